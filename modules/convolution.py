"""Run chains of convolutions fast and in little memory.

Between two convolutions lie cheap layers: GroupNorm, ReLU, upsampling and padding. For the backward pass `run_layers`
keeps what each convolution gives, and computes the cheap layers again, where autograd would keep the output of every
layer, two to four times as much. No convolution is computed twice, unless `checkpointing` is chosen: then only what a
chain begins with is kept.

Channels lie side by side in memory (channels last) from the first layer to the last, the layout in which convolutions
and upsampling work fastest. Under autocast all layers run in its precision.

With `torch.use_deterministic_algorithms` the gradients of upsampling and padding, which torch adds up in no fixed order
on a GPU, are sums and matrix products instead.
"""

import functools
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from modules.spatial import full_precision

aten = torch.ops.aten
PIXELS_AT_ONCE = 2**16  # of a CPU: so that what is between two layers is in its caches
PIXELS_RECOMPUTED = 2**20  # of a GPU: a map of 64 channels then takes 256 MB in float32
_checkpointing = ContextVar("checkpointing", default=False)


@contextmanager
def checkpointing(enabled=True):
    """Within it, what a chain of layers computes is not kept for the backward pass, but computed there once more, a few
    images at a time: a fraction of the memory for a quarter more time. Results are the same."""
    token = _checkpointing.set(enabled)
    try:
        yield
    finally:
        _checkpointing.reset(token)


class ReplicatePad(nn.ReplicationPad2d):
    """Replicate padding of one width on all sides, also for compilers: what torch tells them of its gradient's layout
    is not so (PyTorch 2.14)."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return super().forward(x)
        pad = self.padding[0]
        for dim in (2, 3):
            first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
            x = torch.cat([*pad * [first], x, *pad * [last]], dim)
        return x


def run_layers(x, *modules):
    """What `modules`, containers of layers, make of x [B, C, h, w], one after the other."""
    if torch.compiler.is_compiling():  # a compiler decides by itself on layouts and what to keep
        for module in modules:
            x = module(x)
        return x
    device = "cpu" if x.device.type == "meta" else x.device.type  # of whose autocast is asked
    layers = [layer for module in modules for layer in _layers(module)]
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    x = x.contiguous(memory_format=torch.channels_last)
    recompute = _checkpointing.get() and torch.is_grad_enabled()
    with full_precision(x):
        if device != "cpu" and not recompute:
            return _run(layers, x)
        pixels = x.shape[-2] * x.shape[-1] * 4 ** sum(isinstance(layer, nn.Upsample) for layer in layers)
        parts = x.split(max(1, (PIXELS_AT_ONCE if device == "cpu" else PIXELS_RECOMPUTED) // pixels))
        return torch.cat([_run_again_in_backward(layers, part) if recompute else _run(layers, part) for part in parts])


@checkpointing(False)  # a residual block is part of the chain that contains it
def _run_again_in_backward(layers, x):
    # No layer draws random numbers.
    return checkpoint(_run, layers, x, use_reentrant=False, preserve_rng_state=False)


def _run(layers, x):
    cheap = _Cheap()
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x, cheap = _convolve(x, cheap, layer), _Cheap()
        elif not cheap.add(layer):
            x, cheap = layer(cheap(x)[0]), _Cheap()
    return cheap(x)[0]


def _layers(module):
    """The layers in a container, those of the containers within it included."""
    if isinstance(module, nn.Sequential) or hasattr(module, "main"):
        for child in module.children():
            yield from _layers(child)
    else:
        yield module


@dataclass
class _Cheap:
    """The cheap layers before a convolution, in this order; each may be missing."""

    norm: nn.GroupNorm | None = None
    relu: bool = False
    upsample: bool = False
    pad: int = 0

    def add(self, layer):
        """Whether `layer` follows those that are here; then it is one of them."""
        if isinstance(layer, nn.GroupNorm) and self == _Cheap():
            self.norm = layer
        elif isinstance(layer, nn.ReLU) and not (self.relu or self.upsample or self.pad):
            self.relu = True
        elif isinstance(layer, nn.Upsample) and not (self.upsample or self.pad):
            self.upsample = True
        elif isinstance(layer, nn.ReplicationPad2d) and not self.pad:
            self.pad = layer.padding[0]
        else:
            return False
        return True

    @property
    def parameters(self):
        return (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)

    def __call__(self, x):
        """[B, C, h, w] -> [B, C, h', w'] and the norm's statistics (or None)."""
        statistics = None if self.norm is None else _statistics(x, self.norm)
        return self.outputs(x, statistics)[-1], statistics

    def outputs(self, x, statistics):
        """x after each of the layers behind the norm: activated, enlarged, padded."""
        if self.norm is not None:
            x = _normalized(x, statistics, self.norm)
        activated = F.relu(x, inplace=self.norm is not None) if self.relu else x
        enlarged = _upsample(activated) if self.upsample else activated
        return activated, enlarged, F.pad(enlarged, 4 * [self.pad], mode="replicate") if self.pad else enlarged

    def backward(self, gradient, x, statistics, outputs):
        """The gradients of x, the norm's weight and bias."""
        activated, enlarged, _ = outputs
        if self.pad:
            gradient = _pad_backward(gradient, enlarged, self.pad)
        if self.upsample:
            gradient = _upsample_backward(gradient, activated)
        if self.relu:
            gradient = aten.threshold_backward(gradient, activated, 0)
        return (gradient, None, None) if self.norm is None else _norm_backward(gradient, x, statistics, self.norm)


# GroupNorm with channels last, in sums and products of whole tensors: torch's own is several times slower in bfloat16
# on a CPU, and on a GPU it copies its input to the other layout and back.


def _statistics(x, norm):
    """A group's mean and 1 / deviation, as of each of its channels: [2, B, C], float32 or float64."""
    pixels = _wide(x.permute(0, 2, 3, 1).flatten(1, 2))  # [B, h * w, C]
    moments = torch.stack([pixels.mean(1), pixels.square().mean(1)])  # [2, B, C]
    mean, square = _group_means(moments, norm)
    return torch.stack([mean, torch.rsqrt((square - mean.square()).clamp(min=0) + norm.eps)])


def _wide(x):
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _group_means(values, norm):
    """Each channel's value replaced by the mean over its group: [*, C] -> [*, C]."""
    groups = values.unflatten(-1, (norm.num_groups, -1))
    return groups.mean(-1, keepdim=True).expand_as(groups).flatten(-2)


def _normalized(x, statistics, norm):
    mean, rstd = statistics
    factor = rstd * norm.weight
    return torch.addcmul(_of_pixels(norm.bias - mean * factor, x), x, _of_pixels(factor, x))


def _norm_backward(gradient, x, statistics, norm):
    """The gradients of x and of the norm's weight and bias."""
    mean, rstd = statistics
    g, pixels = (_wide(values.permute(0, 2, 3, 1).flatten(1, 2)) for values in (gradient, x))  # [B, h * w, C]
    sum_g, sum_gx = g.sum(1), (g * pixels).sum(1)  # [B, C]
    count = pixels.shape[1]
    mean_g, mean_gx = (_group_means(norm.weight * total, norm) / count for total in (sum_g, sum_gx))
    slope = (mean_g * mean - mean_gx) * rstd**3
    offset = -slope * mean - mean_g * rstd
    d_x = torch.addcmul(_of_pixels(offset, x), x, _of_pixels(slope, x))
    d_x = torch.addcmul(d_x, gradient, _of_pixels(rstd * norm.weight, x))
    return d_x, ((sum_gx - sum_g * mean) * rstd).sum(0), sum_g.sum(0)


def _of_pixels(values, x):
    """[B, C] -> [B, C, 1, 1] in the precision of x."""
    return values.to(x.dtype)[..., None, None]


def _pad_backward(gradient, x, pad):
    """The gradient of x before replicate padding."""
    if not torch.are_deterministic_algorithms_enabled():
        return aten.replication_pad2d_backward(gradient, x, 4 * [pad])
    for dim in (2, 3):
        first, inner, last = gradient.split([pad, x.shape[dim], pad], dim)
        gradient = inner.clone()
        gradient.narrow(dim, 0, 1).add_(first.sum(dim, keepdim=True))
        gradient.narrow(dim, -1, 1).add_(last.sum(dim, keepdim=True))
    return gradient


def _upsample(x):
    if torch.are_deterministic_algorithms_enabled():
        rows, columns = (_doubling(side, x.device, x.dtype) for side in x.shape[-2:])
        return rows @ x @ columns.T
    # A GPU's kernel for the other layout goes through the batch one image at a time.
    x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _upsample_backward(gradient, x):
    """The gradient of x before upsampling."""
    if torch.are_deterministic_algorithms_enabled():
        rows, columns = (_doubling(side, x.device, x.dtype) for side in x.shape[-2:])
        return rows.T @ gradient @ columns
    return aten.upsample_bilinear2d_backward(gradient, gradient.shape[-2:], x.shape, False, 2.0, 2.0)


@functools.cache  # so that a step copies nothing to the device
@torch.inference_mode(False)  # so that training can use what sampling made
def _doubling(side, device, dtype):
    """The matrix [2 side, side] that upsamples one axis, as `F.interpolate` does without `align_corners`."""
    pixels = torch.arange(side, device=device, dtype=torch.float32)
    points = ((torch.arange(2 * side, device=device) + 0.5) / 2 - 0.5).clamp(0, side - 1)
    return (1 - (points[:, None] - pixels).abs()).clamp(min=0).to(dtype)


def _convolve(x, cheap, convolution):
    """The convolution of what the cheap layers make of x."""
    weight, bias = convolution.weight, convolution.bias
    if cheap.upsample and cheap.pad == 1 and convolution.kernel_size == (3, 3) and convolution.stride == (1, 1):
        return _interleave(_keeping_x(x, replace(cheap, upsample=False), convolution, _phase_weights(weight), bias))
    return _keeping_x(x, cheap, convolution, weight, bias)


def _phase_weights(weight):
    """The 3x3 convolution of an upsampled image as one of the image itself: [O, C, 3, 3] -> [4 * O, C, 3, 3], the four
    pixels that each becomes (two rows of two) one after the other.

    Upsampling makes two points of each, 3/4 of it and 1/4 of either neighbour; what replicate padding adds fits in.
    """
    points = _upsampling(weight.device, weight.dtype)
    return torch.einsum("ajk,blm,ockm->abocjl", points, points, weight).flatten(0, 2)


@functools.cache  # so that a step copies nothing to the device
@torch.inference_mode(False)  # so that training can use what sampling made
def _upsampling(device, dtype):
    """How much of a pixel and its neighbours [3] each tap of a kernel [3] sees at the pixel's two points: [2, 3, 3]."""
    left, right = [[3, 1, 0], [1, 3, 3], [0, 0, 1]], [[1, 0, 0], [3, 3, 1], [0, 1, 3]]  # in quarters
    return torch.tensor([left, right], device=device, dtype=dtype) / 4


def _interleave(x):
    """What `_phase_weights` made of each pixel as a square of two by two: [B, 4 * O, h, w] -> [B, O, 2h, 2w]."""
    B, C, h, w = x.shape
    squares = x.permute(0, 2, 3, 1).reshape(B, h, w, 2, 2, C // 4).transpose(2, 3)
    return squares.reshape(B, 2 * h, 2 * w, C // 4).permute(0, 3, 1, 2)


def _keeping_x(x, cheap, convolution, weight, bias):
    if not torch.is_grad_enabled():
        return _convolution(cheap(x)[0], convolution, weight, bias)
    return _ConvolutionThatKeepsItsInput.apply(x, cheap, convolution, *cheap.parameters, weight, bias)


def _convolution(x, layer, weight, bias):
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, layer.stride, layer.padding)


class _ConvolutionThatKeepsItsInput(torch.autograd.Function):
    """A convolution behind cheap layers, of which only the input is kept."""

    @staticmethod
    def forward(ctx, x, cheap, layer, norm_weight, norm_bias, weight, bias):
        inner, statistics = cheap(x)
        ctx.cheap, ctx.layer = cheap, layer
        ctx.save_for_backward(x, statistics, weight)
        return _convolution(inner, layer, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        with full_precision(gradient):
            return _ConvolutionThatKeepsItsInput._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx, gradient):
        x, statistics, weight = ctx.saved_tensors
        layer, cheap = ctx.layer, ctx.cheap
        needs_x, _, _, needs_norm, _, needs_weight, needs_bias = ctx.needs_input_grad
        outputs = cheap.outputs(x, statistics)
        d_inner, d_weight, d_bias = aten.convolution_backward(
            gradient,
            outputs[-1],
            weight.to(x.dtype),
            None if layer.bias is None else layer.bias.shape,
            *(layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups),
            (needs_x or needs_norm, needs_weight, needs_bias),
        )
        d_weight, d_bias = (d if d is None else d.to(weight.dtype) for d in (d_weight, d_bias))
        if d_inner is None:
            return *[None] * 5, d_weight, d_bias
        d_x, d_norm_weight, d_norm_bias = cheap.backward(d_inner, x, statistics, outputs)
        return d_x, None, None, d_norm_weight, d_norm_bias, d_weight, d_bias
