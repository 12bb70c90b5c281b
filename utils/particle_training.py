"""What training DLPv2 and DDLP has in common: half of the task, and the command."""

import argparse
from functools import cached_property

import torch

from datasets.episodes import scaled
from eval.image_metrics import available_metrics
from utils import checkpoints
from utils.config import Config, overrides_from
from utils.errors import UserError
from utils.loss_functions import VGGDistance
from utils.run import MODELS, Run
from utils.training import RESUMABLE, Task, Trainer, add_training_arguments, make_accelerator, resumed_config

FIGURE_ITEMS = 8  # training items that the figures show, at most


class ParticleTask(Task):
    """A model of `utils.run.MODELS` (by `kind`) that is trained by its ELBO."""

    bar = ("loss", "loss_rec", "kl", "psnr", "visible", "beta_a", "beta_b", "scale")

    def __init__(self, config, accelerator):
        self.config, self.accelerator = config, accelerator
        metrics = config.metrics if config.eval_im_metrics else ()
        self.recon_loss_func = None
        if config.recon_loss_type == "vgg":
            from utils.pretrained import ensure_weight_files, missing_weight_files

            if missing_weight_files(recon_loss_type="vgg"):
                ensure_weight_files(metrics, "vgg")  # one message for all that is missing
            self.recon_loss_func = VGGDistance(device=accelerator.device)
        # Training goes on without the metrics that cannot be had here.
        self.metrics, self.notes = available_metrics(metrics)

    def build_model(self):
        return MODELS[self.kind].from_config(self.config)

    def elbo_options(self):
        """The keyword arguments that every model's `calc_elbo` and every evaluation of it take."""
        config = self.config
        return {
            "beta_kl": config.beta_kl,
            "beta_rec": config.beta_rec,
            "kl_balance": config.kl_balance,
            "recon_loss_type": config.recon_loss_type,
            "recon_loss_func": self.recon_loss_func,
        }

    def evaluation_options(self, run):
        """The keyword arguments of the validation ELBO's functions."""
        config = self.config
        return {
            **self.elbo_options(),
            "batch_size": config.batch_size,
            "device": self.accelerator.device,
            "save_image": True,
            "fig_dir": run.figures,
            "topk": config.topk,
            "iou_thresh": config.iou_thresh,
            "accelerator": self.accelerator,
        }

    def metric_options(self, run):
        """The keyword arguments of the image metrics' functions, beside the first three."""
        return {
            "eval_dir": run.path,
            "metrics": self.metrics,
            "batch_size": self.config.batch_size,
            "accelerator": self.accelerator,
        }

    def figure_items(self):
        """The first items of the training set, stacked: [n, ...]."""
        return scaled(self._figure_items.to(self.accelerator.device))

    @cached_property
    def _figure_items(self):
        # Kept: finding all files of a data set again takes seconds.
        items = self.train_set()
        return torch.stack([items[i][0] for i in range(min(FIGURE_ITEMS, len(items)))])


def health(output):
    """What tells a healthy run from a sick one: particles visible per image, mean Beta a and b, mean glimpse scale."""
    return {
        "visible": (output["obj_on"] > 0.5).float().sum(-1).mean(),
        "beta_a": output["obj_on_a"].mean(),
        "beta_b": output["obj_on_b"].mean(),
        "scale": torch.sigmoid(output["z_scale"]).mean(),
    }


def train(task_class, description, arguments=None):
    """The training command of a `ParticleTask`. description: of the command, for its help; arguments: default
    `sys.argv`."""
    args = parse_arguments(description, arguments)
    overrides = overrides_from(args)
    run = Run.open(args.resume) if args.resume else None
    if run:
        if run.kind != task_class.kind:
            raise UserError(f"{run.path} is a run of kind {run.kind}; this command goes on with kind {task_class.kind}")
        config = resumed_config(run, overrides, RESUMABLE)
    else:
        config = Config.load(args.dataset).replace("command line", **overrides)
    accelerator = make_accelerator(config.device)
    trainer = Trainer(task_class(config, accelerator), config, accelerator, resume_command(task_class, accelerator))
    if run:
        run.is_main = accelerator.is_main_process
        trainer.resume(run)
        run.save_config(config)
    else:
        if config.load_model:
            checkpoints.load_weights(trainer.bare_model, config.pretrained_path)
        run = Run.create(config, task_class.kind, accelerator)
    trainer.fit(run)


def parse_arguments(description, arguments=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s (-d NAME | --resume RUN_DIR) [--KEY VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-d", "--dataset", metavar="NAME", help="a name in configs/, or a path ending in .json")
    add_training_arguments(parser, Config)
    args = parser.parse_args(arguments)
    if (args.dataset is None) == (args.resume is None):
        parser.error("give either -d/--dataset (a new run) or --resume (a run to go on with)")
    return args


def resume_command(task_class, accelerator):
    """What to type, with the run directory behind it, to go on with a run."""
    script = f"train_{task_class.kind}"
    if accelerator.num_processes == 1:
        return f"python {script}.py --resume"
    return f"accelerate launch --config_file ./accel_conf.yml {script}_accelerate.py --resume"
