"""Write the configuration of a run, checked, to a JSON file: ``python configs/generate_config_file.py --help``."""

import argparse
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import CONFIG_DIR, Config, add_override_arguments, base_of, overrides_from
from utils.errors import UserError, run_command
from utils.files import atomic_write, given_path

DESCRIPTION = """Write the configuration of a run. For a data set that has a file in configs/, it starts from that file;
for a new one from the defaults, with an architecture for the --image_size (64 if not given). For "video_folder" it
looks at the videos in the folder --root, and suits the configuration to them; docs/custom_dataset.md has more."""
EXAMPLES = """examples:
  python configs/generate_config_file.py --ds shapes --out small.json --n_kp_enc 6 --num_epochs 20
  python configs/generate_config_file.py --ds video_folder --root PATH --out my_videos.json
  python configs/generate_config_file.py --ds my_data --root ./data/my_data --image_size 128"""

VIDEO_FOLDER = "video_folder"
SIZES_SHOWN = 3
VIDEOS_LOOKED_AT = 50  # three frames of each
# Of the published configurations: the KLs' weights and the batch, by the loss and whether images have 128 pixels.
LOSS_WEIGHTS = {
    ("mse", False): (0.1, 32),
    ("mse", True): (0.15, 8),
    ("vgg", False): (30.0, 10),
    ("vgg", True): (40.0, 8),
}


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        usage="%(prog)s --ds NAME [--out PATH] [--force] [--KEY VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ds", required=True, metavar="NAME", help="name of a file in configs/, or of a new data set")
    parser.add_argument(
        "--out", type=given_path, metavar="PATH", help="file to write, ending in .json (default: configs/NAME.json)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file if it exists")
    add_override_arguments(parser, exclude=("ds",))
    return parser.parse_args(arguments)


def new_config(ds, image_size):
    """The defaults for a data set ``ds`` of square images of ``image_size`` pixels.

    As in the published configurations there are 8 x 8 patches, of 8 x 8 pixels or more, and the background is encoded
    to a 16 x 16 map.
    """
    stages = max(2, 1 + round(math.log2(image_size / 16)))
    enc_channels = [min(32 * 2**stage, 256) for stage in range(stages)]
    return Config(ds=ds, image_size=image_size, patch_size=max(8, image_size // 8), enc_channels=enc_channels)


def look_at(root, keep):
    """Count the frames of the videos in the folder ``root`` and say what was found.

    ``keep``: remember the counts on disk. Returns a dict from "train", "val" and "test" to dicts from a video's name
    to its shape, with ``length``, ``width`` and ``height``.
    """
    from datasets.episodes import why_empty
    from datasets.get_dataset import spread
    from datasets.video_folder_ds import count_frames, find_splits

    splits = find_splits(root)
    videos = {name: video for part in splits.values() for name, video in part.items()}
    shapes = dict(zip(videos, count_frames(root, videos, keep), strict=True))
    sizes = Counter((shape.width, shape.height) for shape in shapes.values()).most_common()
    words = [f"{width} x {height} ({number})" for (width, height), number in sizes[:SIZES_SHOWN]]
    lengths = [shape.length for shape in shapes.values()]
    shortest = next(name for name in shapes if shapes[name].length == min(lengths))
    parts = ", ".join(f"{len(part)} {split}" for split, part in splits.items())
    print(f"{root}: {len(videos)} videos ({parts})")
    print(
        f"frames: {', '.join(words)}{' and other sizes' if len(sizes) > SIZES_SHOWN else ''}; the middle square is used"
    )
    print(f"lengths: {min(lengths)} frames ({shortest}) to {max(lengths)}, {sum(lengths)} in all")
    names = list(videos)
    reasons = {}
    for name in (names[index] for index in spread(len(names), min(VIDEOS_LOOKED_AT, len(names)))):
        reasons.setdefault(why_empty(list(three_frames(videos[name], shapes[name]))), []).append(name)
    for reason, names in reasons.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        if reason:
            print(f"warning: {Path(root) / names[0]}{more}: frames {reason}", file=sys.stderr)
    return {split: {name: shapes[name] for name in part} for split, part in splits.items()}


def three_frames(video, shape):
    """The first, middle and last frame of a video, uint8 [H, W, 3]."""
    for number in (0, shape.length // 2, shape.length - 1):
        yield from video.frames(number, number + 1, shape.seek_points)


def video_config(root, splits, overrides):
    """The configuration for the videos in the folder ``root``, of which `look_at` found ``splits``, with ``overrides``.

    Images have 128 pixels if the shorter side of every video has as many, else 64. The weights of the loss, the batch
    and the particles are those of the published configurations for such images and such a ``recon_loss_type``. The
    horizons are as in these, or as long as the shortest video allows.
    """
    shapes = {name: shape for part in splits.values() for name, shape in part.items()}
    side = min(min(shape.width, shape.height) for shape in shapes.values())
    shortest = min(shape.length for shape in shapes.values())
    if shortest < 2:
        name = next(name for name, shape in shapes.items() if shape.length == shortest)
        raise UserError(f"{Path(root) / name}: has {shortest} frame; legal: at least 2, one to see and one to predict")
    config = new_config(VIDEO_FOLDER, overrides.get("image_size", 128 if side >= 128 else 64))
    is_large, loss = config.image_size >= 128, overrides.get("recon_loss_type", config.recon_loss_type)
    beta, batch_size = LOSS_WEIGHTS[loss, is_large]
    horizon = min(overrides.get("timestep_horizon", config.timestep_horizon), shortest - 1)
    windows = sum(shape.length - horizon for shape in splits["train"].values())
    suited = {
        "root": str(root),
        "batch_size": min(batch_size, windows),
        "beta_kl": beta,
        "beta_dyn": beta,
        "n_kp_enc": 12,
        "n_kp_prior": max(16, overrides.get("n_kp_enc", 0)),
        "use_correlation_heatmaps": True,
        "timestep_horizon": horizon,
        "num_static_frames": min(config.num_static_frames, max(1, horizon // 2)),
        "cond_steps": min(config.cond_steps, max(1, shortest // 2)),
        "animation_horizon": min(config.animation_horizon, shortest),
    }
    config = config.replace("command line", **{**suited, **overrides})
    check_lengths(root, splits, config)
    return config


def check_lengths(root, splits, config):
    """`UserError` if a horizon is longer than the shortest of the videos that it is needed of."""
    windows = config.timestep_horizon + 1
    needed = {"train": windows, "val": max(windows, config.animation_horizon), "test": config.animation_horizon}
    for split, part in splits.items():
        name = min(part, key=lambda name: part[name].length)
        length = part[name].length
        if length < needed[split]:
            raise UserError(
                f"{Path(root) / name}: has {length} frames, {needed[split]} are needed; legal: timestep_horizon at most"
                f" {length - 1} and animation_horizon at most {length}, or no video as short"
            )


def as_json(config):
    """The text of a configuration's file, one line per key."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in config.to_dict().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def make_config(ds, is_known, overrides):
    """The configuration for the data set ``ds``; ``is_known``: whether it has a file in configs/."""
    if ds == VIDEO_FOLDER:
        root = overrides.get("root")
        if root is None:
            raise UserError(f"--root is missing; with --ds {VIDEO_FOLDER} it is the folder of the videos")
        return video_config(root, look_at(root, overrides.get("cache", True)), overrides)
    config = Config.load(ds) if is_known else new_config(ds, overrides.get("image_size", Config.image_size))
    return config.replace("command line", **overrides)


def main(arguments=None):
    args = parse_arguments(arguments)
    overrides = overrides_from(args)
    if args.ds.endswith(".json"):
        raise UserError(f"--ds is {args.ds}; legal: a name, without .json")
    default_path = CONFIG_DIR / f"{args.ds}.json"
    path = default_path if args.out is None else args.out
    if path.suffix != ".json":
        raise UserError(f"--out is {path}; legal: a path that ends in .json")
    if os.path.exists(path) and not args.force:
        raise UserError(f"{path} exists; legal: another --out, or --force to overwrite it")
    is_known = args.ds == VIDEO_FOLDER or os.path.exists(default_path)
    config = make_config(args.ds, is_known, overrides)
    if base_of(path) != Path.cwd():  # else paths mean the same there as here
        config = config.with_absolute_paths()
    with atomic_write(path) as temporary:
        temporary.write_text(as_json(config), encoding="utf-8")
    print(f"wrote {path}")
    if not is_known:
        print(f"{args.ds} is new: if datasets/get_dataset.py does not know it yet, add it there")
    name = args.ds if path == default_path else path
    print(f"train with: python train_dlp.py -d {name} (images) or python train_ddlp.py -d {name} (videos)")


if __name__ == "__main__":
    run_command(main)
