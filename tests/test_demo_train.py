"""The training demo's baseline, and that its data suit its configuration."""

import h5py
import numpy as np
import pytest

import demo_train
from configs.schema import Config
from datasets import balls_preparation
from tests.balls import SMALL


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
