"""How noise on the positions that PINT sees in training changes its predictions, near and far:
``python benchmarks/bench_noise.py --noise 0 0.01 0.03 0.03:0``.

PINT alone (4 layers, width 128), on the true positions of three balls of radius 8 in 64 x 64 pixels, all windows of 11
frames of episodes of 60. Each noise is a standard deviation in units of -1..1, as `pint_noise`, or FROM:TO, which
falls in a straight line over the steps. The loss is the absolute error of the predicted positions. Prints the mean
position error in pixels, of other episodes, whose first ten frames are seen; a still frame's first.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.balls_ds import to_normalized
from datasets.balls_preparation import BallsOptions, make_trajectories
from eval.tracking import pixel_positions
from modules.dynamics_modules import DynamicsDLP
from modules.particles import Particles
from training.particles import groups_with_pint_biases
from utils.device import make_adam
from utils.errors import run_command
from utils.legal import BELOW_1, check, check_at_least_1, illegal

SEEN, FRAMES = 10, 60
AHEAD = 1, 5, 10, 20, 30
BIAS_LR = 30  # the factor of the biases' learning rate, as `pint_bias_lr`


def true_particles(options, split, number):
    """The balls of so many episodes as `Particles` [number, FRAMES, n, ...], their colours the appearance."""
    centres, _, colors = make_trajectories(options, split, range(number))
    z = to_normalized(torch.from_numpy(centres), options.image_size).float()
    ones = torch.ones(*z.shape[:-1], 1)
    appearance = torch.from_numpy(colors).float()[:, None].expand(-1, FRAMES, -1, -1)
    return Particles(z, -ones.expand_as(z), 0 * ones, ones.squeeze(-1), appearance, torch.zeros(*z.shape[:2], 1))


def parsed_noise(text):
    """ "0.03:0.01" -> (0.03, 0.01), "0.02" -> (0.02, 0.02)."""
    first, colon, last = text.partition(":")
    try:
        levels = float(first), float(last if colon else first)
    except ValueError:
        levels = (math.nan,)
    if not all(0 <= level < math.inf for level in levels):
        raise illegal("--noise", text, "a number of at least 0, or FROM:TO, as in 0.03:0.01")
    return levels


def trained(particles, levels, args):
    """PINT after `args.steps` steps on windows of the particles, in evaluation mode."""
    torch.manual_seed(args.seed)
    balls = particles.z.shape[2]
    pint = DynamicsDLP(
        3,
        1,
        128,
        128,
        n_head=8,
        n_layer=4,
        block_size=SEEN,
        dropout=args.dropout,
        max_particles=balls + 1,
        identity_init=args.identity_init,
    )
    adam = make_adam(groups_with_pint_biases(pint, BIAS_LR * args.lr), args.lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, args.steps)
    for step in tqdm(range(args.steps), leave=False, disable=None):
        episodes = torch.randint(len(particles.z), (args.batch_size, 1))
        frames = torch.randint(FRAMES - SEEN, (args.batch_size, 1)) + torch.arange(SEEN + 1)
        window = particles.map(lambda entry, index=(episodes, frames): entry[index])
        past = window.frames(slice(None, -1))
        noise = levels[0] + (levels[1] - levels[0]) * step / args.steps
        past.z = past.z + noise * torch.randn_like(past.z)
        error = pint.predict(past).position.mean - window.z[:, 1:]
        adam.zero_grad()
        error.abs().sum((-2, -1)).mean().backward()
        adam.step()
        rate.step()
    return pint.eval()


def errors(predicted, truth, image_size):
    """The mean distance in pixels of positions [N, FRAMES, n, 2] from the truth, at `AHEAD` frames behind `SEEN`."""
    difference = pixel_positions(predicted, image_size) - pixel_positions(truth, image_size)
    distance = difference.norm(dim=-1).mean((0, 2))
    return [distance[SEEN + ahead - 1].item() for ahead in AHEAD]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="+", default=["0", "0.01", "0.03", "0.03:0"], help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="of training (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="windows a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, metavar="X", help="at first; it falls to 0 (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="X", help="in PINT (%(default)s)")
    parser.add_argument(
        "--identity_init", action=argparse.BooleanOptionalAction, default=True, help="as `pint_identity_init`"
    )
    parser.add_argument("--episodes", type=int, default=1500, metavar="N", help="to train on (%(default)s)")
    parser.add_argument("--test_episodes", type=int, default=100, metavar="N", help="to measure on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (%(default)s)")
    args = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "episodes", "test_episodes", "threads"):
        check_at_least_1(f"--{name}", getattr(args, name))
    check("--lr", args.lr, "a finite number above 0", 0 < args.lr < math.inf)
    check("--dropout", args.dropout, BELOW_1.text, BELOW_1.test(args.dropout))
    noises = {text: parsed_noise(text) for text in args.noise}
    torch.set_num_threads(args.threads)
    options = BallsOptions(num_frames=FRAMES)
    train, test = true_particles(options, "train", args.episodes), true_particles(options, "test", args.test_episodes)
    seen, truth = test.frames(slice(None, SEEN)), test.z

    def print_errors(name, predicted):
        row = errors(predicted, truth, options.image_size)
        print(f"{name:12}" + "".join(f"{error:8.2f}" for error in row), flush=True)

    print(f"{'frames ahead':12}" + "".join(f"{ahead:8}" for ahead in AHEAD))
    print_errors("still frame", seen.z[:, -1:].expand_as(truth))
    for text, levels in noises.items():
        pint = trained(train, levels, args)
        with torch.no_grad():
            unrolled = pint.roll_out(seen, FRAMES - SEEN)
        print_errors(text, unrolled.z)


if __name__ == "__main__":
    run_command(main)
