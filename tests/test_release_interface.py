"""Code written against the published release: its imports, calls and arguments."""

import importlib
import inspect
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.schema import Config
from datasets.get_dataset import get_image_dataset
from eval.eval_gen_metrics import eval_dlp_im_metric
from eval.eval_model import evaluate_validation_elbo, mean_over_processes
from models import ObjectDLP
from utils import util_func
from utils.errors import UserError
from utils.random_state import preserve_random_state, seed_everything, seed_of

SIGNATURES = json.loads((Path(__file__).parent / "published" / "signatures.json").read_text())
CONFIG = {
    "ds": "shapes",
    "n_kp_enc": 3,
    "n_kp_prior": 8,
    "patch_size": 16,
    "enc_channels": [4, 4, 4],
    "prior_channels": [4, 4],
    "learned_feature_dim": 2,
    "val_size": 5,
    "num_workers": 0,
}


def find(name):
    """The object at a dotted path whose first parts are a module."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """The published parameters in their order with their defaults; more may follow, if they have a default."""
    expected, actual = SIGNATURES[name][1:-1], str(inspect.signature(find(name)))[1:-1]
    assert (actual + ", ").startswith(expected + ", "), f"{actual} instead of {expected}"
    extra = actual[len(expected) :].strip(", ")
    assert all("=" in parameter or parameter == "*" for parameter in extra.split(", ") if extra), extra


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ObjectDLP.from_config(CONFIG).eval()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return {**CONFIG, "root": str(tmp_path_factory.mktemp("shapes"))}


def images(config):
    dataset = get_image_dataset("shapes", config["root"], mode="val", image_size=64, num_items=config["val_size"])
    return torch.stack([item[0] for item in dataset])


def test_validation_elbo_is_the_mean_over_the_images(model, config, tmp_path):
    options = {"recon_loss_type": "mse", "beta_kl": 0.3, "beta_rec": 2.0, "kl_balance": 0.01}
    value = evaluate_validation_elbo(model, config, 7, batch_size=2, save_image=True, fig_dir=tmp_path, **options)
    x = images(config)
    with torch.no_grad():
        expected = [
            model.calc_elbo(image[None], model(image[None], deterministic=True), **options)["loss"] for image in x
        ]
    assert value == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert (tmp_path / "image_valid_7.jpg").stat().st_size > 0
    assert evaluate_validation_elbo(model, Config.from_dict(config), 7, batch_size=5, **options) == pytest.approx(value)


def test_image_metrics_are_means_over_the_images(model, config, tmp_path, capsys):
    means = eval_dlp_im_metric(
        model, torch.device("cpu"), config, eval_dir=tmp_path, metrics=("ssim", "psnr"), batch_size=2, verbose=True
    )
    x = images(config)
    with torch.no_grad():
        rec = model(x, deterministic=True)["rec"]
    psnr = -10 * torch.log10((rec - x).square().flatten(1).mean(1))
    assert means["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-4)
    assert json.loads((tmp_path / "last_val_image_metrics.json").read_text()) == means
    assert f"psnr {means['psnr']:.4f}" in capsys.readouterr().out


def test_means_are_over_the_items_of_all_processes():
    """Another process has added up 4 items to 8."""
    accelerator = SimpleNamespace(num_processes=2, reduce=lambda x, reduction: x + {6.0: 8, 2.0: 4}[x.item()])
    assert mean_over_processes(torch.tensor(6.0), 2, accelerator) == 14 / 6
    assert mean_over_processes(torch.tensor(6.0), 2) == 3


def test_the_random_state_is_left_as_it_was():
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(3, "steps", 1, 2)
    expected = draws()
    seed_everything(3, "steps", 1, 2)
    with preserve_random_state():
        assert draws() == expected
    assert draws() == expected != draws()


def test_seeds_of_places_runs_and_uses_differ():
    """Runs of neighbouring seeds, and the processes and workers of each, draw what no other draws."""
    places = [(), (0,), (0, 0), (0, 1), (1, 0), (1,), (1, 1), (0, 0, 0)]
    uses = ("items", "workers", "steps")
    seeds = {seed_of(seed, use, *place) for seed in range(4) for use in uses for place in places}
    assert len(seeds) == 4 * 3 * len(places) and all(0 <= seed < 2**63 for seed in seeds)


def test_helpers_of_util_func(tmp_path):
    path = Path(util_func.prepare_logdir("shapes_dlp", str(tmp_path)))
    assert path.parent == tmp_path and path.name.endswith("_shapes_dlp") and len(path.name.split("_")) == 4
    assert {folder.name for folder in path.iterdir()} == {"figures", "saves"}
    other = Path(util_func.prepare_logdir("shapes_dlp", str(tmp_path)))
    assert other != path
    util_func.log_line(str(path), "first")
    util_func.log_line(str(path), "second\n")
    assert (path / "log.txt").read_text() == "first\nsecond\n"
    util_func.save_config(str(path), CONFIG)
    assert util_func.get_config(str(path / "hparams.json")) == CONFIG
    (path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            util_func.get_config(path / name)


def test_reparameterize_draws_around_the_mean():
    torch.manual_seed(0)
    draws = util_func.reparameterize(torch.full((200000,), 3.0), torch.full((200000,), 2 * torch.tensor(0.5).log()))
    assert draws.mean() == pytest.approx(3, abs=0.01) and draws.std() == pytest.approx(0.5, abs=0.01)
