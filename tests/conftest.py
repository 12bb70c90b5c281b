"""What several test files share."""

import pytest

from tests.pretrained_weights import write_weight_files


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory):
    """A folder that holds VGG-16's and LPIPS's weights, made up, where torch looks if $TORCH_HOME is this folder."""
    home = tmp_path_factory.mktemp("torch_home")
    write_weight_files(home)
    return home
