"""Work off the window's thread: jobs whose results are handed over when the window asks for them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from utils.errors import UserError


class Cancelled(Exception):
    """Raised inside a job that is not wanted any more."""


@dataclass
class Job:
    """key: what it is for, such as "decode"; function: called with `report`; done, failed, progress: called by `poll`
    with its result, a `UserError`, and the share of it that is done."""

    key: str
    function: Callable
    done: Callable
    failed: Callable
    progress: Callable
    is_cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """A thread that does one job after another.

    Of jobs with one key only the latest counts: one that waits is dropped when another comes, and one that runs is
    cancelled, unless it is to be finished (`submit`). Nothing here but the jobs' functions runs in the thread.
    """

    def __init__(self):
        self._waiting, self._running, self._is_closed = {}, None, False
        self._change = threading.Condition()
        self._results = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, key, function, done, failed=lambda error: None, progress=lambda share: None, finish_running=False):
        """Add a job. function(report) computes its result in the thread; it calls report(share), 0 to 1, where it can
        be stopped. finish_running: let a job of this key that runs come to its end, so that quick ones in a row all
        have their effect."""
        with self._change:
            if not finish_running:
                self._cancel_running(key)
            self._waiting.pop(key, None)
            self._waiting[key] = Job(key, function, done, failed, progress)
            self._change.notify()

    def cancel(self, *keys):
        """Drop the jobs of these keys, or all; none of their results will be handed over."""
        with self._change:
            for key in keys or [*self._waiting, *([self._running.key] if self._running else [])]:
                self._waiting.pop(key, None)
                self._cancel_running(key)

    def _cancel_running(self, key):
        if self._running is not None and self._running.key == key:
            self._running.is_cancelled.set()

    @property
    def keys(self):
        """The keys of the jobs that run or wait."""
        with self._change:
            running = [] if self._running is None or self._running.is_cancelled.is_set() else [self._running.key]
            return {*running, *self._waiting}

    def poll(self):
        """Call back for what has come since the last time, in this thread. A job's exception that is no `UserError` is
        raised here."""
        while True:
            try:
                job, name, value = self._results.get_nowait()
            except Empty:
                return
            if job.is_cancelled.is_set():
                continue
            if name == "raised":
                raise value
            getattr(job, name)(value)

    def close(self, seconds=5):
        """Cancel everything, and wait for the running job's next report, at most so long."""
        with self._change:
            self._is_closed = True
            self._change.notify()
        self.cancel()
        self._thread.join(seconds)

    def _work(self):
        while True:
            with self._change:
                self._running = None
                self._change.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                job = self._running = self._waiting.pop(next(iter(self._waiting)))
            self._do(job)

    def _do(self, job):
        def report(share):
            if job.is_cancelled.is_set():
                raise Cancelled
            self._results.put((job, "progress", share))

        try:
            self._results.put((job, "done", job.function(report)))
        except Cancelled:
            pass
        except UserError as error:
            self._results.put((job, "failed", error))
        except Exception as error:  # goes on in `poll`
            self._results.put((job, "raised", error))
