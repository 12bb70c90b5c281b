"""Devices: which one is chosen, nothing stays on another, and on a GPU the same numbers as on the CPU."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import Config, DiffuseConfig
from eval.eval_gen_metrics import eval_ddlp_im_metric
from models import DiffuseDDLP, ObjectDLP, ObjectDynamicsDLP
from rundir import load_model
from tests.balls import SMALL, make_run
from tests.runs import DIFFUSION
from train_ddlp import train_ddlp
from training.loop import Progress
from training.particles import DDLPTask, DLPTask
from utils.device import (
    check_accelerate_settings,
    check_device,
    choose_kernels,
    cpu_has_bfloat16,
    describe_device,
    make_accelerator,
)
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
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_what_accelerate_is_told_elsewhere_is_refused(variable, value, monkeypatch, fresh_accelerate):
    """Unless the run's configuration says the same."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as error:
        check_accelerate_settings(Config.from_dict(SMALL))
    assert variable.removeprefix("ACCELERATE_").lower() in str(error.value) and value.lower() in str(error.value)
    same = {"precision": "bfloat16", "gradient_accumulation_steps": 4, "compile": True}
    if value != "fp16" and "FSDP" not in variable:
        check_accelerate_settings(Config.from_dict({**SMALL, **same}))
    accelerator = make_accelerator("cpu")  # does nothing of it by itself
    assert accelerator.mixed_precision == "no" and accelerator.state.dynamo_plugin.backend == "NO"


def test_kernels_are_chosen_and_stated_in_one_place(fresh_accelerate):
    accelerator = make_accelerator("cpu")
    for deterministic in (True, False):
        config = Config.from_dict({**SMALL, "deterministic": deterministic, "tf32": False})
        choose_kernels(config.tf32, config.deterministic, fixed_shapes=True)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.backends.cudnn.benchmark is not deterministic
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        line = "device: cpu, 1 process, float32, fused Adam" + deterministic * ", deterministic kernels"
        assert describe_device(accelerator, config) == line
    choose_kernels()
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cpu_has_it", [True, False])
def test_a_cpu_without_bfloat16_is_named_where_it_costs_time(precision, cpu_has_it, monkeypatch, fresh_accelerate):
    monkeypatch.setattr("utils.device.cpu_has_bfloat16", lambda: cpu_has_it)
    line = describe_device(make_accelerator("cpu"), Config.from_dict({**SMALL, "precision": precision}))
    assert ("slower than float32" in line) is (precision == "bfloat16" and not cpu_has_it)


def test_bfloat16_is_looked_for_in_the_cpu():
    """On x86, PyTorch's libraries compute with it from AVX-512 on; where there is AVX2 at most, they emulate it."""
    capability = torch.backends.cpu.get_cpu_capability()
    assert capability not in ("AVX2", "AVX512") or cpu_has_bfloat16() is (capability == "AVX512")


class Operations(TorchDispatchMode):
    """The names of the operations that are run in the context."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*arguments, **options or {})


# Of the operations that a GPU runs with additions in no fixed order, those that have no deterministic kernel (the
# documentation of torch.use_deterministic_algorithms), where torch's own functions do not go round them.
NOT_DETERMINISTIC = {
    *("upsample_bilinear2d_backward", "replication_pad2d_backward", "_adaptive_avg_pool2d_backward"),
    *("adaptive_max_pool2d_backward", "grid_sampler_2d_backward", "put_", "histc", "kthvalue", "median", "bincount"),
}


@pytest.mark.parametrize("task_class", [DLPTask, DDLPTask])
def test_a_deterministic_step_runs_no_operation_that_is_not(task_class, deterministic, fresh_accelerate):
    torch.manual_seed(0)
    config, accelerator = Config.from_dict(SMALL), make_accelerator("cpu")

    def operations():
        task = task_class(config, accelerator)
        task._open_metrics()  # without the data
        with Operations() as found:
            model = task.build_model()
            batch = [torch.rand(2, *(4,) * (task.kind == "ddlp"), 3, 32, 32)]
            task.losses(model, batch, Progress(epoch=3, iteration=100, epoch_length=10))["loss"].backward()
        return found.names

    assert not operations() & NOT_DETERMINISTIC
    torch.use_deterministic_algorithms(False)
    assert operations() & NOT_DETERMINISTIC


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


@pytest.mark.parametrize("changes", [{}, {"denoiser": "unet"}, {"particle_norm": "std"}], ids=str)
def test_a_diffusion_reads_nothing_back_and_leaves_nothing_elsewhere(changes):
    config = DiffuseConfig.from_dict({**DIFFUSION, "ddlp_dir": "none", **changes})
    with torch.device("meta"):
        model = DiffuseDDLP.from_config(config, SMALL)
    with torch.no_grad():
        tokens, _ = model.encode(torch.empty(2, 4, 3, 32, 32, device="meta"))
    loss = model(tokens)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(parameter.grad.device.type == "meta" for parameter in model.diffusion.parameters())
    assert model.sample(2, 6).shape == (2, 6, 3, 32, 32)


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
def test_deterministic_training_on_a_gpu_is_the_same_twice(balls_data, tmp_path, monkeypatch, fresh_accelerate):
    weights = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        changes = {"device": "cuda", "deterministic": True, "num_epochs": 1, "eval_im_metrics": False}
        weights.append(train_ddlp(write_config(tmp_path / name, balls_data, **changes)).state_dict())
    choose_kernels()
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


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
