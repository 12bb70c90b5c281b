"""Train DLPv2 on images: ``python train_dlp.py -d shapes``, ``python train_dlp.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from configs.schema import Config
from training.particles import DLPTask, train, train_command
from utils.errors import run_command


def train_dlp(config_path="./configs/shapes.json"):
    """Train the DLPv2 of a configuration, as the command line does. Returns the trained `ObjectDLP`."""
    return train(DLPTask, Config.load(config_path)).trained_model


def main(arguments=None):
    train_command(DLPTask, __doc__, arguments)


if __name__ == "__main__":
    run_command(main)
