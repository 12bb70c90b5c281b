"""Training through faults, each really done: kills, signals, full and read-only disks, dead workers, bad files.

`docs/reliability.md` says what each test shows.
"""

import os
import random
import signal
import sys
import time
from functools import partial

import psutil
import pytest
import torch

import train_dlp
import training.particles
from datasets.get_dataset import shard_loader
from datasets.loading import Loader
from rundir.run import RunDirectory
from tests import runs
from tests.runs import SHAPES, assert_same_run, before, run_apart, the_run
from training.interruption import Interruption, Stopped
from utils.errors import run_command

train, resume = partial(runs.train, train_dlp.main), partial(runs.resume, train_dlp.main)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """`SHAPES` with a root where the images are drawn once for all tests of this file."""
    return {**SHAPES, "root": str(tmp_path_factory.mktemp("shapes")), "num_epochs": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, config):
    """Two epochs of four steps that were never stopped."""
    return train(tmp_path_factory.mktemp("uninterrupted"), config)


def command(function, *arguments, **options):
    """Run a function as a command; returns its exit status and what it said in lines that are no progress bar."""
    code, output = run_apart(run_command, lambda: function(*arguments, **options))
    return code, [line for line in output.splitlines() if "it/s" not in line and "s/it" not in line]


# -------------------------------------------------------------------------------------------------------------- kills


def test_twenty_kills_at_random_places_change_nothing(tmp_path, config):
    """Each process saves once or more and is then killed at a Python call that is drawn at random, anywhere within the
    next step: in the step, in saving, in logging, in an evaluation."""
    config = {**config, "num_epochs": 12, "train_size": 8, "save_every": 1, "n_kp_prior": 8}
    expected = train(tmp_path / "whole", config)
    save_state, calls = RunDirectory.write_state, 6000  # about a step's

    def killed_after(number):
        def count(frame, event, argument):
            nonlocal number
            number -= 1
            if number == 0:
                runs.kill()

        def saved(*arguments):
            save_state(*arguments)
            sys.setprofile(count)

        RunDirectory.write_state = saved
        (tmp_path / "killed").mkdir(exist_ok=True)
        if list((tmp_path / "killed").glob("*_dlp")):
            resume(the_run(tmp_path / "killed"))
        else:
            train(tmp_path / "killed", config)

    for number in random.Random(0).sample(range(1, calls), 20):
        assert run_apart(killed_after, number)[0] == -signal.SIGKILL
    run = the_run(tmp_path / "killed")
    assert run.load_state()["progress"]["iteration"] < 24
    resume(run)
    assert_same_run(run, expected)


# ------------------------------------------------------------------------------------------------------------ signals


def to_the_group(number):
    """Send the signal to all processes of this group; those that load data live on."""
    workers = psutil.Process().children(recursive=True)
    assert len(workers) == 2
    os.killpg(0, number)
    assert not psutil.wait_procs(workers, timeout=0.3)[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves(number, tmp_path, config, uninterrupted, monkeypatch):
    with monkeypatch.context() as patched:
        before(patched, "_step", 1, lambda: to_the_group(number))
        code, lines = command(train, tmp_path, config, num_workers=2)
    run = the_run(tmp_path)
    line = f"stopped at epoch 0, iteration 2; go on with: python train_dlp.py --resume {run.path.name}"
    assert code == 0 and lines[-1] == line
    resume(run)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_an_evaluation(number, tmp_path, config, uninterrupted, monkeypatch):
    def endless(model, items, *arguments):
        next(iter(shard_loader(items, 1, num_workers=2)))
        batches = iter(shard_loader(items, 1, num_workers=2))
        next(batches)
        to_the_group(number)
        while True:
            time.sleep(0.01)

    with monkeypatch.context() as patched:
        patched.setattr(training.particles, "mean_elbo", endless)
        code, lines = command(train, tmp_path, config)
    assert code == 0 and lines[-1].startswith("stopped at epoch 0, iteration 4; go on with: ")
    run = the_run(tmp_path)
    assert run.load_state()["progress"]["evaluation_due"] and run.records() == []
    resume(run)
    assert_same_run(run, uninterrupted)


def test_processes_that_are_spawned_do_not_see_signals():
    batches = iter(Loader(torch.arange(3.0), 1, num_workers=1, multiprocessing_context="spawn"))
    first = next(batches)
    (worker,) = (child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline()))
    for number in (signal.SIGINT, signal.SIGTERM):
        worker.send_signal(number)
    assert [first.item(), *(batch.item() for batch in batches)] == [0, 1, 2]


def test_a_process_that_hangs_is_ended():
    class Hanging(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index:
                time.sleep(600)
            return index

    others, batches = psutil.Process().children(), iter(Loader(Hanging(), 1, num_workers=1))
    next(batches)
    (worker,) = set(psutil.Process().children()) - set(others)
    batches.close()
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running()


def test_processes_that_load_data_do_not_keep_others_from_ending():
    def leave(held=[]):  # noqa: B006
        held.append(iter(Loader(range(9), 1, num_workers=1)))
        next(held[0])

    assert run_apart(leave)[0] == 0


def test_time_that_is_up_saves(tmp_path, config, uninterrupted):
    run = train(tmp_path, config, max_minutes=1e-9)
    assert run.load_state()["progress"]["iteration"] == 1 and run.records() == []
    assert "stopped at epoch 0, iteration 1; go on with: " in (run.path / "log.txt").read_text()
    resume(run, max_minutes="null")
    assert_same_run(run, uninterrupted)


def test_time_that_is_up_stops_an_evaluation():
    handler, interruption = signal.getsignal(signal.SIGALRM), Interruption(0.1 / 60)
    with pytest.raises(Stopped), interruption.raising():
        while True:
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


# --------------------------------------------------------------------------------------------------------- saved states


def test_the_last_states_are_kept_and_gone_on_from(tmp_path, config, uninterrupted):
    run = train(tmp_path, config, keep=2, save_every=2)
    saves = run.path / "saves"
    states = sorted(path.name for path in saves.glob("training_state*"))
    assert states == ["training_state.pt", "training_state_6.pt", "training_state_8.pt"]
    earlier = saves / "training_state_6.pt"
    before = earlier.read_bytes()
    code, lines = command(train_dlp.main, ["--resume", str(earlier), "--keep", "3"])
    assert code == 0 and "resumed at epoch 1, iteration 6" in lines
    assert earlier.read_bytes() == before and [record["epoch"] for record in run.records()] == [0, 1]
    assert_same_state(run, uninterrupted)
    (saves / "training_state.pt").unlink()
    (saves / "training_state.pt").write_bytes(before[:1000])
    code, lines = command(train_dlp.main, ["--resume", str(run.path)])
    assert code == 2 and f"; there is also {saves / 'training_state_8.pt'}" in lines[-1]
    code, lines = command(train_dlp.main, ["--resume", str(saves / "training_state_8.pt"), "--keep", "1"])
    assert code == 0 and "resumed at epoch 2, iteration 8" in lines


def assert_same_state(run, expected):
    mine, theirs = run.load_state(), expected.load_state()
    for name in ("model", "optimizer", "scheduler", "progress", "means"):
        runs.assert_same(mine[name], theirs[name], name)
