"""Train DLPv2 on images: ``python train_dlp.py -d shapes``, ``python train_dlp.py --help``."""

from datasets.episodes import scaled
from eval.eval_gen_metrics import eval_dlp_im_metric
from eval.eval_model import draw_dlp, evaluate_validation_elbo, image_dataset
from utils.errors import run_command
from utils.particle_training import ParticleTask, health, train
from utils.training import training_stage


class DLPTask(ParticleTask):
    """DLPv2: one image, or with tracking one clip, per item."""

    kind = "dlp"

    def train_set(self):
        image_dataset(self.config, "val")  # what is wrong with it shows before training starts
        return image_dataset(self.config, "train", as_uint8=True)

    def losses(self, model, batch, progress):
        x = scaled(batch[0])
        stage = training_stage(progress.epoch, self.config.warmup_epoch)
        output = model(x, train_enc_prior=self.config.train_enc_prior, **stage)
        losses = self.accelerator.unwrap_model(model).calc_elbo(x, output, **self.elbo_options(), **stage)
        return {**losses, **health(output)}

    def evaluate(self, model, progress, run):
        config, device = self.config, self.accelerator.device
        scores = {"val_loss": evaluate_validation_elbo(model, config, progress.epoch, **self.evaluation_options(run))}
        if progress.epoch > 0 and self.metrics:
            scores |= eval_dlp_im_metric(model, device, config, **self.metric_options(run))
        return scores

    def figures(self, model):
        return draw_dlp(model, self.figure_items(), self.config.topk, self.config.iou_thresh)


def main(arguments=None):
    train(DLPTask, __doc__, arguments)


if __name__ == "__main__":
    run_command(main)
