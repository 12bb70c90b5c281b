"""Evaluation of a model on its validation set: the ELBO, figures, animations of predictions."""

from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset, default_collate
from tqdm import tqdm

from datasets.get_dataset import get_image_dataset, get_video_dataset
from utils import plotting
from utils.animation import animate_trajectories
from utils.config import Config
from utils.errors import UserError

FIGURE_COLUMNS = 8


def image_dataset(config, mode, as_uint8=False):
    """A DLPv2 run's data set: images, or clips of T + 1 frames where the model tracks. mode: "train", "val", "test".
    as_uint8: see `get_image_dataset`."""
    seq_len = config.timestep_horizon + 1 if config.use_tracking else 1
    size = _size(config, mode)
    return get_image_dataset(config.ds, config.root, mode, config.image_size, seq_len, size, config.cache, as_uint8)


def video_dataset(config, mode, num_frames, as_uint8=False):
    """A DDLP run's data set: in mode "train" windows of `num_frames` frames, in "val" and "test" whole episodes.
    as_uint8: see `get_video_dataset`."""
    options = {"num_items": _size(config, mode), "cache": config.cache, "as_uint8": as_uint8}
    return get_video_dataset(config.ds, config.root, num_frames, mode, config.image_size, **options)


def _size(config, mode):
    return {"train": config.train_size, "val": config.val_size}.get(mode)


def shard_loader(dataset, batch_size, num_workers=0, accelerator=None, num_frames=None):
    """Batches in order; with several processes, each gets the items i, i + N, i + 2N, ... of its own.

    num_frames: of every entry of an item (of a video), only the first so many frames; `UserError` where there are
    fewer.
    """
    if accelerator is not None and accelerator.num_processes > 1:
        dataset = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
    collate = None if num_frames is None else partial(_collate_first_frames, num_frames)
    return DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collate)


def _collate_first_frames(num_frames, items):
    return default_collate([first_frames(item, num_frames) for item in items])


def first_frames(item, num_frames):
    """The first frames of a video data set's item, a tuple of tensors [T, ...]."""
    if len(item[0]) < num_frames:
        raise UserError(f"{num_frames} frames are asked for, but an episode has {len(item[0])}")
    return tuple(entry[:num_frames] for entry in item)


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
    return _draw(model, images, model(images.unsqueeze(0) if is_clip else images, deterministic=True), topk, iou_thresh)


def draw_ddlp(model, x, topk=5, iou_thresh=0.2):
    """As `draw_dlp`, of the first of the clips [B, T + 1, C, H, W]; a column per frame."""
    return _draw(model, x[0], model(x[:1], deterministic=True), topk, iou_thresh)


def _draw(model, images, output, topk, iou_thresh):
    """The figures of images [N, C, H, W] and the output dictionary of them; the first `FIGURE_COLUMNS` are shown."""
    output = {name: value[:FIGURE_COLUMNS] for name, value in output.items()}
    images = images[:FIGURE_COLUMNS]
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

    def loss(model, x):
        output = model(x, deterministic=True)
        return model.calc_elbo(
            x,
            output,
            beta_kl=beta_kl,
            beta_rec=beta_rec,
            kl_balance=kl_balance,
            recon_loss_type=recon_loss_type,
            recon_loss_func=recon_loss_func,
        )["loss"]

    loader = shard_loader(image_dataset(config, "val"), batch_size, config.num_workers, accelerator)
    figure = Path(fig_dir) / f"image_valid_{epoch}.jpg" if save_image else None
    return _validation_mean(
        model, loader, loss, device, accelerator, figure, partial(draw_dlp, topk=topk, iou_thresh=iou_thresh)
    )


@torch.no_grad()
def evaluate_validation_elbo_dyn(
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
    beta_dyn=1.0,
    iou_thresh=0.2,
    beta_dyn_rec=1.0,
    kl_balance=1.0,
    accelerator=None,
    timestep_horizon=10,
    animation_horizon=50,
):
    """DDLP's loss on the first `timestep_horizon` + 1 frames of the validation set's episodes, with means for samples
    and without a discount.

    `timestep_horizon` is the model's; `animation_horizon` has no effect. The rest as for `evaluate_validation_elbo`.
    """
    config = Config.from_dict(config)

    def loss(model, x):
        output = model(x, deterministic=True, num_static_frames=config.num_static_frames)
        return model.calc_elbo(
            x,
            output,
            beta_kl=beta_kl,
            beta_dyn=beta_dyn,
            beta_rec=beta_rec,
            kl_balance=kl_balance,
            recon_loss_type=recon_loss_type,
            recon_loss_func=recon_loss_func,
            beta_dyn_rec=beta_dyn_rec,
            num_static=config.num_static_frames,
        )["loss"]

    num_frames = timestep_horizon + 1
    dataset = video_dataset(config, "val", num_frames)
    loader = shard_loader(dataset, batch_size, config.num_workers, accelerator, num_frames)
    figure = Path(fig_dir) / f"image_valid_{epoch}.jpg" if save_image else None
    return _validation_mean(
        model, loader, loss, device, accelerator, figure, partial(draw_ddlp, topk=topk, iou_thresh=iou_thresh)
    )


def _validation_mean(model, loader, loss, device, accelerator, figure_path, draw):
    """The mean of `loss(model, x)` over the items of all processes.

    Where `figure_path` is not None the main process writes there the "image" of what `draw(model, x)` returns for the
    first batch.
    """
    model = model.module if hasattr(model, "module") else model
    model.eval()
    is_main = accelerator is None or accelerator.is_main_process
    total, count = torch.zeros((), device=device), 0
    for i, batch in enumerate(tqdm(loader, desc="validation", leave=False, disable=not is_main)):
        x = batch[0].to(device)
        total += loss(model, x) * len(x)
        count += len(x)
        if i == 0 and figure_path is not None and is_main:
            plotting.save_image(draw(model, x)["image"], figure_path)
    return mean_over_processes(total, count, accelerator).item()


@torch.no_grad()
def animate_trajectory_ddlp(
    model,
    config,
    epoch,
    device=torch.device("cpu"),  # noqa: B008 (immutable)
    fig_dir="./",
    timestep_horizon=3,
    num_trajetories=5,
    accelerator=None,
    train=False,
    prefix="",
    cond_steps=None,
    deterministic=True,
    mode=None,
    suffix="gif",
    verbose=False,
):
    """Animations of DDLP's predictions beside the ground truth: `fig_dir`/{prefix}e{epoch}_traj_anim_{i}.{suffix}.

    config: a `Config`, or a dict of its keys; timestep_horizon: frames in all, of which the first `cond_steps` (default
    the model's T) are seen; num_trajetories: how many, the first episodes of `mode` ("val", "test"; default "val") or,
    with `train`, windows from all over the training set; deterministic: PINT's means instead of samples; suffix: "gif"
    or "mp4"; verbose: a progress bar. Only the main process writes. Returns the paths, on every process.
    """
    config = Config.from_dict(config)
    model = model.module if hasattr(model, "module") else model
    model.eval()
    cond_steps = model.timestep_horizon if cond_steps is None else cond_steps
    check_horizon(timestep_horizon, cond_steps)
    dataset = video_dataset(config, "train" if train else mode or "val", timestep_horizon)
    count = min(num_trajetories, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)] if train else range(count)
    paths = [Path(fig_dir) / f"{prefix}e{epoch}_traj_anim_{i}.{suffix}" for i in range(count)]
    if accelerator is not None and not accelerator.is_main_process:
        return paths
    for index, path in zip(tqdm(indices, desc="animations", disable=not verbose), paths, strict=True):
        x = first_frames(dataset[index], timestep_horizon)[0]
        prediction = model.sample(
            x.unsqueeze(0).to(device), timestep_horizon - cond_steps, deterministic, cond_steps=cond_steps
        )
        animate_trajectories(x, prediction[0], path, config.animation_fps, rec_to_pred_t=cond_steps)
    return paths


def check_horizon(horizon, cond_steps):
    """`UserError` unless there is a frame to see and a frame to predict."""
    if cond_steps < 1:
        raise UserError(f"cond_steps is {cond_steps}; legal: at least 1")
    if horizon <= cond_steps:
        raise UserError(f"horizon is {horizon} frames in all; legal: above cond_steps, {cond_steps}")
