"""How long the editor's window lets a person wait, action by action: ``python benchmarks/bench_editor.py``.

It drives the window on a virtual screen (Xvfb) as a mouse and a keyboard do, and prints a table: of each action the
longest pass of the event loop, in wall time and in processor time of the window's thread, and how long a picture takes
to be decoded while a particle is dragged. A pass is what happens between two events that the window can answer to.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import UserError, run_command
from utils.legal import check_at_least_1

ROOT = Path(__file__).resolve().parents[1]
EVENT = 1 / 60  # seconds between two events of a mouse that is moved
PRESSED = 0x100  # of an event's state: the first button is


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ddlp-balls", metavar="NAME", help="of a DDLP in checkpoints/ (%(default)s)")
    parser.add_argument("--size", default="1280x800", metavar="WxH", help="of the window (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="FACTOR", help="of its contents (%(default)s)")
    parser.add_argument("--drags", type=int, default=5, metavar="N", help="particles that are dragged (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the models (default: PyTorch's)")
    args = parser.parse_args(arguments)
    check_at_least_1("--drags", args.drags)
    if args.threads is not None:
        check_at_least_1("--threads", args.threads)
        torch.set_num_threads(args.threads)
    with virtual_screen():
        measure(args)


@contextmanager
def virtual_screen():
    """Start Xvfb, and name its display in the environment."""
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "3840x2160x24", "-nolisten", "tcp"]
    try:
        process = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError("Xvfb is not installed (Debian, Ubuntu: apt install xvfb)") from None
    os.close(write)
    with os.fdopen(read) as file:
        os.environ["DISPLAY"] = f":{file.readline().strip()}"
    try:
        yield
    finally:
        process.terminate()
        process.wait()


class Hand:
    """Gives events to a window, and measures the passes of its event loop."""

    def __init__(self, window):
        self.window, self.passes, self.decodings = window, {}, []

    def turn(self, action):
        """Let the loop do one pass; whether there was anything to do."""
        wall, processor = time.perf_counter(), time.thread_time()
        did = self.window.tk.dooneevent(2)  # without waiting
        if did:
            times = time.perf_counter() - wall, time.thread_time() - processor
            self.passes.setdefault(action, []).append(times)
        return did

    def see(self, action, condition, seconds=120):
        """Go on until it is so, and what that has left to draw is drawn."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                text = self.window.status.message["text"]
                raise UserError(f"{action}: not seen within {seconds} s; the window says: {text}")
            if not self.turn(action):
                time.sleep(0.001)
        for _ in range(100):  # on a busy machine the next timer is always due
            if not self.turn(action):
                break

    def rest(self, action):
        """Go on until the workers have done everything."""
        window = self.window
        self.see(action, lambda: not (window.live.keys | window.slow.keys) and not window.viewing.is_animating)

    def give(self, event, widget=None, **options):
        (widget or self.window.canvas).event_generate(event, when="tail", **options)

    def press_key(self, action, key, condition=lambda: True):
        self.give(f"<{key}>")
        self.turn(action)
        self.see(action, condition)
        self.rest(action)

    def drag(self, action, start, way, widget=None, steps=60):
        """Press, move by `way` pixels in so many steps, as fast as a mouse does, and let go."""
        (x, y), (dx, dy) = start, way
        self.give("<Motion>", widget, x=x, y=y)
        self.give("<Button-1>", widget, x=x, y=y)
        for step in range(1, steps + 1):
            end = time.monotonic() + EVENT
            place = {"x": round(x + dx * step / steps), "y": round(y + dy * step / steps)}
            self.give("<Motion>", widget, state=PRESSED, **place)
            while time.monotonic() < end:
                if not self.turn(action):
                    time.sleep(0.001)
        self.give("<ButtonRelease-1>", widget, x=x + dx, y=y + dy, state=PRESSED)
        self.rest(f"let go of {action.removeprefix('drag ')}")

    def open_model(self, name):
        """Open a model, with its first example."""
        self.window.documents.choose_model(name)
        self.see("open a model", lambda: self.window.image is not None)
        self.rest("open a model")
        self.window.canvas.focus_force()  # there is no window manager to give it the keys

    def drag_particle(self, k, way=None):
        """Drag a particle by `way` pixels, or to the middle of the picture."""
        canvas, state = self.window.canvas, self.window.state
        start = [round(value) for value in canvas.to_canvas(*state.shown.z[0, k].tolist())]
        if way is None:
            way = [size // 2 - value for size, value in zip(canvas.size, start, strict=True)]
        self.drag("drag a particle", start, way)

    def print_table(self):
        print("| action | passes | longest, ms | processor time, ms |\n|---|---|---|---|")
        for action, passes in self.passes.items():
            wall, processor = (1000 * max(times) for times in zip(*passes, strict=True))
            print(f"| {action} | {len(passes)} | {wall:.0f} | {processor:.0f} |")
        wall, processor = (sorted(1000 * t for t in times) for times in zip(*self.decodings, strict=True))
        middle = len(wall) // 2
        print(
            f"\n{len(wall)} pictures decoded: median {wall[middle]:.0f} ms ({processor[middle]:.0f} of the processor),"
            f" at most {wall[-1]:.0f} ({processor[-1]:.0f})"
        )


def measure(args):
    from editor import viewing
    from editor.window import EditorWindow

    window = EditorWindow(ROOT / "checkpoints", ROOT / "assets", torch.device("cpu"), args.scale)
    if args.model not in window.documents.models:
        raise UserError(f"--model is {args.model}; legal: {', '.join(window.documents.models)}")
    window.geometry(f"{args.size}+0+0")
    hand, decode = Hand(window), viewing.decode

    def timed_decode(scene, particles):
        wall, processor = time.perf_counter(), time.thread_time()
        decoded = decode(scene, particles)
        hand.decodings.append((time.perf_counter() - wall, time.thread_time() - processor))
        return decoded

    viewing.decode = timed_decode
    hand.open_model(args.model)
    if not window.state.scene.loaded.is_dynamic:
        raise UserError(f"--model is {args.model}; legal: a DDLP's or a DiffuseDDLP's")
    for k in range(min(args.drags, window.state.scene.count)):
        hand.drag_particle(k)
    slider = window.panel.sliders["scale"].scale
    place = [round(float(value)) for value in slider.coords()]
    hand.drag("drag a slider", place, (40, 0), slider)
    hand.press_key("select all", "Control-a")
    hand.press_key("undo", "Control-z")
    hand.press_key("another frame", "Home")
    for key in ("plus", "plus", "Key-0"):
        hand.press_key("zoom", key)
    hand.press_key("hide the particles", "h")
    hand.press_key("show them", "h")
    window.buttons.animates.set(True)
    hand.press_key("update, animated", "u")
    hand.press_key("predict, open the player", "space", lambda: window.viewing.player is not None)
    player = window.viewing.player
    hand.see("play", lambda: player.frame > 20)
    player.shows_particles.set(True)
    hand.see("play with particles", lambda: player.frame > 40)
    player.destroy()
    window.canvas.focus_force()
    hand.press_key("open the help", "F1")
    window.help_window.destroy()
    window.canvas.focus_force()
    window.geometry("1000x700")
    hand.rest("another size")
    for name in window.documents.models:
        window.state.save(os.devnull)
        window.documents.choose_model(name)
        hand.see("open another model", lambda name=name: name in window.title())
        hand.rest("open another model")
    window.destroy()
    hand.print_table()


if __name__ == "__main__":
    run_command(main)
