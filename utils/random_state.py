"""The random number generators of this process: seeded by a place in training, and left as they were."""

import random
from contextlib import contextmanager

import numpy as np
import torch

_USES = ("items", "workers", "steps", "particles")  # each has random numbers of its own


def seed_of(seed, use, *place):
    """The seed, from 0 to 2^63 - 1, of what is drawn for a `use` at a place, which is integers, in a run of `seed`."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_USES.index(use), *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed, use, *place):
    """Seed Python's, numpy's and torch's generators, on the CPU and the GPU in use, with `seed_of`."""
    value = seed_of(seed, use, *place)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)  # `torch.manual_seed` looks for all kinds of devices first, at each step
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


@contextmanager
def preserve_random_state():
    """Undo what the block does to the random number generators."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
