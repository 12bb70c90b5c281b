"""When training stops before its end: because a signal asks for it, or because its time is up."""

import math
import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext, suppress

from utils.files import machine_id

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME_REQUEST = 2  # seconds within which another signal is taken for the first: launchers pass signals on to processes


class Stopped(BaseException):
    """An evaluation was asked to stop; no error, so that nothing takes it for one."""


class Interruption:
    """Notes SIGINT, SIGTERM and the end of the time, so that the loop can save first; a later signal does what it did
    before. `number` is that of the signal, None before one comes.

    max_minutes: of training from now on, or None. Outside of the main thread, where Python handles no signals, only
    the time is watched, and only between steps.

    Where several processes train, the one that is signalled tells its `siblings` on the same machine by SIGUSR1: in an
    evaluation they do not ask each other, and who waits for one that has left would take it for lost. A thread does
    so, as Python's own handlers wait until an operation on several processes is over.
    """

    def __init__(self, max_minutes=None):
        self.end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.number = self.signalled = None  # which signal, and when
        self.raises = False
        self.siblings = ()

    @property
    def requested(self):
        return self.number is not None or self.seconds_left <= 0

    @property
    def seconds_left(self):
        return math.inf if self.end is None else self.end - time.monotonic()

    @property
    def exit_status(self):
        """Of the command, as shells say it: 128 and the signal's number; 0 where only the time was up."""
        return 0 if self.number is None else 128 + self.number

    def agree(self, processes):
        """Stop when the others do. processes: of each process of the training its machine and number, and its
        `seconds_left`; the first that is over counts for all."""
        mine = machine_id(), os.getpid()
        seconds = min(seconds for _, _, seconds in processes)
        self.end = None if seconds == math.inf else time.monotonic() + seconds
        others = [(machine, process) for machine, process, _ in processes if (machine, process) != mine]
        if hasattr(signal, "SIGUSR1"):
            self.siblings = [process for machine, process in others if machine == mine[0]]

    @contextmanager
    def watch(self):
        """Signals are noted in this block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.previous = {number: signal.signal(number, self._note) for number in STOPPING}
        try:
            with self._telling_siblings() if self.siblings else nullcontext():
                yield
        finally:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    @contextmanager
    def _telling_siblings(self):
        """In this block the siblings are told of a signal, and tell of theirs."""
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        self.previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._note_sibling)
        thread = threading.Thread(target=self._tell_siblings, args=(told,), daemon=True)
        thread.start()
        previous = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            os.close(tell)
            thread.join()
            os.close(told)

    def _tell_siblings(self, told):
        while numbers := os.read(told, 1):  # of each signal as it comes
            if numbers[0] in STOPPING:
                for process in self.siblings:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGUSR1)

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
                signal.setitimer(signal.ITIMER_REAL, max(self.seconds_left, 1e-3))
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
        self.number = number
        self._raise(number, frame)

    def _note_sibling(self, number, frame):
        # Never a second signal, however late it comes: all of them may tell of the same.
        self.number = self.number or signal.SIGTERM
        self._raise(number, frame)

    def _raise(self, number, frame):
        if self.raises:
            self.raises = False  # once: what is cleaned up on the way out is not interrupted again
            raise Stopped
