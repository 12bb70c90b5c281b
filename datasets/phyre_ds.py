"""PHYRE: balls and bars that fall until the task is solved, in folders of PNG files.

    root/{train,valid,test}/{00000,00001,...}/{00000,00001,...}.png

`datasets/phyre_preparation.py` makes them with the PHYRE simulator. The colours are inverted (1 - x), so that the
background is black. The last 30 frames of an episode (3 s, when everything lies still) are cut. Of the others the first
100 are used, and an episode that has fewer is filled up to 100 with its last frame. A window ends within the episode's
own frames, unless there are fewer of them than the window has.
"""

from datasets.episodes import EpisodeVideos
from datasets.frame_sources import FrameFolders

EPISODE_LENGTH = 100
CUT_LENGTH = 30


class _Folders(FrameFolders):
    data_set = "phyre"
    val_folder = "valid"
    legal_number = f"at least {CUT_LENGTH + 1}, as the last {CUT_LENGTH} are cut"
    how_to_get = "; make them with: python datasets/phyre_preparation.py (--help)"

    def used_frames(self, number):
        """See `FrameFolders`."""
        return min(number - CUT_LENGTH, EPISODE_LENGTH) if number > CUT_LENGTH else None

    def read(self, episode, start, stop):
        """See `FrameSource`; the colours are inverted."""
        return 255 - super().read(episode, start, stop)


class PhyreVideos(EpisodeVideos):
    """PHYRE's videos; arguments, items and errors as for `EpisodeVideos`."""

    default_root = "./data/phyre"
    padded_length = EPISODE_LENGTH
    _make_source = _Folders


class PhyreImages(PhyreVideos):
    """Windows of `sample_length` frames in every mode; a single frame [3, H, W] where `sample_length` is 1."""

    is_images = True
