"""A canvas that shows a picture: as large as fits, or zoomed in."""

import tkinter as tk

import numpy as np

from editor.pictures import BACKDROP, hex_color, magnified, ppm

LARGEST_ZOOM = 8.0


class Screen(tk.Canvas):
    """Shows an image, uint8 [H, W, 3] of equal sides, or None.

    What is drawn anew is as little as possible: as a particle is dragged, most of the image stays as it is.
    """

    def __init__(self, parent, side, **options):
        background = hex_color(BACKDROP)
        super().__init__(parent, width=side, height=side, background=background, highlightthickness=0, **options)
        self.image = None
        self.zoom, self._middle = 1.0, (0.5, 0.5)  # the point of the image, in shares of it, in the middle
        self._photo = tk.PhotoImage(master=self)
        self._item = self.create_image(0, 0, anchor="nw", image=self._photo)
        self._drawn = None  # where the image was drawn: what `_frame` said, and the part of the canvas
        self._size = side, side
        self.bind("<Configure>", self._resize)

    def _resize(self, event):
        self._size = max(event.width, 1), max(event.height, 1)
        self.draw()

    # ------------------------------------------------------------------------------------------------------ geometry

    @property
    def size(self):
        """(width, height) in pixels."""
        return self._size

    def _frame(self):
        """The side of the whole image on the canvas, and its upper left corner."""
        side = min(self.size) * self.zoom
        left, top = (size / 2 - middle * side for size, middle in zip(self.size, self._middle, strict=True))
        return side, left, top

    def to_canvas(self, y, x):
        """A position in -1..1 -> (x, y) in pixels of the canvas."""
        side, left, top = self._frame()
        pixels = self._image_side()
        return tuple(start + (((z + 1) / 2 * (pixels - 1)) + 0.5) / pixels * side for start, z in ((left, x), (top, y)))

    def to_position(self, x, y):
        """The inverse: (y, x) in -1..1."""
        side, left, top = self._frame()
        pixels = self._image_side()
        return tuple((((p - start) / side * pixels) - 0.5) / (pixels - 1) * 2 - 1 for start, p in ((top, y), (left, x)))

    def _image_side(self):
        return self.image.shape[0] if self.image is not None else 2

    def set_zoom(self, zoom):
        """Show the image `zoom` times as large as fits, around the same point."""
        self.zoom = min(max(zoom, 1.0), LARGEST_ZOOM)
        self.look_at(*self._middle)

    def look_at(self, x, y):
        """Show a point of the image, in shares of its sides, in the middle, as far as the image fills the canvas."""
        margin = 0.5 / self.zoom
        self._middle = tuple(min(max(value, margin), 1 - margin) for value in (x, y))
        self.draw()

    # ------------------------------------------------------------------------------------------------------- drawing

    def show_image(self, image):
        """Show another image."""
        before, self.image = self.image, image
        is_other = image is None or before is None or before.shape != image.shape
        self._draw_image(None if is_other else before)

    def draw(self):
        """Draw everything that does not fit any more."""
        self._draw_image(self.image)

    def _draw_image(self, before):
        """Draw the image, or what differs from the one `before` where that was drawn at the same place."""
        if self.image is None:
            self._photo.blank()
            self._drawn = None
            return
        frame = side, left, top = self._frame()
        last_x, last_y = (min(size, round(start + side)) for size, start in zip(self.size, (left, top), strict=True))
        whole = max(round(left), 0), max(round(top), 0), last_x, last_y
        if self._drawn != (frame, whole) or before is None:
            self._drawn = frame, whole
            self._photo.configure(data=ppm(self._part(*whole)))
            self.coords(self._item, *whole[:2])
            return
        changed = (self.image != before).any(-1)
        if changed.any():
            part = self._canvas_part(changed, whole)
            self._photo.put(ppm(self._part(*part)), to=(part[0] - whole[0], part[1] - whole[1]))

    def _canvas_part(self, changed, whole):
        """The part of the canvas, within `whole`, that pixels of the image have to do with: left, top, right, bottom.
        changed: bool [H, W], of which some are."""
        side, left, top = self._frame()
        scale = side / self._image_side()
        (first_y, last_y), (first_x, last_x) = (np.flatnonzero(changed.any(axis))[[0, -1]] for axis in (1, 0))
        # A pixel reaches half a pixel into its neighbours.
        start = round(left + (first_x - 0.5) * scale), round(top + (first_y - 0.5) * scale)
        end = round(left + (last_x + 1.5) * scale), round(top + (last_y + 1.5) * scale)
        starts = [min(max(value, whole[i]), whole[i + 2] - 1) for i, value in enumerate(start)]
        ends = [max(min(value, whole[i + 2]), starts[i] + 1) for i, value in enumerate(end)]
        return *starts, *ends

    def _part(self, left, top, right, bottom):
        side, x, y = self._frame()
        size = max(right - left, 1), max(bottom - top, 1)
        return magnified(self.image, size, side / self._image_side(), (x - left, y - top))
