"""Generating videos: run directories of DiffuseDDLP, ours and published ones, and the command."""

import json
import re
import shutil
import warnings
from functools import partial

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from ema_pytorch import EMA
from PIL import Image

import generate_diffuse_ddlp_video_generation as generation
from checkpoints import pack
from configs.schema import Config, DiffuseConfig
from models import DiffuseDDLP, ObjectDynamicsDLP
from modules.diffusion_modules import GaussianDiffusionPINT, ParticleNormalization, PINTDenoiser, sampling_steps
from modules.particles import Particles
from rundir import find_run, load_model
from rundir.diffusion_run import DiffusionRun, find_ddlp_config, find_ddlp_weights
from rundir.run import Run
from tests import golden
from tests.balls import SMALL, run_in
from tests.runs import run_script
from utils import checkpoints
from utils.animation import generated_panel, side_by_side
from utils.device import make_accelerator
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:t = .* left out")
K, D, FRAMES, STEPS, HORIZON = SMALL["n_kp_enc"], SMALL["learned_feature_dim"], 3, 20, 12
BUFFERS = """
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 p2_loss_weight
"""
DIFFUSION = {
    "ds": "obj3d128",
    "ds_root": "/mnt/data/author/obj3d/",
    "device": "cuda",
    "batch_size": 32,
    "lr": 8e-05,
    "train_num_steps": 700000,
    "diffusion_num_steps": STEPS,
    "loss_type": "l1",
    "particle_norm": "minmax",
    "diffuse_frames": FRAMES,
    "ddlp_dir": "./checkpoints/ddlp-obj3d128",
    "ddlp_ckpt": "./checkpoints/ddlp-obj3d128/obj3d128_ddlp.pth",
    "result_dir": None,
}


def released_ddlp_config(**changes):
    """Of the published keys alone, which say nothing of the depth's logvar, with sizes for a test."""
    published = golden.published("ddlp-obj3d128")["config"]
    small = {name: value for name, value in SMALL.items() if name in published}
    values = {**published, **small, "ds": "obj3d128", "root": "/mnt/data/author/obj3d/", "animation_horizon": HORIZON}
    return {**values, "recon_loss_type": "mse", "eval_im_metrics": False, **changes}


def scattered(build, seed):
    """The state dict of the module that `build` makes, with random weights, of sizes that make its output depend on its
    input."""
    torch.manual_seed(seed)
    module = build()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return {name: value.clone() for name, value in module.state_dict().items()}


def new_diffusion(clip_denoised=True):
    denoiser = PINTDenoiser(6 + D, 8, 8, n_head=2, n_layer=1, block_size=FRAMES, max_particles=K + 1)
    return GaussianDiffusionPINT(
        denoiser, seq_length=FRAMES, timesteps=STEPS, objective="pred_x0", clip_denoised=clip_denoised
    )


def diffusion_weights(seed):
    """Random weights of `new_diffusion`, with which its samples differ clearly."""
    weights = scattered(new_diffusion, seed)
    weights["model.particle_projection.2.weight"] *= 10
    return weights


def released_state(step=7):
    """The contents of a published saves/model.pth."""
    online, average = diffusion_weights(1), diffusion_weights(2)
    ema = {"initted": torch.ones(1), "step": torch.tensor([step])}
    ema |= {f"online_model.{name}": value for name, value in online.items()}
    ema |= {f"ema_model.{name}": value for name, value in average.items()}
    return {"step": step, "model": online, "opt": {"state": {}, "param_groups": []}, "ema": ema, "scaler": None}


def released_stats():
    generator = torch.Generator().manual_seed(3)
    stats = {}
    for suffix, width in (("", 6 + D), ("_bg", D)):
        low, size = (torch.rand(width, generator=generator) for _ in range(2))
        stats |= {f"min_val{suffix}": -low - 0.5, f"max_val{suffix}": 0.5 + size}
        stats |= {f"mu{suffix}": 0.3 * low, f"std{suffix}": 0.5 + size}
    return stats


@pytest.fixture(scope="module")
def released_files():
    """The contents of a published directory's files."""
    config = Config.from_dict(released_ddlp_config()).replace(depth_logvar_from_mean=True)
    return {
        "obj3d128_ddlp.pth": scattered(partial(ObjectDynamicsDLP.from_config, config), 0),
        "latent_stats.pth": released_stats(),
        "saves/model.pth": released_state(),
    }


@pytest.fixture
def released(tmp_path, released_files):
    """A published directory; its own paths lead nowhere."""
    folder = tmp_path / "checkpoints" / "diffuse-ddlp-obj3d128"
    (folder / "saves").mkdir(parents=True)
    (folder / "diffusion_hparams.json").write_text(json.dumps(DIFFUSION))
    (folder / "ddlp_hparams.json").write_text(json.dumps(released_ddlp_config()))
    for name, contents in released_files.items():
        torch.save(contents, folder / name)
    return folder


def change(path, **values):
    """Replace keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def generate(folder, *arguments, cwd="/"):
    run_in(cwd, generation.main, "-c", folder, "--cpu", *arguments)


def expected_videos(files, n, horizon, seed=0, part="ema_model.", **options):
    """The videos of a published directory's weights, computed from its files without `DiffuseDDLP`."""
    config = Config.from_dict(released_ddlp_config()).replace(depth_logvar_from_mean=True)
    ddlp = ObjectDynamicsDLP.from_config(config).eval()
    ddlp.load_state_dict(files["obj3d128_ddlp.pth"])
    diffusion = new_diffusion().eval()
    ema = files["saves/model.pth"]["ema"]
    diffusion.load_state_dict({name.removeprefix(part): ema[name] for name in ema if name.startswith(part)})
    torch.manual_seed(seed)
    tokens = diffusion.sample(n, **options)
    stats = files["latent_stats.pth"]
    low, high = stats["min_val"], stats["max_val"]
    x = (tokens[:, :, :-1] + 1) / 2 * (high - low + 1e-5) + low
    low, high = stats["min_val_bg"], stats["max_val_bg"]
    z_bg = (tokens[:, :, -1, 2 : 2 + D] + 1) / 2 * (high - low + 1e-5) + low
    first = Particles(x[..., :2], x[..., 2:4], x[..., 4:5], x[..., 5].clamp(0, 1), x[..., 6:], z_bg)
    with torch.no_grad():
        return ddlp.render(ddlp.predict(first, horizon - FRAMES))


# -------------------------------------------------------------------------------------------- published directories


def test_the_directory_has_the_released_names(released_files):
    weights = {name for name, _ in new_diffusion().model.named_parameters()}
    manifest = golden.manifest("denoiser")["parameters"]
    assert weights == {entry["name"] for entry in manifest if ".blocks.1." not in entry["name"]}
    names = {*BUFFERS.split(), "model.particle_transformer.blocks.0.attn.mask", *(f"model.{name}" for name in weights)}
    assert released_files["saves/model.pth"]["model"].keys() == names
    published = {without_counts(name) for name in golden.published("ddlp-obj3d128")["state_dict"]}
    assert {without_counts(name) for name in released_files["obj3d128_ddlp.pth"]} < published


def without_counts(name):
    """A weight's name without the channel counts and block numbers that are in it."""
    return re.sub(r"\d+", "#", name)


def test_a_published_directory_generates_its_moving_averages_videos(released, released_files):
    model = DiffusionRun.open(released).load_model()
    assert not model.training and model.ddlp.dyn_module.depth_logvar_from_mean
    videos = model.sample(2, HORIZON, seed=4, sampler="ddim", steps=5)
    options = {"n": 2, "horizon": HORIZON, "seed": 4, "sampler": "ddim", "steps": 5}
    torch.testing.assert_close(videos, expected_videos(released_files, **options), rtol=0, atol=1e-5)
    online = expected_videos(released_files, part="online_model.", **options)
    assert (videos - online).abs().max() > 0.01


def test_a_moved_directory_generates_the_same_from_anywhere(released, released_files, tmp_path):
    arguments = ("-n", 2, "--image", "--seed", 1)
    generate(released / "diffusion_hparams.json", *arguments, cwd=tmp_path)
    images = [iio.imread(released / "figures" / f"{i}_frames.png") for i in range(2)]
    moved, elsewhere = tmp_path / "moved", tmp_path / "elsewhere"
    shutil.move(released, moved)
    shutil.rmtree(moved / "figures")
    elsewhere.mkdir()
    generate("../moved", *arguments, cwd=elsewhere)
    assert sorted(path.name for path in (moved / "figures").iterdir()) == ["0_frames.png", "1_frames.png"]
    assert all(np.array_equal(iio.imread(moved / "figures" / f"{i}_frames.png"), images[i]) for i in range(2))
    videos = expected_videos(released_files, 2, 10, seed=1, sampler="dpm++", steps=STEPS)
    row = generation.frame_row(videos[0][[0, 9]], [1, 10], FRAMES)
    assert np.abs(images[0].astype(float) - 255 * row.permute(1, 2, 0).numpy()).max() < 1.5


@pytest.mark.parametrize("beside", [False, True])
def test_a_packed_directory_generates_the_same_to_float16(beside, released, tmp_path):
    """With its DDLP packed too, or naming one beside it."""
    expected = DiffusionRun.open(released).load_model().sample(2, FRAMES, seed=4, sampler="ddim", steps=3)
    packed, start = tmp_path / "packed" / "diffuse", {"load_model": True, "pretrained_path": "start.pth"}
    set_keys(released, **start)
    options = ["--ddlp_dir", "../ddlp"] if beside else []
    pack.main([str(released), str(packed), *options])
    if beside:
        config = Config.from_dict(released_ddlp_config()).replace(depth_logvar_from_mean=True)
        ddlp = Run(released.with_name("ddlp-obj3d128"), config, "ddlp")
        ddlp.path.mkdir()
        shutil.copy(released / "obj3d128_ddlp.pth", ddlp.path)
        ddlp.save_config(config.replace(**start))
        pack.main([str(ddlp.path), str(packed.with_name("ddlp"))])
    assert (packed / "obj3d128_ddlp.pth").is_file() != beside
    for path in packed.parent.rglob("*.json"):  # weights to start from are not packed
        assert not json.loads(path.read_text())["load_model"]
        assert json.loads(path.read_text())["pretrained_path"] is None
    assert 0 < checkpoints.load(packed / "saves" / "model.pth")["step"] == 7
    videos = load_model(packed).sample(2, FRAMES, seed=4, sampler="ddim", steps=3)
    assert (videos - expected).abs().mean() < 2e-3 and not torch.equal(videos, expected)
    both = packed, released
    size, original = (sum(path.stat().st_size for path in folder.rglob("*.pth")) for folder in both)
    assert size < 0.6 * original


def test_the_weights_to_pack_can_be_named(released, tmp_path):
    config = Config.from_dict(released_ddlp_config())
    run = Run(tmp_path / "run", config, "ddlp")
    run.path.mkdir()
    run.save_config(config)
    one, other = (ObjectDynamicsDLP.from_config(config).state_dict() for _ in range(2))
    checkpoints.save(one, run.path / "obj3d128_ddlp.pth")
    checkpoints.save(other, tmp_path / "best.pth")
    for options, expected in ([], one), (["--checkpoint", str(tmp_path / "best.pth")], other):
        pack.main([str(run.path), str(tmp_path / "packed"), *options])
        found = checkpoints.load(tmp_path / "packed" / "obj3d128_ddlp.pth")
        assert all(torch.allclose(found[name].float(), value.float(), atol=1e-3) for name, value in expected.items())
    with pytest.raises(UserError, match=r"--checkpoint: .* is a DiffuseDDLP; legal: without --checkpoint"):
        pack.main([str(released), str(tmp_path / "other"), "--checkpoint", str(tmp_path / "best.pth")])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_averages_scalars_may_have_either_shape(shape, released, released_files):
    state = released_files["saves/model.pth"]
    ema = {**state["ema"], "initted": torch.ones(shape), "step": torch.full(shape, 7)}
    torch.save({**state, "ema": ema}, released / "saves" / "model.pth")
    run = DiffusionRun.open(released)
    state = run.load_state()
    assert state["ema"]["step"].shape == () and "means" not in state
    assert state["progress"] == {"iteration": 7}
    assert isinstance(load_model(released), DiffuseDDLP)


def test_another_checkpoint(released, released_files, tmp_path):
    state = released_files["saves/model.pth"]
    other = {f"ema_model.{name}": value for name, value in diffusion_weights(9).items()}
    torch.save({**state, "ema": {**state["ema"], **other}}, tmp_path / "other.pth")
    generate(released, "-n", 1, "--image", cwd=tmp_path)
    before = iio.imread(released / "figures" / "0_frames.png")
    (released / "saves" / "model.pth").unlink()
    generate(released, "-n", 1, "--image", "--checkpoint", "other.pth", cwd=tmp_path)
    assert not np.array_equal(iio.imread(released / "figures" / "0_frames.png"), before)


# ------------------------------------------------------------------------------------------------------ the command


def test_animations_are_the_models_samples(released, capsys):
    generate(released, "-n", 2, "--seed", 5)
    paths = [released / "figures" / f"{i}_traj_anim.gif" for i in range(2)]
    assert sorted((released / "figures").iterdir()) == paths
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    steps = min(generation.DEFAULT_STEPS, STEPS)
    videos = (
        DiffusionRun.open(released)
        .load_model()
        .sample(2, HORIZON, seed=5, sampler=generation.DEFAULT_SAMPLER, steps=steps)
    )
    for path, video in zip(paths, videos, strict=True):
        expected = side_by_side([generated_panel(video, FRAMES)]).astype(float)
        written = iio.imread(path).astype(float)
        assert written.shape == expected.shape and len(written) == HORIZON
        assert np.abs(written - expected).mean() < 2  # of 255: the palette's error


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0.06, 60), (0.25, 250)])
def test_frames_last_as_configured(seconds, milliseconds, released):
    change(released / "ddlp_hparams.json", animation_fps=seconds)
    generate(released, "-n", 1, "--horizon", 5)
    with Image.open(released / "figures" / "0_traj_anim.gif") as gif:
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
    assert durations == [milliseconds] * 5


def test_mp4(released):
    generate(released, "-n", 1, "--horizon", 5, "--format", "mp4")
    (path,) = (released / "figures").iterdir()
    assert path.name == "0_traj_anim.mp4" and len(iio.imread(path)) == 5
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == pytest.approx(1 / 0.06, abs=0.01)


def images_of(released, n, *arguments):
    generate(released, "-n", n, "--image", *arguments)
    return np.stack([iio.imread(released / "figures" / f"{i}_frames.png") for i in range(n)]).astype(int)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_videos_do_not_depend_on_the_batches(sampler, released):
    one, two, all_of_them = (images_of(released, 5, "-b", size, "--sampler", sampler) for size in (1, 2, 7))
    assert np.abs(one - all_of_them).max() <= 1 and np.abs(two - all_of_them).max() <= 1
    assert min(np.abs(one[i] - one[j]).max() for i in range(5) for j in range(i)) >= 5


def test_videos_depend_on_the_seed_alone(released):
    one, again, other = (images_of(released, 2, "--seed", seed) for seed in (0, 0, 1))
    assert np.array_equal(one, again) and np.abs(one - other).max() > 10
    torch.manual_seed(99)
    assert np.array_equal(images_of(released, 2), one)


@pytest.fixture
def asked(monkeypatch):
    """What the diffusion is asked to sample: a list of keyword arguments."""
    asked, sample = [], GaussianDiffusionPINT.sample
    monkeypatch.setattr(
        GaussianDiffusionPINT, "sample", lambda *args, **kwargs: asked.append(kwargs) or sample(*args, **kwargs)
    )
    return asked


def set_keys(released, **changes):
    """Change keys of a run's configuration."""
    path = released / "diffusion_hparams.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {"sampler": generation.DEFAULT_SAMPLER, "steps": min(generation.DEFAULT_STEPS, STEPS)}),
        (("--steps", 3), {"sampler": generation.DEFAULT_SAMPLER, "steps": 3}),
        (("--sampler", "ddim", "--steps", 4), {"sampler": "ddim", "steps": 4}),
        (("--sampler", "ddim"), {"sampler": "ddim", "steps": min(generation.DEFAULT_STEPS, STEPS)}),
        (("--sampler", "ddpm"), {"sampler": "ddpm"}),
        (("--sampler", "ddpm", "--steps", STEPS), {"sampler": "ddpm"}),
    ],
)
def test_the_sampler_is_the_one_asked_for(arguments, options, released, asked):
    generate(released, "-n", 1, "--image", *arguments)
    (given,) = asked
    assert given["sampler"] == options["sampler"] and given["steps"] == options.get("steps", STEPS)
    assert given["mask"] is None  # as published


def test_what_is_not_asked_for_is_the_runs(released, asked):
    set_keys(released, sampler="ddim", sampling_steps=6, mask_samples=True)
    for arguments in ((), ("--steps", 3), ("--sampler", "dpm++"), ("--sampler", "ddim")):
        generate(released, "-n", 1, "--image", *arguments)
    every = min(generation.DEFAULT_STEPS, STEPS)
    expected = [("ddim", 6), ("ddim", 3), ("dpm++", every), ("ddim", every)]
    assert [(given["sampler"], given["steps"]) for given in asked] == expected
    assert all((given["mask"][-1] == 0).sum() == 6 + D - (2 + D) for given in asked)


def test_a_run_without_mask_samples_can_be_told_to(released, asked):
    generate(released, "-n", 1, "--image", "--mask_samples")
    mask = asked[0]["mask"]
    assert mask.shape[-2:] == (K + 1, 6 + D) and mask[:-1].all() and mask[-1].tolist() == (2 + D) * [1] + 4 * [0]


def test_fewer_steps_than_the_default_where_there_are_fewer():
    assert sampling_steps("dpm++", None, 1000) == generation.DEFAULT_STEPS
    assert sampling_steps("dpm++", None, 20) == 20
    assert sampling_steps("ddpm", None, 1000) == 1000


def test_images_are_rows_of_frames_counted_from_one(released, recwarn):
    generate(released, "-n", 1, "--image", "--horizon", 40)
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]
    row = iio.imread(released / "figures" / "0_frames.png").astype(float)
    video = DiffusionRun.open(released).load_model().sample(1, 40, seed=0, sampler="dpm++", steps=20)[0]
    times = (1, 10, 15, 20, 30, 40)
    panels = [generated_panel(video[t - 1 : t], FRAMES, t) for t in times]
    assert [panel.labels for panel in panels] == [[f"t={t}"] for t in times]
    assert [panel.colors[0] for panel in panels] == ["purple"] + ["green"] * 5
    assert np.abs(row - side_by_side(panels)[0]).max() <= 1


def test_frames_beyond_the_horizon_are_left_out_with_a_warning(released):
    with pytest.warns(UserWarning, match=r"^t = 15, 20, 30, 40 left out: --horizon is 12; legal for all: 40$"):
        generate(released, "-n", 1, "--image")
    row = iio.imread(released / "figures" / "0_frames.png")
    narrow = side_by_side([generated_panel(torch.zeros(1, 3, 32, 32), FRAMES)] * 2)
    assert row.shape == narrow.shape[1:]


def test_generated_frames_are_labelled():
    panel = generated_panel(torch.zeros(3, 3, 8, 8), 2)
    assert panel.labels == ["t=1", "t=2", "t=3"] and panel.colors == ["purple", "purple", "green"]


def test_the_script_says_what_it_does(released, tmp_path, monkeypatch, capsys):
    arguments = ("--cpu", "-c", released, "-n", 3, "-b", 2, "--image")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run_script(monkeypatch, tmp_path, "generate_diffuse_ddlp_video_generation.py", *arguments) == 0
    done = capsys.readouterr()
    assert done.out.split() == [str(released / "figures" / f"{i}_frames.png") for i in range(3)]
    assert "warning: t = 15, 20, 30, 40 left out" in done.err


# --------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", 0), "-n/--num_videos is 0; legal: at least 1"),
        (("-b", 0), "-b/--batch_size is 0; legal: at least 1"),
        (("--seed", -1), "--seed is -1; legal: from 0 to 2^32 - 1"),
        (("--seed", 2**32), "--seed is 4294967296; legal: from 0 to 2^32 - 1"),
        (("--sampler", "euler"), "argument --sampler: invalid choice: 'euler' (choose from "),
        (("--format", "avi"), "argument --format: invalid choice: 'avi' (choose from "),
        (("--image", "--format", "gif"), "--format is of animations; legal: without --image"),
        (("--steps", "few"), "argument --steps: invalid int value: 'few'"),
    ],
)
def test_illegal_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        generate("none", *arguments)
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--horizon", 2), "--horizon is 2; legal: diffuse_frames 3 or more"),
        (("--steps", 0), "--steps is 0; legal: 1 to 20"),
        (("--steps", 21), "--steps is 21; legal: 1 to 20"),
        (("--sampler", "ddpm", "--steps", 5), "--steps is 5; legal: 20 with sampler ddpm"),
    ],
)
def test_what_the_run_does_not_allow(arguments, message, released):
    with pytest.raises(UserError, match=f"^{message}"):
        generate(released, *arguments)


def failure(path, *arguments):
    with pytest.raises(UserError) as error:
        generate(path, *arguments)
    return str(error.value)


def test_what_is_no_run_is_named(tmp_path, released):
    legal = "legal: a run directory, or its diffusion_hparams.json"
    assert failure(tmp_path / "none") == f"{tmp_path}/none: no such run directory; {legal}"
    assert failure(tmp_path) == f"{tmp_path}: not a run directory of DiffuseDDLP: no diffusion_hparams.json in it"
    other = released / "ddlp_hparams.json"
    assert failure(other) == f"{other}: no such run directory; {legal}"
    assert find_run(released / "diffusion_hparams.json").path == released
    (released / "diffusion_hparams.json").write_text("{")
    assert failure(released).startswith(f"{released}/diffusion_hparams.json: invalid JSON at line 1, column 2")


def test_every_missing_file_is_named(released):
    for name in ("obj3d128_ddlp.pth", "latent_stats.pth", "saves/model.pth"):
        (released / name).unlink()
    assert failure(released) == (
        f"{released}: files are missing: the DDLP's weights {released}/obj3d128_ddlp.pth,"
        f" the statistics of its particles {released}/latent_stats.pth,"
        f" the diffusion's weights {released}/saves/model.pth"
    )
    assert failure(released, "--checkpoint", "gone.pth").endswith("the diffusion's weights gone.pth")
    (released / "ddlp_hparams.json").unlink()
    assert failure(released) == (
        f"{released}: no configuration of the DDLP; looked for {released}/ddlp_hparams.json,"
        f" checkpoints/ddlp-obj3d128/hparams.json, {released}/checkpoints/ddlp-obj3d128/hparams.json"
    )


def rewritten(path, function):
    torch.save(function(torch.load(path)), path)


def test_files_that_do_not_fit_are_named(released):
    stats, state, ddlp = released / "latent_stats.pth", released / "saves" / "model.pth", released / "obj3d128_ddlp.pth"
    rewritten(stats, lambda values: {**values, "mu": torch.zeros(9)})
    assert failure(released) == (
        f"{stats}: does not fit the configuration's ParticleNormalization: mu is [9], the model's [8]"
    )
    stats.write_bytes(b"nonsense")
    assert failure(released).startswith(
        f"{stats}: not a readable checkpoint: it is truncated, damaged or of another kind"
    )
    torch.save(released_stats(), stats)
    rewritten(state, lambda values: {**values, "ema": {**values["ema"], "ema_model.betas": torch.zeros(30)}})
    message = "does not fit the configuration's GaussianDiffusionPINT: betas is [30], the model's [20]"
    assert failure(released) == f"{state} (ema): {message}"
    rewritten(state, lambda values: {name: values[name] for name in ("step", "model", "opt")})
    assert failure(released) == f"{state}: not a model.pth of DiffuseDDLP: lacks ema, scaler"
    assert failure(released, "--checkpoint", ddlp) == (
        f"{ddlp}: not a model.pth of DiffuseDDLP: lacks step, model, opt, ema, scaler"
    )
    torch.save({**released_state(), "ema": None}, state)
    assert failure(released) == f"{state}: not a model.pth of DiffuseDDLP: its ema is a NoneType"
    torch.save({**released_state(), "ema": {}}, state)
    assert failure(released) == f"{state}: not a model.pth of DiffuseDDLP: its ema lacks initted, one number"
    torch.save(released_state(), state)
    change(released / "ddlp_hparams.json", pint_dim=16)
    assert failure(released).startswith(f"{ddlp}: does not fit the configuration's ObjectDynamicsDLP: ")


# ----------------------------------------------------------------------------------------------------- our own runs


@pytest.fixture
def ddlp_run(run):
    """The `Run` of a DDLP with random weights."""
    return run


def new_run(ddlp_run, **changes):
    config = DiffuseConfig(
        ds="balls", ddlp_dir=str(ddlp_run.path), diffusion_num_steps=STEPS, diffuse_frames=FRAMES, **changes
    )
    ddlp_config = find_ddlp_config(config)
    weights, statistics = find_ddlp_weights(config, ddlp_config), torch.nn.Module()
    statistics.state_dict = released_stats
    parent = ddlp_run.path.parent
    return DiffusionRun.create(config, ddlp_config, make_accelerator("cpu"), weights, statistics, {"clips": 3}, parent)


def test_a_new_run_is_complete(ddlp_run, tmp_path):
    run = new_run(ddlp_run, result_dir="before")
    names = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    files = {"diffusion_hparams.json", "ddlp_hparams.json", "balls_ddlp.pth", "latent_stats.pth", "latent_stats.json"}
    assert names == files | {"figures", "saves"}
    assert run.path.name.endswith("_balls_diffuse_ddlp")
    hparams = json.loads((run.path / "diffusion_hparams.json").read_text())
    assert hparams["result_dir"] is None and hparams["ddlp_dir"] == str(ddlp_run.path) and hparams["ddlp_ckpt"] is None
    assert json.loads((run.path / "latent_stats.json").read_text()) == {"clips": 3}
    shutil.rmtree(ddlp_run.path)
    opened = DiffusionRun.open(shutil.move(run.path, tmp_path / "moved"))
    assert opened.config == run.config and opened.ddlp_config == ddlp_run.config
    assert opened.ddlp_weights_path() == tmp_path / "moved" / "balls_ddlp.pth"
    ddlp = opened.load_ddlp()
    assert not ddlp.training and not any(parameter.requires_grad for parameter in ddlp.parameters())
    assert not ddlp.dyn_module.depth_logvar_from_mean


def saved(run, step=1):
    """Save a state, as training does. Returns the moving average."""
    ema = EMA(new_diffusion(), beta=0.995, update_every=10, include_online_model=True)
    ema.online_model.load_state_dict(diffusion_weights(1))
    ema.ema_model.load_state_dict(diffusion_weights(2))
    run.save_state(
        {
            "model": ema.online_model.state_dict(),
            "optimizer": torch.optim.Adam(ema.online_model.parameters()).state_dict(),
            "ema": ema.state_dict(),
            "progress": {"iteration": step},
            "best": {"lpips": step},
        }
    )
    return ema


def test_what_is_saved_has_the_published_layout_and_one_entry_more(ddlp_run):
    run = new_run(ddlp_run)
    with pytest.raises(UserError, match=r"cannot be resumed: no saves/model.pth"):
        run.load_state()
    ema = saved(run, 4)
    state, released = torch.load(run.state_path, weights_only=True), released_state()
    assert list(state) == [*released, "training"] and state["scaler"] is None and state["step"] == 4
    for part in ("model", "ema"):
        layout = {name: (value.shape, value.dtype) for name, value in released[part].items()}
        assert {name: (value.shape, value.dtype) for name, value in state[part].items()} == layout
    statistics = torch.load(run.stats_path, weights_only=True)
    assert {name: value.shape for name, value in statistics.items()} == {
        name: value.shape for name, value in released_stats().items()
    }
    loaded = run.load_state()
    assert loaded["progress"] == {"iteration": 4} and loaded["best"] == {"lpips": 4}
    again = EMA(new_diffusion(), include_online_model=True)
    again.load_state_dict(loaded["ema"])
    model = run.load_model()
    for name, value in ema.ema_model.state_dict().items():
        assert torch.equal(model.diffusion.state_dict()[name], value)
        assert torch.equal(again.ema_model.state_dict()[name], value)
    assert isinstance(model.normalization, ParticleNormalization)
    assert torch.equal(model.normalization.max_val_bg, released_stats()["max_val_bg"])


def test_a_crash_while_saving_keeps_the_state_before(ddlp_run, monkeypatch):
    run = new_run(ddlp_run)
    saved(run, 1)
    save = torch.save

    def crash(contents, file):
        save(contents, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            saved(run, 2)
    assert DiffusionRun.open(run.path).load_state()["best"] == {"lpips": 1}
    assert [path.name for path in run.state_path.parent.iterdir()] == ["model.pth"]


def test_only_the_main_process_writes(ddlp_run):
    created = new_run(ddlp_run)
    run = DiffusionRun.open(created.path, is_main=False)
    before = set(created.path.rglob("*"))
    run.log("a line")
    run.record({"step": 1})
    run.save_figure("figure", torch.zeros(3, 8, 8))
    saved(run)
    assert set(created.path.rglob("*")) == before
    for step in (1, 2, 1):
        created.record({"step": step, "loss": step / 2})
    created.log("a line")
    created.save_figure("figure", torch.zeros(3, 8, 8))
    assert created.records() == [{"step": 1, "loss": 0.5}] and (created.path / "log.txt").read_text() == "a line\n"
    assert (created.figures / "figure.jpg").is_file()


# ------------------------------------------------------------------------------------------------- finding the DDLP


def test_where_the_ddlp_is_looked_for(ddlp_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = new_run(ddlp_run)
    relative = ddlp_run.path.relative_to(tmp_path)
    change(run.path / "diffusion_hparams.json", ddlp_dir=str(relative))
    assert DiffusionRun.open(run.path).ddlp_weights_path() == run.path / "balls_ddlp.pth"
    for name in ("balls_ddlp.pth", "ddlp_hparams.json"):
        (run.path / name).unlink()
    best = ddlp_run.weights_path("_best_lpips")
    opened = DiffusionRun.open(run.path)
    assert opened.ddlp_config == ddlp_run.config
    assert opened.ddlp_weights_path() == relative / "saves" / "balls_ddlp.pth"
    shutil.copy(ddlp_run.weights_path(), best)
    assert opened.ddlp_weights_path() == relative / "saves" / "balls_ddlp_best_lpips.pth"
    change(run.path / "diffusion_hparams.json", ddlp_dir=f"../{relative}", ddlp_ckpt=f"../{relative}/saves/{best.name}")
    opened = DiffusionRun.open(run.path)  # relative to the directory
    assert opened.ddlp_weights_path().resolve() == best and opened.ddlp_config == ddlp_run.config
    (run.path / best.name).write_bytes(b"")
    assert opened.ddlp_weights_path() == run.path / best.name


def test_a_missing_ddlp_is_named_before_a_run_is_made(ddlp_run, tmp_path):
    config = DiffuseConfig(ds="balls", ddlp_dir="nowhere")
    with pytest.raises(UserError, match=r"^nowhere: no configuration of the DDLP; looked for nowhere/hparams.json$"):
        find_ddlp_config(config)
    config = DiffuseConfig(ds="balls", ddlp_dir=str(ddlp_run.path), ddlp_ckpt="gone.pth")
    with pytest.raises(UserError, match=r"no weights of the DDLP; looked for gone.pth$"):
        find_ddlp_weights(config, ddlp_run.config)
    with pytest.raises(UserError, match=r"^gone.pth: no such checkpoint file$"):
        DiffusionRun.create(config, ddlp_run.config, make_accelerator("cpu"), "gone.pth", None, {}, tmp_path)
    assert not list(tmp_path.glob("*_diffuse_ddlp"))
    assert Run.open(ddlp_run.path).kind == "ddlp"
