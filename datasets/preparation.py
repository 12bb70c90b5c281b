"""What the scripts that make data sets share: checked arguments, room on the disk, folders that are never half-made,
and worker processes."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.files import is_clutter


def check_space(out, needed):
    """Say how many bytes will be written to the folder `out`; `UserError` if there is no room for them."""
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"--out: {out} needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there")
    size = f"{needed / 1e9:.1f} GB" if needed >= 1e8 else f"{needed / 1e6:.1f} MB"
    print(f"making {size} in {out}")


class Interrupted(UserError):
    """The user stopped the command (Ctrl-C)."""

    exit_status = 130


@contextmanager
def unwritable_as_user_error(path):
    """Turn an OSError into a UserError: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def working_folder(folder):
    """Make a folder for what is not yet whole, which one process at a time has; yields it.

    It is not deleted. Raises UserError where it cannot be made, or another process has it.
    """
    with unwritable_as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    lock = FileLock(folder / "lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder.parent}: another process is making this data set; let it end first") from error
    except OSError as error:
        print(
            f"{folder}: no file locks here ({error.strerror}); let no other process make this data set", file=sys.stderr
        )
    try:
        yield folder
    finally:
        lock.release()


@contextmanager
def message_on_interrupt():
    """Ctrl-C becomes a message instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("stopped; the same command goes on with what is missing") from error


def check_episodes(folder, number, option):
    """UserError if the folder of a split holds anything but episodes 0 to `number` - 1."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--out: {folder} is not a folder; legal: another --out")
    legal = {str(episode) for episode in range(number)}
    others = sorted(name for name in os.listdir(folder) if name not in legal and not is_clutter(name))
    if others:
        raise UserError(
            f"--out: {folder} holds {others[0]!r}, which is none of the {number} episodes of {option}; legal: another"
            f" {option}, or another --out"
        )


def find_ranges(numbers):
    """The ranges of consecutive whole numbers among `numbers`, sorted: a list of (first, last)."""
    ranges = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return ranges


def name_ranges(ranges, most=8):
    """Ranges as a text such as "3, 5-9, 12"; of more than `most` ranges, the first ones and how many follow."""
    names = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    more = f" and {len(names) - most} more ranges" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def make_executor(processes):
    """A pool of worker processes, which leave an interrupt from the keyboard to the parent and end when it ends,
    however it does."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
