"""The training loop through its command: resuming after SIGKILL and signals, NaN, checkpoints, run directories."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import train_dlp
from configs.schema import Config
from rundir.run import Run
from training.loop import EpochBatches, Progress, RunningMeans, Trainer, TrainingError, training_stage
from training.particles import resume_command
from utils import checkpoints
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
SMALL = {
    "ds": "shapes",
    "device": "cpu",
    "batch_size": 4,
    "num_epochs": 3,
    "n_kp_enc": 3,
    "n_kp_prior": 8,
    "patch_size": 16,
    "enc_channels": [4, 4, 4],
    "prior_channels": [4, 4],
    "learned_feature_dim": 2,
    "use_correlation_heatmaps": False,
    "train_size": 24,
    "val_size": 4,
    "metrics": ["ssim", "psnr"],
    "num_workers": 0,
    "checkpoint_freq": 2,
    "seed": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The drawn shapes, once for all tests of this file."""
    return str(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def config_path(tmp_path, data):
    path = tmp_path / "small.json"
    path.write_text(json.dumps({**SMALL, "root": data}))
    return path


def start(folder, *arguments):
    """The command in a process of its own, which can be killed."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_dlp.py"), *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(folder, *arguments):
    """The command in this process, with one thread as in `start`: sums are in the same order then."""
    threads, before = torch.get_num_threads(), os.getcwd()
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        train_dlp.main([str(argument) for argument in arguments])
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def the_run(folder):
    (path,) = folder.glob("*_shapes_dlp*")
    return path


def wait_for(condition, process, seconds=120):
    """Until `condition()`; fails if the process ends or the time runs out before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def saved_iteration(run):
    path = run / "saves" / "training_state.pt"
    return checkpoints.load(path)["progress"]["iteration"] if path.exists() else -1


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "small.json").write_text(json.dumps({**SMALL, "root": data}))
    train(folder, "-d", "small.json")
    return the_run(folder)


def assert_same_run(run, expected):
    """Weights, optimiser, counters, best scores and records, bit for bit."""
    names = sorted(path.name for path in (expected / "saves").iterdir())
    assert sorted(path.name for path in (run / "saves").iterdir()) == names
    for name in names:
        assert_same(checkpoints.load(run / "saves" / name), checkpoints.load(expected / "saves" / name), name)
    assert (run / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()


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


@pytest.mark.parametrize("iteration", [2, 8])  # in the first epoch, in the second
def test_killed_and_resumed_equals_never_stopped(iteration, tmp_path, config_path, uninterrupted, capsys):
    process = start(tmp_path, "-d", config_path)
    wait_for(lambda: list(tmp_path.glob("*_shapes_dlp*/saves/training_state.pt")), process)
    run = the_run(tmp_path)
    wait_for(lambda: saved_iteration(run) >= iteration, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert saved_iteration(run) < 18
    train(tmp_path, "--resume", run)
    assert "resumed at epoch" in capsys.readouterr().out
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path, config_path, uninterrupted):
    process = start(tmp_path, "-d", config_path)
    wait_for(lambda: list(tmp_path.glob("*_shapes_dlp*/saves/training_state.pt")), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    run = the_run(tmp_path)
    assert f"go on with: python train_dlp.py --resume {run.name}" in output
    assert 0 < saved_iteration(run) < 18
    train(tmp_path, "--resume", run)
    assert_same_run(run, uninterrupted)


def test_the_run_directory(uninterrupted):
    hparams = json.loads((uninterrupted / "hparams.json").read_text())
    assert hparams.items() >= {**SMALL, "root": hparams["root"]}.items()
    saves = {path.name for path in (uninterrupted / "saves").iterdir()}
    assert saves == {"shapes_dlp.pth", "shapes_dlp_best.pth", "training_state.pt"}
    figures = {path.name for path in (uninterrupted / "figures").iterdir()}
    names = ["image", "image_valid", "image_obj", "image_seg"]
    assert figures == {f"{name}_{epoch}.jpg" for name in names for epoch in range(3)} | {"shapes_dlp_graph.jpg"}
    records = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert [record["iteration"] for record in records] == [6, 12, 18]
    assert [round(record["lr"] / 2e-4, 6) for record in records] == [1, 0.95, 0.9025]
    assert [("ssim" in record, "psnr" in record) for record in records] == [(False, True), (True, True), (True, True)]
    log = (uninterrupted / "log.txt").read_text()
    assert all(f"epoch {epoch} iteration {6 * (epoch + 1)} " in log for epoch in range(3))


def test_the_best_weights_are_those_of_the_best_epoch(uninterrupted):
    records = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    state = checkpoints.load(uninterrupted / "saves" / "training_state.pt")
    assert state["best"] == {"val_loss": min(record["val_loss"] for record in records)}
    last = checkpoints.load(uninterrupted / "saves" / "shapes_dlp.pth")
    best = checkpoints.load(uninterrupted / "saves" / "shapes_dlp_best.pth")
    best_is_last = records[-1]["val_loss"] == state["best"]["val_loss"]
    assert all(torch.equal(best[name], last[name]) for name in last) == best_is_last
    assert all(torch.equal(state["model"][name], last[name]) for name in last)


def test_a_finished_run_is_a_model(uninterrupted):
    model = Run.open(uninterrupted).load_model()
    weights = checkpoints.load(uninterrupted / "saves" / "shapes_dlp.pth")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_more_epochs_than_at_first(tmp_path, config_path, uninterrupted, capsys):
    train(tmp_path, "-d", config_path, "--num_epochs", 1)
    run = the_run(tmp_path)
    train(tmp_path, "--resume", run, "--num_epochs", 3)
    assert_same_run(run, uninterrupted)
    assert "all 3 epochs are done" not in capsys.readouterr().out
    train(tmp_path, "--resume", run)
    assert "all 3 epochs are done; more: --num_epochs" in capsys.readouterr().out


def test_workers_change_nothing(tmp_path, config_path, uninterrupted):
    train(tmp_path, "-d", config_path, "--num_workers", 2)
    assert_same_run(the_run(tmp_path), uninterrupted)


def test_lpips_and_the_vgg_loss(tmp_path, config_path, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    options = ["--metrics", "lpips,psnr", "--recon_loss_type", "vgg", "--num_epochs", 3, "--train_size", 8]
    train(tmp_path, "-d", config_path, *options)
    run = Run.open(the_run(tmp_path))
    assert (run.path / "saves" / "shapes_dlp_best_lpips.pth").is_file()
    assert run.find_weights() == run.weights_path("_best_lpips")
    measured = [record["lpips"] for record in run.records() if "lpips" in record]
    assert len(measured) == 2 and run.load_state()["best"]["lpips"] == min(measured)
    last = json.loads((run.path / "last_val_image_metrics.json").read_text())
    assert last == {name: run.records()[-1][name] for name in ("lpips", "psnr")}


def test_missing_weights_are_named_once_and_training_goes_on_without_lpips(tmp_path, config_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse_download)
    train(tmp_path, "-d", config_path, "--metrics", "lpips,psnr", "--num_epochs", 2, "--train_size", 8)
    run = Run.open(the_run(tmp_path))
    assert "psnr" in run.records()[1] and "lpips" not in run.records()[1]
    (line,) = [line for line in (run.path / "log.txt").read_text().splitlines() if "lpips is left out" in line]
    assert all(
        word in line for word in ("vgg16-397923af.pth", "vgg.pth", str(tmp_path / "empty"), "--metrics ssim,psnr")
    )


def test_missing_weights_of_the_vgg_loss_stop_before_anything_is_made(tmp_path, config_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse_download)
    with pytest.raises(UserError) as error:
        train(tmp_path, "-d", config_path, "--recon_loss_type", "vgg", "--metrics", "lpips")
    for words in ("vgg16-397923af.pth", "vgg.pth", "--recon_loss_type mse", "--metrics ssim,psnr"):
        assert words in str(error.value)
    assert not list(tmp_path.glob("*_shapes_dlp*"))


def refuse_download(*arguments, **options):
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "nowhere"], "nowhere: no such run directory"),
        (["--resume", "{run}", "--lr", "0.1"], "--lr cannot change when a run goes on; legal: num_epochs"),
        (["-d", "nothing"], "nothing.json: not found"),
        (["-d", "{config}", "--batch_size", "25"], "train_size is 24; legal: at least batch_size 25"),
        (["-d", "{config}", "--ds", "nothing"], "'nothing' is not a known data set; known are balls, clevrer, "),
        (["-d", "{config}", "--load_model", "true", "--pretrained_path", "no.pth"], "no.pth: no such checkpoint file"),
        (["-d", "{config}", "--anchor_s", "0.3"], "anchor_s is 0.3; legal:"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments, words, tmp_path, config_path, uninterrupted, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(run=uninterrupted, config=config_path) for argument in arguments]
    before = (uninterrupted / "hparams.json").read_text()
    with pytest.raises(SystemExit) as ended:
        train_dlp.run_command(lambda: train_dlp.main(arguments))
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ") and words in line
    assert (uninterrupted / "hparams.json").read_text() == before
    assert not list(config_path.parent.glob("*_shapes_dlp*")), "a run directory was left behind"


def trainer_for(folder, data, task_type=DLPTask, **changes):
    config = Config.from_dict({**SMALL, "root": data, **changes})
    accelerator = Accelerator(cpu=True)
    task = task_type(config, accelerator)
    trainer = Trainer(task, config, accelerator, resume_command(DLPTask, accelerator))
    trainer.run = Run.create(config, task.kind, accelerator, folder)
    return trainer


class DivergingTask(DLPTask):
    def losses(self, model, batch, progress):
        losses = super().losses(model, batch, progress)
        if progress.iteration == 4:
            losses["loss_kl_scale"] = losses["loss_kl_scale"] * float("nan")
            losses["loss"] = losses["loss"] + losses["loss_kl_scale"]
        return losses


def test_a_nan_stops_with_step_and_term_and_keeps_the_last_good_checkpoint(tmp_path, data):
    trainer = trainer_for(tmp_path, data, DivergingTask)
    with pytest.raises(TrainingError) as error:
        trainer.fit(trainer.run)
    assert "loss is nan, loss_kl_scale is nan at iteration 5 (epoch 0)" in str(error.value)
    assert f"--resume {trainer.run.path}" in str(error.value) and "\n" not in str(error.value)
    state = trainer.run.load_state()
    assert state["progress"]["iteration"] == 4
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, data):
    trainer = trainer_for(tmp_path, data)
    with torch.no_grad():
        trainer.model.fg_module.object_dec.fc[0].bias[0] = float("inf")
    with pytest.raises(
        TrainingError, match=r"fg_module.object_dec.fc.0.bias are not finite .* no checkpoint was saved"
    ):
        trainer.save_state()
    assert not trainer.run.state_path.exists()


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch
from utils import checkpoints

def half(contents, file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save({"a": torch.ones(3)}, sys.argv[1])
torch.save = half
checkpoints.save({"a": torch.zeros(3)}, sys.argv[1])
"""


def test_a_kill_while_saving_leaves_the_previous_file(tmp_path):
    path = tmp_path / "file.pth"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, path], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the file, and what was half-written
    assert torch.equal(checkpoints.load(path)["a"], torch.ones(3))
    checkpoints.save({"a": torch.full((3,), 2.0)}, path)
    assert torch.equal(checkpoints.load(path)["a"], torch.full((3,), 2.0))
    assert [file.name for file in tmp_path.iterdir()] == ["file.pth"]


def test_files_that_cannot_be_loaded_are_named(tmp_path, data):
    trainer = trainer_for(tmp_path, data)
    model = trainer.bare_model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = tmp_path / "whole.pth"
    checkpoints.save(model.state_dict(), whole)
    (tmp_path / "truncated.pth").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no weights")
    weights = model.state_dict()
    checkpoints.save({**weights, "logvar_kp": torch.zeros(7)}, tmp_path / "shape.pth")
    checkpoints.save({name: weights[name] for name in list(weights)[1:]}, tmp_path / "lacking.pth")
    checkpoints.save([1], tmp_path / "list.pth")
    messages = {
        "truncated.pth": "not a readable checkpoint",
        "empty.pth": "not a readable checkpoint",
        "text.pth": "not a readable checkpoint",
        "shape.pth": r"logvar_kp is \[7\], the model's \[\]",
        "lacking.pth": "lacks logvar_kp",
        "list.pth": "not a file of weights",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=rf"{name}: .*{message}") as error:
            checkpoints.load_weights(model, tmp_path / name)
        assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stages():
    stages = [training_stage(epoch, 2) for epoch in range(4)]
    assert [stage["warmup"] for stage in stages] == [True, True, False, False]
    assert [stage["noisy"] for stage in stages] == [True, True, True, False]


def test_batches_of_an_epoch():
    def indices(process=0, num_processes=1, epoch=0, batch=0, seed=0):
        batches = EpochBatches(50, 4, seed, process, num_processes)
        batches.start_at(Progress(epoch, batch))
        result = list(batches)
        assert len(result) == len(batches)
        return result

    whole = indices()
    flat = [i for batch in whole for i in batch]
    assert [len(batch) for batch in whole] == [4] * 12  # the last two items are dropped
    assert len(set(flat)) == 48 and set(flat) <= set(range(50)) and flat != sorted(flat)
    assert indices() == whole and indices(batch=5) == whole[5:]
    assert indices(epoch=1) != whole and indices(seed=1) != whole
    first, second = indices(0, 2), indices(1, 2)
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == whole
    with pytest.raises(UserError, match=r"batch_size is 60 .* 50 items"):
        EpochBatches(50, 60, 0)


def test_means_over_an_epoch_survive_a_save():
    accelerator = Accelerator(cpu=True)
    means = RunningMeans()
    for value in (1.0, 2.0):
        means.add({"a": torch.tensor(value), "b": torch.tensor(-value)})
    assert means.read(accelerator) == [{"a": 1.0, "b": -1.0}, {"a": 2.0, "b": -2.0}]
    other = RunningMeans()
    other.load_state_dict(means.state_dict())
    other.add({"a": torch.tensor(6.0), "b": torch.tensor(0.0)})
    other.read(accelerator)
    assert other.means() == {"a": 3.0, "b": -1.0}
