"""Animations as they are read back from their files: contents, borders, labels, times; curves over a horizon."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from utils import animation, plotting
from utils.errors import UserError
from utils.util_func import animate_trajectories

RED, BLUE, GREEN, WHITE = (255, 0, 0), (0, 0, 255), (0, 128, 0), (255, 255, 255)


def video(steps=5, height=16, width=16, seed=0):
    """Grey blocks of 4 x 4 pixels, float32 [T, H, W, 3]: no colour of a border among them."""
    grey = np.random.default_rng(seed).uniform(0.1, 0.8, (steps, height // 4, width // 4, 1)).astype(np.float32)
    return grey.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)


def read_gif(path):
    """The frames as int array [T, h, w, 3] and their times in milliseconds, as Pillow reads them."""
    frames, times = [], []
    with Image.open(path) as file:
        for frame in ImageSequence.Iterator(file):
            frames.append(np.asarray(frame.convert("RGB")).astype(int))
            times.append(frame.info["duration"])
    return np.stack(frames), times


def box(frame, color, tolerance=4):
    """(top, bottom, left, right) of the smallest box around all pixels of a colour; the last ones exclusive."""
    rows, columns = (np.abs(frame.astype(int) - color).max(-1) <= tolerance).nonzero()
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def inside(frame, color):
    """What a border of that colour encloses."""
    top, bottom, left, right = box(frame, color)
    rim = animation.BORDER
    assert np.abs(frame[top, left:right].astype(int) - color).max() <= 4
    assert np.abs(frame[top:bottom, right - 1].astype(int) - color).max() <= 4
    return frame[top + rim : bottom - rim, left + rim : right - rim]


def enlarged(frame, zoom):
    return (frame * 255).repeat(zoom, axis=0).repeat(zoom, axis=1)


def has(frame, color):
    return (np.abs(frame - color).max(-1) <= 4).any()


# The published call


def test_a_gif_shows_recording_and_prediction_in_their_borders(tmp_path):
    truth, prediction = video(), video(seed=1)
    animate_trajectories(truth, prediction, tmp_path / "a.gif", rec_to_pred_t=2, title="two videos")
    frames, _ = read_gif(tmp_path / "a.gif")
    assert len(frames) == 5
    for t, frame in enumerate(frames):
        color, other = (BLUE, GREEN) if t < 2 else (GREEN, BLUE)
        assert not has(frame, other)
        assert np.abs(inside(frame, RED) - enlarged(truth[t], 8)).max() <= 8
        assert np.abs(inside(frame, color) - enlarged(prediction[t], 8)).max() <= 8
        assert box(frame, RED)[:2] == box(frame, color)[:2] and box(frame, RED)[3] < box(frame, color)[2]


@pytest.mark.parametrize("rec_to_pred_t", [0, 3, 9])
def test_labels_and_borders_change_with_the_first_predicted_frame(rec_to_pred_t):
    panel = animation.prediction_panel(video(), rec_to_pred_t)
    known = min(rec_to_pred_t, 5)
    conditioned = ["REC:0", "REC:1", "REC:2", "REC:3", "REC:4"]
    predicted = ["PRED:0", "PRED:1", "PRED:2", "PRED:3", "PRED:4"]
    assert panel.labels == conditioned[:known] + predicted[known:]
    assert panel.colors == ["blue"] * known + ["green"] * (5 - known)
    assert animation.prediction_panel(video(), 4, name="PUSHED").labels[4] == "PUSHED:4"
    truth = animation.ground_truth_panel(video(2))
    assert truth.labels == ["GT:0", "GT:1"] and truth.colors == ["red", "red"]


def test_the_written_labels_are_those_of_the_panels(tmp_path):
    truth, prediction = video(3), video(3, seed=1)
    panels = [
        animation.Panel(truth, ["GT:0", "GT:1", "GT:2"], ["red"] * 3),
        animation.Panel(prediction, ["REC:0", "PRED:1", "PRED:2"], ["blue", "green", "green"]),
    ]
    expected = animation.side_by_side(panels)
    animate_trajectories(truth, prediction, tmp_path / "a.gif", rec_to_pred_t=1)
    frames, _ = read_gif(tmp_path / "a.gif")
    assert np.abs(frames - expected).max() <= 8
    strips = expected[:, : box(expected[0], RED)[0]]
    for strip in np.split(strips, 2, axis=2):
        assert (strip[0] != strip[1]).any() and (strip[1] != strip[2]).any()


@pytest.mark.parametrize(("duration", "milliseconds"), [(0.06, 60), (0.08, 80), (0.57, 570), (0.034, 30), (0.001, 20)])
def test_a_gif_has_the_frame_time_and_repeats_for_ever(tmp_path, duration, milliseconds):
    animate_trajectories(video(), video(seed=1), tmp_path / "a.gif", duration=duration)
    assert read_gif(tmp_path / "a.gif")[1] == [milliseconds] * 5
    with Image.open(tmp_path / "a.gif") as file:
        assert file.info["loop"] == 0


@pytest.mark.parametrize("order", [[0, 0, 1, 2, 2, 2, 0], [1, 1, 1], [2]])
def test_frames_that_stand_still_keep_their_time(tmp_path, order):
    frames = (video() * 255).astype(np.uint8)[order]
    animation.save_animation(frames, tmp_path / "a.gif", 0.06)
    shown, times = read_gif(tmp_path / "a.gif")
    starts = [0, *np.cumsum(times)]
    assert starts[-1] == 60 * len(order)
    for t in range(len(order)):
        at = np.searchsorted(starts, 60 * t, side="right") - 1
        assert np.abs(shown[at] - frames[t]).max() <= 4


def test_a_gradient_has_small_errors_and_no_dithering(tmp_path):
    y, x = np.mgrid[:128, :128] / 127
    frame = np.stack([0.3 + 0.4 * x, 0.5 + 0.3 * np.sin(3 * y), 0.7 - 0.5 * x * y], axis=-1)
    animate_trajectories(frame[None], frame[None], tmp_path / "a.gif")
    picture = inside(read_gif(tmp_path / "a.gif")[0][0], RED)
    error = picture - frame * 255
    assert picture.shape == (128, 128, 3) and np.abs(error).max() <= 12 and np.abs(error).mean() < 2
    # Dithering would make nearly every pixel differ from its neighbour.
    assert (picture[:, 1:] != picture[:, :-1]).any(-1).mean() < 0.3


def test_an_mp4_has_the_frames_the_rate_and_the_colors(tmp_path):
    truth, prediction = video(7, 20, 20), video(7, 20, 20, seed=1)
    prediction[..., 2] = 0.2  # yellowish blocks
    animate_trajectories(truth, prediction, tmp_path / "a.mp4", duration=0.06, rec_to_pred_t=3, title="a film")
    frames = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG").astype(int)
    meta = iio.immeta(tmp_path / "a.mp4", plugin="FFMPEG")
    assert meta["fps"] == pytest.approx(1 / 0.06, rel=0.01) and meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p") and "bt709" in meta["pix_fmt"]
    assert meta["duration"] == pytest.approx(7 * 0.06, abs=0.02)
    expected = animation.side_by_side(
        [animation.ground_truth_panel(truth), animation.prediction_panel(prediction, 3)], "a film"
    )
    assert frames.shape == expected.shape
    assert np.abs(frames - expected).mean() < 4
    top, _, left, _ = box(expected[0], BLUE)
    for t, color in enumerate([BLUE] * 3 + [GREEN] * 4):
        rim = frames[t, top + 1 : top + 3, left + 20 : left + 100].mean((0, 1))
        assert np.abs(rim - color).max() < 24
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_an_mp4_of_odd_sides_gets_a_white_line(tmp_path):
    frames = np.full((2, 33, 47, 3), 100, np.uint8)
    animation.save_animation(frames, tmp_path / "a.MP4", 0.1)
    shown = iio.imread((tmp_path / "a.MP4").read_bytes(), extension=".mp4", plugin="FFMPEG").astype(int)
    assert shown.shape == (2, 34, 48, 3)
    assert np.abs(shown[:, :30, :44] - 100).max() < 8 and shown[:, 33].min() > 200 and shown[:, :, 47].min() > 200


def test_all_forms_of_a_video_give_the_same_file(tmp_path):
    pixels = (video(3, 24, 32) * 255).astype(np.uint8)
    floats = torch.from_numpy(pixels / 255)
    forms = {
        "uint8": pixels,
        "channels first": pixels.transpose(0, 3, 1, 2),
        "array": floats.numpy(),
        "tensor": floats.permute(0, 3, 1, 2).float().requires_grad_(),
        "uint8 tensor": torch.from_numpy(pixels),
    }
    files = set()
    for name, form in forms.items():
        animate_trajectories(form, form, tmp_path / f"{name}.gif")
        files.add((tmp_path / f"{name}.gif").read_bytes())
    assert len(files) == 1
    frames, _ = read_gif(tmp_path / "tensor.gif")
    assert np.abs(inside(frames[2], RED) - enlarged(pixels[2] / 255, 4)).max() <= 8


def test_values_out_of_range_are_clamped_and_inputs_kept():
    frames = torch.tensor([-3.0, 0.5, 7.0])[:, None, None, None].expand(3, 3, 8, 8).clone()
    panel = animation.Panel(frames, [""] * 3, ["red"] * 3)
    pictures = animation.side_by_side([panel])
    assert [inside(picture, RED).mean() for picture in pictures] == [0, 128, 255]
    assert frames[:, 0, 0, 0].tolist() == [-3.0, 0.5, 7.0]


# Composition


@pytest.mark.parametrize(("side", "shown"), [(16, 128), (64, 128), (100, 200), (128, 128), (160, 160)])
def test_small_videos_are_enlarged_by_a_whole_factor(side, shown):
    frames = video(1, side, side)
    picture = animation.side_by_side([animation.ground_truth_panel(frames)])[0]
    assert np.array_equal(inside(picture, RED), enlarged(frames[0], shown // side).round())


def test_panels_of_different_widths_share_their_height():
    panels = [animation.ground_truth_panel(video(2, 32, width)) for width in (32, 64)]
    panels[1].colors = [(0, 0, 1), "green"]
    pictures = animation.side_by_side(panels)
    assert inside(pictures[0], RED).shape == (128, 128, 3) and inside(pictures[0], BLUE).shape == (128, 256, 3)
    assert inside(pictures[1], GREEN).shape == (128, 256, 3)
    between = pictures[0][:, box(pictures[0], RED)[3] : box(pictures[0], BLUE)[2]]
    assert between.shape[1] == animation.GAP and (between == 255).all()


@pytest.mark.parametrize(
    ("label", "title"),
    [("PRED:100", "obj3d128, epoch 20"), ("W" * 60, "M" * 100), ("what if ball 3 went left: 100", "a b " * 40)],
)
def test_text_is_written_in_full_above_the_videos(label, title):
    panels = [animation.Panel(np.zeros((1, 8, 8, 3)), [label], [color]) for color in ("red", "blue")]
    picture = animation.side_by_side(panels, title)[0]
    text = picture[: box(picture, RED)[0]].min(-1) < 255
    rows, columns = text.nonzero()
    assert rows.min() > 0 and rows.max() < len(text) - 1 and columns.min() > 0 and columns.max() < text.shape[1] - 1
    middle = (box(picture, RED)[3] + box(picture, BLUE)[2]) // 2
    bare = animation.side_by_side(panels)[0]
    labels = bare[: box(bare, RED)[0]].min(-1) < 255
    assert not labels[:, middle - 2 : middle + 2].any()
    # All of it: as much ink as each word has when it is drawn on its own with all the room it needs.
    ink = (255.0 - bare[: box(bare, RED)[0]]).sum() / 2
    assert ink == pytest.approx(sum(ink_of(word) for word in label.split()), rel=0.02)


def ink_of(word):
    canvas = np.ones((60, 2000, 3), np.float32)
    plotting.draw_text(canvas, word, (20, 40), animation.FONT_SCALE, (0.0, 0.0, 0.0))
    return (255 * (1 - canvas)).sum()


def test_an_animation_without_title_is_its_labels_and_videos():
    panels = [animation.ground_truth_panel(video(2))]
    plain, titled = animation.side_by_side(panels), animation.side_by_side(panels, "title")
    assert np.array_equal(titled[:, animation.LINE_HEIGHT :], plain)
    assert plain.dtype == np.uint8 and plain.shape[1] == animation.LINE_HEIGHT + 128 + 8 + animation.GAP


# Errors and files


@pytest.mark.parametrize("name", ["a.avi", "a", "gif", "a.gif.txt"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name} is .*; legal: .* \.gif or \.mp4$"):
        animate_trajectories(video(), video(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("duration", [0, -1.0, float("nan"), float("inf")])
def test_a_duration_must_be_positive(tmp_path, duration):
    with pytest.raises(UserError, match="duration is"):
        animate_trajectories(video(), video(), tmp_path / "a.gif", duration=duration)


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        (video(5), video(4), r"\[5, 3, 16, 16\] and \[4, 3, 16, 16\].*equally long"),
        (video(5), video(5, height=32), r"\[5, 3, 32, 16\].*equally long and high"),
        (video(5)[0], video(5), r"\[16, 16, 3\]; legal: \[T, H, W, 3\] or \[T, 3, H, W\]"),
        (video(5)[..., :1], video(5), r"\[5, 16, 16, 1\]"),
        (video(5)[:0], video(5)[:0], r"\[0, 16, 16, 3\]"),
        (video(5).astype(np.int64), video(5), r"int64"),
    ],
)
def test_videos_that_do_not_fit_are_refused(tmp_path, truth, prediction, message):
    with pytest.raises(ValueError, match=message):
        animate_trajectories(truth, prediction, tmp_path / "a.gif")


def test_a_panel_needs_a_label_and_a_color_per_frame():
    with pytest.raises(ValueError, match="5 frames, 4 labels, 5 colours"):
        animation.Panel(video(), ["a"] * 4, ["red"] * 5)
    with pytest.raises(ValueError, match="5 frames, 5 labels, 1 colours"):
        animation.Panel(video(), ["a"] * 5, ["red"])


def test_an_interrupted_write_leaves_the_old_animation(tmp_path, monkeypatch):
    animate_trajectories(video(), video(), tmp_path / "a.gif")
    before = (tmp_path / "a.gif").read_bytes()

    def half_a_file(path, data):
        with open(path, "wb") as file:
            file.write(data[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half_a_file)
    with pytest.raises(UserError, match=r"a.gif: cannot be written: disk full"):
        animate_trajectories(video(), video(seed=1), tmp_path / "a.gif")
    assert (tmp_path / "a.gif").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_a_missing_folder_is_named_in_one_line(tmp_path, name):
    with pytest.raises(UserError, match=rf"^.*missing.{name}: cannot be written: No such file or directory$"):
        animate_trajectories(video(1), video(1), tmp_path / "missing" / name)


# Curves over the horizon


def test_a_horizon_graph_has_axes_for_each_quantity(monkeypatch):
    monkeypatch.setattr(plotting, "_figure_pixels", lambda figure: figure)
    panels = {
        "position error": {"model": [1.0, None, 3.0], "baseline": [2.0, float("inf"), float("nan")]},
        "SSIM": {"model": [0.9, 0.8]},
        "speed": {"model": [None, None]},
    }
    error, ssim, speed = plotting.horizon_graph(panels, first=6).axes
    assert [axes.get_ylabel() for axes in (error, ssim, speed)] == ["position error", "SSIM", "speed"]
    assert {axes.get_xlabel() for axes in (error, ssim, speed)} == {"frame"}
    gap = float("nan")
    for line, expected in zip(error.lines, [[(6, 1), (7, gap), (8, 3)], [(6, 2), (7, gap), (8, gap)]], strict=True):
        np.testing.assert_array_equal(line.get_xydata(), expected)
    assert [text.get_text() for text in error.get_legend().get_texts()] == ["model", "baseline"]
    assert ssim.lines[0].get_xydata().tolist() == [[6, 0.9], [7, 0.8]] and ssim.get_legend() is None
    assert not speed.lines and [text.get_text() for text in speed.texts] == ["no values"]
    assert plotting.horizon_graph({"a": {"b": [1.0]}}, xlabel="step").axes[0].get_xlabel() == "step"


def test_a_horizon_graph_is_drawn_with_its_gaps():
    line_color = torch.tensor([31, 119, 180])[:, None, None]  # the first of matplotlib's colour cycle

    def drawn(values):
        graph = plotting.horizon_graph({"error": {"model": values}, "speed": {}})
        assert graph.shape == (3, 400, 1000) and graph.dtype == torch.float32
        return ((graph * 255).round() == line_color).all(0)

    whole, broken = drawn([1.0] * 20), drawn([1.0] * 5 + [float("nan")] * 10 + [1.0] * 5)
    assert not whole[:, 500:].any() and not broken[:, 500:].any()
    columns, remaining = whole.any(0).sum(), broken.any(0).sum()
    assert columns > 350 and 0.35 * columns < remaining < 0.6 * columns
