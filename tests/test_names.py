"""File names and texts that are not ASCII or not even text, whatever the locale."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import Config
from tests.test_video_folder import random_frames, smooth_frames, write_file, write_folder

ROOT = Path(__file__).resolve().parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
STRICT = {"PYTHONIOENCODING": "utf-8:strict"}
NAME = os.fsdecode(b"caf\xe9 \xc3\xa9")  # Latin-1, then UTF-8


def run(arguments, environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, check=False
    )


@pytest.mark.parametrize("environment", [ASCII, STRICT], ids=["ASCII", "strict"])
def test_a_configuration_of_videos_whose_names_are_no_text(tmp_path, environment):
    root = tmp_path / NAME
    for number, split in enumerate(("train", "val", "test")):
        write_folder(root / split / f"{NAME} {number}", random_frames(4, number, 8, 8))
    write_file(tmp_path / "short.mp4", smooth_frames(3))
    (tmp_path / "short.mp4").rename(root / "val" / f"{NAME}.mp4")
    path = tmp_path / f"{NAME}.json"
    made = run(["configs/generate_config_file.py", "--ds", "video_folder", "--root", root, "--out", path], environment)
    assert made.returncode == 0, made.stderr
    assert b"\nlengths: 3 frames (val/caf" in made.stdout
    assert json.loads(path.read_text(encoding="utf-8"))["animation_horizon"] == 3
    assert sorted(os.listdir(Config.load(path).root)) == [".cache", "test", "train", "val"]


def test_the_log_is_utf_8(tmp_path):
    code = "import sys; from rundir.run import log_line; log_line(sys.argv[1], chr(0xE9) + chr(0xDCE9))"
    for environment in (ASCII, STRICT):
        done = run(["-c", code, tmp_path], environment)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "log.txt").read_bytes() == b"\xc3\xa9\\udce9\n" * 2


def text_files_without_encoding(path):
    """The lines of a file of Python that open text in the encoding of the locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_open = isinstance(node.func, ast.Name) and name == "open"
        if name in ("read_text", "write_text") or (is_open and "b'" not in "".join(map(ast.unparse, node.args[1:2]))):
            yield node.lineno


def test_every_text_file_is_utf_8():
    folders = ("", "configs", "datasets", "editor", "eval", "modules", "rundir", "training", "utils")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    assert len(paths) > 60
    assert [f"{path}:{line}" for path in paths for line in text_files_without_encoding(path)] == []
