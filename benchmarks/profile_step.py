"""Which operations a training step spends its time on: ``python benchmarks/profile_step.py -d balls --device cpu``."""

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import Config
from rundir.run import MODELS
from utils.device import PRECISIONS, add_device_arguments, autocast, device_of
from utils.errors import run_command
from utils.legal import check_at_least_1

ROWS = 25


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", default="balls", metavar="NAME", help="a name in configs/ (%(default)s)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="(default: 32 on a GPU, 1 on a CPU)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="(%(default)s)")
    add_device_arguments(parser)
    args = parser.parse_args(arguments)
    if args.batch_size is not None:
        check_at_least_1("--batch_size", args.batch_size)
    device, config = device_of(args), Config.load(args.dataset)
    is_video = config.timestep_horizon > 1
    model = MODELS["ddlp" if is_video else "dlp"].from_config(config).to(device)
    frames = (config.timestep_horizon + 1,) if is_video else ()
    batch_size = args.batch_size or (32 if device.type == "cuda" else 1)
    x = torch.rand(batch_size, *frames, 3, config.image_size, config.image_size, device=device)

    def step():
        with autocast(device, args.precision):
            loss = model.calc_elbo(x, model(x, alpha_masks=False))["loss"]
        loss.backward()

    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        step()
        x.sum().item()  # waits for the device
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=70))


if __name__ == "__main__":
    run_command(main)
