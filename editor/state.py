"""What the editor edits and shows, without a window: particles, edits that can be undone, the selection, the time.

Positions are (y, x) from -1 to 1, as everywhere; k is a particle's number, t a seen frame's.
"""

import math
from dataclasses import replace

import torch

from modules.particles import VISIBLE
from rundir.edits import LARGEST_SIDE, Edit, EditFile, apply_edits, shown_path

DECIMALS = 4  # of the values of edits: a fiftieth of a pixel of 128
SMALLEST_SIDE = 0.01  # that a particle can be made, as a fraction of the image's
IN_BETWEEN = 10  # steps of an animated update


class EditorState:
    """A `Scene` and what was done to it.

    Attributes:
        time: the frame that is shown.
        selection: the selected particles, the one pressed first.
        is_whole: whether edits change all frames, so that motion is kept, or the one that is shown.
        shows_handles: whether particles are drawn.
    """

    def __init__(self, scene, edits=()):
        self.scene = scene
        # What the edits done, and those previewed on top, make of the particles, as long as it is asked for again.
        self._applied = tuple(edits)
        self._applied_particles = apply_edits(scene.particles, edits)  # raises where they do not fit
        self._previewed, self._preview_particles = None, None
        self.time = scene.num_frames - 1
        self.selection = ()
        self.is_whole = not scene.loaded.is_dynamic
        self.shows_handles = True
        # What is opened is undone as what is done: edit by edit.
        self._history, self._position = [tuple(edits[:i]) for i in range(len(edits) + 1)], len(edits)
        self._gesture = None  # what the last entry of the history belongs to
        self._preview = ()
        self._saved = tuple(edits)

    # ---------------------------------------------------------------------------------------------------- particles

    @property
    def edits(self):
        """The edits that are done, in order."""
        return self._history[self._position]

    @property
    def particles(self):
        """`Particles` [1, T, ...] as edited, what is being previewed included."""
        done = self._done()
        if not self._preview:
            return done
        if self._previewed != (self.edits, self._preview):
            self._previewed = (self.edits, self._preview)
            self._preview_particles = apply_edits(done, self._preview, done=self.edits)
        return self._preview_particles

    @property
    def shown(self):
        """The shown frame's `Particles` [1, ...]."""
        return self.particles.frames(self.time)

    def side(self, k):
        """How large a particle is, the geometric mean of height and width, as a fraction of the image's side."""
        return mean_side(self.shown.z_scale[0, k])

    # ---------------------------------------------------------------------------------------------------- selection

    def select(self, particles, extend=False):
        """Select the particles, in their order; extend: beside those that are, or no more where they all are."""
        particles = tuple(dict.fromkeys(particles))
        if not extend:
            self.selection = particles
        elif set(particles) <= set(self.selection):
            self.selection = tuple(k for k in self.selection if k not in particles)
        else:
            self.selection = tuple(dict.fromkeys((*self.selection, *particles)))

    def select_all(self):
        """Select the visible particles."""
        self.selection = tuple((self.shown.obj_on[0] > VISIBLE).nonzero()[:, 0].tolist())

    def pick(self, y, x, radius):
        """The particle nearest to (y, x) in the shown frame, if one is within `radius`; of several at one place a
        selected one, then a visible one."""
        distance = (self.shown.z[0].cpu() - torch.tensor([y, x])).norm(dim=-1)
        near = (distance <= min(radius, distance.min().item() + 0.01)).nonzero()[:, 0].tolist()
        visible = (self.shown.obj_on[0] > VISIBLE).tolist()
        return min(near, key=lambda k: (k not in self.selection, not visible[k], k)) if near else None

    def within(self, top, left, bottom, right):
        """The particles in a rectangle of the shown frame."""
        y, x = self.shown.z[0].cpu().unbind(-1)
        inside = (y >= min(top, bottom)) & (y <= max(top, bottom)) & (x >= min(left, right)) & (x <= max(left, right))
        return tuple(inside.nonzero()[:, 0].tolist())

    def overlapping(self, k):
        """The particle and those whose centres lie within a quarter of its side of its own, as those of one object
        do."""
        shown = self.shown
        distance = (shown.z[0] - shown.z[0, k]).abs() / 2  # as fractions of the image's side
        near = (distance <= torch.sigmoid(shown.z_scale[0, k]) / 4).all(-1)
        return (k, *(other for other in near.nonzero()[:, 0].tolist() if other != k))

    # -------------------------------------------------------------------------------------------------------- edits

    def move(self, dy, dx):
        """The edits that move the selection; like those below, for `preview` or `commit`."""
        return self._edits("move", _rounded(dy), _rounded(dx))

    def scale(self, factor):
        """The edits that make the selection so many times as large, as far as it may be."""
        sides = torch.sigmoid(self._done().z_scale[0, self.time, list(self.selection)])
        if sides.numel():
            factor = min(max(factor, SMALLEST_SIDE / sides.min().item()), LARGEST_SIDE / sides.max().item())
        return self._edits("scale", max(_rounded(factor), 10**-DECIMALS))

    def depth(self, change):
        """The edits that move the selection to the back, or to the front where `change` is below 0."""
        return self._edits("depth", _rounded(change))

    def scale_to(self, side):
        """`scale` such that the particle that was selected first is of that `side`."""
        if not self.selection:
            return ()
        return self.scale(side / mean_side(self._done().z_scale[0, self.time, self.selection[0]]))

    def depth_to(self, depth):
        """`depth` such that the particle that was selected first is at that depth."""
        if not self.selection:
            return ()
        return self.depth(depth - self._done().z_depth[0, self.time, self.selection[0], 0].item())

    def transparency(self, value):
        """The edits that set the selection's transparency in all frames."""
        return self._edits("transparency", min(max(_rounded(value), 0.0), 1.0))

    def appearance(self, other):
        """The edits that give the selection the appearance of the particle `other` in all frames."""
        return self._edits("appearance", float(other))

    def remove(self):
        """The edits that hide the selection in all frames."""
        return self._edits("remove")

    def _edits(self, kind, *values):
        frame = self.time if kind in ("move", "scale", "depth") and not self.is_whole else None
        return (Edit(kind, self.selection, values, frame),) if self.selection else ()

    def _done(self):
        if self._applied != self.edits:
            self._applied = self.edits
            self._applied_particles = apply_edits(self.scene.particles, self.edits)
        return self._applied_particles

    def preview(self, edits):
        """Show edits that are not done yet, in place of those previewed before."""
        self._preview = tuple(edits)

    def commit(self, edits, gesture=None):
        """Do edits. gesture: consecutive edits of one gesture (equal, not None), such as a key that is held, are undone
        as one. Edits that change nothing are left out. Returns whether anything was done."""
        self._preview = ()
        edits = tuple(edit for edit in edits if not _is_idle(edit))
        if not edits:
            return False
        is_same = gesture is not None and gesture == self._gesture and self._position > 0
        before = self.edits
        for edit in edits:
            joined = join(before[-1], edit) if is_same and before else None
            before = (*before, edit) if joined is None else (*before[:-1], joined)
        if is_same:
            self._position -= 1
        self._push(before, gesture)
        return True

    def _push(self, edits, gesture=None):
        self._history[self._position + 1 :] = [edits]
        self._position += 1
        self._gesture = gesture

    def undo(self):
        """Undo the last gesture; returns whether there was one."""
        return self._go(-1)

    def redo(self):
        """Do what was undone last again; returns whether there was anything."""
        return self._go(1)

    def _go(self, steps):
        self._preview, self._gesture = (), None
        if not 0 <= self._position + steps < len(self._history):
            return False
        self._position += steps
        return True

    @property
    def can_undo(self):
        return self._position > 0

    @property
    def can_redo(self):
        return self._position + 1 < len(self._history)

    def reset(self):
        """Take all edits back, which can be undone; returns whether there were any."""
        self._preview = ()
        if not self.edits:
            return False
        self._push(())
        return True

    # --------------------------------------------------------------------------------------------------------- files

    @property
    def is_modified(self):
        """Whether there are edits that were not saved."""
        return self.edits != self._saved

    def file(self):
        """The `EditFile` of what was done."""
        scene = self.scene
        model = shown_path(scene.loaded.path)
        return EditFile(model, scene.video, scene.seed, scene.num_frames, scene.horizon, self.edits)

    def save(self, path):
        """Write the edits; `UserError` where that cannot be."""
        self.file().write(path)
        self._saved = self.edits

    def command(self):
        """The `what_if.py` command that shows the same."""
        return self.file().command()


def mean_side(z_scale):
    """The geometric mean of height and width of logits [2], as a fraction of the image's side."""
    return torch.sigmoid(z_scale).prod().sqrt().item()


def join(first, second):
    """The one edit that does what two in a row do, or None where there is none."""
    if (first.kind, first.particles, first.frame) != (second.kind, second.particles, second.frame):
        return None
    if first.kind in ("move", "depth"):
        return replace(second, values=tuple(_rounded(a + b) for a, b in zip(first.values, second.values, strict=True)))
    if first.kind == "scale":
        return replace(second, values=(_rounded(first.values[0] * second.values[0]),))
    return second


def in_between(before, after, steps=IN_BETWEEN):
    """`steps` frames from `before` to `after`, `Particles` [1, ...] each, the last of them `after` itself, each
    attribute on a straight line: `Particles` [steps, ...]."""
    shares = torch.arange(1, steps + 1) / steps
    targets = iter(after.leaves())

    def line(start):
        share = shares.to(start).view(-1, *[1] * (start.dim() - 1))
        return torch.lerp(start.expand(steps, *start.shape[1:]), next(targets).expand(steps, *start.shape[1:]), share)

    return before.map(line)


def _is_idle(edit):
    if edit.kind in ("move", "depth"):
        return not any(edit.values)
    return (edit.kind == "scale" and edit.values[0] == 1) or (
        edit.kind == "appearance" and set(edit.particles) == {int(edit.values[0])}
    )


def _rounded(value):
    return round(value, DECIMALS) if math.isfinite(value) else 0.0
