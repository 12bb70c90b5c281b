"""Pack a run's weights as float16 beside its configuration, as they are shipped here:
``python checkpoints/pack.py RUN_DIR checkpoints/NAME``, from the checkout's folder."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rundir.diffusion_run import DDLP_CONFIG_FILE, EMA_PREFIX, DiffusionRun, checked_state
from rundir.run import Run
from utils import checkpoints
from utils.errors import UserError, run_command
from utils.files import make_folder, write_json


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN_DIR", help="a run directory of any kind")
    parser.add_argument("folder", metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--ddlp_dir", metavar="PATH", help="of a DiffuseDDLP: its DDLP as seen from FOLDER (default: packed too)"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="of a DLPv2 or DDLP: weights (default: the best by LPIPS, else the last)"
    )
    args = parser.parse_args(arguments)
    folder, is_diffusion = make_folder(args.folder), (Path(args.run) / DiffusionRun.config_file).is_file()
    if args.ddlp_dir is not None and not is_diffusion:
        raise UserError(f"--ddlp_dir: {args.run} is no DiffuseDDLP; legal: without --ddlp_dir")
    if args.checkpoint is not None and is_diffusion:
        raise UserError(f"--checkpoint: {args.run} is a DiffuseDDLP; legal: without --checkpoint")
    if is_diffusion:
        pack_diffusion(DiffusionRun.open(args.run), folder, args.ddlp_dir)
    else:
        pack(Run.open(args.run), folder, args.checkpoint)


def packed(config):
    """A run's configuration as it is shipped: with paths as seen from this checkout, and without the weights that
    training began with, which are not."""
    return config.map_paths(seen_from_here).replace(load_model=False, pretrained_path=None)


def seen_from_here(name, path):
    """A path of a run, which keeps absolute ones, as a configuration of this checkout has it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else f"./{relative}"


def pack(run, folder, checkpoint=None):
    """Write the weights of a DLPv2 or DDLP, those that `Run.load_model` takes, as a released folder has them."""
    weights, config = checkpoints.load(run.find_weights(checkpoint)), packed(run.config).replace(run_prefix="")
    checkpoints.save(_halved(weights), folder / f"{config.ds}_{run.kind}.pth")
    write_json(folder / run.config_file, {"kind": run.kind, **config.to_dict()})


def pack_diffusion(run, folder, ddlp_dir):
    """Write the moving average of a DiffuseDDLP's weights and the statistics of its particles; with `ddlp_dir` None
    its DDLP, too."""
    make_folder(folder / "saves")
    ema = checked_state(run.read_state(), run.state_path)["ema"]
    averages = _halved({name: value for name, value in ema.items() if name.startswith(EMA_PREFIX)})
    kept = averages | {name: ema[name].reshape(1) for name in ("initted", "step")}
    published = {"step": int(ema["step"]), "model": {}, "opt": {}, "ema": kept, "scaler": None}
    checkpoints.save(published, folder / "saves" / run.state_path.name)
    checkpoints.save(checkpoints.load(run.stats_path), folder / run.stats_path.name)
    config = packed(run.config).replace(ddlp_dir=ddlp_dir or ".", ddlp_ckpt=None)
    write_json(folder / run.config_file, {"kind": run.kind, **config.to_dict()})
    if ddlp_dir is None:
        weights = _halved(checkpoints.load(run.ddlp_weights_path()))
        checkpoints.save(weights, folder / run.ddlp_weights_path().name)
        write_json(folder / DDLP_CONFIG_FILE, packed(run.ddlp_config).to_dict())


def _halved(weights):
    """A state dict with its matrices and kernels as float16; the rest is small, and constants need more."""
    return {name: value.half() if value.dim() > 1 else value for name, value in weights.items()}


if __name__ == "__main__":
    run_command(main)
