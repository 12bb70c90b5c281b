"""The doctor for training: its numbers against independent ones, and what it says of healthy runs and of runs that were
made sick on purpose."""

import itertools
import re

import numpy as np
import pytest
import torch

import train_dlp
from configs.schema import Config, DiffuseConfig
from modules.modules import Background
from rundir.run import Run
from tests.balls import ROOT
from tests.runs import SHAPES, train
from training.diagnosis import diagnose, training_health

CONFIG = Config(ds="balls", n_kp_enc=6, warmup_epoch=1)
HEALTHY = {
    "visible": 4.0,
    "scale": 0.25,
    "scale_at_bounds": 0.01,
    "bg_share": 0.1,
    "fg_share": 0.9,
    "loss_rec": 50.0,
    "loss": 60.0,
}


def said(*changes, config=CONFIG):
    """What is said of epochs of `HEALTHY` with these changes, after the noisy epoch: the sections, per epoch."""
    records = [{**HEALTHY, **change, "epoch": 2 + i} for i, change in enumerate(changes)]
    lines = [diagnose(records[: end + 1], config) for end in range(len(records))]
    assert all(line.startswith("diagnosis: ") and line.isprintable() for each in lines for line in each)
    return [[line.rpartition("#")[2] for line in each] for each in lines]


# ---------------------------------------------------------------------------------------------------------- the numbers


def output_of(x, bg, rec, obj_on, scale):
    shape = x.reshape(-1, *x.shape[-3:]).shape  # the models put time into the batch
    return {
        "obj_on": torch.tensor(obj_on),
        "obj_on_a": torch.full((2, 3), 4.0),
        "obj_on_b": torch.full((2, 3), 2.0),
        "z_scale": torch.logit(torch.tensor(scale))[..., None].expand(2, 3, 2),
        "bg": torch.as_tensor(bg, dtype=torch.float32).reshape(shape),
        "rec": torch.as_tensor(rec, dtype=torch.float32).reshape(shape),
    }


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5, 3, 4, 4)])
def test_the_numbers(shape):
    generator = np.random.default_rng(0)
    x = generator.random(shape)
    bg, rec = 0.7 * x + 0.3 * generator.random(shape), 0.9 * x + 0.1 * generator.random(shape)
    scale = [[0.01, 0.25, 0.96], [0.5, 0.25, 0.97]]
    health = training_health(
        torch.tensor(x, dtype=torch.float32),
        output_of(x, bg, rec, [[0.9, 0.4, 0.6], [0.1, 0.2, 0.7]], scale),
    )
    change = (lambda y: y[:, 1:] - y[:, :-1]) if len(shape) == 5 else (lambda y: y - y.mean(0))
    expected = {
        "visible": 1.5,
        "beta_a": 4,
        "beta_b": 2,
        "scale": np.mean(scale),
        "scale_at_bounds": 0.5,
        "bg_share": 1 - ((change(x) - change(bg)) ** 2).sum() / (change(x) ** 2).sum(),
        "fg_share": 1 - ((x - rec) ** 2).sum() / ((x - bg) ** 2).sum(),
    }
    assert {name: value.item() for name, value in health.items()} == pytest.approx(expected, rel=1e-4)
    assert 0.4 < expected["bg_share"] < 0.95 and 0.4 < expected["fg_share"] < 0.95


def test_what_does_not_change_has_no_share():
    x = torch.full((2, 3, 4, 4), 0.5)
    health = training_health(x, output_of(x, x, x, [[0.0] * 3] * 2, [[0.5] * 3] * 2))
    assert health["bg_share"] == health["fg_share"] == 0


def test_what_is_drawn_worse_than_not_at_all_has_no_share():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    health = training_health(x, output_of(x, 3 * x, 9 * x, [[0.0] * 3] * 2, [[0.5] * 3] * 2))
    assert health["bg_share"] == health["fg_share"] == 0


def test_the_shipped_model_draws_what_moves_with_its_particles():
    run = Run.open(ROOT / "checkpoints" / "ddlp-balls")
    frames = [np.asarray(_image(ROOT / "assets" / "balls" / "0" / f"{i}.png")) for i in range(1, 12)]
    x = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None].float() / 255
    with torch.no_grad():
        output = run.load_model()(x, deterministic=True)
    health = {name: value.item() for name, value in training_health(x, output).items()}
    assert health["bg_share"] < 0.1 and health["fg_share"] > 0.8 and 1 <= health["visible"] <= run.config.n_kp_enc
    records = [{**HEALTHY, **health, "epoch": run.config.warmup_epoch + 1}]
    assert diagnose(records, run.config) == []


def _image(path):
    from PIL import Image

    return Image.open(path).convert("RGB")


# --------------------------------------------------------------------------------------------------------- what is said


def test_a_healthy_run_is_told_nothing():
    assert said({}, {}, {"loss_rec": 60.0}, {"bg_share": 0.9}, {"fg_share": 0.1}) == [[]] * 5


def test_an_error_that_sums_more_since_the_dynamics_are_trained_does_not_grow():
    """As in a run of one's own videos, whose sums rose from 79 to 315 there, at the same PSNR."""
    config = CONFIG.replace(start_dyn_epoch=4, dyn_only_epoch=7)
    errors = [95, 79, 315, 300, 290, 900, 880, 870]
    assert said(*({"loss_rec": float(error)} for error in errors), config=config) == [[]] * 8
    errors[3:5] = 500, 510
    assert said(*({"loss_rec": float(error)} for error in errors), config=config)[4] == ["the-loss-grows"]


def test_records_of_an_older_version_are_passed_over():
    """A run that goes on has them: fewer numbers of health, and null where one was not finite."""
    old = {"visible": 0.0, "scale": 0.25, "loss_rec": None, "psnr": None, "epoch": 2}
    assert diagnose([old], CONFIG) == []
    new = {**HEALTHY, "visible": 0.0, "epoch": 3}
    assert ["no-particle-is-visible" in line for line in diagnose([old, new], CONFIG)] == [True]


@pytest.mark.parametrize(
    ("change", "section"),
    [
        ({"visible": 0.2}, "no-particle-is-visible"),
        ({"bg_share": 0.9, "fg_share": 0.1}, "the-background-draws-what-moves"),
        ({"scale_at_bounds": 0.6, "scale": 0.99}, "a-scale-is-at-its-bounds"),
    ],
)
def test_a_sickness_is_said_once_and_again_when_it_comes_back(change, section):
    assert said({}, change, change, {}, change) == [[], [section], [], [], [section]]


def test_some_sicknesses_have_to_last():
    everything, grown, much = {"visible": 5.99}, {"loss_rec": 76.0}, {"loss_rec": 74.0}
    section = "all-particles-are-always-visible"
    assert said(everything, everything, everything, everything) == [[], [], [section], []]
    assert said(everything, everything, {}, everything, everything) == [[]] * 5
    assert said({}, grown, grown, grown) == [[], [], ["the-loss-grows"], []]
    assert said({}, grown, {}, grown) == said({}, much, much, much) == [[]] * 4


def test_warm_up_and_the_noisy_epoch_are_not_judged():
    records = [{**HEALTHY, "visible": 0.0, "epoch": epoch} for epoch in range(3)]
    assert [len(diagnose(records[:end], CONFIG)) for end in (1, 2, 3)] == [0, 0, 1]


def test_the_dynamics_alone_have_no_particles_to_judge():
    assert diagnose([{"epoch": 5, "loss": 3.0, "kl_dyn": 3.0}], CONFIG) == []


def test_a_diffusion_s_loss_that_grows():
    config = DiffuseConfig(ds="balls", ddlp_dir="run")
    records = [{"epoch": 0, "step": step, "loss": loss} for step, loss in ((1, 0.4), (2, 0.2), (3, 0.31), (4, 0.32))]
    lines = [diagnose(records[:end], config) for end in range(1, 5)]
    assert lines[:3] == [[]] * 3 and lines[3][0].startswith(
        "diagnosis: loss grows (0.32, it was 0.2): lower lr (8e-05)"
    )


def test_every_section_is_in_the_faq():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.*)$", text, re.MULTILINE)}
    code = (ROOT / "training" / "diagnosis.py").read_text(encoding="utf-8")
    sections = set(re.findall(r'found\["([a-z-]+)"\]', code))
    assert len(sections) == 5 and sections <= anchors


# ------------------------------------------------------------------------------------------ runs made sick on purpose

# Three steps an epoch, without warm-up, learning fast.
SICK = {
    **SHAPES,
    "lr": 2e-2,
    "adam_eps": 1e-8,
    "num_epochs": 4,
    "train_size": 12,
    "val_size": 2,
    "warmup_epoch": 0,
    "save_every": 1000,
    "eval_epoch_freq": 100,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return str(tmp_path_factory.mktemp("shapes"))


def diagnoses(run):
    """The sections that a run's log names."""
    return re.findall(r"^diagnosis: .*; see docs/faq.md#(.*)$", (run.path / "log.txt").read_text(), re.MULTILINE)


def test_a_prior_without_particles(tmp_path, shapes):
    run = train(train_dlp.main, tmp_path, SICK, root=shapes, obj_on_alpha=0.01, obj_on_beta=50.0, beta_kl=100.0)
    assert "no-particle-is-visible" in diagnoses(run)


def test_a_prior_of_particles_only(tmp_path, shapes):
    changes = {"obj_on_alpha": 50.0, "obj_on_beta": 0.01, "beta_kl": 100.0, "lr": 1e-2, "num_epochs": 6}
    run = train(train_dlp.main, tmp_path, SICK, root=shapes, **changes)
    assert "all-particles-are-always-visible" in diagnoses(run)


def test_a_prior_of_scales_without_bounds(tmp_path, shapes):
    run = train(train_dlp.main, tmp_path, SICK, root=shapes, scale_std=30.0, beta_kl=100.0, num_epochs=3)
    assert "a-scale-is-at-its-bounds" in diagnoses(run)


def copying_background(monkeypatch, error=lambda: 0.05):
    """Backgrounds draw what they see, with this error."""
    encode, decode = Background.encode, Background.decode

    def remember(self, x, mask):
        self.seen = x
        return encode(self, x, mask)

    def copy(self, z_bg):
        return self.seen + error() + 0 * decode(self, z_bg)

    monkeypatch.setattr(Background, "encode", remember)
    monkeypatch.setattr(Background, "decode", copy)


def test_a_background_that_draws_everything(tmp_path, shapes, monkeypatch):
    copying_background(monkeypatch)
    run = train(train_dlp.main, tmp_path, SICK, root=shapes, num_epochs=2)
    assert "the-background-draws-what-moves" in diagnoses(run)


def test_a_loss_that_grows(tmp_path, shapes, monkeypatch):
    steps = itertools.count()
    copying_background(monkeypatch, lambda: (1 + next(steps)) / 20)
    run = train(train_dlp.main, tmp_path, SICK, root=shapes, lr=1e-6)
    assert "the-loss-grows" in diagnoses(run)
