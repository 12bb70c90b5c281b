"""Image metrics against numpy (PSNR), scikit-image (SSIM) and LPIPS's formula on features computed by hand."""

import urllib.error

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from eval import image_metrics
from eval.image_metrics import ImageMetrics, available_metrics
from tests.pretrained_weights import VGG16_NAME, lpips_state, plain_vgg16
from utils.errors import UserError


@pytest.fixture
def with_weights(torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))


@pytest.fixture
def without_weights(tmp_path, monkeypatch):
    """An empty cache, and no network; returns the cache's directory."""

    def refuse(url, *arguments, **options):
        raise urllib.error.URLError(OSError(101, "Network is unreachable"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def images():
    """Target and prediction `[3, 3, 32, 40]`: noise of three strengths, reaching outside 0..1 in the prediction."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 32, 40, generator=generator)
    noise = torch.randn(3, 3, 32, 40, generator=generator)
    return target + torch.tensor([0.02, 0.1, 0.5]).view(3, 1, 1, 1) * noise, target


def _numpy_pairs(prediction, target):
    return list(zip(prediction.clamp(0, 1).double().numpy(), target.double().numpy(), strict=True))


def _plain_lpips(prediction, target):
    """Zhang et al. 2018, equation 1, with the features before each pooling of VGG-16."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    layers = []
    for images in (prediction.clamp(0, 1), target):
        outputs = plain_vgg16((images.double() - mean[:, None, None]) / std[:, None, None])
        layers.append([outputs[i] / outputs[i].square().sum(1, keepdim=True).sqrt() for i in (3, 8, 15, 22, 29)])
    distance = 0.0
    for weights, first, second in zip(lpips_state().values(), *layers, strict=True):
        distance = distance + (weights.double() * (first - second).square()).sum(1).mean(dim=(1, 2))
    return distance


def test_psnr_against_numpy(images):
    values = ImageMetrics(("psnr",))(*images)["psnr"]
    expected = [10 * np.log10(1 / (np.mean((x - y) ** 2) + 1e-8)) for x, y in _numpy_pairs(*images)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_ssim_against_scikit_image(images):
    values = ImageMetrics(("ssim",))(*images)["ssim"]
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [structural_similarity(x, y, data_range=1.0, channel_axis=0, **window) for x, y in _numpy_pairs(*images)]
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_lpips_against_its_formula(images, with_weights):
    values = ImageMetrics(("lpips",))(*images)["lpips"]
    torch.testing.assert_close(values.double(), _plain_lpips(*images), rtol=1e-3, atol=1e-5)
    assert values[0] < values[1] < values[2]


def test_all_metrics_are_per_image_and_in_order(images, with_weights):
    metrics = ImageMetrics()
    together = metrics(*images)
    assert list(together) == ["ssim", "psnr", "lpips"]
    for index in range(3):
        alone = metrics(images[0][index : index + 1], images[1][index : index + 1])
        for name, value in together.items():
            torch.testing.assert_close(value[index : index + 1], alone[name], rtol=1e-4, atol=1e-5)


def test_large_batches_are_taken_in_parts(images, monkeypatch):
    whole = ImageMetrics(("ssim", "psnr"))(*images)
    monkeypatch.setattr(image_metrics, "_IMAGES_AT_ONCE", 2)
    parts = ImageMetrics(("ssim", "psnr"))(*images)
    torch.testing.assert_close(parts, whole)


def test_equal_images_and_doubles_are_fine(images, with_weights):
    target = images[1].double()
    values = ImageMetrics()(target.requires_grad_(), target)
    for name, best in (("ssim", 1.0), ("psnr", 80.0), ("lpips", 0.0)):
        torch.testing.assert_close(values[name], torch.full((3,), best), rtol=1e-5, atol=1e-5)
        assert not values[name].requires_grad


@pytest.mark.parametrize("call", [ImageMetrics, available_metrics])
def test_unknown_names_are_refused(call):
    with pytest.raises(UserError, match='"fid"; legal: "lpips" or "ssim" or "psnr"'):
        call(("psnr", "fid", "mse"))


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ((1, 1, 16, 16), (1, 1, 16, 16), r"prediction has shape \[1, 1, 16, 16\]; legal: \[N, 3, H, W\]"),
        ((3, 16, 16), (1, 3, 16, 16), "prediction has shape"),
        ((1, 3, 16, 16), (3, 16, 16), "target has shape"),
        ((1, 3, 16, 16), (2, 3, 16, 16), "equal"),
    ],
)
def test_wrong_shapes_are_refused(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        ImageMetrics(("psnr",))(torch.zeros(prediction), torch.zeros(target))


@pytest.mark.parametrize(("name", "side"), [("lpips", 16), ("ssim", 11)])
def test_images_too_small_for_a_metric_are_refused(with_weights, name, side):
    metrics = ImageMetrics((name,))
    assert metrics(*2 * [torch.zeros(1, 3, side, side)])[name].shape == (1,)
    with pytest.raises(UserError, match=f"{name}: images are {side} x {side - 1} pixels; legal: at least {side} x"):
        metrics(*2 * [torch.zeros(1, 3, side, side - 1)])


def test_nan_is_named(images):
    prediction = images[0].clone()
    prediction[1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="prediction holds NaN"):
        ImageMetrics(("psnr",))(prediction, images[1])


def test_what_is_available_without_weights(without_weights):
    usable, messages = available_metrics()
    assert list(usable.modules) == ["ssim", "psnr"]
    assert len(messages) == 1 and messages[0].startswith("lpips is left out: missing pretrained weights")
    with pytest.raises(UserError, match="missing pretrained weights"):
        ImageMetrics(("psnr", "lpips"))


def test_an_unreadable_file_makes_lpips_unavailable(without_weights):
    without_weights.mkdir(parents=True)
    for name in (VGG16_NAME, "vgg.pth"):
        (without_weights / name).write_bytes(b"")
    usable, messages = available_metrics(("lpips", "ssim"))
    assert list(usable.modules) == ["ssim"]
    assert len(messages) == 1 and str(without_weights / VGG16_NAME) in messages[0] and "delete it" in messages[0]


def test_everything_is_available_with_weights(with_weights):
    usable, messages = available_metrics(("lpips", "psnr"))
    assert (list(usable.modules), messages) == (["lpips", "psnr"], [])
