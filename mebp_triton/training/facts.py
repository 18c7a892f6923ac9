"""The facts about a setting: its help, its range, and who depends on it; and the checks of a value by them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

MOST_INTEGER = (1 << 31) - 1  # the largest length or count, which so fits into 32 bits


@dataclass(frozen=True)
class Facts:
    """Everything about one setting besides its name, type and default.

    Attributes:
        help: the help of its flag.
        least, most: the smallest and the largest value allowed.
        above, below: like ``least`` and ``most``, but these values themselves are not allowed.
        on_cpu, on_gpu: what None becomes on a CPU and on a GPU; None where None means something of its own.
        resume: "same" if a resumed run must have the value it was begun with; "free" if the value does not change the
            numbers of a step, but for rounding on another device.
        traced: whether the model that the planner traces depends on it.
        chosen: whether a plan may choose it.
        evaluated: whether it says on which data the losses of ``run.json`` were evaluated.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    on_cpu: Any = None
    on_gpu: Any = None
    resume: Literal["same", "free"] = "same"
    traced: bool = False
    chosen: bool = False
    evaluated: bool = False


def setting(default: Any, help: str, **facts: Any) -> Any:
    """Declares a field of ``TrainConfig``: its default, the help of its flag, and further ``Facts`` about it."""
    return field(default=default, metadata={"help": help, "facts": Facts(help, **facts)})


def check_type(name: str, kind: Any, value: Any) -> None:
    """Raises ValueError where ``value`` is none of a Literal's values, or not of the field's type ``kind``."""
    allowed = get_args(kind) if get_origin(kind) not in (None, Literal) else (kind,)
    if value is None and type(None) in allowed:
        return
    for part in allowed:
        if get_origin(part) is Literal:
            if value in get_args(part):
                return
            raise ValueError(f"{name} must be one of {', '.join(get_args(part))}, got {value!r:.200}")
    plain = tuple(part for part in allowed if part is not type(None))
    # A bool is an int to Python, and a whole number is good enough for a float.
    fits = bool in plain if isinstance(value, bool) else isinstance(value, plain)
    if not fits and not (float in plain and type(value) is int):
        raise ValueError(f"{name} must be of type {plain[0].__name__}, got {value!r:.200}")


def check_range(name: str, facts: Facts, value: Any) -> None:
    """Raises ValueError where ``value`` is a number that is not finite, or out of the range of ``facts``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    most = facts.most
    if isinstance(value, int) and most is None:
        most = MOST_INTEGER
        if value < -MOST_INTEGER:  # a whole number that no float can hold, say
            raise ValueError(f"{name} must be at least {facts.least or -MOST_INTEGER}, got {value}")
    too_small = facts.least is not None and value < facts.least or facts.above is not None and value <= facts.above
    too_large = most is not None and value > most or facts.below is not None and value >= facts.below
    if too_small or too_large:
        raise ValueError(f"{name} must be {_range(facts, too_small)}, got {value}")


def _range(facts: Facts, too_small: bool) -> str:
    """Says which bound was broken; of a part of 1, both bounds."""
    low, high = facts.least if facts.above is None else facts.above, facts.most if facts.below is None else facts.below
    if low is not None and high == 1:
        return f"in {'[' if facts.above is None else '('}{low:g}, {high:g}{']' if facts.below is None else ')'}"
    if too_small:
        return f"at least {facts.least}" if facts.above is None else f"larger than {facts.above:g}"
    return f"at most {MOST_INTEGER if high is None else high}"
