"""The demo: what it moves, what it writes, and that it runs from a fresh clone."""

from html.parser import HTMLParser

import pytest
import torch

import demo
from datasets.examples import Examples
from eval.tracking import pixel_positions
from rundir import load_model
from what_if import what_if


@pytest.fixture(scope="module")
def balls():
    return Examples(demo.ROOT / "assets" / "balls")


@pytest.fixture(scope="module")
def ddlp():
    return load_model(demo.ROOT / "checkpoints" / "ddlp-balls")


def test_the_first_object_is_moved_towards_the_middle(balls, ddlp):
    video, positions, sizes, *_ = balls[0]
    edit = demo.move_first_object(ddlp, video, positions, sizes)
    with torch.no_grad():
        tracked = ddlp.track(video[None, : demo.SEEN]).map(lambda x: x[0, -1])
    centre, radius = positions[demo.SEEN - 1, 0], sizes[demo.SEEN - 1, 0]
    distance = (pixel_positions(tracked.z, 64) - centre).norm(dim=-1)
    assert all(distance[k] < radius and tracked.obj_on[k] > 0.5 for k in edit.particles)
    others = [k for k in range(len(distance)) if k not in edit.particles]
    assert all(distance[k] >= radius or tracked.obj_on[k] <= 0.5 for k in others)
    assert torch.tensor(edit.values).norm().item() == pytest.approx(demo.MOVE, rel=1e-4)
    before = tracked.z[list(edit.particles)].mean(0)
    assert (before + torch.tensor(edit.values)).norm() < before.norm()
    compared = what_if(ddlp, video, [edit], horizon=demo.SEEN + 1, cond_steps=demo.SEEN)
    moved = compared.altered_particles.z[demo.SEEN - 1] - compared.particles.z[demo.SEEN - 1]
    torch.testing.assert_close(moved[list(edit.particles)].mean(0), torch.tensor(edit.values), rtol=0, atol=1e-5)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.pictures, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.cells.append(data.strip())


def test_the_demo_writes_a_page_of_pictures_and_numbers(tmp_path, monkeypatch, capsys):
    class Two(Examples):
        def __init__(self, folder):
            super().__init__(folder)
            self.folders = self.folders[:2]

    monkeypatch.setattr(demo, "Examples", Two)
    monkeypatch.setattr(demo, "SHOWN", 1)
    monkeypatch.chdir("/")  # it finds the models and examples of its own checkout
    demo.main(["--out", str(tmp_path / "out"), "--cpu"])
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert len(page.pictures) == len(set(page.pictures)) == 5
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in page.pictures)
    rows = [cell for cell in page.cells if cell.startswith("position error (pixels)")]
    assert rows == [
        "position error (pixels)",
        "position error (pixels): DDLP",
        "position error (pixels): last frame stays",
        "position error (pixels): particles straight on",
    ]
    printed = capsys.readouterr().out
    assert "Videos from nothing" in printed and str(tmp_path / "out" / "index.html") in printed
