"""What the editor edits, without a window: selection, edits, undo, frames between, files; models and examples."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from editor.scene import Scene, dataset_of, find_examples, find_models, generate, open_clip, open_model
from editor.state import EditorState, in_between, join
from modules.particles import Particles
from rundir.edits import Edit, EditFile, apply_edits
from tests.editor_models import SEEN, K, scattered_particles, write_frames
from tests.small_dlp import images
from utils.errors import UserError


def new_state(particles=None, dynamic=True, edits=()):
    loaded = SimpleNamespace(path="checkpoints/ddlp-balls", kind="ddlp", is_dynamic=dynamic, config=None)
    return EditorState(Scene(loaded, particles or scattered_particles(), None, "video", None), edits)


def placed(*points):
    """`Particles` of one frame at (y, x)s, of half the image's side, all visible."""
    n = len(points)
    z = torch.tensor(points)[None, None]
    return Particles(z, torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 1), torch.ones(1, 1, n), torch.zeros(1, 1, n, 2))


# ------------------------------------------------------------------------------------------------------- the selection


def test_the_nearest_particle_within_reach_is_picked():
    state = new_state(placed((0.0, 0.0), (0.0, 0.1), (0.5, 0.5)))
    assert state.pick(0.01, 0.08, 0.1) == 1 and state.pick(0.01, 0.02, 0.1) == 0
    assert state.pick(-0.5, -0.5, 0.1) is None


def test_of_particles_at_one_place_a_selected_then_a_visible_one_is_picked():
    particles = placed((0.0, 0.0), (0.0, 0.001), (0.001, 0.0))
    particles.obj_on[0, 0, 0] = 0
    state = new_state(particles)
    assert state.pick(0.0, 0.0, 0.1) == 1
    state.select([2])
    assert state.pick(0.0, 0.0, 0.1) == 2


def test_a_rectangle_selects_what_lies_in_it_whichever_way_it_is_drawn():
    state = new_state(placed((0.0, 0.0), (0.2, -0.1), (0.5, 0.5)))
    assert state.within(-0.1, -0.2, 0.3, 0.1) == state.within(0.3, 0.1, -0.1, -0.2) == (0, 1)


def test_selections_are_extended_and_taken_back():
    state = new_state()
    state.select([2])
    state.select([0, 2], extend=True)
    assert state.selection == (2, 0)
    state.select([2], extend=True)
    assert state.selection == (0,)
    state.select([3, 1])
    assert state.selection == (3, 1)


def test_all_visible_ones_are_selected():
    particles = placed((0.0, 0.0), (0.2, -0.1), (0.5, 0.5))
    particles.obj_on[0, 0, 1] = 0.2
    state = new_state(particles)
    state.select_all()
    assert state.selection == (0, 2)


def test_the_particles_of_one_object_overlap():
    # A side of half the image is 1 in these units: the centres of one object's particles are at most 0.25 apart.
    assert new_state(placed((0.0, 0.0), (0.2, 0.2), (0.3, 0.0), (-0.1, 0.0))).overlapping(0) == (0, 1, 3)


# ------------------------------------------------------------------------------------------------------------- edits


def test_edits_are_of_the_shown_frame_or_of_all():
    state = new_state()
    state.select([1, 2])
    assert state.move(0.1, 0.2) == (Edit("move", (1, 2), (0.1, 0.2), SEEN - 1),)
    state.time = 2
    assert state.scale(1.5) == (Edit("scale", (1, 2), (1.5,), 2),) and state.depth(-1)[0].frame == 2
    assert state.remove() == (Edit("remove", (1, 2)),) and state.transparency(0.3)[0].frame is None
    assert state.appearance(3) == (Edit("appearance", (1, 2), (3.0,)),)
    state.is_whole = True
    assert state.move(0.1, 0.2)[0].frame is None
    assert new_state(scattered_particles(1), dynamic=False).is_whole


def test_without_a_selection_nothing_is_edited():
    state = new_state()
    assert state.move(0.1, 0.1) == state.remove() == state.scale(2) == () and not state.commit(state.move(0.1, 0.1))


def test_values_are_such_that_a_command_line_says_them_exactly():
    state = new_state()
    state.select([1])
    edit = state.move(1 / 3, -2 / 3)[0]
    assert edit.values == (0.3333, -0.6667) and edit.option() == ("--move", "1@4:0.3333,-0.6667")


def test_a_preview_is_shown_but_not_done():
    state = new_state()
    state.select([1])
    before = state.particles
    state.preview(state.move(0.3, 0.0))
    torch.testing.assert_close(state.shown.z[0, 1], before.z[0, -1, 1] + torch.tensor([0.3, 0.0]))
    assert state.edits == () and not state.can_undo
    state.preview(())
    assert torch.equal(state.particles.z, before.z)


def test_a_particle_is_not_scaled_beyond_what_it_can_be():
    state = new_state()
    state.select([0])
    state.commit(state.scale(1000))
    assert 0.9 < state.side(0) < 1 and torch.isfinite(state.particles.z_scale).all()
    state.commit(state.scale(1e-9))
    assert 0.005 < state.side(0) < 0.02


def test_sliders_set_the_first_particle_and_change_the_others_as_much():
    state = new_state()
    state.select([2, 0])
    ratio = state.side(0) / state.side(2)
    state.commit(state.scale_to(0.3))
    assert state.side(2) == pytest.approx(0.3, rel=1e-3) and state.side(0) == pytest.approx(0.3 * ratio, rel=1e-3)
    difference = state.shown.z_depth[0, 0, 0] - state.shown.z_depth[0, 2, 0]
    state.commit(state.depth_to(-2.5))
    assert state.shown.z_depth[0, 2, 0].item() == pytest.approx(-2.5, abs=1e-3)
    torch.testing.assert_close(state.shown.z_depth[0, 0, 0] - state.shown.z_depth[0, 2, 0], difference)


def test_undo_and_redo_go_through_everything():
    state = new_state()
    state.select([1])
    seen = [state.particles.z]
    for i in range(100):
        state.commit(state.move(0.001 * (i + 1), 0.0))
        seen.append(state.particles.z)
    for z in reversed(seen[:-1]):
        assert state.undo() and torch.equal(state.particles.z, z)
    assert not state.undo() and not state.can_undo
    for z in seen[1:]:
        assert state.redo() and torch.equal(state.particles.z, z)
    assert not state.redo()


def test_a_new_edit_takes_the_place_of_what_was_undone():
    state = new_state()
    state.select([1])
    for kind in (state.move(0.1, 0), state.depth(1), state.remove()):
        state.commit(kind)
    state.undo(), state.undo()
    state.commit(state.transparency(0.5))
    assert [edit.kind for edit in state.edits] == ["move", "transparency"] and not state.can_redo


def test_a_gesture_is_undone_as_one():
    state = new_state()
    state.select([1])
    state.commit(state.move(0.1, 0.0))
    for _ in range(3):
        state.commit(state.move(0.01, 0.02), gesture="nudge 1")
    assert state.edits[1:] == (Edit("move", (1,), (0.03, 0.06), 4),)
    state.commit(state.move(0.01, 0.0), gesture="nudge 2")
    assert len(state.edits) == 3
    state.undo(), state.undo()
    assert state.edits == (Edit("move", (1,), (0.1, 0.0), 4),)


def test_a_gesture_does_not_join_what_differs():
    state = new_state()
    state.select([1])
    state.commit(state.move(0.1, 0.0), "a")
    state.time = 1
    state.commit(state.move(0.1, 0.0), "a")
    assert [edit.frame for edit in state.edits] == [4, 1]
    assert state.undo() and state.edits == () and state.undo() is False


@pytest.mark.parametrize(
    ("kind", "first", "second", "joined"),
    [
        ("move", (0.1, 0.2), (0.2, -0.2), (0.3, 0.0)),
        ("depth", (1.0,), (0.5,), (1.5,)),
        ("scale", (1.5,), (2.0,), (3.0,)),
        ("transparency", (0.5,), (0.25,), (0.25,)),
        ("appearance", (3.0,), (0.0,), (0.0,)),
        ("remove", (), (), ()),
    ],
)
def test_two_edits_in_a_row_are_joined_into_one_that_does_the_same(kind, first, second, joined):
    first, second = Edit(kind, (1, 2), first), Edit(kind, (1, 2), second)
    assert join(first, second) == Edit(kind, (1, 2), joined) and join(first, replace(second, particles=(1,))) is None
    particles = scattered_particles()
    once, twice = apply_edits(particles, [join(first, second)]), apply_edits(particles, [first, second])
    for a, b in zip(once.leaves(), twice.leaves(), strict=True):
        torch.testing.assert_close(a, b)


def test_edits_that_change_nothing_are_no_edits():
    state = new_state()
    state.select([1])
    for idle in (state.move(0, 0), state.scale(1), state.depth(0), state.appearance(1)):
        assert not state.commit(idle)
    assert not state.can_undo


def test_reset_can_be_undone():
    state = new_state()
    state.select([1])
    state.commit(state.move(0.1, 0))
    assert state.reset() and state.edits == () and not state.reset()
    assert state.undo() and len(state.edits) == 1


def test_frames_between_lie_on_straight_lines():
    before, after = scattered_particles(1, seed=1).frames(0), scattered_particles(1, seed=2).frames(0)
    line = in_between(before, after)
    assert line.z.shape == (10, K, 2) and line.obj_on.shape == (10, K)
    for a, b, steps in zip(before.leaves(), after.leaves(), line.leaves(), strict=True):
        torch.testing.assert_close(steps[9:], b)
        torch.testing.assert_close(steps[4:5], (a + b) / 2)
        torch.testing.assert_close(steps[:1], a + (b - a) / 10)


# ------------------------------------------------------------------------------------------------- files and commands


def test_what_is_saved_is_what_is_edited(tmp_path):
    state = new_state()
    state.select([1, 2])
    state.commit(state.move(0.1, -0.2))
    assert state.is_modified
    state.save(tmp_path / "edits.json")
    assert not state.is_modified and EditFile.read(tmp_path / "edits.json") == state.file()
    again = new_state(edits=EditFile.read(tmp_path / "edits.json").edits)
    assert torch.equal(again.particles.z, state.particles.z) and not again.is_modified
    state.undo()
    assert state.is_modified
    expected = "python what_if.py -p checkpoints/ddlp-balls --video video -c 5 --horizon 65"
    assert state.command() == expected
    state.redo()
    assert state.command() == f"{expected} --move 1,2@4:0.1,-0.2"


def test_edits_of_particles_that_are_not_there_do_not_open():
    with pytest.raises(UserError, match="there is no particle 9; legal: 0 to 3"):
        new_state(edits=[Edit("remove", (9,))])


# ------------------------------------------------------------------------------------------------ models and examples


def test_models_and_examples_are_found_by_their_names(place, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "dlp-mine").mkdir()
    (tmp_path / "ddlp-file").write_text("")
    assert list(find_models(tmp_path)) == ["dlp-mine"] and find_models(tmp_path / "missing") == {}
    assert list(find_models(place / "checkpoints")) == ["ddlp-balls", "diffuse-ddlp-balls", "dlp-shapes"]
    assert [dataset_of(name) for name in ("diffuse-ddlp-a-b", "dlp-x", "ddlp", "other-x")] == ["a-b", "x", "", ""]
    (place / "assets" / "balls" / "10").mkdir()
    assert list(find_examples(place / "assets", "balls")) == ["balls 0", "balls 1", "balls 10"]
    (place / "assets" / "balls" / "10").rmdir()
    assert find_examples(place / "assets", "traffic") == {}


def test_an_image_a_video_and_generated_frames_become_scenes(place):
    cpu = torch.device("cpu")
    dlp, ddlp, diffuse = (
        open_model(place / "checkpoints" / name, cpu) for name in ("dlp-shapes", "ddlp-balls", "diffuse-ddlp-balls")
    )
    image = open_clip(dlp, place / "assets" / "shapes" / "0")
    assert image.particles.z.shape == (1, 1, K, 2) and image.horizon == 1 and not dlp.is_dynamic
    clip = open_clip(ddlp, place / "assets" / "balls" / "0")
    assert clip.num_frames == SEEN and clip.horizon == SEEN + 60 and clip.note == ""
    torch.testing.assert_close(clip.particles.z, ddlp.model.track(clip.frames[None, :SEEN]).z)
    assert open_clip(ddlp, place / "assets" / "balls" / "0", 2).num_frames == 2
    done = []
    generated = generate(diffuse, 3, done.append)
    assert generated.frames is None and generated.seed == 3 and generated.num_frames == 4 == len(done) and done[0] == 0
    assert torch.equal(generated.particles.z, generate(diffuse, 3).particles.z)
    with pytest.raises(UserError, match="sees no videos; legal: Generate"):
        open_clip(diffuse, place / "assets" / "balls" / "0")


def test_frames_of_another_size_are_taken_and_named_and_too_few_are_refused(place, tmp_path):
    ddlp = open_model(place / "checkpoints" / "ddlp-balls", torch.device("cpu"))
    write_frames(tmp_path / "large", images(6, size=48)[..., :40])
    scene = open_clip(ddlp, tmp_path / "large")
    assert scene.note == "40 x 48 pixels, shown to the model as 32 x 32" and scene.frames.shape == (6, 3, 32, 32)
    write_frames(tmp_path / "short", images(3))
    with pytest.raises(UserError, match=re.escape("short: has 3 frames; legal for ddlp-balls: at least 4")):
        open_clip(ddlp, tmp_path / "short")
    write_frames(tmp_path / "four", images(4))
    assert open_clip(ddlp, tmp_path / "four").num_frames == 4
