"""What surroundings must not break: it is done as soon as anything of ours is imported."""

import os
import sys
from contextlib import suppress
from pathlib import Path


def prepare():
    _drop_unknown_backend()
    _join_other_datasets()


def _drop_unknown_backend():
    """Forget a backend of matplotlib's that is not installed here, such as a notebook's in a command that it starts.

    matplotlib could not even be imported; figures are drawn without any backend here.
    """
    if "MPLBACKEND" in os.environ and "matplotlib" not in sys.modules:
        backend = os.environ.pop("MPLBACKEND")
        import matplotlib

        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
            os.environ["MPLBACKEND"] = backend


def _join_other_datasets():
    """Let our modules of `datasets` be found beside those of an installed Hugging Face `datasets` that was imported
    first; no two have the same name."""
    other, ours = sys.modules.get("datasets"), str(Path(__file__).resolve().parents[1] / "datasets")
    if other is not None and ours not in other.__path__:
        other.__path__.append(ours)
