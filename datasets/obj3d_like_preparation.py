"""Make a data set like OBJ3D (of G-SWM): videos of a body that comes in and hits others that stand on a plane.

    python datasets/obj3d_like_preparation.py --out data/obj3d_like
    python train_ddlp.py -d obj3d_like128

The first command needs MuJoCo (`pip install -r requirements-obj3d-like.txt`), and writes OBJ3D's layout,
`{train,val,test}/{0,1,..}/test_{0..99}.png`: RGB frames, a folder per episode. `truth.npz` in each folder holds

| array | type and shape | content |
|---|---|---|
| positions | float32 [T, n, 2] | projected centres (row, column), pixels, pixel i covering [i, i + 1) |
| sizes | float32 [T, n] | projected radius of the largest ball that fits into the body, pixels |
| in_camera | bool [T, n] | whether the centre is within the frame and some of the body is seen |
| kinds | str [n] | ball, cube or cylinder |
| colors | float32 [n, 3] | RGB, 0 to 1 |

An episode's folder is whole or not there, and the same command, started again, goes on with the episodes that are
missing; `obj3d_like.json` holds the options. Episode `index` of a split is drawn with `default_rng(SeedSequence(seed,
spawn_key=(m, index)))`, m = 0 for train, 1 for val, 2 for test. It depends on nothing but that, the frame size and
MuJoCo's version and build: not on the number of episodes, frames nor processes.

The scene: 2 to 4 balls, cubes and upright cylinders stand near the middle of a grey plane, each in a colour of its own;
one more starts in view at the rim, a ball rolling, a cube or cylinder sliding, towards one of them. All are rigid,
of one density, and slowed by friction. Light comes from the upper left, and the camera looks down from the front.
MuJoCo moves the bodies, and casts the rays that they are drawn with: no display, OpenGL nor GPU is needed.

Coordinates are x to the right, y away from the camera and z up, in units of about the width of a body; the plane is
z = 0, and the camera looks at about the origin. Time is in seconds, at 60 frames per second.
"""

import argparse
import io
import json
import math
import os
import shutil
import sys
from concurrent.futures import as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.preparation import (
    check_episodes,
    check_space,
    make_executor,
    message_on_interrupt,
    unwritable_as_user_error,
    working_folder,
)
from utils.errors import UserError, run_command
from utils.files import atomic_write, available_cores, given_path
from utils.legal import check, check_at_least_1
from utils.progress import progress_bar

SPLITS = ("train", "val", "test")
KINDS = ("ball", "cube", "cylinder")
COLORS = {
    "red": (0.92, 0.08, 0.08),
    "green": (0.10, 0.68, 0.15),
    "blue": (0.10, 0.22, 0.95),
    "yellow": (0.98, 0.88, 0.05),
    "magenta": (0.90, 0.12, 0.80),
    "cyan": (0.05, 0.82, 0.88),
    "orange": (1.00, 0.48, 0.02),
    "purple": (0.45, 0.12, 0.78),
}
GROUND_COLOR = (0.75, 0.75, 0.75)

EYE, TARGET, FIELD_OF_VIEW = (0.0, -7.2, 8.0), (0.0, -0.25, 0.2), 37.0  # the camera; degrees
LAMPS = np.array([(-30 + x, -18 + y, 52) for x in (-1.5, 1.5) for y in (-1.5, 1.5)])  # four, far away: soft shadows
STANDING_RADIUS, START_RADIUS = 1.4, 2.6  # from the origin: where bodies may stand, and where the last one starts
FRAMES_PER_SECOND, STEPS_PER_FRAME = 60, 16

# Of a ball's radius: half the edge of a cube, the radius and half the height of a cylinder.
_COMPACT = 0.85
_TRIES = 100
_WORKING = ".making"
_RECORD = "obj3d_like.json"


@dataclass(frozen=True)
class Obj3dLikeOptions:
    """What an episode is a function of, besides its split and index.

    `num_frames` per episode; `image_size`: side of a frame in pixels; `simulator`: what moves and draws, recorded so
    that no set is made by two. Raises UserError for what is not legal.
    """

    num_frames: int = 100
    image_size: int = 128
    seed: int = 0
    simulator: str = "mujoco"

    def __post_init__(self):
        check_at_least_1("num_frames", self.num_frames)
        check("image_size", self.image_size, "from 16 to 1024", 16 <= self.image_size <= 1024)
        check("seed", self.seed, "from 0 to 2^32 - 1", 0 <= self.seed < 2**32)


def load_mujoco():
    """mujoco; UserError where it cannot be imported."""
    os.environ["MUJOCO_GL"] = "disable"  # it would load OpenGL, which may be missing and is not used
    try:
        import mujoco
    except (ImportError, OSError) as error:
        raise UserError(
            f"mujoco cannot be imported ({error}); install it: pip install -r requirements-obj3d-like.txt"
            " (see docs/installation.md)"
        ) from error
    return mujoco


# ---- the scene


@dataclass(frozen=True)
class Scene:
    """How an episode of n bodies begins.

    `kinds`: n of `KINDS`. `sizes`, [n]: a ball's radius; a cube's and a cylinder's half height is 0.85 of it. `colors`,
    [n, 3]: RGB in 0..1. `positions`, [n, 3]: centres. `yaws`, [n]: turned about z, in radians. `velocity`, [3]: that of
    the last body; the others are at rest.
    """

    kinds: tuple
    sizes: np.ndarray
    colors: np.ndarray
    positions: np.ndarray
    yaws: np.ndarray
    velocity: np.ndarray


def draw_scene(seed, split, index):
    """The `Scene` of episode `index` of `split`."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)))
    number = 1 + rng.choice([2, 3, 4], p=[0.1, 0.45, 0.45])
    kinds = tuple(rng.choice(KINDS, number).tolist())
    sizes = rng.uniform(0.44, 0.56, number)
    colors = np.array(list(COLORS.values()))[rng.permutation(len(COLORS))[:number]]
    yaws = rng.uniform(0, 2 * np.pi, number)
    reach = sizes * [{"ball": 1, "cube": _COMPACT * math.sqrt(2), "cylinder": _COMPACT}[kind] for kind in kinds]
    centres = None
    while centres is None:
        centres = _place(rng, reach)
    positions = np.column_stack([centres, half_heights(kinds, sizes)])
    return Scene(kinds, sizes, colors, positions, yaws, _aim(rng, centres, reach))


def _place(rng, reach):
    """Centres [n, 2] of bodies, one after the other, all apart, the last at the rim; None where one finds no room."""
    centres = np.empty((0, 2))
    for body in range(len(reach)):
        is_last = body == len(reach) - 1
        radii = START_RADIUS if is_last else STANDING_RADIUS * np.sqrt(rng.uniform(size=_TRIES))
        angles = rng.uniform(0, 2 * np.pi, _TRIES)
        tries = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)
        distances = np.linalg.norm(tries[:, None] - centres, axis=-1)  # [tries, bodies so far]
        free = (distances > reach[body] + reach[:body] + (0.4 if is_last else 0.1)).all(-1)
        if not free.any():
            return None
        centres = np.concatenate([centres, tries[free.argmax()][None]])
    return centres


def _aim(rng, centres, reach):
    """The velocity [3] with which the last body hits one of the others, not always in its middle."""
    aim = rng.integers(len(centres) - 1)
    line = centres[aim] - centres[-1]
    across = np.array([-line[1], line[0]]) / np.linalg.norm(line)
    line = line + across * rng.uniform(-0.5, 0.5) * (reach[aim] + reach[-1])
    return np.array([*(rng.uniform(5, 7.5) * line / np.linalg.norm(line)), 0])


def half_heights(kinds, sizes):
    """The half heights [n] of bodies as `Scene` describes them; also the radii of the largest balls that fit in."""
    return sizes * [1 if kind == "ball" else _COMPACT for kind in kinds]


# ---- the motion


def simulate(scene, num_frames):
    """The motion of the bodies of a `Scene`; the first frame is how it begins.

    Returns the centres, float64 [T, n, 3], and the orientations as quaternions (w, x, y, z), [T, n, 4]; T: num_frames.
    """
    mujoco = load_mujoco()
    model, data = _world(scene)
    data.qvel[-6:-3] = scene.velocity
    if scene.kinds[-1] == "ball":
        # A ball that comes in rolls: it turns about the axis across its way, here in its own coordinates.
        turning = np.cross([0, 0, 1], scene.velocity) / scene.sizes[-1]
        mujoco.mju_rotVecQuat(data.qvel[-3:], turning, data.qpos[-4:] * [1, -1, -1, -1])
    poses = [data.qpos.copy()]
    for _ in range(num_frames - 1):
        mujoco.mj_step(model, data, STEPS_PER_FRAME)
        poses.append(data.qpos.copy())
    poses = np.reshape(poses, (num_frames, -1, 7))
    return poses[..., :3], poses[..., 3:]


def _world(scene):
    """MuJoCo's model and data of a `Scene` as it begins, all at rest; geom 0 is the plane, geom i the body i - 1."""
    mujoco = load_mujoco()
    types = {"ball": "sphere", "cube": "box", "cylinder": "cylinder"}
    bodies, contacts, halves = "", "", half_heights(scene.kinds, scene.sizes)
    for number, (kind, half, (x, y, z)) in enumerate(zip(scene.kinds, halves, scene.positions, strict=True)):
        geom = f"<geom name='{number}' type='{types[kind]}' size='{half} {half} {half}'/>"
        bodies += f"<body pos='{x} {y} {z}' euler='0 0 {scene.yaws[number]}'><freejoint/>{geom}</body>"
        # MuJoCo limits the friction of sliding and of rolling together: with less of the first, balls would not roll.
        grip = 1 if kind == "ball" else 0.2
        contacts += f"<pair geom1='plane' geom2='{number}' friction='{grip} {grip} 0.01 0.06 0.06'/>"
    # More contacts than one of two bodies (multiccd) would now and then make energy, up to ten times what there was.
    model = mujoco.MjModel.from_xml_string(f"""<mujoco>
        <compiler angle='radian'/>
        <option gravity='0 0 -9.8' timestep='{1 / (FRAMES_PER_SECOND * STEPS_PER_FRAME)}' cone='elliptic'>
            <flag multiccd='disable'/>
        </option>
        <default>
            <geom friction='0.04 0 0' solref='{_bounce(0.64)}' solimp='0.99 0.99 0.001'/>
            <pair condim='6' solref='{_bounce(0.4)}' solimp='0.99 0.99 0.001'/>
        </default>
        <worldbody><geom name='plane' type='plane' size='0 0 1'/>{bodies}</worldbody>
        <contact>{contacts}</contact>
    </mujoco>""")
    return model, mujoco.MjData(model)


def _bounce(restitution):
    """MuJoCo's stiffness and damping of contacts, a damped oscillator's, that give back this share of the speed."""
    rate = 300.0  # per second: a contact is half a period, 10 ms, ten times a step
    loss = -math.log(restitution)
    return f"-{rate**2} -{2 * rate * loss / math.hypot(math.pi, loss)}"


# ---- the picture


def render(scene, positions, orientations, image_size):
    """Frames of the bodies of a `Scene` at positions [T, n, 3] and orientations [T, n, 4], as `simulate` returns them.

    Returns the frames, uint8 [T, image_size, image_size, 3], of which each pixel is the mean of 2 x 2 samples, or of
    more in small frames, and whether anything is seen of each body, bool [T, n].
    """
    model, data = _world(scene)
    palette = np.array([GROUND_COLOR, *scene.colors])
    frames = np.empty((len(positions), image_size, image_size, 3), np.uint8)
    is_seen = np.empty(positions.shape[:2], bool)
    for time, poses in enumerate(np.concatenate([positions, orientations], axis=-1)):
        data.qpos[:] = poses.ravel()
        load_mujoco().mj_kinematics(model, data)
        frames[time], is_seen[time] = _photograph(model, data, palette, image_size)
    return frames, is_seen


def _photograph(model, data, palette, image_size):
    """A frame, [image_size, image_size, 3] in 0..255, and which bodies are seen in it, bool [n]."""
    rays = _rays(image_size)
    geoms, distances, normals = _cast(model, data, EYE, rays)
    # A quarter of the samples is lit by each lamp, so that shadows have soft edges.
    is_lit = []
    for lamp, points in zip(LAMPS, np.split(EYE + distances[:, None] * rays, 4), strict=True):
        ways = points - lamp
        lengths = np.linalg.norm(ways, axis=-1)
        is_lit.append(_cast(model, data, lamp, ways / lengths[:, None])[1] > lengths - 1e-4)
    is_lit, to_light = np.concatenate(is_lit), _unit(LAMPS.mean(0))
    # Light comes from all of the sky, of which shadows get some too, and from the lamps; bodies are a little glossy.
    shade = 0.37 + 0.07 * normals[:, 2] + 0.66 * np.where(is_lit, 1, 0.67) * np.maximum(normals @ to_light, 0)
    colors = shade[:, None] * palette[geoms]
    glossy = np.flatnonzero(is_lit & (geoms > 0))
    halfway = (normals[glossy] * _unit(to_light - rays[glossy])).sum(-1)
    colors[glossy] += 0.25 * np.maximum(halfway, 0)[:, None] ** 40
    half = math.isqrt(len(rays) // 4)
    samples = np.minimum(colors, 1).reshape(4, image_size, half // image_size, image_size, half // image_size, 3)
    return np.rint(255 * samples.mean((0, 2, 4))), np.isin(range(1, len(palette)), geoms)


def _cast(model, data, origin, rays):
    """What the rays from `origin`, [3], along unit vectors [r, 3] meet first: the geom, the distance and the surface's
    normal, each [r, ...]."""
    found = geoms, distances, normals = np.empty(len(rays), np.int32), np.empty(len(rays)), np.empty(rays.size)
    load_mujoco().mj_multiRay(model, data, origin, rays.ravel(), None, True, -1, *found, len(rays), math.inf)
    return geoms, distances, normals.reshape(-1, 3)


@cache
def _rays(image_size):
    """Unit vectors [4 h^2, 3] from the camera through the 2h x 2h samples of a frame: taken apart into four grids of
    h x h, each of every second row and column."""
    half = image_size * math.ceil(128 / image_size)
    line = math.tan(math.radians(FIELD_OF_VIEW) / 2) * ((np.arange(2 * half) + 0.5) / half - 1)
    rows, columns = np.meshgrid(line, line, indexing="ij")
    rays = _unit(np.stack([rows, columns, np.ones_like(rows)], axis=-1) @ _camera())
    return rays.reshape(half, 2, half, 2, 3).transpose(1, 3, 0, 2, 4).reshape(-1, 3)


@cache
def _camera():
    """The unit vectors [3, 3] that point down in a frame, to the right in it, and the way the camera looks."""
    forward = _unit(np.subtract(TARGET, EYE))
    right = _unit(np.cross(forward, [0, 0, 1]))
    return np.stack([np.cross(forward, right), right, forward])


def _unit(vectors):
    """Vectors [..., 3] of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def project(scene, positions, image_size):
    """Where the camera sees the bodies of a `Scene` at positions [T, n, 3], see the module's text: the centres, float64
    [T, n, 2], and the radii, [T, n], both in pixels."""
    down, right, ahead = np.moveaxis((positions - EYE) @ _camera().T, -1, 0)
    # What has gone past the camera is put far outside the frame.
    scales = image_size / 2 / math.tan(math.radians(FIELD_OF_VIEW) / 2) / np.maximum(ahead, 0.01)
    centres = np.stack([down, right], axis=-1) * scales[..., None] + image_size / 2
    return centres, scales * half_heights(scene.kinds, scene.sizes)


def make_episode(options, split, index):
    """The frames of an episode, uint8 [num_frames, image_size, image_size, 3], and the arrays of its truth.npz."""
    scene = draw_scene(options.seed, split, index)
    positions, orientations = simulate(scene, options.num_frames)
    frames, is_seen = render(scene, positions, orientations, options.image_size)
    centres, radii = project(scene, positions, options.image_size)
    return frames, {
        "positions": centres.astype(np.float32),
        "sizes": radii.astype(np.float32),
        "in_camera": is_seen & ((centres >= 0) & (centres < options.image_size)).all(-1),
        "kinds": np.array(scene.kinds),
        "colors": scene.colors.astype(np.float32),
    }


# ---- the files


def write_episode(root, options, split, index):
    """Make the folder `root/split/index`; raises UserError where it cannot be written."""
    folder = root / split / str(index)
    part = root / _WORKING / f"{split}_{index}"
    frames, truth = make_episode(options, split, index)
    with unwritable_as_user_error(folder):
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        for number, frame in enumerate(frames):
            (part / f"test_{number}.png").write_bytes(_encode(frame))
        np.savez(part / "truth.npz", **truth)
        folder.parent.mkdir(exist_ok=True)
        part.rename(folder)


def _encode(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def write_episodes(root, options, todo, processes=1):
    """Make the episodes of `todo`, a list of (split, index), in the folder `root`; yields each when it is whole."""
    write = partial(write_episode, root, options)
    processes = min(processes, len(todo))
    if processes == 1:
        for episode in todo:
            write(*episode)
            yield episode
        return
    executor = make_executor(processes)
    try:
        pending = {executor.submit(write, *episode): episode for episode in todo}
        for done in as_completed(pending):
            done.result()
            yield pending[done]
    finally:
        executor.shutdown(cancel_futures=True)


def find_missing(root, options, numbers, is_forced=False):
    """The episodes (split, index) that the folder `root` lacks; `numbers`: a dict, how many of each split.

    Raises UserError if `root` holds anything else, unless `is_forced`; then it lacks all.
    """
    if _is_ours(root) and not is_forced:
        _check_record(root, options)
    todo = []
    for split, number in numbers.items():
        folder = root / split
        if not is_forced:
            check_episodes(folder, number, f"--{split}")
        todo += [(split, index) for index in range(number) if is_forced or not (folder / str(index)).exists()]
    return todo


def _is_ours(root):
    """Whether this script has begun to fill the folder `root`; UserError if something else has."""
    if (root / _RECORD).exists():
        return True
    if any((root / split).exists() for split in SPLITS):
        raise UserError(f"--out: {root} holds files that this script did not make (no {_RECORD}); legal: another --out")
    return False


def _check_record(root, options):
    try:
        found = json.loads((root / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{root / _RECORD}: cannot be read ({error}); legal: another --out, or --force") from error
    if found != asdict(options):
        raise UserError(
            f"--out: {root} was made with {found}, not {asdict(options)}; legal: another --out, or --force to make all"
            " of it again"
        )


def _frame_bytes(options):
    """About how much of the disk a frame takes; in blocks of 4 KiB."""
    return 4096 * math.ceil((300 + 24 * options.image_size) / 4096)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description="Make a data set like OBJ3D: simulated bodies that hit each other.")
    parser.add_argument("--out", type=given_path, required=True, metavar="FOLDER", help="where train, val and test go")
    for split, number in zip(SPLITS, (2920, 200, 200), strict=True):
        parser.add_argument(f"--{split}", type=int, default=number, help=f"{split} episodes (%(default)s)")
    parser.add_argument("--num_frames", type=int, default=100, help="frames per episode (%(default)s)")
    parser.add_argument("--image_size", type=int, default=128, help="side of the frames, px (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other episodes (%(default)s)")
    parser.add_argument("--processes", type=int, default=available_cores(), help="processes that draw (%(default)s)")
    parser.add_argument("--force", action="store_true", help="remove the episodes that FOLDER holds first")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse_arguments(arguments)
    options = Obj3dLikeOptions(args.num_frames, args.image_size, args.seed)
    for name in (*SPLITS, "processes"):
        check_at_least_1(name, getattr(args, name))
    load_mujoco()
    root, numbers = Path(args.out), {split: getattr(args, split) for split in SPLITS}
    with message_on_interrupt():
        todo = find_missing(root, options, numbers, args.force)
        if todo:
            check_space(root, len(todo) * options.num_frames * _frame_bytes(options))
            fill(root, options, todo, sum(numbers.values()), args.processes, args.force)
    print(f"{root}: all {sum(numbers.values())} episodes are there")


def fill(root, options, todo, total, processes=1, is_forced=False):
    """Make the episodes of `todo`, a list of (split, index) out of `total`, in the folder `root`, with a bar.

    `is_forced`: remove first what `root` holds.
    """
    with working_folder(root / _WORKING) as working:
        try:
            if is_forced:
                _remove_episodes(root)
            with atomic_write(root / _RECORD) as record:
                record.write_text(json.dumps(asdict(options)) + "\n", encoding="utf-8")
            frames = options.num_frames
            bar = progress_bar(desc=root.name, total=total * frames, initial=(total - len(todo)) * frames, unit="frame")
            with closing(write_episodes(root, options, todo, processes)) as written, bar:
                for _ in written:
                    bar.update(frames)
        finally:
            shutil.rmtree(working)


def _remove_episodes(root):
    for folder in (root / split for split in SPLITS):
        with unwritable_as_user_error(folder):
            if folder.exists():
                shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(main)
