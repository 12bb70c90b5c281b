"""Training steps as CUDA graphs: the thousands of small kernels of a step are launched as one."""

from dataclasses import replace

import torch

WARM_UP = 3  # steps without a graph, in which libraries choose their kernels and take their memory


class GraphedSteps:
    """`step(batch, progress)`, which computes losses and gradients, by replaying what it did the first time.

    step: returns a dict of scalar tensors; batch: tensors on the GPU, always of the same shapes. It is recorded anew
    whenever the `kind` of the steps changes; within a kind, of the progress only `iteration` may decide numbers, which
    it then has to do as a tensor. Gradients lie in the same memory from replay to replay.
    """

    def __init__(self, step, optimizer):
        self.step, self.optimizer = step, optimizer
        self.stream = torch.cuda.Stream()
        self.kind, self.count, self.graph = None, 0, None

    def __call__(self, kind, batch, progress):
        if kind != self.kind:
            self.kind, self.count, self.graph = kind, 0, None
        self.count += 1
        if self.count <= WARM_UP:
            return self._warm_up(batch, progress)
        if self.graph is None:
            self._record(batch, progress)
        for mine, given in zip(self.batch, batch, strict=True):
            mine.copy_(given, non_blocking=True)
        self.iteration.fill_(progress.iteration)
        self.graph.replay()
        return {name: value.clone() for name, value in self.losses.items()}

    def _warm_up(self, batch, progress):
        self.optimizer.zero_grad(set_to_none=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = self.step(batch, progress)
        torch.cuda.current_stream().wait_stream(self.stream)
        return losses

    def _record(self, batch, progress):
        self.batch = [tensor.clone() for tensor in batch]
        self.iteration = torch.zeros((), dtype=torch.int64, device=self.batch[0].device)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        # Threads that pin memory for the next batches go on meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            losses = self.step(self.batch, replace(progress, iteration=self.iteration))
        self.losses = {name: value.detach() for name, value in losses.items()}
