"""SSIM, PSNR and LPIPS of predicted images, per image."""

import torch

from configs.schema import METRICS
from utils.errors import UserError
from utils.legal import check_choice


def _piqa_metric(name):
    """The piqa module called "ssim", "psnr" or "lpips": two batches of images to one value per image."""
    import piqa  # imports torchvision, which takes seconds

    from utils.pretrained import load_lpips

    if name == "lpips":
        return load_lpips()
    return {"ssim": piqa.SSIM, "psnr": piqa.PSNR}[name](reduction="none")


_SMALLEST_SIDES = {"lpips": 16, "ssim": 11, "psnr": 1}  # pixels, for VGG-16's four poolings and SSIM's window
_IMAGES_AT_ONCE = 32  # LPIPS keeps about 16 MB of features per pair of 128 x 128 images


class ImageMetrics:
    """Similarity of predicted to true images: `ImageMetrics(metrics, device)(prediction, target)`.

    Names are "ssim" (Wang et al. 2004; 11 x 11 Gaussian window, sigma 1.5; -1..1, 1 is best), "psnr" (decibels; at most
    80, piqa adds 1e-8 to the mean squared error) and "lpips" (Zhang et al. 2018, version 0.1 on VGG-16 features; 0 is
    best). Raises `UserError` for an unknown name; "lpips" as `utils.pretrained.load_lpips` does.
    """

    def __init__(self, metrics=("ssim", "psnr", "lpips"), device=torch.device("cpu")):  # noqa: B008 (immutable)
        _check_names(metrics)
        self.device, self.modules = torch.device(device), {}
        for name in metrics:
            self.add(name)

    def add(self, name):
        """One more metric."""
        self.modules[name] = _piqa_metric(name).to(self.device)

    @torch.no_grad()
    def __call__(self, prediction, target):
        """Return `{name: tensor [N]}`, float32, on the metrics' device, in the order the metrics were named.

        prediction, target: `[N, 3, H, W]` on any device, values clamped to 0..1. Raises `ValueError` where the shapes
        are not these, and `UserError` for images too small for a metric (SSIM 11 x 11, LPIPS 16 x 16 pixels) and for
        NaN.
        """
        self._check_shapes(prediction, target)
        images = [_to_unit_range(name, value, self.device) for name, value in _named(prediction, target)]
        chunks = list(zip(*(batch.split(_IMAGES_AT_ONCE) for batch in images), strict=True))
        return {name: torch.cat([module(*chunk) for chunk in chunks]) for name, module in self.modules.items()}

    def _check_shapes(self, prediction, target):
        for name, images in _named(prediction, target):
            if images.dim() != 4 or images.shape[1] != 3:
                raise ValueError(f"{name} has shape {list(images.shape)}; legal: [N, 3, H, W]")
        if prediction.shape != target.shape:
            shapes = f"{list(prediction.shape)} and {list(target.shape)}"
            raise ValueError(f"prediction and target have shapes {shapes}; legal: equal ones")
        height, width = prediction.shape[-2:]
        for name in self.modules:
            side = _SMALLEST_SIDES[name]
            if min(height, width) < side:
                raise UserError(f"{name}: images are {height} x {width} pixels; legal: at least {side} x {side}")


def available_metrics(metrics=("ssim", "psnr", "lpips"), device=torch.device("cpu")):  # noqa: B008 (immutable)
    """Which of these metrics can be computed here: `(the ImageMetrics of those, messages)`.

    messages: one line for each of the others, saying which weight file is missing or unreadable and what to do. Missing
    files are downloaded if that is possible. Raises `UserError` for an unknown name.
    """
    _check_names(metrics)
    images, messages = ImageMetrics((), device), []
    for name in metrics:
        try:
            images.add(name)
        except UserError as error:
            messages.append(f"{name} is left out: {error}")
    return images, messages


def _check_names(metrics):
    for name in metrics:
        check_choice("image metric", name, METRICS)


def _named(prediction, target):
    return ("prediction", prediction), ("target", target)


def _to_unit_range(name, images, device):
    """Float32 images on `device`, clamped to 0..1 (a decoder's rounding may leave the range, which piqa refuses)."""
    images = images.to(device=device, dtype=torch.float32).clamp(0, 1)
    if images.isnan().any():
        raise UserError(f"image metrics: the {name} holds NaN; has training diverged?")
    return images
