"""Weight files in the real format, and VGG-16 without torchvision, for the tests of what uses them."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import vgg16

VGG16_LAYERS = "CCMCCMCCCMCCCMCCCM"  # C: convolution and ReLU, M: max pooling
LPIPS_CHANNELS = (64, 128, 256, 512, 512)
VGG16_NAME, LPIPS_NAME = "vgg16-397923af.pth", "vgg.pth"


@functools.cache
def vgg16_state():
    """A state dict as torchvision's VGG-16 file holds it; the weights are those of the VGG arrays in parts.npz."""
    with torch.device("meta"):
        model = vgg16(init_weights=False)
    rng = np.random.default_rng(11)
    state = {}
    for name, parameter in model.features.named_parameters():
        scale = 0.1 if name.endswith("bias") else 1.4 / math.sqrt(parameter[0].numel())
        values = scale * rng.standard_normal(tuple(parameter.shape))
        state[f"features.{name}"] = torch.from_numpy(values.astype(np.float32))
    for name, parameter in model.classifier.named_parameters():  # one zero on disk instead of 500 MB
        state[f"classifier.{name}"] = torch.zeros(1).expand(parameter.shape)
    return state


@functools.cache
def lpips_state():
    """A state dict as the file of LPIPS's linear weights holds it; the weights are positive, as the real ones are."""
    generator = torch.Generator().manual_seed(5)
    return {
        f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for i, channels in enumerate(LPIPS_CHANNELS)
    }


def write_weight_files(torch_home):
    """Put both files where torch.hub looks when $TORCH_HOME is `torch_home`."""
    checkpoints = torch_home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(vgg16_state(), checkpoints / VGG16_NAME)
    torch.save(lpips_state(), checkpoints / LPIPS_NAME, _use_new_zipfile_serialization=False)  # as the published one


def plain_vgg16(images, dtype=torch.float64):
    """Outputs of all 31 layers of `features` with the weights of `vgg16_state`, one operation after the other."""
    outputs, state = [], vgg16_state()
    for layer in VGG16_LAYERS:
        if layer == "M":
            outputs.append(F.max_pool2d(images, 2))
        else:
            name = f"features.{len(outputs)}"
            weight, bias = state[f"{name}.weight"].to(dtype), state[f"{name}.bias"].to(dtype)
            outputs.append(F.conv2d(images, weight, bias, padding=1))
            outputs.append(outputs[-1].clamp(min=0))
        images = outputs[-1]
    return outputs
