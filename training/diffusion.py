"""The task of training DiffuseDDLP: it counts steps, on particles that were encoded before, with a moving average of
the weights, from which samples are drawn now and then."""

import math
from contextlib import contextmanager
from functools import cached_property, partial

import numpy as np
import torch
from accelerate.utils import gather_object

from datasets.episodes import scaled
from datasets.get_dataset import get_video_dataset
from datasets.particle_cache import AT_ONCE, cached_tokens, clip_batches, data_fingerprint
from models import DiffuseDDLP
from rundir.diffusion_run import load_average
from training.loop import Interval, Task
from utils import checkpoints
from utils.animation import Panel, generated_panel, save_animation, side_by_side
from utils.device import make_adam
from utils.errors import UserError
from utils.progress import progress_bar

SAMPLES = 5  # videos that are generated at a milestone
GRID_COLUMNS = 8  # frames of each that the figure shows


class DiffusionTask(Task):
    """DiffuseDDLP around a trained DDLP: a clip of `diffuse_frames` frames, or its particles, per item.

    config, ddlp_config, ddlp: as for `DiffuseDDLP`; run: the `DiffusionRun` that goes on, which has the particles'
    statistics, or None: they are taken from the training set. `build_model` makes `diffuse_ddlp`, of which the
    diffusion alone is trained.
    """

    bar = ("loss", "grad_norm")
    graph = ({"loss": ("loss",), "gradient norm": ("grad_norm",)}, "step")

    def __init__(self, config, ddlp_config, ddlp, accelerator, run=None):
        self.config, self.accelerator, self.run = config, accelerator, run
        self.ddlp_config, self.ddlp = ddlp_config, ddlp
        self.ema = (config.ema_decay, config.ema_update_every)
        self.save_every = config.save_every
        self.images_per_item = config.diffuse_frames

    def build_model(self):
        self.diffuse_ddlp = DiffuseDDLP.from_config(self.config, self.ddlp_config, self.ddlp)
        if self.config.load_model and self.run is None:
            load_average(self.diffuse_ddlp.diffusion, self.config.pretrained_path)
        return self.diffuse_ddlp.to(self.accelerator.device).diffusion

    def make_optimizer(self, model):
        return make_adam(model.parameters(), self.config.lr, (0.9, 0.99)), self.config.scheduler_gamma

    def open_data(self):
        on_the_fly = self.config.encode_on_the_fly
        self.items = self.clips if on_the_fly else self._cached_tokens()  # clips, or their tokens
        if self.run is None:
            self._take_statistics()
        else:
            self.run.load_stats(self.diffuse_ddlp.normalization, self.identity)
        return self.items

    def train_set(self, progress):
        # Tokens are in memory: other processes would only cost time.
        return self.items, self.config.num_workers if self.config.encode_on_the_fly else 0

    def losses(self, model, batch, progress):
        tokens = batch[0]
        if self.config.encode_on_the_fly:
            tokens, _ = self.diffuse_ddlp.encode(scaled(tokens))
        return {"loss": model(self.diffuse_ddlp.normalization.normalize(tokens), self.diffuse_ddlp.mask)}

    def kind_of_step(self, progress):
        return ()

    def interval(self, progress):
        every = self.config.save_and_sample_every
        start = progress.iteration // every * every
        end = min(start + every, self.config.train_num_steps)
        return Interval(f"to step {end}", start, end)

    def iterations(self, progress):
        return self.config.train_num_steps

    def end(self, progress):
        done = progress.iteration >= self.config.train_num_steps
        return f"all {self.config.train_num_steps} steps are done; more: --train_num_steps" if done else None

    def evaluate(self, model, progress, run):
        """Generate a few videos, always from the same noise, and write them to the run's figures."""
        if self.accelerator.is_main_process:
            config, step = self.config, progress.iteration
            seconds, horizon = self.diffuse_ddlp.ddlp_config.animation_fps, run.ddlp_config.animation_horizon
            horizon, bar = max(horizon, config.diffuse_frames), partial(progress_bar, desc="sampling", leave=False)
            with diffusion_replaced(self.diffuse_ddlp, model) as generator:
                videos = generator.sample(SAMPLES, horizon, seed=config.seed, progress=bar)
            run.save_figure(f"sample_{step}", sample_grid(videos, config.diffuse_frames))
            animation = side_by_side([generated_panel(video, config.diffuse_frames) for video in videos])
            path = run.figures / f"sample_{step}_traj_anim.gif"
            save_animation(animation, path, seconds)
            run.track(path)
        return {}

    # ----------------------------------------------------------------------------- the particles of the training set

    @cached_property
    def clips(self):
        """The training set's clips, uint8 where the data set can do so."""
        config = self.config
        size = self.diffuse_ddlp.ddlp_config.image_size
        try:
            options = {"cache": config.cache, "as_uint8": True}
            return get_video_dataset(config.ds, config.ds_root, config.diffuse_frames, "train", size, **options)
        except UserError as error:
            where = f"the training clips of ds {config.ds}, diffuse_frames {config.diffuse_frames}"
            raise UserError(f"{where}: {error}") from error

    @cached_property
    def identity(self):
        """What the particles of the training set belong to: a dict."""
        return {
            "ddlp_sha256": checkpoints.weights_sha256(self.diffuse_ddlp.ddlp.state_dict()),
            "ds": self.config.ds,
            "image_size": self.diffuse_ddlp.ddlp_config.image_size,
            "diffuse_frames": self.config.diffuse_frames,
            "clips": len(self.clips),
        }

    def _take_statistics(self):
        """Fit the normalisation to the tokens of all clips; clips that are encoded for it are shared out."""
        normalization, accelerator = self.diffuse_ddlp.normalization, self.accelerator
        index = accelerator.process_index
        if not self.config.encode_on_the_fly:
            normalization.fit(self.items.blocks())
            return
        # Of whole batches, so that the clips in them do not depend on the number of processes.
        batches, clips = math.ceil(len(self.clips) / AT_ONCE), range(len(self.clips))
        first, end = (AT_ONCE * (i * batches // accelerator.num_processes) for i in (index, index + 1))
        share = clips[first:end]
        normalization.fit(
            self._with_progress_bar(self._encode(share), len(share)), lambda share: gather_object([share])
        )

    def _encode(self, which):
        """Yield the tokens of the clips `which`, in order, on the CPU."""
        for batch in clip_batches(self.clips, which, self.config.num_workers):
            yield self.diffuse_ddlp.encode(scaled(batch[0].to(self.accelerator.device)))[0].cpu()

    def _cached_tokens(self):
        """The `CachedTokens` of all clips."""
        model = self.diffuse_ddlp
        shape = (len(self.clips), self.config.diffuse_frames, model.num_tokens, model.layout.width)
        key = {
            **self.identity,
            "architecture": repr(model.ddlp.architecture),
            "data": data_fingerprint(self.clips),
        }
        root = self.config.ds_root or getattr(self.clips, "default_root", None)
        processes = self.accelerator.process_index, self.accelerator.num_processes
        return cached_tokens(root, self.config.ds, key, shape, self._encode, "encode_on_the_fly true", *processes)

    def _with_progress_bar(self, blocks, num_clips):
        """The blocks of so many clips' tokens, under a progress bar."""
        with progress_bar(
            desc="statistics of the particles",
            total=num_clips,
            unit="clip",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        ) as bar:
            for block in blocks:
                yield block
                bar.update(len(block))


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


@contextmanager
def diffusion_replaced(model, diffusion):
    """The `DiffuseDDLP` with another diffusion, such as the moving average, for a while."""
    trained = model.diffusion
    model.diffusion = diffusion
    try:
        yield model
    finally:
        model.diffusion = trained
