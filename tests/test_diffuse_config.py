"""The configuration of DiffuseDDLP: its file, what is accepted and refused, and its overrides."""

import argparse
import json

import pytest

from configs.schema import CONFIG_DIR, Config, DiffuseConfig, add_override_arguments, overrides_from
from utils.errors import UserError

RELEASED = {
    "ds": "obj3d128",
    "ds_root": "/mnt/data/obj3d",
    "device": "cuda",
    "batch_size": 32,
    "lr": 8e-5,
    "train_num_steps": 700000,
    "diffusion_num_steps": 1000,
    "loss_type": "l1",
    "particle_norm": "minmax",
    "diffuse_frames": 4,
    "ddlp_dir": "./checkpoints/ddlp-obj3d128",
    "ddlp_ckpt": "./checkpoints/ddlp-obj3d128/obj3d128_ddlp.pth",
    "result_dir": None,
}
ADDED = {
    "scheduler_gamma": 1.0,
    "denoiser": "pint",
    "denoiser_dropout": 0.1,
    "load_model": False,
    "pretrained_path": None,
    "sampler": "dpm++",
    "sampling_steps": None,
    "mask_samples": True,
    "save_and_sample_every": 1000,
    "save_every": 1000,
    "keep": 1,
    "max_minutes": None,
    "ema_decay": 0.995,
    "ema_update_every": 10,
    "cuda_graphs": False,
    "precision": "float32",
    "gradient_accumulation_steps": 1,
    "grad_clip": 1.0,
    "compile": False,
    "tracker": None,
    "tf32": True,
    "deterministic": False,
    "encode_on_the_fly": False,
    "seed": 0,
    "num_workers": 2,
    "cache": True,
}


@pytest.mark.parametrize("name", ["diffuse_ddlp", "diffuse_ddlp.json", CONFIG_DIR / "diffuse_ddlp.json"])
def test_our_file_is_the_released_one_and_is_found(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diffuse_ddlp.json").write_text("{}")  # configs/ comes first
    config = DiffuseConfig.load(name)
    assert config.to_dict() == {**RELEASED, "ds_root": "./data/obj3d", **ADDED}
    file = (CONFIG_DIR / "diffuse_ddlp.json").read_text()
    assert list(json.loads(file)) == [key for key in config.to_dict() if key in json.loads(file)]


def test_a_released_run_s_file_works_unchanged(tmp_path, recwarn):
    path = tmp_path / "diffusion_hparams.json"
    path.write_text(json.dumps(RELEASED))
    config = DiffuseConfig.load(path)
    assert not recwarn.list and config.to_dict() == {**RELEASED, **ADDED}
    assert DiffuseConfig.from_dict(config) is config
    assert DiffuseConfig(**RELEASED) == config


@pytest.mark.parametrize("missing", ["ds", "ddlp_dir"])
def test_keys_without_a_default(missing):
    given = {name: value for name, value in RELEASED.items() if name in ("ds", "ddlp_dir")}
    assert DiffuseConfig.from_dict(given).to_dict() == {
        **RELEASED,
        "ds_root": None,
        "ddlp_ckpt": None,
        **ADDED,
    }
    del given[missing]
    with pytest.raises(UserError, match=f"^here: {missing} is missing; legal: a string, not empty"):
        DiffuseConfig.from_dict(given, where="here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"particle_norm": "max"}, 'particle_norm is "max"; legal: a string, "minmax" or "std"'),
        ({"loss_type": "huber"}, 'loss_type is "huber"; legal: a string, "l1" or "l2"'),
        ({"denoiser": "mlp"}, 'denoiser is "mlp"; legal: a string, "pint" or "unet"'),
        ({"sampler": "euler"}, 'sampler is "euler"; legal: a string, "ddpm" or "ddim" or "dpm++"'),
        ({"diffuse_frames": 0}, "diffuse_frames is 0; legal: an integer, at least 1"),
        ({"diffusion_num_steps": 1}, "diffusion_num_steps is 1; legal: an integer, at least 2"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5; legal: a finite number, from 0 to 1"),
        ({"ddlp_dir": None}, "ddlp_dir is null; legal: a string, not empty"),
        ({"sampling_steps": 1001}, "sampling_steps is 1001; legal: 1 to 1000"),
        ({"sampler": "ddpm", "sampling_steps": 50}, "sampling_steps is 50; legal: 1000 with sampler ddpm"),
        ({"scheduler_gamma": 0}, "scheduler_gamma is 0.0; legal: a finite number, above 0 and at most 1"),
        (
            {"scheduler_gamma": 0.9, "train_num_steps": 1500},
            "train_num_steps is 1500; legal: a multiple of save_and_sample_every 1000, as scheduler_gamma is 0.9",
        ),
        ({"lr": "fast"}, 'lr is "fast"; legal: a finite number, above 0'),
        ({"pint_dim": 8}, "unknown key pint_dim; legal: ds, ds_root, device"),
    ],
)
def test_illegal_values_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        DiffuseConfig(**RELEASED).replace("command line", **changes)
    assert str(error.value).startswith(f"command line: {message}")


def test_legal_combinations_are_accepted():
    config = DiffuseConfig(**RELEASED)
    for changes in ({"sampling_steps": 1000, "sampler": "ddpm"}, {"sampling_steps": 20}):
        values = config.replace(**changes).to_dict()
        assert {name: values[name] for name in changes} == changes


def test_the_configuration_of_a_ddlp_is_named_as_one():
    with pytest.raises(UserError, match="has the key n_kp_enc: it is the configuration of a DLPv2 or DDLP"):
        DiffuseConfig.load(CONFIG_DIR / "balls.json")


def test_unknown_keys_warn():
    with pytest.warns(UserWarning, match="unknown key particle_normalization is ignored; did you mean particle_norm"):
        DiffuseConfig.from_dict({**RELEASED, "particle_normalization": "std"})


def test_each_kind_proposes_its_own_files():
    with pytest.raises(UserError, match=r"one of diffuse_ddlp$"):
        DiffuseConfig.load("missing")
    with pytest.raises(UserError, match=r"one of .*shapes") as error:
        Config.load("missing")
    assert "diffuse" not in str(error.value)


def test_overrides():
    parser = argparse.ArgumentParser()
    add_override_arguments(parser, exclude=("result_dir",), kind=DiffuseConfig)
    args = parser.parse_args(["--particle_norm", "std", "--sampling_steps", "null", "--cache", "false"])
    assert overrides_from(args, DiffuseConfig) == {"particle_norm": "std", "sampling_steps": None, "cache": False}
    with pytest.raises(UserError, match='command line: sampler is "x"; legal'):
        overrides_from(parser.parse_args(["--sampler", "x"]), DiffuseConfig)
    text = " ".join(parser.format_help().split())
    for name in RELEASED | ADDED:
        assert (f"--{name} VALUE" in text) == (name != "result_dir"), name
