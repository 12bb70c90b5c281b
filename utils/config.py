"""The configuration of a run, `Config` for DLP and DDLP and `DiffuseConfig` for DiffuseDDLP: its keys with their
defaults, legal values and meaning, its files, and its command-line overrides.

On disk a configuration is one flat JSON object with the keys of the published release. Every configuration object is
legal: however it is made, it is checked as a whole; what is wrong is a `UserError` that names the key, its value and
what is legal.
"""

import difflib
import inspect
import json
import math
import numbers
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin

from utils.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
METRICS = ("lpips", "ssim", "psnr")
SAMPLERS = ("ddpm", "ddim", "dpm++")
SMALLEST_FEATURE_IMAGE = 32  # VGG-16 and LPIPS halve an image five times

OVERRIDE = "override_"  # the argparse names of overrides, apart from those of a script's own options


class Legal(NamedTuple):
    """Which values of a key's type are legal, in words and as a test."""

    text: str
    test: Callable[[Any], bool]


def at_least(low):
    return Legal(f"at least {low}", lambda value: value >= low)


def one_of(*choices):
    return Legal(" or ".join(json.dumps(choice) for choice in choices), lambda value: value in choices)


def channels(count):
    """At least ``count`` channel counts that group normalisation can split into 4 or 5 groups."""
    return Legal(
        f"{count} or more, each a positive multiple of 4 or 5",
        lambda value: len(value) >= count and all(c > 0 and (c % 4 == 0 or c % 5 == 0) for c in value),
    )


ANY = Legal("", lambda value: True)
POSITIVE = Legal("above 0", lambda value: value > 0)
POSITIVE_TO_1 = Legal("above 0 and at most 1", lambda value: 0 < value <= 1)
BELOW_1 = Legal("at least 0 and below 1", lambda value: 0 <= value < 1)
FRACTION = Legal("from 0 to 1", lambda value: 0 <= value <= 1)
BETAS = Legal("each at least 0 and below 1", lambda value: all(0 <= beta < 1 for beta in value))
INCREASING = Legal("the first below the second", lambda value: value[0] < value[1])
NOT_EMPTY = Legal("not empty", bool)
NAME = Legal("not empty and without / or \\", lambda value: bool(re.fullmatch(r"[^/\\\0]+", value)))
AFFIX = Legal("without / or \\", lambda value: bool(re.fullmatch(r"[^/\\\0]*", value)))
DEVICE = Legal('"cpu", "cuda" or "cuda:N"', lambda value: bool(re.fullmatch(r"cpu|cuda(:[0-9]+)?", value)))
METRIC_LIST = Legal(
    f"one or more of {', '.join(METRICS)}, each once",
    lambda value: len(value) > 0 and set(value) <= set(METRICS) and len(set(value)) == len(value),
)
SEED = Legal("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)


def key(default, meaning, legal=ANY):
    """A field of `Config` with its default, its meaning in words and its legal values."""
    return field(default=default, metadata={"meaning": meaning, "legal": legal})


class BaseConfig:
    """What the configurations share; a subclass is a frozen dataclass whose fields are made by `key`.

    A field without a default is a key that must be given; `IGNORED` are keys that are accepted without an effect.
    """

    IGNORED = frozenset()

    @staticmethod
    def is_own_file(name):
        """Whether the file of that name in configs/ is of this kind."""
        return True

    def __post_init__(self):
        for name, entry in self.keys().items():
            object.__setattr__(self, name, _checked(entry, getattr(self, name)))
        self.check()

    def check(self):
        """Raise `UserError` unless the values are legal together."""

    @classmethod
    def keys(cls):
        """The keys in the files' order, each name with its dataclass field."""
        return {entry.name: entry for entry in fields(cls)}

    @classmethod
    def from_dict(cls, mapping, where="configuration"):
        """The configuration in ``mapping`` (key to value, as in the JSON file; a configuration is returned as it is).

        A key that nothing reads gives a `UserWarning`; an illegal value or combination raises `UserError`, its text
        beginning with ``where``.
        """
        if isinstance(mapping, cls):
            return mapping
        if not isinstance(mapping, Mapping):
            raise UserError(f"{where}: not a JSON object of keys and values")
        keys = cls.keys()
        for name, entry in keys.items():
            if entry.default is MISSING and name not in mapping:
                raise UserError(f"{where}: {name} is missing; legal: {_legal(entry)}")
        for name in mapping:
            if name not in keys and name not in cls.IGNORED:
                near = difflib.get_close_matches(str(name), keys, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                warnings.warn(f"{where}: unknown key {name} is ignored{hint}", UserWarning, stacklevel=2)
        return _at(where, cls, **{name: value for name, value in mapping.items() if name in keys})

    @classmethod
    def load(cls, name_or_path):
        """Read the file of that name in ``configs/`` ("shapes"), or the file at a path that ends in ".json".

        Raises `UserError` if there is no such file, or if it cannot be read, is not valid JSON or is not legal.
        """
        path = cls._path(name_or_path)
        return cls.from_dict(read_json(path, cls.is_own_file), where=str(path))

    @staticmethod
    def _path(name_or_path):
        is_path = str(name_or_path).endswith(".json")
        return Path(name_or_path) if is_path else CONFIG_DIR / f"{name_or_path}.json"

    def replace(self, where="configuration", /, **overrides):
        """A copy with some keys changed, checked as a whole; the text of a `UserError` begins with ``where``."""
        keys = self.keys()
        for name in overrides:
            if name not in keys:
                raise UserError(f"{where}: unknown key {name}; legal: {', '.join(keys)}")
        return _at(where, type(self), **{**self.to_dict(), **overrides})

    def to_dict(self):
        """Key to value in the files' order, lists for tuples: what `from_dict` and JSON take."""
        values = {name: getattr(self, name) for name in self.keys()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Config(BaseConfig):
    """One run, DLP or DDLP; the attributes are the keys of the JSON file. Lists are tuples here.

    A key that a file lacks has the default below; only ``ds`` has none. ``pad_mode`` is "replicate" or "zeros":
    the published release reads every other value as "replicate", here it is refused.
    """

    ds: str = key(MISSING, "the data set, a name that datasets/get_dataset.py knows", NAME)
    root: str | None = key(None, "where the data set lies: a folder or file; null: made on the fly", NOT_EMPTY)
    device: str = key("cuda", "the device; cuda falls back to the CPU where there is none", DEVICE)
    batch_size: int = key(32, "images or clips in a batch, for each process", at_least(1))
    lr: float = key(2e-4, "Adam's learning rate", POSITIVE)
    kp_activation: str = key("tanh", "activation of the position offset's mean", one_of("tanh", "sigmoid"))
    pad_mode: str = key("replicate", "padding in prior, background and image decoder", one_of("replicate", "zeros"))
    load_model: bool = key(False, "start from the weights at pretrained_path")
    pretrained_path: str | None = key(None, "file of weights to start from, used with load_model", NOT_EMPTY)
    num_epochs: int = key(150, "epochs to train", at_least(1))
    n_kp: int = key(1, "proposed particles per patch", at_least(1))
    recon_loss_type: str = key("mse", "reconstruction loss: squared error, or VGG-16 features", one_of("mse", "vgg"))
    sigma: float = key(1.0, "standard deviation of the prior's proposals", POSITIVE)
    beta_kl: float = key(0.1, "weight of the KL terms", at_least(0))
    beta_rec: float = key(1.0, "weight of the reconstruction", at_least(0))
    patch_size: int = key(8, "side of the patches that propose particles, pixels", at_least(1))
    topk: int = key(10, "most confident particles drawn in the figures, or all if fewer", at_least(1))
    n_kp_enc: int = key(10, "posterior particles per image", at_least(1))
    eval_epoch_freq: int = key(1, "epochs between two evaluations", at_least(1))
    learned_feature_dim: int = key(8, "appearance features per particle", at_least(1))
    n_kp_prior: int = key(64, "proposed particles that are kept per image", at_least(1))
    weight_decay: float = key(0.0, "Adam's weight decay", at_least(0))
    kp_range: tuple[float, float] = key((-1.0, 1.0), "range of the positions", INCREASING)
    warmup_epoch: int = key(1, "epochs of warm-up, which trains positions and glimpses first", at_least(0))
    dropout: float = key(0.0, "dropout of the attention in the encoders", BELOW_1)
    iou_thresh: float = key(0.2, "overlap above which non-maximum suppression drops a drawn box", FRACTION)
    anchor_s: float = key(0.25, "side of a glimpse as a fraction of the image's", POSITIVE_TO_1)
    kl_balance: float = key(0.001, "weight of the features', depth's and Chamfer KL in the KL terms", at_least(0))
    image_size: int = key(64, "side of the square images, pixels", at_least(1))
    ch: int = key(3, "channels of the images", one_of(3))
    enc_channels: tuple[int, ...] = key((32, 64, 128), "channels of the background's stages", channels(2))
    prior_channels: tuple[int, ...] = key((16, 32, 64), "channels of the patch and glimpse encoders", channels(1))
    timestep_horizon: int = key(10, "T: a training clip has T + 1 frames, PINT sees T", at_least(1))
    predict_delta: bool = key(True, "PINT predicts changes rather than values")
    beta_dyn: float = key(0.1, "weight of the dynamics' KL", at_least(0))
    scale_std: float = key(0.3, "standard deviation of the scale's prior", POSITIVE)
    offset_std: float = key(0.2, "standard deviation of the position offset's prior", POSITIVE)
    obj_on_alpha: float = key(0.1, "alpha of the transparency's Beta prior", POSITIVE)
    obj_on_beta: float = key(0.1, "beta of the transparency's Beta prior", POSITIVE)
    beta_dyn_rec: float = key(1.0, "weight of the reconstruction after the static frames", at_least(0))
    num_static_frames: int = key(4, "first frames of a clip, under the image prior", at_least(1))
    pint_layers: int = key(6, "transformer blocks of PINT", at_least(1))
    pint_heads: int = key(8, "attention heads of PINT", at_least(1))
    pint_dim: int = key(256, "width of PINT", at_least(4))
    run_prefix: str = key("", "end of the run directory's name", AFFIX)
    animation_horizon: int = key(100, "frames of an animation, conditioning included", at_least(1))
    eval_im_metrics: bool = key(True, "measure the image metrics at each evaluation")
    use_resblock: bool = key(False, "residual blocks")
    scheduler_gamma: float = key(0.95, "factor of the learning rate after every epoch", POSITIVE_TO_1)
    adam_betas: tuple[float, float] = key((0.9, 0.999), "Adam's betas", BETAS)
    adam_eps: float = key(1e-4, "Adam's epsilon", POSITIVE)
    train_enc_prior: bool = key(True, "train the prior that proposes particles")
    start_dyn_epoch: int = key(0, "epoch from which the dynamics are trained", at_least(0))
    cond_steps: int = key(10, "frames that a predicted video is conditioned on", at_least(1))
    animation_fps: float = key(0.06, "seconds (not a rate) that an animation shows each frame", POSITIVE)
    use_correlation_heatmaps: bool = key(False, "track with a correlation map of the previous frame's glimpses")
    enable_enc_attn: bool = key(False, "attention between the particles in their encoders")
    filtering_heuristic: str = key(
        "variance",
        "how proposals are kept; none keeps all and mixes them",
        one_of("variance", "distance", "random", "none"),
    )
    use_tracking: bool = key(False, "DLP encodes videos, tracking particles from frame to frame")
    bg_learned_feature_dim: int | None = key(None, "background features; null: learned_feature_dim", at_least(1))
    depth_logvar_from_mean: bool = key(False, "PINT's depth logvar is its mean, as in the published checkpoints")
    discount_iterations: int = key(
        10_000, "iterations (a whole epoch, if that has more) over which the dynamics' weights rise", at_least(1)
    )
    dyn_only_epoch: int | None = key(
        None, "epoch from which the dynamics alone are trained, which takes less time; null: never", at_least(1)
    )
    seed: int = key(0, "seed of the random numbers", SEED)
    num_workers: int = key(2, "processes that load data", at_least(0))
    metrics: tuple[str, ...] = key(METRICS, "the image metrics to measure", METRIC_LIST)
    checkpoint_freq: int = key(500, "iterations between two saves that training can resume from", at_least(1))
    train_size: int | None = key(None, "items of the training set to use; null: all", at_least(1))
    val_size: int | None = key(None, "items of the validation set to use; null: all", at_least(1))
    cache: bool = key(True, "keep decoded frames on disk, instead of decoding them for every item")

    IGNORED = frozenset({"context_dim"})  # published once, without an effect

    @staticmethod
    def is_own_file(name):
        return not DiffuseConfig.is_own_file(name)

    def check(self):
        check_architecture(cdim=self.ch, **{name: getattr(self, name) for name in ARCHITECTURE})
        check_dynamics(self.pint_layers, self.pint_heads, self.pint_dim, self.timestep_horizon)
        _check_run(self)


KEYS = Config.keys()


@dataclass(frozen=True, kw_only=True)
class DiffuseConfig(BaseConfig):
    """One run of DiffuseDDLP; the attributes are the keys of `diffuse_ddlp.json` and `diffusion_hparams.json`."""

    ds: str = key(MISSING, "the data set, a name that datasets/get_dataset.py knows", NAME)
    ds_root: str | None = key(None, "where the data set lies: a folder or file; null: made on the fly", NOT_EMPTY)
    device: str = key("cuda", "the device; cuda falls back to the CPU where there is none", DEVICE)
    batch_size: int = key(32, "clips in a batch, for each process", at_least(1))
    lr: float = key(8e-5, "Adam's learning rate", POSITIVE)
    train_num_steps: int = key(700_000, "training steps", at_least(1))
    diffusion_num_steps: int = key(1000, "steps of the diffusion's noise schedule", at_least(2))
    loss_type: str = key("l1", "error between the denoiser's output and its target", one_of("l1", "l2"))
    particle_norm: str = key("minmax", "how particles are normalised", one_of("minmax", "std"))
    diffuse_frames: int = key(4, "first frames of a clip, which are generated; PINT predicts the others", at_least(1))
    ddlp_dir: str = key(MISSING, "run directory or released folder of the DDLP, with its hparams.json", NOT_EMPTY)
    ddlp_ckpt: str | None = key(None, "file of the DDLP's weights; null: found in ddlp_dir", NOT_EMPTY)
    result_dir: str | None = key(None, "run directory to continue; null: a new one", NOT_EMPTY)
    denoiser: str = key("pint", "PINT's transformer, or a U-Net to compare it with", one_of("pint", "unet"))
    sampler: str = key("ddpm", "how samples are drawn", one_of(*SAMPLERS))
    sampling_steps: int | None = key(None, "denoising steps of a sample; null: diffusion_num_steps", at_least(1))
    save_and_sample_every: int = key(1000, "training steps between two saves, each with samples drawn", at_least(1))
    ema_decay: float = key(0.995, "decay of the moving average of the weights", FRACTION)
    ema_update_every: int = key(10, "training steps between two updates of the moving average", at_least(1))
    encode_on_the_fly: bool = key(False, "encode each batch anew, instead of the whole training set once")
    seed: int = key(0, "seed of the random numbers", SEED)
    num_workers: int = key(2, "processes that load data", at_least(0))
    cache: bool = key(True, "keep decoded frames on disk, instead of decoding them for every item")

    @staticmethod
    def is_own_file(name):
        return name.startswith("diffuse")

    @staticmethod
    def _path(name_or_path):
        """As `Config`'s; also a file's name alone, ending in ".json", is looked up in ``configs/`` first."""
        path = BaseConfig._path(name_or_path)
        in_configs = CONFIG_DIR / path
        return in_configs if path == Path(path.name) and in_configs.is_file() else path

    def check(self):
        steps, every = self.sampling_steps, self.diffusion_num_steps
        if steps is not None and steps > every:
            raise _illegal("sampling_steps", steps, f"1 to diffusion_num_steps {every}, or null")
        if steps not in (None, every) and self.sampler == "ddpm":
            raise _illegal("sampling_steps", steps, f'null or {every} with sampler "ddpm", which takes all steps')


def check_architecture(
    *,
    image_size,
    patch_size,
    anchor_s,
    enc_channels,
    prior_channels,
    n_kp,
    n_kp_enc,
    n_kp_prior,
    filtering_heuristic,
    pad_mode,
    kp_activation,
    kp_range,
    learned_feature_dim,
    bg_learned_feature_dim,
    sigma,
    dropout,
    scale_std,
    offset_std,
    obj_on_alpha,
    obj_on_beta,
    cdim,
):
    """Raise `UserError` unless a model can be built of these (the constructors' arguments).

    Beyond each value by itself: the background's map of side image_size / 2^(stages - 1) and the glimpse's side are
    decoded from 8 x 8 by doubling; the patches tile the image, and the key maps that are left of them have 2 x 2
    cells or more (one cell has only one position); the anchors are among the proposals that are kept. Where there are
    fewer proposals than `n_kp_enc` a model has fewer particles, as published; a `Config` refuses that.
    """
    for name, value in list(locals().items()):
        if name in KEYS:
            _checked(KEYS[name], value)
    if not isinstance(cdim, int) or cdim < 1:
        raise _illegal("cdim", cdim, "an integer, at least 1")
    stages = len(enc_channels)
    if not _is_power_of_two(image_size) or image_size < 8 * 2 ** (stages - 1):
        legal = f"a power of two, at least {8 * 2 ** (stages - 1)} with {stages} enc_channels"
        raise _illegal("image_size", image_size, legal)
    if 2 ** len(prior_channels) > image_size:
        legal = f"at most {int(math.log2(image_size))} entries with image_size {image_size}, as each halves a patch"
        raise _illegal("prior_channels", prior_channels, legal)
    patch_sizes = [size for size in _powers_of_two(image_size) if size >= 2 ** len(prior_channels)]
    if patch_size not in patch_sizes:
        reason = f"divides image_size {image_size}; {len(prior_channels)} prior_channels leave 2 pixels of it or more"
        raise _illegal("patch_size", patch_size, f"{', '.join(map(str, patch_sizes))} ({reason})")
    _check_glimpse(anchor_s, image_size)
    glimpse_stages = 1 + int(math.log2(round(anchor_s * (image_size - 1))))
    if len(prior_channels) > glimpse_stages:
        legal = f"at most {glimpse_stages} entries with anchor_s {anchor_s}, as each after the first halves a glimpse"
        raise _illegal("prior_channels", prior_channels, legal)
    if filtering_heuristic != "none" and n_kp_enc > n_kp_prior:
        raise _illegal("n_kp_enc", n_kp_enc, f'at most n_kp_prior {n_kp_prior}, or any with filtering_heuristic "none"')


ARCHITECTURE = [name for name in inspect.signature(check_architecture).parameters if name in KEYS]


def _check_glimpse(anchor_s, image_size):
    side = round(anchor_s * (image_size - 1))
    if _is_power_of_two(side) and side >= 8:
        return
    legal = [power / image_size for power in _powers_of_two(image_size // 2) if power >= 8]
    nearest = sorted(sorted(legal, key=lambda fraction: abs(math.log2(fraction / anchor_s)))[:2])
    reason = f"round(anchor_s * (image_size - 1)) is the glimpse's side, a power of two of 8 pixels or more, not {side}"
    raise _illegal("anchor_s", anchor_s, f"near it {' or '.join(map(str, nearest))} ({reason})")


def check_dynamics(pint_layers, pint_heads, pint_dim, timestep_horizon):
    """Raise `UserError` unless PINT can be built of these; its sinusoidal time embedding needs an even width."""
    for name, value in list(locals().items()):
        _checked(KEYS[name], value)
    if pint_dim % pint_heads or pint_dim % 2:
        raise _illegal("pint_dim", pint_dim, f"an even multiple of pint_heads {pint_heads}")


def _check_run(config):
    """Combinations that do not hinder a model from being built."""
    patches = (config.image_size // config.patch_size) ** 2
    if config.filtering_heuristic != "none" and config.n_kp_enc > config.n_kp * patches:
        reason = f"n_kp {config.n_kp} times {patches} patches"
        legal = f'at most {config.n_kp * patches} ({reason}), or any with filtering_heuristic "none"'
        raise _illegal("n_kp_enc", config.n_kp_enc, legal)
    if config.load_model and config.pretrained_path is None:
        raise _illegal("pretrained_path", None, "the path of a file of weights, as load_model is true")
    if config.dyn_only_epoch is not None and config.dyn_only_epoch < config.start_dyn_epoch:
        legal = f"at least start_dyn_epoch {config.start_dyn_epoch}, or null"
        raise _illegal("dyn_only_epoch", config.dyn_only_epoch, legal)
    if config.animation_horizon <= config.cond_steps:
        raise _illegal("animation_horizon", config.animation_horizon, f"above cond_steps {config.cond_steps}")
    if config.train_size is not None and config.train_size < config.batch_size:
        legal = f"at least batch_size {config.batch_size}, as an incomplete last batch is dropped"
        raise _illegal("train_size", config.train_size, legal)
    if config.image_size < SMALLEST_FEATURE_IMAGE and config.recon_loss_type == "vgg":
        legal = f'"mse" with image_size below {SMALLEST_FEATURE_IMAGE}'
        raise _illegal("recon_loss_type", config.recon_loss_type, legal)
    if config.image_size < SMALLEST_FEATURE_IMAGE and config.eval_im_metrics and "lpips" in config.metrics:
        raise _illegal("metrics", config.metrics, f"without lpips with image_size below {SMALLEST_FEATURE_IMAGE}")


def _is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


def _powers_of_two(highest):
    return [2**power for power in range(highest.bit_length())]


def _checked(entry, value):
    """``value`` as the type of the key ``entry``, or `UserError`."""
    try:
        value = _converted(value, entry.type)
        legal = value is None or entry.metadata["legal"].test(value)
    except (TypeError, OverflowError):  # another type, or an integer too large for a float
        legal = False
    if not legal:
        raise _illegal(entry.name, value, _legal(entry))
    return value


def _converted(value, kind):
    """``value`` as ``kind``; TypeError if it is something else. Lists serve as tuples, integers as floats."""
    if _is_nullable(kind):
        return None if value is None else _converted(value, get_args(kind)[0])
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if not isinstance(value, (list, tuple)) or (Ellipsis not in items and len(value) != len(items)):
            raise TypeError
        return tuple(_converted(item, items[0]) for item in value)
    accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    if kind is float and not math.isfinite(value):
        raise TypeError
    return kind(value)


def _is_nullable(kind):
    return NoneType in get_args(kind)


def _legal(entry):
    """What is legal for a key, in words: its type and values."""
    kind, legal = entry.type, entry.metadata["legal"].text
    null = ", or null" if _is_nullable(kind) else ""
    return f"{_described(kind)}{', ' if legal else ''}{legal}{null}"


def _described(kind):
    if _is_nullable(kind):
        return _described(get_args(kind)[0])
    if get_origin(kind) is tuple:
        items = get_args(kind)
        plural = {int: "integers", float: "finite numbers", str: "strings"}[items[0]]
        return f"a list of {plural}" if Ellipsis in items else f"a list of {len(items)} {plural}"
    return {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}[kind]


def _illegal(name, value, legal):
    return UserError(f"{name} is {json.dumps(value, default=repr, ensure_ascii=False)}; legal: {legal}")


def _at(where, function, *arguments, **values):
    """``function``'s result; the text of a `UserError` gets ``where`` in front."""
    try:
        return function(*arguments, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_json(path, is_choice=lambda name: True):
    """What a JSON file holds. Raises `UserError` if there is no such file, it cannot be read or is not valid JSON.

    is_choice: which names of files in configs/ the message proposes in place of one that is missing.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in CONFIG_DIR.glob("*.json") if is_choice(file.stem)))
        raise UserError(f"{path}: not found; legal: a path that ends in .json, or one of {names}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, endless brackets
        raise UserError(f"{path}: invalid JSON: {error}") from None


def add_override_arguments(parser, exclude=(), kind=Config):
    """Give ``parser`` an option ``--KEY VALUE`` for every key but those in ``exclude``; `overrides_from` reads them.

    ``kind``: whose keys, `Config` or `DiffuseConfig`.

    Abbreviated options are switched off: a mistyped key is an error, not another key.
    """
    parser.allow_abbrev = False
    group = parser.add_argument_group(
        "overrides of the configuration",
        "--KEY VALUE replaces the configuration's value. Lists: 16,32 or 16 32 or [16, 32].\n"
        "A VALUE that begins with a minus sign: --KEY=VALUE. Defaults are those of a configuration without the key.",
    )
    for name, entry in kind.keys().items():
        if name in exclude:
            continue
        default = "" if entry.default is MISSING else f"; default {json.dumps(entry.default)}"
        group.add_argument(
            f"--{name}",
            dest=OVERRIDE + name,
            nargs="+" if get_origin(entry.type) is tuple else None,
            metavar="VALUE",
            help=f"{entry.metadata['meaning']} ({_legal(entry)}{default})".replace("%", "%%"),
        )


def overrides_from(args, kind=Config):
    """The overrides of a ``kind``, `Config` or `DiffuseConfig`, among the parsed arguments: key to value.

    Raises `UserError` if one is illegal by itself.
    Combinations are checked where the overrides are applied: ``config.replace("command line", **overrides)``.
    """
    given = {name: (entry, getattr(args, OVERRIDE + name, None)) for name, entry in kind.keys().items()}
    return {
        name: _at("command line", _checked, entry, _parsed(text, entry.type))
        for name, (entry, text) in given.items()
        if text is not None
    }


def _parsed(text, kind):
    """What ``text`` (a list of texts for a list) means as ``kind``; the text itself if it is none."""
    if get_origin(kind) is tuple:
        return _parsed_list(" ".join(text), get_args(kind)[0])
    if _is_nullable(kind):
        return None if text.lower() in ("null", "none") else _parsed(text, get_args(kind)[0])
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _parsed_list(text, kind):
    if not text.startswith("["):
        return [_parsed(item, kind) for item in text.replace(",", " ").split()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
