"""Image metrics of DLPv2's reconstructions and DDLP's predictions, and how well DDLP's particles track objects:
``python eval/eval_gen_metrics.py -p RUN_DIR -c 6 --horizon 50``."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from eval.eval_model import check_horizon, image_dataset, mean_over_processes, shard_loader, video_dataset
from eval.image_metrics import ImageMetrics
from eval.tracking import VISIBLE, pixel_positions, tracking_quality
from utils.config import METRICS, Config
from utils.errors import UserError, run_command
from utils.files import make_folder, replacing
from utils.plotting import horizon_graph, save_image
from utils.prediction import add_prediction_arguments, open_prediction

POSITION = "position"  # the name of what `eval.tracking` measures
LABELS = {
    "lpips": "LPIPS",
    "ssim": "SSIM",
    "psnr": "PSNR (dB)",
    "position_error": "position error (pixels)",
    "tracked": "share of objects tracked",
}
TRAIN_WINDOWS = 200  # of the training set's windows, which overlap, as many are measured
TABLE_ROWS = 11


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
        _report(means, eval_dir, verbose)
    return means


@torch.no_grad()
def eval_ddlp_im_metric(
    model,
    device,
    config,
    timestep_horizon=50,
    val_mode="val",
    eval_dir="./",
    cond_steps=10,
    metrics=("ssim", "psnr", "lpips"),
    batch_size=32,
    verbose=False,
    accelerator=None,
):
    """Image metrics of DDLP's predictions of the frames `cond_steps`..`timestep_horizon` - 1 of a data set's videos.

    config: a `Config`, or a dict of its keys; val_mode: "train", "val" or "test"; metrics: also "position", where the
    objects' true positions are known; verbose: print the result. Returns name to mean over all frames and name_std to
    their standard deviation, the same on every process, and writes them to `eval_dir`/last_val_image_metrics.json.
    """
    over_time = measure_predictions(
        model, device, config, timestep_horizon, val_mode, cond_steps, metrics, batch_size, accelerator
    )
    summary = summarise(over_time)
    if accelerator is None or accelerator.is_main_process:
        _report(summary, eval_dir, verbose)
    return summary


def _report(values, eval_dir, verbose):
    write_json(Path(eval_dir) / "last_val_image_metrics.json", values)
    if verbose:
        print(", ".join(f"{name} {value:.4f}" for name, value in values.items()))


def write_json(path, values):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


@dataclass
class OverTime:
    """Sums of a measured value at each predicted frame, over videos (and objects): float64 [frames] each."""

    total: torch.Tensor
    squares: torch.Tensor
    count: torch.Tensor

    @classmethod
    def empty(cls, num_frames, device):
        return cls(*(torch.zeros(num_frames, dtype=torch.float64, device=device) for _ in range(3)))

    def add(self, values):
        """values: [frames, ...]; NaN where there is no value."""
        values = values.to(self.total).flatten(1)
        self.total += values.nansum(-1)
        self.squares += values.square().nansum(-1)
        self.count += (~values.isnan()).sum(-1)

    def reduced(self, accelerator):
        """Summed over the processes."""
        if accelerator is None or accelerator.num_processes == 1:
            return self
        return OverTime(*(accelerator.reduce(x, reduction="sum") for x in (self.total, self.squares, self.count)))

    def means(self):
        """The mean at each frame, a list; None where nothing was measured."""
        return [t / n if n else None for t, n in zip(self.total.tolist(), self.count.tolist(), strict=True)]

    def mean_and_std(self):
        """Over all values of all frames."""
        count = self.count.sum()
        mean = self.total.sum() / count
        return mean.item(), (self.squares.sum() / count - mean**2).clamp(min=0).sqrt().item()


@torch.no_grad()
def measure_predictions(
    model,
    device,
    config,
    horizon,
    mode="test",
    cond_steps=10,
    metrics=("ssim", "psnr", "lpips"),
    batch_size=32,
    accelerator=None,
    deterministic=True,
):
    """Measure DDLP's predictions of the frames `cond_steps`..`horizon` - 1 of videos.

    The arguments are those of `eval_ddlp_im_metric`; of the training set `TRAIN_WINDOWS` windows from all over it are
    measured. Returns name to `OverTime`: the image metrics', and for "position" `position_error` (pixels) and `tracked`
    (see `eval.tracking.tracking_quality`).
    """
    config = Config.from_dict(config)
    check_horizon(horizon, cond_steps)
    model = model.module if hasattr(model, "module") else model
    model.eval()
    images = ImageMetrics([name for name in metrics if name != POSITION], device)
    names = [*images.modules, *(("position_error", "tracked") if POSITION in metrics else ())]
    over_time = {name: OverTime.empty(horizon - cond_steps, device) for name in names}
    loader = shard_loader(_videos(config, mode, horizon), batch_size, config.num_workers, accelerator, horizon)
    is_main = accelerator is None or accelerator.is_main_process
    for batch in tqdm(loader, desc="predictions", leave=False, disable=not is_main):
        x = batch[0].to(device)
        prediction, particles = model.sample(
            x, horizon - cond_steps, deterministic, cond_steps=cond_steps, return_z=True
        )
        later = slice(cond_steps, None)
        values = images(prediction[:, later].flatten(0, 1), x[:, later].flatten(0, 1))
        for name, value in values.items():
            over_time[name].add(value.unflatten(0, (len(x), -1)).T)
        if POSITION in metrics:
            for errors in _tracking(batch, particles, cond_steps, config):
                for name, value in zip(("position_error", "tracked"), errors, strict=True):
                    over_time[name].add(value)
    return {name: sums.reduced(accelerator) for name, sums in over_time.items()}


def _videos(config, mode, horizon):
    videos = video_dataset(config, mode, horizon)
    if mode != "train" or len(videos) <= TRAIN_WINDOWS:
        return videos
    return Subset(videos, [i * len(videos) // TRAIN_WINDOWS for i in range(TRAIN_WINDOWS)])


def _tracking(batch, particles, cond_steps, config):
    """`tracking_quality` of each video. batch: what a video data set's items collate to."""
    if len(batch) < 5 or batch[1].numel() == 0:
        raise UserError(f"metrics: position needs objects whose positions are known, which ds {config.ds} lacks")
    points = pixel_positions(particles["z_pos"], config.image_size).cpu()
    visible = (particles["z_obj_on"] > VISIBLE).cpu()
    positions, sizes, _, in_camera = batch[1:5]
    for b in range(len(points)):
        yield tracking_quality(points[b], visible[b], positions[b], in_camera[b] > 0, sizes[b], cond_steps)


def summarise(over_time):
    """name to mean over all values, name_std to their standard deviation."""
    summary = {}
    for name, values in over_time.items():
        summary[name], summary[f"{name}_std"] = values.mean_and_std()
    return summary


def table(over_time, cond_steps):
    """The means at some of the frames, the first and the last among them, as lines of text."""
    names = list(over_time)
    columns = {name: values.means() for name, values in over_time.items()}
    count = len(columns[names[0]])
    shown = sorted({round(i * (count - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)})
    lines = [f"{'frame':>6}" + "".join(f"{name:>16}" for name in names)]
    for i in shown:
        cells = [columns[name][i] for name in names]
        lines.append(f"{cond_steps + i:>6}" + "".join(f"{'-' if c is None else f'{c:.4f}':>16}" for c in cells))
    return lines


def main(arguments=None):
    args = parse_arguments(arguments)
    asked = open_prediction(args, horizon=50)
    over_time = measure_predictions(
        asked.model,
        asked.device,
        asked.config,
        asked.horizon,
        asked.mode,
        asked.cond_steps,
        args.metrics,
        args.batch_size,
        deterministic=asked.deterministic,
    )
    folder = make_folder(asked.run.path / "eval")
    summary = summarise(over_time)
    write_json(folder / "last_val_image_metrics.json", summary)
    curves = {name: values.means() for name, values in over_time.items()}
    frames = list(range(asked.cond_steps, asked.horizon))
    write_json(folder / "metrics_over_time.json", {"frame": frames, **curves})
    graph = horizon_graph({LABELS[name]: {name: curve} for name, curve in curves.items()}, first=asked.cond_steps)
    save_image(graph, folder / "metrics_over_time.png")
    print("\n".join(table(over_time, asked.cond_steps)))
    for name in over_time:
        print(f"{LABELS[name]}: {summary[name]:.4f} (std {summary[f'{name}_std']:.4f})")
    print(f"written to {folder}")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_prediction_arguments(parser, horizon="50")
    parser.add_argument("-b", "--batch_size", type=int, default=10, metavar="N", help="videos at a time (default: 10)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=(*METRICS, POSITION),
        default=METRICS,
        help=f"what to measure (default: {' '.join(METRICS)}); position: where objects are known (balls, obj3d_like)",
    )
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        parser.error(f"-b/--batch_size is {args.batch_size}; legal: at least 1")
    return args


if __name__ == "__main__":
    run_command(main)
