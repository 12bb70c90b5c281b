"""A screen for tests of windows: a virtual one of their own where Xvfb is installed, else the user's."""

import os
import shutil
import subprocess

import pytest


def start_display():
    """Start Xvfb. Returns its process and the name of its display."""
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x800x24", "-nolisten", "tcp"]
    process = subprocess.Popen(command, pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as file:
        number = file.readline().strip()
    assert number, "Xvfb did not start"
    return process, f":{number}"


@pytest.fixture(scope="session")
def display():
    """The name of a display, which is in the environment too; skips the test where there is none."""
    pytest.importorskip("tkinter", reason="Python's tkinter is not installed")
    before = os.environ.get("DISPLAY")
    if shutil.which("Xvfb") is None:
        if not before:
            pytest.skip("no display, and Xvfb is not installed (Debian: apt install xvfb)")
        yield before
        return
    process, os.environ["DISPLAY"] = start_display()
    yield os.environ["DISPLAY"]
    process.terminate()
    process.wait()
    if before is None:
        del os.environ["DISPLAY"]
    else:
        os.environ["DISPLAY"] = before
