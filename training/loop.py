"""The one training loop: epochs or steps, exact resume, evaluation and saving, on 1..N processes.

The loop knows no model: a `Task` brings the model, the data, the loss and the evaluation. Training goes in intervals
(an epoch, or so many steps), each followed by an evaluation. What decides the next weights (weights, optimiser,
schedule, counters, sums, best scores) is saved together, so that a run that was stopped anywhere goes on exactly as if
it had not been. There is no random state among it: what a step draws depends on the seed, the epoch and the number of
its batch in the epoch alone, counted over all processes. So N processes compute what one process does that accumulates
the gradients of N batches.
"""

import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import NamedTuple

import torch
from accelerate.utils import gather_object, set_seed
from ema_pytorch import EMA
from tqdm import tqdm

from datasets.loading import Loader
from datasets.particle_cache import data_change, data_identity
from rundir.tracker import Tracker, check_tracker
from training.batches import RunningMeans, SeededItems, ShuffledBatches
from training.diagnosis import diagnose
from training.graphs import GraphedSteps
from training.interruption import Interruption, Stopped
from utils import checkpoints
from utils.device import (
    autocast,
    check_accelerate_settings,
    check_cuda_graphs,
    choose_kernels,
    describe_device,
    memory_in_use,
)
from utils.errors import UserError, is_lost_process
from utils.files import machine_id
from utils.plotting import loss_graph
from utils.progress import progress_bar
from utils.random_state import seed_everything, seed_of

READ_INTERVAL = 20  # iterations between two reads of the losses from the device
AGREEMENT_SECONDS = 2  # about how often several processes ask each other whether to stop
MEASURES = {"psnr"}  # of what a task's `losses` return: no part of the loss
BEST = {"val_loss": "_best", "lpips": "_best_lpips"}  # scores whose lowest value's weights are kept, and where


class TrainingError(UserError):
    """Training cannot go on."""

    exit_status = 1


@dataclass
class Progress:
    """Where training stands: finished epochs, iterations (`batch`) done in this one, iterations in all; an epoch's
    iterations; and whether an interval is finished that is not evaluated yet. An iteration is a step of the optimiser:
    each process's batch, or with gradient accumulation so many of them."""

    epoch: int = 0
    batch: int = 0
    iteration: int = 0
    epoch_length: int = 0
    evaluation_due: bool = False

    def enter_next_epoch_if_due(self):
        if self.batch == self.epoch_length:
            self.epoch, self.batch = self.epoch + 1, 0


class Interval(NamedTuple):
    """The iterations `start` to `end` - 1, under a name."""

    name: str
    start: int
    end: int


class Task(ABC):
    """What is special about training one kind of model; the loop calls nothing else.

    bar: the loss terms that the progress bar shows; graph: panels and horizontal axis of the figure of losses, for
    `loss_graph`; notes: lines to tell the user when training starts; save_every: iterations between two saves;
    images_per_item: of the data set; ema: decay and interval of a moving average of the weights, or None.
    """

    bar: tuple
    graph: tuple
    notes = ()
    save_every: int
    images_per_item = 1
    ema = None

    @abstractmethod
    def build_model(self):
        """The module to train, all of it."""

    @abstractmethod
    def make_optimizer(self, model):
        """The optimiser, and the factor of its learning rate after every interval."""

    @abstractmethod
    def open_data(self):
        """Open what training needs, with the model on its device; returns the data set to train on."""

    @abstractmethod
    def train_set(self, progress):
        """The `torch.utils.data.Dataset` of the current interval, of as many items as that of `open_data`, and how many
        processes load it."""

    @abstractmethod
    def losses(self, model, batch, progress):
        """A dict of scalar tensors: "loss", which is minimised, and whatever else is to be averaged and logged.

        model: the model as wrapped for several processes; batch: what the data set's items collate to, on the device.
        """

    @abstractmethod
    def kind_of_step(self, progress):
        """What tells the current steps from others that run other operations: anything that can be compared."""

    @abstractmethod
    def interval(self, progress):
        """The current `Interval`."""

    @abstractmethod
    def iterations(self, progress):
        """How many iterations training takes in all."""

    @abstractmethod
    def end(self, progress):
        """None, or once the end is reached a line that says so and how to go on."""

    @abstractmethod
    def evaluate(self, model, progress, run):
        """After an interval: a dict of numbers; of those in `BEST` the lowest decide which weights are kept.

        Called on every process, with the bare model, or its moving average, in eval mode. run: the run directory, for
        what is written beside.
        """


class TrainingLoop:
    """Trains a `Task`'s model: `TrainingLoop(task, config, accelerator, resume_command).fit(run)`.

    config: of it is read what is the same for all tasks, from `seed` to `tracker`; resume_command: what a user types,
    before the run directory, to go on with a run that was stopped. A run that goes on needs `resume(run)` before `fit`.
    """

    def __init__(self, task, config, accelerator, resume_command):
        self.task, self.config, self.accelerator, self.resume_command = task, config, accelerator, resume_command
        self.run = None
        self.clock = None  # when the interval's first step was done, and which it was
        self.best, self.means, self.interruption = {}, RunningMeans(), Interruption(config.max_minutes)
        check_accelerate_settings(config)
        if config.tracker:
            check_tracker(config.tracker)
        choose_kernels(config.tf32, config.deterministic, fixed_shapes=True)
        set_seed(config.seed)
        model = task.build_model()
        if config.compile:
            model.compile()  # in place: a wrapper would give the weights other names
        optimizer, decay = task.make_optimizer(model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer.optimizer, decay)
        self.ema = None
        if task.ema:
            beta, every = task.ema
            self.ema = EMA(self.bare_model, beta=beta, update_every=every, include_online_model=True)
        data = task.open_data()  # what one process makes for all, the others wait for by file locks
        check_cuda_graphs(config, accelerator)
        self.graphed_steps = GraphedSteps(self._gradients, self.optimizer) if config.cuda_graphs else None
        processes = accelerator.process_index, accelerator.num_processes
        accumulated = config.gradient_accumulation_steps
        self.batches = ShuffledBatches(len(data), config.batch_size, config.seed, *processes, accumulated)
        self.progress = Progress(epoch_length=self.batches.num_steps)
        self.data = data_identity(data) if accelerator.is_main_process else None

    @property
    def bare_model(self):
        return self.accelerator.unwrap_model(self.model)

    @property
    def trained_model(self):
        """What training is for, in eval mode: the model, or its moving average."""
        return (self.bare_model if self.ema is None else self.ema.ema_model).eval()

    # ---------------------------------------------------------------------------------------------------- the story

    def fit(self, run):
        """Train to the end, in `run`. Returns whether it got there, not stopped by a signal or by `max_minutes`.
        `UserError` where another process trains in the same directory."""
        self.run = run
        with run.locked():
            return self._fit(run)

    def _fit(self, run):
        for line in (f"run directory: {run.path}", describe_device(self.accelerator, self.config), *self.task.notes):
            self._say(line)
        progress, config = self.progress, self.config
        if config.tracker and self.accelerator.is_main_process:
            run.tracker = Tracker(config.tracker, run, self.accelerator, progress.iteration)
        self.start = time.perf_counter(), progress.iteration
        if self.accelerator.num_processes > 1:
            mine = machine_id(), os.getpid(), self.interruption.seconds_left
            self.interruption.agree(gather_object([mine]))
        if self.task.end(progress) is not None and not progress.evaluation_due:
            self._say(self.task.end(progress))
        with self.interruption.watch(), self._explaining_errors():
            try:
                while progress.evaluation_due or self.task.end(progress) is None:
                    if not progress.evaluation_due and not self._train(self.task.interval(progress)):
                        raise Stopped
                    self._finish_interval()
            except Stopped:  # all that is needed is saved: an interval is before it is evaluated
                self._say(f"stopped at {self._position()}; go on with: {self.resume_command} {run.path}")
                return False
        return True

    def _train(self, interval):
        """The rest of an interval. Returns False if it was asked to stop. Either way the state is saved at its end."""
        progress, save_every = self.progress, self.task.save_every
        self.model.train()
        self.batches.start_at(progress.epoch, progress.batch, interval.end - progress.iteration)
        self.clock = None
        self.agreement_interval, self.agreed = 1, time.monotonic()  # steps of another kind may take longer
        with closing(self._grouped(self._make_loader())) as steps:
            for batches in self._with_progress_bar(steps, interval):
                self._step(batches)
                stop = self._stop_requested()
                progress.evaluation_due = progress.iteration == interval.end
                if stop or progress.iteration % save_every == 0 or progress.evaluation_due:
                    self.save_state()
                if stop:
                    self.accelerator.wait_for_everyone()  # a launcher ends the others when the first has ended
                    return False
        return True

    def _step(self, batches):
        """One iteration, with the mean gradient of the batches."""
        self.progress.enter_next_epoch_if_due()
        if not self.graphed_steps:
            self.optimizer.zero_grad(set_to_none=True)
        losses = mean_of([self._losses_of(batch, i) for i, batch in enumerate(batches)])
        if self.config.grad_clip is not None:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            losses = {**losses, "grad_norm": norm}
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        self.means.add(losses)
        self.progress.batch += 1
        self.progress.iteration += 1
        self.clock = self.clock or (time.perf_counter(), self.progress.iteration)
        if self.progress.iteration % READ_INTERVAL == 0:
            self._read_losses()

    def _losses_of(self, batch, i):
        """The losses of a step's i-th batch; adds up the gradients, after the last batch those of all processes."""
        progress, count = self.progress, self.config.gradient_accumulation_steps
        batch = self._to_device(batch)
        seed_everything(self.config.seed, "steps", progress.epoch, self.batches.number(progress.batch, i))
        if self.graphed_steps:
            return self.graphed_steps(self.task.kind_of_step(progress), batch, progress)
        with nullcontext() if i == count - 1 else self.accelerator.no_sync(self.model):
            return self._gradients(batch, progress)

    def _gradients(self, batch, progress):
        """Compute the losses and add up all gradients; returns the losses."""
        with autocast(self.accelerator.device, self.config.precision):
            losses = self.task.losses(self.model, batch, progress)
        (losses["loss"] / self.config.gradient_accumulation_steps).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _finish_interval(self):
        progress = self.progress
        self.accelerator.wait_for_everyone()  # until the state is saved: who is stopped from here on leaves at once
        record = {"epoch": progress.epoch, self.run.counter: progress.iteration, "lr": self.scheduler.get_last_lr()[0]}
        record |= self._speed() | self.means.means() | self._evaluate()
        self.run.record(record)
        if self.accelerator.is_main_process:
            records = self.run.records()
            self.run.save_figure(f"{self.run.name}_graph", loss_graph(records, *self.task.graph))
            self.run.hand_on(record)
        self._say(record_line(record) + self._time_left())
        if self.accelerator.is_main_process:
            for line in diagnose(records, self.config):
                self._say(line)
        with warnings.catch_warnings():
            # Where a run goes on with an evaluation, PyTorch misses a step of the optimiser before.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()
        progress.enter_next_epoch_if_due()
        progress.evaluation_due = False
        self.means = RunningMeans()
        self.save_state()

    def _evaluate(self):
        """Measure, draw and keep the best weights."""
        model = self.trained_model
        set_seed(self.config.seed)
        with torch.no_grad(), self.interruption.raising():
            try:
                scores = self.task.evaluate(model, self.progress, self.run)
            except RuntimeError as error:
                if is_lost_process(error) and self.interruption.requested:
                    raise Stopped from error
                raise
        for score, suffix in BEST.items():
            if scores.get(score, math.inf) < self.best.get(score, math.inf):
                self.best[score] = scores[score]
                self.run.save_weights(model.state_dict(), suffix)
        return scores

    # ------------------------------------------------------------------------------------------------- saved state

    def save_state(self):
        """Save all that decides how training goes on; `TrainingError` if a weight is not finite."""
        self._read_losses()
        for name, parameter in self.bare_model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise self._diverged(f"the weights {name} are not finite at {self._position()}")
        self.run.save_state(
            {
                "model": self.bare_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "progress": asdict(self.progress),
                "means": self.means.state_dict(),
                "best": self.best,
                "num_processes": self.accelerator.num_processes,
                "kind": self.run.kind,
                "config": {name: getattr(self.config, name) for name in self.config.fixed_keys()},
                "items": self.batches.num_items,
                "data": self.data,
            }
        )

    def resume(self, run):
        """Go on from a run's saved state, or a published one, which has less in it; `UserError` where it does not fit.

        On another number of processes the order of the items stays; a few, fewer than a step takes, are seen again.
        """
        self.run = run
        run.check_writable()
        state = run.load_state()
        rate = self._check_state(state)
        checkpoints.insert_weights(self.bare_model, state["model"], f"{run.state_path} (model)")
        self._load_optimizer(state["optimizer"])
        if self.ema is not None:
            checkpoints.insert_weights(self.ema, state["ema"], f"{run.state_path} (ema)")
        self.progress = Progress(**{"epoch_length": self.batches.num_steps, **state["progress"]})
        if "epoch" not in state["progress"]:
            self.progress.epoch, self.progress.batch = divmod(self.progress.iteration, self.progress.epoch_length)
        if "means" in state:
            self.scheduler.load_state_dict(state["scheduler"])
            self.means.load_state_dict(state["means"])
            self.best = state["best"]
        self._say(f"resumed at {self._position()}")
        if rate != self.config.lr:
            self._change_rate(rate)
        processes = state.get("num_processes", self.accelerator.num_processes)
        if processes != self.accelerator.num_processes:
            self._go_on_from(processes)

    def _go_on_from(self, processes):
        """Let the progress of that number of processes count for the number of today."""
        progress, length = self.progress, self.batches.num_steps
        done = min(progress.batch * processes // self.accelerator.num_processes, length)
        progress.batch = length if progress.batch == progress.epoch_length else done
        progress.epoch_length = length
        self._say(
            f"with {self.accelerator.num_processes} process(es) instead of {processes}: the same order of the data, but"
            " not to the bit what as many would give"
        )

    def _check_state(self, state):
        """`UserError` unless a state is of such a run, as far as it says. Returns the learning rate that it is of."""
        run = self.run
        path, config = run.opened_state or run.state_path, run.config
        if state.get("kind", run.kind) != run.kind:
            raise UserError(f"{path}: saved by a run of kind {state['kind']}; legal: one of kind {run.kind}")
        saved = state.get("config", {})
        differ = [
            f"{name} is {saved[name]} there, {getattr(config, name)} in {run.config_file}"
            for name in config.fixed_keys()
            if saved.get(name, getattr(config, name)) != getattr(config, name) and name not in run.may_change
        ]
        if differ:
            raise UserError(f"{path}: saved with another configuration: {', '.join(differ)}; legal: the same")
        items = state.get("items", self.batches.num_items)
        if items != self.batches.num_items:
            raise UserError(
                f"{path}: the training set had {items} items, it has {self.batches.num_items} now; legal: the same"
                " data, or a new run that starts from these weights (load_model, pretrained_path)"
            )
        if self.accelerator.is_main_process and "data" in state:
            change = data_change(state["data"], self.data)
            if change:
                self._say(f"warning: {change} since {path} was saved; training goes on with what is there now")
        return saved.get("lr", config.lr)

    def _change_rate(self, before):
        """Go on with the configuration's learning rate instead of that before, after as many decays."""
        factor = self.config.lr / before
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor
        self.scheduler.base_lrs = [rate * factor for rate in self.scheduler.base_lrs]
        self.scheduler._last_lr = [rate * factor for rate in self.scheduler._last_lr]
        self._say(f"from here on with lr {self.config.lr:g} instead of {before:g}")

    def _diverged(self, what):
        """The error that says what is not finite, and how to go on."""
        self.run.note_divergence(self.progress.iteration)
        lower = ", perhaps with a lower learning rate: --lr" if self.run.state_path.is_file() else ""
        return TrainingError(f"{what}; {self._last_good()}{lower}")

    def _load_optimizer(self, state):
        parameters = [parameter.shape for group in self.optimizer.param_groups for parameter in group["params"]]
        shapes = {index: value["exp_avg"].shape for index, value in state["state"].items()}
        if any(index >= len(parameters) or shape != parameters[index] for index, shape in shapes.items()):
            raise UserError(
                f"{self.run.state_path} (optimiser): does not fit the {len(parameters)} weights of the model"
            )
        self.optimizer.load_state_dict(state)

    # ------------------------------------------------------------------------------------------------------- chores

    def _make_loader(self):
        train_set, num_workers = self.task.train_set(self.progress)
        seed = seed_of(self.config.seed, "workers", self.progress.epoch, self.accelerator.process_index)
        return Loader(
            SeededItems(train_set, self.config.seed),
            batch_sampler=self.batches,
            num_workers=num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
        )

    def _grouped(self, loader):
        """The loader's batches, a list of those of each step."""
        batches = iter(loader)
        while step := list(islice(batches, self.config.gradient_accumulation_steps)):
            yield step

    def _with_progress_bar(self, steps, interval):
        """The steps' batches under a progress bar."""
        self.bar = progress_bar(
            steps,
            desc=interval.name,
            initial=self.progress.iteration - interval.start,
            total=interval.end - interval.start,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )
        return self.bar

    def _to_device(self, batch):
        if torch.is_tensor(batch):
            return batch.to(self.accelerator.device, non_blocking=True)
        return type(batch)(self._to_device(item) for item in batch) if isinstance(batch, (list, tuple)) else batch

    def _read_losses(self):
        """Read the losses since the last time, stop at one that is not finite, show the latest means."""
        first = self.progress.iteration + 1 - len(self.means.pending)
        for iteration, row in enumerate(self.means.read(self.accelerator), first):
            # Of what only measures, infinity is legal: the PSNR of a perfect reconstruction.
            wrong = [
                f"{name} is {value}"
                for name, value in row.items()
                if math.isnan(value) or (math.isinf(value) and name not in MEASURES)
            ]
            if wrong:
                place = f"iteration {iteration} (epoch {self.progress.epoch})"
                raise self._diverged(f"{', '.join(wrong)} at {place}")
        if self.means.count:
            means = self.means.means()
            self.bar.set_postfix({name: f"{means[name]:.3g}" for name in self.task.bar if name in means}, refresh=False)

    def _speed(self):
        """Of all processes: steps and images per second since the interval's first step, if there were more; and the
        memory of this one, in GB."""
        memory = {"memory_gb": memory_in_use(self.accelerator.device) / 1e9}
        if self.clock is None or self.progress.iteration == self.clock[1]:
            return memory
        start, first = self.clock
        speed = (self.progress.iteration - first) / (time.perf_counter() - start)
        batches = self.config.gradient_accumulation_steps * self.accelerator.num_processes
        images = batches * self.config.batch_size * self.task.images_per_item
        return {"steps_per_second": speed, "images_per_second": speed * images, **memory}

    def _time_left(self):
        """How long training takes yet, at the speed since it started or went on, evaluations included: in words."""
        start, first = self.start
        left = self.task.iterations(self.progress) - self.progress.iteration
        done = self.progress.iteration - first
        if not done or not left:
            return ""
        return f" time left {tqdm.format_interval((time.perf_counter() - start) / done * left)}"

    def _stop_requested(self):
        """Whether any process was asked to stop; all agree, but ask each other only every few seconds."""
        interruption = self.interruption
        if self.accelerator.num_processes == 1:
            return interruption.requested
        if self.progress.iteration % self.agreement_interval:
            return False
        seconds = (time.monotonic() - self.agreed) / self.agreement_interval
        mine = [float(interruption.requested), interruption.number or 0, seconds]
        everyone = self.accelerator.gather(torch.tensor([mine], device=self.accelerator.device))
        requests, numbers, seconds = everyone.T.tolist()
        interruption.number = interruption.number or int(max(numbers)) or None
        affordable = [steps for steps in divisors(READ_INTERVAL) if steps * max(seconds) <= AGREEMENT_SECONDS]
        self.agreement_interval, self.agreed = max(affordable, default=1), time.monotonic()
        return any(requests)

    def _say(self, line):
        """To log.txt and to the terminal."""
        self.run.log(line)
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def _position(self):
        return f"epoch {self.progress.epoch}, iteration {self.progress.iteration}"

    @contextmanager
    def _explaining_errors(self):
        """What ends training says how to go on, on the terminal and in log.txt."""
        try:
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise UserError("the GPU's memory is full; legal: a smaller batch_size, precision bfloat16") from error
            except RuntimeError as error:
                if self.accelerator.num_processes == 1 or not is_lost_process(error):
                    raise
                raise UserError(f"another process has ended at {self._position()}") from error
        except UserError as error:
            text = str(error) if isinstance(error, TrainingError) else f"{error}; {self._last_good()}"
            with suppress(UserError):  # the log cannot be written to either, perhaps for the same reason
                self.run.log(f"error: {text}")
            raise TrainingError(text) from error

    def _last_good(self):
        if not self.run.state_path.is_file():
            return "no checkpoint was saved before"
        return f"the last good checkpoint is kept; go on from it with: {self.resume_command} {self.run.path}"


def divisors(number):
    """The divisors of a whole number from 1 on, in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def mean_of(rows):
    """The mean of dicts of scalar tensors, of which there is one at least."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if len(rows) > 1 else rows[0]


def record_line(record):
    """A record of metrics.jsonl in a line: counts in full, other numbers in four digits."""
    texts = {name: value if isinstance(value, int) else f"{value:.4g}" for name, value in record.items()}
    return " ".join(f"{name} {text}" for name, text in texts.items())
