"""Image metrics of DLPv2's reconstructions and of DDLP's predictions, and how well the particles find or track objects:
``python eval/eval_gen_metrics.py -p RUN_DIR -c 6 --horizon 50``."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import Subset

from configs.schema import METRICS, Config
from datasets.episodes import scaled
from datasets.get_dataset import image_dataset, shard_loader, spread, video_dataset
from eval.eval_model import check_horizon
from eval.image_metrics import ImageMetrics
from eval.tracking import detection_quality, pixel_positions, tracking_quality, wholeness
from modules.particles import VISIBLE, Particles
from rundir.prediction import add_prediction_arguments, open_data, open_prediction, open_run
from utils.device import device_of
from utils.errors import UserError, run_command
from utils.files import make_folder, write_json
from utils.plotting import horizon_graph, save_image
from utils.progress import progress_bar

POSITION = "position"  # the name of what `eval.tracking` measures, of predictions these
TRACKING = ("position_error", "tracked", "whole")
LABELS = {
    "lpips": "LPIPS",
    "ssim": "SSIM",
    "psnr": "PSNR (dB)",
    "position_error": "position error (pixels)",
    "tracked": "share of objects tracked",
    "whole": "share of objects whole",
    "found": "share of objects found",
    "visible_per_object": "visible particles per object",
}
# What a prediction has to beat, by the ends of their values' names: what is predicted, in words.
BASELINES = {"_still": "last frame stays", "_straight": "particles straight on"}
VELOCITY_STEPS = 3  # the last steps that are seen, over which a particle's velocity is the mean
TRAIN_WINDOWS = 200  # of the training set's windows, which overlap, as many are measured
TABLE_ROWS = 11


@torch.no_grad()
def measure_reconstructions(model, dataset, images, batch_size=32, num_workers=0, accelerator=None, position=False):
    """Measure DLPv2's reconstructions of a data set of images or clips.

    images: the `ImageMetrics`, on the model's device; position: whether to measure how well objects are found, too.
    Returns name to mean over the images, the same on every process: the image metrics', and with `position`
    `position_error` (pixels), `found` and `visible_per_object` (see `eval.tracking.detection_quality`).
    """
    model = (model.module if hasattr(model, "module") else model).eval()
    is_main = accelerator is None or accelerator.is_main_process
    loader = shard_loader(dataset, batch_size, num_workers, accelerator)
    names = [*images.modules, *(("position_error", "found", "visible_per_object") if position else ())]
    means = {name: OverTime.empty(1, images.device) for name in names}
    for batch in progress_bar(loader, desc="image metrics", leave=False, disable=not is_main):
        x = scaled(batch[0].to(images.device))
        targets = x.reshape(-1, *x.shape[-3:])
        output = model(x, deterministic=True, alpha_masks=False)
        values = images(output["rec"], targets)
        if position:
            values |= dict(zip(names[len(values) :], _detection(batch, output, targets.shape[-1]), strict=True))
        for name, value in values.items():
            means[name].add(value[None])
    return {name: sums.reduced(accelerator).mean_and_std()[0] for name, sums in means.items()}


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
    """`measure_reconstructions` of the data set of `config` (a `Config`, or a dict of its keys).

    val_mode: "train", "val" or "test"; verbose: print the result, which is also written to
    `eval_dir`/last_val_image_metrics.json.
    """
    config = Config.from_dict(config)
    dataset, images = image_dataset(config, val_mode, as_uint8=True), ImageMetrics(metrics, device)
    means = measure_reconstructions(model, dataset, images, batch_size, config.num_workers, accelerator)
    return report(means, eval_dir, accelerator, verbose)


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
    """`measure_predictions` of the data set of `config` (a `Config`, or a dict of its keys).

    val_mode: "train", "val" or "test"; metrics: also "position", where the objects' true positions are known; verbose:
    print the result. Returns name to mean over all frames and name_std to their standard deviation, the same on every
    process, and writes them to `eval_dir`/last_val_image_metrics.json.
    """
    config = Config.from_dict(config)
    over_time = measure_predictions(
        model,
        prediction_videos(config, val_mode, timestep_horizon),
        ImageMetrics([name for name in metrics if name != POSITION], device),
        timestep_horizon,
        cond_steps,
        POSITION in metrics,
        batch_size,
        config.num_workers,
        accelerator,
    )
    return report(summarise(over_time), eval_dir, accelerator, verbose)


def report(values, eval_dir, accelerator=None, verbose=False):
    """Write `values` to `eval_dir`/last_val_image_metrics.json, on the main process, and hand them back."""
    if accelerator is None or accelerator.is_main_process:
        write_json(Path(eval_dir) / "last_val_image_metrics.json", values)
        if verbose:
            print(", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return values


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
    videos,
    images,
    horizon,
    cond_steps=10,
    position=False,
    batch_size=32,
    num_workers=0,
    accelerator=None,
    deterministic=True,
    baselines=False,
):
    """Measure DDLP's predictions of the frames `cond_steps`..`horizon` - 1 of videos.

    videos: a data set of videos; images: the `ImageMetrics`, on the model's device; position: whether to measure how
    well objects are tracked, too; deterministic: PINT's means instead of samples. Returns name to `OverTime`: the image
    metrics', and with `position` `position_error` (pixels), `tracked` and `whole` (see `eval.tracking`); with
    `baselines` each of them also for the `BASELINES`, under its name with their ends.
    """
    check_horizon(horizon, cond_steps)
    model = (model.module if hasattr(model, "module") else model).eval()
    names = [*images.modules, *(TRACKING if position else ())]
    ends = ("", *BASELINES) if baselines else ("",)
    over_time = {name + end: OverTime.empty(horizon - cond_steps, images.device) for end in ends for name in names}
    loader = shard_loader(videos, batch_size, num_workers, accelerator, horizon)
    is_main = accelerator is None or accelerator.is_main_process
    for batch in progress_bar(loader, desc="predictions", leave=False, disable=not is_main):
        x = scaled(batch[0].to(images.device))
        prediction, particles = model.sample(
            x, horizon - cond_steps, deterministic, cond_steps=cond_steps, return_z=True
        )
        predicted = {"": (prediction, particles)}
        if baselines:
            predicted |= baseline_predictions(model, x, particles, cond_steps)
        later = slice(cond_steps, None)
        for end, (video, particles) in predicted.items():
            for name, value in images(video[:, later].flatten(0, 1), x[:, later].flatten(0, 1)).items():
                over_time[name + end].add(value.unflatten(0, (len(x), -1)).T)
            for errors in _tracking(batch, particles, cond_steps) if position else ():
                for name, value in zip(TRACKING, errors, strict=True):
                    over_time[name + end].add(value)
    return {name: sums.reduced(accelerator) for name, sums in over_time.items()}


def baseline_predictions(model, x, particles, cond_steps):
    """The `BASELINES`' videos [B, F, 3, H, W] and particles, by their ends.

    x: the videos; particles: what `model.sample` returned for all F frames. The last frame that is seen stays, or the
    particles go straight on as in the last `VELOCITY_STEPS` steps that are seen, and look as they did last.
    """
    count = x.shape[1] - cond_steps
    seen = {name: value[:, :cond_steps] for name, value in particles.items()}
    still = {
        name: torch.cat([value, value[:, -1:].expand(-1, count, *value.shape[2:])], 1) for name, value in seen.items()
    }
    z = seen["z_pos"]
    steps = min(VELOCITY_STEPS, cond_steps - 1)
    velocity = (z[:, -1:] - z[:, -1 - steps : cond_steps - steps]) / max(steps, 1)
    times = torch.arange(1, count + 1, device=z.device).view(1, -1, 1, 1)
    straight = {**still, "z_pos": torch.cat([z, z[:, -1:] + velocity * times], 1)}
    names = ("z_pos", "z_scale", "z_depth", "z_obj_on", "z_features", "z_bg_features")
    drawn = model.render(Particles(*(straight[name] for name in names)))
    frames = torch.cat([x[:, :cond_steps], x[:, cond_steps - 1 : cond_steps].expand(-1, count, -1, -1, -1)], 1)
    return {"_still": (frames, still), "_straight": (drawn, straight)}


def prediction_videos(config, mode, horizon):
    """The videos of a configuration's data set on which predictions are measured; of the training set `TRAIN_WINDOWS`
    windows from all over it."""
    videos = video_dataset(config, mode, horizon, as_uint8=True)
    if mode != "train" or len(videos) <= TRAIN_WINDOWS:
        return videos
    return Subset(videos, spread(len(videos), TRAIN_WINDOWS))


def _tracking(batch, particles, cond_steps):
    """The values of `TRACKING` of each video. batch: what a video data set's items collate to."""
    positions, sizes, in_view = true_objects(batch)
    image_size = batch[0].shape[-1]
    points = pixel_positions(particles["z_pos"], image_size).cpu()
    visible = (particles["z_obj_on"] > VISIBLE).cpu()
    for video in zip(points, visible, positions, in_view, sizes, strict=True):
        yield *tracking_quality(*video, cond_steps), wholeness(*video, cond_steps, image_size)


def _detection(batch, output, image_size):
    """`detection_quality` of the images. batch: what an image data set's items collate to; output: the model's."""
    positions, sizes, in_view = (x.flatten(0, -n) for x, n in zip(true_objects(batch), (3, 2, 2), strict=True))
    points = pixel_positions(output["z"], image_size).flatten(0, -3)
    visible = (output["obj_on"] > VISIBLE).flatten(0, -2)
    return detection_quality(points, visible, positions, in_view, sizes)


def true_objects(batch):
    """The objects' positions and sizes, pixels, and whether they are in view; `UserError` where they are not known."""
    if len(batch) < 5 or batch[1].numel() == 0:
        raise UserError("this data set does not know where its objects are; legal: shapes, balls, obj3d_like")
    return batch[1], batch[2], batch[4] > 0


def summarise(over_time):
    """name to mean over all values, name_std to their standard deviation."""
    summary = {}
    for name, values in over_time.items():
        summary[name], summary[f"{name}_std"] = values.mean_and_std()
    return summary


def curves_by_method(over_time):
    """What `horizon_graph` draws of measurements with `baselines`: label to method to the means at each frame."""
    methods = {"": "DDLP", **BASELINES}
    return {
        LABELS[name]: {method: over_time[name + end].means() for end, method in methods.items()}
        for name in over_time
        if name in LABELS
    }


def table(over_time, cond_steps):
    """DDLP's means at some of the frames, the first and the last among them, as lines of text."""
    names = [name for name in over_time if name in LABELS]
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
    run = open_run(args)
    (measure_dlp if run.kind == "dlp" else measure_ddlp)(args, run)


def image_metrics(args):
    """The `ImageMetrics` asked for; opened after the data, as their weights may have to be downloaded."""
    return ImageMetrics([name for name in args.metrics if name != POSITION], device_of(args))


def measure_dlp(args, run):
    """Measure the reconstructions of a run of DLPv2, print and write the result."""
    config, mode = open_data(args, run)
    dataset = image_dataset(config, mode, as_uint8=True)
    position = POSITION in args.metrics
    if position and hasattr(dataset, "annotated"):
        dataset = dataset.annotated()
    images = image_metrics(args)
    model = run.load_model(args.checkpoint, args.use_last, images.device)
    means = measure_reconstructions(model, dataset, images, args.batch_size, config.num_workers, position=position)
    folder = make_folder(run.path / "eval")
    report(means, folder)
    print(f"{len(dataset)} images of {config.ds}, {mode}")
    for name, value in means.items():
        print(f"{LABELS[name]}: {value:.4f}")
    print(f"written to {folder}")


def measure_ddlp(args, run):
    """Measure the predictions of a run of DDLP beside the baselines', print, draw and write the result."""
    request = open_prediction(args, horizon=50)
    videos = prediction_videos(request.config, request.mode, request.horizon)
    over_time = measure_predictions(
        request.model,
        videos,
        image_metrics(args),
        request.horizon,
        request.cond_steps,
        POSITION in args.metrics,
        args.batch_size,
        request.config.num_workers,
        deterministic=request.deterministic,
        baselines=True,
    )
    folder = make_folder(run.path / "eval")
    summary = report(summarise(over_time), folder)
    curves = {name: values.means() for name, values in over_time.items()}
    frames = list(range(request.cond_steps, request.horizon))
    write_json(folder / "metrics_over_time.json", {"frame": frames, **curves})
    save_image(horizon_graph(curves_by_method(over_time), first=request.cond_steps), folder / "metrics_over_time.png")
    print("\n".join(table(over_time, request.cond_steps)))
    for name in (name for name in over_time if name in LABELS):
        print(f"{LABELS[name]}: {summary[name]:.4f} (std {summary[f'{name}_std']:.4f})")
        for end, method in BASELINES.items():
            print(f"  {method}: {summary[name + end]:.4f} (std {summary[f'{name}{end}_std']:.4f})")
    print(f"written to {folder}")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_prediction_arguments(parser, horizon="50")
    parser.add_argument(
        "-b", "--batch_size", type=int, default=10, metavar="N", help="videos or images at a time (%(default)s)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=(*METRICS, POSITION),
        default=METRICS,
        help=f"what to measure (default: {' '.join(METRICS)}); position: where objects are known"
        " (balls, obj3d_like, shapes)",
    )
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        parser.error(f"-b/--batch_size is {args.batch_size}; legal: at least 1")
    return args


if __name__ == "__main__":
    run_command(main)
