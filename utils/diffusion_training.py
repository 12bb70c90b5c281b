"""What is special about training DiffuseDDLP: it counts steps, on particles that were encoded before, with a moving
average of the weights, from which samples are drawn now and then."""

import hashlib
import json
import math
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from ema_pytorch import EMA
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.get_dataset import get_video_dataset
from datasets.particle_cache import cached_tokens, data_fingerprint
from models import DiffuseDDLP
from utils import checkpoints
from utils.animation import Panel, generated_panel, save_animation, side_by_side
from utils.config import read_json
from utils.errors import UserError
from utils.plotting import loss_graph
from utils.run import write_json
from utils.training import (
    EpochBatches,
    RunningMeans,
    Task,
    TrainingLoop,
    keeping_random_state,
    random_state,
    set_random_state,
)

SAMPLES = 5  # videos that are generated at a milestone
GRID_COLUMNS = 8  # frames of each that the figure shows
ENCODED_AT_ONCE = 32  # clips; not the batch size, so that the particles do not depend on it
GRAPH = {"loss": ("loss",), "gradient norm": ("grad_norm",)}
# What may change when a run goes on: nothing that decides the numbers, but for where it ends.
RESUMABLE = (
    "train_num_steps",
    "ds_root",
    "device",
    "num_workers",
    "cache",
    "save_and_sample_every",
    "sampler",
    "sampling_steps",
)


class DiffusionTask(Task):
    """DiffuseDDLP around a trained DDLP: a clip of `diffuse_frames` frames, or its particles, per item.

    config, ddlp_config, ddlp: as for `DiffuseDDLP`.
    """

    kind = "diffuse_ddlp"
    bar = ("loss", "grad_norm")

    def __init__(self, config, ddlp_config, ddlp, accelerator):
        self.config, self.ddlp_config, self.ddlp, self.accelerator = config, ddlp_config, ddlp, accelerator

    def build_model(self):
        return DiffuseDDLP.from_config(self.config, self.ddlp_config, self.ddlp)

    def train_set(self):
        config = self.config
        arguments = (config.ds, config.ds_root, config.diffuse_frames, "train", self.ddlp_config.image_size)
        try:
            return get_video_dataset(*arguments, cache=config.cache)
        except UserError as error:
            raise UserError(f"the training clips of ds {config.ds}, diffuse_frames {arguments[2]}: {error}") from error

    def losses(self, model, batch, progress):
        tokens = batch[0]
        if self.config.encode_on_the_fly:
            tokens, _ = self.accelerator.unwrap_model(model).encode(tokens)
        return {"loss": model(tokens)}

    def identity(self, clips):
        """What the particles of the training set, a data set of clips, belong to."""
        return {
            "ddlp_sha256": weights_sha256(self.ddlp),
            "ds": self.config.ds,
            "image_size": self.ddlp_config.image_size,
            "diffuse_frames": self.config.diffuse_frames,
            "clips": len(clips),
        }

    def encoded(self, model, clips):
        """Yield the tokens of all clips, in order, on the CPU."""
        loader = DataLoader(
            clips, batch_size=ENCODED_AT_ONCE, num_workers=self.config.num_workers, generator=torch.Generator()
        )
        for batch in loader:
            yield model.encode(batch[0].to(self.accelerator.device))[0].cpu()

    def cached(self, model, clips):
        """The `CachedTokens` of all clips."""
        shape = (len(clips), self.config.diffuse_frames, model.num_tokens, model.layout.width)
        key = {
            **self.identity(clips),
            "architecture": repr(self.ddlp.architecture),
            "data": data_fingerprint(clips),
        }
        root = self.config.ds_root or getattr(clips, "default_root", None)
        return cached_tokens(root, self.config.ds, key, shape, partial(self.encoded, model, clips))

    def draw_samples(self, model, step, run):
        """Generate a few videos, always from the same noise, and write them to the run's figures."""
        frames, horizon = self.config.diffuse_frames, self.ddlp_config.animation_horizon
        bar = partial(tqdm, desc="sampling", leave=False, dynamic_ncols=True)
        videos = model.sample(SAMPLES, max(horizon, frames), seed=self.config.seed, progress=bar)
        run.save_figure(f"sample_{step}", sample_grid(videos, frames))
        animation = side_by_side([generated_panel(video, frames) for video in videos])
        save_animation(animation, run.figures / f"sample_{step}_traj_anim.gif", self.ddlp_config.animation_fps)


def sample_grid(videos, diffuse_frames):
    """Videos [n, T, 3, H, W] in 0..1, a row each, at up to `GRID_COLUMNS` times from the first to the last: [3, h, w].

    The frames that the diffusion drew are marked as in `generated_panel`.
    """
    horizon = videos.shape[1]
    panels = []
    for t in np.linspace(1, horizon, min(GRID_COLUMNS, horizon)).round().astype(int).tolist():
        one = generated_panel(videos[:1, t - 1], diffuse_frames, first=t)
        panels.append(Panel(videos[:, t - 1], one.labels * len(videos), one.colors * len(videos)))
    return torch.from_numpy(np.concatenate(side_by_side(panels))).permute(2, 0, 1) / 255


def weights_sha256(module):
    """The SHA-256 of a module's weights: of their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


class StepBatches(EpochBatches):
    """The batches of epoch after epoch, to the step `num_steps`."""

    def __init__(self, num_steps, *arguments):
        super().__init__(*arguments)
        self.num_steps = num_steps

    def __iter__(self):
        for _ in range(math.ceil(self.num_steps / self.num_batches) - self.epoch):
            left = self.num_steps - self.epoch * self.num_batches - self.first_batch
            yield from (batch for _, batch in zip(range(left), super().__iter__(), strict=False))
            self.epoch, self.first_batch = self.epoch + 1, 0

    def __len__(self):
        return max(self.num_steps - self.epoch * self.num_batches - self.first_batch, 0)


class DiffusionTrainer(TrainingLoop):
    """Trains a `DiffusionTask`'s model for `train_num_steps` steps.

    Before `fit` a new run needs `encode(fit=True)` and `save_statistics`, one that goes on `resume` and `encode`.
    """

    max_grad_norm = 1.0

    def __init__(self, task, config, accelerator, resume_command):
        super().__init__(task, config, accelerator, resume_command)
        self.clips = self.loader.dataset
        self.ema = None
        if accelerator.is_main_process:
            self.ema = EMA(
                self.bare_model.diffusion,
                beta=config.ema_decay,
                update_every=config.ema_update_every,
                include_online_model=True,
            )
        self._clock = None  # time and step from which the speed is measured

    def _make_optimizer(self, model):
        return torch.optim.Adam(model.diffusion.parameters(), self.config.lr, betas=(0.9, 0.99))

    def _make_batches(self, *arguments):
        return StepBatches(self.config.train_num_steps, *arguments)

    def _bar_options(self):
        return {"desc": "training", "initial": self.progress.iteration, "total": self.config.train_num_steps}

    def _end(self):
        done = self.progress.iteration >= self.config.train_num_steps
        return f"all {self.config.train_num_steps} steps are done; more: --train_num_steps" if done else None

    # --------------------------------------------------------------------------------------- particles of the training

    def encode(self, fit=False):
        """Encode the training set, unless it is kept already or encoded on the fly; `fit`: take its statistics."""
        model, blocks = self.bare_model, None
        with keeping_random_state():
            if not self.config.encode_on_the_fly:
                tokens = self.task.cached(model, self.clips)
                # The tokens are in memory: other processes would only cost time.
                self.loader = self._make_loader(tokens, num_workers=0)
                blocks = tokens.blocks(ENCODED_AT_ONCE)
            if fit:
                blocks = self.task.encoded(model, self.clips) if blocks is None else blocks
                model.normalization.fit(self._counted(blocks))

    def _counted(self, blocks):
        """The blocks of all clips, under a progress bar."""
        with tqdm(
            desc="statistics of the particles",
            total=len(self.clips),
            unit="clip",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        ) as bar:
            for block in blocks:
                yield block
                bar.update(len(block))

    def save_statistics(self, run):
        """Write the particles' statistics, and beside them what they belong to."""
        run.save_stats(self.bare_model.normalization)
        if run.is_main:
            write_json(self.task.identity(self.clips), identity_path(run))

    def _load_statistics(self, run):
        """Load a run's statistics; `UserError` if they are of other particles, as far as it says of which."""
        path = identity_path(run)
        if path.is_file():
            found = read_json(path)
            for name, expected in self.task.identity(self.clips).items():
                if found.get(name) != expected:
                    raise UserError(
                        f"{path}: the statistics are of other particles: {name} is {json.dumps(found.get(name))}, here"
                        f" {json.dumps(expected)}; legal: those of the run's own DDLP and training set"
                    )
        run.load_stats(self.bare_model.normalization)

    # -------------------------------------------------------------------------------------------------------- steps

    def _after_step(self, stop):
        if self.ema is not None:
            self.ema.update()
        step = self.progress.iteration
        self._find_position()
        self._clock = self._clock or (time.perf_counter(), step)
        if step % self.config.save_and_sample_every == 0 or step == self.config.train_num_steps:
            self._finish_interval()
        elif stop:
            self.save_state()

    def _find_position(self):
        self.progress.epoch, self.progress.batch = divmod(self.progress.iteration, self.progress.epoch_length)

    def _finish_interval(self):
        """Record the losses since the last time, save, and draw samples."""
        self._read_losses()
        start, first = self._clock
        step, seconds = self.progress.iteration, time.perf_counter() - start
        record = {"step": step, "epoch": self.progress.epoch, **self.means.means()}
        if step > first:
            record["steps_per_second"] = (step - first) / seconds
        self.run.record(record)
        self.means = RunningMeans()
        self.save_state()
        self._say(" ".join(f"{name} {value:.4g}" for name, value in record.items()))
        if self.accelerator.is_main_process:
            graph = loss_graph(self.run.records(), GRAPH, "step")
            self.run.save_figure(f"{self.config.ds}_{self.task.kind}_graph", graph)
            with averaged(self.bare_model, self.ema) as model:
                self.task.draw_samples(model, step, self.run)
        self._clock = None

    def _finish_stretch(self):
        """All is done at the last step."""

    # -------------------------------------------------------------------------------------------------- saved state

    def save_state(self):
        self._read_losses()
        self._check_weights(self.bare_model.diffusion)
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            state = {
                "step": self.progress.iteration,
                "model": self.bare_model.diffusion.state_dict(),
                "opt": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "scaler": None,
            }
            self.run.save_state(state, {"means": self.means.state_dict(), "random_states": random_states})

    def resume(self, run):
        """Go on from a run's saved state. A published one has no random state: it begins with the seed's.

        Raises `UserError` where that cannot be done.
        """
        self.run = run
        self._load_statistics(run)
        state, training_state = run.load_state(), run.load_training_state()
        checkpoints.insert_weights(self.bare_model.diffusion, state["model"], f"{run.state_path} (model)")
        self._load_optimizer(state["opt"])
        if self.ema is not None:
            checkpoints.insert_weights(self.ema, state["ema"], f"{run.state_path} (ema)")
        self.progress.iteration = state["step"]
        self._find_position()
        if training_state is None:
            set_seed(self.config.seed, device_specific=True)
        else:
            self._check_processes(run, training_state["random_states"])
            self.means.load_state_dict(training_state["means"])
            set_random_state(training_state["random_states"][self.accelerator.process_index])
        self._say(f"resumed at {self._position()}")

    def _load_optimizer(self, state):
        parameters = list(self.bare_model.diffusion.parameters())
        shapes = [value["exp_avg"].shape for _, value in sorted(state["state"].items())]
        if shapes and shapes != [parameter.shape for parameter in parameters]:
            raise UserError(f"{self.run.state_path} (opt): does not fit the {len(parameters)} weights of the model")
        self.optimizer.load_state_dict(state)


def identity_path(run):
    """The file that says what a run's statistics belong to."""
    return Path(run.stats_path).with_suffix(".json")


@contextmanager
def averaged(model, ema):
    """The `DiffuseDDLP` with the moving average's weights, for a while."""
    online = model.diffusion
    model.diffusion = ema.ema_model
    try:
        yield model
    finally:
        model.diffusion = online
