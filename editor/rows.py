"""The rows of controls around the picture. Each shows what it is told; what is pressed goes to the window's parts."""

import tkinter as tk
from tkinter import ttk

from ttkwidgets.frames import Tooltip

from editor.canvas import bind_wheel


class Row(ttk.Frame):
    """A row of labels, boxes and buttons, from left to right. window: an `EditorWindow`."""

    def __init__(self, parent, window, **options):
        super().__init__(parent, **options)
        self.window, self.unit, self.pad = window, window.unit, round(6 * window.unit)

    def add_label(self, text):
        label = ttk.Label(self, text=text)
        label.pack(side="left")
        return label

    def add_box(self, text, width, chosen):
        """A box of names, at least so many letters wide; chosen(name) is called for the one that is chosen."""
        self.add_label(text)
        box = ttk.Combobox(self, state="readonly", width=width)
        # It takes what room there is: in a small window the buttons after it must not be cut off.
        box.pack(side="left", fill="x", expand=True, padx=(round(3 * self.unit), round(10 * self.unit)))

        def choose(event):
            self.window.canvas.focus_set()
            chosen(box.get())

        box.bind("<<ComboboxSelected>>", choose)
        bind_wheel(box, lambda turns: None)  # it would open one model after the other
        return box

    def add_button(self, text, command, hint):
        button = ttk.Button(self, text=text, command=command, takefocus=0)
        button.pack(side="left", padx=round(self.unit))
        Tooltip(button, headertext=text, text=hint, timeout=0.8, width=round(220 * self.unit))
        return button

    def add_check(self, text, value, command=None):
        """A box to mark; returns its variable."""
        variable = tk.BooleanVar(self, value)
        options = {} if command is None else {"command": command}
        check = ttk.Checkbutton(self, text=text, variable=variable, takefocus=0, **options)
        check.pack(side="left", padx=self.pad // 2)
        return variable


class SourceRow(Row):
    """What is shown: the model, and the example or the seed."""

    def __init__(self, parent, window):
        super().__init__(parent, window)
        documents = window.documents
        self.model_box = self.add_box("Model", 12, documents.choose_model)
        self.example_box = self.add_box("Example", 10, documents.choose_example)
        self.generate_button = self.add_button("Generate", documents.generate, "Sample the first frames anew")
        self.add_label("seed")
        self.seed_box = ttk.Spinbox(self, from_=0, to=2**32 - 1, width=6)
        self.seed_box.set(0)
        self.seed_box.bind("<Return>", lambda event: documents.generate())
        self.seed_box.pack(side="left", padx=(self.pad // 2, self.pad))
        self.add_button("Open...", documents.ask_clip, "An image or a video of your own")
        self.add_button("Help", window.show_help, "F1")

    def show(self, documents, state):
        """Show the names of the models and examples, and which of them is open."""
        loaded = documents.loaded
        can_generate = loaded is not None and loaded.diffusion is not None
        self.model_box.configure(values=list(documents.models))
        self.model_box.set("" if loaded is None else loaded.path.name)
        self.example_box.configure(values=list(documents.examples))
        self.example_box.set("" if state is None else documents.example_of(state.scene))
        set_enabled(self.example_box, bool(documents.examples))
        set_enabled(self.generate_button, can_generate)
        set_enabled(self.seed_box, can_generate)


class TimeRow(Row):
    """The frame that is shown, and whether it alone is edited."""

    def __init__(self, parent, window):
        super().__init__(parent, window)
        viewing = window.viewing
        self.label = ttk.Label(self, width=14)
        self.label.pack(side="left")
        self.slider = ttk.Scale(self, command=lambda value: viewing.show_time(round(float(value))), takefocus=0)
        self.slider.pack(side="left", fill="x", expand=True, padx=self.pad)
        bind_wheel(self.slider, viewing.step_time)
        self.is_whole = tk.BooleanVar(self, False)
        for text, value in (("this frame", False), ("all frames", True)):
            options = {"value": value, "variable": self.is_whole, "takefocus": 0}
            ttk.Radiobutton(
                self, text=text, command=lambda: window.editing.set_whole(self.is_whole.get()), **options
            ).pack(side="left", padx=self.pad // 2)

    def show(self, state):
        """Show the time, of a video."""
        if state is None or not state.scene.loaded.is_dynamic:
            self.grid_remove()
            return
        self.grid()
        self.slider.configure(to=state.scene.num_frames - 1, value=state.time)
        self.label["text"] = f"Frame {state.time} of {state.scene.num_frames - 1}"
        self.is_whole.set(state.is_whole)


class ButtonRow(Row):
    """What is done with the picture and the edits."""

    def __init__(self, parent, window):
        super().__init__(parent, window)
        editing, viewing = window.editing, window.viewing
        self.update_button = self.add_button("Update", viewing.update_picture, "Decode the particles (U)")
        self.animates = self.add_check("animate", False)
        self.is_live = self.add_check("live", True)
        self.reset_button = self.add_button("Reset", editing.reset, "Take all edits back")
        self.undo_button = self.add_button("Undo", editing.undo, "Ctrl-Z")
        self.redo_button = self.add_button("Redo", editing.redo, "Ctrl-Shift-Z")
        self.hides = self.add_check("hide particles", False, lambda: viewing.set_handles(not self.hides.get()))
        self.play_button = self.add_button("Play", viewing.play, "Predict and play (Space)")

    def show(self, state):
        """Show what can be done."""
        set_enabled(self.update_button, state is not None)
        set_enabled(self.reset_button, state is not None and bool(state.edits))
        set_enabled(self.undo_button, state is not None and state.can_undo)
        set_enabled(self.redo_button, state is not None and state.can_redo)
        set_enabled(self.play_button, state is not None and state.scene.loaded.is_dynamic)
        self.hides.set(state is not None and not state.shows_handles)


class StatusRow(ttk.Frame):
    """What was done or went wrong, the progress of what takes long, and the command that does the same."""

    def __init__(self, parent, window):
        super().__init__(parent)
        unit, pad = window.unit, round(6 * window.unit)
        self.columnconfigure(0, weight=1)
        # A line that is too long is broken; it must not make the window wider.
        self.message = ttk.Label(self, width=1)
        self.message.grid(row=0, column=0, sticky="ew")
        self.message.bind("<Configure>", lambda event: self.message.configure(wraplength=event.width))
        self.progress = ttk.Progressbar(self, length=round(140 * unit), maximum=1.0)
        self.progress.grid(row=0, column=1, padx=pad)
        self.cancel_button = ttk.Button(self, text="Cancel", command=window.cancel, takefocus=0)
        self.cancel_button.grid(row=0, column=2)
        self.command = tk.StringVar(self)
        entry = ttk.Entry(self, textvariable=self.command, state="readonly", font="TkFixedFont")
        entry.grid(row=1, column=0, columnspan=2, sticky="ew", pady=(pad // 2, 0), padx=(0, pad))
        self.copy_button = ttk.Button(self, text="Copy", command=window.copy_command, takefocus=0)
        self.copy_button.grid(row=1, column=2, pady=(pad // 2, 0))
        self._is_busy = False

    def show(self, state):
        """Show the command."""
        self.command.set("" if state is None else state.command())
        set_enabled(self.copy_button, state is not None)

    def say(self, text, is_error=False):
        """Show a line."""
        self.message.configure(text=text, style="Error.TLabel" if is_error else "TLabel")

    def show_busy(self, is_busy):
        """Show that something takes time, until it says how far it is, or that nothing does any more."""
        if is_busy != self._is_busy:
            self._is_busy = is_busy
            set_enabled(self.cancel_button, is_busy)
            self.progress.configure(mode="indeterminate" if is_busy else "determinate", value=0)
        elif is_busy and str(self.progress["mode"]) == "indeterminate":
            self.progress.step(0.02)

    def show_progress(self, share):
        """Show the share that is done, 0 to 1."""
        self.progress.configure(mode="determinate", value=share)


def set_enabled(widget, is_enabled):
    widget.state(["!disabled" if is_enabled else "disabled"])
