"""Whether a DDLP predicts collisions: what becomes of bodies that stand while they are seen.

    python benchmarks/bench_pushes.py -p checkpoints/ddlp-obj3d_like -c 10 --horizon 40

Bodies of held-out videos whose centre moves less than 0.5 pixels in the seen frames, and that have a particle
(`eval.tracking.match`), are either pushed in the predicted ones, by 3 pixels or more, or left alone, less than 0.5.
Where they are, the data set knows; where they are predicted to be, their particle says. A still frame and particles
straight on leave all of them where they are, so that their error is the way that a body is pushed.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.episodes import scaled
from datasets.get_dataset import shard_loader
from eval.eval_gen_metrics import prediction_videos, true_objects
from eval.tracking import match, pixel_positions
from modules.particles import VISIBLE
from rundir.prediction import add_prediction_arguments, open_prediction
from utils.errors import run_command

STANDS, IS_PUSHED = 0.5, 3.0  # pixels
BATCH = 8  # videos tracked at a time


def ways(points, visible, truth, present, seen):
    """The true and the predicted way, float [m, 2] each in pixels, from the last seen frame to the last of all, of the
    bodies of a video that stand while they are seen.

    The arguments are those of `eval.tracking.tracking_quality`; seen: the number of frames seen.
    """
    chosen = match(points[:seen], visible[:seen], truth[:seen], present[:seen])
    moved = (truth[:seen] - truth[seen - 1]).norm(dim=-1).amax(0)
    bodies = ((moved < STANDS) & present[:seen].all(0) & present[-1] & (chosen >= 0)).nonzero()[:, 0]
    return (
        truth[-1, bodies] - truth[seen - 1, bodies],
        points[-1, chosen[bodies]] - points[seen - 1, chosen[bodies]],
    )


def report(true, predicted):
    """The lines that say how pushes are predicted; true, predicted: ways [m, 2]."""
    length, predicted_length = true.norm(dim=-1), predicted.norm(dim=-1)
    cosine, error = cosine_similarity(true, predicted, dim=-1), (predicted - true).norm(dim=-1)
    is_predicted = (predicted_length >= IS_PUSHED).float()
    groups = {
        "pushed": (
            length >= IS_PUSHED,
            {
                "way, pixels": length,
                "predicted way, pixels": predicted_length,
                "cosine of their directions": cosine,
                "error, pixels": error,
                "share predicted to be pushed": is_predicted,
            },
        ),
        "left alone": (
            length < STANDS,
            {"predicted way, pixels": predicted_length, "share predicted to be pushed": is_predicted},
        ),
    }
    for name, (which, values) in groups.items():
        yield f"bodies that are {name}: {which.sum()}"
        if which.any():
            yield from (f"  {label:30}{value[which].mean():6.2f}" for label, value in values.items())


@torch.no_grad()
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_prediction_arguments(parser, "the run's animation_horizon")
    request = open_prediction(parser.parse_args(arguments))
    seen, horizon = request.cond_steps, request.horizon
    found = []
    for batch in shard_loader(prediction_videos(request.config, request.mode, horizon), BATCH, num_frames=horizon):
        x, (positions, _, in_view) = batch[0], true_objects(batch)
        tracked = request.model.track(scaled(x[:, :seen].to(request.device)))
        particles = request.model.predict(tracked, horizon - seen, request.deterministic)
        points, visible = pixel_positions(particles.z, x.shape[-1]).cpu(), (particles.obj_on > VISIBLE).cpu()
        found += [ways(*video, seen) for video in zip(points, visible, positions, in_view, strict=True)]
    print("\n".join(report(*(torch.cat(parts) for parts in zip(*found, strict=True)))))


if __name__ == "__main__":
    run_command(main)
