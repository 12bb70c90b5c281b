"""Batches from processes that load data: a signal to the whole group leaves them alone, and what fails is one line."""

import errno
import multiprocessing
import re
import signal
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from threading import current_thread, main_thread

from torch.utils.data import DataLoader

from utils.errors import UserError

_SIGBUS = getattr(signal, "SIGBUS", None)  # Windows has none


class Loader(DataLoader):
    """A `DataLoader` that raises `UserError` for what ends its processes and for a `UserError` in them.

    Ctrl-C in a terminal and the signals of batch systems go to every process. Those that load data do not take them:
    they end with the process that they load for, which may have something to save first.
    """

    def check_worker_number_rationality(self):
        """No warning of more processes than cores: they wait for disks, too."""

    def __iter__(self):
        try:
            with _signals_held_back(self):
                batches = super().__iter__()
        except OSError as error:  # of the locks and queues between the processes
            raise (_no_shared_memory() if error.errno == errno.ENOSPC else error) from error
        workers = getattr(batches, "_workers", [])
        # Also where nobody comes to the end of the batches: at the exit, before Python waits for its processes.
        end = Finalize(None, _end, (workers,), exitpriority=0)
        if workers:
            _explain_deaths()
        try:
            yield from batches
        except (RuntimeError, OSError, UserError) as error:
            raise _explained(error, workers) from error
        finally:
            if workers:
                batches._shutdown_workers()
            end()


def _end(workers):
    """Kill the processes that are left: they do not take the SIGTERM that others send them."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _explain_deaths():
    """PyTorch raises an error wherever this process is when one that loads data dies; from now on one of one line."""
    torchs = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if not callable(torchs) or hasattr(torchs, "explains") or current_thread() is not main_thread():
        return

    def handler(number, frame):
        try:
            torchs(number, frame)
        except RuntimeError as error:
            raise _explained(error) from error

    handler.explains = True
    signal.signal(signal.SIGCHLD, handler)


@contextmanager
def _signals_held_back(loader):
    """SIGINT and SIGTERM wait until the block is left. Processes that are started in it never see them."""
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if (loader.multiprocessing_context or multiprocessing).get_start_method() != "fork":
        resource_tracker.ensure_running()  # would let the signals through when it is started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _explained(error, workers=()):
    """The error of an iteration as a `UserError` of one line, if it is known; else itself. workers: the processes."""
    text = str(error)
    if isinstance(error, UserError):
        # PyTorch hands on an error in a process that loads data as that process's traceback, which ends in its text.
        return UserError(text.rstrip().rpartition(f"{UserError.__name__}: ")[2])
    if "Bus error" in text or any(_SIGBUS and worker.exitcode == -_SIGBUS for worker in workers):
        return _no_shared_memory(
            "; or, where there is room, a file of data was cut short: start again with whole files"
        )
    if re.search(r"shared memory|unable to \w+ .*torch_", text):
        return _no_shared_memory()
    if "Too many open files" in text or "ancdata" in text:
        return UserError(
            "the processes that load data have too many files open; legal: a higher limit (ulimit -n 65536), fewer"
            " num_workers"
        )
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        last = text.rstrip().splitlines()[-1]
        return UserError(f"the data cannot be read any more: {last.partition('Error: ')[2] or last}")
    if ended := re.search(r"Connection|is killed by signal: [\w ]+|exited unexpectedly", text):
        return UserError(
            f"a process that loads data was ended from outside or by a library ({ended[0]}), often by the system"
            " because memory was short; legal: fewer num_workers, a smaller batch_size"
        )
    return error


def _no_shared_memory(hint=""):
    return UserError(
        "there is no room in shared memory (/dev/shm), through which processes hand on the data that they load; legal:"
        " more of it (docker run --shm-size=8g), fewer num_workers, or 0, which needs none" + hint
    )
