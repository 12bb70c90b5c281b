"""Balls-Interaction: videos of balls that bounce off each other and off the walls, in HDF5 files.

`datasets/balls_preparation.py` makes the files and says what they hold and in which coordinates.
"""

import os
import shlex
from pathlib import Path

import h5py
import numpy as np
import torch

from datasets.episodes import EpisodeVideos
from datasets.frame_sources import FrameSource
from utils.errors import UserError

DEFAULT_ROOT = "./data/balls"

# The further entries of an item, as torch has them.
_ANNOTATIONS = {"positions": np.float32, "sizes": np.float32, "ids": np.int64, "in_camera": np.int64}


def to_normalized(positions, image_size):
    """The positions of the files as positions of the model.

    `positions`: array or tensor of any shape, in pixels of an image of `image_size` (at least 2) pixels a side, pixel i
    covering [i, i + 1). Returns the same in -1..1, where -1 and 1 are the centres of the first and the last pixel.
    """
    return 2 * (positions - 0.5) / (image_size - 1) - 1


class _Episodes(FrameSource):
    """The episodes of one file.

    Arrays that lie in the file as they are (contiguous) are mapped into memory and shared by all workers and processes;
    others are read through h5py, opened once per process.
    """

    threads = 1  # h5py lets only one work at a time

    def __init__(self, root, split, image_size):
        self._root, self.folder = os.fspath(root), Path(root)
        self._path = self.folder / f"{split}.hdf5"
        self.name, self.place, self.image_size = f"balls_{split}", str(self._path), image_size
        self._open()
        self.lengths = [self._num_frames] * self._num_episodes
        self.is_mapped = "imgs" in self._mapped

    def read(self, episode, start, stop):
        """See `FrameSource`."""
        return self._read("imgs", episode, start, stop)

    def files(self):
        """See `FrameSource`."""
        yield self._path.name

    def annotation(self, name, episode, start, stop):
        """The array `name` at the frames start to stop - 1, of the type that items have; empty where the file has
        none."""
        if name not in self._names:
            return torch.empty(0)
        return torch.from_numpy(self._read(name, episode, start, stop).astype(_ANNOTATIONS[name]))

    def _read(self, name, episode, start, stop):
        try:
            return self._array(name)[episode, start:stop]
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self._path}: {name} of episode {episode} cannot be read: {reason}") from error

    def __getstate__(self):
        # A pickled memory map is a copy of its content; a spawned worker opens the file itself.
        return {name: value for name, value in vars(self).items() if name not in ("_mapped", "_file")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def _open(self):
        """Check the file and map what can be mapped; leaves no file open, so that none is shared over a fork."""
        self._file, self._file_process = None, None
        if not self._path.exists():
            raise UserError(
                f"{self._path} is missing; make it with: python datasets/balls_preparation.py"
                f" --out {shlex.quote(self._root)}"
            )
        try:
            with h5py.File(self._path, "r") as file:
                self._num_episodes, self._num_frames = self._check_images(file).shape[:2]
                self._names = {"imgs", *(name for name in _ANNOTATIONS if self._has_annotation(file, name))}
                self._mapped = {
                    name: _map_array(file[name], self._path) for name in self._names if _is_mappable(file[name])
                }
        except (OSError, KeyError, RuntimeError) as error:
            how = f"python datasets/balls_preparation.py --out {shlex.quote(self._root)}"
            raise UserError(
                f"{self._path} {hdf5_fault(error)}, or one made anew, when this one has been moved away, with: {how}"
            ) from error

    def _check_images(self, file):
        """The array imgs; UserError unless it is one of videos of `image_size`."""
        images = file.get("imgs")
        legal = "uint8 [episodes, frames, height, width, 3] with height = width"
        if not isinstance(images, h5py.Dataset):
            raise UserError(f"{self._path} has no array imgs; legal: {legal}")
        shape = images.shape or ()
        if images.dtype != np.uint8 or len(shape) != 5 or 0 in shape or shape[2] != shape[3] or shape[4] != 3:
            raise UserError(f"{self._path}: imgs is {images.dtype} {list(shape)}; legal: {legal}")
        if shape[2] != self.image_size:
            raise UserError(
                f"image_size: {self.image_size} is not the size of the frames of {self._path}, {shape[2]}; legal:"
                f" image_size {shape[2]}, or other files: python datasets/balls_preparation.py"
                f" --out FOLDER --image_size {self.image_size}"
            )
        return images

    def _has_annotation(self, file, name):
        """Whether the array `name` is there; UserError if it is not one of the episodes' frames."""
        if name not in file:
            return False
        shape = getattr(file[name], "shape", None) or ()
        if shape[:2] != (self._num_episodes, self._num_frames):
            raise UserError(
                f"{self._path}: {name} has the shape {list(shape)}; legal: {self._num_episodes} episodes of"
                f" {self._num_frames} frames first, as imgs has"
            )
        return True

    def _array(self, name):
        """An array of the file: mapped, or a dataset of h5py that this process has opened itself."""
        if name in self._mapped:
            return self._mapped[name]
        if self._file_process != os.getpid():
            if self._file is not None:
                self._file.close()
            self._file, self._file_process = h5py.File(self._path, "r"), os.getpid()
        return self._file[name]


class BallsVideos(EpisodeVideos):
    """The videos in train.hdf5, val.hdf5 and test.hdf5; arguments and errors as for `EpisodeVideos`.

    `image_size` must be the file's. An item is the tuple of

    - the video: float32 [T, 3, H, W] in 0..1;
    - the balls' positions: float32 [T, n, 2], (row, column) in pixels (see `to_normalized`);
    - their sizes: float32 [T, n], the radius in pixels;
    - their ids: int64 [T, n], from 1, and 0 for a ball out of view;
    - in_camera: int64 [T, n], 1 where the ball is in view;

    empty where the file has no such array. Frames that can be mapped from the file need no cache.
    """

    default_root = DEFAULT_ROOT
    _make_source = _Episodes

    def _annotations(self, episode, first, length):
        return tuple(self._source.annotation(name, episode, first, first + length) for name in _ANNOTATIONS)


class BallsImages(BallsVideos):
    """Windows of `sample_length` frames in every mode; where `sample_length` is 1, a single frame: [3, H, W], and no
    entry of the item has the dimension T."""

    is_images = True


def hdf5_fault(error):
    """What keeps an HDF5 file from being read, and what is legal, by the error that h5py raised."""
    if isinstance(error, BlockingIOError):
        return "is open for writing in another process; legal: a file that nobody writes to: let that process end"
    if isinstance(error, PermissionError):
        return "may not be read by this user; legal: a file that may be read"
    return f"is not a whole HDF5 file that can be read ({' '.join(str(error).split())}); legal: a whole file"


def _is_mappable(dataset):
    # HDF5 gives no offset to what is chunked, compressed, compact, virtual, in other files or never written.
    return dataset.id.get_offset() is not None and dataset.external is None


def _map_array(dataset, path):
    # Copy on write rather than read only: torch warns of arrays that cannot be written to.
    array = np.memmap(path, dataset.dtype, "c", dataset.id.get_offset(), dataset.shape)
    return array.view(np.ndarray)
