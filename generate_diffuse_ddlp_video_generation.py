"""Generate videos from nothing with a trained DiffuseDDLP:
``python generate_diffuse_ddlp_video_generation.py -c RUN_DIR/diffusion_hparams.json -b 5 -n 10``.

Writes RUN_DIR/figures/{i}_traj_anim.gif or, with --image, RUN_DIR/figures/{i}_frames.png: the frames t = 1, 10, 15, 20,
30 and 40, counted from 1. The videos depend on the seed and on how many there are, not on how many are made at a time.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from modules.diffusion_modules import DEFAULT_SAMPLER, DEFAULT_STEPS, SAMPLERS
from rundir.diffusion_run import DiffusionRun
from utils.animation import ANIMATION_FORMATS, generated_panel, save_animation, side_by_side
from utils.device import add_device_arguments, device_of
from utils.errors import UserError, run_command
from utils.files import given_path, make_folder
from utils.plotting import save_image
from utils.progress import progress_bar

IMAGE_TIMES = (1, 10, 15, 20, 30, 40)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    help_ = "run directory, ours or a published one, or its .json"
    add("-c", "--config", type=given_path, metavar="PATH", required=True, help=help_)
    add("-n", "--num_videos", type=int, default=5, metavar="N", help="videos (default: 5)")
    add("-b", "--batch_size", type=int, default=5, metavar="N", help="videos made at a time (default: 5)")
    add("--image", action="store_true", help=f"a row of the frames {', '.join(map(str, IMAGE_TIMES))} of each video")
    add("--horizon", type=int, metavar="N", help="frames of a video (default: the DDLP's animation_horizon)")
    add("--sampler", choices=SAMPLERS, help=f"of the diffusion (default: the run's, {DEFAULT_SAMPLER} if it has none)")
    help_ = f"denoising steps (default: the run's, or {DEFAULT_STEPS} of another sampler; ddpm always takes all)"
    add("--steps", type=int, metavar="N", help=help_)
    help_ = "keep the tokens' padding at 0, as in training (default: the run's mask_samples; a published run does not)"
    add("--mask_samples", action="store_true", help=help_)
    add("--seed", type=int, default=0, metavar="N", help="seed of the noise (default: 0)")
    add("--format", choices=ANIMATION_FORMATS, help="of the animations (default: gif)")
    add("--checkpoint", type=given_path, metavar="FILE", help="weights (default: the run's saves/model.pth)")
    add_device_arguments(parser)
    args = parser.parse_args(arguments)
    for option, value in (("-n/--num_videos", args.num_videos), ("-b/--batch_size", args.batch_size)):
        if value < 1:
            parser.error(f"{option} is {value}; legal: at least 1")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed is {args.seed}; legal: from 0 to 2^32 - 1")
    if args.image and args.format is not None:
        parser.error("--format is of animations; legal: without --image")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    run = DiffusionRun.open(args.config)
    horizon = run.ddlp_config.animation_horizon if args.horizon is None else args.horizon
    if horizon < run.config.diffuse_frames:
        raise UserError(f"--horizon is {horizon}; legal: diffuse_frames {run.config.diffuse_frames} or more")
    if args.mask_samples:
        run.config = run.config.replace(mask_samples=True)
    sampler, steps = run.config.sampling(args.sampler, args.steps, "--steps")
    model = run.load_model(device_of(args), args.checkpoint)
    make_folder(run.figures)
    # The noise of all videos is drawn at once, so that it does not depend on the batches; predicting and drawing the
    # frames is what takes memory.
    first = model.sample_particles(
        args.num_videos,
        run.config.diffuse_frames,
        sampler=sampler,
        steps=steps,
        seed=args.seed,
        progress=partial(progress_bar, desc="denoising", dynamic_ncols=True),
    )
    write = write_images if args.image else partial(write_animations, suffix=args.format or "gif")
    write(run, model.ddlp, batches(first, args.batch_size), horizon)


def batches(particles, batch_size):
    """`Particles` [n, ...] as batches, under a progress bar: the number of the first video, and the batch."""
    with progress_bar(total=len(particles.z), desc="videos", dynamic_ncols=True) as bar:
        for start in range(0, len(particles.z), batch_size):
            batch = particles.map(lambda x, start=start: x[start : start + batch_size])
            yield start, batch
            bar.update(len(batch.z))


def write_animations(run, ddlp, batches, horizon, suffix):
    """Write figures/{i}_traj_anim.{suffix} of every video."""
    diffused = run.config.diffuse_frames
    for start, first in batches:
        videos = ddlp.render(ddlp.predict(first, horizon - diffused))
        for i, frames in enumerate(videos, start):
            path = run.figures / f"{i}_traj_anim.{suffix}"
            save_animation(side_by_side([generated_panel(frames, diffused)]), path, run.ddlp_config.animation_fps)
            tqdm.write(str(path))


def write_images(run, ddlp, batches, horizon):
    """Write figures/{i}_frames.png of every video: its frames at `IMAGE_TIMES`, as far as the horizon reaches."""
    diffused, times = run.config.diffuse_frames, [t for t in IMAGE_TIMES if t <= horizon]
    if len(times) < len(IMAGE_TIMES):
        beyond = ", ".join(str(t) for t in IMAGE_TIMES if t > horizon)
        warnings.warn(f"t = {beyond} left out: --horizon is {horizon}; legal for all: {IMAGE_TIMES[-1]}", stacklevel=1)
    for start, first in batches:
        particles = ddlp.predict(first, max(times[-1] - diffused, 0))
        videos = ddlp.render(particles.frames([t - 1 for t in times]))
        for i, frames in enumerate(videos, start):
            path = run.figures / f"{i}_frames.png"
            save_image(frame_row(frames, times, diffused), path)
            tqdm.write(str(path))


def frame_row(frames, times, diffuse_frames):
    """Some frames [n, 3, H, W] of a video, at the given times, beside each other as `generated_panel` shows them:
    [3, h, w]."""
    panels = [generated_panel(frame[None], diffuse_frames, t) for t, frame in zip(times, frames, strict=True)]
    return torch.from_numpy(side_by_side(panels)[0]).permute(2, 0, 1) / 255


if __name__ == "__main__":
    run_command(main)
