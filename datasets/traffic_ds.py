"""Traffic: one long recording of a crossing, in one .npy, uint8 [N, 128, 128, 3].

The first 80 % of the frames are for training, the next 10 % for validation, the rest for testing. Whole episodes are
50 consecutive frames of a part, or as many as a longer `sample_length` says; what is left over at the part's end is not
used, which a warning says. Windows begin at every frame of the part; those that would go beyond its end are moved back
to end there.

`datasets/traffic_preparation.py` makes the file of the recording's numbered frames.
"""

import os
import warnings
from pathlib import Path

import numpy as np

from datasets.episodes import EpisodeVideos, Windows
from datasets.frame_cache import map_npy
from datasets.frame_sources import FrameSource, resized
from utils.errors import UserError

EPISODE_LENGTH = 50

_LEGAL = "uint8 [frames, height, width, 3] with height = width"
_HOW_TO_GET = "make it with: python datasets/traffic_preparation.py (--help)"


class _Recording(FrameSource):
    """One part of the file, as one episode; read from a map of the file that each process makes itself."""

    def __init__(self, path, split, image_size):
        self._path = Path(path)
        self.folder, self.name = self._path.parent, f"{self._path.stem}_{split}"
        self.place = f"the {split} part of {path}"
        self.image_size = image_size
        self._map()
        number = len(self._frames)
        train, val = number * 8 // 10, number // 10
        bounds = {"train": (0, train), "val": (train, train + val), "test": (train + val, number)}
        self._first, stop = bounds[split]
        self.lengths = [stop - self._first]
        self.is_mapped = self._frames.shape[1] == image_size

    def read(self, episode, start, stop):
        """See `FrameSource`."""
        frames = self._frames[self._first + start : self._first + stop]
        return frames if self.is_mapped else np.stack([resized(frame, self.image_size) for frame in frames])

    def files(self):
        """See `FrameSource`."""
        yield self._path.name

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_frames"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._map()

    def _map(self):
        try:
            self._frames = map_npy(self._path)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or "it is not a whole .npy file"
            hint = "" if os.path.exists(self._path) else f"; {_HOW_TO_GET}"
            raise UserError(f"{self._path}: cannot be read: {reason}; legal: a .npy, {_LEGAL}{hint}") from error
        shape, dtype = self._frames.shape, self._frames.dtype
        if dtype != np.uint8 or len(shape) != 4 or 0 in shape or shape[1] != shape[2] or shape[3] != 3:
            raise UserError(f"{self._path}: holds {dtype} {list(shape)}; legal: {_LEGAL}")


class TrafficVideos(EpisodeVideos):
    """Traffic's videos, `root` the path of the file; arguments, items and errors as for `EpisodeVideos`, but episodes
    and windows as the module's text says. The frames need no cache unless they are resized."""

    default_root = "./data/traffic/img128np.npy"
    _make_source = _Recording

    def _make_windows(self, lengths, has_windows):
        (number,) = lengths
        if has_windows:
            self._check_length(number)
            return Windows([number], [number - self._sample_length], [self._sample_length])
        length = max(EPISODE_LENGTH, self._sample_length)
        if number < length:
            raise UserError(f"{self._source.place} has {number} frames; legal: at least {length}, one episode")
        if number % length:
            warnings.warn(
                f"the last {number % length} of {number} frames of {self._source.place} make no whole episode of"
                f" {length} and are not used",
                UserWarning,
                stacklevel=2,
            )
        return Windows([number // length], [number - length], [length], stride=length)


class TrafficImages(TrafficVideos):
    """Windows of `sample_length` frames in every mode; a single frame [3, H, W] where `sample_length` is 1."""

    is_images = True
