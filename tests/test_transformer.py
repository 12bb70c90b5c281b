"""Transformer blocks on a CPU: torch's own attention and dropout are the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.transformer import Attention, Dropout, apply_together, attend, dropout_mask


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shape, p", [((400_001,), 0.1), ((100, 40, 70), 0.5), ((40, 9999), 0.97)])
def test_masks_drop_with_the_probability_asked_for_each_element_by_itself(shape, p):
    torch.manual_seed(0)
    mask = dropout_mask(torch.empty(shape), p)
    assert mask.shape == shape and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    dropped = (mask == 0).flatten().double()
    n = dropped.numel()
    assert abs(dropped.mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)
    centred = dropped - p
    for distance in (1, 2, 3, shape[-1]):  # both halves of a number, numbers, rows
        correlation = (centred[distance:] * centred[:-distance]).sum().item() / (n * p * (1 - p))
        assert n <= 2 * distance or abs(correlation) < 4 / math.sqrt(n - distance)
    assert not torch.equal(mask, dropout_mask(torch.empty(shape), p))


def test_dropout_is_reproducible_keeps_the_mean_and_is_off_in_evaluation():
    dropout, (x,) = Dropout(0.25), tensors((300, 200))
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(dropout(x))
    assert torch.equal(*results)
    assert torch.all((results[0] == 0) | torch.isclose(results[0], x / 0.75, rtol=1e-6, atol=0))
    (gradient,) = torch.autograd.grad(results[0].sum(), x)
    torch.testing.assert_close(gradient, (results[0] / x).detach())
    assert dropout.eval()(x) is x and Dropout(0.0)(x) is x


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_attention_is_torchs(with_bias, dropped, monkeypatch):
    q, k, v, table = tensors((3, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 4), (2, 5, 7))
    bias = table.masked_fill(torch.ones(5, 7, dtype=torch.bool).triu(3), float("-inf")) if with_bias else None
    mask = (torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(1)) > dropped).double() / (1 - dropped)
    monkeypatch.setattr("modules.transformer.dropout_mask", lambda x, p: mask)
    found = attend(q, k, v, bias, dropped)
    # Attention is linear in the values: what each of them is given by torch's own are the weights.
    units = torch.eye(7, dtype=torch.float64).expand(3, 2, 7, 7)
    weights = F.scaled_dot_product_attention(q, k, units, attn_mask=None if bias is None else bias[None])
    expected = (weights * mask) @ v
    torch.testing.assert_close(found, expected)
    (direction,) = tensors(found.shape, seed=2)
    inputs = [q, k, v, *([table] if with_bias else [])]
    gradients = [
        torch.autograd.grad((values * direction).sum(), inputs, retain_graph=True) for values in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_input_are_applied_together(bias):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width, bias=bias) for width in (2, 3, 1)]
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(apply_together(x, layers), torch.cat([layer(x) for layer in layers], dim=-1))


def test_some_tokens_ask_as_they_do_among_all():
    torch.manual_seed(0)
    attention, x, bias = Attention(8, 2, 0.0, linear_bias=True), torch.randn(3, 6, 8), torch.randn(2, 6, 6)
    torch.testing.assert_close(attention(x, bias, last=2), attention(x, bias)[:, 4:])
