"""Weights as people have them: where they are in what a file holds, and what a file is that cannot be loaded."""

import json
import re
import shlex
import zipfile
from typing import NamedTuple

import torch

DEPTH = 3  # dicts in dicts in which weights are looked for
# Parts of names that wrappers put in wherever a wrapped module is: torch.compile's, FSDP's, activation checkpointing's.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)", re.IGNORECASE)
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of what torch.save wrote before it wrote zip files
SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull",
    b"<": "a web page or XML, not the file that was meant to be downloaded",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}


class FoundWeights(NamedTuple):
    """A state dict found in a file: under the keys `place`, "" for the file itself; its names began with `prefix`, and
    contained `wrappers`, all taken off."""

    weights: dict
    place: str
    prefix: str
    wrappers: tuple

    @property
    def is_plain(self):
        return not (self.place or self.prefix or self.wrappers)

    @property
    def is_average(self):
        # ema_pytorch keeps the weights themselves beside their average.
        return AVERAGE.search(f"{self.place}.{self.prefix}") is not None and "online_model." not in self.prefix

    def __str__(self):
        prefix = f"names that begin with {self.prefix}" if self.prefix else ""
        wrappers = f"names without {' and '.join(self.wrappers)}" if self.wrappers else ""
        return ", ".join(part for part in (f"{self.place!r}" if self.place else "", prefix, wrappers) if part)


def find_weights(contents, expected, optional, ignored=None):
    """The `FoundWeights` in what a file holds that fit a model best, and a list of others that fit as well.

    expected: the names of the model's state dict; optional: the last parts of those that may be missing; ignored: how
    the names begin of those that are not wanted. Weights that are not wrapped come first, then a moving average. Where
    none fit, those that share most names; None where none share any.
    """
    found = list(_search(contents, set(expected)))
    fitting = [
        each
        for each in found
        if all(
            name.rpartition(".")[2] in optional or (ignored is not None and name.startswith(ignored))
            for name in each.weights.keys() ^ set(expected)
        )
    ]
    if fitting:
        fitting.sort(key=lambda each: (not each.is_plain, not each.is_average))
        return fitting[0], fitting[1:]
    return max(found, key=lambda each: len(each.weights.keys() & set(expected)), default=None), []


def _search(contents, expected, place="", depth=DEPTH):
    """Yield the `FoundWeights` with any of the expected names, in a dict and in the dicts in it."""
    if not isinstance(contents, dict) or depth == 0:
        return
    tensors = {name: value for name, value in contents.items() if isinstance(name, str) and torch.is_tensor(value)}
    wrappers = tuple(sorted({part for name in tensors for part in name.split(".") if part in WRAPPERS}))
    if wrappers:
        tensors = {
            ".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in tensors.items()
        }
    for prefix in dict.fromkeys(prefix for name in tensors for prefix in _prefixes(name, expected)):
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        yield FoundWeights(weights, place, prefix, wrappers)
    for name, value in contents.items():
        yield from _search(value, expected, f"{place}.{name}" if place else str(name), depth - 1)


def _prefixes(name, expected):
    """Yield what stands before an expected name at the end of a name."""
    starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
    yield from (name[:start] for start in starts if name[start:] in expected)


def kind_of_weights(names):
    """What these names of a state dict are the weights of, of what is known here; None for anything else."""
    parts = {name.partition(".")[0] for name in names}
    if "dyn_module" in parts:
        return "the weights of a DDLP"
    if "fg_module" in parts:
        return "the weights of a DLPv2"
    if {"betas", "alphas_cumprod"} <= parts or {"online_model", "ema_model"} <= parts:
        return "the weights of a DiffuseDDLP"
    return "the statistics of a DiffuseDDLP's particles" if {"min_val", "min_val_bg"} <= parts else None


def keys_of_weights(weights):
    """The configuration keys that the names and shapes of a state dict of a DLPv2 or a DDLP tell, each with its
    value. What they do not tell is left out."""
    shapes = {name: list(value.shape) for name, value in weights.items()}

    def stages(encoder):
        """Of a convolutional encoder: the side of each stage's input to its channels, the largest first."""
        pattern = rf"{re.escape(encoder)}\.main\.conv_in_(\d+)_0\.main\.conv_\d+_to_(\d+)\."
        found = {int(each[1]): int(each[2]) for each in (re.match(pattern, name) for name in shapes) if each}
        return dict(sorted(found.items(), reverse=True))

    def channels(encoder):
        first = (
            re.match(rf"{re.escape(encoder)}\.main\.in_block_1\.main\.conv_\d+_to_(\d+)\.", name) for name in shapes
        )
        return [int(each[1]) for each in first if each][:1] + list(stages(encoder).values())

    def side(encoder):
        return max(stages(encoder), default=None)

    def width(name, axis=0, divided_by=1):
        return shapes[name][axis] // divided_by if len(shapes.get(name, ())) > axis else None

    def any_begins_with(start):
        return any(name.startswith(start) for name in shapes)

    prior, background = "fg_module.prior.enc", "bg_module.bg_cnn_enc"
    attributes, transformer = "fg_module.particle_attribute_enc", "dyn_module.particle_transformer"
    glimpse = side(f"{attributes}.cnn")
    mixing = "none" if any_begins_with("fg_module.particle_mixer") else "one that keeps the best"
    blocks = {name.removeprefix(f"{transformer}.blocks.").partition(".")[0] for name in shapes if ".blocks." in name}
    bias, is_model = f"{transformer}.blocks.0.attn.rel_pos_bias.particle_rel_pos_bias", any_begins_with(prior)
    found = {
        "image_size": side(background),
        "patch_size": side(prior),
        "anchor_s": glimpse / side(background) if glimpse and side(background) else None,
        "enc_channels": channels(background),
        "prior_channels": channels(prior),
        "n_kp": width(f"{prior}.keymap.weight"),
        "learned_feature_dim": width("fg_module.particle_features_enc.features_head.weight", divided_by=2),
        "bg_learned_feature_dim": width("bg_module.bg_enc.4.weight", divided_by=2),
        "use_resblock": any(".bn1." in name for name in shapes) if is_model else None,
        "enable_enc_attn": any_begins_with(f"{attributes}.self_attention") if is_model else None,
        "use_correlation_heatmaps": any_begins_with(f"{attributes}.cnn.main.in_block_1.main.conv_4_")
        if is_model
        else None,
        "filtering_heuristic": mixing if is_model else None,
        "pint_layers": len(blocks) or None,
        "pint_dim": width(f"{transformer}.ln_f.weight"),
        "pint_heads": width(bias, axis=1),
        "timestep_horizon": width(f"{transformer}.blocks.0.attn.mask", axis=3),
        "n_kp_enc": None if bias not in shapes else (width(bias) + 1) // 2 - 1,
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def describe(contents):
    """What a file holds, in words."""
    if torch.is_tensor(contents):
        return f"a tensor {list(contents.shape)}"
    if not isinstance(contents, dict):
        return f"a {type(contents).__name__}"
    names = [str(name) for name in contents]
    if not names:
        return "an empty dict"
    if set(names) == {"state", "param_groups"}:
        return "the state of an optimiser"
    listed = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    if all(torch.is_tensor(value) for value in contents.values()):
        return kind_of_weights(names) or f"the weights of another model ({listed})"
    return f"a dict of {listed}"


def describe_file(path):
    """What a file is that `torch.load` does not read, in words."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    for signature, kind in SIGNATURES.items():
        if start.lstrip().startswith(signature):
            return f"it is {kind}"
    if start[257:262] == b"ustar":
        return "it is a tar archive: unpack it"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "it is a TorchScript program: save its state_dict() instead"
        if names and all(name.endswith(".npy") for name in names):
            return "it is a file of NumPy arrays"
        if not any(name.endswith("/data.pkl") for name in names):
            return "it is a zip archive: unpack it"
    return "it is truncated, damaged or of another kind"


def is_plain_pickle(path):
    """Whether a file is a pickle that `torch.save` did not write."""
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_START))
    return start[:1] == b"\x80" and start != LEGACY_START


def is_safetensors(path):
    """Whether a file is in the format safetensors: the length of a header, then the header, JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def refusal(path, error):
    """Of a file that `torch.load` refuses for safety with `error`: what it holds, and how to save it again; in words.

    None if it was something else that failed.
    """
    if is_plain_pickle(path):
        return _refusal("Python pickle", path, 'pickle.load(open({}, "rb"))')
    unsupported = re.search(
        r"(?:Unsupported global: GLOBAL|Unsupported class|Trying to instantiate class) (\S+)", str(error)
    )
    if unsupported is None:
        return None
    try:
        kinds = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # written by an old torch.save
        kinds = []
    if any(kind.startswith("torch.nn.") for kind in kinds):
        others = sorted(kind for kind in kinds if not kind.startswith(("torch.", "numpy.", "collections.")))
        return _refusal(f"whole model ({(others or sorted(kinds))[0]})", path)
    kinds = {_in_words(kind) for kind in kinds if not kind.startswith("numpy.dtype")} or {unsupported[1]}
    return _refusal(" and a ".join(sorted(kinds)[:3]), path)


def _in_words(kind):
    words = {"scalar": "NumPy number", "_reconstruct": "NumPy array", "ndarray": "NumPy array"}
    return words.get(kind.rpartition(".")[2], kind) if kind.startswith("numpy.") else kind


def with_article(noun):
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


# Of whatever a file holds: the tensors in it, NumPy's arrays as such, and None in place of everything else.
_TENSORS = (
    'w = lambda v: w(v.state_dict()) if hasattr(v, "state_dict") else {k: w(x) for k, x in v.items()}'
    " if isinstance(v, dict) else torch.from_numpy(v.copy()) if isinstance(v, numpy.ndarray)"
    ' and v.dtype.kind in "biuf" else v if torch.is_tensor(v) else None'
)


def _refusal(what, path, load="torch.load({}, weights_only=False)"):
    """The words of `refusal`. what: the file holds; load: Python that loads it by its name."""
    old, new = json.dumps(str(path)), json.dumps(str(path.with_name(f"{path.stem}_weights.pth")))
    command = f"import numpy, pickle, torch; {_TENSORS}; torch.save(w({load.format(old)}), {new})"
    return (
        f"holds {with_article(what)}, which is not loaded for safety; if you trust where it comes from, save its"
        f" weights again: python -c {shlex.quote(command)}"
    )
