"""The tasks of training DLPv2 and DDLP, their stages as functions of the progress, and the command of both."""

from abc import abstractmethod
from functools import cached_property

import torch

from configs.schema import Config, overrides_from
from datasets.episodes import scaled
from datasets.get_dataset import first_frames, image_dataset, video_dataset
from datasets.particle_cache import cached_tokens, clip_batches, data_fingerprint
from eval.eval_gen_metrics import measure_predictions, measure_reconstructions, report, summarise
from eval.eval_model import animate_predictions, draw_ddlp, draw_dlp, mean_elbo
from eval.image_metrics import available_metrics
from rundir.run import MODELS, Run
from training.command import leave, parse_arguments, resume_command
from training.diagnosis import training_health
from training.loop import Interval, Task, TrainingLoop
from utils import checkpoints
from utils.device import make_accelerator, make_adam
from utils.errors import UserError
from utils.loss_functions import VGGDistance
from utils.plotting import LOSS_PANELS
from utils.random_state import preserve_random_state, seed_everything

FIGURE_ITEMS = 8  # training items that the figures show, at most
ANIMATIONS = 5  # of DDLP's predictions, per evaluation

# ------------------------------------------------------------------------------------- stages, from the progress alone


def training_stage(epoch, warmup_epoch):
    """The stage as keyword arguments of a model's `forward` and `calc_elbo`: `warmup_epoch` epochs of warm-up, which is
    noisy too, then one noisy epoch."""
    return {"warmup": epoch < warmup_epoch, "noisy": epoch < warmup_epoch + 1}


def dynamic_discount(progress, config, device=None):
    """The weights of the frames after the static ones, [T - num_static_frames + 1], 0..1: they rise with the iterations
    since the dynamics are trained, those of later frames more slowly."""
    horizon = config.timestep_horizon
    length = max(config.warmup_epoch, 1) * max(config.discount_iterations, progress.epoch_length)
    step = max(length // horizon, 1)
    iterations = progress.iteration - config.start_dyn_epoch * progress.epoch_length
    weights = iterations / (step * torch.arange(1, horizon + 1, device=device))
    return weights.clamp(max=1.0)[: max(horizon - config.num_static_frames + 1, 0)]


def noise_on_positions(progress, config, device=None):
    """The standard deviation of the noise on the positions that PINT sees, a number, or where it changes with the
    iterations since the dynamics are trained, a scalar."""
    first, last = config.pint_noise, config.pint_noise_last
    if last in (None, first):
        return first
    begin, end = (epoch * progress.epoch_length for epoch in (config.start_dyn_epoch, config.num_epochs))
    # Added to a tensor of the device, a number needs no copy that waits for it.
    done = torch.zeros((), device=device) + (progress.iteration - begin) / (end - begin)
    return first + (last - first) * done.clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------- the tasks


class ParticleTask(Task):
    """A model of `rundir.run.MODELS` (by `kind`) that is trained by its ELBO, epoch by epoch.

    Data sets and metrics are made once. Training goes on without the metrics that cannot be had here. run: the `Run`
    that goes on, which has the weights, or None: a new one begins, from those that the configuration names, if any.
    """

    kind: str
    bar = ("loss", "loss_rec", "kl", "psnr", "visible", "beta_a", "beta_b", "scale")
    graph = (LOSS_PANELS, "epoch")

    def __init__(self, config, accelerator, run=None):
        self.config, self.accelerator, self.run = config, accelerator, run
        self.save_every = config.save_every
        self.ema = None if config.ema is None else (config.ema, 1)
        self.images_per_item = config.timestep_horizon + 1 if self.kind == "ddlp" or config.use_tracking else 1

    def build_model(self):
        self.model = MODELS[self.kind].from_config(self.config)
        self.model.checkpointing = self.config.checkpointing
        if self.config.load_model and self.run is None:
            keep = None if self.config.pretrained_dynamics else "dyn_module."
            checkpoints.load_weights(self.model, self.config.pretrained_path, keep)
            self.model.reset_priors()
        return self.model

    def make_optimizer(self, model):
        config = self.config
        options = config.lr, config.adam_betas, config.adam_eps, config.weight_decay
        return make_adam(self.parameter_groups(model), *options), config.scheduler_gamma

    def parameter_groups(self, model):
        """What Adam trains: parameters, or groups of them with learning rates of their own."""
        return model.parameters()

    def open_data(self):
        # The validation set first: what is wrong with it shows before training starts.
        self.validation_items = self.open_validation_set()
        self.training_items = self.open_training_set()
        self._open_metrics()  # last: they may have to be downloaded
        return self.training_items

    def _open_metrics(self):
        config, device = self.config, self.accelerator.device
        metrics = config.metrics if config.eval_im_metrics else ()
        recon_loss_func = None
        if config.recon_loss_type == "vgg":
            from utils.pretrained import ensure_weight_files, missing_weight_files

            if missing_weight_files(recon_loss_type="vgg"):
                ensure_weight_files(metrics, "vgg")  # one message for all that is missing
            recon_loss_func = VGGDistance(device=device)
        self.images, self.notes = available_metrics(metrics, device)
        self.elbo_options = {
            "beta_kl": config.beta_kl,
            "beta_rec": config.beta_rec,
            "kl_balance": config.kl_balance,
            "recon_loss_type": config.recon_loss_type,
            "recon_loss_func": recon_loss_func,
        }

    def train_set(self, progress):
        return self.training_items, self.config.num_workers

    @abstractmethod
    def open_training_set(self):
        """The data set to train on."""

    @abstractmethod
    def open_validation_set(self):
        """The data set to evaluate on."""

    def kind_of_step(self, progress):
        return tuple(training_stage(progress.epoch, self.config.warmup_epoch).values())

    def interval(self, progress):
        start = progress.iteration - progress.batch
        return Interval(f"epoch {progress.epoch}", start, start + progress.epoch_length)

    def iterations(self, progress):
        return progress.iteration + (self.config.num_epochs - progress.epoch) * progress.epoch_length - progress.batch

    def end(self, progress):
        done = progress.epoch >= self.config.num_epochs
        return f"all {self.config.num_epochs} epochs are done; more: --num_epochs" if done else None

    def evaluate(self, model, progress, run):
        epoch, every, last = progress.epoch, self.config.eval_epoch_freq, self.config.num_epochs - 1
        if epoch % every and epoch != last:
            return {}
        scores = {"val_loss": self.validation_loss(model, epoch, run)}
        if epoch > 0 and self.images.modules:
            scores |= report(self.measure(model), run.path, self.accelerator)
        if self.accelerator.is_main_process:
            for name, image in self.draw(model, scaled(self.figure_items)).items():
                run.save_figure(f"{name}_{epoch}", image)
        run.save_weights(model.state_dict())
        return scores

    def validation_loss(self, model, epoch, run, elbo_options=None, forward_options=None, num_frames=None):
        def figure(model, x):
            run.save_figure(f"image_valid_{epoch}", self.draw(model, x)["image"])

        return mean_elbo(
            model,
            self.validation_items,
            {**self.elbo_options, **(elbo_options or {})},
            forward_options,
            num_frames,
            self.config.batch_size,
            self.config.num_workers,
            self.accelerator.device,
            self.accelerator,
            figure,
        )

    @abstractmethod
    def measure(self, model):
        """The image metrics of the validation set: name to number."""

    @abstractmethod
    def draw(self, model, x):
        """The figures of training items: name to image tensor [3, H, W]."""

    @cached_property
    def figure_items(self):
        """The first items of the training set, on the device: [n, ...]."""
        items = [self.training_items[i][0] for i in range(min(FIGURE_ITEMS, len(self.training_items)))]
        return torch.stack(items).to(self.accelerator.device)


class DLPTask(ParticleTask):
    """DLPv2: one image, or with tracking one clip, per item."""

    kind = "dlp"

    def open_training_set(self):
        return image_dataset(self.config, "train", as_uint8=True)

    def open_validation_set(self):
        return image_dataset(self.config, "val", as_uint8=True)

    def losses(self, model, batch, progress):
        x = scaled(batch[0])
        stage = training_stage(progress.epoch, self.config.warmup_epoch)
        output = model(x, train_enc_prior=self.config.train_enc_prior, alpha_masks=False, **stage)
        losses = self.model.calc_elbo(x, output, **self.elbo_options, **stage)
        return {**losses, **training_health(x, output)}

    def measure(self, model):
        config = self.config
        return measure_reconstructions(
            model, self.validation_items, self.images, config.batch_size, config.num_workers, self.accelerator
        )

    def draw(self, model, x):
        return draw_dlp(model, x, self.config.topk, self.config.iou_thresh)


class DDLPTask(ParticleTask):
    """DDLP: a clip of T + 1 frames per item."""

    kind = "ddlp"
    bar = (*ParticleTask.bar, "kl_dyn")

    def open_training_set(self):
        return video_dataset(self.config, "train", self.config.timestep_horizon + 1, as_uint8=True)

    def open_validation_set(self):
        needed = max(self.config.animation_horizon, self.config.timestep_horizon + 1)
        videos = video_dataset(self.config, "val", needed, as_uint8=True)
        first_frames(videos[0], needed)  # raises where an episode is too short
        return videos

    def train_set(self, progress):
        if self._trains_on_particles(progress):
            return self.cached_posteriors, 0  # in memory: other processes would only cost time
        return super().train_set(progress)

    def losses(self, model, batch, progress):
        config = self.config
        learns_all = not self._trains_dynamics_alone(progress)
        self.model.set_require_grad(prior_value=learns_all, enc_value=learns_all, dec_value=learns_all)
        if self._trains_on_particles(progress):
            return self._losses_of_dynamics(model, self.posterior_layout.unpack(batch[0]), progress)
        x = scaled(batch[0])
        stage = training_stage(progress.epoch, config.warmup_epoch)
        with_dynamics = progress.epoch >= config.start_dyn_epoch
        output = model(
            x,
            forward_dyn=with_dynamics,
            train_enc_prior=config.train_enc_prior,
            num_static_frames=config.num_static_frames,
            pint_noise=noise_on_positions(progress, config, x.device),
            alpha_masks=False,
            **stage,
        )
        if with_dynamics:
            discount = dynamic_discount(progress, config, x.device)
            options = {**self.dynamics_options, "dynamic_discount": discount}
            losses = self.model.calc_elbo(x, output, **options, **self.elbo_options, **stage)
        else:
            losses = self.model.calc_elbo_static(x, output, **self.elbo_options, **stage)
        return {**losses, **training_health(x, output)}

    def parameter_groups(self, model):
        config = self.config
        if config.pint_bias_lr == 1.0:
            return super().parameter_groups(model)
        return groups_with_pint_biases(model, config.pint_bias_lr * config.lr)

    def kind_of_step(self, progress):
        with_dynamics, alone = progress.epoch >= self.config.start_dyn_epoch, self._trains_dynamics_alone(progress)
        return (*super().kind_of_step(progress), with_dynamics, alone)

    def _losses_of_dynamics(self, model, posterior, progress):
        """The loss of PINT alone on particles drawn from the posteriors of clips."""
        config, device = self.config, posterior.z_base.device
        noise = noise_on_positions(progress, config, device)
        return self.model.calc_dynamics_loss(
            posterior,
            model(posterior, num_static_frames=config.num_static_frames, pint_noise=noise),
            config.beta_dyn,
            dynamic_discount(progress, config, device),
            beta_dyn_l1=config.beta_dyn_l1,
            num_static=config.num_static_frames,
            recon_loss_type=config.recon_loss_type,
        )

    def _trains_dynamics_alone(self, progress):
        return self.config.dyn_only_epoch is not None and progress.epoch >= self.config.dyn_only_epoch

    def _trains_on_particles(self, progress):
        return self.config.dyn_particle_cache and self._trains_dynamics_alone(progress)

    @cached_property
    def posterior_layout(self):
        """The `Posterior` of one training clip, for its shapes."""
        clip = scaled(self.training_items[0][0].to(self.accelerator.device))
        with torch.no_grad(), preserve_random_state():
            return self.model.encode_posterior(clip[None], self.config.num_static_frames)

    @cached_property
    def cached_posteriors(self):
        """The posteriors of all training clips, each a row of `Posterior.pack`, encoded where they are not yet."""
        config, clips = self.config, self.training_items
        shape = (len(clips), config.timestep_horizon + 1, self.posterior_layout.pack().shape[-1])
        others = {name: value for name, value in self.model.state_dict().items() if not name.startswith("dyn_module.")}
        key = {
            "weights": checkpoints.weights_sha256(others),
            "architecture": repr(self.model.architecture),
            "num_static_frames": config.num_static_frames,
            "seed": config.seed,
            "data": data_fingerprint(clips),
        }
        processes = self.accelerator.process_index, self.accelerator.num_processes
        return cached_tokens(config.root, config.ds, key, shape, self._encode, "dyn_particle_cache false", *processes)

    def _encode(self, which):
        """Yield the posteriors of the training clips `which`, packed, in order, on the CPU; always the same."""
        config = self.config
        seed_everything(config.seed, "particles", which[0])
        with torch.no_grad():
            for batch in clip_batches(self.training_items, which, config.num_workers):
                clips = scaled(batch[0].to(self.accelerator.device))
                yield self.model.encode_posterior(clips, config.num_static_frames).pack().cpu()

    @property
    def dynamics_options(self):
        config = self.config
        return {
            "beta_dyn": config.beta_dyn,
            "beta_dyn_l1": config.beta_dyn_l1,
            "beta_dyn_rec": config.beta_dyn_rec,
            "num_static": config.num_static_frames,
        }

    def validation_loss(self, model, epoch, run):
        config = self.config
        return super().validation_loss(
            model,
            epoch,
            run,
            self.dynamics_options,
            {"num_static_frames": config.num_static_frames},
            config.timestep_horizon + 1,
        )

    def measure(self, model):
        config = self.config
        over_time = measure_predictions(
            model,
            self.validation_items,
            self.images,
            config.animation_horizon,
            config.cond_steps,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            accelerator=self.accelerator,
        )
        return summarise(over_time)

    def evaluate(self, model, progress, run):
        scores = super().evaluate(model, progress, run)
        if scores and self.accelerator.is_main_process:
            config, count = self.config, min(ANIMATIONS, len(self.validation_items))
            paths = [run.figures / f"e{progress.epoch}_traj_anim_{i}.gif" for i in range(count)]
            seen, seconds = config.cond_steps, config.animation_fps
            animate_predictions(
                model, self.validation_items, range(count), paths, config.animation_horizon, seen, seconds
            )
            run.track(paths[0])
        return scores

    def draw(self, model, x):
        return draw_ddlp(model, x, self.config.topk, self.config.iou_thresh)


def leaves_parameters_unused(config):
    """Whether some training steps leave parameters without a gradient: PINT's before the dynamics are trained, all
    others' once they alone are, the prior's where it is not trained."""
    return config.start_dyn_epoch > 0 or config.dyn_only_epoch is not None or not config.train_enc_prior


def groups_with_pint_biases(model, lr):
    """A model's parameters as two groups of an optimiser: all others, and PINT's biases, which learn at rate `lr`."""
    named = list(model.named_parameters())
    biases = [parameter for name, parameter in named if "rel_pos_bias" in name]
    others = [parameter for name, parameter in named if "rel_pos_bias" not in name]
    return [{"params": others}, {"params": biases, "lr": lr}]


# --------------------------------------------------------------------------------------------------------- the command


def train(task_class, config, run_path=None):
    """Train a `ParticleTask`'s model with a `Config`: a new run, or the one at `run_path` that goes on.

    Returns the `TrainingLoop`, which has the `trained_model`.
    """
    accelerator = make_accelerator(config.device, leaves_parameters_unused(config))
    run = None if run_path is None else Run.open(run_path, accelerator.is_main_process)
    task = task_class(config, accelerator, run)
    loop = TrainingLoop(task, config, accelerator, resume_command(task.kind, accelerator))
    if run is None:
        run = Run.create(config, task.kind, accelerator)
    else:
        loop.resume(run)
        run.save_config(config)
    loop.fit(run)
    return loop


def train_command(task_class, description, arguments=None):
    """The training command of a `ParticleTask`. description: of the command, for its help; arguments: default
    `sys.argv`."""
    args = parse_arguments(description, Config, ("-d", "--dataset"), arguments)
    overrides = overrides_from(args)
    if args.resume is not None:
        run = Run.open(args.resume)
        if run.kind != task_class.kind:
            raise UserError(f"{run.path} is a run of kind {run.kind}; this command goes on with kind {task_class.kind}")
        config = run.config.resume(run.may_change, **overrides)
    else:
        config = Config.load(args.new).replace("command line", **overrides)
    leave(train(task_class, config, args.resume))
