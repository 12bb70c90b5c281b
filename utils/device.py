"""Which device, how many processes, which precision and which kernels: decided here alone."""

import atexit
import os
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from utils.errors import UserError
from utils.legal import DEVICE, check, illegal

PRECISIONS = ("float32", "bfloat16")
# How long a process waits for another one that lives: while the main process draws samples and figures, say. One that
# is gone is noticed at once.
PATIENCE = timedelta(hours=1)


def make_accelerator(device, unused_parameters=False):
    """The `Accelerator` of this process.

    device: "cpu", "cuda" (where there is none: the CPU) or "cuda:N"; unused_parameters: whether a step may leave
    parameters that require a gradient without one. Raises `UserError` for a GPU that is not there.
    """
    device = check_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    unused = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    # Where there is no CUDA the CPU is meant, not an accelerator of another make.
    # What accelerate is told elsewhere (`check_accelerate_settings`) is done by the loop.
    handlers = [unused, InitProcessGroupKwargs(timeout=PATIENCE)]
    options = {"mixed_precision": "no", "dynamo_backend": "no", "kwargs_handlers": handlers}
    accelerator = Accelerator(cpu=device == "cpu", **options)
    atexit.register(accelerator.end_training)  # not before: one process may train several times
    return accelerator


def check_accelerate_settings(config):
    """`UserError` where accelerate's own configuration or environment asks for what the run's configuration does not.

    config: a `Config` or `DiffuseConfig`.
    """
    steps = config.gradient_accumulation_steps
    settings = {
        "mixed_precision": ("no", {"float32": "no", "bfloat16": "bf16"}[config.precision], "--precision bfloat16"),
        "gradient_accumulation_steps": ("1", str(steps), "--gradient_accumulation_steps N"),
        "dynamo_backend": ("no", "inductor" if config.compile else "no", "--compile true"),
        "use_fsdp": ("false", "false", "distributed_type MULTI_GPU or MULTI_CPU"),
        "use_deepspeed": ("false", "false", "distributed_type MULTI_GPU or MULTI_CPU"),
        "use_megatron_lm": ("false", "false", "distributed_type MULTI_GPU or MULTI_CPU"),
    }
    for name, (neutral, ours, instead) in settings.items():
        value = os.environ.get(f"ACCELERATE_{name.upper()}", neutral).lower()
        if value not in (neutral, ours):
            legal = " or ".join(dict.fromkeys((neutral, ours)))
            raise UserError(f"accelerate's {name} is {value}; legal: {legal} (instead: {instead})")


def add_device_arguments(parser):
    """The arguments that `device_of` reads."""
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda (default; else the CPU), cuda:N or cpu")
    parser.add_argument("--cpu", action="store_true", help="the same as --device cpu")


def device_of(args):
    """The `torch.device` of a command that predicts or measures; "cuda" falls back to the CPU."""
    choose_kernels()
    return torch.device(check_device("cpu" if args.cpu else args.device))


def check_device(device):
    """The device to use for "cpu", "cuda" or "cuda:N": the CPU where there is no GPU; `UserError` for another name, or
    a GPU that is not there."""
    check("device", device, DEVICE.text, DEVICE.test(device))
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    count = torch.cuda.device_count()
    check("device", device, f"cuda:0 to cuda:{count - 1}, cuda or cpu", int(device.partition(":")[2] or 0) < count)
    return device


def choose_kernels(tf32=True, deterministic=False, fixed_shapes=False):
    """Choose among the kernels that compute the same to rounding, for the whole process.

    tf32: whether a GPU's convolutions round what they multiply to 10 bits; matrix products, which make positions, never
    do. deterministic: only kernels that give the same bits in every run. fixed_shapes: whether all steps have the same
    shapes; then cudnn tries its kernels once and takes the fastest, unless `deterministic`.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = fixed_shapes and not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU's first product is computed


def describe_device(accelerator, config):
    """What a run computes on and with, as a line."""
    device, count = accelerator.device, accelerator.num_processes
    words = [f"device: {device.type}", f"{count} process{'es' if count > 1 else ''}", config.precision]
    if config.precision == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        words[-1] += " (this CPU has no instructions for it: several times slower than float32)"
    if device.type == "cuda":
        words[0] += f" ({torch.cuda.get_device_name(device)})"
        words.append(f"TF32 in convolutions {'on' if torch.backends.cudnn.allow_tf32 else 'off'}")
        words.append(f"cudnn's search for kernels {'on' if torch.backends.cudnn.benchmark else 'off'}")
    words.append("fused Adam")
    if torch.are_deterministic_algorithms_enabled():
        words.append("deterministic kernels")
    elif device.type == "cuda":
        words.append("not deterministic: another run, or one that goes on, agrees to rounding")
    return ", ".join(words)


def cpu_has_bfloat16():
    """Whether this CPU multiplies bfloat16 itself, as far as PyTorch can tell."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def memory_in_use(device):
    """Bytes: of a GPU the most that was allocated so far, elsewhere those of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def autocast(device, precision):
    """A context in which the operations that are safe in it run in `precision`, one of `PRECISIONS`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def make_adam(parameters, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Adam whose step is one kernel per group of weights."""
    return torch.optim.Adam(parameters, lr, betas, eps, weight_decay, fused=True)


def check_cuda_graphs(config, accelerator):
    """`UserError` where `cuda_graphs` is asked for and cannot be had."""
    on_one_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    if config.cuda_graphs and not (on_one_gpu and config.gradient_accumulation_steps == 1):
        place = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
        legal = f"false with {place}; true with one process on a GPU and gradient_accumulation_steps 1"
        raise illegal("cuda_graphs", True, legal)
