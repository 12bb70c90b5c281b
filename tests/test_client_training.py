"""Training from a notebook, as a user of the published release writes it: a JSON file in, the trained model out."""

import inspect
import json
import sys

import pytest
import torch

import train_ddlp_accelerate
import train_dlp_accelerate
from models import ObjectDLP, ObjectDynamicsDLP
from tests.test_client import config, make_ddlp  # noqa: F401 (a fixture)
from train_ddlp import train_ddlp
from train_dlp import train_dlp
from utils.util_func import get_config


@pytest.fixture
def folder(config, tmp_path, monkeypatch):  # noqa: F811
    """A working directory with a configuration in it, in a notebook, whose process has arguments of its own."""
    changes = {"device": "cpu", "num_epochs": 1, "eval_im_metrics": False, "num_workers": 0}
    changes |= {"train_size": 4, "val_size": 1}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.json").write_text(json.dumps({**config, **changes}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    return tmp_path


def the_run(folder, kind):
    (path,) = folder.glob(f"*_balls_{kind}_small")
    return path


def test_train_dlp_returns_the_trained_model(folder):
    model = train_dlp(config_path="./configs/small.json")
    assert type(model) is ObjectDLP
    weights = torch.load(the_run(folder, "dlp") / "saves" / "balls_dlp_small.pth")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    (record,) = (the_run(folder, "dlp") / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record)["iteration"] == 2  # 4 images, 2 in a batch


def test_train_ddlp_returns_the_trained_model(folder):
    model = train_ddlp("./configs/small.json")
    assert type(model) is ObjectDynamicsDLP
    hparams = get_config(the_run(folder, "ddlp") / "hparams.json")
    again = make_ddlp(hparams)
    again.load_state_dict(torch.load(the_run(folder, "ddlp") / "saves" / "balls_ddlp_small.pth"))
    x = torch.rand(1, hparams["timestep_horizon"], 3, 32, 32)
    torch.testing.assert_close(model.eval().sample(x, num_steps=2), again.eval().sample(x, num_steps=2))


@pytest.mark.parametrize(
    ("name", "scripts", "default"),
    [
        ("train_dlp", (sys.modules["train_dlp"], train_dlp_accelerate), "./configs/shapes.json"),
        ("train_ddlp", (sys.modules["train_ddlp"], train_ddlp_accelerate), "./configs/balls.json"),
    ],
)
def test_both_scripts_have_the_function_with_its_default(name, scripts, default):
    for script in scripts:
        assert inspect.signature(getattr(script, name)).parameters["config_path"].default == default
