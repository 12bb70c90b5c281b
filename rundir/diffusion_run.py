"""The run directory of a DiffuseDDLP, ours or a published one.

`{ddmmyy_HHMMSS}_{ds}_diffuse_ddlp/` holds `diffusion_hparams.json` and `ddlp_hparams.json` (the configurations),
`{ds}_ddlp.pth` (the DDLP's weights), `latent_stats.pth` (statistics of the particles), `log.txt`, `metrics.jsonl`,
`figures/` and `saves/model.pth`, in the published layout with one more entry, `training`: what exact resuming needs
beside. It is complete: it can be moved, and does not need the DDLP's own run directory any more.
"""

import json
import shutil
from pathlib import Path

import torch

from configs.schema import DiffuseConfig
from models import DiffuseDDLP, ObjectDynamicsDLP
from rundir.run import Run, RunDirectory, checked_entries, first_file, prepare_logdir, read_config
from utils import checkpoints
from utils.errors import UserError
from utils.files import atomic_write, read_json, write_json
from utils.foreign_weights import describe

DDLP_CONFIG_FILE = "ddlp_hparams.json"
STATE_ENTRIES = ("step", "model", "opt", "ema", "scaler")
EMA_PREFIX = "ema_model."


class DiffusionRun(RunDirectory):
    """A run directory of a DiffuseDDLP; see `RunDirectory` for what it shares with the others."""

    config_file = "diffusion_hparams.json"
    models = "DiffuseDDLP"
    kind = "diffuse_ddlp"
    counter = "step"
    state_file = "model.pth"

    def __init__(self, path, config, ddlp_config, is_main=True):
        super().__init__(path, config, is_main)
        self.ddlp_config = ddlp_config

    @classmethod
    def create(cls, config, ddlp_config, accelerator, ddlp_weights, normalization, identity, parent="."):
        """A new directory, its name shared by all processes, with a copy of the file `ddlp_weights`, the statistics of
        the fitted `ParticleNormalization`, and the dict `identity` of what particles these are of."""
        if not Path(ddlp_weights).is_file():
            raise UserError(f"{ddlp_weights}: no such checkpoint file")
        run = cls(parent, config, ddlp_config, accelerator.is_main_process)
        run.path = Path(prepare_logdir(run.name, parent, accelerator))
        run.save_config(config)
        if run.is_main:
            write_json(run.path / DDLP_CONFIG_FILE, ddlp_config.to_dict())
            with atomic_write(run.path / f"{config.ds}_ddlp.pth") as temporary:
                shutil.copyfile(ddlp_weights, temporary)
            checkpoints.save(normalization.state_dict(), run.stats_path)
            write_json(run.identity_path, identity)
        accelerator.wait_for_everyone()
        return run

    @classmethod
    def open(cls, path, is_main=True):
        """The run in an existing directory, ours or a published one. path: as of `locate`."""
        path, state = cls.locate(path)
        file = path / cls.config_file
        hparams = read_json(file)
        config = DiffuseConfig.from_dict(hparams, where=str(file))
        if "mask_samples" not in hparams:  # a published run
            config = config.replace(mask_samples=False)
        run = cls(path, config, find_ddlp_config(config, path), is_main)
        run.opened_state = state
        return run

    def save_config(self, config):
        super().save_config(config.replace(result_dir=None))

    # -------------------------------------------------------------------------------------------------------- paths

    @property
    def stats_path(self):
        return self.path / "latent_stats.pth"

    @property
    def identity_path(self):
        """The file that says what particles the statistics are of."""
        return self.stats_path.with_suffix(".json")

    def ddlp_weights_path(self):
        """The file of the DDLP's weights; `UserError` if there is none."""
        return find_ddlp_weights(self.config, self.ddlp_config, self.path)

    # ------------------------------------------------------------------------------------------------------- models

    def load_ddlp(self, device="cpu"):
        """The DDLP with its weights, frozen and in evaluation mode."""
        ddlp = ObjectDynamicsDLP.from_config(self.ddlp_config)
        checkpoints.load_weights(ddlp, self.ddlp_weights_path())
        return ddlp.to(device).eval().requires_grad_(False)

    def load_model(self, device="cpu", checkpoint=None):
        """The `DiffuseDDLP` with its moving average's weights, its statistics and its DDLP, in evaluation mode.

        checkpoint: a file like saves/model.pth, instead of that. Raises `UserError` that names every file that is
        missing, or what does not fit.
        """
        path = self.state_path if checkpoint is None else Path(checkpoint)
        files = {"the DDLP's weights": ddlp_weights_candidates(self.config, self.ddlp_config, self.path)}
        files |= {"the statistics of its particles": [self.stats_path], "the diffusion's weights": [path]}
        missing = [f"{what} {paths[0]}" for what, paths in files.items() if not any(map(Path.is_file, paths))]
        if missing:
            raise UserError(f"{self.path}: files are missing: {', '.join(missing)}")
        model = DiffuseDDLP.from_config(self.config, self.ddlp_config, self.load_ddlp())
        self.load_stats(model.normalization)
        load_average(model.diffusion, path)
        return model.to(device).eval()

    # -------------------------------------------------------------------------------------------------------- state

    def load_stats(self, normalization, identity=None):
        """Load latent_stats.pth into a `ParticleNormalization`.

        identity: what its particles must be of; `UserError` if they are not, as far as the directory says.
        """
        found = read_json(self.identity_path) if identity and self.identity_path.is_file() else {}
        if not isinstance(found, dict):
            raise UserError(f"{self.identity_path}: not a JSON object")
        for name, expected in (identity or {}).items():
            if found.get(name, expected) != expected:
                raise UserError(
                    f"{self.identity_path}: the statistics are of other particles: {name} is"
                    f" {json.dumps(found[name])}, here {json.dumps(expected)}; legal: those of the run's own DDLP and"
                    " training set"
                )
        checkpoints.load_weights(normalization, self.stats_path)

    def save_state(self, state):
        """Save what training goes on from, a dict as `TrainingLoop.save_state` makes it: the published entries, and
        all else in `training`."""
        if not self.is_main:
            return
        ema = {**state["ema"]}
        ema["initted"], ema["step"] = ema["initted"].reshape(1).float(), ema["step"].reshape(1).long()
        published = {
            "step": state["progress"]["iteration"],
            "model": state["model"],
            "opt": state["optimizer"],
            "ema": ema,
            "scaler": None,
        }
        others = {name: value for name, value in state.items() if name not in ("model", "optimizer", "ema")}
        self.write_state({**published, "training": others}, published["step"])

    def load_state(self):
        """What `save_state` saved; of a published directory, which has less, the weights, the optimiser, the moving
        average and the iteration."""
        path = self.opened_state or self.state_path
        state = checked_state(self.read_state(), path)
        others = state.get("training", {"progress": {"iteration": state["step"]}})
        if not isinstance(others, dict):
            raise UserError(f"{path}: not a model.pth of DiffuseDDLP: its training is {describe(others)}")
        entries = {"model": state["model"], "optimizer": state["opt"], "ema": state["ema"], **others}
        return checked_entries(entries, path)


def checked_state(state, path):
    """The contents of a file like saves/model.pth, on the CPU, the ema's `initted` and `step` as scalars; `UserError`
    that names what is wrong."""
    lacking = [name for name in STATE_ENTRIES if not isinstance(state, dict) or name not in state]
    if lacking:
        raise UserError(f"{path}: not a model.pth of DiffuseDDLP: lacks {', '.join(lacking)}")
    if not isinstance(state["ema"], dict):
        raise UserError(f"{path}: not a model.pth of DiffuseDDLP: its ema is {describe(state['ema'])}")
    ema = dict(state["ema"])
    for name, kind in (("initted", torch.bool), ("step", torch.int64)):
        if name not in ema or not torch.is_tensor(ema[name]) or ema[name].numel() != 1:
            raise UserError(f"{path}: not a model.pth of DiffuseDDLP: its ema lacks {name}, one number")
        ema[name] = ema[name].reshape(()).to(kind)
    return {**state, "ema": ema}


def load_average(diffusion, path):
    """Load the moving average of the weights in a file like saves/model.pth; `UserError` if there is none that fits."""
    ema = checked_state(checkpoints.load(path), path)["ema"]
    weights = {name.removeprefix(EMA_PREFIX): ema[name] for name in ema if name.startswith(EMA_PREFIX)}
    checkpoints.insert_weights(diffusion, weights, f"{path} (ema)")


def find_ddlp_config(config, folder=None):
    """The `Config` of the DDLP that a `DiffuseConfig` names.

    folder: the run directory, if there is one already: what lies in it comes first. Then paths are relative to the
    working directory, then to `folder`. Raises `UserError` that names where it was looked for.
    """
    candidates = [] if folder is None else [folder / DDLP_CONFIG_FILE]
    candidates += [path / Run.config_file for path in _places(config.ddlp_dir, folder)]
    return read_config(first_file(candidates, f"{folder or config.ddlp_dir}: no configuration of the DDLP"))


def find_ddlp_weights(config, ddlp_config, folder=None):
    """The file of the DDLP's weights, looked for as by `find_ddlp_config`: `ddlp_ckpt`, or else the best in
    `ddlp_dir`."""
    candidates = ddlp_weights_candidates(config, ddlp_config, folder)
    return first_file(candidates, f"{folder or config.ddlp_dir}: no weights of the DDLP")


def ddlp_weights_candidates(config, ddlp_config, folder=None):
    """Where `find_ddlp_weights` looks, in this order."""
    candidates = []
    if folder is not None:
        names = [f"{config.ds}_ddlp.pth", f"{ddlp_config.ds}_ddlp{ddlp_config.run_prefix}.pth"]
        names += [Path(config.ddlp_ckpt).name] if config.ddlp_ckpt else []
        candidates = [folder / name for name in dict.fromkeys(names)]
    if config.ddlp_ckpt:
        return candidates + _places(config.ddlp_ckpt, folder)
    for path in _places(config.ddlp_dir, folder):
        candidates += Run(path, ddlp_config, "ddlp").weights_candidates()
    return candidates


def _places(path, folder):
    """Where a configuration's path may be: relative to the working directory, and to the run directory."""
    return list(dict.fromkeys([Path(path)] if folder is None else [Path(path), folder / path]))
