"""Files that are never half-written, JSON among them, locks between processes, and how many cores there are."""

import fcntl
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError


@contextmanager
def atomic_write(path):
    """Write a file under a temporary name in the same folder, then move it into place.

    Yields the temporary path, which has the same ending. Whatever happens before the move, `path` keeps what it held;
    what a killed process left is overwritten the next time. One process at a time may write to `path`. Raises
    `UserError` where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            temporary.unlink()


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

    `waiting`: a line to print on stderr first where another process holds it.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                print(waiting, file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_json(path):
    """What a JSON file holds; `UserError` if there is none, if it cannot be read or is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, endless brackets
        raise UserError(f"{path}: invalid JSON: {error}") from None


def write_json(path, values):
    """Write a dict as an indented JSON file, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def available_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
