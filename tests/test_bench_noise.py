"""The benchmark of the noise that PINT sees in training."""

import numpy as np
import pytest
import torch

from benchmarks import bench_noise
from datasets.balls_preparation import BallsOptions, make_episodes
from utils.errors import UserError


def test_errors_are_those_of_the_files_positions(capsys):
    """The still frame's row, against the positions that balls_preparation.py writes."""
    bench_noise.main(["--noise", "0", "0.5:0", "--steps", "2", "--episodes", "3", "--test_episodes", "4"])
    head, still, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[2:] == ["1", "5", "10", "20", "30"] and [row[0] for row in rows] == ["0", "0.5:0"]
    positions = make_episodes(BallsOptions(num_frames=60), "test", range(4))["positions"]
    expected = [
        np.linalg.norm(positions[:, 9] - positions[:, 9 + ahead], axis=-1).mean() for ahead in (1, 5, 10, 20, 30)
    ]
    assert [float(value) for value in still[2:]] == pytest.approx(expected, abs=0.006)
    assert all(0 < float(value) < 100 for row in rows for value in row[1:])


@pytest.mark.parametrize("text, levels", [("0.02", (0.02, 0.02)), ("0.03:0.01", (0.03, 0.01)), ("0", (0, 0))])
def test_noise_is_a_number_or_falls(text, levels):
    assert bench_noise.parsed_noise(text) == levels


@pytest.mark.parametrize("text", ["x", "-1", "0.1:", "0.1:nan", "inf", "0.1:0.2:0.3"])
def test_other_noise_is_refused(text):
    with pytest.raises(UserError, match=r"--noise is .*; legal: a number of at least 0, or FROM:TO"):
        bench_noise.parsed_noise(text)


@pytest.mark.parametrize("lr", ["0", "-1", "nan", "inf"])
def test_other_learning_rates_are_refused(lr):
    with pytest.raises(UserError, match=r"--lr is .*; legal: a finite number above 0"):
        bench_noise.main([f"--lr={lr}"])


@pytest.mark.parametrize("dropout", ["1", "-0.1", "nan"])
def test_other_dropout_is_refused(dropout):
    with pytest.raises(UserError, match=r"--dropout is .*; legal: at least 0 and below 1"):
        bench_noise.main([f"--dropout={dropout}"])


@pytest.mark.parametrize("options, begins", [([], True), (["--no-identity_init"], False)])
def test_pint_begins_as_it_is_told(options, begins, monkeypatch, capsys):
    made, dynamics = [], bench_noise.DynamicsDLP

    def noting(*arguments, **settings):
        made.append(dynamics(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(bench_noise, "DynamicsDLP", noting)
    sizes = ["--steps", "1", "--episodes", "2", "--test_episodes", "1"]
    bench_noise.main(["--noise", "0", "--lr", "1e-12", *sizes, *options])
    positions = torch.tensor([[0.3, -0.7]])
    found = made[0].particle_projection.xy_projection(positions)
    assert torch.allclose(found, positions, atol=1e-6) is begins
