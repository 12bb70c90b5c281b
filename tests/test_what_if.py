"""Edits of particles and what they do to predictions: `what_if.py` from Python and from the command line."""

import re

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import what_if as command
from modules.particles import Particles
from rundir.edits import EDITS, Edit, apply_edits, parse_edit
from tests import small_dlp
from tests.balls import COND, HORIZON, predict, run_in, videos
from utils import checkpoints
from utils.animation import Panel, ground_truth_panel, prediction_panel, side_by_side
from utils.errors import UserError
from utils.plotting import enlarge, particle_colors
from what_if import what_if

K = 4


def particles(frames=3):
    torch.manual_seed(0)
    return Particles(
        torch.rand(1, frames, K, 2) - 0.5,
        torch.randn(1, frames, K, 2) - 1,
        torch.randn(1, frames, K, 1),
        torch.rand(1, frames, K),
        torch.randn(1, frames, K, 3),
        torch.randn(1, frames, 3),
    )


def changed(before, after):
    """(attribute, particle) pairs that differ."""
    return {
        (name, k)
        for name in ("z", "z_scale", "z_depth", "obj_on", "z_features")
        for k in range(K)
        if not torch.equal(getattr(before, name)[:, :, k], getattr(after, name)[:, :, k])
    }


EDITED = {
    "move": (Edit("move", (2,), (0.1, -0.2)), "z", lambda x, p: x + torch.tensor([0.1, -0.2])),
    "place": (Edit("place", (2,), (0.3, 0.4)), "z", lambda x, p: x - p.z[:, -1:, 2] + torch.tensor([0.3, 0.4])),
    "scale": (Edit("scale", (2,), (1.3,)), "z_scale", lambda x, p: (1.3 * torch.sigmoid(x)).clamp(max=0.9999).logit()),
    "depth": (Edit("depth", (2,), (-1.5,)), "z_depth", lambda x, p: x - 1.5),
    "transparency": (Edit("transparency", (2,), (0.25,)), "obj_on", lambda x, p: torch.full_like(x, 0.25)),
    "appearance": (Edit("appearance", (2,), (0,)), "z_features", lambda x, p: p.z_features[:, :, 0]),
    "remove": (Edit("remove", (2,)), "obj_on", lambda x, p: torch.zeros_like(x)),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_one_attribute_in_every_frame(kind):
    edit, name, expected = EDITED[kind]
    before = particles()
    original = before.map(torch.clone)
    after = apply_edits(before, [edit])
    torch.testing.assert_close(getattr(after, name)[:, :, 2], expected(getattr(before, name)[:, :, 2], before))
    assert changed(before, after) == {(name, 2)} and torch.equal(after.z_bg, before.z_bg)
    assert changed(original, before) == set()  # what it was applied to stays as it was


def test_several_particles_are_edited_together():
    before = particles()
    after = apply_edits(before, [parse_edit("move", "1,3:+0.1,-0.2")])
    assert changed(before, after) == {("z", 1), ("z", 3)}
    torch.testing.assert_close(
        after.z - before.z, torch.tensor([0, 1, 0, 1])[:, None] * torch.tensor([0.1, -0.2]) + 0 * before.z
    )


def test_edits_act_before_the_roll_out_and_leave_the_other_prediction_alone(run, balls_data):
    model, video = run.load_model(), videos(balls_data)[0][0]
    edits = [Edit("move", (2,), (0.1, -0.2)), Edit("scale", (1,), (1.3,))]
    compared = what_if(model, video, edits, HORIZON, COND)
    plain, latents = predict(run, video[None])
    torch.testing.assert_close(compared.video, plain[0])
    torch.testing.assert_close(compared.particles.z, latents["z_pos"][0])
    tracked = model.track(video[None, :COND])
    tracked.z[:, :, 2] += torch.tensor([0.1, -0.2])
    tracked.z_scale[:, :, 1] = (1.3 * torch.sigmoid(tracked.z_scale[:, :, 1])).logit()
    with torch.no_grad():
        values = model.dyn_module.sample(
            *(getattr(tracked, name) for name in ("z", "z_scale", "obj_on", "z_depth", "z_features", "z_bg")),
            steps=HORIZON - COND,
            deterministic=True,
        )
    torch.testing.assert_close(compared.altered_particles.z, values[0][0])
    decoded = model.decode_all(
        values[0][0], values[4][0], values[5][0], values[2][0], values[3][0], z_scale=values[1][0]
    )
    torch.testing.assert_close(compared.altered_video, decoded["rec"])


@pytest.mark.parametrize(("edit", "value"), [(Edit("remove", (1,)), 0.0), (Edit("transparency", (1,), (0.3,)), 0.3)])
def test_transparency_stays_as_set_through_the_prediction(edit, value, run, balls_data):
    model, video = run.load_model(), videos(balls_data)[0][0]
    compared = what_if(model, video, [edit], HORIZON, COND)
    assert (compared.altered_particles.obj_on[:, 1] == value).all()
    assert (compared.altered_particles.obj_on[:, [0, 2, 3]] > 0).all()
    assert not (compared.particles.obj_on[:, 1] == value).any()


def test_a_removed_particle_is_not_drawn(run, balls_data):
    model, video = run.load_model(), videos(balls_data)[0][0]
    compared = what_if(model, video, [Edit("remove", tuple(range(K)))], HORIZON, COND)
    torch.testing.assert_close(compared.altered_video, model.bg_module.decode(compared.altered_particles.z_bg))


def test_both_sampled_predictions_are_made_of_the_same_draws(run, balls_data):
    model, video = run.load_model(), videos(balls_data)[0][0]
    torch.manual_seed(3)
    unedited = what_if(model, video, [], HORIZON, COND, deterministic=False)
    assert torch.equal(unedited.video, unedited.altered_video)
    assert not torch.equal(unedited.video, what_if(model, video, [], HORIZON, COND, deterministic=False).video)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("move", "2:0.1", "--move 2:0.1: move has 1 values; legal: 2 DY, DX"),
        ("move", "a:0.1,0.2", "--move a:0.1,0.2: not numbers; legal: --move K[@FRAME]:DY,DX"),
        ("move", "2", "--move 2: move has 0 values; legal: 2 DY, DX"),
        ("remove", "2:1", "--remove 2:1: remove has 1 values; legal: 0"),
        ("remove", "", "--remove : not numbers; legal: --remove K"),
        ("scale", "1:0", "--scale 1:0: scale is 0; legal: above 0"),
        ("scale", "1:nan", "--scale 1:nan: scale is nan; legal: -1e+06 to 1e+06"),
        ("move", "1:inf,0", "--move 1:inf,0: move is inf, 0; legal: -1e+06 to 1e+06"),
        ("transparency", "1:1.5", "--transparency 1:1.5: transparency is 1.5; legal: 0 to 1"),
        ("appearance", "1:0.5", "--appearance 1:0.5: appearance is 0.5; legal: a particle's number"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(kind, text, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        parse_edit(kind, text)


def test_python_calls_are_checked_too(run, balls_data):
    model, video = run.load_model(), videos(balls_data)[0][0]
    with pytest.raises(UserError, match="unknown edit jump; legal: move, place"):
        Edit("jump", (1,))
    with pytest.raises(UserError, match="move: there is no particle 4; legal: 0 to 3"):
        what_if(model, video, [Edit("move", (4,), (0, 0))], HORIZON, COND)
    with pytest.raises(UserError, match="appearance: there is no particle 9; legal: 0 to 3"):
        what_if(model, video, [Edit("appearance", (1,), (9,))], HORIZON, COND)
    with pytest.raises(UserError, match="the video has 2 frames; legal: at least cond_steps, 4"):
        what_if(model, video[:2], [], HORIZON, COND)
    with pytest.raises(UserError, match=r"horizon .* is 4; legal: above cond_steps, 4"):
        what_if(model, video, [], COND, COND)
    with pytest.raises(ValueError, match=r"a video of shape \[1, .*; legal: one video \[F, 3, H, W\]"):
        what_if(model, video[None], [], HORIZON, COND)
    with pytest.raises(TypeError, match=r"a model of type ObjectDLP; legal: an ObjectDynamicsDLP"):
        what_if(small_dlp.build(), video, [], HORIZON, COND)


# ----------------------------------------------------------------------------------------------------- the command


def ask(run, *arguments):
    run_in(run.path, command.main, "-p", run.path, "-c", COND, "--horizon", HORIZON, *arguments)


def keep_within_the_image(run):
    """Weights with which the particles stay where they are proposed."""
    weights = checkpoints.load(run.weights_path())
    for name, value in weights.items():
        if "particle_attribute_enc" in name and ("x_head" in name or "y_head" in name):
            value.zero_()
    checkpoints.save(weights, run.weights_path())


def test_without_edits_the_particles_are_numbered(run, balls_data, capsys):
    keep_within_the_image(run)
    ask(run, "--episode", 3)
    image = torch.from_numpy(iio.imread(run.path / "what_if" / "episode_3_particles.png")).permute(2, 0, 1) / 255
    assert image.shape == (3, 256, 256)
    video = videos(balls_data)[0][3]
    tracked = run.load_model().track(video[None, :COND])
    z, visible = tracked.z[0, -1], tracked.obj_on[0, -1] > 0.5
    assert visible.any()
    plain = enlarge(video[COND - 1], 8)
    for k in range(K):
        y, x = ((z[k] + 1) / 2 * 255).round().int().tolist()
        drawn = torch.allclose(image[:, y, x], particle_colors(K)[k], atol=2 / 255)
        others = [j for j in range(K) if j != k and visible[j] and (z[j] - z[k]).abs().max() < 0.2]
        assert drawn == bool(visible[k]) or others
    assert (image - plain).abs().mean() > 0.001
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["particle", "y", "x", "height", "width", "transparency"]
    for k in range(K):
        numbers = [float(word) for word in lines[1 + k].split()]
        sides = torch.sigmoid(tracked.z_scale[0, -1, k]).tolist()
        assert numbers == pytest.approx([k, *z[k].tolist(), *sides, tracked.obj_on[0, -1, k].item()], abs=0.006)


def test_edits_write_truth_prediction_and_altered_prediction(run, balls_data, capsys):
    ask(run, "--episode", 1, "--move", "2:+0.1,-0.2", "--remove", "0", "--scale", "1:1.3")
    path = run.path / "what_if" / "episode_1.gif"
    assert capsys.readouterr().out.strip() == str(path)
    video = videos(balls_data)[0][1]
    edits = [Edit("move", (2,), (0.1, -0.2)), Edit("remove", (0,)), Edit("scale", (1,), (1.3,))]
    compared = what_if(run.load_model(), video, edits, HORIZON, COND)
    panels = [
        ground_truth_panel(enlarge(video[:HORIZON], 8)),
        prediction_panel(command.draw_particles(compared.video, compared.particles), COND),
        Panel(
            command.draw_particles(compared.altered_video, compared.altered_particles),
            [f"WHAT IF:{t}" for t in range(HORIZON)],
            ["orange"] * HORIZON,
        ),
    ]
    written, expected = iio.imread(path).astype(float), side_by_side(panels)
    assert written.shape == expected.shape and np.abs(written - expected).mean() < 2
    with Image.open(path) as gif:
        assert gif.info["duration"] == 60 and gif.n_frames == HORIZON


def test_edits_are_applied_in_the_order_given(run, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "show_comparison", lambda args, asked, source, edits: seen.extend(edits))
    ask(run, "--scale", "1:2", "--move", "0:0,0.1", "--scale", "1:0.5", "--place", "0:0,0")
    assert [edit.kind for edit in seen] == ["scale", "move", "scale", "place"]
    assert [edit.values for edit in seen] == [(2.0,), (0.0, 0.1), (0.5,), (0.0, 0.0)]


def test_where_it_is_written(run, tmp_path):
    ask(run, "--remove", "0", "--format", "mp4")
    assert len(iio.imread(run.path / "what_if" / "episode_0.mp4")) == HORIZON
    ask(run, "--remove", "0", "--out", tmp_path / "new" / "mine.gif")
    assert (tmp_path / "new" / "mine.gif").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--remove", "0", "--out", "mine.txt"), r"mine\.txt is .*; legal: .*\.gif or \.mp4"),
        (("--remove", "0", "--out", "mine.gif", "--format", "mp4"), r"--format is mp4, but --out is mine\.gif"),
        (("--out", "mine.gif"), r"mine\.gif is no name for an image"),
        (("--format", "mp4"), "--format is mp4, but an image is written"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_computed(arguments, message, run, monkeypatch):
    monkeypatch.setattr(command, "open_source", lambda *_: pytest.fail("computed"))
    with pytest.raises(UserError, match=message):
        ask(run, *arguments)


@pytest.mark.parametrize("episode", [-1, 5])
def test_an_episode_that_is_not_there_is_refused(episode, run):
    with pytest.raises(UserError, match=f"--episode is {episode}; legal: 0 to 4"):
        ask(run, "--episode", episode)


def test_a_particle_that_is_not_there_is_refused_before_anything_is_written(run):
    with pytest.raises(UserError, match="remove: there is no particle 4; legal: 0 to 3"):
        ask(run, "--remove", "4")
    assert not (run.path / "what_if").exists()
