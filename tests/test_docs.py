"""The documents say what the code does, name what there is, and lead where they say."""

import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from unittest import mock

import pytest

from tests import hyperparameters
from tests.balls import ROOT

FOLDERS = (".", "docs", "benchmarks", "checkpoints", "checkpoints/*", "configs/accelerate")
PAGES = sorted({page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md")})
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def test_the_table_of_keys_is_the_schemas():
    page = hyperparameters.PAGE.read_text()
    found = page.split(hyperparameters.BEGIN)[1].split(hyperparameters.END)[0].strip().splitlines()
    assert found == hyperparameters.tables(), "python -m tests.hyperparameters writes the table anew"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} in {page.name}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_of_scripts_and_options_that_there_are(page):
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^(?:\S+/)?python3? (\S+\.py\b.*)$", text, re.MULTILINE):
        script, *arguments = shlex.split(line, comments=True)
        assert (ROOT / script).is_file(), line
        for argument in arguments:
            if argument.startswith("-") and not argument[1].isdigit() and argument != "--KEY":
                assert argument.partition("=")[0] in options(script), f"{argument} in {line}"


@cache
def options(script):
    """The options that the script's --help names."""
    text = io.StringIO()
    with mock.patch.object(sys, "argv", [script, "--help"]), redirect_stdout(text), pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return set(re.findall(r"(?<![\w-])--?\w+", text.getvalue()))


def test_the_readme_is_short_and_the_contents_are_complete():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    contents = (ROOT / "docs" / "README.md").read_text()
    missing = [path.name for path in (ROOT / "docs").iterdir() if path.is_file() and f"({path.name})" not in contents]
    assert missing == ["README.md"]


def test_the_readmes_python_runs_and_makes_the_shapes_that_it_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    shapes = {name: list(names[name].shape) for name in ("z", "moved", "video", "prediction", "videos")}
    assert shapes == {
        "z": [4, 16, 2],
        "moved": [4, 3, 64, 64],
        "video": [2, 10, 3, 64, 64],
        "prediction": [2, 30, 3, 64, 64],
        "videos": [4, 50, 3, 64, 64],
    }
    compared = names["compared"]
    assert compared.video.shape == compared.altered_video.shape == (30, 3, 64, 64)
