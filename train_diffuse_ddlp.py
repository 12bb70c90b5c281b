"""Train DiffuseDDLP, which generates videos, around a trained DDLP:
``python train_diffuse_ddlp.py -c diffuse_ddlp.json``, ``python train_diffuse_ddlp.py --help``; on several devices
``accelerate launch --config_file ./accel_conf.yml train_diffuse_ddlp.py -c diffuse_ddlp.json``.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from configs.schema import DiffuseConfig, overrides_from
from models import ObjectDynamicsDLP
from rundir.diffusion_run import DiffusionRun, find_ddlp_config, find_ddlp_weights
from training.command import leave, parse_arguments, resume_command
from training.diffusion import DiffusionTask
from training.loop import TrainingLoop
from utils import checkpoints
from utils.device import make_accelerator
from utils.errors import UserError, run_command


def main(arguments=None):
    args = parse_arguments(__doc__, DiffuseConfig, ("-c", "--config"), arguments)
    config, run = configuration(args, overrides_from(args, DiffuseConfig))
    accelerator = make_accelerator(config.device)
    if run:
        run = DiffusionRun.open(run.path, accelerator.is_main_process)
    ddlp_config, weights = (run.ddlp_config, run.ddlp_weights_path()) if run else the_ddlp(config)
    ddlp = ObjectDynamicsDLP.from_config(ddlp_config)
    checkpoints.load_weights(ddlp, weights)
    task = DiffusionTask(config, ddlp_config, ddlp, accelerator, run)
    loop = TrainingLoop(task, config, accelerator, resume_command(DiffusionRun.kind, accelerator))
    if run:
        loop.resume(run)
        run.save_config(config)
    else:
        statistics = task.diffuse_ddlp.normalization, task.identity
        run = DiffusionRun.create(config, ddlp_config, accelerator, weights, *statistics)
    loop.fit(run)
    leave(loop)


def configuration(args, overrides):
    """The `DiffuseConfig` to train with, and the `DiffusionRun` that goes on, or None for a new one."""
    if args.resume is not None:
        run = DiffusionRun.open(args.resume)
        return run.config.resume(run.may_change, **overrides), run
    config = DiffuseConfig.load(args.new).replace("command line", **overrides)
    if config.result_dir is None:
        return config, None
    run = DiffusionRun.open(config.result_dir)
    return run.config.resume(**{**config.to_dict(), "result_dir": None}), run


def the_ddlp(config):
    """The configuration of the DDLP that a `DiffuseConfig` names, and the file of its weights."""
    if not Path(config.ddlp_dir).is_dir():
        raise UserError(
            f"ddlp_dir is {config.ddlp_dir}: no such folder; legal: the run directory of a DDLP, or a released one"
        )
    if config.ddlp_ckpt is not None and not Path(config.ddlp_ckpt).is_file():
        raise UserError(
            f"ddlp_ckpt is {config.ddlp_ckpt}: no such file; legal: a file of weights, or null, the best in ddlp_dir"
        )
    ddlp_config = find_ddlp_config(config)
    return ddlp_config, find_ddlp_weights(config, ddlp_config)


if __name__ == "__main__":
    run_command(main)
