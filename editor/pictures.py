"""Pictures for the window: arrays, without tkinter."""

import cv2
import numpy as np

from utils.plotting import particle_colors

CHECKERS = (96, 144)  # the greys behind what is transparent
BACKDROP = (43, 43, 43)  # around a picture


def to_bytes(image):
    """An image tensor [3, H, W] in 0..1 -> uint8 [H, W, 3]."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def over_checkers(glimpse):
    """A decoded glimpse [1 + 3, g, g], alpha first, over a pattern of squares: uint8 [g, g, 3]."""
    glimpse = glimpse.clamp(0, 1).cpu().numpy()
    side = glimpse.shape[-1]
    rows, columns = np.indices((side, side)) * 8 // side
    pattern = np.where((rows + columns) % 2, *CHECKERS)
    alpha = glimpse[0]
    return (alpha * glimpse[1:] * 255 + (1 - alpha) * pattern).round().astype(np.uint8).transpose(1, 2, 0)


def placed(image, size, scale, shift):
    """A picture [H, W, 3], `scale` times as large, its upper left corner at `shift` (x, y), on a canvas of `size`
    (width, height): uint8 [height, width, 3]."""
    # cv2 maps pixels' centres, which lie half a pixel from their corners.
    offset = [(scale - 1) / 2 + shift[0], (scale - 1) / 2 + shift[1]]
    matrix = np.array([[scale, 0, offset[0]], [0, scale, offset[1]]])
    height, width = image.shape[:2]
    drawn = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    left, top = (max(round(value), 0) for value in shift)
    right, bottom = round(shift[0] + scale * width), round(shift[1] + scale * height)
    for outside in (np.s_[:top], np.s_[max(bottom, 0) :], np.s_[:, :left], np.s_[:, max(right, 0) :]):
        drawn[outside] = BACKDROP
    return drawn


def ppm(image):
    """uint8 [H, W, 3] as the bytes that tkinter.PhotoImage takes."""
    height, width = image.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + np.ascontiguousarray(image).tobytes()


def hex_colors(count):
    """The particles' colours, as everywhere, for tkinter."""
    return [hex_color(color) for color in (particle_colors(count) * 255).round().int().tolist()]


def hex_color(rgb):
    """A colour, three numbers of 0 to 255, as tkinter takes it: #rrggbb."""
    return "#" + bytes(rgb).hex()
