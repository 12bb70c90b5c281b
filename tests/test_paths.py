"""Paths in configurations: expanded, relative to where they were written, never another data set without a word."""

import json
import re
from pathlib import Path

import pytest

import generate_ddlp_video_prediction
import generate_diffuse_ddlp_video_generation
import what_if
from configs import generate_config_file, schema
from configs.schema import Config, DiffuseConfig
from datasets import balls_preparation, clevrer_preparation, obj3d_like_preparation, traffic_preparation
from eval import eval_gen_metrics
from rundir.prediction import data_config
from rundir.run import Run
from tests.balls import SMALL, make_run


def write(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"ds": "balls", **values}))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, beside the folder `there`."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_home_and_variables_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DATA", "/scratch")
    config = Config.from_dict({"ds": "balls", "root": "~/balls", "pretrained_path": "$DATA/a/${DATA}.pth"})
    assert (config.root, config.pretrained_path) == ("/home/someone/balls", "/scratch/a//scratch.pth")
    config = DiffuseConfig.from_dict({"ds": "balls", "ddlp_dir": "~/run", "ds_root": "$DATA", "result_dir": "$GONE/a"})
    assert (config.ddlp_dir, config.ds_root, config.result_dir) == ("/home/someone/run", "/scratch", "$GONE/a")
    assert Config.from_dict({"ds": "balls", "run_prefix": "$DATA"}).run_prefix == "$DATA"  # no path


@pytest.mark.parametrize(
    ("script", "option"),
    [
        *((script, "--path") for script in (generate_ddlp_video_prediction, eval_gen_metrics, what_if)),
        *((what_if, option) for option in ("--video", "--edits", "--out", "--checkpoint")),
        (generate_diffuse_ddlp_video_generation, "--config"),
        (generate_config_file, "--out"),
        *((script, "--out") for script in (balls_preparation, clevrer_preparation, obj3d_like_preparation)),
        (traffic_preparation, "--frames"),
    ],
)
def test_an_empty_path_is_not_the_working_directory(script, option, capsys):
    """As a variable of the shell that is not set gives it."""
    with pytest.raises(SystemExit) as ended:
        script.parse_arguments([f"{option}="])
    assert ended.value.code == 2 and f"argument {option}: is empty; legal: a path" in message(capsys)


def message(capsys):
    """What argparse said, an option's names in its message reduced to the long one."""
    return re.sub(r"argument -\w/", "argument ", capsys.readouterr().err)


def test_home_is_expanded_in_an_option(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert balls_preparation.parse_arguments(["--out=~/balls"]).out == Path("/home/someone/balls")


def test_a_path_is_relative_to_the_file_that_it_is_written_in(here, recwarn):
    there = here.parent / "there"
    path = write(there / "config.json", root="data/balls")
    assert Config.load(path).root == "data/balls"  # nothing is anywhere
    (there / "data" / "balls").mkdir(parents=True)
    assert Config.load(path).root == Config.load("../there/config.json").root == str(there / "data" / "balls")
    (here / "data" / "balls").mkdir(parents=True)
    assert Config.load(path).root == str(there / "data" / "balls")  # not another one of the same name
    assert Config.load(write(here / "config.json", root="data/balls")).root == "data/balls"  # the same
    assert not recwarn.list


def test_a_path_that_is_only_in_the_working_directory_is_taken_with_a_word(here):
    path = write(here.parent / "there" / "config.json", root="data/balls")
    (here / "data" / "balls").mkdir(parents=True)
    with pytest.warns(
        UserWarning, match=rf"root is data/balls; nothing is at .*there/data/balls, so {here}/data/balls is"
    ):
        assert Config.load(path).root == f"{here}/data/balls"


def test_paths_in_configs_are_relative_to_the_folder_above(here, monkeypatch):
    checkout = here.parent / "there"
    monkeypatch.setattr(schema, "CONFIG_DIR", checkout / "configs")
    write(checkout / "configs" / "balls.json", root="./data/balls")
    (checkout / "data" / "balls").mkdir(parents=True)
    assert Config.load("balls").root == str(checkout / "data" / "balls")


def test_a_written_configuration_means_the_same_from_everywhere(here, monkeypatch):
    """The generator writes a path of the command line into a file of another folder."""
    (here / "mine").mkdir()
    generate_config_file.main(["--ds", "balls", "--root", "mine", "--out", "../there/out.json"])
    generate_config_file.main(["--ds", "balls", "--root", "mine", "--out", "out.json"])
    assert json.loads((here / "out.json").read_text())["root"] == "mine"
    monkeypatch.chdir("/")
    for folder in ("here", "there"):
        assert Config.load(here.parent / folder / "out.json").root == str(here / "mine")


def test_a_run_finds_its_data_from_another_directory(here, balls_data, monkeypatch, capsys):
    (here / "data").symlink_to(balls_data)
    run = make_run(here, "data")
    assert json.loads((run.path / "hparams.json").read_text())["root"] == str(here / "data")
    monkeypatch.chdir("/")
    assert data_config(Run.open(run.path)).root == str(here / "data")
    assert capsys.readouterr().err == ""


def test_another_data_set_is_never_taken_without_a_word(here, balls_data, capsys):
    run = make_run(here, str(here / "gone"))
    root = data_config(run).root
    said = f"{run.path}: its data set was at {here / 'gone'}; here the one at {root} is taken\n"
    assert Path(root).parts[-2:] == ("data", "balls") and capsys.readouterr().err == said
    assert data_config(run, root=balls_data).root == balls_data and capsys.readouterr().err == ""


def test_a_file_that_is_named_for_a_prediction_comes_before_the_run(here, balls_data, capsys):
    run = make_run(here, balls_data)
    (here / "mine").mkdir()
    path = write(here / "other.json", **{**SMALL, "root": "mine"})
    assert data_config(run, str(path)).root == "mine"
    assert capsys.readouterr().err.endswith(f"its data set was at {balls_data}; here the one at mine is taken\n")
    assert data_config(run, "balls").root == balls_data and capsys.readouterr().err == ""


def test_ddlp_dir_of_a_file_elsewhere(here):
    path = write(here.parent / "there" / "diffuse.json", ddlp_dir="run", ds_root=None)
    (here.parent / "there" / "run").mkdir()
    assert DiffuseConfig.load(path).ddlp_dir == str(here.parent / "there" / "run")
