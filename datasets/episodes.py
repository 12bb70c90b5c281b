"""Videos and images out of episodes: which frames make an item, and how they become tensors."""

import copy

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.frame_cache import with_frame_cache
from utils.errors import UserError
from utils.legal import check_choice, whole_number

SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
DARK = 32  # of 255: what is nowhere brighter is nearly black
NO_ANNOTATIONS = 4  # positions, sizes, ids, in_camera


class Windows:
    """Which frames make an item: `windows[index]` is the item's episode, first frame and number of frames.

    `counts`, `lasts` and `lengths` have one entry per episode: how many items it has, the last frame at which one may
    begin, and how many frames each has. Items begin at the frames 0, `stride`, 2 `stride`, ...; those that would begin
    later begin at the last one.
    """

    def __init__(self, counts, lasts, lengths, stride=1):
        self._ends, self._lasts, self._lengths = np.cumsum(counts), np.asarray(lasts), np.asarray(lengths)
        self._stride = stride

    @classmethod
    def whole(cls, lengths):
        """One item per episode: all its frames."""
        return cls(np.ones_like(lengths), np.zeros_like(lengths), lengths)

    @classmethod
    def sliding(cls, lengths, size, ends):
        """The windows of `size` frames at every offset of episodes of `lengths` frames. None ends after the first
        `ends` frames of its episode, if these are `size` or more: it is moved back to end there."""
        lengths = np.asarray(lengths)
        return cls(lengths - size + 1, np.maximum(np.asarray(ends) - size, 0), np.full_like(lengths, size))

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, index):
        index = range(len(self))[index]
        episode = int(np.searchsorted(self._ends, index, side="right"))
        offset = index - int(self._ends[episode - 1]) if episode else index
        return episode, min(offset * self._stride, int(self._lasts[episode])), int(self._lengths[episode])


class EpisodeVideos(Dataset):
    """Videos: in train every window of `sample_length` frames of every episode, otherwise whole episodes.

    `root`: where the data set lies, None for its own place under ./data. `mode`: "train", "val" (or "valid") or "test".
    `image_size`: side of the frames in pixels. `sample_length`: frames of a window. `cache`: keep the decoded frames on
    disk (`datasets.frame_cache`) rather than decode them anew for every item. `as_uint8`: leave the video uint8 in
    0..255, for `scaled`.

    An item is the tuple of the video, float32 [T, 3, H, W] in 0..1, and of what else is known of it: positions, sizes,
    ids, in_camera, each with T first (see `datasets.balls_ds`); empty where the data set has no such thing.

    Raises UserError for an illegal argument, and for files that are missing, damaged or not of the data set's format.
    A data set is a subclass that says, in `_make_source`, where its frames come from.
    """

    default_root = ""
    padded_length = None  # frames of every episode, where short ones are filled up with their last frame
    is_images = False
    _most_frames = None

    def __init__(self, root, mode="train", image_size=128, sample_length=10, cache=True, as_uint8=False):
        check_choice("mode", mode, SPLITS)
        image_size = whole_number("image_size", image_size)
        self._sample_length = whole_number("sample_length", sample_length)
        self._as_uint8 = as_uint8
        split = SPLITS[mode]
        self._source = self._make_source(self.default_root if root is None else root, split, image_size)
        self._windows = self._make_windows(self._source.lengths, self.is_images or split == "train")
        self._frames = with_frame_cache(self._source) if cache and not self._source.is_mapped else self._source

    def _make_source(self, root, split, image_size):
        """The `FrameSource` of a split: "train", "val" or "test"."""
        raise NotImplementedError

    def _make_windows(self, lengths, has_windows):
        """The `Windows` of episodes of `lengths` frames; without windows each is one item."""
        padded = lengths if self.padded_length is None else [self.padded_length] * len(lengths)
        self._check_length(min(padded), "an episode of ")
        return Windows.sliding(padded, self._sample_length, lengths) if has_windows else Windows.whole(padded)

    def _check_length(self, available, what=""):
        if self._sample_length > available:
            raise UserError(
                f"sample_length: {self._sample_length} frames are more than the {available} of {what}"
                f"{self._source.place}; legal: at most so many (timestep_horizon + 1, animation_horizon, --horizon or"
                " diffuse_frames)"
            )

    def first(self, num_frames):
        """The same videos, but each without what follows its first `num_frames` frames; that is not read."""
        videos = copy.copy(self)
        videos._most_frames = num_frames
        return videos

    def fingerprint(self):
        """16 characters that change when the frames may have changed."""
        return self._source.fingerprint()

    def __len__(self):
        return len(self._windows)

    def __getitem__(self, index):
        """The tuple (video, positions, sizes, ids, in_camera), see the class."""
        episode, first, length = self._windows[index]
        window = episode, first, min(length, self._most_frames or length)
        video = torch.from_numpy(self._read(*window)).permute(0, 3, 1, 2)
        item = (video if self._as_uint8 else scaled(video), *self._annotations(*window))
        if self.is_images and self._sample_length == 1:
            return tuple(entry[0] if len(entry) else entry for entry in item)
        return item

    def _read(self, episode, first, length):
        """uint8 [length, H, W, 3], the last frame repeated where the episode has no more."""
        stop = min(first + length, self._source.lengths[episode])
        frames = self._frames.read(episode, first, stop)
        missing = length - len(frames)
        return np.concatenate([frames, frames[-1:].repeat(missing, axis=0)]) if missing else frames

    def _annotations(self, episode, first, length):
        return (torch.empty(0),) * NO_ANNOTATIONS


def scaled(frames):
    """Frames as float32 in 0..1, contiguous: uint8 in 0..255 are divided in one pass, float32 are handed back."""
    if frames.dtype != torch.uint8:
        return frames
    return torch.div(frames, 255, out=torch.empty(frames.shape, device=frames.device))


def why_empty(frames):
    """Why nothing can be learnt from a list of frames, uint8 or in 0..1, tensors or arrays of any shape: in words, None
    where something can."""
    frames = [np.asarray(frame) * (1 if frame.dtype in (np.uint8, torch.uint8) else 255) for frame in frames]
    brightest = max(frame.max() for frame in frames)
    if brightest < DARK:
        return (
            f"are nearly black: the brightest value is {brightest:.0f} of 255; images of 16 bits that use fewer (12,"
            " say) have to be scaled up beforehand"
        )
    if all(np.ptp(frame) == 0 for frame in frames):
        return "are each of one value"
    if len(frames) > 1 and all(np.array_equal(frame, frames[0]) for frame in frames):
        return "are all the same"
    return None
