"""Loss terms against the published release's numbers (parts.npz), torch.distributions, and slow plain versions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Beta, Normal, kl_divergence

from tests.pretrained_weights import plain_vgg16
from utils.errors import UserError
from utils.loss_functions import (
    ChamferLossKL,
    VGGDistance,
    calc_kl,
    calc_kl_beta_dist,
    calc_reconstruction_loss,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "parts.npz")
TOLERANCES = [(torch.float64, 1e-6), (torch.float32, 3e-3)]


def golden(name, dtype=torch.float64):
    return torch.from_numpy(GOLDEN[name]).to(dtype)


def assert_golden(actual, name, tolerance):
    """Within `tolerance` of the array's largest magnitude."""
    expected = golden(name)
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed, *shape):
    return normal(seed, *shape).exp()


# KL of Gaussians


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("balance", [0.5, 0.8])
def test_gaussian_kl_is_the_releases(dtype, tolerance, balance):
    names = ("kl/logvar", "kl/mu", "kl/mu_prior", "kl/logvar_prior")
    value = calc_kl(*(golden(name, dtype) for name in names), reduce="none", balance=balance)
    assert value.dtype == dtype
    assert_golden(value, "kl/value", tolerance)


def test_gaussian_kl_broadcasts_and_reduces():
    mu, logvar, prior_mu = normal(0, 4, 5, 3), normal(1, 4, 5, 3), normal(2, 5, 3)
    prior = Normal(prior_mu, torch.tensor(0.3).exp().sqrt())
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), prior).sum(-1)
    for reduce, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        torch.testing.assert_close(calc_kl(logvar, mu, prior_mu, 0.3, reduce), value, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(calc_kl(logvar, mu), calc_kl(logvar, mu, 0.0, torch.zeros(3), "sum"))


def test_gaussian_kl_keeps_its_digits_near_equality_in_float32():
    logvar = torch.full((1, 1), 1e-3)
    expected = 0.5 * (np.expm1(np.float64(logvar.item())) - np.float64(logvar.item()))
    assert calc_kl(logvar, torch.zeros(1, 1)).item() == pytest.approx(expected, rel=1e-3)


# KL of Beta distributions


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("balance", [0.5, 0.8])
def test_beta_kl_is_the_releases(dtype, tolerance, balance):
    names = ("beta_kl/a_post", "beta_kl/b_post", "beta_kl/a_prior", "beta_kl/b_prior")
    value = calc_kl_beta_dist(*(golden(name, dtype) for name in names), balance=balance)
    assert value.dtype == dtype
    assert_golden(value, "beta_kl/value", tolerance)


def test_beta_kl_without_eps_is_the_kl_divergence():
    a, b, a0, b0 = (positive(seed, 6, 5) for seed in range(4))
    expected = kl_divergence(Beta(a, b), Beta(a0, b0))
    for reduce, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        torch.testing.assert_close(calc_kl_beta_dist(a, b, a0, b0, reduce, eps=0.0), value)
    expected = kl_divergence(Beta(a, b), Beta(torch.tensor(0.2), torch.tensor(0.1)))
    torch.testing.assert_close(calc_kl_beta_dist(a, b, 0.2, 0.1, eps=0.0), expected, rtol=1e-6, atol=1e-6)


def test_beta_kl_is_right_in_float32_from_tiny_to_huge_parameters():
    grid = torch.logspace(-5, 6, 12)
    parameters = torch.stack(torch.meshgrid(grid, grid, grid, grid, indexing="ij")).reshape(4, -1)
    results = {}
    for dtype in (torch.float32, torch.float64):
        inputs = parameters.to(dtype).requires_grad_()
        value = calc_kl_beta_dist(*inputs)
        (gradient,) = torch.autograd.grad(value.sum(), inputs)
        results[dtype] = value.detach(), gradient
    for single, double in zip(*results.values(), strict=True):
        assert torch.isfinite(single).all()
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-6)


# KL balancing


@pytest.mark.parametrize("balance", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("kl", [lambda *parameters, **options: calc_kl(*parameters, **options), calc_kl_beta_dist])
def test_balance_scales_the_gradients_of_posterior_and_prior(kl, balance):
    parameters = [positive(seed, 6, 5).requires_grad_() for seed in range(4)]
    plain = torch.autograd.grad(kl(*parameters, reduce="sum"), parameters)
    balanced = torch.autograd.grad(kl(*parameters, reduce="sum", balance=balance), parameters)
    for index, (actual, full) in enumerate(zip(balanced, plain, strict=True)):
        torch.testing.assert_close(actual, full * (balance if index < 2 else 1 - balance))


# Reconstruction


@pytest.mark.parametrize(
    ("loss_type", "error"),
    [
        ("mse", lambda x, y: (x - y) ** 2),
        ("l1", lambda x, y: np.abs(x - y)),
        ("bce", lambda x, y: -(x * np.log(y) + (1 - x) * np.log(1 - y))),
    ],
)
def test_reconstruction_loss_is_a_sum_per_image(loss_type, error):
    x, recon_x = torch.sigmoid(normal(0, 4, 3, 6, 5)), torch.sigmoid(normal(1, 4, 3, 6, 5))
    per_image = error(x.numpy(), recon_x.numpy()).sum(axis=(1, 2, 3))
    for reduction, value in (("none", per_image), ("sum", per_image.sum()), ("mean", per_image.mean())):
        actual = calc_reconstruction_loss(x, recon_x, loss_type, reduction)
        torch.testing.assert_close(actual, torch.tensor(value))


def test_images_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\] and \[3, 4, 4\]"):
        calc_reconstruction_loss(torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4))


# Chamfer-KL


def plain_chamfer(mu_preds, logvar_preds, mu_gts, logvar_gts, mask, reverse):
    """The class's docstring, pair by pair."""
    totals = []
    for mu_p, lv_p, mu_t, lv_t, kept in zip(mu_preds, logvar_preds, mu_gts, logvar_gts, mask, strict=True):
        table = np.empty((len(mu_p), len(mu_t)))
        for i in range(len(mu_p)):
            for j in range(len(mu_t)):
                prediction, target = Normal(mu_p[i], (lv_p[i] / 2).exp()), Normal(mu_t[j], (lv_t[j] / 2).exp())
                pair = (target, prediction) if reverse else (prediction, target)
                table[i, j] = kl_divergence(*pair).sum()
        left = [i for i in range(len(mu_p)) if kept[i] != 0]
        per_target = sum(min(table[i, j] for i in left) for j in range(len(mu_t))) if left else 0.0
        totals.append(per_target + sum(kept[i].item() * table[i].min() for i in left))
    return torch.tensor(totals, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_chamfer_kl_is_the_releases(dtype, tolerance):
    mu, mu_prior, logvar_prior = (golden(f"chamfer_kl/{n}", dtype) for n in ("mu_pred", "mu_prior", "logvar_prior"))
    assert_golden(ChamferLossKL()(mu, torch.zeros_like(mu), mu_prior, logvar_prior), "chamfer_kl/value", tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_chamfer_kl_against_a_double_loop(reverse, masked):
    inputs = normal(0, 3, 5, 2), normal(1, 3, 5, 2), normal(2, 3, 7, 2), normal(3, 3, 7, 2)
    mask = torch.ones(3, 5)
    if masked:
        mask[0, 1:] = 0
        mask[1] = 0
        mask[2, 3] = 0.5
    actual = ChamferLossKL(use_reverse_kl=reverse)(*inputs, posterior_mask=mask if masked else None)
    torch.testing.assert_close(actual, plain_chamfer(*inputs, mask, reverse))


def test_a_prediction_left_out_gets_no_gradient():
    mu = normal(0, 2, 5, 2).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    distance = ChamferLossKL()(mu, torch.zeros(2, 5, 2), normal(1, 2, 7, 2), torch.zeros(2, 7, 2), mask)
    (gradient,) = torch.autograd.grad(distance.sum(), mu)
    assert torch.equal((gradient != 0).any(dim=-1), mask.bool())


# VGG distance


@pytest.fixture
def make_vgg(torch_home, monkeypatch):
    """`VGGDistance` with weights on disk."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    return VGGDistance


@pytest.fixture(scope="module")
def images():
    """Two batches of images `[2, 3, 32, 32]`."""
    return torch.sigmoid(normal(0, 2, 3, 32, 32)), torch.sigmoid(normal(1, 2, 3, 32, 32))


def plain_vgg_distance(first, second, layers, reduce, coefficient, normalize=True):
    """Per image, `reduce` being what turns squared differences [C, H, W] into a number."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    outputs = []
    for batch in (first, second):
        seen = (batch - mean[:, None, None]) / std[:, None, None] if normalize else batch
        outputs.append(plain_vgg16(seen))
    distances = []
    for index in range(len(first)):
        features = sum(reduce((a[index] - b[index]) ** 2) for a, b in ((x[i] for x in outputs) for i in layers))
        distances.append(reduce((first[index] - second[index]) ** 2) + coefficient * features)
    return torch.stack(distances)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_vgg_distance_is_the_releases(make_vgg, dtype, tolerance):
    distance = make_vgg().to(dtype)(golden("vgg/a", dtype), golden("vgg/b", dtype), reduction="none")
    assert distance.dtype == dtype
    assert_golden(distance, "vgg/distance_per_image", tolerance)


@pytest.mark.parametrize(
    ("arguments", "layers", "reduce", "coefficient", "normalize"),
    [
        ({"accumulate_mode": "mean"}, (3, 8, 13, 22, 30), torch.mean, 0.12151, True),
        ({"accumulate_mode": "ch_mean"}, (3, 8, 13, 22, 30), lambda x: x.mean(0).sum(), 0.12151, True),
        ({"layer_ids": (12, 1, 4, 0), "normalize": False}, (1, 4, 13), torch.sum, 0.12151, False),
        ({"layer_ids": (2, 7), "use_loss_scale": True, "vgg_coeff": 3.0}, (3, 8), torch.sum, 1.5, True),
    ],
)
def test_vgg_distance_options(make_vgg, images, arguments, layers, reduce, coefficient, normalize):
    actual = make_vgg(**arguments).double()(*images, reduction="none")
    expected = plain_vgg_distance(*images, layers, reduce, coefficient, normalize)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_vgg_distance_reductions_and_image_term(make_vgg, images):
    vgg = make_vgg(layer_ids=(2,)).double()
    per_image = vgg(*images, reduction="none")
    torch.testing.assert_close(vgg(*images), per_image.sum())
    torch.testing.assert_close(vgg(*images, reduction="mean"), per_image.mean())
    expected = (images[0] - images[1]).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(vgg(*images, reduction="none", only_image=True), expected)


@pytest.mark.parametrize("trained", [0, 1])
def test_vgg_gradient_reaches_the_images_only(make_vgg, images, trained):
    vgg = make_vgg(layer_ids=(2, 7)).double()
    inputs = [image.clone().requires_grad_(index == trained) for index, image in enumerate(images)]
    vgg(*inputs).backward()
    leaf = images[trained].clone().requires_grad_()
    pair = (leaf, images[1]) if trained == 0 else (images[0], leaf)
    (expected,) = torch.autograd.grad(plain_vgg_distance(*pair, (3, 8), torch.sum, 0.12151).sum(), leaf)
    torch.testing.assert_close(inputs[trained].grad, expected, rtol=1e-5, atol=1e-5)
    assert [tensor for tensor in vgg.parameters() if tensor.requires_grad or tensor.grad is not None] == []


# What is refused


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: calc_kl(x, x, reduce="max"), 'calc_kl: reduce is "max"; legal: "sum" or'),
        (lambda x: calc_kl_beta_dist(x, x, x, x, reduce=None), "calc_kl_beta_dist: reduce is null"),
        (lambda x: calc_reconstruction_loss(x, x, "ssim"), 'loss_type is "ssim"; legal: "mse" or "l1" or "bce"'),
        (lambda x: calc_reconstruction_loss(x, x, reduction="avg"), 'reduction is "avg"'),
        (lambda x: VGGDistance(accumulate_mode="max"), 'accumulate_mode is "max"; legal: "sum" or "mean" or'),
    ],
)
def test_unknown_names_are_refused(call, named):
    with pytest.raises(UserError) as caught:
        call(torch.ones(2, 3))
    assert named in str(caught.value)


@pytest.mark.parametrize("layer_ids", [(2, 31), (-1,), ()])
def test_layers_that_vgg16_lacks_are_refused(make_vgg, layer_ids):
    with pytest.raises(ValueError, match=r"layer_ids is .*; legal: .* 0 to 30"):
        make_vgg(layer_ids=layer_ids)


def test_images_too_small_for_the_pooling_are_refused(make_vgg):
    vgg = make_vgg(layer_ids=(2, 12))
    vgg(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"images of 3 x 5 pixels .* at least 4 x 4"):
        vgg(torch.zeros(1, 3, 3, 5), torch.ones(1, 3, 3, 5))
    with pytest.raises(ValueError, match="shapes"):
        vgg(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))
