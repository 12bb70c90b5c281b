"""Run chains of convolutions fast and in little memory.

Between two convolutions lie cheap layers: GroupNorm, ReLU, upsampling and padding. For the backward pass `run_layers`
keeps what each convolution gives, and computes the cheap layers again, where autograd would keep the output of every
layer, three to six times as much. No convolution is computed twice.

Channels lie side by side in memory (channels last) from the first layer to the last, the layout in which convolutions
and upsampling work fastest. Under autocast all layers run in its precision.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

aten = torch.ops.aten
PIXELS_AT_ONCE = 2**16  # of a CPU: so that what is between two layers is in its caches


def run_layers(x, *modules):
    """What `modules`, containers of layers, make of x [B, C, h, w], one after the other."""
    device = "cpu" if x.device.type == "meta" else x.device.type  # of whose autocast is asked
    layers = [layer for module in modules for layer in _layers(module)]
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, enabled=False):
        if device != "cpu" or torch.compiler.is_compiling():
            return _run(layers, x)
        pixels = x.shape[-2] * x.shape[-1] * 4 ** sum(isinstance(layer, nn.Upsample) for layer in layers)
        return torch.cat([_run(layers, part) for part in x.split(max(1, PIXELS_AT_ONCE // pixels))])


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
        """[B, C, h, w] -> [B, C, h', w'] and the norm's mean and 1 / deviation [B, groups] (or Nones)."""
        mean = rstd = None
        if self.norm is not None:
            B, C, h, w = x.shape
            weight, bias = (_like(parameter, x) for parameter in self.parameters)
            if x.device.type != "cpu":
                x = x.contiguous()
            x, mean, rstd = aten.native_group_norm(x, weight, bias, B, C, h * w, self.norm.num_groups, self.norm.eps)
            x = x.contiguous(memory_format=torch.channels_last)
        return self._activate(x)[-1], mean, rstd

    def _activate(self, x):
        """x after each of the layers but the norm: activated, enlarged, padded."""
        activated = F.relu(x) if self.relu else x
        enlarged = _upsample(activated) if self.upsample else activated
        return activated, enlarged, F.pad(enlarged, 4 * [self.pad], mode="replicate") if self.pad else enlarged

    def again(self, x, mean, rstd):
        """The layers' outputs (as of `_activate`) once more, from the norm's mean and deviation."""
        if self.norm is not None:
            B, C = x.shape[:2]
            weight, bias = (parameter.to(mean.dtype) for parameter in self.parameters)
            per_group = C // self.norm.num_groups
            factor = rstd.repeat_interleave(per_group, 1) * weight
            shift = bias - mean.repeat_interleave(per_group, 1) * factor
            factor, shift = (values.to(x.dtype).view(B, C, 1, 1) for values in (factor, shift))
            x = torch.addcmul(shift, x, factor)
        return self._activate(x)

    def backward(self, gradient, x, mean, rstd, outputs, needed):
        """The gradients of x, the norm's weight and bias. outputs: those of `again`."""
        activated, enlarged, _ = outputs
        if self.pad:
            gradient = aten.replication_pad2d_backward(gradient, enlarged, 4 * [self.pad])
        if self.upsample:
            sizes = enlarged.shape[-2:], activated.shape
            gradient = aten.upsample_bilinear2d_backward(gradient, *sizes, False, 2.0, 2.0)
        if self.relu:
            gradient = aten.threshold_backward(gradient, activated, 0)
        if self.norm is None:
            return gradient, None, None
        B, C, h, w = x.shape
        layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
        gradient, x = gradient.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
        return aten.native_group_norm_backward(
            gradient, x, mean, rstd, _like(self.norm.weight, x), B, C, h * w, self.norm.num_groups, needed
        )


def _like(parameter, x):
    """A norm's parameter in the precision that goes with x: a CPU takes float32 with bfloat16."""
    return parameter if x.device.type == "cpu" and x.dtype == torch.bfloat16 else parameter.to(x.dtype)


def _upsample(x):
    # A GPU's kernel for the other layout goes through the batch one image at a time.
    x = x.contiguous(memory_format=torch.channels_last)
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


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
    points = _phase_points(weight.dtype, weight.device)
    return torch.einsum("ajk,blm,ockm->abocjl", points, points, weight).flatten(0, 2)


@functools.cache  # made once: copying numbers to a GPU would stop a step
def _phase_points(dtype, device):
    """What each tap has of each point, for the first and the second pixel: [2, point, tap]."""
    first, second = [[3, 1, 0], [1, 3, 3], [0, 0, 1]], [[1, 0, 0], [3, 3, 1], [0, 1, 3]]
    return torch.tensor([first, second], dtype=dtype, device=device) / 4


def _interleave(x):
    """What `_phase_weights` made of each pixel as a square of two by two: [B, 4 * O, h, w] -> [B, O, 2h, 2w]."""
    B, C, h, w = x.shape
    squares = x.permute(0, 2, 3, 1).reshape(B, h, w, 2, 2, C // 4).transpose(2, 3)
    return squares.reshape(B, 2 * h, 2 * w, C // 4).permute(0, 3, 1, 2)


def _keeping_x(x, cheap, convolution, weight, bias):
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides by itself what to keep
        return _convolution(cheap(x)[0], convolution, weight, bias)
    return _ConvolutionThatKeepsItsInput.apply(x, cheap, convolution, *cheap.parameters, weight, bias)


def _convolution(x, layer, weight, bias):
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, layer.stride, layer.padding)


class _ConvolutionThatKeepsItsInput(torch.autograd.Function):
    """A convolution behind cheap layers, of which only the input is kept."""

    @staticmethod
    def forward(ctx, x, cheap, layer, norm_weight, norm_bias, weight, bias):
        inner, mean, rstd = cheap(x)
        ctx.cheap, ctx.layer = cheap, layer
        ctx.save_for_backward(x, mean, rstd, weight)
        return _convolution(inner, layer, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        with torch.autocast(gradient.device.type, enabled=False):
            return _ConvolutionThatKeepsItsInput._gradients(ctx, gradient)

    @staticmethod
    def _gradients(ctx, gradient):
        x, mean, rstd, weight = ctx.saved_tensors
        layer, cheap = ctx.layer, ctx.cheap
        needs_x, _, _, needs_norm, _, needs_weight, needs_bias = ctx.needs_input_grad
        outputs = cheap.again(x, mean, rstd)
        d_inner, d_weight, d_bias = aten.convolution_backward(
            gradient,
            outputs[-1],
            weight.to(x.dtype),
            None if layer.bias is None else layer.bias.shape,
            *(layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups),
            (needs_x or needs_norm, needs_weight, needs_bias),
        )
        d_x = d_norm_weight = d_norm_bias = None
        if d_inner is not None:
            needed = needs_x, needs_norm, needs_norm
            d_x, d_norm_weight, d_norm_bias = cheap.backward(d_inner, x, mean, rstd, outputs, needed)
        gradients = [d if d is None else d.to(weight.dtype) for d in (d_norm_weight, d_norm_bias, d_weight, d_bias)]
        return d_x, None, None, *gradients
