"""Training DiffuseDDLP through its command: particles and their statistics, steps, moving average, exact resume."""

import json
import os
import re
import shutil
import signal
from functools import partial
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
from modules.diffusion_modules import ParticleNormalization
from rundir import load_model
from rundir.diffusion_run import DiffusionRun
from rundir.run import Run
from tests import golden, runs
from tests.balls import SMALL, make_run
from tests.runs import DIFFUSION, assert_same, assert_same_run, before, no_figures, the_run
from training.diffusion import DiffusionTask, sample_grid
from training.loop import TrainingError, TrainingLoop
from utils import checkpoints
from utils.animation import generated_panel, side_by_side
from utils.device import make_accelerator
from utils.errors import UserError
from utils.plotting import loss_graph

train, resume = partial(runs.train, train_diffuse_ddlp.main), partial(runs.resume, train_diffuse_ddlp.main)
CLIPS, FRAMES, STEPS, STOP = 33, DIFFUSION["diffuse_frames"], DIFFUSION["train_num_steps"], 115
# The correlation maps' norm is the whole batch's: without them a clip's particles are its own.
INDEPENDENT = {"use_correlation_heatmaps": False}
STATISTICS = {name + suffix for name in ("mu", "std", "min_val", "max_val") for suffix in ("", "_bg")}


@pytest.fixture(scope="module")
def ddlp(tmp_path_factory, balls_data):
    return make_run(tmp_path_factory.mktemp("ddlp"), balls_data, **INDEPENDENT)


@pytest.fixture(scope="module")
def config(ddlp):
    return {**DIFFUSION, "ds_root": ddlp.config.root, "ddlp_dir": str(ddlp.path)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config):
    """A run of 130 steps that was never stopped."""
    return train(tmp_path_factory.mktemp("trained"), config, figures=True)


def new_loop(folder, ddlp, **changes):
    """A training loop and its new run."""
    config = DiffuseConfig.from_dict({**DIFFUSION, "ds_root": ddlp.config.root, "ddlp_dir": str(ddlp.path), **changes})
    accelerator = make_accelerator("cpu")
    task = DiffusionTask(config, ddlp.config, Run.open(ddlp.path).load_model(), accelerator)
    loop = TrainingLoop(task, config, accelerator, "resume")
    statistics = task.diffuse_ddlp.normalization, task.identity
    loop.run = DiffusionRun.create(config, ddlp.config, accelerator, ddlp.find_weights(), *statistics, folder)
    return loop


def fit(loop):
    """Train to the end without figures. Returns the run."""
    with no_figures():
        assert loop.fit(loop.run)
    return loop.run


def plain_tokens(ddlp):
    """The tokens of all training clips, encoded one by one."""
    videos = get_video_dataset("balls", ddlp.config.root, FRAMES, "train", 32)
    config = DiffuseConfig.from_dict({**DIFFUSION, "ddlp_dir": str(ddlp.path)})
    model = DiffuseDDLP.from_config(config, ddlp.config, Run.open(ddlp.path).load_model())
    return torch.cat([model.encode(videos[i][0][None])[0] for i in range(len(videos))]), model.layout


# ---- the run directory


def test_the_run_directory_holds_what_training_promises(trained):
    names = {str(path.relative_to(trained.path)) for path in trained.path.rglob("*") if path.is_file()}
    figures = {f"figures/sample_{step}{end}" for step in (50, 100, 130) for end in (".jpg", "_traj_anim.gif")}
    hparams = {"diffusion_hparams.json", "ddlp_hparams.json", "balls_ddlp.pth", "latent_stats.pth", "latent_stats.json"}
    others = {".lock", "log.txt", "metrics.jsonl", "figures/balls_diffuse_ddlp_graph.jpg"}
    assert names == figures | hparams | others | {"saves/model.pth"}
    assert trained.config.result_dir is None
    records = trained.records()
    assert [(record["step"], record["epoch"]) for record in records] == [(50, 6), (100, 12), (130, 16)]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 and record["steps_per_second"] > 0 for record in records)
    log = (trained.path / "log.txt").read_text()
    assert all(log.count(f" step {step} ") == 1 for step in (50, 100, 130))
    hparams = json.loads((trained.path / "diffusion_hparams.json").read_text())
    assert hparams["kind"] == "diffuse_ddlp" and hparams["lr"] == DIFFUSION["lr"]


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
    assert list(state) == ["step", "model", "opt", "ema", "scaler", "training"]
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
    model, ema = load_model(trained.path), trained.load_state()["ema"]
    assert isinstance(model, DiffuseDDLP) and not any(module.training for module in model.modules())
    assert all(torch.equal(value, ema[f"ema_model.{name}"]) for name, value in model.diffusion.state_dict().items())
    assert model.sample(2, FRAMES + 1).shape == (2, FRAMES + 1, 3, 32, 32)


def test_training_starts_from_the_moving_average_of_trained_weights(trained, config, tmp_path):
    start = {"load_model": True, "pretrained_path": str(tmp_path / "start.pth")}
    shutil.copy(trained.state_path, tmp_path / "start.pth")
    run = train(tmp_path, config, **start, train_num_steps=2, lr=1e-12)  # which moves no weight
    expected, found = trained.load_model().diffusion.state_dict(), run.load_state()
    torch.testing.assert_close(found["model"], expected, rtol=0, atol=1e-10)
    averages = {name: found["ema"][f"ema_model.{name}"] for name in expected}
    torch.testing.assert_close(averages, expected, rtol=0, atol=1e-10)
    trained_weights = trained.load_state()["model"]
    assert any((value - trained_weights[name]).abs().max() > 1e-4 for name, value in expected.items())
    (tmp_path / "start.pth").unlink()  # a run that goes on takes its own weights
    resume(run, train_num_steps=4)
    torch.testing.assert_close(run.load_state()["model"], expected, rtol=0, atol=1e-10)


def test_a_new_run_keeps_the_padding_of_samples_at_0_and_an_older_one_does_not(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    path = tmp_path / "run" / "diffusion_hparams.json"
    hparams = json.loads(path.read_text())
    assert hparams.pop("mask_samples") and trained.load_model().sampling_mask is not None
    path.write_text(json.dumps(hparams))
    assert load_model(tmp_path / "run").sampling_mask is None


def test_the_samples_are_those_of_the_moving_average(trained):
    videos = trained.load_model().sample(5, SMALL["animation_horizon"], seed=DIFFUSION["seed"])
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
    files = sorted((Path(ddlp.config.root) / ".cache").glob("*.npy"))
    arrays = [array for array in map(np.load, files) if array.shape[1:] == tokens.shape[1:]]
    assert [len(array) for array in arrays] == [32, CLIPS - 32]
    array = np.concatenate(arrays)
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
    made, losses = [], {False: [], True: []}
    for on_the_fly in (False, True):
        loop = new_loop(tmp_path / str(on_the_fly), ddlp, train_num_steps=8, encode_on_the_fly=on_the_fly)
        loop.task.losses = noting(loop.task.losses, losses[on_the_fly])
        made.append(fit(loop))
    first, second = (checkpoints.load(run.stats_path) for run in made)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert len(losses[True]) == 8 and losses[True] == pytest.approx(losses[False], rel=1e-4)
    first, second = (run.load_state()["model"] for run in made)
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
    new_loop(folder, ddlp, **changes)
    return sum(encodings)


def test_particles_are_encoded_once(own_data, tmp_path, encodings):
    loop = new_loop(tmp_path, own_data, train_num_steps=9)
    assert sum(encodings) == CLIPS
    run = fit(loop)
    resume(run, train_num_steps=10)
    assert sum(encodings) == CLIPS
    assert encoded_clips(tmp_path, own_data, encodings, seed=4, particle_norm="std", batch_size=5) == 0
    cache = tmp_path / "data" / ".cache"
    kept = sorted(cache.glob("*.npy"))[0]
    first = kept.read_bytes()
    assert encoded_clips(tmp_path, own_data, encodings, diffuse_frames=3) == CLIPS + 3
    other = make_run(tmp_path / "other", own_data.config.root, seed=1, **INDEPENDENT)
    assert encoded_clips(tmp_path, other, encodings) == CLIPS
    assert len(list(cache.glob("*.npy"))) == 2 * 3 and kept.read_bytes() == first
    kept.write_bytes(first[:-4])  # truncated
    assert encoded_clips(tmp_path, own_data, encodings) == 32 and kept.read_bytes() == first
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
        tmp_path / "recording.npy", "traffic", {}, tokens.shape, lambda part: iter(tokens.split(2)), ""
    )
    assert [path.parent for path in kept.paths] == [tmp_path / ".cache"]
    assert all(torch.equal(kept[i][0], tokens[i]) for i in range(3))


def test_what_is_kept_is_whole(own_data, tmp_path, monkeypatch):
    def encode(task, which):
        yield torch.zeros(8, FRAMES, 5, 8)
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionTask, "_encode", encode)
    with pytest.raises(KeyboardInterrupt):
        new_loop(tmp_path, own_data)
    names = [path.name for path in (tmp_path / "data" / ".cache").iterdir()]
    assert len(names) == 1 and names[0].endswith(".lock")
    assert not list(tmp_path.glob("*_diffuse_ddlp"))


def test_room_on_the_disk_is_checked_first(own_data, tmp_path, monkeypatch, encodings):
    monkeypatch.setattr(frame_cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9e9, 9e9, 1e4))
    with pytest.raises(UserError, match=r"/data/.cache: .*clips of balls .* are free; .*encode_on_the_fly true"):
        new_loop(tmp_path, own_data)
    assert encodings == []


def test_of_several_processes_each_begins_with_another_file(tmp_path):
    tokens, made = torch.rand(100, 2, 3, 4), []

    def encode(which):
        made.append(which)
        yield tokens[which.start : which.stop]

    # One of two processes alone: it begins in the middle, and does the other's share too, which is not done.
    one = particle_cache.cached_tokens(tmp_path, "toy", {}, tokens.shape, encode, "", 1, 2)
    assert made == [range(64, 96), range(96, 100), range(32), range(32, 64)]
    other = particle_cache.cached_tokens(tmp_path, "toy", {}, tokens.shape, encode, "", 0, 2)
    assert len(made) == 4 and len(one) == len(other) == 100
    assert all(torch.equal(each[i][0], tokens[i]) for i in range(100) for each in (one, other))
    assert torch.equal(torch.cat(list(one.blocks())), tokens) and max(map(len, one.blocks())) == 32
    with pytest.raises(IndexError):
        one[100]


def test_statistics_that_processes_share_are_those_of_all():
    shares = [torch.randn(n, 2, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 2)]
    whole, merged = (ParticleNormalization(2, 2) for _ in range(2))
    whole.fit(shares)
    parts = []
    for share in (shares[:1], [], shares[1:]):  # the second process has none
        ParticleNormalization(2, 2).fit(share, lambda mine: parts.append(mine) or [mine, *parts[:1]])
    merged.fit(shares[:1], lambda mine: parts)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)


def test_the_weights_hash_is_of_names_and_values():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())

    def sha256(module):
        return checkpoints.weights_sha256(module.state_dict())

    assert sha256(first) == sha256(second) and len(sha256(first)) == 64
    with torch.no_grad():
        second.bias[1] += 1e-6
    assert sha256(first) != sha256(second)
    assert sha256(torch.nn.ModuleList([first])) != sha256(first)


# ---- resuming


@pytest.fixture
def stopped(tmp_path, config, monkeypatch, capsys):
    """A run that was stopped between two saves, after the moving average has begun."""
    with monkeypatch.context() as patched:
        before(patched, "_step", STOP - 1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            train(tmp_path, config)
    run = the_run(tmp_path)
    line = f"stopped at epoch 14, iteration {STOP}; go on with: python train_diffuse_ddlp.py --resume {run.path.name}"
    assert line in capsys.readouterr().out
    assert checkpoints.load(run.state_path)["step"] == STOP
    return run


@pytest.mark.parametrize("way", ["--resume", "result_dir"])
def test_a_resumed_run_equals_one_never_stopped(way, stopped, trained, tmp_path, config, capsys):
    if way == "--resume":
        resume(stopped)
    else:
        relative = os.path.relpath(config["ddlp_dir"], tmp_path)
        train(tmp_path, config, result_dir=stopped.path.name, ddlp_dir=relative, num_workers=1)
    assert f"resumed at epoch 14, iteration {STOP}" in capsys.readouterr().out
    assert_same_run(stopped, trained)
    assert DiffusionRun.open(stopped.path).config.result_dir is None


def test_more_steps_than_at_first(config, trained, tmp_path, capsys):
    run = train(tmp_path, config, train_num_steps=50)
    resume(run)
    assert "all 50 steps are done; more: --train_num_steps" in capsys.readouterr().out
    resume(run, train_num_steps=STEPS)
    assert_same_run(run, trained)


def test_the_learning_rate_falls_after_every_interval(config, tmp_path):
    falling = {**config, "scheduler_gamma": 0.5}
    whole = train(tmp_path / "whole", falling, train_num_steps=150)
    rates = [row["lr"] for row in whole.records()]
    assert rates == pytest.approx([config["lr"], config["lr"] / 2, config["lr"] / 4])
    part = train(tmp_path / "part", falling, train_num_steps=50)
    resume(part, train_num_steps=150)
    assert_same_run(part, whole)


@pytest.mark.parametrize("step", [50, STEPS])
def test_samples_that_could_not_be_drawn_are_drawn_when_the_run_goes_on(step, config, trained, tmp_path, monkeypatch):
    def fail():
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        before(patched, "_evaluate", step, fail)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, config)
    run = the_run(tmp_path)
    assert run.load_state()["progress"]["iteration"] == step and all(row["step"] < step for row in run.records())
    drawn, evaluate = [], TrainingLoop._evaluate
    monkeypatch.setattr(TrainingLoop, "_evaluate", lambda loop: drawn.append(loop.progress.iteration) or evaluate(loop))
    resume(run)
    assert drawn == [each for each in (50, 100, STEPS) if each >= step]
    assert_same_run(run, trained)


def test_drawing_samples_leaves_training_as_it_is(trained, config, tmp_path):
    """`trained` drew some, at other steps."""
    run = train(tmp_path, config, save_and_sample_every=1000)
    for name in ("model", "optimizer", "ema"):
        assert_same(run.load_state()[name], trained.load_state()[name], name)


def as_published(run, folder):
    """A copy of a run that has only what published directories have."""
    shutil.copytree(run.path, folder)
    for name in ("latent_stats.json", "metrics.jsonl", "log.txt"):
        (folder / name).unlink()
    copy = DiffusionRun.open(folder)
    state = checkpoints.load(copy.state_path)
    del state["training"]
    checkpoints.save(state, copy.state_path)
    hparams = json.loads((folder / "diffusion_hparams.json").read_text())
    del hparams["kind"]
    (folder / "diffusion_hparams.json").write_text(json.dumps(hparams))
    return copy


def test_a_published_directory_goes_on(stopped, trained, tmp_path):
    """It lacks sums and best scores, but what the next steps draw follows from the seed and the step."""
    run = as_published(stopped, tmp_path / "published")
    torch.rand(7)
    resume(run)
    assert f"resumed at epoch 14, iteration {STOP}" in (run.path / "log.txt").read_text()
    for name in ("model", "optimizer", "ema", "progress"):
        assert_same(run.load_state()[name], trained.load_state()[name], name)


@pytest.mark.parametrize(
    ("key", "value"), [("ddlp_sha256", "0" * 64), ("ds", "obj3d"), ("diffuse_frames", 3), ("clips", 34)]
)
def test_statistics_of_others_are_refused(key, value, trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    path = tmp_path / "run" / "latent_stats.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=f"latent_stats.json: .*other particles: {key} is {json.dumps(value)}, .*legal"):
        resume(DiffusionRun.open(tmp_path / "run"))
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"latent_stats\.json: not a JSON object"):
        resume(DiffusionRun.open(tmp_path / "run"))


def test_another_ddlp_in_the_run_directory_is_refused(trained, tmp_path, ddlp):
    shutil.copytree(trained.path, tmp_path / "run")
    other = make_run(tmp_path, ddlp.config.root, seed=1, **INDEPENDENT)
    shutil.copy(other.weights_path(), tmp_path / "run" / "balls_ddlp.pth")
    with pytest.raises(UserError, match="other particles: ddlp_sha256 is"):
        resume(DiffusionRun.open(tmp_path / "run"))


@pytest.mark.parametrize(("entry", "words"), [("model", "(model)"), ("opt", "optimiser"), ("ema", "(ema)")])
def test_a_state_that_does_not_fit_is_refused(entry, words, trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    run = DiffusionRun.open(tmp_path / "run")
    state = checkpoints.load(run.state_path)
    if entry == "opt":
        state["opt"]["state"][0]["exp_avg"] = torch.zeros(3)
    else:
        state[entry].popitem()
    checkpoints.save(state, run.state_path)
    with pytest.raises(UserError, match=rf"model.pth .*{re.escape(words)}.*: does not fit"):
        resume(run)


# ---- the arithmetic of a step


def test_the_moving_average_is_the_published_one(ddlp, tmp_path, monkeypatch):
    """A copy up to step 100; then every tenth step with a decay of 1 - (1 + n)^(-2/3), n steps later, at most beta."""
    weights, step = [], TrainingLoop._step

    def noting_weights(loop, batch):
        step(loop, batch)
        weights.append({name: p.detach().clone() for name, p in loop.bare_model.named_parameters()})

    monkeypatch.setattr(TrainingLoop, "_step", noting_weights)
    loop = new_loop(tmp_path, ddlp, train_num_steps=145, save_and_sample_every=1000, ema_decay=0.88)
    run = fit(loop)
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
    loop = new_loop(tmp_path, ddlp)
    loop.model.train()
    parameters = list(loop.bare_model.parameters())
    start = [p.detach().clone() for p in parameters]
    loop._step([next(iter(loop._make_loader()))])
    assert torch.cat([p.grad.flatten() for p in parameters]).norm() == pytest.approx(1, abs=1e-4)
    assert loop.means.read(loop.accelerator)[0]["grad_norm"] > 10
    for first, parameter in zip(start, parameters, strict=True):
        expected = first - DIFFUSION["lr"] * parameter.grad / (parameter.grad.abs() + 1e-8)  # Adam's first step
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in loop.task.diffuse_ddlp.ddlp.parameters())


def test_samples_are_drawn_with_the_moving_average(ddlp, tmp_path, monkeypatch):
    """Which is in the model's place only for a while, whatever happens."""
    loop, drawn = new_loop(tmp_path, ddlp), []

    def sample(model, count, horizon, seed, **others):
        drawn.append((model.diffusion, model.diffusion.training, count, horizon, seed))
        raise ZeroDivisionError

    monkeypatch.setattr(DiffuseDDLP, "sample", sample)
    with pytest.raises(ZeroDivisionError):
        loop._evaluate()
    assert drawn == [(loop.ema.ema_model, False, 5, SMALL["animation_horizon"], DIFFUSION["seed"])]
    assert loop.task.diffuse_ddlp.diffusion is loop.bare_model


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 160), ({"particle_norm": "std", "loss_type": "l2"}, 160), ({"denoiser": "unet"}, 24)],
    ids=["pint", "std", "unet"],
)
def test_the_loss_falls(changes, steps, ddlp, tmp_path):
    changes = {"lr": 5e-3, "train_num_steps": steps, "save_and_sample_every": steps // 4, **changes}
    losses = [record["loss"] for record in fit(new_loop(tmp_path, ddlp, **changes)).records()]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]


@pytest.fixture
def poisoned(ddlp, tmp_path):
    loop = new_loop(tmp_path, ddlp, train_num_steps=30, save_and_sample_every=5)
    yield loop
    state = loop.run.load_state()
    assert state["progress"]["iteration"] == 5 and all(value.isfinite().all() for value in state["model"].values())


def test_training_stops_at_a_loss_that_is_not_finite(poisoned):
    losses = poisoned.task.losses

    def nan_at_8(model, batch, progress):
        factor = float("nan") if progress.iteration == 7 else 1.0
        return {"loss": factor * losses(model, batch, progress)["loss"]}

    poisoned.task.losses = nan_at_8
    with pytest.raises(TrainingError, match=r"loss is nan, grad_norm is nan at iteration 8 .*last good checkpoint"):
        fit(poisoned)


def test_weights_that_are_not_finite_are_not_saved(poisoned):
    def inf_at_10():
        if poisoned.progress.iteration == 9:
            torch.nn.init.constant_(poisoned.bare_model.model.particle_decoder[-1].bias, float("inf"))

    poisoned.ema.update = inf_at_10
    with pytest.raises(TrainingError, match=r"model\.particle_decoder\.\d\.bias .*not finite .*iteration 10; .*good"):
        fit(poisoned)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ddlp_dir": "gone"}, "ddlp_dir is gone: no such folder; legal: "),
        ({"ddlp_dir": "."}, r"no configuration of the DDLP; looked for hparams.json"),
        ({"ddlp_ckpt": "gone.pth"}, "ddlp_ckpt is gone.pth: no such file; legal: "),
        ({"ddlp_ckpt": "other.pth"}, "other.pth: holds an empty dict; legal: the weights of an? ObjectDynamicsDLP"),
        ({"diffuse_frames": 15}, "ds balls, diffuse_frames 15: .*15 frames are more than the 14 "),
        ({"batch_size": 34}, "batch_size is 34 .* 33 items; legal: at most 33"),
        ({"ds": "shapes"}, "ds shapes, diffuse_frames 4: .*has videos"),
        ({"ds_root": "gone"}, "ds balls, diffuse_frames 4: gone/train.hdf5 is missing"),
        ({"load_model": True}, "pretrained_path is null; legal: the path of a file of weights"),
        ({"load_model": True, "pretrained_path": "gone.pth"}, "gone.pth: no such checkpoint file"),
        ({"load_model": True, "pretrained_path": "other.pth"}, "other.pth: not a model.pth of DiffuseDDLP: lacks step"),
        ({"result_dir": "gone"}, "gone: no such"),
        ({"result_dir": "."}, r"\.: not a run directory of DiffuseDDLP"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(changes, message, config, tmp_path, encodings):
    checkpoints.save({}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        train(tmp_path, config, **changes)
    assert encodings == [] and not list(tmp_path.glob("*_diffuse_ddlp"))


def test_what_decides_the_numbers_does_not_change_when_a_run_goes_on(trained, config, tmp_path):
    hparams = trained.path / "diffusion_hparams.json"
    text = hparams.read_text()
    with pytest.raises(UserError, match=r"lr is 0.1; legal: 0.001, .*train_num_steps.*save_and_sample_every"):
        resume(trained, lr=0.1)
    with pytest.raises(UserError, match=r"loss_type is .l2.; legal: 'l1', .*train_num_steps"):
        train(tmp_path, config, result_dir=str(trained.path), loss_type="l2")
    assert hparams.read_text() == text


def test_a_run_without_a_saved_state_does_not_go_on(trained, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run")
    (tmp_path / "run" / "saves" / "model.pth").unlink()
    with pytest.raises(UserError, match=r"cannot be resumed: no saves/model\.pth"):
        resume(DiffusionRun.open(tmp_path / "run"))


def test_either_a_configuration_or_a_run(capsys):
    for arguments in ([], ["-c", "small.json", "--resume", "run"]):
        with pytest.raises(SystemExit):
            train_diffuse_ddlp.main(arguments)
        assert "give either -c/--config" in capsys.readouterr().err


def test_the_options_are_the_configurations_keys(capsys):
    with pytest.raises(SystemExit):
        train_diffuse_ddlp.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in vars(DiffuseConfig.load("diffuse_ddlp"))) and "--no_cache" in text
