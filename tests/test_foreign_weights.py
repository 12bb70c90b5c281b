"""Weights as other programs leave them: found, unwrapped, or named as what they are."""

import argparse
import gzip
import io
import pickle
import re
import shlex
import zipfile

import ema_pytorch
import numpy as np
import pytest
import safetensors.torch
import torch
from torch.optim.swa_utils import AveragedModel

from models import ObjectDynamicsDLP
from rundir.run import Run
from tests.balls import ROOT, SMALL, make_run
from utils import checkpoints
from utils.errors import UserError


class Net(torch.nn.Module):
    """Two layers, one of them in a module."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 1))


def weights_of(value):
    """A state dict of `Net` in which everything is `value`."""
    return {name: torch.full_like(tensor, value) for name, tensor in Net().state_dict().items()}


def prefixed(prefix, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def averaged():
    """A moving average of ema_pytorch: online weights of 2, averaged ones of 1."""
    model = Net()
    model.load_state_dict(weights_of(1))
    ema = ema_pytorch.EMA(model, include_online_model=True)
    model.load_state_dict(weights_of(2))
    return ema.state_dict()


def swa():
    model = Net()
    model.load_state_dict(weights_of(1))
    return AveragedModel(model).state_dict()


# What a file may hold (the weights wanted are 1 everywhere), and words of what is said.
CASES = {
    "plain": (lambda: weights_of(1), None),
    "beside numbers": (lambda: {**weights_of(1), "epoch": 3}, None),
    "DataParallel": (lambda: prefixed("module.", weights_of(1)), "names that begin with module."),
    "compiled": (lambda: prefixed("_orig_mod.", weights_of(1)), "names without _orig_mod"),
    "compiled and parallel": (
        lambda: prefixed("module._orig_mod.", weights_of(1)),
        "begin with module., names without",
    ),
    "a part compiled": (
        lambda: {name.replace("rest.", "rest._orig_mod."): value for name, value in weights_of(1).items()},
        "names without _orig_mod",
    ),
    "beside an optimiser": (
        lambda: {"epoch": 3, "model": weights_of(1), "optimizer": torch.optim.Adam(Net().parameters()).state_dict()},
        "'model'",
    ),
    "Lightning": (
        lambda: {"state_dict": {**prefixed("net.", weights_of(1)), "metric.total": torch.zeros(1)}, "loops": {}},
        "'state_dict', names that begin with net.",
    ),
    "two deep": (lambda: {"checkpoint": {"weights": prefixed("module.", weights_of(1))}}, "'checkpoint.weights'"),
    "averaged beside": (
        lambda: {"model": weights_of(2), "model_ema": weights_of(1)},
        "'model_ema'; not taken: 'model'",
    ),
    "ema_pytorch": (averaged, "names that begin with ema_model.; not taken: names that begin with online_model."),
    "ema_pytorch in a state": (
        lambda: {"model": weights_of(2), "ema": averaged(), "means": {}},
        "'ema', names that begin with ema_model.; not taken: 'model'; 'ema', names that begin with online_model.",
    ),
    "AveragedModel": (swa, "names that begin with module."),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_found_and_it_is_said(case, tmp_path, capsys):
    contents, words = CASES[case]
    torch.save(contents(), tmp_path / "file.pth")
    model = Net()
    checkpoints.load_weights(model, tmp_path / "file.pth")
    assert all((value == 1).all() for value in model.state_dict().values())
    said = capsys.readouterr().err
    assert said.count("\n") == (0 if words is None else 1)
    if words is not None:
        assert said.startswith(f"{tmp_path / 'file.pth'}: took the weights in ") and words in said


def test_safetensors_are_loaded(tmp_path):
    safetensors.torch.save_file(weights_of(1), tmp_path / "model.safetensors")
    model = Net()
    checkpoints.load_weights(model, tmp_path / "model.safetensors")
    assert all((value == 1).all() for value in model.state_dict().values())


def test_the_file_that_training_goes_on_from(tmp_path, balls_data, capsys):
    run = make_run(tmp_path, balls_data)
    model, expected = run.load_model(), checkpoints.load(run.weights_path())
    state = {
        "model": expected,
        "optimizer": torch.optim.Adam(model.parameters()).state_dict(),
        "ema": None,
        "means": {},
    }
    checkpoints.save(state, run.state_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    capsys.readouterr()
    loaded = Run.open(run.path).load_model(run.state_path).state_dict()
    assert "took the weights in 'model'\n" in capsys.readouterr().err
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_what_does_not_fit_is_named_where_it_lies(tmp_path):
    weights = weights_of(1)
    weights["first.bias"] = torch.zeros(7)
    torch.save({"model": prefixed("module.", weights), "epoch": 1}, tmp_path / "file.pth")
    with pytest.raises(
        UserError, match=r"file.pth \(model\): does not fit .*Net: first.bias is \[7\], the model's \[3\]"
    ):
        checkpoints.load_weights(Net(), tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ([1], "holds a list"),
        (torch.zeros(2, 3), r"holds a tensor \[2, 3\]"),
        ({}, "holds an empty dict"),
        ({"epoch": 3, "args": {}}, "holds a dict of epoch, args"),
        (torch.optim.Adam(Net().parameters()).state_dict(), "holds the state of an optimiser"),
        ({"conv.weight": torch.zeros(1)}, r"holds the weights of another model \(conv.weight\)"),
        ({"dyn_module.a": torch.zeros(1), "fg_module.b": torch.zeros(1)}, "holds the weights of a DDLP"),
        ({"fg_module.b": torch.zeros(1)}, "holds the weights of a DLPv2"),
        ({"betas": torch.zeros(1), "alphas_cumprod": torch.zeros(1)}, "holds the weights of a DiffuseDDLP"),
        (dict.fromkeys(["mu", "min_val", "min_val_bg"], torch.zeros(1)), "the statistics of a DiffuseDDLP's particles"),
    ],
)
def test_what_holds_no_weights_is_named(contents, words, tmp_path):
    torch.save(contents, tmp_path / "file.pth")
    with pytest.raises(UserError, match=f"file.pth: {words}; legal: the weights of a Net$|file.pth: holds {words};"):
        checkpoints.load_weights(Net(), tmp_path / "file.pth")


@pytest.mark.parametrize(
    "changes",
    [
        {"enc_channels": [4, 8], "use_resblock": True},
        {"prior_channels": [4, 8], "n_kp": 2, "enable_enc_attn": True, "use_correlation_heatmaps": False},
        {"image_size": 64, "patch_size": 16},
        {"anchor_s": 0.5, "learned_feature_dim": 3, "bg_learned_feature_dim": 5},
        {"pint_layers": 2, "pint_dim": 16, "pint_heads": 4},
        {"n_kp_enc": 6, "timestep_horizon": 5, "filtering_heuristic": "none"},
    ],
)
def test_weights_of_another_configuration_name_its_keys(changes, tmp_path):
    with torch.device("meta"):
        mine, other = (
            ObjectDynamicsDLP.from_config({**SMALL, "root": None, "bg_learned_feature_dim": 2, **each})
            for each in ({}, changes)
        )
    with pytest.raises(
        UserError, match=r"w.pth: does not fit the configuration's ObjectDynamicsDLP: it is of "
    ) as error:
        checkpoints.insert_weights(mine, other.state_dict(), "w.pth")
    said = str(error.value).partition(" is of ")[2].partition("; legal: the configuration that it was trained with")[0]
    assert sorted(re.findall(r"(\w+) (\S.*?) \(not .*?\)", said)) == sorted(
        (name, str(value)) for name, value in changes.items()
    )
    assert "pint_dim 16 (not 8)" in said or "pint_dim" not in changes


def test_a_model_of_another_kind_is_named(tmp_path):
    class Other(torch.nn.Module):
        def __init__(self, *names):
            super().__init__()
            for name in names:
                setattr(self, name, torch.nn.Linear(1, 1))

    torch.save(Other("fg_module", "dyn_module").state_dict(), tmp_path / "ddlp.pth")
    with pytest.raises(UserError, match=r"ddlp.pth: holds the weights of a DDLP; legal: the weights of a DLPv2$"):
        checkpoints.load_weights(Other("fg_module"), tmp_path / "ddlp.pth")


# --------------------------------------------------------------------------------------------- what torch does not read


def whole_model():
    model = Net()
    model.load_state_dict(weights_of(1))
    return model


def in_numpy(weights):
    return {name: value.numpy()[::-1] if value.dim() else value.numpy() for name, value in weights.items()}


def saved(contents, **options):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"")
    return buffer.getvalue()


REFUSED = {
    "numpy number": (lambda: saved({"model": weights_of(1), "epoch": np.float64(3)}), "a NumPy number,"),
    "old format": (
        lambda: saved({"model": weights_of(1), "args": argparse.Namespace()}, _use_new_zipfile_serialization=False),
        "an argparse.Namespace,",
    ),
    "whole model": (lambda: saved(whole_model()), r"a whole model \(tests.test_foreign_weights.Net\),"),
    "pickle": (lambda: pickle.dumps(weights_of(1)), "a Python pickle,"),
    "numpy arrays": (lambda: saved(in_numpy(weights_of(1))), "a NumPy array,"),
    "numpy arrays in a dict": (
        lambda: saved({"model": in_numpy(weights_of(1)), "names": np.array(["a"], object), "lr": np.float64(3)}),
        "a NumPy array and a NumPy number,",
    ),
    "pickled numpy arrays": (lambda: pickle.dumps({"model": in_numpy(weights_of(1))}), "a Python pickle,"),
    "a model in a dict": (
        lambda: saved({"model": whole_model(), "epoch": 3}),
        r"a whole model \(tests.test_foreign_weights.Net\),",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_one_line_whose_command_saves_it_again(case, tmp_path):
    contents, words = REFUSED[case]
    path = tmp_path / "it's one.pth"
    path.write_bytes(contents())
    with pytest.raises(UserError, match=f"one.pth: holds {words} which is not loaded for safety; .*save") as error:
        checkpoints.load(path)
    text = str(error.value)
    assert text.isprintable()
    python, option, command = shlex.split(text.rpartition("save its weights again: ")[2])
    assert (python, option) == ("python", "-c")
    exec(command, {})
    model = Net()
    checkpoints.load_weights(model, tmp_path / "it's one_weights.pth")
    assert all((value == 1).all() for value in model.state_dict().values())


def test_the_case_of_a_numpy_number_beside_the_weights():
    path = ROOT / "tests" / "foreign" / "weights_beside_a_numpy_scalar.pth"
    with pytest.raises(
        UserError, match=r"weights_beside_a_numpy_scalar.pth: holds a NumPy number, which is not loaded"
    ):
        checkpoints.load_weights(torch.nn.Linear(2, 2), path)


def test_the_case_of_a_prefix(capsys):
    model = torch.nn.Linear(2, 2)
    path = ROOT / "tests" / "foreign" / "weights_with_module_prefix.pth"
    checkpoints.load_weights(model, path)
    assert torch.equal(model.weight, torch.load(path, weights_only=True)["module.weight"])
    assert "names that begin with module." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "it is a web page"),
        (gzip.compress(b"0", mtime=0), "it is a gzip archive: unpack it"),
        (archive("weights.txt"), "it is a zip archive: unpack it"),
        (archive("a.npy", "b.npy"), "it is a file of NumPy arrays"),
        (archive("x/constants.pkl", "x/data.pkl"), "it is a TorchScript program"),
        (b"no weights", "it is truncated, damaged or of another kind"),
    ],
)
def test_files_of_other_kinds_are_named(contents, words, tmp_path):
    (tmp_path / "file.pth").write_bytes(contents)
    with pytest.raises(UserError, match=f"file.pth: not a readable checkpoint: {words}") as error:
        checkpoints.load(tmp_path / "file.pth")
    assert str(error.value).isprintable()


def test_a_folder_is_named_as_one(tmp_path):
    with pytest.raises(UserError, match="is a folder; legal: a checkpoint file"):
        checkpoints.load(tmp_path)
