"""Training runs for tests: small configurations, commands in a folder, kills and signals at a step, runs compared."""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from unittest import mock

import filelock
import pytest
import torch
from tqdm import tqdm

import training.diffusion
import training.loop
import training.particles
from datasets.shapes_ds import ShapesDataset
from rundir.diffusion_run import DiffusionRun
from rundir.run import Run
from tests.balls import ROOT, SMALL, run_in
from tests.processes import wait_until
from training.loop import TrainingLoop
from utils import checkpoints
from utils.device import PATIENCE

# DLPv2 on drawn shapes: epochs of 4 steps, saved after every third and after each epoch.
SHAPES = {
    **{name: value for name, value in SMALL.items() if name != "animation_horizon"},
    "ds": "shapes",
    "num_epochs": 3,
    "use_correlation_heatmaps": False,
    "eval_im_metrics": False,
    "save_every": 3,
}


# DiffuseDDLP on balls; `ds_root` and `ddlp_dir` are missing.
DIFFUSION = {
    "ds": "balls",
    "device": "cpu",
    "batch_size": 4,
    "lr": 1e-3,
    "train_num_steps": 130,
    "diffusion_num_steps": 6,
    "diffuse_frames": 4,
    "save_and_sample_every": 50,
    "ema_decay": 0.85,
    "num_workers": 0,
    "seed": 3,
}


def write_json(folder, config, **changes):
    """The file small.json in the folder; returns its path."""
    path = folder / "small.json"
    path.write_text(json.dumps({**config, **changes}))
    return path


def train(main, folder, config, *, figures=False, **changes):
    """Train with a configuration and changes to it in the folder, by a training command's `main`. Returns the run.

    figures: whether anything is drawn, which takes most of the time of a small run and changes nothing else.
    """
    option = "-c" if "ddlp_dir" in config else "-d"
    folder.mkdir(exist_ok=True)
    path = write_json(folder, config, **changes)
    with nullcontext() if figures else no_figures():
        run_in(folder, main, option, path)
    return the_run(folder)


def resume(main, run, **changes):
    """Go on with a run, with changes on the command line, without figures."""
    with no_figures():
        run_in("/", main, "--resume", run.path, *(text for name in changes for text in (f"--{name}", changes[name])))


@contextmanager
def no_figures():
    nothing = torch.zeros(3, 8, 8)
    with ExitStack() as patches:
        for owner, name, drawn in (
            (training.loop, "loss_graph", nothing),
            (training.particles, "draw_dlp", {"image": nothing}),
            (training.particles, "draw_ddlp", {"image": nothing}),
            (training.particles, "animate_predictions", None),
            (training.diffusion.DiffusionTask, "evaluate", {}),
        ):
            patches.enter_context(mock.patch.object(owner, name, lambda *arguments, drawn=drawn: drawn))
        yield


def the_run(folder):
    """The one run in the folder."""
    (path,) = folder.glob("*_*dlp*")
    return (DiffusionRun if path.name.endswith("diffuse_ddlp") else Run).open(path)


def run_script(monkeypatch, folder, script, *arguments):
    """`python script arguments` in this process. Returns its exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


def refuse_download(*arguments, **options):
    raise urllib.error.URLError("no network")


# ---------------------------------------------------------------------------------------------------- runs compared


MEASURED = {"steps_per_second", "images_per_second", "memory_gb"}  # of the machine, not of the run


def numbers(run):
    """The records without speed and memory."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in run.records()]


def assert_same_run(run, expected):
    """Weights, optimiser, counters, random states, best scores and records, bit for bit."""
    names = sorted(path.name for path in (expected.path / "saves").iterdir())
    assert sorted(path.name for path in (run.path / "saves").iterdir()) == names
    for name in names:
        mine, theirs = (checkpoints.load(one.path / "saves" / name) for one in (run, expected))
        assert_same(mine, theirs, name)
    assert numbers(run) == numbers(expected)


def assert_same(actual, expected, where):
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_same(mine, theirs, f"{where}/{i}")
    elif torch.is_tensor(expected):
        assert torch.equal(actual, expected), where
    else:
        assert actual == expected, where


# ------------------------------------------------------------------------------------------------- kills and signals


def before(monkeypatch, method, iteration, act, owner=TrainingLoop):
    """Call `act()` before the owner's `method` when so many iterations are done, once."""
    original, done = getattr(owner, method), []

    def acting(self, *arguments):
        progress = getattr(self, "progress", None) or arguments[1]
        if progress.iteration == iteration and not done:
            done.append(True)
            act()
        return original(self, *arguments)

    monkeypatch.setattr(owner, method, acting)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def exit_code(function, *arguments, **options):
    """A function's exit code in a process of its own, a copy of this one; negative for the signal that ended it."""
    return run_apart(function, *arguments, **options)[0]


def run_apart(function, *arguments, **options):
    """Run a function in a process of its own, a copy of this one, that leads a group. Returns its exit code, negative
    for the signal that ended it, and its output."""
    with tempfile.TemporaryFile("w+") as output:

        def redirected():
            os.setsid()
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            sys.stdout.reconfigure(line_buffering=True)
            tqdm.set_lock(threading.RLock())  # not one that is shared with processes that may be killed meanwhile
            function(*arguments, **options)

        process = multiprocessing.get_context("fork").Process(target=redirected)
        process.start()
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        output.seek(0)
        return process.exitcode, output.read()


# ------------------------------------------------------------------------------------------------- several processes

# Runs training scripts with their arguments in turn, each in a folder of its own, as `python SCRIPT` does. RUN is the
# run in the folder; with SIGTERM@N (or SIGKILL@N) process 1 alone gets that signal in the step after N; with
# SIGTERM@one (or @group) it alone (or the group, launcher and all) gets it in an evaluation, in which it waits for
# process 0 for ever; with SLOW a step takes longer than the processes wait before they ask each other; with NO_NOISE
# nothing that is drawn decides a number (`without_noise`). What each process ends with is written beside the run.
SCRIPT = """
import json, os, runpy, signal, sys, time
from contextlib import nullcontext
from pathlib import Path
import torch
import training.loop
from tests.processes import wait_until
from tests.runs import impatient_while_data_is_made, note_who_waits, without_noise
from training.diffusion import DiffusionTask
from training.loop import TrainingLoop

training.loop.loss_graph = lambda *arguments: torch.zeros(3, 8, 8)
fit, step, encode = TrainingLoop.fit, TrainingLoop._step, DiffusionTask._encode
evaluate = TrainingLoop._evaluate

def fit_and_keep(loop, run):
    fit(loop, run)
    torch.save(loop.bare_model.state_dict(), f"weights_{loop.accelerator.process_index}.pth")
    Path(f"data_{loop.accelerator.process_index}.json").write_text(json.dumps([seen, encoded]))

def step_with_signal(loop, batches):
    if str(loop.progress.iteration) == stop and loop.accelerator.process_index == 1:
        signal.raise_signal(number)
    if slow:
        training.loop.AGREEMENT_SECONDS = 0.1
        time.sleep(0.2)
    step(loop, batches)
    seen.append([loop.progress.epoch, [batch[0].double().sum().item() for batch in batches]])

def evaluate_for_ever(loop):
    if loop.accelerator.process_index == 1:
        Path("waiting").write_text(str(os.getpid()))
        loop.accelerator.wait_for_everyone()
    wait_until(Path("waiting").exists, 60)
    time.sleep(0.3)
    os.killpg(0, number) if stop == "group" else os.kill(int(Path("waiting").read_text()), number)
    while True:
        time.sleep(0.01)

def evaluate_or_wait(loop):
    if stop not in ("one", "group"):
        return evaluate(loop)
    loop.task.evaluate = lambda *arguments: evaluate_for_ever(loop)
    try:
        return evaluate(loop)
    except BaseException as error:
        Path(f"left_{loop.accelerator.process_index}").write_text(type(error).__name__)
        raise

def encode_and_note(task, which):
    encoded.extend(which)
    return encode(task, which)

TrainingLoop.fit, TrainingLoop._step, DiffusionTask._encode = fit_and_keep, step_with_signal, encode_and_note
TrainingLoop._evaluate = evaluate_or_wait
root, start, commands = sys.argv[1], os.getcwd(), json.loads(sys.argv[2])
note_who_waits(Path(start))
impatient_while_data_is_made()
for folder, script, *arguments in commands:
    os.chdir(Path(start) / folder)
    stop, seen, encoded = None, [], []
    for each in [each for each in arguments if each.startswith("SIG")]:
        name, stop = each.split("@")
        number = getattr(signal, name)
        arguments.remove(each)
    slow = "SLOW" in arguments
    noise = without_noise() if "NO_NOISE" in arguments else nullcontext()
    arguments = [each for each in arguments if each not in ("SLOW", "NO_NOISE")]
    sys.argv[1:] = [str(next(Path().glob("*_*dlp*/"))) if each == "RUN" else each for each in arguments]
    status = 0
    try:
        with noise:
            runpy.run_path(str(Path(root) / script), run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    with open(f"status_{os.environ['RANK']}", "a") as file:
        print(status, file=file)
    if status and stop in (None, "one", "group"):
        sys.exit(status)
"""


@contextmanager
def without_noise():
    """Every normal variable is 0, every Beta variable its mean."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch, "randn_like", torch.zeros_like))
        patches.enter_context(mock.patch.object(torch.distributions.Beta, "rsample", lambda beta: beta.mean))
        yield


TIMEOUT = timedelta(seconds=2)  # of the operations on several processes while data is made


def impatient_while_data_is_made():
    """Let operations on both processes give up after `TIMEOUT` while a task opens its data."""
    open_data = training.particles.ParticleTask.open_data

    def open_impatiently(task):
        torch.distributed.distributed_c10d._set_pg_timeout(TIMEOUT)
        try:
            return open_data(task)
        finally:
            torch.distributed.distributed_c10d._set_pg_timeout(PATIENCE)

    training.particles.ParticleTask.open_data = open_impatiently


def note_who_waits(folder):
    """Let a process that draws the shapes take longer than `TIMEOUT` from when another one waits for its lock, as that
    one says in a file there."""
    draw, lock = ShapesDataset._draw, filelock.FileLock.acquire

    def draw_while_others_wait(dataset):
        waits = folder / f"waits_{1 - int(os.environ['RANK'])}"
        if not waits.exists():
            wait_until(waits.exists, 60)
            time.sleep(1.5 * TIMEOUT.total_seconds())
        draw(dataset)

    def acquire(self, *arguments, **options):
        (folder / f"waits_{os.environ['RANK']}").touch()
        return lock(self, *arguments, **options)

    ShapesDataset._draw, filelock.FileLock.acquire = draw_while_others_wait, acquire


def launch(folder, *commands, status=0):
    """Run the commands, (folder, training script, *arguments), on two processes. Returns the output."""
    (folder / "script.py").write_text(SCRIPT)
    for name, *_ in commands:
        (folder / name).mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*torchrun, "script.py", str(ROOT), json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def assert_one_model(folder, trained):
    """Both processes ended with the same weights, which are those `trained`."""
    for process in (0, 1):
        assert_same(dict(checkpoints.load(folder / f"weights_{process}.pth")), dict(trained), "weights")


def assert_nearly_the_same_run(run, expected, tolerance=1e-5, without=()):
    """The records (losses, scores, norms of gradients) `without` some, and the trained weights, to rounding."""
    for mine, theirs in zip(numbers(run), numbers(expected), strict=True):
        for name in without:
            del mine[name], theirs[name]
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    mine, theirs = (one.load_state()["model"] for one in (run, expected))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=tolerance, atol=tolerance, msg=name)
