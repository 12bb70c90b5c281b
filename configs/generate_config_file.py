"""Write the configuration of a run, checked, to a JSON file: ``python configs/generate_config_file.py --help``."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import CONFIG_DIR, Config, add_override_arguments, overrides_from
from utils.errors import UserError, run_command
from utils.files import replacing

DESCRIPTION = """Write the configuration of a run. For a data set that has a file in configs/, it starts from that file;
for a new one from the defaults, with an architecture for the --image_size (64 if not given)."""
EXAMPLES = """examples:
  python configs/generate_config_file.py --ds shapes --out small.json --n_kp_enc 6 --num_epochs 20
  python configs/generate_config_file.py --ds my_data --root ./data/my_data --image_size 128"""


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        usage="%(prog)s --ds NAME [--out PATH] [--force] [--KEY VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ds", required=True, metavar="NAME", help="name of a file in configs/, or of a new data set")
    parser.add_argument("--out", metavar="PATH", help="file to write, ending in .json (default: configs/NAME.json)")
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


def as_json(config):
    """The text of a configuration's file, one line per key."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in config.to_dict().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments=None):
    args = parse_arguments(arguments)
    overrides = overrides_from(args)
    if args.ds.endswith(".json"):
        raise UserError(f"--ds is {args.ds}; legal: a name, without .json")
    default_path = CONFIG_DIR / f"{args.ds}.json"
    is_known = os.path.exists(default_path)
    config = Config.load(args.ds) if is_known else new_config(args.ds, overrides.get("image_size", Config.image_size))
    config = config.replace("command line", **overrides)
    path = Path(args.out) if args.out else default_path
    if path.suffix != ".json":
        raise UserError(f"--out is {path}; legal: a path that ends in .json")
    if os.path.exists(path) and not args.force:
        raise UserError(f"{path} exists; legal: another --out, or --force to overwrite it")
    with replacing(path) as temporary:
        temporary.write_text(as_json(config), encoding="utf-8")
    print(f"wrote {path}")
    if not is_known:
        print(f"{args.ds} is new: if datasets/get_dataset.py does not know it yet, add it there")
    name = args.ds if path == default_path else path
    print(f"train with: python train_dlp.py -d {name} (images) or python train_ddlp.py -d {name} (videos)")


if __name__ == "__main__":
    run_command(main)
