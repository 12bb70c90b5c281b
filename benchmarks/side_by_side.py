"""What the benchmarks of training steps and of roll-outs share: each measurement in a process of its own, this checkout
and another one in turn.

A measurement is a dict with `seconds` (a list), `flops`, `peak_bytes` and whatever says what was measured; it is
printed as one line of JSON. Load on the machine then falls on both sides alike; the fastest times are the most
trustworthy, and the ratio is that of minima.
"""

import argparse
import inspect
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZES = {"shapes": 16, "balls": 4, "obj3d128": 1, "traffic": 1}  # of a CPU


def count(text):
    """The whole number, at least 1, in an argument. Nothing of this repository is imported: what is measured may lie in
    another checkout."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; legal: at least 1")
    return int(text)


def parse_arguments(description, arguments, names):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", nargs="+", choices=names, default=names, metavar="NAME", help=str(names))
    parser.add_argument("--baseline", metavar="FOLDER", help="another checkout of this repository, or the release")
    parser.add_argument(
        "--batch_size",
        type=count,
        help="default: Shapes 16, Balls 4, the others 1; on a GPU the released ones",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again; training only")
    parser.add_argument("--per_sample", action="store_true", help="measure twice the batch, too: memory of one more")
    parser.add_argument("--rounds", type=count, default=3, help="processes per checkout (%(default)s)")
    parser.add_argument("--repeats", type=count, default=3, help="timings per process (%(default)s)")
    parser.add_argument("--threads", type=count, default=1, help="of a CPU (%(default)s)")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)  # one process: the checkout to load
    args = parser.parse_args(arguments)
    if args.baseline is not None and not (Path(args.baseline) / "models.py").is_file():
        parser.error(f"argument --baseline: {args.baseline}; legal: a folder with models.py")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda, but PyTorch finds no GPU; legal: cpu")
    return args


def run(description, arguments, names, measure):
    """The command of a benchmark. measure: a function of (args, name) that returns a measurement."""
    args = parse_arguments(description, arguments, names)
    if args.measure:
        sys.path.insert(0, args.measure)
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args, args.dataset[0])))
        return
    checkouts = [ROOT] if args.baseline is None else [Path(args.baseline).resolve(), ROOT]
    rate = matmul_rate(args)
    for name in args.dataset:
        found = {checkout: [] for checkout in checkouts}
        for _ in range(args.rounds):
            for checkout in checkouts:
                measurement = {"dataset": name, "checkout": str(checkout), **_in_a_process(checkout, name, args)}
                measurement["share_of_matmul"] = measurement["flops"] / min(measurement["seconds"]) / rate
                found[checkout].append(measurement)
                print(json.dumps(measurement), flush=True)
        for checkout in checkouts:
            print(_summary(found[checkout]))
            if args.per_sample:
                first = found[checkout][0]
                twice = _in_a_process(checkout, name, args, batch_size=2 * first["batch_size"], repeats=1)
                more = (twice["peak_bytes"] - first["peak_bytes"]) / first["batch_size"] / 1e9
                print(f"{name}, {checkout}: {more:.3f} GB for each more in a batch", flush=True)
        if args.baseline is not None:
            before, after = (min(_seconds(found[checkout])) for checkout in checkouts)
            memory = [max(m["peak_bytes"] for m in found[checkout]) for checkout in checkouts]
            print(f"{name}: {before / after:.2f} times as fast, {memory[1] / memory[0]:.2f} of the memory", flush=True)


def _in_a_process(checkout, name, args, **changes):
    options = ["--measure", str(checkout), "-d", name, *["--checkpointing"] * args.checkpointing]
    for option in ("batch_size", "device", "precision", "repeats", "threads"):
        value = changes.get(option, getattr(args, option))
        if value is not None:
            options += [f"--{option}", str(value)]
    done = subprocess.run([sys.executable, sys.argv[0], *options], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _seconds(measurements):
    return [seconds for measurement in measurements for seconds in measurement["seconds"]]


def _summary(measurements):
    seconds, first = _seconds(measurements), measurements[0]
    share = max(measurement["share_of_matmul"] for measurement in measurements)
    peak = max(measurement["peak_bytes"] for measurement in measurements) / 1e9
    return (
        f"{first['dataset']} x {first['batch_size']}, {first['checkout']}: median {statistics.median(seconds):.4f} s, "
        f"fastest {min(seconds):.4f} s, {share:.0%} of the float32 matmul rate at best, {peak:.2f} GB above idle"
    )


def build_model(name, device):
    """The model of a configuration, from the checkout that is measured; published constructors are all it needs."""
    import models

    config = json.loads((ROOT / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    model_class = models.ObjectDLP if name == "shapes" else models.ObjectDynamicsDLP
    known = [key for key in inspect.signature(model_class).parameters if key in config]
    torch.manual_seed(0)
    return model_class(cdim=config["ch"], **{key: config[key] for key in known}).to(device), config


def batch_size_of(args, name, config):
    """The images or clips of a batch."""
    return args.batch_size or (BATCH_SIZES[name] if args.device == "cpu" else config["batch_size"])


def measured(step, args, batch_size):
    """Time `step`, a function without arguments, after one call that warms up and one whose operations are counted."""
    idle = _memory(args.device)
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    seconds = []
    clock = _clock(args)
    for _ in range(args.repeats):
        start = clock()
        step()
        seconds.append(clock() - start)
    return {
        "batch_size": batch_size,
        "device": args.device,
        "precision": args.precision,
        "seconds": seconds,
        "flops": counter.get_total_flops(),
        "peak_bytes": _memory(args.device, peak=True) - idle,
    }


def autocast(args):
    """A context in which forward passes run in the precision asked for."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bfloat16")


def _memory(device, peak=False):
    """Bytes in use, or the most there were: of a GPU the tensors', of a CPU the process's resident set."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if peak:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def _clock(args):
    """The function that tells the time in seconds: of a CPU and one thread the process's own, which other load on the
    machine does not lengthen."""
    if args.device == "cpu":
        return time.process_time if args.threads == 1 else time.perf_counter

    def clock():
        torch.cuda.synchronize(args.device)
        return time.perf_counter()

    return clock


def matmul_rate(args):
    """Operations per second of float32 products of 2048 x 2048 matrices, at best (TF32 off)."""
    torch.set_num_threads(args.threads)
    a, b = (torch.randn(2048, 2048, device=args.device) for _ in range(2))
    clock, best = _clock(args), float("inf")
    for _ in range(8):
        start = clock()
        a @ b
        best = min(best, clock() - start)
    print(json.dumps({"float32_matmul_per_second": 2 * 2048**3 / best}), flush=True)
    return 2 * 2048**3 / best
