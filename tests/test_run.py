"""Opening run directories: ours and released ones."""

import json

import pytest
import torch

import train_dlp
from models import ObjectDLP, ObjectDynamicsDLP
from rundir.run import Run
from tests import golden
from utils import checkpoints
from utils.errors import UserError


def released_folder(folder, name, ds):
    """A folder as the release's users have it: hparams.json beside a file of weights in the published names."""
    released = golden.published(name)
    folder.mkdir()
    (folder / "hparams.json").write_text(json.dumps(released["config"]))
    kind = name.split("-")[0]
    weights = {key: 0.01 * torch.randn(shape) for key, shape in released["state_dict"].items()}
    torch.save(weights, folder / f"{ds}_{kind}{released['config']['run_prefix']}.pth")
    return weights


@pytest.mark.parametrize(
    ("name", "ds", "kind", "model_type"),
    [("dlp-traffic_img", "traffic", "dlp", ObjectDLP), ("ddlp-balls", "balls", "ddlp", ObjectDynamicsDLP)],
)
def test_a_released_folder_is_a_model(name, ds, kind, model_type, tmp_path):
    weights = released_folder(tmp_path / "run", name, ds)
    run = Run.open(tmp_path / "run")
    assert run.kind == kind
    model = run.load_model()
    assert type(model) is model_type and not model.training
    bias = "bg_module.bg_enc.4.bias"
    assert torch.equal(model.state_dict()[bias], weights[bias])
    if kind == "ddlp":
        assert run.config.depth_logvar_from_mean and model.dyn_module.depth_logvar_from_mean


def test_training_does_not_go_on_with_a_run_of_another_kind(tmp_path):
    released_folder(tmp_path / "run", "ddlp-balls", "balls")
    with pytest.raises(UserError, match="run is a run of kind ddlp; this command goes on with kind dlp"):
        train_dlp.main(["--resume", str(tmp_path / "run")])


def test_which_weights_are_taken(tmp_path):
    released_folder(tmp_path / "run", "ddlp-balls", "balls")
    run = Run.open(tmp_path / "run")
    assert run.find_weights() == tmp_path / "run" / "balls_ddlp.pth"
    run.weights_path().parent.mkdir()
    checkpoints.save({}, run.weights_path())
    assert run.find_weights() == run.weights_path()
    checkpoints.save({}, run.weights_path("_best_lpips"))
    assert run.find_weights() == run.weights_path("_best_lpips")
    assert run.find_weights(use_last=True) == run.weights_path()
    assert str(run.find_weights(checkpoint="other.pth")) == "other.pth"


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="missing: no such run directory"):
        Run.open(tmp_path / "missing")
    with pytest.raises(UserError, match=r"hparams.json: not found"):
        Run.open(tmp_path)
    released_folder(tmp_path / "run", "ddlp-balls", "balls")
    (tmp_path / "run" / "balls_ddlp.pth").unlink()
    with pytest.raises(UserError, match=r"holds no weights balls_KIND\*.pth, KIND one of dlp, ddlp"):
        Run.open(tmp_path / "run")
