"""Cells of a notebook as a user of the published release writes them: its names, its calls, its returns, no others."""

import inspect
import json
import math
import sys

import imageio.v3 as iio
import pytest
import torch
from torch.utils.data import DataLoader

import train_ddlp_accelerate
import train_dlp_accelerate
from datasets.get_dataset import get_image_dataset, get_video_dataset
from datasets.shapes_ds import generate_shape_dataset_torch
from eval.eval_gen_metrics import eval_ddlp_im_metric
from eval.eval_model import animate_trajectory_ddlp, evaluate_validation_elbo_dyn
from models import ObjectDLP, ObjectDynamicsDLP
from modules.dynamics_modules import DynamicsDLP
from tests import balls, golden
from tests.boxes import plain_selection
from train_ddlp import train_ddlp
from train_dlp import train_dlp
from utils import util_func
from utils.loss_functions import calc_kl, calc_reconstruction_loss
from utils.util_func import (
    animate_trajectories,
    calc_model_size,
    get_bb_from_z_scale,
    get_config,
    plot_bb_on_image_batch_from_masks_nms,
    plot_bb_on_image_batch_from_z_scale_nms,
    plot_glimpse_obj_on,
    plot_keypoints_on_image_batch,
)

SIDE = 32
SMALL = {**balls.SMALL, "batch_size": 2, "val_size": None, "run_prefix": "_small"}
# The release's signatures of what its users call besides `published/signatures.json`.
PLOTTING = {
    "plot_keypoints_on_image": "(k, image_tensor, radius=1, thickness=1, kp_range=(0, 1), plot_numbers=True)",
    "plot_bb_on_image_from_z_scale_nms": "(kp, z_scale, image_tensor, scores, iou_thresh=0.5, thickness=1, "
    "hard_thresh=None, scale_normalized=False)",
    "plot_bb_on_image_from_masks_nms": "(masks, image_tensor, scores, iou_thresh=0.5, thickness=1, hard_thresh=None)",
    "plot_glimpse_obj_on": "(dec_object_glimpses, obj_on, save_dir)",
    "color_map": "(num=100)",
    "get_bb_from_masks_batch": "(masks, width, height)",
    "get_bb_from_z_scale": "(kp, z_scale, width, height, scale_normalized=False)",
    "calc_model_size": "(model)",
}
SHARED = {
    "cdim": 3,
    "image_size": 32,
    "patch_size": 8,
    "n_kp": 2,
    "n_kp_enc": 5,
    "n_kp_prior": 50,
    "enc_channels": (4, 8, 8),
    "prior_channels": (4, 4),
    "learned_feature_dim": 3,
    "bg_learned_feature_dim": 7,
    "kp_range": (-1, 1),
    "kp_activation": "sigmoid",
    "sigma": 0.5,
    "dropout": 0.25,
    "anchor_s": 0.25,
    "use_resblock": True,
    "enable_enc_attn": True,
    "filtering_heuristic": "distance",
}
OTHERS = {"patch_size": 16, "n_kp": 1, "n_kp_enc": 3, "n_kp_prior": 2, "bg_learned_feature_dim": None, "anchor_s": 0.5}
OTHERS |= {"enc_channels": (4, 4), "kp_activation": "tanh", "use_resblock": False, "filtering_heuristic": "none"}
PINT = {"timestep_horizon": 4, "predict_delta": False, "pint_layers": 2, "pint_heads": 3, "pint_dim": 12}


@pytest.mark.parametrize("name", PLOTTING)
def test_signature(name):
    assert str(inspect.signature(getattr(util_func, name))) == PLOTTING[name]


@pytest.mark.parametrize(
    ("changes", "derived"),
    [
        ({}, {"num_patches": 16, "n_kp_total": 32, "n_kp_prior": 32, "obj_patch_size": 8, "features_dim": 8}),
        (OTHERS, {"num_patches": 4, "n_kp_total": 4, "n_kp_prior": 2, "obj_patch_size": 16, "features_dim": 16}),
    ],
)
@pytest.mark.parametrize(("kind", "own"), [(ObjectDLP, {}), (ObjectDynamicsDLP, PINT)])
def test_attributes_that_scripts_read(kind, own, changes, derived):
    arguments = {**SHARED, **changes, **own}
    model = kind(**arguments)
    expected = {**arguments, "bg_learned_feature_dim": 3 if changes else 7, **derived}
    assert {name: getattr(model, name) for name in expected} == expected


def keywords(config):
    """A model's arguments as the release's scripts take them from its JSON."""
    names = ["enc_channels", "prior_channels", "image_size", "n_kp", "learned_feature_dim", "patch_size", "n_kp_enc"]
    names += ["n_kp_prior", "kp_activation", "pad_mode", "sigma", "dropout", "kp_range", "anchor_s", "use_resblock"]
    names += ["scale_std", "offset_std", "obj_on_alpha", "obj_on_beta", "use_correlation_heatmaps", "enable_enc_attn"]
    return {"cdim": config["ch"], **{name: config[name] for name in [*names, "filtering_heuristic"]}}


def make_ddlp(config):
    pint = ("timestep_horizon", "predict_delta", "pint_layers", "pint_heads", "pint_dim")
    return ObjectDynamicsDLP(**keywords(config), **{name: config[name] for name in pint})


def randomized(model):
    """New weights draw next to nothing; these draw something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def config(balls_data):
    return {**golden.published("ddlp-balls")["config"], **SMALL, "root": balls_data}


@pytest.fixture(scope="module")
def images(config):
    dataset = get_image_dataset("balls", config["root"], mode="train", image_size=SIDE)
    return next(iter(DataLoader(dataset, batch_size=3, shuffle=False)))[0]


@pytest.fixture(scope="module")
def clip(config):
    """One validation episode: [1, 14, 3, 32, 32]."""
    dataset = get_video_dataset("balls", config["root"], seq_len=14, mode="valid", image_size=SIDE)
    return next(iter(DataLoader(dataset, batch_size=1)))[0]


@pytest.fixture(scope="module")
def dlp(config):
    return randomized(ObjectDLP(**{**keywords(config), "use_correlation_heatmaps": False}))


@pytest.fixture(scope="module")
def ddlp(config):
    return randomized(make_ddlp(config))


def test_a_dlp_learns_in_a_loop_of_ones_own(config, images):
    torch.manual_seed(0)
    model = ObjectDLP(**{**keywords(config), "use_correlation_heatmaps": False})
    assert calc_model_size(model)["n_params"] == sum(p.numel() for p in model.get_parameters())
    optimizer = torch.optim.Adam(model.get_parameters(), lr=2e-3, betas=(0.9, 0.999), eps=1e-4)
    errors = []
    for step in range(6):
        stage = {"warmup": step < 4, "noisy": step < 5}
        output = model(images, x_prior=images, train_enc_prior=True, **stage)
        losses = model.calc_elbo(images, output, beta_kl=0.1, beta_rec=1.0, kl_balance=0.001, **stage)
        assert losses["loss"].item() == pytest.approx((losses["loss_rec"] + 0.1 * losses["kl"]).item(), rel=1e-5)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        errors.append(losses["loss_rec"].item())
    assert errors[3] < 0.9 * errors[0]


def test_the_losses_are_those_of_the_loss_functions(dlp, images):
    output = dlp(images, deterministic=True)
    losses = dlp.calc_elbo(images, output, recon_loss_type="mse")
    error = calc_reconstruction_loss(images, output["rec"], loss_type="mse", reduction="mean")
    assert losses["loss_rec"].item() == pytest.approx(error.item(), rel=1e-5)
    assert losses["psnr"].item() == pytest.approx(-10 * math.log10(error.item() / (3 * SIDE**2)), rel=1e-4)
    objects = calc_kl(output["logvar_features"].flatten(0, 1), output["mu_features"].flatten(0, 1), reduce="sum")
    background = calc_kl(output["logvar_bg"], output["mu_bg"], reduce="sum")
    assert losses["loss_kl_feat"].item() == pytest.approx((objects + background).item() / len(images), rel=1e-4)


def test_particles_and_boxes_are_drawn(dlp, images, tmp_path):
    output = dlp(images, deterministic=True)
    positions = (output["z_base"] + output["mu_offset"]).clamp(min=dlp.kp_range[0], max=dlp.kp_range[1])
    dots = plot_keypoints_on_image_batch(
        positions, images, radius=2, thickness=1, max_imgs=2, kp_range=dlp.kp_range, plot_numbers=False
    )
    assert dots.shape == (2, 3, SIDE, SIDE) and dots.dtype == torch.float32 and not torch.equal(dots, images[:2])
    scores = -1 * output["logvar_offset"].sum(-1) * output["obj_on"]
    pictures, kept = plot_bb_on_image_batch_from_z_scale_nms(
        positions, output["z_scale"], images, scores=scores, iou_thresh=0.2, thickness=1, max_imgs=2
    )
    assert pictures.shape == (2, 3, SIDE, SIDE) and len(kept) == 2
    for picture, indices, image, z, z_scale, score in zip(
        pictures, kept, images, positions, output["z_scale"], scores, strict=False
    ):
        boxes = get_bb_from_z_scale(z, z_scale, SIDE, SIDE)
        assert set(indices.tolist()) == plain_selection(boxes.tolist(), score.tolist(), 0.2, None)
        outlines = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        for x1, y1, x2, y2 in boxes[indices].clamp(0, SIDE - 1).tolist():
            outlines[y1 : y2 + 1, [x1, x2]] = outlines[[y1, y2], x1 : x2 + 1] = True
        assert torch.equal(picture[:, ~outlines], image[:, ~outlines])
        assert (picture != image).any(0)[outlines].all()
    masks = torch.where(output["alpha_masks"] < 0.05, 0.0, 1.0)
    pictures, kept = plot_bb_on_image_batch_from_masks_nms(masks, images, scores=scores, iou_thresh=0.2)
    assert pictures.shape == images.shape and len(kept) == len(images)
    present = masks.flatten(2).any(-1)
    assert all(present[b, indices].all() for b, indices in enumerate(kept))
    plot_glimpse_obj_on(output["dec_objects_original"][0], output["obj_on"][0], tmp_path / "glimpses.png")
    assert iio.imread(tmp_path / "glimpses.png").ndim == 3


def test_a_particle_moves_its_pixels(dlp, images):
    with torch.no_grad():
        seen = dlp.encode_all(images, deterministic=True)
        z, obj_on = seen["z"].clone(), torch.zeros_like(seen["obj_on"])
        z[:, 1], obj_on[:, 1] = 0.0, 1.0  # one particle, in the middle

        def draw(z):
            z_scale = seen["z_scale"] - 2.0  # small enough to stay inside the image
            return dlp.decode_all(z, seen["z_features"], seen["z_bg"], obj_on, seen["z_depth"], z_scale=z_scale)

        before = draw(z)
        z[:, 1] += 2 / (SIDE - 1) * torch.tensor([3.0, -5.0])  # 3 pixels down, 5 to the left
        after = draw(z)
    assert before["dec_objects_trans"].amax() > 0.1
    moved = torch.roll(before["dec_objects_trans"], (3, -5), dims=(-2, -1))
    torch.testing.assert_close(after["dec_objects_trans"], moved, rtol=0, atol=1e-4)
    assert torch.equal(after["bg"], before["bg"])
    assert (after["rec"] - before["rec"]).abs().amax() > 0.01


def test_a_walkthrough_from_shapes_to_particles_that_are_predicted(config):
    """Drawn shapes, an image model that tracks, and PINT by itself on what it found."""
    torch.manual_seed(0)
    shapes = generate_shape_dataset_torch(img_size=SIDE, min_size=6, max_size=8, num_images=4)
    x = next(iter(DataLoader(shapes, batch_size=2)))[0]
    clip = x[:, None].repeat(1, 3, 1, 1, 1)
    model = randomized(ObjectDLP(**{**keywords(config), "use_tracking": True}))
    with torch.no_grad():
        output, image = model(clip, deterministic=True), model(x, deterministic=True)
    seen = {name: value.view(2, 3, *value.shape[1:]) for name, value in output.items()}
    torch.testing.assert_close(seen["z"][:, 0], image["z"])
    assert torch.equal(seen["z_base"][:, 1:], seen["z"][:, :-1])  # a particle starts where it was

    d, K = model.learned_feature_dim, model.n_kp_enc
    pint = DynamicsDLP(d, model.bg_learned_feature_dim, 8, 8, n_head=2, n_layer=1, block_size=3, max_particles=K + 1)
    names = ("z", "z_scale", "obj_on", "z_depth", "z_features", "z_bg")
    tensors = [seen[name] for name in names]
    with torch.no_grad():
        predicted = randomized(pint)(*tensors)
        unrolled = pint.sample(*tensors, steps=2, deterministic=True)
    means = [predicted[name] for name in ("mu", "mu_scale", "mu_depth", "mu_features", "mu_bg")]
    means.insert(2, predicted["obj_on_a"] / (predicted["obj_on_a"] + predicted["obj_on_b"]))
    for tensor, mean, past in zip(unrolled, means, tensors, strict=True):
        assert tensor.shape[:2] == (2, 5) and torch.equal(tensor[:, :3], past)
        torch.testing.assert_close(tensor[:, 3], mean[:, -1])


def test_a_released_folder_is_loaded(config, ddlp, clip, tmp_path):
    folder = tmp_path / "ddlp-balls"
    folder.mkdir()
    (folder / "hparams.json").write_text(json.dumps(config))
    # A released file does not say how the depth's logvar is meant.
    weights = {name: value for name, value in ddlp.state_dict().items() if "depth_logvar_from_mean" not in name}
    torch.save(weights, folder / "balls_ddlp_small.pth")

    conf = get_config(str(folder / "hparams.json"))
    model = make_ddlp(conf)
    path = folder / f"{conf['ds']}_ddlp{conf['run_prefix']}.pth"
    model.load_state_dict(torch.load(path, map_location=torch.device("cpu")))
    model.eval()
    x = clip[:, : conf["timestep_horizon"] + 1]
    with torch.no_grad():
        loaded, original = model(x, deterministic=True), ddlp(x, deterministic=True)
    for name in ("rec", "z", "mu_dyn", "mu_depth_dyn"):
        assert torch.equal(loaded[name], original[name])
    depth = loaded["logvar_depth_dyn"] + loaded["z_depth"].unflatten(0, x.shape[:2])[:, :-1]  # published: the raw mean
    torch.testing.assert_close(depth, loaded["mu_depth_dyn"])


def test_a_video_is_predicted(ddlp, clip, tmp_path):
    T = ddlp.timestep_horizon
    rec = ddlp.sample(clip, cond_steps=T, num_steps=5, deterministic=True)
    assert rec.shape == (1, T + 5, 3, SIDE, SIDE)
    with torch.no_grad():
        seen = ddlp(clip[:, : T + 1], deterministic=True)
    torch.testing.assert_close(rec[:, :T], seen["rec"].view(1, T + 1, 3, SIDE, SIDE)[:, :T])
    assert not torch.allclose(rec[:, T], rec[:, T - 1], atol=1e-3)
    animate_trajectories(
        clip[0, : T + 5].permute(0, 2, 3, 1).numpy(),
        rec[0].permute(0, 2, 3, 1).numpy(),
        path=str(tmp_path / "prediction.gif"),
        duration=0.1,
        rec_to_pred_t=T,
    )
    assert len(iio.imread(tmp_path / "prediction.gif")) == T + 5


def test_what_if_a_particle_were_elsewhere(ddlp, clip):
    """Encode the first frames, unroll and decode them oneself: as `sample` does; then move a particle and unroll."""
    x, T, steps = clip[:, : ddlp.timestep_horizon], ddlp.timestep_horizon, 5
    with torch.no_grad():
        fg = ddlp.fg_sequential_opt(x, deterministic=True, reshape=False, num_static_frames=T)
        z_bg = ddlp.encode_all(x, deterministic=True, reshape=False, num_static_frames=T)["z_bg"]

        def unroll(z):
            tensors = (z, fg["z_scale"], fg["obj_on"], fg["z_depth"], fg["z_features"], z_bg)
            return ddlp.dyn_module.sample(*tensors, steps=steps, deterministic=True)

        def draw(tensors):
            z, z_scale, obj_on, z_depth, z_features, z_bg = (tensor.flatten(0, 1) for tensor in tensors)
            return ddlp.decode_all(z, z_features, z_bg, obj_on, z_depth=z_depth, z_scale=z_scale)["rec"]

        unrolled = unroll(fg["z"])
        rec, particles = ddlp.sample(clip, cond_steps=T, num_steps=steps, return_z=True)
        names = ("z_pos", "z_scale", "z_obj_on", "z_depth", "z_features", "z_bg_features")
        for name, tensor in zip(names, unrolled, strict=True):
            torch.testing.assert_close(tensor, particles[name])
        assert particles["z_ids"].tolist() == [[[1, 2, 3, 4]] * (T + steps)]
        torch.testing.assert_close(draw(unrolled), rec.flatten(0, 1), rtol=0, atol=1e-4)
        moved = fg["z"].clone()
        moved[:, :, 2] += 0.3
        other = unroll(moved)
        torch.testing.assert_close(other[0][:, :T] - unrolled[0][:, :T], moved - fg["z"])
        assert (other[0] - unrolled[0])[:, T:].abs().amin(dim=(0, 1, 3))[2] > 0.1  # it goes on from there
        assert (draw(other) - draw(unrolled)).abs().amax() > 1e-3  # in some frames it may be outside the picture


def test_a_ddlp_is_evaluated(config, ddlp, tmp_path):
    T, cpu = config["timestep_horizon"], torch.device("cpu")
    conf = {**config, "num_workers": 0}  # the release has no such key; without it workers would be started
    options = {"recon_loss_type": "mse", "beta_kl": 0.1, "beta_dyn": 0.2, "beta_dyn_rec": 0.5, "kl_balance": 0.001}
    loss = evaluate_validation_elbo_dyn(
        ddlp, conf, epoch=1, batch_size=2, device=cpu, fig_dir=str(tmp_path), timestep_horizon=T, **options
    )
    dataset = get_video_dataset("balls", config["root"], seq_len=T + 1, mode="valid", image_size=SIDE)
    episodes = torch.stack([item[0] for item in dataset])
    with torch.no_grad():
        x = episodes[:, : T + 1]
        output = ddlp(x, deterministic=True, num_static_frames=2)
        assert loss == pytest.approx(ddlp.calc_elbo(x, output, num_static=2, **options)["loss"].item(), rel=1e-5)
    scores = eval_ddlp_im_metric(
        ddlp, cpu, conf, timestep_horizon=6, val_mode="val", eval_dir=tmp_path, cond_steps=T, metrics=("psnr",)
    )
    predicted = ddlp.sample(episodes, cond_steps=T, num_steps=6 - T)[:, T:]
    psnr = -10 * torch.log10((predicted - episodes[:, T:6]).square().flatten(2).mean(-1))
    assert scores["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-4)
    animate_trajectory_ddlp(
        ddlp, conf, epoch=3, device=cpu, fig_dir=str(tmp_path), timestep_horizon=6, num_trajetories=1, cond_steps=T
    )
    assert len(iio.imread(tmp_path / "e3_traj_anim_0.gif")) == 6


# ---------------------------------------------------------------------------- training from a JSON file


@pytest.fixture
def folder(config, tmp_path, monkeypatch):
    """A working directory with a configuration in it, in a notebook, whose process has arguments of its own."""
    changes = {"device": "cpu", "num_epochs": 1, "eval_im_metrics": False, "num_workers": 0}
    changes |= {"train_size": 4, "val_size": 1}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.json").write_text(json.dumps({**config, **changes}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    return tmp_path


def the_run(folder, kind):
    (path,) = folder.glob(f"*_balls_{kind}_small")
    return path


def test_train_dlp_returns_the_trained_model(folder):
    model = train_dlp(config_path="./configs/small.json")
    assert type(model) is ObjectDLP
    weights = torch.load(the_run(folder, "dlp") / "saves" / "balls_dlp_small.pth")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    (record,) = (the_run(folder, "dlp") / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record)["iteration"] == 2  # 4 images, 2 in a batch


def test_train_ddlp_returns_the_trained_model(folder):
    model = train_ddlp("./configs/small.json")
    assert type(model) is ObjectDynamicsDLP
    hparams = get_config(the_run(folder, "ddlp") / "hparams.json")
    again = make_ddlp(hparams)
    again.load_state_dict(torch.load(the_run(folder, "ddlp") / "saves" / "balls_ddlp_small.pth"))
    x = torch.rand(1, hparams["timestep_horizon"], 3, 32, 32)
    torch.testing.assert_close(model.eval().sample(x, num_steps=2), again.eval().sample(x, num_steps=2))


@pytest.mark.parametrize(
    ("name", "scripts", "default"),
    [
        ("train_dlp", (sys.modules["train_dlp"], train_dlp_accelerate), "./configs/shapes.json"),
        ("train_ddlp", (sys.modules["train_ddlp"], train_ddlp_accelerate), "./configs/balls.json"),
    ],
)
def test_both_scripts_have_the_function_with_its_default(name, scripts, default):
    for script in scripts:
        assert inspect.signature(getattr(script, name)).parameters["config_path"].default == default
