"""The sums of `compositing` and their gradients as Triton kernels, for CUDA GPUs.

Forward, one program adds up all particles in one tile of one image, and reads each glimpse's pixels where it lies.
Backward, one program gathers all that the image says to one channel of one glimpse: products of small matrices, which
are the weights of interpolation. No program writes where another does: results are deterministic. All is computed in
float32. With TRITON_INTERPRET=1 in the environment the kernels run on tensors of the CPU, for tests.

Shape letters: B images, K particles, N = B * K, C colours, H x W the image, g the glimpse's side.
"""

import torch
import triton
import triton.language as tl

from modules.spatial import EPS

TILE = 16  # forward: a tile's side in pixels
BLOCK = 32  # backward: the side of the blocks in which a glimpse's window is visited


@triton.jit
def _pixels(index, size, centre, scale, g: tl.constexpr, eps: tl.constexpr):
    """Where the image's pixels lie in a glimpse, in its pixels; kept near it, so that they can be made integers."""
    points = -1.0 + index * (2.0 / (size - 1))
    inverse = 1.0 / (scale + eps)
    pixels = (inverse * points - centre * inverse + 1.0) * ((g - 1) / 2)
    return tl.minimum(tl.maximum(pixels, -2.0), g + 1.0)


@triton.jit
def _sums_kernel(
    glimpses, z, scale, obj_on, nearness, sums, K, H, W,
    channels: tl.constexpr, padded: tl.constexpr, g: tl.constexpr, tile: tl.constexpr, eps: tl.constexpr,
):  # fmt: skip
    image, top, left = tl.program_id(0), tl.program_id(1) * tile, tl.program_id(2) * tile
    pixel = tl.arange(0, tile * tile)
    rows, columns = top + pixel // tile, left + pixel % tile
    channel = tl.arange(0, padded)[:, None]
    importance = tl.zeros([tile * tile], tl.float32)
    others = tl.zeros([padded, tile * tile], tl.float32)  # s v^2, s v^2 rgb
    for k in range(K):
        n = image * K + k
        zy, zx = tl.load(z + 2 * n), tl.load(z + 2 * n + 1)
        sy, sx = tl.load(scale + 2 * n), tl.load(scale + 2 * n + 1)
        covers_rows = (_pixels(top + tile - 1, H, zy, sy, g, eps) > -1) & (_pixels(top, H, zy, sy, g, eps) < g)
        covers_columns = (_pixels(left + tile - 1, W, zx, sx, g, eps) > -1) & (_pixels(left, W, zx, sx, g, eps) < g)
        if covers_rows & covers_columns:
            y, x = _pixels(rows, H, zy, sy, g, eps), _pixels(columns, W, zx, sx, g, eps)
            first_y, first_x = tl.floor(y), tl.floor(x)
            pasted = tl.zeros([padded, tile * tile], tl.float32)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    i, j = first_y.to(tl.int32) + dy, first_x.to(tl.int32) + dx
                    weight = (1.0 - tl.abs(y - i)) * (1.0 - tl.abs(x - j))
                    inside = (i >= 0) & (i < g) & (j >= 0) & (j < g)
                    place = glimpses + (n * channels + channel) * g * g + (i * g + j)[None, :]
                    values = tl.load(place, mask=inside[None, :] & (channel < channels), other=0.0)
                    pasted += weight[None, :] * values.to(tl.float32)
            visible = tl.load(obj_on + n) * tl.sum(tl.where(channel == 0, pasted, 0.0), 0)
            weighted = tl.load(nearness + n) * visible
            importance += weighted
            others += (weighted * visible)[None, :] * tl.where(channel == 0, 1.0, pasted)
    inside = (rows < H) & (columns < W)
    place = sums + image * (channels + 1) * H * W + rows * W + columns
    tl.store(place, importance, mask=inside)
    tl.store(place[None, :] + (channel + 1) * H * W, others, mask=inside[None, :] & (channel < channels))


@triton.jit
def _window(size, centre, scale, g: tl.constexpr, eps: tl.constexpr):
    """The first and the end of an image's pixels that a glimpse covers, or one more at either side."""
    inverse = 1.0 / (scale + eps)
    reach = (1.0 + 2.0 / (g - 1)) / inverse
    first = tl.floor((centre - reach + 1.0) * ((size - 1) / 2.0))
    end = tl.ceil((centre + reach + 1.0) * ((size - 1) / 2.0)) + 1.0
    first = tl.minimum(tl.maximum(first, 0.0), size * 1.0)
    end = tl.minimum(tl.maximum(end, 0.0), size * 1.0)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit
def _side(index, size, centre, scale, g: tl.constexpr, padded: tl.constexpr, eps: tl.constexpr):
    """The weights of interpolation [index, padded] and their derivatives by the pixel's place."""
    cell = tl.arange(0, padded)[None, :]
    distance = _pixels(index, size, centre, scale, g, eps)[:, None] - cell
    weights = tl.where(cell < g, tl.maximum(1.0 - tl.abs(distance), 0.0), 0.0)
    return weights, tl.where(weights > 0, tl.where(distance > 0, -1.0, tl.where(distance < 0, 1.0, 0.0)), 0.0)


@triton.jit
def _channel(glimpses, n, c, channels: tl.constexpr, g: tl.constexpr, padded: tl.constexpr):
    """One channel of a glimpse, [padded, padded]."""
    i, j = tl.arange(0, padded)[:, None], tl.arange(0, padded)[None, :]
    place = glimpses + (n * channels + c) * g * g + i * g + j
    return tl.load(place, mask=(i < g) & (j < g), other=0.0).to(tl.float32)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _gradients_kernel(
    gradient, glimpses, z, scale, obj_on, nearness, d_glimpses, d_scalars, K, H, W,
    first_channel: tl.constexpr, channels: tl.constexpr, g: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
    eps: tl.constexpr,
):  # fmt: skip
    n, c = tl.program_id(0), first_channel + tl.program_id(1)
    zy, zx = tl.load(z + 2 * n), tl.load(z + 2 * n + 1)
    sy, sx = tl.load(scale + 2 * n), tl.load(scale + 2 * n + 1)
    on, near = tl.load(obj_on + n), tl.load(nearness + n)
    gradient += (n // K) * (channels + 1) * H * W
    alpha, mine = _channel(glimpses, n, 0, channels, g, padded), _channel(glimpses, n, c, channels, g, padded)
    d_mine = tl.zeros([padded, padded], tl.float32)
    d_zy, d_zx, d_sy, d_sx, d_on, d_near = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    top, bottom = _window(H, zy, sy, g, eps)
    left, right = _window(W, zx, sx, g, eps)
    for h in range(top, bottom, block):
        for w in range(left, right, block):
            i, j = h + tl.arange(0, block), w + tl.arange(0, block)
            rows, d_rows_by_y = _side(i, H, zy, sy, g, padded, eps)
            columns, d_columns_by_x = _side(j, W, zx, sx, g, padded, eps)
            inside = (i < H)[:, None] & (j < W)[None, :]
            place = gradient + i[:, None] * W + j[None, :]
            pasted_alpha = _dot(rows, _dot(alpha, tl.trans(columns)))
            visible = on * pasted_alpha
            if first_channel == 0:
                d_mask = tl.load(place + H * W, mask=inside, other=0.0)
                for colour in tl.static_range(1, channels):
                    other = _channel(glimpses, n, colour, channels, g, padded)
                    d_colour = tl.load(place + (colour + 1) * H * W, mask=inside, other=0.0)
                    d_mask += d_colour * _dot(rows, _dot(other, tl.trans(columns)))
                d_importance = tl.load(place, mask=inside, other=0.0)
                d_near += tl.sum(visible * (d_importance + visible * d_mask))
                d_visible = near * (d_importance + 2.0 * visible * d_mask)
                d_on += tl.sum(d_visible * pasted_alpha)
                d_pasted = on * d_visible
            else:
                d_pasted = near * visible * visible * tl.load(place + (c + 1) * H * W, mask=inside, other=0.0)
            # pasted = rows @ mine @ columns.T
            strips = _dot(mine, tl.trans(columns))
            d_strips = _dot(tl.trans(rows), d_pasted)
            d_mine += _dot(d_strips, columns)
            d_y = tl.sum(_dot(d_pasted, tl.trans(strips)) * d_rows_by_y, 1)
            d_x = tl.sum(_dot(tl.trans(d_strips), mine) * d_columns_by_x, 1)
            d_zy -= tl.sum(d_y)
            d_zx -= tl.sum(d_x)
            d_sy += tl.sum(d_y * (zy + 1.0 - i * (2.0 / (H - 1))))
            d_sx += tl.sum(d_x * (zx + 1.0 - j * (2.0 / (W - 1))))
    a, b = tl.arange(0, padded)[:, None], tl.arange(0, padded)[None, :]
    place = d_glimpses + (n * channels + c) * g * g + a * g + b
    tl.store(place, d_mine.to(d_glimpses.dtype.element_ty), mask=(a < g) & (b < g))
    unit_y, unit_x = ((g - 1) / 2) / (sy + eps), ((g - 1) / 2) / (sx + eps)
    place = d_scalars + (n * channels + c) * 6
    tl.store(place, d_zy * unit_y)
    tl.store(place + 1, d_zx * unit_x)
    tl.store(place + 2, d_sy * unit_y / (sy + eps))
    tl.store(place + 3, d_sx * unit_x / (sx + eps))
    tl.store(place + 4, d_on)
    tl.store(place + 5, d_near)


def forward(glimpses, z, scale, obj_on, nearness, height, width):
    """`compositing.particle_sums` of float32 positions."""
    B, K, channels, g = glimpses.shape[:4]
    inputs = [x.contiguous() for x in (glimpses, z, scale, obj_on, nearness)]
    sums = z.new_empty(B, 1 + channels, height, width)
    grid = B, triton.cdiv(height, TILE), triton.cdiv(width, TILE)
    _sums_kernel[grid](
        *inputs, sums, K, height, width, channels, triton.next_power_of_2(channels), g=g, tile=TILE, eps=EPS
    )
    return sums


def backward(gradient, glimpses, z, scale, obj_on, nearness):
    """`compositing.particle_sums_backward` of float32 positions."""
    B, K, channels, g = glimpses.shape[:4]
    inputs = [x.contiguous() for x in (gradient, glimpses, z, scale, obj_on, nearness)]
    d_glimpses = torch.empty_like(inputs[1])
    d_scalars = z.new_empty(B, K, channels, 6)  # of z, scale, obj_on, nearness, from each channel
    options = {"channels": channels, "g": g, "padded": max(16, triton.next_power_of_2(g)), "block": BLOCK, "eps": EPS}
    for first, count in ((0, 1), (1, channels - 1)):  # alpha, colours
        grid = B * K, count
        _gradients_kernel[grid](
            *inputs, d_glimpses, d_scalars, K, *gradient.shape[-2:], first_channel=first, num_stages=1, **options
        )
    d_z, d_scale, d_obj_on, d_nearness = d_scalars.sum(2).split([2, 2, 1, 1], dim=-1)
    return d_glimpses, *(x.contiguous() for x in (d_z, d_scale, d_obj_on.squeeze(-1), d_nearness.squeeze(-1)))
