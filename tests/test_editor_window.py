"""The editor as a person uses it: a real window, with mouse and key events, on a virtual screen."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import what_if
from rundir.edits import Edit, EditFile
from tests.balls import ROOT, run_in
from tests.displays import start_display
from tests.editor_models import HORIZON, SEEN, write_frames
from tests.editor_person import CPU, PRESSED, SHIFT, Person, answer, error_of
from tests.small_dlp import images
from utils.errors import UserError

# ------------------------------------------------------------------------------------------------ models and examples


def test_models_and_examples_are_chosen(person):
    window = person.window
    person.start()
    assert window.source.model_box.get() == "ddlp-balls" and window.source.example_box.get() == "balls 0"
    first = window.image
    assert first.shape == (32, 32, 3) and window.canvas.find_withtag("dot") and window.canvas.find_withtag("path")
    person.choose(window.source.example_box, "balls 1")
    assert not np.array_equal(window.image, first) and "balls/1" in window.title()
    person.choose(window.source.model_box, "dlp-shapes")
    assert window.state.scene.video == "assets/shapes/0" and not window.canvas.find_withtag("path")
    assert window.buttons.play_button.instate(["disabled"]) and not window.times.winfo_ismapped()


def test_generate_samples_other_frames(person):
    window = person.window
    person.start(window.documents.models["diffuse-ddlp-balls"])
    assert window.state.scene.seed == 0 and window.source.example_box.instate(["disabled"])
    first = window.state.particles.z
    window.source.generate_button.invoke()
    person.rest()
    assert window.state.scene.seed == 1 and not torch.equal(window.state.particles.z, first)
    window.source.seed_box.set(0)
    window.source.generate_button.invoke()
    person.rest()
    assert torch.equal(window.state.particles.z, first)
    window.source.seed_box.set("many")
    window.source.generate_button.invoke()
    assert "the seed is 'many'; legal: 0 to 2^32 - 1" in error_of(window)


def test_ones_own_image_video_and_folder_are_opened(at_video, tmp_path, monkeypatch):
    window = at_video.window
    write_frames(tmp_path / "mine", images(6, size=40, seed=5))
    answer(monkeypatch, tmp_path / "mine")
    window.documents.ask_folder()
    at_video.rest()
    assert window.state.scene.video == str(tmp_path / "mine") and window.source.example_box.get() == ""
    assert window.status.message["text"] == "40 x 40 pixels, shown to the model as 32 x 32"
    iio.imwrite(tmp_path / "mine.gif", (255 * images(6, size=32)).byte().permute(0, 2, 3, 1).numpy())
    answer(monkeypatch, tmp_path / "mine.gif")
    window.documents.ask_clip()
    at_video.rest()
    assert window.state.scene.video == str(tmp_path / "mine.gif") and window.state.scene.num_frames == SEEN


def test_a_run_directory_of_ones_own_is_opened(at_image, place, tmp_path, monkeypatch):
    window = at_image.window
    shutil.copytree(place / "checkpoints" / "ddlp-balls", tmp_path / "010126_000000_balls_ddlp")
    answer(monkeypatch, tmp_path / "010126_000000_balls_ddlp")
    window.documents.ask_run()
    at_image.rest()
    assert window.source.model_box.get() == "010126_000000_balls_ddlp" and window.source.example_box.get() == "balls 0"


# ---------------------------------------------------------------------------------------------------- with the mouse


def inside(state, k, particles, margin=3.5):
    """The pixels in a particle's square, [H, W] bool."""
    side = state.scene.loaded.config.image_size
    y, x = ((particles.z[0, k] + 1) / 2 * (side - 1)).tolist()
    height, width = (torch.sigmoid(particles.z_scale[0, k]) * side / 2 + margin).tolist()
    rows, columns = np.indices((side, side))
    return (abs(rows - y) <= height) & (abs(columns - x) <= width)


@pytest.mark.parametrize("kind", ["at_video", "at_image"])
def test_a_dragged_particle_moves_and_the_image_changes_there(kind, request):
    person = request.getfixturevalue(kind)
    window, state = person.window, person.window.state
    before, image = state.shown, window.image
    start = person.point(1)
    k = state.pick(*window.canvas.to_position(*start), 0.02)
    person.drag(start, (start[0] + 60, start[1] - 40))
    (edit,) = state.edits
    assert edit.kind == "move" and edit.particles == (k,) and state.selection == (k,)
    x, y = person.point(k)
    assert abs(x - start[0] - 60) <= 2 and abs(y - start[1] + 40) <= 2
    changed = (window.image != image).any(-1)
    there = inside(state, k, before) | inside(state, k, state.shown)
    assert changed.any() and not changed[~there].any()
    assert edit.frame == (SEEN - 1 if kind == "at_video" else None)


def test_the_image_follows_while_a_particle_is_dragged(at_video):
    window = at_video.window
    image, start = window.image, at_video.point(0)
    at_video.drag(start, (start[0] + 80, start[1]), drop=False)
    at_video.rest()
    assert not np.array_equal(window.image, image) and window.state.edits == ()
    at_video.key("Escape")
    assert np.array_equal(window.image, image) and window.state.edits == ()


def test_without_live_only_update_decodes(at_video):
    window = at_video.window
    window.buttons.is_live.set(False)
    image, start = window.image, at_video.point(0)
    at_video.drag(start, (start[0] + 80, start[1]))
    assert window.state.edits and np.array_equal(window.image, image)
    window.buttons.update_button.invoke()
    at_video.rest()
    assert not np.array_equal(window.image, image)


def test_a_rectangle_selects_and_those_move_together(at_video):
    window, state = at_video.window, at_video.window.state
    points = [at_video.point(k) for k in range(state.scene.count)]
    wanted = sorted(range(len(points)), key=lambda k: points[k])[:2]
    corners = [[points[k][i] for k in wanted] for i in (0, 1)]
    first = (min(corners[0]) - 20, min(corners[1]) - 20)
    last = (max(corners[0]) + 20, max(corners[1]) + 20)
    expected = state.within(*window.canvas.to_position(*first), *window.canvas.to_position(*last))
    at_video.drag(first, last, drop=False)
    assert window.canvas.find_withtag("band")
    window.canvas.event_generate("<ButtonRelease-1>", x=last[0], y=last[1], state=PRESSED)
    at_video.rest()
    assert state.selection == expected and set(wanted) <= set(expected) and not window.canvas.find_withtag("band")
    before = state.shown.z.clone()
    at_video.drag(points[wanted[0]], (points[wanted[0]][0] + 30, points[wanted[0]][1] + 20))
    moved = (state.shown.z - before)[0]
    assert len(state.edits) == 1 and len(expected) > 1
    for k in range(state.scene.count):
        assert (moved[k].abs().max() > 0.02) == (k in expected)
    torch.testing.assert_close(moved[list(expected)], moved[wanted[0]].expand(len(expected), 2))


def test_presses_select_add_and_clear(at_video):
    state = at_video.window.state
    far = max(range(1, state.scene.count), key=lambda k: (state.shown.z[0, k] - state.shown.z[0, 0]).norm())
    at_video.press(at_video.point(0))
    first = state.selection
    assert len(first) == 1
    at_video.press(at_video.point(far), state=SHIFT)
    assert state.selection[:1] == first and len(state.selection) == 2
    at_video.press(at_video.point(far), state=SHIFT)
    assert state.selection == first
    at_video.press((3, 3))
    assert state.selection == () and state.edits == ()


def test_a_double_press_selects_the_whole_object(at_video):
    window, state = at_video.window, at_video.window.state
    x, y = at_video.point(1)
    for _ in range(2):
        window.canvas.event_generate("<Button-1>", x=x, y=y)
        window.canvas.event_generate("<ButtonRelease-1>", x=x, y=y, state=PRESSED)
    assert state.selection == state.overlapping(state.selection[0]) and state.selection


def test_the_wheel_scales_and_with_alt_changes_the_depth(at_video):
    window, state = at_video.window, at_video.window.state
    state.select([2])
    side, depth = state.side(2), state.shown.z_depth[0, 2, 0].item()
    at_video.wheel(3)
    assert state.side(2) == pytest.approx(side * 1.05**3, rel=1e-3)
    at_video.wheel(-2, "Alt-")
    assert state.shown.z_depth[0, 2, 0].item() == pytest.approx(depth + 0.2, abs=1e-3)
    at_video.wheel(2, "Control-")
    assert window.canvas.zoom == pytest.approx(1.25**2) and len(state.edits) == 2
    at_video.key("Key-0")
    assert window.canvas.zoom == 1


def test_zoomed_in_a_press_still_hits(at_video):
    window, state = at_video.window, at_video.window.state
    at_video.key("plus")
    at_video.key("plus")
    width, height = window.canvas.size
    points = [at_video.point(k) for k in range(state.scene.count)]
    visible = [k for k, (x, y) in enumerate(points) if 0 < x < width and 0 < y < height]
    at_video.press(at_video.point(visible[0]))
    assert len(state.selection) == 1
    middle = window.canvas.to_position(200, 200)
    window.canvas.event_generate("<Button-2>", x=200, y=200)
    window.canvas.event_generate("<B2-Motion>", x=230, y=200)
    moved = window.canvas.to_position(230, 200)
    np.testing.assert_allclose(moved, middle, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- the panel


def slide(person, name, share):
    """Drag a slider to a share of its length."""
    scale = person.window.panel.sliders[name].scale
    person.window.update()
    x, y = (round(float(value)) for value in scale.coords())
    end = round(share * scale.winfo_width())
    person.drag((x, y), (end, y), widget=scale)


def test_sliders_change_all_that_is_selected(at_video):
    window, state = at_video.window, at_video.window.state
    state.select([1, 2])
    window.show_selection()
    image, ratio = window.image, state.side(2) / state.side(1)
    slide(at_video, "transparency", 0.0)
    assert state.edits[-1].kind == "transparency" and state.edits[-1].particles == (1, 2)
    assert (state.shown.obj_on[0, [1, 2]] < 0.2).all() and not np.array_equal(window.image, image)
    slide(at_video, "scale", 0.5)
    assert state.edits[-1].kind == "scale" and state.side(2) / state.side(1) == pytest.approx(ratio, rel=1e-2)
    slide(at_video, "depth", 0.1)
    assert state.edits[-1].kind == "depth" and state.edits[-1].values[0] < 0 and len(state.edits) == 3
    number = float(window.panel.numbers["depth"]["text"])
    assert number == pytest.approx(state.shown.z_depth[0, 1, 0].item(), abs=0.01)


def test_an_appearance_is_chosen_from_the_pictures(at_video):
    window, state = at_video.window, at_video.window.state
    assert len(window.panel.gallery.find_withtag("number")) == 2 * state.scene.count
    state.select([0, 1])
    window.show_selection()
    step = 38 + 4
    at_video.press((3 * step + 10, 10), widget=window.panel.gallery)
    assert state.edits == (Edit("appearance", (0, 1), (3.0,)),)
    features = state.particles.z_features[0]
    assert torch.equal(features[:, 0], features[:, 3]) and torch.equal(features[:, 1], features[:, 3])
    at_video.press((5 * step + 10, 10), widget=window.panel.gallery)  # beside them
    assert len(state.edits) == 1


def test_control_d_takes_over_the_appearance_of_what_is_pressed_next(at_video):
    state = at_video.window.state
    far = max(range(1, state.scene.count), key=lambda k: (state.shown.z[0, k] - state.shown.z[0, 0]).norm())
    at_video.press(at_video.point(0))
    (k,) = state.selection
    at_video.key("Control-d")
    at_video.press(at_video.point(far))
    assert state.selection == (k,) and [edit.kind for edit in state.edits] == ["appearance"]
    at_video.key("Control-d")
    at_video.key("Escape")
    at_video.press(at_video.point(far))
    assert state.selection != (k,) and len(state.edits) == 1


# ---------------------------------------------------------------------------------------------------------- the keys


def test_keys_select_nudge_hide_and_undo(at_video):
    window, state = at_video.window, at_video.window.state
    image = window.image
    at_video.key("Control-a")
    assert len(state.selection) == (state.shown.obj_on > 0.5).sum() > 1
    at_video.key("Escape")
    assert state.selection == ()
    at_video.press(at_video.point(1))
    (k,) = state.selection
    place = state.shown.z[0, k].clone()
    at_video.key("Right")
    pixel = 2 / 31
    torch.testing.assert_close(state.shown.z[0, k], place + torch.tensor([0, pixel]), atol=1e-4, rtol=0)
    at_video.see(lambda: window.editing._pause_timer is None)
    at_video.key("Shift-Up")
    torch.testing.assert_close(state.shown.z[0, k], place + torch.tensor([-10 * pixel, pixel]), atol=2e-4, rtol=0)
    at_video.key("Delete")
    assert state.shown.obj_on[0, k] == 0 and len(state.edits) == 3
    edited = window.image
    for _ in range(3):
        at_video.key("Control-z")
    assert state.edits == () and np.array_equal(window.image, image)
    assert window.buttons.undo_button.instate(["disabled"])
    for key in ("Control-Z", "Control-Shift-z", "Control-y"):
        at_video.key(key)
    assert len(state.edits) == 3 and np.array_equal(window.image, edited)
    window.buttons.reset_button.invoke()
    at_video.rest()
    assert state.edits == () and np.array_equal(window.image, image)
    window.buttons.undo_button.invoke()
    assert len(state.edits) == 3
    at_video.rest()


def test_a_key_that_is_held_is_undone_at_once(at_video):
    state = at_video.window.state
    at_video.press(at_video.point(1))
    for _ in range(5):
        at_video.window.canvas.event_generate("<Left>")
    at_video.rest()
    assert len(state.edits) == 1
    at_video.key("Control-z")
    assert state.edits == ()


def test_h_hides_the_particles(at_video):
    window = at_video.window
    at_video.key("h")
    assert not window.canvas.find_withtag("dot") and window.buttons.hides.get()
    at_video.press(at_video.point(1))
    assert window.state.selection == ()
    at_video.key("H")
    assert window.canvas.find_withtag("dot") and not window.buttons.hides.get()


def test_time_goes_with_keys_and_the_slider_and_any_frame_can_be_edited(at_video):
    window, state = at_video.window, at_video.window.state
    last = window.image
    at_video.key("Home")
    assert state.time == 0 and window.times.label["text"] == f"Frame 0 of {SEEN - 1}"
    assert not np.array_equal(window.image, last)
    at_video.key("Next")
    at_video.key("Next")
    assert state.time == 2
    before = state.particles.z.clone()
    start = at_video.point(1)
    at_video.drag(start, (start[0] + 50, start[1]))
    assert state.edits[0].frame == 2
    (k,) = state.edits[0].particles
    moved = (state.particles.z - before)[0, :, k, 1]
    torch.testing.assert_close(moved / moved[2], torch.tensor([0, 0.5, 1, 0.5, 0]))
    at_video.key("End")
    assert state.time == SEEN - 1
    slider = window.times.slider
    window.update()
    x, y = (round(float(value)) for value in slider.coords())
    at_video.drag((x, y), (0, y), widget=slider)
    assert state.time == 0


def test_all_frames_are_edited_alike_if_wanted(at_video):
    window, state = at_video.window, at_video.window.state
    window.times.is_whole.set(True)
    window.editing.set_whole(True)
    before, start = state.particles.z.clone(), at_video.point(1)
    at_video.drag(start, (start[0] + 50, start[1]))
    (k,) = state.edits[0].particles
    moved = (state.particles.z - before)[0, :, k]
    assert state.edits[0].frame is None
    torch.testing.assert_close(moved, moved[:1].expand(SEEN, 2))


def test_update_is_animated_in_ten_steps(at_video, monkeypatch):
    window = at_video.window
    shown = []
    show = window.canvas.show_image

    def note(image):
        shown.append(image)
        show(image)

    monkeypatch.setattr(window.canvas, "show_image", note)
    window.buttons.is_live.set(False)
    window.buttons.animates.set(True)
    before, start = window.image, at_video.point(1)
    at_video.drag(start, (start[0] + 80, start[1] + 30))
    shown.clear()
    at_video.key("u")
    at_video.see(lambda: len(shown) >= 11 and not window.viewing.is_animating)
    at_video.rest()
    assert len(shown) == 11 and not np.array_equal(shown[0], before)
    assert len({image.tobytes() for image in shown[:10]}) > 5
    assert np.abs(shown[9].astype(int) - shown[10]).max() <= 1  # the last step is the edited picture


def test_help_lists_the_keys(at_video):
    at_video.key("F1")
    texts = [str(child["text"]) for child in at_video.window.help_window.winfo_children()[0].winfo_children()]
    assert "Ctrl-D" in texts and any("Only small changes" in text for text in texts)
    at_video.window.help_window.destroy()


# ------------------------------------------------------------------------------------------------- playing, exporting


def test_space_plays_both_to_the_end(at_video):
    window, state = at_video.window, at_video.window.state
    start = at_video.point(1)
    at_video.drag(start, (start[0] + 50, start[1]))
    window.canvas.event_generate("<space>")
    at_video.see(lambda: window.viewing.player is not None)
    player = window.viewing.player
    names = [name for name, _, _ in player.videos]
    assert names == ["recorded", "prediction", "what if"] and player.length == SEEN + 60
    assert len(player.videos[0][1]) == HORIZON + 2  # the recording is shorter
    expected = what_if.compare(state.scene.loaded.model, state.scene.particles, state.edits, SEEN + 60)
    torch.testing.assert_close(player.videos[1][1], expected.video)
    torch.testing.assert_close(player.videos[2][1], expected.altered_video)
    assert not torch.equal(expected.video, expected.altered_video)
    at_video.see(lambda: player.frame > 2)
    player.focus_force()
    player.event_generate("<End>")
    window.update()
    assert player.frame == player.length - 1 and not player.is_playing and "predicted" in player.label["text"]
    player.event_generate("<space>")
    at_video.see(lambda: player.frame == 1)  # and over again
    player.shows_particles.set(True)
    player.show(2)
    player.event_generate("<Escape>")
    window.update()
    assert not player.winfo_exists()
    window.buttons.play_button.invoke()  # nothing has to be predicted again
    assert window.viewing.player is not player and window.viewing.player.winfo_exists()


def test_no_other_thread_deletes_what_belongs_to_the_window(at_video, monkeypatch):
    window, refused = at_video.window, []
    monkeypatch.setattr(sys, "unraisablehook", refused.append)
    window.buttons.play_button.invoke()
    at_video.see(lambda: window.viewing.player is not None)
    window.viewing.player.destroy()
    window.viewing.player = None
    window.show_help()
    window.help_window.destroy()
    window.help_window = None
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join()
    assert refused == []


def test_what_takes_long_is_cancelled(at_video, monkeypatch):
    from editor import viewing as module

    window, reports = at_video.window, []

    def endless(scene, edits, report):
        while True:
            report(0.5)
            reports.append(1)
            time.sleep(0.001)

    monkeypatch.setattr(module, "play", endless)
    window.canvas.event_generate("<space>")
    status = window.status
    at_video.see(lambda: float(status.progress["value"]) == 0.5 and not status.cancel_button.instate(["disabled"]))
    window.status.cancel_button.invoke()
    at_video.rest()
    assert window.status.message["text"] == "cancelled"
    at_video.see(lambda: window.status.cancel_button.instate(["disabled"]))
    count = len(reports)
    time.sleep(0.05)
    assert len(reports) <= count + 1 and window.viewing.player is None


@pytest.mark.parametrize("ending", ["png", "gif", "mp4"])
def test_pictures_and_animations_are_exported(ending, at_video, tmp_path, monkeypatch):
    window, state = at_video.window, at_video.window.state
    monkeypatch.setattr("editor.scene.STEPS", 4)
    state.select([1])
    window.editing.remove()
    at_video.rest()
    path = tmp_path / f"out.{ending}"
    answer(monkeypatch, path)
    at_video.key("Control-e")
    assert window.status.message["text"] == f"wrote {path}"
    if ending == "png":
        assert iio.imread(path).shape == (256, 256, 3)
    else:
        run_in(tmp_path, what_if.main, *command_words(window, tmp_path), "--format", ending, "--out", "other." + ending)
        assert path.read_bytes() == (tmp_path / f"other.{ending}").read_bytes()


def command_words(window, folder):
    """The arguments in the window's command, from another working directory."""
    words = window.status.command.get().split()
    assert words[:2] == ["python", "what_if.py"]
    place = window.state.scene.loaded.path.parents[1]
    return [str(place / word) if word.startswith(("checkpoints/", "assets/")) else word for word in words[2:]]


def test_what_cannot_be_exported_is_refused(at_image, tmp_path, monkeypatch):
    answer(monkeypatch, tmp_path / "out.gif")
    at_image.key("Control-e")
    assert "cannot be exported as that; legal: .png" in error_of(at_image.window)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- saving, closing


def test_edits_are_saved_opened_again_and_replayed(at_video, tmp_path, monkeypatch):
    window, state = at_video.window, at_video.window.state
    start = at_video.point(1)
    at_video.drag(start, (start[0] + 50, start[1] - 30))
    at_video.key("Delete")
    assert window.title().startswith("*")
    path = tmp_path / "edits.json"
    answer(monkeypatch, path)
    at_video.key("Control-s")
    assert EditFile.read(path) == state.file() and not window.title().startswith("*")
    image, particles = window.image, state.particles
    at_video.choose(window.source.example_box, "balls 1")
    at_video.choose(window.source.model_box, "dlp-shapes")
    at_video.key("Control-o")
    assert window.source.model_box.get() == "ddlp-balls" and window.source.example_box.get() == "balls 0"
    assert np.array_equal(window.image, image) and torch.equal(window.state.particles.z, particles.z)
    assert at_video.asked == []
    assert window.status.command.get() == EditFile.read(path).command()
    window.status.copy_button.invoke()
    assert window.clipboard_get() == window.status.command.get()


def test_generated_frames_are_saved_and_opened_too(person, tmp_path, monkeypatch):
    window = person.window
    person.start(window.documents.models["diffuse-ddlp-balls"])
    window.source.generate_button.invoke()
    person.rest()
    window.state.select([0])
    window.editing.remove()
    answer(monkeypatch, tmp_path / "edits.json")
    person.key("Control-s")
    z = window.state.particles.z
    window.source.generate_button.invoke()
    person.rest()
    assert window.state.scene.seed == 2
    person.key("Control-o")
    assert window.state.scene.seed == 1 and torch.equal(window.state.particles.z, z) and len(window.state.edits) == 1


def test_what_is_not_saved_is_asked_about(at_video, monkeypatch):
    from editor import documents

    window = at_video.window
    at_video.press(at_video.point(1))
    at_video.key("Delete")
    monkeypatch.setattr(documents.messagebox, "askyesnocancel", lambda *texts, **options: None)  # Cancel
    at_video.choose(window.source.model_box, "dlp-shapes")
    assert window.source.model_box.get() == "ddlp-balls" and len(window.state.edits) == 1
    window.close()
    assert window.winfo_exists()
    monkeypatch.setattr(documents.messagebox, "askyesnocancel", lambda *texts, **options: False)  # No
    at_video.choose(window.source.model_box, "dlp-shapes")
    assert window.source.model_box.get() == "dlp-shapes" and window.state.edits == ()


def test_the_window_closes_in_mid_work(at_video):
    window = at_video.window
    start = at_video.point(1)
    at_video.drag(start, (start[0] + 50, start[1]), drop=False)
    window.canvas.event_generate("<space>")
    window.update()
    threads = [worker._thread for worker in (window.live, window.slow)]
    window.close()
    at_video.window = None
    assert not any(thread.is_alive() for thread in threads)


# ------------------------------------------------------------------------------------------------ what may go wrong


def open_window(checkpoints, assets):
    from editor.window import EditorWindow

    return Person(EditorWindow(checkpoints, assets, CPU, scale=1))


def shown_texts(canvas):
    return [canvas.itemcget(item, "text") for item in canvas.find_all() if canvas.type(item) == "text"]


def test_without_models_it_says_so_and_opens_ones_own(place, display, tmp_path):
    person = open_window(tmp_path, place / "assets")
    window = person.window
    window.start()
    window.update()
    assert f"no models in {tmp_path}" in error_of(window) and "run directory" in shown_texts(window.canvas)[0]
    for key in ("space", "Delete", "Control-z", "Control-a", "Left", "Home", "u", "h", "Control-s", "Control-e"):
        person.key(key)
    person.wheel(1)
    person.drag((100, 100), (200, 200))
    window.documents.open_run_directory(place / "checkpoints" / "ddlp-balls")
    person.see(lambda: window.image is not None)
    window.close()


def test_without_examples_it_says_so(place, display, tmp_path):
    person = open_window(place / "checkpoints", tmp_path)
    window = person.window
    window.start()
    person.see(lambda: window.documents.loaded is not None)
    assert f"no examples of balls in {tmp_path}" in error_of(window)
    assert "Open an image" in shown_texts(window.canvas)[0]
    window.close()


def test_a_broken_checkpoint_leaves_everything_as_it_was(at_video, tmp_path, monkeypatch):
    window = at_video.window
    scene = window.state.scene
    broken = tmp_path / "ddlp-broken"
    shutil.copytree(scene.loaded.path, broken)
    (broken / "balls_ddlp.pth").write_bytes(b"torn")
    answer(monkeypatch, broken)
    window.documents.ask_run()
    at_video.rest()
    assert "balls_ddlp.pth: not a readable checkpoint" in error_of(window)
    assert window.state.scene is scene and window.source.model_box.get() == "ddlp-balls"
    answer(monkeypatch, tmp_path)
    window.documents.ask_run()
    at_video.rest()
    assert "no hparams.json in it" in error_of(window)


def test_a_video_that_does_not_fit_leaves_everything_as_it_was(at_video, tmp_path, monkeypatch):
    window = at_video.window
    scene = window.state.scene
    write_frames(tmp_path / "short", images(2))
    for path, message in (
        (tmp_path / "short", "has 2 frames; legal for ddlp-balls: at least 4"),
        (tmp_path / "missing.mp4", "not found"),
    ):
        answer(monkeypatch, path)
        window.documents.ask_clip()
        at_video.rest()
        assert message in error_of(window) and window.state.scene is scene


def test_a_file_of_edits_that_does_not_fit_leaves_everything_as_it_was(at_video, tmp_path, monkeypatch):
    window = at_video.window
    scene, file = window.state.scene, window.state.file()
    path = tmp_path / "edits.json"
    answer(monkeypatch, path)
    for change, message in (
        ({"edits": (Edit("remove", (99,)),)}, "there is no particle 99"),
        ({"video": "missing"}, "missing: not found"),
        ({"model": "missing"}, "missing: no such run directory"),
        ({"video": None, "seed": 1}, "names no video"),
    ):
        EditFile(**{**vars(file), **change}).write(path)
        window.documents.ask_edits()
        at_video.rest()
        assert message in error_of(window) and window.state.scene is scene
    path.write_text("{}")
    at_video.key("Control-o")
    assert "not a file of edits" in error_of(window)


def test_a_file_that_cannot_be_written_is_named(at_video, tmp_path, monkeypatch):
    at_video.press(at_video.point(1))
    at_video.key("Delete")
    answer(monkeypatch, tmp_path / "missing" / "edits.json")
    at_video.key("Control-s")
    assert "cannot be written" in error_of(at_video.window) and at_video.window.state.is_modified


# ------------------------------------------------------------------------------------------------------ the command


def start_editor(*arguments, **environment):
    command = [sys.executable, str(ROOT / "interactive_gui.py"), "--cpu", *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoints", "missing"], "--checkpoints: missing is no folder"),
        (["--assets", "missing"], "--assets: missing is no folder"),
        (["missing"], "missing: not found; legal: a run directory, or a file of edits"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    import interactive_gui

    with pytest.raises(UserError, match=message):
        interactive_gui.main(arguments)


def test_without_a_display_it_says_what_to_do():
    process = start_editor(DISPLAY="", WAYLAND_DISPLAY="")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2 and error.startswith("error: no display") and error.count("\n") == 1, error


@pytest.mark.parametrize(("missing", "message"), [("tkinter", "python3-tk"), ("ttkwidgets", "pip install")])
def test_without_its_libraries_it_says_what_to_do(missing, message, monkeypatch):
    import interactive_gui

    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(interactive_gui, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(UserError, match=message):
        interactive_gui.main([])


@pytest.mark.skipif(shutil.which("xdotool") is None, reason="xdotool is not installed (Debian: apt install xdotool)")
@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed (Debian: apt install xvfb)")
def test_the_command_with_a_real_mouse_and_keyboard(place, tmp_path):
    """Open edits, take one back, drag, save, quit: through the X server, as a person's hands do it."""
    screen, name = start_display()
    model, video = str(place / "checkpoints/ddlp-balls"), str(place / "assets/balls/0")
    file = EditFile(model, video, None, SEEN, HORIZON, (Edit("remove", (0,)),))
    file.write(tmp_path / "edits.json")
    process = start_editor(tmp_path / "edits.json", "--scale", 1, DISPLAY=name)

    def hand(*words):
        subprocess.run(["xdotool", *map(str, words)], env={"DISPLAY": name, "PATH": "/usr/bin:/bin"}, check=True)

    try:
        wait_for_window(name, "opened|seed|balls")
        hand("mousemove", 20, 90)
        hand("key", "ctrl+a", "Right", "ctrl+s")
        wait_until_file(lambda: len(EditFile.read(tmp_path / "edits.json").edits) == 2)
        hand("key", "ctrl+z", "ctrl+z", "ctrl+s")
        wait_until_file(lambda: EditFile.read(tmp_path / "edits.json").edits == ())
        hand("mousemove", 60, 60 + 90, "mousedown", 1, "mousemove", 600, 560, "mouseup", 1, "key", "Delete", "ctrl+s")
        wait_until_file(lambda: len(EditFile.read(tmp_path / "edits.json").edits) == 1)
        hand("key", "ctrl+q")
        assert process.wait(60) == 0
    finally:
        process.kill()
        screen.terminate()
        screen.wait()
    (edit,) = EditFile.read(tmp_path / "edits.json").edits
    assert edit.kind == "remove" and len(edit.particles) > 1


def wait_until_file(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_window(display_name, title):
    subprocess.run(
        ["xdotool", "search", "--sync", "--name", title],
        env={"DISPLAY": display_name, "PATH": "/usr/bin:/bin"},
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
