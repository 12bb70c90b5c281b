"""Edit particles by hand: move, scale, hide and exchange them in a picture or in the frames that a model sees, and
watch what it makes of that.

  python interactive_gui.py                                 the models in checkpoints/, the examples in assets/
  python interactive_gui.py RUN_DIR                         a model of one's own
  python interactive_gui.py edits.json                      edits that were saved

Models are the folders {dlp|ddlp|diffuse-ddlp}-{data set} of `--checkpoints`; a data set's examples are its numbered
folders of frames in `--assets`. docs/gui.md explains the window.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from utils.device import add_device_arguments, device_of
from utils.errors import UserError, run_command

ROOT = Path(__file__).resolve().parent


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", metavar="PATH", help="a run directory, or a file of edits")
    parser.add_argument("--checkpoints", metavar="DIR", help="where the models lie (default: checkpoints/)")
    parser.add_argument("--assets", metavar="DIR", help="where the examples lie (default: assets/)")
    parser.add_argument(
        "--scale", type=float, metavar="FACTOR", help="size of the window's contents (default: by the screen)"
    )
    add_device_arguments(parser)
    args = parser.parse_args(arguments)
    if args.scale is not None and not 0.5 <= args.scale <= 4:
        parser.error(f"--scale is {args.scale:g}; legal: 0.5 to 4")
    return args


def import_tkinter():
    """The module; `UserError` where it, or what the window needs beside it, is missing."""
    try:
        import tkinter
    except ImportError:
        raise UserError("Python's tkinter is missing; install it (Debian, Ubuntu: apt install python3-tk)") from None
    missing = [name for name in ("ttkthemes", "ttkwidgets") if find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing; install: pip install ttkthemes ttkwidgets")
    return tkinter


def main(arguments=None):
    args = parse_arguments(arguments)
    for option, folder in (("--checkpoints", args.checkpoints), ("--assets", args.assets)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"{option}: {folder} is no folder")
    if args.path is not None and not Path(args.path).exists():
        raise UserError(f"{args.path}: not found; legal: a run directory, or a file of edits")
    device = device_of(args)
    checkpoints, assets = args.checkpoints or ROOT / "checkpoints", args.assets or ROOT / "assets"
    tkinter = import_tkinter()
    from editor.window import EditorWindow

    try:
        window = EditorWindow(checkpoints, assets, device, args.scale)
    except tkinter.TclError as error:
        if "display" not in str(error):
            raise
        raise UserError(
            "no display to open a window on; run it on a desktop, through ssh -X, or in xvfb-run; what_if.py edits"
            " without a window"
        ) from None
    window.start(args.path)
    window.mainloop()


if __name__ == "__main__":
    run_command(main)
