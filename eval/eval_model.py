"""Evaluation of a model on its validation set: the ELBO, and figures."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from datasets.get_dataset import get_image_dataset
from utils import plotting
from utils.config import Config

FIGURE_COLUMNS = 8


def image_dataset(config, mode):
    """A DLPv2 run's data set: images, or clips of T + 1 frames where the model tracks. mode: "train", "val", "test"."""
    seq_len = config.timestep_horizon + 1 if config.use_tracking else 1
    num_items = config.train_size if mode == "train" else config.val_size
    return get_image_dataset(config.ds, config.root, mode, config.image_size, seq_len, num_items=num_items)


def shard_loader(dataset, batch_size, num_workers=0, accelerator=None):
    """Batches in order; with several processes, each gets the items i, i + N, i + 2N, ... of its own."""
    if accelerator is not None and accelerator.num_processes > 1:
        dataset = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
    return DataLoader(dataset, batch_size, num_workers=num_workers)


def mean_over_processes(total, count, accelerator=None):
    """total / count, summed over the processes. total: a tensor; count: a number."""
    if accelerator is not None and accelerator.num_processes > 1:
        total = accelerator.reduce(total, reduction="sum")
        count = accelerator.reduce(torch.tensor(float(count), device=total.device), reduction="sum")
    return total / count


def draw_dlp(model, x, topk=5, iou_thresh=0.2):
    """Figures of what DLPv2 makes of images [B, C, H, W] or clips [B, T, C, H, W] (the frames of the first).

    Returns name to image tensor [3, h, w]: "image" the nine rows, "image_obj" cut glimpses over decoded ones,
    "image_seg" images over each particle's alpha in its colour.
    """
    is_clip = x.dim() == 5 and model.use_tracking
    images = (x[0] if is_clip else x.reshape(-1, *x.shape[-3:]))[:FIGURE_COLUMNS]
    output = model(images.unsqueeze(0) if is_clip else images, deterministic=True)
    cut, decoded = output["cropped_objects_original"], output["dec_objects_original"][:, :, 1:]
    return {
        "image": plotting.figure_grid(images, output, topk, iou_thresh, kp_range=model.architecture.kp_range),
        "image_obj": plotting.plot_glimpses(cut.flatten(0, 1), decoded.flatten(0, 1)),
        "image_seg": plotting.segmentation_grid(images, output["alpha_masks"]),
    }


@torch.no_grad()
def evaluate_validation_elbo(
    model,
    config,
    epoch,
    batch_size=100,
    recon_loss_type="vgg",
    device=torch.device("cpu"),  # noqa: B008 (immutable)
    save_image=False,
    fig_dir="./",
    topk=5,
    recon_loss_func=None,
    beta_rec=1.0,
    beta_kl=1.0,
    kl_balance=0.001,
    accelerator=None,
    iou_thresh=0.2,
):
    """DLPv2's loss on the validation set of `config` (a `Config`, or a dict of its keys), with means for samples.

    With `save_image` the figure of the first images goes to `fig_dir`/image_valid_{epoch}.jpg. Returns the mean over
    the images, the same on every process.
    """
    config = Config.from_dict(config)
    model = model.module if hasattr(model, "module") else model
    model.eval()
    is_main = accelerator is None or accelerator.is_main_process
    dataset = image_dataset(config, "val")
    loader = shard_loader(dataset, batch_size, config.num_workers, accelerator)
    total, count = torch.zeros((), device=device), 0
    for i, batch in enumerate(tqdm(loader, desc="validation", leave=False, disable=not is_main)):
        x = batch[0].to(device)
        output = model(x, deterministic=True)
        losses = model.calc_elbo(
            x,
            output,
            beta_kl=beta_kl,
            beta_rec=beta_rec,
            kl_balance=kl_balance,
            recon_loss_type=recon_loss_type,
            recon_loss_func=recon_loss_func,
        )
        total += losses["loss"] * len(x)
        count += len(x)
        if i == 0 and save_image and is_main:
            figure = draw_dlp(model, x, topk, iou_thresh)["image"]
            plotting.save_image(figure, Path(fig_dir) / f"image_valid_{epoch}.jpg")
    return mean_over_processes(total, count, accelerator).item()
