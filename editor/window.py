"""The editor's window: it shows an `EditorState`. What is done to that is in editing.py, what is seen of it in
viewing.py, what is opened and saved in documents.py; workers do what takes time."""

import gc
import traceback
from pathlib import Path

from ttkthemes import ThemedTk

from editor.canvas import ParticleCanvas
from editor.commands import bind_keys, menu_bar
from editor.documents import TITLE, Documents
from editor.editing import Editing
from editor.help import HelpWindow
from editor.panel import ParticlePanel
from editor.rows import ButtonRow, SourceRow, StatusRow, TimeRow
from editor.theme import THEME, scale_contents
from editor.viewing import Viewing
from editor.worker import Worker
from utils.errors import UserError

POLL = 15  # milliseconds
SIZE = 1040, 700  # of the window, in units of `unit` pixels
SMALLEST = 760, 560


class EditorWindow(ThemedTk):
    """The window.

    checkpoints, assets: folders of models and examples; device: of the models; scale: size of the contents (None: by
    the screen's dots per inch).

    Attributes:
        state: the `EditorState` that is shown, or None; image: its picture, uint8 [H, W, 3], or None.
        documents, editing, viewing: what can be done.
        live, slow: the workers of pictures while something is dragged, and of what takes longer.
        unit: a pixel of a screen of 96 dots per inch, in pixels.
    """

    def __init__(self, checkpoints, assets, device, scale=None):
        super().__init__(theme=THEME, themebg=True)
        self.title(TITLE)
        self.unit = scale_contents(self, scale)
        self.state, self.help_window = None, None
        self.live, self.slow = Worker(), Worker()
        self.documents = Documents(self, checkpoints, assets, device)
        self.editing, self.viewing = Editing(self), Viewing(self)
        self._build()
        bind_keys(self)
        self.protocol("WM_DELETE_WINDOW", self.close)
        self.show_scene(None)
        if not self.documents.models:
            named = "Folders are named dlp-DATASET, ddlp-DATASET or diffuse-ddlp-DATASET."
            text = f"No models in {checkpoints}.\n\n{named}\nOpen a run directory: File, Open run directory."
            self.canvas.show(None, None, text)
            self.say(f"no models in {checkpoints}", is_error=True)
        self._poll()

    def _build(self):
        pad = round(6 * self.unit)
        self.configure(menu=menu_bar(self))
        self.columnconfigure(0, weight=1)
        self.rowconfigure(1, weight=1)
        self.source, self.canvas = SourceRow(self, self), ParticleCanvas(self, self.editing, self.unit)
        self.panel = ParticlePanel(self, self.editing, self.unit)
        self.times, self.buttons, self.status = TimeRow(self, self), ButtonRow(self, self), StatusRow(self, self)
        self.source.grid(row=0, column=0, columnspan=2, sticky="ew", padx=pad, pady=pad)
        self.canvas.grid(row=1, column=0, sticky="nsew", padx=(pad, 0))
        self.panel.grid(row=1, column=1, rowspan=2, sticky="ns")
        self.times.grid(row=2, column=0, sticky="ew", padx=pad, pady=(pad // 2, 0))
        self.buttons.grid(row=3, column=0, columnspan=2, sticky="ew", padx=pad, pady=(pad // 2, 0))
        self.status.grid(row=4, column=0, columnspan=2, sticky="ew", padx=pad, pady=pad)
        screen = self.winfo_screenwidth(), self.winfo_screenheight()
        size, smallest = (
            [min(round(length * self.unit), most) for length, most in zip(lengths, screen, strict=True)]
            for lengths in (SIZE, SMALLEST)
        )
        self.geometry(f"{size[0]}x{size[1]}")  # it does not change with what is written into it
        self.minsize(*smallest)

    def start(self, path=None):
        """Open a run directory or a file of edits, or else the first model."""
        if path is not None and Path(path).is_file():
            self.documents.open_edits(path)
        elif path is not None:
            self.documents.open_run_directory(path)
        elif self.documents.models:
            self.documents.choose_model(next(iter(self.documents.models)))

    # ------------------------------------------------------------------------------------------------------- showing

    @property
    def image(self):
        """The picture that is shown."""
        return self.canvas.image

    def say(self, text, is_error=False):
        """Show a line in the status bar."""
        self.status.say(text, is_error)

    def fail(self, error):
        """Show what went wrong."""
        self.say(str(error), is_error=True)

    def report_callback_exception(self, kind, value, trace):
        """tkinter calls this for an exception in a callback: a user's mistake is shown, any other printed too; Ctrl-C
        in the terminal closes the window."""
        if kind is KeyboardInterrupt:
            self.close()
            return
        self.fail(value if isinstance(value, UserError) else f"{kind.__name__}: {value}")
        if not isinstance(value, UserError):
            traceback.print_exception(kind, value, trace)

    def show_scene(self, state, message=""):
        """Show another `EditorState` (None: only a message)."""
        self.state = state
        self.editing.begin()
        self.panel.show_glimpses(None)
        self.canvas.set_zoom(1)
        self.canvas.show(state, None, message)
        self.show_state()
        self.viewing.begin()
        if state is not None:
            frames = f" in {state.scene.num_frames} frames" if state.scene.num_frames > 1 else ""
            self.say(state.scene.note or f"{state.scene.count} particles{frames}")
            if state.scene.seed is not None:
                self.source.seed_box.set(state.scene.seed)

    def show_state(self):
        """Show the state in every part of the window, but for the picture."""
        self.source.show(self.documents, self.state)
        for row in (self.times, self.buttons, self.status):
            row.show(self.state)
        self.show_selection()
        self.title(self._title())

    def show_selection(self):
        """Show where the particles are, and the selected ones."""
        self.canvas.draw_particles()
        self.panel.show(self.state)

    def show_image(self, image):
        """Show the picture, uint8 [H, W, 3]."""
        self.canvas.show_image(image)
        self.canvas.draw_particles()

    def _title(self):
        if self.state is None:
            return TITLE
        scene = self.state.scene
        source = f"seed {scene.seed}" if scene.video is None else scene.video
        return f"{'*' if self.state.is_modified else ''}{scene.loaded.path.name}, {source} - {TITLE}"

    def show_help(self):
        """Show the instructions and the keys."""
        if self.help_window is None or not self.help_window.winfo_exists():
            self.help_window = HelpWindow(self, self.unit)
        self.help_window.lift()

    def copy_command(self):
        """Put the command on the clipboard."""
        self.clipboard_clear()
        self.clipboard_append(self.status.command.get())
        self.say("the command is on the clipboard")

    # -------------------------------------------------------------------------------------------------------- working

    def _poll(self):
        self._timer = self.after(POLL, self._poll)
        self.live.poll()
        if not self.documents.is_asking:
            self.slow.poll()
        self.status.show_busy(bool(self.slow.keys))

    def do(self, key, function, done, failed=None):
        """Let the slow worker do something, with the bar."""
        self.slow.submit(key, function, done, failed or self.fail, self.status.show_progress)

    def cancel(self):
        """Stop what takes time."""
        if self.slow.keys:
            self.slow.cancel()
            self.documents.opening_failed()
            self.say("cancelled")

    # -------------------------------------------------------------------------------------------------------- closing

    def close(self):
        """Close the window, whatever is going on, unless edits are to be saved first."""
        if self.documents.may_close():
            self.destroy()

    def destroy(self):
        self.withdraw()  # what is running may take a moment to stop
        self.after_cancel(self._timer)
        self.viewing.stop_animation()
        self.editing.stop_pause()
        for worker in (self.live, self.slow):
            worker.close()
        super().destroy()
        # Pictures and variables are deleted in this thread, which alone may do that.
        self.__dict__ = {"tk": self.tk, "children": {}, "master": None}
        gc.collect()
