"""Transformer blocks, fast on a CPU too.

Letters: B sequences, L tokens, C width.
"""

import torch
import torch.nn.functional as F
from torch import nn


def apply_together(x, layers):
    """What each of `layers`, `nn.Linear`s of one input, makes of x, side by side, in one matrix product."""
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight, None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]))


class Dropout(nn.Dropout):
    """Dropout, with masks that a CPU draws several times as fast as torch's."""

    def forward(self, x):
        if not (self.training and self.p) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return x * dropout_mask(x, self.p)


def dropout_mask(x, p):
    """0 with probability p, else 1 / (1 - p): a tensor of the shape of x, on the CPU, in its precision or float32."""
    # Two elements from each number: as fine as torch's own draws, which are of 24 bits.
    bits = torch.empty((x.numel() + 1) // 2, dtype=torch.int64).random_(-(2**63), None).view(torch.int32)
    mask = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    torch.ge(bits[: x.numel()].view(x.shape), round(p * 2**32) - 2**31, out=mask)
    return mask.mul_(1 / (1 - p))


def attend(q, k, v, bias=None, dropout=0.0):
    """Scaled dot-product attention: queries [B, heads, M, c], keys and values [B, heads, L, c] -> [B, heads, M, c].

    bias: [heads, M, L] or None, added to the logits; dropout: of the attention's weights, a probability.
    """
    learns_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not (dropout or learns_bias):
        bias = None if bias is None else bias.unsqueeze(0)  # a CPU's fast kernel takes four dimensions alone
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    # A CPU has no kernel for these, and torch's composite of single operations goes more often through the weights.
    dtype = v.dtype
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (logits if bias is None else logits.add_(bias)).softmax(-1)
        return ((weights * dropout_mask(weights, dropout) if dropout else weights) @ v).to(dtype)


class Attention(nn.Module):
    """Multi-head self-attention: [B, L, C] -> [B, L, C].

    bias: [heads, L, L] or None, added to the logits; last: how many tokens ask, the last ones, if those are not all: it
    returns [B, last, C] then.
    """

    def __init__(self, dim, heads, dropout, linear_bias):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.key = nn.Linear(dim, dim, bias=linear_bias)
        self.query = nn.Linear(dim, dim, bias=linear_bias)
        self.value = nn.Linear(dim, dim, bias=linear_bias)
        self.proj = nn.Linear(dim, dim, bias=linear_bias)
        self.resid_drop = Dropout(dropout)

    def forward(self, x, bias=None, last=None):
        if last is None:
            q, k, v = self._heads(x, self.query, self.key, self.value)
        else:
            (q,), (k, v) = self._heads(x[:, -last:], self.query), self._heads(x, self.key, self.value)
            bias = None if bias is None else bias[:, -last:]
        out = attend(q, k, v, bias, self.dropout if self.training else 0.0)
        return self.resid_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _heads(self, x, *layers):
        """What each of the layers makes of x, [B, heads, L, c]."""
        together = apply_together(x, layers).unflatten(-1, (len(layers), self.heads, -1))
        return together.permute(2, 0, 3, 1, 4).contiguous().unbind()


class TransformerMLP(nn.Module):
    """[*, C] -> [*, C] through `ratio` * C."""

    def __init__(self, dim, ratio, activation, dropout):
        super().__init__()
        self.fc_1 = nn.Linear(dim, ratio * dim)
        self.act = activation()
        self.proj = nn.Linear(ratio * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.proj(self.act(self.fc_1(x))))


class TransformerBlock(nn.Module):
    """A pre-norm transformer block around an `Attention`: [B, L, C] -> [B, L, C], or with `last` the last tokens."""

    def __init__(self, dim, attention, mlp_ratio, activation, dropout):
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.ln2 = nn.LayerNorm(dim)
        self.attn = attention
        self.mlp = TransformerMLP(dim, mlp_ratio, activation, dropout)

    def forward(self, x, bias=None, last=None):
        attended = self.attn(self.ln1(x), bias, last)
        x = (x if last is None else x[:, -last:]) + attended
        return x + self.mlp(self.ln2(x))


def init_transformer_weights(module):
    """Initial weights of a transformer: Linear N(0, 0.02) with zero bias, LayerNorm 1 and 0 (PyTorch's default)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
