"""Train a small DLPv2 on shapes, on the CPU, and show the particles that it finds: ``make demo``."""

import argparse
import time

import torch

from eval.eval_gen_metrics import eval_dlp_im_metric
from eval.eval_model import image_dataset
from train_dlp import DLPTask, resume_command
from utils.config import Config, add_override_arguments, overrides_from
from utils.errors import run_command
from utils.run import Run
from utils.training import Trainer, make_accelerator

VISIBLE = 0.5  # a particle with a transparency above this counts as visible
OUTPUT = "demo_output"


@torch.no_grad()
def find_shapes(model, dataset, batch_size=64):
    """Which shapes have a visible particle's centre within their bounding box.

    Returns the share of the data set's shapes that have, and the mean numbers of shapes and of visible particles per
    image.
    """
    found = shapes = visible = 0
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        output = model(torch.stack([dataset[i][0] for i in indices]), deterministic=True)
        pixels = (output["z"] + 1) / 2 * (model.architecture.image_size - 1)  # (y, x)
        shown = output["obj_on"] > VISIBLE
        visible += shown.sum().item()
        for i, centres, is_shown in zip(indices, pixels, shown, strict=True):
            boxes = torch.as_tensor(dataset.boxes(i))  # [n, 4]: the pixels y1..y2-1, x1..x2-1
            low, high = boxes[:, None, :2] - 0.5, boxes[:, None, 2:] - 0.5
            inside = ((centres >= low) & (centres <= high)).all(-1)  # [n, K]
            found += (inside & is_shown).any(-1).sum().item()
            shapes += len(boxes)
    return found / shapes, shapes / len(dataset), visible / len(dataset)


def measure(model, config, run):
    """PSNR (dB) on the held-out images, and what `find_shapes` returns."""
    psnr = eval_dlp_im_metric(model, "cpu", config, eval_dir=run.path, metrics=("psnr",))["psnr"]
    return psnr, *find_shapes(model, image_dataset(config, "val"))


def main():
    parser = argparse.ArgumentParser(usage="%(prog)s [--KEY VALUE ...]", description=__doc__)
    add_override_arguments(parser)
    config = Config.load("demo").replace("command line", **overrides_from(parser.parse_args()))
    accelerator = make_accelerator(config.device)
    started = time.monotonic()
    trainer = Trainer(DLPTask(config, accelerator), config, accelerator, resume_command(accelerator))
    run = Run.create(config, DLPTask.kind, accelerator, parent=OUTPUT)
    before = measure(trainer.bare_model.eval(), config, run)
    if not trainer.fit(run):
        return
    after = measure(trainer.bare_model.eval(), config, run)
    print(f"\nDLPv2 on {config.val_size} held-out images, {time.monotonic() - started:.0f} s in all")
    print("                                       before   after training")
    print(f"PSNR of the reconstruction (dB)        {before[0]:6.2f}   {after[0]:6.2f}")
    print(f"share of the shapes found              {before[1]:6.2f}   {after[1]:6.2f}")
    print(f"visible particles per image            {before[3]:6.2f}   {after[3]:6.2f}   ({after[2]:.2f} shapes)")
    print(f"figure: {run.figures / f'image_valid_{config.num_epochs - 1}.jpg'}")


if __name__ == "__main__":
    run_command(main)
