"""What the commands that use a trained DLPv2 or DDLP have in common: their arguments, and what these name."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed

from configs.schema import CONFIG_DIR, Config
from models import ObjectDynamicsDLP
from rundir.run import Run
from utils.device import add_device_arguments, device_of
from utils.errors import UserError


@dataclass
class PredictionRequest:
    """What is to be predicted: `horizon` frames, the first `cond_steps` of which the model sees, of videos of `mode`
    of the data set in `config`."""

    run: Run
    model: ObjectDynamicsDLP
    config: Config
    device: torch.device
    mode: str
    cond_steps: int
    horizon: int
    deterministic: bool


def add_model_arguments(parser):
    """The arguments that `open_run` and `open_data` read: a run, its weights, a data set, a device."""
    parser.add_argument("-p", "--path", metavar="RUN_DIR", required=True, help="run directory, ours or a released one")
    parser.add_argument("-d", "--dataset", metavar="NAME", help="data set, a name in configs/ (default: the run's)")
    parser.add_argument("--root", metavar="PATH", help="where the data set lies (default: as in the run)")
    parser.add_argument("--no_cache", action="store_true", help="do not keep decoded frames on disk")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights (default: best by LPIPS if there are such, or last)"
    )
    parser.add_argument("--use_last", action="store_true", help="take the last weights, not the best by LPIPS")
    parser.add_argument("--prefix", metavar="P", help="the run_prefix in the weights' names (default: the run's)")
    parser.add_argument("--use_train", action="store_true", help="take the training set, not the test set")
    add_device_arguments(parser)


def add_prediction_arguments(parser, horizon):
    """The arguments that `open_prediction` reads. horizon: the default in words."""
    add_model_arguments(parser)
    parser.add_argument(
        "-c", "--cond_steps", type=int, default=-1, metavar="N", help="frames that the model sees (-1, default: its T)"
    )
    parser.add_argument("--horizon", type=int, metavar="N", help=f"frames in all (default: {horizon})")
    parser.add_argument("--sample", action="store_true", help="sample from the dynamics instead of taking their means")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")


def open_run(args):
    """The `Run` that the arguments name."""
    run = Run.open(args.path)
    if args.prefix is not None:
        run.config = run.config.replace("--prefix", run_prefix=args.prefix)
    return run


def open_data(args, run):
    """The run's configuration with the data set that the arguments name, and the mode: "train" or "test"."""
    config = data_config(run, args.dataset, args.root)
    return config.replace(cache=False) if args.no_cache else config, "train" if args.use_train else "test"


def open_prediction(args, horizon=None):
    """The `PredictionRequest` that the arguments name. horizon: the default (None: the run's animation_horizon)."""
    if args.cond_steps != -1 and args.cond_steps < 1:
        raise UserError(f"-c/--cond_steps is {args.cond_steps}; legal: at least 1, or -1 for the model's T")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; legal: from 0 to 2^32 - 1")
    run = open_run(args)
    if run.kind != "ddlp":
        raise UserError(f"{run.path} is a run of kind {run.kind}; videos are predicted by one of kind ddlp")
    device = device_of(args)
    cond_steps = run.config.timestep_horizon if args.cond_steps == -1 else args.cond_steps
    if args.horizon is not None:
        horizon = args.horizon
    elif horizon is None:
        horizon = run.config.animation_horizon
    if horizon <= cond_steps:
        raise UserError(f"--horizon is {horizon} frames in all; legal: above the {cond_steps} frames that are seen")
    config, mode = open_data(args, run)
    model = run.load_model(args.checkpoint, args.use_last, device)
    set_seed(args.seed)
    return PredictionRequest(run, model, config, device, mode, cond_steps, horizon, not args.sample)


def data_config(run, dataset=None, root=None):
    """The run's configuration with the data set `dataset` (a name in configs/, or a path ending in .json) at `root`.

    Without `root` it is the root in that file if something is there, else the run's own, else, as for a released run,
    whose root is not on this machine, that of the data set's file in configs/. One that is not the run's is said on
    stderr.
    """
    config = run.config
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
