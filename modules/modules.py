"""Networks: blocks, patch prior, particle encoders, glimpse and background decoders.

Shape letters: B images, K particles, N proposals, C channels, H x W the image, g the glimpse's side, d the
appearance's width. The modules' attribute names are those of the published checkpoints, their typing slips included
(`grouupnorm`), so that a state dict is a published one.
"""

import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from modules.compositing import draw_glimpses
from modules.convolution import ReplicatePad, run_layers
from modules.particles import BetaParams, Gaussian, Particles, Posterior
from modules.spatial import (
    compose,
    cut_glimpses,
    duplicates,
    full_precision,
    generate_correlation_maps,
    paste_glimpses,
    square_mask,
)
from modules.transformer import Attention, TransformerBlock, apply_together, init_transformer_weights

HIDDEN_DIM = 256  # width of the fully connected layers of the encoders and decoders
MAP_CHANNELS = 32  # channels of the maps that encoders end with and decoders begin with
MAP_SIZE = 8  # side of the map that decoders begin with


@dataclass(frozen=True)
class Stage:
    """How an encoding is made: the training stage, and whether means replace samples."""

    deterministic: bool = False
    warmup: bool = False  # positions and scales are detached
    noisy: bool = False  # scales are the anchors' own plus noise, alphas are noisy

    @property
    def fixed_scale(self):
        """Whether glimpses are cut at the anchors' scale instead of a learned one."""
        return self.warmup or self.noisy


# ---------------------------------------------------------------------------------------------------------- blocks


def group_norm(channels):
    """GroupNorm with 4 groups, or 5 where 4 do not divide the channels."""
    return nn.GroupNorm(4 if channels % 4 == 0 else 5, channels, eps=1e-4)


def init_conv_weights(module):
    """Initial weights of encoders, decoders and prior: Conv2d N(0, 0.01) with zero bias, GroupNorm 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0, 0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.GroupNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def apply_heads(hidden, *heads):
    """Linear layers of one input, in the precision of their weights: a list of their outputs."""
    with full_precision(hidden):
        outputs = apply_together(hidden.to(heads[0].weight.dtype), heads)
        return outputs.split([head.out_features for head in heads], dim=-1)


def padded_conv(cin, cout, kernel, stride, pad_mode):
    """A bias-free convolution with padding kernel // 2: [padding layer, convolution], or [convolution] for zeros."""
    pad = kernel // 2
    if pad_mode == "zeros":
        return [nn.Conv2d(cin, cout, kernel, stride, padding=pad, bias=False)]
    return [ReplicatePad(pad), nn.Conv2d(cin, cout, kernel, stride, bias=False)]


class ResBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm, plus the input."""

    def __init__(self, cin, cout, stride, pad_mode):
        super().__init__()
        first, second = padded_conv(cin, cout, 3, stride, pad_mode), padded_conv(cout, cout, 3, 1, pad_mode)
        self.conv1 = nn.Sequential(*first) if len(first) > 1 else first[0]
        self.bn1 = group_norm(cout)
        self.conv2 = nn.Sequential(*second) if len(second) > 1 else second[0]
        self.bn2 = group_norm(cout)
        self.relu = nn.ReLU(inplace=True)
        changes_shape = stride != 1 or cin != cout
        self.stride = stride
        self.downsample = nn.Conv2d(cin, cout, 1, bias=False) if changes_shape else nn.Identity()

    def forward(self, x):
        out = run_layers(x, self.conv1, self.bn1, self.relu, self.conv2, self.bn2)
        # Strided here and not in the convolution: oneDNN's backward pass of a strided 1x1 convolution, channels last,
        # writes outside its memory (seen with PyTorch 2.14).
        return F.relu(out + run_layers(x[..., :: self.stride, :: self.stride], self.downsample))


class ConvBlock(nn.Module):
    """Convolution, GroupNorm, ReLU, or a `ResBlock`; then, with `upsample`, a bilinear x2 upsampling.

    [B, cin, h, w] -> [B, cout, ceil(h / stride), ...]. Without `norm`, the convolution and its ReLU alone.
    """

    def __init__(self, cin, cout, kernel=3, stride=1, pad_mode="replicate", residual=False, upsample=False, norm=True):
        super().__init__()
        layers = OrderedDict()
        name = f"conv_{cin}_to_{cout}"
        if residual:
            layers[name] = ResBlock(cin, cout, stride, pad_mode)
        else:
            *padding, convolution = padded_conv(cin, cout, kernel, stride, pad_mode)
            if padding:
                layers["pad"] = padding[0]
            layers[name] = convolution
            if norm:
                layers[f"grouupnorm_{cout}"] = group_norm(cout)
            layers["relu"] = nn.ReLU(inplace=norm)  # the convolution's output is kept for the backward pass
        if upsample:
            layers["upsample"] = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.main = nn.Sequential(layers)

    def forward(self, x):
        return self.main(x)


class OutputConv(nn.Module):
    """A 1x1 convolution with bias."""

    def __init__(self, cin, cout):
        super().__init__()
        self.main = nn.Sequential(OrderedDict({f"conv_{cin}_to_{cout}": nn.Conv2d(cin, cout, 1)}))

    @property
    def dtype(self):
        return self.main[0].weight.dtype

    def forward(self, x):
        return self.main(x)


def mlp(*widths, activation=nn.ReLU, final_activation=False):
    """Linear layers with `activation` between them, and with `final_activation` after the last."""
    layers = []
    for cin, cout in itertools.pairwise(widths):
        layers += [nn.Linear(cin, cout), activation()]
    return nn.Sequential(*layers) if final_activation else nn.Sequential(*layers[:-1])


class PatchCNN(nn.Module):
    """A convolutional encoder with one stride-2 stage per channel count after the first.

    [B, cin, size, size] -> [B, n_out, out_size, out_size].
    """

    def __init__(self, cin, channels, size, n_out, first_kernel=3, pad_mode="replicate", residual=False):
        super().__init__()
        block = {"pad_mode": pad_mode, "residual": residual}
        c = channels[0]
        layers = OrderedDict()
        layers["in_block_1"] = ConvBlock(cin, c, first_kernel, pad_mode=pad_mode)
        layers["in_block_2"] = ConvBlock(c, c, **block)
        for c_next in channels[1:]:
            layers[f"conv_in_{size}_0"] = ConvBlock(c, c_next, stride=2, **block)
            # A later stage of an equal width has no second block of its own: published checkpoints have one such
            # block per width, where that width first occurs.
            if f"conv_in_{c_next}_1" not in layers:
                layers[f"conv_in_{c_next}_1"] = ConvBlock(c_next, c_next, **block)
            c, size = c_next, math.ceil(size / 2)
        self.main = nn.Sequential(layers)
        self.keymap = nn.Conv2d(c, n_out, 1)
        self.out_size = size

    def forward(self, x):
        return run_layers(x, self.main, self.keymap)


class ImageDecoder(nn.Module):
    """[B, cin, s, s] -> [B, cdim, s * 2^(len(channels) - 1), ...] in 0..1, through `channels` from the last on."""

    def __init__(self, cin, channels, cdim, pad_mode, residual):
        super().__init__()
        up = {"pad_mode": pad_mode, "residual": residual, "upsample": True}
        layers = OrderedDict(depth_up=ConvBlock(cin, channels[-1], norm=False, **up))
        c, size = channels[-1], MAP_SIZE
        for c_next in reversed(channels[1:-1]):
            layers[f"conv_to_{size}"] = ConvBlock(c, c_next, **up)
            c, size = c_next, 2 * size
        layers[f"conv_to_{size}"] = ConvBlock(c, channels[0], pad_mode=pad_mode)
        self.main = nn.Sequential(layers)
        self.final_conv = OutputConv(channels[0], cdim)

    def forward(self, x):
        return torch.sigmoid(run_layers(x, self.main, self.final_conv).to(self.final_conv.dtype))


class LatentToMap(nn.Module):
    """[B, d] -> [B, 32, side, side], side = 8, 16, 32, ..."""

    def __init__(self, latent_dim, side, pad_mode, residual):
        super().__init__()
        self.mlp = mlp(latent_dim, HIDDEN_DIM, HIDDEN_DIM, MAP_CHANNELS * MAP_SIZE**2, final_activation=True)
        # The published maps have 32 channels of 8x8 made from 32*64 values.
        blocks = OrderedDict()
        for i in range(int(math.log2(side // MAP_SIZE))):
            blocks[f"depth_up_{i}"] = ConvBlock(
                MAP_CHANNELS, MAP_CHANNELS, pad_mode=pad_mode, residual=residual, upsample=True
            )
        self.cnn = nn.Sequential(blocks)

    def forward(self, z):
        return run_layers(self.mlp(z).unflatten(-1, (MAP_CHANNELS, MAP_SIZE, MAP_SIZE)), self.cnn)


class GlimpseDecoder(nn.Module):
    """[N, d] -> [N, 1 + cdim, g, g] in 0..1: alpha, then the colours."""

    def __init__(self, latent_dim, size, cdim, residual):
        super().__init__()
        self.fc = mlp(latent_dim, HIDDEN_DIM, HIDDEN_DIM, MAP_CHANNELS * MAP_SIZE**2, final_activation=True)
        layers = OrderedDict()
        c, width = MAP_CHANNELS, 2 * MAP_SIZE
        for i in range(int(math.log2(size // MAP_SIZE))):
            name = f"conv_to_{width}" if i else "depth_up"
            layers[name] = ConvBlock(c, 64, residual=residual, upsample=True)
            c, width = 64, width * 2 if i else width
        layers[f"conv_to_{width}"] = ConvBlock(c, 32)
        layers["final_conv"] = OutputConv(32, 1 + cdim)
        self.main = nn.Sequential(layers)
        self.decode = self.main  # published checkpoints list these weights under both names

    def forward(self, z_features):
        maps = self.fc(z_features).unflatten(-1, (MAP_CHANNELS, MAP_SIZE, MAP_SIZE))
        return torch.sigmoid(run_layers(maps, self.main).to(self.main.final_conv.dtype))


class FourierFeatures(nn.Module):
    """Random Fourier features of positions: [*, 2] -> [*, 2 * n + 2], cosines, sines and the position."""

    def __init__(self, n=128, std=10.0):
        super().__init__()
        self.register_buffer("b", std * torch.randn(n, 2))

    def forward(self, z):
        with full_precision(z):
            phase = 2 * math.pi * z @ self.b.T
        return torch.cat([phase.cos(), phase.sin(), z], dim=-1)


# ----------------------------------------------------------------------------------------------------------- prior


class PatchPrior(nn.Module):
    """Proposals: one spatial-softmax key point per heat map of every image patch."""

    def __init__(self, config):
        super().__init__()
        self.patch_size, self.image_size = config.patch_size, config.image_size
        self.kp_range = config.kp_range
        self.enc = PatchCNN(
            config.ch,
            config.prior_channels,
            config.patch_size,
            config.n_kp,
            pad_mode=config.pad_mode,
            residual=config.use_resblock,
        )
        init_conv_weights(self)

    def forward(self, x):
        """[B, C, H, W] -> proposals [B, N, 2] in `kp_range`, their uncertainty [B, N] (var_y + var_x + cov in the
        patch's own coordinates) and their patches' centres [N, 2]."""
        size, per_side = self.patch_size, self.image_size // self.patch_size
        patches = x.unfold(2, size, size).unfold(3, size, size)  # [B, C, rows, columns, size, size]
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        heat_maps = self.enc(patches).to(self.enc.keymap.weight.dtype)
        with full_precision(x):
            local, uncertainty = self._spatial_softmax(heat_maps)  # [B * patches, n_kp, 2], [B * patches, n_kp]
        starts = size * torch.arange(per_side, dtype=x.dtype, device=x.device)
        origins = torch.cartesian_prod(starts, starts).view(-1, 1, 2)  # [patches, 1, 2]
        local = local.unflatten(0, (x.shape[0], -1))  # [B, patches, n_kp, 2]
        centre = torch.full_like(local[0], sum(self.kp_range) / 2)
        return (
            self._to_image(local, origins).flatten(1, 2),
            uncertainty.unflatten(0, (x.shape[0], -1)).flatten(1, 2),
            self._to_image(centre, origins).flatten(0, 1),
        )

    def _spatial_softmax(self, heat_maps):
        """[B, n, h, w] -> the expected (y, x) [B, n, 2] and var_y + var_x + cov [B, n]."""
        height, width = heat_maps.shape[-2:]
        weights = heat_maps.flatten(2).softmax(-1).unflatten(-1, (height, width))
        axis = {"dtype": weights.dtype, "device": weights.device}
        y, x = torch.linspace(*self.kp_range, height, **axis), torch.linspace(*self.kp_range, width, **axis)
        rows, columns = weights.sum(-1), weights.sum(-2)
        mean_y, mean_x = rows @ y, columns @ x
        var_y = (rows @ y.square() - mean_y.square()).clamp(min=1e-6)
        var_x = (columns @ x.square() - mean_x.square()).clamp(min=1e-6)
        covariance = (weights @ x) @ y - mean_y * mean_x
        return torch.stack([mean_y, mean_x], dim=-1), var_y + var_x + covariance

    def _to_image(self, local, origins):
        """From a patch's coordinates to the image's, both in `kp_range`."""
        low, high = self.kp_range
        pixels = (local - low) / (high - low) * (self.patch_size - 1) + origins
        return pixels / (self.image_size - 1) * (high - low) + low


class PreNormResidual(nn.Module):
    """x + fn(norm(x))"""

    def __init__(self, dim, fn):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return x + self.fn(self.norm(x))


class ParticleMixer(nn.Module):
    """Anchors as soft selections of all proposals: an MLP-mixer over their glimpses and positions."""

    def __init__(self, config, n_proposals):
        super().__init__()
        dim = 128
        self.cnn = PatchCNN(config.ch, config.prior_channels, config.glimpse_size, MAP_CHANNELS)
        init_conv_weights(self.cnn)
        self.conv = nn.Sequential(nn.Conv1d(n_proposals, dim, 1), nn.ReLU(), nn.Conv1d(dim, n_proposals, 1))
        self.dense = mlp(dim, dim, dim)
        self.pos_projection = nn.Linear(2, dim // 2)
        self.conv_projection = nn.Linear(MAP_CHANNELS * self.cnn.out_size**2, dim // 2)
        self.mixer = nn.Sequential(
            PreNormResidual(dim, self.conv),  # published checkpoints list these weights under both names
            PreNormResidual(dim, self.dense),
            nn.LayerNorm(dim),
            nn.Linear(dim, config.n_kp_enc),
        )

    def forward(self, glimpses, proposals):
        """glimpses: [B, N, C, g, g]; proposals: [B, N, 2]. Returns anchors [B, K, 2]."""
        features = self.cnn(glimpses.flatten(0, 1)).flatten(1).unflatten(0, glimpses.shape[:2])
        tokens = torch.cat([self.conv_projection(features), self.pos_projection(proposals.detach())], dim=-1)
        weights = self.mixer(tokens).to(proposals.dtype).softmax(dim=1)  # [B, N, K]
        with full_precision(proposals):
            return weights.transpose(1, 2) @ proposals


# -------------------------------------------------------------------------------------------------------- encoders


class GlimpseEncoder(nn.Module):
    """What the particle encoders share: glimpses [B, K, cin, g, g] -> hidden features [B, K, 256]."""

    def __init__(self, config, cin, residual):
        super().__init__()
        self.cnn = PatchCNN(cin, config.prior_channels, config.glimpse_size, MAP_CHANNELS, residual=residual)
        init_conv_weights(self.cnn)
        self.projection = nn.Linear(MAP_CHANNELS * self.cnn.out_size**2, HIDDEN_DIM)
        self.attends = config.enable_enc_attn
        if self.attends:
            self.pos_enc = FourierFeatures()
            self.pos_emb = mlp(2 * len(self.pos_enc.b) + 2, 1024, HIDDEN_DIM, activation=nn.GELU)
            attention = Attention(HIDDEN_DIM, 1, config.dropout, linear_bias=True)
            self.self_attention = TransformerBlock(HIDDEN_DIM, attention, 2, nn.ReLU, config.dropout)
            init_transformer_weights(self.self_attention)
        self.backbone = mlp(HIDDEN_DIM, HIDDEN_DIM, HIDDEN_DIM, final_activation=True)

    def encode(self, glimpses, z):
        features = self.cnn(glimpses.flatten(0, 1)).flatten(1)
        features = self.projection(features).unflatten(0, glimpses.shape[:2])
        if self.attends:
            features = self.self_attention(features + self.pos_emb(self.pos_enc(z.detach())))
        return self.backbone(features)


class ParticleAttributeEncoder(GlimpseEncoder):
    """Glimpses -> offset, scale, transparency and depth."""

    def __init__(self, config):
        cin = config.ch + int(config.use_correlation_heatmaps)
        super().__init__(config, cin, config.use_resblock)
        self.activation = torch.tanh if config.kp_activation == "tanh" else torch.sigmoid
        self.x_head = nn.Linear(HIDDEN_DIM, 2)  # the first component, y, under its published name
        self.y_head = nn.Linear(HIDDEN_DIM, 2)
        self.scale_xy_head = nn.Linear(HIDDEN_DIM, 4)
        self.obj_on_head = nn.Linear(HIDDEN_DIM, 2)
        self.depth_head = nn.Linear(HIDDEN_DIM, 2)

    def forward(self, glimpses, z):
        """glimpses: [B, K, C (+ 1), g, g]; z: [B, K, 2]. Returns the offset's, scale's, transparency's and depth's
        distributions."""
        heads = self.x_head, self.y_head, self.scale_xy_head, self.obj_on_head, self.depth_head
        y, x, scale, obj_on, depth = apply_heads(self.encode(glimpses, z), *heads)
        mean, logvar = torch.stack([y, x], dim=-2).unbind(-1)  # [B, K, 2] each
        return (
            Gaussian(self.activation(mean), logvar),
            Gaussian.from_params(scale),
            BetaParams.from_logits(obj_on),
            Gaussian.from_params(depth),
        )


class ParticleFeaturesEncoder(GlimpseEncoder):
    """Glimpses -> appearance."""

    def __init__(self, config):
        super().__init__(config, config.ch, residual=False)
        self.features_head = nn.Linear(HIDDEN_DIM, 2 * config.learned_feature_dim)

    def forward(self, glimpses, z):
        """glimpses: [B, K, C, g, g]; z: [B, K, 2]. Returns the appearance's distribution, [B, K, d]."""
        return Gaussian.from_params(*apply_heads(self.encode(glimpses, z), self.features_head))


# -------------------------------------------------------------------------------------- foreground and background


class Foreground(nn.Module):
    """Proposals, particle encoders and glimpse decoder: image to particles and back."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.prior = PatchPrior(config)
        if config.filtering_heuristic == "none":
            self.particle_mixer = ParticleMixer(config, config.num_proposals)
        self.particle_attribute_enc = ParticleAttributeEncoder(config)
        self.particle_features_enc = ParticleFeaturesEncoder(config)
        self.object_dec = GlimpseDecoder(
            config.learned_feature_dim, config.glimpse_size, config.ch, config.use_resblock
        )
        init_conv_weights(self.object_dec)

    def propose(self, x, heuristic=None):
        """The proposals kept, best first: [B, C, H, W] -> [B, N, 2].

        heuristic: "variance" keeps the most certain, "distance" those farthest from their patch's centre, "random"
        a random choice that the batch shares, "none" all; default: the configuration's.
        """
        heuristic = heuristic or self.config.filtering_heuristic
        proposals, uncertainty, centres = self.prior(x)
        if heuristic == "none":
            return proposals
        n_kept = min(self.config.n_kp_prior, proposals.shape[1])
        if heuristic == "random":
            return proposals[:, torch.randperm(proposals.shape[1], device=x.device)[:n_kept]]
        score = -uncertainty if heuristic == "variance" else (proposals - centres).square().sum(-1)
        kept = score.argsort(dim=1, descending=True, stable=True)[:, :n_kept]
        return proposals.gather(1, kept.unsqueeze(-1).expand(-1, -1, 2))

    def anchors(self, x, proposals):
        """One anchor per particle: [B, C, H, W], [B, N, 2] -> [B, K, 2]."""
        if self.config.filtering_heuristic == "none":
            glimpses = self.cut(x, proposals.detach())
            return self.particle_mixer(glimpses, proposals)
        return proposals[:, : self.config.n_kp_enc]

    def cut(self, x, z, z_scale=None):
        """Glimpses at z, of the scale given as logits or else the anchors': [B, K, C, g, g]."""
        size = self.config.glimpse_size
        scale = torch.full_like(z, size / self.config.image_size) if z_scale is None else torch.sigmoid(z_scale)
        return cut_glimpses(x, z, scale, size)

    def encode_attributes(self, x, z, z_scale=None, previous_glimpses=None):
        """The attributes' distributions from the glimpses at z (with `use_correlation_heatmaps`, and their correlation
        with the particles' previous glimpses)."""
        if self.config.use_correlation_heatmaps:
            previous = None if previous_glimpses is None else previous_glimpses.flatten(0, 1)
            glimpses = generate_correlation_maps(x, z, self.config.glimpse_size, previous, z_scale)
            glimpses = glimpses.unflatten(0, z.shape[:2])
        else:
            glimpses = self.cut(x, z, z_scale)
        return self.particle_attribute_enc(glimpses, z)

    def encode(self, x, anchors, stage, refine=True, previous_glimpses=None, previous_scale=None):
        """One frame's posterior, a draw from it and the glimpses that it was read from.

        The arguments are those of `locate`. Returns `Posterior`, `Particles` (both without a background) and
        [B, K, C, g, g].
        """
        posterior, particles, glimpses, _ = self.locate(x, anchors, stage, refine, previous_glimpses, previous_scale)
        posterior.features, particles.z_features = self.encode_appearance(glimpses, particles.z, stage)
        return posterior, particles, glimpses

    def locate(self, x, anchors, stage, refine=True, previous_glimpses=None, previous_scale=None, hidden=None):
        """`encode` without the appearance, which the next frame does not need; returns what it returns, and which
        particles are hidden as duplicates, bool [B, K], or None where the configuration hides none.

        x: [B, C, H, W]; anchors: [B, K, 2]; refine: move the anchors by the first estimate and look once more;
        previous_glimpses [B, K, C, g, g], previous_scale [B, K, 2] (logits) and hidden: the particles' of the frame
        before.
        """
        if stage.fixed_scale:
            previous_glimpses = previous_scale = None
        offset, scale, obj_on, depth = self.encode_attributes(x, anchors.detach(), previous_scale, previous_glimpses)
        if refine:
            anchors = anchors + offset.mean
            refined_scale = None if stage.fixed_scale else scale.mean.detach()
            offset, scale, obj_on, depth = self.encode_attributes(x, anchors.detach(), refined_scale, previous_glimpses)
        z_scale = scale.sample(stage.deterministic)
        if stage.noisy:
            s = self.config.anchor_s
            z_scale = math.log(s / (1 - s + 1e-5)) + 0.1 * torch.randn_like(z_scale)
        z = anchors + offset.sample(stage.deterministic)
        if stage.warmup:
            z, z_scale = z.detach(), z_scale.detach()
        if hidden is None and self.config.duplicate_iou is not None:
            hidden = duplicates(z, torch.sigmoid(z_scale), obj_on.sample(deterministic=True), self.config.duplicate_iou)
        if hidden is not None:
            obj_on = obj_on.hide(hidden)
        glimpses = self.cut(x, z, z_scale.detach())
        posterior = Posterior(anchors, offset, scale, depth, obj_on)
        particles = Particles(
            z, z_scale, depth.sample(stage.deterministic), obj_on.sample(stage.deterministic), z_features=None
        )
        return posterior, particles, glimpses, hidden

    def encode_appearance(self, glimpses, z, stage):
        """The appearance's distribution and a draw from it, [B, K, d]. glimpses: [B, K, C, g, g]; z: [B, K, 2]."""
        features = self.particle_features_enc(glimpses, z)
        return features, features.sample(stage.deterministic)

    def decode(self, particles, noisy=False, alpha_masks=True):
        """particles: [B, K, ...]. Returns decoded glimpses [B, K, 1 + C, g, g], the foreground [B, C, H, W], the
        background's mask [B, 1, H, W] and the alpha masks [B, K, 1, H, W], or None unless `alpha_masks`: without them
        drawing takes a fraction of the time and of the memory."""
        size = self.config.image_size
        glimpses = self.object_dec(particles.z_features.flatten(0, 1)).unflatten(0, particles.z.shape[:2])
        placed = glimpses, particles.z, torch.sigmoid(particles.z_scale)
        if not (noisy or alpha_masks):
            return glimpses, *draw_glimpses(*placed, particles.obj_on, particles.z_depth, size, size), None
        canvas = paste_glimpses(*placed, size, size)
        alpha, rgb = canvas[:, :, :1], canvas[:, :, 1:]
        if noisy:
            alpha = (alpha + 0.1 * torch.randn_like(alpha)).clamp(0, 1)
        foreground, bg_mask, masks = compose(alpha, rgb, particles.obj_on, particles.z_depth)
        return glimpses, foreground, bg_mask, masks if alpha_masks else None

    def outside_mask(self, particles):
        """1 where no particle is, 0 where one is: [B, 1, H, W], from squares of the anchors' size."""
        return square_mask(particles.z, particles.obj_on, self.config.glimpse_size, self.config.image_size)


class Background(nn.Module):
    """The background particle: image to d_bg numbers and back."""

    def __init__(self, config):
        super().__init__()
        channels, block = config.enc_channels, {"pad_mode": config.pad_mode, "residual": config.use_resblock}
        self.bg_cnn_enc = PatchCNN(config.ch, channels, config.image_size, MAP_CHANNELS, first_kernel=7, **block)
        side = self.bg_cnn_enc.out_size
        self.bg_enc = mlp(MAP_CHANNELS * side**2, HIDDEN_DIM, HIDDEN_DIM, 2 * config.bg_feature_dim)
        self.latent_to_feat_map = LatentToMap(config.bg_feature_dim, side, **block)
        self.dec = ImageDecoder(MAP_CHANNELS, channels, config.ch, **block)
        init_conv_weights(self)

    def encode(self, x, mask):
        """x: [B, C, H, W]; mask: [B, 1, H, W], 1 where the background is. Returns its distribution, [B, d_bg]."""
        hidden = self.bg_enc[:-1](self.bg_cnn_enc(x * mask).flatten(1))
        return Gaussian.from_params(*apply_heads(hidden, self.bg_enc[-1]))

    def decode(self, z_bg):
        """[B, d_bg] -> [B, C, H, W] in 0..1"""
        return self.dec(self.latent_to_feat_map(z_bg))
