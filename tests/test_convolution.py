"""Chains of convolutions that keep little for the backward pass, against their layers one after the other."""

import pytest
import torch

from modules import convolution
from modules.convolution import checkpointing, run_layers
from modules.modules import ConvBlock, GlimpseDecoder, ImageDecoder, LatentToMap, PatchCNN, ResBlock


def apply_plainly(x, *modules):
    for module in modules:
        x = module(x)
    return x


def chains():
    torch.manual_seed(0)
    return {
        "encoder": ([PatchCNN(3, [8, 16, 16], 16, 5).main, torch.nn.Conv2d(16, 5, 1)], (5, 3, 16, 16)),
        "first kernel of 7": ([PatchCNN(3, [8, 16], 16, 5, first_kernel=7).main], (5, 3, 16, 16)),
        "zeros": ([PatchCNN(3, [8, 16], 16, 5, pad_mode="zeros").main], (5, 3, 16, 16)),
        "residual": ([PatchCNN(3, [8, 16], 16, 5, residual=True).main], (5, 3, 16, 16)),
        "groups of 5": ([PatchCNN(3, [10, 20], 16, 5).main], (2, 3, 16, 16)),
        "upsampling": ([GlimpseDecoder(4, 32, 3, residual=False).main], (5, 32, 8, 8)),
        "upsampling, zeros": ([ImageDecoder(8, [8, 16, 32], 3, "zeros", residual=False).main], (2, 8, 8, 8)),
        "upsampling, residual": ([LatentToMap(4, 32, "replicate", residual=True).cnn], (2, 32, 8, 8)),
        "without a norm": ([ConvBlock(4, 8, norm=False, upsample=True), ConvBlock(8, 4)], (3, 4, 8, 8)),
        "no layers": ([torch.nn.Sequential()], (2, 4, 8, 8)),
        "odd sides": ([PatchCNN(3, [8, 8, 16], 9, 5).main], (3, 3, 9, 9)),
    }


@pytest.mark.parametrize("chunk", [1, 2**20])  # pixels at once: one item after the other; all
@pytest.mark.parametrize("name", chains())
def test_a_chain_is_its_layers_one_after_the_other(name, chunk, monkeypatch):
    monkeypatch.setattr(convolution, "PIXELS_AT_ONCE", chunk)
    modules, shape = chains()[name]
    modules = [module.double() for module in modules]
    for module in modules:
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(parameter for module in modules for parameter in module.parameters())]
    actual, expected = run_layers(x, *modules), apply_plainly(x, *modules)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad(output, inputs, weight) for output in (actual, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(run_layers(x, *modules), expected)


@pytest.mark.parametrize("name", ["encoder", "first kernel of 7", "upsampling", "upsampling, residual", "odd sides"])
def test_a_chain_is_the_same_where_kernels_are_deterministic(name, deterministic):
    modules, shape = chains()[name]
    modules = [module.double() for module in modules]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(parameter for module in modules for parameter in module.parameters())]
    actual = run_layers(x, *modules)
    gradients = torch.autograd.grad(actual.square().sum(), inputs)
    torch.use_deterministic_algorithms(False)
    expected = apply_plainly(x, *modules)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs))


def kept_numbers(function):
    """How many numbers autograd keeps for the backward pass of what `function` returns, parameters aside."""
    kept = {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes() // 4)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function()
    return sum(size for _, size in kept.values()), output


def test_less_than_half_is_kept_of_what_autograd_keeps():
    cnn = PatchCNN(3, [16, 32], 16, 5)
    x = torch.rand(8, 3, 16, 16)
    (kept, _), (plain, _) = (kept_numbers(lambda run=run: run(x, cnn.main)) for run in (run_layers, apply_plainly))
    assert kept < 0.4 * plain


@pytest.mark.parametrize("residual", [False, True])
def test_with_checkpointing_only_what_goes_in_is_kept(residual):
    cnn = PatchCNN(3, [16, 32], 16, 5, residual=residual)
    x = torch.rand(8, 3, 16, 16)
    plain, expected = kept_numbers(lambda: run_layers(x, cnn.main))
    with checkpointing():
        kept, output = kept_numbers(lambda: run_layers(x, cnn.main))
    assert kept <= x.numel() + 1 < plain / 10
    gradients = [torch.autograd.grad(y.square().sum(), list(cnn.main.parameters())) for y in (output, expected)]
    torch.testing.assert_close(*gradients)


def test_training_goes_on_after_inference():
    decoder = GlimpseDecoder(4, 16, 3, residual=False)
    convolution._upsampling.cache_clear()
    with torch.inference_mode():
        decoder(torch.rand(2, 4))
    decoder(torch.rand(2, 4)).sum().backward()


def test_frozen_weights_get_no_gradient_and_pass_it_on():
    cnn = PatchCNN(3, [8, 16], 16, 5).requires_grad_(False)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    (actual,), (expected,) = (
        torch.autograd.grad(run(x, cnn.main).square().sum(), x) for run in (run_layers, apply_plainly)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in cnn.parameters())


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_reaches_all_layers(backward_inside):
    cnn = PatchCNN(3, [16, 32], 16, 5)
    x = torch.rand(8, 3, 16, 16)
    expected = cnn(x)
    plain = torch.autograd.grad(expected.sum(), list(cnn.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        actual = cnn(x)
        if backward_inside:
            gradients = torch.autograd.grad(actual.float().sum(), list(cnn.parameters()))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    if not backward_inside:
        gradients = torch.autograd.grad(actual.float().sum(), list(cnn.parameters()))
    for one, other in zip(gradients, plain, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.1 * other.norm() + 1e-3


def test_a_strided_residual_block_is_the_published_one():
    block = ResBlock(4, 8, 2, "replicate").double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    shortcut = torch.nn.functional.conv2d(x, block.downsample.weight, stride=2)
    plain = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + shortcut
    torch.testing.assert_close(block(x), torch.relu(plain))
