"""`ObjectDLP` and its networks: interface, blocks, prior, posterior, tracking, decoding and loss, against plain code.

The published release's numbers for whole passes are in `test_golden.py`.
"""

import inspect
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Beta, Normal, kl_divergence
from torchvision.ops import nms

from configs.schema import Config
from models import ObjectDLP
from modules.modules import GlimpseDecoder, PatchCNN, Stage
from modules.spatial import cut_glimpses, generate_correlation_maps, square_mask
from tests.small_dlp import ARGUMENTS, build, images
from utils.errors import UserError

K = ARGUMENTS["n_kp_enc"]
HEURISTICS = ["variance", "distance", "random", "none"]
TRACKING = {"use_tracking": True, "use_correlation_heatmaps": True}


def scene(batch=1, particles=1, dtype=torch.float32, **changes):
    """Particles to draw, as `decode_all`'s keyword arguments: in the middle, of the anchors' scale, fully visible."""
    generator = torch.Generator().manual_seed(2)
    values = {
        "z": torch.zeros(batch, particles, 2),
        "z_features": torch.randn(batch, particles, 4, generator=generator),
        "z_bg": torch.randn(batch, 4, generator=generator),
        "obj_on": torch.ones(batch, particles),
        "z_depth": torch.zeros(batch, particles, 1),
        "z_scale": torch.full((batch, particles, 2), 0.25).logit(),
    }
    return {name: value.to(dtype) for name, value in {**values, **changes}.items()}


def assert_outputs_equal(actual, expected, keys=None):
    for key in expected if keys is None else keys:
        torch.testing.assert_close(actual[key], expected[key], msg=lambda text, key=key: f"{key}: {text}")


def gradient_norm(value, parameters):
    gradients = torch.autograd.grad(value, list(parameters), allow_unused=True, retain_graph=True)
    return sum(gradient.norm().item() for gradient in gradients if gradient is not None)


# ------------------------------------------------------------------------------------------------------- interface


def test_default_arguments_make_a_model_of_as_many_particles_as_there_are_proposals():
    with pytest.warns(UserWarning, match="n_kp_enc is 20, but the patches propose 16"):
        model = ObjectDLP()
    x = images(1, size=64)
    output = model(x)
    assert output["z"].shape == (1, 16, 2)
    loss = model.calc_elbo(x, output)["loss"]
    assert loss.isfinite()
    loss.backward()


def test_the_mixer_makes_any_number_of_particles_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(filtering_heuristic="none", n_kp_enc=20, n_kp_prior=2)
    assert model(images(2))["z"].shape == (2, 20, 2)


def test_from_config_hands_every_key_on():
    architecture = {
        **{"enc_channels": (8, 20), "prior_channels": (10, 8), "image_size": 64, "n_kp": 2, "pad_mode": "zeros"},
        **{"sigma": 0.5, "dropout": 0.25, "patch_size": 8, "n_kp_enc": 6, "n_kp_prior": 9, "learned_feature_dim": 3},
        **{"bg_learned_feature_dim": 5, "kp_range": (0.0, 1.0), "kp_activation": "sigmoid", "anchor_s": 0.125},
        **{"use_resblock": True, "scale_std": 0.4, "offset_std": 0.6, "obj_on_alpha": 0.7, "obj_on_beta": 0.8},
        **{"use_correlation_heatmaps": True, "enable_enc_attn": True, "filtering_heuristic": "distance"},
        **{"duplicate_iou": 0.4},
    }
    for config in ({"ds": "shapes", **architecture, "use_tracking": True}, Config(ds="shapes", **architecture)):
        model = ObjectDLP.from_config(config)
        assert vars(model.architecture) == {**architecture, "ch": 3}
        assert model.use_tracking == isinstance(config, dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kp_prior": 4}, "n_kp_enc is 5; legal: at most n_kp_prior 4"),
        ({"anchor_s": 0.3}, "anchor_s is 0.3; legal: near it 0.25 or 0.5"),
        ({"patch_size": 5}, "patch_size is 5; legal: 8, 16, 32"),
        ({"image_size": 48}, "image_size is 48; legal: a power of two"),
        ({"enc_channels": (8, 7)}, "enc_channels is [8, 7]; legal: a list of integers"),
        ({"prior_channels": ()}, "prior_channels is []; legal: a list of integers, 1 or more"),
        ({"duplicate_iou": 1.5}, "duplicate_iou is 1.5; legal: a finite number, from 0 to 1, or null"),
        ({"n_kp": 0}, "n_kp is 0; legal: an integer, at least 1"),
        ({"filtering_heuristic": "best"}, 'filtering_heuristic is "best"; legal: a string, "variance" or'),
        ({"pad_mode": "reflect"}, 'pad_mode is "reflect"; legal: a string, "replicate" or "zeros"'),
        ({"kp_activation": "relu"}, 'kp_activation is "relu"; legal: a string, "tanh" or "sigmoid"'),
        ({"kp_range": (1, -1)}, "kp_range is [1.0, -1.0]; legal: a list of 2 finite numbers, the first below"),
        ({"learned_feature_dim": 0}, "learned_feature_dim is 0; legal: an integer, at least 1"),
        ({"bg_learned_feature_dim": 0}, "bg_learned_feature_dim is 0; legal: an integer, at least 1"),
        ({"cdim": 0}, "ch is 0; legal: an integer, at least 1"),
    ],
)
def test_illegal_arguments_are_refused_with_key_value_and_what_is_legal(changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\\n]*$"):
        ObjectDLP(**{**ARGUMENTS, **changes})


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 64, 64), (2, 3, 32, 64), (1, 2, 2, 3, 32, 32), (0, 3, 32, 32)]
)
@pytest.mark.parametrize("method", ["forward", "encode_all", "fg_sequential_opt"])
def test_input_of_another_shape_is_refused_in_one_line(method, shape):
    with pytest.raises(ValueError) as caught:
        getattr(build(), method)(torch.zeros(shape))
    assert caught.type is ValueError  # of a programmer's, with its traceback
    kinds = {"forward": r"images [B, 3, 32, 32] or clips [B, T, 3, 32, 32]", "encode_all": "images [B, 3, 32, 32]"}
    assert str(caught.value) == f"input of shape {list(shape)}; legal: {kinds.get(method, 'clips [B, T, 3, 32, 32]')}"


def test_input_that_is_not_of_floats_is_refused():
    with pytest.raises(ValueError, match=r"input of torch.uint8; legal: floats in 0..1, such as x / 255"):
        build()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="input of type ndarray; legal: a tensor"):
        build()(torch.zeros(2, 3, 32, 32).numpy())


def test_prior_images_of_another_shape_are_refused():
    x = images(2, 3)
    for method in ("forward", "fg_sequential_opt"):
        with pytest.raises(ValueError, match=r"^x_prior of shape \[2, 2, 3, 32, 32\]; legal: .*\[2, 3, 3, 32, 32\]$"):
            getattr(build(**TRACKING), method)(x, x_prior=x[:, :2])


def test_integer_arguments_are_priors_that_a_checkpoint_can_replace():
    model = build(obj_on_alpha=1, obj_on_beta=2, sigma=1, scale_std=1, offset_std=1)
    released = build().state_dict()
    model.load_state_dict(released)
    assert all(torch.equal(value, released[name]) for name, value in model.state_dict().items())


def test_parameters_are_partitioned_into_prior_encoder_and_decoder():
    model = build(filtering_heuristic="none", enable_enc_attn=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = {}
    for part in ("prior", "encoder", "decoder"):
        chosen = {key: key == part for key in ("prior", "encoder", "decoder")}
        parts[part] = [names[id(parameter)] for parameter in model.get_parameters(**chosen)]
    listed = [name for part in parts.values() for name in part]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(names.values())
    assert len(model.get_parameters()) == len(listed)
    prefixes = {part: {".".join(name.split(".")[:2]) for name in chosen} for part, chosen in parts.items()}
    assert prefixes == {
        "prior": {"fg_module.prior", "fg_module.particle_mixer"},
        "encoder": {
            *("fg_module.particle_attribute_enc", "fg_module.particle_features_enc"),
            *("bg_module.bg_cnn_enc", "bg_module.bg_enc"),
        },
        "decoder": {"fg_module.object_dec", "bg_module.latent_to_feat_map", "bg_module.dec"},
    }


def test_set_require_grad_freezes_and_thaws_each_part():
    model = build()
    model.set_require_grad(prior_value=False, dec_value=False)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in model.get_parameters(prior=False, decoder=False)}
    model.set_require_grad()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_info_names_every_number_of_the_architecture_and_the_parameters():
    model = build()
    lines = [line.strip() for line in model.info().splitlines()]
    assert lines[0] == f"ObjectDLP: {sum(p.numel() for p in model.parameters()):,} parameters"
    assert f"prior: {sum(p.numel() for p in model.fg_module.prior.parameters()):,} parameters" in lines
    assert "glimpses of 8 x 8 pixels" in lines
    for name in inspect.signature(ObjectDLP).parameters:
        name = "ch" if name == "cdim" else name
        assert name == "use_tracking" or f"{name}: {getattr(model.architecture, name)}" in lines


def test_lerp_is_a_moving_average_with_decay_betta():
    model, other = build(seed=0), build(seed=1, dtype=torch.float64)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.lerp(other, 0.25)
    for old, theirs, new in zip(before, other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, (0.25 * old + 0.75 * theirs).float())


# ---------------------------------------------------------------------------------------------------------- blocks


def test_patch_cnn_has_one_second_block_per_channel_count():
    cnn = PatchCNN(3, [32, 32, 64, 64], size=16, n_out=5)
    convolutions = {
        name: next(m for m in block.modules() if isinstance(m, nn.Conv2d)) for name, block in cnn.main.named_children()
    }
    layout = [(name, c.in_channels, c.out_channels, c.stride[0]) for name, c in convolutions.items()]
    assert layout == [
        ("in_block_1", 3, 32, 1),
        ("in_block_2", 32, 32, 1),
        ("conv_in_16_0", 32, 32, 2),
        ("conv_in_32_1", 32, 32, 1),
        ("conv_in_8_0", 32, 64, 2),
        ("conv_in_64_1", 64, 64, 1),
        ("conv_in_4_0", 64, 64, 2),  # followed by nothing: conv_in_64_1 stands above
    ]
    assert cnn(torch.zeros(1, 3, 16, 16)).shape == (1, 5, 2, 2)
    assert cnn.out_size == 2


@pytest.mark.parametrize(("anchor_s", "size"), [(0.125, 8), (0.25, 16), (0.5, 32)])
def test_glimpse_decoder_doubles_8_pixels_up_to_the_glimpse(anchor_s, size):
    model = build(image_size=64, anchor_s=anchor_s)
    decoder = model.fg_module.object_dec
    doublings = int(math.log2(size)) - 3
    assert sum(isinstance(module, nn.Upsample) for module in decoder.modules()) == doublings
    shapes = [tuple(m.weight.shape[:2]) for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    widths = [32] + doublings * [64] + [32, 4]
    assert shapes == list(zip(widths[1:], widths[:-1], strict=True))
    glimpses = decoder(torch.randn(6, 4))
    assert glimpses.shape == (6, 4, size, size)
    assert 0 < glimpses.min() < glimpses.max() < 1
    output = model(images(1, size=64))
    assert output["dec_objects_original"].shape == (1, K, 4, size, size)
    assert output["cropped_objects_original"].shape == (1, K, 3, size, size)


def test_glimpse_decoder_begins_with_the_colour_channels_it_is_told():
    assert GlimpseDecoder(4, 16, cdim=1, residual=True)(torch.randn(2, 4)).shape == (2, 2, 16, 16)


def test_initial_weights_are_the_published_distributions():
    torch.manual_seed(0)
    model = ObjectDLP(**{**ARGUMENTS, "enable_enc_attn": True, "filtering_heuristic": "none"})
    transformers = [
        encoder.self_attention
        for encoder in (model.fg_module.particle_attribute_enc, model.fg_module.particle_features_enc)
    ]
    in_transformer = {module for transformer in transformers for module in transformer.modules()}
    deviations = {"convolution": [], "transformer": []}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            deviations["convolution"].append(module.weight.flatten() / 0.01)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.GroupNorm):
            assert module.eps == 1e-4
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, nn.Linear) and module in in_transformer:
            deviations["transformer"].append(module.weight.flatten() / 0.02)
            assert not module.bias.any()
        elif isinstance(module, nn.Linear):  # PyTorch's default: uniform in +-1/sqrt(inputs)
            bound = 1 / math.sqrt(module.in_features)
            assert 0.95 * bound < module.weight.abs().max() <= bound
            assert module.bias.abs().max() <= bound
    for name, weights in deviations.items():
        weights = torch.cat(weights)
        assert weights.std().item() == pytest.approx(1, abs=0.02), name
        assert weights.mean().item() == pytest.approx(0, abs=0.02), name
        assert weights.pow(4).mean().item() == pytest.approx(3, abs=0.2), name  # normal, not uniform (1.8)
    frequencies = model.fg_module.particle_attribute_enc.pos_enc.b
    assert frequencies.shape == (128, 2)
    assert frequencies.std().item() == pytest.approx(10, abs=2)


# ----------------------------------------------------------------------------------------------------------- prior


def propose_by_patch(model, image):
    """Proposals, uncertainties, and patch centres of one image [C, H, W], one patch and heat map after the other."""
    arch = model.architecture
    low, high = arch.kp_range
    size = arch.patch_size

    def to_image(value, origin):
        pixel = (value - low) / (high - low) * (size - 1) + origin
        return pixel / (arch.image_size - 1) * (high - low) + low

    proposals, uncertainties, centres = [], [], []
    for top in range(0, arch.image_size, size):
        for left in range(0, arch.image_size, size):
            patch = image[None, :, top : top + size, left : left + size]
            for heat_map in model.fg_module.prior.enc(patch)[0]:
                cells = heat_map.shape[0]
                axis = [low + (high - low) * i / (cells - 1) for i in range(cells)]
                total = sum(math.exp(value) for row in heat_map.tolist() for value in row)
                points = [
                    (math.exp(value) / total, y, x)
                    for y, row in zip(axis, heat_map.tolist(), strict=True)
                    for x, value in zip(axis, row, strict=True)
                ]
                mean_y, mean_x = sum(p * y for p, y, _ in points), sum(p * x for p, _, x in points)
                var_y = max(sum(p * (y - mean_y) ** 2 for p, y, _ in points), 1e-6)
                var_x = max(sum(p * (x - mean_x) ** 2 for p, _, x in points), 1e-6)
                uncertainties.append(var_y + var_x + sum(p * (y - mean_y) * (x - mean_x) for p, y, x in points))
                proposals.append([to_image(mean_y, top), to_image(mean_x, left)])
                middle = (low + high) / 2
                centres.append([to_image(middle, top), to_image(middle, left)])
    return proposals, uncertainties, centres


@pytest.mark.parametrize("kp_range", [(-1, 1), (0, 1)])
@pytest.mark.parametrize("heuristic", ["variance", "distance", "none"])
def test_proposals_are_the_expected_positions_in_every_patch_best_first(heuristic, kp_range):
    model = build(dtype=torch.float64, n_kp=2, n_kp_prior=20, kp_range=kp_range, filtering_heuristic=heuristic, seed=3)
    with torch.no_grad():
        model.fg_module.prior.enc.keymap.weight.mul_(3)  # from all but flat heat maps to all but single cells
    x = images(2, dtype=torch.float64)
    kept = model.fg_module.propose(x)
    for image, actual in zip(x, kept, strict=True):
        proposals, uncertainties, centres = propose_by_patch(model, image)
        best = range(len(proposals))
        if heuristic == "variance":
            best = sorted(best, key=lambda i: uncertainties[i])[:20]
        elif heuristic == "distance":
            best = sorted(best, key=lambda i: -math.dist(proposals[i], centres[i]))[:20]
        expected = torch.tensor([proposals[i] for i in best], dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        assert expected.min() >= kp_range[0]
        assert expected.max() <= kp_range[1]
    if heuristic != "none":
        output = model(x, deterministic=True)
        torch.testing.assert_close(output["kp_p"], kept)


def test_the_variance_of_a_single_cell_is_at_least_a_millionth():
    model = build(dtype=torch.float64)
    with torch.no_grad():
        model.fg_module.prior.enc.keymap.weight.mul_(1e6)
    uncertainty = model.fg_module.prior(images(2, dtype=torch.float64))[1]
    torch.testing.assert_close(uncertainty, torch.full((2, 16), 2e-6, dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_random_filtering_draws_one_choice_that_the_batch_shares():
    model = build(filtering_heuristic="random")
    x = images(3)
    proposals = model.fg_module.prior(x)[0]
    choices = []
    for seed in range(4):
        torch.manual_seed(seed)
        kept = model.fg_module.propose(x)
        distances = torch.cdist(kept, proposals)  # [B, kept, all]
        assert distances.amin(-1).max() < 1e-6
        indices = distances.argmin(-1)
        assert (indices == indices[0]).all()
        choices.append(tuple(indices[0].tolist()))
        assert len(set(choices[-1])) == ARGUMENTS["n_kp_prior"]
    assert len(set(choices)) == 4


@pytest.mark.parametrize("heuristic", HEURISTICS)
def test_no_more_proposals_are_kept_than_there_are(heuristic):
    model = build(filtering_heuristic=heuristic, n_kp_prior=100, n_kp_enc=10)
    assert model(images(1))["kp_p"].shape == (1, 16, 2)


def test_the_prior_learns_through_the_anchors_alone(monkeypatch):
    model, x = build(), images(2)
    proposals = model.fg_module.propose(x)
    monkeypatch.setattr(model.fg_module, "propose", lambda *arguments: proposals)
    loss = model.calc_elbo(x, model(x), kl_balance=1.0)["loss"]
    (gradient,) = torch.autograd.grad(loss, proposals)
    assert (gradient[:, :K] != 0).all()
    assert (gradient[:, K:] == 0).all()
    assert gradient_norm(model(x)["mu_scale"].sum(), model.fg_module.prior.parameters()) == 0


@pytest.mark.parametrize("call", ["forward", "encode_all", "fg_sequential_opt"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_prior_can_be_left_untrained(call, trained):
    model, x = build(), images(2)
    if call == "forward":
        z = model(x, train_enc_prior=trained)["z"]
    elif call == "encode_all":
        z = model.encode_all(x, train_prior=trained)["z"]
    else:
        z = model.fg_sequential_opt(x[:, None], train_prior=trained)["z"]
    assert (gradient_norm(z.sum(), model.fg_module.prior.parameters()) > 0) == trained
    assert gradient_norm(z.sum(), model.fg_module.particle_attribute_enc.parameters()) > 0


def test_prior_images_change_the_proposals_and_nothing_else():
    model, x, other = build(dtype=torch.float64), images(2, dtype=torch.float64), images(2, seed=5, dtype=torch.float64)
    output = model(x, deterministic=True, x_prior=other)
    torch.testing.assert_close(output["kp_p"], model(other, deterministic=True)["kp_p"])
    anchors = output["kp_p"][:, :K]
    posterior, particles, glimpses = model.fg_module.encode(x, anchors, Stage(deterministic=True))
    torch.testing.assert_close(output["z_base"], posterior.z_base)
    torch.testing.assert_close(output["z_features"], particles.z_features)
    torch.testing.assert_close(output["cropped_objects_original"], glimpses)
    assert_outputs_equal(model(x, deterministic=True, x_prior=x), model(x, deterministic=True))


# ------------------------------------------------------------------------------------------- one frame's posterior


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("correlate", [True, False])
def test_encode_all_looks_at_the_frame_before(correlate, refine):
    model, x = build(dtype=torch.float64, use_correlation_heatmaps=correlate), images(2, dtype=torch.float64)
    previous = images(2, K, size=8, seed=3, dtype=torch.float64)
    scale = torch.linspace(-2, -0.5, 2 * K * 2, dtype=torch.float64).view(2, K, 2)
    output = model.encode_all(
        x, deterministic=True, cropped_objects_prev=previous, scale_prev=scale, refinement_iter=refine
    )

    def attributes(z, z_scale):
        if correlate:
            glimpses = generate_correlation_maps(x, z, 8, previous.flatten(0, 1), z_scale).unflatten(0, (2, K))
        else:
            glimpses = cut_glimpses(x, z, torch.sigmoid(z_scale), 8)
        return model.fg_module.particle_attribute_enc(glimpses, z)

    anchors = model.fg_module.propose(x)[:, :K]
    offset, scale, obj_on, depth = attributes(anchors, scale)
    if refine:
        anchors = anchors + offset.mean
        offset, scale, obj_on, depth = attributes(anchors, scale.mean)
    z = anchors + offset.mean
    glimpses = cut_glimpses(x, z, torch.sigmoid(scale.mean), 8)
    features = model.fg_module.particle_features_enc(glimpses, z)
    expected = {
        **{"z_base": anchors, "mu": anchors, "logvar": torch.zeros_like(anchors), "z": z, "z_offset": offset.mean},
        **{"mu_offset": offset.mean, "logvar_offset": offset.logvar},
        **{"mu_scale": scale.mean, "logvar_scale": scale.logvar, "z_scale": scale.mean},
        **{"mu_depth": depth.mean, "logvar_depth": depth.logvar, "z_depth": depth.mean},
        **{"obj_on_a": obj_on.a, "obj_on_b": obj_on.b, "obj_on": obj_on.a / (obj_on.a + obj_on.b)},
        **{"mu_features": features.mean, "logvar_features": features.logvar, "z_features": features.mean},
        **{"cropped_objects": glimpses, "z_kp_bg": torch.zeros(2, 1, 2, dtype=torch.float64)},
    }
    assert_outputs_equal(output, expected)


@pytest.mark.parametrize("stage", [{"warmup": True}, {"noisy": True}])
def test_warmup_and_noisy_look_at_neither_scales_nor_the_frame_before(stage, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    x, previous, scale = images(2), images(2, K, size=8, seed=3), torch.zeros(2, K, 2)
    for flags, looks in ((stage, False), ({}, True)):
        model = build(**TRACKING)
        plain = model.encode_all(x, deterministic=True, **flags)
        reminded = model.encode_all(x, deterministic=True, cropped_objects_prev=previous, scale_prev=scale, **flags)
        with torch.no_grad():
            model.fg_module.particle_attribute_enc.scale_xy_head.bias.add_(1)
        larger = model.encode_all(x, deterministic=True, **flags)
        assert torch.equal(plain["mu_offset"], reminded["mu_offset"]) is not looks
        assert torch.equal(plain["mu_offset"], larger["mu_offset"]) is not looks


def test_warmup_detaches_positions_and_scales():
    model, x = build(), images(2)
    encoder = model.fg_module.particle_attribute_enc
    for warmup in (True, False):
        output = model(x, warmup=warmup)
        assert output["z"].requires_grad is not warmup
        assert output["z_scale"].requires_grad is not warmup
        heads = [*encoder.x_head.parameters(), *encoder.scale_xy_head.parameters()]
        assert (gradient_norm(output["rec"].sum(), heads) > 0) is not warmup


def test_noisy_scales_are_the_anchors_plus_noise():
    model, x = build(anchor_s=0.5), images(64)
    for deterministic in (True, False):
        scale = model.encode_all(x, deterministic=deterministic, noisy=True)["z_scale"]
        assert scale.mean().item() == pytest.approx(math.log(0.5 / (0.5 + 1e-5)), abs=0.02)
        assert scale.std().item() == pytest.approx(0.1, abs=0.01)


def test_appearance_gradients_reach_the_positions_but_not_the_scales():
    model = build()
    encoder, features = model.fg_module.particle_attribute_enc, model(images(2))["z_features"].sum()
    assert gradient_norm(features, encoder.x_head.parameters()) > 0
    assert gradient_norm(features, encoder.y_head.parameters()) > 0
    assert gradient_norm(features, encoder.scale_xy_head.parameters()) == 0


def test_refined_anchors_keep_the_first_offsets_gradient():
    model, x = build(), images(2)
    heads = model.fg_module.particle_attribute_enc.x_head.parameters
    assert gradient_norm(model.encode_all(x)["z_base"].sum(), heads()) > 0
    unrefined = model.encode_all(x, refinement_iter=False)["z_base"].sum()
    assert gradient_norm(unrefined, heads()) == 0
    assert gradient_norm(unrefined, model.fg_module.prior.parameters()) > 0


def test_position_heads_are_y_then_x():
    model, x = build(), images(2)
    before = model.encode_all(x, deterministic=True, refinement_iter=False)["mu_offset"]
    with torch.no_grad():
        model.fg_module.particle_attribute_enc.x_head.bias[0] += 1
    moved = model.encode_all(x, deterministic=True, refinement_iter=False)["mu_offset"] - before
    assert (moved[..., 0] > 0.01).all()
    assert (moved[..., 1] == 0).all()


def test_offset_activation_is_tanh_or_sigmoid():
    x = images(2, dtype=torch.float64)
    tanh, sigmoid = (
        build(dtype=torch.float64, kp_activation=name).encode_all(x, deterministic=True, refinement_iter=False)
        for name in ("tanh", "sigmoid")
    )
    torch.testing.assert_close(tanh["mu_offset"].atanh(), sigmoid["mu_offset"].logit())


def test_deterministic_passes_are_means_and_others_are_draws():
    model, x = build(), images(2)
    first, second = (model(x, deterministic=True) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert_outputs_equal(
        first,
        {
            "z": first["z_base"] + first["mu_offset"],
            "obj_on": first["obj_on_a"] / (first["obj_on_a"] + first["obj_on_b"]),
            **{f"z_{name}": first[f"mu_{name}"] for name in ("scale", "depth", "features", "bg")},
        },
    )
    first, second = (model(x) for _ in range(2))
    assert torch.equal(first["mu_offset"], second["mu_offset"])  # nothing drawn comes before
    for key in ("z", "z_scale", "z_depth", "obj_on", "z_features", "z_bg"):
        assert torch.isclose(first[key], second[key]).float().mean() < 0.2, key


@pytest.mark.parametrize("bias", [(1e4, -1e4), (-1e4, 1e4), (3e38, 3e38), (-3e38, -3e38), (3e38, -3e38), (-3e38, 3e38)])
def test_extreme_transparency_logits_leave_everything_finite(bias):
    model, x = build(), images(2)
    with torch.no_grad():
        model.fg_module.particle_attribute_enc.obj_on_head.bias.copy_(torch.tensor(bias))
    for stage in ({}, {"warmup": True, "noisy": True}):
        output = model(x, deterministic=False, **stage)
        losses = model.calc_elbo(x, output, **stage)
        losses["loss"].backward()
        assert all(value.isfinite().all() for value in [*output.values(), *losses.values()])
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("attends", [True, False])
def test_particles_attend_to_each_other_in_any_order(attends):
    model = build(dtype=torch.float64, enable_enc_attn=attends)
    glimpses, z = images(2, K, size=8, dtype=torch.float64), torch.rand(2, K, 2, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    changed = glimpses.clone()
    changed[:, 0] = 1 - changed[:, 0]

    def encode(glimpses, z):
        fg = model.fg_module
        offset, scale, obj_on, depth = fg.particle_attribute_enc(glimpses, z)
        features = fg.particle_features_enc(glimpses, z)
        return torch.cat([offset.mean, scale.mean, depth.mean, obj_on.a.log().unsqueeze(-1), features.mean], dim=-1)

    encoded = encode(glimpses, z)
    torch.testing.assert_close(encode(glimpses[:, order], z[:, order]), encoded[:, order])
    affected = (encode(changed, z) - encoded).abs().amax((0, 2)) > 1e-9
    assert affected.tolist() == [True] + [attends] * (K - 1)
    moved = encode(glimpses, z + torch.tensor([0.1, 0.0], dtype=torch.float64))
    assert (not torch.allclose(moved, encoded)) == attends  # the positions' Fourier features


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_the_encoders_attentions_in_training(dropout):
    model, x = build(enable_enc_attn=True, dropout=dropout), images(2)
    for training in (True, False):
        model.train(training)
        first, second = (model(x, deterministic=True)["rec"] for _ in range(2))
        assert torch.equal(first, second) is not (training and dropout > 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_enc_attn": True, "use_resblock": True},
        {"filtering_heuristic": "none", **TRACKING},
        {"filtering_heuristic": "random", "pad_mode": "zeros"},
        {"filtering_heuristic": "distance", "kp_range": (0, 1), "n_kp": 2},
    ],
)
def test_a_float64_model_computes_in_float64_alone(changes):
    model, x = build(dtype=torch.float64, **changes), images(1, 2, dtype=torch.float64)
    narrow = []
    for module in model.modules():
        module.register_forward_hook(
            lambda module, inputs, output: narrow.extend(
                type(module).__name__
                for value in [*inputs, output]
                if isinstance(value, torch.Tensor) and value.dtype != torch.float64
            )
        )
    for stage in ({}, {"warmup": True, "noisy": True}):
        output = model(x, **stage)
        losses = model.calc_elbo(x, output, **stage)
        assert {value.dtype for value in [*output.values(), *losses.values()]} == {torch.float64}
    drawn = model.decode_all(*(output[key] for key in ("z", "z_features", "z_bg", "obj_on")), noisy=True)
    assert {value.dtype for value in drawn.values()} == {torch.float64}
    assert narrow == []


def test_grey_images_need_no_more_than_cdim_1():
    model, x = build(cdim=1, **TRACKING), images(2, 2, channels=1)
    output = model(x)
    assert output["rec"].shape == (4, 1, 32, 32)
    assert output["cropped_objects_original"].shape == (4, K, 1, 8, 8)
    assert output["dec_objects_original"].shape == (4, K, 2, 8, 8)
    losses = model.calc_elbo(x, output)
    expected = (x.flatten(0, 1) - output["rec"]).square().sum() / 4
    torch.testing.assert_close(losses["loss_rec"], expected)
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------------ background


def test_the_background_is_seen_outside_the_particles_squares():
    model, x = build(dtype=torch.float64), images(2, dtype=torch.float64)
    encoded = model.encode_all(x, deterministic=True)
    mask = square_mask(encoded["z"], encoded["obj_on"], 8, 32)
    torch.testing.assert_close(encoded["bg_mask"], mask)
    torch.testing.assert_close(encoded["mu_bg"], model.bg_module.encode(x, mask).mean)
    assert gradient_norm(encoded["mu_bg"].sum(), model.fg_module.parameters()) == 0


def test_the_background_is_seen_where_the_decoded_particles_leave_it_free():
    model, x = build(dtype=torch.float64), images(2, dtype=torch.float64)
    output = model(x, deterministic=True, bg_masks_from_fg=True)
    mask = 1 - output["alpha_masks"].sum(1)
    torch.testing.assert_close(output["mu_bg"], model.bg_module.encode(x, mask).mean)
    encoded = model.encode_all(x, deterministic=True, bg_masks_from_fg=True)
    torch.testing.assert_close(encoded["bg_mask"], mask)
    torch.testing.assert_close(encoded["mu_bg"], output["mu_bg"])
    assert not torch.allclose(output["mu_bg"], model(x, deterministic=True)["mu_bg"])


# -------------------------------------------------------------------------------------------------------- tracking


def test_a_clip_of_one_frame_is_an_image():
    tracking, x = build(**TRACKING), images(2)
    image = tracking(x, deterministic=True)
    assert_outputs_equal(tracking(x[:, None], deterministic=True), image)
    assert_outputs_equal(build(**{**TRACKING, "use_tracking": False})(x, deterministic=True), image)


def test_a_model_that_does_not_track_takes_a_clip_for_a_batch():
    model, clip = build(), images(2, 3)
    output = model(clip, deterministic=True)
    assert_outputs_equal(output, model(clip.flatten(0, 1), deterministic=True))
    assert_outputs_equal(model.calc_elbo(clip, output), model.calc_elbo(clip.flatten(0, 1), output))


def test_tracked_particles_start_where_the_frame_before_left_them():
    model, clip = build(dtype=torch.float64, **TRACKING), images(2, 3, dtype=torch.float64)
    torch.manual_seed(0)
    output = {name: value.unflatten(0, (2, 3)) for name, value in model(clip).items()}  # draws, not means
    proposals = torch.stack([model.fg_module.propose(clip[:, t]) for t in range(3)], dim=1)
    torch.testing.assert_close(output["kp_p"], proposals)  # every frame has its own
    for t in (1, 2):
        before = {name: value[:, t - 1] for name, value in output.items()}
        torch.testing.assert_close(output["z_base"][:, t], before["z"])
        glimpses = generate_correlation_maps(
            clip[:, t], before["z"], 8, before["cropped_objects_original"].flatten(0, 1), before["z_scale"]
        )
        attributes = model.fg_module.particle_attribute_enc(glimpses.unflatten(0, (2, K)), before["z"])
        torch.testing.assert_close(output["mu_offset"][:, t], attributes[0].mean)
        torch.testing.assert_close(output["mu_scale"][:, t], attributes[1].mean)


@pytest.mark.parametrize("stage", [{}, {"warmup": True, "noisy": True}])
def test_no_gradient_flows_from_a_frame_to_the_one_before(stage):
    model, clip = build(**TRACKING), images(2, 3).requires_grad_()
    output = model(clip, **stage)
    last = [value.unflatten(0, (2, 3))[:, 2].sum() for value in output.values() if value.requires_grad]
    (gradient,) = torch.autograd.grad(sum(last), clip)
    assert gradient[:, 2].abs().max() > 0
    assert gradient[:, :2].abs().max() == 0


def test_correlation_maps_steer_the_tracking(monkeypatch):
    model, clip = build(**TRACKING), images(2, 3)
    correlated = model(clip, deterministic=True)["mu_offset"].unflatten(0, (2, 3))
    monkeypatch.setattr(
        "modules.spatial.correlation_maps", lambda glimpses, previous: torch.zeros_like(glimpses[:, :1])
    )
    blind = model(clip, deterministic=True)["mu_offset"].unflatten(0, (2, 3))
    assert torch.equal(correlated[:, 0], blind[:, 0])
    assert ((correlated - blind)[:, 1:].abs().amax((0, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("stage", [{}, {"noisy": True}])
def test_duplicates_in_the_first_frame_are_hidden_in_all(stage):
    clip, changes = images(3, 4), {"n_kp_enc": 8, **TRACKING}
    torch.manual_seed(0)
    plain = build(**changes)(clip, deterministic=True, **stage)
    torch.manual_seed(0)
    model = build(duplicate_iou=0.3, **changes)
    output = model(clip, deterministic=True, **stage)
    first = {name: plain[name].unflatten(0, (3, 4))[:, 0] for name in ("z", "z_scale", "obj_on")}
    hidden = torch.ones(3, 8, dtype=torch.bool)
    for position, scale, visibility, row in zip(*first.values(), hidden, strict=True):
        half = torch.sigmoid(scale)
        row[nms(torch.cat([position - half, position + half], dim=-1), visibility, 0.3)] = False
    assert 0 < hidden.float().mean() < 1
    hidden = hidden.repeat_interleave(4, dim=0)
    for name, value in {"obj_on_a": 0.1, "obj_on_b": 100.0, "obj_on": 0.1 / 100.1}.items():
        torch.testing.assert_close(output[name], plain[name].masked_fill(hidden, value))
    assert_outputs_equal(output, plain, ["z", "z_scale", "z_depth", "z_features", "mu_features"])
    if not stage:
        names = ("z", "z_features", "z_bg", "obj_on", "z_depth", "z_scale")
        drawn = model.decode_all(**{name: output[name] for name in names})["rec"]
        torch.testing.assert_close(output["rec"], drawn)
        assert (output["rec"] - plain["rec"]).abs().mean() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_tracks(dtype):
    half = build(**TRACKING).to(dtype)(images(1, 2, dtype=dtype), deterministic=True)
    full = build(**TRACKING)(images(1, 2), deterministic=True)
    assert (half["rec"].float() - full["rec"]).abs().mean() < 0.05


@pytest.mark.parametrize("stage", [{}, {"noisy": True}, {"warmup": True, "noisy": True}])
@pytest.mark.parametrize("heuristic", HEURISTICS)
def test_every_filtering_tracks_through_every_stage(heuristic, stage):
    model, clip = build(filtering_heuristic=heuristic, **TRACKING), images(2, 3)
    proposals = model.fg_module.prior(clip.flatten(0, 1))[0]
    torch.manual_seed(0)
    output = model(clip, **stage)
    kept, found = output["kp_p"], proposals
    if heuristic == "none":
        torch.testing.assert_close(kept, proposals)
    else:
        distances = torch.cdist(kept, found)
        assert distances.amin(-1).max() < 1e-6
        indices = distances.argmin(-1)
        shared = bool((indices == indices[0]).all())  # random filtering, which all have in these stages
        assert shared == (heuristic == "random" or bool(stage))
    loss = model.calc_elbo(clip, output, kl_balance=1.0, **stage)["loss"]
    part = model.fg_module.particle_mixer if heuristic == "none" else model.fg_module.prior
    assert loss.isfinite()
    assert gradient_norm(loss, part.parameters()) > 0


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("reshape", [True, False])
def test_fg_sequential_opt_is_the_forward_passs_foreground(reshape, decode):
    model, clip = build(**TRACKING), images(2, 3)
    forward = model(clip, deterministic=True)
    output = model.fg_sequential_opt(clip, deterministic=True, reshape=reshape, decode=decode)
    drawn = {"dec_objects", "dec_objects_original", "alpha_masks"}
    background = {"rec", "bg", "mu_bg", "logvar_bg", "z_bg"}
    assert set(output) == set(forward) - background - (set() if decode else drawn) | ({"bg_mask"} if decode else set())
    if not reshape:
        assert all(value.shape[:2] == (2, 3) for value in output.values())
        output = {name: value.flatten(0, 1) for name, value in output.items()}
    assert_outputs_equal(output, forward, keys=set(output) - {"bg_mask"})
    if decode:
        torch.testing.assert_close(output["bg_mask"], 1 - output["alpha_masks"].sum(1))


# -------------------------------------------------------------------------------------------------------- decoding


def test_decoding_without_depth_or_scale_takes_the_anchors():
    model, particles = build(), scene(2, 3, z=torch.rand(2, 3, 2) - 0.5)
    expected = model.decode_all(**particles)
    for missing in ("z_depth", "z_scale"):
        assert_outputs_equal(model.decode_all(**{k: v for k, v in particles.items() if k != missing}), expected)
    far = model.decode_all(**{**particles, "z_depth": torch.full((2, 3, 1), 3.0)})
    torch.testing.assert_close(far["rec"], expected["rec"], rtol=1e-3, atol=1e-3)  # equal depths, whatever they are


@pytest.mark.parametrize(
    ("name", "shape", "legal"),
    [
        ("z", (3, 2), "[B, K, 2]"),
        ("z", (2, 3, 3), "[B, K, 2]"),
        ("z_features", (2, 3, 1), "[2, 3, {features}]"),
        ("z_bg", (1, 4), "[2, {bg}]"),
        ("obj_on", (2, 3, 1), "[2, 3]"),
        ("z_depth", (2, 3), "[2, 3, 1]"),
        ("z_scale", (2, 4, 2), "[2, 3, 2]"),
    ],
)
def test_particles_of_shapes_that_do_not_fit_are_named(name, shape, legal):
    model, particles = build(), scene(2, 3)
    legal = legal.format(features=particles["z_features"].shape[-1], bg=particles["z_bg"].shape[-1])
    message = re.escape(f"{name} of shape {list(shape)}; legal: {legal}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        model.decode_all(**{**particles, name: torch.zeros(shape)})


def test_the_image_is_the_foreground_on_the_background():
    model, particles = build(), scene(2, 3, z=torch.rand(2, 3, 2) - 0.5)
    drawn = model.decode_all(**particles)
    bg_mask = 1 - drawn["alpha_masks"].sum(1)
    torch.testing.assert_close(drawn["rec"], bg_mask * drawn["bg"] + drawn["dec_objects_trans"])
    invisible = model.decode_all(**{**particles, "obj_on": torch.zeros(2, 3)})
    torch.testing.assert_close(invisible["rec"], drawn["bg"])
    assert drawn["dec_objects"].shape == (2, 3, 4, 8, 8)
    torch.testing.assert_close(
        drawn["dec_objects"].flatten(0, 1), model.fg_module.object_dec(particles["z_features"].flatten(0, 1))
    )


@pytest.mark.parametrize(("axis", "pixels"), [(0, 5), (0, -7), (1, 4)])
def test_moving_a_particle_moves_its_glimpse_by_as_many_pixels(axis, pixels):
    model, z = build(), torch.zeros(1, 1, 2)
    still = model.decode_all(**scene(z=z))
    z[..., axis] += 2 * pixels / 31
    moved = model.decode_all(**scene(z=z))
    for key in ("alpha_masks", "dec_objects_trans"):
        assert still[key].abs().max() > 0.1
        shifted = still[key].roll(pixels, dims=-2 if axis == 0 else -1)
        torch.testing.assert_close(moved[key], shifted, rtol=0, atol=1e-4)
    covered = (still["alpha_masks"] > 0).sum().item()
    assert 8 * 8 <= covered <= 10 * 10  # a quarter of the image's side


@pytest.mark.parametrize("nearer", [0, 1])
def test_of_two_particles_in_one_place_the_one_of_smaller_depth_is_seen(nearer):
    model = build()
    both = scene(1, 2)
    both["z_depth"] = torch.full((1, 2, 1), 20.0)
    both["z_depth"][0, nearer] = -20.0
    drawn = model.decode_all(**both)
    alone = {name: value if name == "z_bg" else value[:, nearer : nearer + 1] for name, value in both.items()}
    hidden = {name: value if name == "z_bg" else value[:, 1 - nearer :][:, :1] for name, value in both.items()}
    torch.testing.assert_close(drawn["rec"], model.decode_all(**alone)["rec"])
    assert not torch.allclose(drawn["rec"], model.decode_all(**hidden)["rec"], atol=0.01)


def test_noisy_decoding_adds_noise_to_the_alphas_and_clamps_them():
    model, particles = build(), scene(8)
    torch.manual_seed(0)
    noisy, clean = model.decode_all(**particles, noisy=True), model.decode_all(**particles)
    assert_outputs_equal(model.decode_all(**particles), clean)
    alpha = noisy["alpha_masks"]
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    outside = alpha[clean["alpha_masks"] == 0]  # max(0, 0.1 N(0, 1)), of mean 0.1 / sqrt(2 pi)
    assert (outside == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert outside.mean().item() == pytest.approx(0.1 / math.sqrt(2 * math.pi), abs=0.003)


# -------------------------------------------------------------------------------------------------------- the loss

PRIORS = {"sigma": 0.6, "scale_std": 0.7, "offset_std": 0.4, "obj_on_alpha": 0.3, "obj_on_beta": 0.6}


def normal(output, name):
    return Normal(output[f"mu_{name}"], (output[f"logvar_{name}"] / 2).exp())


def plain_kl_terms(output, kl_balance, early):
    """The KL terms by name, from torch's own divergences; `early`: in warm-up or the noisy stage."""

    def mean(kl):
        return kl.flatten(1).sum(1).mean()

    offset_std, scale_std = (0.1, 0.1) if early else (PRIORS["offset_std"], PRIORS["scale_std"])
    a, b = (0.2, 0.1) if early else (PRIORS["obj_on_alpha"], PRIORS["obj_on_beta"])
    side = 0.75 * ARGUMENTS["anchor_s"]
    scale_mean = math.log(side / (1 - side + 1e-5))
    chamfer = 0.0
    for anchors, proposals in zip(output["z_base"], output["kp_p"], strict=True):
        distances = [
            [kl_divergence(Normal(z, 1.0), Normal(p, PRIORS["sigma"])).sum() for p in proposals] for z in anchors
        ]
        chamfer += sum(min(row) for row in distances) + sum(min(column) for column in zip(*distances, strict=True))
    obj_on = kl_divergence(Beta(output["obj_on_a"], output["obj_on_b"]), Beta(*torch.tensor([a, b]).double()))
    offset = mean(kl_divergence(normal(output, "offset"), Normal(0.0, offset_std)))
    features, bg = (mean(kl_divergence(normal(output, name), Normal(0.0, 1.0))) for name in ("features", "bg"))
    return {
        "loss_kl_kp": offset + 0.5 * kl_balance * chamfer / len(output["z_base"]),
        "loss_kl_scale": mean(kl_divergence(normal(output, "scale"), Normal(scale_mean, scale_std))),
        "loss_kl_obj_on": mean(obj_on),
        "loss_kl_feat": features + bg,
        "loss_kl_depth": mean(kl_divergence(normal(output, "depth"), Normal(0.0, 1.0))),
    }


@pytest.mark.parametrize("stage", [{}, {"warmup": True}, {"noisy": True}, {"warmup": True, "noisy": True}])
@pytest.mark.parametrize(("beta_kl", "beta_rec", "kl_balance"), [(0.05, 1.0, 0.001), (0.3, 0.7, 0.9)])
def test_the_loss_is_reconstruction_plus_weighted_divergences(beta_kl, beta_rec, kl_balance, stage):
    model, x = build(dtype=torch.float64, **PRIORS), images(2, dtype=torch.float64)
    with torch.no_grad():
        output = model(x, **stage)
    losses = model.calc_elbo(x, output, beta_kl=beta_kl, beta_rec=beta_rec, kl_balance=kl_balance, **stage)
    expected = plain_kl_terms(output, kl_balance, early=bool(stage))
    expected["kl"] = sum(expected[f"loss_kl_{name}"] for name in ("kp", "scale", "obj_on"))
    expected["kl"] += kl_balance * (expected["loss_kl_feat"] + expected["loss_kl_depth"])
    if "warmup" in stage:
        error = output["dec_objects_original"][:, :, 1:] - output["cropped_objects_original"]
        expected["loss_rec"] = error.square().sum() / (2 * K)
        expected["psnr"] = torch.zeros((), dtype=torch.float64)
    else:
        error = (x - output["rec"]).square()
        expected["loss_rec"] = error.sum() / 2
        expected["psnr"] = -10 * torch.log10(error.mean())
    expected["obj_on_l1"] = output["obj_on"].sum() / 2
    expected["loss"] = beta_rec * expected["loss_rec"] + beta_kl * expected["kl"]
    assert set(losses) == set(expected)
    for name, value in expected.items():
        # 1e-3: the Beta's divergence is taken with 1e-5 added to its arguments, where its parameters may be small
        torch.testing.assert_close(
            losses[name], value, rtol=1e-3, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


class RecordingDistance:
    """Stands in for `VGGDistance`: an error per image that is no squared error, and a memory of what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, I1, I2, reduction="sum", only_image=False):
        assert reduction == "none"
        assert not only_image
        self.calls.append((I1, I2))
        return (I1 - I2).abs().flatten(1).sum(1)


def test_the_vgg_loss_is_the_distances_mean_and_a_thousandth_in_all():
    model, x, distance = build(), images(2), RecordingDistance()
    with torch.no_grad():
        output = model(x)
    losses = model.calc_elbo(x, output, beta_kl=0.3, beta_rec=0.7, recon_loss_type="vgg", recon_loss_func=distance)
    plain = model.calc_elbo(x, output, beta_kl=0.3, beta_rec=0.7)
    ((first, second),) = distance.calls
    assert torch.equal(first, x)
    assert torch.equal(second, output["rec"])
    rec = (x - output["rec"]).abs().sum() / 2
    expected = {**plain, "loss_rec": rec, "loss": 1e-3 * (0.7 * rec + 0.3 * plain["kl"])}
    assert_outputs_equal(losses, expected)


@pytest.mark.parametrize("anchor_s", [0.25, 0.5])  # glimpses of 16 and of 32 pixels
def test_the_vgg_loss_of_warmup_enlarges_glimpses_below_32_pixels(anchor_s):
    model, x, distance = build(image_size=64, anchor_s=anchor_s), images(1, size=64), RecordingDistance()
    with torch.no_grad():
        output = model(x, warmup=True)
    losses = model.calc_elbo(x, output, warmup=True, recon_loss_type="vgg", recon_loss_func=distance)
    ((first, second),) = distance.calls
    for actual, glimpses in ((first, "cropped_objects_original"), (second, "dec_objects_original")):
        expected = output[glimpses][0, :, -3:]  # less alpha
        if expected.shape[-1] < 32:
            expected = F.interpolate(expected, size=32, mode="bilinear", align_corners=False)
        assert actual.shape == (K, 3, 32, 32)
        torch.testing.assert_close(actual, expected)
    rec = (first - second).abs().flatten(1).sum(1).mean()
    torch.testing.assert_close(losses["loss_rec"], rec)
    torch.testing.assert_close(losses["loss"], 1e-3 * (rec + 0.05 * losses["kl"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recon_loss_type": "vgg"}, r'^recon_loss_func is None; legal with recon_loss_type "vgg": a VGGDistance$'),
        ({"recon_loss_type": "psnr"}, 'loss_type is "psnr"; legal: "mse"'),
    ],
)
def test_an_impossible_reconstruction_loss_is_refused(arguments, message):
    model, x = build(), images(1)
    with pytest.raises(ValueError, match=message):
        model.calc_elbo(x, model(x), **arguments)
