"""What the commands that use a trained model have in common: their arguments, and what these name."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed

from configs.schema import CONFIG_DIR, Config
from models import DiffuseDDLP, ParticleModel
from rundir import find_run
from rundir.diffusion_run import DiffusionRun
from rundir.run import Run
from utils.device import add_device_arguments, device_of
from utils.errors import UserError
from utils.files import given_path


@dataclass
class PredictionRequest:
    """What is to be predicted: `horizon` frames, the first `cond_steps` of which the model sees, of videos of `mode`
    of the data set in `config`. `model` draws them; `diffusion`, of a DiffuseDDLP, generates the first frames."""

    run: Run | DiffusionRun
    model: ParticleModel
    diffusion: DiffuseDDLP | None
    config: Config
    device: torch.device
    mode: str
    cond_steps: int
    horizon: int
    deterministic: bool


def add_model_arguments(parser, needs_path=True):
    """The arguments that `open_run` and `open_data` read: a run, its weights, a data set, a device. needs_path: whether
    -p must be given."""
    help_text = "run directory, ours or a released one"
    parser.add_argument("-p", "--path", type=given_path, metavar="RUN_DIR", required=needs_path, help=help_text)
    parser.add_argument("-d", "--dataset", metavar="NAME", help="data set, a name in configs/ (default: the run's)")
    parser.add_argument("--root", metavar="PATH", help="where the data set lies (default: as in the run)")
    parser.add_argument("--no_cache", action="store_true", help="do not keep decoded frames on disk")
    parser.add_argument(
        "--checkpoint",
        type=given_path,
        metavar="FILE",
        help="weights (default: best by LPIPS if there are such, or last)",
    )
    parser.add_argument("--use_last", action="store_true", help="take the last weights, not the best by LPIPS")
    parser.add_argument("--prefix", metavar="P", help="the run_prefix in the weights' names (default: the run's)")
    parser.add_argument("--use_train", action="store_true", help="take the training set, not the test set")
    add_device_arguments(parser)


def add_prediction_arguments(parser, horizon, needs_path=True):
    """The arguments that `open_prediction` reads. horizon: the default in words; needs_path: whether -p must be
    given."""
    add_model_arguments(parser, needs_path)
    parser.add_argument(
        "-c", "--cond_steps", type=int, default=-1, metavar="N", help="frames that the model sees (-1, default: its T)"
    )
    parser.add_argument("--horizon", type=int, metavar="N", help=f"frames in all (default: {horizon})")
    parser.add_argument("--sample", action="store_true", help="sample from the dynamics instead of taking their means")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")


def open_run(args, kinds=("ddlp", "dlp")):
    """The `Run` that the arguments name, or, where `kinds` has "diffuse_ddlp", the `DiffusionRun`; `UserError` for one
    of another kind."""
    run = find_run(args.path)
    if run.kind not in kinds:
        raise UserError(f"{run.path} is a run of kind {run.kind}; legal here: kind {' or '.join(kinds)}")
    if args.prefix is not None and run.kind != "diffuse_ddlp":
        run.config = run.config.replace("--prefix", run_prefix=args.prefix)
    return run


def open_data(args, run):
    """The configuration of the run's DLPv2 or DDLP with the data set that the arguments name, and the mode: "train" or
    "test"."""
    config = data_config(run, args.dataset, args.root)
    return config.replace(cache=False) if args.no_cache else config, "train" if args.use_train else "test"


def open_prediction(args, horizon=None, kinds=("ddlp",)):
    """The `PredictionRequest` that the arguments name. horizon: the default (None: the run's animation_horizon);
    kinds: of runs that can do what is asked."""
    if args.cond_steps != -1 and args.cond_steps < 1:
        raise UserError(f"-c/--cond_steps is {args.cond_steps}; legal: at least 1, or -1 for the model's T")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; legal: from 0 to 2^32 - 1")
    run = open_run(args, kinds)
    device = device_of(args)
    cond_steps = frames_seen(run) if args.cond_steps == -1 else args.cond_steps
    if run.kind != "ddlp" and cond_steps != frames_seen(run):
        raise UserError(f"-c/--cond_steps is {cond_steps}; legal with a run of kind {run.kind}: {frames_seen(run)}")
    horizon = _horizon(args, run, cond_steps, horizon)
    config, mode = open_data(args, run)
    if run.kind == "diffuse_ddlp":
        diffusion = run.load_model(device, args.checkpoint)
        model = diffusion.ddlp
    else:
        diffusion, model = None, run.load_model(args.checkpoint, args.use_last, device)
    set_seed(args.seed)
    return PredictionRequest(run, model, diffusion, config, device, mode, cond_steps, horizon, not args.sample)


def _horizon(args, run, cond_steps, default):
    if run.kind == "dlp":
        if args.horizon not in (None, 1):
            raise UserError(f"--horizon is {args.horizon}; legal with a run of kind dlp, which predicts nothing: 1")
        return 1
    default = particle_config(run).animation_horizon if default is None else default
    horizon = default if args.horizon is None else args.horizon
    if horizon <= cond_steps:
        raise UserError(f"--horizon is {horizon} frames in all; legal: above the {cond_steps} frames that are seen")
    return horizon


def particle_config(run):
    """The `Config` of the model that draws particles: the run's own, or that of a DiffuseDDLP's DDLP."""
    return run.ddlp_config if run.kind == "diffuse_ddlp" else run.config


def frames_seen(run):
    """How many frames the model of a run sees unless another number is asked for, or, of a DiffuseDDLP, generates
    first."""
    if run.kind == "dlp":
        return 1
    return run.config.diffuse_frames if run.kind == "diffuse_ddlp" else run.config.timestep_horizon


def data_config(run, dataset=None, root=None):
    """The run's configuration with the data set `dataset` (a name in configs/, or a path ending in .json) at `root`.

    Without `root` it is the root in that file if something is there, else the run's own, else, as for a released run,
    whose root is not on this machine, that of the data set's file in configs/. One that is not the run's is said on
    stderr.
    """
    config = particle_config(run)
    named = None if dataset is None else Config.load(dataset)
    ds = config.ds if named is None else named.ds
    if root is None:
        roots = [named.root] if str(dataset).endswith(".json") else []
        roots += [config.root] if ds == config.ds else []
        known = named or (Config.load(ds) if (CONFIG_DIR / f"{ds}.json").is_file() else config)
        root = next((path for path in roots if path is not None and Path(path).exists()), known.root)
        if ds == config.ds and config.root not in (None, root):
            print(f"{run.path}: its data set was at {config.root}; here the one at {root} is taken", file=sys.stderr)
    return config.replace("--root", ds=ds, root=root)
