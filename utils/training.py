"""The one training loop: exact resume, evaluation, saving, on 1..N processes; and training by epochs on it.

The loop knows no model: a `Task` brings the model, the data, the loss and the evaluation. What decides the next weights
(weights, optimiser, schedule, counters, random states, sums, best scores) is saved together, so that a run that was
stopped anywhere goes on exactly as if it had not been.
"""

import math
import random
import signal
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from utils.config import OVERRIDE, add_override_arguments
from utils.errors import UserError
from utils.plotting import loss_graph

READ_INTERVAL = 20  # iterations between two reads of the losses from the device
# What may change when a run goes on: nothing that decides the numbers, but for where it ends.
RESUMABLE = (
    "num_epochs",
    "root",
    "device",
    "num_workers",
    "cache",
    "checkpoint_freq",
    "eval_epoch_freq",
    "eval_im_metrics",
    "metrics",
    "val_size",
    "topk",
    "iou_thresh",
)


class TrainingError(UserError):
    """Training cannot go on."""

    exit_status = 1


class Task:
    """What is special about training one kind of model; the loop calls nothing else.

    `kind` names the run directory and its weights, `bar` the loss terms that the progress bar shows, `notes` are lines
    to tell the user when training starts.
    """

    kind = ""
    bar = ()
    notes = ()

    def build_model(self):
        """The model to train."""
        raise NotImplementedError

    def train_set(self):
        """A `torch.utils.data.Dataset`."""
        raise NotImplementedError

    def losses(self, model, batch, progress):
        """A dict of scalar tensors: "loss", which is minimised, and whatever else is to be averaged and logged.

        model: the model as wrapped for several processes; batch: what the data set's items collate to, on the device.
        """
        raise NotImplementedError

    def evaluate(self, model, progress, run):
        """After an epoch: a dict of numbers; by "val_loss" and perhaps "lpips" among them the best weights are kept.

        Called on every process, with the bare model in eval mode. run: the `Run`, for what is written beside.
        """
        raise NotImplementedError

    def figures(self, model):
        """After an epoch, on the main process: name to image tensor [3, H, W]."""
        raise NotImplementedError


@dataclass
class Progress:
    """Where training stands: finished epochs, batches done in this one, iterations in all; and a whole epoch's
    iterations."""

    epoch: int = 0
    batch: int = 0
    iteration: int = 0
    epoch_length: int = 0


def training_stage(epoch, warmup_epoch):
    """The stage as keyword arguments of a model's `forward` and `calc_elbo`: `warmup_epoch` epochs of warm-up, which is
    noisy too, then one noisy epoch."""
    return {"warmup": epoch < warmup_epoch, "noisy": epoch < warmup_epoch + 1}


def make_accelerator(device, unused_parameters=True):
    """The `Accelerator` of this process.

    device: "cpu", "cuda" (where there is none: the CPU) or "cuda:N"; unused_parameters: whether a step may leave
    parameters without a gradient, as warm-up and noisy stages do.
    """
    if device.startswith("cuda:") and torch.cuda.is_available():
        index, count = int(device.split(":")[1]), torch.cuda.device_count()
        if index >= count:
            raise UserError(f"device is {device}; legal: cuda:0 to cuda:{count - 1}, cuda or cpu")
        torch.cuda.set_device(index)
    unused = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    return Accelerator(cpu=device == "cpu", kwargs_handlers=[unused])


def add_training_arguments(parser, kind):
    """The arguments of every training command: --resume, --no_cache and the overrides of a `kind` of configuration."""
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with this run, exactly where it was saved")
    parser.add_argument(
        "--no_cache", dest=f"{OVERRIDE}cache", action="store_const", const="false", help="the same as --cache false"
    )
    add_override_arguments(parser, kind=kind)


def resumed_config(run, overrides, resumable):
    """The configuration with which a run goes on; `UserError` for an override of a key that is not `resumable`."""
    fixed = [name for name in overrides if name not in resumable]
    if fixed:
        raise UserError(f"--{fixed[0]} cannot change when a run goes on; legal: {', '.join(resumable)}")
    return run.config.replace("command line", **overrides)


class EpochBatches(Sampler):
    """The batches of one epoch, shuffled by (seed, epoch) alone, from any batch on.

    The last, incomplete batch is dropped. With several processes each takes every `num_processes`-th batch.
    """

    def __init__(self, num_items, batch_size, seed, process=0, num_processes=1):
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.process, self.num_processes = process, num_processes
        self.num_batches = num_items // (batch_size * num_processes)
        if self.num_batches == 0:
            raise UserError(
                f"batch_size is {batch_size} on {num_processes} process(es), but the training set has"
                f" {num_items} items; legal: at most {num_items // num_processes}"
            )
        self.epoch = self.first_batch = 0

    def start_at(self, progress):
        self.epoch, self.first_batch = progress.epoch, progress.batch

    def __iter__(self):
        seed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        order = torch.randperm(self.num_items, generator=torch.Generator().manual_seed(seed))
        batches = order.split(self.batch_size)
        for i in range(self.first_batch, self.num_batches):
            yield batches[i * self.num_processes + self.process].tolist()

    def __len__(self):
        return self.num_batches - self.first_batch


class RunningMeans:
    """Means of named scalars over an epoch; the scalars stay on the device until `read`."""

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


class Interruption:
    """Notes SIGINT and SIGTERM so that the loop can save first; a second signal ends the process at once."""

    def __init__(self):
        self.requested = False

    @contextmanager
    def watched(self):
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number, frame):
            self.requested = True
            for each, handler in previous.items():
                signal.signal(each, handler)

        for number in previous:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class TrainingLoop:
    """Steps through a task's batches, from the start or from a run's saved state, to an end.

    A subclass says which optimiser and batches these are, what follows a step, where the end is, and what is saved.
    The loop goes in stretches (`_train_stretch`), such as epochs, each under a progress bar of its own.
    """

    max_grad_norm = None  # the gradient's norm is clipped at this

    def __init__(self, task, config, accelerator, resume_command):
        """resume_command: what a user types, before the run directory, to go on with a run that was stopped."""
        self.task, self.config, self.accelerator, self.resume_command = task, config, accelerator, resume_command
        self.run = None
        self.progress, self.means = Progress(), RunningMeans()
        self.interruption = Interruption()
        set_seed(config.seed, device_specific=True)
        model = task.build_model()
        self.model, self.optimizer = accelerator.prepare(model, self._make_optimizer(model))
        with accelerator.main_process_first():
            train_set = task.train_set()
        self.batches = self._make_batches(
            len(train_set), config.batch_size, config.seed, accelerator.process_index, accelerator.num_processes
        )
        self.progress.epoch_length = self.batches.num_batches
        self.loader = self._make_loader(train_set, config.num_workers)

    # ------------------------------------------------------------------------------------- what a subclass decides

    def _make_optimizer(self, model):
        raise NotImplementedError

    def _make_batches(self, *arguments):
        """The batch sampler; arguments: those of `EpochBatches`."""
        raise NotImplementedError

    def _bar_options(self):
        """Of the stretch's progress bar: `desc`, `initial` and `total`."""
        raise NotImplementedError

    def _end(self):
        """None, or once the end is reached a line that says so and how to go on."""
        raise NotImplementedError

    def _after_step(self, stop):
        """After every step. stop: whether training stops here, so that the state has to be saved."""
        raise NotImplementedError

    def _finish_stretch(self):
        """After a stretch that was not stopped."""
        raise NotImplementedError

    def save_state(self):
        """Save all that decides how training goes on."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------------- the loop

    @property
    def bare_model(self):
        return self.accelerator.unwrap_model(self.model)

    def _make_loader(self, dataset, num_workers):
        return DataLoader(
            dataset,
            batch_sampler=self.batches,
            num_workers=num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # starting an epoch draws from it, not from the model's generator
        )

    def fit(self, run):
        """Train to the end, in `run`. Returns whether it got there, not stopped by a signal."""
        self.run = run
        for line in (f"run directory: {run.path}", *self.task.notes):
            self._say(line)
        if self._end() is not None:
            self._say(self._end())
        with self.interruption.watched():
            while self._end() is None:
                if not self._train_stretch():
                    self._say(f"stopped at {self._position()}; go on with: {self.resume_command} {self.run.path}")
                    return False
                self._finish_stretch()
        return True

    def _train_stretch(self):
        """The rest of the current stretch. Returns False if a signal stopped it; the state is saved then."""
        self.model.train()
        self.batches.start_at(self.progress)
        for batch in self._bar():
            self._step(batch)
            stop = self._stop_requested()
            self._after_step(stop)
            if stop:
                return False
        self._read_losses()
        return True

    def _step(self, batch):
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.task.losses(self.model, self._to_device(batch), self.progress)
        self.accelerator.backward(losses["loss"])
        if self.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            losses = {**losses, "grad_norm": norm}
        self.optimizer.step()
        self.means.add(losses)
        self.progress.batch += 1
        self.progress.iteration += 1
        if self.progress.iteration % READ_INTERVAL == 0:
            self._read_losses()

    def _bar(self):
        """The stretch's batches under a progress bar."""
        options = {"disable": not self.accelerator.is_main_process, "dynamic_ncols": True}
        self.bar = tqdm(self.loader, **self._bar_options(), **options)
        return self.bar

    def _to_device(self, batch):
        if torch.is_tensor(batch):
            return batch.to(self.accelerator.device, non_blocking=True)
        return type(batch)(self._to_device(item) for item in batch) if isinstance(batch, (list, tuple)) else batch

    def _read_losses(self):
        """Read the losses since the last time, stop at one that is not finite, show the latest means."""
        first = self.progress.iteration + 1 - len(self.means.pending)
        for iteration, row in enumerate(self.means.read(self.accelerator), first):
            wrong = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
            if wrong:
                place = f"iteration {iteration} (epoch {self.progress.epoch})"
                raise TrainingError(f"{', '.join(wrong)} at {place}; {self._last_good()}")
        if self.means.count:
            means = self.means.means()
            self.bar.set_postfix({name: f"{means[name]:.3g}" for name in self.task.bar}, refresh=False)

    def _stop_requested(self):
        """Whether any process was asked to stop; all processes agree, which they only ask each other now and then."""
        if self.accelerator.num_processes == 1:
            return self.interruption.requested
        if self.progress.iteration % READ_INTERVAL:
            return False
        requested = torch.tensor(float(self.interruption.requested), device=self.accelerator.device)
        return self.accelerator.reduce(requested, reduction="sum").item() > 0

    def _check_weights(self, model):
        """Raise `TrainingError` unless all parameters are finite."""
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise TrainingError(f"the weights {name} are not finite at {self._position()}; {self._last_good()}")

    def _check_processes(self, run, random_states):
        """Raise `UserError` unless the run was trained by as many processes."""
        processes = len(random_states)
        if processes != self.accelerator.num_processes:
            raise UserError(f"{run.path} was trained by {processes} process(es); it can only go on with as many")

    # --------------------------------------------------------------------------------------------------------- words

    def _say(self, line):
        """To log.txt and to the terminal."""
        self.run.log(line)
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def _position(self):
        return f"epoch {self.progress.epoch}, iteration {self.progress.iteration}"

    def _last_good(self):
        if not self.run.state_path.is_file():
            return "no checkpoint was saved before"
        return f"the last good checkpoint is kept; go on from it with: {self.resume_command} {self.run.path}"


class Trainer(TrainingLoop):
    """Trains by epochs, each followed by an evaluation and a smaller learning rate."""

    def __init__(self, task, config, accelerator, resume_command):
        super().__init__(task, config, accelerator, resume_command)
        self.best = {}
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer.optimizer, config.scheduler_gamma)

    def _make_optimizer(self, model):
        config = self.config
        return torch.optim.Adam(model.parameters(), config.lr, config.adam_betas, config.adam_eps, config.weight_decay)

    def _make_batches(self, *arguments):
        return EpochBatches(*arguments)

    def _bar_options(self):
        return {
            "desc": f"epoch {self.progress.epoch}",
            "initial": self.progress.batch,
            "total": self.batches.num_batches,
        }

    def _end(self):
        done = self.progress.epoch >= self.config.num_epochs
        return f"all {self.config.num_epochs} epochs are done; more: --num_epochs" if done else None

    def _after_step(self, stop):
        if stop or self.progress.iteration % self.config.checkpoint_freq == 0:
            self.save_state()

    def _finish_stretch(self):
        epoch = self.progress.epoch
        means = self.means.means()
        record = {"epoch": epoch, "iteration": self.progress.iteration, "lr": self.scheduler.get_last_lr()[0], **means}
        if epoch % self.config.eval_epoch_freq == 0 or epoch == self.config.num_epochs - 1:
            record |= self._evaluate()
        self.run.record(record)
        if self.accelerator.is_main_process:
            self.run.save_figure(f"{self.run.name}_graph", loss_graph(self.run.records()))
        self._say(" ".join(f"{name} {value:.4g}" for name, value in record.items()))
        self.scheduler.step()
        self.progress.epoch, self.progress.batch = epoch + 1, 0
        self.means = RunningMeans()
        self.save_state()

    def _evaluate(self):
        """Measure, draw and keep the weights; training's random state is left as it was."""
        model = self.bare_model.eval()
        with torch.no_grad(), keeping_random_state():
            set_seed(self.config.seed)
            scores = self.task.evaluate(model, self.progress, self.run)
            if self.accelerator.is_main_process:
                for name, image in self.task.figures(model).items():
                    self.run.save_figure(f"{name}_{self.progress.epoch}", image)
        self.run.save_weights(model.state_dict())
        for score, suffix in (("val_loss", "_best"), ("lpips", "_best_lpips")):
            if scores.get(score, math.inf) < self.best.get(score, math.inf):
                self.best[score] = scores[score]
                self.run.save_weights(model.state_dict(), suffix)
        return scores

    # ------------------------------------------------------------------------------------------------- saved state

    def save_state(self):
        self._read_losses()
        self._check_weights(self.bare_model)
        random_states = gather_object([random_state()])
        self.run.save_state(
            {
                "model": self.bare_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "progress": asdict(self.progress),
                "means": self.means.state_dict(),
                "best": self.best,
                "random_states": random_states,
            }
        )

    def resume(self, run):
        """Go on from a run's saved state. Raises `UserError` where that cannot be done exactly."""
        self.run = run
        state = run.load_state()
        self._check_processes(run, state["random_states"])
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.progress = Progress(**state["progress"])
        self.means.load_state_dict(state["means"])
        self.best = state["best"]
        set_random_state(state["random_states"][self.accelerator.process_index])
        self._say(f"resumed at {self._position()}")


def random_state():
    """The state of all random number generators of this process, as tensors and plain values."""
    numpy_state = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": keys}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state):
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    keys = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": keys}})
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def keeping_random_state():
    """Undo what the block does to the random number generators."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
