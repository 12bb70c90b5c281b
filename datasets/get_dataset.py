"""The data sets by name.

One's own data set is one more `register` line here, or the same call in one's own script:

    register("mine", image="my_package.my_data:MyImages", video="my_package.my_data:MyVideos")

A data set may have one of the two variants or both. A variant is a class or function that makes the data set, or its
name, "module:attribute", which is imported only when the data set is used, as its packages are needed only then. It is
called as

    variant(root, mode=mode, image_size=image_size, sample_length=seq_len)

and, if it is registered with `decodes=True`, with `cache=` (whether to keep decoded frames on disk) and `as_uint8=`
(whether to leave frames uint8 in 0..255, see `datasets.episodes`). It returns a
`torch.utils.data.Dataset`. `mode` is "train", "val", "valid" (= "val") or "test"; frames are float32 in
0..1 with sides of `image_size` pixels. An item is a tuple whose first entry is

- for `video`: [T, 3, H, W]; in train a window of T = `sample_length` frames, otherwise a whole episode;
- for `image`: [3, H, W], or a window [sample_length, 3, H, W] where the images come from videos.

The further entries are the data set's own. Each item is checked when it is read: a `UserError` says what is wrong.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from torch.utils.data import Subset, default_collate

from datasets.episodes import EpisodeVideos, why_empty
from datasets.item_check import CheckedItems
from datasets.loading import Loader
from utils.errors import UserError
from utils.legal import illegal, whole_number

_LOOKED_AT = 8  # items of a training set that are looked at before training


@dataclass(frozen=True)
class _Variants:
    image: Callable | str | None
    video: Callable | str | None
    takes_num_items: bool
    decodes: bool


_VARIANTS: dict[str, _Variants] = {}


def register(name, image=None, video=None, takes_num_items=False, decodes=False):
    """Make a data set known under `name` (the configuration key `ds`).

    `image` and `video` are its variants, as the module's text says. With `takes_num_items` they are also called with
    `num_items=` (a positive int, or None for all) and make only that many, instead of making all and using the first;
    with `decodes` with `cache=` and `as_uint8=`, see `get_image_dataset`.

    Raises UserError for a name that is taken, a data set without a variant, and a text other than "module:attribute".
    """
    if name in _VARIANTS:
        raise UserError(f"register: the data set name {name!r} is taken")
    if image is None and video is None:
        raise UserError(f"register: the data set {name!r} has neither an image nor a video variant; give at least one")
    for variant in (image, video):
        if isinstance(variant, str) and not all(variant.partition(":")):
            raise UserError(f'register: {variant!r} of the data set {name!r} is not of the form "module:attribute"')
    _VARIANTS[name] = _Variants(image, video, takes_num_items, decodes)


def _shapes(root, mode, image_size, sample_length, num_items):
    """Shapes has single images: `sample_length` is of no use to it."""
    from datasets.shapes_ds import ShapesDataset

    return ShapesDataset(root, mode, image_size, num_images=num_items)


register("shapes", image=_shapes, takes_num_items=True)
# Each of these has the classes ...Images and ...Videos.
for _name, _classes in {
    "balls": "datasets.balls_ds:Balls",
    "obj3d": "datasets.obj3d_ds:Obj3d",
    "obj3d128": "datasets.obj3d_ds:Obj3d",
    "obj3d_like": "datasets.obj3d_like_ds:Obj3dLike",
    "traffic": "datasets.traffic_ds:Traffic",
    "phyre": "datasets.phyre_ds:Phyre",
    "clevrer": "datasets.clevrer_ds:Clevrer",
    "video_folder": "datasets.video_folder_ds:VideoFolder",
}.items():
    register(_name, image=f"{_classes}Images", video=f"{_classes}Videos", decodes=True)


def get_image_dataset(ds, root, mode="train", image_size=128, seq_len=1, num_items=None, cache=True, as_uint8=False):
    """The images of the data set `ds`.

    `root`: where it lies on disk (None: where the data set has a place of its own). `mode`: "train", "val" (or
    "valid") or "test". `image_size`: side of an image in pixels. `seq_len`: frames per item where the images come
    from videos. `num_items`: use only so many items, spread over the set (all, if there are no more). `cache`: keep
    decoded frames on disk, for the data sets that are decoded, rather than decode them anew for every item. `as_uint8`:
    leave item 0 of these uint8 in 0..255, for `datasets.episodes.scaled` to scale on the device: a quarter of the bytes
    go from process to process and to the device.

    Returns a Dataset whose item 0 is float32 [3, H, W] (or [seq_len, 3, H, W] for windows of videos) in 0..1. Raises
    UserError for an unknown name, a data set that has no images, and an illegal argument.
    """
    return _make("image", ds, root, mode, image_size, seq_len, num_items, cache, as_uint8)


def get_video_dataset(ds, root, seq_len=1, mode="train", image_size=128, num_items=None, cache=True, as_uint8=False):
    """The videos of the data set `ds`; arguments and errors as for `get_image_dataset`.

    Returns a Dataset whose item 0 is float32 [T, 3, H, W] in 0..1: in train a window of T = `seq_len` frames,
    otherwise a whole episode.
    """
    return _make("video", ds, root, mode, image_size, seq_len, num_items, cache, as_uint8)


def _make(kind, ds, root, mode, image_size, seq_len, num_items, cache, as_uint8):
    variant = _variant(kind, ds)
    if num_items is not None:
        whole_number("num_items", num_items)
    options = {"num_items": num_items} if _VARIANTS[ds].takes_num_items else {}
    if _VARIANTS[ds].decodes:
        options |= {"cache": cache, "as_uint8": as_uint8}
    dataset = variant(root, mode=mode, image_size=image_size, sample_length=seq_len, **options)
    if not isinstance(dataset, EpisodeVideos):  # whose items are what they should be
        windows = seq_len if kind == "image" or mode == "train" else 1
        num_frames = None if kind == "image" and seq_len == 1 else windows
        dataset = CheckedItems(dataset, ds, image_size, num_frames, as_uint8 and _VARIANTS[ds].decodes)
    if num_items is None or len(dataset) <= num_items:
        return dataset
    return Subset(dataset, spread(len(dataset), num_items))


def _variant(kind, ds):
    """The `kind` ("image" or "video") variant of `ds`; one that is named is imported."""
    if ds not in _VARIANTS:
        raise illegal("ds", ds, _names(_VARIANTS))
    variant = getattr(_VARIANTS[ds], kind)
    if variant is None:
        others = _names(name for name, variants in _VARIANTS.items() if getattr(variants, kind) is not None)
        raise illegal("ds", ds, f"a data set that has {kind}s: {others}")
    if isinstance(variant, str):
        variant = _imported(variant, ds)
    return variant


def _imported(name, ds):
    """What "module:attribute" names; `UserError` where there is no such module or attribute."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that this one imports
        place = f"no module {module} in the working directory or among the installed packages"
        raise UserError(f"data set {ds}: {name}: {place}") from error
    except AttributeError as error:
        raise UserError(f"data set {ds}: {name}: {error}") from error


def _names(names):
    return ", ".join(sorted(names)) or "none"


def spread(length, count):
    """`count` of the indices 0 to `length` - 1, evenly spaced from 0 on."""
    return [i * length // count for i in range(count)]


# -------------------------------------------------------------------------------- the data sets of a configuration


def image_dataset(config, mode, as_uint8=False):
    """A DLPv2 run's data set: images, or clips of T + 1 frames where the model tracks. mode: "train", "val", "test".
    as_uint8: see `get_image_dataset`."""
    seq_len = config.timestep_horizon + 1 if config.use_tracking else 1
    size = _size(config, mode)
    options = {"num_items": size, "cache": config.cache, "as_uint8": as_uint8}
    images = get_image_dataset(config.ds, config.root, mode, config.image_size, seq_len, **options)
    return _looked_at(images, config.ds) if mode == "train" else images


def video_dataset(config, mode, num_frames, as_uint8=False):
    """A DDLP run's data set: in mode "train" windows of `num_frames` frames, in "val" and "test" the first as many
    frames of the episodes, or whole episodes where the data set is not ours. as_uint8: see `get_video_dataset`."""
    options = {"num_items": _size(config, mode), "cache": config.cache, "as_uint8": as_uint8}
    videos = get_video_dataset(config.ds, config.root, num_frames, mode, config.image_size, **options)
    return _looked_at(videos, config.ds) if mode == "train" else _only_first(videos, num_frames)


def _looked_at(dataset, name):
    """A data set to train on, with a warning where frames from all over it are nearly black or constant."""
    if isinstance(dataset.dataset if isinstance(dataset, Subset) else dataset, EpisodeVideos):
        items = [dataset[index][0] for index in spread(len(dataset), min(_LOOKED_AT, len(dataset)))]
        frames = [frame for item in items for frame in (item if item.dim() == 4 else [item])]
        reason = why_empty(frames)
        if reason:
            warnings.warn(f"{len(frames)} training frames of {name} {reason}", UserWarning, stacklevel=2)
    return dataset


def _only_first(videos, num_frames):
    """Videos of which no more than the first frames are read, where the data set can do so."""
    if isinstance(videos, Subset):
        return Subset(_only_first(videos.dataset, num_frames), videos.indices)
    return videos.first(num_frames) if isinstance(videos, EpisodeVideos) else videos


def _size(config, mode):
    return {"train": config.train_size, "val": config.val_size}.get(mode)


def shard_loader(dataset, batch_size, num_workers=0, accelerator=None, num_frames=None):
    """Batches in order; with several processes, each gets the items i, i + N, i + 2N, ... of its own.

    num_frames: how many frames of every video to read, from the first (None: all); `UserError` where a video has fewer.
    """
    if accelerator is not None and accelerator.num_processes > 1:
        dataset = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
    collate = None
    if num_frames is not None:
        dataset, collate = _only_first(dataset, num_frames), partial(_collate_first_frames, num_frames)
    return Loader(dataset, batch_size, num_workers=num_workers, collate_fn=collate)


def _collate_first_frames(num_frames, items):
    return default_collate([first_frames(item, num_frames) for item in items])


def first_frames(item, num_frames):
    """The first frames of a video data set's item, a tuple of tensors [T, ...]."""
    if len(item[0]) < num_frames:
        raise UserError(f"{num_frames} frames are asked for, but an episode has {len(item[0])}")
    return tuple(entry[:num_frames] for entry in item)
