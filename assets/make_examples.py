"""Write the examples in this folder from the test sets of shapes, balls and obj3d_like, which must have been made:
``python assets/make_examples.py``, from the checkout's folder."""

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.examples import write_example
from datasets.get_dataset import first_frames, get_video_dataset
from datasets.shapes_ds import ShapesDataset
from utils.errors import run_command

ASSETS = Path(__file__).resolve().parent
COUNT, FRAMES = 10, 60
VIDEOS = ("balls", "obj3d_like")


def write_shapes(root):
    """The first images of the test set; a shape's position is the middle of its box."""
    dataset = ShapesDataset(root, "test")
    for index in range(COUNT):
        centres, radii = dataset.circles(index)
        present = torch.ones(1, len(radii), dtype=torch.bool)
        write_example(ASSETS / "shapes" / str(index), dataset[index][0][None], centres[None], radii[None], present)


def write_videos(name, root):
    """The beginnings of the test set's first videos."""
    videos = get_video_dataset(name, root, FRAMES, "test", 64)
    for index in range(COUNT):
        frames, positions, sizes, _, in_camera = first_frames(videos[index], FRAMES)
        objects = in_camera.any(0)
        write_example(
            ASSETS / name / str(index), frames, positions[:, objects], sizes[:, objects], in_camera[:, objects]
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["shapes", *VIDEOS], metavar="NAME", help="of data sets (all)")
    parser.add_argument("--data", default="data", metavar="PATH", help="where the data sets lie (%(default)s)")
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in ("shapes", *VIDEOS):
            parser.error(f"{name} has no examples; legal: shapes, {', '.join(VIDEOS)}")
        shutil.rmtree(ASSETS / name, ignore_errors=True)
        root = Path(args.data) / name
        write_shapes(root) if name == "shapes" else write_videos(name, root)


if __name__ == "__main__":
    run_command(main)
