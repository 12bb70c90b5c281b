"""Saving and loading tensors: atomically, and with messages that name the file.

A model's weights are a plain ``torch.save(model.state_dict())`` whose names are those of the published checkpoints:
released files and ours are interchangeable.
"""

import errno
import hashlib
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from utils.errors import UserError
from utils.files import atomic_write
from utils.foreign_weights import (
    describe,
    describe_file,
    find_weights,
    is_safetensors,
    keys_of_weights,
    kind_of_weights,
    refusal,
    with_article,
)


def save(contents, path):
    """`torch.save` that leaves the file's old content or all of the new one; `UserError` where it cannot be written."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        writer = _Writer(file)
        try:
            torch.save(contents, writer)
        except RuntimeError as error:
            raise writer.error or error from error


class _Writer:
    """Hands bytes on to a file, and keeps the reason why it takes none, of which PyTorch's error says nothing."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def load(path, device="cpu"):
    """The contents of a file that `save`, `torch.save` or safetensors wrote; only tensors and plain Python values are
    accepted.

    Raises `UserError` if there is no such file or if it cannot be read; one that torch refuses for safety is told how
    to be saved again.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; legal: a checkpoint file")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        if is_safetensors(path):
            return load_file(path, device)
        _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of formats that then fail
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which seeking in a truncated file gives
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        refused = refusal(path, error)
        raise UserError(f"{path}: {refused or f'not a readable checkpoint: {describe_file(path)}'}") from error


def _check_sums(path):
    """`BadZipFile` where bytes in a file that `torch.save` wrote have changed, which `torch.load` does not look at."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # the older format has no checksums
            return
        with zipfile.ZipFile(file) as archive:
            has_sums = any(entry.CRC for entry in archive.infolist())  # torch can be told to leave them out
            damaged = archive.testzip() if has_sums else None
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged")


def load_weights(model, path, keep=None):
    """Load a file of weights, strictly, into `model`, which stays as it was where they do not fit.

    keep: the beginning of the names of weights that stay those of the model, whether or not the file has such.

    The weights may be wrapped: in a dict, beside an optimiser or an epoch, with names that begin with what wrapped the
    model. Which were taken is said on stderr. Raises `UserError` that names the file and what it is or what differs.
    """
    contents, expected = load(path), model.state_dict()
    kept = {name: value for name, value in expected.items() if keep is not None and name.startswith(keep)}
    expected = {name: value for name, value in expected.items() if name not in kept}
    found, others = find_weights(contents, expected, optional_entries(model), keep)
    if found is None:
        raise UserError(
            f"{path}: holds {describe(contents)}; legal: the weights of {with_article(type(model).__name__)}"
        )
    weights = {name: value for name, value in found.weights.items() if keep is None or not name.startswith(keep)}
    kind, wanted = kind_of_weights(weights), kind_of_weights(expected)
    if kind != wanted and wanted is not None and kind is not None:
        raise UserError(f"{path}: holds {kind}; legal: {wanted}")
    if not found.is_plain:
        also = f"; not taken: {'; '.join(map(str, others))}" if others else ""
        print(f"{path}: took the weights in {found}{also}", file=sys.stderr)
    insert_weights(model, {**weights, **kept}, f"{path} ({found.place})" if found.place else path)


def insert_weights(model, weights, path):
    """`load_weights` of a state dict that was read from a file; `path` is for the message."""
    if not isinstance(weights, dict) or not all(torch.is_tensor(value) for value in weights.values()):
        raise UserError(f"{path}: not a file of weights (a state dict of tensors)")
    expected = model.state_dict()
    endings = optional_entries(model)
    optional = {name for name in (*expected, *weights) if name.rpartition(".")[2] in endings}
    problems = [f"lacks {name}" for name in expected if name not in weights and name not in optional]
    problems += [f"has {name}, unknown here" for name in weights if name not in expected and name not in optional]
    problems += [
        f"{name} is {list(weights[name].shape)}, the model's {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems += [
        f"{name} is {_kind(weights[name])}, the model's {_kind(value)}"
        for name, value in expected.items()
        if name in weights and _kind(weights[name]) != _kind(value)
    ]
    if problems:
        theirs, ours = keys_of_weights(weights), keys_of_weights(expected)
        differ = [f"{key} {value} (not {ours[key]})" for key, value in theirs.items() if ours.get(key, value) != value]
        if differ:
            raise UserError(
                f"{path}: does not fit the configuration's {type(model).__name__}: it is of {', '.join(differ)}; legal:"
                " the configuration that it was trained with, mostly hparams.json beside it"
            )
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(f"{path}: does not fit the configuration's {type(model).__name__}: {problems[0]}{more}")
    names = [name for name, _ in model.named_parameters() if not torch.isfinite(weights[name]).all()]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{path}: {names[0]}{more} hold values that are NaN or infinite; legal: finite weights")
    model.load_state_dict(weights)


def _kind(tensor):
    """What decides whether a tensor can take another's values: any floats can, but no integers, say."""
    if tensor.layout != torch.strided:
        return "sparse"
    return "floats" if tensor.is_floating_point() else str(tensor.dtype)


def optional_entries(model):
    """The last parts of the names of the entries that a state dict may lack: the `OPTIONAL_ENTRIES` of the model's
    modules."""
    return {name for module in model.modules() for name in getattr(module, "OPTIONAL_ENTRIES", ())}


def weights_sha256(weights):
    """The SHA-256 of a state dict: of its names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def calc_model_size(model):
    """How large a model is: `n_params`, the number of its trainable parameters, and `size_mb`, the MiB that all its
    parameters and buffers take, what they share counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "n_params": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "size_mb": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20,
    }
