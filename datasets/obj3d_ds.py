"""OBJ3D: objects on a ground that one of them rolls into (of G-SWM), in folders of PNG files.

    root/{train,val,test}/{0,1,...}/test_{0..99}.png

Every episode has 100 frames, of 128 x 128 pixels in the download; they are resized to `image_size`. The download is
linked from G-SWM's page; `datasets/obj3d_like_preparation.py` makes videos like them.
"""

from datasets.episodes import EpisodeVideos
from datasets.frame_sources import FrameFolders


class _Folders(FrameFolders):
    data_set = "obj3d"
    prefix = "test_"
    how_to_get = " (unpack OBJ3D's download there, or try datasets/obj3d_like_preparation.py)"


class Obj3dVideos(EpisodeVideos):
    """OBJ3D's videos; arguments, items and errors as for `EpisodeVideos`."""

    default_root = "./data/obj3d"
    _make_source = _Folders


class Obj3dImages(Obj3dVideos):
    """Windows of `sample_length` frames in every mode; a single frame [3, H, W] where `sample_length` is 1."""

    is_images = True
