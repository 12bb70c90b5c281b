"""The training demo's baseline and table, and that its data suit its configuration."""

import signal
import sys

import h5py
import numpy as np
import pytest
import torch

import demo_train
from configs.schema import Config
from datasets import balls_preparation
from eval.eval_gen_metrics import OverTime
from tests.balls import SMALL
from tests.runs import before


def test_the_baseline_is_the_last_frame_seen(balls_data):
    config = Config.from_dict({**SMALL, "root": balls_data})  # 3 frames are seen, 6 in all
    psnr, error = demo_train.still_frame(config)
    with h5py.File(f"{balls_data}/test.hdf5") as file:
        images, positions = file["imgs"][:] / 255.0, file["positions"][:]
    for i, t in enumerate(range(3, 6)):
        mean_squares = ((images[:, t] - images[:, 2]) ** 2).mean((1, 2, 3))
        assert psnr[i] == pytest.approx((-10 * np.log10(mean_squares + 1e-8)).mean(), rel=1e-4)
        assert error[i] == pytest.approx(np.linalg.norm(positions[:, t] - positions[:, 2], axis=-1).mean(), rel=1e-4)


def test_the_demos_videos_are_those_its_configuration_is_for():
    config = Config.load("demo")
    args = balls_preparation.parse_arguments(["--out", config.root, *demo_train.BALLS.split()])
    assert args.image_size == config.image_size
    assert args.num_frames >= max(config.animation_horizon, config.timestep_horizon + 1)
    assert args.num_balls <= config.n_kp_enc
    assert args.val == config.val_size


def test_the_demos_configuration_trains_particles_first_then_both_and_then_the_dynamics_alone():
    config = Config.load("demo")
    assert 0 < config.start_dyn_epoch < config.dyn_only_epoch < config.num_epochs


def test_a_signal_ends_it_with_the_signals_status(tmp_path, monkeypatch, capsys):
    small = "--train 3 --val 2 --test 1 --num_frames 16 --num_balls 2 --radius 4 --image_size 32 --processes 1"
    monkeypatch.setattr(demo_train, "BALLS", small)
    before(monkeypatch, "_step", 1, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["demo_train.py", "--root", "data", "--val_size", "2"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        demo_train.main()
    assert "stopped at epoch 0, iteration 2; go on with: python train_ddlp.py --resume demo_output/" in (
        capsys.readouterr().out
    )


def test_the_table_has_every_predicted_frame_and_says_at_how_many_the_model_is_better(capsys):
    config = Config.from_dict({**SMALL, "root": "."})  # 3 frames are seen, 6 in all
    measured = {name: OverTime.empty(3, "cpu") for name in ("psnr", "position_error", "tracked")}
    measured["psnr"].add(torch.tensor([20.0, 15.0, 10.0])[:, None])
    measured["position_error"].add(torch.tensor([1.0, 6.0, 9.0])[:, None])
    measured["tracked"].add(torch.tensor([1.0, 0.5, 0.0])[:, None])
    demo_train.report(config, measured, ([12.0, 12.0, 12.0], [3.0, 5.0, 7.0]))
    *table, verdict = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in table[2:]]
    assert rows == [
        ["3", "20.00", "12.00", "1.00", "3.00", "1.00"],
        ["4", "15.00", "12.00", "6.00", "5.00", "0.50"],
        ["5", "10.00", "12.00", "9.00", "7.00", "0.00"],
        ["mean", "15.00", "12.00", "5.33", "5.00", "0.50"],
    ]
    assert verdict == "DDLP beats the still frame at 2 of 3 frames in PSNR, at 1 in position"
