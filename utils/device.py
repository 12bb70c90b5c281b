"""Which device and how many processes: the `Accelerator` of this process."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from utils.errors import UserError


def make_accelerator(device, unused_parameters=False):
    """The `Accelerator` of this process.

    device: "cpu", "cuda" (where there is none: the CPU) or "cuda:N"; unused_parameters: whether a step may leave
    parameters that require a gradient without one. Raises `UserError` for a GPU that is not there.
    """
    if device.startswith("cuda:") and torch.cuda.is_available():
        index, count = int(device.split(":")[1]), torch.cuda.device_count()
        if index >= count:
            raise UserError(f"device is {device}; legal: cuda:0 to cuda:{count - 1}, cuda or cpu")
        torch.cuda.set_device(index)
    unused = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    # Where there is no CUDA the CPU is meant, not an accelerator of another make.
    return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(), kwargs_handlers=[unused])
