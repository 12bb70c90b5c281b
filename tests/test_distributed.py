"""Training on two processes, as `accelerate launch` starts one per device."""

import pytest

import train_diffuse_ddlp
import train_dlp
from eval.eval_gen_metrics import eval_ddlp_im_metric
from tests import runs
from tests.balls import SMALL, make_data, make_run
from tests.runs import SHAPES, assert_one_model, assert_same_run, launch, the_run, write_json
from utils import checkpoints
from utils.errors import UserError


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A folder for each of several trainings on two processes. Returns the folder of these, and the output."""
    folder = tmp_path_factory.mktemp("launched")
    data = make_data(folder / "data")
    for name in ("dlp", "ddlp", "diffusion"):
        (folder / name).mkdir()
    changes = {"batch_size": 2, "num_epochs": 6, "eval_epoch_freq": 9, "save_every": 100}
    write_json(folder / "dlp", SHAPES, root=str(folder / "shapes"), **changes)
    write_json(folder / "ddlp", SMALL, root=data, eval_epoch_freq=2, val_size=None, dyn_only_epoch=1)
    ddlp = make_run(folder, data)
    changes = {"train_num_steps": 8, "save_and_sample_every": 4}
    write_json(folder / "diffusion", runs.DIFFUSION, ds_root=data, ddlp_dir=str(ddlp.path), **changes)
    dlp, diffusion = "train_dlp_accelerate.py", "train_diffuse_ddlp.py"
    output = launch(
        folder,
        ("dlp/whole", dlp, "-d", "../small.json"),
        ("dlp/stopped", dlp, "-d", "../small.json", "SIGTERM@18"),
        ("dlp/stopped", dlp, "--resume", "RUN"),
        ("ddlp", "train_ddlp_accelerate.py", "-d", "small.json"),
        ("diffusion/whole", diffusion, "-c", "../small.json"),
        ("diffusion/stopped", diffusion, "-c", "../small.json", "--train_num_steps", "6"),
        ("diffusion/stopped", diffusion, "--resume", "RUN", "--train_num_steps", "8"),
    )
    return folder, output


def test_two_processes_train_one_model_and_go_on_exactly(launched):
    """A signal to one of them stops both."""
    folder, output = launched
    whole, stopped = the_run(folder / "dlp" / "whole"), the_run(folder / "dlp" / "stopped")
    # 16 images, 2 processes of 2 images
    assert [record["iteration"] for record in whole.records()] == [4, 8, 12, 16, 20, 24]
    assert (whole.path / "log.txt").read_text().count("epoch 0 iteration 4 ") == 1
    assert_one_model(folder / "dlp" / "whole", checkpoints.load(whole.weights_path()))
    line = "stopped at epoch 4, iteration 20; go on with: accelerate launch --config_file ./accel_conf.yml"
    assert output.count(f"{line} train_dlp_accelerate.py --resume {stopped.path.name}") == 1
    assert "resumed at epoch 4, iteration 20" in output
    assert_same_run(stopped, whole)
    with pytest.raises(UserError, match=r"was trained by 2 process\(es\)"):
        runs.resume(train_dlp.main, whole, num_epochs=7)


def test_two_processes_train_and_measure_one_ddlp(launched, tmp_path):
    folder = launched[0] / "ddlp"
    run = the_run(folder)
    assert_one_model(folder, checkpoints.load(run.weights_path()))
    assert [record["iteration"] for record in run.records()] == [2, 4]  # 16 clips, 2 processes of 4 clips
    # The four videos' metrics, two from each process, are those of one process alone.
    horizon, seen = SMALL["animation_horizon"], SMALL["cond_steps"]
    alone = eval_ddlp_im_metric(
        run.load_model(), "cpu", run.config, horizon, eval_dir=tmp_path, cond_steps=seen, metrics=("ssim", "psnr")
    )
    # The correlation maps' norm is the whole batch's, so that it matters a little which videos are together.
    assert {name: run.records()[1][name] for name in alone} == pytest.approx(alone, rel=1e-3)
    assert len(list(run.figures.glob("e1_traj_anim_*.gif"))) == 4


def test_two_processes_train_one_diffusion_and_go_on_exactly(launched):
    folder, output = launched
    whole, stopped = (the_run(folder / "diffusion" / name) for name in ("whole", "stopped"))
    # Once for all processes: the clips of DDLP's dynamics, and the diffusion's.
    assert output.count("encoding the training clips of balls once") == 2
    state = whole.load_state()
    assert_one_model(folder / "diffusion" / "whole", state["model"])
    # 33 clips, 2 processes of 4: 4 steps an epoch
    assert [(record["step"], record["epoch"]) for record in whole.records()] == [(4, 0), (8, 1)]
    assert (whole.path / "log.txt").read_text().count(" step 4 ") == 1 and state["ema"]["step"] == 8
    for name in ("model", "optimizer", "ema", "progress", "random_states"):
        runs.assert_same(stopped.load_state()[name], state[name], name)
    with pytest.raises(UserError, match=r"was trained by 2 process\(es\)"):
        runs.resume(train_diffuse_ddlp.main, whole)
