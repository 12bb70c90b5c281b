"""Draw the pictures of the README into assets/figures with the shipped models and the examples here:
``python assets/make_figures.py``. With ``--editor`` those of the editor's windows, which needs Xvfb."""

import argparse
import os
import sys
from pathlib import Path

import torch
from PIL import ImageGrab

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
from benchmarks.bench_editor import Hand, virtual_screen
from datasets.examples import Examples
from eval.eval_model import draw_dlp
from rundir import load_model
from utils.animation import generated_panel, save_animation, side_by_side
from utils.errors import UserError, run_command
from utils.files import make_folder
from utils.plotting import save_image
from what_if import comparison_panels, what_if

FIGURES = demo.ROOT / "assets" / "figures"
HORIZON = 40  # frames
SHAPES = 5  # images
VIDEOS = 4  # that are generated
WINDOW = "1000x625"  # of the editor
WAY = 75, -55  # pixels that a ball is dragged
PLAYED = 16  # frame


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=FIGURES, type=Path, metavar="PATH", help="folder to write to (%(default)s)")
    parser.add_argument("--episode", type=int, default=0, metavar="N", help="which example of balls (%(default)s)")
    parser.add_argument("--editor", action="store_true", help="draw the editor's windows instead")
    args = parser.parse_args(arguments)
    if args.editor:
        make_folder(args.out)
        with virtual_screen():
            draw_editor(args.out)
    else:
        draw_models(args.out, args.episode)


def draw_models(out, episode):
    """What the three models do."""
    shapes, balls = (Examples(demo.ROOT / "assets" / name) for name in ("shapes", "balls"))
    if not 0 <= episode < len(balls):
        raise UserError(f"--episode is {episode}; legal: 0 to {len(balls) - 1}")
    make_folder(out)
    dlp, ddlp, generator = (
        load_model(demo.ROOT / "checkpoints" / name) for name in ("dlp-shapes", "ddlp-balls", "diffuse-ddlp-balls")
    )
    images = torch.cat([shapes[i][0] for i in range(SHAPES)])
    save_image(draw_dlp(dlp, images)["image"], out / "shapes.png")
    video, positions, sizes, *_ = (entry[:HORIZON] for entry in balls[episode])
    edit = demo.move_first_object(ddlp, video, positions, sizes)
    compared = what_if(ddlp, video, [edit], HORIZON, demo.SEEN)
    panels = comparison_panels(compared, video, demo.SEEN)
    save_animation(side_by_side(panels), out / "what_if.gif", demo.FRAME_SECONDS)
    videos = generator.sample(VIDEOS, HORIZON, seed=0)
    panels = [generated_panel(each, generator.config.diffuse_frames) for each in videos]
    save_animation(side_by_side(panels), out / "generated.gif", demo.FRAME_SECONDS)


def draw_editor(out):
    """The editor after a ball was moved in the last frame that is seen, and the player of what follows."""
    from editor.window import EditorWindow

    window = EditorWindow(demo.ROOT / "checkpoints", demo.ROOT / "assets", torch.device("cpu"), scale=1)
    window.geometry(f"{WINDOW}+0+0")
    hand = Hand(window)
    hand.open_model("ddlp-balls")
    hand.press_key("the last frame", "End")
    k = window.state.shown.z[0, :, 0].argmin().item()  # the highest ball's
    window.editing.select([k], extend=False)
    window.editing.select_object()
    hand.drag_particle(k, WAY)
    grab(window, out / "editor.png")
    hand.press_key("predict", "space", lambda: window.viewing.player is not None)
    player = window.viewing.player
    player.shows_particles.set(True)
    player.pause_at(PLAYED)
    hand.rest("play")
    grab(player, out / "player.png")
    window.state.save(os.devnull)
    window.destroy()


def grab(window, path):
    """Write what is seen of a window, which lies in the corner of the screen, its menu above it."""
    window.lift()
    window.update()
    right, bottom = window.winfo_rootx() + window.winfo_width(), window.winfo_rooty() + window.winfo_height()
    ImageGrab.grab((0, 0, right, bottom)).save(path)


if __name__ == "__main__":
    run_command(main)
