"""Small balls videos and runs, made by the tests that need them."""

import json
import os
from pathlib import Path

import h5py
import torch

from configs.schema import Config
from datasets import balls_preparation
from rundir.run import MODELS, Run
from utils import checkpoints

ROOT = Path(__file__).parents[1]
NUM_FRAMES = 14
HORIZON, COND = 9, 4  # of the predictions that tests make: frames in all, and those that are seen
SMALL = {
    "ds": "balls",
    "device": "cpu",
    "batch_size": 4,
    "num_epochs": 2,
    "image_size": 32,
    "patch_size": 8,
    "n_kp_enc": 4,
    "n_kp_prior": 8,
    "enc_channels": [4, 4],
    "prior_channels": [4, 4],
    "learned_feature_dim": 2,
    "timestep_horizon": 3,
    "num_static_frames": 2,
    "pint_layers": 1,
    "pint_heads": 2,
    "pint_dim": 8,
    "cond_steps": 3,
    "animation_horizon": 6,
    "use_correlation_heatmaps": True,
    "train_size": 16,
    "val_size": 3,
    "metrics": ["ssim", "psnr"],
    "num_workers": 0,
    "seed": 3,
}


def make_data(folder):
    """Episodes of 14 frames of 32 x 32 pixels: 3 to train on, 4 to validate and 5 to test."""
    sizes = ["--train", "3", "--val", "4", "--test", "5", "--num_frames", str(NUM_FRAMES), "--processes", "1"]
    balls_preparation.main(["--out", str(folder), "--image_size", "32", "--radius", "4", "--speed", "1.5", *sizes])
    return str(folder)


def make_run(folder, root, seed=0, kind="ddlp", **changes):
    """A run directory of a model with random weights that draw something; returns the `Run`."""
    config = Config.from_dict({**SMALL, "root": root, **changes})
    torch.manual_seed(seed)
    model = MODELS[kind].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    run = Run(folder / f"010126_000000_{config.ds}_{kind}{config.run_prefix}", config, kind)
    (run.path / "saves").mkdir(parents=True)
    run.save_config(config)
    checkpoints.save(model.state_dict(), run.weights_path())
    return run


def write_config(folder, root, **changes):
    path = folder / "small.json"
    path.write_text(json.dumps({**SMALL, "root": root, **changes}))
    return path


def run_in(folder, main, *arguments):
    """A command's `main` with `folder` as the working directory, with one thread: sums are in one order then."""
    threads, before = torch.get_num_threads(), os.getcwd()
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        return main([str(argument) for argument in arguments])
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def videos(balls_data, mode="test"):
    """Images [N, T, 3, H, W] and positions [N, T, n, 2], read independently of the loader."""
    with h5py.File(f"{balls_data}/{mode}.hdf5") as file:
        return torch.from_numpy(file["imgs"][:]).permute(0, 1, 4, 2, 3).float() / 255, file["positions"][:]


def predict(run, x, horizon=HORIZON, cond=COND):
    return run.load_model().sample(x[:, :horizon], horizon - cond, cond_steps=cond, return_z=True)
