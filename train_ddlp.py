"""Train DDLP on videos: ``python train_ddlp.py -d balls``, ``python train_ddlp.py --help``."""

import torch

from datasets.episodes import scaled
from eval.eval_gen_metrics import eval_ddlp_im_metric
from eval.eval_model import (
    animate_trajectory_ddlp,
    draw_ddlp,
    evaluate_validation_elbo_dyn,
    first_frames,
    video_dataset,
)
from utils.errors import run_command
from utils.particle_training import ParticleTask, health, train
from utils.training import training_stage

ANIMATIONS = 5  # per evaluation


class DDLPTask(ParticleTask):
    """DDLP: a clip of T + 1 frames per item."""

    kind = "ddlp"
    bar = (*ParticleTask.bar, "kl_dyn")

    def train_set(self):
        # What evaluation will need is looked for before training starts.
        needed = max(self.config.animation_horizon, self.config.timestep_horizon + 1)
        first_frames(video_dataset(self.config, "val", needed)[0], needed)
        return video_dataset(self.config, "train", self.config.timestep_horizon + 1, as_uint8=True)

    def losses(self, model, batch, progress):
        config, x = self.config, scaled(batch[0])
        stage = training_stage(progress.epoch, config.warmup_epoch)
        with_dynamics = progress.epoch >= config.start_dyn_epoch
        bare = self.accelerator.unwrap_model(model)
        learns_all = config.dyn_only_epoch is None or progress.epoch < config.dyn_only_epoch
        bare.set_require_grad(prior_value=learns_all, enc_value=learns_all, dec_value=learns_all)
        output = model(
            x,
            forward_dyn=with_dynamics,
            train_enc_prior=config.train_enc_prior,
            num_static_frames=config.num_static_frames,
            **stage,
        )
        if with_dynamics:
            options = {
                "beta_dyn": config.beta_dyn,
                "beta_dyn_rec": config.beta_dyn_rec,
                "num_static": config.num_static_frames,
                "dynamic_discount": dynamic_discount(progress, config).to(x),
            }
            losses = bare.calc_elbo(x, output, **options, **self.elbo_options(), **stage)
        else:
            losses = bare.calc_elbo_static(x, output, **self.elbo_options(), **stage)
        return {**losses, **health(output)}

    def evaluate(self, model, progress, run):
        config, device, epoch = self.config, self.accelerator.device, progress.epoch
        scores = {
            "val_loss": evaluate_validation_elbo_dyn(
                model,
                config,
                epoch,
                beta_dyn=config.beta_dyn,
                beta_dyn_rec=config.beta_dyn_rec,
                timestep_horizon=config.timestep_horizon,
                **self.evaluation_options(run),
            )
        }
        animate_trajectory_ddlp(
            model,
            config,
            epoch,
            device,
            run.figures,
            timestep_horizon=config.animation_horizon,
            num_trajetories=ANIMATIONS,
            accelerator=self.accelerator,
            cond_steps=config.cond_steps,
        )
        if epoch > 0 and self.metrics:
            scores |= eval_ddlp_im_metric(
                model,
                device,
                config,
                timestep_horizon=config.animation_horizon,
                cond_steps=config.cond_steps,
                **self.metric_options(run),
            )
        return scores

    def figures(self, model):
        return draw_ddlp(model, self.figure_items(), self.config.topk, self.config.iou_thresh)


def dynamic_discount(progress, config):
    """The weights of the frames after the static ones, [T - num_static_frames + 1], 0..1: they rise with the
    iterations, those of later frames more slowly."""
    horizon = config.timestep_horizon
    length = max(config.warmup_epoch, 1) * max(config.discount_iterations, progress.epoch_length)
    step = max(length // horizon, 1)
    weights = progress.iteration / (step * torch.arange(1, horizon + 1))
    return weights.clamp(max=1.0)[: max(horizon - config.num_static_frames + 1, 0)]


def main(arguments=None):
    train(DDLPTask, __doc__, arguments)


if __name__ == "__main__":
    run_command(main)
