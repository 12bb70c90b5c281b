"""`ObjectDynamicsDLP` and PINT: what the dynamics see, roll-outs, samples, discounts, and what they share with DLPv2.

The published release's numbers for whole passes are in `test_golden.py`.
"""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import models
from configs.schema import Config
from models import ObjectDLP, ObjectDynamicsDLP
from modules.dynamics_modules import DynamicsDLP
from modules.particles import Particles
from modules.transformer import Dropout
from tests import golden
from training.loop import Progress
from training.particles import dynamic_discount

ARGUMENTS = golden.case("ddlp")["arguments"]  # 32 pixels, 5 particles
T, K = ARGUMENTS["timestep_horizon"], ARGUMENTS["n_kp_enc"]
D = 3  # width of the appearance in `pint`


def large_weights(kind, seed, *arguments, **options):
    """A model of that class in evaluation mode, whose weights are large enough for every input to matter."""
    torch.manual_seed(seed)
    model = kind(*arguments, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.2
            parameter.copy_(scale * torch.randn_like(parameter) + (parameter if parameter.dim() == 1 else 0))
    return model.eval()


def build(seed=0, **changes):
    return large_weights(ObjectDynamicsDLP, seed, **{**ARGUMENTS, **changes})


def images(*leading):
    """Smooth random images [.., 3, 32, 32] in 0..1, as many as `leading` says."""
    coarse = torch.rand(math.prod(leading), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=32, mode="bicubic", align_corners=False).clamp(0, 1).view(*leading, 3, 32, 32)


def pint(seed=0, **changes):
    options = {"n_head": 2, "n_layer": 2, "block_size": 4, "max_particles": K + 1, **changes}
    return large_weights(DynamicsDLP, seed, D, D, 16, 16, **options).double()


def particles(batch=2, frames=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draws = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in 3 * [(batch, frames, K, 2)] + [(batch, frames, K, D), (batch, frames, D)]
    ]
    return Particles(0.5 * draws[0], draws[1], draws[2][..., :1], torch.sigmoid(draws[2][..., 1]), draws[3], draws[4])


def differs(a, b):
    """For each frame, whether any tensor of two trees [B, T, ...] differs by more than rounding."""
    found = []
    a.map(lambda x: found.append(x) or x)
    others = []
    b.map(lambda x: others.append(x) or x)
    return [any((x[:, t] - y[:, t]).abs().max() > 1e-12 for x, y in zip(found, others, strict=True)) for t in range(4)]


# ------------------------------------------------------------------------------------------------------------ PINT


@pytest.mark.parametrize("changed", range(4))
def test_a_prediction_depends_on_its_frame_and_those_before_alone(changed):
    model, before = pint(), particles()
    after = before.map(torch.clone)
    after.z[:, changed, 2] += 0.3
    assert differs(model.predict(before), model.predict(after)) == [t >= changed for t in range(4)]


def test_every_particle_and_the_background_see_every_other():
    model, before = pint(), particles()
    for name in ("z", "z_scale", "z_depth", "obj_on", "z_features"):
        after = before.map(torch.clone)
        getattr(after, name)[:, 0, 1] += 0.3
        change = model.predict(after).position.mean - model.predict(before).position.mean
        assert (change[:, 0].abs().amax(-1) > 0).all(), name
    after.z_bg[:, 0] += 0.3
    assert ((model.predict(after).position.mean - model.predict(before).position.mean)[:, 0].abs() > 0).all()
    after = before.map(torch.clone)
    after.z[:, 0, 1] += 0.3
    assert (model.predict(after).bg.mean - model.predict(before).bg.mean)[:, 0].abs().min() > 0


def test_without_position_biases_the_particles_order_does_not_matter():
    order = torch.tensor([3, 0, 4, 1, 2])
    plain, permuted = particles(), particles()
    for name in ("z", "z_scale", "z_depth", "obj_on", "z_features"):
        setattr(permuted, name, getattr(permuted, name)[:, :, order])
    for positional_bias in (False, True):
        model = pint(positional_bias=positional_bias)
        one, two = model.predict(plain).position.mean[:, :, order], model.predict(permuted).position.mean
        assert torch.allclose(one, two, atol=1e-12) is not positional_bias


def test_changes_are_added_to_the_current_particles():
    absolute, delta, past = pint(predict_delta=False), pint(predict_delta=True), particles()
    values, changes = absolute.predict(past), delta.predict(past)
    assert values.position.mean.abs().max() <= 1
    for name, current in {
        "position": "z",
        "scale": "z_scale",
        "depth": "z_depth",
        "features": "z_features",
        "bg": "z_bg",
    }.items():
        expected = getattr(values, name).mean + getattr(past, current)
        torch.testing.assert_close(getattr(changes, name).mean, expected)
        torch.testing.assert_close(getattr(changes, name).logvar, getattr(values, name).logvar)
    torch.testing.assert_close(changes.obj_on.a, values.obj_on.a)


def test_the_published_depth_logvar_is_the_mean_before_the_depth_is_added():
    past = particles()
    own, published = pint(), pint(depth_logvar_from_mean=True)
    change = own.predict(past).depth.mean - past.z_depth
    torch.testing.assert_close(published.predict(past).depth.logvar, change)
    assert (own.predict(past).depth.logvar - change).abs().min() > 0


def test_what_a_state_dict_says_of_the_depth_logvar():
    """Ours says False; a published one says nothing, which means True; one without any entry of PINT says nothing."""
    ours = build().state_dict()
    assert ours.pop("dyn_module.depth_logvar_from_mean").item() is False
    assert "dyn_module.depth_logvar_from_mean" not in build(depth_logvar_from_mean=True).state_dict()
    parts = {name: value for name, value in ours.items() if name.startswith("fg_module.")}
    for before in (False, True):
        model = build(depth_logvar_from_mean=before)
        model.load_state_dict(parts, strict=False)
        assert model.dyn_module.depth_logvar_from_mean is before
        model.load_state_dict(ours)
        assert model.dyn_module.depth_logvar_from_mean is True
        model.load_state_dict(build().state_dict())
        assert model.dyn_module.depth_logvar_from_mean is False


# ------------------------------------------------------------------------------------------------------- roll-outs


def test_a_roll_out_appends_the_prediction_from_the_last_window():
    model, past = pint(), particles(frames=6)
    unrolled = model.roll_out(past, 3)
    expected = past
    for _ in range(3):
        window = Particles(*(value[:, -4:] for value in vars(expected).values()))
        prediction = model.predict(window)
        means = [
            prediction.position.mean,
            prediction.scale.mean,
            prediction.depth.mean,
            prediction.obj_on.a / (prediction.obj_on.a + prediction.obj_on.b),
            prediction.features.mean,
            prediction.bg.mean,
        ]
        values = zip(vars(expected).values(), means, strict=True)
        expected = Particles(*(torch.cat([old, new[:, -1:]], 1) for old, new in values))
    for name in vars(expected):
        torch.testing.assert_close(getattr(unrolled, name), getattr(expected, name))


def test_what_constrains_a_roll_out_is_seen_by_the_next_step():
    model, past = pint(), particles(frames=3)

    def stop(frame):
        assert frame.z.shape == (2, 1, K, 2)
        frame.z = past.z[:, -1:]
        return frame

    unrolled = model.roll_out(past, 2, constrain=stop)
    assert torch.equal(unrolled.z[:, 3:], past.z[:, -1:].expand(-1, 2, -1, -1))
    first = model.roll_out(past, 1)
    first.z[:, -1:] = past.z[:, -1:]
    torch.testing.assert_close(unrolled.z_scale[:, 4], model.roll_out(first, 1).z_scale[:, 4])


def test_samples_have_the_predicted_means_and_variances():
    """One step of many equal videos: each attribute's mean and variance, within five standard errors."""
    count = 20_000
    model, past = pint(), particles(batch=1, frames=2)
    many = [value.expand(count, *value.shape[1:]) for value in vars(past).values()]
    z, z_scale, z_depth, obj_on, z_features, z_bg = many
    torch.manual_seed(0)
    with torch.no_grad():
        prediction = model.predict(past)
        draws = model.sample(z, z_scale, obj_on, z_depth, z_features, z_bg, steps=1)
    a, b = prediction.obj_on.a[0, -1], prediction.obj_on.b[0, -1]
    expected = {
        "position": (prediction.position.mean, prediction.position.logvar.exp()),
        "scale": (prediction.scale.mean, prediction.scale.logvar.exp()),
        "obj_on": (a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))),
        "depth": (prediction.depth.mean, prediction.depth.logvar.exp()),
        "features": (prediction.features.mean, prediction.features.logvar.exp()),
        "bg": (prediction.bg.mean, prediction.bg.logvar.exp()),
    }
    for (name, (mean, variance)), draw in zip(expected.items(), draws, strict=True):
        mean, variance = (x if name == "obj_on" else x[0, -1] for x in (mean, variance))
        new = draw[:, -1]
        assert ((new.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all(), name
        spread = (new - new.mean(0)).square()
        assert ((spread.mean(0) - variance).abs() < 5 * spread.std(0) / math.sqrt(count)).all(), name
    # Attributes are drawn independently of each other.
    noise = torch.cat([((d[:, -1] - d[:, -1].mean(0)) / d[:, -1].std(0)).flatten(1) for d in draws], 1)
    correlation = noise.T @ noise / count - torch.eye(noise.shape[1], dtype=noise.dtype)
    assert correlation.abs().max() < 6 / math.sqrt(count)


def test_later_samples_follow_from_the_earlier_ones():
    """The spread of a position grows from step to step, and the second step's mean moves with the first's draw."""
    model, past = pint(), particles(batch=1, frames=2)
    many = past.map(lambda x: x.expand(4000, *x.shape[1:]))
    torch.manual_seed(0)
    with torch.no_grad():
        z = model.roll_out(many, 2, deterministic=False).z
    first, second = z[:, 2].flatten(1), z[:, 3].flatten(1)
    assert (second.var(0) > first.var(0)).all()
    moved = ((first - first.mean(0)) * (second - second.mean(0))).mean(0) / first.var(0)
    assert (moved > 0.5).all()  # with changes added, a draw's displacement stays


def test_sampling_is_reproducible_and_deterministic_predictions_draw_nothing():
    model, video = build(), images(2, T + 1)
    with torch.no_grad():
        means = model.sample(video, 3, cond_steps=2)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert torch.equal(model.sample(video, 3, cond_steps=2), means)
        assert torch.equal(torch.get_rng_state(), state)
        draw = model.sample(video, 3, deterministic=False, cond_steps=2)
        assert not torch.equal(draw, model.sample(video, 3, deterministic=False, cond_steps=2))
        torch.manual_seed(1)
        assert torch.equal(model.sample(video, 3, deterministic=False, cond_steps=2), draw)
    torch.testing.assert_close(draw[:, :2], means[:, :2])
    assert (draw[:, 2:] - means[:, 2:]).abs().amax((2, 3, 4)).min() > 1e-3


# ----------------------------------------------------------------------------------------------------------- model


def test_the_first_frame_is_encoded_as_dlpv2_encodes_it():
    dlp_arguments = {name: ARGUMENTS[name] for name in ARGUMENTS if name in inspect.signature(ObjectDLP).parameters}
    dlp, ddlp = ObjectDLP(**dlp_arguments).eval(), build()
    weights = {name: value for name, value in ddlp.state_dict().items() if not name.startswith("dyn_module")}
    dlp.load_state_dict(weights)
    video = images(2, T + 1)
    frames, first = ddlp(video, deterministic=True), dlp(video[:, 0], deterministic=True)
    apart = ddlp(video, deterministic=True, forward_dyn=False)
    alone = dlp(video.flatten(0, 1), deterministic=True)
    assert apart.keys() == alone.keys() == {name for name in frames if "_dyn" not in name}
    for name in first:
        torch.testing.assert_close(frames[name].unflatten(0, (2, T + 1))[:, 0], first[name], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(apart[name], alone[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("forward_dyn", [True, False])
def test_videos_work_without_filtering(forward_dyn):
    model = build(filtering_heuristic="none").train()
    video = images(2, T + 1)
    output = model(video, forward_dyn=forward_dyn)
    loss = model.calc_elbo if forward_dyn else model.calc_elbo_static
    loss(video, output)["loss"].backward()
    mixer = [parameter.grad for parameter in model.fg_module.particle_mixer.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in mixer)
    assert output["kp_p"].shape[1] == (ARGUMENTS["image_size"] // ARGUMENTS["patch_size"]) ** 2
    prediction, latents = model.eval().sample(video, 2, cond_steps=3, return_z=True)
    assert prediction.shape == (2, 5, 3, 32, 32) and latents["z_pos"].shape == (2, 5, K, 2)


@pytest.mark.parametrize("frames", [1, T, T + 2])
def test_a_clip_of_another_length_is_refused(frames):
    model = build()
    with pytest.raises(ValueError, match=f"a clip of {frames} frames; legal: {T + 1}, timestep_horizon [+] 1"):
        model(images(1, frames))
    with pytest.raises(ValueError, match=f"a clip of {frames} frames"):
        model.calc_elbo(images(1, frames), {})
    assert model(images(1, frames), forward_dyn=False)["rec"].shape[0] == frames


@pytest.mark.parametrize("cond_steps", [0, 6])
def test_more_conditioning_frames_than_there_are_are_refused(cond_steps):
    with pytest.raises(ValueError, match=f"cond_steps is {cond_steps}; legal: 1 to the clip's 5 frames"):
        build().sample(images(1, 5), 2, cond_steps=cond_steps)


def test_hidden_duplicates_are_hidden_from_the_dynamics():
    model, clip = build(duplicate_iou=0.0), images(2, T + 1)
    hidden = model.encode_all(clip[:, :1], deterministic=True)["obj_on_b"] == 100
    assert 0 < hidden.float().mean() < 1
    posterior = model.encode_posterior(clip)  # from draws: the first frame's overlaps are others
    off = posterior.obj_on.b == 100
    assert off.any() and (off == off[:, :1]).all()
    tracked = model.track(clip[:, :3])
    assert ((tracked.obj_on < 0.01) == hidden[:, None]).all()


@pytest.mark.parametrize(
    "dropout, is_random", [({}, True), ({"pint_dropout": 0.0}, False), ({"pint_dropout": 0.5}, True)]
)
def test_dropout_is_pints_in_training_alone(dropout, is_random):
    """0.1 unless it is said otherwise, as in the release."""
    model = build(**dropout)
    past = model.track(images(2, T))
    expected = model.dyn_module.predict(past).position.mean
    model.train()
    probabilities = {layer.p for layer in model.dyn_module.modules() if isinstance(layer, Dropout)}
    assert probabilities == {dropout.get("pint_dropout", 0.1)}
    found = [model.dyn_module.predict(past).position.mean for _ in range(2)]
    assert all(torch.equal(values, expected) is not is_random for values in found)
    assert torch.equal(*found) is not is_random


def new_ddlp(**changes):
    """With the weights that it is made with."""
    torch.manual_seed(0)
    return ObjectDynamicsDLP(**{**ARGUMENTS, **changes})


def test_pint_can_begin_with_positions_as_they_are():
    plain, model = new_ddlp(), new_ddlp(pint_identity_init=True)
    positions = 3 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    released, found = (ddlp.dyn_module.particle_projection.xy_projection(positions) for ddlp in (plain, model))
    assert torch.equal(found, positions)
    assert (released - positions).abs().mean() > 1
    other = {name for name, weight in plain.state_dict().items() if not torch.equal(weight, model.state_dict()[name])}
    assert other == {
        f"dyn_module.particle_projection.xy_projection.{layer}.{name}"
        for layer in (0, 2)
        for name in ("weight", "bias")
    }


def test_what_begins_as_the_identity_learns_all_its_weights():
    model = new_ddlp(pint_identity_init=True).dyn_module
    projection = model.particle_projection.xy_projection
    for _ in range(2):  # at first the idle units' way out is 0, so that there is no gradient before it
        model.zero_grad()
        projection(torch.randn(64, 2, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        with torch.no_grad():
            for parameter in projection.parameters():
                parameter -= 1e-3 * parameter.grad
    assert all(
        parameter.grad.flatten(1 if parameter.dim() > 1 else 0).abs().sum(-1).gt(0).float().mean() > 0.9
        for parameter in projection.parameters()
    )


def test_loaded_weights_are_not_begun_anew():
    plain, model = new_ddlp(), new_ddlp(pint_identity_init=True)
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in plain.state_dict().items())


def test_less_than_no_frames_cannot_be_predicted():
    with pytest.raises(ValueError, match="num_steps is -1; legal: at least 0"):
        build().sample(images(1, 5), -1, cond_steps=3)


def test_a_prediction_is_tracking_then_dynamics_then_drawing(monkeypatch):
    model, video = build(), images(2, 5)
    whole, latents = model.sample(video, 6, cond_steps=3, return_z=True)
    tracked = model.track(video[:, :3])
    encoded = model.encode_all(video[:, :3], deterministic=True, num_static_frames=3, reshape=False)
    for mine, theirs in {"z": "z", "z_scale": "z_scale", "obj_on": "obj_on", "z_bg": "z_bg"}.items():
        torch.testing.assert_close(getattr(tracked, mine), encoded[theirs])
    unrolled = model.predict(tracked, 6)
    assert torch.equal(unrolled.z, latents["z_pos"])
    decoded = model.decode_all(
        *(latents[name].flatten(0, 1) for name in ("z_pos", "z_features", "z_bg_features", "z_obj_on", "z_depth")),
        z_scale=latents["z_scale"].flatten(0, 1),
    )
    torch.testing.assert_close(decoded["rec"].unflatten(0, (2, 9)), whole)
    # Frames that are drawn a few at a time are those that are drawn at once.
    monkeypatch.setattr(models, "FRAMES_AT_ONCE", 4)
    torch.testing.assert_close(model.sample(video, 6, cond_steps=3), whole)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.03), (torch.bfloat16, 0.1)])
def test_a_model_of_half_precision_trains_and_predicts(dtype, error):
    video, model = images(1, T + 1), build()
    full = model.sample(video, 2, cond_steps=3)
    model.to(dtype)
    losses = model.calc_elbo(video.to(dtype), model(video.to(dtype)))
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert (model.sample(video.to(dtype), 2, cond_steps=3) - full).abs().mean() < error


def test_parameters_are_partitioned_with_the_dynamics():
    model = build()
    parts = [model.get_parameters(*(i == part for i in range(4))) for part in range(4)]
    assert sorted(id(p) for part in parts for p in part) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in parts[3]} == {id(p) for p in model.dyn_module.parameters()}
    model.set_require_grad(False, False, False)
    assert [p.requires_grad for p in model.parameters()] == [
        name.startswith("dyn_module") for name, _ in model.named_parameters()
    ]


# -------------------------------------------------------------------------------------------------------- discount


@pytest.mark.parametrize(
    ("iteration", "warmup", "epoch_length", "floor", "num_static"),
    [
        (0, 1, 500, 10_000, 4),
        (3500, 1, 500, 10_000, 4),
        (3500, 3, 20_000, 10_000, 1),
        (12, 0, 50, 40, 2),
        (9, 0, 3, 3, 2),
    ],
)
def test_the_discount_rises_with_the_iterations(iteration, warmup, epoch_length, floor, num_static):
    config = Config.from_dict(
        {
            "ds": "balls",
            "timestep_horizon": 10,
            "warmup_epoch": warmup,
            "discount_iterations": floor,
            "num_static_frames": num_static,
        }
    )
    step = max(1, max(warmup, 1) * max(floor, epoch_length) // 10)
    expected = [min(1.0, iteration / ((i + 1) * step)) for i in range(10)][: 10 - num_static + 1]
    weights = dynamic_discount(Progress(0, 0, iteration, epoch_length), config)
    torch.testing.assert_close(weights, torch.tensor(expected))
    # It counts from the epoch on from which the dynamics are trained.
    later = config.replace(start_dyn_epoch=3)
    assert torch.equal(dynamic_discount(Progress(3, 0, 3 * epoch_length + iteration, epoch_length), later), weights)
    assert not dynamic_discount(Progress(3, 0, 3 * epoch_length, epoch_length), later).any()


def test_static_frames_alone_leave_nothing_to_discount():
    config = Config.from_dict({"ds": "balls", "timestep_horizon": 3, "num_static_frames": 9})
    assert len(dynamic_discount(Progress(), config)) == 0
    model, video = build(), images(1, T + 1)
    losses = model.calc_elbo(video, model(video, deterministic=True), num_static=9, dynamic_discount=torch.empty(0))
    assert losses["kl_dyn"] == 0 and torch.isfinite(losses["loss"])


def test_a_discount_that_is_too_short_is_refused():
    model, video = build(), images(1, T + 1)
    with pytest.raises(ValueError, match=f"dynamic_discount has 1 entries; legal: at least {T - 1}"):
        model.calc_elbo(video, model(video), num_static=2, dynamic_discount=[1.0])
