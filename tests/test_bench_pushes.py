"""The benchmark of predicted collisions."""

import shutil

import h5py
import torch

from benchmarks import bench_pushes
from tests.balls import COND, HORIZON


def test_ways_are_those_of_bodies_that_stand():
    """Of four bodies one moves while it is seen and one is out of view; the others' particles are the nearest ones."""
    truth = torch.tensor([[5.0, 5], [20, 20], [10, 25], [28, 4]]).repeat(4, 1, 1)
    truth[:, 0, 1] += torch.tensor([0, 0, 0, 4.0])  # pushed
    truth[:, 1, 0] += torch.tensor([0, 1.0, 2, 3])  # moves
    present = torch.ones(4, 4, dtype=torch.bool)
    present[3, 2] = False
    points = truth[:, [3, 0, 1, 2]].clone()  # of the particles, in another order
    points[3, 1] += torch.tensor([2.0, -3])
    true, predicted = bench_pushes.ways(points, torch.ones(4, 4, dtype=torch.bool), truth, present, 2)
    torch.testing.assert_close(true, torch.tensor([[0.0, 4], [0, 0]]))
    torch.testing.assert_close(predicted, torch.tensor([[2.0, 1], [0, 0]]), atol=1e-5, rtol=0)


def test_the_report_is_of_pushes_and_of_what_is_left_alone():
    true = torch.tensor([[3.0, 4], [0, 10], [0, 0.4], [1, 1]])  # the last one is neither
    predicted = torch.tensor([[3.0, 0], [0, -2], [0, 6], [50, 0]])
    lines = list(bench_pushes.report(true, predicted))
    assert [line.split()[-1] for line in lines] == ["2", "7.50", "2.50", "-0.20", "8.00", "0.50", "1", "6.00", "1.00"]
    assert next(bench_pushes.report(true[2:3], predicted[2:3])) == "bodies that are pushed: 0"


def test_bodies_of_the_data_set(run, balls_data, tmp_path, capsys):
    """All videos with one ball that stands and is pushed by five pixels, and others that go on moving."""
    shutil.copytree(balls_data, tmp_path / "pushed")
    with h5py.File(tmp_path / "pushed" / "test.hdf5", "r+") as file:
        positions = file["positions"][:]
        positions[:, :, 0] = positions[:, :1, 0]
        positions[:, COND:, 0, 1] += 5
        positions[:, :, 1:, 0] += 2 * torch.arange(positions.shape[1]).view(1, -1, 1).numpy()
        file["positions"][:] = positions
    arguments = ["-p", str(run.path), "-c", str(COND), "--horizon", str(HORIZON)]
    bench_pushes.main([*arguments, "--root", str(tmp_path / "pushed"), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"bodies that are pushed: {len(positions)}"
    assert lines[1].split() == ["way,", "pixels", "5.00"] and lines[-1] == "bodies that are left alone: 0"
