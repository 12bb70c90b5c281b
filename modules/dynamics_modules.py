"""PINT, the particle interaction transformer: from the particles of past frames to the distribution of the next ones
(arXiv 2306.05957, section 3.2).

Shape letters: B clips, T frames, K particles, N = K + 1 tokens per frame (the last one is the background's), C width,
d and d_bg the widths of the appearance and of the background.
"""

import torch
from torch import nn

from modules.modules import apply_heads, full_precision, mlp
from modules.particles import BetaParams, Gaussian, Particles, Prediction
from modules.transformer import Attention, TransformerBlock, init_transformer_weights

DEPTH_MARK = "depth_logvar_from_mean"  # in the state dicts of models without the published depth logvar


class RelativePositionBias(nn.Module):
    """Learned biases of the attention's logits by the tokens' distance in time and, unless `max_particles` is None, in
    particle order."""

    def __init__(self, n_head, max_frames, max_particles):
        super().__init__()
        self.max_frames, self.max_particles = max_frames, max_particles
        self.rel_pos_bias = nn.Parameter(0.02 * torch.randn(2 * max_frames - 1, n_head))
        self.particle_rel_pos_bias = (
            None if max_particles is None else nn.Parameter(0.02 * torch.randn(2 * max_particles - 1, n_head))
        )

    def forward(self, n_frames, n_particles):
        """[heads, T, N, T, N], from token (t, i) to token (s, j)."""
        time = self._by_distance(self.rel_pos_bias, n_frames, self.max_frames)[:, :, None, :, None]
        if self.particle_rel_pos_bias is None:
            return time.expand(-1, -1, n_particles, -1, n_particles)
        particle = self._by_distance(self.particle_rel_pos_bias, n_particles, self.max_particles)  # [heads, N, N]
        return time + particle[:, None, :, None, :]

    @staticmethod
    def _by_distance(table, count, maximum):
        index = torch.arange(count, device=table.device)
        return table[maximum - 1 + index[None, :] - index[:, None]].permute(2, 0, 1)


class CausalParticleAttention(Attention):
    """Attention over all tokens of all frames: token (t, i) sees (s, j) for every particle j and frame s <= t."""

    def __init__(self, dim, n_head, max_frames, max_particles, dropout, positional_bias):
        super().__init__(dim, n_head, dropout, linear_bias=False)
        self.register_buffer("mask", torch.ones(max_frames, max_frames).tril()[None, None, None, :, None, :])
        self.rel_pos_bias = RelativePositionBias(n_head, max_frames, max_particles) if positional_bias else None

    def bias(self, T, N):
        """What is added to the logits of T frames of N tokens, -inf where one is not seen: [heads, T * N, T * N]."""
        visible = self.mask[0, 0, 0, :T, :, :T, None].bool()  # [T, 1, T, 1]
        bias = self.mask.new_zeros(1, T, N, T, N) if self.rel_pos_bias is None else self.rel_pos_bias(T, N)
        return bias.masked_fill(~visible, float("-inf")).flatten(3, 4).flatten(1, 2)


class ParticleTransformer(nn.Module):
    """A causal transformer over frames and particles: [B, T, N, C] -> [B, T, N, C]."""

    def __init__(self, dim, n_head, n_layer, max_frames, max_particles, dropout, positional_bias=True):
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(
                    dim,
                    CausalParticleAttention(dim, n_head, max_frames, max_particles, dropout, positional_bias),
                    4,
                    nn.GELU,
                    dropout,
                )
                for _ in range(n_layer)
            )
        )
        self.ln_f = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, dim, bias=False)
        init_transformer_weights(self)

    def biases(self, n_frames, n_particles):
        """The blocks' attention biases, a list: they do not change from call to call."""
        return [block.attn.bias(n_frames, n_particles) for block in self.blocks]

    def forward(self, x, biases=None, last=None):
        """biases: those of `biases`, if they are known; last: give so many last frames alone, [B, last, N, C]."""
        T, N = x.shape[1:3]
        biases = self.biases(T, N) if biases is None else biases
        x = x.flatten(1, 2)  # frame by frame
        for block, bias in zip(self.blocks, biases, strict=True):
            x = block(x, bias, N * last if last and block is self.blocks[-1] else None)
        return self.head(self.ln_f(x)).unflatten(1, (-1, N))


class ParticleProjection(nn.Module):
    """Particles -> tokens: each attribute through an MLP of its own, then all of a particle's through one.

    With `identity_init` that of the positions begins as the identity. As PyTorch draws its weights it lets little of a
    position through, and hardly more than one direction of it, so that PINT learns late to move particles.
    """

    def __init__(self, features_dim, bg_features_dim, hidden_dim, dim, identity_init=False):
        super().__init__()
        self.xy_projection = mlp(2, hidden_dim, 2)
        self.scale_projection = mlp(2, hidden_dim, 2)
        self.obj_on_projection = mlp(1, hidden_dim, 1)
        self.depth_projection = mlp(1, hidden_dim, 1)
        self.features_projection = mlp(features_dim, hidden_dim, features_dim)
        self.particle_projection = mlp(2 + 2 + 1 + 1 + features_dim, hidden_dim, dim)
        self.bg_features_projection = mlp(bg_features_dim, hidden_dim, dim)
        if identity_init:
            _begin_as_identity(self.xy_projection)

    def forward(self, particles):
        """`Particles` [B, T, ...] -> tokens [B, T, N, C], the background's last."""
        with full_precision(particles.z):
            attributes = [
                self.xy_projection(particles.z),
                self.scale_projection(particles.z_scale),
                self.obj_on_projection(particles.obj_on.unsqueeze(-1)),
                self.depth_projection(particles.z_depth),
                self.features_projection(particles.z_features),
            ]
            tokens = self.particle_projection(torch.cat(attributes, dim=-1))  # [B, T, K, C]
            background = self.bg_features_projection(particles.z_bg).unsqueeze(2)  # [B, T, 1, C]
        return torch.cat([tokens, background], dim=2)


@torch.no_grad()
def _begin_as_identity(net):
    """Make a two-layer ReLU MLP the identity, relu(x) - relu(-x); its other hidden units have no weight yet."""
    first, last = net[0], net[-1]
    width = first.in_features
    signs = torch.cat([torch.eye(width), -torch.eye(width)])
    first.weight[: 2 * width] = signs
    first.bias[: 2 * width] = 0
    last.weight.zero_()
    last.bias.zero_()
    last.weight[:, : 2 * width] = signs.T


class ParticleDecoder(nn.Module):
    """Tokens -> the distribution of the next particles, as changes where the dynamics predict those."""

    def __init__(self, features_dim, bg_features_dim, hidden_dim, dim):
        super().__init__()
        self.backbone = mlp(dim, hidden_dim, hidden_dim, final_activation=True)
        self.x_head = nn.Linear(hidden_dim, 2)  # the first component, y, under its published name
        self.y_head = nn.Linear(hidden_dim, 2)
        self.scale_xy_head = nn.Linear(hidden_dim, 4)
        self.obj_on_head = nn.Linear(hidden_dim, 2)
        self.depth_head = nn.Linear(hidden_dim, 2)
        self.features_head = nn.Linear(hidden_dim, 2 * features_dim)
        self.bg_features_head = nn.Linear(hidden_dim, 2 * bg_features_dim)

    def forward(self, tokens):
        """[B, T, N, C] -> `Prediction` [B, T, ...]; the position's mean is not bounded yet."""
        hidden = self.backbone(tokens)  # [B, T, N, hidden]
        heads = self.x_head, self.y_head, self.scale_xy_head, self.depth_head, self.obj_on_head, self.features_head
        y, x, scale, depth, obj_on, features = apply_heads(hidden[:, :, :-1], *heads)
        (background,) = apply_heads(hidden[:, :, -1], self.bg_features_head)
        mean, logvar = torch.stack([y, x], dim=-2).unbind(-1)
        return Prediction(
            Gaussian(mean, logvar),
            Gaussian.from_params(scale),
            Gaussian.from_params(depth),
            BetaParams.from_logits(obj_on),
            Gaussian.from_params(features),
            Gaussian.from_params(background),
        )


class DynamicsDLP(nn.Module):
    """PINT. `block_size`: the longest window, T_max frames; `max_particles`: K + 1, or None for any number, without a
    bias by particle order; the window's last prediction is the next frame's; `identity_init`: as for
    `ParticleProjection`.

    With `depth_logvar_from_mean` the depth's logvar is its mean (before the current depth is added to it), as in the
    published release. A state dict says so by what it lacks: published ones have no entry `depth_logvar_from_mean`, and
    loading one switches it on; a state dict with that entry (False) switches it off, and one that has no entry of PINT
    at all leaves it as it is.
    """

    OPTIONAL_ENTRIES = (DEPTH_MARK,)

    def __init__(
        self,
        features_dim,
        bg_features_dim,
        hidden_dim,
        projection_dim,
        n_head=4,
        n_layer=2,
        block_size=12,
        dropout=0.1,
        kp_activation="tanh",
        predict_delta=True,
        max_delta=1.0,
        positional_bias=True,
        max_particles=None,
        depth_logvar_from_mean=False,
        identity_init=False,
    ):
        super().__init__()
        self.block_size, self.predict_delta, self.max_delta = block_size, predict_delta, max_delta
        self.depth_logvar_from_mean = depth_logvar_from_mean
        self.activation = torch.tanh if kp_activation == "tanh" else torch.sigmoid
        self.particle_projection = ParticleProjection(
            features_dim, bg_features_dim, hidden_dim, projection_dim, identity_init
        )
        self.particle_transformer = ParticleTransformer(
            projection_dim, n_head, n_layer, block_size, max_particles, dropout, positional_bias
        )
        self.particle_decoder = ParticleDecoder(features_dim, bg_features_dim, hidden_dim, projection_dim)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.depth_logvar_from_mean:
            destination[prefix + DEPTH_MARK] = torch.tensor(False)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        if any(name.startswith(prefix) for name in state_dict):
            self.depth_logvar_from_mean = bool(state_dict.pop(prefix + DEPTH_MARK, True))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def predict(self, particles, last=None):
        """`Particles` [B, T, ...], T <= block_size -> `Prediction` [B, T, ...] of each frame's successor, or with
        `last` [B, last, ...], of the successors of so many last frames."""
        tokens = self.particle_transformer(self.particle_projection(particles), last=last)
        return self._decode(tokens, particles if last is None else particles.frames(slice(-last, None)))

    def _decode(self, tokens, particles):
        """The transformer's output and the particles that it saw -> `Prediction`."""
        prediction = self.particle_decoder(tokens)
        prediction.position.mean = self.max_delta * self.activation(prediction.position.mean)
        if self.depth_logvar_from_mean:
            prediction.depth.logvar = prediction.depth.mean
        if self.predict_delta:
            prediction.position.mean = particles.z + prediction.position.mean
            prediction.scale.mean = particles.z_scale + prediction.scale.mean
            prediction.depth.mean = particles.z_depth + prediction.depth.mean
            prediction.features.mean = particles.z_features + prediction.features.mean
            prediction.bg.mean = particles.z_bg + prediction.bg.mean
        return prediction

    def roll_out(self, particles, steps, deterministic=True, constrain=None):
        """`Particles` [B, T, ...] of the first frames -> [B, T + steps, ...], the predicted ones behind them.

        constrain: a function that is applied to each predicted frame, `Particles` [B, 1, ...], before it is used.
        """
        last = particles.frames(slice(-1, None))
        tokens = self.particle_projection(particles.frames(slice(-self.block_size, None)))  # [B, T, N, C]
        unrolled, biases = [particles], None
        for _ in range(steps):
            if biases is None or biases[0].shape[-1] != tokens.shape[1] * tokens.shape[2]:
                biases = self.particle_transformer.biases(*tokens.shape[1:3])
            hidden = self.particle_transformer(tokens, biases, last=1)
            following = self._decode(hidden, last).sample(deterministic)
            last = following if constrain is None else constrain(following)
            unrolled.append(last)
            tokens = torch.cat([tokens, self.particle_projection(last)], dim=1)[:, -self.block_size :]
        return Particles.cat(unrolled)

    def forward(self, z, z_scale, z_obj_on, z_depth, z_features, z_bg_features):
        """`predict` for loose tensors: z, z_scale [B, T, K, 2]; z_obj_on [B, T, K]; z_depth [B, T, K, 1]; z_features
        [B, T, K, d]; z_bg_features [B, T, d_bg]. Returns the dict of `prediction_dict`."""
        return prediction_dict(self.predict(_as_particles(z, z_scale, z_obj_on, z_depth, z_features, z_bg_features)))

    def sample(self, z, z_scale, z_obj_on, z_depth, z_features, z_bg_features, steps=10, deterministic=False):
        """`roll_out` for loose tensors, as for `forward`: the same six in the same order, [B, T + steps, ...]."""
        particles = _as_particles(z, z_scale, z_obj_on, z_depth, z_features, z_bg_features)
        unrolled = self.roll_out(particles, steps, deterministic)
        obj_on = unrolled.obj_on.view(*unrolled.obj_on.shape, *z_obj_on.shape[3:])
        return unrolled.z, unrolled.z_scale, obj_on, unrolled.z_depth, unrolled.z_features, unrolled.z_bg


def _as_particles(z, z_scale, z_obj_on, z_depth, z_features, z_bg_features):
    return Particles(z, z_scale, z_depth, z_obj_on.reshape(z.shape[:3]), z_features, z_bg_features)


def prediction_dict(prediction, suffix=""):
    """The release's names for a `Prediction`'s tensors, with a suffix."""
    output = {
        "mu": prediction.position.mean,
        "logvar": prediction.position.logvar,
        "mu_features": prediction.features.mean,
        "logvar_features": prediction.features.logvar,
        "obj_on_a": prediction.obj_on.a,
        "obj_on_b": prediction.obj_on.b,
        "mu_depth": prediction.depth.mean,
        "logvar_depth": prediction.depth.logvar,
        "mu_scale": prediction.scale.mean,
        "logvar_scale": prediction.scale.logvar,
        "mu_bg": prediction.bg.mean,
        "logvar_bg": prediction.bg.logvar,
    }
    return {f"{name}{suffix}": value for name, value in output.items()}
