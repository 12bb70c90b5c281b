"""Small data sets in their real formats, made by the tests that need them, and the plainest reading of them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.episodes import EpisodeVideos
from datasets.frame_sources import FrameSource


def write_png(path, size=8, mode="RGB", seed=0):
    """A PNG of size x size random pixels; alpha, if it has any, is random too."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, *channels), np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


def write_episodes(folder, numbers, prefix="", size=8, mode="RGB", digits=1):
    """Folders of frames: `numbers` maps an episode's name to its number of frames."""
    for episode, number in numbers.items():
        for frame in range(number):
            path = folder / episode / f"{prefix}{frame:0{digits}d}.png"
            write_png(path, size, mode, seed=int.from_bytes(str(path.relative_to(folder.parent)).encode(), "big"))
    return folder


def frame_of(path, size, inverted=False):
    """A frame as Pillow and plain arithmetic have it, float64 [3, size, size]."""
    with Image.open(path) as image:
        opaque = Image.fromarray(np.array(image)[..., :3])
    if opaque.size != (size, size):
        opaque = opaque.resize((size, size), Image.Resampling.BICUBIC)
    values = np.array(opaque).transpose(2, 0, 1) / 255
    return 1 - values if inverted else values


def assert_item(item, frames):
    """Whether an item is the video (or the image) `frames`, and nothing else is known of it."""
    video, *others = item
    frames = np.array(frames)
    assert isinstance(item, tuple) and [other.numel() for other in others] == [0, 0, 0, 0]
    assert video.dtype == torch.float32 and video.is_contiguous() and video.shape == frames.shape
    np.testing.assert_allclose(video.numpy(), frames, rtol=0, atol=1e-7)


class TextEpisodes(FrameSource):
    """A source whose episodes are files of one digit per frame; a frame is full of its digit."""

    def __init__(self, root, split, image_size):
        self.folder, self.name, self.place, self.image_size = Path(root), f"text_{split}", f"{root}/{split}", image_size
        self._paths = sorted(Path(root).glob(f"{split}_*.txt"))
        self.lengths = [len(path.read_text()) for path in self._paths]

    def read(self, episode, start, stop):
        digits = [int(digit) for digit in self._paths[episode].read_text()[start:stop]]
        return np.array(digits, np.uint8)[:, None, None, None] * np.ones(
            (self.image_size, self.image_size, 3), np.uint8
        )

    def files(self):
        return (path.name for path in self._paths)


class TextVideos(EpisodeVideos):
    """Videos of `TextEpisodes`."""

    _make_source = TextEpisodes


def write_texts(root, **episodes):
    """The files of `TextEpisodes`: `train_0="0123"` and so on."""
    root.mkdir(parents=True, exist_ok=True)
    for name, digits in episodes.items():
        (root / f"{name}.txt").write_text(digits)
    return root


def digits_of(video):
    """The digits of a video of `TextEpisodes` as a text."""
    values = (255 * video).round().int()
    assert all(len(frame.unique()) == 1 for frame in values)
    return "".join(str(frame.flatten()[0].item()) for frame in values)
