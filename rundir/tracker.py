"""A run's numbers, figures and animations in an experiment tracker: TensorBoard, Weights & Biases or trackio."""

import importlib
import json
import re

from PIL import Image

from utils.errors import UserError

PROJECT = "ddlp"


def check_tracker(name):
    """`UserError` where the library of the tracker, a key's value, is not installed."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"tracker is {name}, which is not installed; legal: pip install {name}, or null") from error


class Tracker:
    """Hands on, by accelerate's trackers, what a `RunDirectory` writes; on the main process alone.

    run: which goes on at iteration `step`, 0 for a new one. TensorBoard's files lie in `tensorboard` in its directory.
    """

    def __init__(self, name, run, accelerator, step):
        self.name, self.accelerator, self.pending = name, accelerator, {}
        config = run.config.to_dict()
        again = {"name": run.path.resolve().name, "resume": "allow", "config": config}
        options = {
            "tensorboard": {"purge_step": step + 1 if step else None},
            "wandb": {**again, "id": again["name"], "dir": str(run.path)},
            "trackio": again,
        }
        accelerator.log_with = [name]
        accelerator.project_configuration.logging_dir = str(run.path)
        project = "tensorboard" if name == "tensorboard" else PROJECT
        accelerator.init_trackers(project, init_kwargs={name: options[name]})
        if name == "tensorboard" and not step:
            accelerator.log({"configuration": f"```\n{json.dumps(config, indent=2)}\n```"}, 0)

    def add_file(self, path):
        """Keep a figure, or an animation as GIF or MP4, for the next record. Its name is the file's without numbers at
        its ends, so that those of all epochs are shown as one."""
        self.pending[re.sub(r"^e\d+_|_\d+(?=_|$)", "", path.stem)] = path

    def record(self, values, step):
        """Hand on a dict of numbers, and what was kept before it, as of iteration `step`."""
        self.accelerator.log(values, step)
        hand_on = self._add_to_tensorboard if self.name == "tensorboard" else self._log_file
        for name, path in self.pending.items():
            hand_on(name, path, step)
        self.pending = {}

    def _add_to_tensorboard(self, name, path, step):
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as image:
            width, height = image.size
        # The file as it is, so that a GIF moves.
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        writer = self.accelerator.get_tracker(self.name, unwrap=True)
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        writer.flush()

    def _log_file(self, name, path, step):
        library = importlib.import_module(self.name)
        kind = library.Video if path.suffix in (".gif", ".mp4") else library.Image
        self.accelerator.log({name: kind(str(path))}, step)
