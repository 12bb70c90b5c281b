"""The picture with its particles, on which they are pressed, dragged and surrounded."""

import itertools
import math

from editor.pictures import byte_colors, hex_color
from editor.screen import Screen
from modules.particles import VISIBLE
from utils.plotting import at_one_place

RADIUS = 7  # of a particle's dot, and all below in units of `unit` pixels
REACH = 12  # within which a press hits a particle
SAME_PLACE = 24  # nearer dots share a label
SHORTEST_ARROW = 12
LONGEST_CLICK = 3  # a drag is longer
ZOOM_STEP = 1.25
SHIFT, CONTROL = 0x1, 0x4  # of an event's state
LAYERS = ("path", "box", "dot", "label", "message")  # what lies over the image, from below


class ParticleCanvas(Screen):
    """Shows an image and an `EditorState`'s particles over it.

    actions: what the mouse does goes to its methods; unit: a pixel of a screen of 96 dots per inch, in pixels.
    """

    def __init__(self, parent, actions, unit):
        super().__init__(parent, round(500 * unit), takefocus=1)
        self.actions, self.unit = actions, unit
        self.state, self.message = None, ""
        self._shapes = {}  # what is drawn over the image: its tag -> what it looks like
        self._drag = None  # of the pressed button: where it was pressed, and what is being done
        self.bind("<Button-1>", self._press)
        self.bind("<Double-Button-1>", self._press_twice)
        self.bind("<B1-Motion>", self._move)
        self.bind("<ButtonRelease-1>", self._release)
        self.bind("<Button-2>", self._start_panning)
        self.bind("<B2-Motion>", self._pan)
        for prefix, turned in {
            "": actions.wheel_scale,
            "Alt-": actions.wheel_depth,
            "Control-": self.zoom_by,
        }.items():
            bind_wheel(self, turned, prefix)

    # ------------------------------------------------------------------------------------------------------- drawing

    def show(self, state, image, message=""):
        """Show a state and the image that belongs to it, or a message in the middle."""
        self.state, self.message = state, message
        self.show_image(image)
        self.draw_particles()

    def draw(self):
        super().draw()
        self.draw_particles()

    def draw_particles(self):
        """Draw what lies over the image, as far as it has changed."""
        shapes = dict(self._shapes_over())
        for tag, shape in self._shapes.items():
            if shapes.get(tag) != shape:
                self.delete(tag)
        for tag, (draw, *look) in shapes.items():
            if self._shapes.get(tag) != (draw, *look):
                draw(tag, *look)
        self._shapes = shapes
        for layer in LAYERS:
            self.tag_raise(layer)

    def _shapes_over(self):
        """Yields a tag and a tuple for each shape: the function that draws it, and what it draws."""
        if self.message:
            yield "the-message", (self._draw_message, self.message, self.size)
        if self.state is None or self.image is None or not self.state.shows_handles:
            return
        particles, time, selection = self.state.particles, self.state.time, self.state.selection
        visible = (particles.obj_on[0, time] > VISIBLE).tolist()
        places = particles.z[0].cpu().tolist()  # [T][K][2]
        sides = particles.z_scale[0, time].sigmoid().tolist()
        points = [self.to_canvas(*place) for place in places[time]]
        colors = [hex_color(color) for color in byte_colors(len(visible))]
        for k in sorted(range(len(visible)), key=lambda k: (k in selection, visible[k])):
            is_selected = k in selection
            if len(places) > 1 and (visible[k] or is_selected):
                path = tuple(self.to_canvas(*frame[k]) for frame in places)
                yield f"path-{k}", (self._draw_path, path, colors[k], is_selected)
            if is_selected:
                half = tuple(side * self._frame()[0] / 2 for side in sides[k])
                yield f"box-{k}", (self._draw_box, points[k], half, colors[k])
            yield f"dot-{k}", (self._draw_dot, points[k], colors[k], visible[k], is_selected)
        for group in at_one_place(points, SAME_PLACE * self.unit):
            text = ",".join(map(str, group))
            yield f"label-{group[0]}", (self._draw_label, points[group[0]], text)

    def _draw_message(self, tag, text, size):
        options = {"fill": "white", "width": 0.9 * size[0], "justify": "center", "tags": ("message", tag)}
        self.create_text(size[0] / 2, size[1] / 2, text=text, **options)

    def _draw_path(self, tag, points, color, is_selected):
        """A line through the points, an arrow at the end of each part that is long enough to have one."""
        width = (3 if is_selected else 1.5) * self.unit
        self.create_line(*points, fill="black", width=width + 2 * self.unit, tags=("path", tag))
        self.create_line(*points, fill=color, width=width, tags=("path", tag))
        shape = tuple(size * self.unit for size in (8, 9, 4))
        for start, end in itertools.pairwise(points):
            if math.dist(start, end) >= SHORTEST_ARROW * self.unit:
                options = {"arrow": "last", "arrowshape": shape, "width": width}
                self.create_line(*start, *end, fill=color, tags=("path", tag), **options)

    def _draw_box(self, tag, point, half, color):
        (x, y), (dy, dx) = point, half
        for outline, width in (("black", 3), (color, 1)):
            box = (x - dx, y - dy, x + dx, y + dy)
            self.create_rectangle(*box, outline=outline, width=width * self.unit, tags=("box", tag))

    def _draw_dot(self, tag, point, color, is_visible, is_selected):
        (x, y), radius = point, RADIUS * self.unit * (1 if is_visible else 0.6)
        rim, width = ("white", 3) if is_selected else ("black", 1.5)
        oval = (x - radius, y - radius, x + radius, y + radius)
        fill = color if is_visible else ""
        outline = rim if is_visible else color
        self.create_oval(*oval, fill=fill, outline=outline, width=width * self.unit, tags=("dot", tag))

    def _draw_label(self, tag, point, text):
        (x, y), offset = point, (RADIUS + 3) * self.unit
        for dx, dy, fill in ((-1, 0, "black"), (1, 0, "black"), (0, -1, "black"), (0, 1, "black"), (0, 0, "white")):
            place = (x + offset + dx * self.unit, y - offset / 2 + dy * self.unit)
            self.create_text(*place, text=text, anchor="w", fill=fill, font="TkHeadingFont", tags=("label", tag))

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

    def zoom_by(self, turns):
        """Zoom in by so many steps, or out."""
        self.set_zoom(self.zoom * ZOOM_STEP**turns)

    def _start_panning(self, event):
        self._pan_from = (event.x, event.y, *self._middle)

    def _pan(self, event):
        x, y, *middle = self._pan_from
        side, _, _ = self._frame()
        self.look_at(middle[0] - (event.x - x) / side, middle[1] - (event.y - y) / side)


def bind_wheel(widget, turned, prefix=""):
    """Call turned(1) for a turn of the wheel up over a widget, turned(-1) for one down, and nothing else. prefix: keys
    that are held, such as "Alt-"."""

    def turn(direction):
        turned(direction)
        return "break"

    widget.bind(f"<{prefix}MouseWheel>", lambda event: turn(1 if event.delta > 0 else -1))
    widget.bind(f"<{prefix}Button-4>", lambda event: turn(1))
    widget.bind(f"<{prefix}Button-5>", lambda event: turn(-1))
