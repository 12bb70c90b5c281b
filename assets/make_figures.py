"""Draw the pictures of the README into assets/figures with the shipped models and the examples here:
``python assets/make_figures.py``, from the checkout's folder."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from datasets.examples import Examples
from eval.eval_model import draw_dlp
from rundir import load_model
from utils.animation import generated_panel, save_animation, side_by_side
from utils.errors import run_command
from utils.files import make_folder
from utils.plotting import save_image
from what_if import comparison_panels, what_if

FIGURES = demo.ROOT / "assets" / "figures"
HORIZON = 40  # frames
SHAPES = 5  # images
VIDEOS = 4  # that are generated


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=FIGURES, type=Path, metavar="PATH", help="folder to write to (%(default)s)")
    parser.add_argument("--episode", type=int, default=0, metavar="N", help="which example of balls (%(default)s)")
    args = parser.parse_args(arguments)
    shapes, balls = (Examples(demo.ROOT / "assets" / name) for name in ("shapes", "balls"))
    if not 0 <= args.episode < len(balls):
        parser.error(f"--episode is {args.episode}; legal: 0 to {len(balls) - 1}")
    make_folder(args.out)
    dlp, ddlp, generator = (
        load_model(demo.ROOT / "checkpoints" / name) for name in ("dlp-shapes", "ddlp-balls", "diffuse-ddlp-balls")
    )
    images = torch.cat([shapes[i][0] for i in range(SHAPES)])
    save_image(draw_dlp(dlp, images)["image"], args.out / "shapes.png")
    video, positions, sizes, *_ = (entry[:HORIZON] for entry in balls[args.episode])
    edit = demo.move_first_object(ddlp, video, positions, sizes)
    compared = what_if(ddlp, video, [edit], HORIZON, demo.SEEN)
    panels = comparison_panels(compared, video, demo.SEEN)
    save_animation(side_by_side(panels), args.out / "what_if.gif", demo.FRAME_SECONDS)
    videos = generator.sample(VIDEOS, HORIZON, seed=0)
    panels = [generated_panel(each, generator.config.diffuse_frames) for each in videos]
    save_animation(side_by_side(panels), args.out / "generated.gif", demo.FRAME_SECONDS)


if __name__ == "__main__":
    run_command(main)
