"""What the scripts that make data sets share: checked arguments, room on the disk, and worker processes."""

import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from utils.errors import UserError


def check(name, value, legal, is_legal):
    """`UserError` unless `is_legal`; `legal` says in words which values are."""
    if not is_legal:
        raise UserError(f"{name}: {value} is not legal; it must be {legal}")


def check_at_least_1(name, value):
    """`UserError` if `value` is below 1."""
    check(name, value, "at least 1", value >= 1)


def check_space(out, needed):
    """Say how many bytes will be written to the folder `out`; `UserError` if there is no room for them."""
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"--out: {out} needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there")
    print(f"making {needed / 1e9:.1f} GB in {out}")


def available_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
