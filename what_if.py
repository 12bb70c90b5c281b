"""Ask a trained model "what if": change particles in the frames that it sees, and compare the two predictions.

  python what_if.py -p RUN_DIR --episode 3                      numbers the particles of the last frame that is seen
  python what_if.py -p RUN_DIR --episode 3 --move 2:+0.1,-0.2 --remove 4 --scale 1:1.3 --horizon 60
  python what_if.py -p RUN_DIR --video my.mp4 --move 2@9:+0.1,-0.2
  python what_if.py --edits FILE

The second writes an animation: the truth, the prediction and the altered prediction, with numbered particles; for a
DLPv2, which predicts nothing, an image. A DiffuseDDLP generates the first frames, from --seed. Edits are applied in the
order given, to every frame that the model sees, so that motion is kept, or (third) to one of them, from where they fade
out to the first and the last: so motion is changed. Several particles that make up one object are edited together:
--move 2,5:+0.1,-0.2. Positions are (y, x) from -1 to 1, from the first pixel to the last, y downwards. Only small
changes stay within what the model has learned. The last replays what interactive_gui.py saved.

From Python: `what_if(model, video, [Edit("move", (2,), (0.1, -0.2))], horizon=60)`, with `rundir.edits.Edit`.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from datasets.examples import read_clip
from datasets.get_dataset import first_frames, image_dataset, video_dataset
from eval.eval_model import check_horizon
from models import ObjectDynamicsDLP
from modules.particles import VISIBLE, Particles
from rundir.edits import EDITS, EditFile, apply_edits, constraint, edit_form, parse_edit
from rundir.prediction import add_prediction_arguments, open_prediction, particle_config
from utils.animation import (
    ANIMATION_FORMATS,
    Panel,
    animation_format,
    ground_truth_panel,
    prediction_panel,
    save_animation,
    side_by_side,
)
from utils.errors import UserError, run_command
from utils.files import given_path, make_folder
from utils.plotting import check_image_name, enlarge, plot_keypoints_on_image_batch, save_image, zoom_factor
from utils.random_state import preserve_random_state

FRAMES_AT_ONCE = 8  # drawn between two reports of progress
CANVAS = 256  # pixels: smaller frames are enlarged before numbered particles are drawn on them


@dataclass
class Comparison:
    """Two predictions of one video, [T, ...] each: images [T, 3, H, W], and the `Particles` that they show."""

    video: torch.Tensor
    particles: Particles
    altered_video: torch.Tensor
    altered_particles: Particles


@torch.no_grad()
def what_if(model, video, edits, horizon=60, cond_steps=None, deterministic=True):
    """Predict a video with and without a list of `Edit`s.

    model: an `ObjectDynamicsDLP` in eval mode; video: [F, 3, H, W] in 0..1, whose first `cond_steps` frames (default
    the model's T) are seen; horizon: frames in all. Returns a `Comparison` of `horizon` frames. With `deterministic`
    False both predictions are made of the same random draws.
    """
    if not isinstance(model, ObjectDynamicsDLP):
        raise TypeError(f"a model of type {type(model).__name__}; legal: an ObjectDynamicsDLP (DDLP), which predicts")
    if video.dim() != 4:
        raise ValueError(f"a video of shape {list(video.shape)}; legal: one video [F, 3, H, W]")
    cond_steps = model.timestep_horizon if cond_steps is None else cond_steps
    check_horizon(horizon, cond_steps)
    if len(video) < cond_steps:
        raise UserError(f"the video has {len(video)} frames; legal: at least cond_steps, {cond_steps}")
    return compare(model, model.track(video[None, :cond_steps]), edits, horizon, deterministic)


@torch.no_grad()
def compare(model, seen, edits, horizon, deterministic=True, report=lambda share: None):
    """`what_if` of `Particles` [1, T, ...] that are known already; of any particle model where the horizon is T.
    report: called now and then with the share that is done, 0 to 1."""
    altered, unseen = apply_edits(seen, edits), horizon - seen.z.shape[1]
    done, total, keep = 0, 2 * (unseen + horizon), constraint(edits)

    def note(frames, count=1):
        nonlocal done
        done += count
        report(done / total)
        return frames

    if unseen:
        with preserve_random_state():
            predicted = model.predict(seen, unseen, deterministic, note)
        seen, altered = predicted, model.predict(altered, unseen, deterministic, lambda frame: note(keep(frame)))
    videos = []
    for particles in (seen, altered):
        parts = [particles.frames(slice(t, t + FRAMES_AT_ONCE)) for t in range(0, horizon, FRAMES_AT_ONCE)]
        videos.append(torch.cat([note(model.render(part)[0], part.z.shape[1]) for part in parts]))
    return Comparison(videos[0], seen.map(lambda x: x[0]), videos[1], altered.map(lambda x: x[0]))


def draw_particles(frames, particles):
    """Frames [T, 3, H, W], enlarged, with the numbered visible ones of `Particles` [T, ...]."""
    # A position that is not a number is not drawn.
    points = particles.z.masked_fill(particles.obj_on[..., None] <= VISIBLE, torch.nan)
    canvas = enlarge(frames.cpu(), zoom_factor(frames, CANVAS))
    return plot_keypoints_on_image_batch(
        points, canvas, radius=3, max_imgs=len(canvas), kp_range=(-1, 1), plot_numbers=True
    )


def describe(particles):
    """A line per particle of one frame's `Particles` [K, ...]."""
    sides = torch.sigmoid(particles.z_scale)
    lines = ["particle   y      x      height width  transparency"]
    for k in range(len(particles.z)):
        numbers = [*particles.z[k].tolist(), *sides[k].tolist(), particles.obj_on[k].item()]
        lines.append(
            f"{k:>8}   "
            + " ".join(f"{number:<+6.2f}" if i < 2 else f"{number:<6.2f}" for i, number in enumerate(numbers))
        )
    return lines


class _CollectEdit(argparse.Action):
    """Appends an edit's name and text to one list, so that edits of all kinds stay in order."""

    def __call__(self, parser, namespace, text, option=None):
        namespace.edits = [*namespace.edits, (self.dest, text)]


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_prediction_arguments(parser, horizon="the run's animation_horizon", needs_path=False)
    parser.add_argument("--episode", type=int, metavar="N", help="which of the data set's, from 0 (default: 0)")
    parser.add_argument(
        "--video", type=given_path, metavar="PATH", help="a video, folder of frames or image of one's own instead"
    )
    parser.add_argument("--format", choices=ANIMATION_FORMATS, help="of the animation (default: gif)")
    parser.add_argument(
        "--out", type=given_path, metavar="PATH", help="file to write (default: RUN_DIR/what_if/episode_N.gif)"
    )
    parser.add_argument(
        "--edits",
        dest="file",
        type=given_path,
        metavar="FILE",
        help="edits that the editor saved, and all that is not given beside it",
    )
    group = parser.add_argument_group(
        "edits", "K is a particle's number, or several: 2,5; FRAME changes one of the seen frames, from 0, not all"
    )
    for kind, (_, meaning) in EDITS.items():
        group.add_argument(f"--{kind}", action=_CollectEdit, metavar=edit_form(kind), help=meaning)
    parser.set_defaults(edits=[], seed=None)
    args = parser.parse_args(arguments)
    if args.path is None and args.file is None:
        parser.error("the following arguments are required: -p/--path, or --edits")
    if args.video is not None and args.episode is not None:
        parser.error("--video and --episode are two things to see; legal: one of them")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    edits = [parse_edit(kind, text) for kind, text in args.edits]
    if args.file is not None:
        edits = [*take_over(args, EditFile.read(args.file)), *edits]
    if args.seed is None:
        args.seed = 0
    request = open_prediction(args, kinds=("ddlp", "dlp", "diffuse_ddlp"))
    check_output(args, is_animation=bool(edits) and request.horizon > 1)
    source = open_source(args, request)
    if edits:
        show_comparison(args, request, source, edits)
    else:
        show_particles(args, request, source)


def take_over(args, file):
    """Set the arguments that are not given to what an `EditFile` says; returns its edits."""
    if args.path is None:
        args.path = file.model
    if args.video is None and args.episode is None:
        args.video = file.video
    if args.cond_steps == -1:
        args.cond_steps = file.cond_steps
    if args.horizon is None:
        args.horizon = file.horizon
    if args.seed is None:
        args.seed = file.seed
    return file.edits


@dataclass
class Source:
    """What is asked about: the `Particles` [1, T, ...] of the frames that are seen, the frames that there are
    [F, 3, H, W] (of what is generated None), and a name for what is written."""

    particles: Particles
    frames: torch.Tensor | None
    name: str


def open_source(args, request):
    """The `Source` that the arguments name."""
    if request.diffusion is not None:
        if args.video is not None or args.episode is not None:
            raise UserError(f"{request.run.path}: a DiffuseDDLP sees nothing; legal: --seed, no --video or --episode")
        particles = request.diffusion.sample_particles(1, request.cond_steps, seed=args.seed)
        return Source(particles, None, f"seed_{args.seed}")
    if args.video is not None:
        frames, name = read_clip(args.video, request.config.image_size, request.horizon), Path(args.video).stem
        if len(frames) < request.cond_steps:
            raise UserError(f"{args.video}: has {len(frames)} frames; legal: at least the {request.cond_steps} seen")
    else:
        episode = args.episode or 0
        frames, name = read_episode(request, episode), f"episode_{episode}"
    seen = frames[None, : request.cond_steps].to(request.device)
    return Source(request.model.track(seen), frames, name)


def read_episode(request, episode):
    """The first `horizon` frames [F, 3, H, W] of a video of the data set, or one image as a video."""
    is_image = request.run.kind == "dlp"
    data = (
        image_dataset(request.config, request.mode)
        if is_image
        else video_dataset(request.config, request.mode, request.horizon)
    )
    if not 0 <= episode < len(data):
        raise UserError(f"--episode is {episode}; legal: 0 to {len(data) - 1}")
    item = data[episode]
    return item[0].reshape(-1, *item[0].shape[-3:])[:1] if is_image else first_frames(item, request.horizon)[0]


def check_output(args, is_animation):
    """`UserError`, before anything is computed, where --out or --format does not fit what is written."""
    if not is_animation and args.format is not None:
        raise UserError(f"--format is {args.format}, but an image is written; legal: with edits of a video")
    if args.out is None:
        return
    if not is_animation:
        check_image_name(args.out)
    elif args.format not in (None, animation_format(args.out)):
        raise UserError(f"--format is {args.format}, but --out is {args.out}; legal: one of them, or the same")


def output_path(args, request, default):
    """Where to write: --out, or a file in RUN_DIR/what_if."""
    path = Path(args.out) if args.out is not None else request.run.path / "what_if" / default
    make_folder(path.parent)
    return path


def show_particles(args, request, source):
    """Write the last frame seen, with numbered particles, and print where they are."""
    particles = source.particles.map(lambda x: x[0, -1:].cpu())
    if source.frames is None:
        image = request.model.render(source.particles.frames(slice(-1, None)))[0]
    else:
        image = source.frames[request.cond_steps - 1 : request.cond_steps]
    path = output_path(args, request, f"{source.name}_particles.png")
    save_image(draw_particles(image, particles)[0], path)
    print("\n".join(describe(particles.map(lambda x: x[0]))))
    print(path)


def show_comparison(args, request, source, edits):
    """Write the truth, where there is any, the prediction and the altered prediction side by side."""
    compared = compare(request.model, source.particles, edits, request.horizon, request.deterministic)
    panels = comparison_panels(compared, source.frames, request.cond_steps)
    if request.horizon == 1:
        path = output_path(args, request, f"{source.name}.png")
        save_image(torch.from_numpy(side_by_side(panels)[0]).permute(2, 0, 1) / 255, path)
    else:
        path = output_path(args, request, f"{source.name}.{args.format or 'gif'}")
        save_animation(side_by_side(panels), path, particle_config(request.run).animation_fps)
    print(path)


def comparison_panels(compared, truth=None, cond_steps=1):
    """The `Panel`s of a `Comparison`: the frames `truth` [F, 3, H, W], if there are any, as far as they go, the
    prediction, and the altered prediction, with numbered particles."""
    altered = draw_particles(compared.altered_video, compared.altered_particles)
    count = len(altered)
    panels = [
        prediction_panel(draw_particles(compared.video, compared.particles), cond_steps),
        Panel(altered, [f"WHAT IF:{t}" for t in range(count)], ["orange"] * count),
    ]
    if truth is None:
        return panels
    truth = enlarge(truth[:count].cpu(), zoom_factor(truth, CANVAS))
    missing = count - len(truth)  # they are white
    recorded = ground_truth_panel(torch.cat([truth, truth.new_ones(missing, *truth.shape[1:])]))
    if missing:
        recorded.labels[-missing:], recorded.colors[-missing:] = [""] * missing, ["white"] * missing
    return [recorded, *panels]


if __name__ == "__main__":
    run_command(main)
