"""Surroundings in which things start all the same: a notebook's settings, another package of our name, a safe path, a
system without what only Unix has, and Python's newer ways to start processes."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.balls import ROOT
from tests.test_imports import FILES
from utils.animation import save_animation
from utils.errors import UserError

OURS = ("configs", "datasets", "eval", "models", "modules", "rundir", "training", "utils")


def python(*arguments, **environment):
    """Run this Python; returns its standard output."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd="/",
        env={**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_notebook_s_backend_that_is_not_installed_and_a_safe_path():
    script = str(ROOT / "train_dlp.py")
    assert "usage: " in python(script, "--help", MPLBACKEND="module://not_installed.backend", PYTHONSAFEPATH="1")


@pytest.mark.parametrize(("backend", "kept"), [("nonsense", False), ("agg", True), ("svg", True)])
def test_a_backend_is_only_forgotten_where_it_is_none(backend, kept):
    code = "import os, utils.plotting, matplotlib; print(os.environ.get('MPLBACKEND'), matplotlib.rcParams['backend'])"
    said = python("-c", code, MPLBACKEND=backend, PYTHONPATH=str(ROOT)).split()
    assert said[0] == (backend if kept else "None") and (said[1] == backend or not kept)


@pytest.mark.parametrize("name", [name for name in FILES if "/" not in name and name != "models.py"])
def test_every_script_finds_its_modules_with_a_safe_path(name):
    """Python then leaves the script's folder out of the path; the test above runs one."""
    text = (ROOT / name).read_text(encoding="utf-8")
    before = re.split(rf"^(?:from|import) (?:{'|'.join(OURS)}|train_)", text, maxsplit=1, flags=re.MULTILINE)[0]
    assert "sys.path.insert(0, str(Path(__file__).resolve().parent))" in before


def test_a_hugging_face_datasets_that_was_imported_first(tmp_path):
    """Both are found afterwards."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("name = 'another'\n")
    (tmp_path / "datasets" / "load.py").write_text("here = True\n")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import datasets
sys.path[0] = sys.argv[2]
import train_ddlp
from eval import eval_gen_metrics
import datasets.load
from datasets.get_dataset import get_video_dataset
assert datasets.name == "another" and datasets.load.here and get_video_dataset.__module__ == "datasets.get_dataset"
"""
    python("-c", code, str(tmp_path), str(ROOT))


def test_everything_is_imported_without_what_only_unix_has():
    """As on Windows: no fcntl, fork or sched_getaffinity; the libraries, which know Windows, are imported before."""
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in FILES
        if name.split("/")[0] in (*OURS, "train_dlp.py", "train_ddlp.py", "what_if.py")
    ]
    code = f"""
import os, signal, sys
import accelerate, cv2, diffusers, ema_pytorch, filelock, h5py, imageio, matplotlib.figure, piqa, PIL.Image, psutil
import scipy.optimize, skimage.draw, torchvision, tqdm
for name in ("fcntl", "grp", "pwd", "pty", "resource", "termios", "tty"):
    sys.modules[name] = None
for owner, names in ((os, ("fork", "getuid", "killpg", "setsid", "sched_getaffinity", "getpgid", "sysconf", "statvfs")),
                     (signal, ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1"))):
    for name in names:
        delattr(owner, name)
import importlib
for name in {modules!r}:
    importlib.import_module(name)
from utils.files import available_cores
assert available_cores() >= 1
"""
    python("-c", code, PYTHONPATH=str(ROOT))


def test_an_mp4_without_ffmpeg_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "gone"))
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match=r"^an MP4 needs ffmpeg; legal: pip install imageio-ffmpeg, .* or \.gif$"):
        save_animation(frames, tmp_path / "a.mp4", 0.1)
    save_animation(frames, tmp_path / "a.gif", 0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_ends_a_command_with_one_line():
    code = "from utils.errors import run_command; import time; run_command(lambda: (print('on'), time.sleep(60)))"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "stopped\n" and process.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes that end so")
def test_output_that_nobody_reads_any_more_is_no_error():
    code = "from utils.errors import run_command; run_command(lambda: [print('x' * 99) for _ in range(9999)])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141
