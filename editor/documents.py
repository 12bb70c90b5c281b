"""What the editor has open: models, examples, one's own videos, and files of edits; where it reads and writes them."""

from contextlib import contextmanager
from pathlib import Path
from tkinter import filedialog, messagebox

from editor.jobs import export_animation, export_picture, play
from editor.scene import dataset_of, find_examples, find_models, generate, open_clip, open_model
from editor.state import EditorState
from rundir.edits import EditFile
from utils.animation import ANIMATION_FORMATS
from utils.errors import UserError

TITLE = "Particle editor"
EDIT_FILES = [("Edits", "*.json"), ("All files", "*")]
EXPORT_FILES = [("Animation", "*.gif"), ("Video", "*.mp4"), ("Picture", "*.png")]


class Documents:
    """What an `EditorWindow` shows, and asks for.

    Attributes:
        models, examples: dicts from names to paths.
        loaded: the open `LoadedModel`, or None.
        is_asking: whether a dialog is open; what has been read meanwhile is not shown before it is closed.
    """

    def __init__(self, window, checkpoints, assets, device):
        self.window, self.assets, self.device = window, assets, device
        self.models, self.examples, self.loaded = find_models(checkpoints), {}, None
        self.is_asking = False
        self._path = None  # of the file that the edits were saved in
        self._given_up = None  # unsaved edits that may be left, as what was asked for is being opened

    def example_of(self, scene):
        """The name of the example that a `Scene` is of, or ""."""
        video = scene.video and Path(scene.video).resolve()
        return next((name for name, place in self.examples.items() if place.resolve() == video), "")

    def dataset(self):
        """The name of the data set whose examples go with the model."""
        return dataset_of(self.loaded.path.name) or self.loaded.config.ds

    # --------------------------------------------------------------------------------------------------------- opening

    def choose_model(self, name):
        """Open a model of the list, and its first example."""
        self.open_run_directory(self.models[name])

    def open_run_directory(self, path):
        """Open a model, one's own too, and the first of its examples that can be read."""
        path, assets, device = Path(path), self.assets, self.device

        def read(report):
            loaded, broken = open_model(path, device), []
            if loaded.diffusion is not None:
                return loaded, generate(loaded, 0, report), broken
            for place in find_examples(assets, dataset_of(path.name) or loaded.config.ds).values():
                try:
                    return loaded, open_clip(loaded, place), broken
                except UserError as error:
                    broken.append(str(error))
            return loaded, None, broken

        def show(found):
            loaded, scene, broken = found
            self._set_model(loaded)
            if scene is not None:
                self._set_scene(scene)
            else:
                self._show_no_example(broken)
            if broken:
                self.window.say(broken[0], is_error=True)

        self._open(f"opening {path} ...", read, show)

    def _show_no_example(self, broken):
        text = "" if broken else f"no examples of {self.dataset()} in {self.assets}"
        heading = f"No example of {self.dataset()} can be read." if broken else f"N{text[1:]}."
        self._set_scene(None, f"{heading}\n\nOpen an image, a folder of frames or a video: File.")
        self.window.say(text, is_error=True)

    def _open(self, text, read, show):
        """Let read(report) be done, and show(what it read), unless edits would be lost. text: says what is done."""
        if not self.may_leave():
            return
        self.window.slow.cancel("play", "animate")  # of what is left
        self.window.say(text)

        def finish(found):
            if self.may_leave():  # what was edited since is asked about, too
                show(found)
            self._given_up = None

        def fail(error):
            self.opening_failed()
            self.window.fail(error)

        self.window.do("open", read, finish, fail)

    def _set_model(self, loaded):
        self.loaded = loaded
        self.models.setdefault(loaded.path.name, loaded.path)
        self.examples = find_examples(self.assets, self.dataset()) if loaded.diffusion is None else {}

    def _set_scene(self, scene, message="", edits=(), path=None):
        """Edit another scene (None: none, and show a message). path: of the file that the edits come from."""
        self._path = path
        self.window.show_scene(None if scene is None else EditorState(scene, edits), message)

    def choose_example(self, name):
        """Open an example of the list."""
        self.open_clip(self.examples[name])

    def open_clip(self, path):
        """Open an image, a folder of frames or a video."""
        if self.loaded is None:
            raise UserError("no model is open; legal: choose one first")
        loaded = self.loaded
        self._open(f"reading {path} ...", lambda report: open_clip(loaded, path), self._set_scene)

    def generate(self):
        """Let the diffusion draw frames, from the seed in the box, or the next one if that is shown already."""
        if self.loaded is None or self.loaded.diffusion is None:
            return
        loaded, state, text = self.loaded, self.window.state, self.window.source.seed_box.get()
        if not text.isdecimal() or int(text) >= 2**32:
            raise UserError(f"the seed is {text!r}; legal: 0 to 2^32 - 1")
        seed = int(text)
        if state is not None and state.scene.seed == seed:
            seed = (seed + 1) % 2**32
        self._open(f"generating with seed {seed} ...", lambda report: generate(loaded, seed, report), self._set_scene)

    def open_edits(self, path):
        """Open a file of edits, and what they are edits of."""
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
            self._set_model(scene.loaded)
            self._set_scene(scene, edits=file.edits, path=path)
            self.window.say(f"opened {path}: {len(file.edits)} edits")

        self._open(f"opening {path} ...", read, show)

    def opening_failed(self):
        """Keep what is open: nothing was given up for it."""
        self._given_up = None
        self.window.show_state()

    # ---------------------------------------------------------------------------------------------------------- asking

    @contextmanager
    def _asking(self):
        before, self.is_asking = self.is_asking, True
        try:
            yield
        finally:
            self.is_asking = before

    def _ask_path(self, dialog, title, parent=None, **options):
        with self._asking():
            return dialog(parent=parent or self.window, title=title, **options)

    def ask_clip(self):
        """Ask for an image or a video."""
        self._ask_and(self.open_clip, filedialog.askopenfilename, "Open an image or a video")

    def ask_folder(self):
        """Ask for a folder of frames."""
        self._ask_and(self.open_clip, filedialog.askdirectory, "Open a folder of frames", mustexist=True)

    def ask_run(self):
        """Ask for a run directory."""
        self._ask_and(self.open_run_directory, filedialog.askdirectory, "Open a run directory", mustexist=True)

    def ask_edits(self):
        """Ask for a file of edits."""
        self._ask_and(self.open_edits, filedialog.askopenfilename, "Open edits", filetypes=EDIT_FILES)

    def _ask_and(self, use, dialog, title, **options):
        path = self._ask_path(dialog, title, **options)
        if path:
            use(path)

    def may_leave(self):
        """Whether the edits may be left: they are saved, or need not be."""
        state = self.window.state
        if state is None or not state.is_modified or state.edits == self._given_up:
            return True
        with self._asking():
            answer = messagebox.askyesnocancel(TITLE, "Save the edits first?", parent=self.window)
        if answer is False:
            self._given_up = state.edits
        elif not (answer and self.save()):
            self.window.show_state()  # the boxes name what is open
            return False
        return True

    def may_close(self):
        """Whether the window may be closed: `may_leave`, and nothing is being written."""
        if not self.may_leave():
            return False
        if "export" not in self.window.slow.keys:
            return True
        with self._asking():
            return messagebox.askyesno(TITLE, "A file is being exported. Stop that?", parent=self.window)

    # ---------------------------------------------------------------------------------------------------------- saving

    def save(self):
        """Save the edits where they were saved before, or ask; returns whether they are saved."""
        if self.window.state is None:
            return False
        return self.save_as() if self._path is None else self._save(self._path)

    def save_as(self):
        """Ask where to save the edits; returns whether they are saved."""
        if self.window.state is None:
            return False
        options = {"defaultextension": ".json", "filetypes": EDIT_FILES, "initialfile": "edits.json"}
        path = self._ask_path(filedialog.asksaveasfilename, "Save edits", **options)
        return bool(path) and self._save(path)

    def _save(self, path):
        try:
            self.window.state.save(path)
        except UserError as error:
            self.window.fail(error)
            return False
        self._path = path
        self.window.show_state()
        self.window.say(f"saved {path}")
        return True

    def export(self, parent=None):
        """Ask where to write the picture (.png), or both predictions side by side (.gif, .mp4)."""
        if self.window.state is None:
            return
        is_dynamic = self.window.state.scene.loaded.is_dynamic
        kinds = EXPORT_FILES if is_dynamic else EXPORT_FILES[-1:]
        options = {"filetypes": kinds, "defaultextension": kinds[0][1][1:], "initialfile": "edited"}
        path = self._ask_path(filedialog.asksaveasfilename, "Export", parent, **options)
        if path:
            self.export_to(path)

    def export_to(self, path):
        """Write the picture or the animation, as the path's ending says."""
        state, ending = self.window.state, Path(path).suffix.lower()
        scene, shown, edits, has_handles = state.scene, state.shown, state.edits, state.shows_handles
        legal = [".png", *(f".{name}" for name in ANIMATION_FORMATS if scene.loaded.is_dynamic)]
        if ending not in legal:
            raise UserError(f"{path}: cannot be exported as that; legal: {', '.join(legal)}")
        compared = self.window.viewing.compared
        known = compared[1] if compared is not None and compared[0] == edits else None

        def write(report):
            if ending == ".png":
                return export_picture(scene, shown, has_handles, path)
            return export_animation(scene, known or play(scene, edits, report), path)

        self.window.say(f"writing {path} ...")
        self.window.do("export", write, lambda path: self.window.say(f"wrote {path}"))
