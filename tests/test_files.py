"""Files written under temporary names: what is deleted, what is left and what replaces what."""

import subprocess
import sys

import psutil
import pytest

from tests.balls import ROOT
from tests.processes import wait_until
from utils.errors import UserError
from utils.files import atomic_write

# Writes half of a file, says so, and waits.
HALF = """
import sys
from utils.files import atomic_write

with atomic_write(sys.argv[1]) as part:
    part.write_text("half")
    print("half", flush=True)
    sys.stdin.read()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_process_left_is_deleted_once_it_is_dead(tmp_path):
    def write(text):
        with atomic_write(tmp_path / "file.txt") as part:
            part.write_text(text)
        return names(tmp_path)

    command = [sys.executable, "-c", HALF, tmp_path / "file.txt"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert len(write("while it lives")) == 2
        other.kill()
        wait_until(lambda: psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE, 30)
        assert write("while nobody has asked how it ended") == ["file.txt"]


@pytest.mark.parametrize("replace", [True, False])
def test_what_appears_meanwhile_is_replaced_or_left(tmp_path, replace):
    path = tmp_path / "file.txt"
    for before in (None, "damaged"):
        if before is not None:
            path.write_text(before)
        with atomic_write(path, replace) as part:
            part.write_text("mine")
        assert path.read_text() == "mine"
        with atomic_write(path, replace) as part:
            part.write_text("mine, later")
            path.unlink()
            path.write_text("of another")
        assert path.read_text() == ("mine, later" if replace else "of another")
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_that_disappears_is_one_line(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with (
        pytest.raises(UserError, match=r"file\.txt: cannot be written: No such file or directory"),
        atomic_write(folder / "file.txt") as part,
    ):
        part.write_text("gone")
        part.rename(tmp_path / "elsewhere")
        folder.rmdir()
