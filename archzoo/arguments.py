"""Whether a value is what a function's annotation asks for, in a module that imports nothing heavy.

YAML, the command line and Python give values of any type, and nobody minds: `bias: "no"` is true, `width: true` is 1.
There is one set of rules, and `Rules` says what of it depends on where a value comes from: `YAML`, from a file that
people write by hand or that comes from anyone; `archzoo.layers._check.PYTHON`, from the call of a layer.
"""

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, Union, get_args, get_origin

LARGEST = 2**31 - 1
"""Of a whole number in YAML: sizes beyond it are a slip, and their products no longer fit what torch counts with."""
LONGEST = 100_000
"""Of a list or a mapping in YAML."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What depends on where values come from."""

    whole: Any
    """The type of a whole number, which no bool is. YAML's are ints, and are written to YAML again; Python has numpy's
    too."""
    largest: int
    """Of whole numbers."""
    real: Any
    """The type of a number, which is neither a bool nor NaN."""
    largest_number: float
    """Of finite numbers: what the function computes with."""
    finite: bool
    """Whether infinite numbers are refused."""
    sequence: Any
    """What does for a list of any length. A tuple of so many is a list or a tuple everywhere, and a text is neither."""
    longest: float
    """Of a list or a mapping: YAML may come from anyone."""
    classes: bool
    """Whether what is annotated with a class must be an instance: YAML has none, and a function makes it of a name."""
    words: Mapping[Any, str]
    """What an annotation is called; that of None is `type(None)`."""
    brackets: str
    """Of a tuple."""


YAML = Rules(
    whole=int,
    largest=LARGEST,
    real=int | float,
    largest_number=1e300,
    finite=True,
    sequence=list | tuple,
    longest=LONGEST,
    classes=False,
    words={
        int: f"a whole number up to {LARGEST}",
        float: "a finite number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
        Sequence: "a list",
    },
    brackets="[]",
)
INFINITE = replace(YAML, finite=False, largest_number=math.inf)
"""YAML whose infinite numbers the function refuses itself, and says what would be right."""


def fits(value: Any, annotation: Any, rules: Rules = YAML) -> bool:
    """Whether a value is of an annotated type. What is annotated with a class of ours is left to the function.

    A whole number is no bool, a number is not NaN, a list does for a tuple, and keys of a mapping are texts.

    Args:
        value: The value.
        annotation: As `inspect.signature` gives it.
        rules: Of where the value comes from.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, part, rules) for part in parts)
    if origin is Literal:
        return any(value is part or (type(value) is type(part) and value == part) for part in parts)
    if origin in (tuple, list, Sequence):
        fixed = origin is tuple and Ellipsis not in parts
        if isinstance(value, str | bytes) or not isinstance(value, (list, tuple) if fixed else rules.sequence):
            return False
        if fixed:
            return len(value) == len(parts) and all(fits(v, part, rules) for v, part in zip(value, parts, strict=True))
        return len(value) <= rules.longest and all(fits(v, parts[0], rules) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and len(value) <= rules.longest and all(isinstance(key, str) for key in value)
    if origin is Callable:
        return callable(value)
    if annotation is int:
        return isinstance(value, rules.whole) and not isinstance(value, bool) and abs(value) <= rules.largest
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, rules.real):
            return False
        size: Any = abs(value)
        if isinstance(value, Integral):  # torch takes no larger ones, not even for a float
            return size < 2**63
        return size <= rules.largest_number or (not rules.finite and size == math.inf)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if annotation in (None, type(None)):
        return value is None
    ours = getattr(annotation, "__module__", "archzoo.").startswith("archzoo.")
    return ours or not rules.classes or not isinstance(annotation, type) or isinstance(value, annotation)


def described(annotation: Any, rules: Rules = YAML) -> str:
    """What an annotation asks for, in words.

    >>> described(int | None)
    'a whole number up to 2147483647 or null'
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        told = [described(part, rules) for part in parts if get_origin(part) is not Callable or Callable in rules.words]
        return " or ".join(told)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple and Ellipsis not in parts:
        return ", ".join(described(part, rules) for part in parts).join(rules.brackets)
    if origin in (tuple, list, Sequence):
        return f"{rules.words[Sequence]}, each {described(parts[0], rules)}"
    if origin in (dict, Mapping):
        return "a mapping"
    word = rules.words.get(type(None) if annotation is None else origin or annotation)
    return word or (f"a {getattr(annotation, '__name__', annotation)}" if rules.classes else "a value")


def check_types(target: Callable[..., Any], options: Mapping[str, Any], rules: Rules = YAML) -> None:
    """Checks options against a function's annotations. Whether it has such options, `Registry.create` says.

    Args:
        target: The function or class.
        options: What it is to be called with, by name.
        rules: Of where the options come from.

    Raises:
        ValueError: With the first option that is of another type.
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"{_shown(options)}: must be a mapping of options to values")
    parameters = inspect.signature(target).parameters
    for name, value in options.items():
        if name in parameters and not fits(value, annotation := parameters[name].annotation, rules):
            raise ValueError(f"{name}={_shown(value)}: must be {described(annotation, rules)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
