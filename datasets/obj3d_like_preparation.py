"""Make a data set like OBJ3D (of G-SWM): videos of a body that comes in and hits others that stand on a plane.

    python datasets/obj3d_like_preparation.py --out data/obj3d_like
    python train_ddlp.py -d obj3d128 --root data/obj3d_like

The first command needs pybullet (`pip install -r requirements-obj3d-like.txt`), and writes OBJ3D's layout,
`{train,val,test}/{0,1,..}/test_{0..99}.png`: RGB frames, a folder per episode. An episode's folder is whole or not
there, and the same command, started again, goes on with the episodes that are missing; `obj3d_like.json` holds the
options. Episode `index` of a split is drawn with `default_rng(SeedSequence(seed, spawn_key=(m, index)))`, m = 0 for
train, 1 for val, 2 for test. It depends on nothing but that, the frame size and pybullet's build: not on the number of
episodes, frames nor processes.

The scene: 2 to 4 balls, cubes and upright cylinders stand near the middle of a grey plane, each in a colour of its own;
one more starts in view at the rim, a ball rolling, a cube or cylinder sliding, towards one of them. All are rigid,
of one density, and slowed by friction. Light comes from the upper left, and the camera looks down from the front.

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
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

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
from utils.files import atomic_write, available_cores
from utils.legal import check, check_at_least_1

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
STANDING_RADIUS, START_RADIUS = 1.4, 2.6  # from the origin: where bodies may stand, and where the last one starts
FRAMES_PER_SECOND, STEPS_PER_FRAME = 60, 4

# Of a ball's radius: half the edge of a cube, the radius and half the height of a cylinder.
_COMPACT = 0.85
_TRIES = 100
_WORKING = ".making"
_RECORD = "obj3d_like.json"


@dataclass(frozen=True)
class Obj3dLikeOptions:
    """What an episode is a function of, besides its split and index.

    `num_frames` per episode; `image_size`: side of a frame in pixels. Raises UserError for what is not legal.
    """

    num_frames: int = 100
    image_size: int = 128
    seed: int = 0

    def __post_init__(self):
        check_at_least_1("num_frames", self.num_frames)
        check("image_size", self.image_size, "from 16 to 1024", 16 <= self.image_size <= 1024)
        check("seed", self.seed, "from 0 to 2^32 - 1", 0 <= self.seed < 2**32)


@cache
def load_pybullet():
    """pybullet, with a world in it; UserError where it is not installed."""
    try:
        # It greets on stderr, in each process.
        with _silent_stderr():
            import pybullet
    except ImportError as error:
        raise UserError(
            f"pybullet cannot be imported ({error}); install it: pip install -r requirements-obj3d-like.txt"
            " (see docs/installation.md)"
        ) from error
    pybullet.connect(pybullet.DIRECT)
    return pybullet


@contextmanager
def _silent_stderr():
    """Drop what a C library writes to stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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
    heights = sizes * [1 if kind == "ball" else _COMPACT for kind in kinds]
    return Scene(kinds, sizes, colors, np.column_stack([centres, heights]), yaws, _aim(rng, centres, reach))


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


# ---- the motion


def simulate(scene, num_frames):
    """The motion of the bodies of a `Scene`; the first frame is how it begins.

    Returns the centres, float64 [num_frames, n, 3], and the orientations as quaternions (x, y, z, w), [num_frames, n,
    4].
    """
    bullet = load_pybullet()
    bullet.resetSimulation()
    bullet.setGravity(0, 0, -9.8)
    bullet.setTimeStep(1 / (FRAMES_PER_SECOND * STEPS_PER_FRAME))
    bullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
    plane = bullet.createMultiBody(0, bullet.createCollisionShape(bullet.GEOM_PLANE))
    bullet.changeDynamics(plane, -1, lateralFriction=1, restitution=0.5)
    bodies = [_add_solid(bullet, *body) for body in _bodies(scene)]
    # A ball that comes in rolls: it turns about the axis across its way.
    turning = np.cross([0, 0, 1], scene.velocity) / scene.sizes[-1] if scene.kinds[-1] == "ball" else np.zeros(3)
    bullet.resetBaseVelocity(bodies[-1], scene.velocity.tolist(), turning.tolist())
    poses = [_poses(bullet, bodies)]
    for _ in range(num_frames - 1):
        for _ in range(STEPS_PER_FRAME):
            bullet.stepSimulation()
        poses.append(_poses(bullet, bodies))
    return tuple(np.array(entry) for entry in zip(*poses, strict=True))


def _bodies(scene):
    """Each body's kind, size, centre and orientation at the start."""
    upright = np.zeros_like(scene.yaws)
    orientations = np.stack([upright, upright, np.sin(scene.yaws / 2), np.cos(scene.yaws / 2)], axis=-1)
    return zip(scene.kinds, scene.sizes.tolist(), scene.positions.tolist(), orientations.tolist(), strict=True)


def _add_solid(bullet, kind, size, position, orientation):
    compact = _COMPACT * size
    if kind == "ball":
        shape, volume = bullet.createCollisionShape(bullet.GEOM_SPHERE, radius=size), 4 / 3 * math.pi * size**3
    elif kind == "cube":
        shape, volume = bullet.createCollisionShape(bullet.GEOM_BOX, halfExtents=[compact] * 3), 8 * compact**3
    else:
        shape = bullet.createCollisionShape(bullet.GEOM_CYLINDER, radius=compact, height=2 * compact)
        volume = 2 * math.pi * compact**3
    body = bullet.createMultiBody(volume, shape, -1, position, orientation)
    bullet.changeDynamics(body, -1, lateralFriction=0.2, rollingFriction=0.06, spinningFriction=0.02, restitution=0.8)
    # By default pybullet slows bodies also as a viscous medium would.
    bullet.changeDynamics(body, -1, linearDamping=0, angularDamping=0)
    return body


def _poses(bullet, bodies):
    return tuple(zip(*(bullet.getBasePositionAndOrientation(body) for body in bodies), strict=True))


# ---- the picture


def render(scene, positions, orientations, image_size):
    """Frames of the bodies of a `Scene` at positions [T, n, 3] and orientations [T, n, 4], as `simulate` returns them.

    Returns uint8 [T, image_size, image_size, 3]; each pixel is the mean of 2 x 2 samples, or of more in small frames.
    """
    bullet = load_pybullet()
    bullet.resetSimulation()
    bullet.createMultiBody(0, -1, _mesh(bullet, *_ground(), 1, GROUND_COLOR))
    bodies = [
        bullet.createMultiBody(0, -1, _add_surface(bullet, *body))
        for body in zip(scene.kinds, scene.sizes.tolist(), scene.colors.tolist(), strict=True)
    ]
    frames = np.empty((len(positions), image_size, image_size, 3), np.uint8)
    for frame, centres, turns in zip(frames, positions.tolist(), orientations.tolist(), strict=True):
        for body, centre, turn in zip(bodies, centres, turns, strict=True):
            bullet.resetBasePositionAndOrientation(body, centre, turn)
        frame[:] = _photograph(bullet, image_size)
    return frames


def _photograph(bullet, image_size):
    # The shadows' resolution is that of the samples: coarser ones would speckle the plane.
    fine = max(2, math.ceil(256 / image_size))
    side = fine * image_size
    *_, pixels, _, _ = bullet.getCameraImage(
        side,
        side,
        bullet.computeViewMatrix(EYE, TARGET, (0, 0, 1)),
        # TinyRenderer lights what is at most 0.05 - 2 * near behind the first surface that the light meets: with a
        # near above 0.025 all is in shadow, and one below 0 keeps faces free of stripes.
        bullet.computeProjectionMatrixFOV(FIELD_OF_VIEW, 1, -0.04, 1000),
        lightDirection=(-3, -1.8, 6),
        lightDistance=17,
        lightColor=(1, 1, 1),
        lightAmbientCoeff=0.35,
        lightDiffuseCoeff=0.65,
        lightSpecularCoeff=0.1,
        shadow=1,
        renderer=bullet.ER_TINY_RENDERER,
        flags=bullet.ER_NO_SEGMENTATION_MASK,
    )
    # A pybullet that was built without NumPy returns a tuple.
    samples = np.asarray(pixels, np.uint8).reshape(image_size, fine, image_size, fine, 4)
    return np.rint(samples[..., :3].mean((1, 3)))


def _add_surface(bullet, kind, size, color):
    if kind == "cube":
        return bullet.createVisualShape(
            bullet.GEOM_BOX, halfExtents=[_COMPACT * size] * 3, rgbaColor=[*color, 1], specularColor=[1, 1, 1]
        )
    if kind == "ball":
        return _mesh(bullet, *_ball(), size, color)
    return _mesh(bullet, *_cylinder(), _COMPACT * size, color)


def _mesh(bullet, vertices, normals, scale, color):
    """A surface of quadrilaterals between the neighbours on a grid of vertices and normals, both [h, w, 3]."""
    corners = np.arange(vertices.shape[0] * vertices.shape[1]).reshape(vertices.shape[:2])
    a, b, c, d = corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:]
    return bullet.createVisualShape(
        bullet.GEOM_MESH,
        vertices=(scale * vertices).reshape(-1, 3).tolist(),
        indices=np.stack([a, b, c, a, c, d], axis=-1).ravel().tolist(),
        normals=normals.reshape(-1, 3).tolist(),
        rgbaColor=[*color, 1],
    )


def _ball(rings=12):
    """Vertices and normals of a sphere of radius 1; pybullet's own is coarse."""
    polar, around = np.meshgrid(
        np.linspace(0, np.pi, rings + 1), np.linspace(0, 2 * np.pi, 2 * rings + 1), indexing="ij"
    )
    normals = np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], axis=-1)
    return normals, normals


def _cylinder(sides=32):
    """Vertices and normals of a cylinder of radius 1 and height 2; pybullet's own has rounded shading at its edges."""
    around = np.linspace(0, 2 * np.pi, sides + 1)
    rim = np.stack([np.cos(around), np.sin(around), 0 * around], axis=-1)
    up, axis = np.broadcast_to([0.0, 0.0, 1.0], rim.shape), np.zeros_like(rim)
    vertices = np.stack([axis + up, rim + up, rim + up, rim - up, rim - up, axis - up])
    return vertices, np.stack([up, up, rim, rim, -up, -up])


def _ground(extent=12, squares=4):
    """Vertices and normals of a piece of the plane that fills the view."""
    line = np.linspace(-extent, extent, squares + 1)
    x, y = np.meshgrid(line, line, indexing="ij")
    vertices = np.stack([x, y, 0 * x], axis=-1)
    return vertices, np.broadcast_to([0.0, 0.0, 1.0], vertices.shape)


def make_episode(options, split, index):
    """The frames of an episode, uint8 [num_frames, image_size, image_size, 3]."""
    scene = draw_scene(options.seed, split, index)
    return render(scene, *simulate(scene, options.num_frames), options.image_size)


# ---- the files


def write_episode(root, options, split, index):
    """Make the folder `root/split/index`; raises UserError where it cannot be written."""
    folder = root / split / str(index)
    part = root / _WORKING / f"{split}_{index}"
    frames = make_episode(options, split, index)
    with unwritable_as_user_error(folder):
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        for number, frame in enumerate(frames):
            (part / f"test_{number}.png").write_bytes(_encode(frame))
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
        found = json.loads((root / _RECORD).read_text())
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
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where train, val and test go")
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
    load_pybullet()
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
                record.write_text(json.dumps(asdict(options)) + "\n")
            frames = options.num_frames
            bar = tqdm(desc=root.name, total=total * frames, initial=(total - len(todo)) * frames, unit="frame")
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
