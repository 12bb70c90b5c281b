"""The OBJ3D-like set: its scenes, its motion, its pictures and its files."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Config
from datasets import obj3d_like_preparation as preparation
from datasets.balls_ds import to_normalized
from datasets.get_dataset import get_image_dataset, get_video_dataset
from datasets.obj3d_like_preparation import COLORS, EYE, FIELD_OF_VIEW, TARGET, Scene, draw_scene, render, simulate
from eval.eval_gen_metrics import measure_predictions
from eval.image_metrics import ImageMetrics
from tests.processes import group_is_gone, wait_until
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")
SMALL = "--num_frames 2 --image_size 16 --processes 1"
GRAVITY, FRICTION, RESTITUTION = 9.8, 0.2, 0.64


def prepare(out, *arguments):
    preparation.main(["--out", str(out), *SMALL.split(), *" ".join(arguments).split()])


def make_scene(*bodies, velocity=(0, 0, 0)):
    """A `Scene` of bodies (kind, x, y) of size 0.5, not turned, in the first colours."""
    kinds, x, y = zip(*bodies, strict=True)
    heights = [0.5 if kind == "ball" else 0.425 for kind in kinds]
    colors = np.array(list(COLORS.values()))[: len(kinds)]
    sizes, yaws = np.full(len(kinds), 0.5), np.zeros(len(kinds))
    return Scene(kinds, sizes, colors, np.column_stack([x, y, heights]).astype(float), yaws, np.array(velocity, float))


def show(scene, image_size=128):
    """One frame of a scene as it begins, float [S, S, 3]."""
    return render(scene, *simulate(scene, 1), image_size)[0][0].astype(float)


def half_heights(scene):
    return scene.sizes * [1 if kind == "ball" else 0.85 for kind in scene.kinds]


def reaches(scene):
    """The radius of the circle around each body's footprint."""
    return half_heights(scene) * [np.sqrt(2) if kind == "cube" else 1 for kind in scene.kinds]


def project(points):
    """Where the camera sees points [..., 3]: (row, column) from -1 to 1 within a frame."""
    forward = np.subtract(TARGET, EYE) / np.linalg.norm(np.subtract(TARGET, EYE))
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    seen = np.asarray(points) - EYE
    edge = (seen @ forward) * np.tan(np.radians(FIELD_OF_VIEW) / 2)
    return np.stack([seen @ down / edge, seen @ right / edge], axis=-1)


# ---- the scenes


def test_bodies_start_on_the_plane_apart_and_in_view():
    angles = np.linspace(0, 2 * np.pi, 60)
    rims = np.concatenate([np.stack([np.cos(angles), np.sin(angles), 0 * angles + up], axis=-1) for up in (-1, 1)])
    numbers, kinds, names = set(), [], []
    for index in range(300):
        scene = draw_scene(0, "train", index)
        numbers.add(len(scene.kinds))
        kinds += scene.kinds
        np.testing.assert_allclose(scene.positions[:, 2], half_heights(scene))
        assert len(np.unique(scene.colors, axis=0)) == len(scene.kinds)
        names += [name for name, color in COLORS.items() if (scene.colors == color).all(-1).any()]
        for i, j in itertools.combinations(range(len(scene.kinds)), 2):
            assert np.linalg.norm(scene.positions[i] - scene.positions[j]) > reaches(scene)[[i, j]].sum()
        assert np.linalg.norm(scene.positions[:-1, :2], axis=-1).max() < 1.5
        np.testing.assert_allclose(np.linalg.norm(scene.positions[-1, :2]), 2.6)
        # The upright cylinder around each body.
        surface = np.stack([reaches(scene), reaches(scene), half_heights(scene)], axis=-1)[:, None] * rims
        assert np.abs(project(scene.positions[:, None] + surface)).max() < 1
    assert numbers == {3, 4, 5} and set(names) == set(COLORS)
    assert all(kinds.count(kind) > 0.25 * len(kinds) for kind in ("ball", "cube", "cylinder"))


def test_the_last_body_is_aimed_at_another():
    for index in range(100):
        scene = draw_scene(1, "val", index)
        assert scene.velocity[2] == 0 and 5 <= np.linalg.norm(scene.velocity) <= 7.5
        way = scene.velocity[:2] / np.linalg.norm(scene.velocity)
        to_others = scene.positions[:-1, :2] - scene.positions[-1, :2]
        across = np.abs(to_others @ [-way[1], way[0]])
        assert (across < reaches(scene)[:-1] + reaches(scene)[-1])[to_others @ way > 0].any()


# ---- the motion


def test_bodies_at_rest_stay_until_something_hits_them():
    for index in range(20):
        scene = draw_scene(0, "test", index)
        positions, orientations = simulate(scene, 100)
        bodies = len(scene.kinds)
        assert positions.shape == (100, bodies, 3) and orientations.shape == (100, bodies, 4)
        np.testing.assert_allclose(positions[0], scene.positions, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(orientations, axis=-1), 1, atol=1e-6)
        assert (positions[..., 2] > half_heights(scene) - 0.02).all() and positions[..., 2].max() < 1.2
        moved = np.linalg.norm(positions - positions[0], axis=-1)[:, :-1]  # [T, n - 1]
        touching = np.linalg.norm(positions[:, :-1] - positions[:, -1:], axis=-1) < reaches(scene)[:-1] + 0.85
        first = (moved > 0.05).any(-1).argmax()
        assert 0 < first < 60 and touching[: first + 1].any()
        assert moved[: touching.any(-1).argmax()].max(initial=0) < 0.001
        # What hits is slowed or turned by it.
        speeds = np.diff(positions[:, -1], axis=0) * 60
        np.testing.assert_allclose(speeds[0], scene.velocity, atol=0.3)
        assert np.linalg.norm(speeds[first + 1] - speeds[0]) > 0.5


def test_a_ball_that_comes_in_rolls():
    positions, orientations = simulate(make_scene(("ball", -2, 0), velocity=(3, 0, 0)), 16)
    way = positions[-1, 0, 0] - positions[0, 0, 0]
    assert 0.65 < way < 0.75 and np.abs(positions[:, 0, 1]).max() < 1e-3
    # Turned about y by the way over the radius; a quaternion has half the angle.
    np.testing.assert_allclose(orientations[-1, 0], [np.cos(way), 0, np.sin(way), 0], atol=0.01)


def test_friction_slows_a_sliding_cube():
    positions, _ = simulate(make_scene(("cube", -2, 0), velocity=(3, 0, 0)), 120)
    times = np.minimum(np.arange(120) / 60, 3 / (FRICTION * GRAVITY))
    np.testing.assert_allclose(positions[:, 0, 0], -2 + 3 * times - FRICTION * GRAVITY * times**2 / 2, atol=0.02)


def test_two_balls_head_on():
    positions, _ = simulate(make_scene(("ball", 0.5, 0), ("ball", -1, 0), velocity=(6, 0, 0)), 12)
    speeds = np.diff(positions[..., 0], axis=0) * 60  # [T, 2]
    # They touch after 0.5 / 6 s, 5 frames; equal masses, one at rest.
    np.testing.assert_allclose(speeds[:5], [[0, 6]] * 5, atol=0.15)
    np.testing.assert_allclose(speeds[6], [6 * (1 + RESTITUTION) / 2, 6 * (1 - RESTITUTION) / 2], atol=0.4)
    assert np.abs(positions[..., 1]).max() < 0.01


def test_motion_does_not_depend_on_what_came_before_nor_on_its_length():
    scene = draw_scene(0, "train", 3)
    once = simulate(scene, 40)
    simulate(draw_scene(0, "train", 4), 10)
    for entry, other in zip(simulate(scene, 20), once, strict=True):
        np.testing.assert_array_equal(entry, other[:20])


# ---- the pictures


@pytest.mark.parametrize("image_size", [16, 64, 128, 200])
def test_the_plane_is_even(image_size):
    # Neither stripes of shadow nor a rim that the light misses.
    image = show(make_scene(("ball", 0, 40)), image_size)
    assert image.shape == (image_size, image_size, 3)
    assert len(np.unique(image)) == 1 and 160 < image[0, 0, 0] < 220


@pytest.mark.parametrize("kind", ["ball", "cube", "cylinder"])
@pytest.mark.parametrize("place", [(0, 0), (1.5, 1.5), (-2, -1)])
def test_a_body_is_where_the_camera_sees_it(kind, place):
    scene = make_scene((kind, *place))
    image = show(scene)
    rows, columns = np.nonzero(np.ptp(image, axis=-1) > 60)
    seen = (np.array([rows.mean(), columns.mean()]) + 0.5) / 64 - 1
    np.testing.assert_allclose(seen, project(scene.positions[0]), atol=0.02)
    # As far to the sides as the part of it that is nearest to the camera, or farther for what is seen obliquely.
    half = half_heights(scene)[0]
    width = np.ptp(project(scene.positions[0] + np.outer([-1, 1], [half, 0, 0]))[:, 1])
    assert width - 0.03 < (np.ptp(columns) + 1) / 64 < 1.35 * width


@pytest.mark.parametrize("name", COLORS)
def test_colors_are_vivid_in_light_and_in_shade(name):
    bodies = [(kind, 1.5 * place, 0) for place, kind in enumerate(("ball", "cube", "cylinder"), -1)]
    scene = make_scene(*bodies)
    scene.colors[:] = COLORS[name]
    image = show(scene)
    body = image[np.ptp(image, axis=-1) > 60]
    assert len(body) > 600
    # Light changes how bright they are, not their hue: the same ratios but for a rim pixel that is partly plane.
    body = body[np.linalg.norm(np.cross(body, COLORS[name]), axis=-1) < 0.05 * np.linalg.norm(body, axis=-1)]
    assert len(body) > 500
    brightness = body.max(-1) / max(COLORS[name])
    assert 70 < brightness.min() < 0.75 * brightness.max() and brightness.max() > 200


def test_light_from_the_left_makes_shadows_to_the_right():
    scene = make_scene(("cylinder", 0, 0))
    image = show(scene)
    plane = image[0, 0, 0]
    is_plane = np.ptp(image, axis=-1) == 0
    rows, columns = np.nonzero(is_plane & (image[..., 0] < 0.95 * plane))
    assert 80 < len(rows) < 600
    row, column = (project(scene.positions[0]) + 1) * 64
    assert columns.mean() > column + 8 and abs(rows.mean() - row) < 12
    assert (image[is_plane] >= 0.8 * plane).all()
    body = np.ptp(image, axis=-1) > 60
    left, right = (image[..., 0][body & side] for side in (np.arange(128) < column, np.arange(128) >= column))
    assert left.mean() > 1.15 * right.mean()


def test_pixels_are_means_of_finer_samples():
    scene = draw_scene(0, "train", 0)
    blocks = show(scene, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    np.testing.assert_allclose(show(scene, 64), blocks, atol=1)


def test_a_near_body_hides_a_far_one():
    image = show(make_scene(("cube", 0, 0.9), ("cube", 0, 0)))
    both = [show(make_scene(("cube", 0, y))) for y in (0.9, 0)]
    red = [np.ptp(one, axis=-1) > 60 for one in both]
    covered = red[0] & red[1]
    assert covered.sum() > 30
    green = image[..., 1] > image[..., 0]
    assert green[covered].mean() > 0.8


# ---- the truth


def truth_of(scene, monkeypatch, num_frames=1, image_size=32):
    monkeypatch.setattr(preparation, "draw_scene", lambda *episode: scene)
    return preparation.make_episode(preparation.Obj3dLikeOptions(num_frames, image_size), "train", 0)[1]


def test_truth_is_the_projection_of_the_motion(monkeypatch):
    scene = draw_scene(0, "train", 4)
    positions, _ = simulate(scene, 30)
    truth = truth_of(scene, monkeypatch, 30)
    np.testing.assert_allclose(truth["positions"], (project(positions) + 1) * 16, atol=1e-3)
    # To the camera's left and right of the centre, where the ball that fits in ends.
    beside = [positions + side * half_heights(scene)[:, None] * [1, 0, 0] for side in (-1, 1)]
    width = np.subtract(*(project(points)[..., 1] for points in beside[::-1])) * 16
    np.testing.assert_allclose(truth["sizes"], width / 2, atol=1e-3)
    assert truth["kinds"].tolist() == list(scene.kinds)
    np.testing.assert_allclose(truth["colors"], scene.colors, atol=1e-6)
    assert [truth[name].dtype for name in ("positions", "sizes", "in_camera", "colors")] == ["f4", "f4", "?", "f4"]


def test_what_is_hidden_or_outside_is_not_in_camera(monkeypatch):
    # Two balls cut by the frame's rims, one with its centre within; a third above a cube, hidden behind it, before it.
    across = np.linspace(0, 8, 1601)
    inside = across[project(np.stack([across, 0 * across, 0 * across + 0.5], axis=-1))[:, 1] < 1].max()
    scene = make_scene(("ball", inside - 0.1, 0), ("ball", -inside - 0.1, 0), ("ball", 0, 0.75), ("cube", 0, 0))
    assert truth_of(scene, monkeypatch)["in_camera"].tolist() == [[True, False, True, True]]
    scene.positions[:2, 0] *= -1
    scene.sizes[2], scene.positions[2] = 0.1, (0, 0.6, 0.1)
    assert truth_of(scene, monkeypatch)["in_camera"].tolist() == [[True, False, False, True]]
    scene.positions[2] = (0, -0.6, 0.1)
    assert truth_of(scene, monkeypatch)["in_camera"].tolist() == [[True, False, True, True]]


# ---- the data set


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """6 frames of 32 pixels; 4 train, 1 val and 3 test episodes, and the truth of each."""
    out = tmp_path_factory.mktemp("made")
    prepare(out, "--train 4 --val 1 --test 3 --num_frames 6 --image_size 32")
    return out, {path.parent.name: dict(np.load(path)) for path in out.glob("test/*/truth.npz")}


@pytest.mark.parametrize("image_size", [32, 16])
def test_items_are_frames_and_truth(made, image_size):
    out, truths = made
    videos = get_video_dataset("obj3d_like", str(out), 2, "test", image_size)
    most = max(len(truth["kinds"]) for truth in truths.values())
    assert len({len(truth["kinds"]) for truth in truths.values()}) > 1 and len(videos) == 3
    for episode, item in enumerate(videos):
        truth, (video, positions, sizes, ids, in_camera) = truths[str(episode)], item
        bodies = len(truth["kinds"])
        assert [tuple(entry.shape) for entry in item[1:]] == [(6, most, 2), (6, most), (6, most), (6, most)]
        assert [entry.dtype for entry in item] == [torch.float32] * 3 + [torch.int64] * 2
        np.testing.assert_allclose(positions[:, :bodies], truth["positions"] * image_size / 32, rtol=1e-6)
        np.testing.assert_allclose(sizes[:, :bodies], truth["sizes"] * image_size / 32, rtol=1e-6)
        np.testing.assert_array_equal(in_camera[:, :bodies], truth["in_camera"])
        np.testing.assert_array_equal(ids[:, :bodies], truth["in_camera"] * np.arange(1, bodies + 1))
        assert not in_camera[:, bodies:].any() and not ids[:, bodies:].any()
        if image_size == 32:
            frame = np.asarray(Image.open(out / f"test/{episode}/test_5.png"))
            np.testing.assert_array_equal((video[5] * 255).round().permute(1, 2, 0), frame)
    window = get_video_dataset("obj3d_like", str(out), 2, "train", image_size)[7]
    whole = get_image_dataset("obj3d_like", str(out), "train", image_size, 6)[1]
    single = get_image_dataset("obj3d_like", str(out), "train", image_size)[6 + 2]
    for part, full, one in zip(window, whole, single, strict=True):
        torch.testing.assert_close(part, full[2:4])
        torch.testing.assert_close(one, full[2])


def test_the_metric_position_sees_perfect_particles(made):
    out, truths = made
    videos = get_video_dataset("obj3d_like", str(out), 6, "test", 32)
    positions, in_camera = (torch.stack([item[i] for item in videos]) for i in (1, 4))

    class Perfect(torch.nn.Module):
        def sample(self, x, *_, **__):
            # In another order than the objects'.
            return x, {"z_pos": to_normalized(positions, 32).flip(2), "z_obj_on": in_camera.flip(2).float()}

    videos = get_video_dataset("obj3d_like", str(out), 1, "test", 32)
    sums = measure_predictions(Perfect(), videos, ImageMetrics(()), 6, 2, position=True)
    seen = sum(truth["in_camera"][2:].sum(-1) for truth in truths.values())
    np.testing.assert_array_equal(sums["tracked"].count, seen)
    assert sums["whole"].means() == sums["tracked"].means() == [1] * 4 and max(sums["position_error"].means()) < 1e-3


def test_plain_obj3d_reads_the_made_frames(made, tmp_path):
    for frame in range(100):
        (tmp_path / "val" / "0").mkdir(parents=True, exist_ok=True)
        shutil.copy(made[0] / f"val/0/test_{frame % 6}.png", tmp_path / f"val/0/test_{frame}.png")
    shutil.copy(made[0] / "val/0/truth.npz", tmp_path / "val/0")
    item = get_video_dataset("obj3d", str(tmp_path), 1, "val", 32)[0]
    torch.testing.assert_close(item[0][6], get_video_dataset("obj3d_like", str(made[0]), 1, "val", 32)[0][0][0])
    assert [len(entry) for entry in item[1:]] == [0] * 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read ("),
        (lambda path: path.write_bytes(b""), "cannot be read ("),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be read ("),
        (lambda path: path.write_bytes(b"PNG"), "cannot be read ("),
        (lambda path: np.savez(path, positions=np.zeros((6, 3, 2))), "cannot be read ("),
        (
            lambda path: np.savez(
                path, positions=np.zeros((5, 3, 2)), sizes=np.zeros((5, 3)), in_camera=np.zeros((5, 3), bool)
            ),
            "positions, sizes and in_camera have the shapes [5, 3, 2], [5, 3], [5, 3]; legal: [T, n, 2], [T, n], [T, n]"
            " of T = 6 frames",
        ),
    ],
)
def test_truth_that_is_missing_or_damaged(made, tmp_path, damage, message):
    shutil.copytree(made[0] / "val", tmp_path / "val")
    damage(tmp_path / "val/0/truth.npz")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/val/0/truth.npz: {message}")) as error:
        get_video_dataset("obj3d_like", str(tmp_path), 1, "val", 32)
    assert "\n" not in str(error.value) and "legal: " in str(error.value)


@pytest.mark.parametrize("name", ["obj3d", "obj3d128", "obj3d_img"])
def test_configurations_are_those_of_obj3d(name):
    expected = {**Config.load(name).to_dict(), "ds": "obj3d_like", "root": "./data/obj3d_like"}
    assert Config.load(name.replace("obj3d", "obj3d_like")).to_dict() == expected


# ---- the files


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_format(tmp_path, capfd):
    out = tmp_path / "new" / "obj3d_like"
    prepare(out, "--train 1 --val 2 --test 1 --num_frames 11 --image_size 20 --seed 5")
    frames = {
        f"{split}/{episode}/test_{frame}.png"
        for split, number in zip(SPLITS, (1, 2, 1), strict=True)
        for episode in range(number)
        for frame in range(11)
    }
    truths = {str(Path(name).parent / "truth.npz") for name in frames}
    assert set(contents(out)) == {*frames, *truths, "obj3d_like.json"}
    assert sorted(path.name for path in out.iterdir()) == ["obj3d_like.json", "test", "train", "val"]
    for name in frames:
        with Image.open(out / name) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (20, 20))
    scene = draw_scene(5, "val", 1)
    expected, _ = render(scene, *simulate(scene, 11), 20)
    for frame in range(11):
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"val/1/test_{frame}.png")), expected[frame])
    record = {"num_frames": 11, "image_size": 20, "seed": 5, "simulator": "mujoco"}
    assert json.loads((out / "obj3d_like.json").read_text()) == record
    assert capfd.readouterr().out.splitlines() == [f"making 0.2 MB in {out}", f"{out}: all 4 episodes are there"]


def test_default_options():
    args = preparation.parse_arguments(["--out", "x"])
    assert (args.train, args.val, args.test) == (2920, 200, 200)
    options = preparation.Obj3dLikeOptions()
    assert (options.num_frames, options.image_size, options.seed) == (100, 128, 0)
    assert (args.num_frames, args.image_size, args.seed) == (100, 128, 0)


def test_episodes_do_not_depend_on_their_number_nor_on_processes(tmp_path):
    prepare(tmp_path / "one", "--train 4 --val 1 --test 2")
    prepare(tmp_path / "two", "--train 4 --val 1 --test 2 --processes 2")
    prepare(tmp_path / "few", "--train 2 --val 1 --test 1 --num_frames 1")
    one, two, few = (contents(tmp_path / name) for name in ("one", "two", "few"))
    assert len(one) == 22 and one == two
    few = {name: content for name, content in few.items() if name.endswith(".png")}
    assert len(few) == 4 and few.items() <= one.items()


def test_episodes_splits_and_seeds_differ():
    scenes = [draw_scene(seed, split, index) for seed in (0, 1) for split in SPLITS for index in (0, 1)]
    assert len({scene.positions.tobytes() for scene in scenes}) == 12


def run_script(*arguments, **options):
    script = [sys.executable, "datasets/obj3d_like_preparation.py", *" ".join(arguments).split()]
    return subprocess.Popen(script, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_a_stopped_preparation_goes_on(tmp_path, capsys, how):
    out = tmp_path / "out"
    numbers = "--train 400 --val 1 --test 1"
    process = run_script(f"--out {out} {SMALL} {numbers} --processes 2", start_new_session=True)
    wait_until(lambda: (out / "train" / "1").exists(), 120)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    message = process.communicate(timeout=120)[1].splitlines()[-1]
    wait_until(lambda: group_is_gone(process.pid), 120)
    assert process.returncode == (130 if how == "ctrl-c" else -signal.SIGKILL)
    if how == "ctrl-c":
        assert message == "error: stopped; the same command goes on with what is missing"
        assert not (out / ".making").exists()
    made = sorted((out / "train").iterdir())
    assert 1 <= len(made) < 400
    for episode in made:
        assert sorted(path.name for path in episode.iterdir()) == ["test_0.png", "test_1.png", "truth.npz"]
    # Let what is asked for be little more than what is there, which is not made again.
    number = max(int(episode.name) for episode in made) + 2
    kept = {path: path.stat().st_mtime_ns for episode in made for path in episode.iterdir()}
    prepare(out, f"--train {number} --val 1 --test 1")
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: all {number + 2} episodes are there"
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    prepare(tmp_path / "whole", f"--train {number} --val 1 --test 1")
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / ".making").exists()


def test_a_part_that_was_left_is_not_taken_for_a_whole(tmp_path):
    part = tmp_path / "out" / ".making" / "train_0"
    part.mkdir(parents=True)
    (part / "test_7.png").write_text("half")
    prepare(tmp_path / "out", "--train 1 --val 1 --test 1")
    prepare(tmp_path / "whole", "--train 1 --val 1 --test 1")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_there_is_kept_and_more_is_added(tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(out, "--train 1 --val 1 --test 1")
    made = []
    make = preparation.make_episode
    monkeypatch.setattr(
        preparation, "make_episode", lambda options, *episode: made.append(episode) or make(options, *episode)
    )
    prepare(out, "--train 1 --val 1 --test 1")
    assert not made
    prepare(out, "--train 3 --val 1 --test 1")
    assert made == [("train", 1), ("train", 2)]
    made.clear()
    prepare(out, "--train 1 --val 1 --test 1 --seed 1 --force")
    assert len(made) == 3 and not (out / "train" / "1").exists()
    assert json.loads((out / "obj3d_like.json").read_text())["seed"] == 1


# ---- what can be wrong


def test_other_options_and_fewer_episodes_are_refused(tmp_path):
    out = tmp_path / "out"
    prepare(out, "--train 2 --val 1 --test 1")
    before = contents(out)
    for arguments, message in {
        "--train 2 --val 1 --test 1 --seed 1": f"--out: {out} was made with {{'num_frames': 2, 'image_size': 16,"
        " 'seed': 0, 'simulator': 'mujoco'}, not {'num_frames': 2, 'image_size': 16, 'seed': 1, 'simulator': 'mujoco'};"
        " legal: another --out, or --force",
        "--train 1 --val 1 --test 1": f"--out: {out / 'train'} holds '1', which is none of the 1 episodes of --train",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as error:
            prepare(out, arguments)
        assert "\n" not in str(error.value)
    (out / "obj3d_like.json").write_text("{")
    with pytest.raises(UserError, match=r"obj3d_like\.json: cannot be read .* legal: another --out, or --force"):
        prepare(out, "--train 2 --val 1 --test 1")
    (out / "obj3d_like.json").write_bytes(before["obj3d_like.json"])
    assert contents(out) == before


@pytest.mark.parametrize("force", ["", "--force"])
def test_the_data_of_others_are_left_alone(tmp_path, force):
    (tmp_path / "train" / "0").mkdir(parents=True)
    (tmp_path / "train" / "0" / "test_0.png").write_text("precious")
    with pytest.raises(UserError, match=re.escape(f"--out: {tmp_path} holds files that this script did not make")):
        prepare(tmp_path, force)
    assert contents(tmp_path) == {"train/0/test_0.png": b"precious"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train 0", "train is 0; legal: at least 1"),
        ("--val -1", "val is -1; legal"),
        ("--test 0", "test is 0; legal"),
        ("--processes 0", "processes is 0; legal"),
        ("--num_frames 0", "num_frames is 0; legal: at least 1"),
        ("--image_size 15", "image_size is 15; legal: from 16 to 1024"),
        ("--image_size 1025", "image_size is 1025; legal"),
        ("--seed -1", "seed is -1; legal: from 0 to 2^32 - 1"),
        ("--seed 4294967296", "seed is 4294967296; legal"),
    ],
)
def test_illegal_options(tmp_path, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare(tmp_path / "out", arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_without_mujoco(tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "mujoco.py").write_text("raise ModuleNotFoundError(\"No module named 'mujoco'\")")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "stub")}
    process = run_script(f"--out {tmp_path / 'out'}", env=environment)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert message == (
        "error: mujoco cannot be imported (No module named 'mujoco'); install it:"
        " pip install -r requirements-obj3d-like.txt (see docs/installation.md)\n"
    )
    assert not (tmp_path / "out").exists()
    wanted = (REPOSITORY / "requirements-obj3d-like.txt").read_text().splitlines()[-1]
    assert wanted.startswith("mujoco") and wanted in (REPOSITORY / "requirements-dev.txt").read_text().splitlines()
    assert "requirements-obj3d-like.txt" in (REPOSITORY / "docs" / "installation.md").read_text()


def test_room_on_the_disk_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9e9, 8e9, 1e9))
    with pytest.raises(UserError, match=r"--out: .*obj3d_like needs 1\.4 GB, but 1\.0 GB are free there"):
        preparation.main(["--out", str(tmp_path / "new" / "obj3d_like")])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/\.making: cannot be written: Not a directory"):
        prepare(tmp_path / "file")
    write = Path.write_bytes

    def on_a_full_disk(path, data):
        if path.parent.name == "val_0" and path.name == "test_1.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="out/val/0: cannot be written: No space left"):
        patch.setattr(Path, "write_bytes", on_a_full_disk)
        prepare(out, "--train 1 --val 1 --test 1")
    assert set(contents(out)) == {
        "obj3d_like.json",
        *(f"train/0/{name}" for name in ("test_0.png", "test_1.png", "truth.npz")),
    }
    prepare(out, "--train 1 --val 1 --test 1")
    assert len(contents(out)) == 10


def test_errors_of_a_worker_process_arrive(tmp_path):
    out = tmp_path / "out"
    prepare(out, "--train 1 --val 1 --test 1")
    (out / "val").rename(out / "kept")
    (out / "val").symlink_to(out / "nowhere")
    with pytest.raises(UserError, match=r"out/val/[01]: cannot be written"):
        prepare(out, "--train 1 --val 2 --test 1 --processes 2")


def test_two_at_once_are_refused(tmp_path):
    out = tmp_path / "out"
    with preparation.working_folder(out / ".making"), pytest.raises(UserError, match="another process is making this"):
        prepare(out, "--train 1 --val 1 --test 1")
    assert not (out / "train").exists()
