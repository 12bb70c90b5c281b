"""The numbers that a model is built from, and which are legal. A new one is a field here (and an argument of a model's
constructor): the configuration has it as a key, `from_config` hands it on, and the modules read it from the object.

Every object is legal: however it is made, it is checked, and what is wrong is a `UserError` that names the field, its
value and what is legal.
"""

import math
from dataclasses import dataclass, fields

from utils.legal import (
    BELOW_1,
    FRACTION,
    INCREASING,
    POSITIVE,
    POSITIVE_TO_1,
    at_least,
    channels,
    check_keys,
    illegal,
    key,
    one_of,
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What every particle model is built from, images to particles and back.

    Beyond each value by itself: the background's map of side image_size / 2^(stages - 1) and the glimpse's side are
    decoded from 8 x 8 by doubling; the patches tile the image, and the key maps that are left of them have 2 x 2
    cells or more (one cell has only one position); the anchors are among the proposals that are kept.
    """

    ch: int = key(3, "channels of the images", at_least(1))
    image_size: int = key(64, "side of the square images, pixels", at_least(1))
    patch_size: int = key(8, "side of the patches that propose particles, pixels", at_least(1))
    n_kp: int = key(1, "proposed particles per patch", at_least(1))
    n_kp_prior: int = key(64, "proposed particles that are kept per image", at_least(1))
    n_kp_enc: int = key(10, "posterior particles per image", at_least(1))
    learned_feature_dim: int = key(8, "appearance features per particle", at_least(1))
    bg_learned_feature_dim: int | None = key(None, "background features; null: learned_feature_dim", at_least(1))
    anchor_s: float = key(0.25, "side of a glimpse as a fraction of the image's", POSITIVE_TO_1)
    enc_channels: tuple[int, ...] = key((32, 64, 128), "channels of the background's stages", channels(2))
    prior_channels: tuple[int, ...] = key((16, 32, 64), "channels of the patch and glimpse encoders", channels(1))
    pad_mode: str = key("replicate", "padding in prior, background and image decoder", one_of("replicate", "zeros"))
    use_resblock: bool = key(False, "residual blocks")
    kp_activation: str = key("tanh", "activation of the position offset's mean", one_of("tanh", "sigmoid"))
    kp_range: tuple[float, float] = key((-1.0, 1.0), "range of the positions", INCREASING)
    dropout: float = key(0.0, "dropout of the attention in the encoders", BELOW_1)
    enable_enc_attn: bool = key(False, "attention between the particles in their encoders")
    use_correlation_heatmaps: bool = key(False, "track with a correlation map of the previous frame's glimpses")
    filtering_heuristic: str = key(
        "variance",
        "how proposals are kept; none keeps all and mixes them",
        one_of("variance", "distance", "random", "none"),
    )
    duplicate_iou: float | None = key(
        None,
        "overlap of two particles' squares in the first frame above which the less visible is hidden; null: none is",
        FRACTION,
    )
    sigma: float = key(1.0, "standard deviation of the prior's proposals", POSITIVE)
    scale_std: float = key(0.3, "standard deviation of the scale's prior", POSITIVE)
    offset_std: float = key(0.2, "standard deviation of the position offset's prior", POSITIVE)
    obj_on_alpha: float = key(0.1, "alpha of the transparency's Beta prior", POSITIVE)
    obj_on_beta: float = key(0.1, "beta of the transparency's Beta prior", POSITIVE)

    def __post_init__(self):
        check_keys(self, fields(Architecture))
        stages = len(self.enc_channels)
        if not _is_power_of_two(self.image_size) or self.image_size < 8 * 2 ** (stages - 1):
            legal = f"a power of two, at least {8 * 2 ** (stages - 1)} with {stages} enc_channels"
            raise illegal("image_size", self.image_size, legal)
        self._check_patches()
        self._check_glimpses()
        if self.filtering_heuristic != "none" and self.n_kp_enc > self.n_kp_prior:
            legal = f'at most n_kp_prior {self.n_kp_prior}, or any with filtering_heuristic "none"'
            raise illegal("n_kp_enc", self.n_kp_enc, legal)

    def _check_patches(self):
        size, stages = self.image_size, len(self.prior_channels)
        if 2**stages > size:
            legal = f"at most {int(math.log2(size))} entries with image_size {size}, as each halves a patch"
            raise illegal("prior_channels", self.prior_channels, legal)
        sizes = [power for power in _powers_of_two(size) if power >= 2**stages]
        if self.patch_size not in sizes:
            reason = f"divides image_size {size}; {stages} prior_channels leave 2 pixels of it or more"
            raise illegal("patch_size", self.patch_size, f"{', '.join(map(str, sizes))} ({reason})")

    def _check_glimpses(self):
        side = self.glimpse_size
        if not _is_power_of_two(side) or side < 8:
            fractions = [power / self.image_size for power in _powers_of_two(self.image_size // 2) if power >= 8]
            nearest = sorted(sorted(fractions, key=lambda fraction: abs(math.log2(fraction / self.anchor_s)))[:2])
            reason = (
                "round(anchor_s * (image_size - 1)) is the glimpse's side, a power of two of 8 pixels or more,"
                f" not {side}"
            )
            raise illegal("anchor_s", self.anchor_s, f"near it {' or '.join(map(str, nearest))} ({reason})")
        stages = 1 + int(math.log2(side))
        if len(self.prior_channels) > stages:
            legal = f"at most {stages} entries with anchor_s {self.anchor_s}, as each after the first halves a glimpse"
            raise illegal("prior_channels", self.prior_channels, legal)

    @property
    def glimpse_size(self):
        """The glimpse's side in pixels."""
        return round(self.anchor_s * (self.image_size - 1))

    @property
    def bg_feature_dim(self):
        """The background's features."""
        return self.bg_learned_feature_dim or self.learned_feature_dim

    @property
    def num_patches(self):
        """The patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_proposals(self):
        """The particles that an image's patches propose."""
        return self.n_kp * self.num_patches


@dataclass(frozen=True, kw_only=True)
class PINTArchitecture:
    """What PINT is built from, beside the particles; its sinusoidal time embedding needs an even width."""

    timestep_horizon: int = key(10, "T: a training clip has T + 1 frames, PINT sees T", at_least(1))
    predict_delta: bool = key(True, "PINT predicts changes rather than values")
    pint_layers: int = key(6, "transformer blocks of PINT", at_least(1))
    pint_heads: int = key(8, "attention heads of PINT", at_least(1))
    pint_dim: int = key(256, "width of PINT", at_least(4))
    pint_dropout: float = key(0.1, "dropout in PINT", BELOW_1)
    pint_identity_init: bool = key(False, "PINT's MLP of the particles' positions begins as the identity")
    depth_logvar_from_mean: bool = key(False, "PINT's depth logvar is its mean, as in the published checkpoints")

    def __post_init__(self):
        check_keys(self, fields(PINTArchitecture))
        if self.pint_dim % self.pint_heads or self.pint_dim % 2:
            raise illegal("pint_dim", self.pint_dim, f"an even multiple of pint_heads {self.pint_heads}")


def _is_power_of_two(number):
    return number > 0 and number & (number - 1) == 0


def _powers_of_two(highest):
    return [2**power for power in range(highest.bit_length())]
