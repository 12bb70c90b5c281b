"""The configuration: what is accepted, refused and warned of, files, overrides, and the generator."""

import argparse
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest

from configs import generate_config_file
from configs import schema as config_module
from configs.schema import Config, DiffuseConfig, add_override_arguments, overrides_from
from modules.architecture import Architecture, PINTArchitecture
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
PUBLISHED = {
    path.stem: json.loads(path.read_text())["config"] for path in REPOSITORY.glob("tests/published/dlp-*.json")
}
# What the published DDLP configurations set otherwise than the DLP ones: (image, patch, glimpse, channels, particles).
PUBLISHED_DDLP = {
    "balls": {"image_size": 64, "patch_size": 8, "anchor_s": 0.25, "n_kp_enc": 6, "n_kp_prior": 12},
    "clevrer": {"image_size": 128, "patch_size": 16, "anchor_s": 0.25, "n_kp_enc": 12, "n_kp_prior": 16},
    "phyre": {"image_size": 128, "patch_size": 16, "anchor_s": 0.125, "n_kp_enc": 25, "n_kp_prior": 30},
}
ADDED = {
    "pretrained_dynamics": True,
    "beta_dyn_l1": 0.0,
    "discount_iterations": 10_000,
    "dyn_only_epoch": None,
    "dyn_particle_cache": True,
    "pint_noise": 0.0,
    "pint_noise_last": None,
    "pint_bias_lr": 1.0,
    "grad_clip": None,
    "ema": None,
    "checkpointing": False,
    "metrics": ["lpips", "ssim", "psnr"],
    "save_every": 500,
    "train_size": None,
    "val_size": None,
    "bg_learned_feature_dim": None,
    "duplicate_iou": None,
    "pint_dropout": 0.1,
    "pint_identity_init": False,
    "depth_logvar_from_mean": False,
    "cuda_graphs": False,
    "precision": "float32",
    "gradient_accumulation_steps": 1,
    "compile": False,
    "tracker": None,
    "tf32": True,
    "deterministic": False,
    "seed": 0,
    "num_workers": 2,
    "keep": 1,
    "max_minutes": None,
    "cache": True,
}


def without_context_dim(mapping):
    return {name: value for name, value in mapping.items() if name != "context_dim"}


@pytest.fixture
def shapes():
    return dict(PUBLISHED["dlp-shapes"])


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Published configurations


def test_published_configurations_are_there():
    assert sorted(PUBLISHED) == ["dlp-obj3d128_img", "dlp-shapes", "dlp-traffic_img"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_is_kept_in_values_and_order(name):
    published = without_context_dim(PUBLISHED[name])
    ours = Config.from_dict(PUBLISHED[name]).to_dict()
    assert ours == {**published, **ADDED}
    assert list(ours) == [*published, *ADDED]


@pytest.mark.parametrize("ds", PUBLISHED_DDLP)
def test_ddlp_configuration_is_accepted(shapes, ds):
    channels = [32, 64, 128] if PUBLISHED_DDLP[ds]["image_size"] == 64 else [32, 64, 128, 256]
    values = {**shapes, **PUBLISHED_DDLP[ds], "ds": ds, "enc_channels": channels, "filtering_heuristic": "variance"}
    del values["use_tracking"], values["context_dim"]
    ours = Config.from_dict(values).to_dict()
    assert ours == {**values, "use_tracking": False, **ADDED}


def test_every_key_has_a_default_but_ds():
    assert Config.from_dict({"ds": "mine"}) == Config(ds="mine")
    with pytest.raises(UserError, match=r"^here: ds is missing; legal: a string"):
        Config.from_dict({}, where="here")


def test_every_key_has_a_meaning():
    for entry in [*Config.keys().values(), *DiffuseConfig.keys().values()]:
        assert len(entry.metadata["meaning"].split()) >= 2, entry.name


def test_unknown_key_warns_with_the_nearest_one(shapes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = Config.from_dict({**shapes, "batchsize": 3, "zzzz": 1}, where="hparams.json")
    assert [str(warning.message) for warning in caught] == [
        "hparams.json: unknown key batchsize is ignored; did you mean batch_size?",
        "hparams.json: unknown key zzzz is ignored",
    ]
    assert {warning.category for warning in caught} == {UserWarning}
    assert config == Config.from_dict(shapes)


def test_values_keep_their_types(shapes):
    config = Config.from_dict({**shapes, "lr": 1, "kp_range": [-1, 1], "n_kp": 2})
    assert isinstance(config.lr, float) and isinstance(config.n_kp, int) and config.use_resblock is False
    assert config.kp_range == (-1.0, 1.0) and all(isinstance(end, float) for end in config.kp_range)
    assert config.enc_channels == (32, 32, 64, 64)
    with pytest.raises(AttributeError):
        config.lr = 0.1


def test_round_trip_through_json(shapes):
    config = Config.from_dict({**shapes, "metrics": ["psnr"], "train_size": 640})
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config.from_dict(config) is config


# Illegal values and combinations: the key and its value, what the message says of it

ILLEGAL = [
    ({"batch_size": 0}, "batch_size is 0; legal: an integer, at least 1"),
    ({"batch_size": 2.0}, "batch_size is 2.0; legal: an integer"),
    ({"batch_size": True}, "batch_size is true; legal: an integer"),
    ({"batch_size": None}, "batch_size is null; legal: an integer"),
    ({"batch_size": "many\nlines"}, 'batch_size is "many\\nlines"; legal: an integer'),
    ({"lr": 0}, "lr is 0.0; legal: a finite number, above 0"),
    ({"lr": "0.1"}, 'lr is "0.1"; legal: a finite number'),
    ({"lr": True}, "lr is true; legal: a finite number"),
    ({"lr": math.nan}, "lr is NaN; legal: a finite number"),
    ({"lr": math.inf}, "lr is Infinity; legal: a finite number"),
    ({"lr": 10**400}, "lr is 1000"),
    ({"beta_kl": -0.1}, "beta_kl is -0.1; legal: a finite number, at least 0"),
    ({"kl_balance": -1}, "kl_balance is -1.0; legal"),
    ({"weight_decay": -1}, "weight_decay is -1.0; legal"),
    ({"use_resblock": 1}, "use_resblock is 1; legal: true or false"),
    ({"load_model": "false"}, 'load_model is "false"; legal: true or false'),
    ({"ds": ""}, 'ds is ""; legal: a string, not empty and without /'),
    ({"ds": "a/b"}, 'ds is "a/b"; legal'),
    ({"ds": 3}, "ds is 3; legal: a string"),
    ({"root": 3}, "root is 3; legal: a string, not empty, or null"),
    ({"run_prefix": "../x"}, 'run_prefix is "../x"; legal: a string, without / or \\'),
    ({"device": "gpu"}, 'device is "gpu"; legal: a string, "cpu", "cuda" or "cuda:N"'),
    ({"device": "cuda:"}, 'device is "cuda:"; legal'),
    ({"ch": 1}, "ch is 1; legal: an integer, 3"),
    ({"pad_mode": "reflect"}, 'pad_mode is "reflect"; legal: a string, "replicate" or "zeros"'),
    ({"kp_activation": "relu"}, 'kp_activation is "relu"; legal: a string, "tanh" or "sigmoid"'),
    ({"recon_loss_type": "l1"}, 'recon_loss_type is "l1"; legal: a string, "mse" or "vgg"'),
    ({"filtering_heuristic": None}, "filtering_heuristic is null; legal: a string"),
    ({"filtering_heuristic": "best"}, '"variance" or "distance" or "random" or "none"'),
    ({"kp_range": [1, -1]}, "kp_range is [1.0, -1.0]; legal: a list of 2 finite numbers, the first below"),
    ({"kp_range": [-1, 0, 1]}, "kp_range is [-1, 0, 1]; legal: a list of 2 finite numbers"),
    ({"kp_range": 1}, "kp_range is 1; legal: a list"),
    ({"adam_betas": [0.9, 1.0]}, "adam_betas is [0.9, 1.0]; legal: a list of 2 finite numbers, each at least 0 and"),
    ({"adam_eps": 0}, "adam_eps is 0.0; legal"),
    ({"scheduler_gamma": 1.1}, "scheduler_gamma is 1.1; legal: a finite number, above 0 and at most 1"),
    ({"dropout": 1}, "dropout is 1.0; legal: a finite number, at least 0 and below 1"),
    ({"iou_thresh": 1.5}, "iou_thresh is 1.5; legal: a finite number, from 0 to 1"),
    ({"scale_std": 0}, "scale_std is 0.0; legal"),
    ({"offset_std": 0}, "offset_std is 0.0; legal"),
    ({"sigma": 0}, "sigma is 0.0; legal"),
    ({"obj_on_alpha": 0}, "obj_on_alpha is 0.0; legal"),
    ({"obj_on_beta": -1}, "obj_on_beta is -1.0; legal"),
    ({"animation_fps": 0}, "animation_fps is 0.0; legal"),
    ({"warmup_epoch": -1}, "warmup_epoch is -1; legal: an integer, at least 0"),
    ({"eval_epoch_freq": 0}, "eval_epoch_freq is 0; legal"),
    ({"num_epochs": 0}, "num_epochs is 0; legal"),
    ({"topk": 0}, "topk is 0; legal"),
    ({"timestep_horizon": 0}, "timestep_horizon is 0; legal"),
    ({"num_static_frames": 0}, "num_static_frames is 0; legal"),
    ({"learned_feature_dim": 0}, "learned_feature_dim is 0; legal"),
    ({"bg_learned_feature_dim": 0}, "bg_learned_feature_dim is 0; legal: an integer, at least 1, or null"),
    ({"seed": 2**32}, "seed is 4294967296; legal: an integer, from 0 to 2^32 - 1"),
    ({"num_workers": -1}, "num_workers is -1; legal"),
    ({"save_every": 0}, "save_every is 0; legal"),
    ({"metrics": []}, "metrics is []; legal: a list of strings, one or more of lpips, ssim, psnr"),
    ({"metrics": ["psnr", "fid"]}, 'metrics is ["psnr", "fid"]; legal'),
    ({"metrics": ["psnr", "psnr"]}, 'metrics is ["psnr", "psnr"]; legal'),
    ({"metrics": "psnr"}, 'metrics is "psnr"; legal: a list'),
    ({"load_model": True}, "pretrained_path is null; legal: the path of a file of weights, as load_model is true"),
    ({"train_size": 31}, "train_size is 31; legal: at least batch_size 32"),
    ({"start_dyn_epoch": 3, "dyn_only_epoch": 2}, "dyn_only_epoch is 2; legal: at least start_dyn_epoch 3, or null"),
    ({"animation_horizon": 10}, "animation_horizon is 10; legal: above cond_steps 10"),
    ({"pint_heads": 7}, "pint_dim is 256; legal: an even multiple of pint_heads 7"),
    ({"pint_dim": 15, "pint_heads": 5}, "pint_dim is 15; legal: an even multiple"),
    ({"pint_dim": 2, "pint_heads": 1}, "pint_dim is 2; legal: an integer, at least 4"),
    ({"pint_layers": 0}, "pint_layers is 0; legal"),
    ({"image_size": 96}, "image_size is 96; legal: a power of two, at least 64 with 4 enc_channels"),
    ({"image_size": 32}, "image_size is 32; legal: a power of two, at least 64 with 4 enc_channels"),
    ({"image_size": 0}, "image_size is 0; legal"),
    ({"enc_channels": [32]}, "enc_channels is [32]; legal: a list of integers, 2 or more"),
    ({"enc_channels": [32, 33]}, "enc_channels is [32, 33]; legal: a list of integers, 2 or more, each a positive mul"),
    ({"enc_channels": [32, 0]}, "enc_channels is [32, 0]; legal"),
    ({"prior_channels": []}, "prior_channels is []; legal: a list of integers, 1 or more"),
    (
        {"prior_channels": [8] * 7},
        "prior_channels is [8, 8, 8, 8, 8, 8, 8]; legal: at most 6 entries with image_size 64",
    ),
    (
        {"prior_channels": [8] * 6, "patch_size": 64},
        "prior_channels is [8, 8, 8, 8, 8, 8]; legal: at most 5 entries with anchor_s 0.25",
    ),
    ({"patch_size": 12}, "patch_size is 12; legal: 8, 16, 32, 64 (divides image_size 64"),
    (
        {"patch_size": 4},
        "patch_size is 4; legal: 8, 16, 32, 64 (divides image_size 64; 3 prior_channels leave 2 pixels of",
    ),
    ({"patch_size": 128}, "patch_size is 128; legal: 8, 16, 32, 64"),
    ({"anchor_s": 0}, "anchor_s is 0.0; legal: a finite number, above 0 and at most 1"),
    ({"anchor_s": 0.3}, "anchor_s is 0.3; legal: near it 0.25 or 0.5 (round(anchor_s * (image_size - 1))"),
    ({"anchor_s": 0.0625}, "anchor_s is 0.0625; legal: near it 0.125 or 0.25"),
    (
        {"filtering_heuristic": "variance", "n_kp_prior": 9},
        "n_kp_enc is 10; legal: at most n_kp_prior 9, or any with filtering_heuristic",
    ),
    (
        {"filtering_heuristic": "random", "n_kp_enc": 65, "n_kp_prior": 100},
        "n_kp_enc is 65; legal: at most 64 (n_kp 1 times 64 patches), or any with filtering_heuristic",
    ),
]
SMALL = {"image_size": 16, "enc_channels": [8, 8], "patch_size": 8, "anchor_s": 0.5}
ILLEGAL.append(({**SMALL, "recon_loss_type": "vgg"}, 'recon_loss_type is "vgg"; legal: "mse" with image_size below 32'))


@pytest.mark.parametrize(("changes", "message"), ILLEGAL, ids=[message[:50] for _, message in ILLEGAL])
def test_illegal_is_refused_with_key_value_and_what_is_legal(shapes, changes, message):
    with pytest.raises(UserError) as of_dict:
        Config.from_dict({**shapes, **changes}, where="my.json")
    assert str(of_dict.value).startswith("my.json: ") and message in str(of_dict.value)
    assert "; legal: " in str(of_dict.value) and "\n" not in str(of_dict.value)
    with pytest.raises(UserError) as of_replace:
        Config.from_dict(shapes).replace("command line", **changes)
    assert str(of_replace.value).startswith("command line: ") and message in str(of_replace.value)


LEGAL = [
    {"pad_mode": "zeros"},
    {"device": "cuda:12"},
    {"metrics": ["psnr"]},
    {"warmup_epoch": 0, "num_workers": 0, "beta_kl": 0, "dropout": 0, "weight_decay": 1e-4, "seed": 2**32 - 1},
    {"train_size": 32, "val_size": 1},
    {"start_dyn_epoch": 3, "dyn_only_epoch": 3},
    {"load_model": True, "pretrained_path": "weights.pth"},
    {"enc_channels": [5, 20]},
    {"image_size": 256},
    {"anchor_s": 0.5},
    {"anchor_s": 0.126},  # 8 pixels as well: round(7.938)
    {"prior_channels": [8] * 5, "patch_size": 64},
    {"filtering_heuristic": "none", "n_kp_enc": 65, "n_kp_prior": 9},  # the mixer makes any number of anchors
    {"filtering_heuristic": "variance", "n_kp_enc": 64, "n_kp_prior": 64},
    {"filtering_heuristic": "distance", "n_kp_enc": 100, "n_kp_prior": 100, "n_kp": 2},
    {**SMALL, "recon_loss_type": "mse", "metrics": ["lpips", "ssim", "psnr"]},  # the smallest that any metric meets
]


@pytest.mark.parametrize("changes", LEGAL, ids=str)
def test_legal_is_accepted(shapes, changes):
    values = Config.from_dict({**shapes, **changes}).to_dict()
    assert {name: values[name] for name in changes} == changes


@pytest.mark.parametrize("image_size", [16, 32, 64, 128, 256])
def test_proposed_anchor_s_is_legal(image_size):
    base = Config(ds="mine", image_size=image_size, enc_channels=[8, 8], anchor_s=0.5, n_kp_enc=4, metrics=["psnr"])
    for anchor_s in (0.01, 0.2, 0.3, 0.45, 0.7, 0.99, 1.0):
        with pytest.raises(UserError) as error:
            base.replace(anchor_s=anchor_s)
        for proposed in str(error.value).split("near it ")[1].split(" (")[0].split(" or "):
            assert base.replace(anchor_s=float(proposed)).anchor_s == float(proposed)


def test_replace_refuses_an_unknown_key(shapes):
    config = Config.from_dict(shapes)
    with pytest.raises(UserError, match=r"^configuration: unknown key batchsize; legal: ds, root, "):
        config.replace(batchsize=3)
    assert config.replace(lr=0.1) != config and config.replace(lr=config.lr) == config


def test_what_may_change_when_a_run_goes_on(shapes):
    config = Config.from_dict(shapes)
    changed = config.replace(num_epochs=200, device="cpu").with_absolute_paths()
    assert config.resume(num_epochs=200, lr=config.lr, device="cpu") == changed
    with pytest.raises(UserError, match=r"^lr is 0.5; legal: 0.0002, .*num_epochs"):
        config.resume(lr=0.5)
    with pytest.raises(UserError, match=r"^command line: num_epochs is 0; legal"):
        config.resume(num_epochs=0)
    there = config.replace(pretrained_path="there.pth").with_absolute_paths()
    assert there.resume(pretrained_path="there.pth", enc_channels=list(config.enc_channels)) == there
    with pytest.raises(UserError, match=r"^pretrained_path is \"here.pth\"; legal: '/.*/there.pth', as in the run"):
        there.resume(pretrained_path="here.pth")
    diffuse = DiffuseConfig(ds="mine", ddlp_dir="run")
    assert diffuse.resume(train_num_steps=5, sampler="ddim").sampler == "ddim"
    with pytest.raises(UserError, match=r"^loss_type is "):
        diffuse.resume(loss_type="l2")
    assert diffuse.resume(save_and_sample_every=70).save_and_sample_every == 70
    falling = diffuse.replace(scheduler_gamma=0.5)
    assert falling.resume(train_num_steps=2000, save_and_sample_every=1000).train_num_steps == 2000
    with pytest.raises(UserError, match=r"^save_and_sample_every is 70; legal: 1000, as in the run that goes on"):
        falling.resume(save_and_sample_every=70)


def test_not_an_object_is_refused():
    with pytest.raises(UserError, match=r"^here: not a JSON object"):
        Config.from_dict(["ds"], where="here")


def architecture_of(values):
    return {entry.name: values[entry.name] for entry in fields(Architecture) if entry.name in values}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch": 0}, "ch is 0; legal: an integer, at least 1"),
        ({"sigma": 0}, "sigma is 0.0; legal: a finite number, above 0"),
        ({"kp_activation": "relu"}, 'kp_activation is "relu"; legal: a string, "tanh" or "sigmoid"'),
        ({"n_kp_prior": 9, "filtering_heuristic": "distance"}, "n_kp_enc is 10; legal: at most n_kp_prior 9"),
    ],
    ids=str,
)
def test_an_architecture_checks_itself(shapes, changes, message):
    with pytest.raises(UserError) as error:
        Architecture(**architecture_of({**shapes, **changes}))
    assert str(error.value).startswith(message)


def test_an_architecture_may_be_what_a_configuration_may_not(shapes):
    """Other channels; and fewer patches than particles, as the release's model has fewer particles then."""
    changes = {"ch": 1, "patch_size": 32, "filtering_heuristic": "distance"}
    values = {**shapes, **changes}
    assert Architecture(**architecture_of(values)).num_proposals == 4 < values["n_kp_enc"]
    with pytest.raises(UserError, match=r"pint_dim is 20; legal: .*pint_heads 8"):
        PINTArchitecture(pint_dim=20)


GOLDEN = [path for path in (REPOSITORY / "tests" / "golden").glob("dlp*.json") if ".manifest" not in path.name]


@pytest.mark.parametrize("path", sorted(GOLDEN), ids=lambda path: path.stem)
def test_architecture_of_golden_models(path):
    arguments = json.loads(path.read_text())["arguments"]
    Architecture(**architecture_of({"ch": arguments["cdim"], **arguments}))


# Files


def test_load_by_name_and_path(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**shapes, "batch_size": 7}))
    assert Config.load("mine.json").batch_size == Config.load(path).batch_size == 7
    path.write_text(json.dumps({**shapes, "batch_size": 8}), encoding="utf-8-sig")  # as some editors save it
    assert Config.load(path).batch_size == 8
    assert Config.load("shapes").batch_size == 32


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "ds": "shapes",\n  "lr": ,\n}', r"invalid JSON at line 3, column 9: Expecting value"),
        (b"", r"invalid JSON at line 1, column 1"),
        (b'{"ds": "\xff"}', r"invalid JSON: 'utf-8' codec can't decode"),
        (b'{"ds": "shapes", "batch_size": ' + b"1" * 5000 + b"}", r"invalid JSON: Exceeds the limit"),
        (b'["shapes"]', r"not a JSON object"),
        (b'{"ds": "shapes", "lr": 0.1, "lr": 0.2}', r'invalid JSON: the key "lr" is there twice'),
        (b'{"ds": "shapes", "ddlp_dir": "run"}', r"has the key ddlp_dir: it is the configuration of a DiffuseDDLP"),
        (b'{"ds": "shapes", "lr": NaN}', r"lr is NaN; legal: a finite number"),
        (b'{"ds": "shapes", "lr": 1e999}', r"lr is Infinity; legal: a finite number"),
        (b'{"lr": 0.1}', r"ds is missing"),
    ],
)
def test_load_names_the_file_and_what_is_wrong(tmp_path, content, message):
    path = write(tmp_path / "broken.json", content)
    with pytest.raises(UserError, match=message) as error:
        Config.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_load_lists_the_names_when_there_is_no_such_file(tmp_path):
    for name in ("shape", str(tmp_path / "missing.json")):
        with pytest.raises(UserError, match=r"not found; legal: a path that ends in \.json, or one of .*shapes"):
            Config.load(name)


def test_load_of_a_directory_or_an_impossible_path(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "folder.json", "x" * 300 + ".json", write(tmp_path / "file", b"") / "hparams.json"):
        with pytest.raises(UserError, match=r"cannot be read|not found"):
            Config.load(path)


# The files in configs/


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("shapes", "./data/shapes"),
        ("traffic_img", "./data/traffic/img128np.npy"),
        ("obj3d128_img", "./data/obj3d"),
    ],
)
def test_our_file_equals_the_published_one(name, root):
    ours = json.loads((REPOSITORY / "configs" / f"{name}.json").read_text())
    published = without_context_dim(PUBLISHED[f"dlp-{name}"])
    expected = {**published, "root": root, "device": "cuda", "run_prefix": "", **ADDED}
    assert Config.load(name).to_dict() == expected
    assert list(ours) == [key for key in expected if key in ours]


def test_obj3d_img_is_obj3d128_img_at_64_pixels():
    small, large = Config.load("obj3d_img").to_dict(), Config.load("obj3d128_img").to_dict()
    assert {name: value for name, value in small.items() if value != large[name]} == {
        "ds": "obj3d",
        "image_size": 64,
        "patch_size": 8,
        "enc_channels": [32, 64, 128],
        "n_kp_enc": 8,
        "learned_feature_dim": 10,
        "beta_kl": 12.0,
        "beta_dyn": 12.0,
    }


# Overrides on a command line


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("-d", "--dataset")
    parser.add_argument("--resume")
    add_override_arguments(parser)
    return overrides_from(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["-d", "shapes", "--resume", "run"], {}),
        (["--batch_size", "4", "--lr", "1e-3", "--device", "cpu"], {"batch_size": 4, "lr": 0.001, "device": "cpu"}),
        (["--lr", "1"], {"lr": 1.0}),
        (["--use_resblock", "true", "--eval_im_metrics", "False"], {"use_resblock": True, "eval_im_metrics": False}),
        (["--enc_channels", "8,16"], {"enc_channels": (8, 16)}),
        (["--enc_channels", "8", "16", "-d", "shapes"], {"enc_channels": (8, 16)}),
        (["--enc_channels", "8 16"], {"enc_channels": (8, 16)}),
        (["--enc_channels", "[8, 16]"], {"enc_channels": (8, 16)}),
        (["--kp_range", "-1", "1"], {"kp_range": (-1.0, 1.0)}),
        (["--kp_range=-1,0.5"], {"kp_range": (-1.0, 0.5)}),
        (["--metrics", "psnr", "ssim"], {"metrics": ("psnr", "ssim")}),
        (["--metrics", '["psnr"]'], {"metrics": ("psnr",)}),
        (["--root", "null", "--train_size", "None"], {"root": None, "train_size": None}),
        (["--train_size", "64"], {"train_size": 64}),
        (["--filtering_heuristic", "none"], {"filtering_heuristic": "none"}),
        (["--run_prefix", ""], {"run_prefix": ""}),
        (["--ds", "mine"], {"ds": "mine"}),
    ],
    ids=str,
)
def test_overrides_are_parsed(arguments, expected):
    assert parsed(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "1.5"], 'batch_size is "1.5"; legal: an integer, at least 1'),
        (["--batch_size", "0"], "batch_size is 0; legal: an integer, at least 1"),
        (["--batch_size", "none"], 'batch_size is "none"; legal: an integer'),
        (["--lr", "fast"], 'lr is "fast"; legal: a finite number'),
        (["--lr", "nan"], "lr is NaN; legal: a finite number"),
        (["--use_resblock", "1"], 'use_resblock is "1"; legal: true or false'),
        (["--enc_channels", "8,x"], 'enc_channels is [8, "x"]; legal: a list of integers'),
        (["--enc_channels", "[8,"], 'enc_channels is "[8,"; legal: a list of integers'),
        (["--enc_channels", "8.5"], 'enc_channels is ["8.5"]; legal: a list of integers'),
        (["--kp_range", "1"], "kp_range is [1.0]; legal: a list of 2 finite numbers"),
    ],
    ids=str,
)
def test_illegal_overrides_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        parsed(*arguments)
    assert str(error.value).startswith(f"command line: {message}")


@pytest.mark.parametrize("arguments", [["--batch", "3"], ["--batchsize", "3"], ["--lr"]], ids=str)
def test_unknown_and_abbreviated_options_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        parsed(*arguments)
    assert error.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_help_tells_meaning_legal_values_and_default():
    parser = argparse.ArgumentParser(prog="train")
    add_override_arguments(parser, exclude=("seed",))
    text = " ".join(parser.format_help().split())
    for name in Config.keys():  # noqa: SIM118 (a method of ours)
        assert (f"--{name} VALUE" in text) == (name != "seed"), name
    assert "images or clips in a batch, for each process (an integer, at least 1; default 32)" in text
    assert "the data set, a name that datasets/get_dataset.py knows (a string" in text


# The generator


def generate(*arguments):
    generate_config_file.main(list(arguments))


def test_generator_starts_from_a_known_configuration(tmp_path, capsys):
    path = tmp_path / "small.json"
    generate("--ds", "traffic_img", "--out", str(path), "--root", "/data", "--n_kp_enc", "6", "--use_tracking", "true")
    expected = Config.load("traffic_img").replace(root="/data", n_kp_enc=6, use_tracking=True)
    assert Config.load(path) == expected and expected.ds == "traffic"
    commands = f"python train_dlp.py -d {path} (images) or python train_ddlp.py -d {path} (videos)"
    assert capsys.readouterr().out == f"wrote {path}\ntrain with: {commands}\n"
    assert os.listdir(tmp_path) == ["small.json"]


@pytest.mark.parametrize(
    ("image_size", "patch_size", "enc_channels"),
    [(32, 8, [32, 64]), (64, 8, [32, 64, 128]), (128, 16, [32, 64, 128, 256]), (256, 32, [32, 64, 128, 256, 256])],
)
def test_generator_suits_a_new_data_set_to_the_image_size(tmp_path, image_size, patch_size, enc_channels):
    path = tmp_path / "new.json"
    generate("--ds", "new", "--out", str(path), "--image_size", str(image_size), "--seed", "3")
    changes = {"image_size": image_size, "patch_size": patch_size, "enc_channels": enc_channels, "seed": 3}
    assert Config.load(path).to_dict() == {**Config(ds="new").to_dict(), **changes}


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "CONFIG_DIR", tmp_path)
    monkeypatch.setattr(generate_config_file, "CONFIG_DIR", tmp_path)
    return tmp_path


def test_generator_writes_into_configs_and_overwrites_only_with_force(own_configs, capsys):
    generate("--ds", "new")
    assert "new is new: " in (out := capsys.readouterr().out) and out.endswith("python train_ddlp.py -d new (videos)\n")
    before = (own_configs / "new.json").read_text()
    with pytest.raises(UserError, match=r"new\.json exists; legal: another --out, or --force to overwrite it"):
        generate("--ds", "new", "--lr", "0.5")
    assert (own_configs / "new.json").read_text() == before
    generate("--ds", "new", "--lr", "0.5", "--force")
    assert Config.load("new") == Config(ds="new", lr=0.5)
    assert "is new" not in capsys.readouterr().out
    assert os.listdir(own_configs) == ["new.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ds", "new", "--image_size", "96"], "image_size is 96; legal: a power of two"),
        (["--ds", "new", "--image_size", "0"], "command line: image_size is 0; legal"),
        (["--ds", "new", "--n_kp_enc", "90"], "command line: n_kp_enc is 90; legal: at most n_kp_prior 64"),
        (["--ds", "a/b"], 'ds is "a/b"; legal: a string, not empty and without /'),
        (["--ds", "new.json"], "--ds is new.json; legal: a name, without .json"),
        (["--ds", "new", "--out", "new.yaml"], "--out is new.yaml; legal: a path that ends in .json"),
        (["--ds", "new", "--out", "missing/new.json"], "missing/new.json: cannot be written: No such file"),
        (["--ds", "new", "--out", "file/new.json"], "file/new.json: cannot be written: Not a directory"),
    ],
    ids=str,
)
def test_generator_writes_nothing_on_bad_input(own_configs, monkeypatch, arguments, message):
    monkeypatch.chdir(own_configs)
    write(own_configs / "file", b"")
    with pytest.raises(UserError) as error:
        generate(*arguments)
    assert message in str(error.value)
    assert os.listdir(own_configs) == ["file"]


def test_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "old.json", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"old\.json: cannot be written: No space left on device"):
        generate("--ds", "shapes", "--out", str(path), "--force")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["old.json"]


def test_generator_as_a_command(tmp_path):
    command = [sys.executable, "-W", "error", str(REPOSITORY / "configs" / "generate_config_file.py")]
    good = [*command, "--ds", "shapes", "--out", "mine.json", "--metrics", "psnr"]
    done = subprocess.run(good, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "wrote mine.json" in done.stdout
    written, shapes = Config.load(tmp_path / "mine.json"), Config.load("shapes")
    assert written == shapes.replace(metrics=["psnr"], root=written.root)
    assert written.root in (shapes.root, str(REPOSITORY / "data" / "shapes"))  # the latter where that is a folder
    bad = [*command, "--ds", "shapes", "--out", "other.json", "--anchor_s", "0.3"]
    failed = subprocess.run(bad, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: command line: anchor_s is 0.3; legal: near it 0.25 or 0.5")
    assert os.listdir(tmp_path) == ["mine.json"]
