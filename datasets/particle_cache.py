"""Encoded particles of a training set that are kept on disk, mapped into memory and shared by runs and processes.

The tokens of all clips lie in a few .npy, float32 [clips, frames, K + 1, F] each, beside the decoded frames
(`datasets.frame_cache`). Their names have a hash of all that decides what they hold: a file of that name is whole, and
another encoder or other frames have files of their own. The files can be deleted at any time.

Each file is made by one process, with its own lock, and several processes share the files out.
"""

import hashlib
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from datasets.frame_cache import Words, check_room, load_or_build, map_npy, write_blocks
from datasets.loading import Loader
from utils.progress import progress_bar
from utils.random_state import preserve_random_state, seed_everything

AT_ONCE = 32  # clips that are encoded together; not the batch size, so that the particles do not depend on it
_FILES = 32  # of a training set, at most
_VERSION = 2  # of how clips are encoded and kept; another number makes every file anew
_SAMPLES = 16  # items that stand for a data set
_DEFAULT_FOLDER = "data"  # of a data set that lies nowhere


class CachedTokens(Dataset):
    """The tokens in files, one behind the other: an item is the tuple of one clip's, float32 [frames, K + 1, F].

    paths: the files; shapes: those of their arrays, all of as many clips but the last, which may have fewer. Raises
    OSError, ValueError or EOFError where a file is missing or does not hold an array of its shape.
    """

    def __init__(self, paths, shapes):
        self.paths = [Path(path) for path in paths]
        self._arrays = [map_npy(path) for path in paths]
        for path, array, shape in zip(self.paths, self._arrays, shapes, strict=True):
            if (array.dtype, array.shape) != (np.float32, tuple(shape)):
                raise ValueError(f"{path} does not hold {tuple(shape)}")

    def __len__(self):
        return sum(map(len, self._arrays))

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        file, clip = divmod(index, len(self._arrays[0]))
        return (torch.from_numpy(self._arrays[file][clip]),)

    def blocks(self):
        """Yield all tokens in order, [at most `AT_ONCE`, frames, K + 1, F] each."""
        for array in self._arrays:
            yield from torch.from_numpy(array).split(AT_ONCE)


def cached_tokens(root, ds, key, shape, encode, without, process=0, num_processes=1):
    """The `CachedTokens` of the data set `ds` at `root`; what is not on disk yet is encoded first.

    root: a folder, or a file (then its folder), or None; key: dict of all that decides the tokens, beside their `shape`
    [clips, frames, K + 1, F]; encode: called with the `range` of the clips of each file that is missing; returns a
    generator of tokens [*, frames, K + 1, F], in order; without: the key and value that keep none, for messages. Of
    several processes, which all call this, each begins with another file; the first one shows a bar. Raises UserError
    where there is no room, or no folder that can be written to.
    """
    text = json.dumps({"version": _VERSION, "shape": list(shape), **key}, sort_keys=True)
    name = f"{ds}_particles_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    root = Path(_DEFAULT_FOLDER if root is None else root)
    root = root.parent if root.is_file() else root
    words = Words("encoded particles", f"or {without}, which encodes each batch anew")
    place, clips = f"the training clips of {ds}", range(shape[0])
    step = math.ceil(len(clips) / AT_ONCE / _FILES) * AT_ONCE
    parts = [clips[start : start + step] for start in range(0, len(clips), step)]
    first, paths, is_announced = process * len(parts) // num_processes, {}, False
    with progress_bar(total=len(clips), unit="clip", delay=1, disable=process > 0, dynamic_ncols=True) as bar:

        def write(path, part):
            nonlocal is_announced
            missing = len(clips) - sum(len(parts[i]) for i in paths)
            gigabytes = check_room(path.parent, 4 * missing * math.prod(shape[1:]), place, words)
            if not is_announced:
                tqdm.write(f"encoding {place} once, into {path.parent} ({gigabytes:.2f} GB)", sys.stderr)
            is_announced = True
            blocks = (np.ascontiguousarray(block.numpy(), np.float32) for block in encode(part))
            write_blocks(path, "<f4", (len(part), *shape[1:]), blocks, bar)

        for number in (*range(first, len(parts)), *range(first)):
            part, file = parts[number], f"{name}_{number:02}"
            found = load_or_build(
                root,
                file,
                f"{file}.npy",
                load=partial(_load, shape=(len(part), *shape[1:])),
                write=partial(write, part=part),
                waiting=f"waiting for another process that encodes {place}",
                words=words,
            )
            paths[number] = found.paths[0]
            bar.update(sum(len(parts[i]) for i in paths) - bar.n)
    return CachedTokens([paths[i] for i in range(len(parts))], [(len(part), *shape[1:]) for part in parts])


def _load(path, shape):
    """The `CachedTokens` of one file, or None if it is missing or not whole."""
    try:
        return CachedTokens([path], [shape])
    except (OSError, ValueError, EOFError):
        return None


def clip_batches(clips, which, num_workers):
    """Batches of `AT_ONCE` of the items `which` of a data set, to be encoded."""
    return Loader(Subset(clips, which), AT_ONCE, num_workers=num_workers, generator=torch.Generator())


def data_fingerprint(videos):
    """What tells a data set of videos from another, or from itself with other frames: its own `fingerprint()`, or,
    where it has none, a hash of some of its items."""
    return videos.fingerprint() if hasattr(videos, "fingerprint") else _digest_of_items(videos)


def _digest_of_items(dataset):
    """A hash of some of a data set's items, always of the same ones, also where it draws something for them."""
    digest = hashlib.sha256()
    with preserve_random_state():
        seed_everything(0, "items")
        which = np.linspace(0, len(dataset) - 1, min(_SAMPLES, len(dataset)), dtype=int).tolist()
        for batch in Loader(Subset(dataset, which), 1, generator=torch.Generator()):
            digest.update(np.ascontiguousarray(batch[0]).tobytes())
    return digest.hexdigest()[:16]


def data_identity(dataset):
    """What tells a training set from itself with other data, for `data_change`: a dict."""
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    files = whole.fingerprint() if hasattr(whole, "fingerprint") else None
    return {"files": files, "items": _digest_of_items(dataset)}


def data_change(before, now):
    """What has changed between two `data_identity`s, in words; None if nothing has."""
    if before["items"] != now["items"]:
        return "the training set has changed (some of its items are others)"
    if before["files"] != now["files"]:
        return "files of the training set have changed (names, sizes or times; the items that were compared are equal)"
    return None
