"""The spatial transformer against the published release's numbers, torch's own resampling, and loops over pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import nms

from modules.spatial import (
    compose,
    correlation_maps,
    create_masks_fast,
    cut_glimpses,
    duplicates,
    generate_correlation_maps,
    paste_glimpses,
    spatial_transform,
    square_mask,
)
from tests import golden

GOLDEN = golden.arrays("parts")
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}

dtypes = pytest.mark.parametrize("dtype", TOLERANCES)


def published(name, dtype=torch.float64):
    return torch.from_numpy(GOLDEN[name]).to(dtype)


def assert_published(actual, name):
    """Within the tolerance of `actual`'s dtype, a fraction of the array's largest magnitude."""
    expected = published(name)
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= TOLERANCES[actual.dtype] * expected.abs().max(), name


def generator(seed):
    return torch.Generator().manual_seed(seed)


def uniform(low, high, *shape, seed=0, dtype=torch.float64):
    """Random numbers that a test made with this seed always gets."""
    values = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
    return (low + (high - low) * values).to(dtype)


# ------------------------------------------------------------------------------------------- the release's numbers


@dtypes
def test_crop_is_the_published_one(dtype):
    image, scale = published("glimpse/image", dtype), published("glimpse/scale", dtype)
    position = published("glimpse/position", dtype).requires_grad_()
    crop = spatial_transform(image, position, scale, (6, 3, 8, 8))
    assert crop.dtype == dtype
    assert_published(crop, "glimpse/crop_8x8")
    crop.square().sum().backward()
    assert_published(position.grad, "glimpse/crop_grad_position")


@dtypes
def test_paste_is_the_published_one(dtype):
    patch = published("glimpse/patch", dtype)
    position, scale = (published(f"glimpse/{name}", dtype).requires_grad_() for name in ("position", "scale"))
    paste = spatial_transform(patch, position, scale, (6, 3, 24, 24), inverse=True)
    assert paste.dtype == dtype
    assert_published(paste, "glimpse/paste_24x24")
    paste.square().sum().backward()
    assert_published(position.grad, "glimpse/paste_grad_position")
    assert_published(scale.grad, "glimpse/paste_grad_scale")


@dtypes
@pytest.mark.parametrize("frame", ["first_frame", "next_frame"])
def test_correlation_maps_are_the_published_ones(frame, dtype):
    image, position = published("correlation/image", dtype), published("correlation/position", dtype)
    previous, scale = published("correlation/previous", dtype), published("correlation/scale_logit", dtype)
    memory = {} if frame == "first_frame" else {"previous_objects": previous, "z_scale": scale}
    maps = generate_correlation_maps(image, position, 8, **memory)
    assert maps.dtype == dtype
    assert_published(maps, f"correlation/{frame}")


@dtypes
def test_masks_are_the_published_ones(dtype):
    masks = create_masks_fast(published("mask/center", dtype), 0.25, feature_dim=32)
    assert masks.dtype == dtype
    assert_published(masks, "mask/anchor_0.25_of_32")


# ------------------------------------------------------------------------------------- torch's own resampling


def sample_by_grid(image, z, scale, height, width, inverse=False):
    """`spatial_transform` as the published matrices and torch's bilinear sampling give it, position (y, x)."""
    y, x, height_scale, width_scale = z[:, 0], z[:, 1], scale[:, 0], scale[:, 1]
    zero = torch.zeros_like(y)
    if inverse:
        height_scale, width_scale = 1 / (height_scale + 1e-9), 1 / (width_scale + 1e-9)
        y, x = -y * height_scale, -x * width_scale
    theta = torch.stack(
        [torch.stack([width_scale, zero, x], dim=-1), torch.stack([zero, height_scale, y], dim=-1)], dim=1
    )
    grid = F.affine_grid(theta, [len(z), image.shape[1], height, width], align_corners=True)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def assert_values_and_gradients_equal(function, oracle, inputs, dtype):
    """Of two functions of one list of tensors; the oracle computes in float64."""
    results = []
    for candidate, kind in ((function, dtype), (oracle, torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in inputs]
        output = candidate(*leaves)
        weight = uniform(-1, 1, *output.shape, seed=99, dtype=kind)
        results.append([output, *torch.autograd.grad((weight * output).sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - expected).abs().max() <= TOLERANCES[dtype] * max(1.0, expected.abs().max())


@dtypes
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scales", [(0.05, 0.3), (0.3, 1.5)])
def test_spatial_transform_is_torchs_affine_grid_and_grid_sample(inverse, scales, dtype):
    image = uniform(-1, 1, 40, 3, 14, 17)  # not square, so that rows and columns cannot be confused
    z = uniform(-1.6, 1.6, 40, 2, seed=1)  # also outside the image
    scale = uniform(*scales, 40, 2, seed=2)

    def transform(image, z, scale):
        return spatial_transform(image, z, scale, (40, 3, 9, 12), inverse=inverse)

    def oracle(image, z, scale):
        return sample_by_grid(image, z, scale, 9, 12, inverse)

    assert_values_and_gradients_equal(transform, oracle, [image, z, scale], dtype)


@dtypes
def test_cut_glimpses_is_torchs_affine_grid_and_grid_sample_per_particle(dtype):
    inputs = [uniform(0, 1, 3, 2, 16, 16), uniform(-1.3, 1.3, 3, 5, 2, seed=1), uniform(0.1, 0.9, 3, 5, 2, seed=2)]

    def oracle(x, z, scale):
        particles = [sample_by_grid(x, z[:, k], scale[:, k], 8, 8) for k in range(5)]
        return torch.stack(particles, dim=1)

    assert_values_and_gradients_equal(lambda *inputs: cut_glimpses(*inputs, 8), oracle, inputs, dtype)


@dtypes
def test_paste_glimpses_is_torchs_affine_grid_and_grid_sample_per_particle(dtype):
    inputs = [
        uniform(0, 1, 3, 5, 2, 8, 8),
        uniform(-1.3, 1.3, 3, 5, 2, seed=1),
        uniform(0.1, 0.9, 3, 5, 2, seed=2),
    ]

    def oracle(glimpses, z, scale):
        particles = [sample_by_grid(glimpses[:, k], z[:, k], scale[:, k], 16, 20, inverse=True) for k in range(5)]
        return torch.stack(particles, dim=1)

    assert_values_and_gradients_equal(lambda *inputs: paste_glimpses(*inputs, 16, 20), oracle, inputs, dtype)


def test_a_glimpse_of_no_size_is_drawn_nowhere_with_finite_gradients():
    glimpses = uniform(0, 1, 1, 1, 3, 8, 8, dtype=torch.float32)
    z = torch.tensor([[[0.123, -0.456]]], requires_grad=True)
    scale = torch.zeros(1, 1, 2, requires_grad=True)
    canvas = paste_glimpses(glimpses, z, scale, 32, 32)
    assert canvas.abs().max() == 0
    canvas.sum().backward()
    assert z.grad.isfinite().all()
    assert scale.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- masks


def squares_by_loop(z, glimpse_size, image_size):
    """[B, K, 2] -> [B, K, S, S]: 1 where a pixel lies less than half a side from the particle, in both directions."""
    squares = torch.zeros(*z.shape[:2], image_size, image_size, dtype=z.dtype)
    for b, k, i, j in torch.cartesian_prod(*(torch.arange(n) for n in squares.shape)).tolist():
        y, x = ((z[b, k] + 1) / 2 * (image_size - 1)).tolist()
        squares[b, k, i, j] = abs(i - y) < glimpse_size / 2 and abs(j - x) < glimpse_size / 2
    return squares


def test_square_mask_is_one_minus_the_clamped_sum_of_the_particles_squares():
    z, obj_on = uniform(-1.2, 1.2, 2, 4, 2, seed=3), uniform(0.2, 0.9, 2, 4, seed=4)
    expected = 1 - (obj_on[..., None, None] * squares_by_loop(z, 8, 16)).sum(1, keepdim=True).clamp(0, 1)
    assert (expected == 0).any()  # particles overlap, so that the clamp matters
    torch.testing.assert_close(square_mask(z, obj_on, 8, 16), expected)


@pytest.mark.parametrize(("arguments", "side"), [({"anchor_s": 0.3}, 4), ({"anchor_s": 0.3, "patch_size": 6}, 6)])
def test_create_masks_fast_draws_one_square_per_particle(arguments, side):
    z = uniform(-1.2, 1.2, 2, 4, 2, seed=5)
    expected = squares_by_loop(z, side, 16).unsqueeze(2)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(create_masks_fast(z, feature_dim=16, **arguments), expected)


@pytest.mark.parametrize("iou", [0.0, 0.2, 0.5, 1.0])
def test_duplicates_are_what_torchvision_s_suppression_drops(iou):
    z, scale, visibility = uniform(-0.7, 0.7, 20, 12, 2), uniform(0.1, 0.5, 20, 12, 2, seed=2), uniform(0, 1, 20, 12)
    hidden = duplicates(z, scale, visibility, iou)
    for image in range(20):
        boxes = torch.cat([z[image] - scale[image], z[image] + scale[image]], dim=-1)
        kept = nms(boxes, visibility[image], iou)
        assert sorted(kept.tolist()) == (~hidden[image]).nonzero()[:, 0].tolist()
    assert hidden.any() == (iou < 1) and not hidden.all(1).any()


def test_of_equally_visible_duplicates_the_first_stays():
    z = torch.zeros(1, 3, 2)
    assert duplicates(z, z + 0.2, torch.full((1, 3), 0.7), 0.5).tolist() == [[False, True, True]]


# ----------------------------------------------------------------------------------------------------- correlation


def correlation_by_convolution(glimpses, previous):
    """The published computation: one full grouped convolution, its norm, the middle of it, scaled to 0..1."""
    n, channels, g, _ = glimpses.shape
    glimpses, previous = glimpses.clamp(0, 1), previous.clamp(0, 1)
    padded = F.pad(glimpses, (g, g, g, g), mode="replicate").reshape(1, n * channels, 3 * g, 3 * g)
    products = F.conv2d(padded, previous, groups=n)
    energy = F.conv2d(padded.square(), torch.ones_like(previous), groups=n)
    norm = torch.sqrt(previous.square().sum() * energy + 1e-10) + 1e-5
    middle = slice(g // 2 + 1, -(g // 2))
    maps = (products / norm)[0, :, middle, middle].unsqueeze(1)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low + 1e-5)


def glimpse_pairs(kind, n, size, channels=3):
    glimpses, previous = (uniform(-0.2, 1.2, n, channels, size, size, seed=seed) for seed in (6, 7))
    if kind == "object in a corner":  # windows without any light, where all that is left is rounding
        glimpses[:, :, : 3 * size // 4] = 0
    elif kind == "nearly black":
        glimpses, previous = 1e-4 * glimpses, 1e-4 * previous
    elif kind == "uniform":
        glimpses, previous = torch.full_like(glimpses, 0.3), torch.full_like(previous, 0.7)
    elif kind == "black":
        glimpses = torch.zeros_like(glimpses)
    return glimpses, previous


@dtypes
@pytest.mark.parametrize("kind", ["random", "object in a corner", "nearly black"])
@pytest.mark.parametrize(("n", "size", "channels"), [(5, 8, 3), (3, 16, 1)])
def test_correlation_is_the_grouped_convolution(n, size, channels, kind, dtype):
    glimpses, previous = glimpse_pairs(kind, n, size, channels)
    expected = correlation_by_convolution(glimpses, previous)
    assert expected.amax() > 0.01
    actual = correlation_maps(glimpses.to(dtype), previous.to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_correlation_of_half_precision_is_computed_in_float32(dtype):
    # So many that their energy is beyond float16.
    glimpses, previous = (tensor.to(dtype) for tensor in glimpse_pairs("random", 100, 32))
    actual = correlation_maps(glimpses, previous)
    assert torch.equal(actual, correlation_maps(glimpses.float(), previous.float()).to(dtype))
    assert actual.dtype == dtype


@pytest.mark.parametrize("kind", ["uniform", "black"])
def test_correlation_of_glimpses_without_structure_is_finite(kind):
    maps = correlation_maps(*(tensor.float() for tensor in glimpse_pairs(kind, 4, 8)))
    assert maps.isfinite().all()
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_correlation_maps_follow_the_glimpses_and_pass_no_gradient():
    x = uniform(0, 1, 2, 3, 32, 32).requires_grad_()
    z = uniform(-0.5, 0.5, 2, 4, 2, seed=1).requires_grad_()
    previous, logits = uniform(0, 1, 8, 3, 8, 8, seed=2).requires_grad_(), uniform(-2, 0, 2, 4, 2, seed=3)
    combined = generate_correlation_maps(x, z, 8, previous, logits)
    glimpses = cut_glimpses(x, z, torch.sigmoid(logits), 8).flatten(0, 1)
    torch.testing.assert_close(combined[:, :3], glimpses)
    torch.testing.assert_close(combined[:, 3:], correlation_by_convolution(glimpses, previous), rtol=0, atol=1e-9)
    actual = torch.autograd.grad(combined.square().sum(), [x, z, previous], allow_unused=True)
    expected = torch.autograd.grad(glimpses.square().sum(), [x, z])
    torch.testing.assert_close(actual[:2], expected)
    assert actual[2] is None


# ----------------------------------------------------------------------------------------------------- composition


def compose_by_pixel(alpha, rgb, obj_on, depth):
    """Foreground, background mask and alpha masks of one image, one pixel and particle after the other."""
    K, channels, height, width = rgb.shape
    foreground, masks = torch.zeros(channels, height, width), torch.zeros(K, 1, height, width)
    foreground, masks = foreground.to(rgb), masks.to(rgb)
    for i in range(height):
        for j in range(width):
            visible = [obj_on[k].item() * alpha[k, 0, i, j].item() for k in range(K)]
            weight = [visible[k] / (1 + math.exp(depth[k, 0].item())) for k in range(K)]
            total = sum(weight) + 1e-5
            for k in range(K):
                masks[k, 0, i, j] = weight[k] / total * visible[k]
                foreground[:, i, j] += masks[k, 0, i, j] * rgb[k, :, i, j]
    return foreground, 1 - masks.sum(0), masks


def test_compose_is_the_sum_over_particles_at_every_pixel():
    alpha, rgb = uniform(0, 1, 2, 4, 1, 5, 6, seed=1), uniform(0, 1, 2, 4, 3, 5, 6, seed=2)
    alpha[:, :, :, 0] = 0  # no particle here: the background alone
    obj_on, depth = uniform(0, 1, 2, 4, seed=3), uniform(-3, 3, 2, 4, 1, seed=4)
    images = [compose_by_pixel(*arguments) for arguments in zip(alpha, rgb, obj_on, depth, strict=True)]
    expected = [torch.stack(part) for part in zip(*images, strict=True)]
    actual = compose(alpha, rgb, obj_on, depth)
    for part, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(part, plain, rtol=1e-9, atol=1e-12)
    assert (actual[1][:, :, 0] == 1).all()


@pytest.mark.parametrize("nearer", [0, 1])
def test_the_particle_of_smaller_depth_covers_the_other(nearer):
    rgb = torch.tensor([0.2, 0.9]).view(1, 2, 1, 1, 1)
    depth = torch.tensor([5.0, 5.0]).view(1, 2, 1)
    depth[0, nearer] = -5.0
    foreground, bg_mask, alpha_masks = compose(torch.ones(1, 2, 1, 1, 1), rgb, torch.ones(1, 2), depth)
    assert foreground.item() == pytest.approx(rgb[0, nearer].item(), abs=0.01)
    assert bg_mask.item() == pytest.approx(0, abs=1e-4)
    assert alpha_masks[0, nearer].item() > 0.99
