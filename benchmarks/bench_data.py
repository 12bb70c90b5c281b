"""How fast the data sets give items, with and without decoded frames kept on disk, beside what training takes.

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --ds obj3d128 clevrer --clips_per_second 40

Makes a few episodes of every data set in its real format, at the released resolution, in a temporary folder, and draws
random training items of the released length from them, once the frames are kept (warm): float32 in this process, by
one thread, as a loading process has (ms per item), and, as training takes them, uint8 through one loading process in
the released batches (items per second). The last row is an item that costs nothing: what is left is PyTorch's handing
over of batches from process to process. What training takes is the number of clips in its steps, forward, backward and
Adam, over their time: of the released configuration but for the reconstruction loss, which is the squared error for all
(VGG-16 would make steps slower), and, on a CPU, batches of one clip.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import Config
from datasets import balls_preparation
from datasets.episodes import NO_ANNOTATIONS
from datasets.get_dataset import get_image_dataset, get_video_dataset
from training.loop import Progress
from training.particles import DDLPTask, DLPTask
from utils.device import make_accelerator
from utils.errors import UserError, run_command

SIDE = 128  # of the frames on disk; Balls and Shapes have 64
HEADINGS = ("", "", "ms per item", "", "items/s, one worker", "", "training")
COLUMNS = ("data set", "item", "cache", "no cache", "cache", "no cache", "takes/s")
WIDTHS = (10, 12, 12, 9, 20, 9, 9)


# ---- the data


def frames_like_a_rendering(number, seed):
    """Yield uint8 [SIDE, SIDE, 3] frames: balls that move over a shaded ground, and a little noise."""
    rng = np.random.default_rng(seed)
    ground = np.linspace(90, 190, SIDE)[:, None, None] + np.zeros((SIDE, SIDE, 3))
    centres, speeds = rng.uniform(30, 98, (4, 2)), rng.uniform(-0.5, 0.5, (4, 2))
    colours = rng.integers(0, 256, (4, 3)).tolist()
    for frame in range(number):
        image = ground + rng.integers(0, 3, ground.shape)
        for (x, y), colour in zip(centres + frame * speeds, colours, strict=True):
            cv2.circle(image, (int(x), int(y)), 11, colour, -1, cv2.LINE_AA)
        yield image.astype(np.uint8)


def write_folders(root, episodes, number, name, alpha=False):
    """Episodes of `number` PNG files; `name` has the names of an episode and a frame as {e} and {f}."""
    for e in range(episodes):
        for f, frame in enumerate(frames_like_a_rendering(number, e)):
            path = root / name.format(e=e, f=f)
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(frame)
            if alpha:
                image.putalpha(255)
            image.save(path)


def make_source(ds, root, episodes):
    """Make a small data set `ds` in the folder `root`; returns what its configuration has as `root`."""
    if ds.startswith("obj3d"):
        write_folders(root, episodes, 100, "train/{e}/test_{f}.png", alpha=True)
    elif ds == "clevrer":
        write_folders(root, episodes, 100, "train/{e}/{f}.png")
    elif ds == "phyre":
        write_folders(root, episodes, 130, "train/{e:05d}/{f:05d}.png")
    elif ds == "traffic":
        root = root / "img128np.npy"
        np.save(root, np.stack([*frames_like_a_rendering(100 * episodes, 0)]))
    elif ds == "balls":
        balls_preparation.main(["--out", str(root), "--train", str(episodes), "--val", "1", "--test", "1"])
    return root


def make_dataset(config, root, **options):
    if config.ds == "shapes":
        return get_image_dataset(config.ds, root, "train", config.image_size, num_items=1_000)
    return get_video_dataset(config.ds, root, config.timestep_horizon + 1, "train", config.image_size, **options)


class Constant(Dataset):
    """Items like those of a video data set, all the same tensors."""

    def __init__(self, num_frames, image_size):
        video = torch.zeros(num_frames, 3, image_size, image_size, dtype=torch.uint8)
        self._item = (video, *[torch.empty(0)] * NO_ANNOTATIONS)

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return self._item


# ---- the measurements


def milliseconds(dataset, seconds):
    """The mean time of an item in this process, over `seconds` after a quarter of that to warm up."""
    indices = torch.randint(len(dataset), (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rate = _rate(lambda number: dataset[indices[number % len(indices)]], seconds)
    torch.set_num_threads(threads)
    return 1e3 / rate


def items_per_second(dataset, batch_size, seconds):
    """Items out of one loading process, over `seconds` after a quarter of that to warm up."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**7)
    batches = iter(DataLoader(dataset, batch_size, sampler=sampler, num_workers=1))
    return batch_size * _rate(lambda number: next(batches), seconds)


def _rate(call, seconds):
    """Calls of `call(number of the call)` per second."""
    for span in (seconds / 4, seconds):
        start, number = time.perf_counter(), 0
        while time.perf_counter() - start < span:
            call(number)
            number += 1
        rate = number / (time.perf_counter() - start)
    return rate


def clips_per_second(config, device, steps):
    """Clips (of Shapes: images) in `steps` training steps after one more, over their time."""
    accelerator = make_accelerator(device)
    task_class = DLPTask if config.ds == "shapes" else DDLPTask
    task = task_class(config.replace(recon_loss_type="mse", eval_im_metrics=False), accelerator)
    model = task.build_model().to(accelerator.device)
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    batch_size = config.batch_size if accelerator.device.type == "cuda" else 1
    frames = () if config.ds == "shapes" else (config.timestep_horizon + 1,)
    clip = torch.rand(batch_size, *frames, 3, config.image_size, config.image_size, device=accelerator.device)
    progress = Progress(epoch=config.warmup_epoch + 1, iteration=10**6, epoch_length=1)
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        task.losses(model, (clip,), progress)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        clip.sum().item()  # waits for the device
    return steps * batch_size / (time.perf_counter() - start)


def measure(ds, args):
    """The table's row of one data set, as texts."""
    config = Config.load(ds)
    num_frames = 1 if ds == "shapes" else config.timestep_horizon + 1
    with tempfile.TemporaryDirectory() as folder:
        root = make_source(ds, Path(folder), args.episodes)
        costs, rates = [], []
        for cache in (True,) if ds == "shapes" else (True, False):  # Shapes are always kept on disk.
            costs.append(f"{milliseconds(make_dataset(config, root, cache=cache), args.seconds):.2f}")
            loaded = make_dataset(config, root, cache=cache, as_uint8=True)
            rates.append(f"{items_per_second(loaded, config.batch_size, args.seconds):.0f}")
    training = args.clips_per_second or clips_per_second(config, args.device, args.steps)
    return row(ds, num_frames, config.image_size, costs, rates, f"{training:.3g}")


def measure_handing_over(args):
    """The row of items that cost nothing, of the size and in the batches of obj3d128."""
    config = Config.load("obj3d128")
    shape = config.timestep_horizon + 1, config.image_size
    rate = items_per_second(Constant(*shape), config.batch_size, args.seconds)
    return row("(constant)", *shape, ["0"], [f"{rate:.0f}"], "-")


def row(name, num_frames, image_size, costs, rates, training):
    """A row's cells; a second cost or rate that is missing is a dash."""
    pairs = [(*values, "-")[:2] for values in (costs, rates)]
    return name, f"{num_frames} x {image_size}^2", *pairs[0], *pairs[1], training


def line(cells):
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def parse_arguments(arguments):
    names = ("obj3d", "obj3d128", "traffic", "phyre", "clevrer", "balls", "shapes")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--episodes", type=int, default=4, metavar="N", help="to make of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4, metavar="S", help="to draw items for (%(default)s)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="of training to measure (%(default)s)")
    parser.add_argument("--clips_per_second", type=float, metavar="R", help="what training takes, if known")
    parser.add_argument("--device", default="cuda", help="to train on; cuda falls back to the CPU (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    for name in ("episodes", "seconds", "steps", "clips_per_second"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} is {value}; legal: above 0 and finite")
    rows = [measure(ds, args) for ds in tqdm(args.ds, "measuring", unit="data set")]
    rows.append(measure_handing_over(args))
    print("\n".join(line(cells) for cells in (HEADINGS, COLUMNS, *rows)))


if __name__ == "__main__":
    run_command(main)
