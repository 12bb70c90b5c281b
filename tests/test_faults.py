"""Training through faults, each really done: kills, signals, full and read-only disks, dead workers, bad files.

`docs/reliability.md` says what each test shows.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch

import train_dlp
import training.particles
from datasets.frame_cache import map_npy
from datasets.get_dataset import shard_loader
from datasets.loading import Loader
from datasets.shapes_ds import ShapesDataset
from rundir.run import Run, RunDirectory
from tests import runs
from tests.runs import SHAPES, assert_same_run, before, run_apart, the_run
from training.interruption import Interruption, Stopped
from training.loop import TrainingError
from training.particles import DLPTask
from utils import checkpoints
from utils.errors import UserError, run_command

train, resume = partial(runs.train, train_dlp.main), partial(runs.resume, train_dlp.main)


MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def mount(source, target, options="", flags=0):
    """Mount a file system that this process alone sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(mount, "namespace"):
        uid, gid = os.getuid(), os.getgid()
        if libc.unshare(CLONE_NEWNS):
            assert libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0, "this system lets nobody mount"
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        mount.namespace = True
    kind = b"tmpfs" if source == "tmpfs" else None
    done = libc.mount(os.fsencode(source), os.fsencode(target), kind, flags, options.encode())
    assert done == 0, os.strerror(ctypes.get_errno())


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
    assert code == 128 + number and lines[-1] == line
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
    assert code == 128 + number and lines[-1].startswith("stopped at epoch 0, iteration 4; go on with: ")
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


@pytest.mark.parametrize("how", ["truncated", "weights", "text"])
def test_a_state_that_is_none_is_named(how, tmp_path, uninterrupted):
    run = copy_of(uninterrupted, tmp_path)
    path, weights = run.state_path, run.path / "saves" / "shapes_dlp.pth"
    before = {"truncated": path.read_bytes()[:9000], "weights": weights.read_bytes(), "text": b"no state"}[how]
    path.unlink()
    path.write_bytes(before)
    code, lines = command(train_dlp.main, ["--resume", str(run.path), "--num_epochs", "3"])
    words = {"truncated": "not a readable", "weights": "legal: a state that training saved", "text": "not a readable"}
    assert code == 2 and lines[-1].startswith(f"error: {path}: ") and words[how] in lines[-1]
    assert path.read_bytes() == before


def test_a_state_of_another_run_names_the_keys(tmp_path, config, uninterrupted):
    run = copy_of(uninterrupted, tmp_path)
    state = checkpoints.load(run.state_path)
    other = {**state, "config": {**state["config"], "n_kp_enc": 3, "beta_kl": 0.2}}
    checkpoints.save(other, run.state_path)
    code, lines = command(train_dlp.main, ["--resume", str(run.path)])
    assert code == 2 and lines[-1] == (
        f"error: {run.state_path}: saved with another configuration: beta_kl is 0.2 there, {run.config.beta_kl} in"
        f" hparams.json, n_kp_enc is 3 there, {run.config.n_kp_enc} in hparams.json; legal: the same"
    )
    checkpoints.save({**state, "kind": "ddlp"}, run.state_path)
    code, lines = command(train_dlp.main, ["--resume", str(run.path)])
    assert code == 2 and lines[-1].endswith("saved by a run of kind ddlp; legal: one of kind dlp")
    checkpoints.save({**state, "items": 17}, run.state_path)
    code, lines = command(train_dlp.main, ["--resume", str(run.path)])
    assert code == 2 and "the training set had 17 items, it has 16 now; legal: the same data" in lines[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"progress": None}, "no progress as training saves"),
        ({"progress": {"epoch": -1, "iteration": 3}}, "no progress as training saves"),
        ({"optimizer": {}}, "no optimizer as training saves"),
        ({"best": None, "means": 5}, "no means and best as training saves"),
        ({"model": 3}, "no model as training saves"),
    ],
)
def test_a_state_with_other_entries_is_named(change, words, tmp_path, uninterrupted):
    run = copy_of(uninterrupted, tmp_path)
    checkpoints.save({**checkpoints.load(run.state_path), **change}, run.state_path)
    with pytest.raises(UserError, match=f"training_state.pt: {words}; legal: a state that training saved"):
        run.load_state()


def test_damaged_records_are_named(tmp_path, uninterrupted):
    run = copy_of(uninterrupted, tmp_path)
    records = run.records()
    for line in ('{"epoch": 2, "iter', "[1]", '{"epoch": 2}'):
        run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records) + line)
        with pytest.raises(UserError, match=f"metrics.jsonl: line {len(records) + 1} is damaged; legal: without it"):
            run.records()


def test_no_two_processes_train_in_one_directory(tmp_path, uninterrupted):
    run = copy_of(uninterrupted, tmp_path)
    before = run.state_path.read_bytes()
    with run.locked():
        code, lines = command(train_dlp.main, ["--resume", str(run.path), "--num_epochs", "4"])
    assert code == 2 and lines[-1] == f"error: {run.path}: another process trains in it; legal: when that has ended"
    assert run.state_path.read_bytes() == before
    with run.locked():  # it is free again
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("values", "warning: the training set has changed (some of its items are others) since "),
        ("times", "warning: files of the training set have changed (names, sizes or times; the items that were "),
        ("nothing", None),
    ],
)
def test_data_that_changed_under_a_run_is_said(change, said, tmp_path, config, balls_data):
    data = shutil.copytree(balls_data, tmp_path / "data")
    run = train(tmp_path, {**config, "ds": "balls", "root": str(data)}, num_epochs=1, train_size=8)
    if change == "values":
        with h5py.File(data / "train.hdf5", "r+") as file:
            file["imgs"][:, 0] = 255 - file["imgs"][:, 0]
    if change == "times":
        os.utime(data / "train.hdf5", (0, 0))
    resume(run, num_epochs=2)
    log = (run.path / "log.txt").read_text()
    assert len(run.records()) == 2
    assert (said in log) if said else ("warning" not in log)


def copy_of(run, folder):
    shutil.copytree(run.path, folder / run.path.name)
    return Run.open(folder / run.path.name)


def test_where_training_diverged_the_learning_rate_may_change(tmp_path, config, uninterrupted, monkeypatch):
    code, lines = command(train_dlp.main, ["--resume", str(uninterrupted.path), "--lr", "1e-5"])
    assert code == 2 and "lr is 1e-05; legal: 0.0002, as in the run that goes on" in lines[-1]
    losses = DLPTask.losses

    def diverging(task, model, batch, progress):
        result = losses(task, model, batch, progress)
        return {**result, "loss": result["loss"] * float("nan")} if progress.iteration == 6 else result

    with monkeypatch.context() as patched:
        patched.setattr(DLPTask, "losses", diverging)
        code, lines = command(train, tmp_path, config)
    run = the_run(tmp_path)
    assert code == 1 and "loss is nan at iteration 7 (epoch 1); the last good checkpoint is kept" in lines[-1]
    assert lines[-1].endswith(f"--resume {run.path.name}, perhaps with a lower learning rate: --lr")
    assert run.load_state()["progress"]["iteration"] == 6
    resume(run, lr=1e-5)
    assert "from here on with lr 1e-05 instead of 0.0002" in (run.path / "log.txt").read_text()
    assert [record["lr"] for record in run.records()] == pytest.approx([2e-4, 0.95e-5])
    (group,) = run.load_state()["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.95**2 * 1e-5) and Run.open(run.path).config.lr == 1e-5
    code, lines = command(train_dlp.main, ["--resume", str(run.path), "--lr", "1e-6"])
    assert code == 2 and "lr is 1e-06; legal: 1e-05" in lines[-1]


# ------------------------------------------------------------------------------------------------ disks and processes


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, config, uninterrupted, monkeypatch):
    def on_a_small_disk():
        mount("tmpfs", tmp_path, "size=256m")

        def fill():
            with suppress(OSError), open(tmp_path / "filler", "wb", buffering=0) as file:
                while file.write(bytes(1 << 20)):
                    pass

        before(monkeypatch, "_step", 4, fill)
        with pytest.raises(TrainingError) as error:
            train(tmp_path, config)
        run = the_run(tmp_path)
        assert "cannot be written: No space left on device; the last good checkpoint is kept" in str(error.value)
        (tmp_path / "filler").unlink()
        assert not list(tmp_path.rglob(".*.part*")) and run.load_state()["progress"]["iteration"] == 4
        resume(run)
        assert_same_run(run, uninterrupted)

    code, output = run_apart(on_a_small_disk)
    assert code == 0, output


def test_a_read_only_run_directory_is_one_line(tmp_path, uninterrupted):
    def read_only():
        mount(uninterrupted.path, uninterrupted.path, flags=MS_BIND)
        mount(uninterrupted.path, uninterrupted.path, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
        run_command(lambda: train_dlp.main(["--resume", str(uninterrupted.path), "--num_epochs", "3"]))

    code, output = run_apart(read_only)
    line = f"error: {uninterrupted.path}: cannot be written to; legal: a run directory that can, or a copy of it\n"
    assert code == 2 and output.endswith(line)


@pytest.mark.parametrize("size", ["8k", "128k"])  # too little for the queues, for the batches
def test_little_shared_memory_is_one_line(size, tmp_path, config):
    def with_little():
        mount("tmpfs", "/dev/shm", f"size={size}")
        train(tmp_path, config, num_workers=1, batch_size=16)

    code, lines = command(with_little)
    assert code == 1 and "error: there is no room in shared memory (/dev/shm)" in lines[-1]
    assert "legal: more of it (docker run --shm-size=8g), fewer num_workers, or 0" in lines[-1]


def test_a_killed_worker_is_one_line(tmp_path, config, monkeypatch):
    def kill_one():
        psutil.Process().children()[0].kill()
        time.sleep(1)

    before(monkeypatch, "_step", 4, kill_one)
    code, lines = command(train, tmp_path, config, num_workers=2)
    assert code == 1 and "error: a process that loads data was ended from outside" in lines[-1]
    assert "the last good checkpoint is kept; go on from it with: python train_dlp.py --resume" in lines[-1]
    assert the_run(tmp_path).load_state()["progress"]["iteration"] == 4


def test_a_mapped_file_that_is_cut_is_one_line(tmp_path):
    file = tmp_path / "frames.npy"
    np.save(file, np.zeros((64, 4096), np.uint8))
    batches = iter(Loader(map_npy(file), 1, num_workers=1, prefetch_factor=1))
    next(batches)
    os.truncate(file, 4096)
    with pytest.raises(UserError, match=r"no room in shared memory .*; or, .* a file of data was cut short"):
        list(batches)


def test_as_many_processes_load_as_are_asked_for(recwarn, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert len(list(Loader(range(99), 1, num_workers=2))) == 99
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_data_that_disappears_is_one_line(tmp_path, config, monkeypatch):
    def gone(items, index):
        raise FileNotFoundError(2, "No such file or directory", "frame_7.png")

    before(monkeypatch, "_step", 2, lambda: monkeypatch.setattr(ShapesDataset, "__getitem__", gone))
    code, lines = command(train, tmp_path, config, save_every=9)
    assert code == 1 and lines[-1].startswith(
        "error: the data cannot be read any more: [Errno 2] No such file or directory: 'frame_7.png'; no checkpoint"
    )


def assert_same_state(run, expected):
    mine, theirs = run.load_state(), expected.load_state()
    for name in ("model", "optimizer", "scheduler", "progress", "means"):
        runs.assert_same(mine[name], theirs[name], name)
