"""Training as published, step by step: losses through all stages against Adam written out by hand.

The published warm-up loss contains zero times the image, so Adam counts warm-up's steps for the background's decoder
too, which warm-up does not reach.
"""

import pytest
import torch

from models import ObjectDLP, ObjectDynamicsDLP

SMALL = {
    "image_size": 16,
    "patch_size": 8,
    "anchor_s": 0.5,
    "n_kp_enc": 3,
    "n_kp_prior": 4,
    "enc_channels": (4, 4),
    "prior_channels": (4, 4),
    "learned_feature_dim": 2,
}
PINT = {"timestep_horizon": 3, "pint_layers": 1, "pint_heads": 2, "pint_dim": 8}
LR, BETAS, EPS = 4e-3, (0.9, 0.999), 1e-4
WARMUP, NOISY, PLAIN = {"warmup": True, "noisy": True}, {"noisy": True}, {}
STAGES = 3 * [WARMUP] + 3 * [NOISY] + 3 * [PLAIN]


@pytest.fixture(autouse=True)
def no_normal_noise(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


def small_model(kind):
    torch.manual_seed(0)
    model = ObjectDLP(**SMALL) if kind == "dlp" else ObjectDynamicsDLP(**SMALL, **PINT)
    return model.double().eval()  # PINT's dropout is noise, too


def clips():
    """Bright squares that move over noise, in which no two patches are alike: [2, 4, 3, 16, 16]."""
    x = 0.4 * torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for b in range(2):
        for t in range(4):
            x[b, t, b, 2 + 2 * t : 7 + 2 * t, 3 + 4 * b : 8 + 4 * b] = 0.9
    return x


def loss_of(model, stage, image_is_constant=False):
    """A step's loss. image_is_constant: so that no gradient reaches what only the image depends on."""
    x = clips()
    if isinstance(model, ObjectDLP):
        output, elbo = model(x, deterministic=True, **stage), model.calc_elbo
    elif stage is PLAIN:
        output, elbo = model(x, deterministic=True, num_static_frames=2), with_two_static_frames(model.calc_elbo)
    else:  # the dynamics join after the noisy stage
        output, elbo = model(x, deterministic=True, forward_dyn=False, **stage), model.calc_elbo_static
    if image_is_constant:
        output["rec"] = output["rec"].detach()
    return elbo(x, output, **stage)["loss"]


def with_two_static_frames(calc_elbo):
    discount = torch.tensor([1.0, 0.5], dtype=torch.float64)
    return lambda x, output: calc_elbo(x, output, num_static=2, beta_dyn=0.1, dynamic_discount=discount)


def train_as_the_loop_does(kind):
    """The losses of all steps, and the trained model."""
    model, losses = small_model(kind), []
    optimizer = torch.optim.Adam(model.parameters(), LR, BETAS, EPS)
    for stage in STAGES:
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss_of(model, stage))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach(), model


def train_by_hand(kind, counts_as_zero):
    """The same with Adam as its authors write it (arXiv 1412.6980, algorithm 1) and warm-up without the image.

    counts_as_zero: of a parameter without a gradient, by name: whether its gradient is zero or the step passes it by.
    """
    model, losses = small_model(kind), []
    steps, first, second = {}, {}, {}
    for stage in STAGES:
        losses.append(loss_of(model, stage, image_is_constant=stage is WARMUP))
        model.zero_grad(set_to_none=True)
        losses[-1].backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None and not counts_as_zero(name):
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            t = steps[name] = steps.get(name, 0) + 1
            first[name] = BETAS[0] * first.get(name, 0) + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second.get(name, 0) + (1 - BETAS[1]) * gradient**2
            mean, square = first[name] / (1 - BETAS[0] ** t), second[name] / (1 - BETAS[1] ** t)
            parameter.data -= LR * mean / (square.sqrt() + EPS)
    return torch.stack(losses).detach(), model


@pytest.mark.parametrize("kind", ["dlp", "ddlp"])
def test_training_goes_the_published_way_through_all_stages(kind):
    actual, trained = train_as_the_loop_does(kind)
    expected, trained_by_hand = train_by_hand(kind, lambda name: not name.startswith("dyn_module"))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    for (name, mine), theirs in zip(trained.named_parameters(), trained_by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    # Without the gradients of zero the losses part as soon as warm-up is over.
    other, _ = train_by_hand(kind, lambda name: False)
    parting = ((other - actual) / actual).abs()
    assert parting[:4].max() < 1e-10 and parting[4:].max() > 0.01


@pytest.mark.parametrize("kind", ["dlp", "ddlp"])
def test_warmup_gives_every_parameter_but_the_dynamics_a_gradient(kind):
    model = small_model(kind)
    loss_of(model, WARMUP).backward()
    without = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == ({"dyn_module"} if kind == "ddlp" else set())
    unreached = [*model.bg_module.dec.parameters(), *model.bg_module.latent_to_feat_map.parameters()]
    assert not any(parameter.grad.any() for parameter in unreached)
    assert all(parameter.grad.any() for parameter in model.bg_module.bg_enc.parameters())


def test_warmup_with_the_dynamics_gives_every_parameter_a_gradient():
    model, x = small_model("ddlp"), clips()
    model.calc_elbo(x, model(x, deterministic=True, **WARMUP), **WARMUP)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
