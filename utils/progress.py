"""Progress bars, which log files get as a line now and then."""

import sys

from tqdm import tqdm

LINE_INTERVAL = 60.0  # seconds between two lines where there is no terminal; what takes less time gets none


class Lines:
    """A text file that gets what is written to a terminal's line, again and again, as lines."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        line = text.replace("\x1b[A", "").strip()  # that code moves up to the bars above
        if line:
            self.file.write(f"{line}\n")

    def flush(self):
        self.file.flush()


def progress_bar(*arguments, **options):
    """tqdm's bar on stderr where that is a terminal; else a line every `LINE_INTERVAL` seconds. The arguments are
    tqdm's."""
    if sys.stderr is not None and not sys.stderr.isatty():
        every = {"mininterval": LINE_INTERVAL, "maxinterval": LINE_INTERVAL, "delay": LINE_INTERVAL}
        options |= {"file": Lines(sys.stderr), "dynamic_ncols": False, "ncols": 0, **every}
    return tqdm(*arguments, **options)
