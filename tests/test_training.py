"""The training loop through DLPv2's command: exact resume, NaN, the run directory; checkpoints, batches and means."""

import json
import pickle
import signal
from functools import partial

import pytest
import torch
from accelerate import Accelerator

import train_dlp
from configs.schema import Config
from datasets import get_dataset
from eval.image_metrics import ImageMetrics
from models import ObjectDLP
from rundir.run import Run
from tests import runs
from tests.runs import (
    SHAPES,
    assert_same,
    assert_same_run,
    before,
    exit_code,
    kill,
    refuse_download,
    the_run,
    write_json,
)
from training import interruption, loop, particles
from training.batches import RunningMeans, ShuffledBatches
from training.command import resume_command
from training.loop import TrainingError, TrainingLoop
from training.particles import DLPTask, training_stage
from utils import checkpoints
from utils.errors import UserError

train, resume = partial(runs.train, train_dlp.main), partial(runs.resume, train_dlp.main)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """`SHAPES` with a root where the images are drawn once for all tests of this file."""
    return {**SHAPES, "root": str(tmp_path_factory.mktemp("shapes"))}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, config):
    """Three epochs of four steps that were never stopped."""
    return train(tmp_path_factory.mktemp("uninterrupted"), config)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, config):
    """Two epochs with image metrics and the figure of losses."""
    changes = {"eval_im_metrics": True, "num_epochs": 2, "train_size": 4}
    return train(tmp_path_factory.mktemp("measured"), config, figures=True, **changes)


# ------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(
    ("method", "iteration", "saved"),
    [
        ("_step", 3, 3),  # within the first epoch
        ("_step", 7, 6),
        ("_evaluate", 4, 4),  # an epoch that is finished but not evaluated
        ("_evaluate", 12, 12),  # the last one
    ],
)
def test_killed_and_resumed_equals_never_stopped(
    method, iteration, saved, tmp_path, config, uninterrupted, monkeypatch, capsys, recwarn
):
    with monkeypatch.context() as patched:
        before(patched, method, iteration, kill)
        assert exit_code(train, tmp_path, config) == -signal.SIGKILL
    run = the_run(tmp_path)
    assert run.load_state()["progress"]["iteration"] == saved
    resume(run)
    assert "resumed at epoch" in capsys.readouterr().out
    assert_same_run(run, uninterrupted)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_an_evaluation_that_fails_is_made_up_for(tmp_path, config, uninterrupted, monkeypatch):
    def fail():
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        before(patched, "evaluate", 8, fail, owner=DLPTask)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, config)
    run = the_run(tmp_path)
    assert [record["epoch"] for record in run.records()] == [0]
    resume(run)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(("number", "iteration"), [(signal.SIGINT, 1), (signal.SIGTERM, 3)])  # 3: the epoch's last step
def test_a_signal_saves_and_says_how_to_go_on(number, iteration, tmp_path, config, uninterrupted, monkeypatch, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        before(patched, "_step", iteration, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as ended:
            train(tmp_path, config)
    run = the_run(tmp_path)
    assert ended.value.code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    output, log = capsys.readouterr().out, (run.path / "log.txt").read_text()
    line = f"stopped at epoch 0, iteration {iteration + 1}; go on with: python train_dlp.py --resume {run.path.name}"
    assert line in output and line in log
    assert run.load_state()["progress"]["iteration"] == iteration + 1 and run.records() == []
    resume(run)
    assert_same_run(run, uninterrupted)


def test_a_second_signal_ends_the_process_at_once(tmp_path, config, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    before(monkeypatch, "_step", 3, twice)
    monkeypatch.setattr(interruption, "SAME_REQUEST", -1)
    assert exit_code(train, tmp_path, config) == -signal.SIGTERM
    assert the_run(tmp_path).load_state()["progress"]["iteration"] == 3


def test_more_epochs_than_at_first(tmp_path, config, uninterrupted, capsys):
    run = train(tmp_path, config, num_epochs=1)
    resume(run)
    assert "all 1 epochs are done; more: --num_epochs" in capsys.readouterr().out
    resume(run, num_epochs=3)
    assert_same_run(run, uninterrupted)
    assert "are done" not in capsys.readouterr().out
    assert Run.open(run.path).config.num_epochs == 3


def test_a_run_made_by_an_older_version_goes_on(tmp_path, config, uninterrupted, monkeypatch):
    """Its configuration does not name the kind, its state not whether an evaluation is due."""
    with monkeypatch.context() as patched:
        before(patched, "_evaluate", 4, kill)
        exit_code(train, tmp_path, config)
    run = the_run(tmp_path)
    state, hparams = run.load_state(), json.loads((run.path / "hparams.json").read_text())
    assert state["progress"].pop("evaluation_due") and hparams.pop("kind") == "dlp"
    run.save_state(state)
    (run.path / "hparams.json").write_text(json.dumps(hparams))
    resume(run)
    assert_same_run(run, uninterrupted)
    assert json.loads((run.path / "hparams.json").read_text())["kind"] == "dlp"


def test_workers_change_nothing(tmp_path, config, uninterrupted):
    assert_same_run(train(tmp_path, config, num_workers=2), uninterrupted)


def test_an_evaluation_changes_nothing_but_the_best_weights(tmp_path, config, uninterrupted):
    seldom = train(tmp_path, config, eval_epoch_freq=5)
    mine, theirs = (run.load_state() for run in (seldom, uninterrupted))
    for name in ("model", "optimizer", "scheduler"):
        assert_same(mine[name], theirs[name], name)
    # Besides every fifth epoch, from the first on, the last is evaluated.
    assert ["val_loss" in record for record in seldom.records()] == [True, False, True]


# -------------------------------------------------------------------------------------------------- the run directory


def test_the_run_directory(measured):
    saves = {path.name for path in (measured.path / "saves").iterdir()}
    assert saves == {"shapes_dlp.pth", "shapes_dlp_best.pth", "training_state.pt"}
    figures = {path.name for path in (measured.path / "figures").iterdir()}
    names = ["image", "image_valid", "image_obj", "image_seg"]
    assert figures == {f"{name}_{epoch}.jpg" for name in names for epoch in range(2)} | {"shapes_dlp_graph.jpg"}
    records = measured.records()
    # The image metrics are measured from epoch 1 on; "psnr" of epoch 0 is training's.
    assert ["ssim" in record for record in records] == [False, True]
    last = json.loads((measured.path / "last_val_image_metrics.json").read_text())
    assert last.keys() == {"ssim", "psnr"} and last == {name: records[1][name] for name in last}
    assert {"loss", "loss_rec", "kl", "visible", "beta_a", "beta_b", "scale", "val_loss"} <= records[0].keys()


def test_the_configuration_and_the_records_are_kept(uninterrupted, config):
    hparams = json.loads((uninterrupted.path / "hparams.json").read_text())
    assert hparams.items() >= {"kind": "dlp", **config}.items()
    records = uninterrupted.records()
    assert [(record["epoch"], record["iteration"]) for record in records] == [(0, 4), (1, 8), (2, 12)]
    assert [round(record["lr"] / 2e-4, 6) for record in records] == [1, 0.95, 0.9025]
    assert all(record["steps_per_second"] > 0 for record in records)
    log = (uninterrupted.path / "log.txt").read_text()
    assert all(f"epoch {epoch} iteration {4 * (epoch + 1)} " in log for epoch in range(3))


def test_records_are_means_over_their_own_epoch(tmp_path, config, monkeypatch):
    seen, losses = [], DLPTask.losses

    def noting(*arguments):
        result = losses(*arguments)
        seen.append(result["loss"].item())
        return result

    monkeypatch.setattr(DLPTask, "losses", noting)
    records = train(tmp_path, config, num_epochs=2, eval_epoch_freq=9).records()
    for epoch, record in enumerate(records):
        assert record["loss"] == pytest.approx(sum(seen[4 * epoch : 4 * epoch + 4]) / 4)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_best_weights_are_those_of_the_best_epoch(stopped, tmp_path, config, monkeypatch):
    """Also where a run goes on before a worse epoch."""
    weights, scores = [], {"val_loss": [3.0, 2.0, 2.5], "lpips": [0.3, 0.4, 0.5]}

    def evaluate(task, model, progress, run):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return {name: values[progress.epoch] for name, values in scores.items()}

    monkeypatch.setattr(DLPTask, "evaluate", evaluate)
    run = train(tmp_path, config, num_epochs=2 if stopped else 3)
    resume(run, num_epochs=3)
    assert [record["val_loss"] for record in run.records()] == scores["val_loss"]
    assert run.load_state()["best"] == {"val_loss": 2.0, "lpips": 0.3}
    for which, epoch in (("_best", 1), ("_best_lpips", 0)):
        assert_same(dict(checkpoints.load(run.weights_path(which))), weights[epoch], which)
    assert all(any(not torch.equal(weights[i][name], weights[i + 1][name]) for name in weights[0]) for i in (0, 1))


def test_training_from_python_returns_the_saved_model(tmp_path, config, monkeypatch):
    path = write_json(tmp_path, config, num_epochs=1, train_size=4)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.chdir(tmp_path)
    model = train_dlp.train_dlp(path)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert type(model) is ObjectDLP and not any(module.training for module in model.modules())
    run = the_run(tmp_path)
    for weights in (checkpoints.load(run.weights_path()), run.load_state()["model"], run.load_model().state_dict()):
        assert_same(dict(model.state_dict()), dict(weights), "weights")
    again = particles.train(DLPTask, run.config, run.path).trained_model  # nothing is left to do
    assert not again.training
    assert_same(dict(again.state_dict()), dict(model.state_dict()), "weights")


def test_training_starts_from_the_weights_that_are_named(tmp_path, config, uninterrupted, monkeypatch):
    states, step = [], TrainingLoop._step

    def noting(trainer, batch):
        states.append({name: value.clone() for name, value in trainer.bare_model.state_dict().items()})
        step(trainer, batch)

    monkeypatch.setattr(TrainingLoop, "_step", noting)
    path = uninterrupted.weights_path()
    train(tmp_path, config, num_epochs=1, train_size=4, load_model=True, pretrained_path=str(path))
    assert_same(states[0], dict(checkpoints.load(path)), "weights")


def test_data_sets_and_metrics_are_made_once(tmp_path, config, monkeypatch):
    """For a training with two evaluations."""
    made, image_dataset, add = [], get_dataset.get_image_dataset, ImageMetrics.add

    def noting_dataset(ds, root, mode, *others, **options):
        made.append(mode)
        return image_dataset(ds, root, mode, *others, **options)

    def noting_metric(metrics, name):
        made.append(name)
        add(metrics, name)

    monkeypatch.setattr(get_dataset, "get_image_dataset", noting_dataset)
    monkeypatch.setattr(ImageMetrics, "add", noting_metric)
    run = train(tmp_path, config, num_epochs=2, train_size=4, eval_im_metrics=True)
    assert ["val_loss" in record for record in run.records()] == [True, True] and "ssim" in run.records()[1]
    assert sorted(made) == ["psnr", "ssim", "train", "val"]


def test_lpips_and_the_vgg_loss(tmp_path, config, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    changes = {"eval_im_metrics": True, "metrics": ["lpips", "psnr"], "recon_loss_type": "vgg", "train_size": 4}
    run = train(tmp_path, config, **changes)
    assert run.find_weights() == run.weights_path("_best_lpips") and run.weights_path("_best_lpips").is_file()
    values = [record["lpips"] for record in run.records() if "lpips" in record]
    assert len(values) == 2 and run.load_state()["best"]["lpips"] == min(values)


def test_missing_weights_are_named_once_and_training_goes_on_without_lpips(tmp_path, config, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse_download)
    changes = {"eval_im_metrics": True, "metrics": ["lpips", "psnr"], "num_epochs": 2, "train_size": 4}
    run = train(tmp_path, config, **changes)
    assert "psnr" in run.records()[1] and "lpips" not in run.records()[1]
    (line,) = [line for line in (run.path / "log.txt").read_text().splitlines() if "lpips is left out" in line]
    for words in ("vgg16-397923af.pth", "vgg.pth", str(tmp_path / "empty"), "--metrics ssim psnr"):
        assert words in line


def test_missing_weights_of_the_vgg_loss_stop_before_anything_is_made(tmp_path, config, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse_download)
    with pytest.raises(UserError) as error:
        train(tmp_path, config, recon_loss_type="vgg", metrics=["lpips"], eval_im_metrics=True)
    for words in ("vgg16-397923af.pth", "vgg.pth", "--recon_loss_type mse", "--metrics ssim psnr"):
        assert words in str(error.value)
    assert not list(tmp_path.glob("*_shapes_dlp*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "nowhere"], ["nowhere", "no such run directory"]),
        (["--resume", ""], ["not a run directory", "no hparams.json"]),
        (["--resume", "{run}", "--lr", "0.1"], ["lr is 0.1", "0.0002", "num_epochs"]),
        (["-d", "nothing"], ["nothing.json", "not found"]),
        (["-d", "{config}", "--batch_size", "25"], ["train_size is 16", "batch_size 25"]),
        (["-d", "{config}", "--ds", "nothing"], ["nothing", "balls, clevrer"]),
        (["-d", "{config}", "--load_model", "true", "--pretrained_path", "no.pth"], ["no.pth", "no such"]),
        (["-d", "{config}", "--anchor_s", "0.3"], ["anchor_s is 0.3", "legal:"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, tmp_path, config, uninterrupted, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, hparams = write_json(tmp_path, config), uninterrupted.path / "hparams.json"
    text = hparams.read_text()
    with pytest.raises(SystemExit) as ended:
        train_dlp.run_command(
            lambda: train_dlp.main([a.format(run=uninterrupted.path, config=path) for a in arguments])
        )
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: ") and all(word in line for word in words)
    assert hparams.read_text() == text
    assert not list(tmp_path.glob("*_shapes_dlp*")), "a run directory was left behind"


# -------------------------------------------------------------------------------------------- what is not finite


def new_loop(folder, config, task_type=DLPTask):
    config, accelerator = Config.from_dict(config), Accelerator(cpu=True)
    task = task_type(config, accelerator)
    result = TrainingLoop(task, config, accelerator, resume_command(task.kind, accelerator))
    result.run = Run.create(config, task.kind, accelerator, folder)
    return result


class DivergingTask(DLPTask):
    def losses(self, model, batch, progress):
        losses = super().losses(model, batch, progress)
        if progress.iteration == 3:
            losses["loss_kl_scale"] = losses["loss_kl_scale"] * float("nan")
            losses["loss"] = losses["loss"] + losses["loss_kl_scale"]
        return losses


def test_a_nan_stops_with_step_and_term_and_keeps_the_last_good_checkpoint(tmp_path, config):
    diverging = new_loop(tmp_path, config, DivergingTask)
    with pytest.raises(TrainingError) as error:
        diverging.fit(diverging.run)
    text = str(error.value)
    for words in ("loss is nan", "loss_kl_scale is nan", "iteration 4", "epoch 0", f"--resume {diverging.run.path}"):
        assert words in text
    assert "\n" not in text and "loss_rec" not in text and error.value.exit_status == 1
    assert f"error: {text}\n" in (diverging.run.path / "log.txt").read_text()
    state = diverging.run.load_state()
    assert state["progress"]["iteration"] == 3
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_nan_is_noticed_without_a_save(tmp_path, config, monkeypatch):
    """At the latest after `READ_INTERVAL` steps."""
    monkeypatch.setattr(loop, "READ_INTERVAL", 2)
    diverging = new_loop(tmp_path, {**config, "save_every": 100, "train_size": 32}, DivergingTask)
    with pytest.raises(TrainingError, match="iteration 4"):
        diverging.fit(diverging.run)
    assert diverging.progress.iteration == 4 and not diverging.run.state_path.exists()


def test_an_infinite_psnr_is_no_divergence(tmp_path, config, monkeypatch):
    """That of a perfect reconstruction; the file of records stays JSON."""
    losses = DLPTask.losses

    def perfect(*arguments):
        return {**losses(*arguments), "psnr": torch.tensor(float("inf"))}

    monkeypatch.setattr(DLPTask, "losses", perfect)
    run = train(tmp_path, config, num_epochs=2, tracker="tensorboard")
    for line in run.metrics_path.read_text().splitlines():
        record = json.loads(line, parse_constant=pytest.fail)
        assert record["psnr"] is None and record["loss"] > 0
    assert "psnr inf" in (run.path / "log.txt").read_text()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, config):
    infinite = new_loop(tmp_path, config)
    with torch.no_grad():
        infinite.model.fg_module.object_dec.fc[0].bias[0] = float("inf")
    with pytest.raises(TrainingError, match=r"fg_module.object_dec.fc.0.bias .*not finite.* no checkpoint was saved"):
        infinite.save_state()
    assert not infinite.run.state_path.exists()


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_kill_while_saving_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "file.pth"
    checkpoints.save({"a": torch.ones(3)}, path)

    def half(contents, file):
        file.write(b"half")
        file.flush()
        kill()

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        assert exit_code(checkpoints.save, {"a": torch.zeros(3)}, path) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the file, and what was half-written
    assert torch.equal(checkpoints.load(path)["a"], torch.ones(3))
    checkpoints.save({"a": torch.full((3,), 2.0)}, path)
    assert torch.equal(checkpoints.load(path)["a"], torch.full((3,), 2.0))
    assert [file.name for file in tmp_path.iterdir()] == ["file.pth"]


class CreatesFile:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"a": CreatesFile(tmp_path / "created")}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(CreatesFile(tmp_path / "created"), protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match=f"{name}: holds an? .*, which is not loaded for safety"):
            checkpoints.load(tmp_path / name)
    assert not (tmp_path / "created").exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes()).close()
    assert (tmp_path / "created").exists()  # as it would


def test_files_that_cannot_be_loaded_are_named(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    weights, whole = {name: value + 1 for name, value in first.items()}, tmp_path / "whole.pth"
    checkpoints.save(weights, whole)
    (tmp_path / "truncated.pth").write_bytes(whole.read_bytes()[:500])
    content = bytearray(whole.read_bytes())
    content[content.index(weights["0.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no weights")
    checkpoints.save({**weights, "1.bias": torch.zeros(7)}, tmp_path / "shape.pth")
    checkpoints.save({name: weights[name] for name in list(weights)[1:]}, tmp_path / "lacking.pth")
    checkpoints.save({**weights, "2.bias": torch.zeros(1)}, tmp_path / "more.pth")
    checkpoints.save([1], tmp_path / "list.pth")
    not_finite = {"0.bias": torch.full((3,), torch.inf), "1.bias": torch.tensor([torch.nan])}
    checkpoints.save({**weights, **not_finite}, tmp_path / "nan.pth")
    checkpoints.save({**weights, "1.bias": torch.zeros(1, dtype=torch.int64)}, tmp_path / "whole_numbers.pth")
    checkpoints.save({**weights, "1.bias": torch.zeros(1).to_sparse()}, tmp_path / "sparse.pth")
    messages = {
        "gone.pth": "no such",
        "truncated.pth": "not a readable checkpoint",
        "flipped.pth": "not a readable checkpoint: it is truncated, damaged or of another kind",
        "empty.pth": "not a readable checkpoint",
        "text.pth": "not a readable checkpoint",
        "shape.pth": r"1\.bias is \[7\], .*\[1\]",
        "lacking.pth": r"lacks 0\.weight",
        "more.pth": r"has 2\.bias",
        "list.pth": "holds a list; legal: the weights of a Sequential",
        "nan.pth": r"0\.bias and 1 more hold values that are NaN or infinite",
        "whole_numbers.pth": r"1\.bias is torch\.int64, the model's floats",
        "sparse.pth": r"1\.bias is sparse, the model's floats",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=rf"{name}: .*{message}") as error:
            checkpoints.load_weights(model, tmp_path / name)
        assert "\n" not in str(error.value)
    assert_same(dict(model.state_dict()), first, "weights")
    checkpoints.load_weights(model, whole)
    assert_same(dict(model.state_dict()), weights, "weights")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(first, tmp_path / "without_checksums.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    checkpoints.load_weights(model, tmp_path / "without_checksums.pth")
    assert_same(dict(model.state_dict()), first, "weights")


# ------------------------------------------------------------------------------------------- stages, batches, means


def test_stages():
    stages = [training_stage(epoch, 2) for epoch in range(4)]
    assert [stage["warmup"] for stage in stages] == [True, True, False, False]
    assert [stage["noisy"] for stage in stages] == [True, True, True, False]


def batch_list(process=0, num_processes=1, epoch=0, batch=0, count=None, seed=0):
    sampler = ShuffledBatches(50, 4, seed, process, num_processes)
    sampler.start_at(epoch, batch, sampler.num_steps - batch if count is None else count)
    result = list(sampler)
    assert len(result) == len(sampler)
    return [batch.indices for batch in result]


def test_batches_of_an_epoch():
    whole = batch_list()
    flat = [i for batch in whole for i in batch]
    assert [len(batch) for batch in whole] == [4] * 12  # the last two items are dropped
    assert len(set(flat)) == 48 and set(flat) <= set(range(50)) and flat != sorted(flat)
    torch.manual_seed(9)
    assert batch_list() == whole and batch_list(batch=5) == whole[5:]
    assert batch_list(epoch=1) != whole and batch_list(seed=1) != whole
    first, second = batch_list(0, 2), batch_list(1, 2)
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == whole
    with pytest.raises(UserError, match=r"batch_size is 60 .* 50 items.* legal: at most 50"):
        ShuffledBatches(50, 60, 0)
    with pytest.raises(UserError, match=r"batch_size is 26 on 2 .* legal: at most 25"):
        ShuffledBatches(50, 26, 0, 0, 2)


def test_batches_go_on_from_epoch_to_epoch():
    expected = [batch for epoch in range(4) for batch in batch_list(1, 2, epoch)]
    assert len(expected) == 24
    for start in range(19):
        assert batch_list(1, 2, *divmod(start, 6), count=23 - start) == expected[start:23]
    assert batch_list(1, 2, 0, 6, count=3) == expected[6:9]  # from the end of an epoch
    assert batch_list(count=0) == []


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
    assert other.means() == {"a": 3.0, "b": -1.0} and means.means() == {"a": 1.5, "b": -1.5}


@pytest.mark.parametrize(
    "script", [f"train_{kind}{several}.py" for kind in ("dlp", "ddlp") for several in ("", "_accelerate")]
)
def test_the_scripts_start_and_stop_with_one_line(script, tmp_path, monkeypatch, capsys):
    assert runs.run_script(monkeypatch, tmp_path, script, "--resume", "missing") == 2
    assert (
        capsys.readouterr().err
        == "error: missing: no such run directory; legal: a run directory, or its hparams.json\n"
    )


def test_a_records_line_has_counts_in_full():
    record = {"epoch": 123456, "iteration": 11220, "lr": 0.000123456, "loss": 97.45678}
    assert loop.record_line(record) == "epoch 123456 iteration 11220 lr 0.0001235 loss 97.46"
