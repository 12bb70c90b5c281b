"""Balls-Interaction: videos of balls that bounce off each other and off the walls, in HDF5 files.

`datasets/balls_preparation.py` makes the files and says what they hold and in which coordinates.
"""

import os
import shlex
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from utils.errors import UserError

DEFAULT_ROOT = "./data/balls"

_FILES = {"train": "train.hdf5", "val": "val.hdf5", "valid": "val.hdf5", "test": "test.hdf5"}
# The further entries of an item, as torch has them.
_ANNOTATIONS = {"positions": np.float32, "sizes": np.float32, "ids": np.int64, "in_camera": np.int64}


def to_normalized(positions, image_size):
    """The positions of the files as positions of the model.

    `positions`: array or tensor of any shape, in pixels of an image of `image_size` (at least 2) pixels a side, pixel i
    covering [i, i + 1). Returns the same in -1..1, where -1 and 1 are the centres of the first and the last pixel.
    """
    return 2 * (positions - 0.5) / (image_size - 1) - 1


class BallsVideos(Dataset):
    """Videos: in train every window of `sample_length` frames of every episode, otherwise whole episodes.

    `root`: folder of train.hdf5, val.hdf5 and test.hdf5, None for ./data/balls. `mode`: "train", "val" (or "valid") or
    "test". `image_size`: side of the frames in pixels, which must be the file's. `sample_length`: frames of a window.

    An item is the tuple of

    - the video: float32 [T, 3, H, W] in 0..1;
    - the balls' positions: float32 [T, n, 2], (row, column) in pixels (see `to_normalized`);
    - their sizes: float32 [T, n], the radius in pixels;
    - their ids: int64 [T, n], from 1, and 0 for a ball out of view;
    - in_camera: int64 [T, n], 1 where the ball is in view;

    empty where the file has no such array. Arrays that lie in the file as they are (contiguous) are mapped into memory
    and shared by all workers and processes; others are read through h5py, opened once per process.

    Raises UserError for an illegal argument, and a file that is missing, damaged or not of this format.
    """

    def __init__(self, root, mode="train", image_size=64, sample_length=10):
        if mode not in _FILES:
            raise UserError(f"mode: {mode!r} is unknown; legal are train, val (or valid) and test")
        self._root = os.fspath(DEFAULT_ROOT if root is None else root)
        self._path = Path(self._root) / _FILES[mode]
        self._image_size = _at_least_1("image_size", image_size)
        self._length = _at_least_1("sample_length", sample_length)
        self._open()
        if self._length > self._num_frames:
            raise UserError(
                f"sample_length: {sample_length} frames are more than the {self._num_frames} of an episode of"
                f" {self._path}"
            )
        if not self._has_windows(mode):
            self._length = self._num_frames

    @staticmethod
    def _has_windows(mode):
        return mode == "train"

    def __len__(self):
        return self._num_episodes * self._items_per_episode

    @property
    def _items_per_episode(self):
        return self._num_frames - self._length + 1

    def __getitem__(self, index):
        """The tuple (video, positions, sizes, ids, in_camera), see the class."""
        episode, first = divmod(range(len(self))[index], self._items_per_episode)
        frames = slice(first, first + self._length)
        video = torch.from_numpy(self._array("imgs")[episode, frames].transpose(0, 3, 1, 2).copy()).float() / 255
        return video, *(self._annotation(name, episode, frames) for name in _ANNOTATIONS)

    def _annotation(self, name, episode, frames):
        if name not in self._names:
            return torch.empty(0)
        return torch.from_numpy(self._array(name)[episode, frames].astype(_ANNOTATIONS[name]))

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
                self._num_episodes, self._num_frames = self._checked_images(file).shape[:2]
                self._names = {"imgs", *(name for name in _ANNOTATIONS if self._has_annotation(file, name))}
                self._mapped = {
                    name: _mapped(file[name], self._path) for name in self._names if _is_mappable(file[name])
                }
        except (OSError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self._path} is not a whole HDF5 file that can be read; delete it to make it anew: {reason}"
            ) from error

    def _checked_images(self, file):
        """The array imgs; UserError unless it is one of videos of `image_size`."""
        images = file.get("imgs")
        legal = "uint8 [episodes, frames, height, width, 3] with height = width"
        if not isinstance(images, h5py.Dataset):
            raise UserError(f"{self._path} has no array imgs; legal: {legal}")
        shape = images.shape or ()
        if images.dtype != np.uint8 or len(shape) != 5 or 0 in shape or shape[2] != shape[3] or shape[4] != 3:
            raise UserError(f"{self._path}: imgs is {images.dtype} {list(shape)}; legal: {legal}")
        if shape[2] != self._image_size:
            raise UserError(
                f"image_size: {self._image_size} is not the size of the frames of {self._path}, {shape[2]}; legal:"
                f" image_size {shape[2]}, or other files: python datasets/balls_preparation.py"
                f" --out FOLDER --image_size {self._image_size}"
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


class BallsImages(BallsVideos):
    """Windows of `sample_length` frames in every mode; a single frame [3, H, W] where `sample_length` is 1.

    Arguments, items and errors are those of `BallsVideos`; for a single frame no entry of an item has the dimension T.
    """

    @staticmethod
    def _has_windows(mode):
        return True

    def __getitem__(self, index):
        """The tuple (images, positions, sizes, ids, in_camera), see the class."""
        item = super().__getitem__(index)
        return tuple(entry[0] if len(entry) else entry for entry in item) if self._length == 1 else item


def _is_mappable(dataset):
    # HDF5 gives no offset to what is chunked, compressed, compact, virtual, in other files or never written.
    return dataset.id.get_offset() is not None and dataset.external is None


def _mapped(dataset, path):
    array = np.memmap(path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)
    return array.view(np.ndarray)


def _at_least_1(name, value):
    """`value` as an int; UserError unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name}: {value!r} is not legal; it must be a whole number of at least 1")
    return int(value)
