"""Cut glimpses out of images, paste them back and compose them (the spatial transformer).

Glimpses are axis-aligned, so a bilinear resampling is a product of one interpolation matrix per axis: dense matrix
products that need no gather and whose gradient, unlike `grid_sample`'s on CUDA, has no atomic additions: it is
deterministic. Autocast does not reach them. Coordinates are (y, x) in -1..1 with `align_corners=True`; outside an image
all is zero.

Shape letters: B images, K particles, C channels, H x W the image, g the glimpse's side in pixels.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

EPS = 1e-9  # keeps the inverse of a scale finite


def full_precision(x):
    """A context without autocast, on the device of x: for whatever decides positions, distributions and pictures."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def interpolation_matrix(centre, scale, n_in, n_out):
    """Weights that sample `n_out` points, at ``scale * linspace(-1, 1) + centre``, from `n_in` pixels.

    centre, scale: [*]. Returns [*, n_out, n_in]; rows outside the image are zero.
    """
    points = torch.linspace(-1, 1, n_out, dtype=centre.dtype, device=centre.device)
    pixels = (scale.unsqueeze(-1) * points + centre.unsqueeze(-1) + 1) * ((n_in - 1) / 2)  # [*, n_out]
    distance = pixels.unsqueeze(-1) - torch.arange(n_in, dtype=centre.dtype, device=centre.device)
    return (1 - distance.abs()).clamp(min=0)


def cut_glimpses(x, z, scale, size):
    """Cut a `size` x `size` glimpse per particle.

    x: [B, C, H, W]; z: [B, K, 2] positions; scale: [B, K, 2] (height, width) as fractions of the image's side.
    Returns [B, K, C, size, size].
    """
    B, C, H, W = x.shape
    K = z.shape[1]
    rows = interpolation_matrix(z[..., 0], scale[..., 0], H, size)  # [B, K, g, H]
    columns = interpolation_matrix(z[..., 1], scale[..., 1], W, size)  # [B, K, g, W]
    with full_precision(x):
        strips = rows.flatten(1, 2) @ x.transpose(1, 2).flatten(2)  # [B, K*g, C*W]: one product for all particles
        strips = strips.view(B, K, size, C, W).transpose(2, 3)  # [B, K, C, g, W]
        return strips @ columns.unsqueeze(2).transpose(-1, -2)


def paste_glimpses(glimpses, z, scale, height, width):
    """Paste each glimpse on a canvas of its own: the inverse of `cut_glimpses`.

    glimpses: [B, K, C, g, g]; z: [B, K, 2]; scale: [B, K, 2] fractions. Returns [B, K, C, height, width].
    """
    B, K, C = glimpses.shape[:3]
    canvas = (B * K, C, height, width)
    pasted = spatial_transform(glimpses.flatten(0, 1), z.flatten(0, 1), scale.flatten(0, 1), canvas, inverse=True)
    return pasted.unflatten(0, (B, K))


def spatial_transform(image, z_pos, z_scale, out_dims, inverse=False, eps=EPS):
    """Cut (or, with `inverse`, paste) one glimpse per image.

    image: [N, C, h, w]; z_pos: [N, 2]; z_scale: [N, 2] fractions; out_dims: (N, C, h_out, w_out). Returns `out_dims`.
    """
    height, width = out_dims[-2:]
    if inverse:
        z_scale = 1 / (z_scale + eps)
        z_pos = -z_pos * z_scale
    rows = interpolation_matrix(z_pos[:, 0], z_scale[:, 0], image.shape[-2], height)
    columns = interpolation_matrix(z_pos[:, 1], z_scale[:, 1], image.shape[-1], width)
    with full_precision(image):
        return rows.unsqueeze(1) @ image @ columns.unsqueeze(1).transpose(-1, -2)


def square_mask(z, obj_on, glimpse_size, image_size):
    """Where the particles are not: 1 minus the transparency-weighted union of one square per particle.

    The square, `glimpse_size` pixels wide whatever the particle's scale, is moved to the particle's nearest pixel.
    z: [B, K, 2]; obj_on: [B, K]. Returns [B, 1, image_size, image_size] in 0..1.
    """
    inside = _inside_square(z, glimpse_size, image_size).to(z.dtype)  # [B, K, 2, S]
    with full_precision(z):
        squares = torch.einsum("bk,bkh,bkw->bhw", obj_on, inside[:, :, 0], inside[:, :, 1])
    return 1 - squares.clamp(0, 1).unsqueeze(1)


@torch.no_grad()
def duplicates(z, scale, visibility, iou):
    """Which particles hide behind a more visible one: greedy non-maximum suppression of their squares.

    z: [B, K, 2]; scale: [B, K, 2], sides as fractions of the image's; visibility: [B, K]; iou: the overlap above which
    the less visible one of two is hidden, 0..1. Returns bool [B, K].
    """
    visibility, order = visibility.sort(dim=1, descending=True, stable=True)
    z, scale = (x.gather(1, order.unsqueeze(-1).expand_as(x)) for x in (z, scale))
    # Positions span 2 over the image, so a square reaches from z - scale to z + scale.
    low = torch.maximum((z - scale).unsqueeze(1), (z - scale).unsqueeze(2))
    high = torch.minimum((z + scale).unsqueeze(1), (z + scale).unsqueeze(2))
    shared, area = (high - low).clamp(min=0).prod(-1), (2 * scale).prod(-1)
    overlap = shared / (area.unsqueeze(1) + area.unsqueeze(2) - shared).clamp(min=EPS)
    hides = (overlap > iou).triu(diagonal=1)  # [B, better, worse]
    hidden = torch.zeros_like(visibility, dtype=torch.bool)
    for better in range(z.shape[1] - 1):
        hidden = hidden | (hides[:, better] & ~hidden[:, better : better + 1])
    return torch.zeros_like(hidden).scatter(1, order, hidden)


def create_masks_fast(center, anchor_s, feature_dim=16, patch_size=None):
    """One square of ones per particle.

    center: [B, K, 2]; the square's side is `patch_size` or ``round(anchor_s * (feature_dim - 1))`` pixels.
    Returns [B, K, 1, feature_dim, feature_dim].
    """
    size = round(anchor_s * (feature_dim - 1)) if patch_size is None else patch_size
    inside = _inside_square(center, size, feature_dim).to(center.dtype)
    return (inside[:, :, 0].unsqueeze(-1) * inside[:, :, 1].unsqueeze(-2)).unsqueeze(2)


def _inside_square(z, glimpse_size, image_size):
    """[B, K, 2] -> [B, K, 2, S]: which rows and columns a square in the canvas's middle covers once moved to z."""
    pixels = torch.arange(image_size, dtype=z.dtype, device=z.device)
    source = torch.round(pixels - z.unsqueeze(-1) * ((image_size - 1) / 2))  # the nearest pixel before the move
    first = image_size // 2 - glimpse_size // 2
    return (source >= first) & (source < first + glimpse_size)


def generate_correlation_maps(x, kp, patch_size, previous_objects=None, z_scale=None):
    """Glimpses with, as one more channel, their correlation with the particles' previous glimpses.

    x: [B, C, H, W]; kp: [B, K, 2]; patch_size: the glimpse's side g; previous_objects: [B * K, C, g, g], or None: the
    map is zeros; z_scale: [B, K, 2] logits (default: a side of g pixels). Returns [B * K, C + 1, g, g]; no gradient
    passes through the map.
    """
    scale = torch.full_like(kp, patch_size / x.shape[-1]) if z_scale is None else torch.sigmoid(z_scale)
    glimpses = cut_glimpses(x, kp, scale, patch_size).flatten(0, 1)
    if previous_objects is None:
        maps = torch.zeros_like(glimpses[:, :1])
    else:
        with torch.no_grad():
            maps = correlation_maps(glimpses, previous_objects)
    return torch.cat([glimpses, maps], dim=1)


def correlation_maps(glimpses, previous):
    """Normalised cross-correlation of each particle's glimpse with its previous one.

    glimpses, previous: [N, C, g, g], g even; clamped to 0..1. Returns [N, 1, g, g], each map scaled to 0..1.
    """
    dtype, g = glimpses.dtype, glimpses.shape[-1]
    # The FFT knows no half precision, and the batch's energy exceeds float16.
    precise = torch.promote_types(dtype, torch.float32)
    glimpses, previous = (x.to(precise).clamp(0, 1) for x in (glimpses, previous))
    # Of the full map over a glimpse padded by g, only its middle g x g is kept: this padding gives just that.
    padded = F.pad(glimpses, (g // 2 - 1, g // 2, g // 2 - 1, g // 2), mode="replicate")
    correlation = _correlate(padded, previous)
    energy = _box_sum(padded.square().sum(1, keepdim=True), g)
    # The FFT's rounding errors, which the norm would blow up where a window is black: bounded by Cauchy-Schwarz.
    correlation = correlation.clamp(min=0).minimum(torch.sqrt(energy * previous.square().sum((1, 2, 3), keepdim=True)))
    # The kernels' energy is that of the whole batch, as published.
    norm = torch.sqrt(previous.square().sum() * energy + 1e-10) + 1e-5
    correlation = correlation / norm
    low, high = correlation.amin((-2, -1), keepdim=True), correlation.amax((-2, -1), keepdim=True)
    return ((correlation - low) / (high - low + 1e-5)).to(dtype)


def _correlate(x, kernel):
    """Valid cross-correlation summed over channels, by FFT: [N, C, h, w] and [N, C, g, g] -> [N, 1, h-g+1, w-g+1]."""
    height, width = x.shape[-2:]
    product = torch.fft.rfft2(x) * torch.fft.rfft2(kernel, s=(height, width)).conj()
    full = torch.fft.irfft2(product.sum(1, keepdim=True), s=(height, width))
    return full[..., : height - kernel.shape[-2] + 1, : width - kernel.shape[-1] + 1]


def _box_sum(x, size):
    """Sum over every size x size window: [N, C, h, w] -> [N, C, h-size+1, w-size+1]."""
    x = F.avg_pool2d(x, (size, 1), stride=1)
    return F.avg_pool2d(x, (1, size), stride=1) * size**2


def compose(alpha, rgb, obj_on, depth):
    """Stack the particles' canvases by depth and transparency.

    alpha: [B, K, 1, H, W]; rgb: [B, K, C, H, W]; obj_on: [B, K]; depth: [B, K, 1].
    Returns the foreground [B, C, H, W], the background's mask [B, 1, H, W] and the alpha masks [B, K, 1, H, W].
    """
    visible = obj_on[..., None, None, None] * alpha  # [B, K, 1, H, W]
    importance = visible * torch.sigmoid(-depth)[..., None, None]
    weights = importance / (importance.sum(1, keepdim=True) + 1e-5)
    alpha_masks = weights * visible
    foreground = (alpha_masks * rgb).sum(1)
    return foreground, 1 - alpha_masks.sum(1), alpha_masks
