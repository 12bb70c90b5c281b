"""What can be asked of the editor by menu and key."""

import tkinter as tk
from functools import partial

NUDGE, LARGE_NUDGE = 1, 10  # pixels
# Widgets that have keys of their own, and the keys that are the editor's even there.
TYPING = ("TEntry", "TCombobox", "TSpinbox")
ALWAYS = ("Control-s", "Control-S", "Control-Shift-s", "Control-o", "Control-q", "F1", "Escape")
SLIDING = {"TScale": ("Left", "Right", "Up", "Down", "Home", "End")}
PRESSING = ("TButton", "TCheckbutton", "TRadiobutton")  # those of the space bar


def menu_bar(window):
    """The menu: each entry has a name, what it does, and the key that does the same."""
    documents, editing, viewing = window.documents, window.editing, window.viewing
    bar = tk.Menu(window)
    for name, entries in {
        "File": (
            ("Open image or video...", documents.ask_clip, ""),
            ("Open folder of frames...", documents.ask_folder, ""),
            ("Open run directory...", documents.ask_run, ""),
            None,
            ("Open edits...", documents.ask_edits, "Ctrl-O"),
            ("Save edits", documents.save, "Ctrl-S"),
            ("Save edits as...", documents.save_as, "Ctrl-Shift-S"),
            ("Export...", documents.export, "Ctrl-E"),
            None,
            ("Quit", window.close, "Ctrl-Q"),
        ),
        "Edit": (
            ("Undo", editing.undo, "Ctrl-Z"),
            ("Redo", editing.redo, "Ctrl-Shift-Z"),
            ("Reset", editing.reset, ""),
            None,
            ("Select all", editing.select_all, "Ctrl-A"),
            ("Select whole object", editing.select_object, "double press"),
            ("Take over an appearance", editing.ask_appearance, "Ctrl-D"),
            ("Hide", editing.remove, "Delete"),
        ),
        "View": (
            ("Hide particles", viewing.toggle_handles, "H"),
            ("Zoom in", partial(viewing.zoom, 1), "+"),
            ("Zoom out", partial(viewing.zoom, -1), "-"),
            ("Whole picture", partial(viewing.zoom, 0), "0"),
            None,
            ("Update", viewing.update_picture, "U"),
            ("Play", viewing.play, "Space"),
        ),
        "Help": (("Instructions and keys", window.show_help, "F1"),),
    }.items():
        menu = tk.Menu(bar, tearoff=False)
        for entry in entries:
            if entry is None:
                menu.add_separator()
            else:
                menu.add_command(label=entry[0], command=entry[1], accelerator=entry[2])
        bar.add_cascade(label=name, menu=menu)
    return bar


def bind_keys(window):
    """Bind the keys of the window, which are not those of the windows beside it."""
    documents, editing, viewing = window.documents, window.editing, window.viewing
    keys = {
        "Control-z": editing.undo,
        **dict.fromkeys(("Control-Z", "Control-Shift-z", "Control-y"), editing.redo),
        "Control-a": editing.select_all,
        "Control-d": editing.ask_appearance,
        "Control-o": documents.ask_edits,
        "Control-s": documents.save,
        **dict.fromkeys(("Control-S", "Control-Shift-s"), documents.save_as),
        "Control-e": documents.export,
        "Control-q": window.close,
        **dict.fromkeys(("Delete", "BackSpace"), editing.remove),
        "Escape": editing.give_up,
        "Home": partial(viewing.show_time, 0),
        "End": partial(viewing.show_time, -1),
        "Prior": partial(viewing.step_time, -1),
        "Next": partial(viewing.step_time, 1),
        "space": viewing.play,
        "F1": window.show_help,
        **dict.fromkeys("hH", viewing.toggle_handles),
        **dict.fromkeys("uU", viewing.update_picture),
        **dict.fromkeys(("plus", "equal", "KP_Add"), partial(viewing.zoom, 1)),
        **dict.fromkeys(("minus", "KP_Subtract"), partial(viewing.zoom, -1)),
        **dict.fromkeys(("Key-0", "KP_0"), partial(viewing.zoom, 0)),
    }
    for name, (y, x) in {"Left": (0, -1), "Right": (0, 1), "Up": (-1, 0), "Down": (1, 0)}.items():
        keys[name] = partial(editing.nudge, y, x, NUDGE)
        keys[f"Shift-{name}"] = partial(editing.nudge, y, x, LARGE_NUDGE)
    for key, action in keys.items():
        window.bind(f"<{key}>", partial(_press, window, key, action))
    for kind in TYPING:
        window.bind_class(kind, "<Control-a>", lambda event: event.widget.event_generate("<<SelectAll>>"))


def _press(window, key, action, event):
    """Do what a key means, unless it is another window's, or the widget that has the focus needs it itself."""
    widget = event.widget
    if isinstance(widget, str) or widget.winfo_toplevel() is not window:
        return None
    kind = widget.winfo_class()
    is_typing = kind in TYPING
    if is_typing and key == "Escape":
        window.canvas.focus_set()
        return "break"
    if (
        (is_typing and key not in ALWAYS)
        or key in SLIDING.get(kind, ())
        or (kind in PRESSING and key == "space")
        or (key == "space" and event.state & 0x4)
    ):
        return None
    action()
    return "break"
