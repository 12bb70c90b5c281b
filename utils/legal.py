"""Which values are legal, and the one way to say that a value is not."""

import json
import math
import numbers
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, field
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin

from utils.errors import UserError


def illegal(name, value, legal):
    """The `UserError` that says that `name` is `value`, and in words what is legal."""
    return UserError(f"{name} is {json.dumps(value, default=repr, ensure_ascii=False)}; legal: {legal}")


def check_choice(name, value, choices):
    """`UserError` unless `value` is one of the `choices`."""
    if value not in choices:
        raise illegal(name, value, one_of(*choices).text)


def check(name, value, legal, is_legal):
    """`UserError` unless `is_legal`; `legal` says in words which values are."""
    if not is_legal:
        raise illegal(name, value, legal)


def check_at_least_1(name, value):
    """`UserError` if `value` is below 1."""
    check(name, value, "at least 1", value >= 1)


def whole_number(name, value, lowest=1):
    """`value` as an int; `UserError` unless it is a whole number of at least `lowest`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < lowest:
        raise illegal(name, value, f"a whole number of at least {lowest}")
    return int(value)


class Legal(NamedTuple):
    """Which values of a key's type are legal, in words and as a test."""

    text: str
    test: Callable[[Any], bool]


def at_least(low):
    return Legal(f"at least {low}", lambda value: value >= low)


def one_of(*choices):
    return Legal(" or ".join(json.dumps(choice) for choice in choices), lambda value: value in choices)


def channels(count):
    """At least ``count`` channel counts that group normalisation can split into 4 or 5 groups."""
    return Legal(
        f"{count} or more, each a positive multiple of 4 or 5",
        lambda value: len(value) >= count and all(c > 0 and (c % 4 == 0 or c % 5 == 0) for c in value),
    )


def several_of(*choices):
    """A list of choices, each at most once."""
    return Legal(
        f"one or more of {', '.join(choices)}, each once",
        lambda value: len(value) > 0 and set(value) <= set(choices) and len(set(value)) == len(value),
    )


ANY = Legal("", lambda value: True)
POSITIVE = Legal("above 0", lambda value: value > 0)
POSITIVE_TO_1 = Legal("above 0 and at most 1", lambda value: 0 < value <= 1)
BELOW_1 = Legal("at least 0 and below 1", lambda value: 0 <= value < 1)
FRACTION = Legal("from 0 to 1", lambda value: 0 <= value <= 1)
BETAS = Legal("each at least 0 and below 1", lambda value: all(0 <= beta < 1 for beta in value))
INCREASING = Legal("the first below the second", lambda value: value[0] < value[1])
NOT_EMPTY = Legal("not empty", bool)
NAME = Legal("not empty and without / or \\", lambda value: bool(re.fullmatch(r"[^/\\\0]+", value)))
AFFIX = Legal("without / or \\", lambda value: bool(re.fullmatch(r"[^/\\\0]*", value)))
DEVICE = Legal('"cpu", "cuda" or "cuda:N"', lambda value: bool(re.fullmatch(r"cpu|cuda(:[0-9]+)?", value)))
SEED = Legal("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)


# ------------------------------------------------------------------------------------------------ keys of dataclasses


def key(default, meaning, legal=ANY, resumable=False, is_path=False):
    """A dataclass's field with its default (MISSING: it must be given), its meaning in words and its legal values.

    resumable: whether it may change when a run goes on, as it decides no number but where training ends; is_path:
    whether it names a file or folder, in which ~ and variables of the environment are expanded.
    """
    metadata = {"meaning": meaning, "legal": legal, "resumable": resumable, "is_path": is_path}
    return field(default=default, metadata=metadata)


def check_key(entry, value):
    """``value`` as the type of the key ``entry``, or `UserError`. Lists serve as tuples, integers as floats."""
    try:
        value = _convert(value, entry.type)
        if value is not None and entry.metadata["is_path"]:
            value = os.path.expanduser(os.path.expandvars(value))
        is_legal = value is None or entry.metadata["legal"].test(value)
    except (TypeError, OverflowError):  # another type, or an integer too large for a float
        is_legal = False
    if not is_legal:
        raise illegal(entry.name, value, describe(entry))
    return value


def check_keys(instance, entries):
    """Check and convert the keys ``entries`` of a frozen dataclass's instance, in place."""
    for entry in entries:
        object.__setattr__(instance, entry.name, check_key(entry, getattr(instance, entry.name)))


def describe(entry):
    """What is legal for a key, in words: its type and values."""
    legal = entry.metadata["legal"].text
    null = ", or null" if is_nullable(entry.type) else ""
    return f"{_describe_type(entry.type)}{', ' if legal else ''}{legal}{null}"


def help_text(entry):
    """A key's meaning, legal values and default, in words."""
    default = "" if entry.default is MISSING else f"; default {json.dumps(entry.default)}"
    return f"{entry.metadata['meaning']} ({describe(entry)}{default})"


def is_list(kind):
    return get_origin(kind) is tuple


def is_nullable(kind):
    return NoneType in get_args(kind)


def parse(text, kind):
    """What ``text`` (a list of texts for a list) means as ``kind``; the text itself if it is none."""
    if is_list(kind):
        return _parse_list(" ".join(text), get_args(kind)[0])
    if is_nullable(kind):
        return None if text.lower() in ("null", "none") else parse(text, get_args(kind)[0])
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _parse_list(text, kind):
    if not text.startswith("["):
        return [parse(item, kind) for item in text.replace(",", " ").split()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _convert(value, kind):
    """``value`` as ``kind``; TypeError if it is something else."""
    if is_nullable(kind):
        return None if value is None else _convert(value, get_args(kind)[0])
    if is_list(kind):
        items = get_args(kind)
        if not isinstance(value, (list, tuple)) or (Ellipsis not in items and len(value) != len(items)):
            raise TypeError
        return tuple(_convert(item, items[0]) for item in value)
    accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    if kind is float and not math.isfinite(value):
        raise TypeError
    return kind(value)


def _describe_type(kind):
    if is_nullable(kind):
        return _describe_type(get_args(kind)[0])
    if is_list(kind):
        items = get_args(kind)
        plural = {int: "integers", float: "finite numbers", str: "strings"}[items[0]]
        return f"a list of {plural}" if Ellipsis in items else f"a list of {len(items)} {plural}"
    return {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}[kind]
