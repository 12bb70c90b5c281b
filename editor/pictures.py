"""Pictures for the window: arrays, without tkinter."""

import cv2
import numpy as np

from utils.plotting import particle_colors

CHECKERS = (96, 144)  # the greys behind what is transparent
BACKDROP = (43, 43, 43)  # around a picture


def to_bytes(image):
    """An image tensor [3, H, W] in 0..1 -> uint8 [H, W, 3]."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def over_checkers(glimpses, side):
    """Decoded glimpses [n, 1 + 3, g, g], alpha first, over a pattern of squares: uint8 [n, side, side, 3]."""
    g = glimpses.shape[-1]
    alpha, colors = np.split(glimpses.clamp(0, 1).cpu().numpy().transpose(0, 2, 3, 1), [1], axis=-1)
    rows, columns = np.indices((g, g)) * 8 // g
    pattern = np.where((rows + columns) % 2, *CHECKERS)[..., None]
    pictures = (alpha * colors * 255 + (1 - alpha) * pattern).round().astype(np.uint8)
    return np.stack([cv2.resize(picture, (side, side), interpolation=cv2.INTER_LINEAR) for picture in pictures])


def gallery(pictures, columns, gap, rim, background):
    """Pictures [n, s, s, 3] in rows of so many, `gap` pixels apart, in frames of their particles' colours, `rim` pixels
    wide: uint8 [h, w, 3]. background: a colour, three numbers of 0 to 255."""
    count, side = pictures.shape[:2]
    step = side + gap
    rows = (count + columns - 1) // columns
    sheet = np.full((rows * step, columns * step, 3), background, np.uint8)
    for k, color in enumerate(byte_colors(count)):
        y, x = k // columns * step, k % columns * step
        sheet[y : y + side, x : x + side] = color
        sheet[y + rim : y + side - rim, x + rim : x + side - rim] = pictures[k, rim:-rim, rim:-rim]
    return sheet


def magnified(image, size, scale, shift):
    """A part of a picture [H, W, 3] that is made `scale` times as large, its upper left corner at `shift` (x, y): the
    first `size` (width, height) pixels, uint8 [height, width, 3]."""
    # cv2 maps pixels' centres, which lie half a pixel from their corners.
    offset = [(scale - 1) / 2 + start for start in shift]
    matrix = np.array([[scale, 0, offset[0]], [0, scale, offset[1]]])
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def ppm(image):
    """uint8 [H, W, 3] as the bytes that tkinter.PhotoImage takes."""
    height, width = image.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + np.ascontiguousarray(image).tobytes()


def byte_colors(count):
    """The particles' colours, as everywhere: a list of three numbers of 0 to 255 each."""
    return (particle_colors(count) * 255).round().int().tolist()


def hex_color(rgb):
    """A colour, three numbers of 0 to 255, as tkinter takes it: #rrggbb."""
    return "#" + bytes(rgb).hex()
