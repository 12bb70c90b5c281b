"""Which items make the batches of training, and the running means of its losses."""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from utils.errors import UserError
from utils.random_state import seed_everything


class Batch(NamedTuple):
    """The items at `indices`: the batch of that number in its epoch, counted over all processes."""

    epoch: int
    number: int
    indices: list


class ShuffledBatches(Sampler):
    """Batches step after step, epoch after epoch, each epoch shuffled by (seed, epoch) alone: those of the next `count`
    steps from any step on.

    A step takes `per_step` batches on each process, in turn the first one's, the second's and so on, so that the order
    of the items does not depend on the number of processes. What is left of an epoch that makes no whole step is
    dropped.
    """

    def __init__(self, num_items, batch_size, seed, process=0, num_processes=1, per_step=1):
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.process, self.num_processes, self.per_step = process, num_processes, per_step
        batches = num_processes * per_step
        self.num_steps = num_items // (batch_size * batches)  # in an epoch
        if self.num_steps == 0:
            accumulated = f" of {per_step} batches a step (gradient_accumulation_steps)" if per_step > 1 else ""
            raise UserError(
                f"batch_size is {batch_size} on {num_processes} process(es){accumulated}, but the training set has"
                f" {num_items} items; legal: at most {num_items // batches}"
            )
        self.start_at(0, 0, self.num_steps)

    def start_at(self, epoch, step, count):
        """The next iteration gives the batches of `count` steps from a step of an epoch on."""
        self.epoch, self.step, self.count = epoch, step, count

    def number(self, step, i):
        """Which batch of an epoch is the i-th of this process in a step."""
        return (step * self.per_step + i) * self.num_processes + self.process

    def __iter__(self):
        epoch, first, left = self.epoch, self.step, self.count
        while left > 0:
            batches = self._order(epoch).split(self.batch_size)
            for step in range(first, min(self.num_steps, first + left)):
                for i in range(self.per_step):
                    number = self.number(step, i)
                    yield Batch(epoch, number, batches[number].tolist())
            left -= max(self.num_steps - first, 0)
            epoch, first = epoch + 1, 0

    def _order(self, epoch):
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.randperm(self.num_items, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return self.count * self.per_step


class SeededItems(Dataset):
    """A data set's items by the `Batch`; what they draw depends on (seed, epoch, number of the batch) alone, wherever
    they are made."""

    def __init__(self, items, seed):
        self.items, self.seed = items, seed

    def __len__(self):
        return len(self.items)

    def __getitems__(self, batch):
        seed_everything(self.seed, "items", batch.epoch, batch.number)
        return [self.items[i] for i in batch.indices]


class RunningMeans:
    """Means of named scalars; the scalars stay on the device until `read`."""

    def __init__(self):
        self.sums, self.count, self.pending = {}, 0, []

    def add(self, scalars):
        self.names = list(scalars)
        self.pending.append(torch.stack([value.detach().float() for value in scalars.values()]))

    def read(self, accelerator):
        """Bring the pending scalars over, averaged over the processes. Returns a list of dicts, one per `add`."""
        if not self.pending:
            return []
        values = accelerator.reduce(torch.stack(self.pending), reduction="mean").tolist()
        self.pending = []
        rows = [dict(zip(self.names, row, strict=True)) for row in values]
        for row in rows:
            self.count += 1
            for name, value in row.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
        return rows

    def means(self):
        return {name: value / self.count for name, value in self.sums.items()}

    def state_dict(self):
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state):
        self.sums, self.count, self.pending = dict(state["sums"]), state["count"], []
