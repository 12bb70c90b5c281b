"""Animations: videos side by side, each frame with a coloured border and a label, written as GIF or MP4.

Shapes: T frames, H and W the sides of a video, h and w those of the animation.
"""

from dataclasses import dataclass
from io import BytesIO
from math import isfinite
from pathlib import Path
from textwrap import wrap

import cv2
import imageio.v3 as iio
import numpy as np
import torch
from imageio_ffmpeg import get_ffmpeg_version
from matplotlib.colors import to_rgb
from PIL import Image

from utils.errors import UserError
from utils.files import atomic_write
from utils.legal import illegal
from utils.plotting import LEGIBLE_SIDE, draw_text, enlarge, images_on_cpu, zoom_factor

ANIMATION_FORMATS = ("gif", "mp4")
BORDER = 4  # pixels around each video
GAP = 6  # white pixels between the panels and around them all
LINE_HEIGHT = 20  # pixels, of a line of text
BASELINE = 15  # pixels from a line's top
FONT_SCALE = 0.5  # of cv2's plain font: capitals of 11 pixels
# The file says how its colours were converted; where one does not, players guess, each in its own way.
MP4_COLORS = "scale=out_color_matrix=bt709,setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709"


@dataclass
class Panel:
    """One video of an animation.

    Attributes:
        frames: [T, 3, H, W] in 0..1, or [T, H, W, 3], or uint8 in 0..255; a tensor or an array. Kept as float32
            [T, 3, H, W].
        labels: T strings, written above the frames.
        colors: T colours of the frames' borders, matplotlib's names or RGB triples in 0..1.

    Raises:
        ValueError: there are no frames, or their shape or type or the number of labels or colours is wrong.
    """

    frames: torch.Tensor
    labels: list
    colors: list

    def __post_init__(self):
        self.frames = _as_video(self.frames)
        if not len(self.frames) == len(self.labels) == len(self.colors):
            counts = f"{len(self.frames)} frames, {len(self.labels)} labels, {len(self.colors)} colours"
            raise ValueError(f"a panel of {counts}; legal: a label and a colour per frame")


def ground_truth_panel(frames):
    """A recorded video (see `Panel`) in red frames, with the labels "GT:t"."""
    return Panel(frames, [f"GT:{t}" for t in range(len(frames))], ["red"] * len(frames))


def prediction_panel(frames, rec_to_pred_t, name="PRED"):
    """A predicted video (see `Panel`): up to frame `rec_to_pred_t` in blue frames, with the labels "REC:t", from it on
    in green ones, with the labels "`name`:t"."""
    steps = range(len(frames))
    labels = [f"REC:{t}" if t < rec_to_pred_t else f"{name}:{t}" for t in steps]
    return Panel(frames, labels, ["blue" if t < rec_to_pred_t else "green" for t in steps])


def generated_panel(frames, diffuse_frames, first=1):
    """A generated video (see `Panel`) from its frame `first` on, counted from 1: the `diffuse_frames` that the
    diffusion drew in purple frames, those that were predicted from them in green ones, with the labels "t=1", ..."""
    steps = range(first, first + len(frames))
    colors = ["purple" if t <= diffuse_frames else "green" for t in steps]
    return Panel(frames, [f"t={t}" for t in steps], colors)


def side_by_side(panels, title=None):
    """The frames of an animation: the panels from left to right, each with its labels above it.

    Videos narrower than `plotting.LEGIBLE_SIDE` are enlarged by a whole factor, the same for all. Text that is wider
    than its place is broken into lines.

    Args:
        panels: list of `Panel`, of one length and height.
        title: a line above them all; ASCII, as the labels.

    Returns:
        uint8 array [T, h, w, 3].

    Raises:
        ValueError: the panels' lengths or heights differ.
    """
    if len({(len(panel.frames), panel.frames.shape[-2]) for panel in panels}) > 1:
        shapes = " and ".join(str(list(panel.frames.shape)) for panel in panels)
        raise ValueError(f"videos side by side of [T, 3, H, W] {shapes}; legal: equally long and high ones")
    narrowest = min((panel.frames for panel in panels), key=lambda frames: frames.shape[-1])
    zoom = zoom_factor(narrowest, LEGIBLE_SIDE)
    bordered = [_with_borders(panel, zoom) for panel in panels]
    labels = _label_strips([panel.labels for panel in panels], [video.shape[2] for video in bordered])
    columns = [np.concatenate(parts, axis=1) for parts in zip(labels, bordered, strict=True)]
    frames = _pad(np.concatenate([_pad(column, left=GAP) for column in columns], axis=2), right=GAP, bottom=GAP)
    width = frames.shape[2]
    heading = _text(_lines(title or "", width), width)
    return np.concatenate([np.broadcast_to(heading, (len(frames), *heading.shape)), frames], axis=1)


def save_animation(frames, path, duration):
    """Write an animation, by the path's ending as GIF, which repeats for ever, or as MP4 (H.264).

    The file appears complete or not at all. A GIF's times are whole hundredths of a second, and 0.02 s at least, as
    browsers slow down what is faster; equal frames in a row become one that lasts as long as they did. An MP4 has even
    sides: a white line is added where needed.

    Args:
        frames: uint8 array [T, h, w, 3].
        path: ends in one of `ANIMATION_FORMATS`.
        duration: of a frame, seconds.

    Raises:
        UserError: the ending is another one, the duration is not a positive number, or the file cannot be written.
    """
    encode = dict(zip(ANIMATION_FORMATS, (_gif, _mp4), strict=True))[animation_format(path)]
    if not (isfinite(duration) and duration > 0):
        raise illegal("duration", duration, "seconds above 0")
    data = encode(frames, duration)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def animation_format(path):
    """Which of `ANIMATION_FORMATS` a path's ending names; `UserError` if none."""
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in ANIMATION_FORMATS:
        endings = " or ".join(f".{name}" for name in ANIMATION_FORMATS)
        raise UserError(f"{path} is no name for an animation; legal: one that ends in {endings}")
    return suffix


def animate_trajectories(
    orig_trajectory, pred_trajectory, path="./traj_anim.gif", duration=0.08, rec_to_pred_t=10, title=None
):
    """Write an animation of a recorded video (left) and its prediction (right).

    The recording has red frames and the labels "GT:t"; the prediction blue ones and "REC:t" up to frame
    `rec_to_pred_t`, where the model stops to see the recording, then green ones and "PRED:t".

    Args:
        orig_trajectory, pred_trajectory: [T, H, W, 3] or [T, 3, H, W] in 0..1, or uint8 in 0..255; tensors or arrays.
        path: the file, see `save_animation`.
        duration: of a frame, seconds.
        rec_to_pred_t: the first frame that is predicted.
        title: a line of text above the videos.

    Raises:
        ValueError: the videos differ in length or height, or are no videos.
        UserError: see `save_animation`.
    """
    panels = [ground_truth_panel(orig_trajectory), prediction_panel(pred_trajectory, rec_to_pred_t)]
    save_animation(side_by_side(panels, title), path, duration)


def _as_video(frames):
    """float32 [T, 3, H, W] in 0..1 on the CPU from any of the forms that `Panel` takes."""
    frames = frames if isinstance(frames, torch.Tensor) else torch.from_numpy(np.array(frames))
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[-1]) or not len(frames):
        raise ValueError(f"a video of shape {list(frames.shape)}; legal: [T, H, W, 3] or [T, 3, H, W] with T > 0")
    if not (frames.is_floating_point() or frames.dtype == torch.uint8):
        raise ValueError(f"a video of {frames.dtype}; legal: floats in 0..1 or uint8 in 0..255")
    video = images_on_cpu(frames) / (255 if frames.dtype == torch.uint8 else 1)
    return video.permute(0, 3, 1, 2) if video.shape[-1] == 3 else video


def _with_borders(panel, zoom):
    """The panel's enlarged frames in their borders: uint8 [T, h, w, 3]."""
    video = _to_bytes(enlarge(panel.frames, zoom).permute(0, 2, 3, 1))
    colors = _to_bytes(torch.tensor([to_rgb(color) for color in panel.colors]))
    height, width = video.shape[1:3]
    canvas = np.repeat(np.repeat(colors[:, None, None], height + 2 * BORDER, axis=1), width + 2 * BORDER, axis=2)
    canvas[:, BORDER:-BORDER, BORDER:-BORDER] = video
    return canvas


def _label_strips(labels, widths):
    """For each panel a strip [T, h, w, 3] with its labels; all are as high as the label with the most lines needs."""
    lines = [[_lines(label, width) for label in texts] for texts, width in zip(labels, widths, strict=True)]
    height = max(len(text) for texts in lines for text in texts)
    padded = [[[""] * (height - len(text)) + text for text in texts] for texts in lines]
    return [np.stack([_text(text, width) for text in texts]) for texts, width in zip(padded, widths, strict=True)]


def _lines(text, width):
    """The text in as few lines as fit into `width` pixels with a margin; none if there is no text."""
    for length in range(len(text), 0, -1):
        lines = wrap(text, length)
        if all(_text_width(line) <= width - 2 * BORDER for line in lines):
            return lines
    return []


def _text_width(text):
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, FONT_SCALE, 1)[0][0]


def _text(lines, width):
    """Lines of black text, each in the middle of a white strip: uint8 [h, width, 3]."""
    canvas = np.ones((LINE_HEIGHT * len(lines), width, 3), np.float32)
    for i, line in enumerate(lines):
        origin = ((width - _text_width(line)) // 2, LINE_HEIGHT * i + BASELINE)
        draw_text(canvas, line, origin, FONT_SCALE, (0.0, 0.0, 0.0))
    return _to_bytes(torch.from_numpy(canvas))


def _to_bytes(tensor):
    """An array of uint8 from a tensor in 0..1."""
    return (tensor.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _pad(frames, left=0, right=0, bottom=0):
    """Frames [T, h, w, 3] with white margins."""
    return np.pad(frames, ((0, 0), (0, bottom), (left, right), (0, 0)), constant_values=255)


def _gif(frames, duration):
    """The bytes of a GIF."""
    # Of Pillow's ways to choose a frame's colours the one with the smallest errors; dithering would flicker. The 256th
    # colour is left to Pillow, which marks with it what stays as it is.
    options = {"colors": 255, "method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
    images = [Image.fromarray(frame).quantize(**options) for frame in frames]
    milliseconds = 10 * max(2, round(duration * 100))
    buffer = BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return buffer.getvalue()


def _mp4(frames, duration):
    """The bytes of an MP4 that browsers play: yuv420p, and its index in front."""
    try:
        get_ffmpeg_version()
    except (RuntimeError, OSError) as error:
        raise UserError("an MP4 needs ffmpeg; legal: pip install imageio-ffmpeg, which brings one, or .gif") from error
    frames = _pad(frames, right=frames.shape[2] % 2, bottom=frames.shape[1] % 2)
    return iio.imwrite(
        "<bytes>",
        frames,
        extension=".mp4",
        plugin="FFMPEG",
        fps=1 / duration,
        codec="libx264",
        pixelformat="yuv420p",
        macro_block_size=1,
        output_params=["-crf", "18", "-vf", MP4_COLORS, "-movflags", "+faststart"],
    )
