"""Whether a value is what a function's annotation asks for, in a module that imports nothing heavy.

YAML and the command line give values of any type, and Python does not mind: `bias: "no"` is true, `width: true` is 1.
"""

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

LARGEST = 2**31 - 1
"""Of a whole number: sizes beyond it are a slip, and their products no longer fit what torch counts with."""
LONGEST = 100_000
"""Of a list or a mapping."""


def fits(value: Any, annotation: Any, finite: bool = True) -> bool:
    """Whether a value is of an annotated type. What is annotated with a class is left to the function.

    A whole number is no bool, a number is not NaN, a list does for a tuple.

    Args:
        value: As YAML has it.
        annotation: As `inspect.signature` gives it.
        finite: Whether infinite numbers are refused too.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, part, finite) for part in parts)
    if origin is Literal:
        return any(value is part or (type(value) is type(part) and value == part) for part in parts)
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list | tuple) or len(value) > LONGEST:
            return False
        if origin is tuple and Ellipsis not in parts:
            return len(value) == len(parts) and all(fits(v, part, finite) for v, part in zip(value, parts, strict=True))
        return all(fits(v, parts[0], finite) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and len(value) <= LONGEST and all(isinstance(key, str) for key in value)
    if origin is not None and not isinstance(origin, type):
        return True
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            return False
        return not finite or (abs(value) <= 1e300 and math.isfinite(value))
    if annotation in (bool, str):
        return isinstance(value, annotation)
    return value is None if annotation in (None, type(None)) else True


def described(annotation: Any) -> str:
    """What an annotation asks for, in words.

    >>> described(int | None)
    'a whole number up to 2147483647 or null'
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(described(part) for part in parts if get_origin(part) is not Callable)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple and Ellipsis not in parts:
        return f"[{', '.join(map(described, parts))}]"
    if origin in (tuple, list, Sequence):
        return f"a list, each {described(parts[0])}"
    if origin in (dict, Mapping):
        return "a mapping"
    words = {int: f"a whole number up to {LARGEST}", float: "a finite number", bool: "true or false", str: "a text"}
    return words.get(annotation) or ("null" if annotation in (None, type(None)) else "a value")


def check_types(target: Callable[..., Any], options: Mapping[str, Any], finite: bool = True) -> None:
    """Checks options against a function's annotations. Whether it has such options, `Registry.create` says.

    Args:
        target: The function or class.
        options: What it is to be called with, by name.
        finite: Whether infinite numbers are refused too.

    Raises:
        ValueError: With the first option that is of another type.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"{_shown(options)}: must be a mapping of options to values")
    parameters = inspect.signature(target).parameters
    for name, value in options.items():
        if name in parameters and not fits(value, annotation := parameters[name].annotation, finite):
            raise ValueError(f"{name}={_shown(value)}: must be {described(annotation)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
