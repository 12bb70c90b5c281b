"""Devices: which one is chosen, nothing stays on another, and on a GPU the same numbers as on the CPU."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from configs.schema import Config
from eval.eval_gen_metrics import eval_ddlp_im_metric
from models import ObjectDLP, ObjectDynamicsDLP
from rundir import load_model
from tests.balls import SMALL, make_run
from train_ddlp import train_ddlp
from utils.device import check_device, make_accelerator
from utils.errors import UserError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest --gpu on a machine with one")


@pytest.fixture
def fresh_accelerate():
    """accelerate remembers the first device that it was asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_cuda_means_the_cpu_where_there_is_none(monkeypatch, fresh_accelerate):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # an accelerator of another make
    assert [check_device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu"] * 3
    assert make_accelerator("cuda").device.type == "cpu"
    assert not PartialState().distributed_type.startswith("MULTI")


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [check_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name, words in {"cuda:2": "cuda:0 to cuda:1", "gpu": "cuda:N", "mps": "cuda:N"}.items():
        with pytest.raises(UserError) as error:
            check_device(name)
        assert name in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_what_accelerate_is_told_elsewhere_is_refused(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as error:
        make_accelerator("cpu")
    assert variable.removeprefix("ACCELERATE_").lower() in str(error.value) and value.lower() in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"filtering_heuristic": "none"}, {"enable_enc_attn": True}], ids=str)
@pytest.mark.parametrize("stage", [{}, {"warmup": True, "noisy": True}], ids=["plain", "warmup"])
@pytest.mark.parametrize("kind", [ObjectDLP, ObjectDynamicsDLP])
def test_nothing_is_read_back_and_nothing_stays_elsewhere(kind, stage, changes, monkeypatch):
    """On the meta device every tensor has a shape and no values: a value that is read, or a tensor that was made on
    the CPU, raises."""
    # PyTorch draws Beta variables on real devices only.
    monkeypatch.setattr(torch, "_sample_dirichlet", torch.empty_like)
    monkeypatch.setattr(torch, "_dirichlet_grad", lambda x, *others: torch.empty_like(x))
    config = Config.from_dict({**SMALL, **changes})
    with torch.device("meta"):
        model = kind.from_config(config)
        size = config.image_size
        x = torch.empty(2, 3, size, size) if kind is ObjectDLP else torch.empty(2, 4, 3, size, size)
    loss = model.calc_elbo(x, model(x, **stage), **stage)["loss"]
    loss.backward()
    assert loss.device.type == "meta" and all(parameter.grad.device.type == "meta" for parameter in model.parameters())
    if kind is ObjectDynamicsDLP:
        assert model.sample(x, num_steps=3, cond_steps=2).shape == (2, 5, 3, size, size)


# ------------------------------------------------------------------------------------------------------- with a GPU


def write_config(folder, root, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**SMALL, "root": root, **changes}))
    return str(path)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_on_a_gpu_agrees_with_the_cpu(precision, balls_data, tmp_path, monkeypatch, fresh_accelerate):
    """The first losses of a run, whose noise differs from device to device, and that it goes on."""
    records = {}
    for device in ("cpu", "cuda"):
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / device).mkdir()
        monkeypatch.chdir(tmp_path / device)
        changes = {"device": device, "precision": precision, "dyn_only_epoch": 1}
        model = train_ddlp(write_config(tmp_path / device, balls_data, **changes))
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
        (run,) = (tmp_path / device).glob("*_balls_ddlp")
        records[device] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "loss_rec", "kl", "val_loss"):
        assert records["cuda"][0][name] == pytest.approx(records["cpu"][0][name], rel=0.05), name
    assert records["cuda"][1]["psnr"] == pytest.approx(records["cpu"][1]["psnr"], abs=0.5)


@needs_gpu
def test_predictions_and_metrics_on_a_gpu_are_those_of_the_cpu(balls_data, tmp_path):
    run = make_run(tmp_path, balls_data)
    video = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    here, there = load_model(run.path), load_model(run.path, "cuda")
    expected = here.sample(video, num_steps=4, cond_steps=3)
    found = there.sample(video.cuda(), num_steps=4, cond_steps=3).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    options = {"timestep_horizon": 6, "cond_steps": 3, "metrics": ("psnr", "ssim", "position"), "eval_dir": tmp_path}
    on_cpu, on_gpu = (
        eval_ddlp_im_metric(model, device, run.config, **options) for model, device in ((here, "cpu"), (there, "cuda"))
    )
    assert on_gpu == pytest.approx(on_cpu, rel=1e-2)
