"""DiffuseDDLP's diffusion over the particles of a clip's first frames (arXiv 2306.05957): the denoisers, the
normalisation of particles, and the noise schedule with its samplers.

Shape letters: B clips, T frames, K particles, N = K + 1 tokens per frame (the last one is the background's), F width
of a token (`TokenLayout`), C width of a denoiser.
"""

import itertools
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from modules.dynamics_modules import ParticleTransformer
from modules.modules import mlp
from modules.particles import TokenLayout
from utils.errors import UserError
from utils.legal import check_choice, illegal

# diffusers takes seconds to import, and most commands need none of it: it is imported where it is used.

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
BETA_SCHEDULES = ("cosine", "linear")


SAMPLERS = ("ddpm", "ddim", "dpm++")
DEFAULT_SAMPLER, DEFAULT_STEPS = "dpm++", 50


def sampling_steps(sampler, steps, all_steps, name="steps"):
    """How often `sampler` denoises: `steps`, or by default `DEFAULT_STEPS`, or with "ddpm" `all_steps`, those of the
    noise schedule. `UserError` for an illegal number, which `name` is the name of."""
    if sampler == "ddpm":
        if steps not in (None, all_steps):
            raise illegal(name, steps, f"{all_steps} with sampler ddpm, which takes all steps")
        return all_steps
    if steps is None:
        return min(DEFAULT_STEPS, all_steps)
    if steps not in range(1, all_steps + 1):
        raise illegal(name, steps, f"1 to {all_steps}, the steps of the noise schedule")
    return steps


# ------------------------------------------------------------------------------------------------------- denoisers


class SinusoidalTimeEmbedding(nn.Module):
    """Times [B] -> [B, dim]: sines, then cosines, of frequencies from 1 down to 1/10000 (arXiv 2006.11239)."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, time):
        half = self.dim // 2
        exponents = torch.arange(half, dtype=time.dtype, device=time.device) / (half - 1)
        angles = time[:, None] * torch.exp(-math.log(10_000) * exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class LearnedSinusoidalTimeEmbedding(nn.Module):
    """Times [B] -> [B, dim + 1]: the time, then sines and cosines of frequencies that are learned or, if `is_random`,
    stay as drawn."""

    def __init__(self, dim, is_random):
        super().__init__()
        if dim % 2:
            raise ValueError(f"learned_sinusoidal_dim is {dim}; legal: an even number")
        self.weights = nn.Parameter(torch.randn(dim // 2), requires_grad=not is_random)

    def forward(self, time):
        angles = 2 * math.pi * time[:, None] * self.weights
        return torch.cat([time[:, None], angles.sin(), angles.cos()], dim=-1)


def _with_condition(x, x_self_cond):
    """The denoiser's input with the last estimate of x_0 (zeros if there is none) in front, along the features."""
    return torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=-1)


class PINTDenoiser(nn.Module):
    """A denoiser on PINT's transformer, causal in the frames.

    features_dim: F; hidden_dim: width of the MLPs in and out; projection_dim: C; block_size: the most frames;
    max_particles: N, or None for any number, without a bias by particle order; self_condition: the last estimate of
    x_0 is a second input (arXiv 2208.04202); learned_sinusoidal_cond, random_fourier_features: time embeddings with
    learned, or random fixed, frequencies, `learned_sinusoidal_dim` // 2 of them. predict_delta has no effect, as in
    the published release: a denoiser's output is what the diffusion's objective says.
    """

    def __init__(
        self,
        features_dim,
        hidden_dim,
        projection_dim,
        n_head=4,
        n_layer=2,
        block_size=12,
        dropout=0.1,
        predict_delta=True,
        positional_bias=True,
        max_particles=None,
        self_condition=False,
        learned_sinusoidal_cond=False,
        random_fourier_features=False,
        learned_sinusoidal_dim=16,
    ):
        super().__init__()
        self.features_dim, self.block_size, self.max_particles = features_dim, block_size, max_particles
        self.self_condition = self_condition
        if learned_sinusoidal_cond or random_fourier_features:
            embedding = LearnedSinusoidalTimeEmbedding(learned_sinusoidal_dim, random_fourier_features)
            embedding_dim = learned_sinusoidal_dim + 1
        else:
            embedding, embedding_dim = SinusoidalTimeEmbedding(projection_dim), projection_dim
        time_layers = mlp(embedding_dim, 4 * projection_dim, projection_dim, activation=nn.GELU)
        self.time_mlp = nn.Sequential(embedding, *time_layers)
        in_dim = 2 * features_dim if self_condition else features_dim
        self.particle_projection = mlp(in_dim, hidden_dim, projection_dim, activation=nn.GELU)
        self.particle_transformer = ParticleTransformer(
            projection_dim, n_head, n_layer, block_size, max_particles, dropout, positional_bias
        )
        self.particle_decoder = mlp(projection_dim, hidden_dim, features_dim, activation=nn.GELU)

    def forward(self, x, time, x_self_cond=None):
        """x: [B, T, N, F], T <= block_size and N <= max_particles; time: [B], 0, 1, ..; x_self_cond: None or shaped as
        x, used with `self_condition`. Returns [B, T, N, F]."""
        self._check(x)
        if self.self_condition:
            x = _with_condition(x, x_self_cond)
        tokens = self.particle_projection(x) + self.time_mlp(time.to(x.dtype))[:, None, None]
        return self.particle_decoder(self.particle_transformer(tokens))

    def _check(self, x):
        frames, particles = x.shape[1:3]
        if frames > self.block_size:
            raise ValueError(f"particles of {frames} frames; legal: at most block_size {self.block_size}")
        if self.max_particles is not None and particles > self.max_particles:
            raise ValueError(f"frames of {particles} tokens; legal: at most max_particles {self.max_particles}")


class UNetDenoiser(nn.Module):
    """A convolutional denoiser to compare PINT's with: a U-Net over the grid of frames x particles, whose channels are
    the features. It is not causal, and the particles' order matters.

    features_dim: F; dim: C, the width below the one halving, where there is attention; above it is C / 2;
    max_particles: N; self_condition: as for `PINTDenoiser`, which has the same call.
    """

    def __init__(self, features_dim, dim, n_head=4, dropout=0.1, max_particles=None, self_condition=False):
        super().__init__()
        from diffusers import UNet2DModel

        self.features_dim, self.max_particles, self.self_condition = features_dim, max_particles, self_condition
        self.unet = UNet2DModel(
            in_channels=2 * features_dim if self_condition else features_dim,
            out_channels=features_dim,
            block_out_channels=(dim // 2, dim),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=dim // n_head,
            norm_num_groups=math.gcd(dim // 2, 32),
            dropout=dropout,
        )

    def forward(self, x, time, x_self_cond=None):
        if self.self_condition:
            x = _with_condition(x, x_self_cond)
        frames, particles = x.shape[1:3]
        grid = F.pad(x.permute(0, 3, 1, 2), (0, particles % 2, 0, frames % 2))  # to even sides
        return self.unet(grid, time).sample[:, :, :frames, :particles].permute(0, 2, 3, 1)


# --------------------------------------------------------------------------------------------------- normalisation


class RunningStatistics:
    """Count, mean, sum of squared deviations, smallest and largest value of each feature, in float64.

    Batches are merged as by Chan, Golub and LeVeque (1983): the result is that of one pass over everything.
    """

    def __init__(self):
        self.count = 0

    def update(self, values):
        """values: [*, n]."""
        values = values.flatten(0, -2).double()
        mean = values.mean(0)
        self._merge(len(values), mean, (values - mean).square().sum(0), values.amin(0), values.amax(0))

    def merge(self, other):
        """Add what another object of this class has seen."""
        if other.count:
            self._merge(other.count, other.mean, other.squares, other.low, other.high)

    def _merge(self, count, mean, squares, low, high):
        if self.count == 0:
            self.count, self.mean, self.squares, self.low, self.high = count, mean, squares, low, high
            return
        total, delta = self.count + count, mean - self.mean
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count = total

    @property
    def std(self):
        """Unbiased."""
        return (self.squares / max(self.count - 1, 1)).sqrt()


class ParticleNormalization(nn.Module):
    """The normalisation of tokens by statistics of each feature over the training set.

    mode "minmax": 2 (x - min) / (max - min + eps) - 1; "std": (x - mean) / (std + eps). Particles and background each
    have their own statistics, of widths 6 + d and d_bg; positions of the background and padding are 0 before and after.
    The buffers are those of the published `latent_stats.pth`.
    """

    def __init__(self, features_dim, bg_features_dim, mode="minmax", eps=1e-5):
        super().__init__()
        check_choice("mode", mode, ("minmax", "std"))
        self.mode, self.eps = mode, eps
        self.layout = TokenLayout(features_dim, bg_features_dim)
        for suffix, width in {"": self.layout.particle_dim, "_bg": bg_features_dim}.items():
            self.register_buffer(f"mu{suffix}", torch.zeros(width))
            self.register_buffer(f"std{suffix}", torch.ones(width))
            self.register_buffer(f"min_val{suffix}", -torch.ones(width))
            self.register_buffer(f"max_val{suffix}", torch.ones(width))

    def fit(self, batches, gather=None):
        """Take the statistics of all batches of tokens [B, T, N, F] that the iterable gives.

        gather: where each of several processes has batches of its own, a function that returns the list of what all of
        them give it. Raises `UserError` if there are no batches, or a value is not finite.
        """
        parts = [RunningStatistics(), RunningStatistics()]
        for tokens in batches:
            for running, values in zip(parts, self.layout.split(tokens.cpu()), strict=True):
                running.update(values)
        shares = [parts] if gather is None else gather(parts)
        for suffix, same_part in zip(("", "_bg"), zip(*shares, strict=True), strict=True):
            running = RunningStatistics()
            for share in same_part:
                running.merge(share)
            if running.count == 0:
                raise UserError("no particles to take statistics of; legal: one clip or more")
            if not running.squares.isfinite().all():
                raise UserError("a particle is not finite; legal: particles of a DDLP whose weights are finite")
            values = {"mu": running.mean, "std": running.std, "min_val": running.low, "max_val": running.high}
            for name, value in values.items():
                getattr(self, name + suffix).copy_(value)

    def normalize(self, tokens):
        """Tokens [*, N, F] -> tokens around 0, in -1..1 with "minmax"."""
        return self._apply_to_parts(tokens, lambda values, centre, scale: (values - centre) / scale)

    def unnormalize(self, tokens):
        """What `normalize` normalised."""
        return self._apply_to_parts(tokens, lambda values, centre, scale: values * scale + centre)

    def _apply_to_parts(self, tokens, function):
        particles, background = self.layout.split(tokens)
        return self.layout.join(
            function(particles, *self._centre_and_scale("")), function(background, *self._centre_and_scale("_bg"))
        )

    def _centre_and_scale(self, suffix):
        if self.mode == "std":
            return getattr(self, f"mu{suffix}"), getattr(self, f"std{suffix}") + self.eps
        low, high = getattr(self, f"min_val{suffix}"), getattr(self, f"max_val{suffix}")
        scale = (high - low + self.eps) / 2
        return low + scale, scale


# ------------------------------------------------------------------------------------------------------- diffusion


def noise_schedule(beta_schedule, timesteps):
    """The variances beta_t of the noise that is added at each step, [timesteps], float64.

    "cosine" (arXiv 2102.09672): s = 0.008, at most 0.999; "linear" (arXiv 2006.11239): 1e-4 to 0.02 in 1000 steps,
    scaled for other numbers of steps.
    """
    if beta_schedule == "linear":
        return torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64).clamp(max=0.999)
    time = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - signal[1:] / signal[:-1]).clamp(0, 0.999)


def schedule_constants(betas, p2_gamma, p2_k):
    """Everything that follows from the betas, by the published checkpoints' names; computed in their dtype."""
    alphas = 1 - betas
    product = alphas.cumprod(0)
    previous = F.pad(product[:-1], (1, 0), value=1.0)
    variance = betas * (1 - previous) / (1 - product)
    return {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": product.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - product).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - product).log(),
        "sqrt_recip_alphas_cumprod": (1 / product).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / product - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - product),
        "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - product),
        "p2_loss_weight": (p2_k + product / (1 - product)) ** -p2_gamma,
    }


def _at(values, t, like):
    """The schedule's values at times t [B], shaped to be multiplied with `like`, [B, ...]."""
    return values[t].to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def _randn(like, generator=None):
    """Normal noise shaped as `like`; drawn on the generator's device, if one is given."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


@contextmanager
def _evaluating(module):
    """The module in evaluation mode, for a while."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class GaussianDiffusionPINT(nn.Module):
    """Denoising diffusion (arXiv 2006.11239) of tokens [B, T, N, F].

    model: the denoiser, `model(x, time, x_self_cond=None)`, with attributes `features_dim`, `max_particles` and
    `self_condition`; seq_length: T; timesteps: steps of the noise schedule; sampling_timesteps: steps of a sample, DDIM
    if fewer; loss_type: "l1" or "l2"; objective: what the model predicts, "pred_noise", "pred_x0" or "pred_v" (arXiv
    2202.00512); beta_schedule: see `noise_schedule`; p2_loss_weight_gamma, p2_loss_weight_k: the loss at time t is
    weighed by (k + SNR_t)^-gamma (arXiv 2204.00227); ddim_sampling_eta: DDIM's eta, 0 without noise to 1;
    auto_normalize: the tokens outside are in 0..1 instead of -1..1; clip_denoised: sampling clamps estimates of x_0 to
    -1..1, which is right only where the tokens are in there.
    """

    def __init__(
        self,
        model,
        *,
        seq_length,
        timesteps=1000,
        sampling_timesteps=None,
        loss_type="l1",
        objective="pred_noise",
        beta_schedule="cosine",
        p2_loss_weight_gamma=0.0,
        p2_loss_weight_k=1,
        ddim_sampling_eta=0.0,
        auto_normalize=False,
        clip_denoised=True,
    ):
        super().__init__()
        check_choice("loss_type", loss_type, tuple(LOSSES))
        check_choice("objective", objective, OBJECTIVES)
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        if not isinstance(timesteps, int) or timesteps < 2:
            raise UserError(f"timesteps is {timesteps}; legal: an integer, at least 2")
        self.model, self.seq_length, self.num_timesteps = model, seq_length, timesteps
        self.sampling_timesteps = timesteps if sampling_timesteps is None else sampling_timesteps
        self._check_steps("sampling_timesteps", self.sampling_timesteps)
        self._check_eta("ddim_sampling_eta", ddim_sampling_eta)
        self.loss_type, self.objective, self.ddim_sampling_eta = loss_type, objective, ddim_sampling_eta
        self.auto_normalize, self.clip_denoised, self.beta_schedule = auto_normalize, clip_denoised, beta_schedule
        betas = noise_schedule(beta_schedule, timesteps)
        for name, values in schedule_constants(betas, p2_loss_weight_gamma, p2_loss_weight_k).items():
            self.register_buffer(name, values.float())

    # -------------------------------------------------------------------------------------------------- formulas

    def q_sample(self, x_start, t, noise=None):
        """A draw from q(x_t | x_0) at times t [B]; x_start, noise: [B, ...]."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            _at(self.sqrt_alphas_cumprod, t, noise) * x_start
            + _at(self.sqrt_one_minus_alphas_cumprod, t, noise) * noise
        )

    def q_posterior(self, x_start, x_t, t):
        """Mean, variance and log variance (at least log 1e-20) of q(x_{t-1} | x_t, x_0)."""
        mean = _at(self.posterior_mean_coef1, t, x_t) * x_start + _at(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, _at(self.posterior_variance, t, x_t), _at(self.posterior_log_variance_clipped, t, x_t)

    def predict_start(self, x_t, t, output):
        """x_0 from the model's output."""
        if self.objective == "pred_x0":
            return output
        if self.objective == "pred_noise":
            return (
                _at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
                - _at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * output
            )
        return _at(self.sqrt_alphas_cumprod, t, x_t) * x_t - _at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * output

    def predict_noise(self, x_t, t, x_start):
        """The noise of x_t, from x_0."""
        return (_at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x_start) / _at(
            self.sqrt_recipm1_alphas_cumprod, t, x_t
        )

    def predict_v(self, x_start, t, noise):
        """v_t = sqrt(alpha_t) noise - sqrt(1 - alpha_t) x_0, with the products alpha_t."""
        return (
            _at(self.sqrt_alphas_cumprod, t, noise) * noise
            - _at(self.sqrt_one_minus_alphas_cumprod, t, noise) * x_start
        )

    # ------------------------------------------------------------------------------------------------------ loss

    def forward(self, img, mask=None, *args, **kwargs):
        """The training loss at random times; see `p_losses`, which gets the other arguments.

        img: tokens [B, T, N, F]; mask: shaped to be multiplied with them, 0 where the error does not count.
        """
        t = torch.randint(0, self.num_timesteps, (len(img),), device=img.device)
        return self.p_losses(2 * img - 1 if self.auto_normalize else img, t, mask, *args, **kwargs)

    def p_losses(self, x_start, t, mask=None, noise=None):
        """The loss at times t [B], a scalar: masked errors, averaged over all elements, masked ones included.

        With self-conditioning, half of the times the model is given its own first estimate of x_0.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t, condition = self.q_sample(x_start, t, noise), None
        if self.model.self_condition and torch.rand(()) < 0.5:
            with torch.no_grad():
                condition = self._estimate(x_t, t)
        output = self.model(x_t, t, condition)
        if self.objective == "pred_x0":
            target = x_start
        else:
            target = noise if self.objective == "pred_noise" else self.predict_v(x_start, t, noise)
        loss = LOSSES[self.loss_type](output, target, reduction="none")
        loss = loss if mask is None else loss * mask
        return (loss.flatten(1).mean(1) * self.p2_loss_weight[t].to(loss.dtype)).mean()

    # -------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self,
        batch_size=16,
        *,
        sampler=None,
        steps=None,
        eta=None,
        noise=None,
        mask=None,
        generator=None,
        progress=iter,
    ):
        """Draw tokens [B, T, N, F].

        sampler: "ddpm" (all steps, with noise), "ddim" (arXiv 2010.02502) or "dpm++" (DPM-Solver++ of second order,
        arXiv 2211.01095, at times that lie closer where there is little noise), by default as `sampling_timesteps`
        says; steps: of "ddim" and "dpm++", default `sampling_timesteps`; eta: the noise of each step, of "ddim" from 0
        to 1, default `ddim_sampling_eta`, of "dpm++" 1 (it solves the stochastic equation, the default) or 0 (the
        ordinary one); noise: x_T, [B, T, N, F], instead of `batch_size` draws; mask: shaped to be multiplied with the
        tokens, 0 where every estimate of x_0 is to be 0, as those elements are that the loss leaves out; generator: of
        the draws; progress: what the steps are wrapped in, such as tqdm.

        Raises `UserError` if an argument is not legal.
        """
        fewer = self.sampling_timesteps < self.num_timesteps
        sampler = sampler if sampler is not None else ("ddim" if fewer else "ddpm")
        check_choice("sampler", sampler, SAMPLERS)
        if steps is None and sampler != "ddpm":
            steps = self.sampling_timesteps
        steps = sampling_steps(sampler, steps, self.num_timesteps)
        if eta is None:
            eta = 1 if sampler == "dpm++" else self.ddim_sampling_eta
        self._check_eta("eta", eta)
        if sampler == "dpm++" and eta not in (0, 1):
            raise UserError(f"eta is {eta}; legal: 0 or 1 with sampler dpm++")
        x = self._initial_noise(batch_size, generator) if noise is None else noise
        with _evaluating(self.model):
            if sampler == "ddpm":
                x = self._ancestral(x, self.num_timesteps - 1, mask, generator, progress)
            elif sampler == "ddim":
                x = self._ddim(x, steps, eta, mask, generator, progress)
            else:
                x = self._dpm_solver(x, steps, eta, mask, generator, progress)
        return (x + 1) / 2 if self.auto_normalize else x

    @torch.no_grad()
    def interpolate(self, x1, x2, t=None, lam=0.5, mask=None):
        """Between two sets of tokens [B, T, N, F]: both are diffused to time t (default the last) with the same noise,
        mixed as (1 - lam) x1 + lam x2, and denoised (arXiv 2006.11239, section 4.4); mask: as for `sample`."""
        t = self.num_timesteps - 1 if t is None else t
        if x1.shape != x2.shape:
            raise ValueError(f"x2 of shape {list(x2.shape)}; legal: that of x1, {list(x1.shape)}")
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"t is {t}; legal: 0 to {self.num_timesteps - 1}")
        mixed = (1 - lam) * x1 + lam * x2
        mixed = 2 * mixed - 1 if self.auto_normalize else mixed
        x = self.q_sample(mixed, torch.full((len(x1),), t, device=x1.device))
        with _evaluating(self.model):
            x = self._ancestral(x, t, mask)
        return (x + 1) / 2 if self.auto_normalize else x

    def _check_steps(self, name, steps):
        if not isinstance(steps, int) or not 1 <= steps <= self.num_timesteps:
            raise UserError(f"{name} is {steps}; legal: 1 to {self.num_timesteps}, the steps of the noise schedule")

    @staticmethod
    def _check_eta(name, eta):
        if not 0 <= eta <= 1:
            raise UserError(f"{name} is {eta}; legal: from 0 to 1")

    def _initial_noise(self, batch_size, generator):
        if self.model.max_particles is None:
            raise ValueError("max_particles is None; legal for sampling without given noise: a number of particles")
        like = self.betas.new_empty(()).expand(
            batch_size, self.seq_length, self.model.max_particles, self.model.features_dim
        )
        return _randn(like, generator)

    def _estimate(self, x, t, previous=None, mask=None):
        """The model's x_0 for x_t at times t [B]; previous: the last step's x_0, for self-conditioning; mask: see
        `sample`."""
        x_start = self.predict_start(x, t, self.model(x, t, previous if self.model.self_condition else None))
        x_start = x_start.clamp(-1, 1) if self.clip_denoised else x_start
        return x_start if mask is None else x_start * mask

    def _ancestral(self, x, start, mask=None, generator=None, progress=iter):
        """DDPM from x_start, a time, down to x_0."""
        x_start = None
        for time in progress(range(start, -1, -1)):
            t = torch.full((len(x),), time, device=x.device)
            x_start = self._estimate(x, t, x_start, mask)
            x, _, logvar = self.q_posterior(x_start, x, t)
            if time > 0:
                x = x + torch.exp(0.5 * logvar) * _randn(x, generator)
        return x

    def _times(self, steps):
        """The times that a sampler with fewer steps visits, from the last one down."""
        # As published, rounding errors included: 30 of 1000 steps visit 498, where 499 would be exact.
        times = torch.linspace(-1, self.num_timesteps - 1, steps + 1, dtype=torch.float64)
        return times.int().flip(0).tolist()[:-1]

    def _ddim(self, x, steps, eta, mask, generator, progress):
        x_start = None
        for time, following in progress(list(itertools.pairwise([*self._times(steps), None]))):
            t = torch.full((len(x),), time, device=x.device)
            x_start = self._estimate(x, t, x_start, mask)
            if following is None:
                return x_start
            alpha, next_alpha = self.alphas_cumprod[time].to(x.dtype), self.alphas_cumprod[following].to(x.dtype)
            noise = self.predict_noise(x, t, x_start)
            sigma = eta * ((1 - alpha / next_alpha) * (1 - next_alpha) / (1 - alpha)).sqrt()
            x = next_alpha.sqrt() * x_start + (1 - next_alpha - sigma**2).sqrt() * noise
            if eta > 0:
                x = x + sigma * _randn(x, generator)

    def _quadratic_times(self, steps):
        """As many different times from the last one down to 0, as i^2 for i in 0 .. steps - 1."""
        last = self.num_timesteps - 1
        # Rounding must not make two of them one.
        times = [max(round(last * (i / (steps - 1)) ** 2), i) for i in range(1, steps)]
        return [*reversed(times), 0] if times else [last]

    def _dpm_solver(self, x, steps, eta, mask, generator, progress):
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        solver = DPMSolverMultistepScheduler(
            num_train_timesteps=self.num_timesteps,
            prediction_type="sample",
            final_sigmas_type="zero",
            algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        )
        # Its own products are accumulated in float32.
        solver.alphas_cumprod = (1 - noise_schedule(self.beta_schedule, self.num_timesteps)).cumprod(0).numpy()
        solver.set_timesteps(timesteps=self._quadratic_times(steps))
        x_start = None
        for time in progress(solver.timesteps.tolist()):
            x_start = self._estimate(x, torch.full((len(x),), time, device=x.device), x_start, mask)
            x = solver.step(x_start, time, x, generator).prev_sample
        return x
