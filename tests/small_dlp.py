"""A small DLPv2 and images for it."""

import math

import torch
import torch.nn.functional as F

from models import ObjectDLP
from tests import golden

ARGUMENTS = golden.case("dlp")["arguments"]  # 32 pixels, glimpses of 8, 16 patches, 8 proposals, 5 particles


def build(seed=0, dtype=torch.float32, **changes):
    """A small model in evaluation mode, whose weights are large enough for every input to matter."""
    torch.manual_seed(seed)
    model = ObjectDLP(**{**ARGUMENTS, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def images(*leading, channels=3, size=32, seed=1, dtype=torch.float32):
    """Smooth random images in 0..1, as many as `leading` says."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(math.prod(leading), channels, size // 4, size // 4, generator=generator)
    fine = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
    return fine.view(*leading, channels, size, size).to(dtype)
