"""The pretrained weight files behind the VGG loss and the LPIPS metric.

Both need torchvision's VGG-16, LPIPS also its own linear weights; both files are looked for in
`torch.hub.get_dir()/checkpoints` (`$TORCH_HOME/hub/checkpoints`), and downloaded if they are not there. Without a
network, put them there by hand; the linear weights also come with the PyPI package lpips, as
`lpips/weights/v0.1/vgg.pth`.
"""

import http.client
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import piqa.lpips
import torch
from piqa.utils.color import ImageNetNorm
from torch import nn
from torchvision.models import VGG16_Weights, vgg16

from utils.errors import UserError

DOWNLOAD_TIMEOUT = 10.0  # seconds that a connection may be silent before the download is given up


class MissingWeightsError(UserError):
    """Pretrained weight files that are neither on disk nor to be downloaded."""


class WeightFile(NamedTuple):
    """A weight file: where it comes from, and the first digits of its SHA-256 sum, where the publisher tells them."""

    url: str
    hash_prefix: str | None = None

    @property
    def name(self):
        """The file's name in the cache."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def path(self):
        """Where the file is looked for; follows `$TORCH_HOME` and `torch.hub.set_dir`."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name


VGG16_FILE = WeightFile(VGG16_Weights.IMAGENET1K_V1.url, hash_prefix="397923af")
LPIPS_FILE = WeightFile(f"{piqa.lpips.ORIGIN}/raw/master/lpips/weights/v0.1/vgg.pth")

_LPIPS_LAYERS = (3, 8, 15, 22, 29)  # the last ReLU before each pooling
_LPIPS_CHANNELS = (64, 128, 256, 512, 512)
_WITHOUT_LPIPS = "--metrics ssim psnr"
_WITHOUT_VGG_LOSS = "--recon_loss_type mse"


def required_weight_files(metrics=(), recon_loss_type="mse"):
    """The `WeightFile`s, without repetition, that these image metrics (names) and this reconstruction loss need."""
    files = [VGG16_FILE] if recon_loss_type == "vgg" or "lpips" in metrics else []
    return [*files, LPIPS_FILE] if "lpips" in metrics else files


def missing_weight_files(metrics=(), recon_loss_type="mse"):
    """Those of `required_weight_files` that are not in the cache; nothing is downloaded or read."""
    return [file for file in required_weight_files(metrics, recon_loss_type) if not os.path.isfile(file.path)]


def ensure_weight_files(metrics=(), recon_loss_type="mse"):
    """Download what `missing_weight_files` lists.

    Raises one `MissingWeightsError` that names every file that cannot be had, its URL, the directory it belongs in, and
    the options with which no such file is needed.
    """
    failures = {}
    for file in missing_weight_files(metrics, recon_loss_type):
        try:
            _download(file)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: the hash does not fit
            failures[file] = error
    if failures:
        raise MissingWeightsError(_missing_message(failures, metrics, recon_loss_type))


def _download(file):
    file.path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {file.url} to {file.path}", file=sys.stderr)
    with _socket_timeout(DOWNLOAD_TIMEOUT):
        torch.hub.download_url_to_file(file.url, str(file.path), file.hash_prefix)


@contextmanager
def _socket_timeout(seconds):
    """Sockets opened in this block give up after `seconds` of silence; torch.hub's download has no such option."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _missing_message(failures, metrics, recon_loss_type):
    """One line: files with URL and reason, directory, and how to go on without them."""
    files = "; ".join(f"{file.name} from {file.url} ({_describe(error)})" for file, error in failures.items())
    needs = {_WITHOUT_LPIPS: "lpips" in metrics, _WITHOUT_VGG_LOSS: recon_loss_type == "vgg" and VGG16_FILE in failures}
    options = " and ".join(option for option, needed in needs.items() if needed)
    directory = next(iter(failures)).path.parent
    return f"missing pretrained weights, download failed: {files}; put them in {directory}, or do without: {options}"


def _describe(error):
    """The error as one line: its class and the first line of its text."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_vgg16_features():
    """The `features` of torchvision's VGG-16 with ImageNet weights: an `nn.Sequential` of 31 layers, float32, on the
    CPU, in eval mode, without gradients for its weights.

    The random state of torch is left as it is. Raises `MissingWeightsError` (`ensure_weight_files`), and `UserError`
    for a file that cannot be read or holds something else.
    """
    ensure_weight_files(recon_loss_type="vgg")
    return _read_vgg16_features()


def load_lpips():
    """LPIPS on VGG-16 features, version 0.1, as a `piqa.LPIPS` that returns one value per image; on the CPU.

    The random state of torch is left as it is. Raises `MissingWeightsError` (`ensure_weight_files`), and `UserError`
    for a file that cannot be read or holds something else.
    """
    ensure_weight_files(metrics=("lpips",))
    return _VGGLPIPS(_read_vgg16_features(), _read_lpips_weights())


class _VGGLPIPS(piqa.LPIPS):
    """`piqa.LPIPS(network="vgg", reduction="none")` from weights that are already loaded."""

    def __init__(self, features, weights):
        nn.Module.__init__(self)  # piqa's constructor downloads, unpickles anything, and builds VGG-16's classifier too
        self.normalize = ImageNetNorm()
        self.net = piqa.lpips.Perceptual(list(features), _LPIPS_LAYERS).eval()
        self.weights = nn.ParameterList(weights)
        self.requires_grad_(False)
        self.epsilon = 1e-10
        self.reduction = "none"


def _read_vgg16_features():
    state = _read_state_dict(VGG16_FILE)
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        features = vgg16(init_weights=False).features
    weights = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    try:
        features.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise _unreadable(VGG16_FILE, "does not hold the weights of torchvision's VGG-16") from error
    return features.float().eval().requires_grad_(False)


def _read_lpips_weights():
    """The weight of each channel, one vector per layer of `_LPIPS_LAYERS`."""
    state = _read_state_dict(LPIPS_FILE)
    expected = {f"lin{i}.model.1.weight": (1, channels, 1, 1) for i, channels in enumerate(_LPIPS_CHANNELS)}
    if {name: tuple(value.shape) for name, value in state.items()} != expected:
        raise _unreadable(LPIPS_FILE, "does not hold the linear weights of LPIPS for VGG-16")
    return [state[name].flatten().float() for name in expected]


def _read_state_dict(file):
    try:
        state = torch.load(file.path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise almost anything
        raise _unreadable(file, f"cannot be read, it is truncated or damaged ({type(error).__name__})") from error
    if not isinstance(state, Mapping) or not all(torch.is_tensor(value) for value in state.values()):
        raise _unreadable(file, "is not a state dict")
    return state


def _unreadable(file, what):
    return UserError(f"the weight file {file.path} {what}; delete it to have it downloaded again from {file.url}")
