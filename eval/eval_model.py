"""Evaluation of a model on given data sets: the ELBO, figures, animations of predictions.

The functions of the published names take a configuration instead, and open its data set."""

from pathlib import Path

import torch

from configs.schema import Config
from datasets.episodes import scaled
from datasets.get_dataset import first_frames, image_dataset, shard_loader, spread, video_dataset
from utils import plotting
from utils.animation import animate_trajectories
from utils.legal import illegal
from utils.progress import progress_bar

FIGURE_COLUMNS = 8


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
def mean_elbo(
    model,
    dataset,
    elbo_options,
    forward_options=None,
    num_frames=None,
    batch_size=100,
    num_workers=0,
    device=torch.device("cpu"),  # noqa: B008 (immutable)
    accelerator=None,
    figure=None,
):
    """The model's loss on a data set of images, or of videos whose first `num_frames` frames are read, with means for
    samples.

    elbo_options, forward_options: keyword arguments of the model's `calc_elbo` and `forward`; figure: a function of the
    model and the first batch, which the main process calls. Returns the mean over the items of all processes, the same
    on every process.
    """
    model = (model.module if hasattr(model, "module") else model).eval()
    is_main = accelerator is None or accelerator.is_main_process
    loader = shard_loader(dataset, batch_size, num_workers, accelerator, num_frames)
    total, count = torch.zeros((), device=device), 0
    for i, batch in enumerate(progress_bar(loader, desc="validation", leave=False, disable=not is_main)):
        x = scaled(batch[0].to(device))
        output = model(x, deterministic=True, alpha_masks=False, **(forward_options or {}))
        total += model.calc_elbo(x, output, **elbo_options)["loss"] * len(x)
        count += len(x)
        if i == 0 and figure is not None and is_main:
            figure(model, x)
    return mean_over_processes(total, count, accelerator).item()


def validation_figure(draw, fig_dir, epoch, **options):
    """A `figure` of `mean_elbo`: writes the "image" that `draw` (`draw_dlp`, `draw_ddlp`, with its options) returns to
    `fig_dir`/image_valid_{epoch}.jpg."""

    def figure(model, x):
        plotting.save_image(draw(model, x, **options)["image"], Path(fig_dir) / f"image_valid_{epoch}.jpg")

    return figure


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
    """`mean_elbo` of DLPv2 on the validation set of `config` (a `Config`, or a dict of its keys).

    With `save_image` the figure of the first images goes to `fig_dir`/image_valid_{epoch}.jpg.
    """
    config = Config.from_dict(config)
    options = {
        "beta_kl": beta_kl,
        "beta_rec": beta_rec,
        "kl_balance": kl_balance,
        "recon_loss_type": recon_loss_type,
        "recon_loss_func": recon_loss_func,
    }
    figure = validation_figure(draw_dlp, fig_dir, epoch, topk=topk, iou_thresh=iou_thresh) if save_image else None
    return mean_elbo(
        model,
        image_dataset(config, "val", as_uint8=True),
        options,
        batch_size=batch_size,
        num_workers=config.num_workers,
        device=device,
        accelerator=accelerator,
        figure=figure,
    )


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
    """`mean_elbo` of DDLP on the first `timestep_horizon` + 1 frames of the validation set's episodes, without a
    discount.

    `timestep_horizon` is the model's; `animation_horizon` has no effect. The rest as for `evaluate_validation_elbo`.
    """
    config = Config.from_dict(config)
    num_frames, num_static = timestep_horizon + 1, config.num_static_frames
    options = {
        "beta_kl": beta_kl,
        "beta_dyn": beta_dyn,
        "beta_rec": beta_rec,
        "kl_balance": kl_balance,
        "recon_loss_type": recon_loss_type,
        "recon_loss_func": recon_loss_func,
        "beta_dyn_rec": beta_dyn_rec,
        "num_static": num_static,
    }
    figure = validation_figure(draw_ddlp, fig_dir, epoch, topk=topk, iou_thresh=iou_thresh) if save_image else None
    return mean_elbo(
        model,
        video_dataset(config, "val", num_frames, as_uint8=True),
        options,
        {"num_static_frames": num_static},
        num_frames,
        batch_size,
        config.num_workers,
        device,
        accelerator,
        figure,
    )


@torch.no_grad()
def animate_predictions(model, videos, indices, paths, horizon, cond_steps, seconds, deterministic=True, verbose=False):
    """Write animations of DDLP's predictions beside the ground truth.

    videos: a data set of videos, whose items at `indices` are shown, one at each of the `paths`; horizon: frames in
    all, of which the first `cond_steps` are seen; seconds: how long each frame is shown; deterministic: PINT's means
    instead of samples; verbose: a progress bar.
    """
    device = next(model.parameters()).device
    for index, path in zip(progress_bar(indices, desc="animations", disable=not verbose), paths, strict=True):
        x = scaled(first_frames(videos[index], horizon)[0].to(device))
        prediction = model.sample(x[None], horizon - cond_steps, deterministic, cond_steps=cond_steps)
        animate_trajectories(x, prediction[0], path, seconds, rec_to_pred_t=cond_steps)


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

    config: a `Config`, or a dict of its keys; device: the model's; timestep_horizon: frames in all, of which the first
    `cond_steps` (default the model's T) are seen; num_trajetories: how many, the first episodes of `mode` ("val",
    "test"; default "val") or, with `train`, windows from all over the training set; suffix: "gif" or "mp4"; the rest as
    for `animate_predictions`. Only the main process writes. Returns the paths, on every process.
    """
    config = Config.from_dict(config)
    model = (model.module if hasattr(model, "module") else model).eval()
    cond_steps = model.timestep_horizon if cond_steps is None else cond_steps
    check_horizon(timestep_horizon, cond_steps)
    videos = video_dataset(config, "train" if train else mode or "val", timestep_horizon, as_uint8=True)
    count = min(num_trajetories, len(videos))
    indices = spread(len(videos), count) if train else range(count)
    paths = [Path(fig_dir) / f"{prefix}e{epoch}_traj_anim_{i}.{suffix}" for i in range(count)]
    if accelerator is None or accelerator.is_main_process:
        options = {"deterministic": deterministic, "verbose": verbose}
        animate_predictions(
            model, videos, indices, paths, timestep_horizon, cond_steps, config.animation_fps, **options
        )
    return paths


def check_horizon(horizon, cond_steps):
    """`UserError` unless there is a frame to see and a frame to predict."""
    if cond_steps < 1:
        raise illegal("cond_steps", cond_steps, "at least 1")
    if horizon <= cond_steps:
        raise illegal("horizon (frames in all)", horizon, f"above cond_steps, {cond_steps}")
