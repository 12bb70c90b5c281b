"""Opening run directories: ours and released ones."""

import json

import pytest
import torch

import train_dlp
from configs.schema import Config
from models import ObjectDLP, ObjectDynamicsDLP
from rundir import load_model
from rundir.run import Run
from tests import golden
from tests.balls import SMALL
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
    model = load_model(tmp_path / "run")
    assert type(model) is model_type and not any(module.training for module in model.modules())
    bias = "bg_module.bg_enc.4.bias"
    assert torch.equal(model.state_dict()[bias], weights[bias])
    if kind == "ddlp":
        assert run.config.depth_logvar_from_mean and model.dyn_module.depth_logvar_from_mean


@pytest.mark.parametrize(("kind", "model_type"), [("dlp", ObjectDLP), ("ddlp", ObjectDynamicsDLP)])
def test_a_run_says_its_kind_whatever_its_files_are_called(kind, model_type, tmp_path):
    other = {"dlp": "ddlp", "ddlp": "dlp"}[kind]
    config = Config.from_dict({**SMALL, "run_prefix": f"_{other}"})
    run = Run(tmp_path / f"010126_000000_balls_{other}", config, kind)
    (run.path / "saves").mkdir(parents=True)
    run.save_config(config)
    model = model_type.from_config(config)
    run.save_weights(model.state_dict())
    checkpoints.save({}, run.path / f"balls_{other}.pth")
    checkpoints.save({}, run.path / "saves" / f"balls_{other}.pth")
    assert Run.open(run.path).kind == kind
    loaded = load_model(run.path)
    assert type(loaded) is model_type and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_kind_of_a_run_that_does_not_say_it_is_in_its_folders_name_too(tmp_path):
    released_folder(tmp_path / "010126_000000_balls_ddlp", "ddlp-balls", "balls")
    (tmp_path / "010126_000000_balls_ddlp" / "balls_ddlp.pth").unlink()
    assert Run.open(tmp_path / "010126_000000_balls_ddlp").kind == "ddlp"


def test_records_replace_those_of_the_step_and_later_ones(tmp_path):
    run = Run(tmp_path, None, "dlp")
    for iteration, loss in ((4, 1), (8, 2), (12, 3), (8, 4)):
        run.record({"iteration": iteration, "loss": loss})
    other = Run(tmp_path, None, "dlp", is_main=False)
    other.record({"iteration": 4, "loss": 9})
    other.log("nothing")
    assert (
        run.records() == [{"iteration": 4, "loss": 1}, {"iteration": 8, "loss": 4}]
        and not (tmp_path / "log.txt").exists()
    )


def test_training_does_not_go_on_with_a_run_of_another_kind(tmp_path):
    released_folder(tmp_path / "run", "ddlp-balls", "balls")
    with pytest.raises(UserError, match=r"run is a run of kind ddlp; .* kind dlp"):
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
    with pytest.raises(UserError, match=r"not a run directory of DLPv2 or DDLP: no hparams\.json in it"):
        Run.open(tmp_path)
    released_folder(tmp_path / "run", "ddlp-balls", "balls")
    hparams = tmp_path / "run" / "hparams.json"
    assert Run.open(hparams).path == tmp_path / "run"
    hparams.write_text(json.dumps({**json.loads(hparams.read_text()), "kind": ["ddlp"]}))
    assert Run.open(tmp_path / "run").kind == "ddlp"  # by the names of its weights
    (tmp_path / "run" / "balls_ddlp.pth").unlink()
    with pytest.raises(UserError, match=r"holds no weights balls_KIND\*.pth, KIND one of dlp, ddlp"):
        Run.open(tmp_path / "run")
