"""The picture with its particles, on which they are pressed, dragged and surrounded."""

import itertools
import math
import tkinter as tk

from editor.pictures import BACKDROP, hex_color, hex_colors, placed, ppm
from modules.particles import VISIBLE

RADIUS = 7  # of a particle's dot, and all below in units of `unit` pixels
REACH = 12  # within which a press hits a particle
SAME_PLACE = 24  # nearer dots share a label
SHORTEST_ARROW = 12
LONGEST_CLICK = 3  # a drag is longer
ZOOM_STEP, LARGEST_ZOOM = 1.25, 8.0
SHIFT, CONTROL = 0x1, 0x4  # of an event's state


class ParticleCanvas(tk.Canvas):
    """Shows an image and an `EditorState`'s particles over it.

    actions: what the mouse does goes to its methods; unit: a pixel of a screen of 96 dots per inch, in pixels.
    """

    def __init__(self, parent, actions, unit):
        background = hex_color(BACKDROP)
        side = round(500 * unit)
        super().__init__(parent, width=side, height=side, background=background, highlightthickness=0, takefocus=1)
        self.actions, self.unit = actions, unit
        self.state, self.image, self.message = None, None, ""
        self.zoom, self._middle = 1.0, (0.5, 0.5)  # the point of the image, in shares of it, in the canvas's middle
        self._photo = tk.PhotoImage(master=self)
        self._picture = self.create_image(0, 0, anchor="nw", image=self._photo)
        self._drag = None  # of the pressed button: where it was pressed, and what is being done
        self.bind("<Configure>", lambda event: self.draw())
        self.bind("<Button-1>", self._press)
        self.bind("<Double-Button-1>", self._press_twice)
        self.bind("<B1-Motion>", self._move)
        self.bind("<ButtonRelease-1>", self._release)
        self.bind("<Button-2>", self._start_panning)
        self.bind("<B2-Motion>", self._pan)
        turns = {"": actions.wheel_scale, "Alt-": actions.wheel_depth, "Control-": self._wheel_zoom}
        for prefix, turned in turns.items():
            self.bind(f"<{prefix}MouseWheel>", lambda event, turned=turned: turned(1 if event.delta > 0 else -1))
            self.bind(f"<{prefix}Button-4>", lambda event, turned=turned: turned(1))
            self.bind(f"<{prefix}Button-5>", lambda event, turned=turned: turned(-1))

    # ------------------------------------------------------------------------------------------------------ geometry

    @property
    def size(self):
        """(width, height) in pixels."""
        return max(self.winfo_width(), 1), max(self.winfo_height(), 1)

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
        self._look_at(*self._middle)

    def _look_at(self, x, y):
        margin = 0.5 / self.zoom
        self._middle = tuple(min(max(value, margin), 1 - margin) for value in (x, y))
        self.draw()

    # ------------------------------------------------------------------------------------------------------- drawing

    def show(self, state, image, message=""):
        """Show a state and the image uint8 [H, W, 3] that belongs to it, or a message in the middle."""
        self.state, self.image, self.message = state, image, message
        self.draw()

    def draw(self):
        """Draw everything anew."""
        if self.image is not None:
            side, left, top = self._frame()
            self._photo.configure(data=ppm(placed(self.image, self.size, side / self._image_side(), (left, top))))
        else:
            self._photo.blank()
        self.draw_particles()

    def draw_particles(self):
        """Draw what lies over the image."""
        self.delete("over")
        if self.message:
            width, height = self.size
            self.create_text(
                width / 2, height / 2, text=self.message, fill="white", width=0.9 * width, justify="center", tags="over"
            )
        if self.state is None or self.image is None or not self.state.shows_handles:
            return
        particles, time = self.state.particles, self.state.time
        visible = (particles.obj_on[0, time] > VISIBLE).tolist()
        places = particles.z[0].cpu().tolist()  # [T][K][2]
        colors = hex_colors(len(visible))
        order = sorted(range(len(visible)), key=lambda k: (k in self.state.selection, visible[k]))
        for k in order:
            if len(places) > 1 and (visible[k] or k in self.state.selection):
                self._draw_path([self.to_canvas(*place[k]) for place in places], colors[k], k in self.state.selection)
        for k in self.state.selection:
            self._draw_box(places[time][k], particles.z_scale[0, time, k].sigmoid().tolist(), colors[k])
        points = {k: self.to_canvas(*places[time][k]) for k in order}
        for k, point in points.items():
            self._draw_dot(*point, colors[k], visible[k], k in self.state.selection)
        self._draw_labels(points)

    def _draw_path(self, points, color, is_selected):
        """A line through the points, an arrow at the end of each part that is long enough to have one."""
        flat = [value for point in points for value in point]
        width = (3 if is_selected else 1.5) * self.unit
        shape = tuple(size * self.unit for size in (8, 9, 4))
        self.create_line(*flat, fill="black", width=width + 2 * self.unit, tags="over")
        for start, end in itertools.pairwise(points):
            has_arrow = math.dist(start, end) >= SHORTEST_ARROW * self.unit
            options = {"arrow": "last", "arrowshape": shape} if has_arrow else {}
            self.create_line(*start, *end, fill=color, width=width, tags=("over", "path"), **options)

    def _draw_box(self, place, sides, color):
        side, _, _ = self._frame()
        x, y = self.to_canvas(*place)
        half = [size * side / 2 for size in sides]
        box = (x - half[1], y - half[0], x + half[1], y + half[0])
        self.create_rectangle(*box, outline="black", width=3 * self.unit, tags="over")
        self.create_rectangle(*box, outline=color, width=self.unit, tags=("over", "box"))

    def _draw_dot(self, x, y, color, is_visible, is_selected):
        radius = RADIUS * self.unit * (1 if is_visible else 0.6)
        rim, width = ("white", 3) if is_selected else ("black", 1.5)
        oval = (x - radius, y - radius, x + radius, y + radius)
        fill = color if is_visible else ""
        self.create_oval(
            *oval, fill=fill, outline=rim if fill else color, width=width * self.unit, tags=("over", "dot")
        )

    def _draw_labels(self, points):
        """The numbers of the particles beside their dots, those at one place together."""
        groups = []
        for k in sorted(points):
            for group in groups:
                if max(abs(a - b) for a, b in zip(points[group[0]], points[k], strict=True)) < SAME_PLACE * self.unit:
                    group.append(k)
                    break
            else:
                groups.append([k])
        for group in groups:
            x, y = points[group[0]]
            text, offset = ",".join(map(str, group)), (RADIUS + 3) * self.unit
            for dx, dy, fill in ((-1, 0, "black"), (1, 0, "black"), (0, -1, "black"), (0, 1, "black"), (0, 0, "white")):
                place = (x + offset + dx * self.unit, y - offset / 2 + dy * self.unit)
                self.create_text(*place, text=text, anchor="w", fill=fill, font="TkHeadingFont", tags="over")

    # --------------------------------------------------------------------------------------------------------- mouse

    def _hit(self, event):
        y, x = self.to_position(event.x, event.y)
        side, _, _ = self._frame()
        return None if not self.state.shows_handles else self.state.pick(y, x, 2 * REACH * self.unit / side)

    def _press(self, event):
        self.focus_set()
        if self.state is None or self.image is None:
            return
        hit = self._hit(event)
        if self.actions.takes_press(hit):
            return
        extend = bool(event.state & (SHIFT | CONTROL))
        self._drag = {"from": (event.x, event.y), "hit": hit, "extend": extend, "moved": False}
        if hit is not None and (extend or hit not in self.state.selection):
            self.actions.select((hit,), extend)

    def _press_twice(self, event):
        hit = self._hit(event) if self.state is not None and self.image is not None else None
        if hit is not None:
            self.actions.select(self.state.overlapping(hit), False)
            self._drag = {"from": (event.x, event.y), "hit": hit, "extend": False, "moved": False}

    def _move(self, event):
        if self._drag is None:
            return
        x, y = self._drag["from"]
        if not self._drag["moved"] and max(abs(event.x - x), abs(event.y - y)) <= LONGEST_CLICK * self.unit:
            return
        self._drag["moved"] = True
        if self._drag["hit"] is not None:
            self.actions.drag(*self._distance(event))
        else:
            self.delete("band")
            dash = (4, 3)
            self.create_rectangle(x, y, event.x, event.y, outline="white", dash=dash, width=self.unit, tags="band")

    def _release(self, event):
        drag, self._drag = self._drag, None
        self.delete("band")
        if drag is None:
            return
        if drag["hit"] is not None:
            if drag["moved"]:
                self.actions.drop()
        elif drag["moved"]:
            corners = (*self.to_position(*drag["from"]), *self.to_position(event.x, event.y))
            self.actions.select(self.state.within(*corners), drag["extend"])
        elif not drag["extend"]:
            self.actions.select((), False)

    def _distance(self, event):
        start = self.to_position(*self._drag["from"])
        return tuple(b - a for a, b in zip(start, self.to_position(event.x, event.y), strict=True))

    def stop_dragging(self):
        """Forget what the pressed button was doing; returns whether it was doing anything."""
        drag, self._drag = self._drag, None
        self.delete("band")
        return drag is not None and drag["moved"]

    def _wheel_zoom(self, turns):
        self.set_zoom(self.zoom * ZOOM_STEP**turns)

    def _start_panning(self, event):
        self._pan_from = (event.x, event.y, *self._middle)

    def _pan(self, event):
        x, y, *middle = self._pan_from
        side, _, _ = self._frame()
        self._look_at(middle[0] - (event.x - x) / side, middle[1] - (event.y - y) / side)
