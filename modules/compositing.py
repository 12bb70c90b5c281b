"""Draw particles without a canvas for each: what `spatial.compose` makes of `spatial.paste_glimpses`, in less memory.

Of the canvases a picture needs, at every pixel, only the sums over particles of s v, s v^2 and s v^2 rgb: with v the
transparency times the pasted alpha and s = sigmoid(-depth),

    foreground = sum(s v^2 rgb) / (sum(s v) + 1e-5),   background's mask = 1 - sum(s v^2) / (sum(s v) + 1e-5).

The sums are one operator, which pastes the glimpses again in its backward pass: a few particles at a time, within the
pixels that their glimpses cover, or on a CUDA GPU by the kernels of `compositing_triton`. It computes in float32 (or
float64) also where glimpses come in bfloat16, and adds up in a fixed order: results are deterministic.

Shape letters: B images, K particles, N = B * K, C colours, H x W the image, g the glimpse's side in pixels.
"""

import importlib.util
from dataclasses import dataclass

import torch

from modules.spatial import EPS, full_precision

PIXELS_AT_ONCE = 2**15  # few enough for a CPU's caches, many enough for its matrix products
HAS_TRITON = importlib.util.find_spec("triton") is not None


def draw_glimpses(glimpses, z, scale, obj_on, depth, height, width):
    """Paste the glimpses and compose them, without alpha masks.

    glimpses: [B, K, 1 + C, g, g], alpha first; z: [B, K, 2] positions; scale: [B, K, 2] fractions of the image's side;
    obj_on: [B, K]; depth: [B, K, 1]. Returns the foreground [B, C, height, width] and the background's mask
    [B, 1, height, width].
    """
    full = torch.promote_types(z.dtype, torch.float32)
    z, scale, obj_on, depth = (x.to(full) for x in (z, scale, obj_on, depth))
    sums = particle_sums(glimpses, z, scale, obj_on, torch.sigmoid(-depth).squeeze(-1), height, width)
    normed = sums[:, 1:] / (sums[:, :1] + 1e-5)
    return normed[:, 1:], 1 - normed[:, :1]


@torch.library.custom_op("ddlp::particle_sums", mutates_args=())
def particle_sums(
    glimpses: torch.Tensor,
    z: torch.Tensor,
    scale: torch.Tensor,
    obj_on: torch.Tensor,
    nearness: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    """The sums over particles of s v, s v^2 and s v^2 rgb: [B, 2 + C, height, width].

    nearness: [B, K], s; the other arguments are those of `draw_glimpses`.
    """
    return _particle_sums(glimpses, z, scale, obj_on, nearness, height, width)


def _particle_sums(glimpses, z, scale, obj_on, nearness, height, width):
    channels = glimpses.shape[2]
    sums = z.new_zeros(z.shape[0], 1 + channels, height, width)
    with full_precision(z):
        for chunk in _chunks(z, scale, glimpses.shape[-1], height, width):
            alpha, rgb = _paste(chunk, glimpses)[0].split([1, channels - 1], dim=1)
            visible = chunk.of(obj_on) * alpha
            importance = chunk.of(nearness) * visible
            masks = importance * visible
            terms = torch.cat([importance, masks, masks * rgb], dim=1)
            for window, term in zip(chunk.windows(sums), terms, strict=True):
                window += term
    return sums


@particle_sums.register_fake
def _(glimpses, z, scale, obj_on, nearness, height, width):
    return z.new_empty(z.shape[0], 1 + glimpses.shape[2], height, width)


@torch.library.custom_op("ddlp::particle_sums_backward", mutates_args=())
def particle_sums_backward(
    gradient: torch.Tensor,
    glimpses: torch.Tensor,
    z: torch.Tensor,
    scale: torch.Tensor,
    obj_on: torch.Tensor,
    nearness: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the glimpses, z, scale, obj_on and nearness from the sums' gradient [B, 2 + C, H, W]."""
    return _particle_sums_backward(gradient, glimpses, z, scale, obj_on, nearness)


def _particle_sums_backward(gradient, glimpses, z, scale, obj_on, nearness):
    channels, g = glimpses.shape[2:4]
    gradients = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (glimpses, z, scale, obj_on, nearness)
    ]
    d_glimpses, d_z, d_scale, d_obj_on, d_nearness = (x.flatten(0, 1) for x in gradients)
    with full_precision(z):
        for chunk in _chunks(z, scale, g, *gradient.shape[-2:]):
            canvas, patches, strips = _paste(chunk, glimpses)
            alpha, rgb = canvas.split([1, channels - 1], dim=1)
            near, on = chunk.of(nearness), chunk.of(obj_on)
            d_importance, d_mask, d_colour = torch.stack(chunk.windows(gradient)).split([1, 1, channels - 1], dim=1)
            visible = on * alpha
            d_mask = d_mask + (d_colour * rgb).sum(1, keepdim=True)
            d_nearness[chunk.particles] = (visible * (d_importance + visible * d_mask)).sum((1, 2, 3))
            d_visible = near * (d_importance + 2 * visible * d_mask)
            d_obj_on[chunk.particles] = (d_visible * alpha).sum((1, 2, 3))
            d_canvas = torch.cat([on * d_visible, near * visible.square() * d_colour], dim=1)  # [n, 1 + C, h, w]
            # canvas = rows @ strips and strips = patches @ columns.T, for each channel
            d_rows = d_canvas.transpose(1, 2).flatten(2) @ strips.transpose(2, 3).flatten(1, 2)  # [n, h, g]
            d_strips = chunk.rows.weights.transpose(1, 2).unsqueeze(1) @ d_canvas  # [n, 1 + C, g, w]
            d_columns = d_strips.flatten(1, 2).transpose(1, 2) @ patches.flatten(1, 2)  # [n, w, g]
            d_glimpses[chunk.particles] = (d_strips @ chunk.columns.weights.unsqueeze(1)).to(glimpses.dtype)
            for axis, (side, d_weights) in enumerate(((chunk.rows, d_rows), (chunk.columns, d_columns))):
                d_z[chunk.particles, axis], d_scale[chunk.particles, axis] = side.backward(d_weights)
    return tuple(gradients)


@particle_sums_backward.register_fake
def _(gradient, glimpses, z, scale, obj_on, nearness):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (glimpses, z, scale, obj_on, nearness)
    )


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx, gradient):
    return *particle_sums_backward(gradient.contiguous(), *ctx.saved_tensors), None, None


particle_sums.register_autograd(_backward, setup_context=_save_inputs)


if HAS_TRITON:

    @particle_sums.register_kernel("cuda")
    def _(glimpses, z, scale, obj_on, nearness, height, width):
        if z.dtype != torch.float32:
            return _particle_sums(glimpses, z, scale, obj_on, nearness, height, width)
        from modules import compositing_triton

        return compositing_triton.forward(glimpses, z, scale, obj_on, nearness, height, width)

    @particle_sums_backward.register_kernel("cuda")
    def _(gradient, glimpses, z, scale, obj_on, nearness):
        if z.dtype != torch.float32:
            return _particle_sums_backward(gradient, glimpses, z, scale, obj_on, nearness)
        from modules import compositing_triton

        return compositing_triton.backward(gradient, glimpses, z, scale, obj_on, nearness)


# ---------------------------------------------------------------------------------------------- a few particles


@dataclass
class _Side:
    """Of a few particles one axis of their windows: which n_out pixels of the image, and the weights of pasting."""

    first: list  # n first pixels
    points: torch.Tensor  # [n, n_out] the pixels' coordinates, -1..1
    centre: torch.Tensor  # [n, 1] of the particles
    scale: torch.Tensor  # [n, 1]
    distance: torch.Tensor  # [n, n_out, g] from the glimpse's pixels, in pixels of the glimpse
    weights: torch.Tensor  # [n, n_out, g] of bilinear interpolation

    def backward(self, d_weights):
        """The gradients [n] of the particles' centres and scales."""
        d_pixel = -(d_weights * self.distance.sign()).masked_fill(self.weights == 0, 0).sum(-1)  # [n, n_out]
        d_point = d_pixel * ((self.weights.shape[-1] - 1) / 2) / (self.scale + EPS)
        return -d_point.sum(1), (d_point * (self.centre - self.points)).sum(1) / (self.scale + EPS).squeeze(1)


@dataclass
class _Chunk:
    """A few particles and the windows, all of one size, in which their glimpses lie."""

    particles: torch.Tensor  # [n] indices among the N
    images: list  # n indices among the B
    rows: _Side
    columns: _Side

    def of(self, values):
        """[B, K] -> [n, 1, 1, 1]"""
        return values.flatten()[self.particles].view(-1, 1, 1, 1)

    def windows(self, canvas):
        """The windows' views of a canvas [B, *, H, W], one per particle."""
        h, w = self.rows.points.shape[1], self.columns.points.shape[1]
        return [
            canvas[image, :, top : top + h, left : left + w]
            for image, top, left in zip(self.images, self.rows.first, self.columns.first, strict=True)
        ]


def _chunks(z, scale, g, height, width):
    """Yield all particles that lie in the image, those with windows of like size together."""
    sides = [_covered(z[..., i].flatten(), scale[..., i].flatten(), g, n) for i, n in enumerate((height, width))]
    (_, heights), (_, widths) = sides
    areas, order = (heights * widths).sort(stable=True)
    for particles in order.split(_chunk_sizes(areas.tolist())):
        images = (particles // z.shape[1]).tolist()
        rows, columns = (
            _side(
                z[..., i].flatten()[particles], scale[..., i].flatten()[particles], g, n, *(x[particles] for x in side)
            )
            for i, (n, side) in enumerate(zip((height, width), sides, strict=True))
        )
        yield _Chunk(particles, images, rows, columns)


def _chunk_sizes(areas):
    """How many particles to take at a time, in increasing order of their windows' areas."""
    sizes = [0]
    for area in areas:
        if sizes[-1] and (sizes[-1] + 1) * area > PIXELS_AT_ONCE:
            sizes.append(0)
        sizes[-1] += 1
    return sizes


def _pixels(points, centre, scale, g):
    """Where the image's `points`, coordinates in -1..1, lie in the glimpse: in pixels, 0 to g - 1 within."""
    inverse = 1 / (scale + EPS)
    return (inverse * points - centre * inverse + 1) * ((g - 1) / 2)


def _covered(centre, scale, g, n_out):
    """The first of the image's pixels that each glimpse covers, and their number: [N] each."""
    points = torch.linspace(-1, 1, n_out, dtype=centre.dtype, device=centre.device)
    pixels = _pixels(points, centre.unsqueeze(1), scale.unsqueeze(1), g)
    inside = (pixels > -1) & (pixels < g)
    return inside.int().argmax(1), inside.sum(1)


def _side(centre, scale, g, n_out, first, count):
    count = int(count.max())
    first = first.clamp(max=n_out - count)
    points = torch.linspace(-1, 1, n_out, dtype=centre.dtype, device=centre.device)
    points = points[first.unsqueeze(1) + torch.arange(count, device=first.device)]
    centre, scale = centre.unsqueeze(1), scale.unsqueeze(1)
    pixels = torch.arange(g, dtype=centre.dtype, device=centre.device)
    distance = _pixels(points, centre, scale, g).unsqueeze(-1) - pixels
    return _Side(first.tolist(), points, centre, scale, distance, (1 - distance.abs()).clamp(min=0))


def _paste(chunk, glimpses):
    """The chunk's canvases [n, 1 + C, h, w], its glimpses in the positions' precision and their strips (columns
    resampled, rows not yet) [n, 1 + C, g, w]."""
    patches = glimpses.flatten(0, 1)[chunk.particles].to(chunk.rows.weights.dtype)
    strips = patches @ chunk.columns.weights.transpose(1, 2).unsqueeze(1)
    return chunk.rows.weights.unsqueeze(1) @ strips, patches, strips
