"""The examples in `assets/`, a few images and videos of each small data set, so that a model can be shown and measured
before any data set is made.

    assets/{shapes,balls,demo,obj3d_like}/{0,1,...}/{1,2,...}.png     a frame per file, RGB
    assets/{shapes,balls,demo,obj3d_like}/{0,1,...}/truth.npz         where the objects are

`truth.npz` holds positions, float32 [T, n, 2]: (row, column) in pixels, pixel i covering [i, i + 1); sizes, float32
[T, n]: radii in pixels; in_camera, bool [T, n]: whether the object is in view. `assets/make_examples.py` writes them.
"""

import os
from itertools import islice
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.frame_sources import resized
from datasets.video_files import IMAGE_ENDINGS, VIDEO_ENDINGS, FrameFolder, VideoFile, natural_order
from datasets.video_folder_ds import square
from utils.errors import UserError
from utils.files import is_clutter

LEGAL_CLIP = f"an image, a video ({', '.join(VIDEO_ENDINGS)}) or a folder of frames"


def write_example(folder, frames, positions, sizes, in_camera):
    """Write an example into `folder`. frames: [T, 3, H, W] in 0..1; the others as in `truth.npz`, arrays or tensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate((frames * 255).round().byte().permute(0, 2, 3, 1).numpy(), 1):
        iio.imwrite(folder / f"{number}.png", frame)
    np.savez_compressed(
        folder / "truth.npz",
        positions=np.asarray(positions, np.float32),
        sizes=np.asarray(sizes, np.float32),
        in_camera=np.asarray(in_camera, bool),
    )


class Examples(Dataset):
    """The examples of one data set, videos (of one frame where it has images), as they lie in `folder`.

    An item is the tuple of the video, float32 [T, 3, H, W] in 0..1, and as in `datasets.obj3d_like_ds` of the objects'
    positions [T, n, 2] and sizes [T, n], pixels, their ids [T, n], from 1, and in_camera [T, n]. n is the largest
    number of objects in an example; what others lack is never in view. Raises UserError where there is no example.
    """

    def __init__(self, folder):
        self.folders = sorted((p for p in Path(folder).glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
        if not self.folders:
            raise UserError(f"{folder}: no examples; legal: folders that are named by numbers, with 1.png, 2.png, ...")
        self._truths = [dict(np.load(path / "truth.npz")) for path in self.folders]
        self._most = max(truth["in_camera"].shape[1] for truth in self._truths)

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, index):
        folder, truth = self.folders[index], self._truths[index]
        in_camera = truth["in_camera"]
        frames = np.stack([iio.imread(folder / f"{number}.png") for number in range(1, len(in_camera) + 1)])
        missing = ((0, 0), (0, self._most - in_camera.shape[1]))
        in_camera = torch.from_numpy(np.pad(in_camera, missing)).long()
        return (
            torch.from_numpy(frames).permute(0, 3, 1, 2) / 255,
            torch.from_numpy(np.pad(truth["positions"], (*missing, (0, 0)))),
            torch.from_numpy(np.pad(truth["sizes"], missing)),
            in_camera * torch.arange(1, self._most + 1),
            in_camera,
        )


def read_clip(path, image_size, num_frames=None):
    """The first `num_frames` frames (None: all) of a video file, a folder of frames or an image: float32 [T, 3, S, S]
    in 0..1. The largest square in the middle of each is resized to `image_size` S. Raises UserError for what cannot be
    read, and where there is no frame."""
    frames = [resized(square(frame), image_size) for frame in islice(_frames_of(Path(path)), num_frames)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255


def clip_size(path):
    """The (height, width) of the frames of what `read_clip` reads, in pixels."""
    return next(_frames_of(Path(path))).shape[:2]


def _frames_of(path):
    """Yields the frames, uint8 [H, W, 3]."""
    ending = path.suffix.lower()
    if path.is_dir():
        images = [name for name in os.listdir(path) if is_image(name) and not is_clutter(name)]
        if not images:
            raise UserError(f"{path}: holds no frames; legal: PNG or JPEG files, named in their order")
        return FrameFolder(path, tuple(sorted(images, key=natural_order))).frames(0)
    if not path.is_file():
        raise UserError(f"{path}: not found; legal: {LEGAL_CLIP}")
    if ending in IMAGE_ENDINGS:
        return FrameFolder(path.parent, (path.name,)).frames(0)
    if ending in VIDEO_ENDINGS:
        return VideoFile(path).frames(0)
    raise UserError(f"{path}: is none; legal: {LEGAL_CLIP}")


def is_image(name):
    """Whether a file of that name is an image, by its ending."""
    return Path(name).suffix.lower() in IMAGE_ENDINGS
