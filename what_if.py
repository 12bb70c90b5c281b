"""Ask a trained DDLP "what if": change particles in the frames that it sees, and compare the two predictions.

  python what_if.py -p RUN_DIR --episode 3                      numbers the particles of the last frame that is seen
  python what_if.py -p RUN_DIR --episode 3 --move 2:+0.1,-0.2 --remove 4 --scale 1:1.3 --horizon 60

The second writes an animation: the truth, the prediction and the altered prediction, with numbered particles. Edits are
applied in the order given, to every frame that the model sees, so that motion is kept. Several particles that make up
one object are edited together: --move 2,5:+0.1,-0.2. Positions are (y, x) from -1 to 1, from the first pixel to the
last, y downwards. Only small changes stay within what the model has learned.

From Python: `what_if(model, video, [Edit("move", (2,), (0.1, -0.2))], horizon=60)`.
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from datasets.get_dataset import first_frames, video_dataset
from eval.eval_model import check_horizon
from modules.particles import VISIBLE, Particles
from rundir.prediction import add_prediction_arguments, open_prediction
from training.loop import preserve_random_state
from utils.animation import ANIMATION_FORMATS, Panel, ground_truth_panel, prediction_panel, save_animation, side_by_side
from utils.errors import UserError, run_command
from utils.files import make_folder
from utils.plotting import enlarge, plot_keypoints_on_image_batch, save_image, zoom_factor

CANVAS = 256  # pixels: smaller frames are enlarged before numbered particles are drawn on them
# What can be done to a particle: the names of the values, and what it does.
EDITS = {
    "move": (("DY", "DX"), "move by so much"),
    "place": (("Y", "X"), "move to where it is there in the last frame seen"),
    "scale": (("FACTOR",), "make it so many times as high and wide"),
    "depth": (("CHANGE",), "move it back (above 0) or to the front"),
    "transparency": (("VALUE",), "set its transparency, 0 (invisible) to 1, and keep it"),
    "appearance": (("OTHER",), "give it the appearance of the particle OTHER"),
    "remove": ((), "make it invisible, for good"),
}
# Of the edits whose value cannot be any number: what it can be.
LEGAL_VALUES = {
    "scale": ("above 0", lambda value: value > 0),
    "transparency": ("0 to 1", lambda value: 0 <= value <= 1),
    "appearance": ("a particle's number", lambda value: value >= 0 and value == int(value)),
}


@dataclass(frozen=True)
class Edit:
    """A change of some particles. kind: a key of `EDITS`, which says how many `values` it has; particles: their
    numbers, from 0. `UserError` where these are not legal."""

    kind: str
    particles: tuple[int, ...]
    values: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in EDITS:
            raise UserError(f"unknown edit {self.kind}; legal: {', '.join(EDITS)}")
        names, given = EDITS[self.kind][0], len(self.values)
        if given != len(names):
            raise UserError(
                f"{self.kind} has {given} values; legal: {len(names)}{' ' if names else ''}{', '.join(names)}"
            )
        if not all(math.isfinite(value) for value in self.values):
            raise UserError(f"{self.kind} is {', '.join(f'{value:g}' for value in self.values)}; legal: finite numbers")
        words, is_legal = LEGAL_VALUES.get(self.kind, ("", lambda value: True))
        if self.values and not is_legal(self.values[0]):
            raise UserError(f"{self.kind} is {self.values[0]:g}; legal: {words}")

    def check(self, count):
        """`UserError` unless there are such particles among `count`."""
        others = [int(self.values[0])] if self.kind == "appearance" else []
        for k in (*self.particles, *others):
            if not 0 <= k < count:
                raise UserError(f"{self.kind}: there is no particle {k}; legal: 0 to {count - 1}")

    def apply(self, particles):
        """`Particles` [B, T, ...], changed in all frames."""
        k = list(self.particles)
        z, z_scale, z_depth, obj_on, z_features = (
            x.clone()
            for x in (particles.z, particles.z_scale, particles.z_depth, particles.obj_on, particles.z_features)
        )
        if self.kind == "move":
            z[:, :, k] += z.new_tensor(self.values)
        elif self.kind == "place":
            z[:, :, k] += z.new_tensor(self.values) - z[:, -1:, k]
        elif self.kind == "scale":
            fraction = torch.sigmoid(z_scale[:, :, k]) * self.values[0]
            z_scale[:, :, k] = fraction.clamp(max=1 - 1e-4).logit()
        elif self.kind == "depth":
            z_depth[:, :, k] += self.values[0]
        elif self.kind == "appearance":
            z_features[:, :, k] = z_features[:, :, [int(self.values[0])]]
        else:
            obj_on[:, :, k] = self.kept_transparency
        return Particles(z, z_scale, z_depth, obj_on, z_features, particles.z_bg)

    @property
    def kept_transparency(self):
        """The transparency that the particles keep in the predicted frames too, or None."""
        return {"remove": 0.0, "transparency": self.values[0] if self.values else None}.get(self.kind)


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
    cond_steps = model.timestep_horizon if cond_steps is None else cond_steps
    check_horizon(horizon, cond_steps)
    if len(video) < cond_steps:
        raise UserError(f"the video has {len(video)} frames; legal: at least cond_steps, {cond_steps}")
    seen = model.track(video[None, :cond_steps])
    altered = seen
    for edit in edits:
        edit.check(seen.z.shape[2])
        altered = edit.apply(altered)
    kept = [(list(edit.particles), edit.kept_transparency) for edit in edits if edit.kept_transparency is not None]

    def keep_transparency(frame):
        obj_on = frame.obj_on.clone()
        for particles, value in kept:
            obj_on[:, :, particles] = value
        return replace(frame, obj_on=obj_on)

    with preserve_random_state():
        predicted = model.predict(seen, horizon - cond_steps, deterministic)
    altered = model.predict(altered, horizon - cond_steps, deterministic, keep_transparency)
    images, altered_images = model.render(predicted)[0], model.render(altered)[0]
    return Comparison(images, predicted.map(lambda x: x[0]), altered_images, altered.map(lambda x: x[0]))


def draw_particles(frames, particles):
    """Frames [T, 3, H, W], enlarged, with the numbered visible ones of `Particles` [T, ...]."""
    # A position that is not a number is not drawn.
    points = particles.z.masked_fill(particles.obj_on[..., None] <= VISIBLE, torch.nan)
    canvas = enlarge(frames.cpu(), zoom_factor(frames, CANVAS))
    return plot_keypoints_on_image_batch(
        points, canvas, radius=3, max_imgs=len(canvas), kp_range=(-1, 1), plot_numbers=True
    )


def comparison_panels(video, compared, cond_steps):
    """The panels of an animation: the truth, a video [T, 3, H, W]; its prediction; the altered prediction. The latter
    two, a `Comparison` of T frames, with numbered particles."""
    predicted = draw_particles(compared.video, compared.particles)
    altered = draw_particles(compared.altered_video, compared.altered_particles)
    return [
        ground_truth_panel(enlarge(video, zoom_factor(video, CANVAS))),
        prediction_panel(predicted, cond_steps),
        Panel(altered, [f"WHAT IF:{t}" for t in range(len(altered))], ["orange"] * len(altered)),
    ]


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


def parse_edit(kind, text):
    """The `Edit` in ``K[,K...][:VALUE[,VALUE...]]``."""
    names, _ = EDITS[kind]
    numbers, _, values = text.partition(":")
    try:
        particles = tuple(int(number) for number in numbers.split(","))
        values = tuple(float(value) for value in values.split(",")) if values else ()
    except ValueError:
        raise UserError(f"--{kind} {text}: not numbers; legal: --{kind} {_form(names)}") from None
    try:
        return Edit(kind, particles, values)
    except UserError as error:
        raise UserError(f"--{kind} {text}: {error}") from None


def _form(names):
    return f"K{':' if names else ''}{','.join(names)}"


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_prediction_arguments(parser, horizon="the run's animation_horizon")
    parser.add_argument("--episode", type=int, default=0, metavar="N", help="which video, from 0 (default: 0)")
    parser.add_argument("--format", choices=ANIMATION_FORMATS, default="gif", help="of the animation (default: gif)")
    parser.add_argument("--out", metavar="PATH", help="file to write (default: RUN_DIR/what_if/episode_N.gif)")
    group = parser.add_argument_group("edits", "K is a particle's number, or several: 2,5")
    for kind, (names, meaning) in EDITS.items():
        group.add_argument(f"--{kind}", action=_CollectEdit, metavar=_form(names), help=meaning)
    parser.set_defaults(edits=[])
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    edits = [parse_edit(kind, text) for kind, text in args.edits]
    request = open_prediction(args)
    videos = video_dataset(request.config, request.mode, request.horizon)
    if not 0 <= args.episode < len(videos):
        raise UserError(f"--episode is {args.episode}; legal: 0 to {len(videos) - 1}")
    video = first_frames(videos[args.episode], request.horizon)[0]
    if edits:
        show_comparison(args, request, video, edits)
    else:
        show_particles(args, request, video)


def output_path(args, request, default):
    """Where to write: --out, or a file in RUN_DIR/what_if."""
    path = Path(args.out) if args.out else request.run.path / "what_if" / default
    make_folder(path.parent)
    return path


def show_particles(args, request, video):
    particles = request.model.track(video[None, : request.cond_steps].to(request.device)).map(lambda x: x[0, -1:].cpu())
    path = output_path(args, request, f"episode_{args.episode}_particles.png")
    save_image(draw_particles(video[request.cond_steps - 1 : request.cond_steps], particles)[0], path)
    print("\n".join(describe(particles.map(lambda x: x[0]))))
    print(path)


def show_comparison(args, request, video, edits):
    compared = what_if(
        request.model, video.to(request.device), edits, request.horizon, request.cond_steps, request.deterministic
    )
    path = output_path(args, request, f"episode_{args.episode}.{args.format}")
    panels = comparison_panels(video, compared, request.cond_steps)
    save_animation(side_by_side(panels), path, request.config.animation_fps)
    print(path)


if __name__ == "__main__":
    run_command(main)
