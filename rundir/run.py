"""The run directory: what training writes, and what everything else starts from.

`{ddmmyy_HHMMSS}_{ds}_{kind}{run_prefix}/` holds `hparams.json` (the configuration), `log.txt`, `metrics.jsonl` (one
line per epoch), `figures/` and `saves/`: weights `{ds}_{kind}{run_prefix}.pth`, `..._best.pth`, `..._best_lpips.pth`,
and `training_state.pt`, from which training goes on. Released folders (`hparams.json` beside the weights) open too.
"""

import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list

from configs.schema import Config
from models import ObjectDLP, ObjectDynamicsDLP
from utils import checkpoints
from utils.errors import UserError
from utils.files import atomic_write, link_or_copy, read_json, try_lock, write_json
from utils.foreign_weights import describe
from utils.plotting import save_image

# The entries of what training goes on from, as far as they are there, and of what type each is.
STATE_ENTRIES = {
    **dict.fromkeys(("model", "optimizer", "scheduler", "progress", "means", "best", "config"), dict),
    **dict.fromkeys(("items", "num_processes"), int),
}
MODELS = {"dlp": ObjectDLP, "ddlp": ObjectDynamicsDLP}


class RunDirectory:
    """What run directories of all kinds share. Only the main process writes; on the others every writing method does
    nothing."""

    config_file = "hparams.json"
    models = "DLPv2 or DDLP"
    kind = ""  # of the model
    counter = "iteration"  # what metrics.jsonl calls the number of training steps
    state_file = "training_state.pt"
    opened_state = None  # the file in saves/ that the directory was opened by, instead of its own path
    tracker = None  # the `Tracker` that is handed what is written

    def __init__(self, path, config, is_main=True):
        self.path, self.config, self.is_main = Path(path), config, is_main

    @classmethod
    def locate(cls, path):
        """The run directory that a path is of, and None; of a state in its saves/ to go on from, the directory and
        that. path: the directory, its file of the configuration, or the state. `UserError` where there is none."""
        path, state = split_state(path)
        if path.is_file() and path.name == cls.config_file:
            path = path.parent
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory; legal: a run directory, or its {cls.config_file}")
        if not (path / cls.config_file).exists():
            raise UserError(f"{path}: not a run directory of {cls.models}: no {cls.config_file} in it")
        return path, state

    @property
    def name(self):
        """{ds}_{kind}{run_prefix}"""
        return f"{self.config.ds}_{self.kind}{getattr(self.config, 'run_prefix', '')}"

    @property
    def figures(self):
        return self.path / "figures"

    @property
    def metrics_path(self):
        return self.path / "metrics.jsonl"

    def records(self):
        """The lines of metrics.jsonl, a list of dicts."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = [_record_of(line) for line in lines]
        for number, record in enumerate(records, 1):
            if record is None or self.counter not in record:
                raise UserError(f"{self.metrics_path}: line {number} is damaged; legal: without it")
        return records

    # -------------------------------------------------------------------------------------------------------- state

    @property
    def state_path(self):
        """The file of what training last saved."""
        return self.path / "saves" / self.state_file

    def earlier_states(self):
        """The files of the states that `keep` asks for, the current one among them: iteration to path, in order."""
        name, suffix = Path(self.state_file).stem, Path(self.state_file).suffix
        found = {path: path.stem.removeprefix(f"{name}_") for path in self.state_path.parent.glob(f"{name}_*{suffix}")}
        return dict(sorted((int(number), path) for path, number in found.items() if number.isdecimal()))

    def write_state(self, contents, iteration):
        """Write what training goes on from after so many iterations, and keep the last `keep` states."""
        checkpoints.save(contents, self.state_path)
        if self.divergence_path.is_file() and read_json(self.divergence_path)["iteration"] <= iteration:
            self.divergence_path.unlink()
        kept = self.earlier_states()
        if self.config.keep > 1:
            numbered = self.state_path.with_stem(f"{self.state_path.stem}_{iteration}")
            with atomic_write(numbered) as temporary:
                link_or_copy(self.state_path, temporary)
            kept[iteration] = numbered
        # Later ones are of steps that are done anew since training went on from an earlier state.
        last = [number for number in kept if number <= iteration][-self.config.keep :] if self.config.keep > 1 else []
        for number in kept.keys() - set(last):
            kept[number].unlink(missing_ok=True)

    @property
    def divergence_path(self):
        return self.state_path.with_name("not_finite.json")

    def note_divergence(self, iteration):
        """Note that what was computed was not finite any more at an iteration, until training gets beyond that."""
        if self.is_main:
            write_json(self.divergence_path, {"iteration": iteration})

    @property
    def may_change(self):
        """Keys that may change, beside the usual ones, when the run goes on: the rate where training diverged."""
        return ("lr",) if self.divergence_path.is_file() else ()

    @contextmanager
    def locked(self):
        """In this block no other process may train in the directory; `UserError` where one does."""
        if not self.is_main:
            yield
            return
        try:
            lock = try_lock(self.path / ".lock")
        except OSError:  # a file system without locks: whoever trains there twice is not told so
            yield
            return
        if lock is None:
            raise UserError(f"{self.path}: another process trains in it; legal: when that has ended")
        try:
            yield
        finally:
            lock.release()

    def check_writable(self):
        """`UserError` if training cannot write to the directory."""
        for folder in (self.path, self.state_path.parent, self.figures):
            if folder.is_dir() and not os.access(folder, os.W_OK):
                raise UserError(f"{folder}: cannot be written to; legal: a run directory that can, or a copy of it")

    def read_state(self):
        """What `write_state` wrote last, or, where the directory was opened by the path of another state, that."""
        path = self.opened_state or self.state_path
        if not path.is_file():
            raise UserError(f"{self.path}: cannot be resumed: no {path.relative_to(self.path)} in it")
        try:
            return checkpoints.load(path)
        except UserError as error:
            others = [other for other in reversed(self.earlier_states().values()) if not path.samefile(other)]
            raise UserError(f"{error}; there is also {others[0]}" if others else str(error)) from error

    def save_config(self, config):
        """Write the configuration, with absolute paths, which the run has from here on."""
        self.config = config.with_absolute_paths()
        if self.is_main:
            write_json(self.path / self.config_file, {"kind": self.kind, **self.config.to_dict()})

    def log(self, line):
        """Append a line to log.txt."""
        if self.is_main:
            log_line(self.path, line)

    def record(self, values):
        """Add a training step's numbers to metrics.jsonl, in place of any record of that step or of a later one.
        What is not finite, such as the PSNR of a perfect reconstruction, is null there."""
        if not self.is_main:
            return
        kept = [record for record in self.records() if record[self.counter] < values[self.counter]]
        with atomic_write(self.metrics_path) as temporary:
            text = "".join(json.dumps(_finite(record)) + "\n" for record in [*kept, values])
            temporary.write_text(text, encoding="utf-8")

    def hand_on(self, values):
        """Hand a training step's numbers, and the figures written before it, to the tracker, if there is one."""
        if self.tracker:
            self.tracker.record(values, values[self.counter])

    def save_figure(self, name, image):
        """Write an image tensor [3, H, W] to figures/`name`.jpg."""
        if self.is_main:
            save_image(image, self.figures / f"{name}.jpg")
            self.track(self.figures / f"{name}.jpg")

    def track(self, path):
        """Hand a figure or an animation that was written to the tracker, if there is one."""
        if self.tracker:
            self.tracker.add_file(path)


def _finite(record):
    """A dict of numbers as JSON knows them: null in place of what is not finite."""
    return {name: None if value is None or not math.isfinite(value) else value for name, value in record.items()}


class Run(RunDirectory):
    """The run directory of a DLPv2 or a DDLP."""

    def __init__(self, path, config, kind, is_main=True):
        super().__init__(path, config, is_main)
        self.kind = kind

    @classmethod
    def create(cls, config, kind, accelerator, parent="."):
        """A new directory for a run of `kind` ("dlp" or "ddlp"), its name shared by all processes."""
        run = cls(parent, config, kind, accelerator.is_main_process)
        run.path = Path(prepare_logdir(run.name, parent, accelerator))
        run.save_config(config)
        return run

    @classmethod
    def open(cls, path, is_main=True):
        """The run in an existing directory, ours or a released one. path: as of `locate`."""
        path, state = cls.locate(path)
        hparams = read_json(path / cls.config_file)
        config = config_of(hparams, path / cls.config_file)
        kind = hparams.get("kind")
        if not isinstance(kind, str) or kind not in MODELS:
            kind = find_kind(path, config)
        run = cls(path, config, kind, is_main)
        run.opened_state = state
        return run

    # ------------------------------------------------------------------------------------------------------ reading

    def weights_path(self, which=""):
        """The file of weights: which "" (last), "_best" (validation loss) or "_best_lpips"."""
        return self.path / "saves" / f"{self.name}{which}.pth"

    def find_weights(self, checkpoint=None, use_last=False):
        """The file to load: `checkpoint` if given, else the best by LPIPS (unless `use_last`), else the last."""
        if checkpoint is not None:
            return Path(checkpoint)
        return first_file(self.weights_candidates(use_last), f"{self.path}: no weights")

    def weights_candidates(self, use_last=False):
        """The files of weights that a run may have, in the order in which they are looked for."""
        paths = [self.weights_path()] if use_last else [self.weights_path("_best_lpips"), self.weights_path()]
        # A released folder holds its weights beside hparams.json.
        return paths + [self.path / path.name for path in paths]

    def load_model(self, checkpoint=None, use_last=False, device="cpu"):
        """The run's model with its weights (`find_weights` says which), in eval mode."""
        model = MODELS[self.kind].from_config(self.config)
        checkpoints.load_weights(model, self.find_weights(checkpoint, use_last))
        return model.to(device).eval()

    # ------------------------------------------------------------------------------------------------------ writing

    def save_weights(self, state_dict, which=""):
        if self.is_main:
            checkpoints.save(state_dict, self.weights_path(which))

    def save_state(self, state):
        if self.is_main:
            self.write_state(state, state["progress"]["iteration"])

    def load_state(self):
        """The training state to go on from."""
        state = self.read_state()
        if not isinstance(state, dict) or not {"model", "optimizer", "progress"} <= state.keys():
            path = self.opened_state or self.state_path
            raise UserError(f"{path}: holds {describe(state)}; legal: a state that training saved")
        return checked_entries(state, self.opened_state or self.state_path)


def checked_entries(state, path):
    """A state to go on from, a dict; `UserError` where an entry of it is not what training saves."""
    wrong = [name for name, kind in STATE_ENTRIES.items() if not isinstance(state.get(name, kind()), kind)]
    if not wrong and not {"state", "param_groups"} <= state["optimizer"].keys():
        wrong = ["optimizer"]
    if not wrong and not all(isinstance(count, int) and count >= 0 for count in state["progress"].values()):
        wrong = ["progress"]
    if wrong:
        raise UserError(f"{path}: no {' and '.join(wrong)} as training saves; legal: a state that training saved")
    return state


def _record_of(line):
    """The dict in a line of metrics.jsonl, None where there is none."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def split_state(path):
    """A run directory and None, or, of the path of a file in its saves/, both."""
    path = Path(path)
    return (path.parents[1], path) if path.is_file() and path.absolute().parent.name == "saves" else (path, None)


def read_config(path):
    """The `Config` in a run's file of it."""
    return config_of(read_json(path), path)


def config_of(hparams, path):
    """The `Config` that a run's file holds; a released run's has the published depth logvar."""
    config = Config.from_dict(hparams, where=str(path))
    return config if "depth_logvar_from_mean" in hparams else config.replace(depth_logvar_from_mean=True)


def find_kind(path, config):
    """The kind of a released run, which does not say it, by the names of its weights or else its folder's."""
    kinds = [kind for kind in MODELS if any(path.rglob(f"{config.ds}_{kind}*.pth"))]
    kinds = kinds or [kind for kind in MODELS if f"_{config.ds}_{kind}" in path.resolve().name]
    if not kinds:
        raise UserError(f"{path}: holds no weights {config.ds}_KIND*.pth, KIND one of {', '.join(MODELS)}")
    return kinds[0]


def first_file(candidates, missing):
    """The first of the paths that is a file; `UserError`, its text beginning with `missing`, if none is."""
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"{missing}; looked for {', '.join(str(path) for path in candidates)}")


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
    """Append a line to `{src_dir}/log.txt`, in UTF-8; bytes of file names that are none are written as escapes."""
    path = Path(src_dir) / "log.txt"
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line.rstrip("\n") + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def save_config(src_dir, hparams):
    """Write `{src_dir}/hparams.json`. hparams: a dict."""
    write_json(Path(src_dir) / RunDirectory.config_file, hparams)


def get_config(fpath):
    """The dict in a JSON configuration file."""
    return read_json(fpath)
