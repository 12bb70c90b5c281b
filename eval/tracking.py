"""How well particles find and follow objects whose true positions are known.

Every object gets one particle, chosen by the frames that the model has seen, and keeps it: what is measured afterwards
is tracking, not a new match at every frame. Shape letters: F frames, K particles, n objects. Positions are in pixels,
(row, column), pixel i being the stretch i..i+1.
"""

import torch
from scipy.optimize import linear_sum_assignment


def pixel_positions(z, image_size):
    """Positions (y, x) in -1..1, from the first pixel's centre to the last's, in pixels."""
    return (z + 1) / 2 * (image_size - 1) + 0.5


def match(points, visible, truth, present):
    """The particle of each object: the assignment (Hungarian algorithm) of the smallest mean distance over the frames.

    points: [F, K, 2]; visible: [F, K] bool; truth: [F, n, 2]; present: [F, n] bool, whether the object is in view.
    Particles that are seen in less than half of the frames come last. Returns int64 [n], -1 for an object that is
    never in view or, where there are more objects than particles, gets none.
    """
    distance = (points[:, :, None] - truth[:, None]).norm(dim=-1)  # [F, K, n]
    weight = present[:, None].to(distance)
    cost = (distance * weight).sum(0) / weight.sum(0).clamp(min=1)  # [K, n]
    hidden = visible.float().mean(0) < 0.5
    cost[hidden] += 2 * cost.max() + 1
    chosen = torch.full((truth.shape[1],), -1)
    candidates = present.any(0).nonzero()[:, 0]
    rows, columns = linear_sum_assignment(cost[:, candidates].numpy())
    chosen[candidates[columns]] = torch.from_numpy(rows)
    return chosen


def tracking_quality(points, visible, truth, present, radii, cond_steps):
    """The position error of every object in the frames after the first `cond_steps`, and whether it is tracked.

    points: [F, K, 2]; visible: [F, K] bool; truth: [F, n, 2]; present: [F, n] bool; radii: [F, n] pixels. Returns two
    float tensors [F - cond_steps, n]: the distance (pixels) to the object of the particle that `match` gave it in the
    first `cond_steps` frames, and 1 where that particle is visible and nearer to the object's centre than its radius.
    NaN where the object is not in view; an object without a particle is not tracked and has no error.
    """
    points, visible, truth, present, radii = (x.detach().cpu() for x in (points, visible, truth, present, radii))
    seen, later = slice(None, cond_steps), slice(cond_steps, None)
    chosen = match(points[seen], visible[seen], truth[seen], present[seen])
    return _quality(chosen, points[later], visible[later], truth[later], present[later], radii[later])


def wholeness(points, visible, truth, present, radii, cond_steps, image_size):
    """Whether each object is still one thing in the frames after the first `cond_steps`: it has not left, vanished or
    split.

    image_size: side of the picture, pixels; the others as of `tracking_quality`. The particles of an object are those
    that are visible within its radius in the last frame that is seen, each the nearest object's. Returns a float tensor
    [F - cond_steps, n]: 1 as long as, in this frame and in all before it, one of them is visible, the mean of the
    visible ones lies in the picture and none of these is farther from the mean than the radius. NaN where the object
    is not in view.
    """
    points, visible, truth, present, radii = (x.detach().cpu() for x in (points, visible, truth, present, radii))
    last, later = cond_steps - 1, slice(cond_steps, None)
    distance = (points[last, :, None] - truth[last]).norm(dim=-1).where(present[last], torch.inf)  # [K, n]
    nearest = distance.argmin(-1, keepdim=True) == torch.arange(truth.shape[1])
    belongs = nearest & (distance < radii[last]) & visible[last, :, None]
    drawn = belongs & visible[later, :, None]  # [F - cond_steps, K, n]
    count = drawn.sum(1)
    mean = torch.einsum("fkn,fkd->fnd", drawn.to(points), points[later]) / count.clamp(min=1)[..., None]
    spread = (points[later, :, None] - mean[:, None]).norm(dim=-1).where(drawn, 0).amax(1)
    inside = ((mean >= 0) & (mean <= image_size)).all(-1)
    whole = ((count > 0) & inside & (spread <= radii[later])).cummin(0).values
    return whole.float().where(present[later], torch.nan)


def detection_quality(points, visible, truth, present, radii):
    """How well the particles of single images find their objects: (position error, found, visible per object).

    points: [B, K, 2]; visible: [B, K] bool; truth: [B, n, 2]; present: [B, n] bool; radii: [B, n] pixels. Each object
    gets one particle (`match`). The first two are float [B, n], NaN where there is no object: the distance (pixels) of
    that particle, and 1 where it is visible and nearer to the object's centre than its radius. The third is float [B],
    the number of visible particles for each object of the image, NaN where it has none.
    """
    points, visible, truth, present, radii = (x.detach().cpu() for x in (points, visible, truth, present, radii))
    images = zip(*(x.split(1) for x in (points, visible, truth, present, radii)), strict=True)
    quality = [_quality(match(*image[:4]), *image) for image in images]
    error, found = (torch.cat(values) for values in zip(*quality, strict=True))
    count = present.sum(-1)
    return error, found, (visible.sum(-1) / count).where(count > 0, torch.nan)


def _quality(chosen, points, visible, truth, present, radii):
    """The distance [F, n] of the objects' chosen particles, and whether each is visible and within its object."""
    error = (points[:, chosen.clamp(min=0)] - truth).norm(dim=-1)
    error[:, chosen < 0] = torch.nan
    on_object = ((error < radii) & visible[:, chosen.clamp(min=0)]).float()
    return error.where(present, torch.nan), on_object.where(present, torch.nan)
