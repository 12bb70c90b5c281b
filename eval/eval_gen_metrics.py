"""Image metrics (LPIPS, SSIM, PSNR) of reconstructions."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from eval.eval_model import image_dataset, mean_over_processes, shard_loader
from eval.image_metrics import ImageMetrics
from utils.config import Config
from utils.files import replacing


@torch.no_grad()
def eval_dlp_im_metric(
    model,
    device,
    config,
    val_mode="val",
    eval_dir="./",
    metrics=("ssim", "psnr", "lpips"),
    batch_size=32,
    verbose=False,
    accelerator=None,
):
    """Image metrics of DLPv2's reconstructions of a data set.

    config: a `Config`, or a dict of its keys; val_mode: "train", "val" or "test"; verbose: print the result. Returns
    name to mean over the images, the same on every process, and writes it to
    `eval_dir`/last_val_image_metrics.json.
    """
    config = Config.from_dict(config)
    model = model.module if hasattr(model, "module") else model
    model.eval()
    is_main = accelerator is None or accelerator.is_main_process
    measure = ImageMetrics(metrics, device)
    loader = shard_loader(image_dataset(config, val_mode), batch_size, config.num_workers, accelerator)
    totals, count = dict.fromkeys(metrics, torch.zeros((), device=device)), 0
    for batch in tqdm(loader, desc="image metrics", leave=False, disable=not is_main):
        x = batch[0].to(device)
        images = x.reshape(-1, *x.shape[-3:])
        values = measure(model(x, deterministic=True)["rec"], images)
        totals = {name: totals[name] + values[name].sum() for name in metrics}
        count += len(images)
    means = {name: mean_over_processes(totals[name], count, accelerator).item() for name in metrics}
    if is_main:
        with replacing(Path(eval_dir) / "last_val_image_metrics.json") as temporary:
            temporary.write_text(json.dumps(means, indent=2) + "\n")
        if verbose:
            print(", ".join(f"{name} {value:.4f}" for name, value in means.items()))
    return means
