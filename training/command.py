"""What the training commands share: their arguments, and the command that goes on with a run."""

import argparse
import sys

from configs.schema import OVERRIDE, add_override_arguments


def parse_arguments(description, kind, flags, arguments=None):
    """The parsed arguments of a training command: `new`, the configuration of a new run, or `resume`, a run directory;
    and the overrides, which `overrides_from` reads.

    description: of the command, for its help; kind: whose keys can be overridden, `Config` or `DiffuseConfig`; flags:
    those that name a configuration; arguments: default `sys.argv`.
    """
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s ({flags[0]} NAME | --resume RUN_DIR) [--KEY VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_ = "a new run: a name in configs/, or a path ending in .json"
    parser.add_argument(*flags, dest="new", metavar="NAME", help=help_)
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="go on with this run, exactly where it was saved, or from a file in its saves/",
    )
    parser.add_argument(
        "--no_cache", dest=f"{OVERRIDE}cache", action="store_const", const="false", help="the same as --cache false"
    )
    add_override_arguments(parser, kind=kind)
    args = parser.parse_args(arguments)
    if (args.new is None) == (args.resume is None):
        parser.error(f"give either {'/'.join(flags)} (a new run) or --resume (a run to go on with)")
    return args


def leave(loop):
    """End the process where a signal stopped its training, with the status that says so."""
    if loop.interruption.exit_status:
        sys.exit(loop.interruption.exit_status)


def resume_command(kind, accelerator):
    """What to type, with the run directory behind it, to go on with a run."""
    if accelerator.num_processes == 1:
        return f"python train_{kind}.py --resume"
    script = f"train_{kind}.py" if kind == "diffuse_ddlp" else f"train_{kind}_accelerate.py"
    return f"accelerate launch --config_file ./accel_conf.yml {script} --resume"
