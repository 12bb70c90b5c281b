"""The run directory: what training writes, and what everything else starts from.

`{ddmmyy_HHMMSS}_{ds}_{kind}{run_prefix}/` holds `hparams.json` (the configuration), `log.txt`, `metrics.jsonl` (one
line per epoch), `figures/` and `saves/`: weights `{ds}_{kind}{run_prefix}.pth`, `..._best.pth`, `..._best_lpips.pth`,
and `training_state.pt`, from which training goes on. Released folders (`hparams.json` beside the weights) open too.
"""

import json
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list

from models import ObjectDLP, ObjectDynamicsDLP
from utils import checkpoints
from utils.config import Config, read_json
from utils.errors import UserError
from utils.files import replacing
from utils.plotting import save_image

MODELS = {"dlp": ObjectDLP, "ddlp": ObjectDynamicsDLP}


class Run:
    """A run directory. Only the main process writes; on the others every writing method does nothing."""

    def __init__(self, path, config, kind, is_main=True):
        self.path, self.config, self.kind, self.is_main = Path(path), config, kind, is_main

    @classmethod
    def create(cls, config, kind, accelerator, parent="."):
        """A new directory for a run of `kind` ("dlp" or "ddlp"), its name shared by all processes."""
        run = cls(parent, config, kind, accelerator.is_main_process)
        run.path = Path(prepare_logdir(run.name, parent, accelerator))
        run.save_config(config)
        return run

    @classmethod
    def open(cls, path, is_main=True):
        """The run in an existing directory, ours or a released one."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory")
        hparams = read_json(path / "hparams.json")
        config = Config.from_dict(hparams, where=str(path / "hparams.json"))
        if "depth_logvar_from_mean" not in hparams:  # a released run
            config = config.replace(depth_logvar_from_mean=True)
        kinds = [kind for kind in MODELS if any(path.rglob(f"{config.ds}_{kind}*.pth"))]
        kinds = kinds or [kind for kind in MODELS if f"_{config.ds}_{kind}" in path.resolve().name]
        if not kinds:
            raise UserError(f"{path}: holds no weights {config.ds}_KIND*.pth, KIND one of {', '.join(MODELS)}")
        return cls(path, config, kinds[0], is_main)

    # ------------------------------------------------------------------------------------------------------ reading

    @property
    def name(self):
        """{ds}_{kind}{run_prefix}"""
        return f"{self.config.ds}_{self.kind}{self.config.run_prefix}"

    @property
    def figures(self):
        return self.path / "figures"

    @property
    def state_path(self):
        return self.path / "saves" / "training_state.pt"

    @property
    def metrics_path(self):
        return self.path / "metrics.jsonl"

    def weights_path(self, which=""):
        """The file of weights: which "" (last), "_best" (validation loss) or "_best_lpips"."""
        return self.path / "saves" / f"{self.name}{which}.pth"

    def find_weights(self, checkpoint=None, use_last=False):
        """The file to load: `checkpoint` if given, else the best by LPIPS (unless `use_last`), else the last."""
        if checkpoint is not None:
            return Path(checkpoint)
        candidates = [self.weights_path()] if use_last else [self.weights_path("_best_lpips"), self.weights_path()]
        # A released folder holds its weights beside hparams.json.
        candidates += [self.path / path.name for path in candidates]
        for path in candidates:
            if path.is_file():
                return path
        raise UserError(f"{self.path}: no weights; looked for {', '.join(str(path) for path in candidates)}")

    def load_model(self, checkpoint=None, use_last=False, device="cpu"):
        """The run's model with its weights (`find_weights` says which), in eval mode."""
        model = MODELS[self.kind].from_config(self.config)
        checkpoints.load_weights(model, self.find_weights(checkpoint, use_last))
        return model.to(device).eval()

    def records(self):
        """The lines of metrics.jsonl: a list of dicts, one per epoch."""
        if not self.metrics_path.exists():
            return []
        return [json.loads(line) for line in self.metrics_path.read_text().splitlines()]

    # ------------------------------------------------------------------------------------------------------ writing

    def save_config(self, config):
        self.config = config
        if self.is_main:
            save_config(self.path, config.to_dict())

    def log(self, line):
        """Append a line to log.txt."""
        if self.is_main:
            log_line(self.path, line)

    def record(self, values):
        """Add an epoch's numbers to metrics.jsonl, in place of any record of that epoch or of a later one."""
        if not self.is_main:
            return
        kept = [record for record in self.records() if record["epoch"] < values["epoch"]]
        with replacing(self.metrics_path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in [*kept, values]))

    def save_figure(self, name, image):
        """Write an image tensor [3, H, W] to figures/`name`.jpg."""
        if self.is_main:
            save_image(image, self.figures / f"{name}.jpg")

    def save_weights(self, state_dict, which=""):
        if self.is_main:
            checkpoints.save(state_dict, self.weights_path(which))

    def save_state(self, state):
        if self.is_main:
            checkpoints.save(state, self.state_path)

    def load_state(self):
        """The training state to go on from."""
        if not self.state_path.is_file():
            raise UserError(f"{self.path}: cannot be resumed: no {self.state_path.relative_to(self.path)} in it")
        return checkpoints.load(self.state_path)


def prepare_logdir(runname, src_dir="./", accelerator=None):
    """Make the directory `{src_dir}/{ddmmyy_HHMMSS}_{runname}` with `figures` and `saves` in it, once for all
    processes. Returns its path, a string."""
    path = [None]
    if accelerator is None or accelerator.is_main_process:
        path = [_new_directory(runname, Path(src_dir))]
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(path)
    return path[0]


def _new_directory(runname, parent):
    while True:
        path = parent / f"{time.strftime('%d%m%y_%H%M%S')}_{runname}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # of another run, started in the same second
            time.sleep(1)
            continue
        except OSError as error:
            raise UserError(f"{path}: the run directory cannot be made: {error.strerror}") from error
        (path / "figures").mkdir()
        (path / "saves").mkdir()
        return str(path)


def log_line(src_dir, line):
    """Append a line to `{src_dir}/log.txt`."""
    with open(Path(src_dir) / "log.txt", "a") as file:
        file.write(line.rstrip("\n") + "\n")


def save_config(src_dir, hparams):
    """Write `{src_dir}/hparams.json`. hparams: a dict."""
    with replacing(Path(src_dir) / "hparams.json") as temporary:
        temporary.write_text(json.dumps(hparams, indent=2) + "\n")


def get_config(fpath):
    """The dict in a JSON configuration file."""
    return read_json(fpath)
