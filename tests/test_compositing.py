"""Particles drawn without canvases against pasting and composing them, with gradients; the GPU's kernels in Triton's
interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules import compositing
from modules.compositing import draw_glimpses, particle_sums
from modules.spatial import compose, paste_glimpses

ROOT = Path(__file__).resolve().parents[1]


def draw_plainly(glimpses, z, scale, obj_on, depth, height, width):
    canvas = paste_glimpses(glimpses, z, scale, height, width)
    return compose(canvas[:, :, :1], canvas[:, :, 1:], obj_on, depth)[:2]


def scene(B, K, g, scales, colours=3, spread=1.5, dtype=torch.float64, seed=0):
    """Particles up to `spread` from the middle, so that some are partly and some wholly outside."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)

    glimpses, z = uniform(0, 1, B, K, 1 + colours, g, g), uniform(-spread, spread, B, K, 2)
    values = glimpses, z, uniform(*scales, B, K, 2), uniform(0, 1, B, K), uniform(-3, 3, B, K, 1)
    return [value.requires_grad_() for value in values]


SCALES = {"usual": (0.1, 0.4), "all sizes": (0.02, 2.0), "huge": (3.0, 30.0), "tiny": (1e-4, 1e-2)}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("B", "K", "g", "size"), [(2, 9, 8, 32), (1, 1, 8, 16), (3, 4, 16, 20)])
def test_drawing_is_pasting_and_composing(B, K, g, size, scales):
    inputs = scene(B, K, g, SCALES[scales])
    actual, expected = (draw(*inputs, size, size) for draw in (draw_glimpses, draw_plainly))
    weights = [torch.rand_like(part) for part in expected]
    gradients = [torch.autograd.grad(parts, inputs, weights) for parts in (actual, expected)]
    for one, other in zip([*actual, *gradients[0]], [*expected, *gradients[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * other.abs().max().item() + 1e-14)


def test_gradients_are_those_of_finite_differences():
    inputs = scene(1, 3, 4, (0.3, 0.9), spread=0.8)
    assert torch.autograd.gradcheck(lambda *inputs: draw_glimpses(*inputs, 9, 9), inputs, atol=1e-6)


@pytest.mark.parametrize("pixels", [1, 100])  # in a chunk: every particle alone; some together
def test_chunks_do_not_matter(pixels, monkeypatch):
    inputs = scene(2, 5, 8, (0.1, 1.0))
    expected = draw_glimpses(*inputs, 16, 16)
    gradients = torch.autograd.grad(expected[0].sum(), inputs)
    monkeypatch.setattr(compositing, "PIXELS_AT_ONCE", pixels)
    actual = draw_glimpses(*inputs, 16, 16)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual[0].sum(), inputs), gradients)


def test_a_particle_that_covers_no_pixel_is_not_drawn_and_has_finite_gradients():
    inputs = scene(1, 2, 8, (1e-9, 1e-9), dtype=torch.float32)
    foreground, mask = draw_glimpses(*inputs, 16, 16)
    assert foreground.abs().max() == 0
    assert (mask == 1).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(foreground.sum() + mask.sum(), inputs))


def test_glimpses_in_bfloat16_are_composed_in_float32():
    glimpses, *others = scene(2, 5, 8, (0.1, 0.5), dtype=torch.float32)
    rough = glimpses.detach().bfloat16().requires_grad_()
    expected = draw_glimpses(rough.float(), *others, 32, 32)
    actual = draw_glimpses(rough, *others, 32, 32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    inputs = [rough, *others]
    (gradient, *_), (plain, *_) = (torch.autograd.grad(parts[0].sum(), inputs) for parts in (actual, expected))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, plain)


def test_the_operators_keep_pytorchs_rules():
    glimpses, z, scale, obj_on, depth = scene(2, 3, 8, (0.1, 0.5))
    torch.library.opcheck(particle_sums, (glimpses, z, scale, obj_on, torch.sigmoid(-depth)[..., 0], 16, 12))


KERNELS = """
import torch
from modules import compositing, compositing_triton
from tests.test_compositing import SCALES, scene

for (B, K, g, height, width), colours in (((2, 3, 8, 20, 24), 3), ((1, 1, 16, 17, 17), 1), ((1, 2, 32, 48, 40), 3)):
    for name, scales in SCALES.items():
        with torch.no_grad():
            *inputs, depth = scene(B, K, g, scales, colours, dtype=torch.float32)
            inputs = [x.detach() for x in (*inputs, torch.sigmoid(-depth)[..., 0])]
            plain = [x.double() for x in inputs]
            sums = compositing_triton.forward(*inputs, height, width)
            gradient = torch.rand_like(sums)
            actual = [sums, *compositing_triton.backward(gradient, *inputs)]
            expected = [compositing._particle_sums(*plain, height, width)]
            expected += compositing._particle_sums_backward(gradient.double(), *plain)
            for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
                error = (one - other).abs().max() / other.abs().max().clamp(min=1e-3)
                assert error < 2e-4, (B, K, g, name, i, error)
            rough = inputs[0].bfloat16()
            sums = compositing_triton.forward(rough, *inputs[1:], height, width)
            other = compositing_triton.forward(rough.float(), *inputs[1:], height, width)
            assert torch.equal(sums, other)
            assert compositing_triton.backward(gradient, rough, *inputs[1:])[0].dtype == torch.bfloat16
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_gpus_kernels_compute_the_same_sums_and_gradients():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("scales", SCALES)
def test_a_gpu_draws_what_a_cpu_draws(scales):
    inputs = scene(2, 9, 16, SCALES[scales], dtype=torch.float32)
    results = []
    for device in ("cpu", "cuda", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in inputs]
        drawn = draw_glimpses(*leaves, 64, 64)
        gradients = torch.autograd.grad([part.square().sum() for part in drawn], leaves)
        results.append([x.cpu() for x in (*drawn, *gradients)])
    cpu, gpu, again = results
    for one, other, repeated in zip(gpu, cpu, again, strict=True):
        assert (one - other).abs().max() <= 2e-4 * other.abs().max().clamp(min=1e-3)
        assert torch.equal(one, repeated)
