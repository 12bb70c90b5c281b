"""Train DLPv2 on several devices or machines:
``accelerate launch --config_file ./accel_conf.yml train_dlp_accelerate.py -d shapes``.

`train_dlp.py` runs on any number of processes; this is its published name for several.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from train_dlp import main, train_dlp
from utils.errors import run_command

__all__ = ["main", "train_dlp"]

if __name__ == "__main__":
    run_command(main)
