"""The particles' dataclasses: trees of tensors, and draws that stay finite whatever an encoder says."""

import math

import pytest
import scipy.stats
import torch

from models import Encoding
from modules.particles import BetaParams, Gaussian, Particles, Posterior, reparameterize
from utils.loss_functions import calc_kl_beta_dist

LARGEST = torch.finfo(torch.float32).max
EXTREME_LOGITS = (-LARGEST, -1e30, -1e4, -100.0, -20.0, -1.0, 0.0, 1.0, 10.0, 14.0, 20.0, 88.8, 100.0, 1e4, LARGEST)
# Parameters of 0.01 and just under a million: with one draw of 300 the sampler's gradient would overflow in float32.
HARDEST_LOGITS = ((-4.6, 13.8), (13.8, -4.6))


def encoding(*leading, with_background=True):
    """An `Encoding` whose every tensor differs, with `leading` dimensions, 5 particles and 7 proposals."""
    generator = torch.Generator().manual_seed(sum(leading))

    def draw(*shape):
        return torch.rand(*leading, *shape, generator=generator)

    def gaussian(*shape):
        return Gaussian(draw(*shape), draw(*shape))

    beta = BetaParams(draw(5), draw(5))
    bg, z_bg = (gaussian(6), draw(6)) if with_background else (None, None)
    posterior = Posterior(draw(5, 2), gaussian(5, 2), gaussian(5, 2), gaussian(5, 1), beta, gaussian(5, 4), bg)
    particles = Particles(draw(5, 2), draw(5, 2), draw(5, 1), draw(5), draw(5, 4), z_bg)
    return Encoding(draw(7, 2), posterior, particles, draw(5, 3, 8, 8))


def leaves(tree, path=""):
    """Every tensor (or None) of a tree, by its path, without the tree's own methods."""
    found = {}
    for name, value in vars(tree).items():
        is_tree = not (value is None or isinstance(value, torch.Tensor))
        found |= leaves(value, f"{path}{name}.") if is_tree else {f"{path}{name}": value}
    return found


def assert_trees_equal(actual, expected):
    actual, expected = leaves(actual), leaves(expected)
    assert list(actual) == list(expected)
    for path, tensor in expected.items():
        assert (actual[path] is None) == (tensor is None), path
        assert tensor is None or torch.equal(actual[path], tensor), path


# ----------------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("with_background", [True, False])
def test_map_reaches_every_tensor_and_changes_nothing_in_place(with_background):
    tree = encoding(2, with_background=with_background)
    before = leaves(tree)
    assert sum(tensor is not None for tensor in before.values()) == (21 if with_background else 18)
    doubled = tree.map(lambda tensor: 2 * tensor)
    for path, tensor in leaves(doubled).items():
        assert (tensor is None) == (before[path] is None), path
        assert tensor is None or torch.equal(tensor, 2 * before[path]), path
    assert all(tensor is before[path] for path, tensor in leaves(tree).items())


def test_detach_stops_every_gradient():
    tree = encoding(2).map(lambda tensor: tensor.requires_grad_())
    assert not any(tensor.requires_grad for tensor in leaves(tree.detach()).values())
    assert_trees_equal(tree.detach(), tree)


@pytest.mark.parametrize("with_background", [True, False])
def test_merged_time_splits_again_and_keeps_the_order_of_clips(with_background):
    tree = encoding(2, 3, with_background=with_background)
    merged = tree.merge_time()
    assert torch.equal(merged.particles.z[4], tree.particles.z[1, 1])  # clip 1, frame 1 of 3
    assert torch.equal(merged.posterior.scale.logvar[2], tree.posterior.scale.logvar[0, 2])
    assert_trees_equal(merged.split_time(3), tree)


@pytest.mark.parametrize("with_background", [True, False])
def test_stacked_frames_are_a_clip(with_background):
    clip = encoding(2, 3, with_background=with_background)
    frames = [clip.map(lambda tensor, t=t: tensor[:, t]) for t in range(3)]
    assert_trees_equal(Encoding.stack(frames), clip)
    assert_trees_equal(Encoding.stack(frames, dim=0), clip.map(lambda tensor: tensor.transpose(0, 1)))


# ------------------------------------------------------------------------------------------------------- Gaussians


def test_from_params_takes_means_then_logvars_and_position_adds_the_anchor():
    gaussian = Gaussian.from_params(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert gaussian.mean.tolist() == [[1.0, 2.0]]
    assert gaussian.logvar.tolist() == [[3.0, 4.0]]
    posterior = encoding(2).posterior
    assert torch.equal(posterior.position.mean, posterior.z_base + posterior.offset.mean)
    assert torch.equal(posterior.position.logvar, posterior.offset.logvar)


@pytest.mark.parametrize("draw", [reparameterize, lambda mean, logvar: Gaussian(mean, logvar).sample()])
def test_gaussian_draws_have_the_mean_the_spread_and_their_gradients(draw):
    torch.manual_seed(0)
    n, mean, std = 200_000, torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([0.1, 1.0, 2.0])
    means, logvars = mean.expand(n, 3).clone().requires_grad_(), (2 * std.log()).expand(n, 3).clone().requires_grad_()
    sample = draw(means, logvars)
    error = std / math.sqrt(n)  # one standard error of the mean
    assert ((sample.mean(0) - mean).abs() < 5 * error).all()
    assert ((sample.std(0) - std).abs() < 5 * error).all()
    sample.sum().backward()
    assert torch.equal(means.grad, torch.ones_like(means))
    noise = (sample.detach() - mean) / std
    torch.testing.assert_close(logvars.grad, 0.5 * std * noise, rtol=1e-4, atol=1e-5)  # d(std)/d(logvar) = std / 2


def test_deterministic_gaussian_is_its_mean():
    gaussian = Gaussian(torch.rand(3, 2), torch.rand(3, 2))
    assert torch.equal(gaussian.sample(deterministic=True), gaussian.mean)


# -------------------------------------------------------------------------------------------------- transparencies


def test_beta_parameters_are_the_published_ones_below_a_million():
    logits = torch.stack([torch.linspace(-120, 13.8, 500), torch.linspace(13.8, -120, 500)], dim=-1)
    assert logits.exp().max() < 1e6
    beta = BetaParams.from_logits(logits)
    expected = logits.exp().clamp(min=1e-5)
    assert torch.equal(beta.a, expected[:, 0])
    assert torch.equal(beta.b, expected[:, 1])


@pytest.mark.parametrize("term", ["sample", "mean", "kl"])
def test_every_pair_of_float32_logits_gives_finite_values_and_gradients(term):
    torch.manual_seed(0)
    grid = torch.tensor(EXTREME_LOGITS)
    pairs, hardest = torch.cartesian_prod(grid, grid), torch.tensor(HARDEST_LOGITS)
    logits = torch.cat([pairs.repeat(100, 1), hardest.repeat(5000, 1)]).requires_grad_()
    beta = BetaParams.from_logits(logits)
    if term == "kl":
        value = calc_kl_beta_dist(beta.a, beta.b, torch.tensor(0.1), torch.tensor(0.1))
    else:
        value = beta.sample(deterministic=term == "mean")
        assert value.min() >= 0
        assert value.max() <= 1
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    value.sum().backward()
    assert logits.grad.isfinite().all()
    moderate = (logits.detach().abs() <= 1).all(-1)  # where the gradient must not have been clamped away
    assert (logits.grad[moderate].abs().sum(-1) > 0).float().mean() > 0.95


def test_the_mean_of_a_beta_is_a_of_a_plus_b():
    beta = BetaParams.from_logits(torch.tensor([[math.log(3.0), math.log(1.0)], [-LARGEST, LARGEST]]))
    assert beta.sample(deterministic=True).tolist() == pytest.approx([0.75, 1e-11], rel=1e-5)


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.1), (0.5, 3.0), (2.0, 5.0), (400.0, 100.0)])
def test_beta_draws_have_the_distribution_and_its_means_gradient(a, b):
    torch.manual_seed(0)
    n = 20_000
    logits = torch.tensor([math.log(a), math.log(b)]).expand(n, 2).clone().requires_grad_()
    draws = BetaParams.from_logits(logits).sample()
    for x in (0.02, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.98):
        expected = scipy.stats.beta(a, b).cdf(x)
        spread = math.sqrt(max(expected * (1 - expected), 1 / n) / n)
        assert abs((draws < x).float().mean().item() - expected) < 5 * spread, x
    draws.sum().backward()
    # The expected gradient of a draw is that of the mean a / (a + b), by log a and by log b.
    expected = a * b / (a + b) ** 2 * torch.tensor([1.0, -1.0])
    standard_error = logits.grad.std(0) / math.sqrt(n)
    assert ((logits.grad.mean(0) - expected).abs() < 5 * standard_error).all()
