"""Edits: what is changed about the particles that a model sees, as data.

An edit moves, scales or hides some particles, in every frame that the model sees or in one of them, from where it
fades out towards frames that are left as they are. Edits are applied in order. A file of edits (`EditFile`) says what
they are edits of: the model, and the video or the seed of the frames that it sees. The editor writes and reads such
files, and `what_if.py` replays them.
"""

import os
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from utils.errors import UserError
from utils.files import read_json, write_json
from utils.legal import illegal

# What can be done to a particle: the names of the values, and what it does.
EDITS = {
    "move": (("DY", "DX"), "move by so much"),
    "place": (("Y", "X"), "move to where it is there in the last frame seen, or in FRAME"),
    "scale": (("FACTOR",), "make it so many times as high and wide"),
    "depth": (("CHANGE",), "move it back (above 0) or to the front"),
    "transparency": (("VALUE",), "set its transparency, 0 (invisible) to 1, and keep it"),
    "appearance": (("OTHER",), "give it the appearance of the particle OTHER"),
    "remove": ((), "make it invisible, for good"),
}
# The edits that one frame can have for itself: what they change.
CHANGES = {"move": "position", "place": "position", "scale": "scale", "depth": "depth"}
# Of the edits whose value cannot be any number: what it can be.
LEGAL_VALUES = {
    "scale": ("above 0", lambda value: value > 0),
    "transparency": ("0 to 1", lambda value: 0 <= value <= 1),
    "appearance": ("a particle's number", lambda value: value >= 0 and value == int(value)),
}
LEAST_SIDE, LARGEST_SIDE = 1e-6, 1 - 1e-4  # of a particle, as a fraction of the image's: its logit is finite
LARGEST_VALUE = 1e6  # of an edit: far more than makes sense, and what follows from it is finite
VERSION = 1  # of the files


@dataclass(frozen=True)
class Edit:
    """A change of some particles. kind: a key of `EDITS`, which says how many `values` it has; particles: their
    numbers, from 0; frame: the one that is changed, from 0 (None: all). `UserError` where these are not legal."""

    kind: str
    particles: tuple[int, ...]
    values: tuple[float, ...] = ()
    frame: int | None = None

    def __post_init__(self):
        if self.kind not in EDITS:
            raise UserError(f"unknown edit {self.kind}; legal: {', '.join(EDITS)}")
        names, given = EDITS[self.kind][0], len(self.values)
        if given != len(names):
            raise UserError(
                f"{self.kind} has {given} values; legal: {len(names)}{' ' if names else ''}{', '.join(names)}"
            )
        if not self.particles:
            raise UserError(f"{self.kind} is of no particle; legal: at least one")
        if not all(abs(value) <= LARGEST_VALUE for value in self.values):  # nor one that is not a number
            numbers = ", ".join(f"{value:g}" for value in self.values)
            raise UserError(f"{self.kind} is {numbers}; legal: -{LARGEST_VALUE:g} to {LARGEST_VALUE:g}")
        words, is_legal = LEGAL_VALUES.get(self.kind, ("", lambda value: True))
        if self.values and not is_legal(self.values[0]):
            raise UserError(f"{self.kind} is {self.values[0]:g}; legal: {words}")
        if self.frame is not None and self.kind not in CHANGES:
            raise UserError(f"{self.kind} has a frame, {self.frame}; legal: none, but with {', '.join(CHANGES)}")

    def check(self, count, num_frames):
        """`UserError` unless there are such particles among `count`, and such a frame among `num_frames`."""
        others = [int(self.values[0])] if self.kind == "appearance" else []
        for k in (*self.particles, *others):
            if not 0 <= k < count:
                raise UserError(f"{self.kind}: there is no particle {k}; legal: 0 to {count - 1}")
        if self.frame is not None and not 0 <= self.frame < num_frames:
            raise UserError(f"{self.kind}: frame {self.frame} is not seen; legal: 0 to {num_frames - 1}")

    @property
    def kept_transparency(self):
        """The transparency that the particles keep in the predicted frames too, or None."""
        return {"remove": 0.0, "transparency": self.values[0] if self.values else None}.get(self.kind)

    def option(self):
        """The edit as a command line has it: the option and its text."""
        values = ",".join(_shortest(value) for value in self.values)
        frame = "" if self.frame is None else f"@{self.frame}"
        numbers = ",".join(map(str, self.particles))
        return f"--{self.kind}", f"{numbers}{frame}{':' if values else ''}{values}"


def _shortest(value):
    """The shortest text that is this number again."""
    return repr(float(value)).removesuffix(".0")


def apply_edits(particles, edits, done=()):
    """`Particles` [B, T, ...], changed by the edits in order.

    An edit of one frame fades out, linearly in time, towards the nearest frames that stay as they are: the first, the
    last, and those in which the same was edited before. done: the edits that `particles` have had already.
    `UserError` for particles or frames that are not there.
    """
    num_frames, count = particles.z.shape[1:3]
    changed = particles.map(torch.clone)
    set_frames = {}  # of a particle and what is changed of it: the frames that were edited
    for i, edit in enumerate((*done, *edits)):
        edit.check(count, num_frames)
        frames = [set_frames.setdefault((k, CHANGES.get(edit.kind)), {0, num_frames - 1}) for k in edit.particles]
        if i >= len(done):
            weights = changed.z.new_ones(num_frames, len(edit.particles))
            if edit.frame is not None:
                columns = [fading_weights(num_frames, edit.frame, fixed) for fixed in frames]
                weights = torch.stack(columns, dim=-1).to(weights)
            _change(changed, edit, weights[..., None])
        if edit.frame is not None:
            for fixed in frames:
                fixed.add(edit.frame)
    return changed


def fading_weights(num_frames, frame, fixed):
    """[num_frames]: 1 at `frame`, from where it falls to 0 at the nearest of the frames `fixed` before and after it."""
    before = max((f for f in fixed if f < frame), default=frame)
    after = min((f for f in fixed if f > frame), default=frame)
    weights = torch.zeros(num_frames)
    weights[before : frame + 1] = torch.linspace(0, 1, frame - before + 1) if before < frame else 1.0
    weights[frame : after + 1] = torch.linspace(1, 0, after - frame + 1) if after > frame else 1.0
    return weights


def _change(particles, edit, weights):
    """Change `Particles` [B, T, ...] in place. weights: how much of the edit each frame has for each of its particles,
    [T, n, 1]."""
    k, values = list(edit.particles), particles.z.new_tensor(edit.values)
    if edit.kind == "move":
        particles.z[:, :, k] += weights * values
    elif edit.kind == "place":
        frame = -1 if edit.frame is None else edit.frame
        particles.z[:, :, k] += weights * (values - particles.z[:, frame, k].unsqueeze(1))
    elif edit.kind == "scale":
        side = torch.sigmoid(particles.z_scale[:, :, k]) * values**weights
        particles.z_scale[:, :, k] = side.clamp(LEAST_SIDE, LARGEST_SIDE).logit()
    elif edit.kind == "depth":
        particles.z_depth[:, :, k] += weights * values
    elif edit.kind == "appearance":
        particles.z_features[:, :, k] = particles.z_features[:, :, [int(edit.values[0])]]
    else:
        particles.obj_on[:, :, k] = edit.kept_transparency


def constraint(edits):
    """What the edits ask of predicted frames: a function of `Particles` [B, T, ...], as `ObjectDynamicsDLP.predict`
    takes it. Transparencies stay as set."""
    kept = [(list(edit.particles), edit.kept_transparency) for edit in edits if edit.kept_transparency is not None]

    def keep_transparency(frame):
        obj_on = frame.obj_on.clone()
        for particles, value in kept:
            obj_on[:, :, particles] = value
        return replace(frame, obj_on=obj_on)

    return keep_transparency


def parse_edit(kind, text):
    """The `Edit` in ``K[,K...][@FRAME][:VALUE[,VALUE...]]``."""
    numbers, _, values = text.partition(":")
    numbers, _, frame = numbers.partition("@")
    try:
        particles = tuple(int(number) for number in numbers.split(","))
        values = tuple(float(value) for value in values.split(",")) if values else ()
        frame = int(frame) if frame else None
    except ValueError:
        raise UserError(f"--{kind} {text}: not numbers; legal: --{kind} {edit_form(kind)}") from None
    try:
        return Edit(kind, particles, values, frame)
    except UserError as error:
        raise UserError(f"--{kind} {text}: {error}") from None


def edit_form(kind):
    """What `parse_edit` reads, in capitals."""
    names, _ = EDITS[kind]
    return f"K{'[@FRAME]' if kind in CHANGES else ''}{':' if names else ''}{','.join(names)}"


# ------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class EditFile:
    """Edits, and what they are edits of.

    model: a run directory; video: the file, folder of frames or image whose first `cond_steps` frames the model sees,
    or None where they are generated with `seed`; horizon: frames in all. Paths are relative to the working directory.
    """

    model: str
    video: str | None
    seed: int | None
    cond_steps: int
    horizon: int
    edits: tuple[Edit, ...] = ()

    @classmethod
    def read(cls, path):
        """The file at `path`; `UserError` for what is missing or not legal. A path in it that is not there from the
        working directory is taken from the file's folder."""
        values = read_json(path)
        names = [field.name for field in fields(cls)]
        version = values.get("particle_edits") if isinstance(values, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise UserError(f"{path}: written by a later version, in format {version}; legal: {VERSION}")
        if version != VERSION:
            raise UserError(f'{path}: not a file of edits; legal: a JSON object with "particle_edits": {VERSION}')
        for name in values:
            if name not in (*names, "particle_edits"):
                raise UserError(f"{path}: {name} is unknown; legal: {', '.join(names)}")
        try:
            _check_types(values, names)
            edits = tuple(_edit_of(entry) for entry in values["edits"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        paths = {name: values[name] and find_beside(values[name], path) for name in ("model", "video")}
        return cls(**paths, **{name: values[name] for name in ("seed", "cond_steps", "horizon")}, edits=edits)

    def write(self, path):
        """Write it as JSON, atomically where it can be."""
        values = {"particle_edits": VERSION, **{field.name: getattr(self, field.name) for field in fields(self)}}
        values["edits"] = [_entry_of(edit) for edit in self.edits]
        write_json(path, values)

    def command(self):
        """The command, a text, that shows the same without a window."""
        words = ["python", "what_if.py", "-p", self.model]
        words += ["--seed", str(self.seed)] if self.video is None else ["--video", self.video]
        if self.video is not None and self.horizon > 1:
            words += ["-c", str(self.cond_steps)]
        words += ["--horizon", str(self.horizon)] if self.horizon > 1 else []
        return shlex.join([*words, *(word for edit in self.edits for word in edit.option())])


def _check_types(values, names):
    """`UserError` unless the values of a file are of their types."""
    whole = ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
    text = ("a path", lambda value: isinstance(value, str))
    legal = {
        "model": text,
        "video": ("a path, or null with a seed", lambda value: value is None or isinstance(value, str)),
        "seed": (
            "a whole number from 0 to 2^32 - 1, or null",
            lambda value: value is None or (whole[1](value) and 0 <= value < 2**32),
        ),
        "cond_steps": (f"{whole[0]} from 1 on", lambda value: whole[1](value) and value >= 1),
        "horizon": (f"{whole[0]} from 1 on", lambda value: whole[1](value) and value >= 1),
        "edits": ("a list", lambda value: isinstance(value, list)),
    }
    for name in names:
        if name not in values:
            raise UserError(f"{name} is missing; legal: {legal[name][0]}")
        if not legal[name][1](values[name]):
            raise illegal(name, values[name], legal[name][0])
    if values["video"] is None and values["seed"] is None:
        raise UserError("neither video nor seed is given; legal: one of them")


def _entry_of(edit):
    entry = {"kind": edit.kind, "particles": list(edit.particles), "values": list(edit.values)}
    return entry if edit.frame is None else {**entry, "frame": edit.frame}


def _edit_of(entry):
    legal = '{"kind": ..., "particles": [...], "values": [...]} and, for one frame, "frame"'
    names = {"kind", "particles", "values"}
    if not isinstance(entry, dict) or not names <= set(entry) <= names | {"frame"}:
        raise illegal("an edit", entry, legal)
    numbers = (
        [*entry["particles"], *([] if entry.get("frame") is None else [entry["frame"]])]
        if isinstance(entry["particles"], list)
        else [None]
    )
    values = entry["values"] if isinstance(entry["values"], list) else [None]
    if not (
        isinstance(entry["kind"], str)
        and all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    ):
        raise illegal("an edit", entry, legal)
    try:
        values = tuple(map(float, values))
    except OverflowError:  # a whole number of hundreds of digits
        raise UserError(f"{entry['kind']} has a value that is too large; legal: at most {LARGEST_VALUE:g}") from None
    return Edit(entry["kind"], tuple(entry["particles"]), values, entry.get("frame"))


def find_beside(path, file):
    """`path`, or the same from the folder of `file` if only that is there."""
    beside = Path(file).parent / path
    return str(beside) if not Path(path).exists() and beside.exists() else path


def shown_path(path):
    """A path from the working directory, if it lies below that; else as a whole."""
    path = Path(path).resolve()
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
