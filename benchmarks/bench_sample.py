"""How long a prediction takes: 10 frames seen, 30 predicted, all drawn.

    python benchmarks/bench_sample.py
    python benchmarks/bench_sample.py -d traffic --baseline ../other_checkout

Configurations are those of configs/; weights and images are random. With --baseline another checkout, such as the
published release's, is measured in turn with this one.
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import side_by_side

SEEN, PREDICTED = 10, 30


def measure(args, name):
    """A measurement of configuration `name` (see `side_by_side`)."""
    model, config = side_by_side.build_model(name, args.device)
    model.eval()
    batch_size = side_by_side.batch_size_of(args, name, config)
    x = torch.rand(batch_size, SEEN + PREDICTED, config["ch"], *2 * [config["image_size"]], device=args.device)

    @torch.no_grad()
    def step():
        with side_by_side.autocast(args):
            model.sample(x, num_steps=PREDICTED, cond_steps=SEEN)

    return side_by_side.measured(step, args, batch_size)


def main(arguments=None):
    videos = tuple(name for name in side_by_side.BATCH_SIZES if name != "shapes")
    side_by_side.run(__doc__, arguments, videos, measure)


if __name__ == "__main__":
    main()
