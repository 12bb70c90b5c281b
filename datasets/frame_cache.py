"""Decoded frames that are kept on disk, mapped into memory and shared by all workers and processes.

All frames of a `FrameSource` lie in one .npy, uint8 [frames, S, S, 3], in `.cache` in the data set's folder, or, where
that cannot be written to or has no file locks, in a folder of `$XDG_CACHE_HOME/ddlp` (`~/.cache/ddlp`). The file's
name ends in the source's fingerprint: a file of that name is whole and holds these frames. When the frames change, so
does the fingerprint, and the old file is deleted. The files can be deleted at any time.

One process decodes, the others wait for its lock. Where there are no locks, or only such as other machines do not see,
several may decode; each writes under a name of its own, and the first to end puts its file in place.
"""

import glob
import hashlib
import os
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write, available_cores, file_lock, remove_abandoned
from utils.progress import progress_bar

_VERSION = 2  # of how frames are decoded and kept; another number makes every file anew
_BLOCK = 100  # frames that are decoded at a time


@dataclass(frozen=True)
class Words:
    """For messages: what a cache holds, and how to do without it."""

    what: str
    without: str


_FRAMES = Words("decoded frames", "or cache false (--no_cache), which decodes every item anew")


class CachedFrames:
    """The decoded frames of a source: `read` as in `FrameSource`, but only from the map of the file at `path`.

    Raises OSError, ValueError or EOFError if there is no such file or it does not hold these frames. Pickled without
    the map, which a spawned worker makes itself.
    """

    def __init__(self, path, lengths, image_size):
        self.path = Path(path)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._shape = (int(self._starts[-1]), image_size, image_size, 3)
        self._map()

    def read(self, episode, start, stop):
        """The frames start to stop - 1 of an episode, uint8 [stop - start, S, S, 3]; not to be written to."""
        first = self._starts[episode]
        return self._frames[first + start : first + stop]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_frames"}

    def __setstate__(self, state):
        vars(self).update(state)
        try:
            self._map()
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.path}: has been deleted or replaced in the meantime; start again") from error

    def _map(self):
        self._frames = map_npy(self.path)
        if (self._frames.dtype, self._frames.shape) != (np.uint8, self._shape):
            raise ValueError(f"{self.path} does not hold {self._shape}")


def map_npy(path):
    """The array in a .npy, mapped into memory; what is written to it stays in memory.

    Raises OSError, ValueError or EOFError if there is no such file or it is not whole.
    """
    # Copy on write rather than read only: torch warns of arrays that cannot be written to.
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is not one array")
    return array.view(np.ndarray)


def with_frame_cache(source):
    """The `CachedFrames` of a source; what is not on disk yet is decoded and written first.

    One process decodes, with a bar; others that want the same frames wait for it. Raises UserError where a frame is
    not legal, there is no room, or no folder that can be written to.
    """
    name = f"{source.name}_{source.image_size}"
    return load_or_build(
        source.folder,
        name,
        f"{name}_{_fingerprint(source)}.npy",
        load=lambda path: _load_whole(path, source),
        write=lambda path: _write(path, name, source),
        waiting=f"waiting for another process that decodes the frames of {source.place}",
    )


def load_or_build(root, name, file_name, load, write, waiting, words=_FRAMES):
    """What `load` reads from the file `file_name` in a cache folder of the data set at `root`; where no folder has it,
    `write` writes it first.

    load: a function of a path, None if the file is missing or not as it should be; write: a function of a path. One
    process writes, and the others of the same `name` wait, having printed the line `waiting`. Raises UserError where
    there is no room, or no folder that can be written to.
    """
    folders = _folders(Path(root))
    for folder in folders:
        remove_abandoned(folder, glob.escape(Path(file_name).stem), Path(file_name).suffix)
        found = load(folder / file_name)
        if found is not None:
            return found
    with _own_folder(folders, name, waiting, words) as folder:
        path = folder / file_name
        if load(path) is None:
            write(path)
    found = load(path)
    if found is None:
        raise UserError(f"{path}: has been deleted or replaced in the meantime; start again")
    return found


def _fingerprint(source):
    return hashlib.sha256(f"{_VERSION} {source.fingerprint()}".encode()).hexdigest()[:16]


def _folders(root):
    """Where the frames of the data set at `root` may be kept, the best first."""
    folders = [root / ".cache"]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(home):
        place = root.resolve()
        name = f"{place.name}_{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"
        folders.append(Path(home) / "ddlp" / name)
    return folders


def folder_lock(root, name, waiting):
    """A context with the cache folder of the data set at `root`, made if need be, in which the lock `name` is held. A
    process that has to wait for the lock prints the line `waiting` first. Raises UserError where no folder can be
    written to."""
    return _own_folder(_folders(root), name, waiting, _FRAMES)


@contextmanager
def _own_folder(folders, name, waiting, words):
    """Yield the first of the folders that can be written to and has locks, made if need be, and hold the lock `name` in
    it. Where none has locks, the first that can be written to, without."""
    writable, reasons = [], []
    for folder in folders:
        lock = folder / f"{name}.lock"
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.touch()
                writable.append(folder)
                stack.enter_context(file_lock(lock, waiting))
            except OSError as error:
                reasons.append(f"{folder} ({error.strerror})")
                continue
            yield folder
            return
    if not writable:
        raise _cannot_keep(reasons, words)
    print(f"no file locks in {' or '.join(reasons)}: other processes may do the same work meanwhile", file=sys.stderr)
    yield writable[0]


def _cannot_keep(reasons, words):
    return UserError(
        f"{words.what} cannot be kept in {' or '.join(reasons)}; legal: one that can be written to, another"
        f" $XDG_CACHE_HOME, {words.without}"
    )


def _load_whole(path, source):
    """The `CachedFrames` at `path`; None if there are none, or if the file was damaged: some of its frames
    (`FrameSource.samples`) are compared with the source's."""
    try:
        frames = CachedFrames(path, source.lengths, source.image_size)
    except (OSError, ValueError, EOFError):
        return None
    for episode, frame in source.samples():
        if not np.array_equal(*(each.read(episode, frame, frame + 1) for each in (frames, source))):
            return None
    return frames


def _write(path, name, source):
    """Decode all frames of `source` into the file at `path`, in place of all others of that `name`."""
    any_of_it = f"{glob.escape(name)}_{'?' * 16}"
    remove_abandoned(path.parent, any_of_it, ".npy")
    for old in path.parent.glob(f"{any_of_it}.npy"):
        with suppress(OSError):  # another process deletes it, or it may not be deleted: it is left
            old.unlink()
    shape = (sum(source.lengths), source.image_size, source.image_size, 3)
    gigabytes = check_room(path.parent, int(np.prod(shape)), source.place)
    print(f"decoding {source.place} once, into {path} ({gigabytes:.2f} GB)", file=sys.stderr)
    with progress_bar(total=shape[0], unit="frame") as bar:
        write_blocks(path, "|u1", shape, _blocks(source), bar)


def check_room(folder, size, place, words=_FRAMES):
    """`size` bytes, which the `words` of a data set take, in GB; UserError where the folder has no room for them.
    place: the data set, in words."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder}: the {words.what} of {place} take {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are"
            f" free; legal: room for them, {words.without}"
        )
    return size / 1e9


def write_blocks(path, descr, shape, blocks, bar):
    """Write the arrays that the generator `blocks` yields, one behind the other, to a .npy, and tell the bar of each.

    descr, shape: numpy's description of the type, and the shape of all. The file appears whole or not at all.
    """
    with atomic_write(path, replace=False) as part, open(part, "wb") as file, closing(blocks):
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        for block in blocks:
            file.write(block)
            bar.update(len(block))


def _blocks(source):
    """Yield all frames of `source` in order, in blocks that threads decode ahead.

    Threads, not processes: decoding and resizing are done by libraries that let other threads run meanwhile.
    """
    threads = source.threads or available_cores()
    pending = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for episode, length in enumerate(source.lengths):
                read = source.reader(episode)
                for start in range(0, length, _BLOCK):
                    pending.append(pool.submit(read, start, min(start + _BLOCK, length)))
                    if len(pending) > 2 * threads:
                        yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
