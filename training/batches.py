"""Which items make the batches of training, and the running means of its losses."""

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.errors import UserError


class ShuffledBatches(Sampler):
    """Batches epoch after epoch, each epoch shuffled by (seed, epoch) alone: the next `count` from any batch on.

    An epoch's last, incomplete batch is dropped. With several processes each takes every `num_processes`-th batch.
    """

    def __init__(self, num_items, batch_size, seed, process=0, num_processes=1):
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.process, self.num_processes = process, num_processes
        self.num_batches = num_items // (batch_size * num_processes)  # of each process in an epoch
        if self.num_batches == 0:
            raise UserError(
                f"batch_size is {batch_size} on {num_processes} process(es), but the training set has"
                f" {num_items} items; legal: at most {num_items // num_processes}"
            )
        self.start_at(0, 0, self.num_batches)

    def start_at(self, epoch, batch, count):
        """The next iteration gives `count` batches from batch number `batch` of an epoch on."""
        self.epoch, self.batch, self.count = epoch, batch, count

    def __iter__(self):
        epoch, first, left = self.epoch, self.batch, self.count
        while left > 0:
            batches = self._order(epoch).split(self.batch_size)
            for i in range(first, min(self.num_batches, first + left)):
                yield batches[i * self.num_processes + self.process].tolist()
            left -= max(self.num_batches - first, 0)
            epoch, first = epoch + 1, 0

    def _order(self, epoch):
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.randperm(self.num_items, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return self.count


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
