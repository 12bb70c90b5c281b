"""Small models of each kind that the editor opens, with random weights, and examples for them."""

import imageio.v3 as iio
import torch

from configs.schema import Config, DiffuseConfig
from models import DiffuseDDLP, ObjectDLP, ObjectDynamicsDLP
from modules.particles import Particles
from rundir.diffusion_run import DiffusionRun
from rundir.run import Run
from tests.balls import SMALL
from tests.small_dlp import images
from utils import checkpoints

K, SEEN, HORIZON = SMALL["n_kp_enc"], 5, 12
CONFIG = {**SMALL, "timestep_horizon": SEEN, "cond_steps": SEEN, "animation_horizon": HORIZON, "root": "nowhere"}
DIFFUSION = {"ds": "balls", "device": "cpu", "diffusion_num_steps": 4, "diffuse_frames": 4, "ddlp_dir": "nowhere"}


def write_checkpoints(folder):
    """`folder` with dlp-shapes, ddlp-balls and diffuse-ddlp-balls, of images of 32 pixels."""
    dlp = Config.from_dict({**CONFIG, "ds": "shapes", "use_correlation_heatmaps": False})
    write_run(Run(folder / "dlp-shapes", dlp, "dlp"), ObjectDLP)
    ddlp = Config.from_dict(CONFIG)
    model = write_run(Run(folder / "ddlp-balls", ddlp, "ddlp"), ObjectDynamicsDLP)
    write_diffusion(DiffusionRun(folder / "diffuse-ddlp-balls", DiffuseConfig.from_dict(DIFFUSION), ddlp), model)
    return folder


def write_run(run, kind):
    model = visible_model(kind, run.config)
    run.path.mkdir(parents=True)
    run.save_config(run.config)
    checkpoints.save(model.state_dict(), run.path / f"{run.name}.pth")
    return model


def visible_model(kind, config):
    """A model with random weights whose particles are visible, apart, inside the image, and differ in colour."""
    torch.manual_seed(0)
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        encoder = model.fg_module.particle_attribute_enc
        for head in (encoder.x_head, encoder.y_head):
            head.weight.mul_(0.02)
            head.bias.zero_()
        encoder.obj_on_head.bias.copy_(torch.tensor([4.0, 0.0]))
    return model.eval()


def write_diffusion(run, ddlp):
    model = DiffuseDDLP.from_config(run.config, run.ddlp_config, ddlp)
    stats = model.normalization.state_dict()
    for name, value in stats.items():
        value.fill_({"min": -0.6, "max": 0.6, "mu": 0.0}.get(name.split("_")[0], 0.5))
    run.path.mkdir(parents=True)
    run.save_config(run.config)
    (run.path / "ddlp_hparams.json").write_text((run.path.parent / "ddlp-balls" / "hparams.json").read_text())
    checkpoints.save(ddlp.state_dict(), run.path / "balls_ddlp.pth")
    checkpoints.save(stats, run.stats_path)
    weights = model.diffusion.state_dict()
    ema = {"initted": torch.ones(1), "step": torch.ones(1).long()}
    ema |= {f"ema_model.{name}": value for name, value in weights.items()}
    run.state_path.parent.mkdir()
    checkpoints.save({"step": 1, "model": weights, "opt": {}, "ema": ema, "scaler": None}, run.state_path)


def write_assets(folder, size=32):
    """`folder` with two examples of shapes and two of balls, these of HORIZON + 2 frames."""
    for name, frames in (("shapes", 1), ("balls", HORIZON + 2)):
        for number in range(2):
            write_frames(folder / name / str(number), images(frames, size=size, seed=number))
    return folder


def write_frames(folder, frames):
    """Frames [T, 3, H, W] as 1.png, 2.png, ..."""
    folder.mkdir(parents=True)
    for number, frame in enumerate((frames * 255).round().byte().permute(0, 2, 3, 1).numpy(), 1):
        iio.imwrite(folder / f"{number}.png", frame)


def scattered_particles(frames=SEEN, count=K, seed=0):
    """`Particles` [1, frames, count, ...] that are apart and inside the image."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(1, frames, *shape, generator=generator)

    return Particles(
        1.6 * draw(count, 2) - 0.8,
        draw(count, 2) - 1.5,
        draw(count, 1),
        0.5 + 0.5 * draw(count),
        draw(count, 2) - 0.5,
        draw(3),
    )
