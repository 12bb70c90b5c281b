"""The configuration of a run, `Config` for DLP and DDLP and `DiffuseConfig` for DiffuseDDLP: its keys with their
defaults, legal values and meaning, its files, and its command-line overrides.

On disk a configuration is one flat JSON object with the keys of the published release. Every configuration object is
legal: however it is made, it is checked as a whole; what is wrong is a `UserError` that names the key, its value and
what is legal.
"""

import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import MappingProxyType

from modules.architecture import Architecture, PINTArchitecture
from modules.diffusion_modules import DEFAULT_SAMPLER, DEFAULT_STEPS, LOSSES, SAMPLERS, sampling_steps
from utils.device import PRECISIONS
from utils.errors import UserError
from utils.files import read_json
from utils.legal import (
    AFFIX,
    BELOW_1,
    BETAS,
    DEVICE,
    FRACTION,
    NAME,
    NOT_EMPTY,
    POSITIVE,
    POSITIVE_TO_1,
    SEED,
    at_least,
    check_key,
    check_keys,
    describe,
    help_text,
    illegal,
    is_list,
    key,
    one_of,
    parse,
    several_of,
)

CONFIG_DIR = Path(__file__).resolve().parent
METRICS = ("lpips", "ssim", "psnr")
TRACKERS = ("tensorboard", "wandb", "trackio")
SMALLEST_VGG_IMAGE = 32  # the VGG loss reads the features behind the fifth pooling

# What both kinds of configuration say of this, with defaults of their own.
SAVE_EVERY = "iterations between two saves that training can resume from, besides those at the end of an interval"

OVERRIDE = "override_"  # the argparse names of overrides, apart from those of a script's own options


class BaseConfig:
    """What the configurations share; a subclass is a frozen dataclass whose fields are made by `key`.

    A field without a default is a key that must be given; `IGNORED` are keys that are accepted without an effect,
    `FORMER` former names of keys, which older files have, `FOREIGN` keys that only files of another kind have, each
    with what that is. `FIRST` names the keys that come first in a file; before inherited ones come the class's own.
    """

    FIRST = ""
    IGNORED = frozenset({"kind"})  # of a run, which its directory's file names
    FORMER = MappingProxyType({})
    FOREIGN = MappingProxyType({})

    @staticmethod
    def is_own_file(name):
        """Whether the file of that name in configs/ is of this kind."""
        return True

    def __post_init__(self):
        check_keys(self, self.keys().values())
        self.check()

    def check(self):
        """Raise `UserError` unless the values are legal together."""

    @classmethod
    def keys(cls):
        """The keys in the files' order, each name with its dataclass field."""
        entries = {entry.name: entry for entry in fields(cls)}
        return {name: entries[name] for name in dict.fromkeys([*cls.FIRST.split(), *cls.__annotations__, *entries])}

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
        for name in cls.FOREIGN.keys() & mapping.keys():
            raise UserError(f"{where}: has the key {name}: it is {cls.FOREIGN[name]}")
        keys = cls.keys()
        for former in cls.FORMER.keys() & mapping.keys():
            mapping = {cls.FORMER[former]: mapping[former], **mapping}
        for name, entry in keys.items():
            if entry.default is MISSING and name not in mapping:
                raise UserError(f"{where}: {name} is missing; legal: {describe(entry)}")
        for name in mapping:
            if name not in keys and name not in cls.IGNORED and name not in cls.FORMER:
                near = difflib.get_close_matches(str(name), keys, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                warnings.warn(f"{where}: unknown key {name} is ignored{hint}", UserWarning, stacklevel=2)
        return _at(where, cls, **{name: value for name, value in mapping.items() if name in keys})

    @classmethod
    def load(cls, name_or_path):
        """Read the file of that name in ``configs/`` ("shapes"), or the file at a path that ends in ".json".

        Relative paths in it are relative to its folder, those of a file in ``configs/`` to the folder above, where
        something is there; else to the working directory, with a warning if something is there.

        Raises `UserError` if there is no such file, or if it cannot be read, is not valid JSON or is not legal.
        """
        path = cls._path(name_or_path)
        if not os.path.exists(path):  # which a name that is too long does not upset
            names = ", ".join(sorted(file.stem for file in CONFIG_DIR.glob("*.json") if cls.is_own_file(file.stem)))
            raise UserError(f"{path}: not found; legal: a path that ends in .json, or one of {names}")
        config = cls.from_dict(read_json(path), where=str(path))
        return config.map_paths(lambda name, value: _relative_to_file(name, value, path))

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

    def map_paths(self, function):
        """A copy in which every path that is given is `function(name of the key, path)`."""
        paths = {name: getattr(self, name) for name, entry in self.keys().items() if entry.metadata["is_path"]}
        return self.replace(**{name: function(name, path) for name, path in paths.items() if path is not None})

    def with_absolute_paths(self):
        """A copy that means the same wherever it is read."""
        return self.map_paths(lambda name, path: os.path.abspath(path))

    def resume(self, also=(), /, **changes):
        """The configuration with which a run of this one goes on: a copy with some keys changed; `UserError` for a
        change of a key that may not change then. also: keys that may change this time."""
        entries = self.keys()
        fixed = [name for name in changes if name in entries and not entries[name].metadata["resumable"]]
        fixed = [name for name in fixed if name not in also]
        here, changed = self.with_absolute_paths(), self.replace("command line", **changes).with_absolute_paths()
        for name in fixed:
            if getattr(changed, name) != getattr(here, name):
                legal = ", ".join(name for name, entry in entries.items() if entry.metadata["resumable"])
                reason = f"{getattr(self, name)!r}, as in the run that goes on; what may change: {legal}"
                raise illegal(name, changes[name], reason)
        return changed

    def fixed_keys(self):
        """The names of the keys that decide what a run's numbers are, which stay as they are when it goes on."""
        keys = self.keys().items()
        return [name for name, entry in keys if not (entry.metadata["resumable"] or entry.metadata["is_path"])]

    def to_dict(self):
        """Key to value in the files' order, lists for tuples: what `from_dict` and JSON take."""
        values = {name: getattr(self, name) for name in self.keys()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(BaseConfig):
    """The keys that trainings of all kinds have, and mean the same in each."""

    device: str = key("cuda", "the device; cuda falls back to the CPU where there is none", DEVICE, resumable=True)
    load_model: bool = key(False, "start from the weights at pretrained_path; priors stay those of the configuration")
    pretrained_path: str | None = key(
        None,
        "file of weights to start from, used with load_model; of a DiffuseDDLP its saves/model.pth",
        NOT_EMPTY,
        is_path=True,
    )
    cuda_graphs: bool = key(False, "replay training steps as CUDA graphs, which small models on one GPU gain by")
    precision: str = key(
        "float32", "of training: bfloat16 where it is safe, or float32 everywhere", one_of(*PRECISIONS)
    )
    gradient_accumulation_steps: int = key(
        1, "batches of each process whose gradients are averaged for one step of the optimiser", at_least(1)
    )
    compile: bool = key(False, "compile the model with torch.compile, which pays off in long runs", resumable=True)
    tracker: str | None = key(
        None, "where numbers, figures and animations go, beside the run directory", one_of(*TRACKERS), resumable=True
    )
    tf32: bool = key(True, "convolutions of float32 on a GPU multiply in TF32, which is faster", resumable=True)
    deterministic: bool = key(
        False, "only kernels that give the same bits in every run, on a GPU more slowly", resumable=True
    )
    seed: int = key(0, "seed of the random numbers", SEED)
    num_workers: int = key(2, "processes that load data", at_least(0), resumable=True)
    keep: int = key(1, "last saves that are kept, to go on from an earlier one", at_least(1), resumable=True)
    max_minutes: float | None = key(
        None, "minutes after which training saves and stops; null: none", POSITIVE, resumable=True
    )
    cache: bool = key(True, "keep decoded frames on disk, instead of decoding them for every item", resumable=True)

    def check(self):
        if self.load_model and self.pretrained_path is None:
            raise illegal("pretrained_path", None, "the path of a file of weights, as load_model is true")


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig, PINTArchitecture, Architecture):
    """One run, DLP or DDLP; the attributes are the keys of the JSON file. Lists are tuples here.

    A key that a file lacks has the default below; only ``ds`` has none. ``pad_mode`` is "replicate" or "zeros":
    the published release reads every other value as "replicate", here it is refused.
    """

    ds: str = key(MISSING, "the data set, a name that datasets/get_dataset.py knows", NAME)
    root: str | None = key(
        None,
        "where the data set lies: a folder or file; null: made on the fly",
        NOT_EMPTY,
        resumable=True,
        is_path=True,
    )
    batch_size: int = key(32, "images or clips in a batch, for each process", at_least(1))
    lr: float = key(2e-4, "Adam's learning rate", POSITIVE)
    pretrained_dynamics: bool = key(True, "take PINT's weights from pretrained_path too, instead of new ones")
    num_epochs: int = key(150, "epochs to train", at_least(1), resumable=True)
    recon_loss_type: str = key("mse", "reconstruction loss: squared error, or VGG-16 features", one_of("mse", "vgg"))
    beta_kl: float = key(0.1, "weight of the KL terms", at_least(0))
    beta_rec: float = key(1.0, "weight of the reconstruction", at_least(0))
    topk: int = key(10, "most confident particles drawn in the figures, or all if fewer", at_least(1), resumable=True)
    eval_epoch_freq: int = key(1, "epochs between two evaluations", at_least(1), resumable=True)
    weight_decay: float = key(0.0, "Adam's weight decay", at_least(0))
    warmup_epoch: int = key(1, "epochs of warm-up, which trains positions and glimpses first", at_least(0))
    iou_thresh: float = key(
        0.2, "overlap above which non-maximum suppression drops a drawn box", FRACTION, resumable=True
    )
    kl_balance: float = key(0.001, "weight of the features', depth's and Chamfer KL in the KL terms", at_least(0))
    beta_dyn: float = key(0.1, "weight of the dynamics' KL", at_least(0))
    beta_dyn_l1: float = key(0.0, "weight of the absolute error of the positions that PINT predicts", at_least(0))
    beta_dyn_rec: float = key(1.0, "weight of the reconstruction after the static frames", at_least(0))
    num_static_frames: int = key(4, "first frames of a clip, under the image prior", at_least(1))
    run_prefix: str = key("", "end of the run directory's name", AFFIX)
    animation_horizon: int = key(100, "frames of an animation, conditioning included", at_least(1))
    eval_im_metrics: bool = key(
        True, "measure the image metrics at evaluations, but not the first epoch's", resumable=True
    )
    scheduler_gamma: float = key(0.95, "factor of the learning rate after every epoch", POSITIVE_TO_1)
    adam_betas: tuple[float, float] = key((0.9, 0.999), "Adam's betas", BETAS)
    adam_eps: float = key(1e-4, "Adam's epsilon", POSITIVE)
    train_enc_prior: bool = key(True, "train the prior that proposes particles")
    start_dyn_epoch: int = key(0, "epoch from which the dynamics are trained", at_least(0))
    cond_steps: int = key(10, "frames that a predicted video is conditioned on", at_least(1))
    animation_fps: float = key(0.06, "seconds (not a rate) that an animation shows each frame", POSITIVE)
    use_tracking: bool = key(False, "DLP encodes videos, tracking particles from frame to frame")
    discount_iterations: int = key(
        10_000, "iterations (a whole epoch, if that has more) over which the dynamics' weights rise", at_least(1)
    )
    dyn_only_epoch: int | None = key(
        None, "epoch from which the dynamics alone are trained, which takes less time; null: never", at_least(0)
    )
    dyn_particle_cache: bool = key(True, "encode the training set once when the dynamics alone are trained")
    pint_noise: float = key(0.0, "standard deviation of noise on the positions that PINT sees in training", at_least(0))
    pint_noise_last: float | None = key(
        None, "pint_noise at the end of num_epochs, a straight line from the first one; null: the same", at_least(0)
    )
    pint_bias_lr: float = key(1.0, "factor of the learning rate of PINT's position biases", POSITIVE)
    grad_clip: float | None = key(None, "norm at which the gradient is clipped; null: it is not", POSITIVE)
    ema: float | None = key(
        None, "decay of a moving average of the weights, which then is evaluated and saved; null: none", FRACTION
    )
    checkpointing: bool = key(
        False, "compute activations again in the backward pass: less memory, more time", resumable=True
    )
    metrics: tuple[str, ...] = key(METRICS, "the image metrics to measure", several_of(*METRICS), resumable=True)
    save_every: int = key(500, SAVE_EVERY, at_least(1), resumable=True)
    train_size: int | None = key(None, "items of the training set to use; null: all", at_least(1))
    val_size: int | None = key(None, "items of the validation set to use; null: all", at_least(1), resumable=True)

    FIRST = """
    ds root device batch_size lr kp_activation pad_mode load_model pretrained_path num_epochs n_kp recon_loss_type
    sigma beta_kl beta_rec patch_size topk n_kp_enc eval_epoch_freq learned_feature_dim n_kp_prior weight_decay
    kp_range warmup_epoch dropout iou_thresh anchor_s kl_balance image_size ch enc_channels prior_channels
    timestep_horizon predict_delta beta_dyn scale_std offset_std obj_on_alpha obj_on_beta beta_dyn_rec
    num_static_frames pint_layers pint_heads pint_dim run_prefix animation_horizon eval_im_metrics use_resblock
    scheduler_gamma adam_betas adam_eps train_enc_prior start_dyn_epoch cond_steps animation_fps
    use_correlation_heatmaps enable_enc_attn filtering_heuristic use_tracking
    """  # those of the published files, in their order
    IGNORED = BaseConfig.IGNORED | {"context_dim"}  # published once, without an effect
    FORMER = MappingProxyType({"checkpoint_freq": "save_every"})
    FOREIGN = MappingProxyType({"ddlp_dir": "the configuration of a DiffuseDDLP, which train_diffuse_ddlp.py reads"})

    @staticmethod
    def is_own_file(name):
        return not DiffuseConfig.is_own_file(name)

    def check(self):
        super().check()
        Architecture.__post_init__(self)
        PINTArchitecture.__post_init__(self)
        if self.ch != 3:
            raise illegal("ch", self.ch, "an integer, 3")
        if self.filtering_heuristic != "none" and self.n_kp_enc > self.num_proposals:
            reason = f"n_kp {self.n_kp} times {self.num_patches} patches"
            legal = f'at most {self.num_proposals} ({reason}), or any with filtering_heuristic "none"'
            raise illegal("n_kp_enc", self.n_kp_enc, legal)
        if self.dyn_only_epoch is not None and self.dyn_only_epoch < self.start_dyn_epoch:
            legal = f"at least start_dyn_epoch {self.start_dyn_epoch}, or null"
            raise illegal("dyn_only_epoch", self.dyn_only_epoch, legal)
        if self.animation_horizon <= self.cond_steps:
            raise illegal("animation_horizon", self.animation_horizon, f"above cond_steps {self.cond_steps}")
        if self.train_size is not None and self.train_size < self.batch_size:
            legal = f"at least batch_size {self.batch_size}, as an incomplete last batch is dropped"
            raise illegal("train_size", self.train_size, legal)
        if self.image_size < SMALLEST_VGG_IMAGE and self.recon_loss_type == "vgg":
            raise illegal("recon_loss_type", "vgg", f'"mse" with image_size below {SMALLEST_VGG_IMAGE}')


@dataclass(frozen=True, kw_only=True)
class DiffuseConfig(TrainingConfig):
    """One run of DiffuseDDLP; the attributes are the keys of `diffuse_ddlp.json` and `diffusion_hparams.json`."""

    ds: str = key(MISSING, "the data set, a name that datasets/get_dataset.py knows", NAME)
    ds_root: str | None = key(
        None,
        "where the data set lies: a folder or file; null: made on the fly",
        NOT_EMPTY,
        resumable=True,
        is_path=True,
    )
    batch_size: int = key(32, "clips in a batch, for each process", at_least(1))
    lr: float = key(8e-5, "Adam's learning rate", POSITIVE)
    train_num_steps: int = key(700_000, "training steps", at_least(1), resumable=True)
    scheduler_gamma: float = key(
        1.0, "factor of the learning rate after every save_and_sample_every steps", POSITIVE_TO_1
    )
    diffusion_num_steps: int = key(1000, "steps of the diffusion's noise schedule", at_least(2))
    loss_type: str = key("l1", "error between the denoiser's output and its target", one_of(*LOSSES))
    particle_norm: str = key("minmax", "how particles are normalised", one_of("minmax", "std"))
    diffuse_frames: int = key(4, "first frames of a clip, which are generated; PINT predicts the others", at_least(1))
    ddlp_dir: str = key(
        MISSING, "run directory or released folder of the DDLP, with its hparams.json", NOT_EMPTY, is_path=True
    )
    ddlp_ckpt: str | None = key(None, "file of the DDLP's weights; null: found in ddlp_dir", NOT_EMPTY, is_path=True)
    result_dir: str | None = key(None, "run directory to continue; null: a new one", NOT_EMPTY, is_path=True)
    denoiser: str = key("pint", "PINT's transformer, or a U-Net to compare it with", one_of("pint", "unet"))
    denoiser_dropout: float = key(0.1, "dropout in the denoiser", BELOW_1)
    sampler: str = key(DEFAULT_SAMPLER, "how samples are drawn", one_of(*SAMPLERS), resumable=True)
    sampling_steps: int | None = key(
        None,
        f"denoising steps of a sample; null: {DEFAULT_STEPS}, or with ddpm diffusion_num_steps",
        at_least(1),
        resumable=True,
    )
    mask_samples: bool = key(True, "sampling keeps the tokens' padding at 0, as it is in training", resumable=True)
    save_and_sample_every: int = key(
        1000, "training steps after which the state is saved and samples are drawn", at_least(1), resumable=True
    )
    save_every: int = key(1000, SAVE_EVERY, at_least(1), resumable=True)
    ema_decay: float = key(0.995, "decay of the moving average of the weights", FRACTION)
    ema_update_every: int = key(10, "training steps between two updates of the moving average", at_least(1))
    grad_clip: float | None = key(1.0, "norm at which the gradient is clipped; null: it is not", POSITIVE)
    encode_on_the_fly: bool = key(False, "encode each batch anew, instead of the whole training set once")

    FIRST = """
    ds ds_root device batch_size lr train_num_steps diffusion_num_steps loss_type particle_norm diffuse_frames
    ddlp_dir ddlp_ckpt result_dir
    """
    FOREIGN = MappingProxyType(
        {"n_kp_enc": "the configuration of a DLPv2 or DDLP, which train_dlp.py and train_ddlp.py read"}
    )

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
        super().check()
        self.sampling(name="sampling_steps")
        every, gamma = self.save_and_sample_every, self.scheduler_gamma
        if gamma != 1 and self.train_num_steps % every:
            legal = f"a multiple of save_and_sample_every {every}, as scheduler_gamma is {gamma}"
            raise illegal("train_num_steps", self.train_num_steps, legal)

    def sampling(self, sampler=None, steps=None, name="steps"):
        """The sampler and its steps, those of the configuration where none are given; `UserError`, which calls the
        steps `name`, if they are not legal together."""
        if sampler is None:
            sampler, steps = self.sampler, self.sampling_steps if steps is None else steps
        return sampler, sampling_steps(sampler, steps, self.diffusion_num_steps, name)

    def resume(self, also=(), /, **changes):
        every = changes.get("save_and_sample_every", self.save_and_sample_every)
        if self.scheduler_gamma != 1 and every != self.save_and_sample_every:
            reason = f"{self.save_and_sample_every}, as in the run that goes on, as scheduler_gamma is not 1"
            raise illegal("save_and_sample_every", every, reason)
        return super().resume(also, **changes)


def base_of(file):
    """The folder that relative paths in a configuration's file are relative to."""
    folder = Path(file).resolve().parent
    return folder.parent if folder == CONFIG_DIR else folder


def _relative_to_file(name, path, file):
    """What a path in a configuration's file means: `path` itself where that is the same, or where nothing is there."""
    written, here = os.path.normpath(base_of(file) / path), os.path.abspath(path)
    if written == here or not (os.path.exists(written) or os.path.exists(here)):
        return path
    if os.path.exists(written):
        return written
    text = f"{file}: {name} is {path}; nothing is at {written}, so {here} is taken"
    warnings.warn(text, UserWarning, stacklevel=2)
    return here


def _at(where, function, *arguments, **values):
    """``function``'s result; the text of a `UserError` gets ``where`` in front."""
    try:
        return function(*arguments, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
        group.add_argument(
            f"--{name}",
            dest=OVERRIDE + name,
            nargs="+" if is_list(entry.type) else None,
            metavar="VALUE",
            help=help_text(entry).replace("%", "%%"),
        )


def overrides_from(args, kind=Config):
    """The overrides of a ``kind``, `Config` or `DiffuseConfig`, among the parsed arguments: key to value.

    Raises `UserError` if one is illegal by itself.
    Combinations are checked where the overrides are applied: ``config.replace("command line", **overrides)``.
    """
    given = {name: (entry, getattr(args, OVERRIDE + name, None)) for name, entry in kind.keys().items()}
    return {
        name: _at("command line", check_key, entry, parse(text, entry.type))
        for name, (entry, text) in given.items()
        if text is not None
    }
