"""How many clips a second DDLP learns from, with everything trained and with the dynamics alone on encoded particles:
``python benchmarks/bench_dynamics.py -d balls``. Both in turn, in one process; images are random."""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import Config
from models import ObjectDynamicsDLP
from utils.device import PRECISIONS, add_device_arguments, autocast, device_of, make_adam
from utils.errors import run_command
from utils.legal import check_at_least_1


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", default="balls", metavar="NAME", help="a name in configs/ (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="clips with everything (%(default)s)")
    parser.add_argument("--alone_batch_size", type=int, default=32, metavar="N", help="clips alone (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timings of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a CPU (%(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="(%(default)s)")
    add_device_arguments(parser)
    args = parser.parse_args(arguments)
    for name in ("batch_size", "alone_batch_size", "rounds", "threads"):
        check_at_least_1(f"--{name}", getattr(args, name))
    torch.set_num_threads(args.threads)
    device, config = device_of(args), Config.load(args.dataset)
    model = ObjectDynamicsDLP.from_config(config).to(device)
    adam = make_adam(model.parameters(), config.lr)
    size = 3, config.image_size, config.image_size
    x = torch.rand(max(args.batch_size, args.alone_batch_size), config.timestep_horizon + 1, *size, device=device)
    with torch.no_grad():
        posteriors = model.encode_posterior(x[: args.alone_batch_size])

    # Of one thread the process's own time, which other load on the machine does not lengthen.
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter

    def everything():
        return model.calc_elbo(x[: args.batch_size], model(x[: args.batch_size], alpha_masks=False))["loss"]

    def alone():
        prediction = model(posteriors, num_static_frames=config.num_static_frames)
        return model.calc_dynamics_loss(posteriors, prediction, num_static=config.num_static_frames)["loss"]

    def clips_per_second(loss, clips, learns_all):
        model.set_require_grad(learns_all, learns_all, learns_all)
        for _ in range(2):  # the first warms up
            start = clock()
            adam.zero_grad(set_to_none=True)
            with autocast(device, args.precision):
                value = loss()
            value.backward()
            adam.step()
            value.item()  # waits for the device
            seconds = clock() - start
        return clips / seconds

    found = [
        (clips_per_second(everything, args.batch_size, True), clips_per_second(alone, args.alone_batch_size, False))
        for _ in range(args.rounds)
    ]
    both, dynamics = (sorted(values)[len(values) // 2] for values in zip(*found, strict=True))
    print(
        f"{args.dataset}: {both:.3g} clips/s with everything, {dynamics:.3g} alone, {dynamics / both:.1f} times as many"
    )


if __name__ == "__main__":
    run_command(main)
