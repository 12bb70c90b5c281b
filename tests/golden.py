"""The published release's numbers: how a case's weights are made and its arrays read.

`tests/golden/NAME.json` holds a case's constructor, forward and loss arguments, `NAME.manifest.json` the rule that
fills its weights, `NAME.npz` its input and outputs, computed in float64 and stored as float32.
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"
PUBLISHED = Path(__file__).parent / "published"
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@functools.cache
def arrays(name):
    """All arrays of a case, by key; read only."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def case(name):
    """A case's arguments: model, arguments, forward_arguments, loss_arguments, seed."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def manifest(name):
    return json.loads((FOLDER / f"{name}.manifest.json").read_text())


@functools.cache
def weights(name):
    """The weights of a case."""
    return state_dict(manifest(name), case(name)["seed"])


def state_dict(manifest, seed):
    """One normal draw per entry, in order, scaled and shifted as the entry says; buffers and aliases as listed."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for entry in manifest["parameters"]:
        values = entry["offset"] + entry["scale"] * rng.standard_normal(entry["shape"])
        tensors[entry["name"]] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    for entry in manifest["buffers"]:
        tensors[entry["name"]] = torch.tensor(entry["values"], dtype=torch.float32).reshape(entry["shape"])
    for second, first in manifest["aliases"].items():
        tensors[second] = tensors[first]
    return tensors


def published(name):
    """A released configuration and its checkpoint's names and shapes: config, model, state_dict."""
    return json.loads((PUBLISHED / f"{name}.json").read_text())


def assert_close(actual, expected, dtype, label):
    """float64: within 1e-6 of the array's largest magnitude; float32: 95 % of the array within 3e-3 of it."""
    actual = actual.detach().cpu().double().numpy()
    assert actual.shape == expected.shape, label
    error = np.abs(actual - expected) / max(np.abs(expected).max(), 1e-12)
    if dtype is torch.float64:
        assert error.max() < 1e-6, f"{label}: {error.max():.1e}"
    else:
        assert np.quantile(error, 0.95) < 3e-3, f"{label}: {np.quantile(error, 0.95):.1e}"
