"""What a person may do to the editor that nobody would ask for: each gets a clear line and loses nothing."""

import json
import shutil
import sys
import threading

import imageio.v3 as iio
import numpy as np
import pytest

from rundir.edits import Edit, EditFile
from tests.editor_models import SEEN, K, write_frames
from tests.editor_person import CPU, Person, answer, error_of
from tests.small_dlp import images


def edit_something(person):
    """Hide a particle."""
    person.window.editing.select((1,), False)
    person.key("Delete")
    assert person.window.state.is_modified


def gated(function):
    """A function that waits for an event before it does the same, and the event."""
    gate = threading.Event()

    def wait(*arguments, **options):
        assert gate.wait(60)
        return function(*arguments, **options)

    return wait, gate


# ------------------------------------------------------------------------------------------------- typing and wheels


def test_what_is_typed_in_a_box_does_nothing_to_the_particles(person):
    window = person.window
    person.start(window.documents.models["diffuse-ddlp-balls"])
    person.press(person.point(0))
    selection, entry = window.state.selection, window.source.seed_box
    entry.focus_force()
    entry.set("")
    for key in ("Key-7", "space", "BackSpace", "Delete", "Key-0", "h", "u", "Left", "Home", "Control-a", "Control-d"):
        person.key(key, entry)
    assert window.state.edits == () and window.state.selection == selection and window.state.shows_handles
    assert window.viewing.player is None and window.state.time == window.state.scene.num_frames - 1
    entry.set("7")
    person.key("Return", entry)
    assert window.state.scene.seed == 7
    person.key("Escape", entry)
    assert window.focus_get() is window.canvas
    entry.set("\u00b2")  # a digit, but no number
    window.source.generate_button.invoke()
    assert "legal: 0 to 2^32 - 1" in error_of(window)


def test_the_wheel_moves_sliders_and_opens_nothing(at_video):
    window, state = at_video.window, at_video.window.state
    window.source.model_box.event_generate("<Button-5>")
    window.source.example_box.event_generate("<Button-5>")
    at_video.rest()
    assert window.state is state and window.source.example_box.get() == "balls 0"
    window.times.slider.event_generate("<Button-5>")
    assert state.time == SEEN - 2
    scale = window.panel.sliders["transparency"].scale
    scale.event_generate("<Button-5>")
    assert state.edits == ()  # nothing is selected
    window.editing.select((0,), False)
    before = state.shown.obj_on[0, 0].item()
    for _ in range(3):
        scale.event_generate("<Button-5>")
    at_video.rest()
    assert state.shown.obj_on[0, 0].item() == pytest.approx(before - 3 / 50, abs=1e-3)
    assert [edit.kind for edit in state.edits] == ["transparency"]  # the turns are one gesture
    at_video.key("Control-z")
    assert state.edits == ()


# ------------------------------------------------------------------------------------------------- what is opened


@pytest.mark.parametrize(
    "image",
    [
        np.arange(40 * 60, dtype=np.uint8).reshape(40, 60),  # grey
        np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 20,  # 16 bits
        np.full((33, 33, 4), (200, 10, 10, 255), np.uint8),  # with transparency
        np.full((1, 200, 3), 90, np.uint8),
    ],
    ids=["grey", "16 bits", "RGBA", "a line"],
)
def test_images_of_any_kind_are_opened(image, at_image, tmp_path):
    iio.imwrite(tmp_path / "picture.png", image)
    at_image.window.documents.open_clip(tmp_path / "picture.png")
    at_image.rest()
    height, width = image.shape[:2]
    assert at_image.window.state.scene.video == str(tmp_path / "picture.png")
    assert f"{width} x {height} pixels" in at_image.window.status.message["text"]


def test_a_long_video_is_read_only_as_far_as_it_is_needed(at_video, tmp_path):
    write_frames(tmp_path / ("long " * 40), images(100))
    at_video.window.documents.open_clip(tmp_path / ("long " * 40))
    at_video.rest()
    scene = at_video.window.state.scene
    assert scene.num_frames == SEEN and len(scene.frames) == scene.horizon
    width = at_video.window.winfo_width()
    at_video.window.fail("a line without an end " * 40)
    at_video.window.update()
    assert at_video.window.winfo_width() == width


def test_a_broken_example_is_passed_over_and_named(person, place, tmp_path):
    window, assets = person.window, tmp_path / "assets"
    shutil.copytree(place / "assets", assets)
    window.documents.assets = assets
    (assets / "balls" / "0" / "3.png").write_bytes(b"torn")
    window.start(window.documents.models["ddlp-balls"])
    person.see(lambda: window.image is not None)
    person.rest()
    assert "3.png" in error_of(window) and window.source.example_box.get() == "balls 1"
    scene = window.state.scene
    person.choose(window.source.example_box, "balls 0")
    assert "3.png" in error_of(window) and window.state.scene is scene
    assert window.source.example_box.get() == "balls 1"  # the box names what is shown
    (assets / "balls" / "1" / "1.png").write_bytes(b"torn")
    person.choose(window.source.model_box, "ddlp-balls")
    assert window.state is None and "0" in error_of(window) and "can be read" in window.canvas.message


def test_a_model_that_disappears_is_named_and_the_open_one_stays(at_video, place, tmp_path):
    window, scene = at_video.window, at_video.window.state.scene
    window.documents.models["gone"] = tmp_path / "gone"
    at_video.choose(window.source.model_box, "gone")
    assert "gone: no such run directory" in error_of(window) and window.state.scene is scene
    assert window.source.model_box.get() == "ddlp-balls"


def test_edits_of_another_model_are_refused(at_video, place, tmp_path):
    window, scene = at_video.window, at_video.window.state.scene
    file = window.state.file()
    path, other = tmp_path / "edits.json", str(place / "checkpoints/dlp-shapes")
    for change, message in (
        ({"edits": (Edit("move", (K + 3,), (0.1, 0.1)),)}, f"there is no particle {K + 3}; legal: 0 to {K - 1}"),
        ({"edits": (Edit("move", (0,), (0.1, 0.1), SEEN),)}, f"frame {SEEN} is not seen"),
        ({"cond_steps": 10**6}, "has 14 frames; legal for ddlp-balls: at least 1000000"),
        (
            {"model": other, "edits": (Edit("remove", (99,)),)},
            "there is no particle 99",
        ),
    ):
        EditFile(**{**vars(file), **change}).write(path)
        window.documents.open_edits(path)
        at_video.rest()
        assert message in error_of(window) and window.state.scene is scene
        assert window.source.model_box.get() == "ddlp-balls"
    path.write_text(json.dumps({"particle_edits": 7}))
    window.documents.ask_edits = lambda: window.documents.open_edits(path)
    with pytest.raises(ValueError, match="written by a later version"):
        window.documents.open_edits(path)


# ------------------------------------------------------------------------------------------------- while work is done


def test_what_is_edited_while_something_is_opened_is_asked_about(at_video, monkeypatch):
    from editor import documents

    window, scene = at_video.window, at_video.window.state.scene
    waiting, gate = gated(documents.open_clip)
    monkeypatch.setattr(documents, "open_clip", waiting)
    window.documents.choose_example("balls 1")
    edit = Edit("remove", (1,))
    window.editing.commit((edit,))
    monkeypatch.setattr(documents.messagebox, "askyesnocancel", lambda *texts, **options: None)  # Cancel
    gate.set()
    at_video.rest()
    assert window.state.scene is scene and window.state.edits == (edit,)
    assert window.source.example_box.get() == "balls 0"


def test_what_may_be_left_is_still_asked_about_if_opening_fails(at_video, tmp_path, monkeypatch):
    from editor import documents

    window = at_video.window
    edit_something(at_video)
    window.documents.open_clip(tmp_path / "missing")  # the answer is no
    at_video.rest()
    assert len(at_video.asked) == 1 and window.state.is_modified
    monkeypatch.setattr(documents.messagebox, "askyesnocancel", lambda *texts, **options: None)
    window.close()
    assert window.winfo_exists()


def test_another_model_may_be_opened_while_a_video_is_predicted(at_video):
    window = at_video.window
    window.buttons.play_button.invoke()
    window.documents.choose_model("dlp-shapes")
    at_video.rest()
    assert window.source.model_box.get() == "dlp-shapes" and window.viewing.player is None


def test_presses_in_a_hurry_are_one(at_video, monkeypatch):
    from editor import viewing

    window, calls = at_video.window, []
    play = viewing.play
    monkeypatch.setattr(viewing, "play", lambda *arguments: calls.append(1) or play(*arguments))
    for _ in range(3):
        window.buttons.play_button.invoke()
    at_video.see(lambda: window.viewing.player is not None)
    assert calls == [1]
    for _ in range(2):
        window.show_help()
    assert len([child for child in window.winfo_children() if child.winfo_class() == "Toplevel"]) == 2


def test_what_has_been_read_waits_until_a_dialog_is_closed(at_video, tmp_path, monkeypatch):
    from editor import documents

    window, state = at_video.window, at_video.window.state
    edit_something(at_video)
    state.save(tmp_path / "first.json")
    window.documents.choose_example("balls 1")

    def save_slowly(**options):
        at_video.see(lambda: not window.slow.keys)
        for _ in range(5):
            window.update()
        return str(tmp_path / "second.json")

    monkeypatch.setattr(documents.filedialog, "asksaveasfilename", save_slowly)
    assert window.documents.save_as() and EditFile.read(tmp_path / "second.json").edits == state.edits
    at_video.rest()
    assert window.source.example_box.get() == "balls 1"


def test_the_window_closes_while_frames_are_generated(person):
    window = person.window
    person.start(window.documents.models["diffuse-ddlp-balls"])
    window.source.generate_button.invoke()
    thread = window.slow._thread
    window.close()
    person.window = None
    assert not thread.is_alive()


def test_closing_asks_about_a_file_that_is_being_written(at_video, tmp_path, monkeypatch):
    from editor import documents

    window, asked = at_video.window, []
    waiting, gate = gated(documents.export_picture)
    monkeypatch.setattr(documents, "export_picture", waiting)
    monkeypatch.setattr(documents.messagebox, "askyesno", lambda *texts, **options: asked.append(texts))  # No
    window.documents.export_to(tmp_path / "out.png")
    window.close()
    assert len(asked) == 1 and window.winfo_exists()
    gate.set()
    at_video.rest()
    assert (tmp_path / "out.png").exists()


def test_control_c_in_the_terminal_closes_the_window(at_video):
    window = at_video.window
    thread = window.live._thread
    window.report_callback_exception(KeyboardInterrupt, KeyboardInterrupt(), None)
    at_video.window = None
    assert not thread.is_alive()


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no /dev/full and no /proc")
@pytest.mark.parametrize("ending", ["png", "gif", "mp4"])
def test_an_export_that_cannot_be_written_is_named(ending, at_video, monkeypatch):
    window = at_video.window
    monkeypatch.setattr("editor.scene.STEPS", 2)
    window.documents.export_to(f"/proc/out.{ending}")
    at_video.rest()
    assert f"/proc/out.{ending}: cannot be written" in error_of(window)


def test_edits_that_cannot_be_saved_are_kept_and_asked_about(at_video, monkeypatch):
    from editor import documents

    window = at_video.window
    edit_something(at_video)
    answer(monkeypatch, "/proc/edits.json")
    monkeypatch.setattr(documents.messagebox, "askyesnocancel", lambda *texts, **options: True)  # Save
    at_video.choose(window.source.example_box, "balls 1")
    assert "/proc/edits.json: cannot be written" in error_of(window)
    assert window.state.is_modified and window.source.example_box.get() == "balls 0"
    window.canvas.event_generate("<Control-q>")
    window.update()
    assert window.winfo_exists()
    monkeypatch.setattr(documents.messagebox, "askyesnocancel", lambda *texts, **options: False)


def test_a_path_without_a_known_ending_is_refused(at_video, tmp_path):
    for name in ("out", "out.", "out.tiff", "out.gif.exe"):
        with pytest.raises(ValueError, match=r"cannot be exported as that; legal: \.png, \.gif, \.mp4"):
            at_video.window.documents.export_to(tmp_path / name)


@pytest.mark.parametrize("scale", [1, 1.5])
def test_the_smallest_window_shows_every_control(scale, place, display):
    from editor.window import SMALLEST, EditorWindow

    window = EditorWindow(place / "checkpoints", place / "assets", CPU, scale=scale)
    person = Person(window)
    width, height = (round(length * scale) for length in SMALLEST)
    window.geometry(f"{width}x{height}+0+0")
    person.start(window.documents.models["ddlp-balls"])
    person.see(lambda: window.winfo_width() == width)
    rows = window.source, window.times, window.buttons, window.status
    for control in (*(control for row in rows for control in row.winfo_children()), window.panel.object_button):
        right = control.winfo_rootx() + control.winfo_width() - window.winfo_rootx()
        bottom = control.winfo_rooty() + control.winfo_height() - window.winfo_rooty()
        assert right <= width and bottom <= height
        if control.winfo_class() in ("TButton", "TCheckbutton", "TRadiobutton", "TCombobox", "TSpinbox"):
            assert control.winfo_width() >= control.winfo_reqwidth(), control.winfo_class()
    window.close()
