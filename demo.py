"""Show what the shipped models do: particles found in images, a future predicted, a question answered and a video made
from nothing: ``make demo``. Writes a page of pictures and numbers, demo_output/index.html."""

import argparse
import sys
import time
from html import escape
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from datasets.examples import Examples
from eval.eval_gen_metrics import LABELS, curves_by_method, measure_predictions, measure_reconstructions
from eval.eval_model import draw_dlp
from eval.image_metrics import ImageMetrics
from eval.tracking import pixel_positions
from modules.particles import VISIBLE
from rundir import load_model
from rundir.edits import Edit
from utils.animation import generated_panel, ground_truth_panel, prediction_panel, save_animation, side_by_side
from utils.device import add_device_arguments, device_of
from utils.errors import run_command
from utils.files import atomic_write, make_folder
from utils.plotting import horizon_graph, save_image
from what_if import comparison_panels, what_if

ROOT = Path(__file__).resolve().parent
SEEN, HORIZON = 10, 40  # frames of a video: those that the model sees, and all
AHEAD = (1, 5, 10, 20, 30)  # frames after the last one seen, of the table
SHOWN = 3  # videos
FRAME_SECONDS = 0.08
MOVE = 0.35  # of an object towards the middle, in units of -1..1


def decompose(model, examples, folder):
    """DLPv2 on example images: the grid of pictures, and a line of numbers."""
    images = torch.stack([video for video, *_ in examples]).to(_device(model))
    grid = folder / "decomposed.png"
    save_image(draw_dlp(model, images)["image"], grid)
    measured = measure_reconstructions(model, examples, _image_metrics(model), position=True)
    return [grid], [[LABELS[name], f"{value:.2f}"] for name, value in measured.items()]


def predict(model, examples, folder):
    """DDLP's predictions of example videos: animations beside the truth, curves, and a table with the baselines."""
    paths = [folder / f"predicted_{i}.gif" for i in range(SHOWN)]
    for i, path in enumerate(paths):
        video = examples[i][0][:HORIZON].to(_device(model))
        with torch.no_grad():
            prediction = model.sample(video[None], HORIZON - SEEN, deterministic=True, cond_steps=SEEN)[0]
        _animate([ground_truth_panel(video), prediction_panel(prediction, SEEN)], path)
    over_time = measure_predictions(
        model, examples, _image_metrics(model), HORIZON, SEEN, position=True, baselines=True, batch_size=5
    )
    curves = curves_by_method(over_time)
    save_image(horizon_graph(curves, first=SEEN), folder / "predicted.png")
    rows = [["", *(f"{n} ahead" for n in AHEAD)]]
    for label, by_method in curves.items():
        for method, values in by_method.items():
            rows.append([f"{label}: {method}", *(f"{values[n - 1]:.2f}" for n in AHEAD)])
    return [*paths, folder / "predicted.png"], rows


def ask_what_if(model, examples, folder):
    """What DDLP predicts if the first object had been nearer to the middle: an animation, and the edit in words."""
    video, positions, sizes, *_ = (entry[:HORIZON].to(_device(model)) for entry in examples[0])
    edit = move_first_object(model, video, positions, sizes)
    compared = what_if(model, video, [edit], HORIZON, SEEN)
    path = folder / "what_if.gif"
    _animate(comparison_panels(compared, video, SEEN), path)
    particles = ",".join(map(str, edit.particles))
    return [path], [
        ["particles moved", particles],
        ["by (y, x), in units of -1..1", "{:+.2f}, {:+.2f}".format(*edit.values)],
    ]


def move_first_object(model, video, positions, sizes):
    """The `Edit` that moves the first object towards the middle: all visible particles within it in the last frame that
    is seen, or else the nearest one.

    video: [T, 3, H, W]; positions: [T, n, 2] and sizes: [T, n], pixels.
    """
    with torch.no_grad():
        particles = model.track(video[None, :SEEN]).map(lambda x: x[0, -1])
    centre, radius = positions[SEEN - 1, 0], sizes[SEEN - 1, 0]
    distance = (pixel_positions(particles.z, video.shape[-1]) - centre).norm(dim=-1)
    distance = distance.masked_fill(particles.obj_on <= VISIBLE, torch.inf)
    chosen = (distance < radius).nonzero()[:, 0].tolist() or [int(distance.argmin())]
    towards = -particles.z[chosen].mean(0)
    shift = MOVE * towards / towards.norm().clamp(min=1e-6)
    return Edit("move", tuple(chosen), tuple(shift.tolist()))


def generate(model, folder):
    """Videos that DiffuseDDLP makes from noise."""
    videos = model.sample(SHOWN, HORIZON, seed=0)
    path = folder / "generated.gif"
    _animate([generated_panel(video, model.config.diffuse_frames) for video in videos], path)
    return [path], [
        ["frames drawn by the diffusion", str(model.config.diffuse_frames)],
        ["frames in all", str(HORIZON)],
    ]


def write_page(sections, path):
    """Write the page of sections, (heading, sentence, pictures in the page's folder, rows of a table) each."""
    body = []
    for heading, sentence, pictures, rows in sections:
        body += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(sentence)}</p>"]
        body += [f'<img src="{picture.name}" alt="{escape(heading)}">' for picture in pictures]
        cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        body += ["<table>", *(f"<tr>{row}</tr>" for row in cells), "</table>"]
    page = PAGE.format(title="Deep latent particles", body="\n".join(body))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }}
img {{ max-width: 100%; margin: 0.3em 0; }}
td {{ padding: 0.1em 1em 0.1em 0; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo_output", metavar="PATH", help="folder to write to (%(default)s)")
    add_device_arguments(parser)
    args = parser.parse_args(arguments)
    started, device, folder = time.monotonic(), device_of(args), make_folder(args.out)
    shapes, balls = (Examples(ROOT / "assets" / name) for name in ("shapes", "balls"))
    dlp, ddlp, diffuse_ddlp = (
        load_model(ROOT / "checkpoints" / name, device) for name in ("dlp-shapes", "ddlp-balls", "diffuse-ddlp-balls")
    )
    sections = []
    for heading, sentence, show in (
        (
            "An image becomes particles",
            "DLPv2 on images that it was not trained on. The rows: the image, its particles, what is drawn from them,"
            " where particles were proposed, the most confident ones, the foreground, boxes, the background.",
            lambda: decompose(dlp, shapes, folder),
        ),
        (
            "A future is predicted",
            f"DDLP sees {SEEN} frames of videos that it was not trained on (blue), and predicts the others (green). Two"
            " simple predictions to beat: the last frame stays, and the particles go straight on.",
            lambda: predict(ddlp, balls, folder),
        ),
        (
            "What if an object had been moved",
            "The first ball is moved in the frames that the model sees, and the future is predicted anew.",
            lambda: ask_what_if(ddlp, balls, folder),
        ),
        (
            "Videos from nothing",
            "DiffuseDDLP draws the particles of the first frames from noise (purple), and its DDLP predicts the others"
            " (green).",
            lambda: generate(diffuse_ddlp, folder),
        ),
    ):
        print(f"{heading} ...", flush=True)
        pictures, rows = show()
        sections.append((heading, sentence, pictures, rows))
        for label, *cells in rows:
            print(f"  {label:<46}" + "".join(f"{cell:>11}" for cell in cells))
    page = folder / "index.html"
    write_page(sections, page)
    print(f"{time.monotonic() - started:.0f} s; look at {page}")


def _animate(panels, path):
    save_animation(side_by_side(panels), path, FRAME_SECONDS)


def _device(model):
    return next(model.parameters()).device


def _image_metrics(model):
    return ImageMetrics(("psnr",), _device(model))


if __name__ == "__main__":
    run_command(main)
