"""Weight files: which ones are needed, how they are had, and what is said when they are not to be had or broken."""

import hashlib
import http.server
import socket
import sys
import threading
import urllib.error

import pytest
import torch
from torchvision.models import vgg16

from tests.pretrained_weights import LPIPS_NAME, VGG16_NAME, lpips_state, plain_vgg16, vgg16_state
from utils import pretrained
from utils.errors import UserError
from utils.pretrained import (
    MissingWeightsError,
    WeightFile,
    ensure_weight_files,
    load_lpips,
    load_vgg16_features,
    missing_weight_files,
)


@pytest.fixture
def full_cache(torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _refuse_connection)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network; returns the directory of the weight files, which does not exist yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _refuse_connection)
    return tmp_path / "hub" / "checkpoints"


def _refuse_connection(url, *arguments, **options):
    raise urllib.error.URLError(OSError(101, "Network is unreachable"))


def test_files_made_here_have_the_names_and_shapes_of_torchvision():
    with torch.device("meta"):
        expected = {name: value.shape for name, value in vgg16().state_dict().items()}
    assert {name: value.shape for name, value in vgg16_state().items()} == expected


@pytest.mark.parametrize(
    ("metrics", "recon_loss_type", "expected"),
    [
        (("ssim", "psnr"), "mse", []),
        (("ssim", "lpips"), "mse", [VGG16_NAME, LPIPS_NAME]),
        (("psnr",), "vgg", [VGG16_NAME]),
        (("lpips",), "vgg", [VGG16_NAME, LPIPS_NAME]),
    ],
)
def test_missing_files_are_those_that_are_needed(cache, metrics, recon_loss_type, expected):
    assert [file.name for file in missing_weight_files(metrics, recon_loss_type)] == expected


def test_a_file_in_the_cache_is_not_missing(cache):
    cache.mkdir(parents=True)
    (cache / LPIPS_NAME).touch()
    assert [file.name for file in missing_weight_files(("lpips",))] == [VGG16_NAME]


def test_one_message_names_every_missing_file_and_the_way_on(cache):
    with pytest.raises(MissingWeightsError) as caught:
        ensure_weight_files(("ssim", "lpips"), "vgg")
    message = str(caught.value)
    assert "\n" not in message
    expected = (
        f"{VGG16_NAME} from https://download.pytorch.org/models/{VGG16_NAME}",
        f"{LPIPS_NAME} from https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
        f"put them in {cache},",
        "Network is unreachable",
        "--metrics ssim psnr and --recon_loss_type mse",
    )
    assert [part for part in expected if part not in message] == []


@pytest.mark.parametrize(
    ("load", "named", "unnamed"),
    [
        (load_lpips, "--metrics ssim psnr", "--recon_loss_type"),
        (load_vgg16_features, "--recon_loss_type mse", "--metrics"),
    ],
)
def test_the_way_on_fits_what_was_asked_for(cache, load, named, unnamed):
    with pytest.raises(MissingWeightsError) as caught:
        load()
    assert named in str(caught.value) and unnamed not in str(caught.value)


def test_nothing_is_downloaded_without_need(cache):
    ensure_weight_files(("ssim", "psnr"), "mse")
    assert not cache.exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine for the files of the returned directory, and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(served))

        def log_message(self, *arguments):
            """Keep quiet."""

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        _serve_from(monkeypatch, running.server_address[1], served)
        yield served
        running.shutdown()
        thread.join()


def _serve_from(monkeypatch, port, served):
    """Point both weight files at this port; the backbone's contents are given, and checked by their hash."""
    contents = b"backbone"
    (served / VGG16_NAME).write_bytes(contents)
    prefix = hashlib.sha256(contents).hexdigest()[:8]
    monkeypatch.setattr(pretrained, "VGG16_FILE", WeightFile(f"http://127.0.0.1:{port}/{VGG16_NAME}", prefix))
    monkeypatch.setattr(pretrained, "LPIPS_FILE", WeightFile(f"http://127.0.0.1:{port}/{LPIPS_NAME}"))


def test_missing_files_are_downloaded(server):
    (server / LPIPS_NAME).write_bytes(b"linear")
    ensure_weight_files(("lpips",))
    assert pretrained.VGG16_FILE.path.read_bytes() == b"backbone"
    assert pretrained.LPIPS_FILE.path.read_bytes() == b"linear"
    assert socket.getdefaulttimeout() is None


def test_only_what_cannot_be_downloaded_is_missing(server):
    with pytest.raises(MissingWeightsError) as caught:
        ensure_weight_files(("lpips",))
    assert "404" in str(caught.value) and f"/{LPIPS_NAME} " in str(caught.value)
    assert VGG16_NAME not in str(caught.value)


def test_a_download_with_the_wrong_hash_is_not_kept(server):
    (server / VGG16_NAME).write_bytes(b"a login page of the network instead")
    with pytest.raises(MissingWeightsError, match="invalid hash value"):
        ensure_weight_files(recon_loss_type="vgg")
    assert list(pretrained.VGG16_FILE.path.parent.iterdir()) == []


def test_a_silent_server_does_not_hang_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(pretrained, "DOWNLOAD_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{VGG16_NAME}"
        monkeypatch.setattr(pretrained, "VGG16_FILE", WeightFile(url))
        give_up = threading.Timer(10, silent.close)  # resets the connection, which is another error than a time-out
        give_up.start()
        with pytest.raises(MissingWeightsError, match="timed out"):
            ensure_weight_files(recon_loss_type="vgg")
        give_up.cancel()
    assert socket.getdefaulttimeout() is None


class _Command:
    """Pickles as a call that, on loading, adds a module to sys.modules: what a malicious file might do."""

    def __reduce__(self):
        return exec, ("import sys; sys.modules['injected_by_a_weight_file'] = sys",)


def _saved(state, path, legacy):
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


def _broken_contents(path):
    """Name: bytes that no weight file may hold."""
    zipped, legacy = _saved(lpips_state(), path, legacy=False), _saved(lpips_state(), path, legacy=True)
    return {
        "empty": b"",
        "web page": b"<!DOCTYPE html><html>404</html>",
        "truncated zip": zipped[: len(zipped) // 2],
        "truncated pickle": legacy[:-1],
        "zeros": bytes(2000),
        "other names": _saved({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path, legacy=False),
        "a list": _saved([torch.zeros(3)], path, legacy=False),
        "not tensors": _saved({"epoch": 3}, path, legacy=False),
        "a command": _saved(_Command(), path, legacy=False),
    }


BROKEN = ["empty", "web page", "truncated zip", "truncated pickle", "zeros", "other names", "a list", "not tensors"]


def _assert_named_as_unreadable(load, path):
    with pytest.raises(UserError) as caught:
        load()
    assert not isinstance(caught.value, MissingWeightsError)
    assert str(path) in str(caught.value) and "delete it" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", [*BROKEN, "a command"])
@pytest.mark.parametrize("name", [VGG16_NAME, LPIPS_NAME])
def test_a_broken_file_is_named(cache, tmp_path, monkeypatch, name, broken):
    cache.mkdir(parents=True)
    (cache / name).write_bytes(_broken_contents(tmp_path / "scratch")[broken])
    load = load_vgg16_features
    if name == LPIPS_NAME:
        (cache / VGG16_NAME).touch()  # never read: the backbone is stood in for
        monkeypatch.setattr(pretrained, "_read_vgg16_features", torch.nn.Sequential)
        load = load_lpips
    _assert_named_as_unreadable(load, cache / name)
    assert "injected_by_a_weight_file" not in sys.modules


def test_swapped_files_are_named(cache):
    cache.mkdir(parents=True)
    torch.save(lpips_state(), cache / VGG16_NAME)
    torch.save(lpips_state(), cache / LPIPS_NAME)
    _assert_named_as_unreadable(load_lpips, cache / VGG16_NAME)


def test_linear_weights_of_another_network_are_named(cache, monkeypatch):
    cache.mkdir(parents=True)
    (cache / VGG16_NAME).touch()
    torch.save({name: value[:, :32] for name, value in lpips_state().items()}, cache / LPIPS_NAME)
    monkeypatch.setattr(pretrained, "_read_vgg16_features", torch.nn.Sequential)
    _assert_named_as_unreadable(load_lpips, cache / LPIPS_NAME)


def test_features_are_torchvisions_and_frozen(full_cache):
    features = load_vgg16_features()
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = plain_vgg16(images, torch.float32)
    assert len(features) == len(expected) == 31
    torch.testing.assert_close(features(images), expected[-1], rtol=1e-4, atol=1e-4)
    assert not features.training
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_loading_leaves_the_random_state_alone(full_cache):
    before = torch.get_rng_state()
    load_lpips()
    assert torch.equal(torch.get_rng_state(), before)


def test_lpips_is_frozen(full_cache):
    lpips = load_lpips()
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert [weights.numel() for weights in lpips.weights] == [64, 128, 256, 512, 512]
