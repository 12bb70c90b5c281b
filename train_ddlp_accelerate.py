"""Train DDLP on several devices or machines:
``accelerate launch --config_file ./accel_conf.yml train_ddlp_accelerate.py -d balls``.

`train_ddlp.py` runs on any number of processes; this is its published name for several.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from train_ddlp import main, train_ddlp
from utils.errors import run_command

__all__ = ["main", "train_ddlp"]

if __name__ == "__main__":
    run_command(main)
