"""The dataclasses in which particles travel.

`Particles` holds one value per attribute, `Posterior` one distribution per attribute. Leading dimensions `*` are
`B` (images), `B, T` (clips), or `B * T` (clips as a batch of images); K is the number of particles, d the width of
the appearance, d_bg that of the background.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Beta

# Bounds of the Beta's parameters: the published lower one, and an upper one that keeps exp, lgamma, digamma and the
# sampler's gradient finite in float32 whatever the logits are.
BETA_MIN, BETA_MAX = 1e-5, 1e6
VISIBLE = 0.5  # a particle of a transparency above this counts as visible


class TensorTree:
    """What a dataclass of tensors, of nested `TensorTree`s and of None can do as a whole."""

    def map(self, function):
        """Apply `function` to every tensor."""
        return replace(self, **{name: self._map_value(value, function) for name, value in self._items()})

    def detach(self):
        return self.map(Tensor.detach)

    def pack(self):
        """All tensors [B, T, ...] side by side: [B, T, n]; `unpack` takes them apart."""
        return torch.cat([leaf.flatten(2) for leaf in self.leaves()], dim=-1)

    def unpack(self, packed):
        """A tree of the shapes of this one, but for B and T, from what `pack` gave: [B, T, n]."""
        shapes = [leaf.shape[2:] for leaf in self.leaves()]
        parts = iter(packed.split([shape.numel() for shape in shapes], dim=-1))
        return self.map(lambda leaf: next(parts).unflatten(-1, leaf.shape[2:]) if leaf.dim() > 2 else next(parts))

    def leaves(self):
        """All tensors, in the order of the fields."""
        found = []
        self.map(lambda leaf: found.append(leaf) or leaf)
        return found

    def merge_time(self):
        """[B, T, ...] -> [B * T, ...]"""
        return self.map(lambda x: x.flatten(0, 1))

    def split_time(self, num_frames):
        """[B * T, ...] -> [B, T, ...]"""
        return self.map(lambda x: x.unflatten(0, (-1, num_frames)))

    def frames(self, frames):
        """The frames that an index or slice selects: [B, T, ...] -> [B, ...] or [B, t, ...]"""
        return self.map(lambda x: x[:, frames])

    @classmethod
    def cat(cls, trees, dim=1):
        """[B, T1, ...], [B, T2, ...], ... -> [B, T1 + T2 + ..., ...]"""
        return cls._join(torch.cat, trees, dim)

    @classmethod
    def stack(cls, trees, dim=1):
        """One tree per frame, [B, ...] each -> [B, T, ...]"""
        return cls._join(torch.stack, trees, dim)

    @classmethod
    def _join(cls, join, trees, dim):
        joined = {}
        for name, first in trees[0]._items():
            values = [getattr(tree, name) for tree in trees]
            if isinstance(first, TensorTree):
                joined[name] = first._join(join, values, dim)
            else:
                joined[name] = None if first is None else join(values, dim)
        return cls(**joined)

    def _items(self):
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    @staticmethod
    def _map_value(value, function):
        if value is None:
            return None
        return value.map(function) if isinstance(value, TensorTree) else function(value)


@dataclass
class Gaussian(TensorTree):
    """A diagonal normal distribution: `mean` and `logvar`, [*, n] each."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_params(cls, params):
        """`params` [*, 2n]: means, then logvars."""
        return cls(*params.chunk(2, dim=-1))

    def sample(self, deterministic=False):
        """A reparameterised draw, or the mean."""
        return self.mean if deterministic else reparameterize(self.mean, self.logvar)


@dataclass
class BetaParams(TensorTree):
    """A Beta distribution's `a` and `b`, [*] each, in `BETA_MIN..BETA_MAX`."""

    a: Tensor
    b: Tensor

    @classmethod
    def from_logits(cls, logits):
        """`logits` [*, 2]: log a, log b. Finite, with finite gradients, for any finite logits."""
        return cls(*logits.clamp(max=math.log(BETA_MAX)).exp().clamp(min=BETA_MIN).unbind(-1))

    def hide(self, hidden):
        """These, but nearly surely invisible (a mean of 0.001) where `hidden`, bool [*]."""
        return BetaParams(self.a.masked_fill(hidden, 0.1), self.b.masked_fill(hidden, 100.0))

    def sample(self, deterministic=False):
        """A reparameterised draw in 0..1, or the mean."""
        if deterministic:
            return self.a / (self.a + self.b)
        # In float32 the sampler's gradient is not finite where b/a is over 1e8; in float64 it always is.
        return Beta(self.a.double(), self.b.double(), validate_args=False).rsample().to(self.a.dtype)


@dataclass
class Particles(TensorTree):
    """One particle set: what the decoder draws and what the dynamics move."""

    z: Tensor  # [*, K, 2] position (y, x), -1..1 from the first pixel's centre to the last's
    z_scale: Tensor  # [*, K, 2] (height, width) logits: sigmoid is the side as a fraction of the image's
    z_depth: Tensor  # [*, K, 1]
    obj_on: Tensor  # [*, K] transparency, 0 (invisible) to 1
    z_features: Tensor | None  # [*, K, d] appearance; None until it is encoded
    z_bg: Tensor | None = None  # [*, d_bg] background


@dataclass(frozen=True)
class TokenLayout:
    """How particles lie in the tokens of the diffusion, [*, K + 1, width], width = 2 + 2 + 1 + 1 + max(d, d_bg).

    A particle is [position 2, scale 2, depth 1, obj_on 1, features d], the background, the last token,
    [0, 0, z_bg d_bg]; zeros fill what is left of either.
    """

    features_dim: int  # d
    bg_features_dim: int  # d_bg

    @property
    def particle_dim(self):
        return 2 + 2 + 1 + 1 + self.features_dim

    @property
    def width(self):
        return 2 + 2 + 1 + 1 + max(self.features_dim, self.bg_features_dim)

    def join(self, particles, background):
        """[*, K, 6 + d] and [*, d_bg] -> tokens."""
        particles = F.pad(particles, (0, self.width - self.particle_dim))
        background = F.pad(background, (2, self.width - 2 - self.bg_features_dim))
        return torch.cat([particles, background.unsqueeze(-2)], dim=-2)

    def split(self, tokens):
        """What `join` joined: [*, K, 6 + d] and [*, d_bg]."""
        return tokens[..., :-1, : self.particle_dim], tokens[..., -1, 2 : 2 + self.bg_features_dim]

    def pack(self, particles):
        """`Particles` -> tokens."""
        attributes = [
            particles.z,
            particles.z_scale,
            particles.z_depth,
            particles.obj_on.unsqueeze(-1),
            particles.z_features,
        ]
        return self.join(torch.cat(attributes, dim=-1), particles.z_bg)

    def unpack(self, tokens):
        """Tokens -> `Particles`."""
        particles, background = self.split(tokens)
        z, z_scale, z_depth, obj_on, z_features = particles.split([2, 2, 1, 1, self.features_dim], dim=-1)
        return Particles(z, z_scale, z_depth, obj_on.squeeze(-1), z_features, background)

    def mask(self, num_tokens):
        """1 where a token holds a value (or the background's position), 0 where it is padded: [K + 1, width]."""
        mask = self.join(torch.ones(num_tokens - 1, self.particle_dim), torch.ones(self.bg_features_dim))
        mask[-1, :2] = 1
        return mask


@dataclass
class Posterior(TensorTree):
    """The distributions that an encoder gives for one particle set.

    The position's is a Gaussian *offset* from the anchor `z_base`, [*, K, 2].
    """

    z_base: Tensor
    offset: Gaussian
    scale: Gaussian
    depth: Gaussian
    obj_on: BetaParams
    features: Gaussian | None = None  # None until the appearance is encoded
    bg: Gaussian | None = None

    @property
    def position(self):
        """The position's distribution."""
        return Gaussian(self.z_base + self.offset.mean, self.offset.logvar)

    def sample(self, deterministic=False):
        """A draw, or the means, as `Particles`."""
        return sample_particles(self, deterministic)


@dataclass
class Prediction(TensorTree):
    """The distributions that the dynamics give for the next particle set."""

    position: Gaussian
    scale: Gaussian
    depth: Gaussian
    obj_on: BetaParams
    features: Gaussian
    bg: Gaussian

    def sample(self, deterministic=False):
        """A draw, or the means, as `Particles`."""
        return sample_particles(self, deterministic)


def sample_particles(distributions, deterministic):
    """`Particles` drawn from a `Posterior` or a `Prediction`, or their means."""
    names = ("position", "scale", "depth", "obj_on", "features", "bg")
    return Particles(*(getattr(distributions, name).sample(deterministic) for name in names))


def reparameterize(mu, logvar):
    """A draw from N(mu, exp(logvar)) through which gradients flow; any shape."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
