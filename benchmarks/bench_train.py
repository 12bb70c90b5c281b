"""How long a training step takes, and how much memory: forward, loss with squared error, backward, Adam.

    python benchmarks/bench_train.py
    python benchmarks/bench_train.py -d balls --baseline ../other_checkout
    python benchmarks/bench_train.py --device cuda --precision bfloat16 --batch_size 32

Configurations are those of configs/, past their warm-up; weights and images are random. With --baseline another
checkout, such as the published release's, is measured in turn with this one.
"""

import inspect
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import side_by_side


def measure(args, name):
    """A measurement of configuration `name` (see `side_by_side`)."""
    model, config = side_by_side.build_model(name, args.device)
    batch_size = side_by_side.batch_size_of(args, name, config)
    frames = () if name == "shapes" else (config["timestep_horizon"] + 1,)
    model.checkpointing = args.checkpointing
    x = torch.rand(batch_size, *frames, config["ch"], *2 * [config["image_size"]], device=args.device)
    optimizer = torch.optim.Adam(model.parameters(), config["lr"], eps=config["adam_eps"])
    keys = ["beta_kl", "beta_rec", "kl_balance", *(() if name == "shapes" else ("beta_dyn", "beta_dyn_rec"))]
    weights = {key: config[key] for key in keys}
    # As training does: without the particles' masks, which are drawn for figures only.
    options = {"alpha_masks": False} if "alpha_masks" in inspect.signature(model.forward).parameters else {}

    def step():
        with side_by_side.autocast(args):
            loss = model.calc_elbo(x, model(x, **options), **weights)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return side_by_side.measured(step, args, batch_size)


def main(arguments=None):
    side_by_side.run(__doc__, arguments, tuple(side_by_side.BATCH_SIZES), measure)


if __name__ == "__main__":
    main()
