"""How the window's contents look: the theme, and their size on screens with fine pixels."""

from tkinter import font, ttk

THEME, LARGE_THEME = "arc", "clam"  # the first is made of pictures of a fixed size, which are small on fine screens
FINE = 1.5  # pixels, of those of 96 dots per inch, from which the second is taken


def scale_contents(window, scale=None):
    """Set the size of a `ThemedTk`'s contents. scale: that of a screen of 96 dots per inch is 1 (None: as the screen
    says). Returns how many pixels one of such a screen has become."""
    # Screens say 97 dots where they mean 96.
    unit = min(max(round(window.winfo_fpixels("1i") / 96 * 4) / 4, 1), 4) if scale is None else scale
    window.tk.call("tk", "scaling", unit * 96 / 72)
    for name in font.names(window):
        named = font.nametofont(name, window)
        size = named.cget("size")
        # Sizes in pixels, below 0, are those of 96 dots per inch.
        named.configure(size=size if size > 0 else round(-size * 72 / 96))
    style = ttk.Style(window)
    if unit >= FINE:
        window.set_theme(LARGE_THEME)
        window.configure(background=style.lookup("TFrame", "background"))
        _scale_widgets(style, unit)
    style.configure("Error.TLabel", foreground="#c0392b")
    style.configure("TButton", width=-5)
    window.option_add("*TCombobox*Listbox.font", "TkDefaultFont")
    return unit


def _scale_widgets(style, unit):
    style.configure("Horizontal.TScale", sliderlength=round(22 * unit), arrowsize=round(13 * unit))
    style.configure("Horizontal.TProgressbar", thickness=round(12 * unit))
    for kind in ("TCheckbutton", "TRadiobutton"):
        style.configure(kind, indicatorsize=round(11 * unit), indicatormargin=[round(3 * unit)] * 4)
    for kind in ("TCombobox", "TSpinbox"):
        style.configure(kind, arrowsize=round(13 * unit))
    style.configure("TButton", padding=round(3 * unit))
