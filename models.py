"""The models: how the modules are put together, and their losses (arXiv 2306.05957, sections 3.1 and 3.2).

`ObjectDLP` is DLPv2: images as particles and a background. `ObjectDynamicsDLP` is DDLP: videos as particles that are
tracked and whose future is predicted. `DiffuseDDLP` generates videos: a diffusion draws the particles of the first
frames, from which a trained DDLP predicts and draws the video. Shape letters: B batch, T frames, K particles,
N proposals, C channels, H x W the image, g the glimpse's side, d and d_bg the widths of the appearance and of the
background, F the width of a particle as a token.
"""

import inspect
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Config, DiffuseConfig
from modules.architecture import Architecture, PINTArchitecture
from modules.convolution import checkpointing
from modules.diffusion_modules import (
    GaussianDiffusionPINT,
    ParticleNormalization,
    PINTDenoiser,
    UNetDenoiser,
)
from modules.dynamics_modules import DynamicsDLP, prediction_dict
from modules.modules import Background, Foreground, Stage
from modules.particles import BetaParams, Gaussian, Particles, Posterior, Prediction, TensorTree
from utils.loss_functions import ChamferLossKL, calc_kl, calc_kl_beta_dist, calc_reconstruction_loss

FRAMES_AT_ONCE = 64  # a frame of 128 x 128 pixels with 24 particles takes some 10 MB to draw
VGG_LOSS_SCALE = 1e-3  # the whole loss is multiplied by it where the reconstruction is measured by VGG features


@dataclass
class Encoding(TensorTree):
    """What encoding gives, frame by frame or merged into one batch."""

    proposals: Tensor  # [*, N, 2]
    posterior: Posterior
    particles: Particles
    glimpses: Tensor  # [*, K, C, g, g], cut at the particles


@dataclass
class Decoding(TensorTree):
    """What decoding gives."""

    glimpses: Tensor  # [*, K, 1 + C, g, g]: alpha, colours
    foreground: Tensor  # [*, C, H, W]
    alpha_masks: Tensor | None  # [*, K, 1, H, W], if wanted
    bg: Tensor  # [*, C, H, W]
    rec: Tensor  # [*, C, H, W]


class ParticleModel(nn.Module):
    """What every particle model has: foreground and background modules, priors, decoding, the static ELBO.

    checkpointing: whether the backward pass computes the convolutions' activations again instead of keeping them.
    """

    checkpointing = False

    def __init__(self, architecture):
        super().__init__()
        arch = self.architecture = architecture
        # What scripts read off a model, by the release's names.
        for field in fields(Architecture):
            setattr(self, field.name, getattr(arch, field.name))
        self.cdim, self.bg_learned_feature_dim = arch.ch, arch.bg_feature_dim
        self.num_patches, self.n_kp_total = arch.num_patches, arch.num_proposals
        self.n_kp_prior = min(arch.n_kp_prior, self.n_kp_total)
        self.obj_patch_size = arch.glimpse_size  # pixels
        if arch.filtering_heuristic != "none" and self.n_kp_total < arch.n_kp_enc:
            warnings.warn(
                f"n_kp_enc is {arch.n_kp_enc}, but the patches propose {self.n_kp_total}: so many are the particles",
                stacklevel=3,
            )
        for name, value in self._priors().items():
            self.register_buffer(name, torch.tensor(float(value)))
        self.fg_module = Foreground(arch)
        self.bg_module = Background(arch)
        self.features_dim = self.bg_module.bg_cnn_enc.out_size  # side of the background encoder's map

    def _priors(self):
        """The priors' parameters, under the published checkpoints' names."""
        arch = self.architecture
        mean_scale = 0.75 * arch.anchor_s
        return {
            "logvar_kp": math.log(arch.sigma**2),
            "mu_scale_prior": math.log(mean_scale / (1 - mean_scale + 1e-5)),
            "logvar_scale_p": math.log(arch.scale_std**2),
            "logvar_offset_p": math.log(arch.offset_std**2),
            "obj_on_a_p": arch.obj_on_alpha,
            "obj_on_b_p": arch.obj_on_beta,
        }

    def reset_priors(self):
        """Give the priors the parameters of the constructor's arguments, in place of those of a state dict that was
        loaded, which holds them too."""
        for name, value in self._priors().items():
            getattr(self, name).fill_(value)

    @classmethod
    def from_config(cls, config):
        """The model of a configuration: a `Config`, or a dict of its keys."""
        config = Config.from_dict(config)
        arguments = inspect.signature(cls).parameters
        return cls(cdim=config.ch, **{name: getattr(config, name) for name in arguments if name != "cdim"})

    # ------------------------------------------------------------------------------------------- encode and decode

    def _check_input(self, x, x_prior=None, dims=(4,)):
        """`ValueError` unless x is made of images (4 in `dims`) or clips (5) of floats, and x_prior is shaped as x;
        `TypeError` for what is no tensor."""
        if not torch.is_tensor(x):
            raise TypeError(f"input of type {type(x).__name__}; legal: a tensor")
        image = [self.architecture.ch, *2 * [self.architecture.image_size]]
        if x.dim() not in dims or list(x.shape[-3:]) != image or x.numel() == 0:
            image = ", ".join(map(str, image))
            kinds = {4: f"images [B, {image}]", 5: f"clips [B, T, {image}]"}
            raise ValueError(f"input of shape {list(x.shape)}; legal: {' or '.join(kinds[n] for n in dims)}")
        if not x.is_floating_point():
            raise ValueError(f"input of {x.dtype}; legal: floats in 0..1, such as x / 255 of bytes")
        if x_prior is not None and x_prior.shape != x.shape:
            raise ValueError(f"x_prior of shape {list(x_prior.shape)}; legal: the input's shape, {list(x.shape)}")

    def _encode_clip(self, x, stage, x_prior=None, prior_frames=None, train_prior=True, heuristic=None):
        """Track the particles through a clip: frame 0 from the proposals, each later frame from the one before.

        x: [B, T, C, H, W]; x_prior: the images that proposals are read from (default x); prior_frames: how many
        frames have proposals of their own (default all; later ones repeat the last); train_prior: whether gradients
        reach the prior. Returns an `Encoding`, [B, T, ...], without a background.
        """
        T = x.shape[1]
        prior_frames = min(prior_frames or T, T)
        x_prior = (x if x_prior is None else x_prior)[:, :prior_frames]
        with torch.set_grad_enabled(train_prior and torch.is_grad_enabled()):
            proposals = self.fg_module.propose(x_prior.flatten(0, 1), heuristic).unflatten(0, (-1, prior_frames))
        frames = []
        for t in range(T):
            if t == 0:
                anchors = self.fg_module.anchors(x[:, 0], proposals[:, 0])
                frame = self.fg_module.locate(x[:, 0], anchors, stage)
            else:
                _, particles, glimpses, hidden = frames[-1]
                frame = self.fg_module.locate(
                    x[:, t],
                    particles.z.detach(),
                    stage,
                    refine=False,
                    previous_glimpses=glimpses.detach(),
                    previous_scale=particles.z_scale.detach(),
                    hidden=hidden,
                )
            frames.append(frame)
        posteriors, particles, glimpses, _ = zip(*frames, strict=True)
        posterior, particles, glimpses = (
            Posterior.stack(posteriors),
            Particles.stack(particles),
            torch.stack(glimpses, 1),
        )
        # No frame needs the appearance of the one before: all frames' are encoded at once.
        features, z_features = self.fg_module.encode_appearance(
            glimpses.flatten(0, 1), particles.z.flatten(0, 1), stage
        )
        posterior.features, particles.z_features = features.split_time(T), z_features.unflatten(0, (-1, T))
        last = proposals[:, -1:].expand(-1, T - prior_frames, -1, -1)
        return Encoding(torch.cat([proposals, last], dim=1), posterior, particles, glimpses)

    def _encode_background(self, x, encoding, stage, mask=None):
        """Add the background to an encoding of [B, ...] images, seen outside the particles or through `mask`.

        Returns the mask, [B, 1, H, W].
        """
        if mask is None:
            mask = self.fg_module.outside_mask(encoding.particles.detach())
        encoding.posterior.bg = self.bg_module.encode(x, mask)
        encoding.particles.z_bg = encoding.posterior.bg.sample(stage.deterministic)
        return mask

    def _decode(self, particles, noisy=False, alpha_masks=True):
        """`Particles` [B, K, ...] -> `Decoding`."""
        foreground = self.fg_module.decode(particles, noisy, alpha_masks)
        return self._add_background(foreground, particles.z_bg)

    def _add_background(self, foreground, z_bg):
        glimpses, image, bg_mask, alpha_masks = foreground
        bg = self.bg_module.decode(z_bg)
        return Decoding(glimpses, image, alpha_masks, bg, bg_mask * bg + image)

    def _foreground_dict(self, particles, noisy):
        """The part of the output dictionary that decoding the foreground fills."""
        glimpses, foreground, bg_mask, alpha_masks = self.fg_module.decode(particles, noisy)
        return {
            "dec_objects_original": glimpses,
            "dec_objects": foreground,
            "bg_mask": bg_mask,
            "alpha_masks": alpha_masks,
        }

    def _autoencode(self, x, encoding, stage, bg_masks_from_fg, alpha_masks):
        """Encode the background of [B, C, H, W] images and decode all. Completes `encoding`; returns a `Decoding`."""
        foreground = self.fg_module.decode(encoding.particles, stage.noisy, alpha_masks)
        self._encode_background(x, encoding, stage, foreground[2] if bg_masks_from_fg else None)
        return self._add_background(foreground, encoding.particles.z_bg)

    def decode_all(self, z, z_features, z_bg, obj_on, z_depth=None, noisy=False, z_scale=None):
        """Draw particles.

        z: [B, K, 2]; z_features: [B, K, d]; z_bg: [B, d_bg]; obj_on: [B, K]; z_depth: [B, K, 1] (default: all
        equal); z_scale: [B, K, 2] logits (default: the anchors' scale). Returns a dict of `rec`, `bg`,
        `dec_objects_trans` (the foreground), `dec_objects` (decoded glimpses) and `alpha_masks`. Raises `ValueError`
        for arguments of other shapes.
        """
        if z.dim() != 3 or z.shape[-1] != 2:
            raise ValueError(f"z of shape {list(z.shape)}; legal: [B, K, 2]")
        if z_depth is None:
            z_depth = torch.zeros_like(z[..., :1])
        if z_scale is None:
            z_scale = torch.full_like(z, self.architecture.glimpse_size / self.architecture.image_size).logit()
        B, K, _ = z.shape
        for name, value, *legal in (
            ("z_features", z_features, B, K, self.architecture.learned_feature_dim),
            ("z_bg", z_bg, B, self.architecture.bg_feature_dim),
            ("obj_on", obj_on, B, K),
            ("z_depth", z_depth, B, K, 1),
            ("z_scale", z_scale, B, K, 2),
        ):
            if list(value.shape) != legal:
                raise ValueError(f"{name} of shape {list(value.shape)}; legal: {legal}")
        decoding = self._decode(Particles(z, z_scale, z_depth, obj_on, z_features, z_bg), noisy)
        return {
            "rec": decoding.rec,
            "dec_objects": decoding.glimpses,
            "dec_objects_trans": decoding.foreground,
            "bg": decoding.bg,
            "alpha_masks": decoding.alpha_masks,
        }

    @torch.no_grad()
    def track(self, x, bg_masks_from_fg=False):
        """The particles of clips [B, T, C, H, W] of any length: `Particles` [B, T, ...], the posteriors' means."""
        self._check_input(x, dims=(5,))
        encoding = self._encode_clip(x, Stage(deterministic=True)).merge_time()
        mask = self.fg_module.decode(encoding.particles, alpha_masks=False)[2] if bg_masks_from_fg else None
        self._encode_background(x.flatten(0, 1), encoding, Stage(deterministic=True), mask)
        return encoding.particles.split_time(x.shape[1])

    @torch.no_grad()
    def render(self, particles):
        """Draw `Particles` [B, T, ...]: [B, T, C, H, W]. A few frames at a time, so that long videos fit in memory."""
        frames, count = particles.merge_time(), particles.z.shape[0] * particles.z.shape[1]
        parts = [
            self._decode(frames.map(lambda x, start=start: x[start : start + FRAMES_AT_ONCE]), alpha_masks=False).rec
            for start in range(0, count, FRAMES_AT_ONCE)
        ]
        return torch.cat(parts).unflatten(0, particles.z.shape[:2])

    # ----------------------------------------------------------------------------------------------------- the loss

    def _static_kl(self, posterior, proposals, stage, kl_balance):
        """The static KL terms, [B] each, by name. posterior: [B, K, ...]; proposals: [B, N, 2]."""
        if stage.fixed_scale:
            offset_logvar = scale_logvar = 2 * math.log(0.1)
            a, b = 0.2, 0.1
        else:
            offset_logvar, scale_logvar = self.logvar_offset_p, self.logvar_scale_p
            a, b = self.obj_on_a_p, self.obj_on_b_p
        logvar_kp = self.logvar_kp.expand_as(proposals)
        chamfer = ChamferLossKL()(posterior.z_base, torch.zeros_like(posterior.z_base), proposals.detach(), logvar_kp)
        return {
            "kp": 0.5 * kl_balance * chamfer + gaussian_kl(posterior.offset, logvar=offset_logvar).sum(-1),
            "scale": gaussian_kl(posterior.scale, self.mu_scale_prior, scale_logvar).sum(-1),
            "obj_on": calc_kl_beta_dist(posterior.obj_on.a, posterior.obj_on.b, a, b).sum(-1),
            "features": gaussian_kl(posterior.features).sum(-1),
            "depth": gaussian_kl(posterior.depth).sum(-1),
            "bg": gaussian_kl(posterior.bg),
        }

    def _reconstruction(self, x, output, stage, recon_loss_type, recon_loss_func):
        """Each image's reconstruction error [B], and the PSNR. x: [B, C, H, W].

        In warm-up the decoded glimpses' colours against the glimpses cut, summed over the glimpses, and a PSNR of 0.
        """
        if not stage.warmup:
            rec = reconstruction_loss(x, output["rec"], recon_loss_type, recon_loss_func)
            return rec, peak_signal_to_noise_ratio(x, output["rec"])
        target = output["cropped_objects_original"].flatten(0, 1)
        decoded = output["dec_objects_original"][:, :, 1:].flatten(0, 1)
        if recon_loss_type == "vgg" and target.shape[-1] < 32:
            target, decoded = (
                F.interpolate(x, size=32, mode="bilinear", align_corners=False) for x in (target, decoded)
            )
        rec = reconstruction_loss(target, decoded, recon_loss_type, recon_loss_func)
        rec = rec.unflatten(0, (len(x), -1)).sum(-1)
        # As published: zero times the image. What warm-up does not reach has a gradient of zero then instead of none,
        # and Adam, which counts that as a step, makes the published ones afterwards.
        return rec + 0 * output["rec"].mean(), rec.new_zeros(())

    def _static_elbo(self, x, output, stage, beta_kl, beta_rec, kl_balance, recon_loss_type, recon_loss_func):
        """DLPv2's loss (arXiv 2306.05957, section 3.1) as `calc_elbo` documents it. x: [B, C, H, W]."""
        rec, psnr = self._reconstruction(x, output, stage, recon_loss_type, recon_loss_func)
        if stage.warmup:
            rec = rec / output["z"].shape[1]  # a mean over the glimpses
        rec = rec.mean()
        terms = self._static_kl(posterior_of(output), output["kp_p"], stage, kl_balance)
        kl = kl_dict({name: term.mean() for name, term in terms.items()}, kl_balance)
        loss = beta_rec * rec + beta_kl * kl["kl"]
        return elbo_dict(loss, psnr, rec, kl, output, recon_loss_type)

    # -------------------------------------------------------------------------------------------------- parameters

    def _parameter_groups(self):
        fg, bg = self.fg_module, self.bg_module
        mixer = [fg.particle_mixer] if hasattr(fg, "particle_mixer") else []
        return {
            "prior": [fg.prior, *mixer],
            "encoder": [fg.particle_attribute_enc, fg.particle_features_enc, bg.bg_cnn_enc, bg.bg_enc],
            "decoder": [fg.object_dec, bg.latent_to_feat_map, bg.dec],
        }

    def _parameters_of(self, *groups):
        modules = self._parameter_groups()
        return [parameter for group in groups for module in modules[group] for parameter in module.parameters()]

    def get_parameters(self, prior=True, encoder=True, decoder=True):
        """The parameters of the parts asked for, a list."""
        chosen = {"prior": prior, "encoder": encoder, "decoder": decoder}
        return self._parameters_of(*(name for name, wanted in chosen.items() if wanted))

    def set_require_grad(self, prior_value=True, enc_value=True, dec_value=True):
        """Freeze (False) or train (True) each part."""
        for group, value in {"prior": prior_value, "encoder": enc_value, "decoder": dec_value}.items():
            for parameter in self._parameters_of(group):
                parameter.requires_grad_(value)

    def info(self):
        """A text with the architecture's numbers and the number of parameters."""
        arch = self.architecture
        lines = [f"{type(self).__name__}: {sum(p.numel() for p in self.parameters()):,} parameters"]
        for group in self._parameter_groups():
            lines.append(f"  {group}: {sum(p.numel() for p in self._parameters_of(group)):,} parameters")
        lines.append(f"  glimpses of {arch.glimpse_size} x {arch.glimpse_size} pixels")
        lines += [f"  {field.name}: {getattr(arch, field.name)}" for field in fields(arch)]
        return "\n".join(lines)

    @torch.no_grad()
    def lerp(self, other, betta):
        """An exponential moving average's step: betta * self + (1 - betta) * other, in place, for all weights."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs.to(mine), 1 - betta)


class ObjectDLP(ParticleModel):
    """DLPv2: an image as K particles and a background.

    The arguments are those of the published release; `Architecture` and the configuration's keys say what they mean.
    With `use_tracking` a clip is encoded frame by frame, each frame's particles starting at the last one's.
    """

    def __init__(
        self,
        cdim=3,
        enc_channels=(16, 16, 32),
        prior_channels=(16, 16, 32),
        image_size=64,
        n_kp=1,
        pad_mode="replicate",
        sigma=1.0,
        dropout=0.0,
        patch_size=16,
        n_kp_enc=20,
        n_kp_prior=20,
        learned_feature_dim=16,
        bg_learned_feature_dim=None,
        kp_range=(-1, 1),
        kp_activation="tanh",
        anchor_s=0.25,
        use_tracking=False,
        use_resblock=False,
        scale_std=0.3,
        offset_std=0.2,
        obj_on_alpha=0.1,
        obj_on_beta=0.1,
        use_correlation_heatmaps=False,
        enable_enc_attn=False,
        filtering_heuristic="variance",
        duplicate_iou=None,
    ):
        super().__init__(fields_of(Architecture, {**locals(), "ch": cdim}))
        self.use_tracking = use_tracking

    def forward(
        self,
        x,
        deterministic=False,
        bg_masks_from_fg=False,
        x_prior=None,
        warmup=False,
        noisy=False,
        train_enc_prior=True,
        alpha_masks=True,
    ):
        """Encode and decode.

        x: [B, C, H, W], or [B, T, C, H, W], whose frames count as images of one batch (with `use_tracking`: as a clip).
        deterministic: means instead of samples; bg_masks_from_fg: the background's encoder sees what the decoded
        particles leave free, instead of what lies outside their squares; x_prior: images for the proposals instead of
        x; warmup, noisy: the training stages; train_enc_prior: whether gradients reach the prior; alpha_masks=False:
        without `alpha_masks`, which training does not need and without which drawing takes much less memory.

        Returns a dict, batch [B * T, ...]: `kp_p` proposals [., N, 2]; `rec` image, `dec_objects` foreground, `bg`
        background [., C, H, W]; `alpha_masks` [., K, 1, H, W]; `mu` = `z_base` anchors, `logvar` = 0, `z` positions
        [., K, 2]; `z_kp_bg` [., 1, 2] = 0; the posteriors' `mu_*` and `logvar_*` and draws `z_*` of offset (draw:
        `z`), scale, depth, features and bg; `obj_on_a`, `obj_on_b`, `obj_on` [., K]; `cropped_objects_original` cut
        glimpses [., K, C, g, g]; `dec_objects_original` decoded ones [., K, 1 + C, g, g], alpha first.
        """
        stage = Stage(deterministic, warmup, noisy)
        self._check_input(x, x_prior, dims=(4, 5))
        clip = self._as_clip(x)
        x_prior = None if x_prior is None else self._as_clip(x_prior)
        with checkpointing(self.checkpointing):
            encoding = self._encode_frames(clip, stage, x_prior, train_enc_prior).merge_time()
            decoding = self._autoencode(clip.flatten(0, 1), encoding, stage, bg_masks_from_fg, alpha_masks)
        return {**encoding_dict(encoding), **decoding_dict(decoding)}

    def _as_clip(self, x):
        """[B, C, H, W] or [B, T, C, H, W] -> [B, T, C, H, W], one frame per clip unless tracking."""
        return x if x.dim() == 5 and self.use_tracking else _as_images(x)

    def _encode_frames(self, clip, stage, x_prior, train_prior):
        mixes = self.architecture.filtering_heuristic == "none"  # the mixer needs all proposals, in their order
        heuristic = "random" if self.use_tracking and stage.fixed_scale and not mixes else None
        return self._encode_clip(clip, stage, x_prior, train_prior=train_prior, heuristic=heuristic)

    def encode_all(
        self,
        x,
        deterministic=False,
        noisy=False,
        warmup=False,
        bg_masks_from_fg=False,
        train_prior=True,
        cropped_objects_prev=None,
        scale_prev=None,
        refinement_iter=True,
    ):
        """Encode images [B, C, H, W].

        cropped_objects_prev [B, K, C, g, g] and scale_prev [B, K, 2] (logits): the particles' glimpses and scales in
        the frame before; refinement_iter: look twice. Returns `forward`'s dict of posteriors and draws, with
        `cropped_objects`, `bg_mask` [B, 1, H, W] and `z_offset`, without proposals and decodings.
        """
        stage = Stage(deterministic, warmup, noisy)
        self._check_input(x)
        with torch.set_grad_enabled(train_prior and torch.is_grad_enabled()):
            proposals = self.fg_module.propose(x)
        anchors = self.fg_module.anchors(x, proposals)
        frame = self.fg_module.encode(x, anchors, stage, refinement_iter, cropped_objects_prev, scale_prev)
        encoding = Encoding(proposals, *frame)
        mask = self.fg_module.decode(encoding.particles, noisy, alpha_masks=False)[2] if bg_masks_from_fg else None
        mask = self._encode_background(x, encoding, stage, mask)
        return encoded_dict(encoding, mask)

    def fg_sequential_opt(
        self,
        x,
        deterministic=False,
        x_prior=None,
        warmup=False,
        noisy=False,
        reshape=True,
        train_prior=False,
        decode=True,
    ):
        """Encode (and, with `decode`, draw) the foreground of a clip alone.

        x: [B, T, C, H, W]. Returns `forward`'s dict without the background; [B * T, ...] each, or [B, T, ...] without
        `reshape`.
        """
        stage = Stage(deterministic, warmup, noisy)
        self._check_input(x, x_prior, dims=(5,))
        encoding = self._encode_frames(x, stage, x_prior, train_prior).merge_time()
        output = encoding_dict(encoding)
        if decode:
            output |= self._foreground_dict(encoding.particles, noisy)
        return output if reshape else unflatten(output, x.shape[:2])

    def calc_elbo(
        self,
        x,
        model_output,
        warmup=False,
        beta_kl=0.05,
        beta_rec=1.0,
        kl_balance=0.001,
        recon_loss_type="mse",
        recon_loss_func=None,
        noisy=False,
    ):
        """The loss: beta_rec * reconstruction + beta_kl * KL (arXiv 2306.05957, section 3.1).

        x: the images (or clips) that `model_output`, `forward`'s dict, was made from; recon_loss_type: "mse", or "vgg"
        with `recon_loss_func` a `VGGDistance`. Returns a dict of scalars: `loss`, `psnr` (dB, 0 in warm-up), `kl` (the
        unweighted bracket), `loss_rec`, `obj_on_l1` (visible particles per image) and the KL's parts `loss_kl_kp`,
        `loss_kl_feat`, `loss_kl_obj_on`, `loss_kl_scale`, `loss_kl_depth`.
        """
        x = x.reshape(-1, *x.shape[-3:])
        stage = Stage(warmup=warmup, noisy=noisy)
        return self._static_elbo(
            x, model_output, stage, beta_kl, beta_rec, kl_balance, recon_loss_type, recon_loss_func
        )


class ObjectDynamicsDLP(ParticleModel):
    """DDLP: a video as tracked particles, whose dynamics PINT predicts.

    The arguments are those of the published release; `Architecture` and the configuration's keys say what they mean.
    `timestep_horizon` is T, the frames that PINT sees; a training clip has T + 1. `depth_logvar_from_mean` is how the
    published checkpoints were trained (see `DynamicsDLP`).
    """

    def __init__(
        self,
        cdim=3,
        enc_channels=(16, 16, 32),
        prior_channels=(16, 16, 32),
        image_size=64,
        n_kp=1,
        pad_mode="replicate",
        sigma=1.0,
        dropout=0.0,
        patch_size=16,
        n_kp_enc=20,
        n_kp_prior=20,
        learned_feature_dim=16,
        bg_learned_feature_dim=None,
        kp_range=(-1, 1),
        kp_activation="tanh",
        anchor_s=0.25,
        predict_delta=True,
        timestep_horizon=10,
        enable_enc_attn=False,
        use_correlation_heatmaps=True,
        use_resblock=False,
        scale_std=0.3,
        offset_std=0.2,
        obj_on_alpha=0.1,
        obj_on_beta=0.1,
        pint_layers=6,
        pint_heads=8,
        pint_dim=256,
        filtering_heuristic="variance",
        depth_logvar_from_mean=False,
        duplicate_iou=None,
        pint_dropout=0.1,
        pint_identity_init=False,
    ):
        super().__init__(fields_of(Architecture, {**locals(), "ch": cdim}))
        fields_of(PINTArchitecture, locals())  # raises where PINT cannot be built
        self.timestep_horizon, self.predict_delta = timestep_horizon, predict_delta
        self.pint_layers, self.pint_heads, self.pint_dim = pint_layers, pint_heads, pint_dim
        self.dyn_module = DynamicsDLP(
            learned_feature_dim,
            self.architecture.bg_feature_dim,
            pint_dim,
            pint_dim,
            n_head=pint_heads,
            n_layer=pint_layers,
            block_size=timestep_horizon,
            dropout=pint_dropout,
            kp_activation=kp_activation,
            predict_delta=predict_delta,
            max_particles=n_kp_enc + 1,
            depth_logvar_from_mean=depth_logvar_from_mean,
            identity_init=pint_identity_init,
        )

    def _parameter_groups(self):
        return {**super()._parameter_groups(), "dynamics": [self.dyn_module]}

    def get_parameters(self, prior=True, encoder=True, decoder=True, dynamics=True):
        """The parameters of the parts asked for, a list."""
        return super().get_parameters(prior, encoder, decoder) + (self._parameters_of("dynamics") if dynamics else [])

    def forward(
        self,
        x,
        deterministic=False,
        bg_masks_from_fg=False,
        x_prior=None,
        warmup=False,
        noisy=False,
        forward_dyn=True,
        train_enc_prior=True,
        num_static_frames=4,
        pint_noise=0.0,
        alpha_masks=True,
    ):
        """Encode, decode and predict.

        x: clips [B, T + 1, C, H, W], or their `Posterior`, from which PINT alone predicts, and only the frames after
        the static ones; forward_dyn=False: without the dynamics, the frames as images of one batch; num_static_frames:
        frames with proposals of their own;
        pint_noise: the standard deviation of noise on the positions that PINT sees, a number or scalar; the rest as for
        `ObjectDLP.forward`, whose dict is returned too, batch [B * (T + 1), ...], with, [B, T, ...], PINT's prediction
        for each frame but the first: `mu_dyn` and `logvar_dyn` (position), `mu_*_dyn` and `logvar_*_dyn` of scale,
        depth, features and bg, `obj_on_a_dyn` and `obj_on_b_dyn`.
        """
        if isinstance(x, Posterior):
            past = x.sample(deterministic).frames(slice(None, -1))
            last = max(x.z_base.shape[1] - num_static_frames, 1)
            return prediction_dict(self._predict_noisily(past, pint_noise, last), "_dyn")
        stage = Stage(deterministic, warmup, noisy)
        self._check_clip(x, x_prior, self.timestep_horizon + 1 if forward_dyn else None)
        clip = x if forward_dyn else _as_images(x)
        x_prior = x_prior if forward_dyn or x_prior is None else _as_images(x_prior)
        prior_frames = num_static_frames if forward_dyn else None
        with checkpointing(self.checkpointing):
            encoding = self._encode_clip(clip, stage, x_prior, prior_frames, train_enc_prior).merge_time()
            decoding = self._autoencode(clip.flatten(0, 1), encoding, stage, bg_masks_from_fg, alpha_masks)
        output = {**encoding_dict(encoding), **decoding_dict(decoding)}
        if forward_dyn:
            past = encoding.particles.split_time(x.shape[1]).frames(slice(None, -1))
            output |= prediction_dict(self._predict_noisily(past, pint_noise), "_dyn")
        return output

    def encode_posterior(self, x, num_static_frames=4):
        """The `Posterior` [B, T, ...] of clips [B, T, C, H, W], each frame tracked from a draw of the frame before, as
        in training."""
        self._check_clip(x)
        encoding = self._encode_clip(x, Stage(), prior_frames=num_static_frames).merge_time()
        self._encode_background(x.flatten(0, 1), encoding, Stage())
        return encoding.posterior.split_time(x.shape[1])

    def _predict_noisily(self, past, noise, last=None):
        """PINT's `Prediction` from `Particles` whose positions get noise of that standard deviation first; last: as
        for `DynamicsDLP.predict`."""
        if torch.is_tensor(noise) or noise:
            past = replace(past, z=past.z + noise * torch.randn_like(past.z))
        return self.dyn_module.predict(past, last)

    def _check_clip(self, x, x_prior=None, num_frames=None):
        self._check_input(x, x_prior, dims=(5,))
        if num_frames is not None and x.shape[1] != num_frames:
            raise ValueError(f"a clip of {x.shape[1]} frames; legal: {num_frames}, timestep_horizon + 1")

    def encode_all(
        self,
        x,
        deterministic=False,
        x_prior=None,
        warmup=False,
        noisy=False,
        reshape=True,
        train_prior=False,
        num_static_frames=4,
    ):
        """Encode clips [B, T, C, H, W] of any length.

        Returns `forward`'s dict of posteriors and draws, with `cropped_objects`, `bg_mask` [., 1, H, W] and `z_offset`,
        without proposals and decodings: [B * T, ...] each, or [B, T, ...] without `reshape`.
        """
        stage = Stage(deterministic, warmup, noisy)
        self._check_clip(x, x_prior)
        encoding = self._encode_clip(x, stage, x_prior, num_static_frames, train_prior).merge_time()
        mask = self._encode_background(x.flatten(0, 1), encoding, stage)
        output = encoded_dict(encoding, mask)
        return output if reshape else unflatten(output, x.shape[:2])

    def fg_sequential_opt(
        self,
        x,
        deterministic=False,
        x_prior=None,
        warmup=False,
        noisy=False,
        reshape=True,
        train_prior=False,
        num_static_frames=4,
    ):
        """Encode and draw the foreground of a clip alone; as `ObjectDLP.fg_sequential_opt`."""
        stage = Stage(deterministic, warmup, noisy)
        self._check_clip(x, x_prior)
        encoding = self._encode_clip(x, stage, x_prior, num_static_frames, train_prior).merge_time()
        output = {**encoding_dict(encoding), **self._foreground_dict(encoding.particles, noisy)}
        return output if reshape else unflatten(output, x.shape[:2])

    @torch.no_grad()
    def sample(self, x, num_steps=10, deterministic=True, bg_masks_from_fg=False, cond_steps=None, return_z=False):
        """Predict how a video goes on.

        x: [B, F, C, H, W], whose first `cond_steps` frames (default T) are looked at; num_steps: frames to predict;
        deterministic: PINT's means instead of samples. Returns [B, cond_steps + num_steps, C, H, W]: the conditioning
        frames' reconstruction, then the prediction. With `return_z` also a dict of the particles of all frames:
        `z_pos`, `z_scale`, `z_obj_on`, `z_depth`, `z_features`, `z_bg_features`, and `z_ids` [B, F, K], 1..K.
        """
        cond_steps = self.timestep_horizon if cond_steps is None else cond_steps
        self._check_input(x, dims=(5,))
        if not 1 <= cond_steps <= x.shape[1]:
            raise ValueError(f"cond_steps is {cond_steps}; legal: 1 to the clip's {x.shape[1]} frames")
        if num_steps < 0:
            raise ValueError(f"num_steps is {num_steps}; legal: at least 0")
        particles = self.predict(self.track(x[:, :cond_steps], bg_masks_from_fg), num_steps, deterministic)
        rec = self.render(particles)
        if not return_z:
            return rec
        ids = torch.arange(1, particles.z.shape[2] + 1, device=x.device).expand(particles.obj_on.shape)
        return rec, {
            "z_pos": particles.z,
            "z_scale": particles.z_scale,
            "z_obj_on": particles.obj_on,
            "z_depth": particles.z_depth,
            "z_features": particles.z_features,
            "z_bg_features": particles.z_bg,
            "z_ids": ids,
        }

    @torch.no_grad()
    def predict(self, particles, num_steps, deterministic=True, constrain=None):
        """`Particles` [B, T, ...] of the first frames -> [B, T + num_steps, ...], PINT's predictions behind them.

        constrain: a function that is applied to each predicted frame, `Particles` [B, 1, ...], before it is used.
        """
        return self.dyn_module.roll_out(particles, num_steps, deterministic, constrain)

    def calc_elbo(
        self,
        x,
        model_output,
        warmup=False,
        beta_kl=0.05,
        beta_dyn=1.0,
        beta_rec=1.0,
        kl_balance=0.001,
        dynamic_discount=None,
        recon_loss_type="mse",
        recon_loss_func=None,
        balance=0.5,
        beta_dyn_rec=0.1,
        num_static=4,
        noisy=False,
        beta_dyn_l1=0.0,
    ):
        """The loss of a video (arXiv 2306.05957, section 3.2): reconstruction, the static KL of the first `num_static`
        frames, and the dynamics' KL of the later ones.

        x: the clips [B, T + 1, C, H, W] that `model_output` was made from; dynamic_discount: the weights of frames
        `num_static`, `num_static` + 1, ... (at least T + 1 - num_static of them; default 1); beta_dyn_rec: the weight
        of those frames' reconstruction, beside the discount; balance: see `calc_kl`; beta_dyn_l1: the weight of
        PINT's position error (`_position_error`); the rest as for `ObjectDLP.calc_elbo`, whose dict is returned, with
        `kl_dyn`.
        """
        self._check_clip(x, num_frames=self.timestep_horizon + 1)
        num_frames = x.shape[1]
        num_static = min(num_static, num_frames)
        stage = Stage(warmup=warmup, noisy=noisy)
        discount = self._discount(dynamic_discount, num_frames - num_static, x)

        images = x.flatten(0, 1)
        rec, psnr = self._reconstruction(images, model_output, stage, recon_loss_type, recon_loss_func)
        rec = rec.unflatten(0, (-1, num_frames))
        rec = rec[:, :num_static].sum(-1) + (beta_dyn_rec * discount * rec[:, num_static:]).sum(-1)
        rec = rec.mean()

        posterior = posterior_of(model_output).split_time(num_frames)
        static = posterior.frames(slice(None, num_static)).merge_time()
        proposals = model_output["kp_p"].unflatten(0, (-1, num_frames))[:, :num_static].flatten(0, 1)
        terms = self._static_kl(static, proposals, stage, kl_balance)
        terms["bg"] = terms["bg"] / self.architecture.bg_feature_dim  # as published: a mean over the features
        terms = {name: term.unflatten(0, (-1, num_static)).sum(1).mean() for name, term in terms.items()}
        kl = kl_dict(terms, kl_balance)

        kl["kl_dyn"] = self._dynamics_kl(posterior, model_output, dynamic_discount, balance, num_static)
        dynamics = beta_dyn * kl["kl_dyn"]
        if beta_dyn_l1:
            dynamics = dynamics + beta_dyn_l1 * self._position_error(
                posterior, model_output, dynamic_discount, num_static
            )
        loss = (beta_rec * rec + beta_kl * kl["kl"] + dynamics) / num_frames
        return elbo_dict(loss, psnr, rec, kl, model_output, recon_loss_type)

    def calc_elbo_static(
        self,
        x,
        model_output,
        warmup=False,
        beta_kl=0.05,
        beta_dyn=1.0,
        beta_rec=1.0,
        kl_balance=0.001,
        dynamic_discount=None,
        recon_loss_type="mse",
        recon_loss_func=None,
        balance=0.5,
        noisy=False,
    ):
        """The loss without the dynamics: DLPv2's over all frames, with a `kl_dyn` of 0.

        beta_dyn, dynamic_discount and balance, which weigh the dynamics, have no effect.
        """
        stage = Stage(warmup=warmup, noisy=noisy)
        losses = self._static_elbo(
            x.flatten(0, 1), model_output, stage, beta_kl, beta_rec, kl_balance, recon_loss_type, recon_loss_func
        )
        return {**losses, "kl_dyn": losses["kl"].new_zeros(())}

    def calc_dynamics_loss(
        self,
        posterior,
        model_output,
        beta_dyn=1.0,
        dynamic_discount=None,
        balance=0.5,
        num_static=4,
        recon_loss_type="mse",
        beta_dyn_l1=0.0,
    ):
        """The share of `calc_elbo`'s loss that depends on PINT: `loss` and `kl_dyn`, a dict.

        posterior: the `Posterior` [B, T + 1, ...] that `model_output`, `forward`'s dict, was made from; the rest as for
        `calc_elbo`.
        """
        num_frames = posterior.z_base.shape[1]
        num_static = min(num_static, num_frames)
        kl_dyn = self._dynamics_kl(posterior, model_output, dynamic_discount, balance, num_static)
        loss = beta_dyn * kl_dyn
        if beta_dyn_l1:
            loss = loss + beta_dyn_l1 * self._position_error(posterior, model_output, dynamic_discount, num_static)
        loss = loss / num_frames
        return {"loss": loss * VGG_LOSS_SCALE if recon_loss_type == "vgg" else loss, "kl_dyn": kl_dyn}

    def _dynamics_kl(self, posterior, output, discount, balance, num_static):
        """The dynamics' KL of the frames after the static ones, weighted by the discount: a scalar."""
        frames = posterior.frames(slice(num_static, None))
        kl = dynamics_kl(frames, self._last_predictions(output, frames.z_base.shape[1]), balance)
        return (self._discount(discount, kl.shape[1], kl) * kl).sum(-1).mean()

    def _position_error(self, posterior, output, discount, num_static):
        """The absolute difference (-1..1) between the positions that PINT predicts and the posteriors' means, summed
        over particles and coordinates, of the frames after the static ones, weighted by the discount: a scalar.

        Unlike the KL it does not fade where the predicted variance is large, so that PINT learns how particles move in
        a tenth of the steps.
        """
        frames = posterior.frames(slice(num_static, None))
        predicted = self._last_predictions(output, frames.z_base.shape[1]).position.mean
        error = (predicted - (frames.z_base + frames.offset.mean).detach()).abs().sum((-2, -1))
        return (self._discount(discount, error.shape[1], error) * error).sum(-1).mean()

    @staticmethod
    def _last_predictions(output, count):
        """PINT's `Prediction` of the last `count` frames."""
        prediction = prediction_of(output)
        return prediction.frames(slice(prediction.position.mean.shape[1] - count, None))

    def _discount(self, discount, count, like):
        """The weights of the `count` frames after the static ones, [count]."""
        if discount is None:
            return like.new_ones(count)
        if len(discount) < count:
            raise ValueError(f"dynamic_discount has {len(discount)} entries; legal: at least {count}")
        return torch.as_tensor(discount).to(like, non_blocking=True)[:count]


class DiffuseDDLP(nn.Module):
    """DiffuseDDLP: videos from nothing. A diffusion draws the particles of the first `diffuse_frames` frames, PINT
    predicts the others, and the DDLP draws them all.

    config, ddlp_config: the `DiffuseConfig` and the DDLP's `Config`, whose PINT settings are the denoiser's; ddlp: the
    trained DDLP, which is frozen here: always in evaluation mode, without gradients. Training moves `diffusion` alone;
    `normalization` must have been fitted before (`ParticleNormalization.fit`).
    """

    def __init__(self, config, ddlp_config, ddlp):
        super().__init__()
        self.config, self.ddlp_config = config, ddlp_config
        self.ddlp = ddlp.eval().requires_grad_(False)
        d, d_bg = ddlp.architecture.learned_feature_dim, ddlp.architecture.bg_feature_dim
        self.normalization = ParticleNormalization(d, d_bg, config.particle_norm)
        self.layout = self.normalization.layout
        self.num_tokens = ddlp_config.n_kp_enc + 1
        self.register_buffer("mask", self.layout.mask(self.num_tokens), persistent=False)
        self.diffusion = GaussianDiffusionPINT(
            self._denoiser(),
            seq_length=config.diffuse_frames,
            timesteps=config.diffusion_num_steps,
            loss_type=config.loss_type,
            objective="pred_x0",
            clip_denoised=config.particle_norm == "minmax",
        )

    def _denoiser(self):
        width, pint, dropout = self.layout.width, self.ddlp_config, self.config.denoiser_dropout
        if self.config.denoiser == "unet":
            return UNetDenoiser(width, pint.pint_dim, pint.pint_heads, dropout, max_particles=self.num_tokens)
        return PINTDenoiser(
            width,
            pint.pint_dim,
            pint.pint_dim,
            n_head=pint.pint_heads,
            n_layer=pint.pint_layers,
            block_size=self.config.diffuse_frames,
            dropout=dropout,
            max_particles=self.num_tokens,
        )

    @classmethod
    def from_config(cls, config, ddlp_config, ddlp=None):
        """The model of two configurations, each an object or a dict of its keys, around a DDLP; without one, around a
        new DDLP with random weights."""
        config, ddlp_config = DiffuseConfig.from_dict(config), Config.from_dict(ddlp_config)
        return cls(config, ddlp_config, ObjectDynamicsDLP.from_config(ddlp_config) if ddlp is None else ddlp)

    def train(self, mode=True):
        super().train(mode)
        self.ddlp.eval()
        return self

    # -------------------------------------------------------------------------------------------------- training

    def encode(self, videos):
        """The particles of the first `diffuse_frames` frames, the posteriors' means, as tokens that are not normalised.

        videos: [B, diffuse_frames or more, C, H, W]. Returns tokens [B, diffuse_frames, K + 1, F] and the mask, 0 on
        their padding, of the same shape.
        """
        frames = self.config.diffuse_frames
        if videos.dim() == 5 and videos.shape[1] < frames:
            raise ValueError(f"a clip of {videos.shape[1]} frames; legal: diffuse_frames {frames} or more")
        tokens = self.layout.pack(self.ddlp.track(videos[:, :frames], bg_masks_from_fg=True))
        return tokens, self.mask.expand_as(tokens)

    def forward(self, tokens):
        """The training loss, a scalar, of tokens that `encode` gave."""
        return self.diffusion(self.normalization.normalize(tokens), self.mask)

    def loss(self, videos):
        """The training loss of videos, as for `encode`."""
        return self(self.encode(videos)[0])

    # -------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(self, n, horizon, **options):
        """Generate n videos of `horizon` frames: [n, horizon, C, H, W]. options: those of `sample_particles`."""
        return self.ddlp.render(self.sample_particles(n, horizon, **options))

    @torch.no_grad()
    def sample_particles(self, n, horizon, *, sampler=None, steps=None, seed=None, deterministic=True, progress=iter):
        """The particles of n videos: `Particles` [n, horizon, ...].

        sampler, steps: see `GaussianDiffusionPINT.sample`, by default those of the configuration; seed: of all draws;
        deterministic: PINT's means instead of samples; progress: what the steps are wrapped in, such as tqdm.
        Raises `ValueError` if an argument is not legal.
        """
        frames = self.config.diffuse_frames
        if n < 1:
            raise ValueError(f"n is {n}; legal: at least 1")
        if horizon < frames:
            raise ValueError(f"horizon is {horizon}; legal: diffuse_frames {frames} or more")
        sampler, steps = self.config.sampling(sampler, steps)
        if seed is not None and not 0 <= seed < 2**64:  # torch would wrap others around
            raise ValueError(f"seed is {seed}; legal: 0 to {2**64 - 1}, or None")
        with _seeded(seed, self.mask.device):
            tokens = self.diffusion.sample(n, sampler=sampler, steps=steps, mask=self.sampling_mask, progress=progress)
            particles = self.particles_of(tokens)
            return self.ddlp.predict(particles, horizon - frames, deterministic)

    @property
    def sampling_mask(self):
        """What `GaussianDiffusionPINT.sample` is to keep at 0: the tokens' padding, where the configuration says so."""
        return self.mask if self.config.mask_samples else None

    def particles_of(self, tokens):
        """Normalised tokens -> `Particles`, whose transparency is within 0..1, as whatever uses it expects."""
        particles = self.layout.unpack(self.normalization.unnormalize(tokens))
        particles.obj_on = particles.obj_on.clamp(0, 1)
        return particles


@contextmanager
def _seeded(seed, device):
    """Seeded random numbers for a while, none touched outside; without a seed, as ever."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# ----------------------------------------------------------------------------- the release's dictionaries, and terms


def fields_of(architecture, arguments):
    """The `architecture` (its class) whose fields are taken from a constructor's arguments."""
    return architecture(**{field.name: arguments[field.name] for field in fields(architecture)})


def _as_images(x):
    """[..., C, H, W] -> [N, 1, C, H, W]: clips of one frame."""
    return x.reshape(-1, 1, *x.shape[-3:])


def encoding_dict(encoding):
    """The part of the output dictionary that encoding fills. encoding: [B, ...]."""
    posterior, particles = encoding.posterior, encoding.particles
    output = {
        "kp_p": encoding.proposals,
        "mu": posterior.z_base,
        "logvar": torch.zeros_like(posterior.z_base),
        "z": particles.z,
        "z_base": posterior.z_base,
        "z_kp_bg": torch.zeros_like(posterior.z_base[:, :1]),
        "mu_offset": posterior.offset.mean,
        "logvar_offset": posterior.offset.logvar,
        "mu_scale": posterior.scale.mean,
        "logvar_scale": posterior.scale.logvar,
        "z_scale": particles.z_scale,
        "mu_depth": posterior.depth.mean,
        "logvar_depth": posterior.depth.logvar,
        "z_depth": particles.z_depth,
        "obj_on_a": posterior.obj_on.a,
        "obj_on_b": posterior.obj_on.b,
        "obj_on": particles.obj_on,
        "mu_features": posterior.features.mean,
        "logvar_features": posterior.features.logvar,
        "z_features": particles.z_features,
        "cropped_objects_original": encoding.glimpses,
    }
    if posterior.bg is not None:
        output |= {"mu_bg": posterior.bg.mean, "logvar_bg": posterior.bg.logvar, "z_bg": particles.z_bg}
    return output


def encoded_dict(encoding, bg_mask):
    """What `encode_all` returns."""
    output = encoding_dict(encoding)
    output["cropped_objects"] = output.pop("cropped_objects_original")
    del output["kp_p"]
    return {**output, "z_offset": encoding.particles.z - encoding.posterior.z_base, "bg_mask": bg_mask}


def unflatten(output, sizes):
    """A dictionary's tensors [B * T, ...] as [B, T, ...]."""
    return {name: value.unflatten(0, sizes) for name, value in output.items()}


def decoding_dict(decoding):
    """The part of the output dictionary that decoding fills."""
    output = {
        "rec": decoding.rec,
        "dec_objects": decoding.foreground,
        "dec_objects_original": decoding.glimpses,
        "bg": decoding.bg,
    }
    return output if decoding.alpha_masks is None else {**output, "alpha_masks": decoding.alpha_masks}


def posterior_of(output):
    """The `Posterior` in an output dictionary."""
    return Posterior(
        output["z_base"],
        gaussian_of(output, "offset"),
        gaussian_of(output, "scale"),
        gaussian_of(output, "depth"),
        BetaParams(output["obj_on_a"], output["obj_on_b"]),
        gaussian_of(output, "features"),
        gaussian_of(output, "bg"),
    )


def prediction_of(output):
    """The `Prediction` in an output dictionary."""
    return Prediction(
        Gaussian(output["mu_dyn"], output["logvar_dyn"]),
        gaussian_of(output, "scale_dyn"),
        gaussian_of(output, "depth_dyn"),
        BetaParams(output["obj_on_a_dyn"], output["obj_on_b_dyn"]),
        gaussian_of(output, "features_dyn"),
        gaussian_of(output, "bg_dyn"),
    )


def gaussian_of(output, name):
    """The `Gaussian` of the attribute `name` in an output dictionary."""
    return Gaussian(output[f"mu_{name}"], output[f"logvar_{name}"])


def kl_dict(kl, kl_balance):
    """The reported KL terms, from those of `ParticleModel._static_kl` reduced to scalars."""
    features = kl["features"] + kl["bg"]
    return {
        "kl": kl["kp"] + kl["scale"] + kl["obj_on"] + kl_balance * (features + kl["depth"]),
        "loss_kl_kp": kl["kp"],
        "loss_kl_feat": features,
        "loss_kl_obj_on": kl["obj_on"],
        "loss_kl_scale": kl["scale"],
        "loss_kl_depth": kl["depth"],
    }


def elbo_dict(loss, psnr, rec, kl, output, recon_loss_type):
    """What `calc_elbo` returns. kl: the reported KL terms by name."""
    return {
        "loss": loss * VGG_LOSS_SCALE if recon_loss_type == "vgg" else loss,
        "psnr": psnr,
        "loss_rec": rec,
        "obj_on_l1": output["obj_on"].abs().sum(-1).mean(),
        **kl,
    }


def dynamics_kl(posterior, predicted, balance):
    """KL(posterior || PINT's prediction), the anchors without a gradient: [B, T, ...] -> [B, T]."""

    def kl(mine, theirs):
        return calc_kl(mine.logvar, mine.mean, theirs.mean, theirs.logvar, reduce="none", balance=balance)

    position = Gaussian(posterior.z_base.detach() + posterior.offset.mean, posterior.offset.logvar)
    obj_on = calc_kl_beta_dist(
        posterior.obj_on.a, posterior.obj_on.b, predicted.obj_on.a, predicted.obj_on.b, balance=balance
    )
    per_particle = (
        kl(position, predicted.position)
        + kl(posterior.scale, predicted.scale)
        + kl(posterior.depth, predicted.depth)
        + kl(posterior.features, predicted.features)
        + obj_on
    )
    return per_particle.sum(-1) + kl(posterior.bg, predicted.bg)


def gaussian_kl(posterior, mean=0.0, logvar=0.0):
    """KL(posterior || N(mean, exp(logvar))) summed over the last dimension: [*, n] -> [*]."""
    return calc_kl(posterior.logvar, posterior.mean, mean, logvar, reduce="none")


def reconstruction_loss(x, rec, recon_loss_type, recon_loss_func):
    """The error of each image, summed over pixels and channels: [B, C, H, W] twice -> [B]."""
    if recon_loss_type == "vgg":
        if recon_loss_func is None:
            raise ValueError('recon_loss_func is None; legal with recon_loss_type "vgg": a VGGDistance')
        return recon_loss_func(x, rec, reduction="none")
    return calc_reconstruction_loss(x, rec, loss_type=recon_loss_type, reduction="none")


def peak_signal_to_noise_ratio(x, rec):
    """-10 log10 of the mean squared error over everything, in dB, for values in 0..1."""
    return -10 * torch.log10(F.mse_loss(rec.detach(), x))
