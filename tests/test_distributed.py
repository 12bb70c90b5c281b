"""Training on two processes, as `accelerate launch` starts one per device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_dlp
from eval.eval_gen_metrics import eval_ddlp_im_metric
from rundir.run import Run
from tests.balls import make_data, write_config
from tests.test_training import SMALL
from utils import checkpoints
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
# Trains as train_dlp_accelerate.py does, and writes what each process ends with.
SCRIPT = """
import sys
import torch
from {script} import main
from training.loop import Trainer

fit = Trainer.fit

def fit_and_keep(trainer, run):
    fit(trainer, run)
    torch.save(trainer.bare_model.state_dict(), f"weights_{trainer.accelerator.process_index}.pth")

Trainer.fit = fit_and_keep
main(sys.argv[1:])
"""


def launch(folder, script):
    """Train with `small.json` on two processes; returns the run directory."""
    (folder / "script.py").write_text(SCRIPT.replace("{script}", script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, "script.py", "-d", "small.json"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = folder.glob("*_*dlp")
    return run


def assert_one_model(folder, run):
    """Both processes ended with the same weights, which are those saved. Returns the records."""
    first, second = (checkpoints.load(folder / f"weights_{process}.pth") for process in (0, 1))
    saved = checkpoints.load(Run.open(run).weights_path())
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], saved[name]) for name in first)
    states = checkpoints.load(run / "saves" / "training_state.pt")["random_states"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_one_model_in_one_run_directory(tmp_path):
    config = {**SMALL, "root": str(tmp_path / "data"), "num_epochs": 2, "batch_size": 3, "eval_epoch_freq": 2}
    (tmp_path / "small.json").write_text(json.dumps(config))
    run = launch(tmp_path, "train_dlp")
    records = assert_one_model(tmp_path, run)
    assert [record["iteration"] for record in records] == [4, 8]  # 24 images, 2 processes of 3 images
    assert (run / "log.txt").read_text().count("epoch 0 iteration 4 ") == 1
    with pytest.raises(UserError, match=r"was trained by 2 process\(es\); it can only go on with as many"):
        train_dlp.main(["--resume", str(run)])


def test_two_processes_train_and_measure_one_ddlp(tmp_path):
    write_config(tmp_path, make_data(tmp_path / "data"), eval_epoch_freq=2, val_size=None, dyn_only_epoch=1)
    run = launch(tmp_path, "train_ddlp")
    records = assert_one_model(tmp_path, run)
    assert [record["iteration"] for record in records] == [2, 4]  # 16 clips, 2 processes of 4 clips
    # The four videos' metrics, two from each process, are those of one process alone.
    opened = Run.open(run)
    alone = eval_ddlp_im_metric(
        opened.load_model(),
        "cpu",
        opened.config,
        opened.config.animation_horizon,
        eval_dir=tmp_path,
        cond_steps=opened.config.cond_steps,
        metrics=("ssim", "psnr"),
    )
    # The correlation maps' norm is the whole batch's, so that it matters a little which videos are together.
    assert {name: records[1][name] for name in alone} == pytest.approx(alone, rel=1e-3)
    assert len(list((run / "figures").glob("e1_traj_anim_*.gif"))) == 4
