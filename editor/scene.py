"""What the editor opens: models, and the particles of the frames that they see."""

from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import Config
from datasets.examples import clip_size, read_clip
from models import DiffuseDDLP, ParticleModel
from modules.particles import Particles
from rundir import find_run
from rundir.edits import shown_path
from rundir.prediction import frames_seen, particle_config
from utils.errors import UserError
from utils.plotting import particle_colors

KINDS = ("dlp", "ddlp", "diffuse-ddlp")  # a model's folder is named {kind}-{ds}
FEWEST_FRAMES = 4  # of a video, unless the model sees fewer
STEPS = 60  # that are predicted


def find_models(folder):
    """The folders in `folder` that are named as a model's, in order: a dict from name to path."""
    folder = Path(folder)
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path for path in paths if path.is_dir() and dataset_of(path.name)}


def dataset_of(name):
    """The data set in a folder's name, {kind}-{ds}; "" if it is named otherwise."""
    for kind in sorted(KINDS, key=len, reverse=True):
        if name.startswith(f"{kind}-"):
            return name.removeprefix(f"{kind}-")
    return ""


def find_examples(folder, ds):
    """The examples of the data set `ds`, `folder`/{ds}/{number}, in order: a dict from name to path."""
    folder = Path(folder) / ds
    numbers = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()] if folder.is_dir() else []
    return {f"{ds} {path.name}": path for path in sorted(numbers, key=lambda path: int(path.name))}


@dataclass(frozen=True)
class LoadedModel:
    """A run's model. kind: "dlp", "ddlp" or "diffuse_ddlp"; model: draws the particles; diffusion: generates them, of a
    DiffuseDDLP; frames: that it sees at most, or generates; config: the drawing model's."""

    path: Path
    kind: str
    model: ParticleModel
    diffusion: DiffuseDDLP | None
    frames: int
    config: Config
    device: torch.device

    @property
    def is_dynamic(self):
        """Whether it predicts how frames go on."""
        return self.kind != "dlp"


def open_model(path, device):
    """The `LoadedModel` in a run directory; `UserError` where there is none."""
    run = find_run(path)
    model = run.load_model(device=device)
    diffusion = model if run.kind == "diffuse_ddlp" else None
    drawing = model if diffusion is None else model.ddlp
    drawing.requires_grad_(False)
    particle_colors(1)  # takes long the first time, which is not to be in the window's thread
    return LoadedModel(Path(path), run.kind, drawing, diffusion, frames_seen(run), particle_config(run), device)


@dataclass(frozen=True)
class Scene:
    """What is edited: `Particles` [1, T, ...] of the frames that a model sees.

    frames: those seen and the ones after them, as far as they are known, [F, 3, H, W] on the CPU; None of generated
    ones, which have a seed instead of a video, a path. note: what should be said about them, or "".
    """

    loaded: LoadedModel
    particles: Particles
    frames: torch.Tensor | None
    video: str | None
    seed: int | None
    note: str = ""

    @property
    def num_frames(self):
        return self.particles.z.shape[1]

    @property
    def count(self):
        return self.particles.z.shape[2]

    @property
    def horizon(self):
        """Frames in all, when it is played."""
        return self.num_frames + STEPS if self.loaded.is_dynamic else 1


@torch.no_grad()
def open_clip(loaded, path, num_frames=None):
    """The `Scene` of a video, folder of frames or image. num_frames: how many frames the model sees (None: as many as
    it can). `UserError` for what cannot be read, and where there are too few frames."""
    if loaded.kind == "diffuse_ddlp":
        raise UserError(f"{loaded.path.name} sees no videos; legal: Generate, or a model of kind dlp or ddlp")
    side, most = loaded.config.image_size, num_frames or loaded.frames
    frames = read_clip(path, side, most + STEPS if loaded.is_dynamic else 1)
    fewest = num_frames or min(FEWEST_FRAMES, loaded.frames)
    if len(frames) < fewest:
        raise UserError(f"{path}: has {len(frames)} frames; legal for {loaded.path.name}: at least {fewest}")
    height, width = clip_size(path)
    note = "" if height == width == side else f"{width} x {height} pixels, shown to the model as {side} x {side}"
    particles = loaded.model.track(frames[None, :most].to(loaded.device))
    return Scene(loaded, particles, frames, shown_path(path), None, note)


@torch.no_grad()
def generate(loaded, seed, report=lambda done: None):
    """The `Scene` of frames that a DiffuseDDLP generates. report: called with the share of the steps that are done."""

    def progress(steps):
        steps = list(steps)
        for i, step in enumerate(steps):
            report(i / len(steps))
            yield step

    particles = loaded.diffusion.sample_particles(1, loaded.frames, seed=seed, progress=progress)
    return Scene(loaded, particles, None, None, seed)
