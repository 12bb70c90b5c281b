"""Edits as data: of one frame, in files, on command lines; and `what_if.py` with what it can be asked about."""

import json
import re

import imageio.v3 as iio
import pytest
import torch

import what_if as command
from datasets.examples import clip_size, read_clip
from rundir import load_model
from rundir.edits import EDITS, Edit, EditFile, apply_edits, fading_weights, parse_edit
from tests.balls import run_in
from tests.editor_models import HORIZON, SEEN, scattered_particles, write_frames
from tests.small_dlp import images
from utils.animation import save_animation
from utils.errors import UserError
from what_if import what_if

EVERY_KIND = (
    Edit("move", (0, 2), (0.1, -0.25), 3),
    Edit("place", (1,), (0.1 + 0.2, 0.0)),
    Edit("scale", (0,), (1.5,), 0),
    Edit("depth", (3,), (-2.0,)),
    Edit("transparency", (1,), (0.4,)),
    Edit("appearance", (2,), (3.0,)),
    Edit("remove", (3,)),
)


# ------------------------------------------------------------------------------------------------- edits of one frame


@pytest.mark.parametrize(
    ("frame", "fixed", "expected"),
    [
        (0, {0, 4}, [1, 0.75, 0.5, 0.25, 0]),
        (4, {0, 4}, [0, 0.25, 0.5, 0.75, 1]),
        (2, {0, 4}, [0, 0.5, 1, 0.5, 0]),
        (3, {0, 2, 4}, [0, 0, 0, 1, 0]),
        (0, {0, 2, 4}, [1, 0.5, 0, 0, 0]),
    ],
)
def test_an_edit_of_one_frame_fades_out_to_the_fixed_ones(frame, fixed, expected):
    assert fading_weights(5, frame, fixed).tolist() == expected


def test_one_frame_is_all_there_is():
    assert fading_weights(1, 0, {0}).tolist() == [1]


def test_a_frame_that_was_set_stays_where_it_was_put():
    before = scattered_particles()
    after = apply_edits(before, [Edit("move", (1,), (0.2, 0.1), 2), Edit("move", (1,), (-0.4, 0.0), 0)])
    moved = (after.z - before.z)[0, :, 1]
    torch.testing.assert_close(moved[:, 0], torch.tensor([-0.4, -0.1, 0.2, 0.1, 0.0]))
    torch.testing.assert_close(moved[:, 1], torch.tensor([0.0, 0.05, 0.1, 0.05, 0.0]))
    assert torch.equal(after.z[:, :, [0, 2, 3]], before.z[:, :, [0, 2, 3]])


def test_what_was_set_of_one_attribute_or_particle_does_not_fix_another():
    before = scattered_particles()
    edits = [Edit("move", (0,), (0.1, 0.1), 2), Edit("scale", (1,), (2.0,), 2), Edit("move", (1,), (0.4, 0.0), 0)]
    moved = (apply_edits(before, edits).z - before.z)[0, :, 1, 0]
    torch.testing.assert_close(moved, torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]))


@pytest.mark.parametrize("split", range(4))
def test_edits_may_be_applied_in_two_parts(split):
    before = scattered_particles()
    edits = [Edit("move", (0, 1), (0.2, 0.1), 2), Edit("scale", (1,), (1.5,), 1), Edit("move", (1,), (0.3, 0.0), 0)]
    first = apply_edits(before, edits[:split])
    for once, twice in zip(
        apply_edits(before, edits).leaves(), apply_edits(first, edits[split:], edits[:split]).leaves(), strict=True
    ):
        assert torch.equal(once, twice)


def test_place_scale_and_depth_of_one_frame():
    before = scattered_particles()
    edits = [Edit("place", (0,), (0.3, 0.4), 4), Edit("scale", (1,), (1.5,), 4), Edit("depth", (2,), (-1.0,), 4)]
    after = apply_edits(before, edits)
    torch.testing.assert_close(after.z[0, 4, 0], torch.tensor([0.3, 0.4]))
    share = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    expected = before.z[0, :, 0] + share[:, None] * (torch.tensor([0.3, 0.4]) - before.z[0, 4, 0])
    torch.testing.assert_close(after.z[0, :, 0], expected)
    factor = torch.sigmoid(after.z_scale[0, :, 1]) / torch.sigmoid(before.z_scale[0, :, 1])
    torch.testing.assert_close(factor, (1.5**share)[:, None].expand(5, 2))
    torch.testing.assert_close((after.z_depth - before.z_depth)[0, :, 2, 0], -share)


def test_a_frame_that_cannot_be_edited_is_refused():
    with pytest.raises(UserError, match=r"^move: frame 5 is not seen; legal: 0 to 4$"):
        apply_edits(scattered_particles(), [Edit("move", (0,), (0.0, 0.0), 5)])
    with pytest.raises(UserError, match=r"^remove has a frame, 2; legal: none, but with move, place, scale, depth$"):
        Edit("remove", (0,), (), 2)


# -------------------------------------------------------------------------------------------- command lines and files


@pytest.mark.parametrize("edit", EVERY_KIND, ids=lambda edit: edit.kind)
def test_the_option_of_an_edit_is_that_edit_again(edit):
    option, text = edit.option()
    assert parse_edit(option.removeprefix("--"), text) == edit
    assert {edit.kind for edit in EVERY_KIND} == set(EDITS)


def test_a_frame_on_the_command_line():
    assert parse_edit("move", "2,5@9:+0.1,-0.2") == Edit("move", (2, 5), (0.1, -0.2), 9)
    with pytest.raises(UserError, match=re.escape("--scale 1@x:2: not numbers; legal: --scale K[@FRAME]:FACTOR")):
        parse_edit("scale", "1@x:2")


def test_a_file_of_edits_is_the_same_when_it_is_read(tmp_path):
    file = EditFile("run", "video.mp4", None, 5, 12, EVERY_KIND)
    file.write(tmp_path / "edits.json")
    assert EditFile.read(tmp_path / "edits.json") == file
    generated = EditFile("run", None, 3, 4, 12)
    generated.write(tmp_path / "edits.json")
    assert EditFile.read(tmp_path / "edits.json") == generated


def test_what_a_file_names_is_found_beside_it_too(tmp_path, monkeypatch):
    (tmp_path / "files" / "my video").mkdir(parents=True)
    EditFile("run", "my video", None, 5, 12).write(tmp_path / "files" / "edits.json")
    monkeypatch.chdir(tmp_path)
    assert EditFile.read("files/edits.json").video == "files/my video"
    monkeypatch.chdir(tmp_path / "files")
    assert EditFile.read("edits.json").video == "my video"


LEGAL = EditFile("run", "video.mp4", None, 5, 12, EVERY_KIND[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"particle_edits": 0}, 'not a file of edits; legal: a JSON object with "particle_edits": 1'),
        ({"particle_edits": "1"}, "not a file of edits"),
        ({"particle_edits": 2}, "written by a later version, in format 2; legal: 1"),
        ({"colour": 1}, "colour is unknown; legal: model, video, seed, cond_steps, horizon, edits"),
        ({"horizon": 2.5}, "horizon is 2.5; legal: a whole number from 1 on"),
        ({"model": 3}, "model is 3; legal: a path"),
        ({"video": None}, "neither video nor seed is given"),
        ({"seed": -1}, "seed is -1; legal: a whole number from 0 to 2^32 - 1, or null"),
        ({"seed": 2**32}, "seed is 4294967296; legal: a whole number from 0 to 2^32 - 1, or null"),
        ({"edits": {}}, "edits is {}; legal: a list"),
        ({"edits": [{"kind": "remove", "particles": [], "values": []}]}, "remove is of no particle"),
        ({"edits": [{"kind": "depth", "particles": [0], "values": [10**400]}]}, "depth has a value that is too large"),
        (
            {"edits": [{"kind": "depth", "particles": [0], "values": [1e300]}]},
            "depth is 1e+300; legal: -1e+06",
        ),
        ({"edits": [{"kind": "move"}]}, 'an edit is {"kind": "move"}; legal: {"kind"'),
        ({"edits": [{"kind": "remove", "particles": [True], "values": []}]}, "an edit is {"),
        ({"edits": [{"kind": "remove", "particles": [1], "values": [], "colour": 1}]}, "an edit is {"),
        ({"edits": [{"kind": "scale", "particles": [1], "values": [0]}]}, "scale is 0; legal: above 0"),
        ({"edits": [{"kind": "scale", "particles": 1, "values": [2]}]}, "an edit is {"),
        ({"edits": [{"kind": "scale", "particles": [1], "values": ["2"]}]}, "an edit is {"),
    ],
)
def test_a_file_that_is_not_legal_is_refused_by_name(change, message, tmp_path):
    path = tmp_path / "edits.json"
    LEGAL.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(
        UserError, match=f"^{re.escape(str(path))}: .*{message if '.*' in message else re.escape(message)}"
    ):
        EditFile.read(path)


@pytest.mark.parametrize(
    "edit",
    [Edit("move", (0,), (1e6, -1e6)), Edit("scale", (0,), (1e-300,)), Edit("scale", (0,), (1e6,), 2)],
)
def test_what_legal_edits_make_is_finite(edit):
    for value in vars(apply_edits(scattered_particles(), [edit])).values():
        assert value.isfinite().all()


def test_a_file_that_lacks_something_or_is_no_json_is_refused(tmp_path):
    path = tmp_path / "edits.json"
    path.write_text('{"particle_edits": 1}')
    with pytest.raises(UserError, match="model is missing; legal: a path"):
        EditFile.read(path)
    path.write_text("[")
    with pytest.raises(UserError, match="invalid JSON"):
        EditFile.read(path)


# ----------------------------------------------------------------------------------------------------- frames to edit


def test_a_clip_is_read_from_a_folder_a_file_or_an_image(tmp_path):
    frames = images(11, size=16)
    write_frames(tmp_path / "video", frames)
    (tmp_path / "video" / "truth.npz").write_bytes(b"")
    read = read_clip(tmp_path / "video", 16)
    assert read.shape == (11, 3, 16, 16) and (read - frames).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(read_clip(tmp_path / "video", 16, 3), read[:3])
    assert torch.equal(read_clip(tmp_path / "video" / "10.png", 16), read[9:10])
    assert read_clip(tmp_path / "video", 8).shape == (11, 3, 8, 8) and clip_size(tmp_path / "video") == (16, 16)
    iio.imwrite(tmp_path / "wide.gif", (255 * images(4, size=24)[:, :, 4:20]).byte().permute(0, 2, 3, 1).numpy())
    assert read_clip(tmp_path / "wide.gif", 16).shape == (4, 3, 16, 16) and clip_size(tmp_path / "wide.gif") == (16, 24)


def test_what_is_no_clip_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no frames")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, message in (("empty", "holds no frames"), ("missing", "not found"), ("text.txt", "is none; legal: an")):
        with pytest.raises(UserError, match=message):
            read_clip(tmp_path / name, 16)
    with pytest.raises(UserError, match=r"torn\.png: cannot be read"):
        read_clip(tmp_path / "torn.png", 16)


# ------------------------------------------------------------------------------------------------ the command with it


def ask(place, *arguments):
    run_in(place, command.main, *arguments)


def test_a_file_of_edits_is_replayed(place, capsys):
    edits = (Edit("move", (2,), (0.1, -0.2), SEEN - 1), Edit("remove", (0,)))
    EditFile("checkpoints/ddlp-balls", "assets/balls/1", None, SEEN, HORIZON, edits).write(place / "edits.json")
    ask(place, "--edits", "edits.json", "--out", "replayed.gif")
    assert capsys.readouterr().out.strip() == "replayed.gif"
    clip = read_clip(place / "assets/balls/1", 32, HORIZON)
    compared = what_if(load_model(place / "checkpoints/ddlp-balls"), clip, edits, HORIZON, SEEN)
    expected = command.side_by_side(command.comparison_panels(compared, clip, SEEN))
    save_animation(expected, place / "expected.gif", 0.06)
    assert (place / "replayed.gif").read_bytes() == (place / "expected.gif").read_bytes()


def test_the_command_of_a_file_does_the_same(place, monkeypatch):
    edits = (*EVERY_KIND, Edit("scale", (0, 1), (1.25,)))
    file = EditFile("checkpoints/ddlp-balls", "assets/balls/1", None, 4, 7, edits)
    file.write(place / "edits.json")
    shown = []
    monkeypatch.setattr(command, "show_comparison", lambda *arguments: shown.append(arguments))
    ask(place, "--edits", "edits.json")
    words = file.command().split()
    assert words[:2] == ["python", "what_if.py"]
    ask(place, *words[2:])
    (_, request, source, first), (_, again, same, second) = shown
    assert tuple(first) == tuple(second) == edits and request.cond_steps == again.cond_steps == 4
    assert request.horizon == again.horizon == 7 and request.run.path == again.run.path
    assert torch.equal(source.particles.z, same.particles.z) and torch.equal(source.frames, same.frames)


def test_what_is_given_beside_a_file_counts(place, monkeypatch):
    LEGAL.write(place / "edits.json")
    seen = []
    monkeypatch.setattr(command, "show_comparison", lambda args, request, source, edits: seen.extend([request, edits]))
    arguments = ["-p", "checkpoints/ddlp-balls", "--video", "assets/balls/0", "--horizon", "8", "--remove", "1"]
    ask(place, "--edits", "edits.json", *arguments)
    assert seen[0].horizon == 8 and seen[1] == [*LEGAL.edits, Edit("remove", (1,))]


def test_an_image_is_edited_too(place, capsys):
    arguments = ["-p", "checkpoints/dlp-shapes", "--video", "assets/shapes/0"]
    ask(place, *arguments, "--move", "1:0.2,0.1", "--out", "image.png")
    image = iio.imread(place / "image.png")
    assert image.shape[1] > 3 * 256
    ask(place, *arguments, "--out", "particles.png")
    assert iio.imread(place / "particles.png").shape == (256, 256, 3)
    with pytest.raises(UserError, match="--horizon is 3; legal with a run of kind dlp, which predicts nothing: 1"):
        ask(place, *arguments, "--horizon", 3)


def test_generated_frames_are_edited_too(place, monkeypatch):
    shown = []
    monkeypatch.setattr(command, "show_comparison", lambda *arguments: shown.append(arguments))
    edits = ["--move", "1@3:0.2,0.1"]
    for seed in (3, 3, 4):
        ask(place, "-p", "checkpoints/diffuse-ddlp-balls", "--seed", seed, *edits)
    first, again, other = (arguments[2].particles.z for arguments in shown)
    assert first.shape[1] == 4 and torch.equal(first, again) and not torch.equal(first, other)
    EditFile("checkpoints/diffuse-ddlp-balls", None, 3, 4, HORIZON, (parse_edit("move", edits[1]),)).write(
        place / "edits.json"
    )
    ask(place, "--edits", "edits.json")
    assert torch.equal(shown[-1][2].particles.z, first) and shown[-1][3] == [Edit("move", (1,), (0.2, 0.1), 3)]
    ask(place, "--edits", "edits.json", "--seed", 0)
    assert not torch.equal(shown[-1][2].particles.z, first)
    with pytest.raises(UserError, match="a DiffuseDDLP sees nothing"):
        ask(place, "-p", "checkpoints/diffuse-ddlp-balls", "--video", "assets/balls/0")


def test_a_video_that_ends_early_is_shown_as_far_as_it_goes():
    clip = images(3)
    compared = command.Comparison(images(5), scattered_particles(5).map(lambda x: x[0]), *[None] * 2)
    compared.altered_video, compared.altered_particles = compared.video, compared.particles
    recorded, *_ = command.comparison_panels(compared, clip, 3)
    assert recorded.labels == ["GT:0", "GT:1", "GT:2", "", ""] and recorded.colors[3:] == ["white", "white"]
    assert (recorded.frames[3:] == 1).all() and not (recorded.frames[:3] == 1).all()


def test_a_video_of_ones_own_that_is_too_short_is_refused(place):
    with pytest.raises(UserError, match=r"1\.png: has 1 frames; legal: at least the 5 seen"):
        ask(place, "-p", "checkpoints/ddlp-balls", "--video", "assets/balls/0/1.png", "--remove", 1)


def test_nothing_to_open_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments([])
    assert "-p/--path, or --edits" in capsys.readouterr().err
