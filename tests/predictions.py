"""What DDLP predicts of the test videos, from the model itself."""

import h5py
import torch

HORIZON, COND = 9, 4


def videos(balls_data, mode="test"):
    """Images [N, T, 3, H, W] and positions [N, T, n, 2], read independently of the loader."""
    with h5py.File(f"{balls_data}/{mode}.hdf5") as file:
        return torch.from_numpy(file["imgs"][:]).permute(0, 1, 4, 2, 3).float() / 255, file["positions"][:]


def predict(run, x, horizon=HORIZON, cond=COND):
    return run.load_model().sample(x[:, :horizon], horizon - cond, cond_steps=cond, return_z=True)
