"""Pictures as functions of tensors: particles, boxes, masks, the figure grid and curves.

Images are float [B, 3, H, W] in 0..1, positions (y, x); tensors may live on any device and carry gradients, what comes
back is float32 on the CPU, and no input is modified. The functions of one image return what image files hold, uint8
arrays [H, W, 3]. Only `save_image` and `plot_glimpse_obj_on` touch the disk.

Shapes: B images, K particles, H and W the image's sides, S the side of a square image, g a glimpse's side.
"""

from functools import cache
from math import ceil, isfinite, nan
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.errors import UserError
from utils.files import atomic_write, make_folder

MASK_THRESHOLD = 0.05  # a pixel belongs to a particle above this alpha
SCORE_THRESHOLD = 2.0  # boxes of less confident particles are left out of the figure grid
# torchvision is imported where it is used: it takes seconds, which no `--help` and no error message should wait for.
LEGIBLE_SIDE = 128  # smaller images are enlarged to at least this many pixels before anything is drawn on them
LOG_RATIO = 20.0  # a curve whose values span more than this factor gets a logarithmic axis
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # luma, ITU-R BT.601

LOSS_PANELS = {
    "loss": ("loss",),
    "KL": (
        "kl",
        "kl_dyn",
        "loss_kl_kp",
        "loss_kl_scale",
        "loss_kl_depth",
        "loss_kl_obj_on",
        "loss_kl_feat",
    ),
    "reconstruction": ("loss_rec",),
    "validation loss": ("val_loss",),
}


@cache
def _palette(count):
    """Float array [count, 3]: vivid RGB colours, each the farthest (in CIE Lab) from all before it; red comes first."""
    levels = np.linspace(0, 1, 16, dtype=np.float32)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(1, -1, 3)
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]
    # Neither grey, nor nearly black or white: colours have to stand out on greyscale, dark and bright images.
    vivid = (np.linalg.norm(lab[:, 1:], axis=-1) > 40) & (lab[:, 0] > 50) & (lab[:, 0] < 92)
    rgb, lab = rgb[0][vivid], lab[vivid]
    chosen = [int(np.abs(rgb - (1, 0, 0)).sum(-1).argmin())]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=-1))
        chosen.append(int(distance.argmax()))
    return rgb[chosen]


def particle_colors(k):
    """The colours of particles 0..k-1 in every picture.

    Returns:
        float32 tensor [k, 3], RGB in 0..1; distinct (for k up to 1000), and colour i does not depend on k.
    """
    return torch.from_numpy(_palette(k)[:k].copy())


def color_map(num=100):
    """The particles' colours in turn, as 8-bit numbers: uint8 array [11 * num, 3]."""
    return (particle_colors(11 * num) * 255).round().to(torch.uint8).numpy()


def confidence(logvar_offset, obj_on):
    """How sure the posterior is of each particle: minus (sum of its offset logvars times its transparency).

    Args:
        logvar_offset: [B, K, 2].
        obj_on: [B, K] in 0..1.

    Returns:
        [B, K], larger is surer.
    """
    return -(logvar_offset.sum(-1) * obj_on)


def boxes_from_particles(z, z_scale, image_size, scale_normalized=False):
    """Bounding boxes (z + 1)/2 * S -/+ fraction * S/2, S the image's side, truncated to whole pixels and not clipped
    to the image.

    Args:
        z: [..., 2] positions (y, x) in -1..1.
        z_scale: [..., 2] (height, width), logits of the box's sides as fractions of the image's.
        image_size: the image's side in pixels, or (height, width).
        scale_normalized: `z_scale` holds the fractions themselves.

    Returns:
        int64 [..., 4], [x1, y1, x2, y2].
    """
    fraction = z_scale if scale_normalized else torch.sigmoid(z_scale)
    side = z.new_tensor(image_size)
    center = (z + 1) / 2 * side
    half = fraction * side / 2
    return torch.cat([(center - half).flip(-1), (center + half).flip(-1)], dim=-1).to(torch.int64)


def boxes_from_masks(masks):
    """Bounding boxes of the pixels whose alpha exceeds `MASK_THRESHOLD`; first and last pixel both belong to the box.

    Args:
        masks: alpha [B, K, 1, H, W] in 0..1.

    Returns:
        int64 [B, K, 4], [x1, y1, x2, y2] (zeros where there is no such pixel); bool [B, K], whether there is one.
    """
    from torchvision.ops import masks_to_boxes

    inside = masks[:, :, 0] > MASK_THRESHOLD
    present = inside.flatten(2).any(-1)
    boxes = torch.zeros(*present.shape, 4, dtype=torch.int64, device=masks.device)
    if present.any():
        boxes[present] = masks_to_boxes(inside[present]).to(torch.int64)
    return boxes, present


def get_bb_from_z_scale(kp, z_scale, width, height, scale_normalized=False):
    """`boxes_from_particles` in an image of `width` x `height` pixels: int64 [..., 4], [x1, y1, x2, y2]."""
    return boxes_from_particles(kp, z_scale, (height, width), scale_normalized)


def get_bb_from_masks_batch(masks, width, height):
    """`boxes_from_masks` in an image of `width` x `height` pixels, whatever the masks' own size.

    Args:
        masks: alpha [B, K, 1, h, w] in 0..1.

    Returns:
        int64 [B, K, 4], [x1, y1, x2, y2], rounded down to whole pixels; zeros for an empty mask.
    """
    boxes, _ = boxes_from_masks(masks)
    h, w = masks.shape[-2:]
    return boxes * boxes.new_tensor([width, height] * 2) // boxes.new_tensor([w, h] * 2)


def select_boxes(boxes, scores, iou_thresh, hard_thresh=None, present=None):
    """Non-maximum suppression per image, and a floor for the scores.

    Args:
        boxes: [B, K, 4], [x1, y1, x2, y2].
        scores: [B, K], higher wins.
        iou_thresh: a box that overlaps a better one by more than this intersection over union is suppressed.
        hard_thresh: boxes scoring less are dropped; None drops none.
        present: bool [B, K], boxes to consider; None is all of them.

    Returns:
        bool [B, K], the boxes that stay.
    """
    from torchvision.ops import nms

    candidates = torch.ones_like(scores, dtype=torch.bool) if present is None else present.clone()
    if hard_thresh is not None:
        candidates &= scores >= hard_thresh
    keep = torch.zeros_like(candidates)
    for b in range(len(boxes)):
        index = candidates[b].nonzero()[:, 0]
        keep[b, index[nms(boxes[b, index].to(scores.dtype), scores[b, index], iou_thresh)]] = True
    return keep


def plot_keypoints_on_image_batch(
    kp_batch_tensor, img_batch_tensor, radius=1, thickness=1, max_imgs=8, kp_range=(0, 1), plot_numbers=False
):
    """Draw each particle as a dot in its colour.

    Args:
        kp_batch_tensor: [B, K, 2] positions (y, x) in `kp_range`, whose ends are the centres of the first and last
            pixel. Particles off the image are not drawn.
        img_batch_tensor: [B, 3, H, W] in 0..1.
        radius: of the dots in pixels; from 2 on they have a black rim.
        thickness: of the stroke around the dot in its own colour, pixels; 1 adds nothing, -1 means none.
        max_imgs: how many images to draw at most.
        kp_range: (lowest, highest) coordinate.
        plot_numbers: write each particle's index beside its dot, together where several lie at one place; legible from
            about 128 pixels on.

    Returns:
        float32 [min(B, max_imgs), 3, H, W].
    """
    points = _on_cpu(kp_batch_tensor[:max_imgs])
    shown = torch.ones(points.shape[:2], dtype=torch.bool)
    images = images_on_cpu(img_batch_tensor[:max_imgs])
    return _draw_points(images, points, shown, radius, thickness, kp_range, plot_numbers)


def plot_keypoints_on_image(k, image_tensor, radius=1, thickness=1, kp_range=(0, 1), plot_numbers=True):
    """`plot_keypoints_on_image_batch` of one image [3, H, W] with particles [K, 2]: uint8 array [H, W, 3]."""
    options = {"kp_range": kp_range, "plot_numbers": plot_numbers}
    return _to_pixels(plot_keypoints_on_image_batch(k[None], image_tensor[None], radius, thickness, **options)[0])


def plot_bb_on_image_batch_from_z_scale_nms(
    kp_batch_tensor,
    z_scale_batch_tensor,
    img_batch_tensor,
    scores,
    iou_thresh=0.5,
    thickness=1,
    max_imgs=8,
    hard_thresh=None,
    scale_normalized=False,
):
    """Draw the particles' boxes by position and scale (`boxes_from_particles`) that survive `select_boxes`.

    Args:
        kp_batch_tensor: [B, K, 2] positions (y, x) in -1..1.
        z_scale_batch_tensor: [B, K, 2] (height, width), logits, or fractions with `scale_normalized`.
        img_batch_tensor: [B, 3, H, W] in 0..1.
        scores: [B, K].
        iou_thresh, hard_thresh: see `select_boxes`.
        thickness: of the lines, pixels.
        max_imgs: how many images to draw at most.
        scale_normalized: see `boxes_from_particles`.

    Returns:
        float32 [min(B, max_imgs), 3, H, W], each box in its particle's colour; a list with, per image, the particles
        whose boxes were kept: int64 [n], the surest first.
    """
    images, scores = img_batch_tensor[:max_imgs], scores[:max_imgs]
    z, z_scale = _on_cpu(kp_batch_tensor[:max_imgs]), _on_cpu(z_scale_batch_tensor[:max_imgs])
    boxes = boxes_from_particles(z, z_scale, images.shape[-2:], scale_normalized)
    return _draw_kept_boxes(images, boxes, scores, iou_thresh, hard_thresh, thickness)


def plot_bb_on_image_from_z_scale_nms(
    kp, z_scale, image_tensor, scores, iou_thresh=0.5, thickness=1, hard_thresh=None, scale_normalized=False
):
    """`plot_bb_on_image_batch_from_z_scale_nms` of one image [3, H, W].

    kp, z_scale: [K, 2]; scores: [K]. Returns a uint8 array [H, W, 3] and the particles kept, int64 [n].
    """
    options = {"hard_thresh": hard_thresh, "scale_normalized": scale_normalized}
    images, kept = plot_bb_on_image_batch_from_z_scale_nms(
        kp[None], z_scale[None], image_tensor[None], scores[None], iou_thresh, thickness, **options
    )
    return _to_pixels(images[0]), kept[0]


def plot_bb_on_image_batch_from_masks_nms(
    mask_batch_tensor, img_batch_tensor, scores, iou_thresh=0.5, thickness=1, max_imgs=8, hard_thresh=None
):
    """Draw the boxes of the particles' alpha masks (`boxes_from_masks`) that survive `select_boxes`.

    Args:
        mask_batch_tensor: alpha [B, K, 1, H, W] in 0..1; an empty mask has no box.
        img_batch_tensor: [B, 3, H, W] in 0..1.
        scores: [B, K].
        iou_thresh, hard_thresh: see `select_boxes`.
        thickness: of the lines, pixels.
        max_imgs: how many images to draw at most.

    Returns:
        float32 [min(B, max_imgs), 3, H, W], each box in its particle's colour; a list with, per image, the particles
        whose boxes were kept: int64 [n], the surest first.
    """
    images, scores = img_batch_tensor[:max_imgs], scores[:max_imgs]
    boxes, present = boxes_from_masks(_on_cpu(mask_batch_tensor[:max_imgs]))
    return _draw_kept_boxes(images, boxes, scores, iou_thresh, hard_thresh, thickness, present)


def plot_bb_on_image_from_masks_nms(masks, image_tensor, scores, iou_thresh=0.5, thickness=1, hard_thresh=None):
    """`plot_bb_on_image_batch_from_masks_nms` of one image [3, H, W].

    masks: [K, 1, H, W]; scores: [K]. Returns a uint8 array [H, W, 3] and the particles kept, int64 [n].
    """
    images, kept = plot_bb_on_image_batch_from_masks_nms(
        masks[None], image_tensor[None], scores[None], iou_thresh, thickness, hard_thresh=hard_thresh
    )
    return _to_pixels(images[0]), kept[0]


def plot_glimpses(cropped, decoded_rgb, columns=16):
    """Pairs of glimpses, the cut one over the decoded one, `columns` pairs to a row.

    Args:
        cropped: [N, 3, g, g] in 0..1, cut from the image.
        decoded_rgb: [N, 3, g, g] in 0..1, what the decoder made of it.

    Returns:
        float32 [3, h, w]; small glimpses are enlarged, the separators are white.
    """
    from torchvision.utils import make_grid

    top, bottom = (enlarge(images_on_cpu(t), zoom_factor(t, LEGIBLE_SIDE // 2)) for t in (cropped, decoded_rgb))
    separator = torch.ones(len(top), 3, 1, top.shape[-1])
    pairs = torch.cat([top, separator, bottom], dim=-2)
    return make_grid(pairs, nrow=columns, padding=4, pad_value=1.0)


def plot_glimpse_obj_on(dec_object_glimpses, obj_on, save_dir):
    """Write a figure of each particle's decoded glimpse, in rows of eight, under each its number and transparency.

    Args:
        dec_object_glimpses: [*, K, 3, g, g] colours in 0..1, or [*, K, 4, g, g] with the alpha before them.
        obj_on: [*, K] or [*, K, 1] in 0..1.
        save_dir: a folder, which is made where it is missing and gets `glimpses_obj_on.png`, or the path of an image
            file, recognised by its ending.

    Raises:
        UserError: the file cannot be written.
    """
    from torchvision.utils import make_grid

    glimpses = images_on_cpu(dec_object_glimpses).flatten(0, -4)[:, -3:]
    tiles = enlarge(glimpses, zoom_factor(glimpses, LEGIBLE_SIDE // 2))
    numbers = [i % dec_object_glimpses.shape[-4] for i in range(len(tiles))]
    texts = [f"{k}: {value:.2f}" for k, value in zip(numbers, obj_on.flatten().tolist(), strict=True)]
    labels = torch.stack([_label(text, tiles.shape[-1]) for text in texts])
    path = Path(save_dir)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        path = make_folder(path) / "glimpses_obj_on.png"
    save_image(make_grid(torch.cat([tiles, labels], dim=-2), nrow=8, padding=4, pad_value=1.0), path)


def plot_segmentation(alpha_masks, images=None):
    """Each particle's mask in its colour, blended over the dimmed greyscale image.

    Args:
        alpha_masks: [B, K, 1, H, W] in 0..1; where they add up to more than 1 they are scaled down to 1.
        images: [B, 3, H, W] in 0..1; None blends over black.

    Returns:
        float32 [B, 3, H, W].
    """
    alpha = images_on_cpu(alpha_masks)[:, :, 0]  # [B, K, H, W]
    alpha = alpha / alpha.sum(1, keepdim=True).clamp(min=1.0)
    color = torch.einsum("bkhw,kc->bchw", alpha, particle_colors(alpha.shape[1]))
    if images is None:
        return color
    grey = torch.einsum("bchw,c->bhw", images_on_cpu(images), torch.tensor(GREY_WEIGHTS))
    return color + (1 - alpha.sum(1, keepdim=True)) * 0.5 * grey[:, None]


def segmentation_grid(images, alpha_masks):
    """Images [B, 3, H, W] in a row, below each its `plot_segmentation` of masks [B, K, 1, H, W]: float32 [3, h, w]."""
    from torchvision.utils import make_grid

    rows = [images_on_cpu(images), plot_segmentation(alpha_masks, images)]
    tiles = torch.cat([enlarge(row, zoom_factor(row, LEGIBLE_SIDE)) for row in rows])
    return make_grid(tiles, nrow=len(images), padding=4, pad_value=1.0)


def figure_rows(images, output, topk, iou_thresh, kp_range=(-1, 1), columns=8):
    """The nine rows of the figure grid, by name, from top to bottom.

    Suppression and truncation of boxes are done in the model's pixels; everything is drawn on images enlarged by a
    whole factor to at least `LEGIBLE_SIDE` pixels.

    Args: see `figure_grid`.

    Returns:
        dict of name -> float32 [min(N, columns), 3, h, w].
    """
    images, rec, foreground, background = (
        images_on_cpu(t[:columns]) for t in (images, output["rec"], output["dec_objects"], output["bg"])
    )
    particle_keys = ("z_base", "mu_offset", "logvar_offset", "obj_on", "z_scale", "alpha_masks", "kp_p")
    z_base, mu_offset, logvar_offset, obj_on, z_scale, masks, proposals = (
        _on_cpu(output[key][:columns]) for key in particle_keys
    )
    z = z_base + mu_offset
    low, high = kp_range
    scores = confidence(logvar_offset, obj_on)
    topk = min(topk, scores.shape[1])
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(topk).indices, True)
    scale_boxes = boxes_from_particles((z - low) / (high - low) * 2 - 1, z_scale, images.shape[-1])
    scale_keep = select_boxes(scale_boxes, scores, iou_thresh, SCORE_THRESHOLD)
    mask_boxes, present = boxes_from_masks(masks)
    mask_keep = select_boxes(mask_boxes, scores, iou_thresh, SCORE_THRESHOLD, present)

    zoom = zoom_factor(images, LEGIBLE_SIDE)
    canvas = enlarge(images, zoom)
    radius, line = 2 + canvas.shape[-1] // 256, max(1, canvas.shape[-1] // 128)
    return {
        "ground truth": canvas,
        "posterior": _draw_points(canvas, z, torch.ones_like(best), radius, 1, kp_range),
        "reconstruction": enlarge(rec, zoom),
        "prior": _draw_points(canvas, proposals, torch.ones_like(proposals[..., 0]).bool(), radius, 1, kp_range),
        f"top {topk}": _draw_points(canvas, z, best, radius, 1, kp_range),
        "foreground": enlarge(foreground, zoom),
        "boxes (scale)": _draw_boxes(canvas, scale_boxes, scale_keep, line, zoom),
        "boxes (masks)": _draw_boxes(canvas, mask_boxes, mask_keep, line, zoom),
        "background": enlarge(background, zoom),
    }


def figure_grid(images, output, topk, iou_thresh, kp_range=(-1, 1), columns=8):
    """One picture of what the model sees: a column per image, nine named rows.

    Rows: ground truth, all posterior particles, reconstruction, all prior proposals, the `topk` particles by
    `confidence`, foreground, boxes from z_scale, boxes from alpha masks, background. Particles keep their colours
    throughout.

    Args:
        images: [N, 3, S, S] in 0..1, N = B, or B*F in DDLP.
        output: the model's forward output; read are z_base, mu_offset, logvar_offset [N, K, 2], obj_on [N, K],
            z_scale [N, K, 2], kp_p [N, n_kp_prior, 2], rec, dec_objects, bg [N, 3, S, S], alpha_masks [N, K, 1, S, S].
        topk: particles in row five; more than K means all.
        iou_thresh: of the boxes' suppression; boxes scoring under `SCORE_THRESHOLD` are left out.
        kp_range: the range of all positions.
        columns: the first so many images are shown.

    Returns:
        float32 [3, h, w], white between the images, the rows' names at the left.
    """
    return labelled_grid(figure_rows(images, output, topk, iou_thresh, kp_range, columns))


def labelled_grid(rows, titles=()):
    """Rows of images in one picture, each with its name at the left.

    Args:
        rows: dict of a row's name -> its images [n, 3, H, W], or [n, 1, H, W] for greys, in 0..1; all rows have the
            same n, H and W. Images smaller than `LEGIBLE_SIDE` are enlarged by a whole factor.
        titles: n strings to write above the columns, ASCII, or none.

    Returns:
        float32 [3, h, w], white between the images.

    Raises:
        ValueError: there are titles, but not one per column.
    """
    images = torch.cat([images_on_cpu(row).expand(-1, 3, -1, -1) for row in rows.values()])
    images = enlarge(images, zoom_factor(images, LEGIBLE_SIDE))
    count, (height, width), padding = len(images) // len(rows), images.shape[-2:], 2
    if titles and len(titles) != count:
        raise ValueError(f"{len(titles)} titles for {count} columns; legal: one per column")
    tiles = F.pad(images, (padding, 0, padding, 0), value=1.0).unflatten(0, (len(rows), count))
    grid = F.pad(tiles.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2), (0, padding, 0, padding), value=1.0)
    margin = torch.cat([_row_label(name, height + padding) for name in rows], dim=-2)
    margin = F.pad(margin, (0, 0, padding, 0), value=1.0)
    picture = torch.cat([margin, grid], dim=-1)
    if not titles:
        return picture
    heading = torch.cat([_label(title, width + padding, scale=0.5) for title in titles], dim=-1)
    return torch.cat([F.pad(heading, (picture.shape[-1] - heading.shape[-1], 0), value=1.0), picture], dim=-2)


def check_image_name(path):
    """`UserError` unless a path's ending is one of `IMAGE_SUFFIXES`."""
    if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path} is no name for an image; legal: one that ends in {', '.join(IMAGE_SUFFIXES)}")


def save_image(tensor, path):
    """Write [3, h, w] in 0..1 as JPEG (quality 95) or PNG; the file appears complete or not at all.

    Raises:
        UserError: the path's ending is not one of `IMAGE_SUFFIXES`, or it cannot be written.
    """
    check_image_name(path)
    path = Path(path)
    pixels = _to_pixels(tensor)
    # Full colour resolution: thin coloured lines fade with JPEG's usual chroma subsampling.
    options = {} if path.suffix.lower() == ".png" else {"quality": 95, "subsampling": 0}
    with atomic_write(path) as temporary:
        iio.imwrite(temporary, pixels, **options)


def loss_graph(records, panels=LOSS_PANELS, progress="epoch"):
    """Training curves: over the epochs loss, KLs, reconstruction and validation loss.

    Args:
        records: dicts with the key `progress` and any of those in `panels`; values that are missing, None or not
            finite are left out.
        panels: dict of a quantity's name -> its keys; two quantities side by side.
        progress: the key of the horizontal axis.

    Returns:
        float32 [3, 400 * rows, 1200], [3, 800, 1200] with the default panels.
    """
    rows = ceil(len(panels) / 2)
    figure = Figure(figsize=(12, 4 * rows), dpi=100, layout="constrained")
    places = figure.subplots(rows, 2).flat
    for axes, (label, keys) in zip(places, panels.items(), strict=False):
        _draw_curves(axes, label, {key: _curve(records, key, progress) for key in keys}, progress)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    return _figure_pixels(figure)


def horizon_graph(panels, first=0, xlabel="frame"):
    """Quantities measured at every step of a sequence: a row of axes, one per quantity.

    Args:
        panels: dict of a quantity's name -> dict of a curve's name -> its values, one per step; where a value is None
            or not finite, the curve has a gap.
        first: the number of the step that the values begin with.
        xlabel: what a step is.

    Returns:
        float32 [3, 400, 500 * len(panels)].
    """
    figure = Figure(figsize=(5 * len(panels), 4), dpi=100, layout="constrained")
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        points = {name: _steps(values, first) for name, values in curves.items()}
        _draw_curves(axes, label, points, xlabel, legend_columns=2)
    return _figure_pixels(figure)


def _on_cpu(tensor):
    """Without gradient, on the CPU, in float32 or better."""
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))


def images_on_cpu(tensor):
    """The tensor without gradient, on the CPU, in float32, which is what cv2 draws on."""
    return tensor.detach().to("cpu", torch.float32)


def _to_pixels(tensor):
    """Colours [3, H, W] as an image file holds them: uint8 array [H, W, 3]."""
    pixels = (images_on_cpu(tensor).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return pixels.contiguous().numpy()  # cv2 draws on no other layout


def zoom_factor(images, side):
    """The whole factor that makes images [..., W] at least `side` pixels wide."""
    return max(1, ceil(side / images.shape[-1]))


def enlarge(images, zoom):
    """Images [..., H, W] with every pixel repeated `zoom` times both ways."""
    return images.repeat_interleave(zoom, dim=-2).repeat_interleave(zoom, dim=-1)


def _to_canvas(image):
    """[3, H, W] to an array [H, W, 3] of its own, in the memory layout that cv2 draws on."""
    return np.array(image.permute(1, 2, 0).numpy(), order="C", copy=True)


def _from_canvases(canvases):
    return torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2).contiguous()


def _draw_points(images, points, shown, radius, thickness, kp_range, plot_numbers=False):
    """Dots at points [B, K, 2] (y, x) in `kp_range` where shown [B, K], on float32 images [B, 3, H, W]."""
    low, high = kp_range
    size = torch.tensor(images.shape[-2:])
    pixels = (points - low) / (high - low) * (size - 1)
    # Written so that a position that is not a number counts as outside.
    shown = shown & ((pixels > -radius) & (pixels < size - 1 + radius)).all(-1)
    colors = particle_colors(points.shape[1]).tolist()
    canvases = [_to_canvas(image) for image in images]
    for b, k in shown.nonzero().tolist():
        y, x = pixels[b, k].round().int().tolist()
        if radius >= 2:
            cv2.circle(canvases[b], (x, y), radius + 1, (0.0, 0.0, 0.0), cv2.FILLED)
        cv2.circle(canvases[b], (x, y), radius, colors[k], cv2.FILLED)
        cv2.circle(canvases[b], (x, y), radius, colors[k], thickness)
    for b in range(len(canvases) if plot_numbers else 0):
        numbers = shown[b].nonzero()[:, 0].tolist()
        places = pixels[b].round().int().flip(-1).tolist()
        for group in at_one_place([places[k] for k in numbers], 2 * radius):
            x, y = places[numbers[group[0]]]
            text = ",".join(str(numbers[i]) for i in group)
            _draw_label(canvases[b], text, (x + radius + 1, y - radius - 1))
    return _from_canvases(canvases)


def at_one_place(points, reach):
    """Group points (x, y) that lie nearer than `reach` to a group's first one, both ways: lists of their indices. What
    is written beside them would else be written one over the other."""
    groups = []
    for k, (x, y) in enumerate(points):
        for group in groups:
            if abs(points[group[0]][0] - x) < reach and abs(points[group[0]][1] - y) < reach:
                group.append(k)
                break
        else:
            groups.append([k])
    return groups


def _draw_boxes(images, boxes, keep, thickness, zoom=1):
    """Outlines of boxes [B, K, 4] where keep [B, K], on float32 images [B, 3, H, W].

    The images are `zoom` times as large as those that the boxes refer to. Sides beyond the image are drawn on its
    border; a box that is wholly outside is not drawn.
    """
    height, width = (side // zoom for side in images.shape[-2:])
    colors = particle_colors(boxes.shape[1]).tolist()
    canvases = [_to_canvas(image) for image in images]
    for b, k in keep.nonzero().tolist():
        x1, y1, x2, y2 = boxes[b, k].tolist()
        if x2 < 0 or y2 < 0 or x1 >= width or y1 >= height:
            continue
        first = (max(x1, 0) * zoom, max(y1, 0) * zoom)
        last = ((min(x2, width - 1) + 1) * zoom - 1, (min(y2, height - 1) + 1) * zoom - 1)
        cv2.rectangle(canvases[b], first, last, colors[k], thickness)
    return _from_canvases(canvases)


def _draw_kept_boxes(images, boxes, scores, iou_thresh, hard_thresh, thickness, present=None):
    """The boxes [B, K, 4] that survive `select_boxes`, drawn on images [B, 3, H, W]; per image their indices, int64
    [n], the surest first."""
    scores = _on_cpu(scores)
    keep = select_boxes(boxes, scores, iou_thresh, hard_thresh, present)
    ranking = scores.argsort(dim=1, descending=True, stable=True)
    kept = [order[keep_here[order]] for order, keep_here in zip(ranking, keep, strict=True)]
    return _draw_boxes(images_on_cpu(images), boxes, keep, thickness), kept


def _draw_label(canvas, text, corner):
    """Write a text with its lower left corner near (x, y), inside the image, white with a black halo."""
    scale = max(0.35, canvas.shape[0] / 512)
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x = min(max(corner[0], 1), canvas.shape[1] - width - 1)
    y = min(max(corner[1], height + 1), canvas.shape[0] - 2)
    for ink, thickness in (((0.0, 0.0, 0.0), 3), ((1.0, 1.0, 1.0), 1)):
        draw_text(canvas, text, (x, y), scale, ink, thickness)


def draw_text(canvas, text, origin, scale, color, thickness=1):
    """Write smoothed text on a float32 array [H, W, 3], lower left corner at (x, y), in cv2's plain font.

    cv2 smooths on 8-bit arrays only, so the text is blended in, where it is.
    """
    (width, height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    x, y = origin
    margin = thickness + 2
    left, top = max(x - margin, 0), max(y - height - margin, 0)
    place = canvas[top : max(y + baseline + margin, 0), left : max(x + width + margin, 0)]
    stencil = np.zeros(place.shape[:2], np.uint8)
    if not stencil.size:
        return
    cv2.putText(stencil, text, (x - left, y - top), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)
    weight = stencil[..., None].astype(np.float32) / 255
    place[:] = place * (1 - weight) + np.asarray(color, np.float32) * weight


def _row_label(name, length):
    """A row's name read from bottom to top, centred in a white strip [3, length, 22]."""
    return torch.rot90(_label(name, length, scale=0.5), dims=(1, 2))


def _label(text, length, scale=0.4):
    """A text, centred in a white strip [3, 22, length]."""
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    canvas = np.ones((22, length, 3), np.float32)
    draw_text(canvas, text, ((length - width) // 2, 15), scale, (0.0, 0.0, 0.0))
    return torch.from_numpy(canvas).permute(2, 0, 1)


def _figure_pixels(figure):
    """A matplotlib figure, drawn without a display: float32 [3, h, w]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def _curve(records, key, progress):
    """The (progress, value) pairs of the records that have both."""
    pairs = [(record.get(progress), record.get(key)) for record in records]
    return [(at, value) for at, value in pairs if at is not None and value is not None and isfinite(value)]


def _steps(values, first):
    """The (step, value) pairs of values at consecutive steps; a value that is missing or not finite becomes NaN."""
    return [
        (step, value if value is not None and isfinite(value) else nan)
        for step, value in enumerate(values, start=first)
    ]


def _draw_curves(axes, label, curves, xlabel="epoch", legend_columns=4):
    """One panel with its vertical axis named `label`; `curves` maps a name to its (x, value) pairs.

    A value that is not a number interrupts its curve.
    """
    finite = {name: [value for _, value in points if isfinite(value)] for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if finite[name]}
    axes.set(xlabel=xlabel, ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.5, label=name)
    if not curves:
        axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)
        return
    if len(curves) > 1:
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": legend_columns}
        axes.legend(**place, fontsize="small", frameon=False)
    values = [value for name in curves for value in finite[name]]
    if min(values) > 0 and max(values) > LOG_RATIO * min(values):
        axes.set_yscale("log")
