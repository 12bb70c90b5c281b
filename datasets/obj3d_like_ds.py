"""The OBJ3D-like set: bodies on a plane that one more is thrown at, in folders of PNG files, and where the bodies are.

    root/{train,val,test}/{0,1,...}/test_{0,1,...}.png
    root/{train,val,test}/{0,1,...}/truth.npz

`datasets/obj3d_like_preparation.py` makes it, and says what the files hold. All that `datasets/obj3d_ds.py` says of the
frames holds here too, but that episodes may have any number of frames.
"""

import os
import zipfile

import numpy as np
import torch

from datasets.episodes import EpisodeVideos
from datasets.frame_sources import FrameFolders
from utils.errors import UserError

DEFAULT_ROOT = "./data/obj3d_like"


class _Folders(FrameFolders):
    """`truths`: of each episode the positions, float32 [T, n, 2], sizes, float32 [T, n], ids and in_camera, both int64
    [T, n], as `Obj3dLikeVideos` has them; n is the same for all."""

    data_set = "obj3d_like"
    prefix = "test_"
    legal_number = "at least 1"
    how_to_get = f" (make it with: python datasets/obj3d_like_preparation.py --out {DEFAULT_ROOT})"

    def __init__(self, root, split, image_size):
        super().__init__(root, split, image_size)
        truths = [self._read_truth(episode) for episode in range(len(self.lengths))]
        most = max(in_camera.shape[1] for _, _, in_camera in truths)
        self.truths = [self._item_entries(most, *truth) for truth in truths]

    def used_frames(self, number):
        """See `FrameFolders`."""
        return number or None

    def _read_truth(self, episode):
        path = os.path.join(self.place, self._episodes[episode][0], "truth.npz")
        try:
            with np.load(path) as file:
                positions, sizes, in_camera = (file[name] for name in ("positions", "sizes", "in_camera"))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: cannot be read ({' '.join(str(error).split())}); legal: what"
                " datasets/obj3d_like_preparation.py writes there"
            ) from error
        shape = (self.lengths[episode], *in_camera.shape[1:])
        if not (len(shape) == 2 and in_camera.shape == sizes.shape == shape and positions.shape == (*shape, 2)):
            shapes = ", ".join(str(list(array.shape)) for array in (positions, sizes, in_camera))
            raise UserError(
                f"{path}: positions, sizes and in_camera have the shapes {shapes}; legal: [T, n, 2], [T, n], [T, n] of"
                f" T = {self.lengths[episode]} frames"
            )
        return positions, sizes, in_camera

    def _item_entries(self, most, positions, sizes, in_camera):
        """The entries of an item, of `most` bodies."""
        scale, missing = self.image_size / self._side, most - in_camera.shape[1]
        positions = np.pad(positions * scale, ((0, 0), (0, missing), (0, 0))).astype(np.float32)
        sizes = np.pad(sizes * scale, ((0, 0), (0, missing))).astype(np.float32)
        in_camera = np.pad(in_camera, ((0, 0), (0, missing))).astype(np.int64)
        return positions, sizes, in_camera * np.arange(1, most + 1), in_camera


class Obj3dLikeVideos(EpisodeVideos):
    """The made videos; arguments and errors as for `EpisodeVideos`.

    An item is the tuple of the video, float32 [T, 3, H, W] in 0..1, and as in `datasets.balls_ds` of the bodies'
    positions, float32 [T, n, 2]: (row, column), in pixels of the item's frames; their sizes, float32 [T, n]: radii in
    the same pixels; their ids, int64 [T, n], from 1, and 0 for a body out of view; in_camera, int64 [T, n], 1 where the
    body is in view. n is the largest number of bodies in an episode of the split; what others lack is never in view.
    """

    default_root = DEFAULT_ROOT
    _make_source = _Folders

    def _annotations(self, episode, first, length):
        return tuple(torch.from_numpy(entry[first : first + length]) for entry in self._source.truths[episode])


class Obj3dLikeImages(Obj3dLikeVideos):
    """Windows of `sample_length` frames in every mode; where `sample_length` is 1, a single frame: [3, H, W], and no
    entry of the item has the dimension T."""

    is_images = True
