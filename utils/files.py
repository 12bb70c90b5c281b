"""Files that are never half-written, JSON among them, locks between processes, and how many cores there are."""

import argparse
import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from utils.errors import UserError

# What systems, disks and network drives leave in folders, beside what is hidden by a dot.
_CLUTTER = (
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "@recycle"),
    *("$recycle.bin", "system volume information", "lost+found"),
)
ABANDONED = 3600  # seconds after which a temporary file of another machine that nobody writes to is given up


@contextmanager
def atomic_write(path, replace=True):
    """Write a file under a temporary name in the same folder, then move it into place.

    Yields the temporary path, which is no other process's and has the same ending. Whatever happens before the move,
    `path` keeps what it held; what a killed process left is deleted by whoever writes to `path` next (on another
    machine: an hour later). Raises `UserError` where it cannot be written.

    replace: whether a file that appeared at `path` in the meantime is replaced; else it is left.
    """
    path = Path(path)
    remove_abandoned(path.parent, glob.escape(path.stem), path.suffix)
    writer = f"{machine_id()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.stem}.{writer}.part{path.suffix}")
    before = _identity(path)
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what may be written to
            os.fsync(file.fileno())
        if replace or _identity(path) in (None, before):
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it was moved, was never made or cannot be reached any more
            temporary.unlink()


def _identity(path):
    """What tells the file at `path` from one that takes its place; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def remove_abandoned(folder, stem, suffix):
    """Delete what processes that were killed in `atomic_write` left of files of these names; stem: a pattern."""
    for temporary in folder.glob(f".{stem}.*.part{suffix}"):
        with suppress(OSError):  # another process deletes or moves it, or it may not be deleted: it is left
            if _is_abandoned(temporary):
                temporary.unlink()


def _is_abandoned(temporary):
    machine, _, rest = temporary.name.removesuffix(f".part{temporary.suffix}").rpartition(".")[2].partition("-")
    process = rest.partition("-")[0]
    if machine == machine_id() and process.isdecimal() and not _is_running(int(process)):
        return True
    return time.time() - temporary.stat().st_mtime > ABANDONED


def _is_running(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@cache
def machine_id():
    """A short name of what a process number is unique in: a container or machine since it was started."""
    try:
        place = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8") + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        place = platform.node()
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def link_or_copy(path, other):
    """Give a file that will not be written to any more another name, or a copy where its file system has no links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def given_path(text):
    """The type of an argparse argument that is a path: with ~ expanded, which a shell does not do behind "=", and not
    empty, as a variable of the shell that is not set would make it."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; legal: a path")
    return Path(os.path.expanduser(text))


def is_clutter(name):
    """Whether a file or folder of that name is none that a person put there."""
    return name.startswith(".") or name.lower() in _CLUTTER


def is_special_file(entry):
    """Whether an `os.DirEntry` is a pipe, a socket or a device, which may never come to an end."""
    try:
        mode = entry.stat().st_mode
    except OSError:  # a link that leads nowhere: whoever opens it says so
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def make_folder(path):
    """The folder at `path`, made with its parents where it is missing; `UserError` where that cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be made: {error.strerror or error}") from error
    return path


@contextmanager
def file_lock(path, waiting=None):
    """Wait for the lock of the file at `path` and hold it; the system frees the lock of a process that was killed.

    waiting: a line to print on stderr first where another process holds it. Raises OSError where the file cannot be
    written to or its file system has no locks.
    """
    # Not the marker files that stand in for locks elsewhere: a killed process leaves them, and all others wait.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            print(waiting, file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def try_lock(path):
    """The lock of the file at `path`, held until its `release()`, or None where another process holds it. Raises
    OSError as `file_lock` does."""
    lock = FileLock(path, fallback_to_soft=False)
    try:
        return lock.acquire(timeout=0).lock
    except Timeout:
        return None


def read_json(path):
    """What a JSON file holds; `UserError` if there is none, if it cannot be read, is not valid JSON or has a key
    twice."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, endless brackets
        raise UserError(f"{path}: invalid JSON: {error}") from None


def _without_repeats(pairs):
    """A JSON object's dict; json itself would take the last of a key's values without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {json.dumps(repeated)} is there twice")
    return values


def write_json(path, values):
    """Write a dict as an indented JSON file, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def available_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
