"""When training stops before its end: because a signal asks for it, or because its time is up."""

import signal
import threading
import time
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 2  # seconds within which another signal is taken for the first: launchers pass signals on to processes


class Stopped(BaseException):
    """An evaluation was asked to stop; no error, so that nothing takes it for one."""


class Interruption:
    """Notes SIGINT, SIGTERM and the end of the time, so that the loop can save first; a later signal does what it did
    before.

    max_minutes: of training from now on, or None. Outside of the main thread, where Python handles no signals, only
    the time is watched, and only between steps.
    """

    def __init__(self, max_minutes=None):
        self.end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signalled = None  # when
        self.raises = False

    @property
    def requested(self):
        return self.signalled is not None or (self.end is not None and time.monotonic() >= self.end)

    @contextmanager
    def watch(self):
        """Signals are noted in this block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.previous = {number: signal.signal(number, self._note) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    @contextmanager
    def raising(self):
        """A request to stop raises `Stopped` within this block, wherever it is, instead of being noted alone."""
        alarm = hasattr(signal, "setitimer") and self.end is not None
        alarm = alarm and threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGALRM, self._raise) if alarm else None
        self.raises = True
        try:
            if self.requested:
                raise Stopped
            if alarm:
                signal.setitimer(signal.ITIMER_REAL, max(self.end - time.monotonic(), 1e-3))
            yield
        finally:
            self.raises = False
            if alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, previous)

    def _note(self, number, frame):
        if self.signalled is not None and time.monotonic() - self.signalled > SAME_REQUEST:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
        self.signalled = self.signalled or time.monotonic()
        self._raise(number, frame)

    def _raise(self, number, frame):
        if self.raises:
            self.raises = False  # once: what is cleaned up on the way out is not interrupted again
            raise Stopped
