"""DiffuseDDLP: the denoisers, the diffusion and its samplers, packing, normalisation, and the model, against the
published release's numbers and against plain computations."""

import math

import pytest
import torch
from ema_pytorch import EMA
from torch import nn

from models import DiffuseDDLP, ObjectDynamicsDLP
from modules import diffusion_modules
from modules.diffusion_modules import (
    GaussianDiffusionPINT,
    ParticleNormalization,
    PINTDenoiser,
    RunningStatistics,
    UNetDenoiser,
    noise_schedule,
)
from modules.particles import Particles, TokenLayout
from tests import golden
from tests.golden import DTYPES, assert_close
from tests.small_dlp import images
from utils import checkpoints
from utils.errors import UserError

ARRAYS = golden.arrays("diffusion")
CASE = golden.case("diffusion")
DDLP_CASE = golden.case(CASE["ddlp_case"])
DDLP_CONFIG = {
    "ds": "toy",
    **{("ch" if name == "cdim" else name): value for name, value in DDLP_CASE["arguments"].items()},
}
CONFIG = {"ds": "toy", "ddlp_dir": "none", "diffusion_num_steps": 20, "diffuse_frames": 3}
T, K, D = 3, DDLP_CASE["arguments"]["n_kp_enc"], DDLP_CASE["arguments"]["learned_feature_dim"]


def array(name, dtype=torch.float64):
    return torch.from_numpy(ARRAYS[name]).to(dtype)


def golden_denoiser():
    denoiser = PINTDenoiser(**CASE["denoiser"])
    denoiser.load_state_dict(golden.state_dict(golden.manifest("denoiser"), CASE["denoiser_seed"]), strict=True)
    return denoiser


def golden_diffusion(dtype, **options):
    return GaussianDiffusionPINT(golden_denoiser(), seq_length=4, objective="pred_x0", **options).to(dtype).eval()


def golden_model(dtype, **config):
    ddlp = ObjectDynamicsDLP(**DDLP_CASE["arguments"])
    weights = golden.state_dict(golden.manifest(CASE["ddlp_case"]), CASE["ddlp_seed"])
    ddlp.load_state_dict(weights, strict=True)
    return DiffuseDDLP.from_config({**CONFIG, "diffuse_frames": 4, **config}, DDLP_CONFIG, ddlp).to(dtype)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------------------- the published release's numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_denoiser(dtype):
    dtype = DTYPES[dtype]
    denoiser = golden_denoiser().to(dtype).eval()
    output = denoiser(array("denoiser/input", dtype), array("denoiser/timestep").long())
    assert_close(output, ARRAYS["denoiser/output"], dtype, "denoiser")


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_schedule(dtype):
    diffusion = golden_diffusion(DTYPES[dtype])
    names = [name for name in ARRAYS if name.startswith("schedule/")]
    assert len(names) == 5
    for name in names:
        buffer = getattr(diffusion, name.split("/")[1])
        assert_close(buffer, ARRAYS[name], torch.float64, name)  # computed in float64 whatever it is kept in


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_diffusion_step_and_loss(dtype):
    dtype = DTYPES[dtype]
    diffusion, t = golden_diffusion(dtype), array("diffuse/timestep").long()
    x0, noise, mask = (array(f"diffuse/{name}", dtype) for name in ("x0", "noise", "mask"))
    x_t = diffusion.q_sample(x0, t, noise)
    loss = diffusion.p_losses(x0, t, mask, noise)
    estimate = diffusion.predict_start(x_t, t, diffusion.model(x_t, t)).clamp(-1, 1)
    mean, variance, logvar = diffusion.q_posterior(estimate, x_t, t)
    found = {"x_t": x_t, "l1_loss": loss, "x0_clipped": estimate, "posterior_mean": mean}
    found["posterior_logvar"] = logvar.expand_as(mean)
    for name, value in found.items():
        assert_close(value, ARRAYS[f"diffuse/{name}"], dtype, name)
    torch.testing.assert_close(logvar[1:].exp(), variance[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [25, 30])
def test_published_ddim_samples(steps, dtype):
    dtype = DTYPES[dtype]
    sample = golden_diffusion(dtype).sample(sampler="ddim", steps=steps, noise=array("ddim/x_T", dtype))
    assert_close(sample, ARRAYS[f"ddim/x_0_{steps}_steps"], dtype, "ddim")
    by_constructor = golden_diffusion(dtype, sampling_timesteps=steps).sample(noise=array("ddim/x_T", dtype))
    assert torch.equal(by_constructor, sample)


@pytest.mark.parametrize("dtype", DTYPES)
def test_published_ddpm_samples(dtype, monkeypatch):
    dtype = DTYPES[dtype]
    noise = iter(array("ddpm/noise_per_step", dtype))
    monkeypatch.setattr(diffusion_modules, "_randn", lambda like, generator: next(noise))
    sample = golden_diffusion(dtype, timesteps=10).sample(noise=array("ddim/x_T", dtype))
    assert_close(sample, ARRAYS["ddpm/x_0_of_10_step_schedule"], dtype, "ddpm")
    assert next(noise, None) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["minmax", "std"])
def test_published_tokens_statistics_and_videos(norm, dtype):
    dtype = DTYPES[dtype]
    model = golden_model(dtype, particle_norm=norm)
    tokens, mask = model.encode(array("pack/x", dtype))
    model.normalization.fit(tokens.split(1))
    assert_close(mask, ARRAYS["pack/mask"], dtype, "mask")
    for name in (name for name in ARRAYS if name.startswith("stats/")):
        assert_close(getattr(model.normalization, name.split("/")[1]), ARRAYS[name], dtype, name)
    assert_close(model.normalization.normalize(tokens), ARRAYS[f"pack/{norm}"], dtype, "tokens")
    particles = model.particles_of(array(f"pack/{norm}", dtype))
    assert_close(model.ddlp.render(particles), ARRAYS[f"unpack/{norm}/rec"], dtype, "rec")
    if norm == "minmax":
        video = model.ddlp.render(model.ddlp.predict(particles, 5))
        assert_close(video, ARRAYS["unroll/rec_9_frames"], dtype, "rolled out")


def test_every_published_array_is_tested():
    tested = {"denoiser", "schedule", "diffuse", "ddim", "ddpm", "pack", "stats", "unpack", "unroll"}
    assert {name.split("/")[0] for name in ARRAYS} == tested


CONSTANTS = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "p2_loss_weight",
]


def test_checkpoints_have_the_published_names():
    manifest = golden.manifest("denoiser")
    denoiser = [entry["name"] for entry in manifest["parameters"] + manifest["buffers"]]
    names = {*CONSTANTS, *(f"model.{name}" for name in denoiser)}
    diffusion = golden_diffusion(torch.float32)
    assert set(diffusion.state_dict()) == names
    assert {value.dtype for value in diffusion.state_dict().values()} == {torch.float32}
    ema = EMA(diffusion, beta=0.995, update_every=10, include_online_model=True)
    both = {f"{kind}_model.{name}" for kind in ("online", "ema") for name in names}
    assert set(ema.state_dict()) == both | {"initted", "step"}
    published = {name: torch.randn_like(value.float()) for name, value in ema.state_dict().items()}
    published |= {"initted": torch.ones(1), "step": torch.full((1,), 70)}
    ema.load_state_dict(published, strict=True)
    name = "model.particle_transformer.blocks.1.attn.mask"
    assert torch.equal(ema.ema_model.state_dict()[name], published[f"ema_model.{name}"])
    assert set(ParticleNormalization(2, 3).state_dict()) == {
        f"{name}{suffix}" for name in ("mu", "std", "min_val", "max_val") for suffix in ("", "_bg")
    }


# ------------------------------------------------------------------------------------------------------- denoisers


def denoiser(seed=0, **options):
    """Weights large enough for every input to matter."""
    torch.manual_seed(seed)
    options = {"n_head": 2, "n_layer": 1, "block_size": 4, "max_particles": 6, **options}
    model = PINTDenoiser(5, 12, 8, **options).double().eval()
    with torch.no_grad():
        for parameter in model.particle_transformer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_a_frame_is_denoised_from_itself_and_those_before():
    model, x, time = denoiser(), normal(2, 4, 6, 5), torch.tensor([3, 900])
    other = x.clone()
    other[:, 2, 1] += 1
    change = (model(other, time) - model(x, time)).abs().amax((0, 2, 3))
    assert (change[:2] == 0).all() and (change[2:] > 1e-6).all()
    with pytest.raises(ValueError, match="particles of 5 frames; legal: at most block_size 4"):
        model(normal(2, 5, 6, 5), time)
    with pytest.raises(ValueError, match="frames of 7 tokens; legal: at most max_particles 6"):
        model(normal(2, 4, 7, 5), time)


@pytest.mark.parametrize("positional_bias", [True, False])
@pytest.mark.parametrize("max_particles", [6, None])
def test_only_biases_by_particle_order_see_the_order(max_particles, positional_bias):
    model, x, time = denoiser(max_particles=max_particles, positional_bias=positional_bias), normal(2, 4, 6, 5), 5
    order, time = torch.tensor([3, 0, 4, 1, 5, 2]), torch.tensor([time, time])
    seen = not torch.allclose(model(x[:, :, order], time), model(x, time)[:, :, order], atol=1e-12)
    assert seen is (positional_bias and max_particles is not None)
    biases = [name.split(".")[-1] for name, _ in model.named_parameters() if "rel_pos_bias" in name]
    time_only = ["rel_pos_bias"] if positional_bias else []
    assert biases == (["rel_pos_bias", "particle_rel_pos_bias"] if seen else time_only)
    if max_particles is None:
        assert model(normal(2, 4, 11, 5), time).shape == (2, 4, 11, 5)
        with pytest.raises(ValueError, match="max_particles is None; legal for sampling without given noise"):
            GaussianDiffusionPINT(model, seq_length=4).sample(2)


def test_predict_delta_has_no_effect():
    x, time = normal(2, 4, 6, 5), torch.tensor([3, 900])
    assert torch.equal(denoiser(predict_delta=True)(x, time), denoiser(predict_delta=False)(x, time))


@pytest.mark.parametrize(
    "options", [{}, {"learned_sinusoidal_cond": True}, {"random_fourier_features": True, "learned_sinusoidal_dim": 6}]
)
def test_time_embeddings(options):
    model, time = denoiser(**options), torch.tensor([0, 17])
    embedding = model.time_mlp[0]
    expected = []
    for t in time.tolist():
        if options:
            angles = [2 * math.pi * t * w for w in embedding.weights.tolist()]
            expected.append([t, *map(math.sin, angles), *map(math.cos, angles)])
        else:
            angles = [t * math.exp(-i * math.log(10_000) / 3) for i in range(4)]
            expected.append([*map(math.sin, angles), *map(math.cos, angles)])
    torch.testing.assert_close(embedding(time.double()), torch.tensor(expected, dtype=torch.float64))
    learned = [parameter.requires_grad for parameter in embedding.parameters()]
    assert learned == ([not options.get("random_fourier_features", False)] if options else [])
    x = normal(2, 4, 6, 5)
    assert not torch.allclose(model(x, time), model(x, time + 300))
    with pytest.raises(ValueError, match="learned_sinusoidal_dim is 7; legal: an even number"):
        denoiser(learned_sinusoidal_cond=True, learned_sinusoidal_dim=7)


@pytest.mark.parametrize("kind", ["pint", "unet"])
def test_self_conditioning_is_an_input(kind):
    torch.manual_seed(0)
    model = denoiser(self_condition=True) if kind == "pint" else UNetDenoiser(5, 8, 2, self_condition=True).double()
    model, x, time = model.eval(), normal(2, 4, 6, 5), torch.tensor([3, 900])
    without = model(x, time)
    assert torch.equal(model(x, time, torch.zeros_like(x)), without)
    assert not torch.allclose(model(x, time, x), without)


@pytest.mark.parametrize("frames, tokens", [(4, 6), (3, 7), (1, 1)])
def test_the_unet_keeps_the_grid(frames, tokens):
    torch.manual_seed(0)
    model, x = UNetDenoiser(5, 8, 2, max_particles=tokens).double().eval(), normal(2, frames, tokens, 5)
    assert model(x, torch.tensor([3, 9])).shape == x.shape
    if frames * tokens > 1:  # what lies farthest apart is seen
        other = x.clone()
        other[:, -1, -1] += 1
        assert (model(other, torch.tensor([3, 9])) - model(x, torch.tensor([3, 9])))[:, 0, 0].abs().min() > 0


@pytest.mark.parametrize("kind", ["pint", "unet"])
def test_denoisers_can_learn_one_batch(kind):
    torch.manual_seed(0)
    model = PINTDenoiser(5, 64, 64, block_size=3, max_particles=5, dropout=0.0)
    if kind == "unet":
        model = UNetDenoiser(5, 16, 2, max_particles=5, dropout=0.0)
    diffusion = GaussianDiffusionPINT(model, seq_length=3, timesteps=20, objective="pred_x0")
    x = normal(4, 3, 5, 5, dtype=torch.float32).clamp(-1, 1)
    t, noise = torch.tensor([2, 8, 14, 19]), normal(4, 3, 5, 5, seed=1, dtype=torch.float32)
    optimizer = torch.optim.Adam(diffusion.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        losses.append(diffusion.p_losses(x, t, noise=noise))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ------------------------------------------------------------------------------------------- schedule and formulas


def products(diffusion):
    return (1 - noise_schedule(diffusion.beta_schedule, diffusion.num_timesteps)).cumprod(0)


class GaussianDenoiser(nn.Module):
    """The best denoiser of data N(MEAN, STD^2): E[x_0 | x_t], which is linear in x_t, in the form of any objective."""

    MEAN, STD = 0.3, 0.5
    self_condition, features_dim, max_particles = False, 2, 3

    def __init__(self, objective, alphas):
        super().__init__()
        self.objective, self.alphas, self.training_modes = objective, alphas, []

    def forward(self, x, time, x_self_cond=None):
        self.training_modes.append(self.training)
        alpha = self.alphas[time].view(-1, 1, 1, 1)
        gain = alpha.sqrt() * self.STD**2 / (alpha * self.STD**2 + 1 - alpha)
        x0 = self.MEAN + gain * (x - alpha.sqrt() * self.MEAN)
        noise = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return {"pred_x0": x0, "pred_noise": noise, "pred_v": alpha.sqrt() * noise - (1 - alpha).sqrt() * x0}[
            self.objective
        ]


def toy(objective="pred_x0", timesteps=1000, clip_denoised=False, schedule="cosine", **options):
    alphas = (1 - noise_schedule(schedule, timesteps)).cumprod(0)
    return GaussianDiffusionPINT(
        GaussianDenoiser(objective, alphas),
        seq_length=2,
        timesteps=timesteps,
        objective=objective,
        beta_schedule=schedule,
        clip_denoised=clip_denoised,
        **options,
    ).double()


@pytest.mark.parametrize("steps", [1000, 50])
def test_schedules(steps):
    linear, cosine = noise_schedule("linear", steps), noise_schedule("cosine", steps)
    torch.testing.assert_close(linear[[0, -1]] * steps, torch.tensor([0.1, 20.0], dtype=torch.float64))
    torch.testing.assert_close(linear.diff(), linear.diff()[:1].expand(steps - 1))

    def signal(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - signal(t + 1) / signal(t), 0.999) for t in range(steps)]
    torch.testing.assert_close(cosine, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_posterior_is_bayes_rule(schedule):
    diffusion = toy(schedule=schedule)
    betas, alphas = noise_schedule(schedule, 1000), products(diffusion)
    x0, x_t = normal(4, 2, 3, 2), normal(4, 2, 3, 2, seed=1)
    t = torch.tensor([1, 20, 500, 998])
    mean, variance, _ = diffusion.q_posterior(x0, x_t, t)
    for i, time in enumerate(t.tolist()):
        beta, previous = betas[time], alphas[time - 1]
        # q(x_{t-1} | x_0) = N(sqrt(previous) x_0, 1 - previous); q(x_t | x_{t-1}) = N(sqrt(1 - beta) x_{t-1}, beta)
        precision = 1 / (1 - previous) + (1 - beta) / beta
        expected = (x0[i] * previous.sqrt() / (1 - previous) + x_t[i] * (1 - beta).sqrt() / beta) / precision
        torch.testing.assert_close(mean[i], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance[i].squeeze(), 1 / precision, rtol=1e-5, atol=0)


def test_x0_noise_and_v_of_each_other():
    x0, noise, t = normal(3, 2, 3, 2), normal(3, 2, 3, 2, seed=1), torch.tensor([5, 400, 900])
    for objective in ("pred_noise", "pred_v", "pred_x0"):
        diffusion = toy(objective)
        x_t = diffusion.q_sample(x0, t, noise)
        alpha = products(diffusion)[t].view(-1, 1, 1, 1)
        torch.testing.assert_close(x_t, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, rtol=1e-6, atol=1e-6)
        output = {"pred_noise": noise, "pred_x0": x0, "pred_v": diffusion.predict_v(x0, t, noise)}[objective]
        torch.testing.assert_close(diffusion.predict_start(x_t, t, output), x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(diffusion.predict_noise(x_t, t, x0), noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_the_loss_written_out(objective, loss_type):
    diffusion = toy(objective, loss_type=loss_type, p2_loss_weight_gamma=0.5, p2_loss_weight_k=2)
    x0, noise, t = normal(3, 2, 3, 2), normal(3, 2, 3, 2, seed=1), torch.tensor([5, 400, 900])
    mask = (normal(2, 3, 2, seed=2) > 0).double()
    expected = 0.0
    for i, time in enumerate(t.tolist()):
        alpha = products(diffusion)[time]
        x_t = alpha.sqrt() * x0[i] + (1 - alpha).sqrt() * noise[i]
        targets = {"pred_noise": noise[i], "pred_x0": x0[i]}
        targets["pred_v"] = alpha.sqrt() * noise[i] - (1 - alpha).sqrt() * x0[i]
        error = (diffusion.model(x_t[None], t[i : i + 1])[0] - targets[objective]) * mask
        weight = (2 + alpha / (1 - alpha)) ** -0.5
        expected = expected + weight * (error.abs() if loss_type == "l1" else error.square()).sum() / (3 * 12)
    torch.testing.assert_close(diffusion.p_losses(x0, t, mask, noise), expected, rtol=1e-5, atol=1e-6)


def test_forward_is_the_loss_at_random_times(monkeypatch):
    diffusion, x = toy(auto_normalize=True), torch.rand(5, 2, 3, 2, dtype=torch.float64)
    seen = []
    p_losses = diffusion.p_losses
    monkeypatch.setattr(diffusion, "p_losses", lambda *a, **k: seen.append((a, k)) or p_losses(*a, **k))
    for _ in range(200):
        assert diffusion(x, torch.ones(2, 3, 2), noise=torch.zeros_like(x)).dim() == 0
    (x_start, _, mask), options = seen[0]
    torch.testing.assert_close(x_start, 2 * x - 1)
    assert mask.sum() == 12 and torch.equal(options["noise"], torch.zeros_like(x))
    times = torch.cat([arguments[1] for arguments, _ in seen])
    assert 0 <= times.min() < 10 and 990 <= times.max() < 1000 and abs(times.double().mean() - 499.5) < 50


def test_half_of_the_self_conditioned_losses_see_an_estimate(monkeypatch):
    model = denoiser(self_condition=True)
    diffusion = GaussianDiffusionPINT(model, seq_length=4, objective="pred_x0").double()
    x, t, noise = normal(2, 4, 6, 5), torch.tensor([3, 900]), normal(2, 4, 6, 5, seed=1)
    x_t = diffusion.q_sample(x, t, noise)
    first = model(x_t, t)
    expected = {
        0.49: (model(x_t, t, first.clamp(-1, 1)) - x).abs().mean(),
        0.51: (first - x).abs().mean(),
    }
    for draw, loss in expected.items():
        monkeypatch.setattr(diffusion_modules.torch, "rand", lambda *shape, draw=draw: torch.tensor(draw))
        torch.testing.assert_close(diffusion.p_losses(x, t, noise=noise), loss)
    conditions = []
    model.forward = lambda x, t, condition: conditions.append(condition) or 0.1 * x
    for sampler in ("ddim", "dpm++"):
        conditions.clear()
        diffusion.sample(2, sampler=sampler, steps=3)
        assert conditions[0] is None and all(torch.is_tensor(condition) for condition in conditions[1:])


# -------------------------------------------------------------------------------------------------------- samplers


def exact_flow(diffusion, x_T):
    """Where the probability flow of N(MEAN, STD^2) takes x_T: it keeps each point's distance in standard deviations."""
    alpha, model = products(diffusion)[-1], diffusion.model
    deviations = (x_T - alpha.sqrt() * model.MEAN) / (alpha * model.STD**2 + 1 - alpha).sqrt()
    return model.MEAN + model.STD * deviations


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_dpm_solver_is_of_second_order(schedule):
    diffusion, x_T = toy(schedule=schedule), normal(6, 2, 3, 2)

    def error(sampler, steps):
        sample = diffusion.sample(sampler=sampler, steps=steps, eta=0, noise=x_T)
        return (sample - exact_flow(diffusion, x_T)).abs().max()

    assert error("ddim", 1000) < 5e-3 and error("dpm++", 200) < 1e-3
    # Twice the steps: half the error for the first order, about a quarter for the second.
    assert 1.7 < error("ddim", 10) / error("ddim", 20) < 2.3
    assert error("dpm++", 10) / error("dpm++", 20) > 3
    for steps in (10, 20, 50):
        assert error("dpm++", steps) < 0.8 * error("ddim", steps)


def quadratic_times(steps, timesteps=1000):
    """Squares from 0 to the last time, rounded, and pushed apart where they meet; from the top."""
    times = []
    for x in torch.linspace(0, 1, steps, dtype=torch.float64).tolist() if steps > 1 else [1.0]:
        time = round((timesteps - 1) * x**2)
        times.append(time if not times or time > times[-1] else times[-1] + 1)
    return times[::-1]


def multistep(diffusion, x, times, clip, noises=None):
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: data prediction, midpoint; the first and last steps of first
    order, the last one to sigma 0. With noises, one per step, the solver of the stochastic equation (appendix F)."""
    alphas, model = products(diffusion), diffusion.model
    ratio = [math.log(alphas[t].sqrt() / (1 - alphas[t]).sqrt()) for t in times]
    estimates = []
    for i, t in enumerate(times):
        estimate = model(x, torch.full((len(x),), t))
        estimates.append(estimate.clamp(-1, 1) if clip else estimate)
        if i == len(times) - 1:
            return estimates[-1]
        data, h = estimates[-1], ratio[i + 1] - ratio[i]
        if i > 0:
            r = (ratio[i] - ratio[i - 1]) / h
            data = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
        following = alphas[times[i + 1]]
        sigma, next_sigma = (1 - alphas[t]).sqrt(), (1 - following).sqrt()
        if noises is None:
            x = next_sigma / sigma * x - following.sqrt() * math.expm1(-h) * data
        else:
            fresh = -math.expm1(-2 * h)  # the share of the variance that is drawn anew
            x = next_sigma / sigma * math.exp(-h) * x + following.sqrt() * fresh * data
            x = x + next_sigma * math.sqrt(fresh) * noises[i]


@pytest.mark.parametrize("steps", [1, 2, 10, 30, 61])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0, 1])
def test_dpm_solver_written_out(steps, clip, eta):
    diffusion, x_T = toy(clip_denoised=clip), normal(6, 2, 3, 2)
    draw = torch.Generator().manual_seed(3)
    noises = [torch.randn(x_T.shape, generator=draw) for _ in range(steps)] if eta else None
    generator = torch.Generator().manual_seed(3)
    sample = diffusion.sample(sampler="dpm++", steps=steps, noise=x_T, eta=eta, generator=generator)
    expected = multistep(diffusion, x_T, quadratic_times(steps), clip, noises)
    torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)


def test_quadratic_times():
    for timesteps in (2, 3, 40, 1000):
        diffusion = toy(timesteps=timesteps)
        for steps in range(1, timesteps + 1):
            times = diffusion._quadratic_times(steps)
            assert len(times) == steps and times[0] == timesteps - 1 and (steps == 1 or times[-1] == 0)
            assert times == quadratic_times(steps, timesteps) and times == sorted(set(times), reverse=True)


def test_ddim_is_that_of_diffusers():
    from diffusers import DDIMScheduler

    diffusion, x_T = golden_diffusion(torch.float32), array("ddim/x_T", torch.float32)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=True,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(20)
    x = x_T
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = diffusion.model(x, t.expand(len(x)))
            x = scheduler.step(output, t, x, eta=0, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(diffusion.sample(sampler="ddim", steps=20, noise=x_T), x, rtol=1e-4, atol=1e-4)


def test_ddim_with_full_noise_and_all_steps_is_ddpm():
    diffusion, x_T = toy(timesteps=40), normal(6, 2, 3, 2)
    draws = [
        diffusion.sample(noise=x_T, generator=torch.Generator().manual_seed(1), **options)
        for options in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddim"})
    ]
    torch.testing.assert_close(draws[0], draws[1], rtol=1e-5, atol=1e-5)
    assert (draws[0] - draws[2]).abs().max() > 0.1
    by_constructor = toy(timesteps=40, ddim_sampling_eta=1.0)
    sample = by_constructor.sample(noise=x_T, sampler="ddim", generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample, draws[1])


@pytest.mark.parametrize(
    ("sampler", "steps", "eta"),
    [("ddpm", None, None), ("ddim", 50, 0.0), ("ddim", 100, 0.5), ("dpm++", 50, None), ("dpm++", 50, 0)],
)
def test_samples_have_the_moments_of_the_data(sampler, steps, eta):
    diffusion = toy(timesteps=1000 if steps else 250)
    sample = diffusion.sample(
        2500, sampler=sampler, steps=steps, eta=eta, generator=torch.Generator().manual_seed(0)
    )  # 30,000 values
    assert sample.shape == (2500, 2, 3, 2)
    assert sample.mean() == pytest.approx(GaussianDenoiser.MEAN, abs=0.015)
    assert sample.std() == pytest.approx(GaussianDenoiser.STD, rel=0.05)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_samples_of_all_objectives_agree(sampler):
    x_T = normal(6, 2, 3, 2)
    samples = []
    for objective in ("pred_x0", "pred_noise", "pred_v"):
        generator = torch.Generator().manual_seed(1)
        samples.append(toy(objective, 40).sample(sampler=sampler, noise=x_T, generator=generator))
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(samples[2], samples[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_estimates_are_clamped_only_where_asked(sampler):
    x_T = 4 * normal(6, 2, 3, 2)
    clamped = toy(timesteps=40, clip_denoised=True).sample(sampler=sampler, noise=x_T)
    free = toy(timesteps=40).sample(sampler=sampler, noise=x_T, eta=0)
    assert clamped.abs().max() <= 1 + 1e-6
    assert free.abs().max() > 1.5 or sampler == "ddpm"  # whose noise hides where it began
    outside = toy(timesteps=40, auto_normalize=True).sample(sampler=sampler, noise=x_T, eta=0)
    assert sampler == "ddpm" or torch.allclose(outside, (free + 1) / 2)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", None), ("ddim", 0.0), ("ddim", 0.5), ("dpm++", 0)])
@pytest.mark.parametrize("clip_denoised", [False, True])
def test_masked_elements_are_noise_around_0_and_end_there(sampler, eta, clip_denoised):
    """As they are in training; the denoiser of this test works element by element, so the others stay as they were."""
    mask = torch.ones(3, 2)
    mask[1, 0] = mask[2] = 0
    x_T, seen = normal(2000, 2, 3, 2), []
    samples = []
    for given in (mask, None):
        diffusion, generator = toy(timesteps=40, clip_denoised=clip_denoised), torch.Generator().manual_seed(1)
        if given is not None:
            diffusion.model.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0], inputs[1][0])))
        samples.append(diffusion.sample(sampler=sampler, eta=eta, noise=x_T, mask=given, generator=generator))
    masked, free = samples
    assert (masked[:, :, mask == 0] == 0).all() and torch.equal(masked[:, :, mask == 1], free[:, :, mask == 1])
    assert (free[:, :, mask == 0] != 0).all() and len(seen) == 40
    for x, time in seen[1:]:
        expected = (1 - diffusion.alphas_cumprod[time]).sqrt().item()
        assert x[:, :, mask == 0].std().item() == pytest.approx(expected, rel=0.05)
        assert x[:, :, mask == 0].mean().item() == pytest.approx(0, abs=0.05)


def test_what_a_sample_takes():
    diffusion = toy(timesteps=40, sampling_timesteps=8).train()
    wrapped = []

    def progress(steps):
        wrapped.append(list(steps))
        return wrapped[-1]

    state = torch.get_rng_state()
    one = diffusion.sample(3, generator=torch.Generator().manual_seed(5), progress=progress)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, diffusion.sample(3, sampler="ddim", steps=8, generator=torch.Generator().manual_seed(5)))
    assert len(wrapped[0]) == 8 and diffusion.model.training and not any(diffusion.model.training_modes)
    for sampler, steps in {"ddpm": 40, "ddim": 8, "dpm++": 8}.items():
        diffusion.model.training_modes.clear()
        diffusion.sample(1, sampler=sampler, progress=progress)
        assert len(wrapped[-1]) == len(diffusion.model.training_modes) == steps
    assert diffusion.sample().shape == (16, 2, 3, 2)


def test_interpolation():
    diffusion, x1, x2 = toy(timesteps=40), normal(6, 2, 3, 2), normal(6, 2, 3, 2, seed=1)

    def between(*arguments, model=diffusion, **options):
        torch.manual_seed(0)
        return model.interpolate(*arguments, **options)

    torch.testing.assert_close(between(x1, x2, lam=0.0), between(x1, x1))
    torch.testing.assert_close(between(x1, x2, lam=1.0), between(x2, x2))
    # At time 0 one denoising step is left.
    noised = diffusion.q_sample(0.75 * x1 + 0.25 * x2, torch.zeros(6, dtype=int), torch.zeros_like(x1))
    nearly = between(x1, x2, t=0, lam=0.25)
    torch.testing.assert_close(nearly, diffusion.model(noised, torch.zeros(6, dtype=int)), rtol=0, atol=0.2)
    assert (between(x1, x2, t=2, lam=0.25) - noised).abs().mean() < (between(x1, x2, lam=0.25) - noised).abs().mean()
    unit = toy(timesteps=40, auto_normalize=True)
    in_unit = between((x1 + 1) / 2, (x2 + 1) / 2, model=unit)
    torch.testing.assert_close(in_unit, (between(x1, x2) + 1) / 2)
    mask = torch.tensor([1.0, 0.0])
    assert (between(x1, x2, mask=mask) == 0).all((0, 1, 2)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, 'sampler is "euler"; legal: "ddpm" or "ddim" or'),
        ({"sampler": "ddim", "steps": 0}, "steps is 0; legal: 1 to 40, the steps of the noise schedule"),
        ({"sampler": "dpm++", "steps": 41}, "steps is 41; legal: 1 to 40"),
        ({"sampler": "ddim", "steps": 2.5}, "steps is 2.5; legal: 1 to 40"),
        ({"sampler": "ddpm", "steps": 8}, "steps is 8; legal: 40 with sampler ddpm, which takes all steps"),
        ({"sampler": "ddim", "eta": 1.5}, "eta is 1.5; legal: from 0 to 1"),
        ({"sampler": "dpm++", "eta": 0.5}, "eta is 0.5; legal: 0 or 1 with sampler dpm"),
    ],
)
def test_illegal_samplers_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        toy(timesteps=40).sample(1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "huber"}, 'loss_type is "huber"; legal: "l1" or "l2"'),
        ({"objective": "pred_x1"}, 'objective is "pred_x1"; legal: "pred_noise" or'),
        ({"beta_schedule": "sigmoid"}, 'beta_schedule is "sigmoid"; legal: "cosine" or'),
        ({"timesteps": 1}, "timesteps is 1; legal: an integer, at least 2"),
        ({"sampling_timesteps": 1001}, "sampling_timesteps is 1001; legal: 1 to 1000"),
        ({"ddim_sampling_eta": -0.1}, "ddim_sampling_eta is -0.1; legal: from 0 to 1"),
    ],
)
def test_illegal_constructor_arguments_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GaussianDiffusionPINT(nn.Identity(), seq_length=2, **options)


def test_illegal_interpolations_are_refused():
    x = normal(6, 2, 3, 2)
    with pytest.raises(ValueError, match="t is 40; legal: 0 to 39"):
        toy(timesteps=40).interpolate(x, x, t=40)
    with pytest.raises(ValueError, match=r"x2 of shape \[5, 2, 3, 2\]; legal: that of x1, \[6, 2, 3, 2\]"):
        toy(timesteps=40).interpolate(x, x[1:])


# --------------------------------------------------------------------------------------- packing and normalisation


def particles(d, d_bg, batch=2, frames=3, count=4, seed=0):
    shapes = [(count, 2), (count, 2), (count, 1), (count,), (count, d), (d_bg,)]
    return Particles(*(normal(batch, frames, *shape, seed=seed + i) for i, shape in enumerate(shapes)))


WIDTHS = [(4, 4), (4, 2), (2, 5)]


@pytest.mark.parametrize(("d", "d_bg"), WIDTHS)
def test_packing_is_the_published_layout_and_back(d, d_bg):
    layout, original = TokenLayout(d, d_bg), particles(d, d_bg)
    tokens = layout.pack(original)
    assert tokens.shape == (2, 3, 5, 6 + max(d, d_bg))
    token, background = tokens[1, 2, 3], tokens[1, 2, 4]
    values = [original.z, original.z_scale, original.z_depth, original.obj_on[..., None], original.z_features]
    expected = [value for attribute in values for value in attribute[1, 2, 3].tolist()]
    assert token.tolist() == expected + [0] * (layout.width - 6 - d)
    assert background.tolist() == [0, 0, *original.z_bg[1, 2].tolist()] + [0] * (layout.width - 2 - d_bg)
    mask = layout.mask(5)
    assert mask[3].tolist() == [1] * (6 + d) + [0] * (layout.width - 6 - d) and mask[:4].unique(dim=0).shape[0] == 1
    assert mask[4].tolist() == [1] * (2 + d_bg) + [0] * (layout.width - 2 - d_bg)
    for name, value in vars(layout.unpack(tokens)).items():
        assert torch.equal(value, getattr(original, name)), name


@pytest.mark.parametrize("mode", ["minmax", "std"])
@pytest.mark.parametrize(("d", "d_bg"), WIDTHS)
def test_normalisation_is_per_feature_and_reversible(d, d_bg, mode):
    layout = TokenLayout(d, d_bg)
    tokens = layout.pack(particles(d, d_bg).map(lambda x: 3 * x + 5))
    normalization = ParticleNormalization(d, d_bg, mode).double()
    normalization.fit([tokens])
    normalized = normalization.normalize(tokens)
    parts = [normalized[..., :4, : 6 + d], normalized[..., 4, 2 : 2 + d_bg]]
    for part in (part.flatten(0, -2) for part in parts):
        if mode == "minmax":
            assert torch.allclose(part.amin(0), torch.tensor(-1.0).double())
            assert torch.allclose(part.amax(0), torch.tensor(1.0).double(), atol=1e-4)
        else:
            assert part.mean(0).abs().max() < 1e-6 and torch.allclose(part.std(0), torch.ones(()).double(), atol=1e-4)
    assert (normalized * (1 - layout.mask(5)) == 0).all() and (normalized[..., 4, :2] == 0).all()
    torch.testing.assert_close(normalization.unnormalize(normalized), tokens)


def test_constant_features_stay_finite():
    tokens = torch.full((2, 3, 5, 10), 2.5)
    tokens[..., 4, [0, 1, 6, 7, 8, 9]] = 0
    for mode in ("minmax", "std"):
        normalization = ParticleNormalization(4, 4, mode)
        normalization.fit([tokens])
        torch.testing.assert_close(normalization.unnormalize(normalization.normalize(tokens)), tokens)


def test_streaming_statistics_are_those_of_one_pass():
    """Also where the mean is large beside the deviations and batches are of all sizes."""
    values = 1e4 + normal(1000, 3) * torch.tensor([1e-3, 1.0, 50.0])
    values[500:] += 7
    statistics = RunningStatistics()
    for batch in values.float().double().split([1, 1, 499, 100, 399]):
        statistics.update(batch)
    values = values.float().double()
    torch.testing.assert_close(statistics.mean, values.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.std, values.std(0), rtol=1e-9, atol=0)
    assert torch.equal(statistics.low, values.amin(0)) and torch.equal(statistics.high, values.amax(0))
    assert statistics.count == 1000


def test_statistics_of_nothing_or_of_what_is_not_finite_are_refused():
    normalization = ParticleNormalization(4, 4)
    with pytest.raises(UserError, match="no particles to take statistics of; legal: one clip or more"):
        normalization.fit([])
    with pytest.raises(UserError, match="a particle is not finite"):
        normalization.fit([torch.full((1, 2, 3, 10), math.nan)])
    with pytest.raises(UserError, match='mode is "max"; legal: "minmax" or "std"'):
        ParticleNormalization(4, 4, "max")


# ----------------------------------------------------------------------------------------------------------- model


def build(seed=0, ddlp_changes=(), **changes):
    torch.manual_seed(seed)
    model = DiffuseDDLP.from_config({**CONFIG, **changes}, {**DDLP_CONFIG, **dict(ddlp_changes)})
    model.normalization.fit([model.encode(images(4, T + 1))[0]])
    return model


@pytest.mark.parametrize("d_bg", [4, 2, 6])
@pytest.mark.parametrize("options", [{}, {"particle_norm": "std"}, {"denoiser": "unet"}])
def test_the_loss_of_videos_is_that_of_their_tokens(options, d_bg):
    model, videos = build(ddlp_changes={"bg_learned_feature_dim": d_bg}, **options).eval(), images(2, T + 2)
    tokens, mask = model.encode(videos)
    assert tokens.shape == mask.shape == (2, T, K + 1, 6 + max(D, d_bg))
    torch.manual_seed(3)
    loss = model.loss(videos)
    torch.manual_seed(3)
    t, noise = torch.randint(0, 20, (2,)), torch.randn_like(tokens)
    x0 = model.normalization.normalize(tokens)
    output = model.diffusion.model(model.diffusion.q_sample(x0, t, noise), t)
    torch.testing.assert_close(loss, ((output - x0).abs() * mask).mean())
    assert model.diffusion.clip_denoised is (options.get("particle_norm") != "std")


@pytest.mark.parametrize("kind", ["pint", "unet"])
def test_the_denoisers_dropout(kind):
    def is_random(**options):
        denoiser = build(denoiser=kind, **options).diffusion.model.train()
        x, time = torch.randn(2, T, K + 1, denoiser.features_dim), torch.tensor([3, 9])
        with torch.no_grad():
            return not torch.equal(denoiser(x, time), denoiser(x, time))

    assert is_random()  # 0.1, as published
    assert is_random(denoiser_dropout=0.5)
    assert not is_random(denoiser_dropout=0.0)


def test_only_the_diffusion_is_trained():
    model = build().train()
    assert model.diffusion.training and not any(module.training for module in model.ddlp.modules())
    model.loss(images(2, T)).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.ddlp.parameters())
    assert all(parameter.grad is not None for parameter in model.diffusion.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        f"diffusion.{name}" for name, _ in model.diffusion.named_parameters()
    ]


def test_the_background_is_encoded_where_the_decoded_particles_leave_it_free():
    model, videos = build(), images(2, T)
    frames = videos.flatten(0, 1)
    encoded = model.ddlp.encode_all(videos, deterministic=True, num_static_frames=T)
    mask = model.ddlp.fg_module.decode(model.ddlp.track(videos).merge_time())[2]
    expected = model.ddlp.bg_module.encode(frames, mask).mean
    tokens = model.encode(videos)[0]
    torch.testing.assert_close(tokens[:, :, K, 2 : 2 + D].flatten(0, 1), expected)
    torch.testing.assert_close(tokens[:, :, :K, :2].flatten(0, 1), encoded["z"])
    assert not torch.allclose(expected, encoded["mu_bg"])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_samples_are_diffused_rolled_out_and_drawn(sampler):
    model, steps = build(), None if sampler == "ddpm" else 4
    options = {"sampler": sampler, "steps": steps, "seed": 4}
    state = torch.get_rng_state()
    videos = model.sample(2, T + 3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert videos.shape == (2, T + 3, 3, 32, 32) and videos.min() >= 0 and videos.max() <= 1
    torch.manual_seed(4)
    first = model.particles_of(model.diffusion.sample(2, sampler=sampler, steps=steps, mask=model.mask))
    everything = model.sample_particles(2, T + 3, **options)
    torch.testing.assert_close(everything.z[:, :T], first.z)
    torch.testing.assert_close(everything.z_bg, model.ddlp.predict(first, 3).z_bg)
    torch.testing.assert_close(model.ddlp.render(everything), videos)
    assert not torch.equal(model.sample_particles(2, T, **{**options, "seed": 5}).z, first.z)


def test_roll_outs_are_deterministic_unless_asked():
    model = build()
    means, draw, again = (
        model.sample_particles(2, T + 2, sampler="ddim", steps=2, seed=1, deterministic=deterministic).z
        for deterministic in (True, False, False)
    )
    assert torch.equal(draw, again) and torch.equal(draw[:, :T], means[:, :T])
    assert not torch.allclose(draw[:, T:], means[:, T:])


def test_the_sampler_is_the_configurations_unless_given(monkeypatch):
    seen = []
    model = build(sampler="dpm++", sampling_steps=5)
    sample = model.diffusion.sample
    monkeypatch.setattr(model.diffusion, "sample", lambda n, **k: seen.append((k["sampler"], k["steps"])) or sample(n))
    for options in ({}, {"steps": 3}, {"sampler": "ddim"}, {"sampler": "ddim", "steps": 2}):
        model.sample_particles(1, T, **options)
    assert seen == [("dpm++", 5), ("dpm++", 3), ("ddim", 20), ("ddim", 2)]  # 20: all there are


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_the_padding_of_samples_is_0_unless_the_configuration_says_so(sampler):
    padding = build().mask.expand(2, T, K + 1, -1) == 0
    assert padding.any() and not padding[:, :, :K].any()
    tokens, samples = [], {}
    for masked in (False, True):
        model = build(mask_samples=masked)
        unpack = model.particles_of
        model.particles_of = lambda drawn, unpack=unpack: tokens.append(drawn) or unpack(drawn)
        samples[masked] = model.sample_particles(2, T, sampler=sampler, steps=None if sampler == "ddpm" else 4, seed=4)
    assert (tokens[0][padding] != 0).all() and (tokens[1][padding] == 0).all()
    assert not torch.allclose(samples[True].z_bg, samples[False].z_bg)  # the denoiser sees the padding


def test_sampled_transparencies_are_legal():
    model = build(particle_norm="std")
    tokens = 1e4 * normal(2, T, K + 1, 10, dtype=torch.float32)
    found = model.particles_of(tokens)
    assert found.obj_on.min() == 0 and found.obj_on.max() == 1
    assert torch.isfinite(model.ddlp.render(model.ddlp.predict(found, 2))).all()


def test_std_samples_go_beyond_one_standard_deviation():
    for norm, beyond in {"minmax": False, "std": True}.items():
        model = build(particle_norm=norm)
        with torch.no_grad():  # a denoiser that always says 2
            for name, parameter in model.diffusion.model.particle_decoder[2].named_parameters():
                parameter.fill_(2.0 if name == "bias" else 0.0)
        for sampler in ("ddpm", "ddim", "dpm++"):
            tokens = model.diffusion.sample(2, sampler=sampler)
            assert torch.allclose(tokens, torch.tensor(2.0 if beyond else 1.0), atol=1e-4), (norm, sampler)


@pytest.mark.parametrize("options", [{}, {"denoiser": "unet", "particle_norm": "std"}])
def test_the_weights_hold_the_whole_model(tmp_path, options):
    model = build(**options)
    checkpoints.save(model.state_dict(), tmp_path / "model.pt")
    other = DiffuseDDLP.from_config({**CONFIG, **options}, DDLP_CONFIG)
    checkpoints.load_weights(other, tmp_path / "model.pt")
    generated = (m.eval().sample(1, T + 1, sampler="ddim", steps=2, seed=0) for m in (model, other))
    assert torch.equal(*generated)
    weights = {name: value for name, value in model.state_dict().items() if name != "normalization.mu"}
    checkpoints.save(weights, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r"less.pt: .* DiffuseDDLP: lacks normalization.mu$"):
        checkpoints.load_weights(other, tmp_path / "less.pt")


def test_statistics_are_a_file_of_their_own_too(tmp_path):
    model = build()
    checkpoints.save(model.normalization.state_dict(), tmp_path / "latent_stats.pth")
    other = ParticleNormalization(D, D)
    checkpoints.load_weights(other, tmp_path / "latent_stats.pth")
    assert torch.equal(other.mu, model.normalization.mu) and other.std_bg.shape == (D,)
    torch.save(tmp_path, tmp_path / "object.pth")  # a pickle that makes an object of its own choice
    with pytest.raises(UserError, match=r"object\.pth: holds a .*not loaded for safety"):
        checkpoints.load(tmp_path / "object.pth")


def test_short_clips_and_horizons_are_refused():
    model = build()
    with pytest.raises(ValueError, match="a clip of 2 frames; legal: diffuse_frames 3 or more"):
        model.encode(images(1, 2))
    with pytest.raises(ValueError, match=r"input of shape \[1, 3, 32, 32\]; legal: clips"):
        model.encode(images(1))
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}; legal: 0 to {2**64 - 1}, or None"):
            model.sample(1, 3, seed=seed)
    with pytest.raises(ValueError, match="horizon is 2; legal: diffuse_frames 3 or more"):
        model.sample(1, 2)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"n is {n}; legal: at least 1"):
            model.sample(n, 4)


def test_more_frames_than_the_dynamics_see_can_be_diffused():
    """PINT predicts from the last `timestep_horizon` of them."""
    frames = DDLP_CASE["arguments"]["timestep_horizon"] + 2
    model = DiffuseDDLP.from_config({**CONFIG, "diffuse_frames": frames}, DDLP_CONFIG)
    assert model.sample_particles(1, frames + 2, sampler="ddim", steps=2).z.shape == (1, frames + 2, K, 2)
