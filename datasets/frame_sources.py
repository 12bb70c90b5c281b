"""The frames of episodes as they lie on disk: read from a data set's own files, decoded each time."""

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.video_files import open_image
from utils.errors import UserError
from utils.files import is_clutter, is_special_file

_LEGAL_PNG = "a whole square PNG, RGB or RGBA"


class FrameSource:
    """The frames of one part of a data set, episode after episode.

    `name`: of the data set and the part, as in "obj3d_train"; `folder`: where the data set lies; `place`: where the
    part lies, in words; `image_size`: side of the frames in pixels; `lengths`: frames of each episode.

    `is_mapped`: whether the frames lie in a file as they are, so that a cache is of no use. `threads`: how many threads
    reading is worth (None: as many as there are cores).
    """

    is_mapped = False
    threads = None
    name: str
    folder: Path
    place: str
    image_size: int
    lengths: list[int]

    def read(self, episode, start, stop):
        """The frames start to stop - 1 of an episode: uint8 [stop - start, S, S, 3], RGB. Raises UserError for a file
        that cannot be read or is not legal."""
        raise NotImplementedError

    def reader(self, episode):
        """A function of (start, stop) that reads a whole episode, block after block. Threads may call it at the same
        time, but each block is asked for after the one before it."""
        return partial(self.read, episode)

    def samples(self):
        """The (episode, frame)s by which a cache is compared with the source."""
        last = len(self.lengths) - 1
        return (0, 0), (last, self.lengths[last] - 1)

    def files(self):
        """Yield the paths in `folder` of all files that the frames are decoded from, in order."""
        raise NotImplementedError

    def fingerprint(self):
        """16 characters that change when the frames may have changed: with the names, sizes and times of change of the
        files, and with how they are used."""
        digest = hashlib.sha256(repr((self.name, self.image_size, list(self.lengths))).encode())
        for name in self.files():
            note_file(digest, name, os.path.join(self.folder, name))
        return digest.hexdigest()[:16]


def note_file(digest, name, path):
    """Add the `name` of the file at `path`, its size and its time of change to a digest of hashlib; UserError where it
    cannot be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    digest.update(os.fsencode(name) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())


class FrameFolders(FrameSource):
    """Episodes that are folders of numbered PNG files: root/PART/EPISODE/FRAME.png.

    Episodes are the folders named by a number, in the order of the numbers, which may have gaps. The frames' numbers
    begin at 0 and have none; all may be padded with zeros. Alpha is dropped; frames of another size are resized
    (`resized`). Other files, and whatever a system leaves in folders (`utils.files.is_clutter`), are left alone.

    `root`: the data set's folder; `split`: "train", "val" or "test"; `image_size`: side in pixels. Raises UserError
    for what is missing, unreadable or not of this format.
    """

    data_set = ""
    val_folder = "val"
    prefix = ""  # of a frame's name, before its number
    legal_number = "100"
    how_to_get = ""

    def __init__(self, root, split, image_size):
        self.folder = Path(root)
        self.name = f"{self.data_set}_{split}"
        self.image_size = image_size
        self._part = self.val_folder if split == "val" else split
        self.place = str(self.folder / self._part)
        self._legal = f"legal: folders 0, 1, ... of frames {self.prefix}0.png, {self.prefix}1.png, ..."
        listed = [(name, *self._count_frames(name)) for name in self._episode_names()]
        self._episodes = [(name, digits) for name, digits, _ in listed]
        self.lengths = [length for _, _, length in listed]
        self._side = len(read_png(self._path(0, 0)))

    def used_frames(self, number):
        """How many frames of an episode that has `number` are used, from the first; None if `number` is not legal."""
        return number if number == 100 else None

    def read(self, episode, start, stop):
        """See `FrameSource`; every frame must be of the size of the first of all."""
        frames = np.empty((stop - start, self.image_size, self.image_size, 3), np.uint8)
        for position in range(stop - start):
            path = self._path(episode, start + position)
            frame = read_png(path)
            if len(frame) != self._side:
                size, legal = (f"{side} x {side}" for side in (len(frame), self._side))
                raise UserError(f"{path}: is of {size} pixels; legal: {legal}, as {self._path(0, 0)}")
            frames[position] = resized(frame, self.image_size)
        return frames

    def files(self):
        """See `FrameSource`."""
        for episode, length in enumerate(self.lengths):
            for frame in range(length):
                yield self._file(episode, frame)

    def _file(self, episode, frame):
        name, digits = self._episodes[episode]
        return os.path.join(self._part, name, self._frame_name(frame, digits))

    def _path(self, episode, frame):
        return os.path.join(self.folder, self._file(episode, frame))

    def _frame_name(self, frame, digits):
        return f"{self.prefix}{frame:0{digits}d}.png"

    def _episode_names(self):
        """The names of the episodes' folders, in the order of their numbers."""
        names = {}
        for entry in self._entries(self.place, self.how_to_get):
            is_number, is_folder = _is_number(entry.name), entry.is_dir()
            if not is_number and not is_folder:
                continue
            if not is_number or not is_folder:
                raise UserError(f"{entry.path}: is not an episode; {self._legal}")
            other = names.setdefault(int(entry.name), entry.name)
            if other != entry.name:
                raise UserError(f"{entry.path}: has the number of {other}; {self._legal}")
        if not names:
            raise UserError(f"{self.place}: holds no episodes; {self._legal}{self.how_to_get}")
        return [names[number] for number in sorted(names)]

    def _count_frames(self, episode):
        """How many digits the frames' numbers are padded to in the folder of that name, and how many frames of it are
        used."""
        folder = os.path.join(self.place, episode)
        names = {}
        for entry in self._entries(folder):
            stem, ending = os.path.splitext(entry.name)
            number = stem.removeprefix(self.prefix)
            if ending != ".png" or is_special_file(entry):
                continue
            if not stem.startswith(self.prefix) or not _is_number(number):
                raise UserError(f"{entry.path}: is not a frame's name; {self._legal}")
            other = names.setdefault(int(number), entry.name)
            if other != entry.name:
                raise UserError(f"{entry.path}: has the number of {other}; {self._legal}")
        digits = len(names[min(names)]) - len(f"{self.prefix}.png") if names else 0
        for frame in range(len(names)):
            name = self._frame_name(frame, digits)
            if names.get(frame) != name:
                raise UserError(f"{folder}/{name}: is missing, but later frames are there; {self._legal}")
        used = self.used_frames(len(names))
        if used is None:
            raise UserError(f"{folder}: is an episode of {len(names)} frames; legal: {self.legal_number}")
        return digits, used

    def _entries(self, folder, how_to_get=""):
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if not is_clutter(entry.name)]
        except OSError as error:
            raise UserError(f"{folder}: cannot be read: {error.strerror}; {self._legal}{how_to_get}") from error


def _is_number(text):
    return text.isascii() and text.isdecimal()


def resized(frame, image_size):
    """uint8 [H, W, 3] -> uint8 [image_size, image_size, 3], by antialiased bicubic interpolation (Pillow's)."""
    if frame.shape[:2] == (image_size, image_size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((image_size, image_size), Image.Resampling.BICUBIC))


def read_png(path):
    """The image in a PNG file without its alpha: uint8 [H, H, 3], RGB, of 16 bits the upper 8.

    Every checksum in the file is tested. Raises UserError unless it is a whole square PNG, RGB or RGBA.
    """
    with open_image(path, ("PNG",), _LEGAL_PNG, whole=True) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise UserError(f"{path}: is of Pillow's mode {image.mode}; legal: {_LEGAL_PNG}")
        if image.width != image.height:
            raise UserError(f"{path}: is of {image.width} x {image.height} pixels; legal: {_LEGAL_PNG}")
        return np.array(image.convert("RGB"))
