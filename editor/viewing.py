"""What of the edited particles is seen: the decoded picture, the time, the zoom, and what is predicted from them."""

from functools import partial

from editor.canvas import ZOOM_STEP
from editor.jobs import decode, decode_line, play
from editor.player import Player
from editor.state import in_between

ANIMATION_STEP = 60  # milliseconds


class Viewing:
    """Shows what the models make of an `EditorWindow`'s state; its workers ask them.

    Attributes:
        player: the window that plays predictions, or None.
        compared: the edits that were played last and their `Comparison`, or None.
    """

    def __init__(self, window):
        self.window = window
        self.player, self.compared = None, None
        self._updated = None  # the particles [1, ...] of the picture of the last update
        self._predicting = None  # the edits whose prediction was asked for last
        self._animation = None

    @property
    def state(self):
        """The window's `EditorState`, or None."""
        return self.window.state

    def begin(self):
        """Show another scene, or none."""
        self.stop_animation()
        self.window.slow.cancel("play", "animate")
        self._updated = None if self.state is None else self.state.shown
        self.compared = None
        self.decode()

    # -------------------------------------------------------------------------------------------------------- decoding

    def decode(self):
        """Let the picture of the shown particles be drawn."""
        if self.state is not None:
            scene, particles = self.state.scene, self.state.shown
            show = partial(self._show_decoded, scene)
            self.window.live.submit(
                "decode", lambda report: decode(scene, particles), show, self.window.fail, finish_running=True
            )

    def decode_live(self):
        """`decode`, if that is wanted while something is edited."""
        if self.window.buttons.is_live.get():
            self.decode()

    def _show_decoded(self, scene, decoded):
        if not self._is_shown(scene):
            return
        self.stop_animation()
        image, glimpses = decoded
        self.window.show_image(image)
        self.window.panel.show_glimpses(glimpses)

    def _is_shown(self, scene):
        return self.state is not None and self.state.scene is scene

    def update_picture(self):
        """Decode; with "animate", in steps from the picture of the last update."""
        if self.state is None:
            return
        before, self._updated = self._updated, self.state.shown
        if not self.window.buttons.animates.get():
            self.decode()
            return
        scene, line = self.state.scene, in_between(before, self._updated)
        self.window.do("animate", lambda report: decode_line(scene, line), partial(self._animate, scene))

    def _animate(self, scene, images):
        self.stop_animation()
        if not self._is_shown(scene):
            return
        self.window.show_image(images[0])
        following = partial(self._animate, scene, images[1:]) if len(images) > 1 else self.decode
        self._animation = self.window.after(ANIMATION_STEP, following)

    @property
    def is_animating(self):
        return self._animation is not None

    def stop_animation(self):
        """Show no further step of an update."""
        if self._animation is not None:
            self.window.after_cancel(self._animation)
            self._animation = None

    # --------------------------------------------------------------------------------------------------- time and zoom

    def show_time(self, time):
        """Show a frame; -1 is the last one."""
        if self.state is None:
            return
        last = self.state.scene.num_frames - 1
        time = last if time == -1 else min(max(time, 0), last)
        if time != self.state.time:
            self.state.time = time
            self._updated = self.state.shown
            self.window.show_state()
            self.decode()

    def step_time(self, steps):
        """Show the next frame, or the one before (-1)."""
        if self.state is not None:
            self.show_time(max(self.state.time + steps, 0))

    def set_handles(self, are_shown):
        """Show the particles, or hide them."""
        if self.state is not None:
            self.state.shows_handles = are_shown
            self.window.show_state()

    def toggle_handles(self):
        """Hide the particles, or show them."""
        if self.state is not None:
            self.set_handles(not self.state.shows_handles)

    def zoom(self, direction):
        """Zoom in (1), out (-1), or to the whole picture (0)."""
        canvas = self.window.canvas
        canvas.set_zoom(canvas.zoom * ZOOM_STEP**direction if direction else 1)

    # --------------------------------------------------------------------------------------------------------- playing

    def play(self):
        """Predict how the original and the edited video go on, and play both."""
        if self.state is None or not self.state.scene.loaded.is_dynamic:
            return
        scene, edits = self.state.scene, self.state.edits
        if self.compared is not None and self.compared[0] == edits:
            self._show_player(scene, edits, self.compared[1])
        elif "play" not in self.window.slow.keys or self._predicting != edits:
            self._predicting = edits
            self.window.say("predicting ...")
            self.window.do("play", lambda report: play(scene, edits, report), partial(self._show_player, scene, edits))

    def _show_player(self, scene, edits, compared):
        if not self._is_shown(scene):
            return
        self.compared = (edits, compared)
        if self.player is not None and self.player.winfo_exists():
            self.player.destroy()
        videos = [
            ("prediction", compared.video, compared.particles),
            ("what if", compared.altered_video, compared.altered_particles),
        ]
        if scene.frames is not None and len(scene.frames) > scene.num_frames:
            videos = [("recorded", scene.frames, None), *videos]
        self.player = Player(self.window, videos, scene.num_frames, self.window.unit, self.window.documents.export)
        self.window.say(f"{scene.num_frames} frames seen, {scene.horizon - scene.num_frames} predicted")
