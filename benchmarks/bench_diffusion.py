"""How good what a DiffuseDDLP generates is, by sampler and number of steps, and how long it takes.

    python benchmarks/bench_diffusion.py -p RUN_DIR
    python benchmarks/bench_diffusion.py -p RUN_DIR --samples 200 --samplers ddpm dpm++:10 dpm++:20 ddim:50

The particles of generated first frames are compared with those of held-out videos, which the same DDLP encodes:

- for each attribute the Wasserstein-1 distance between the two distributions of its values over all visible
  particles (transparency over 0.5) and frames, in standard deviations of the held-out values; of the two coordinates
  of position and of scale, and of the appearance's dimensions, the mean. "motion" is the change of position from frame
  to frame, and "transparency" that of all particles. The last column is the mean of these;
- the mean number of visible particles per frame;
- the sharpness of decoded frames: the mean gradient's length (differences of neighbouring pixels), as a fraction of
  that of the held-out videos as the DDLP reconstructs them.

The row "training set" compares as many clips of the training set with the held-out ones: what chance alone leaves.
All samplers begin with the same noise. Writes RUN_DIR/eval/diffusion.json, and its graph, .png.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.get_dataset import get_video_dataset
from modules.particles import VISIBLE
from rundir.diffusion_run import DiffusionRun
from utils.errors import UserError, run_command
from utils.files import atomic_write, make_folder, write_json
from utils.legal import illegal

BATCH = 50  # clips encoded or drawn at a time
ATTRIBUTES = ("position", "motion", "scale", "depth", "transparency", "appearance", "background")
SAMPLERS = ("ddpm", "ddim:10", "ddim:25", "ddim:50", "dpm++:10", "dpm++:20", "dpm++:25", "dpm++:50")
MARGIN = 0.05  # a fast sampler is as good as ddpm if its mean distance is at most so much larger


# ---- what is compared


def clips_of(run, mode, number):
    """The first `number` clips of `diffuse_frames` frames of a part of the data set, spread over it and, where there
    are so many, without common frames: a list of [T, C, H, W]."""
    config, ddlp = run.config, run.ddlp_config
    frames = config.diffuse_frames
    episodes = get_video_dataset(config.ds, config.ds_root, frames, mode, ddlp.image_size, cache=config.cache)
    if mode == "train":
        indices = torch.linspace(0, len(episodes) - 1, min(number, len(episodes))).int().tolist()
        return [episodes[index][0] for index in indices]
    clips = [clip for index in range(len(episodes)) for clip in episodes[index][0].split(frames)]
    return [clip for clip in clips if len(clip) == frames][:number]


def particles_of(model, clips):
    """The `Particles` [N, T, ...] that clips are encoded as, in one."""
    batches = [torch.stack(clips[first : first + BATCH]) for first in range(0, len(clips), BATCH)]
    tokens = torch.cat([model.encode(batch)[0] for batch in tqdm(batches, "encoding", leave=False)])
    return model.layout.unpack(tokens)


def values_of(particles):
    """The values that are compared: an attribute's name to a list of 1-D arrays, one per dimension."""
    visible = particles.obj_on > VISIBLE
    moving = visible[:, 1:] & visible[:, :-1]
    values = {
        "position": particles.z[visible],
        "motion": (particles.z[:, 1:] - particles.z[:, :-1])[moving],
        "scale": particles.z_scale[visible],
        "depth": particles.z_depth[visible],
        "transparency": particles.obj_on.reshape(-1, 1),
        "appearance": particles.z_features[visible],
        "background": particles.z_bg.flatten(0, 1),
    }
    return {name: [column.numpy() for column in value.T] for name, value in values.items()}


def distances(values, reference):
    """The mean Wasserstein-1 distance of each attribute's dimensions, in standard deviations of the `reference`."""
    return {
        name: sum(
            wasserstein_distance(mine, theirs) / max(theirs.std(), 1e-6) if len(mine) else float("inf")
            for mine, theirs in zip(values[name], reference[name], strict=True)
        )
        / len(reference[name])
        for name in ATTRIBUTES
    }


def sharpness(model, particles):
    """The mean length of the gradient of decoded frames."""
    total = 0.0
    for batch in tqdm(range(0, len(particles.z), BATCH), "decoding", leave=False):
        x = model.ddlp.render(particles.map(lambda entry, first=batch: entry[first : first + BATCH]))
        dy, dx = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
        total += (dy**2 + dx**2).sqrt().mean((1, 2, 3, 4)).sum().item()
    return total / len(particles.z)


def measured(model, particles, reference):
    """One row: the distances to `reference` (as of `values_of`), their mean, visible particles per frame, sharpness."""
    row = distances(values_of(particles), reference)
    row["mean"] = sum(row.values()) / len(row)
    row["visible"] = (particles.obj_on > VISIBLE).float().sum(-1).mean().item()
    row["sharpness"] = sharpness(model, particles)
    return row


def generate(model, noise, sampler, steps, seed):
    """The `Particles` that a sampler makes of noise [N, T, K + 1, F]."""
    generator = torch.Generator(noise.device).manual_seed(seed)
    tokens = [
        model.diffusion.sample(
            sampler=sampler,
            steps=steps,
            noise=part,
            mask=model.sampling_mask,
            generator=generator,
            progress=lambda times: tqdm(times, f"{sampler} {steps or ''}", leave=False),
        )
        for part in noise.split(len(noise) if sampler != "ddpm" else 4 * BATCH)
    ]
    return model.particles_of(torch.cat(tokens))


# ---- the report


def table(rows):
    """The rows (name to measures) as lines."""
    heads = (*ATTRIBUTES, "mean", "visible", "sharpness", "seconds")
    lines = [f"{'':14}" + "".join(f"{head:>13}" for head in heads)]
    for name, row in rows.items():
        cells = [f"{row[head]:13.3f}" if head in row else f"{'-':>13}" for head in heads]
        lines.append(f"{name:14}" + "".join(cells))
    return "\n".join(lines)


def graph(rows):
    """Mean distance and sharpness by the number of steps, a curve for each fast sampler; ddpm and chance as levels."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    curves = {}
    for name in rows:
        sampler, _, steps = name.partition(":")
        if steps:
            curves.setdefault(sampler, []).append((int(steps), rows[name]))
    labels = {"mean": "mean Wasserstein distance (std)", "sharpness": "sharpness (1: held-out)"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for sampler, points in curves.items():
            points = sorted(points, key=lambda point: point[0])
            axes.plot([steps for steps, _ in points], [row[key] for _, row in points], "o-", label=sampler)
        for name, style in (("ddpm", "--"), ("training set", ":")):
            if name in rows:
                axes.axhline(rows[name][key], color="black", linestyle=style, label=name)
        steps = sorted({steps for points in curves.values() for steps, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(steps, map(str, steps))
        axes.set_xticks([], minor=True)
        axes.set(xlabel="steps", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def verdict(rows):
    """Which fast samplers come within MARGIN of ddpm's mean distance."""
    if "ddpm" not in rows:
        return "ddpm was not measured"
    limit = (1 + MARGIN) * rows["ddpm"]["mean"]
    good = [name for name, row in rows.items() if ":" in name and row["mean"] <= limit]
    return f"at most {MARGIN:.0%} above ddpm's mean distance {rows['ddpm']['mean']:.3f}: {', '.join(good) or 'none'}"


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-p", "--path", metavar="RUN_DIR", required=True, help="run directory of a DiffuseDDLP")
    parser.add_argument(
        "--samplers", nargs="+", default=SAMPLERS, metavar="NAME[:STEPS]", help=f"({' '.join(SAMPLERS)})"
    )
    parser.add_argument("--samples", type=int, default=500, metavar="N", help="clips to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (%(default)s)")
    args = parser.parse_args(arguments)
    if args.samples < 2:
        raise UserError(f"--samples is {args.samples}; legal: at least 2")
    return args


def parsed_sampler(text):
    """ "ddim:25" -> ("ddim", 25), "ddpm" -> ("ddpm", None)."""
    sampler, colon, steps = text.partition(":")
    if colon and not steps.isdecimal():
        raise illegal("--samplers", text, "NAME or NAME:STEPS, as in ddim:25")
    return sampler, int(steps) if colon else None


def main(arguments=None):
    args = parse_arguments(arguments)
    samplers = {text: parsed_sampler(text) for text in args.samplers}
    run = DiffusionRun.open(args.path)
    model = run.load_model()
    held_out = particles_of(model, clips_of(run, "test", args.samples))
    reference = values_of(held_out)
    shape = (args.samples, run.config.diffuse_frames, model.num_tokens, model.layout.width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    rows = {
        "held out": {"visible": (held_out.obj_on > VISIBLE).float().sum(-1).mean().item()},
        "training set": measured(model, particles_of(model, clips_of(run, "train", args.samples)), reference),
    }
    for text, (sampler, steps) in samplers.items():
        if sampler != "ddpm":  # what is only imported when it is needed takes seconds
            generate(model, noise[:1], sampler, 1, args.seed)
        started = time.perf_counter()
        particles = generate(model, noise, sampler, steps, args.seed)
        seconds = time.perf_counter() - started
        rows[text] = {**measured(model, particles, reference), "seconds": seconds}
    scale = sharpness(model, held_out)
    rows["held out"]["sharpness"] = scale
    for row in rows.values():
        row["sharpness"] /= scale
    lines = f"{len(held_out.z)} held-out clips, {args.samples} generated\n{table(rows)}\n{verdict(rows)}"
    print(lines)
    folder = make_folder(run.path / "eval")
    write_json(folder / "diffusion.json", rows)
    with atomic_write(folder / "diffusion.png") as part:
        graph(rows).savefig(part)
    print(f"{folder / 'diffusion.json'}, {folder / 'diffusion.png'}")


if __name__ == "__main__":
    run_command(main)
