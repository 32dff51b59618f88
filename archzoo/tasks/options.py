"""Checks of a task's options. A wrong one is a ValueError with its name, its value and what would be right."""

import math
from collections.abc import Iterable
from typing import Any

from archzoo.names import suggest


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """The value, if it is an int from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: must be a whole number from {low} to {high}")
    return value


def number(name: str, value: Any, low: float, high: float) -> float:
    """The value, if it is a number from `low` to `high`; neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r}: must be a number from {low:g} to {high:g}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name}={value!r}: must be from {low:g} to {high:g}")
    return float(value)


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """The value, if it is one of the choices; else the message suggests the nearest ones."""
    names = sorted(choices)
    if value not in names:
        raise ValueError(f"{name}={value!r}: there is no such {name}; {suggest(str(value), names)}")
    return str(value)
