"""The examples in `assets/`: that what is written is read again, and that their truth is where their objects are."""

from pathlib import Path

import pytest
import torch

from assets import make_examples, make_figures
from datasets.examples import Examples, write_example
from utils.errors import UserError

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def test_what_is_written_is_read_again(tmp_path):
    generator = torch.Generator().manual_seed(0)
    written = []
    for number, objects in (("2", 1), ("10", 3)):
        frames = torch.randint(0, 256, (12, 3, 8, 8), generator=generator) / 255
        positions, sizes = torch.rand(12, objects, 2), torch.rand(12, objects)
        in_camera = torch.rand(12, objects) > 0.3
        write_example(tmp_path / number, frames, positions, sizes, in_camera)
        written.append((frames, positions, sizes, in_camera))
    examples = Examples(tmp_path)
    assert len(examples) == 2
    for item, (frames, positions, sizes, in_camera), objects in zip(examples, written, (1, 3), strict=True):
        assert torch.equal(item[0], frames)
        assert torch.equal(item[1][:, :objects], positions) and torch.equal(item[2][:, :objects], sizes)
        assert torch.equal(item[4][:, :objects] > 0, in_camera) and not item[4][:, objects:].any()
        assert torch.equal(item[3], item[4] * torch.tensor([1, 2, 3]))


def test_a_folder_without_examples_is_named(tmp_path):
    with pytest.raises(UserError, match="no examples"):
        Examples(tmp_path)


@pytest.mark.parametrize("data", ["missing", "short"])
def test_examples_are_kept_where_new_ones_cannot_be_made(data, tmp_path, balls_data, monkeypatch):
    (tmp_path / "balls" / "0").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    if data == "short":
        (tmp_path / "data" / "balls").symlink_to(balls_data)
    monkeypatch.setattr(make_examples, "ASSETS", tmp_path)
    with pytest.raises(UserError):
        make_examples.main(["balls", "--data", str(tmp_path / "data")])
    with pytest.raises(SystemExit):
        make_examples.main(["balls", "clevrer", "--data", str(tmp_path / "data")])
    assert (tmp_path / "balls" / "0").is_dir()


def test_examples_are_the_beginnings_of_the_test_sets_videos(tmp_path, balls_data, monkeypatch):
    (tmp_path / "balls" / "old").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "balls").symlink_to(balls_data)
    monkeypatch.setattr(make_examples, "ASSETS", tmp_path)
    monkeypatch.setattr(make_examples, "COUNT", 2)
    monkeypatch.setitem(make_examples.VIDEOS, "balls", make_examples.Videos("balls", "balls", 5, 32))
    make_examples.main(["balls", "--data", str(tmp_path / "data")])
    assert {path.name for path in (tmp_path / "balls").iterdir()} == {"0", "1"}
    assert Examples(tmp_path / "balls")[1][0].shape == (5, 3, 32, 32)


@pytest.mark.parametrize("episode", [-1, 99])
def test_a_figure_of_an_example_that_is_not_there_is_refused(episode, tmp_path):
    with pytest.raises(UserError, match=f"--episode is {episode}; legal: 0 to 9"):
        make_figures.main(["--out", str(tmp_path / "out"), "--episode", str(episode)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "length", "size"), [("shapes", 1, 64), ("balls", 60, 64), ("demo", 16, 32), ("obj3d_like", 60, 64)]
)
def test_the_truth_is_where_the_objects_are(name, length, size):
    """Around the true centres lies what the corner's background is not, in the colour of one object."""
    examples = Examples(ASSETS / name)
    assert len(examples) == 10
    for video, positions, sizes, _, in_camera in examples:
        assert video.shape == (length, 3, size, size) and in_camera.any(-1).all()
        for t in range(0, length, 20):
            corner = video[t][:, 0, 0].tolist()
            background = {"shapes": [0.0, 1.0, 1.0], "obj3d_like": corner}.get(name, [0.0, 0.0, 0.0])
            drawn = (video[t] - torch.tensor(background)[:, None, None]).abs()
            for k in in_camera[t].nonzero()[:, 0]:
                row, column = positions[t, k].long().clamp(max=size - 1)
                assert drawn[:, row, column].amax() > 0.1
                assert 1 < sizes[t, k] < 10
