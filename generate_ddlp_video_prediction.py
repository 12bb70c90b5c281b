"""Predict videos with a trained DDLP and show them beside the truth:
``python generate_ddlp_video_prediction.py -p RUN_DIR -n 1 -c 10 --horizon 100``.

Writes RUN_DIR/animations/e0_traj_anim_{i}.gif: ground truth left, prediction right.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from eval.eval_model import animate_trajectory_ddlp
from rundir.prediction import add_prediction_arguments, open_prediction
from utils.animation import ANIMATION_FORMATS
from utils.errors import run_command
from utils.files import make_folder


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_prediction_arguments(parser, horizon="the run's animation_horizon")
    parser.add_argument("-n", "--num_predictions", type=int, default=5, metavar="N", help="videos (default: 5)")
    parser.add_argument("--format", choices=ANIMATION_FORMATS, default="gif", help="of the files (default: gif)")
    args = parser.parse_args(arguments)
    if args.num_predictions < 1:
        parser.error(f"-n/--num_predictions is {args.num_predictions}; legal: at least 1")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    request = open_prediction(args)
    folder = make_folder(request.run.path / "animations")
    paths = animate_trajectory_ddlp(
        request.model,
        request.config,
        0,
        request.device,
        folder,
        timestep_horizon=request.horizon,
        num_trajetories=args.num_predictions,
        train=args.use_train,
        cond_steps=request.cond_steps,
        deterministic=request.deterministic,
        mode=request.mode,
        suffix=args.format,
        verbose=True,
    )
    for path in paths:
        print(path)


if __name__ == "__main__":
    run_command(main)
