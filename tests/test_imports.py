"""The floors of the code: imports run down only. And scripts start quickly, and only when they are run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The top floor comes first. A file is on the floor of its folder, unless `floor_of` says otherwise.
FLOORS = ("scripts", "training", "eval", "rundir", "datasets", "models", "configs", "modules", "utils")
ON_OTHER_FLOORS = {
    "models.py": "models",
    "configs/generate_config_file.py": "scripts",
    "utils/util_func.py": "scripts",  # the release's import path, which hands names on from everywhere
}
NO_FLOOR = {"tests", "data"}
UNKNOWN_TO_MODELS = {"json", "argparse", "pathlib", "cv2", "matplotlib"}
SLOW = ("torchvision", "diffusers", "piqa", "matplotlib.pyplot")  # to import these takes seconds
FILES = [
    name
    for name in (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.rglob("*.py")))
    if not name.startswith(".") and name.split("/")[0] not in NO_FLOOR
]


def floor_of(name):
    if name in ON_OTHER_FLOORS:
        return ON_OTHER_FLOORS[name]
    folder = name.split("/")[0]
    return folder if folder in FLOORS and not name.endswith("_preparation.py") else "scripts"


def imported_modules(code):
    """The dotted names that code imports, anywhere in it; of "from a import b" both "a" and "a.b"."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def files_of(modules):
    paths = [module.replace(".", "/") for module in modules]
    return {file for path in paths for file in (f"{path}.py", f"{path}/__init__.py") if file in FILES}


def wrong_imports(name, code):
    """What the code of the file of that name imports, but must not."""
    modules, floor = set(imported_modules(code)), floor_of(name)
    wrong = {module for module in modules if module.startswith(".")}
    wrong |= {file for file in files_of(modules) if FLOORS.index(floor_of(file)) < FLOORS.index(floor)}
    if floor in ("models", "modules"):
        wrong |= {module for module in modules if module.split(".")[0] in UNKNOWN_TO_MODELS}
    return wrong


def test_imports_run_down():
    assert {floor_of(name) for name in FILES} == set(FLOORS)
    found = {name: wrong_imports(name, (ROOT / name).read_text()) for name in FILES}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("name", "code", "wrong"),
    [
        ("utils/files.py", "from configs import schema", {"configs/schema.py", "configs/__init__.py"}),
        ("utils/files.py", "def late():\n    import models", {"models.py"}),
        ("utils/files.py", "from utils.errors import UserError", set()),
        ("utils/util_func.py", "import what_if", set()),
        ("modules/spatial.py", "from utils.util_func import log_line", {"utils/util_func.py"}),
        ("modules/spatial.py", "import json, cv2.ml", {"json", "cv2.ml"}),
        ("modules/spatial.py", "from .particles import Particles", {".particles", ".particles.Particles"}),
        ("models.py", "from matplotlib import pyplot", {"matplotlib", "matplotlib.pyplot"}),
        ("models.py", "import eval.tracking as tracking", {"eval/tracking.py"}),
        ("configs/schema.py", "from configs.generate_config_file import main", {"configs/generate_config_file.py"}),
        ("datasets/balls_ds.py", "from datasets.balls_preparation import main", {"datasets/balls_preparation.py"}),
        ("datasets/balls_preparation.py", "import demo, datasets.preparation", set()),
        ("training/loop.py", "from train_dlp import main", {"train_dlp.py"}),
        ("train_dlp.py", "import training.loop", set()),
    ],
)
def test_an_import_that_runs_up_is_found(name, code, wrong):
    assert wrong_imports(name, code) == wrong


def test_every_imported_folder_is_a_package():
    """Otherwise an installed package of its name, such as Hugging Face's `datasets`, would come before it."""
    imported = {file for name in FILES for file in files_of(imported_modules((ROOT / name).read_text()))}
    folders = {file.rpartition("/")[0] for file in imported} - {""}
    assert {"datasets", "utils"} <= folders and [folder for folder in folders if not is_package(folder)] == []


def is_package(folder):
    return (ROOT / folder / "__init__.py").is_file()


STARTS = """
import importlib, multiprocessing, runpy, sys, threading

root, slow, scripts = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
sys.path.insert(0, root)

def check(what):
    imported = [name for name in slow if name in sys.modules]
    assert not imported, f"{what} imports {imported}"

for script in scripts:
    sys.argv = [script, "--no_such_option"]
    importlib.import_module(script)
    assert threading.active_count() == 1 and not multiprocessing.active_children(), script
    check(script)
print("imported", file=sys.stderr)
for arguments in [
    *([script, "--help"] for script in scripts),
    ["train_dlp", "-d", "missing"],
    ["train_dlp", "-d", "shapes", "--anchor_s", "0.3"],
    ["train_ddlp", "--resume", "missing"],
    ["train_diffuse_ddlp", "-c", "missing"],
    ["generate_ddlp_video_prediction", "-p", "missing"],
    ["generate_diffuse_ddlp_video_generation", "-c", "missing"],
]:
    sys.argv = arguments
    try:
        runpy.run_path(f"{root}/{arguments[0]}.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == (0 if "--help" in arguments else 2), (arguments, end.code)
    else:
        raise AssertionError(f"{arguments} ran")
    check(arguments)
"""


def test_scripts_start_only_when_they_are_run_and_quickly(tmp_path):
    scripts = " ".join(name.removesuffix(".py") for name in FILES if "/" not in name and name != "models.py")
    command = [sys.executable, "-c", STARTS, str(ROOT), " ".join(SLOW), scripts]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported, _, ran = done.stderr.partition("imported\n")
    assert imported == "" and ran.count("error: ") == 6 and list(tmp_path.iterdir()) == []
