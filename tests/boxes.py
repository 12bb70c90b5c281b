"""Suppression of boxes, box by box."""


def overlap(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def plain_selection(boxes, scores, iou_thresh, hard_thresh):
    """Greedy suppression of one image's boxes, as a set of indices."""
    kept = []
    for k in sorted(range(len(boxes)), key=lambda k: -scores[k]):
        if (hard_thresh is None or scores[k] >= hard_thresh) and all(
            overlap(boxes[k], boxes[j]) <= iou_thresh for j in kept
        ):
            kept.append(k)
    return set(kept)
