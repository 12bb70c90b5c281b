"""How well DLPv2 finds objects whose positions are known, as `eval/eval_gen_metrics.py` measures it."""

import json
import math

import h5py
import numpy as np
import pytest
import torch

from datasets.shapes_ds import ShapesDataset
from eval import eval_gen_metrics
from eval.tracking import detection_quality
from tests.balls import ROOT, make_run
from tests.runs import run_script
from utils.errors import UserError
from utils.plotting import save_image


def test_each_object_gets_one_particle_and_absent_ones_none():
    truth = torch.tensor([[[10.0, 10.0], [30.0, 30.0]], [[20.0, 20.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    present = torch.tensor([[1, 1], [1, 0], [0, 0]]) > 0
    points = torch.tensor(
        [
            [[10.0, 13.0], [11.0, 10.0], [50.0, 50.0]],  # two on object 0, none on object 1
            [[20.0, 24.0], [60.0, 60.0], [20.0, 20.0]],  # the nearest one is hidden
            [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]],
        ]
    )
    visible = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]) > 0
    error, found, visible_per_object = detection_quality(points, visible, truth, present, torch.full((3, 2), 5.0))
    # In image 0 the sum is smallest where particle 1 is object 0's, and object 1 gets the nearer of the others.
    expected = torch.tensor([[1.0, math.hypot(20, 17)], [4.0, torch.nan], [torch.nan, torch.nan]])
    torch.testing.assert_close(error, expected, equal_nan=True)
    torch.testing.assert_close(
        found, torch.tensor([[1.0, 0.0], [1.0, torch.nan], [torch.nan, torch.nan]]), equal_nan=True
    )
    torch.testing.assert_close(visible_per_object, torch.tensor([1.5, 2.0, torch.nan]), equal_nan=True)


def test_annotated_shapes_lie_where_they_are_drawn(tmp_path):
    shapes = ShapesDataset(tmp_path, "test", num_images=6)
    annotated = shapes.annotated()
    assert len(annotated) == 6
    for index, (image, positions, sizes, ids, in_camera) in enumerate(annotated):
        boxes = shapes.boxes(index)
        count = len(boxes)
        assert torch.equal(image, shapes[index][0])
        assert positions.shape == (5, 2) and ids.tolist() == [*range(1, count + 1), *[0] * (5 - count)]
        assert in_camera.tolist() == [1] * count + [0] * (5 - count)
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert np.array_equal(positions[:count].numpy(), middles)
        assert np.array_equal(sizes[:count].numpy(), (boxes[:, 2:] - boxes[:, :2]).min(1) / 2)


def test_the_command_measures_dlpv2_on_images(tmp_path, balls_data, monkeypatch, capsys):
    """Its numbers against those computed here, image by image, by the definitions."""
    run = make_run(tmp_path, balls_data, 1, "dlp")
    arguments = ("-p", run.path, "-b", 7, "--metrics", "psnr", "position")
    assert run_script(monkeypatch, ROOT, "eval/eval_gen_metrics.py", *arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((run.path / "eval" / "last_val_image_metrics.json").read_text())
    assert set(found) == {"psnr", "position_error", "found", "visible_per_object"}
    with h5py.File(f"{balls_data}/test.hdf5") as file:
        images = torch.from_numpy(file["imgs"][:]).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        positions = file["positions"][:].reshape(len(images), -1, 2)
        in_view = file["in_camera"][:].reshape(len(images), -1) > 0
    with torch.no_grad():
        output = run.load_model()(images, deterministic=True)
    psnr = -10 * (output["rec"] - images).square().mean((1, 2, 3)).log10()
    assert found["psnr"] == pytest.approx(psnr.mean().item(), abs=1e-3)
    visible = (output["obj_on"] > 0.5).sum(-1).numpy()
    assert found["visible_per_object"] == pytest.approx((visible / in_view.sum(-1)).mean(), rel=1e-6)
    assert f"{len(images)} images of balls, test" in printed and f"{found['found']:.4f}" in printed
    # The best assignment of one particle per ball is never nearer than every ball's nearest particle.
    points = ((output["z"] + 1) / 2 * 31 + 0.5).numpy()
    nearest = np.linalg.norm(points[:, :, None] - positions[:, None], axis=-1).min(1)[in_view].mean()
    assert nearest <= found["position_error"] < 32


def test_the_command_measures_dlpv2_on_shapes(tmp_path, monkeypatch):
    class FewShapes(ShapesDataset):
        def __init__(self, root, mode, image_size, num_images):
            super().__init__(root, mode, image_size, num_images=12)

    monkeypatch.setattr("datasets.shapes_ds.ShapesDataset", FewShapes)
    run = make_run(tmp_path, str(tmp_path / "shapes"), 1, "dlp", ds="shapes")
    eval_gen_metrics.main(["-p", str(run.path), "--metrics", "ssim", "position"])
    found = json.loads((run.path / "eval" / "last_val_image_metrics.json").read_text())
    assert 0 <= found["found"] <= 1 and 0 < found["position_error"] < 46 and -1 < found["ssim"] < 1


def test_position_needs_known_objects(tmp_path):
    for number in range(30):
        folder = tmp_path / "videos" / f"clip{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 32, 32), folder / f"{number}.png")
    run = make_run(tmp_path, str(tmp_path / "videos"), 1, "dlp", ds="video_folder")
    with pytest.raises(UserError, match="this data set does not know where its objects are; legal: shapes"):
        eval_gen_metrics.main(["-p", str(run.path), "--use_train", "--metrics", "position"])
