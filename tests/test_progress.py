"""Progress bars: on a terminal tqdm's, elsewhere a line now and then."""

import io
import sys

import pytest
from tqdm import tqdm

from utils import progress
from utils.progress import progress_bar


class Output(io.StringIO):
    """What is written to it; a terminal or not."""

    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.fixture
def stderr(monkeypatch):
    def replace(is_terminal):
        monkeypatch.setattr(sys, "stderr", Output(is_terminal))
        return sys.stderr

    return replace


def test_what_takes_less_than_an_interval_gets_no_line(stderr):
    output = stderr(False)
    assert list(progress_bar(range(1000), desc="work")) == list(range(1000))
    assert output.getvalue() == ""


@pytest.mark.parametrize("leave", [True, False])
def test_long_work_gets_lines(leave, stderr, monkeypatch):
    """With an interval of 0 every step is a line: whole, without a carriage return, the last one said once."""
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    output = stderr(False)
    with progress_bar(total=3, desc="outer", unit="step") as outer:
        for _ in range(3):
            for _ in progress_bar(range(2), desc="inner", leave=leave):
                tqdm.write("a line of its own", file=output)
            outer.set_postfix({"loss": "1.5"}, refresh=False)
            outer.update()
    text = output.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n") and "\n\n" not in text
    lines = text.splitlines()
    assert lines.count("a line of its own") == 6
    assert any(line.startswith("outer: 3/3") or line.startswith("outer: 100%") for line in lines)
    assert any("loss=1.5" in line for line in lines)


def test_lines_are_so_long_apart(stderr, monkeypatch):
    output, now = stderr(False), [0.0]
    monkeypatch.setattr(progress, "LINE_INTERVAL", 60.0)
    bar = progress_bar(total=6000, desc="work", miniters=1)
    bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0
    for second in range(600):
        now[0] = second + 1.0
        bar.update(10)
    bar.close()
    assert 9 <= len(output.getvalue().splitlines()) <= 11


def test_a_terminal_gets_the_bar(stderr):
    output = stderr(True)
    list(progress_bar(range(3), desc="work", ncols=60))
    assert "\r" in output.getvalue() and "work" in output.getvalue()
