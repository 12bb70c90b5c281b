"""The window that plays a prediction beside the one that was edited."""

import tkinter as tk
from tkinter import ttk

from editor.pictures import to_bytes
from editor.screen import Screen
from what_if import draw_particles

SIDE, LEAST_SIDE, GAP = 300, 96, 8  # in units of `unit` pixels
MILLISECONDS = 80


class Player(tk.Toplevel):
    """Plays videos [T, 3, H, W] beside each other, over and over.

    videos: a list of (name, frames, `Particles` [T, ...] or None); frames from `seen` on are predicted; export: called
    with this window by the button.
    """

    def __init__(self, parent, videos, seen, unit, export):
        super().__init__(parent)
        self.title("Prediction")
        self.unit, self.seen, self.videos = unit, seen, videos
        self.length = max(len(frames) for _, frames, _ in videos)
        self.frame, self.is_playing, self._timer = 0, True, None
        self.shows_particles = tk.BooleanVar(self, False)
        self._screens = []
        pad = round(GAP * unit)
        row = ttk.Frame(self, padding=pad)
        row.pack(fill="both", expand=True)
        for column, (name, _, _) in enumerate(videos):
            ttk.Label(row, text=name, font="TkHeadingFont").grid(row=0, column=column)
            screen = Screen(row, round(SIDE * unit))
            screen.grid(row=1, column=column, sticky="nsew", padx=pad // 2)
            row.columnconfigure(column, weight=1, minsize=LEAST_SIDE * unit)
            self._screens.append(screen)
        row.rowconfigure(1, weight=1)
        controls = ttk.Frame(self, padding=(pad, 0, pad, pad))
        controls.pack(fill="x")
        self.play_button = ttk.Button(controls, text="Pause", command=self.toggle, takefocus=0, width=7)
        self.play_button.pack(side="left")
        self.slider = ttk.Scale(controls, from_=0, to=self.length - 1, command=self._slide, takefocus=0)
        self.slider.pack(side="left", fill="x", expand=True, padx=pad)
        self.label = ttk.Label(controls, width=24)
        self.label.pack(side="left")
        ttk.Checkbutton(
            controls, text="particles", variable=self.shows_particles, command=self._refresh, takefocus=0
        ).pack(side="left")
        ttk.Button(controls, text="Export...", command=lambda: export(self), takefocus=0).pack(
            side="left", padx=(pad, 0)
        )
        self.bind("<space>", lambda event: self.toggle())
        self.bind("<Escape>", lambda event: self.destroy())
        self.bind("<Home>", lambda event: self.pause_at(0))
        self.bind("<End>", lambda event: self.pause_at(self.length - 1))
        self.bind("<Left>", lambda event: self.pause_at(self.frame - 1))
        self.bind("<Right>", lambda event: self.pause_at(self.frame + 1))
        self.focus_set()
        self._tick()

    def show(self, frame):
        """Show one frame of all videos; of one that is shorter, nothing."""
        self.frame = min(max(frame, 0), self.length - 1)
        for screen, (_, frames, particles) in zip(self._screens, self.videos, strict=True):
            if self.frame >= len(frames):
                screen.show_image(None)
                continue
            images = frames[self.frame : self.frame + 1]
            if particles is not None and self.shows_particles.get():
                images = draw_particles(images, particles.map(lambda x: x[self.frame : self.frame + 1]))
            screen.show_image(to_bytes(images[0]))
        what = "seen" if self.frame < self.seen else "predicted"
        self.label["text"] = f"frame {self.frame} of {self.length - 1}, {what}"

    def _refresh(self):
        self.show(self.frame)

    def _slide(self, value):
        self.pause_at(round(float(value)))

    def pause_at(self, frame):
        """Stop, and show a frame."""
        self._set_playing(False)
        self.show(frame)
        self._move_slider()

    def _move_slider(self):
        self.slider.configure(value=self.frame)

    def toggle(self):
        """Play, or stop."""
        self._set_playing(not self.is_playing)

    def _set_playing(self, is_playing):
        self.is_playing = is_playing
        self.play_button["text"] = "Pause" if is_playing else "Play"

    def _tick(self):
        if self.is_playing:
            self.show((self.frame + 1) % self.length if self._timer else 0)
            self._move_slider()
        self._timer = self.after(MILLISECONDS, self._tick)

    def destroy(self):
        if self._timer is not None:
            self.after_cancel(self._timer)
        super().destroy()
        # Pictures and variables are deleted here, in the window's thread, not by whatever thread collects garbage next.
        self._screens, self.shows_particles = [], None
