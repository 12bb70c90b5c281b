"""The shipped models do what their README says, on videos that are made here."""

import pytest
import torch

from datasets import balls_preparation
from datasets.get_dataset import get_video_dataset
from eval.tracking import pixel_positions
from rundir import load_model
from tests.balls import ROOT

CHECKPOINTS = ROOT / "checkpoints"


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    """Eight videos [8, 10, 3, 64, 64] of three balls, and where the balls are, in pixels [8, 10, 3, 2]."""
    folder = tmp_path_factory.mktemp("balls64")
    sizes = "--train 1 --val 1 --test 8 --num_frames 20 --processes 1 --seed 7"
    balls_preparation.main(["--out", str(folder), *sizes.split()])
    items = list(get_video_dataset("balls", str(folder), 10, "test", 64))
    return torch.stack([item[0][:10] for item in items]), torch.stack([item[1][:10] for item in items])


def test_ddlp_balls_finds_and_draws_the_balls(balls):
    videos, positions = balls
    model = load_model(CHECKPOINTS / "ddlp-balls")
    particles = model.track(videos)
    error = (model.render(particles) - videos).square().mean().item()
    assert error < 10**-2.3  # 23 dB
    points = pixel_positions(particles.z, 64)
    nearest = (points[:, :, :, None] - positions[:, :, None]).norm(dim=-1).amin(2)  # [8, 10, 3], pixels
    assert (nearest < 1).float().mean() > 0.85


def test_every_shipped_file_is_small():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert files and all(path.stat().st_size <= 12e6 for path in files)
