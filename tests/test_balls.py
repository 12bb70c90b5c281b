"""Balls-Interaction: its physics, its drawing and its files, and the data sets that read them."""

import errno
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from configs.schema import Config
from datasets import balls_preparation
from datasets.balls_ds import BallsImages, BallsVideos, to_normalized
from datasets.balls_preparation import BallsOptions, draw_start, make_episodes, render, simulate
from datasets.get_dataset import get_image_dataset, get_video_dataset
from tests.processes import group_is_gone, wait_until
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")
CSS = {
    "blue": (0, 0, 255),
    "red": (255, 0, 0),
    "yellow": (255, 255, 0),
    "fuchsia": (255, 0, 255),
    "aqua": (0, 255, 255),
}
SMALL = BallsOptions(num_frames=6, num_balls=2, radius=2.5, speed=2, image_size=16)
SMALL_ARGUMENTS = "--num_frames 6 --num_balls 2 --radius 2.5 --speed 2 --image_size 16 --processes 1"


def prepare(out, *arguments):
    balls_preparation.main(["--out", str(out), *SMALL_ARGUMENTS.split(), *" ".join(arguments).split()])


def starts(options, number, split="train"):
    """Positions and velocities [number, n, 2] and colors [number, n, 3] of the first episodes of a split."""
    return (
        np.stack(entry) for entry in zip(*(draw_start(options, split, index) for index in range(number)), strict=True)
    )


# ---- the physics


def wall_event(ball, low, high):
    """When and along which axis a ball [y, x, vy, vx] next meets a wall."""
    times = []
    for axis in range(2):
        p, v = ball[axis], ball[2 + axis]
        if v:
            times.append((((high if v > 0 else low) - p) / v, axis))
    return min(times)


def pair_event(one, two, contact):
    """When two balls next meet; inf if they do not."""
    d, w = [[b - a for a, b in zip(one[k : k + 2], two[k : k + 2], strict=True)] for k in (0, 2)]
    approach, speed2 = d[0] * w[0] + d[1] * w[1], w[0] ** 2 + w[1] ** 2
    inner = approach**2 - speed2 * (d[0] ** 2 + d[1] ** 2 - contact**2)
    return (-approach - math.sqrt(inner)) / speed2 if approach < 0 and inner > 0 else math.inf


def bounce(one, two):
    """Exchange the velocities of two touching balls along the line of their centres."""
    y, x = two[0] - one[0], two[1] - one[1]
    length = math.hypot(y, x)
    y, x = y / length, x / length
    change = (two[2] - one[2]) * y + (two[3] - one[3]) * x
    one[2], one[3] = one[2] + change * y, one[3] + change * x
    two[2], two[3] = two[2] - change * y, two[3] - change * x


def from_event_to_event(positions, velocities, radius, image_size, num_frames):
    """The exact motion in continuous time: positions [num_frames, n, 2] and the number of hits between balls."""
    balls = [[*p, *v] for p, v in zip(positions.tolist(), velocities.tolist(), strict=True)]
    pairs = [(i, j) for i in range(len(balls)) for j in range(i)]
    frames, hits = [[ball[:2] for ball in balls]], 0
    for _ in range(num_frames - 1):
        left = 1.0
        while left > 0:
            walls = [(*wall_event(ball, radius, image_size - radius), ball) for ball in balls]
            wall = min(walls, key=lambda event: event[0])
            pair = min(pairs, key=lambda ij: pair_event(balls[ij[0]], balls[ij[1]], 2 * radius), default=None)
            meeting = pair_event(balls[pair[0]], balls[pair[1]], 2 * radius) if pair else math.inf
            step = min(left, wall[0], meeting)
            for ball in balls:
                ball[0] += ball[2] * step
                ball[1] += ball[3] * step
            if step == meeting:
                bounce(balls[pair[0]], balls[pair[1]])
                hits += 1
            elif step == wall[0]:
                wall[2][2 + wall[1]] *= -1
            left -= step
        frames.append([ball[:2] for ball in balls])
    return np.array(frames), hits


def test_motion_is_that_of_continuous_time():
    options = BallsOptions()
    p, v, _ = starts(options, 10)
    ours, _ = simulate(p, v, 8, 64, 12)
    all_hits = 0
    for episode in range(10):
        expected, hits = from_event_to_event(p[episode], v[episode], 8, 64, 12)
        np.testing.assert_allclose(ours[episode], expected, atol=1e-9)
        all_hits += hits
    assert all_hits > 10


def test_head_on():
    # 10 px apart, nearing each other by 4 px per frame: they touch after 2.5 frames, and exchange their velocities.
    p, v = simulate([[[32, 20], [32, 46]]], [[[0, 3], [0, -1]]], 8, 64, 6)
    np.testing.assert_allclose(p[0, :, :, 1], [[20, 46], [23, 45], [26, 44], [27, 45], [26, 48], [25, 51]], atol=1e-12)
    np.testing.assert_allclose(v[0, :, :, 1], [[3, -1]] * 3 + [[-1, 3]] * 3, atol=1e-12)
    assert (p[..., 0] == 32).all() and (v[..., 0] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 3.0, -7.5, 9.9])
def test_oblique(offset):
    # A ball meets one at rest with an offset b: sin(angle of the line of centres) = b / 2r.
    radius, speed, start = 5.0, 2.3, 60.0
    p, v = simulate([[[100, start], [100 + offset, 100]]], [[[0, speed], [0, 0]]], radius, 200, 40)
    line = np.array([offset, math.sqrt(100 - offset**2)]) / 10
    pushed = speed * line[1] * line
    contact = (100 - 10 * line[1] - start) / speed
    after = 39 - contact
    np.testing.assert_allclose(v[0, -1], [[-pushed[0], speed - pushed[1]], pushed], atol=1e-12)
    np.testing.assert_allclose(p[0, -1, 1], np.array([100 + offset, 100]) + pushed * after, atol=1e-9)
    np.testing.assert_allclose(
        p[0, -1, 0], [100 - pushed[0] * after, start + speed * contact + (speed - pushed[1]) * after], atol=1e-9
    )


def test_no_hit_without_approach():
    p, v = simulate([[[20, 20], [20, 29]]], [[[0, -1], [0, 1]]], 5, 64, 3)
    np.testing.assert_allclose(p[0, 2, :, 1], [18, 31], atol=1e-12)
    np.testing.assert_allclose(v[0, 2, :, 1], [-1, 1], atol=1e-12)


def test_walls_mirror():
    p, v = simulate([[[10, 50]]], [[[-2.7, 1.9]]], 8, 64, 100)
    path = np.array([10, 50]) - 8 + np.arange(100)[:, None] * np.array([-2.7, 1.9])
    np.testing.assert_allclose(p[0, :, 0], 8 + 48 - np.abs(path % 96 - 48), atol=1e-9)
    np.testing.assert_allclose(np.abs(v[0, :, 0]), [[2.7, 1.9]] * 100, atol=1e-12)
    np.testing.assert_array_equal(np.sign(v[0, :, 0]), np.where(path % 96 < 48, 1, -1) * [-1, 1])


def test_momentum_is_kept_where_balls_hit_each_other():
    angles = np.arange(5) * 2 * np.pi / 5 + 0.1
    out = np.stack([np.sin(angles), np.cos(angles)], -1)
    _, v = simulate([500 + 40 * out], [-out * np.arange(1, 6)[:, None]], 8, 1000, 60)
    assert np.abs(v[0, -1] - v[0, 0]).max(-1).min() > 0.1
    np.testing.assert_allclose(v.sum(2), np.broadcast_to(v[:, :1].sum(2), (1, 60, 2)), atol=1e-12)
    np.testing.assert_allclose((v**2).sum((2, 3)), 55, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        BallsOptions(),
        replace(SMALL, num_frames=100),
        BallsOptions(num_balls=1, radius=16, image_size=32),
        BallsOptions(num_balls=8, radius=3, speed=14, image_size=40, num_frames=50),
        BallsOptions(num_balls=2, radius=4.99, speed=49, image_size=30),
        BallsOptions(num_balls=2, speed=0, num_frames=2),
    ],
)
def test_episodes_are_legal(options):
    p, v, _ = starts(options, 25)
    np.testing.assert_allclose(np.hypot(v[..., 0], v[..., 1]), options.speed)
    for i in range(options.num_balls):
        for j in range(i):
            assert np.hypot(*(p[:, i] - p[:, j]).T).min() >= 2 * options.radius
    p, v = simulate(p, v, options.radius, options.image_size, options.num_frames)
    assert p.shape == v.shape == (25, options.num_frames, options.num_balls, 2)
    assert p.min() >= options.radius and p.max() <= options.image_size - options.radius
    np.testing.assert_allclose((v**2).sum((2, 3)), options.num_balls * options.speed**2, rtol=1e-11)
    files = make_episodes(options, "train", range(25))["positions"]
    assert files.min() >= np.float32(options.radius) and files.max() <= np.float32(options.image_size - options.radius)


def test_balls_stay_apart():
    p, v, _ = starts(BallsOptions(), 60)
    p, _ = simulate(p, v, 8, 64, 100)
    gaps = [np.linalg.norm(p[:, :, i] - p[:, :, j], axis=-1) - 16 for i, j in ((0, 1), (0, 2), (1, 2))]
    # Only two hits within one tenth of a frame leave an overlap, of a fraction of the way in that time.
    assert np.min(gaps) > -0.3 and np.mean(np.array(gaps) < -1e-9) < 0.01


def test_starts_fill_the_box_and_all_directions():
    p, v, _ = starts(BallsOptions(num_balls=1), 800)
    for axis in range(2):
        counts = np.histogram(p[:, 0, axis], 6, (8, 56))[0]
        assert abs(counts - 800 / 6).max() < 50
    counts = np.histogram(np.arctan2(v[:, 0, 0], v[:, 0, 1]), 8, (-np.pi, np.pi))[0]
    assert abs(counts - 100).max() < 45


def test_colors_are_css_and_drawn_with_replacement():
    _, _, colors = starts(BallsOptions(), 500)
    drawn = [tuple(color) for color in (255 * colors).reshape(-1, 3).astype(int).tolist()]
    counts = Counter(drawn)
    assert set(counts) == set(CSS.values())
    assert max(abs(count - 300) for count in counts.values()) < 75
    all_equal = sum(len(set(drawn[k : k + 3])) == 1 for k in range(0, 1500, 3))
    assert 5 <= all_equal <= 40


# ---- the drawing


def supersampled(centre, radius, image_size, samples=64):
    """The fraction of each pixel inside a disc, by points; [S, S]."""
    points = (np.arange(image_size * samples) + 0.5) / samples
    inside = (points[:, None] - centre[0]) ** 2 + (points - centre[1]) ** 2 < radius**2
    return inside.reshape(image_size, samples, image_size, samples).mean((1, 3))


@pytest.mark.parametrize(("radius", "image_size"), [(8, 64), (2.3, 16), (0.4, 8), (10, 20), (7.99, 17)])
def test_a_disc_covers_its_pixels(radius, image_size):
    centres = np.random.default_rng(0).uniform(radius, image_size - radius, (1, 12, 1, 2))
    centres[0, 0] = image_size / 2
    centres[0, 1] = radius
    centres[0, 2] = np.floor(centres[0, 2]).clip(radius, image_size - radius)
    images = render(centres, np.ones((1, 1, 3)), radius, image_size)
    assert images.dtype == np.uint8 and images.shape == (1, 12, image_size, image_size, 3)
    assert (images[..., 0] == images[..., 1]).all() and (images[..., 0] == images[..., 2]).all()
    pixels = images[0, ..., 0] / 255
    grid = np.arange(image_size) + 0.5
    for image, centre in zip(pixels, centres[0, :, 0], strict=True):
        np.testing.assert_allclose(image, supersampled(centre, radius, image_size), atol=0.5 / 255 + 0.004)
        assert abs(image.sum() / (math.pi * radius**2) - 1) < (0.005 if radius > 2 else 0.02)
        mass = np.array([(image.sum(1) * grid).sum(), (image.sum(0) * grid).sum()]) / image.sum()
        np.testing.assert_allclose(mass, centre, atol=0.002 + 0.1 / radius**2)


def test_later_balls_cover_earlier_ones():
    centres = np.array([[[[10, 10], [10, 14]]]])
    image = render(centres, np.array([[[1, 0, 0], [0, 0, 1]]]), 5, 24)[0, 0]
    first, second = (supersampled(centre, 5, 24) for centre in ((10, 10), (10, 14)))
    np.testing.assert_allclose(image[..., 0] / 255, first * (1 - second), atol=0.01)
    np.testing.assert_allclose(image[..., 2] / 255, second, atol=0.01)
    assert not image[..., 1].any()


def test_frames_show_the_balls_where_the_positions_say():
    episodes = make_episodes(BallsOptions(num_frames=20), "val", range(3))
    for episode in range(3):
        for frame in range(0, 20, 7):
            expected = np.zeros((64, 64, 3))
            for position, color in zip(
                episodes["positions"][episode, frame], episodes["colors"][episode, frame], strict=True
            ):
                alpha = supersampled(position, 8, 64, 32)[..., None]
                expected = expected * (1 - alpha) + color * alpha
            np.testing.assert_allclose(episodes["imgs"][episode, frame] / 255, expected, atol=0.01)


# ---- the files


FORMAT = {
    "imgs": ("uint8", (16, 16, 3)),
    "positions": ("float32", (2, 2)),
    "velocities": ("float32", (2, 2)),
    "sizes": ("float32", (2,)),
    "masses": ("float32", (2,)),
    "ids": ("int32", (2,)),
    "present": ("uint8", (2,)),
    "in_camera": ("uint8", (2,)),
    "layers": ("int32", (2,)),
    "shapes": ("int32", (2,)),
    "colors": ("float32", (2, 3)),
}


def contents(path):
    with h5py.File(path) as file:
        return {name: array[()] for name, array in file.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_format(tmp_path, capsys):
    prepare(tmp_path / "a" / "balls", "--train 5 --val 2 --test 3 --seed 7")
    for split, number in zip(SPLITS, (5, 2, 3), strict=True):
        with h5py.File(tmp_path / "a" / "balls" / f"{split}.hdf5") as file:
            assert {name: (str(array.dtype), array.shape) for name, array in file.items()} == {
                name: (dtype, (number, 6, *shape)) for name, (dtype, shape) in FORMAT.items()
            }
            for array in file.values():
                assert array.chunks is None and array.id.get_offset() is not None
            assert dict(file.attrs) == {
                "num_frames": 6,
                "num_balls": 2,
                "radius": 2.5,
                "speed": 2,
                "image_size": 16,
                "seed": 7,
                "split": split,
            }
            assert set(np.unique(file["ids"][..., 0])) == {1} and set(np.unique(file["ids"][..., 1])) == {2}
            assert set(np.unique(file["layers"][..., 0])) == {0} and set(np.unique(file["layers"][..., 1])) == {1}
            for name, value in {"sizes": 2.5, "masses": 1, "present": 1, "in_camera": 1, "shapes": 0}.items():
                assert set(np.unique(file[name])) == {value}
            assert (file["colors"][:] == file["colors"][:, :1]).all()
            np.testing.assert_allclose(np.linalg.norm(file["velocities"][:, 0], axis=-1), 2, rtol=1e-6)
    assert sorted(path.name for path in (tmp_path / "a" / "balls").iterdir()) == ["test.hdf5", "train.hdf5", "val.hdf5"]
    assert " MB in " in capsys.readouterr().out


def test_released_options_by_default():
    args = balls_preparation.parse_arguments(["--out", "x"])
    assert (args.train, args.val, args.test) == (5000, 200, 200)
    options = {
        name: getattr(args, name) for name in ("num_frames", "num_balls", "radius", "speed", "image_size", "seed")
    }
    assert options == {"num_frames": 100, "num_balls": 3, "radius": 8, "speed": 3, "image_size": 64, "seed": 0}
    assert BallsOptions(**options) == BallsOptions()
    assert make_episodes(BallsOptions(), "test", range(2))["imgs"].shape == (2, 100, 64, 64, 3)


def test_episodes_do_not_depend_on_their_number_nor_on_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(balls_preparation, "_BATCH_BYTES", 20_000)
    prepare(tmp_path / "one", "--train 9 --val 1 --test 1")
    prepare(tmp_path / "two", "--train 9 --val 1 --test 1 --processes 2")
    monkeypatch.setattr(balls_preparation, "_BATCH_BYTES", 60_000)
    prepare(tmp_path / "few", "--train 4 --val 1 --test 1")
    one, two, few = (contents(tmp_path / name / "train.hdf5") for name in ("one", "two", "few"))
    assert len(one["imgs"]) == 9
    assert_equal(one, two)
    assert_equal({name: array[:4] for name, array in one.items()}, few)
    for number, episode in enumerate(one["imgs"]):
        assert not any((episode == other).all() for other in one["imgs"][:number])


def test_splits_and_seeds_differ(tmp_path):
    prepare(tmp_path / "zero", "--train 2 --val 2 --test 2")
    prepare(tmp_path / "one", "--train 2 --val 2 --test 2 --seed 1")
    videos = [contents(tmp_path / seed / f"{split}.hdf5")["imgs"][0] for seed in ("zero", "one") for split in SPLITS]
    for number, video in enumerate(videos):
        assert not any((video == other).all() for other in videos[:number])


def test_an_interrupted_preparation_goes_on(tmp_path, monkeypatch, capsys):
    prepare(tmp_path / "whole", "--train 3 --val 3 --test 2")
    make = balls_preparation.make_episodes

    def interrupted(options, split, indices):
        if split == "val" and indices.stop == 3:
            raise KeyboardInterrupt
        return make(options, split, indices)

    monkeypatch.setattr(balls_preparation, "_BATCH_BYTES", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(balls_preparation, "make_episodes", interrupted)
        prepare(tmp_path / "cut", "--train 3 --val 3 --test 2")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["train.hdf5"]
    written = (tmp_path / "cut" / "train.hdf5").stat().st_mtime_ns
    prepare(tmp_path / "cut", "--train 3 --val 3 --test 2")
    assert f"{tmp_path / 'cut' / 'train.hdf5'} is there already: kept" in capsys.readouterr().out
    assert (tmp_path / "cut" / "train.hdf5").stat().st_mtime_ns == written
    for split in SPLITS:
        assert_equal(*(contents(tmp_path / name / f"{split}.hdf5") for name in ("cut", "whole")))


@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_no_process_outlives_the_command(tmp_path, how):
    command = [sys.executable, "datasets/balls_preparation.py", "--out", str(tmp_path / "balls")]
    command += ["--train", "600", "--processes", "2"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = (tmp_path / "balls").glob
    wait_until(lambda: any(part.stat().st_blocks > 100 for part in parts(".train.*.part.hdf5")), 30)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    assert process.wait(timeout=30) != 0
    wait_until(lambda: group_is_gone(process.pid), 30)
    if how == "ctrl-c":
        assert not list((tmp_path / "balls").iterdir())
    prepare(tmp_path / "balls", "--train 2 --val 1 --test 1")
    names = sorted(path.name for path in (tmp_path / "balls").iterdir() if not path.name.startswith("."))
    assert names == ["test.hdf5", "train.hdf5", "val.hdf5"]


def test_other_files_are_refused_and_forced(tmp_path):
    prepare(tmp_path, "--train 2 --val 2 --test 2")
    path = tmp_path / "train.hdf5"
    before = path.read_bytes()
    for arguments, message in {
        "--train 3 --val 2 --test 2": "episodes 2, not 3;",
        "--train 2 --val 2 --test 2 --radius 2 --seed 1": "radius 2.5, not 2.0; seed 0, not 1;",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"{path} exists with {message}") + ".*--force"):
            prepare(tmp_path, arguments)
    shutil.copy(tmp_path / "val.hdf5", path)
    with pytest.raises(UserError, match="split val, not train;"):
        prepare(tmp_path, "--train 2 --val 2 --test 2")
    foreign = tmp_path / "foreign.hdf5"
    with h5py.File(foreign, "w") as file:
        file["imgs"] = np.zeros((2, 6, 16, 16, 3), np.uint8)
    for content in (b"", b"text", before[:-100], foreign.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(f"{path} exists but was not made by this script") + ".*--force"):
            prepare(tmp_path, "--train 2 --val 2 --test 2")
        assert path.read_bytes() == content
    prepare(tmp_path, "--train 2 --val 2 --test 2 --force")
    assert_equal(contents(path), make_episodes(SMALL, "train", range(2)))
    prepare(tmp_path, "--train 3 --val 1 --test 1 --force")
    assert [len(contents(tmp_path / f"{split}.hdf5")["imgs"]) for split in SPLITS] == [3, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train 0", "train is 0; legal: at least 1"),
        ("--val -1", "val is -1"),
        ("--test 0", "test is 0"),
        ("--processes 0", "processes is 0"),
        ("--num_frames 0", "num_frames is 0"),
        ("--num_balls 0", "num_balls is 0"),
        ("--image_size -64", "image_size is -64"),
        ("--seed -1", "seed is -1; legal: from 0 to 2^32 - 1"),
        ("--seed 4294967296", "seed is 4294967296"),
        ("--radius 0", "radius is 0.0"),
        ("--radius -2", "radius is -2.0"),
        ("--radius nan", "radius is NaN"),
        ("--radius 8.1", "radius is 8.1; legal: above 0 and at most half the image_size, 8"),
        ("--speed -1", "speed is -1.0"),
        ("--speed inf", "speed is Infinity"),
        ("--speed 25.1", "speed is 25.1; legal: from 0 to 25 px per frame"),
        ("--num_balls 9", "num_balls: 9 balls of radius 2.5 do not fit at random into a box of 16 x 16 pixels"),
        ("--num_balls 1000000", "num_balls: 1000000 balls of radius 2.5 do not fit"),
    ],
)
def test_illegal_options(tmp_path, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare(tmp_path / "balls", arguments if "speed" in arguments else f"{arguments} --speed 0")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_room_on_the_disk_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9e9, 4e9, 5e9))
    with pytest.raises(UserError, match=r"--out: .*balls needs 6\.\d GB, but 5\.0 GB are free there"):
        balls_preparation.main(["--out", str(tmp_path / "new" / "balls")])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: the folder cannot be made: File exists"):
        prepare(tmp_path / "file")
    script = [
        sys.executable,
        "datasets/balls_preparation.py",
        *SMALL_ARGUMENTS.split(),
        "--out",
        str(tmp_path / "file"),
    ]
    done = subprocess.run([*script, "--radius", "9"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: radius is 9.0") and done.stderr.count("\n") == 1
    make = balls_preparation.make_episodes

    def on_a_full_disk(options, split, indices):
        if split == "val" and options.num_frames > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(options, split, indices)

    monkeypatch.setattr(balls_preparation, "make_episodes", on_a_full_disk)
    with pytest.raises(UserError, match=r"balls/val\.hdf5: cannot be written: No space left on device"):
        prepare(tmp_path / "balls", "--train 1 --val 1 --test 1")
    assert [path.name for path in (tmp_path / "balls").iterdir()] == ["train.hdf5"]


# ---- the data sets


ANNOTATIONS = {"positions": (2,), "sizes": (), "ids": (), "in_camera": ()}
TYPES = {"positions": torch.float32, "sizes": torch.float32, "ids": torch.int64, "in_camera": torch.int64}
NUMBERS = {"train.hdf5": 3, "val.hdf5": 2, "test.hdf5": 1}
STORAGE = {
    "contiguous": {},
    "chunked": {"chunks": True},
    "gzip": {"chunks": True, "compression": "gzip", "shuffle": True},
}


def random_files(root, storage="contiguous", names=tuple(ANNOTATIONS), dtype=np.float32, **options):
    """Files of episodes of 7 frames of 6 x 6 pixels with 2 balls, and random content."""
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    for name, number in NUMBERS.items():
        with h5py.File(root / name, "w", **options) as file:
            images = rng.integers(0, 256, (number, 7, 6, 6, 3), np.uint8)
            file.create_dataset("imgs", data=images, **STORAGE[storage])
            for annotation in names:
                values = rng.integers(0, 60, (number, 7, 2, *ANNOTATIONS[annotation])).astype(dtype)
                file.create_dataset(annotation, data=values)
    return root


def expected_item(path, episode, first, last):
    """An item, read in the plainest way."""
    with h5py.File(path) as file:
        video = [
            [[[file["imgs"][episode, t, y, x, c] / 255 for x in range(6)] for y in range(6)] for c in range(3)]
            for t in range(first, last)
        ]
        entries = [
            torch.tensor(np.array(file[name][episode][first:last].tolist()), dtype=TYPES[name])
            if name in file
            else torch.empty(0)
            for name in ANNOTATIONS
        ]
    return [torch.tensor(video, dtype=torch.float32), *entries]


def assert_item(item, expected):
    assert isinstance(item, tuple) and len(item) == len(expected) == 5
    for entry, other in zip(item, expected, strict=True):
        assert entry.dtype == other.dtype and entry.shape == other.shape and entry.is_contiguous()
        torch.testing.assert_close(entry, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("length", [1, 3, 7])
def test_train_items_are_all_windows(tmp_path, storage, length):
    root = random_files(tmp_path, storage)
    videos, images = (kind(root, "train", 6, length) for kind in (BallsVideos, BallsImages))
    windows = 7 - length + 1
    assert len(videos) == len(images) == 3 * windows
    for index in {0, 1, windows - 1, windows, 2 * windows - 1, 3 * windows - 1}:
        episode, first = index // windows, index % windows
        expected = expected_item(root / "train.hdf5", episode, first, first + length)
        assert_item(videos[index], expected)
        assert_item(images[index], [entry[0] for entry in expected] if length == 1 else expected)
    assert_item(videos[-1], expected_item(root / "train.hdf5", 2, 7 - length, 7))
    for index in (3 * windows, -3 * windows - 1):
        with pytest.raises(IndexError):
            videos[index]


@pytest.mark.parametrize("mode", ["val", "valid", "test"])
def test_items_of_the_other_modes(tmp_path, mode):
    root = random_files(tmp_path)
    name = "test.hdf5" if mode == "test" else "val.hdf5"
    number = NUMBERS[name]
    videos, images = (kind(root, mode, 6, 4) for kind in (BallsVideos, BallsImages))
    assert (len(videos), len(images)) == (number, 4 * number)
    for episode in range(number):
        assert_item(videos[episode], expected_item(root / name, episode, 0, 7))
        assert_item(images[4 * episode + 3], expected_item(root / name, episode, 3, 7))


def test_files_of_others(tmp_path):
    for name, options in {
        "block": {"userblock_size": 1024},
        "types": {"dtype": np.dtype(">f8")},
        "some": {"names": ("sizes",)},
        "none": {"names": ()},
    }.items():
        root = random_files(tmp_path / name, **options)
        assert_item(BallsVideos(root, "train", 6, 4)[5], expected_item(root / "train.hdf5", 1, 1, 5))
    assert [entry.numel() for entry in BallsImages(root, "val", 6, 1)[9]] == [108, 0, 0, 0, 0]
    root = random_files(tmp_path / "unwritten", names=("ids",))
    with h5py.File(root / "train.hdf5", "a") as file:
        file.create_dataset("sizes", (3, 7, 2), "f4")
    assert not BallsVideos(root, "train", 6, 4)[0][2].any()


def test_prepared_files_are_mapped_and_a_file_is_opened_once(tmp_path, monkeypatch):
    prepare(tmp_path / "balls", "--train 2 --val 1 --test 1")
    random_files(tmp_path / "gzip", "gzip")
    opened = []
    open_file = h5py.File
    monkeypatch.setattr(
        h5py, "File", lambda path, *args, **options: opened.append(path) or open_file(path, *args, **options)
    )
    mapped = BallsVideos(tmp_path / "balls", "train", 16, 3)
    read = BallsVideos(tmp_path / "gzip", "train", 6, 3, cache=False)
    assert len(opened) == 2
    for dataset, expected in ((mapped, 2), (read, 3)):
        assert len([dataset[index] for index in range(8)]) == 8
        assert len(opened) == expected


@pytest.mark.parametrize("storage", ["contiguous", "gzip"])
def test_pickled(tmp_path, storage):
    root = random_files(tmp_path, storage)
    dataset = BallsVideos(root, "train", 6, 3, cache=False)
    before = dataset[7]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2_000
    assert_item(pickle.loads(pickled)[7], before)


@pytest.mark.parametrize(("storage", "start"), [("contiguous", "fork"), ("gzip", "fork"), ("gzip", "spawn")])
def test_items_through_workers(tmp_path, storage, start):
    root = random_files(tmp_path, storage)
    dataset = BallsVideos(root, "train", 6, 3, cache=False)
    expected = [dataset[index] for index in range(15)]
    workers = 2 if start == "fork" else 1
    loader = DataLoader(dataset, batch_size=5, num_workers=workers, multiprocessing_context=start)
    batches = list(loader)
    assert len(batches) == 3
    for number, batch in enumerate(batches):
        for position, entry in enumerate(batch):
            whole = torch.stack([item[position] for item in expected[5 * number : 5 * number + 5]])
            assert torch.equal(entry, whole)
    assert_item(dataset[7], expected_item(root / "train.hdf5", 1, 2, 5))


def test_normalized_positions_are_the_discs_centres_of_mass(tmp_path):
    prepare(tmp_path, "--train 1 --val 1 --test 1 --num_balls 1")
    video, positions, *_ = BallsVideos(tmp_path, "test", 16, 6)[0]
    z = to_normalized(positions, 16)
    grid = torch.linspace(-1, 1, 16)
    for frame, centre in zip(video.sum(1), z[:, 0], strict=True):
        mass = torch.stack([(frame.sum(1) * grid).sum(), (frame.sum(0) * grid).sum()]) / frame.sum()
        torch.testing.assert_close(mass, centre, rtol=0, atol=2e-3)
    assert to_normalized(np.array([0.5, 32, 63.5]), 64).tolist() == [-1, 0, 1]


def test_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    random_files(tmp_path / "data" / "balls")
    assert get_video_dataset("balls", None, 4, "val", 6)[0][0].shape == (7, 3, 6, 6)
    assert get_video_dataset("balls", "data/balls", 4, "train", 6)[0][0].shape == (4, 3, 6, 6)
    assert get_image_dataset("balls", None, "val", 6, seq_len=1)[0][0].shape == (3, 6, 6)
    assert len(get_image_dataset("balls", None, "test", 6, seq_len=2, num_items=4)) == 4


def test_configuration():
    values = json.loads((REPOSITORY / "configs" / "balls.json").read_text())
    shapes = json.loads((REPOSITORY / "configs" / "shapes.json").read_text())
    assert list(values) == list(shapes)
    config = Config.load("balls")
    assert (config.ds, config.root, config.n_kp_enc, config.n_kp_prior) == ("balls", "./data/balls", 6, 12)
    assert (config.learned_feature_dim, config.timestep_horizon, config.use_correlation_heatmaps) == (3, 10, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "training"}, 'mode is "training"; legal: "train" or "val" or "valid" or "test"'),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 6.0}, "image_size is 6.0"),
        ({"sample_length": 0}, "sample_length is 0"),
        ({"sample_length": True}, "sample_length is true"),
        ({"sample_length": 8}, "sample_length: 8 frames are more than the 7 of an episode of {root}/train.hdf5"),
        ({"sample_length": 8, "mode": "val"}, "sample_length: 8 frames"),
        (
            {"image_size": 64},
            "image_size: 64 is not the size of the frames of {root}/train.hdf5, 6; legal: image_size 6, or other files:"
            " python datasets/balls_preparation.py --out FOLDER --image_size 64",
        ),
    ],
)
@pytest.mark.parametrize("kind", [BallsVideos, BallsImages])
def test_illegal_arguments(tmp_path, kind, arguments, message):
    root = random_files(tmp_path)
    with pytest.raises(UserError, match=re.escape(message.format(root=root))) as error:
        kind(root, **{"image_size": 6, "sample_length": 3, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("root", "shown"),
    [("my/balls", "my/balls"), ("./here", "./here"), ("two words", "'two words'"), (None, "./data/balls")],
)
def test_a_missing_file_says_how_to_make_it(tmp_path, monkeypatch, root, shown):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        BallsVideos(root, "val")
    assert str(error.value).startswith(str(Path(root or "data/balls") / "val.hdf5"))
    assert str(error.value).endswith(f"make it with: python datasets/balls_preparation.py --out {shown}")


def damaged(**arrays):
    """Write a train.hdf5 with these arrays over the file at a path."""

    def write(path):
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array

    return write


def without_its_groups(path):
    content = path.read_bytes()
    path.write_bytes(content[:96] + bytes(700) + content[796:])


FRAMES = np.zeros((2, 7, 6, 6, 3), np.uint8)
DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-500]), "is not a whole HDF5 file"),
    "empty": (lambda path: path.write_bytes(b""), "is not a whole HDF5 file"),
    "foreign": (lambda path: path.write_text("text"), "is not a whole HDF5 file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is not a whole HDF5 file"),
    "overwritten": (without_its_groups, "is not a whole HDF5 file"),
    "no imgs": (damaged(frames=FRAMES), "has no array imgs"),
    "group": (damaged(**{"imgs/a": FRAMES}), "has no array imgs"),
    "floats": (damaged(imgs=FRAMES.astype(np.float32)), r"imgs is float32 \[2, 7, 6, 6, 3\]; legal: uint8"),
    "images": (damaged(imgs=FRAMES[0]), r"imgs is uint8 \[7, 6, 6, 3\]"),
    "channels first": (damaged(imgs=FRAMES.transpose(0, 1, 4, 2, 3)), r"imgs is uint8 \[2, 7, 3, 6, 6\]"),
    "oblong": (damaged(imgs=FRAMES[:, :, :5]), r"imgs is uint8 \[2, 7, 5, 6, 3\]"),
    "no episodes": (damaged(imgs=FRAMES[:0]), r"imgs is uint8 \[0, 7, 6, 6, 3\]"),
    "null": (damaged(imgs=h5py.Empty("u1")), r"imgs is uint8 \[\]"),
    "annotation": (
        damaged(imgs=FRAMES, sizes=np.ones((2, 6, 3))),
        r"sizes has the shape \[2, 6, 3\]; legal: 2 episodes of 7 frames first",
    ),
}


def test_a_file_that_another_process_writes_is_left(tmp_path):
    path = random_files(tmp_path) / "train.hdf5"
    content = path.read_bytes()
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); input()"
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError) as error:
            BallsVideos(tmp_path, "train", 6, 3)
        legal = r"is open for writing in another process; legal: a file that nobody writes to: let that process end"
        assert re.match(re.escape(f"{path} {legal}"), str(error.value))
        with pytest.raises(UserError, match=f"{re.escape(legal)}, or another --out$"):
            prepare(tmp_path)
        other.communicate(b"\n")
    assert len(BallsVideos(tmp_path, "train", 6, 3)) and path.read_bytes() == content


def test_a_file_that_may_not_be_read_is_left(tmp_path, monkeypatch):
    path = random_files(tmp_path) / "train.hdf5"
    refuse = PermissionError(errno.EACCES, "unable to open file: errno = 13")
    monkeypatch.setattr(h5py, "File", lambda *args, **options: (_ for _ in ()).throw(refuse))
    with pytest.raises(UserError) as error:
        BallsVideos(tmp_path, "train", 6, 3)
    assert str(error.value).startswith(f"{path} may not be read by this user; legal: a file that may be read")
    with pytest.raises(
        UserError, match=r"may not be read by this user; legal: a file that may be read, or another --out"
    ):
        prepare(tmp_path)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, kind):
    path = random_files(tmp_path) / "train.hdf5"
    damage, message = DAMAGES[kind]
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        BallsVideos(tmp_path, "train", 6, 3)
    assert str(error.value).startswith(str(path)) and not re.search("\n|delete", str(error.value))


@pytest.mark.parametrize("name", ["imgs", "positions"])
def test_what_is_damaged_within_a_compressed_array_is_named(tmp_path, name):
    path = random_files(tmp_path) / "train.hdf5"
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        del file[name]
        array = file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]), fletcher32=True)
        place = array.id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    videos = BallsVideos(tmp_path, "train", 6, 7, cache=False)
    assert len(videos[0][0]) == 7
    with pytest.raises(UserError, match=rf"train\.hdf5: {name} of episode 1 cannot be read: "):
        videos[1]
