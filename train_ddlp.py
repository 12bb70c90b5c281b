"""Train DDLP on videos: ``python train_ddlp.py -d balls``, ``python train_ddlp.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from configs.schema import Config
from training.particles import DDLPTask, train, train_command
from utils.errors import run_command


def train_ddlp(config_path="./configs/balls.json"):
    """Train the DDLP of a configuration, as the command line does. Returns the trained `ObjectDynamicsDLP`."""
    return train(DDLPTask, Config.load(config_path)).trained_model


def main(arguments=None):
    train_command(DDLPTask, __doc__, arguments)


if __name__ == "__main__":
    run_command(main)
