"""What the editor says about itself."""

import tkinter as tk
from tkinter import ttk

INSTRUCTIONS = """\
Choose a model and an example, or open an image, a folder of frames, a video or a run directory of your own. The \
picture shows what the model makes of its particles: the numbered dots. Of a video you see one frame at a time; the \
lines are the particles' paths through the frames that the model sees.

Press a particle to select it, Shift-press for several, press twice for all particles of one object, or draw a \
rectangle around some. Drag them. The panel on the right sets their scale, depth and transparency, and gives them \
another's appearance; all that are selected change together.

"This frame" moves and scales particles in the frame that is shown; the frames between it and the first, the last, or \
others that were edited are interpolated: motion changes. "All frames" changes every frame alike: motion is kept. \
Transparency and appearance always hold in all frames.

Update decodes anew, with "animate" in ten steps from the picture of the last update; "live" decodes while you drag. \
Play predicts how the original and the edited video go on, side by side. Reset takes all edits back.

An edit is a file: save it, open it again, or replay it with the command at the bottom.

Only small changes stay within what the model has learned: a particle that is moved far, made much larger or given a \
foreign appearance may be drawn, and predicted, in ways that mean nothing.
"""

KEYS = (
    ("drag", "move the selected particles"),
    ("drag beside them", "select with a rectangle (Shift: more)"),
    ("double press", "select a whole object"),
    ("arrows", "nudge by a pixel (Shift: by ten)"),
    ("wheel", "scale the selected (Alt: depth)"),
    ("Ctrl-wheel, +, -, 0", "zoom, and back; drag the middle button to pan"),
    ("Ctrl-A, Escape", "select all, none"),
    ("Ctrl-D", "take over the appearance of the particle pressed next"),
    ("Delete", "hide the selected"),
    ("Ctrl-Z, Ctrl-Shift-Z", "undo, redo"),
    ("Home, End", "first, last frame"),
    ("Page Up, Page Down", "previous, next frame"),
    ("H", "hide the handles"),
    ("U", "update"),
    ("Space", "play"),
    ("Ctrl-O, Ctrl-S", "open, save edits (Ctrl-Shift-S: as)"),
    ("Ctrl-E", "export"),
    ("Ctrl-Q", "quit"),
    ("F1", "this"),
)


class HelpWindow(tk.Toplevel):
    """Shows the instructions and the keys, until Escape."""

    def __init__(self, parent, unit):
        super().__init__(parent)
        self.title("Help")
        pad = round(12 * unit)
        body = ttk.Frame(self, padding=pad)
        body.pack(fill="both", expand=True)
        ttk.Label(body, text=INSTRUCTIONS, wraplength=round(480 * unit), justify="left").grid(
            row=0, column=0, rowspan=len(KEYS), sticky="n", padx=(0, 2 * pad)
        )
        for row, (key, meaning) in enumerate(KEYS):
            ttk.Label(body, text=key, font="TkHeadingFont").grid(row=row, column=1, sticky="w", padx=(0, pad))
            ttk.Label(body, text=meaning).grid(row=row, column=2, sticky="w")
        self.bind("<Escape>", lambda event: self.destroy())
        self.focus_set()
