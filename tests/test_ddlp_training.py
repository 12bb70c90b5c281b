"""DDLP's training through its command: run directory, stages, discount, exact resume."""

import shutil
from functools import partial

import h5py
import pytest
import torch
from PIL import Image

import train_ddlp
import train_dlp
from configs.schema import Config
from datasets import get_dataset
from models import ObjectDLP, ObjectDynamicsDLP
from modules.particles import BetaParams
from tests import runs
from tests.balls import SMALL
from tests.runs import assert_same, assert_same_run, the_run, write_json
from training.loop import Progress, TrainingLoop
from training.particles import DDLPTask, leaves_parameters_unused, noise_on_positions
from utils import checkpoints
from utils.device import make_accelerator
from utils.errors import UserError

train, resume = partial(runs.train, train_ddlp.main), partial(runs.resume, train_ddlp.main)
FIRST_STATIC = {"start_dyn_epoch": 1, "warmup_epoch": 0}


@pytest.fixture(scope="module")
def config(balls_data):
    return {**SMALL, "root": balls_data}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config):
    """Two epochs of four iterations, the first without the dynamics."""
    return train(tmp_path_factory.mktemp("trained"), config, figures=True, **FIRST_STATIC)


def test_the_run_directory_holds_what_training_promises(trained):
    names = {str(path.relative_to(trained.path)) for path in trained.path.rglob("*") if path.is_file()}
    figures = {
        f"figures/{name}_{epoch}.jpg" for name in ("image", "image_valid", "image_obj", "image_seg") for epoch in (0, 1)
    }
    animations = {f"figures/e{epoch}_traj_anim_{i}.gif" for epoch in (0, 1) for i in range(3)}  # val_size 3
    saves = {f"saves/{name}" for name in ("balls_ddlp.pth", "balls_ddlp_best.pth", "training_state.pt")}
    others = {".lock", "hparams.json", "log.txt", "metrics.jsonl", "last_val_image_metrics.json"}
    assert names == figures | animations | saves | others | {"figures/balls_ddlp_graph.jpg"}
    assert trained.kind == "ddlp" and isinstance(trained.load_model(), ObjectDynamicsDLP)
    with Image.open(trained.figures / "e1_traj_anim_0.gif") as gif:
        assert gif.info["duration"] == 60 and gif.n_frames == SMALL["animation_horizon"]


def test_the_data_is_looked_for_before_weights_are_downloaded(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("a download"))
    changes = {"recon_loss_type": "vgg", "eval_im_metrics": True, "metrics": ["lpips"]}
    with pytest.raises(UserError, match="nowhere"):
        train(tmp_path, config, root=str(tmp_path / "nowhere"), **changes)


def test_without_the_dynamics_only_the_images_are_learned(trained):
    static, dynamic = trained.records()
    assert static["kl_dyn"] == 0 and dynamic["kl_dyn"] > 0
    assert static["iteration"] == 4 and dynamic["iteration"] == 8
    assert {"val_loss", "psnr", "ssim", "visible", "beta_a", "beta_b", "scale", "loss_rec"} <= dynamic.keys()
    assert "ssim_std" not in static and dynamic["ssim_std"] > 0  # image metrics from epoch 1 on


def test_a_resumed_run_equals_one_never_stopped(trained, config, tmp_path):
    """One epoch, then the second with --resume: every bit as in one go."""
    run = train(tmp_path, config, num_epochs=1, **FIRST_STATIC)
    resume(run, num_epochs=2)
    assert_same_run(run, trained)


def test_training_from_python_returns_the_saved_model(config, tmp_path, monkeypatch):
    path = write_json(tmp_path, config, num_epochs=1, train_size=4, eval_im_metrics=False)
    monkeypatch.chdir(tmp_path)
    with runs.no_figures():
        model = train_ddlp.train_ddlp(path)
    assert type(model) is ObjectDynamicsDLP and not any(module.training for module in model.modules())
    assert_same(dict(model.state_dict()), dict(the_run(tmp_path).load_model().state_dict()), "weights")


def test_data_sets_are_made_once(config, tmp_path, monkeypatch):
    """For a training with two evaluations."""
    made, video_dataset = [], get_dataset.get_video_dataset

    def noting(ds, root, num_frames, mode, *others, **options):
        made.append(mode)
        return video_dataset(ds, root, num_frames, mode, *others, **options)

    monkeypatch.setattr(get_dataset, "get_video_dataset", noting)
    run = train(tmp_path, config, train_size=4, metrics=["psnr"])
    assert "psnr_std" in run.records()[1] and sorted(made) == ["train", "val"]


# ------------------------------------------------------------------------------------------------------------- steps


def new_loop(config, **changes):
    config, accelerator = Config.from_dict({**config, **changes}), make_accelerator("cpu")
    return TrainingLoop(DDLPTask(config, accelerator), config, accelerator, "resume")


def test_train_size_takes_windows_from_all_over_the_training_set(config):
    items = new_loop(config, train_size=5, batch_size=1).task.training_items
    with h5py.File(f"{config['root']}/train.hdf5") as file:
        images = file["imgs"][:]
    windows = [images[episode, first : first + 4] for episode in range(3) for first in range(14 - 4 + 1)]
    assert len(items) == 5
    for item, window in zip(items, (0, 6, 13, 19, 26), strict=True):  # of 33
        assert torch.equal(item[0], torch.from_numpy(windows[window]).permute(0, 3, 1, 2))


@pytest.mark.parametrize("start_dyn_epoch", [0, 1])
def test_the_dynamics_learn_from_their_epoch_on(start_dyn_epoch, config):
    loop = new_loop(config, start_dyn_epoch=start_dyn_epoch, num_epochs=1, warmup_epoch=0)
    loop.progress.iteration = 10**6
    loop.model.train()
    losses = loop.task.losses(loop.model, next(iter(loop._make_loader())), loop.progress)
    losses["loss"].backward()
    moved = {
        name.split(".")[0]
        for name, parameter in loop.bare_model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert ("dyn_module" in moved) is (start_dyn_epoch == 0) and "fg_module" in moved


@pytest.mark.parametrize(("epoch", "learning"), [(1, {"fg_module", "bg_module", "dyn_module"}), (2, {"dyn_module"})])
def test_from_its_epoch_on_the_dynamics_learn_alone(epoch, learning, config):
    loop = new_loop(config, dyn_only_epoch=2, num_epochs=4, warmup_epoch=0, dyn_particle_cache=False)
    batch = next(iter(loop._make_loader()))
    loop.progress.iteration = 10**6
    for loop.progress.epoch in (2, epoch):  # also back from there, as when an earlier state is resumed
        loop.optimizer.zero_grad(set_to_none=True)
        losses = loop.task.losses(loop.model, batch, loop.progress)
        losses["loss"].backward()
    found = {name.split(".")[0] for name, p in loop.bare_model.named_parameters() if p.grad is not None}
    assert found == learning
    assert losses["loss_rec"] > 0 and losses["kl_dyn"] > 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"start_dyn_epoch": 1}, {"dyn_only_epoch": 2}, {"train_enc_prior": False}],
    ids=str,
)
def test_several_processes_know_whether_parameters_go_unused(changes, config):
    """Which they have to be told. Warm-up leaves none without a gradient."""
    loop, unused = new_loop(config, **{"warmup_epoch": 1, **changes}), False
    for loop.progress.epoch in range(3):
        batch = next(iter(loop._make_loader()))
        loop.optimizer.zero_grad(set_to_none=True)
        loop.task.losses(loop.model, batch, loop.progress)["loss"].backward()
        unused |= any(parameter.grad is None for parameter in loop.bare_model.parameters())
    assert leaves_parameters_unused(loop.config) is unused is bool(changes)


# ---------------------------------------------------------------------------------- the dynamics on encoded particles

ALONE = {"dyn_only_epoch": 1, "num_epochs": 3, "warmup_epoch": 0, "eval_im_metrics": False, "eval_epoch_freq": 9}


def test_pints_gradient_is_that_of_the_whole_loss(config, tmp_path, monkeypatch):
    """On the same particles, which are equal where no noise is drawn, and no map is scaled by the whole batch."""
    root = str(shutil.copytree(config["root"], tmp_path / "data"))
    config = {**config, "root": root, "use_correlation_heatmaps": False}
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(BetaParams, "sample", lambda self, deterministic=False: self.a / (self.a + self.b))
    norms = {}
    for cached in (False, True):
        loop = new_loop(config, dyn_particle_cache=cached, beta_dyn=0.3, discount_iterations=50, **ALONE)
        loop.progress.epoch, loop.progress.iteration = 2, 11
        batch = next(iter(loop._make_loader()))
        losses = loop.task.losses(loop.model.eval(), batch, loop.progress)
        losses["loss"].backward()
        gradients = {name: p.grad for name, p in loop.bare_model.named_parameters() if p.grad is not None}
        norms[cached] = losses["kl_dyn"], gradients
    (kl, gradients), (kl_cached, gradients_cached) = norms[False], norms[True]
    torch.testing.assert_close(kl_cached, kl)
    assert gradients.keys() == gradients_cached.keys() and all(name.startswith("dyn_module.") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_cached[name], gradient, rtol=1e-3, atol=1e-6 + 1e-4 * gradient.abs().max())


def test_particles_are_encoded_once_and_drawn_anew(config, tmp_path, monkeypatch):
    root = shutil.copytree(config["root"], tmp_path / "data")
    encoded, encode = [], ObjectDynamicsDLP.encode_posterior

    def noting(model, x, *others):
        encoded.append(len(x))
        return encode(model, x, *others)

    monkeypatch.setattr(ObjectDynamicsDLP, "encode_posterior", noting)
    run = train(tmp_path, {**config, "root": str(root)}, train_size=16, **ALONE)
    assert encoded == [1, 16]  # a clip for the shapes, then all clips, in the first of the two epochs
    first, *later = run.records()
    assert "loss_rec" in first and all(record.keys() & {"loss_rec", "kl_dyn"} == {"kl_dyn"} for record in later)
    loop = new_loop({**config, "root": str(root)}, **ALONE)
    loop.progress.epoch, loop.progress.iteration = 1, 50
    batch = next(iter(loop._make_loader()))
    one, other = (loop.task.losses(loop.model, batch, loop.progress)["kl_dyn"].item() for _ in range(2))
    assert one != other


def test_no_room_for_particles_is_said_with_the_key_that_needs_none(config, tmp_path, monkeypatch):
    root = shutil.copytree(config["root"], tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    loop = new_loop({**config, "root": str(root)}, **ALONE)
    loop.progress.epoch = 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9e9, 9e9, 1e4))
    with pytest.raises(UserError, match=r"are free; .*, or dyn_particle_cache false, which encodes each batch anew"):
        loop._make_loader()


def test_whatever_decides_the_particles_gives_them_files_of_their_own(config, tmp_path):
    config = {**config, "root": str(shutil.copytree(config["root"], tmp_path / "data"))}

    def files(change=None, **changes):
        task = new_loop(config, **{**ALONE, **changes}).task
        if change is not None:
            with torch.no_grad():
                next(getattr(task.model, change).parameters()).add_(1)
        return set(task.cached_posteriors.paths)

    one = files()
    assert one == files() == files("dyn_module")
    assert not one & files(num_static_frames=1) and not one & files("fg_module") and not one & files("bg_module")


def test_the_weights_to_start_from_encode_the_particles(config, tmp_path, monkeypatch):
    torch.manual_seed(11)
    start = ObjectDynamicsDLP.from_config(Config.from_dict(config)).state_dict()
    checkpoints.save(start, tmp_path / "start.pth")
    encode = ObjectDynamicsDLP.encode_posterior

    def checking(model, x, *others):
        weights = model.state_dict()
        assert all(torch.equal(weights[name], start[name]) for name in start if name.startswith(("fg_", "bg_")))
        return encode(model, x, *others)

    monkeypatch.setattr(ObjectDynamicsDLP, "encode_posterior", checking)
    options = {"load_model": True, "pretrained_path": str(tmp_path / "start.pth")}
    run = train(tmp_path, config, **{**ALONE, "dyn_only_epoch": 0, "num_epochs": 1}, **options)
    trained = checkpoints.load(run.weights_path())
    assert all(torch.equal(trained[name], start[name]) for name in start if name.startswith(("fg_", "bg_")))
    assert any(not torch.equal(trained[name], start[name]) for name in start if name.startswith("dyn_module."))
    (tmp_path / "start.pth").unlink()
    resume(run, num_epochs=2)  # takes its own weights


def test_the_weights_to_start_from_are_read_before_the_data_set(config, tmp_path):
    options = {"load_model": True, "pretrained_path": str(tmp_path / "gone.pth"), "root": str(tmp_path / "no_data")}
    with pytest.raises(UserError, match=r"gone\.pth: no such checkpoint file"):
        train(tmp_path, config, **options)


def test_dynamics_alone_go_on_exactly(config, tmp_path):
    whole = train(tmp_path / "whole", config, **{**ALONE, "eval_epoch_freq": 1})
    part = train(tmp_path / "part", config, **{**ALONE, "eval_epoch_freq": 1, "num_epochs": 2})
    resume(part, num_epochs=3)
    assert_same_run(part, whole)


def test_the_position_error_joins_the_loss(config):
    """Against its definition, frame by frame, in the joint loss and in that of the dynamics alone."""
    clip = torch.rand(2, SMALL["timestep_horizon"] + 1, 3, 32, 32)
    model = ObjectDynamicsDLP.from_config(Config.from_dict(config)).eval()
    output, posterior = model(clip, num_static_frames=2), None
    frames, discount = clip.shape[1], [0.5, 0.25, 0.1, 0.0]
    means = (output["z_base"] + output["mu_offset"]).unflatten(0, (2, frames))
    expected = 0.0
    for t, weight in zip(range(2, frames), discount, strict=False):
        expected += weight * (output["mu_dyn"][:, t - 1] - means[:, t]).abs().sum() / 2
    options = {"dynamic_discount": discount, "num_static": 2}
    plain, both = (model.calc_elbo(clip, output, beta_dyn_l1=weight, **options)["loss"] for weight in (0, 3.0))
    torch.testing.assert_close(both - plain, 3.0 * expected / frames, rtol=1e-4, atol=1e-4)
    posterior = model.encode_posterior(clip, 2)
    alone = model(posterior, deterministic=True, num_static_frames=2)
    means = posterior.z_base + posterior.offset.mean
    expected = sum(
        weight * (alone["mu_dyn"][:, t - 2] - means[:, t]).abs().sum() / 2
        for t, weight in zip(range(2, frames), discount, strict=False)
    )
    plain, both = (
        model.calc_dynamics_loss(posterior, alone, beta_dyn_l1=weight, **options)["loss"] for weight in (0, 3.0)
    )
    torch.testing.assert_close(both - plain, 3.0 * expected / frames, rtol=1e-4, atol=1e-5)


def test_pints_biases_learn_at_a_rate_of_their_own(config):
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    loop = new_loop(config, pint_bias_lr=20.0, beta_dyn_l1=5.0, lr=1e-3, adam_eps=1e-12, discount_iterations=1, **ALONE)
    loop.progress.epoch, loop.progress.iteration = 2, 100
    before = {name: value.clone() for name, value in loop.bare_model.named_parameters()}
    batch = next(iter(loop._make_loader()))
    loop.task.losses(loop.model, batch, loop.progress)["loss"].backward()
    loop.optimizer.step()
    steps = {
        name: (value.detach() - before[name]).abs().max().item() for name, value in loop.bare_model.named_parameters()
    }
    biases = {name: step for name, step in steps.items() if "rel_pos_bias" in name}
    assert len(biases) == 2 * SMALL["pint_layers"] and list(biases.values()) == pytest.approx([0.02] * len(biases))
    others = [step for name, step in steps.items() if name.startswith("dyn_module.") and name not in biases]
    assert max(others) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", ["ddlp", "dlp"])
def test_particles_from_elsewhere_under_new_dynamics(config, tmp_path, kind):
    """Of a DDLP with another number of particles, or of a DLPv2; the priors are the configuration's."""
    torch.manual_seed(11)
    if kind == "ddlp":
        source = ObjectDynamicsDLP.from_config(Config.from_dict({**config, "n_kp_enc": 5, "obj_on_beta": 3.0}))
    else:
        source = ObjectDLP.from_config(Config.from_dict({**config, "use_tracking": True, "obj_on_beta": 3.0}))
    checkpoints.save({"model": source.state_dict()}, tmp_path / "start.pth")
    options = {"load_model": True, "pretrained_path": str(tmp_path / "start.pth"), "pretrained_dynamics": False}
    run = train(tmp_path, config, **{**ALONE, "dyn_only_epoch": 0, "num_epochs": 1}, lr=1e-7, **options)
    trained = checkpoints.load(run.weights_path())
    for name, value in source.state_dict().items():
        if name.startswith(("fg_", "bg_")):
            assert torch.equal(trained[name], value)
    assert trained["obj_on_b_p"] == pytest.approx(config.get("obj_on_beta", 0.1))
    fresh = new_loop({**config, **ALONE}).bare_model.state_dict()
    for name in (name for name in fresh if name.startswith("dyn_module.")):
        torch.testing.assert_close(trained[name], fresh[name], rtol=0, atol=1e-5)


def test_noise_on_what_pint_sees(config, monkeypatch):
    seen = []
    loop = new_loop(config, pint_noise=0.5, **ALONE)
    dynamics, predict = loop.bare_model.dyn_module, loop.bare_model.dyn_module.predict
    monkeypatch.setattr(dynamics, "predict", lambda past, last: seen.append(past.z) or predict(past, last))
    clip = next(iter(loop._make_loader()))[0] / 255
    output = loop.model(clip, deterministic=True, pint_noise=0.5, num_static_frames=2)
    noise = seen[0] - output["z"].unflatten(0, clip.shape[:2])[:, :-1]
    assert 0.4 < noise.std() < 0.6 and abs(noise.mean()) < 0.1


@pytest.mark.parametrize("epoch", [1, 2])
def test_noise_on_what_pint_sees_can_fall(epoch, config, monkeypatch):
    """From the epoch in which the dynamics begin to the end of the last one, in joint steps and in those of PINT."""
    changes = {"start_dyn_epoch": 1, "dyn_only_epoch": 2, "num_epochs": 5}
    loop = new_loop(config, pint_noise=0.5, pint_noise_last=0.1, **{**ALONE, **changes})
    seen, predict = [], ObjectDynamicsDLP._predict_noisily

    def noting(model, past, noise, last=None):
        seen.append(float(noise))
        return predict(model, past, noise, last)

    monkeypatch.setattr(ObjectDynamicsDLP, "_predict_noisily", noting)
    length = loop.progress.epoch_length
    loop.progress.epoch, loop.progress.iteration = epoch, epoch * length + 1
    loop.task.losses(loop.model, next(iter(loop._make_loader())), loop.progress)
    assert seen == [pytest.approx(0.5 - 0.4 * ((epoch - 1) * length + 1) / (4 * length))]


def test_the_last_noise_is_that_of_the_end(config):
    config = Config.from_dict({**config, "pint_noise": 0.2, "pint_noise_last": 0.0, "num_epochs": 3})
    found = [noise_on_positions(Progress(iteration=i, epoch_length=10), config) for i in (0, 15, 30, 40)]
    assert [float(noise) for noise in found] == pytest.approx([0.2, 0.1, 0.0, 0.0])
    as_recorded = noise_on_positions(Progress(iteration=torch.tensor(15), epoch_length=10), config)
    assert as_recorded.item() == pytest.approx(0.1)
    for last in (None, 0.2):
        assert noise_on_positions(Progress(epoch_length=10), config.replace(pint_noise_last=last)) == 0.2


def test_bfloat16_learns_as_float32_does(config):
    """A few steps of both, from the same weights and noise. A step amplifies rounding: of weights that were rounded to
    bfloat16 once and trained in float32, single losses are up to 1% away after 8 steps, the mean fall up to 20%."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        loop = new_loop(config, precision=precision, warmup_epoch=0, lr=1e-3, adam_eps=1e-8)
        for loop.progress.epoch in (1, 2):
            for batch in loop._make_loader():
                loop._step([batch])
        assert all(parameter.dtype is torch.float32 for parameter in loop.bare_model.parameters())
        losses[precision] = [row["loss"] for row in loop.means.read(loop.accelerator)]
    exact, rough = losses["float32"], losses["bfloat16"]
    assert rough != exact and rough[0] == pytest.approx(exact[0], rel=1e-4)
    fall, rough_fall = (values[0] - sum(values[4:]) / 4 for values in (exact, rough))
    assert fall > 0.01 * exact[0] and rough_fall == pytest.approx(fall, rel=0.3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_recomputes_its_activations_if_the_configuration_says_so(checkpointing, config):
    assert new_loop(config, checkpointing=checkpointing).bare_model.checkpointing is checkpointing


def test_a_step_minimises_the_elbo_of_the_configuration(config):
    """The loss is `calc_elbo`'s with every weight of the configuration and the iteration's discount."""
    weights = {"beta_kl": 0.3, "beta_rec": 2.0, "beta_dyn": 0.7, "beta_dyn_rec": 0.4, "kl_balance": 0.01}
    loop = new_loop(config, start_dyn_epoch=1, warmup_epoch=0, discount_iterations=9, num_epochs=3, **weights)
    loop.progress.epoch, loop.progress.iteration = 2, 8  # past the noisy epoch, 4 iterations with the dynamics
    batch, model = next(iter(loop._make_loader())), loop.model.eval()
    torch.manual_seed(5)
    loss = loop.task.losses(model, batch, loop.progress)["loss"]
    torch.manual_seed(5)
    clip = batch[0] / 255  # loading processes hand over uint8
    output = model(clip, num_static_frames=2)
    discount = [4 / 3, 4 / 6]  # step 9 // 3; entries 0 .. T - num_static
    expected = model.calc_elbo(
        clip, output, num_static=2, dynamic_discount=[min(1.0, weight) for weight in discount], **weights
    )
    torch.testing.assert_close(loss, expected["loss"])


def test_a_step_is_adams_of_the_configuration(config):
    """The first one, which by Adam's bias correction is lr * g / (|g| + eps), with weight decay in g."""
    loop = new_loop(config, lr=0.01, adam_eps=1e-3, weight_decay=0.1, adam_betas=[0.7, 0.8])
    start = [parameter.detach().clone() for parameter in loop.bare_model.parameters()]
    loop._step([next(iter(loop._make_loader()))])
    for first, parameter in zip(start, loop.bare_model.parameters(), strict=True):
        if parameter.grad is not None:
            g = parameter.grad + 0.1 * first
            torch.testing.assert_close(parameter.detach(), first - 0.01 * g / (g.abs() + 1e-3), atol=1e-6, rtol=1e-4)
    assert loop.optimizer.param_groups[0]["betas"] == (0.7, 0.8)


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "/none"}, r"python datasets/balls_preparation.py --out /none"),
        ({"timestep_horizon": 14}, "15 frames .* 14 of an episode"),
        ({"image_size": 64, "enc_channels": [4, 4, 4]}, "image_size.* 64 .*the frames"),
        ({"animation_horizon": 20}, r"20 frames .*14"),
    ],
)
def test_a_configuration_that_does_not_fit_the_videos_is_refused_at_once(changes, message, config, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path, config, **changes)
    assert not list(tmp_path.glob("*_balls_ddlp*"))


def test_dlpv2s_command_does_not_go_on_with_it(trained):
    with pytest.raises(UserError, match=r"is a run of kind ddlp; .* kind dlp"):
        runs.resume(train_dlp.main, trained)
