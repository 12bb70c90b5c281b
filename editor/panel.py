"""The panel of the selected particles: the decoded glimpse, sliders, and the appearances to choose from."""

import math
import tkinter as tk
from tkinter import ttk

import torch
from ttkwidgets import TickScale

from editor.canvas import bind_wheel
from editor.pictures import gallery, over_checkers, ppm

GLIMPSE, THUMBNAIL, GAP, COLUMNS = 112, 38, 4, 6  # in units of `unit` pixels
LARGEST_SIDE = 100  # per cent
MOST_NUMBERS = 8  # of the selected particles that are listed
TURNS = 50  # of the wheel, from a slider's one end to the other


class ParticlePanel(ttk.Frame):
    """Shows an `EditorState`'s selection. Sliders and pictures call `actions`."""

    def __init__(self, parent, actions, unit):
        super().__init__(parent, padding=round(8 * unit))
        self.actions, self.unit = actions, unit
        self.glimpses = None
        self._is_setting, self._is_held = False, False
        self._state, self._shown_glimpse = None, None
        # What is written into it must not change its width: the picture beside it would move.
        self._width = round((COLUMNS * (THUMBNAIL + GAP) + GAP) * unit)
        ttk.Frame(self, width=self._width).pack()
        self.title = ttk.Label(self, font="TkHeadingFont")
        self.title.pack(anchor="w")
        self._glimpse_side = round(GLIMPSE * unit)
        self._glimpse = tk.PhotoImage(master=self, width=self._glimpse_side, height=self._glimpse_side)
        self.picture = ttk.Label(self, image=self._glimpse)
        self.picture.pack(pady=round(6 * unit))
        self.values, self.sliders, self.numbers = {}, {}, {}
        for name, text, low, high in (
            ("scale", "Scale, % of the image", 1, LARGEST_SIDE),
            ("depth", "Depth: front ... back", -5, 5),
            ("transparency", "Transparency: 0 is invisible", 0, 1),
        ):
            self._add_slider(name, text, low, high)
        ttk.Label(self, text="Take over the appearance of").pack(anchor="w", pady=(round(8 * unit), 0))
        color = ttk.Style(self).lookup("TFrame", "background")
        self._background = [value // 256 for value in self.winfo_rgb(color)]
        self.gallery = tk.Canvas(self, highlightthickness=0, width=self._width, height=1, background=color)
        self.gallery.pack(anchor="w", pady=round(2 * unit))
        self.gallery.bind("<Button-1>", self._choose)
        self._pictures = tk.PhotoImage(master=self)
        self.gallery.create_image(0, 0, image=self._pictures, anchor="nw")
        buttons = ttk.Frame(self)
        buttons.pack(fill="x", pady=round(6 * unit))
        self.hide_button = ttk.Button(buttons, text="Hide (Delete)", command=actions.remove, takefocus=0)
        self.hide_button.pack(side="left")
        self.object_button = ttk.Button(buttons, text="Whole object", command=actions.select_object, takefocus=0)
        self.object_button.pack(side="left", padx=round(4 * unit))

    def _add_slider(self, name, text, low, high):
        line = ttk.Frame(self)
        line.pack(fill="x", pady=(round(4 * self.unit), 0))
        ttk.Label(line, text=text).pack(side="left")
        self.numbers[name] = ttk.Label(line)
        self.numbers[name].pack(side="right")
        variable = self.values[name] = tk.DoubleVar(self)
        slider = TickScale(
            self,
            from_=low,
            to=high,
            variable=variable,
            orient="horizontal",
            showvalue=False,
            command=lambda value, name=name: self._slide(name),
        )
        slider.pack(fill="x")
        scale = slider.scale
        scale.bind("<Button-1>", lambda event: self._hold(), add=True)
        scale.bind("<ButtonRelease-1>", lambda event: self._let_go(), add=True)
        bind_wheel(scale, lambda turns: self._turn(name, turns))
        self.sliders[name] = slider

    # ------------------------------------------------------------------------------------------------------- showing

    def show(self, state):
        """Show a state's selection (None: nothing)."""
        chosen = state.selection if state is not None else ()
        self._state = state
        if not chosen:
            self.title["text"] = "Press a particle"
        else:
            numbers = ", ".join(map(str, chosen[:MOST_NUMBERS])) + (", ..." if len(chosen) > MOST_NUMBERS else "")
            self.title["text"] = f"Particle {numbers}" if len(chosen) == 1 else f"Particles {numbers}"
        for slider in self.sliders.values():
            slider.scale.state(["!disabled" if chosen else "disabled"])
        for button in (self.hide_button, self.object_button):
            button.state(["!disabled" if chosen else "disabled"])
        if chosen and not self._is_held:
            self._set(state, chosen[0])
        elif not chosen:
            for label in self.numbers.values():
                label["text"] = ""
        self.show_glimpse()

    def _set(self, state, k):
        shown = state.shown
        depth = shown.z_depth[0, k, 0].item()
        depths = state.scene.particles.z_depth
        self.sliders["depth"].scale.configure(
            from_=min(depths.min().item() - 5, depth), to=max(depths.max().item() + 5, depth)
        )
        values = {"scale": 100 * state.side(k), "depth": depth, "transparency": shown.obj_on[0, k].item()}
        self._is_setting = True
        for name, value in values.items():
            self.values[name].set(value)
        self._is_setting = False
        self._write_numbers()

    def _write_numbers(self):
        for name, label in self.numbers.items():
            label["text"] = f"{self.values[name].get():.{1 if name == 'scale' else 2}f}"

    def show_glimpses(self, glimpses):
        """Show the decoded glimpses [K, 4, g, g] of all particles (None: of none)."""
        if glimpses is not None and self.glimpses is not None and torch.equal(glimpses, self.glimpses):
            return  # as while a particle is dragged
        self.glimpses, self._shown_glimpse = glimpses, None
        self.show_glimpse()
        self.gallery.delete("number")
        if glimpses is None:
            self._pictures.blank()
            return
        count, gap = len(glimpses), round(GAP * self.unit)
        # Of many particles the pictures are smaller, so that all have room.
        self._columns = max(COLUMNS, math.ceil(math.sqrt(1.5 * count)))
        side = self._width // self._columns - gap
        rim = max(round(2 * self.unit * side / (THUMBNAIL * self.unit)), 1)
        sheet = gallery(over_checkers(glimpses, side), self._columns, gap, rim, self._background)
        self._pictures.configure(data=ppm(sheet))
        self._step = side + gap
        for k in range(count):
            x, y = k % self._columns * self._step + 2 * rim, k // self._columns * self._step + side - rim
            for dx, dy, fill in ((1, 1, "black"), (0, 0, "white")):
                options = {"anchor": "sw", "fill": fill, "font": "TkSmallCaptionFont", "tags": "number"}
                self.gallery.create_text(x + dx, y + dy, text=k, **options)
        self.gallery["height"] = len(sheet)

    def show_glimpse(self):
        """Show the glimpse of the particle that was selected first."""
        chosen = self._state.selection[:1] if self._state is not None and self.glimpses is not None else ()
        if chosen == self._shown_glimpse:
            return
        self._shown_glimpse = chosen
        if chosen:
            self._glimpse.configure(data=ppm(over_checkers(self.glimpses[list(chosen)], self._glimpse_side)[0]))
        else:
            self._glimpse.blank()

    # ------------------------------------------------------------------------------------------------------- sliding

    def _hold(self):
        self._is_held = True

    def _slide(self, name):
        if self._is_setting or self._state is None or not self._state.selection:
            return
        self._write_numbers()
        self.actions.slide(name, self.values[name].get())
        if not self._is_held:  # by the keyboard or the wheel
            self.actions.drop(name)

    def _turn(self, name, turns):
        if not self._state or not self._state.selection:
            return
        scale = self.sliders[name].scale
        low, high = float(scale["from"]), float(scale["to"])
        self.values[name].set(min(max(self.values[name].get() + turns * (high - low) / TURNS, low), high))
        self._slide(name)

    def _let_go(self):
        if self._is_held:
            self._is_held = False
            self.actions.drop()

    def _choose(self, event):
        if self.glimpses is None:
            return
        column, k = event.x // self._step, event.y // self._step * self._columns + event.x // self._step
        if column < self._columns and k < len(self.glimpses):
            self.actions.take_appearance(k)
