"""Encoded particles of a training set that are kept on disk, mapped into memory and shared by runs and processes.

The tokens of all clips lie in one .npy, float32 [clips, frames, K + 1, F], beside the decoded frames
(`datasets.frame_cache`). The file's name ends in a hash of all that decides what it holds: a file of that name is
whole, and another encoder or other frames have a file of their own. The files can be deleted at any time.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.frame_cache import Words, load_or_build, map_npy, write_blocks

_VERSION = 1  # of how clips are encoded and kept; another number makes every file anew
_SAMPLES = 16  # items that stand for a data set without a fingerprint of its own
_DEFAULT_FOLDER = "data"  # of a data set that lies nowhere
_PARTICLES = Words("encoded particles", "or encode_on_the_fly true, which encodes each batch anew")


class CachedTokens(Dataset):
    """The tokens in the file at `path`: an item is the tuple of one clip's, float32 [frames, K + 1, F].

    Raises OSError, ValueError or EOFError if there is no such file or it does not hold an array of that shape.
    """

    def __init__(self, path, shape):
        self.path = Path(path)
        self._tokens = map_npy(path)
        if (self._tokens.dtype, self._tokens.shape) != (np.float32, tuple(shape)):
            raise ValueError(f"{path} does not hold {tuple(shape)}")

    def __len__(self):
        return len(self._tokens)

    def __getitem__(self, index):
        return (torch.from_numpy(self._tokens[index]),)

    def blocks(self, size):
        """Yield all tokens in order, [at most `size`, frames, K + 1, F] each."""
        for start in range(0, len(self), size):
            yield torch.from_numpy(self._tokens[start : start + size])


def cached_tokens(root, ds, key, shape, blocks):
    """The `CachedTokens` of the data set `ds` at `root`; what is not on disk yet is encoded first, with a bar.

    root: a folder, or a file (then its folder), or None; key: dict of all that decides the tokens, beside their `shape`
    [clips, frames, K + 1, F]; blocks: called only where they have to be encoded; returns a generator of tokens
    [*, frames, K + 1, F], in order.
    One process encodes, others that want the same tokens wait for it. Raises UserError where there is no room, or no
    folder that can be written to.
    """
    text = json.dumps({"version": _VERSION, "shape": list(shape), **key}, sort_keys=True)
    name = f"{ds}_particles_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    root = Path(_DEFAULT_FOLDER if root is None else root)
    root = root.parent if root.is_file() else root
    place = f"the training clips of {ds}"

    def load(path):
        try:
            return CachedTokens(path, shape)
        except (OSError, ValueError, EOFError):
            return None

    def write(path):
        arrays = (np.ascontiguousarray(block.numpy(), np.float32) for block in blocks())
        write_blocks(path, "<f4", tuple(shape), arrays, "encoding", place, "clip", _PARTICLES)

    waiting = f"waiting for another process that encodes {place}"
    return load_or_build(root, name, f"{name}.npy", load, write, waiting, _PARTICLES)


def data_fingerprint(videos):
    """What tells a data set of videos from another, or from itself with other frames: its own `fingerprint()`, or,
    where it has none, a hash of some of its items."""
    if hasattr(videos, "fingerprint"):
        return videos.fingerprint()
    digest = hashlib.sha256()
    for index in np.linspace(0, len(videos) - 1, min(_SAMPLES, len(videos)), dtype=int).tolist():
        digest.update(np.ascontiguousarray(videos[index][0]).tobytes())
    return digest.hexdigest()[:16]
