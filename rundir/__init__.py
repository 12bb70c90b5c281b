"""The run directory, which training writes and everything else opens."""

from pathlib import Path


def find_run(path):
    """The run in `path`: a `Run` or a `DiffusionRun`. Raises `UserError` where there is none."""
    from rundir.diffusion_run import DiffusionRun
    from rundir.run import Run

    path = Path(path)
    file = path if path.is_file() else path / DiffusionRun.config_file
    return (DiffusionRun if file.is_file() and file.name == DiffusionRun.config_file else Run).open(path)


def load_model(path, device="cpu"):
    """The trained model in `path`, in eval mode: `ObjectDLP`, `ObjectDynamicsDLP` or `DiffuseDDLP`.

    path: any run directory, released folder or DiffuseDDLP directory. Raises `UserError` where there is no model.
    """
    return find_run(path).load_model(device=device)
