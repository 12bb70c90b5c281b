"""Train a small DDLP on balls that bounce off each other, on the CPU, and predict how held-out videos go on:
``make demo-train``."""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from configs.schema import Config, add_override_arguments, overrides_from
from datasets import balls_preparation
from datasets.get_dataset import video_dataset
from eval.eval_gen_metrics import measure_predictions
from eval.eval_model import animate_trajectory_ddlp
from eval.image_metrics import ImageMetrics
from rundir.run import Run
from training.command import leave, resume_command
from training.loop import TrainingLoop
from training.particles import DDLPTask, leaves_parameters_unused
from utils.device import make_accelerator
from utils.errors import run_command
from utils.plotting import horizon_graph, save_image

OUTPUT = "demo_output"
# Smaller than the data set's: two balls in 32 x 32 pixels; and more, shorter videos, whose clips differ more.
BALLS = "--train 240 --val 10 --test 40 --num_frames 16 --num_balls 2 --radius 4 --speed 3 --image_size 32"


def still_frame(config):
    """What one gets by leaving the last frame that is seen as it is: PSNR (dB) and position error (pixels), means over
    the test videos at each later frame."""
    psnr, error = [], []
    for video, positions, *_ in video_dataset(config, "test", config.animation_horizon):
        last, later = config.cond_steps - 1, slice(config.cond_steps, config.animation_horizon)
        psnr.append(-10 * torch.log10((video[later] - video[last]).square().mean((1, 2, 3)) + 1e-8))
        error.append((positions[later] - positions[last]).norm(dim=-1).mean(-1))
    return torch.stack(psnr).mean(0).tolist(), torch.stack(error).mean(0).tolist()


def report(config, measured, still):
    """The table of both, and a graph of them."""
    psnr, error, tracked = (measured[name].means() for name in ("psnr", "position_error", "tracked"))
    print("          PSNR (dB)            position error (pixels)    share of the")
    print("frame     DDLP    still        DDLP    still              balls tracked")
    mean = [sum(values) / len(values) for values in (psnr, still[0], error, still[1], tracked)]
    rows = [
        (config.cond_steps + i, *row)
        for i, row in enumerate(zip(psnr, still[0], error, still[1], tracked, strict=True))
    ]
    for name, a, b, c, d, share in [*rows, ("mean", *mean)]:
        print(f"{name:>5}   {a:6.2f}   {b:6.2f}      {c:6.2f}   {d:6.2f}              {share:6.2f}")
    better = sum(a > b for a, b in zip(psnr, still[0], strict=True))
    nearer = sum(a < b for a, b in zip(error, still[1], strict=True))
    print(f"DDLP beats the still frame at {better} of {len(psnr)} frames in PSNR, at {nearer} in position")
    return horizon_graph(
        {
            "PSNR (dB)": {"DDLP": psnr, "last frame stays": still[0]},
            "position error (pixels)": {"DDLP": error, "last frame stays": still[1]},
            "share of balls tracked": {"DDLP": tracked},
        },
        first=config.cond_steps,
    )


def main():
    parser = argparse.ArgumentParser(usage="%(prog)s [--KEY VALUE ...]", description=__doc__)
    add_override_arguments(parser)
    config = Config.load("demo").replace("command line", **overrides_from(parser.parse_args()))
    started = time.monotonic()
    balls_preparation.main(["--out", config.root, *BALLS.split()])
    accelerator = make_accelerator(config.device, leaves_parameters_unused(config))
    task = DDLPTask(config, accelerator)
    loop = TrainingLoop(task, config, accelerator, resume_command(task.kind, accelerator))
    run = Run.create(config, DDLPTask.kind, accelerator, parent=OUTPUT)
    if not loop.fit(run):
        return leave(loop)
    trained = time.monotonic() - started
    model = loop.bare_model.eval()
    horizon, seen = config.animation_horizon, config.cond_steps
    videos = video_dataset(config, "test", horizon)
    images = ImageMetrics(("psnr",), accelerator.device)
    measured = measure_predictions(model, videos, images, horizon, seen, position=True)
    paths = animate_trajectory_ddlp(
        model, config, 0, accelerator.device, run.path, horizon, cond_steps=seen, mode="test", prefix="test_"
    )
    print(f"\n{len(videos)} held-out videos: {seen} frames are seen, {horizon - seen} predicted")
    save_image(report(config, measured, still_frame(config)), run.path / "predictions.png")
    print(f"{trained:.0f} s of preparing and training, {time.monotonic() - started:.0f} s in all")
    print(f"animations (truth left, prediction right): {paths[0]} ...; graph: {run.path / 'predictions.png'}")
    print(f"ask what if: python what_if.py -p {run.path} --episode 0 --move 0:+0.1,-0.2")


if __name__ == "__main__":
    run_command(main)
