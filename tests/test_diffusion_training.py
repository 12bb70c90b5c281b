"""Training DiffuseDDLP through its command: particles and their statistics, steps, moving average, exact resume."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import train_diffuse_ddlp
from configs.schema import DiffuseConfig
from datasets import frame_cache, particle_cache
from datasets.get_dataset import get_video_dataset
from models import DiffuseDDLP
from rundir.diffusion_run import DiffusionRun
from rundir.run import Run
from tests import golden
from tests.balls import ROOT, SMALL, make_run, run_in
from tests.test_training import assert_same
from training.diffusion import (
    RESUMABLE,
    DiffusionTask,
    DiffusionTrainer,
    StepBatches,
    averaged,
    sample_grid,
    weights_sha256,
)
from training.loop import EpochBatches, Progress, TrainingError, make_accelerator
from utils import checkpoints
from utils.animation import generated_panel, side_by_side
from utils.errors import UserError
from utils.plotting import loss_graph

CLIPS, FRAMES, STEPS, STOP, EVERY = 33, 4, 130, 115, 50
BASE = {
    "ds": "balls",
    "device": "cpu",
    "batch_size": 4,
    "lr": 1e-3,
    "train_num_steps": STEPS,
    "diffusion_num_steps": 6,
    "diffuse_frames": FRAMES,
    "save_and_sample_every": EVERY,
    "ema_decay": 0.85,
    "num_workers": 0,
    "seed": 3,
}
# The correlation maps' norm is the whole batch's: without them a clip's particles are its own.
INDEPENDENT = {"use_correlation_heatmaps": False}
STATISTICS = {name + suffix for name in ("mu", "std", "min_val", "max_val") for suffix in ("", "_bg")}


@pytest.fixture(scope="module")
def ddlp(tmp_path_factory, balls_data):
    return make_run(tmp_path_factory.mktemp("ddlp"), balls_data, **INDEPENDENT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ddlp):
    """A run of 130 steps that was never stopped."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder, ddlp)
    train(folder, "-c", "small.json")
    return the_run(folder)


def write(folder, ddlp, **changes):
    """small.json in the folder; returns its configuration."""
    config = {**BASE, "ds_root": ddlp.config.root, "ddlp_dir": str(ddlp.path), **changes}
    (folder / "small.json").write_text(json.dumps(config))
    return DiffuseConfig.from_dict(config)


def train(folder, *arguments):
    run_in(folder, train_diffuse_ddlp.main, *arguments)


def the_run(folder):
    (path,) = folder.glob("*_balls_diffuse_ddlp")
    return DiffusionRun.open(path)


def trainer_for(folder, ddlp, **changes):
    """A trainer and its new run, ready for `fit`."""
    config, accelerator = write(folder, ddlp, **changes), make_accelerator("cpu", unused_parameters=False)
    model = Run.open(ddlp.path).load_model()
    trainer = DiffusionTrainer(DiffusionTask(config, ddlp.config, model, accelerator), config, accelerator, "resume")
    trainer.encode(fit=True)
    run = DiffusionRun.create(config, ddlp.config, accelerator, ddlp.find_weights(), folder)
    trainer.save_statistics(run)
    return trainer, run


def numbers(run):
    """The records without the speed."""
    return [{name: value for name, value in row.items() if name != "steps_per_second"} for row in run.records()]


def assert_same_run(run, expected):
    """Weights, optimiser, moving average, random states, sums and records, bit for bit."""
    assert_same(run.load_state(), expected.load_state(), "model.pth")
    assert_same(run.load_training_state(), expected.load_training_state(), "training_state.pt")
    assert numbers(run) == numbers(expected)


def plain_tokens(ddlp):
    """The tokens of all training clips, encoded one by one."""
    videos = get_video_dataset("balls", ddlp.config.root, FRAMES, "train", 32)
    config = DiffuseConfig.from_dict({**BASE, "ddlp_dir": str(ddlp.path)})
    model = DiffuseDDLP.from_config(config, ddlp.config, Run.open(ddlp.path).load_model())
    return torch.cat([model.encode(videos[i][0][None])[0] for i in range(len(videos))]), model.layout


# ---- the run directory


def test_the_run_directory_holds_what_training_promises(trained):
    names = {str(path.relative_to(trained.path)) for path in trained.path.rglob("*") if path.is_file()}
    figures = {f"figures/sample_{step}{end}" for step in (50, 100, 130) for end in (".jpg", "_traj_anim.gif")}
    hparams = {"diffusion_hparams.json", "ddlp_hparams.json", "balls_ddlp.pth", "latent_stats.pth", "latent_stats.json"}
    others = {"log.txt", "metrics.jsonl", "figures/balls_diffuse_ddlp_graph.jpg"}
    assert names == figures | hparams | others | {"saves/model.pth", "saves/training_state.pt"}
    assert trained.config.result_dir is None
    records = trained.records()
    assert [(record["step"], record["epoch"]) for record in records] == [(50, 6), (100, 12), (130, 16)]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 and record["steps_per_second"] > 0 for record in records)
    assert (trained.path / "log.txt").read_text().count("\nstep ") == 3


def test_the_graph_is_of_loss_and_gradient_over_the_steps(trained):
    graph = iio.imread(trained.figures / "balls_diffuse_ddlp_graph.jpg") / 255
    assert graph.shape == (400, 1200, 3)
    same = [{"epoch": r["step"], "loss": r["loss"], "val_loss": r["grad_norm"]} for r in trained.records()]
    panels = {"loss": ("loss",), "gradient norm": ("val_loss",)}
    expected = loss_graph([{**r, "step": r["epoch"]} for r in same], panels, "step").permute(1, 2, 0).numpy()
    assert np.abs(graph - expected).max() < 0.2
    empty = loss_graph([], panels, "step").permute(1, 2, 0).numpy()
    assert all((np.abs(graph - empty)[:, half] > 0.5).any() for half in (slice(0, 600), slice(600, 1200)))


def test_the_checkpoint_has_the_published_layout(trained):
    state = checkpoints.load(trained.state_path)
    assert list(state) == ["step", "model", "opt", "ema", "scaler"]
    assert state["step"] == STEPS and type(state["step"]) is int and state["scaler"] is None
    manifest = golden.manifest("denoiser")
    denoiser = {f"model.{entry['name']}" for entry in manifest["parameters"] + manifest["buffers"]}
    buffers = {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        "p2_loss_weight",
    }
    # The golden denoiser has more layers than the test's, the same names in each.
    layers = re.compile(r"model\.particle_transformer\.\w+\.[1-9]\d*\.")
    expected = {name for name in denoiser if not layers.match(name)} | buffers
    assert state["model"].keys() == expected
    both = {f"{part}_model.{name}" for part in ("online", "ema") for name in expected}
    assert state["ema"].keys() == both | {"initted", "step"}
    initted, step = state["ema"]["initted"], state["ema"]["step"]
    assert (initted.dtype, initted.tolist()) == (torch.float32, [1.0])
    assert (step.dtype, step.tolist()) == (torch.int64, [STEPS])
    assert all(torch.equal(state["ema"][f"online_model.{name}"], value) for name, value in state["model"].items())
    assert state["model"]["betas"].shape == (6,) and state["opt"].keys() == {"state", "param_groups"}
    (group,) = state["opt"]["param_groups"]
    assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.99))
    statistics = checkpoints.load(trained.stats_path)
    assert statistics.keys() == STATISTICS and statistics["mu"].shape == (6 + SMALL["learned_feature_dim"],)


def test_a_finished_run_is_a_model(trained):
    model, ema = trained.load_model(), trained.load_state()["ema"]
    assert all(torch.equal(value, ema[f"ema_model.{name}"]) for name, value in model.diffusion.state_dict().items())
    assert model.sample(2, FRAMES + 1).shape == (2, FRAMES + 1, 3, 32, 32)


def test_the_samples_are_those_of_the_moving_average(trained):
    videos = trained.load_model().sample(5, SMALL["animation_horizon"], seed=BASE["seed"])
    animation = side_by_side([generated_panel(video, FRAMES) for video in videos])
    frames = iio.imread(trained.figures / f"sample_{STEPS}_traj_anim.gif")
    assert frames.shape == animation.shape == (SMALL["animation_horizon"], *animation.shape[1:])
    assert np.abs(frames.astype(float) - animation).mean() < 4  # a GIF has 256 colours
    image = iio.imread(trained.figures / f"sample_{STEPS}.jpg") / 255
    assert np.abs(image - sample_grid(videos, FRAMES).permute(1, 2, 0).numpy()).mean() < 0.01


def test_a_grid_has_a_row_for_each_video_from_its_first_frame_to_its_last():
    videos = torch.linspace(0, 1, 2 * 15)[:, None, None, None].expand(30, 3, 128, 128).unflatten(0, (2, 15))
    grid = sample_grid(videos, 4)
    times = [0, 2, 4, 6, 8, 10, 12, 14]
    height, width = grid.shape[1] // 2, grid.shape[2] // 8
    found = [[grid[0, row * height + height // 2, t * width + width // 2] for t in range(8)] for row in range(2)]
    torch.testing.assert_close(torch.tensor(found), videos[:, times, 0, 0, 0], atol=1 / 255, rtol=0)


# ---- particles and statistics


def test_the_statistics_are_those_of_all_clips(trained, ddlp):
    tokens, layout = plain_tokens(ddlp)
    statistics = checkpoints.load(trained.stats_path)
    for suffix, values in zip(("", "_bg"), layout.split(tokens), strict=True):
        values = values.flatten(0, -2).double()
        expected = {
            "mu": values.mean(0),
            "std": values.std(0),
            "min_val": values.amin(0),
            "max_val": values.amax(0),
        }
        for name, value in expected.items():
            torch.testing.assert_close(statistics[name + suffix].double(), value, atol=1e-3, rtol=1e-3)


def test_the_cache_holds_the_particles_of_every_clip(trained, ddlp):
    tokens, _ = plain_tokens(ddlp)
    (array,) = (
        np.load(path)
        for path in (Path(ddlp.config.root) / ".cache").glob("*.npy")
        if np.load(path).shape == tokens.shape
    )
    assert array.dtype == np.float32 and array.shape == (CLIPS, FRAMES, SMALL["n_kp_enc"] + 1, 8)
    torch.testing.assert_close(torch.from_numpy(array), tokens, atol=1e-3, rtol=1e-3)


def noting(losses, found):
    """A task's `losses` that adds each loss to the list `found`."""

    def wrapped(*arguments):
        result = losses(*arguments)
        found.append(result["loss"].item())
        return result

    return wrapped


def test_a_step_on_the_fly_equals_one_on_kept_particles(ddlp, tmp_path):
    runs, losses = [], {False: [], True: []}
    for on_the_fly in (False, True):
        folder = tmp_path / str(on_the_fly)
        folder.mkdir()
        options = {"encode_on_the_fly": on_the_fly, "num_workers": int(on_the_fly)}
        trainer, run = trainer_for(folder, ddlp, train_num_steps=8, **options)
        trainer.task.losses = noting(trainer.task.losses, losses[on_the_fly])
        trainer.task.draw_samples = lambda model, step, run: None
        trainer.fit(run)
        runs.append(run)
    first, second = (checkpoints.load(run.stats_path) for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(losses[True]) == 8 and losses[True] == pytest.approx(losses[False], rel=1e-4)
    first, second = (run.load_state()["model"] for run in runs)
    assert all(torch.allclose(value, second[name], atol=1e-3) for name, value in first.items())


@pytest.fixture
def own_data(tmp_path, ddlp):
    """The DDLP with a data folder of the test's own."""
    shutil.copytree(ddlp.config.root, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    return make_run(tmp_path, str(tmp_path / "data"), **INDEPENDENT)


@pytest.fixture
def encodings(monkeypatch):
    """Counts the clips that are encoded."""
    counts, encode = [], DiffuseDDLP.encode

    def counting(model, videos):
        counts.append(len(videos))
        return encode(model, videos)

    monkeypatch.setattr(DiffuseDDLP, "encode", counting)
    return counts


def encoded_clips(folder, ddlp, encodings, **changes):
    encodings.clear()
    trainer_for(folder, ddlp, **changes)
    return sum(encodings)


def test_particles_are_encoded_once(own_data, tmp_path, encodings):
    trainer, run = trainer_for(tmp_path, own_data, train_num_steps=9)
    assert sum(encodings) == CLIPS
    assert trainer.fit(run) and sum(encodings) == CLIPS
    assert encoded_clips(tmp_path, own_data, encodings, seed=4, particle_norm="std", batch_size=5) == 0
    cache = tmp_path / "data" / ".cache"
    (kept,) = cache.glob("*.npy")
    before = kept.read_bytes()
    assert encoded_clips(tmp_path, own_data, encodings, diffuse_frames=3) == CLIPS + 3
    other = make_run(tmp_path / "other", own_data.config.root, seed=1, **INDEPENDENT)
    assert encoded_clips(tmp_path, other, encodings) == CLIPS
    assert len(list(cache.glob("*.npy"))) == 3 and kept.read_bytes() == before
    kept.write_bytes(before[:-4])  # truncated
    assert encoded_clips(tmp_path, own_data, encodings) == CLIPS and kept.read_bytes() == before
    os.utime(tmp_path / "data" / "train.hdf5", (1, 1))
    assert encoded_clips(tmp_path, own_data, encodings) == CLIPS


def test_other_frames_are_encoded_anew_where_a_data_set_has_no_fingerprint():
    clips = [(torch.full((4, 3, 8, 8), i / 9),) for i in range(5)]
    before = particle_cache.data_fingerprint(clips)
    assert particle_cache.data_fingerprint([(clip[0].clone(),) for clip in clips]) == before
    clips[-1][0][0, 0, 0, 0] += 0.5
    assert particle_cache.data_fingerprint(clips) != before


def test_particles_of_a_data_set_that_is_a_file_are_kept_beside_it(tmp_path):
    (tmp_path / "recording.npy").touch()
    tokens = torch.rand(3, 2, 4, 5)
    kept = particle_cache.cached_tokens(
        tmp_path / "recording.npy", "traffic", {}, tokens.shape, lambda: iter(tokens.split(2))
    )
    assert kept.path.parent == tmp_path / ".cache"
    assert all(torch.equal(kept[i][0], tokens[i]) for i in range(3))


def test_what_is_kept_is_whole(own_data, tmp_path, monkeypatch):
    def encoded(task, model, clips):
        yield torch.zeros(8, FRAMES, 5, 8)
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionTask, "encoded", encoded)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, own_data)
    names = [path.name for path in (tmp_path / "data" / ".cache").iterdir()]
    assert len(names) == 1 and names[0].endswith(".lock")
    assert not list(tmp_path.glob("*_diffuse_ddlp"))


def test_room_on_the_disk_is_checked_first(own_data, tmp_path, monkeypatch, encodings):
    monkeypatch.setattr(frame_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9e9, 9e9, 1e4))
    message = r"/data/.cache: the encoded particles of the training clips of balls take 0.00 GB, but 0.00 GB are free;"
    with pytest.raises(UserError, match=f"{message} legal: room for them, or encode_on_the_fly true, which encodes"):
        trainer_for(tmp_path, own_data)
    assert encodings == []


def test_a_random_state_is_not_touched_by_encoding(own_data, tmp_path):
    first, _ = trainer_for(tmp_path, own_data)
    state = torch.get_rng_state()
    shutil.rmtree(tmp_path / "data" / ".cache")
    first.encode(fit=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_weights_hash_is_of_names_and_values():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    assert weights_sha256(first) == weights_sha256(second) and len(weights_sha256(first)) == 64
    with torch.no_grad():
        second.bias[1] += 1e-6
    assert weights_sha256(first) != weights_sha256(second)
    assert weights_sha256(torch.nn.ModuleList([first])) != weights_sha256(first)


# ---- resuming


def stop_at(step, monkeypatch):
    monkeypatch.setattr(DiffusionTrainer, "_stop_requested", lambda trainer: trainer.progress.iteration == step)


@pytest.fixture
def stopped(tmp_path, ddlp, monkeypatch, capsys):
    """A run that was stopped between two saves, after the moving average has begun."""
    write(tmp_path, ddlp)
    with monkeypatch.context() as patched:
        stop_at(STOP, patched)
        train(tmp_path, "-c", "small.json")
    run = the_run(tmp_path)
    line = f"stopped at epoch 14, iteration {STOP}; go on with: python train_diffuse_ddlp.py --resume {run.path.name}"
    assert line in capsys.readouterr().out
    assert run.load_state()["step"] == STOP
    return run


@pytest.mark.parametrize("way", ["--resume", "result_dir"])
def test_a_resumed_run_equals_one_never_stopped(way, stopped, trained, tmp_path, ddlp, capsys):
    if way == "--resume":
        train("/", "--resume", stopped.path)
    else:
        write(tmp_path, ddlp, result_dir=str(stopped.path), num_workers=1)
        train("/", "-c", tmp_path / "small.json")
    assert f"resumed at epoch 14, iteration {STOP}" in capsys.readouterr().out
    assert_same_run(stopped, trained)
    assert DiffusionRun.open(stopped.path).config.result_dir is None


def test_more_steps_than_at_first(stopped, trained, capsys):
    train("/", "--resume", stopped.path, "--train_num_steps", STOP)
    assert f"all {STOP} steps are done; more: --train_num_steps" in capsys.readouterr().out
    train("/", "--resume", stopped.path, "--train_num_steps", STEPS)
    assert_same_run(stopped, trained)


def test_drawing_samples_leaves_training_as_it_is(trained, ddlp, tmp_path):
    write(tmp_path, ddlp, save_and_sample_every=1000, sampler="ddim", sampling_steps=2)
    train(tmp_path, "-c", "small.json")
    for name in ("model", "opt", "ema"):
        assert_same(the_run(tmp_path).load_state()[name], trained.load_state()[name], name)


def test_a_published_directory_goes_on_with_the_seeds_random_state(stopped, tmp_path):
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    shutil.copytree(stopped.path, tmp_path / "copy")
    for name in ("saves/training_state.pt", "latent_stats.json", "metrics.jsonl", "log.txt"):
        (tmp_path / "copy" / name).unlink()
    ends = []
    for name in ("first", "second"):
        shutil.copytree(tmp_path / "copy", tmp_path / name)
        torch.rand(7)
        train("/", "--resume", tmp_path / name)
        ends.append(DiffusionRun.open(tmp_path / name).load_state())
    assert ends[0]["step"] == STEPS and ends[0]["ema"]["step"] == STEPS
    assert_same(*ends, "model.pth")


@pytest.mark.parametrize(
    ("key", "value"), [("ddlp_sha256", "0" * 64), ("ds", "obj3d"), ("diffuse_frames", 3), ("clips", 34)]
)
def test_statistics_of_others_are_refused(key, value, trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    path = tmp_path / "run" / "latent_stats.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    message = f"latent_stats.json: the statistics are of other particles: {key} is {json.dumps(value)}, here .*; legal:"
    with pytest.raises(UserError, match=message):
        train("/", "--resume", tmp_path / "run")


def test_another_ddlp_in_the_run_directory_is_refused(trained, tmp_path, ddlp):
    shutil.copytree(trained.path, tmp_path / "run")
    other = make_run(tmp_path, ddlp.config.root, seed=1, **INDEPENDENT)
    shutil.copy(other.weights_path(), tmp_path / "run" / "balls_ddlp.pth")
    with pytest.raises(UserError, match="the statistics are of other particles: ddlp_sha256 is"):
        train("/", "--resume", tmp_path / "run")


@pytest.mark.parametrize("entry", ["model", "opt", "ema"])
def test_a_state_that_does_not_fit_is_refused(entry, trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    run = DiffusionRun.open(tmp_path / "run")
    state = checkpoints.load(run.state_path)
    if entry == "opt":
        state["opt"]["state"][0]["exp_avg"] = torch.zeros(3)
    else:
        state[entry].popitem()
    checkpoints.save(state, run.state_path)
    with pytest.raises(UserError, match=rf"model.pth \({entry}\): does not fit"):
        train("/", "--resume", run.path)


# ---- the arithmetic of a step


def test_steps_take_the_batches_of_epoch_after_epoch():
    def epoch(number):
        batches = EpochBatches(11, 2, 5, 1, 2)
        batches.start_at(Progress(epoch=number))
        return list(batches)

    expected = [batch for number in range(4) for batch in epoch(number)][:7]
    batches = StepBatches(7, 11, 2, 5, 1, 2)
    for step in range(9):
        batches.start_at(Progress(*divmod(step, 2)))
        assert len(batches) == max(7 - step, 0)
        assert list(batches) == expected[step:]


def test_the_moving_average_is_the_published_one(ddlp, tmp_path, monkeypatch):
    """A copy up to step 100; then every tenth step with a decay of 1 - (1 + n)^(-2/3), n steps later, at most beta."""
    weights, after_step = [], DiffusionTrainer._after_step

    def keep(trainer, stop):
        weights.append({name: p.detach().clone() for name, p in trainer.bare_model.diffusion.named_parameters()})
        after_step(trainer, stop)

    monkeypatch.setattr(DiffusionTrainer, "_after_step", keep)
    trainer, run = trainer_for(tmp_path, ddlp, train_num_steps=145, save_and_sample_every=1000, ema_decay=0.88)
    trainer.fit(run)
    average = {name: value.double() for name, value in weights[100].items()}  # weights[i]: after step i + 1
    for update, n in ((110, 10), (120, 20), (130, 30), (140, 40)):
        decay = min(0.88, 1 - (1 + n) ** (-2 / 3))
        average = {name: decay * value + (1 - decay) * weights[update][name] for name, value in average.items()}
    found = run.load_state()["ema"]
    for name, value in average.items():
        torch.testing.assert_close(found[f"ema_model.{name}"].double(), value, atol=1e-6, rtol=1e-5)
    assert any(not torch.allclose(weights[-1][name].double(), value, atol=1e-4) for name, value in average.items())


def test_a_step_is_adams_with_the_clipped_gradient(ddlp, tmp_path, monkeypatch):
    losses = DiffusionTask.losses
    monkeypatch.setattr(DiffusionTask, "losses", lambda *arguments: {"loss": 1000 * losses(*arguments)["loss"]})
    trainer, _ = trainer_for(tmp_path, ddlp)
    trainer.model.train()
    before = [p.detach().clone() for p in trainer.bare_model.diffusion.parameters()]
    trainer.means.add({"loss": torch.zeros(()), "grad_norm": torch.zeros(())})
    trainer._step(next(iter(trainer.loader)))
    gradients = [p.grad for p in trainer.bare_model.diffusion.parameters()]
    assert torch.cat([g.flatten() for g in gradients]).norm() == pytest.approx(1, abs=1e-4)
    assert trainer.means.read(trainer.accelerator)[1]["grad_norm"] > 10
    for start, gradient, parameter in zip(before, gradients, trainer.bare_model.diffusion.parameters(), strict=True):
        expected = start - BASE["lr"] * gradient / (gradient.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in trainer.bare_model.ddlp.parameters())


def test_the_average_is_in_the_models_place_only_for_a_while(ddlp, tmp_path):
    trainer, _ = trainer_for(tmp_path, ddlp)
    model = trainer.bare_model
    online = model.diffusion
    with pytest.raises(ZeroDivisionError), averaged(model, trainer.ema) as sampled:
        assert sampled is model and model.diffusion is trainer.ema.ema_model
        raise ZeroDivisionError
    assert model.diffusion is online


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 160), ({"particle_norm": "std", "loss_type": "l2"}, 160), ({"denoiser": "unet"}, 40)],
    ids=["pint", "std", "unet"],
)
def test_the_loss_falls(changes, steps, ddlp, tmp_path):
    every = steps // 4
    trainer, run = trainer_for(tmp_path, ddlp, lr=5e-3, train_num_steps=steps, save_and_sample_every=every, **changes)
    trainer.task.draw_samples = lambda model, step, run: None
    trainer.fit(run)
    losses = [record["loss"] for record in run.records()]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]


@pytest.fixture
def poisoned(ddlp, tmp_path):
    trainer, run = trainer_for(tmp_path, ddlp, train_num_steps=30, save_and_sample_every=5)
    yield trainer, run
    state = run.load_state()
    assert state["step"] == 5 and all(value.isfinite().all() for value in state["model"].values())


def test_training_stops_at_a_loss_that_is_not_finite(poisoned):
    trainer, run = poisoned
    losses = trainer.task.losses

    def nan_at_8(model, batch, progress):
        factor = float("nan") if progress.iteration == 7 else 1.0
        return {"loss": factor * losses(model, batch, progress)["loss"]}

    trainer.task.losses = nan_at_8
    message = (
        r"loss is nan, grad_norm is nan at iteration 8 \(epoch 1\); the last good checkpoint is kept; go on from it"
    )
    with pytest.raises(TrainingError, match=message):
        trainer.fit(run)


def test_weights_that_are_not_finite_are_not_saved(poisoned):
    trainer, run = poisoned

    def inf_at_10():
        if trainer.progress.iteration == 10:
            torch.nn.init.constant_(trainer.bare_model.diffusion.model.particle_decoder[-1].bias, float("inf"))

    trainer.ema.update = inf_at_10
    message = r"the weights model\.particle_decoder\.\d\.bias are not finite at epoch 1, iteration 10; the last good"
    with pytest.raises(TrainingError, match=message):
        trainer.fit(run)


# ---- several processes

SCRIPT = """
import sys
import torch
from train_diffuse_ddlp import main
from training.diffusion import DiffusionTrainer

fit = DiffusionTrainer.fit

def fit_and_keep(trainer, run):
    fit(trainer, run)
    torch.save(trainer.bare_model.diffusion.state_dict(), f"weights_{trainer.accelerator.process_index}.pth")

DiffusionTrainer.fit = fit_and_keep
main(sys.argv[1:])
"""


def launch(folder, *arguments):
    """The command on two processes; returns what they printed."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_two_processes_train_one_model_and_go_on_together(own_data, tmp_path):
    write(tmp_path, own_data, train_num_steps=8, save_and_sample_every=4)
    output = launch(tmp_path, "-c", "small.json")
    assert output.count("encoding the training clips of balls once") == 1
    run = the_run(tmp_path)
    first, second = (checkpoints.load(tmp_path / f"weights_{process}.pth") for process in (0, 1))
    state = run.load_state()
    assert_same(first, second, "weights")
    assert_same(first, state["model"], "weights")
    states = run.load_training_state()["random_states"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    assert [(record["step"], record["epoch"]) for record in run.records()] == [(4, 1), (8, 2)]  # 33 // (2 * 4)
    assert (run.path / "log.txt").read_text().count("step 4 ") == 1 and state["ema"]["step"] == 8
    with pytest.raises(UserError, match=r"was trained by 2 process\(es\); it can only go on with as many"):
        train("/", "--resume", run.path)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ddlp_dir": "gone"}, "ddlp_dir is gone: no such folder; legal: the run directory of a DDLP, or a released"),
        ({"ddlp_dir": "."}, r"\.: no configuration of the DDLP; looked for hparams.json"),
        ({"ddlp_ckpt": "gone.pth"}, "ddlp_ckpt is gone.pth: no such file; legal: a file of weights, or null, the best"),
        ({"ddlp_ckpt": "other.pth"}, "other.pth: does not fit the configuration's ObjectDynamicsDLP: lacks logvar_kp"),
        (
            {"diffuse_frames": 15},
            "the training clips of ds balls, diffuse_frames 15: sample_length: 15 frames are more than the 14 of",
        ),
        (
            {"batch_size": 34},
            r"batch_size is 34 on 1 process\(es\), but the training set has 33 items; legal: at most 33",
        ),
        ({"ds": "shapes"}, "the training clips of ds shapes, diffuse_frames 4: ds: the data set 'shapes' has no video"),
        ({"ds_root": "gone"}, "the training clips of ds balls, diffuse_frames 4: gone/train.hdf5 is missing; make it"),
        ({"result_dir": "gone"}, "gone: no such"),
        ({"result_dir": "."}, r"\.: not a run directory of DiffuseDDLP"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(changes, message, ddlp, tmp_path, encodings):
    write(tmp_path, ddlp, **changes)
    checkpoints.save({}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        train(tmp_path, "-c", "small.json")
    assert encodings == [] and not list(tmp_path.glob("*_diffuse_ddlp"))


def test_what_decides_the_numbers_does_not_change_when_a_run_goes_on(trained, ddlp, tmp_path):
    before = (trained.path / "diffusion_hparams.json").read_text()
    with pytest.raises(UserError, match=f"--lr cannot change when a run goes on; legal: {', '.join(RESUMABLE)}"):
        train("/", "--resume", trained.path, "--lr", 0.1)
    write(tmp_path, ddlp, result_dir=str(trained.path), loss_type="l2")
    message = rf'loss_type is "l2", but "l1" in result_dir {re.escape(str(trained.path))}, and cannot change'
    with pytest.raises(UserError, match=message):
        train("/", "-c", tmp_path / "small.json")
    assert (trained.path / "diffusion_hparams.json").read_text() == before


def test_a_run_without_a_saved_state_does_not_go_on(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    (tmp_path / "run" / "saves" / "model.pth").unlink()
    with pytest.raises(UserError, match=r"cannot be resumed: no saves/model\.pth in it"):
        train("/", "--resume", tmp_path / "run")


def test_either_a_configuration_or_a_run(capsys):
    for arguments in ([], ["-c", "small.json", "--resume", "run"]):
        with pytest.raises(SystemExit):
            train_diffuse_ddlp.main(arguments)
        assert "give either -c/--config" in capsys.readouterr().err


def test_the_options_are_the_configurations_keys(capsys):
    with pytest.raises(SystemExit):
        train_diffuse_ddlp.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in BASE) and "--no_cache" in text
