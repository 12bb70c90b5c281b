"""A folder of one's own videos: files, or folders of frames, of any size and length.

    root/{any.mp4, other.gif, a_folder_of_frames/{frame_9.png,frame_10.png,...}, ...}
    root/{train,val,test}/{any.mp4, ...}                           ("valid" for "val" is legal)

Without the folders train, val and test the videos are split by their names: the SHA-256 of a name, as a fraction of its
range, decides: below 0.1 it is in test, below 0.2 in val, and else in train. But test and val get at least one video
each, and otherwise at most a fifth of all: the smallest fractions are in test, the next ones in val. So a video stays
where it is when others are added, but for the few of a small folder. At least three videos are needed.

A video is a file that libav decodes (`VIDEO_ENDINGS`), or a folder whose images (PNG, JPEG, ...), in the order of
their names, are its frames. The largest square in the middle of a frame is resized to the image size (antialiased).
Hidden files and documents (.txt, .json, ...) are left alone; anything else that is no video is an error, and so is a
video that is damaged or shorter than a window or horizon.

Lengths are found by decoding. They are kept in `.cache/video_folder.json`, beside the decoded frames
(`datasets.frame_cache`), and counted anew for files that have changed.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from threading import Condition

import numpy as np

from datasets.episodes import EpisodeVideos
from datasets.frame_cache import folder_lock
from datasets.frame_sources import FrameSource, note_file, resized
from datasets.video_files import IMAGES, VIDEO_ENDINGS, FrameFolder, Shape, find_videos, list_entries
from utils.errors import UserError
from utils.files import atomic_write, available_cores
from utils.progress import progress_bar

DEFAULT_ROOT = "./data/video_folder"
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
LEGAL = f"videos ({', '.join(VIDEO_ENDINGS)}) and folders of frames ({IMAGES})"

_INDEX = "video_folder"
_counted = {}  # what this process has counted: from a video's fingerprint to its `Shape`


# ---- which videos


def find_splits(root):
    """The videos of a folder: a dict from "train", "val" and "test" to dicts from a video's path in the folder to the
    video (see `datasets.video_files`). Nothing is decoded. Raises UserError for what is not as the module's text says.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"root: {root} {what}; legal: a folder of {LEGAL}")
    entries = list_entries(root, LEGAL)
    named = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
    folders = [entry.name for entry in entries if entry.name in named and entry.is_dir()]
    if folders:
        return _splits_by_folder(root, entries, {named[name]: name for name in folders}, folders)
    videos = find_videos(root, LEGAL)
    if len(videos) < 3:
        raise UserError(
            f"{root}: holds {len(videos)} videos; legal: at least 3, as some are for training, some for validation and"
            " some for testing"
        )
    return {split: {name: videos[name] for name in names} for split, names in split_by_name(videos).items()}


def _splits_by_folder(root, entries, by_split, folders):
    legal = "all of train, val (or valid) and test, and nothing else"
    others = [entry.name for entry in entries if entry.name not in folders]
    if others or len(folders) != len(by_split) or len(by_split) < len(SPLIT_FOLDERS):
        raise UserError(f"{root}: holds {', '.join(folders + others[:1])}; legal: {legal}, or none of these")
    splits = {}
    for split in SPLIT_FOLDERS:
        folder = by_split[split]
        splits[split] = {os.path.join(folder, name): video for name, video in find_videos(root / folder, LEGAL).items()}
    return splits


def split_by_name(names):
    """A dict from "train", "val" and "test" to lists of `names` (at least 3), by the rule in the module's text; the
    order of the names is kept."""
    fractions = {name: int.from_bytes(hashlib.sha256(os.fsencode(name)).digest(), "big") / 2**256 for name in names}
    ranked = sorted(names, key=fractions.get)
    most = max(1, len(ranked) // 5)
    below = [sum(fraction < bound for fraction in fractions.values()) for bound in (0.1, 0.2)]
    test = min(max(below[0], 1), most)
    val = min(max(below[1] - below[0], 1), most)
    parts = {"train": set(ranked[test + val :]), "val": set(ranked[test : test + val]), "test": set(ranked[:test])}
    return {split: [name for name in names if name in part] for split, part in parts.items()}


# ---- how long they are


def count_frames(root, videos, keep=True):
    """The `Shape` of each of the `videos` of the folder `root` (a dict as `find_splits` has for a split), a list.

    What is not known is decoded once, with a bar. `keep`: remember it on disk. Raises UserError for a damaged video.
    """
    fingerprints = {name: _fingerprint(video) for name, video in videos.items()}
    if not all(fingerprint in _counted for fingerprint in fingerprints.values()):
        _count(root, videos, fingerprints, keep)
    return [_counted[fingerprint] for fingerprint in fingerprints.values()]


def _fingerprint(video):
    """A text that changes with the paths, sizes and times of change of a video's files."""
    digest = hashlib.sha256()
    for path in video.files():
        note_file(digest, path.name, path)
    return f"{os.path.realpath(video.path)} {digest.hexdigest()[:16]}"


def _count(root, videos, fingerprints, keep):
    if not keep:
        _decode_unknown(root, videos, fingerprints)
        return
    waiting = f"waiting for another process that counts the frames of {root}"
    with folder_lock(Path(root), _INDEX, waiting) as folder:
        path = folder / f"{_INDEX}.json"
        _counted.update(_read_index(path))
        try:
            _decode_unknown(root, videos, fingerprints)
        finally:
            _write_index(path, set(fingerprints.values()))


def _read_index(path):
    """What is kept in the file at `path`: nothing if there is no such file or it is damaged."""
    try:
        return {
            name: Shape(*map(int, shape), tuple((int(number), int(time)) for number, time in points))
            for name, (*shape, points) in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_index(path, names):
    known = _read_index(path)
    new = {name: _counted[name] for name in names if name in _counted}
    if new.keys() <= known.keys():
        return
    # What a video was before it changed is forgotten.
    changed = {name.rpartition(" ")[0] for name in new}
    known = {name: shape for name, shape in known.items() if name.rpartition(" ")[0] not in changed}
    with atomic_write(path) as part:
        part.write_text(json.dumps({name: astuple(shape) for name, shape in (known | new).items()}), encoding="utf-8")


def _decode_unknown(root, videos, fingerprints):
    unknown = {fingerprints[name]: video for name, video in videos.items() if fingerprints[name] not in _counted}
    if not unknown:
        return
    pool = ThreadPoolExecutor(available_cores())
    try:
        jobs = {pool.submit(video.probe): fingerprint for fingerprint, video in unknown.items()}
        for job in progress_bar(as_completed(jobs), f"counting the frames of {root}", len(jobs), unit="video"):
            _counted[jobs[job]] = job.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- the data set


class _Videos(FrameSource):
    """The videos of one split. `keep`: remember their lengths on disk."""

    def __init__(self, root, split, image_size, keep):
        self.folder, self.name, self.image_size = Path(root), f"{_INDEX}_{split}", image_size
        self.place = f"the {split} part of {root}"
        videos = find_splits(root)[split]
        shapes = count_frames(root, videos, keep)
        self.lengths = [shape.length for shape in shapes]
        self._seek_points = [shape.seek_points for shape in shapes]
        self._videos = list(videos.values())

    def read(self, episode, start, stop):
        """See `FrameSource`."""
        return self._blocks_of(self._videos[episode].frames(start, stop, self._seek_points[episode]), stop - start)

    def reader(self, episode):
        """See `FrameSource`; a file is decoded once, not from its beginning for every block."""
        video = self._videos[episode]
        if isinstance(video, FrameFolder):
            return super().reader(episode)
        return _InOrder(video.frames(0, self.lengths[episode]), self._blocks_of)

    def samples(self):
        """See `FrameSource`; first frames, as a file is decoded from its beginning."""
        return (0, 0), (len(self.lengths) - 1, 0)

    def files(self):
        """See `FrameSource`."""
        for video in self._videos:
            for path in video.files():
                yield os.path.relpath(path, self.folder)

    def path(self, episode):
        """Where an episode lies."""
        return self._videos[episode].path

    def _blocks_of(self, frames, number):
        """The next `number` of the iterator `frames`, as they are shown to a model: uint8 [number, S, S, 3]."""
        return np.stack([resized(square(frame), self.image_size) for frame in islice(frames, number)])


class _InOrder:
    """Blocks out of an iterator of frames: threads may ask for them in any order, and each waits for its turn."""

    def __init__(self, frames, take):
        self._frames, self._take, self._next, self._turn = frames, take, 0, Condition()

    def __call__(self, start, stop):
        with self._turn:
            self._turn.wait_for(lambda: self._next == start)
            try:
                return self._take(self._frames, stop - start)
            finally:
                self._next = stop
                self._turn.notify_all()


def square(frame):
    """The largest square in the middle of a frame [H, W, 3]."""
    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frame[top : top + side, left : left + side]


class VideoFolderVideos(EpisodeVideos):
    """The videos of a folder; arguments, items and errors as for `EpisodeVideos`."""

    default_root = DEFAULT_ROOT

    def __init__(self, root, mode="train", image_size=128, sample_length=10, cache=True, as_uint8=False):
        self._keep = cache
        super().__init__(root, mode, image_size, sample_length, cache, as_uint8)

    def _make_source(self, root, split, image_size):
        return _Videos(root, split, image_size, self._keep)

    def _make_windows(self, lengths, has_windows):
        short = [episode for episode, length in enumerate(lengths) if length < self._sample_length]
        if short:
            more = f" (and {len(short) - 1} more are too short)" if len(short) > 1 else ""
            raise UserError(
                f"{self._source.path(short[0])}: has {lengths[short[0]]} frames{more}; legal: at least"
                f" {self._sample_length} in every video, or a lower timestep_horizon, animation_horizon or --horizon"
            )
        return super()._make_windows(lengths, has_windows)


class VideoFolderImages(VideoFolderVideos):
    """Windows of `sample_length` frames in every mode; a single frame [3, H, W] where `sample_length` is 1."""

    is_images = True
