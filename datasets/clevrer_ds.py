"""CLEVRER: objects that enter a scene and collide, in folders of PNG files.

    root/{train,valid,test}/{0,1,...}/{0..99}.png

`datasets/clevrer_preparation.py` makes them of the download's videos: episodes of 100 frames of 128 x 128 pixels.
"""

from datasets.episodes import EpisodeVideos
from datasets.frame_sources import FrameFolders


class _Folders(FrameFolders):
    data_set = "clevrer"
    val_folder = "valid"
    how_to_get = "; make them with: python datasets/clevrer_preparation.py (--help)"


class ClevrerVideos(EpisodeVideos):
    """CLEVRER's videos; arguments, items and errors as for `EpisodeVideos`."""

    default_root = "./data/clevrer"
    _make_source = _Folders


class ClevrerImages(ClevrerVideos):
    """Windows of `sample_length` frames in every mode; a single frame [3, H, W] where `sample_length` is 1."""

    is_images = True
