"""The panel of the selected particles: the decoded glimpse, sliders, and the appearances to choose from."""

import tkinter as tk
from tkinter import ttk

import cv2
import torch
from ttkwidgets import TickScale

from editor.pictures import hex_colors, over_checkers, ppm

GLIMPSE, THUMBNAIL, GAP, COLUMNS = 112, 38, 4, 6  # in units of `unit` pixels
LARGEST_SIDE = 100  # per cent


class ParticlePanel(ttk.Frame):
    """Shows an `EditorState`'s selection. Sliders and pictures call `actions`."""

    def __init__(self, parent, actions, unit):
        super().__init__(parent, padding=round(8 * unit))
        self.actions, self.unit = actions, unit
        self.glimpses = None
        self._is_setting, self._is_held = False, False
        self._state = None
        # What is written into it must not change its width: the picture beside it would move.
        width = round((COLUMNS * (THUMBNAIL + GAP) + GAP) * unit)
        ttk.Frame(self, width=width).pack()
        self.title = ttk.Label(self, font="TkHeadingFont", wraplength=width)
        self.title.pack(anchor="w")
        self._glimpse = tk.PhotoImage(master=self)
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
        background = ttk.Style(self).lookup("TFrame", "background")
        self.gallery = tk.Canvas(self, highlightthickness=0, width=width, height=1, background=background)
        self.gallery.pack(anchor="w", pady=round(2 * unit))
        self.gallery.bind("<Button-1>", self._choose)
        self._thumbnails = []
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
        self.sliders[name] = slider

    # ------------------------------------------------------------------------------------------------------- showing

    def show(self, state):
        """Show a state's selection (None: nothing)."""
        chosen = state.selection if state is not None else ()
        self._state = state
        if not chosen:
            self.title["text"] = "Press a particle"
        else:
            numbers = ", ".join(map(str, chosen))
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
        self.glimpses = glimpses
        self.show_glimpse()
        self.gallery.delete("all")
        self._thumbnails = []
        if glimpses is None:
            return
        side, step = round(THUMBNAIL * self.unit), round((THUMBNAIL + GAP) * self.unit)
        for k, color in enumerate(hex_colors(len(glimpses))):
            picture = cv2.resize(over_checkers(glimpses[k]), (side, side), interpolation=cv2.INTER_LINEAR)
            photo = tk.PhotoImage(master=self, data=ppm(picture))
            x, y = k % COLUMNS * step, k // COLUMNS * step
            self.gallery.create_image(x, y, image=photo, anchor="nw")
            self.gallery.create_rectangle(x, y, x + side - 1, y + side - 1, outline=color, width=2 * self.unit)
            place = (x + 4 * self.unit, y + side - 2 * self.unit)
            self.gallery.create_text(*place, text=k, anchor="sw", fill="white", font="TkSmallCaptionFont")
            self._thumbnails.append(photo)
        self.gallery["height"] = (len(glimpses) + COLUMNS - 1) // COLUMNS * step

    def show_glimpse(self):
        """Show the glimpse of the particle that was selected first."""
        side = round(GLIMPSE * self.unit)
        chosen = self._state.selection if self._state is not None else ()
        if not chosen or self.glimpses is None:
            self._glimpse.blank()
            self._glimpse.configure(width=side, height=side)
            return
        picture = over_checkers(self.glimpses[chosen[0]])
        self._glimpse.configure(data=ppm(cv2.resize(picture, (side, side), interpolation=cv2.INTER_LINEAR)))

    # ------------------------------------------------------------------------------------------------------- sliding

    def _hold(self):
        self._is_held = True

    def _slide(self, name):
        if self._is_setting or self._state is None or not self._state.selection:
            return
        self._write_numbers()
        self.actions.slide(name, self.values[name].get())
        if not self._is_held:  # by the keyboard
            self.actions.drop()

    def _let_go(self):
        if self._is_held:
            self._is_held = False
            self.actions.drop()

    def _choose(self, event):
        step = (THUMBNAIL + GAP) * self.unit
        k = int(event.y // step) * COLUMNS + int(event.x // step)
        if self.glimpses is not None and k < len(self.glimpses) and event.x < COLUMNS * step:
            self.actions.take_appearance(k)
