"""Write the examples in this folder from the test sets of shapes, balls, obj3d_like and demo_train.py, which must have
been made: ``python assets/make_examples.py``, from the checkout's folder."""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.examples import write_example
from datasets.get_dataset import first_frames, get_video_dataset
from datasets.shapes_ds import ShapesDataset
from utils.errors import UserError, run_command

ASSETS = Path(__file__).resolve().parent
COUNT = 10


@dataclass(frozen=True)
class Videos:
    """The data set `ds`, which lies in a folder of the data's; of its videos so many frames of so many pixels."""

    ds: str
    folder: str
    frames: int = 60
    image_size: int = 64


VIDEOS = {
    "balls": Videos("balls", "balls"),
    "obj3d_like": Videos("obj3d_like", "obj3d_like"),
    "demo": Videos("balls", "balls_demo", frames=16, image_size=32),
}


def shapes(root):
    """The first images of the test set; a shape's position is the middle of its box. Yields `write_example`'s
    arguments."""
    dataset = ShapesDataset(root, "test")
    for index in range(COUNT):
        centres, radii = dataset.circles(index)
        yield dataset[index][0][None], centres[None], radii[None], torch.ones(1, len(radii), dtype=torch.bool)


def videos(kind, root):
    """The beginnings of the first test videos of a `Videos`, as `shapes`."""
    dataset = get_video_dataset(kind.ds, root, kind.frames, "test", kind.image_size)
    if len(dataset) < COUNT:
        raise UserError(f"{root}: has {len(dataset)} videos to test with; legal: at least {COUNT}")
    for index in range(COUNT):
        frames, positions, sizes, _, in_camera = first_frames(dataset[index], kind.frames)
        objects = in_camera.any(0)
        yield frames, positions[:, objects], sizes[:, objects], in_camera[:, objects]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["shapes", *VIDEOS], metavar="NAME", help="of data sets (all)")
    parser.add_argument("--data", default="data", metavar="PATH", help="where the data sets lie (%(default)s)")
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in ("shapes", *VIDEOS):
            parser.error(f"{name} has no examples; legal: shapes, {', '.join(VIDEOS)}")
    for name in args.names:
        kind = VIDEOS.get(name)
        root = Path(args.data) / (kind.folder if kind else name)
        examples = list(videos(kind, root) if kind else shapes(root))  # before the old ones are deleted
        shutil.rmtree(ASSETS / name, ignore_errors=True)
        for index, example in enumerate(examples):
            write_example(ASSETS / name / str(index), *example)


if __name__ == "__main__":
    run_command(main)
