"""Shapes: images of a few random shapes on a cyan background, drawn when they are first asked for.

An image is scikit-image's `random_shapes` (64 x 64 pixels, 2 to 5 shapes of size 11 to 13, none over another) with
its white background turned to (0, 255, 255). `random_shapes` never gives a shape the value 255 in any channel, so a
pixel that is 255 in all three is background. It tries 100 places per shape, then leaves the shape out: a small image
may hold fewer than asked for.

Image `index` of a mode is drawn with `default_rng(SeedSequence(seed, spawn_key=(m, index)))`, m = 0 for train, 1 for
val, 2 for test. It depends on nothing else: not on the number of images, of processes or of workers.
"""

import os
import subprocess
import sys
import warnings
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.draw import random_shapes
from torch.utils.data import Dataset, TensorDataset

from utils.errors import UserError
from utils.files import atomic_write, available_cores, file_lock, remove_abandoned
from utils.legal import check_choice, whole_number
from utils.progress import progress_bar

DEFAULT_ROOT = "./data/shapes"
SHAPE_KINDS = ("rectangle", "circle", "triangle", "ellipse")

_MODES = {"train": 0, "val": 1, "valid": 1, "test": 2}
_NUM_IMAGES = {"train": 40_000, "val": 2_000, "test": 2_000}
_BACKGROUND = (0, 255, 255)
# A further drawing process pays off only where it draws for longer than it takes to start.
_IMAGES_PER_PROCESS = 5_000


@dataclass(frozen=True)
class ShapesDrawing:
    """What is drawn: image `index` is a function of these values and `index` alone.

    `seed` and `stream` (one per mode) seed the random generator. The rest is handed to `random_shapes`: image side
    and shape sizes in pixels, the range (both ends included) of the number of shapes, and whether they may overlap.
    """

    seed: int
    stream: int
    image_size: int = 64
    min_shapes: int = 2
    max_shapes: int = 5
    min_size: int = 11
    max_size: int = 13
    allow_overlap: bool = False

    @property
    def record_type(self):
        """The dtype of a drawn record: `image` uint8 [H, W, 3]; `shapes` int16 [max_shapes, 5], one row (y1, x1, y2,
        x2, position in SHAPE_KINDS) per shape drawn, its box cut at the image's edge, the remaining rows zero."""
        side = self.image_size
        return np.dtype([("image", "u1", (side, side, 3)), ("shapes", "<i2", (self.max_shapes, 5))])

    def draw(self, index):
        """Draw image `index` (>= 0); returns one record of `record_type`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not fit any shapes")
            image, labels = random_shapes(
                (self.image_size, self.image_size),
                min_shapes=self.min_shapes,
                max_shapes=self.max_shapes,
                min_size=self.min_size,
                max_size=self.max_size,
                allow_overlap=self.allow_overlap,
                channel_axis=-1,
                rng=np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.stream, index))),
            )
        image[(image == 255).all(axis=-1)] = _BACKGROUND
        record = np.zeros((), self.record_type)
        record["image"] = image
        for row, (kind, ((y1, y2), (x1, x2))) in enumerate(labels):
            # A triangle may reach over the top of the image, and so does the box that is given for it.
            record["shapes"][row] = max(y1, 0), x1, y2, x2, SHAPE_KINDS.index(kind)
        return record


def draw_shapes(drawing, num_images, processes=None):
    """Yield the records of images 0 .. num_images - 1 of a `ShapesDrawing`, in order.

    `processes`: how many draw; None for as many as there are cores to use and as are worth starting. One draws in the
    calling process. The records are the same for every number.
    """
    if processes is None:
        processes = min(available_cores(), -(-num_images // _IMAGES_PER_PROCESS))
    if processes > 1:
        yield from _draw_in_processes(drawing, num_images, processes)
    else:
        yield from map(drawing.draw, range(num_images))


def _draw_in_processes(drawing, num_images, processes):
    """Yield the records that `processes` workers draw in turn, as they come through the workers' pipes."""
    size = drawing.record_type.itemsize
    workers = []
    try:
        for first in range(processes):
            workers.append(_start_worker(drawing, first, num_images, processes))
        for index in range(num_images):
            worker = workers[index % processes]
            data = worker.stdout.read(size)
            if len(data) < size:
                raise RuntimeError(f"a process that draws shapes ended early, with exit status {worker.wait()}")
            yield np.frombuffer(data, drawing.record_type)[0]
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()
            worker.wait()


def _start_worker(drawing, *indices):
    """Start an interpreter that draws `range(*indices)`.

    A fresh interpreter and a pipe rather than multiprocessing: spawning would run the caller's script once more where
    it has no main guard, and forking would copy a process that may hold torch's threads and the lock on the files.
    """
    path = [str(Path(__file__).resolve().parents[1]), *map(str, sys.path)]
    code = (
        f"import sys; sys.path[:] = {path!r}; from {__name__} import ShapesDrawing, write_records; "
        f"write_records(ShapesDrawing(**{asdict(drawing)!r}), range(*{indices!r}), sys.stdout.buffer)"
    )
    # In a session of its own: an interrupt from the keyboard reaches only the parent, which ends its workers.
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)


def write_records(drawing, indices, file):
    """Draw the images `indices` of a `ShapesDrawing` and write their records' bytes to the binary `file`; ends
    quietly where nobody reads any more."""
    try:
        for index in indices:
            file.write(drawing.draw(index).tobytes())
        file.flush()
    except BrokenPipeError:
        os._exit(1)


class ShapesDataset(Dataset):
    """Images of random shapes, kept on disk and shared by all workers and processes.

    `root`: folder of the files, None for ./data/shapes. `mode`: "train" (40 000 images), "val" (or "valid") or "test"
    (2 000 each). `image_size`: side in pixels, at least 13. `num_images`: another number of images; a smaller set is
    the beginning of a larger one. `seed`: another set of images.

    An item is the tuple `(image,)`, image float32 [3, H, W] in 0..1.

    The files are drawn once: the images (uint8 [N, H, W, 3], .npy, memory-mapped) and what the images show (int16
    [N, 5, 5], .npy, see `ShapesDrawing.record_type`). While one process draws, others that want the same files wait
    for it; a file is either whole or not there.

    Raises UserError for an illegal argument, a folder that cannot be written to, and files that are not whole or not
    of these images.
    """

    def __init__(self, root, mode="train", image_size=64, num_images=None, seed=0):
        check_choice("mode", mode, _MODES)
        mode = "val" if mode == "valid" else mode
        image_size = whole_number("image_size", image_size, ShapesDrawing.max_size)
        self._num_images = _NUM_IMAGES[mode] if num_images is None else whole_number("num_images", num_images, 1)
        self._drawing = ShapesDrawing(whole_number("seed", seed, 0), _MODES[mode], image_size)
        root = Path(DEFAULT_ROOT if root is None else root)
        stem = f"{mode}_{image_size}x{image_size}_{self._num_images}_seed{self._drawing.seed}"
        self._images_path = root / f"{stem}.npy"
        self._shapes_path = root / f"{stem}_boxes.npy"
        self._open()

    def __len__(self):
        return self._num_images

    def __getitem__(self, index):
        """`(image,)`, image float32 [3, H, W] in 0..1."""
        return (_to_tensor(self._images[index]),)

    def boxes(self, index):
        """The bounding boxes of the shapes of image `index` in the order they were drawn: int64 [n, 4], rows (y1, x1,
        y2, x2) in pixels, 0 <= y1 < y2 <= H; y1 and x1 are the shape's first row and column, y2 and x2 one past its
        last."""
        return self._rows(index)[:, :4].astype(np.int64)

    def circles(self, index):
        """The middles of the `boxes` of image `index`, float32 [n, 2]: (row, column), and the radii of the circles that
        fit into them, float32 [n]; pixels, pixel i covering [i, i + 1)."""
        boxes = torch.from_numpy(self.boxes(index)).float()
        first, last = boxes[:, :2], boxes[:, 2:]
        return (first + last) / 2, (last - first).amin(-1) / 2

    def annotated(self):
        """The same images with their truth: a Dataset whose items are, as those of `datasets.balls_ds.BallsImages`,
        the tuple of the image, the shapes' positions [n, 2] and sizes [n] (`circles`), their ids [n], from 1, and
        in_camera [n]; n is the largest number of shapes, and what an image has less is out of view."""
        return _AnnotatedShapes(self)

    def labels(self, index):
        """The kinds (of SHAPE_KINDS) of the shapes of image `index`, a list in the order of `boxes`."""
        return [SHAPE_KINDS[kind] for kind in self._rows(index)[:, 4]]

    def _rows(self, index):
        rows = self._shapes[index]
        return rows[rows[:, 2] > rows[:, 0]]

    def __getstate__(self):
        # A pickled memory map is a copy of all images; a spawned worker opens the files itself.
        return {name: value for name, value in vars(self).items() if name not in ("_images", "_shapes")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def _open(self):
        """Map the files into memory, drawn first where they are missing."""
        folder = self._images_path.parent
        remove_abandoned(folder, self._images_path.stem, self._images_path.suffix)
        try:
            if not self._images_path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                self._draw_once()
        except OSError as error:
            raise UserError(f"root: the shapes cannot be written to {folder}: {error.strerror or error}") from error
        record_type = self._drawing.record_type
        self._images = self._map(self._images_path, record_type["image"])
        self._shapes = self._map(self._shapes_path, record_type["shapes"])
        self._check_content()

    def _draw_once(self):
        """Draw the files unless another process does so first; where there are no locks, several may draw the same."""
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(file_lock(self._images_path.with_suffix(".lock")))
            if not self._images_path.exists():
                self._draw()

    def _draw(self):
        """Draw all images and write both files, the images last: their being there says that both are whole."""
        side = self._drawing.image_size
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._num_images, side, side, 3)}
        shapes = []
        records = draw_shapes(self._drawing, self._num_images)
        with atomic_write(self._images_path, replace=False) as part, open(part, "wb") as file, closing(records):
            np.lib.format.write_array_header_1_0(file, header)
            for record in progress_bar(records, f"drawing {self._images_path.name}", self._num_images, unit="image"):
                file.write(record["image"].tobytes())
                shapes.append(record["shapes"])
            with atomic_write(self._shapes_path) as shapes_part:
                np.save(shapes_part, np.stack(shapes))

    def _map(self, path, entry):
        """Memory-map the .npy at `path`, which must hold one `entry` (a dtype with a shape) per image."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except PermissionError as error:
            raise UserError(f"{path} may not be read by this user; legal: a file that may be read") from error
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(path) from error
        legal = (entry.base, (self._num_images, *entry.shape))
        if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != legal:
            raise self._damaged(path)
        return array

    def _check_content(self):
        """Compare the first and the last image with a fresh drawing."""
        for index in (0, self._num_images - 1):
            record = self._drawing.draw(index)
            if not np.array_equal(self._images[index], record["image"]):
                raise self._damaged(self._images_path)
            if not np.array_equal(self._shapes[index], record["shapes"]):
                raise self._damaged(self._shapes_path)

    def _damaged(self, path):
        return UserError(
            f"{path} is missing, truncated or not of these shapes; legal: whole files of them, or none: where"
            f" {self._images_path} and {self._shapes_path} are moved away, both are drawn anew"
        )


class _AnnotatedShapes(Dataset):
    def __init__(self, shapes):
        self._shapes, self._most = shapes, shapes._drawing.max_shapes

    def __len__(self):
        return len(self._shapes)

    def __getitem__(self, index):
        centres, radii = self._shapes.circles(index)
        missing = self._most - len(radii)
        in_camera = (torch.arange(self._most) < len(radii)).long()
        ids = in_camera * torch.arange(1, self._most + 1)
        return *self._shapes[index], F.pad(centres, (0, 0, 0, missing)), F.pad(radii, (0, missing)), ids, in_camera


def generate_shape_dataset_torch(
    img_size=64, min_shapes=2, max_shapes=5, min_size=11, max_size=13, allow_overlap=False, num_images=10000
):
    """Draw shapes in memory; returns a TensorDataset whose items are `(image,)`, float32 [3, img_size, img_size] in
    0..1.

    `img_size`, `min_size` and `max_size` are in pixels; `min_shapes` to `max_shapes` shapes are drawn per image.
    Every call draws new images, seeded from torch's global generator. Raises UserError for an illegal argument.
    """
    min_shapes = whole_number("min_shapes", min_shapes, 0)
    min_size = whole_number("min_size", min_size, 2)
    max_size = whole_number("max_size", max_size, min_size)
    drawing = ShapesDrawing(
        seed=int(torch.randint(2**63 - 1, ())),
        stream=0,
        image_size=whole_number("img_size", img_size, max_size),
        min_shapes=min_shapes,
        max_shapes=whole_number("max_shapes", max_shapes, max(min_shapes, 1)),
        min_size=min_size,
        max_size=max_size,
        allow_overlap=bool(allow_overlap),
    )
    num_images = whole_number("num_images", num_images, 1)
    images = torch.empty(num_images, 3, drawing.image_size, drawing.image_size)
    with closing(draw_shapes(drawing, num_images)) as records:
        for index, record in enumerate(progress_bar(records, "drawing shapes", num_images, unit="image")):
            images[index] = _to_tensor(record["image"])
    return TensorDataset(images)


def _to_tensor(image):
    """uint8 [H, W, 3] -> float32 [3, H, W] in 0..1."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
