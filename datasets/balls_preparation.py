"""Make Balls-Interaction (of G-SWM): videos of balls that bounce off each other and off the walls of a box.

    python datasets/balls_preparation.py --out data/balls

writes `train.hdf5`, `val.hdf5` and `test.hdf5`. Each is whole or not there; a run that was interrupted goes on with the
files that are missing. Episode `index` of a split is drawn with
`default_rng(SeedSequence(seed, spawn_key=(m, index)))`, m = 0 for train, 1 for val, 2 for test. It depends on nothing
but that and the physical options: not on the number of episodes nor of processes.

The physics: the balls start without overlap, each with the given speed in a random direction. Between two frames they
take ten steps; in each they move straight, hit each other (equal masses, no loss: the velocities along the line of the
centres are exchanged at the instant of contact), and are mirrored at the walls. Each ball is a disc of a colour out of
`COLORS`, drawn with replacement, on black; a rim pixel has the fraction of it that the disc covers.

Coordinates are (row, column) in pixels, continuous, from the top left corner of the image: pixel i covers [i, i + 1),
so that its centre is i + 0.5, and the walls of a box of S x S pixels are at 0 and S. A centre is never nearer to a wall
than its radius.

A file holds these arrays, for N episodes of T frames with n balls; the options are attributes of the file.

| imgs | uint8 [N, T, S, S, 3] | RGB frames, contiguous and not compressed |
| positions | float32 [N, T, n, 2] | centres (row, column), pixels |
| velocities | float32 [N, T, n, 2] | (row, column), pixels per frame |
| sizes | float32 [N, T, n] | radius, pixels |
| masses | float32 [N, T, n] | 1 |
| ids | int32 [N, T, n] | 1 to n; 0 would be a ball out of view |
| present | uint8 [N, T, n] | 1 where the ball exists |
| in_camera | uint8 [N, T, n] | 1 where the ball is in view |
| layers | int32 [N, T, n] | order of drawing from 0; a later one covers an earlier one |
| shapes | int32 [N, T, n] | 0: a disc |
| colors | float32 [N, T, n, 3] | RGB, 0 to 1 |
"""

import argparse
import math
import sys
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.balls_ds import hdf5_fault
from datasets.preparation import check_space, make_executor
from utils.errors import UserError, run_command
from utils.files import atomic_write, available_cores, given_path, make_folder
from utils.legal import check, check_at_least_1
from utils.progress import progress_bar

SPLITS = ("train", "val", "test")
SUBSTEPS = 10
COLORS = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]], np.float32)  # CSS blue, red, ..., aqua

_BATCH_BYTES = 25_000_000
_TRIES = 100


@dataclass(frozen=True)
class BallsOptions:
    """What an episode is a function of, besides its split and index.

    `num_frames` per episode; `radius` of the balls in pixels; `speed` at the start in pixels per frame; `image_size`:
    side of the box, and of a frame, in pixels. Raises UserError for what is not legal.
    """

    num_frames: int = 100
    num_balls: int = 3
    radius: float = 8.0
    speed: float = 3.0
    image_size: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("num_frames", "num_balls", "image_size"):
            check_at_least_1(name, getattr(self, name))
        check("seed", self.seed, "from 0 to 2^32 - 1", 0 <= self.seed < 2**32)
        half = self.image_size / 2
        check("radius", self.radius, f"above 0 and at most half the image_size, {half:g}", 0 < self.radius <= half)
        # Two balls with all the energy between them must not pass through each other within a sub-step.
        fastest = SUBSTEPS * self.radius * math.sqrt(2 / self.num_balls)
        check("speed", self.speed, f"from 0 to {fastest:.4g} px per frame", 0 <= self.speed <= fastest)
        if not self._fits():
            raise UserError(
                f"num_balls: {self.num_balls} balls of radius {self.radius:g} do not fit at random into a box of"
                f" {self.image_size} x {self.image_size} pixels; legal: fewer or smaller balls, or a larger image_size"
            )

    def _fits(self):
        """Whether a random placement finds room for all balls often enough."""
        if self.num_balls * math.pi * self.radius**2 > self.image_size**2:
            return False
        rng = np.random.default_rng(0)
        return sum(_place(rng, self.num_balls, self.radius, self.image_size) is not None for _ in range(20)) >= 5


# ---- an episode


def _place(rng, num_balls, radius, image_size):
    """Centres [n, 2] of balls within the walls and without overlap, one after the other; None where one finds no
    room."""
    centres = np.empty((0, 2))
    for _ in range(num_balls):
        tries = rng.uniform(radius, image_size - radius, (_TRIES, 1, 2))
        free = (((tries - centres) ** 2).sum(-1) >= (2 * radius) ** 2).all(-1)
        if not free.any():
            return None
        centres = np.concatenate([centres, tries[free.argmax()]])
    return centres


def draw_start(options, split, index):
    """How episode `index` of `split` begins: positions and velocities, float64 [n, 2], and colors, float32 [n, 3]."""
    rng = np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=(SPLITS.index(split), index)))
    angles = rng.uniform(0, 2 * np.pi, options.num_balls)
    colors = COLORS[rng.integers(len(COLORS), size=options.num_balls)]
    positions = None
    while positions is None:
        positions = _place(rng, options.num_balls, options.radius, options.image_size)
    return positions, options.speed * np.stack([np.sin(angles), np.cos(angles)], axis=-1), colors


def simulate(positions, velocities, radius, image_size, num_frames):
    """The motion of balls from where they start.

    `positions`, `velocities`: [E, n, 2], the first frame of E episodes, (row, column) in pixels and pixels per frame.
    `radius` of all balls and `image_size`, the side of the box, in pixels.

    Returns positions and velocities, float64 [E, num_frames, n, 2]. Kinetic energy does not change, nor does
    momentum where balls hit each other; each centre stays within radius .. image_size - radius.
    """
    p, v = np.array(positions, np.float64), np.array(velocities, np.float64)  # [E, n, 2]
    all_p, all_v = (np.empty((len(p), num_frames, *p.shape[1:])) for _ in range(2))
    all_p[:, 0], all_v[:, 0] = p, v
    for frame in range(1, num_frames):
        for _ in range(SUBSTEPS):
            p += v / SUBSTEPS
            for i in range(p.shape[1]):
                for j in range(i):
                    _collide(p, v, i, j, 2 * radius)
            _reflect(p, v, radius, image_size - radius)
        all_p[:, frame], all_v[:, frame] = p, v
    return all_p, all_v


def _collide(p, v, i, j, contact):
    """Let balls i and j of each episode hit each other where they approach within the distance `contact`; in place.

    The pair goes back to the instant of contact (within this sub-step), exchanges its velocities along the line of the
    centres, and goes on for the same time.
    """
    hit = np.flatnonzero(((p[:, i] - p[:, j]) ** 2).sum(-1) < contact**2)
    if not len(hit):
        return
    d, w = p[hit, i] - p[hit, j], v[hit, i] - v[hit, j]  # [hits, 2]
    approach = (d * w).sum(-1)
    hit, d, w, approach = (array[approach < 0] for array in (hit, d, w, approach))
    # The time since contact, t > 0 with |d - w t| = contact.
    overlap = contact**2 - (d**2).sum(-1)
    since = overlap / (np.sqrt(approach**2 + (w**2).sum(-1) * overlap) - approach)
    since = np.minimum(since, 1 / SUBSTEPS)
    d = d - w * since[:, None]
    exchanged = d * ((d * w).sum(-1) / (d**2).sum(-1))[:, None]
    v[hit, i] -= exchanged
    v[hit, j] += exchanged
    p[hit, i] -= exchanged * since[:, None]
    p[hit, j] += exchanged * since[:, None]


def _reflect(p, v, low, high):
    """Mirror positions beyond `low` and `high` there, and turn those velocities inwards; in place."""
    below, above = p < low, p > high
    p[below] = 2 * low - p[below]
    p[above] = 2 * high - p[above]
    v[below] = np.abs(v[below])
    v[above] = -np.abs(v[above])
    # A box that leaves a ball less room than it moves in a sub-step.
    np.clip(p, low, high, out=p)


def render(positions, colors, radius, image_size):
    """Draw balls on black; later balls cover earlier ones.

    `positions`: [E, T, n, 2], centres (row, column) in pixels. `colors`: [E, n, 3], RGB in 0..1. `radius` in pixels.
    Returns uint8 [E, T, image_size, image_size, 3].
    """
    episodes, num_frames, num_balls = positions.shape[:3]
    images = np.zeros((episodes, num_frames, image_size, image_size, 3), np.uint8)
    frames = np.arange(num_frames)[:, None, None]
    side = min(math.ceil(2 * radius) + 1, image_size)
    for video, centres, rgb in zip(images, positions, colors, strict=True):
        for ball in range(num_balls):
            first = np.clip(np.floor(centres[:, ball] - radius).astype(int), 0, image_size - side)  # [T, 2]
            alpha = _coverage(centres[:, ball] - first, radius, side)[..., None]  # [T, side, side, 1]
            pixels = first[:, :, None] + np.arange(side)  # [T, 2, side]
            window = (frames, pixels[:, 0, :, None], pixels[:, 1, None, :])
            video[window] = np.rint(video[window] * (1 - alpha) + 255 * rgb[ball] * alpha)
    return images


def _coverage(centres, radius, side):
    """The fraction of each pixel of a `side` x `side` window that a disc covers, exactly.

    `centres`: [T, 2], (row, column) from the window's corner. Returns float64 [T, side, side].
    """
    area = math.pi * radius**2
    # Pixel edges as seen from the centre, and the disc's area before each edge.
    edges = np.clip(np.arange(side + 1) - centres[:, :, None], -radius, radius)  # [T, 2, side + 1]
    before = edges * np.sqrt(radius**2 - edges**2) + radius**2 * np.arcsin(edges / radius) + area / 2
    y, x = edges[:, 0, :, None], edges[:, 1, None, :]
    above, left = before[:, 0, :, None], before[:, 1, None, :]
    # The disc's area above and left of each pixel corner, for a corner inside and outside the disc.
    inside = (above + left) / 2 - area / 4 + y * x
    outside = above * (x >= 0) + left * (y >= 0) - area * ((x >= 0) & (y >= 0))
    corner = np.where(y**2 + x**2 < radius**2, inside, outside)  # [T, side + 1, side + 1]
    return np.clip(np.diff(np.diff(corner, axis=1), axis=2), 0, 1)


def make_trajectories(options, split, indices):
    """How the balls of the episodes `indices` (a range of E) of `split` move: positions and velocities, as of
    `simulate`, and colors, float32 [E, n, 3]."""
    starts = [draw_start(options, split, index) for index in indices]
    positions, velocities, colors = (np.stack(entry) for entry in zip(*starts, strict=True))
    return *simulate(positions, velocities, options.radius, options.image_size, options.num_frames), colors


def make_episodes(options, split, indices):
    """The episodes `indices` (a range of E) of `split`: a dict of the file's arrays, each [E, T, ...]."""
    p, v, colors = make_trajectories(options, split, indices)
    balls = p.shape[:3]
    order = np.arange(options.num_balls, dtype=np.int32)
    return {
        "imgs": render(p, colors, options.radius, options.image_size),
        "positions": p.astype(np.float32),
        "velocities": v.astype(np.float32),
        "sizes": np.full(balls, options.radius, np.float32),
        "masses": np.ones(balls, np.float32),
        "ids": np.broadcast_to(order + 1, balls),
        "present": np.ones(balls, np.uint8),
        "in_camera": np.ones(balls, np.uint8),
        "layers": np.broadcast_to(order, balls),
        "shapes": np.zeros(balls, np.int32),
        "colors": np.broadcast_to(colors[:, None], (*balls, 3)),
    }


# ---- the files


def make_batches(options, split, num_episodes, processes):
    """Yield the episodes of `split` in order, batch by batch, each a dict as of `make_episodes`."""
    size = max(1, _BATCH_BYTES // _episode_bytes(options))
    ranges = [range(first, min(first + size, num_episodes)) for first in range(0, num_episodes, size)]
    make = partial(make_episodes, options, split)
    processes = min(processes, len(ranges))
    if processes == 1:
        yield from map(make, ranges)
        return
    executor = make_executor(processes)
    try:
        # Few batches ahead: what is made must not pile up where the disk is slow.
        pending = deque()
        for indices in ranges:
            pending.append(executor.submit(make, indices))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def write_split(path, options, split, num_episodes, processes=1):
    """Make the file of one split at `path`; raises UserError where it cannot be written."""
    batches = make_batches(options, split, num_episodes, processes)
    bar = progress_bar(desc=f"making {path.name}", total=num_episodes, unit="episode")
    with atomic_write(path) as part, closing(batches), bar:
        offsets = _lay_out(part, options, split, num_episodes)
        # As plain bytes: h5py can lose an interrupt from the keyboard, and the reason why a disk does not write.
        with open(part, "r+b") as file:
            for batch in batches:
                for name, array in batch.items():
                    file.seek(offsets[name])
                    offsets[name] += file.write(np.ascontiguousarray(array))
                bar.update(len(batch["imgs"]))


def _lay_out(path, options, split, num_episodes):
    """Make an HDF5 file whose arrays are yet to be written; returns where each begins, in bytes."""
    allocated = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    allocated.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    allocated.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w") as file:
        file.attrs.update(_attributes(options, split))
        return {
            name: file.create_dataset(name, (num_episodes, *shape), dtype, dcpl=allocated).id.get_offset()
            for name, (dtype, shape) in _episode_arrays(options).items()
        }


def _episode_arrays(options):
    """The dtype and shape of each array of one episode."""
    one_frame = make_episodes(replace(options, num_frames=1), "train", range(1))
    return {name: (array.dtype, (options.num_frames, *array.shape[2:])) for name, array in one_frame.items()}


def _episode_bytes(options):
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in _episode_arrays(options).values())


def _attributes(options, split):
    return {**asdict(options), "split": split}


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description="Make the videos of Balls-Interaction.")
    parser.add_argument(
        "--out", type=given_path, required=True, metavar="FOLDER", help="where train.hdf5, val.hdf5 and test.hdf5 go"
    )
    for split, number in zip(SPLITS, (5000, 200, 200), strict=True):
        parser.add_argument(f"--{split}", type=int, default=number, help=f"{split} episodes (%(default)s)")
    parser.add_argument("--num_frames", type=int, default=100, help="frames per episode (%(default)s)")
    parser.add_argument("--num_balls", type=int, default=3, help="balls (%(default)s)")
    parser.add_argument("--radius", type=float, default=8, help="radius of the balls, px (%(default)s)")
    parser.add_argument("--speed", type=float, default=3, help="speed at the start, px per frame (%(default)s)")
    parser.add_argument("--image_size", type=int, default=64, help="side of the frames, px (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other episodes (%(default)s)")
    parser.add_argument("--processes", type=int, default=available_cores(), help="processes that draw (%(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    options = BallsOptions(args.num_frames, args.num_balls, args.radius, args.speed, args.image_size, args.seed)
    for name in (*SPLITS, "processes"):
        check_at_least_1(name, getattr(args, name))
    out = Path(args.out)
    todo = {}
    for split in SPLITS:
        path, number = out / f"{split}.hdf5", getattr(args, split)
        if args.force or not _is_made(path, number, _attributes(options, split)):
            todo[split] = path, number
    if not todo:
        return
    check_space(out, sum(number for _, number in todo.values()) * _episode_bytes(options))
    make_folder(out)
    for split, (path, number) in todo.items():
        write_split(path, options, split, number, args.processes)


def _is_made(path, num_episodes, attributes):
    """Whether the file at `path` is there; UserError if it is there with other episodes."""
    if not path.exists():
        return False
    wanted = {"episodes": num_episodes, **attributes}
    try:
        with h5py.File(path, "r") as file:
            found = {"episodes": len(file["imgs"]), **{name: file.attrs[name] for name in attributes}}
    except (OSError, KeyError, RuntimeError) as error:
        if isinstance(error, BlockingIOError | PermissionError):  # it may be whole: no word of overwriting it
            raise UserError(f"{path} {hdf5_fault(error)}, or another --out") from error
        raise UserError(
            f"{path} exists but was not made by this script, or is not whole; legal: another --out, or --force to"
            " overwrite it"
        ) from error
    differing = [f"{name} {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    if differing:
        raise UserError(f"{path} exists with {'; '.join(differing)}; legal: another --out, or --force to overwrite it")
    print(f"{path} is there already: kept")
    return True


if __name__ == "__main__":
    run_command(main)
