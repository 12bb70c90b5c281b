"""What several test files share."""

import os

import pytest

from tests.balls import make_data, make_run
from tests.displays import display  # noqa: F401 (a fixture, as those of the next line)
from tests.editor_models import write_assets, write_checkpoints
from tests.editor_person import at_image, at_video, person  # noqa: F401
from tests.pretrained_weights import write_weight_files


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the tests see a GPU")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers are those of the CPU, wherever the tests run
        return
    import torch

    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory):
    """A folder that holds VGG-16's and LPIPS's weights, made up, where torch looks if $TORCH_HOME is this folder."""
    home = tmp_path_factory.mktemp("torch_home")
    write_weight_files(home)
    return home


@pytest.fixture(scope="session")
def balls_data(tmp_path_factory):
    """The folder of a small balls data set (`tests.balls.make_data`)."""
    return make_data(tmp_path_factory.mktemp("balls"))


@pytest.fixture
def run(tmp_path, balls_data):
    """A run directory of a DDLP with random weights on it."""
    return make_run(tmp_path, balls_data)


@pytest.fixture
def deterministic():
    """Deterministic kernels alone, as `utils.device.choose_kernels` asks for."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small checkpoints/ and assets/ for the editor; each module's own, which may add to it."""
    folder = tmp_path_factory.mktemp("place")
    write_checkpoints(folder / "checkpoints")
    write_assets(folder / "assets")
    return folder
