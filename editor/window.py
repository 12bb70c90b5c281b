"""The editor's window: it shows an `EditorState` and hands on what is done to it. Workers do what takes time."""

import gc
import tkinter as tk
import traceback
from functools import partial
from pathlib import Path
from tkinter import filedialog, font, messagebox, ttk

from ttkthemes import ThemedTk
from ttkwidgets.frames import Tooltip

from editor.canvas import ZOOM_STEP, ParticleCanvas
from editor.help import INSTRUCTIONS, KEYS
from editor.jobs import decode, decode_line, export_animation, export_picture, play
from editor.panel import ParticlePanel
from editor.player import Player
from editor.scene import dataset_of, find_examples, find_models, generate, open_clip, open_model
from editor.state import EditorState, in_between
from editor.worker import Worker
from rundir.edits import EditFile
from utils.animation import ANIMATION_FORMATS
from utils.errors import UserError

THEME, LARGE_THEME = "arc", "clam"  # the first is made of pictures of a fixed size, which are small on fine screens
FINE = 1.5  # pixels, of those of 96 dots per inch, from which the second is taken
POLL, ANIMATION_STEP, KEY_PAUSE = 15, 60, 600  # milliseconds
NUDGE, LARGE_NUDGE = 1, 10  # pixels
WHEEL_SCALE, WHEEL_DEPTH = 1.05, 0.1  # of a turn
TYPING = ("TEntry", "TCombobox", "TSpinbox", "TScale")  # widgets that have keys of their own
PRESSING = ("TButton", "TCheckbutton", "TRadiobutton")  # those of the space bar
EDIT_FILES = [("Edits", "*.json"), ("All files", "*")]
EXPORT_FILES = [("Animation", "*.gif"), ("Video", "*.mp4"), ("Picture", "*.png")]


class EditorWindow(ThemedTk):
    """The window.

    checkpoints, assets: folders of models and examples; device: of the models; scale: size of the contents (None: by
    the screen's dots per inch).
    """

    def __init__(self, checkpoints, assets, device, scale=None):
        super().__init__(theme=THEME, themebg=True)
        self.title("Particle editor")
        self.assets, self.device = assets, device
        self.models = find_models(checkpoints)
        self.loaded, self.state, self.image = None, None, None
        self._updated = None  # the particles [1, ...] of the picture of the last update
        self._compared = None  # the edits that were played last, and the `Comparison`
        self._path = None  # of the file that the edits were saved in
        self._slid = ()  # the edits that are being made by dragging
        self._gesture, self._gesture_timer, self._animation = 0, None, None
        self._takes_appearance = False
        self.player = None
        self.live, self.slow = Worker(), Worker()
        self._scale_contents(scale)
        self._build_menu()
        self._build()
        self._bind_keys()
        self.protocol("WM_DELETE_WINDOW", self.close)
        self.show_state()
        if not self.models:
            named = "Folders are named dlp-DATASET, ddlp-DATASET or diffuse-ddlp-DATASET."
            text = f"No models in {checkpoints}.\n\n{named}\nOpen a run directory: File, Open run directory."
            self.canvas.show(None, None, text)
            self.say(f"no models in {checkpoints}", is_error=True)
        self._poll()

    def start(self, path=None):
        """Open a run directory or a file of edits, or else the first model."""
        if path is not None and Path(path).is_file():
            self.open_edits(path)
        elif path is not None:
            self.open_run_directory(path)
        elif self.models:
            self.choose_model(next(iter(self.models)))

    # ------------------------------------------------------------------------------------------------------ building

    def _scale_contents(self, scale):
        # Screens say 97 dots where they mean 96.
        self.unit = min(max(round(self.winfo_fpixels("1i") / 96 * 4) / 4, 1), 4) if scale is None else scale
        self.tk.call("tk", "scaling", self.unit * 96 / 72)
        for name in font.names(self):
            named = font.nametofont(name, self)
            size = named.cget("size")
            # Sizes in pixels, below 0, are those of 96 dots per inch.
            named.configure(size=size if size > 0 else round(-size * 72 / 96))
        style = ttk.Style(self)
        style.configure("Error.TLabel", foreground="#c0392b")
        style.configure("TButton", width=-6)
        if self.unit >= FINE:
            self._scale_theme(style)
        self.option_add("*TCombobox*Listbox.font", "TkDefaultFont")

    def _scale_theme(self, style):
        self.set_theme(LARGE_THEME)
        self.configure(background=style.lookup("TFrame", "background"))
        style.configure("Horizontal.TScale", sliderlength=round(22 * self.unit), arrowsize=round(13 * self.unit))
        style.configure("Horizontal.TProgressbar", thickness=round(12 * self.unit))
        for kind in ("TCheckbutton", "TRadiobutton"):
            size, margin = round(11 * self.unit), [round(3 * self.unit)] * 4
            style.configure(kind, indicatorsize=size, indicatormargin=margin)
        for kind in ("TCombobox", "TSpinbox"):
            style.configure(kind, arrowsize=round(13 * self.unit))
        style.configure("TButton", width=-6, padding=round(3 * self.unit))

    def _build_menu(self):
        menu = tk.Menu(self)
        for name, entries in {
            "File": (
                ("Open image or video...", self.ask_clip, ""),
                ("Open folder of frames...", self.ask_folder, ""),
                ("Open run directory...", self.ask_run, ""),
                None,
                ("Open edits...", self.ask_edits, "Ctrl-O"),
                ("Save edits", self.save, "Ctrl-S"),
                ("Save edits as...", self.save_as, "Ctrl-Shift-S"),
                ("Export...", self.export, "Ctrl-E"),
                None,
                ("Quit", self.close, "Ctrl-Q"),
            ),
            "Edit": (
                ("Undo", self.undo, "Ctrl-Z"),
                ("Redo", self.redo, "Ctrl-Shift-Z"),
                ("Reset", self.reset, ""),
                None,
                ("Select all", self.select_all, "Ctrl-A"),
                ("Select whole object", self.select_object, "double press"),
                ("Take over an appearance", self.ask_appearance, "Ctrl-D"),
                ("Hide", self.remove, "Delete"),
            ),
            "View": (
                ("Hide particles", self.toggle_handles, "H"),
                ("Zoom in", lambda: self.zoom(1), "+"),
                ("Zoom out", lambda: self.zoom(-1), "-"),
                ("Whole picture", lambda: self.zoom(0), "0"),
                None,
                ("Play", self.play, "Space"),
            ),
            "Help": (("Instructions and keys", self.show_help, "F1"),),
        }.items():
            submenu = tk.Menu(menu, tearoff=False)
            for entry in entries:
                if entry is None:
                    submenu.add_separator()
                else:
                    submenu.add_command(label=entry[0], command=entry[1], accelerator=entry[2])
            menu.add_cascade(label=name, menu=submenu)
        self.configure(menu=menu)

    def _build(self):
        pad = round(6 * self.unit)
        self.columnconfigure(0, weight=1)
        self.rowconfigure(1, weight=1)
        top = ttk.Frame(self, padding=pad)
        top.grid(row=0, column=0, columnspan=2, sticky="ew")
        self.model_box = self._add_box(top, "Model", 22, lambda: self.choose_model(self.model_box.get()))
        self.model_box["values"] = list(self.models)
        self.example_box = self._add_box(top, "Example", 16, lambda: self.choose_example(self.example_box.get()))
        self.generate_button = self._add_button(top, "Generate", self.generate, "Sample the first frames anew")
        ttk.Label(top, text="seed").pack(side="left")
        self.seed_box = ttk.Spinbox(top, from_=0, to=2**32 - 1, width=6)
        self.seed_box.set(0)
        self.seed_box.pack(side="left", padx=(pad // 2, pad))
        self._add_button(top, "Open...", self.ask_clip, "An image or a video of your own")
        self._add_button(top, "Help", self.show_help, "F1")
        self.canvas = ParticleCanvas(self, self, self.unit)
        self.canvas.grid(row=1, column=0, sticky="nsew", padx=(pad, 0))
        self.panel = ParticlePanel(self, self, self.unit)
        self.panel.grid(row=1, column=1, rowspan=3, sticky="ns")
        self._build_time(pad)
        self._build_buttons(pad)
        self._build_status(pad)
        self.update_idletasks()
        self.minsize(*(min(wanted, screen) for wanted, screen in zip(self._wanted(), self._screen(), strict=True)))

    def _wanted(self):
        return self.winfo_reqwidth(), self.winfo_reqheight()

    def _screen(self):
        return self.winfo_screenwidth(), self.winfo_screenheight()

    def _add_box(self, parent, text, width, command):
        ttk.Label(parent, text=text).pack(side="left")
        box = ttk.Combobox(parent, state="readonly", width=width)
        box.pack(side="left", padx=(round(3 * self.unit), round(10 * self.unit)))
        box.bind("<<ComboboxSelected>>", lambda event: (self.canvas.focus_set(), command()))
        return box

    def _add_button(self, parent, text, command, hint):
        button = ttk.Button(parent, text=text, command=command, takefocus=0)
        button.pack(side="left", padx=round(2 * self.unit))
        Tooltip(button, headertext=text, text=hint, timeout=0.8, width=round(220 * self.unit))
        return button

    def _build_time(self, pad):
        self.time_row = ttk.Frame(self, padding=(pad, pad // 2))
        self.time_row.grid(row=2, column=0, sticky="ew")
        self.time_label = ttk.Label(self.time_row, width=14)
        self.time_label.pack(side="left")
        self.time_slider = ttk.Scale(self.time_row, command=self._slide_time, takefocus=0)
        self.time_slider.pack(side="left", fill="x", expand=True, padx=pad)
        self.is_whole = tk.BooleanVar(self, False)
        for text, value in (("this frame", False), ("all frames", True)):
            ttk.Radiobutton(
                self.time_row, text=text, value=value, variable=self.is_whole, command=self._set_whole, takefocus=0
            ).pack(side="left", padx=pad // 2)

    def _build_buttons(self, pad):
        row = ttk.Frame(self, padding=(pad, 0))
        row.grid(row=3, column=0, sticky="ew")
        self.update_button = self._add_button(row, "Update", self.update_picture, "Decode the particles (U)")
        self.animate, self.is_live, self.hides = (tk.BooleanVar(self, value) for value in (False, True, False))
        for text, variable in (("animate", self.animate), ("live", self.is_live)):
            ttk.Checkbutton(row, text=text, variable=variable, takefocus=0).pack(side="left", padx=pad // 2)
        self.reset_button = self._add_button(row, "Reset", self.reset, "Take all edits back")
        self.undo_button = self._add_button(row, "Undo", self.undo, "Ctrl-Z")
        self.redo_button = self._add_button(row, "Redo", self.redo, "Ctrl-Shift-Z")
        ttk.Checkbutton(row, text="hide particles", variable=self.hides, command=self._set_handles, takefocus=0).pack(
            side="left", padx=pad // 2
        )
        self.play_button = self._add_button(row, "Play", self.play, "Predict and play (Space)")

    def _build_status(self, pad):
        bottom = ttk.Frame(self, padding=pad)
        bottom.grid(row=4, column=0, columnspan=2, sticky="ew")
        bottom.columnconfigure(0, weight=1)
        self.status = ttk.Label(bottom)
        self.status.grid(row=0, column=0, sticky="ew")
        self.progress = ttk.Progressbar(bottom, length=round(140 * self.unit), maximum=1.0)
        self.progress.grid(row=0, column=1, padx=pad)
        self.cancel_button = ttk.Button(bottom, text="Cancel", command=self.cancel, takefocus=0)
        self.cancel_button.grid(row=0, column=2)
        self.command_text = tk.StringVar(self)
        entry = ttk.Entry(bottom, textvariable=self.command_text, state="readonly", font="TkFixedFont")
        entry.grid(row=1, column=0, columnspan=2, sticky="ew", pady=(pad // 2, 0), padx=(0, pad))
        self.copy_button = ttk.Button(bottom, text="Copy", command=self.copy_command, takefocus=0)
        self.copy_button.grid(row=1, column=2, pady=(pad // 2, 0))

    def _bind_keys(self):
        keys = {
            "<Control-z>": self.undo,
            "<Control-Z>": self.redo,
            "<Control-Shift-z>": self.redo,
            "<Control-y>": self.redo,
            "<Control-a>": self.select_all,
            "<Control-d>": self.ask_appearance,
            "<Control-o>": self.ask_edits,
            "<Control-s>": self.save,
            "<Control-S>": self.save_as,
            "<Control-Shift-s>": self.save_as,
            "<Control-e>": self.export,
            "<Control-q>": self.close,
            "<Delete>": self.remove,
            "<BackSpace>": self.remove,
            "<Escape>": self.give_up,
            "<Home>": lambda: self.show_time(0),
            "<End>": lambda: self.show_time(self.state.scene.num_frames - 1 if self.state else 0),
            "<Prior>": lambda: self.show_time(self.state.time - 1 if self.state else 0),
            "<Next>": lambda: self.show_time(self.state.time + 1 if self.state else 0),
            "<space>": self.play,
            "<F1>": self.show_help,
            **{f"<{key}>": self.toggle_handles for key in "hH"},
            **{f"<{key}>": self.update_picture for key in "uU"},
            **{f"<{key}>": partial(self.zoom, 1) for key in ("plus", "equal", "KP_Add")},
            **{f"<{key}>": partial(self.zoom, -1) for key in ("minus", "KP_Subtract")},
            **{f"<{key}>": partial(self.zoom, 0) for key in ("Key-0", "KP_0")},
        }
        for name, direction in {"Left": (0, -1), "Right": (0, 1), "Up": (-1, 0), "Down": (1, 0)}.items():
            keys[f"<{name}>"] = partial(self.nudge, *direction, NUDGE)
            keys[f"<Shift-{name}>"] = partial(self.nudge, *direction, LARGE_NUDGE)
        for key, action in keys.items():
            self.bind(key, partial(self._key, action))

    def _key(self, action, event):
        """Do what a key means, unless it is another window's, or the widget that has the focus needs it itself."""
        widget = event.widget
        if isinstance(widget, str) or widget.winfo_toplevel() is not self:
            return None
        is_command = event.state & 0x4 or event.keysym in ("F1", "Escape")
        kind = widget.winfo_class()
        if not is_command and (kind in TYPING or (kind in PRESSING and event.keysym == "space")):
            return None
        action()
        return "break"

    # ------------------------------------------------------------------------------------------------------- showing

    def say(self, text, is_error=False):
        """Show a line in the status bar."""
        self.status.configure(text=text, style="Error.TLabel" if is_error else "TLabel")

    def fail(self, error):
        """Show what went wrong."""
        self.say(str(error), is_error=True)

    def report_callback_exception(self, kind, value, trace):
        """tkinter calls this for an exception in a callback: a user's mistake is shown, any other printed too."""
        self.fail(value if isinstance(value, UserError) else f"{kind.__name__}: {value}")
        if not isinstance(value, UserError):
            traceback.print_exception(kind, value, trace)

    def show_state(self):
        """Show the state in every part of the window, but for the picture."""
        state = self.state
        self.canvas.show(state, self.image, "" if state is not None else self.canvas.message)
        self.panel.show(state)
        is_dynamic = state is not None and state.scene.loaded.is_dynamic
        if is_dynamic:
            self.time_row.grid()
            self.time_slider.configure(to=state.scene.num_frames - 1, value=state.time)
            self.time_label["text"] = f"Frame {state.time} of {state.scene.num_frames - 1}"
            self.is_whole.set(state.is_whole)
        else:
            self.time_row.grid_remove()
        can_generate = self.loaded is not None and self.loaded.diffusion is not None
        for widget, is_on in (
            (self.generate_button, can_generate),
            (self.seed_box, can_generate),
            (self.example_box, self.loaded is not None and not can_generate),
            (self.update_button, state is not None),
            (self.reset_button, state is not None and bool(state.edits)),
            (self.undo_button, state is not None and state.can_undo),
            (self.redo_button, state is not None and state.can_redo),
            (self.play_button, is_dynamic),
            (self.copy_button, state is not None),
        ):
            widget.state(["!disabled" if is_on else "disabled"])
        self.command_text.set("" if state is None else state.command())
        self.title(self._title())

    def _title(self):
        if self.state is None:
            return "Particle editor"
        scene = self.state.scene
        source = f"seed {scene.seed}" if scene.video is None else scene.video
        return f"{'*' if self.state.is_modified else ''}{scene.loaded.path.name}, {source} - Particle editor"

    def _show_selection(self):
        self.canvas.draw_particles()
        self.panel.show(self.state)

    # -------------------------------------------------------------------------------------------------------- working

    def _poll(self):
        self._timer = self.after(POLL, self._poll)
        for worker in (self.live, self.slow):
            worker.poll()
        is_busy = bool(self.slow.keys)
        self.cancel_button.state(["!disabled" if is_busy else "disabled"])
        if not is_busy:
            self.progress["value"] = 0

    def _do(self, key, function, done):
        """Let the slow worker do something, with the bar."""
        self.slow.submit(key, function, done, self.fail, lambda share: self.progress.configure(value=share))

    def cancel(self):
        """Stop what takes time."""
        if self.slow.keys:
            self.slow.cancel()
            self.say("cancelled")

    def decode(self):
        """Let the picture of the shown particles be drawn."""
        if self.state is not None:
            scene, particles = self.state.scene, self.state.shown
            show = partial(self._show_decoded, scene)
            self.live.submit("decode", lambda report: decode(scene, particles), show, self.fail, finish_running=True)

    def _show_decoded(self, scene, decoded):
        if self.state is None or self.state.scene is not scene:
            return
        self._stop_animation()
        self.image, glimpses = decoded
        self.canvas.show(self.state, self.image)
        self.panel.show_glimpses(glimpses)

    def update_picture(self):
        """Decode; with "animate", in steps from the picture of the last update."""
        if self.state is None:
            return
        before, self._updated = self._updated, self.state.shown
        if not self.animate.get() or before is None:
            self.decode()
            return
        scene, line = self.state.scene, in_between(before, self._updated)
        self._do("animate", lambda report: decode_line(scene, line), partial(self._animate, scene))

    def _animate(self, scene, images):
        self._stop_animation()
        if self.state is None or self.state.scene is not scene:
            return
        self.image = images[0]
        self.canvas.show(self.state, self.image)
        following = partial(self._animate, scene, images[1:]) if len(images) > 1 else self.decode
        self._animation = self.after(ANIMATION_STEP, following)

    def _stop_animation(self):
        if self._animation is not None:
            self.after_cancel(self._animation)
            self._animation = None

    # -------------------------------------------------------------------------------------------------------- opening

    def choose_model(self, name):
        """Open a model of the list, and its first example."""
        self.open_run_directory(self.models[name])

    def open_run_directory(self, path):
        """Open a model, one's own too, and its first example."""
        if not self._may_leave():
            return
        path = Path(path)
        self.say(f"opening {path} ...")
        self._do("open", lambda report: open_model(path, self.device), self._set_model)

    def _set_model(self, loaded):
        self._show_model(loaded)
        if loaded.diffusion is not None:
            self._generate(0)
        elif self.examples:
            self.choose_example(next(iter(self.examples)), ask=False)
        else:
            self._clear(
                f"No examples of {self._dataset()} in {self.assets}.\n\nOpen an image, a folder of frames or a"
                " video: File."
            )
            self.say(f"no examples of {self._dataset()} in {self.assets}", is_error=True)

    def _show_model(self, loaded):
        self.loaded = loaded
        self.models.setdefault(loaded.path.name, loaded.path)
        self.model_box["values"] = list(self.models)
        self.model_box.set(loaded.path.name)
        self.examples = find_examples(self.assets, self._dataset()) if loaded.diffusion is None else {}
        self.example_box["values"] = list(self.examples)
        self.example_box.set("")

    def _dataset(self):
        return dataset_of(self.loaded.path.name) or self.loaded.config.ds

    def _clear(self, message):
        self.state, self.image = None, None
        self.canvas.show(None, None, message)
        self.panel.show(None)
        self.panel.show_glimpses(None)
        self.show_state()

    def choose_example(self, name, ask=True):
        """Open an example of the list."""
        self.open_clip(self.examples[name], ask)

    def open_clip(self, path, ask=True):
        """Open an image, a folder of frames or a video."""
        if self.loaded is None:
            raise UserError("no model is open; legal: choose one first")
        if ask and not self._may_leave():
            return
        loaded = self.loaded
        self.say(f"reading {path} ...")
        self._do("open", lambda report: open_clip(loaded, path), self.set_scene)

    def generate(self):
        """Let the diffusion draw frames, from the seed in the box, or the next one if that is shown already."""
        if self.loaded is None or self.loaded.diffusion is None or not self._may_leave():
            return
        text = self.seed_box.get()
        if not text.isdigit() or int(text) >= 2**32:
            raise UserError(f"the seed is {text!r}; legal: 0 to 2^32 - 1")
        is_shown = self.state is not None and self.state.scene.seed == int(text)
        self._generate((int(text) + is_shown) % 2**32)

    def _generate(self, seed):
        loaded = self.loaded
        self.say(f"generating with seed {seed} ...")
        self._do("open", lambda report: generate(loaded, seed, report), self.set_scene)

    def set_scene(self, scene, edits=(), path=None):
        """Edit another scene. path: of the file that the edits come from."""
        self.state = EditorState(scene, edits)
        self._updated, self._compared, self._path, self._takes_appearance = self.state.shown, None, path, False
        self.image = None
        self.hides.set(False)
        self.panel.show_glimpses(None)
        if scene.seed is not None:
            self.seed_box.set(scene.seed)
        video = scene.video and Path(scene.video).resolve()
        names = [name for name, place in self.examples.items() if place.resolve() == video]
        self.example_box.set(names[0] if names else "")
        self.canvas.message = ""
        self.canvas.set_zoom(1)
        self.show_state()
        self.decode()
        frames = f" in {scene.num_frames} frames" if scene.num_frames > 1 else ""
        self.say(scene.note or f"{scene.count} particles{frames}")

    def open_edits(self, path):
        """Open a file of edits, and what they are edits of."""
        if not self._may_leave():
            return
        file, current, device = EditFile.read(path), self.loaded, self.device

        def read(report):
            is_open = current is not None and current.path.resolve() == Path(file.model).resolve()
            loaded = current if is_open else open_model(file.model, device)
            if loaded.diffusion is not None:
                scene = generate(loaded, file.seed or 0, report)
            elif file.video is None:
                raise UserError(f"{path}: names no video, and {file.model} generates none")
            else:
                scene = open_clip(loaded, file.video, file.cond_steps if loaded.is_dynamic else None)
            EditorState(scene, file.edits)  # whether they fit, before anything else is left
            return scene

        def show(scene):
            self._show_model(scene.loaded)
            self.set_scene(scene, file.edits, path)
            self.say(f"opened {path}: {len(file.edits)} edits")

        self.say(f"opening {path} ...")
        self._do("open", read, show)

    def ask_clip(self):
        """Ask for an image or a video."""
        self._ask(filedialog.askopenfilename, self.open_clip, title="Open an image or a video")

    def ask_folder(self):
        """Ask for a folder of frames."""
        self._ask(filedialog.askdirectory, self.open_clip, title="Open a folder of frames", mustexist=True)

    def ask_run(self):
        """Ask for a run directory."""
        self._ask(filedialog.askdirectory, self.open_run_directory, title="Open a run directory", mustexist=True)

    def ask_edits(self):
        """Ask for a file of edits."""
        self._ask(filedialog.askopenfilename, self.open_edits, title="Open edits", filetypes=EDIT_FILES)

    def _ask(self, dialog, use, **options):
        path = dialog(parent=self, **options)
        if path:
            use(path)

    # --------------------------------------------------------------------------------------------------------- saving

    def save(self):
        """Save the edits where they were saved before, or ask; returns whether they are saved."""
        if self.state is None:
            return False
        return self.save_as() if self._path is None else self._save(self._path)

    def save_as(self):
        """Ask where to save the edits; returns whether they are saved."""
        if self.state is None:
            return False
        path = filedialog.asksaveasfilename(
            parent=self, title="Save edits", defaultextension=".json", filetypes=EDIT_FILES, initialfile="edits.json"
        )
        return bool(path) and self._save(path)

    def _save(self, path):
        self.state.save(path)
        self._path = path
        self.show_state()
        self.say(f"saved {path}")
        return True

    def _may_leave(self):
        """Whether the edits may be left: they are saved, or need not be."""
        if self.state is None or not self.state.is_modified:
            return True
        answer = messagebox.askyesnocancel("Particle editor", "Save the edits first?", parent=self)
        may_leave = answer is False or (answer is True and self.save())
        if not may_leave and self.loaded is not None:
            self.model_box.set(self.loaded.path.name)
        return may_leave

    def export(self):
        """Ask where to write the picture (.png), or both predictions side by side (.gif, .mp4)."""
        if self.state is None:
            return
        is_dynamic = self.state.scene.loaded.is_dynamic
        kinds = EXPORT_FILES if is_dynamic else EXPORT_FILES[-1:]
        path = filedialog.asksaveasfilename(
            parent=self, title="Export", filetypes=kinds, defaultextension=kinds[0][1][1:], initialfile="edited"
        )
        if path:
            self.export_to(path)

    def export_to(self, path):
        """Write the picture or the animation, as the path's ending says."""
        state, ending = self.state, Path(path).suffix.lower()
        scene = state.scene
        legal = [".png", *(f".{name}" for name in ANIMATION_FORMATS if scene.loaded.is_dynamic)]
        if ending not in legal:
            raise UserError(f"{path}: cannot be exported as that; legal: {', '.join(legal)}")
        if ending == ".png":
            shown, handles = state.shown, state.shows_handles
            self._do("export", lambda report: export_picture(scene, shown, handles, path), self._show_exported)
        else:
            edits, compared = state.edits, self._compared
            known = compared[1] if compared is not None and compared[0] == edits else None

            def write(report):
                return export_animation(scene, known or play(scene, edits, report), path)

            self._do("export", write, self._show_exported)
        self.say(f"writing {path} ...")

    def _show_exported(self, path):
        self.say(f"wrote {path}")

    # -------------------------------------------------------------------------------------------------------- editing

    def commit(self, edits, gesture=None):
        """Do edits, and show what they make."""
        if self.state is not None and self.state.commit(edits, gesture):
            self._show_edited()

    def _show_edited(self):
        self._slid = ()
        self.show_state()
        if self.is_live.get():
            self.decode()

    def preview(self, edits):
        """Show edits while they are made."""
        self._slid = edits
        self.state.preview(edits)
        self._show_selection()
        if self.is_live.get():
            self.decode()

    def select(self, particles, extend):
        """Select particles."""
        self.state.select(particles, extend)
        self._show_selection()

    def select_all(self):
        """Select all visible particles."""
        if self.state is not None:
            self.state.select_all()
            self._show_selection()

    def select_object(self):
        """Select what overlaps the particle that was selected first."""
        if self.state is not None and self.state.selection:
            self.select(self.state.overlapping(self.state.selection[0]), False)

    def give_up(self):
        """Stop what is being done with the mouse or the next press; else select nothing."""
        if self.state is None:
            return
        if self.canvas.stop_dragging() or self._slid:
            self.preview(())
        elif self._takes_appearance:
            self._takes_appearance = False
            self.say("")
        else:
            self.select((), False)

    def drag(self, dy, dx):
        """Show the selection moved so far."""
        self.preview(self.state.move(dy, dx))

    def slide(self, name, value):
        """Show what a slider asks for."""
        make = {
            "scale": lambda: self.state.scale_to(value / 100),
            "depth": lambda: self.state.depth_to(value),
            "transparency": lambda: self.state.transparency(value),
        }
        self.preview(make[name]())

    def drop(self):
        """Do what was shown while dragging."""
        if self._slid:
            self.commit(self._slid)

    def nudge(self, y, x, pixels):
        """Move the selection by so many pixels; a key that is held is one gesture."""
        if self.state is not None:
            step = 2 * pixels / (self.state.scene.loaded.config.image_size - 1)
            self.commit(self.state.move(y * step, x * step), self._next_gesture("nudge"))

    def wheel_scale(self, turns):
        """Scale the selection by turns of the wheel."""
        if self.state is not None:
            self.commit(self.state.scale(WHEEL_SCALE**turns), self._next_gesture("scale"))

    def wheel_depth(self, turns):
        """Move the selection to the front or the back by turns of the wheel."""
        if self.state is not None:
            self.commit(self.state.depth(-WHEEL_DEPTH * turns), self._next_gesture("depth"))

    def _next_gesture(self, name):
        """The gesture of a key or turn: that of the one before, unless there was a pause."""
        if self._gesture_timer is None:
            self._gesture += 1
        else:
            self.after_cancel(self._gesture_timer)
        self._gesture_timer = self.after(KEY_PAUSE, self._end_gesture)
        return name, self._gesture

    def _end_gesture(self):
        self._gesture_timer = None

    def remove(self):
        """Hide the selection."""
        if self.state is not None:
            self.commit(self.state.remove())

    def ask_appearance(self):
        """Let the next press choose whose appearance the selection takes over."""
        if self.state is not None and self.state.selection:
            self._takes_appearance = True
            self.say("press the particle whose appearance is to be taken over (Escape: none)")

    def takes_press(self, hit):
        """Whether a press on a particle (or None) was waited for."""
        if not self._takes_appearance:
            return False
        self._takes_appearance = False
        self.say("")
        if hit is not None:
            self.take_appearance(hit)
        return True

    def take_appearance(self, k):
        """Give the selection the appearance of the particle k."""
        self.commit(self.state.appearance(k))

    def undo(self):
        """Undo the last edit."""
        if self.state is not None and self.state.undo():
            self._show_edited()

    def redo(self):
        """Do what was undone again."""
        if self.state is not None and self.state.redo():
            self._show_edited()

    def reset(self):
        """Take all edits back."""
        if self.state is not None and self.state.reset():
            self._show_edited()

    # -------------------------------------------------------------------------------------------------------- viewing

    def show_time(self, time):
        """Show a frame."""
        if self.state is None:
            return
        time = min(max(time, 0), self.state.scene.num_frames - 1)
        if time != self.state.time:
            self.state.time = time
            self._updated = self.state.shown
            self.show_state()
            self.decode()

    def _slide_time(self, value):
        self.show_time(round(float(value)))

    def _set_whole(self):
        self.state.is_whole = self.is_whole.get()

    def toggle_handles(self):
        """Hide the particles, or show them."""
        self.hides.set(not self.hides.get())
        self._set_handles()

    def _set_handles(self):
        if self.state is not None:
            self.state.shows_handles = not self.hides.get()
            self.canvas.draw_particles()

    def zoom(self, direction):
        """Zoom in (1), out (-1), or to the whole picture (0)."""
        self.canvas.set_zoom(self.canvas.zoom * ZOOM_STEP**direction if direction else 1)

    def play(self):
        """Predict how the original and the edited video go on, and play both."""
        if self.state is None or not self.state.scene.loaded.is_dynamic:
            return
        scene, edits = self.state.scene, self.state.edits
        if self._compared is not None and self._compared[0] == edits:
            self._show_player(scene, edits, self._compared[1])
            return
        self.say("predicting ...")
        self._do("play", lambda report: play(scene, edits, report), partial(self._show_player, scene, edits))

    def _show_player(self, scene, edits, compared):
        if self.state is None or self.state.scene is not scene:
            return
        self._compared = (edits, compared)
        if self.player is not None and self.player.winfo_exists():
            self.player.destroy()
        videos = [
            ("prediction", compared.video, compared.particles),
            ("what if", compared.altered_video, compared.altered_particles),
        ]
        if scene.frames is not None and len(scene.frames) > scene.num_frames:
            videos = [("recorded", scene.frames, None), *videos]
        self.player = Player(self, videos, scene.num_frames, self.unit, self.export)
        self.say(f"{scene.num_frames} frames seen, {scene.horizon - scene.num_frames} predicted")

    def copy_command(self):
        """Put the command on the clipboard."""
        self.clipboard_clear()
        self.clipboard_append(self.command_text.get())
        self.say("the command is on the clipboard")

    def show_help(self):
        """Show the instructions and the keys."""
        window = tk.Toplevel(self)
        window.title("Help")
        pad = round(12 * self.unit)
        body = ttk.Frame(window, padding=pad)
        body.pack(fill="both", expand=True)
        ttk.Label(body, text=INSTRUCTIONS, wraplength=round(480 * self.unit), justify="left").grid(
            row=0, column=0, rowspan=len(KEYS), sticky="n", padx=(0, 2 * pad)
        )
        for row, (key, meaning) in enumerate(KEYS):
            ttk.Label(body, text=key, font="TkHeadingFont").grid(row=row, column=1, sticky="w", padx=(0, pad))
            ttk.Label(body, text=meaning).grid(row=row, column=2, sticky="w")
        window.bind("<Escape>", lambda event: window.destroy())
        window.focus_set()
        self.help_window = window

    # -------------------------------------------------------------------------------------------------------- closing

    def close(self):
        """Close the window, whatever is going on, unless edits are to be saved first."""
        if self._may_leave():
            self.destroy()

    def destroy(self):
        self.withdraw()  # what is running may take a moment to stop
        self.after_cancel(self._timer)
        self._stop_animation()
        self._end_gesture_timer()
        for worker in (self.live, self.slow):
            worker.close()
        super().destroy()
        # Pictures and variables are deleted in this thread, which alone may do that.
        self.__dict__ = {"tk": self.tk, "children": {}, "master": None}
        gc.collect()

    def _end_gesture_timer(self):
        if self._gesture_timer is not None:
            self.after_cancel(self._gesture_timer)
