"""Someone at the editor: what is done with the mouse, the keys and the eyes."""

import time

import pytest
import torch

SHIFT, CONTROL, PRESSED = 0x1, 0x4, 0x100  # of an event's state
CPU = torch.device("cpu")


class Person:
    """Someone at the window: what is done with the mouse, the keys and the eyes."""

    def __init__(self, window):
        self.window = window
        window.geometry("1000x700+0+0")
        self.see(lambda: window.canvas.winfo_width() > 100)
        window.focus_force()
        window.canvas.focus_force()

    def see(self, condition, seconds=120):
        """Wait until it is so."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.window.update()
            if condition():
                return
            time.sleep(0.005)
        raise AssertionError(f"never seen: {self.window.status.message['text']}")

    def rest(self):
        """Wait until nothing is done any more."""
        self.see(self.is_at_rest)
        self.window.update()

    def is_at_rest(self):
        workers = self.window.live, self.window.slow
        if any(worker.keys for worker in workers):
            return False
        for worker in workers:
            worker.poll()  # what has come may ask for more
        return not any(worker.keys for worker in workers) and not self.window.viewing.is_animating

    def start(self, path=None):
        self.window.start(path)
        self.see(lambda: self.window.image is not None)
        self.rest()

    def choose(self, box, name):
        box.set(name)
        box.event_generate("<<ComboboxSelected>>")
        self.rest()

    def point(self, k):
        """Where a particle's dot is."""
        state = self.window.state
        return tuple(round(value) for value in self.window.canvas.to_canvas(*state.shown.z[0, k].tolist()))

    def drag(self, start, end, state=0, widget=None, drop=True):
        widget = widget or self.window.canvas
        widget.event_generate("<Motion>", x=start[0], y=start[1])
        widget.event_generate("<Button-1>", x=start[0], y=start[1], state=state)
        for share in (0.25, 0.5, 0.75, 1):
            x, y = (round(a + share * (b - a)) for a, b in zip(start, end, strict=True))
            widget.event_generate("<Motion>", x=x, y=y, state=state | PRESSED)
            self.window.update()
        if drop:
            widget.event_generate("<ButtonRelease-1>", x=end[0], y=end[1], state=state | PRESSED)
            self.rest()

    def press(self, point, state=0, widget=None):
        widget = widget or self.window.canvas
        widget.event_generate("<Button-1>", x=point[0], y=point[1], state=state)
        widget.event_generate("<ButtonRelease-1>", x=point[0], y=point[1], state=state | PRESSED)
        # The next press is not the second one of a double press.
        widget.event_generate("<Motion>", x=0, y=0)
        widget.event_generate("<Button-3>", x=0, y=0)
        self.rest()

    def key(self, name, widget=None):
        (widget or self.window.canvas).event_generate(f"<{name}>")
        self.rest()

    def wheel(self, turns, modifier=""):
        for _ in range(abs(turns)):
            self.window.canvas.event_generate(f"<{modifier}Button-{4 if turns > 0 else 5}>", x=10, y=10)
        self.rest()


@pytest.fixture
def person(place, display, monkeypatch):
    from editor import documents
    from editor.window import EditorWindow

    monkeypatch.chdir(place)
    asked = []
    monkeypatch.setattr(documents.messagebox, "askyesnocancel", lambda *texts, **options: asked.append(texts) or False)
    window = EditorWindow(place / "checkpoints", place / "assets", CPU, scale=1)
    person = Person(window)
    person.asked = asked
    yield person
    if person.window is not None:
        window.close()


@pytest.fixture
def at_video(person):
    """Someone who has opened a video."""
    person.start(person.window.documents.models["ddlp-balls"])
    return person


@pytest.fixture
def at_image(person):
    """Someone who has opened an image."""
    person.start(person.window.documents.models["dlp-shapes"])
    return person


def answer(monkeypatch, path):
    """Let the file dialogs answer with a path."""
    from editor import documents

    for name in ("askopenfilename", "asksaveasfilename", "askdirectory"):
        monkeypatch.setattr(documents.filedialog, name, lambda path=path, **options: str(path))


def error_of(window):
    """The text of the status bar, which must be an error's."""
    assert str(window.status.message["style"]) == "Error.TLabel"
    return window.status.message["text"]
