"""Which device, how many processes and which precision: decided here alone."""

import atexit
import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from utils.errors import UserError
from utils.legal import DEVICE, check, illegal

PRECISIONS = ("float32", "bfloat16")
# What accelerate's own configuration or environment may set, and the value that leaves it alone.
REFUSED_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no", "--precision bfloat16"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "1", "a larger --batch_size"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no", "a configuration without it"),
}


def make_accelerator(device, unused_parameters=False):
    """The `Accelerator` of this process.

    device: "cpu", "cuda" (where there is none: the CPU) or "cuda:N"; unused_parameters: whether a step may leave
    parameters that require a gradient without one. Raises `UserError` for a GPU that is not there, and for a setting of
    accelerate's own that training does not follow.
    """
    for variable, (name, legal, instead) in REFUSED_SETTINGS.items():
        value = os.environ.get(variable, legal).lower()
        if value != legal:
            raise UserError(f"accelerate's {name} is {value}; legal: {legal} (instead: {instead})")
    device = check_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    unused = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    # Where there is no CUDA the CPU is meant, not an accelerator of another make.
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[unused])
    atexit.register(accelerator.end_training)  # not before: one process may train several times
    return accelerator


def add_device_arguments(parser):
    """The arguments that `device_of` reads."""
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda (default; else the CPU), cuda:N or cpu")
    parser.add_argument("--cpu", action="store_true", help="the same as --device cpu")


def device_of(args):
    """The `torch.device` of a command that predicts or measures; "cuda" falls back to the CPU."""
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


def autocast(device, precision):
    """A context in which the operations that are safe in it run in `precision`, one of `PRECISIONS`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def make_adam(parameters, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Adam whose step is one kernel per group of weights."""
    return torch.optim.Adam(parameters, lr, betas, eps, weight_decay, fused=True)


def check_cuda_graphs(config, accelerator):
    """`UserError` where `cuda_graphs` is asked for and cannot be had."""
    if config.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        place = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
        raise illegal("cuda_graphs", True, f"false with {place}; true with one process on a GPU")
