"""Switches of training: accumulation, clipping, a moving average, compilation, trackers; and what is said meanwhile."""

import random
import re
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ema_pytorch import EMA
from torch.utils.data import DataLoader, Dataset

import train_ddlp
import train_dlp
from configs.schema import Config
from rundir.run import Run
from rundir.tracker import Tracker
from tests import runs
from tests.balls import SMALL
from tests.runs import SHAPES, assert_nearly_the_same_run
from training.batches import SeededItems, ShuffledBatches
from training.loop import TrainingLoop
from utils import checkpoints
from utils.device import make_accelerator
from utils.errors import UserError

train, resume = partial(runs.train, train_dlp.main), partial(runs.resume, train_dlp.main)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Epochs of four steps; its images are drawn once for all tests of this file."""
    return {**SHAPES, "root": str(tmp_path_factory.mktemp("shapes")), "num_epochs": 2, "eval_epoch_freq": 9}


# ------------------------------------------------------------------------------------------------------------ steps


def test_accumulated_batches_make_the_step_of_one_large_batch(config, tmp_path):
    """Where no noise is drawn; the norm is of the mean gradient."""
    with runs.without_noise():
        large = train(tmp_path / "large", config, grad_clip=100.0)
        small = train(tmp_path / "small", config, batch_size=2, gradient_accumulation_steps=2, grad_clip=100.0)
    assert [record["iteration"] for record in small.records()] == [4, 8]
    # But for the logarithm of a batch's mean error, and shares of what moves in a batch.
    assert_nearly_the_same_run(small, large, without=["psnr", "bg_share", "fg_share"])


def test_the_gradient_is_clipped(config, tmp_path, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def noting(optimizer, *arguments, **options):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    records = train(tmp_path, config, grad_clip=0.5).records()
    assert norms == pytest.approx([0.5] * 8, rel=1e-4) and all(record["grad_norm"] > 0.5 for record in records)


def test_a_moving_average_is_evaluated_saved_and_goes_on(config, tmp_path, monkeypatch):
    weights, step = [], TrainingLoop._step

    def noting(loop, batches):
        step(loop, batches)
        weights.append({name: value.clone() for name, value in loop.bare_model.state_dict().items()})

    monkeypatch.setattr(TrainingLoop, "_step", noting)
    monkeypatch.setattr("ema_pytorch.EMA.get_current_decay", lambda ema: ema.beta)
    monkeypatch.setattr("training.loop.EMA", partial(EMA, update_after_step=0))
    whole = train(tmp_path / "whole", config, ema=0.6)
    average = dict(weights[0])
    for later in weights[1:8]:
        average = {name: average[name].lerp(later[name], 0.4) for name in average}
    saved = checkpoints.load(whole.weights_path())
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(saved[name], whole.load_state()["model"][name])
    half = train(tmp_path / "half", config, ema=0.6, num_epochs=1)
    resume(half, num_epochs=2)
    runs.assert_same(half.load_state()["ema"], whole.load_state()["ema"], "ema")


def test_a_compiled_model_trains_to_the_same_weights_under_their_own_names(config, tmp_path, monkeypatch):
    compiled, compile_module = [], torch.nn.Module.compile

    def with_a_fast_compiler(module, *arguments, **options):
        compiled.append(module)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", with_a_fast_compiler)
    torch._dynamo.reset()
    plain = train(tmp_path / "plain", config, num_epochs=1)
    fast = train(tmp_path / "compiled", config, num_epochs=1, compile=True)
    assert len(compiled) == 1 and compiled[0]._compiled_call_impl is not None
    assert_nearly_the_same_run(fast, plain, 1e-3)


# ------------------------------------------------------------------------------------------------- data that is drawn


class Augmented(Dataset):
    """Of each item: its number, and what the three generators draw for it."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def augmented(num_workers=0, process=0, num_processes=1, step=0, epoch=0, seed=7):
    batches = ShuffledBatches(24, 3, seed, process, num_processes)
    batches.start_at(epoch, step, batches.num_steps - step)
    return list(DataLoader(SeededItems(Augmented(), seed), batch_sampler=batches, num_workers=num_workers))


def test_what_a_data_set_draws_depends_on_seed_epoch_and_place_alone():
    """Not on workers, on where training goes on, or on the number of processes."""
    whole = torch.stack(augmented())
    assert len(whole[..., 1:].unique()) == 3 * 24
    torch.rand(5)
    assert torch.equal(torch.stack(augmented(num_workers=2)), whole)
    assert torch.equal(torch.stack(augmented(num_workers=1, step=3)), whole[3:])
    shares = [torch.stack(augmented(process=process, num_processes=2)) for process in (0, 1)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole)
    for other in (augmented(epoch=1), augmented(seed=8)):
        assert len(torch.cat([torch.stack(other), whole])[..., 1:].unique()) == 2 * 3 * 24


# ------------------------------------------------------------------------------------------------ trackers, progress


def events(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(path), size_guidance={"images": 0, "scalars": 0})
    return accumulator.Reload()


def test_tensorboard_gets_numbers_figures_and_an_animation(tmp_path, balls_data):
    changes = {"root": balls_data, "tracker": "tensorboard", "train_size": 4, "val_size": 1}
    run = runs.train(train_ddlp.main, tmp_path, SMALL, figures=True, **changes)
    found = events(run.path / "tensorboard")
    for record in run.records():
        for name, value in record.items():
            values = {event.step: event.value for event in found.Scalars(name)}
            assert values[record["iteration"]] == pytest.approx(value, rel=1e-5), name
    assert {"image", "image_valid", "image_obj", "traj_anim"} <= set(found.Tags()["images"])
    animation = found.Images("traj_anim")[-1]
    assert animation.step == run.records()[-1]["iteration"]
    assert animation.encoded_image_string == (run.figures / "e1_traj_anim_0.gif").read_bytes()
    (graph,) = run.figures.glob("*_graph.jpg")  # with this record's losses
    assert found.Images(graph.stem)[-1].encoded_image_string == graph.read_bytes()
    assert '"ds": "balls"' in found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_the_same(name, tmp_path, monkeypatch):
    """A stand-in for the library notes what it is given."""
    given, options = [], {}
    tracker_run = SimpleNamespace(log=lambda values, step: given.append((step, values)), finish=lambda: None)
    library = SimpleNamespace(
        __spec__=SimpleNamespace(name=name),
        init=lambda **given_options: options.update(given_options) or tracker_run,
        Image=lambda path: ("image", path),
        Video=lambda path: ("video", path),
    )
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: True)
    run = Run(tmp_path, Config.from_dict(SMALL), "ddlp")
    run.tracker = Tracker(name, run, make_accelerator("cpu"), 7)
    run.figures.mkdir()
    run.save_figure("image_3", torch.zeros(3, 8, 8))
    run.track(run.figures / "e3_traj_anim_0.gif")
    run.hand_on({"epoch": 3, "iteration": 8, "loss": 0.5})
    assert options["name"] == tmp_path.name and options["resume"] == "allow" and options["config"]["ds"] == "balls"
    assert given == [
        (8, {"epoch": 3, "iteration": 8, "loss": 0.5}),
        (8, {"image": ("image", str(run.figures / "image_3.jpg"))}),
        (8, {"traj_anim": ("video", str(run.figures / "e3_traj_anim_0.gif"))}),
    ]


def test_a_tracker_that_is_not_installed_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="tracker is wandb, which is not installed; legal: pip install wandb, or null"):
        train(tmp_path, config, tracker="wandb")
    assert not list(tmp_path.glob("*_dlp"))


def test_speed_memory_and_the_time_left_are_said(config, tmp_path):
    run = train(tmp_path, config, gradient_accumulation_steps=2, batch_size=2)
    for record in run.records():
        assert record["images_per_second"] == pytest.approx(4 * record["steps_per_second"])
        assert 0.05 < record["memory_gb"] < 50
    lines = [line for line in (run.path / "log.txt").read_text().splitlines() if line.startswith("epoch ")]
    assert re.search(r" time left \d\d:\d\d$", lines[0]) and "time left" not in lines[1]
