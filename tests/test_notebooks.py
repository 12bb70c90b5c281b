"""The notebooks as they are kept: run from top to bottom, with their outputs. `make test` runs their cells, too."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.balls import ROOT

FOLDER = ROOT / "notebooks"
NAMES = ["ddlp_pretrained_loading_generation", "dlpv2_ddlp_walkthrough_tutorial", "train_on_your_own_video"]
MOST_BYTES = 5_000_000  # of all notebooks together


def cells(name, kind):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    return [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == kind]


def outputs(name):
    return [output for cell in cells(name, "code") for output in cell["outputs"]]


def test_all_notebooks_are_here():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_was_run_once_in_order(name):
    counts = [cell["execution_count"] for cell in cells(name, "code")]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_without_noise(name):
    found = outputs(name)
    pictures = [output for output in found if {"image/png", "image/gif"} & output.get("data", {}).keys()]
    assert len(pictures) >= 6
    assert not [output for output in found if output["output_type"] == "error" or output.get("name") == "stderr"]
    printed = json.dumps([output.get("text", "") for output in found])
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/\S*", printed)  # paths of the machine that ran it


def test_the_notebooks_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name):
    for cell in cells(name, "markdown"):
        for target in re.findall(r"\]\(([^)]+)\)", cell["source"]):
            assert target.startswith("https://") or (FOLDER / target.partition("#")[0]).exists(), target


def test_all_begin_with_the_same_setup():
    assert len({cells(name, "code")[0]["source"] for name in NAMES}) == 1


@pytest.fixture
def set_up():
    """A function that runs the setup cell in a folder, and returns the folder that it leads to, or its error."""
    code = cells(NAMES[0], "code")[0]["source"] + "\nprint(os.getcwd(), sys.path[0], sep='\\n')"

    def run(folder, **environment):
        command = [sys.executable, "-c", code]
        environment = {**os.environ, **environment}
        found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if found.returncode:
            return found.stderr.splitlines()[-1]
        place, first_on_path = found.stdout.split()
        assert place == first_on_path
        return place

    return run


def test_the_setup_finds_the_checkout(set_up):
    assert set_up(FOLDER) == set_up(ROOT) == str(ROOT)


def test_the_setup_fetches_the_code_where_there_is_none(set_up, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    folder.mkdir()
    source.mkdir()
    (source / "models.py").write_text("")
    (source / "requirements.txt").write_text("pip\n")  # it is here already: nothing is downloaded
    git = ["git", "-C", source, "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Code"]):
        subprocess.run([*git, *command], check=True)
    assert "REPOSITORY" in set_up(folder)
    assert set_up(folder, REPOSITORY=f"file://{source}") == str(folder / "ddlp")
    assert set_up(folder) == str(folder / "ddlp")  # the second time it is there
