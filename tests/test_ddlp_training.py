"""DDLP's training through its command: run directory, stages, discount, exact resume."""

import json

import imageio.v3 as iio
import pytest
import torch
from PIL import Image

import train_ddlp
from configs.schema import Config
from models import ObjectDynamicsDLP
from rundir.run import Run
from tests.balls import run_in, write_config
from tests.test_training import assert_same_run, train
from training.loop import Trainer, make_accelerator
from utils import checkpoints
from utils.errors import UserError


def the_run(folder):
    (path,) = folder.glob("*_balls_ddlp*")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, balls_data):
    """Two epochs of four iterations, the first without the dynamics."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder, balls_data, start_dyn_epoch=1, warmup_epoch=0)
    run_in(folder, train_ddlp.main, "-d", "small.json")
    return the_run(folder)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_directory_holds_what_training_promises(trained):
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    figures = {
        f"figures/{name}_{epoch}.jpg" for name in ("image", "image_valid", "image_obj", "image_seg") for epoch in (0, 1)
    }
    animations = {f"figures/e{epoch}_traj_anim_{i}.gif" for epoch in (0, 1) for i in range(3)}  # val_size 3
    saves = {f"saves/{name}" for name in ("balls_ddlp.pth", "balls_ddlp_best.pth", "training_state.pt")}
    others = {"hparams.json", "log.txt", "metrics.jsonl", "last_val_image_metrics.json", "figures/balls_ddlp_graph.jpg"}
    assert names == figures | animations | saves | others
    run = Run.open(trained)
    assert run.kind == "ddlp" and isinstance(run.load_model(), ObjectDynamicsDLP)


def test_an_animation_is_the_validation_episode_beside_its_prediction(trained, balls_data):
    run = Run.open(trained)
    frames = iio.imread(trained / "figures" / "e1_traj_anim_0.gif")
    with Image.open(trained / "figures" / "e1_traj_anim_0.gif") as gif:
        assert gif.info["duration"] == 60 and gif.n_frames == run.config.animation_horizon == len(frames)


def test_without_the_dynamics_only_the_images_are_learned(trained):
    static, dynamic = records(trained)
    assert static["kl_dyn"] == 0 and dynamic["kl_dyn"] > 0
    assert static["iteration"] == 4 and dynamic["iteration"] == 8
    assert {"val_loss", "psnr", "ssim", "visible", "beta_a", "beta_b", "scale", "loss_rec"} <= dynamic.keys()
    assert "ssim_std" not in static and dynamic["ssim_std"] > 0  # image metrics from epoch 1 on


def trainer_for(folder, balls_data, **changes):
    config = Config.load(str(write_config(folder, balls_data, **changes)))
    accelerator = make_accelerator("cpu")
    return Trainer(DDLPTask(config, accelerator), config, accelerator, "resume")


@pytest.mark.parametrize("start_dyn_epoch", [0, 1])
def test_the_dynamics_learn_from_their_epoch_on(start_dyn_epoch, balls_data, tmp_path):
    trainer = trainer_for(tmp_path, balls_data, start_dyn_epoch=start_dyn_epoch, num_epochs=1, warmup_epoch=0)
    before = {name: value.clone() for name, value in trainer.bare_model.state_dict().items()}
    batch = next(iter(trainer.loader))
    trainer.progress.iteration = 10**6
    trainer.model.train()
    losses = trainer.task.losses(trainer.model, batch, trainer.progress)
    losses["loss"].backward()
    trainer.optimizer.step()
    after = trainer.bare_model.state_dict()
    moved = [name for name in before if name.startswith("dyn_module") and not torch.equal(before[name], after[name])]
    assert bool(moved) is (start_dyn_epoch == 0)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("fg_module"))


@pytest.mark.parametrize(("epoch", "learning"), [(1, {"fg_module", "bg_module", "dyn_module"}), (2, {"dyn_module"})])
def test_from_its_epoch_on_the_dynamics_learn_alone(epoch, learning, balls_data, tmp_path):
    trainer = trainer_for(tmp_path, balls_data, dyn_only_epoch=2, num_epochs=4, warmup_epoch=0)
    batch = next(iter(trainer.loader))
    trainer.progress.iteration = 10**6
    for trainer.progress.epoch in (2, epoch):  # also back from there, as when an earlier state is resumed
        trainer.optimizer.zero_grad(set_to_none=True)
        losses = trainer.task.losses(trainer.model, batch, trainer.progress)
        losses["loss"].backward()
    found = {name.split(".")[0] for name, p in trainer.bare_model.named_parameters() if p.grad is not None}
    assert found == learning
    assert losses["loss_rec"] > 0 and losses["kl_dyn"] > 0


def test_a_step_minimises_the_elbo_of_the_configuration(balls_data, tmp_path, monkeypatch):
    """The loss is `calc_elbo`'s with every weight of the configuration and the iteration's discount."""
    weights = {"beta_kl": 0.3, "beta_rec": 2.0, "beta_dyn": 0.7, "beta_dyn_rec": 0.4, "kl_balance": 0.01}
    trainer = trainer_for(tmp_path, balls_data, warmup_epoch=0, discount_iterations=9, num_epochs=3, **weights)
    trainer.progress.epoch, trainer.progress.iteration = 2, 4  # past the noisy epoch
    batch, model = next(iter(trainer.loader)), trainer.model.eval()
    torch.manual_seed(5)
    loss = trainer.task.losses(model, batch, trainer.progress)["loss"]
    torch.manual_seed(5)
    clip = batch[0] / 255  # loading processes hand over uint8
    output = model(clip, num_static_frames=2)
    discount = [4 / 3, 4 / 6]  # step 9 // 3; entries 0 .. T - num_static
    expected = model.calc_elbo(
        clip, output, num_static=2, dynamic_discount=[min(1.0, weight) for weight in discount], **weights
    )
    torch.testing.assert_close(loss, expected["loss"])


def test_a_resumed_run_equals_one_never_stopped(trained, balls_data, tmp_path):
    """One epoch, then the second with --resume: every bit as in one go."""
    write_config(tmp_path, balls_data, start_dyn_epoch=1, warmup_epoch=0)
    run_in(tmp_path, train_ddlp.main, "-d", "small.json", "--num_epochs", 1)
    run = the_run(tmp_path)
    run_in(tmp_path, train_ddlp.main, "--resume", run, "--num_epochs", 2)
    assert_same_run(run, trained)


def test_best_weights_by_lpips_are_kept(balls_data, tmp_path, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    write_config(tmp_path, balls_data, metrics=["lpips"])
    run_in(tmp_path, train_ddlp.main, "-d", "small.json")
    run = Run.open(the_run(tmp_path))
    assert run.find_weights() == run.weights_path("_best_lpips")
    first, second = run.records()
    assert "lpips" not in first and second["lpips"] > 0
    best, last = (checkpoints.load(run.weights_path(which)) for which in ("_best_lpips", ""))
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_missing_data_names_the_command_that_makes_it(tmp_path):
    write_config(tmp_path, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"python datasets/balls_preparation.py --out \S*none"):
        run_in(tmp_path, train_ddlp.main, "-d", "small.json")
    assert not list(tmp_path.glob("*_balls_ddlp*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep_horizon": 14}, "15 frames are more than the 14 of an episode"),
        ({"image_size": 64, "enc_channels": [4, 4, 4]}, "image_size: 64 is not the size of the frames"),
        ({"animation_horizon": 20}, "20 frames are more than the 14 of an episode"),
    ],
)
def test_a_configuration_that_does_not_fit_the_videos_is_refused_at_once(changes, message, balls_data, tmp_path):
    write_config(tmp_path, balls_data, **changes)
    with pytest.raises(UserError, match=message):
        run_in(tmp_path, train_ddlp.main, "-d", "small.json")
    assert not list(tmp_path.glob("*_balls_ddlp*"))


def test_dlpv2s_command_does_not_go_on_with_it(trained):
    with pytest.raises(UserError, match="is a run of kind ddlp; this command goes on with kind dlp"):
        train("/", "--resume", trained)
