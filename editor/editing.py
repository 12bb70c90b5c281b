"""What is done to the particles with mouse and keys: each gesture becomes edits of the `EditorState`."""

WHEEL_SCALE, WHEEL_DEPTH = 1.05, 0.1  # of a turn
PAUSE = 600  # milliseconds without a key or turn, after which the next begins a gesture of its own


class Editing:
    """Gestures on an `EditorWindow`'s state. While one lasts its edits are previewed; then they are done."""

    def __init__(self, window):
        self.window = window
        self._slid = ()  # the edits that are being made by dragging
        self._gesture, self._pause_timer = 0, None
        self._takes_appearance = False

    @property
    def state(self):
        """The window's `EditorState`, or None."""
        return self.window.state

    def begin(self):
        """Forget what was being done, as another scene is shown."""
        self._slid, self._takes_appearance = (), False

    def commit(self, edits, gesture=None):
        """Do edits, and show what they make."""
        if self.state is not None and self.state.commit(edits, gesture):
            self._show_edited()

    def _show_edited(self):
        self._slid = ()
        self.window.show_state()
        self.window.say("")  # what it said is past
        self.window.viewing.decode_live()

    def preview(self, edits):
        """Show edits while they are made."""
        self._slid = edits
        self.state.preview(edits)
        self.window.show_selection()
        self.window.viewing.decode_live()

    def drop(self, gesture=None):
        """Do what was previewed. gesture: the name of what is done by several keys or turns in a row."""
        if self._slid:
            self.commit(self._slid, gesture and self._next_gesture(gesture))

    # ------------------------------------------------------------------------------------------------------- selecting

    def select(self, particles, extend):
        """Select particles."""
        self.state.select(particles, extend)
        self.window.show_selection()

    def select_all(self):
        """Select all visible particles."""
        if self.state is not None:
            self.state.select_all()
            self.window.show_selection()

    def select_object(self):
        """Select what overlaps the particle that was selected first."""
        if self.state is not None and self.state.selection:
            self.select(self.state.overlapping(self.state.selection[0]), False)

    def give_up(self):
        """Stop what is being done with the mouse or the next press; else select nothing."""
        if self.state is None:
            return
        if self.window.canvas.stop_dragging() or self._slid:
            self.preview(())
        elif self._takes_appearance:
            self._takes_appearance = False
            self.window.say("")
        else:
            self.select((), False)

    # --------------------------------------------------------------------------------------------------------- editing

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
        if self._pause_timer is None:
            self._gesture += 1
        else:
            self.window.after_cancel(self._pause_timer)
        self._pause_timer = self.window.after(PAUSE, self._end_gesture)
        return name, self._gesture

    def _end_gesture(self):
        self._pause_timer = None

    def stop_pause(self):
        """Wait for no further key of a gesture."""
        if self._pause_timer is not None:
            self.window.after_cancel(self._pause_timer)
            self._pause_timer = None

    def remove(self):
        """Hide the selection."""
        if self.state is not None:
            self.commit(self.state.remove())

    def ask_appearance(self):
        """Let the next press choose whose appearance the selection takes over."""
        if self.state is not None and self.state.selection:
            self._takes_appearance = True
            self.window.say("press the particle whose appearance is to be taken over (Escape: none)")

    def takes_press(self, hit):
        """Whether a press on a particle (or None) was waited for."""
        if not self._takes_appearance:
            return False
        self._takes_appearance = False
        self.window.say("")
        if hit is not None:
            self.take_appearance(hit)
        return True

    def take_appearance(self, k):
        """Give the selection the appearance of the particle k."""
        if self.state is not None and not self.state.selection:
            self.window.say("press a particle first: the selected ones take over the appearance")
            return
        self.commit(self.state.appearance(k))

    def set_whole(self, is_whole):
        """Edit all frames alike from now on, or the one that is shown."""
        if self.state is not None:
            self.state.is_whole = is_whole

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
