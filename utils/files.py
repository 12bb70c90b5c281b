"""Files that are never half-written, and locks between processes."""

import fcntl
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError


@contextmanager
def replacing(path):
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
def locked(path, waiting=None):
    """Hold the lock of the file at `path` once every other holder has let go; the system frees a killed one's.

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
