"""Train DLPv2 on images: ``python train_dlp.py -d shapes``, ``python train_dlp.py --help``."""

import argparse

import torch

from eval.eval_gen_metrics import eval_dlp_im_metric
from eval.eval_model import draw_dlp, evaluate_validation_elbo, image_dataset
from eval.image_metrics import available_metrics
from models import ObjectDLP
from utils import checkpoints
from utils.config import Config, add_override_arguments, overrides_from
from utils.errors import UserError, run_command
from utils.loss_functions import VGGDistance
from utils.run import Run
from utils.training import RESUMABLE, Task, Trainer, make_accelerator, training_stage

ACCELERATE = "accelerate launch --config_file ./accel_conf.yml train_dlp_accelerate.py"


class DLPTask(Task):
    """DLPv2: one image, or with tracking one clip, per item."""

    kind = "dlp"
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
        return ObjectDLP.from_config(self.config)

    def train_set(self):
        return image_dataset(self.config, "train")

    def losses(self, model, batch, progress):
        config, x = self.config, batch[0]
        stage = training_stage(progress.epoch, config.warmup_epoch)
        output = model(x, train_enc_prior=config.train_enc_prior, **stage)
        losses = self.accelerator.unwrap_model(model).calc_elbo(
            x,
            output,
            beta_kl=config.beta_kl,
            beta_rec=config.beta_rec,
            kl_balance=config.kl_balance,
            recon_loss_type=config.recon_loss_type,
            recon_loss_func=self.recon_loss_func,
            **stage,
        )
        return {**losses, **health(output)}

    def evaluate(self, model, progress, run):
        config, device, epoch = self.config, self.accelerator.device, progress.epoch
        scores = {
            "val_loss": evaluate_validation_elbo(
                model,
                config,
                epoch,
                batch_size=config.batch_size,
                recon_loss_type=config.recon_loss_type,
                device=device,
                save_image=True,
                fig_dir=run.figures,
                topk=config.topk,
                recon_loss_func=self.recon_loss_func,
                beta_rec=config.beta_rec,
                beta_kl=config.beta_kl,
                kl_balance=config.kl_balance,
                accelerator=self.accelerator,
                iou_thresh=config.iou_thresh,
            )
        }
        if epoch > 0 and self.metrics:
            scores |= eval_dlp_im_metric(
                model,
                device,
                config,
                eval_dir=run.path,
                metrics=self.metrics,
                batch_size=config.batch_size,
                accelerator=self.accelerator,
            )
        return scores

    def figures(self, model):
        items = self.train_set()
        x = torch.stack([items[i][0] for i in range(min(8, len(items)))]).to(self.accelerator.device)
        return draw_dlp(model, x, self.config.topk, self.config.iou_thresh)


def health(output):
    """What tells a healthy run from a sick one: particles visible per image, mean Beta a and b, mean glimpse scale."""
    return {
        "visible": (output["obj_on"] > 0.5).float().sum(-1).mean(),
        "beta_a": output["obj_on_a"].mean(),
        "beta_b": output["obj_on_b"].mean(),
        "scale": torch.sigmoid(output["z_scale"]).mean(),
    }


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s (-d NAME | --resume RUN_DIR) [--KEY VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-d", "--dataset", metavar="NAME", help="a name in configs/, or a path ending in .json")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with this run, exactly where it was saved")
    add_override_arguments(parser)
    args = parser.parse_args(arguments)
    if (args.dataset is None) == (args.resume is None):
        parser.error("give either -d/--dataset (a new run) or --resume (a run to go on with)")
    return args


def resumed_config(run, overrides):
    """The configuration with which a run goes on."""
    if run.kind != DLPTask.kind:
        raise UserError(f"{run.path} is a run of kind {run.kind}; this command goes on with kind {DLPTask.kind}")
    fixed = [name for name in overrides if name not in RESUMABLE]
    if fixed:
        raise UserError(f"--{fixed[0]} cannot change when a run goes on; legal: {', '.join(RESUMABLE)}")
    return run.config.replace("command line", **overrides)


def resume_command(accelerator):
    """What to type, with the run directory behind it, to go on with a run."""
    return f"{'python train_dlp.py' if accelerator.num_processes == 1 else ACCELERATE} --resume"


def main(arguments=None):
    args = parse_arguments(arguments)
    overrides = overrides_from(args)
    run = Run.open(args.resume) if args.resume else None
    config = resumed_config(run, overrides) if run else Config.load(args.dataset).replace("command line", **overrides)
    accelerator = make_accelerator(config.device)
    trainer = Trainer(DLPTask(config, accelerator), config, accelerator, resume_command(accelerator))
    if run:
        run.is_main = accelerator.is_main_process
        trainer.resume(run)
        run.save_config(config)
    else:
        if config.load_model:
            checkpoints.load_weights(trainer.bare_model, config.pretrained_path)
        run = Run.create(config, DLPTask.kind, accelerator)
    trainer.fit(run)


if __name__ == "__main__":
    run_command(main)
