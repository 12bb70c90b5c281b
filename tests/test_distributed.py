"""Training on two processes, as `accelerate launch` starts one per device."""

import json
import re
import shutil
import signal

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

import train_ddlp
import train_diffuse_ddlp
import train_dlp
from eval.eval_gen_metrics import eval_ddlp_im_metric
from rundir.run import Run
from tests import runs
from tests.balls import ROOT, SMALL, make_data, make_run
from tests.runs import (
    SHAPES,
    assert_nearly_the_same_run,
    assert_one_model,
    assert_same_run,
    launch,
    the_run,
    without_noise,
    write_json,
)
from utils import checkpoints
from utils.errors import run_command

# Without correlation maps, whose norm is the whole batch's, the items of a batch do not depend on each other.
TWO_CLIPS = {
    "batch_size": 1,
    "gradient_accumulation_steps": 2,
    "grad_clip": 100.0,
    "use_correlation_heatmaps": False,
    "train_size": 16,
    "seed": 5,
}
DLP = {"batch_size": 2, "num_epochs": 6, "eval_epoch_freq": 9, "save_every": 100}
DIFFUSION = {"train_num_steps": 8, "save_and_sample_every": 4}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A folder for each of several trainings on two processes. Returns the folder of these, and the output."""
    folder = tmp_path_factory.mktemp("launched")
    data = make_data(folder / "data")
    for name in ("dlp", "ddlp", "joint", "diffusion"):
        (folder / name).mkdir()
    # Where there is no GPU, "cuda" means the CPU, also here.
    write_json(folder / "dlp", SHAPES, root=str(folder / "shapes"), device="cuda", **DLP)
    # One video to validate: nothing is left for the second process.
    write_json(folder / "ddlp", SMALL, root=data, eval_epoch_freq=2, val_size=1, dyn_only_epoch=1)
    write_json(folder / "joint", SMALL, root=data, **TWO_CLIPS)
    ddlp = make_run(folder, data, use_correlation_heatmaps=False)
    write_json(folder / "diffusion", runs.DIFFUSION, ds_root=data, ddlp_dir=str(ddlp.path), **DIFFUSION)
    dlp, diffusion = "train_dlp_accelerate.py", "train_diffuse_ddlp.py"
    output = launch(
        folder,
        ("dlp/whole", dlp, "-d", "../small.json"),
        ("dlp/stopped", dlp, "-d", "../small.json", "SIGTERM@18"),
        ("dlp/stopped", dlp, "--resume", "RUN", "SLOW", "SIGINT@22"),
        ("dlp/stopped", dlp, "--resume", "RUN"),
        ("ddlp", "train_ddlp_accelerate.py", "-d", "small.json"),
        ("joint", "train_ddlp_accelerate.py", "-d", "small.json", "NO_NOISE"),
        ("diffusion/whole", diffusion, "-c", "../small.json"),
        ("diffusion/stopped", diffusion, "-c", "../small.json", "--train_num_steps", "6"),
        ("diffusion/stopped", diffusion, "--resume", "RUN", "--train_num_steps", "8"),
    )
    return folder, output


def test_two_processes_train_one_model_and_go_on_exactly(launched):
    """A signal to one of them stops both, after the same step, also where steps are slow."""
    folder, output = launched
    whole, stopped = the_run(folder / "dlp" / "whole"), the_run(folder / "dlp" / "stopped")
    # 16 images, 2 processes of 2 images
    assert [record["iteration"] for record in whole.records()] == [4, 8, 12, 16, 20, 24]
    assert (whole.path / "log.txt").read_text().count("epoch 0 iteration 4 ") == 1
    assert_one_model(folder / "dlp" / "whole", checkpoints.load(whole.weights_path()))
    go_on = f"accelerate launch --config_file ./accel_conf.yml train_dlp_accelerate.py --resume {stopped.path.name}"
    # After the signal in the step after 18 at the next step at which they ask each other; after the one in 22 at once.
    (place, _), (second, _) = re.findall(f"stopped at (epoch ., iteration (19|20|23)); go on with: {go_on}", output)
    assert f"resumed at {place}" in output and second == "epoch 5, iteration 23"
    told, signalled = ((folder / "dlp" / "stopped" / f"status_{process}").read_text().split() for process in (0, 1))
    assert signalled == [str(128 + signal.SIGTERM), str(128 + signal.SIGINT), "0"]
    assert told[2] == "0" and all(int(status) > 128 for status in told[:2])
    assert "destroy_process_group" not in output  # PyTorch's warning where a training is not ended
    assert_same_run(stopped, whole)


def test_one_process_makes_the_data_while_the_others_wait_for_its_lock(launched):
    """In a collective they would give up, here after two seconds; who draws takes three from when the other waits for
    the lock."""
    folder, _ = launched
    assert (folder / "waits_0").exists() and (folder / "waits_1").exists()
    assert len(list((folder / "shapes").glob("*.npy"))) == 4  # images and shapes, to train and to validate


def data_of(folder):
    """Of each process: the epoch of each step and the sums of its batches' pixels; the clips that it encoded."""
    return [json.loads((folder / f"data_{process}.json").read_text()) for process in (0, 1)]


def test_each_item_is_seen_once_per_epoch(launched):
    (first, _), (second, _) = data_of(launched[0] / "dlp" / "whole")
    epochs = {}
    for epoch, batches in first + second:
        epochs.setdefault(epoch, []).extend(batches)
    assert sorted(epochs) == list(range(6)) and len(epochs[0]) == 8
    assert epochs[0] != epochs[1]
    assert len({sum(batches) for batches in epochs.values()}) == 1  # the same images, in another order


def test_two_processes_compute_what_one_does_that_accumulates_two_batches(launched, tmp_path):
    """Random numbers and all."""
    expected = the_run(launched[0] / "dlp" / "whole")
    alone = runs.train(
        train_dlp.main, tmp_path, SHAPES, root=expected.config.root, **DLP, gradient_accumulation_steps=2
    )
    assert_nearly_the_same_run(alone, expected)


def test_two_processes_compute_what_one_does_with_all_their_batches(launched, tmp_path):
    """Losses, gradients, weights, validation and metrics, where no noise is drawn; each process accumulates two."""
    expected = the_run(launched[0] / "joint")
    assert expected.records()[0]["grad_norm"] > 0 and "ssim" in expected.records()[1]
    with without_noise():
        changes = {**TWO_CLIPS, "batch_size": 4, "gradient_accumulation_steps": 1}
        alone = runs.train(train_ddlp.main, tmp_path, SMALL, root=expected.config.root, **changes)
    # Shares of what moves in a batch are not means over its items.
    assert_nearly_the_same_run(alone, expected, without=["bg_share", "fg_share"])


def test_another_number_of_processes_goes_on_in_the_same_order(launched, tmp_path):
    folder, _ = launched
    run = the_run(folder / "dlp" / "whole")
    copy = Run.open(shutil.copytree(run.path, tmp_path / "run"))
    runs.resume(train_dlp.main, copy, num_epochs=7)
    log = (copy.path / "log.txt").read_text()
    assert "with 1 process(es) instead of 2: the same order of the data, but not to the bit" in log
    assert copy.records()[-1]["iteration"] == 24 + 8 and copy.load_state()["num_processes"] == 1


@pytest.mark.parametrize("path", [ROOT / "accel_conf.yml", *sorted((ROOT / "configs" / "accelerate").glob("*.yml"))])
def test_accelerate_reads_our_configurations(path):
    """All of them start processes, and leave to the run what are its keys."""
    config = load_config_from_file(str(path))
    assert config.num_processes > 1 and config.mixed_precision == "no" and not config.dynamo_config
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train_dlp.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.multi_gpu and arguments.num_processes == config.num_processes


def test_a_process_that_is_killed_ends_the_others_with_one_line(launched, tmp_path):
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run", SHAPES, root=str(launched[0] / "shapes"), **{**DLP, "save_every": 3})
    output = launch(tmp_path, ("run", "train_dlp_accelerate.py", "-d", "small.json", "SIGKILL@5"), status=1)
    run = the_run(tmp_path / "run")
    place = (
        "epoch 1, iteration 5; the last good checkpoint is kept; go on from it with: accelerate launch --config_file"
    )
    line = (
        f"error: another process has ended at {place} ./accel_conf.yml train_dlp_accelerate.py --resume {run.path.name}"
    )
    assert line in output.splitlines() and run.load_state()["progress"]["iteration"] == 4
    assert output.count("Traceback") == 1 and "torch/distributed/run.py" in output  # of what started the processes


@pytest.mark.parametrize(("to", "name"), [("one", "SIGTERM"), ("group", "SIGINT")])
def test_a_signal_in_an_evaluation_stops_both(to, name, launched, tmp_path):
    """Also the process that waits for the other one, in an operation that Python's signal handlers do not enter."""
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run", SHAPES, root=str(launched[0] / "shapes"), **DLP)
    output = launch(tmp_path, ("run", "train_dlp_accelerate.py", "-d", "small.json", f"{name}@{to}"), status=1)
    run = the_run(tmp_path / "run")
    assert "stopped at epoch 0, iteration 4; go on with: accelerate launch" in output and "error:" not in output
    assert [(tmp_path / "run" / f"left_{process}").read_text() for process in (0, 1)] == ["Stopped", "Stopped"]
    progress = run.load_state()["progress"]
    assert progress["iteration"] == 4 and progress["evaluation_due"] and run.records() == []


def test_also_before_training_a_lost_process_is_one_line(capsys):
    def lose(text):
        raise RuntimeError(text)

    with pytest.raises(SystemExit) as ended:
        run_command(lambda: lose("[gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:25809"))
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: another process of this training has ended\n"
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_command(lambda: lose("shapes do not fit"))


def test_two_processes_train_and_measure_one_ddlp(launched, tmp_path):
    folder = launched[0] / "ddlp"
    run = the_run(folder)
    assert_one_model(folder, checkpoints.load(run.weights_path()))
    assert [record["iteration"] for record in run.records()] == [2, 4]  # 16 clips, 2 processes of 4 clips
    # The video's metrics, of which the second process has none, are those of one process alone.
    horizon, seen = SMALL["animation_horizon"], SMALL["cond_steps"]
    options = {"eval_dir": tmp_path, "cond_steps": seen, "metrics": ("ssim", "psnr")}
    alone = eval_ddlp_im_metric(run.load_model(), "cpu", run.config, horizon, **options)
    assert {name: run.records()[1][name] for name in alone} == pytest.approx(alone, rel=1e-5)
    assert len(list(run.figures.glob("e1_traj_anim_*.gif"))) == 1


def test_two_processes_train_one_diffusion_and_go_on_exactly(launched, tmp_path):
    folder, _ = launched
    whole, stopped = (the_run(folder / "diffusion" / name) for name in ("whole", "stopped"))
    encoded = [data_of(folder / "diffusion" / name) for name in ("whole", "stopped")]
    assert sorted(clip for _, clips in encoded[0] for clip in clips) == list(range(33))  # once, by both
    assert all(clips == [] for _, clips in encoded[1])
    state = whole.load_state()
    assert_one_model(folder / "diffusion" / "whole", state["model"])
    # 33 clips, 2 processes of 4: 4 steps an epoch
    assert [(record["step"], record["epoch"]) for record in whole.records()] == [(4, 0), (8, 1)]
    assert (whole.path / "log.txt").read_text().count(" step 4 ") == 1 and state["ema"]["step"] == 8
    for name in ("model", "optimizer", "ema", "progress"):
        runs.assert_same(stopped.load_state()[name], state[name], name)
    config = {**runs.DIFFUSION, "ds_root": whole.config.ds_root, "ddlp_dir": whole.config.ddlp_dir, **DIFFUSION}
    alone = runs.train(train_diffuse_ddlp.main, tmp_path, config, gradient_accumulation_steps=2)
    assert_nearly_the_same_run(alone, whole)
