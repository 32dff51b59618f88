"""Checks of arguments and inputs that layers share. Each raises an error that says what would be right."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from archzoo.arguments import Rules, described, fits
from archzoo.kernels._conv import check_input
from archzoo.kernels._op import under_autocast

Init = TypeVar("Init", bound=Callable[..., None])

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PYTHON = Rules(
    whole=Integral,
    largest=2**63 - 1,
    real=Real,
    largest_number=torch.finfo(torch.float32).max,
    finite=False,
    sequence=Sequence,
    longest=math.inf,
    classes=True,
    words={
        int: "a whole number below 2^63",
        float: "a number that float32 can hold",
        bool: "True or False",
        str: "a text",
        type(None): "None",
        Sequence: "a sequence",
        Callable: "a function",
    },
    brackets="()",
)
"""Of an argument of a layer, which says itself which infinite numbers are right."""

# --- Arguments --------------------------------------------------------------------------------------------------------


def typed(init: Init) -> Init:
    """Decorator of a layer's `__init__`: a ValueError for an argument of another type than it is annotated with.

    So that no layer repeats it, and each checks but what its numbers and names may be. Without it `bias="no"` is true,
    and `device=[]` an error of torch that names neither argument nor layer. The layer's own checks come first, for they
    say more. The rules are `PYTHON`. A device may be one that is not there: `FakeTensorMode` has such.
    """
    parameters = inspect.signature(init).parameters
    names = tuple(parameters)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        try:
            init(self, *args, **kwargs)
        except Exception as error:  # whatever a value of a wrong type brings about; it is raised again, or named
            text = str(error)
            if isinstance(error, ValueError) and any(f"{name}=" in text for name in given):
                raise
            _check_types(given, parameters)
            large = isinstance(error, RuntimeError) and any(words in text for words in ("overflow", "out of bounds"))
            if large or isinstance(error, _TooLarge):
                raise _TooLarge(f"{_numbers(given)}: a size, or a number for the dtype, is too large") from error
            raise
        _check_types(given, parameters)

    return checked  # type: ignore[return-value]  # `wraps` keeps the signature


class _TooLarge(ValueError):
    """Of a layer; one that has it as a part says so of its own arguments."""


def _numbers(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items() if type(value) in (int, float, tuple))


def _check_types(given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    for name, value in given.items():
        if name not in parameters:
            continue  # Python says so
        if name == "device":
            if not _is_device(value):
                raise ValueError(f"device={value!r}: must be a device that torch knows, as 'cpu', 'cuda:0' or 'meta'")
        elif name == "dtype":
            if value is not None and value not in DTYPES:
                raise ValueError(f"dtype={value!r}: must be one of {', '.join(map(str, DTYPES))}, or None")
        elif not fits(value, annotation := parameters[name].annotation, PYTHON):
            raise ValueError(f"{name}={value!r}: must be {described(annotation, PYTHON)}")


def _is_device(value: Any) -> bool:
    if not isinstance(value, str):
        return value is None or isinstance(value, torch.device | int)
    try:
        torch.device(value)
    except RuntimeError:
        return False
    return True


def check_whole(**values: Any) -> None:
    """A ValueError that names the first value that is not a whole number, 1 or more."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value}: must be a whole number, 1 or more, got {value!r}")


def check_positive(**values: Any) -> None:
    """A ValueError that names the first value that is not a finite number above 0."""
    for name, value in values.items():
        if not _is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: must be a finite number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_dropout(dropout: Any) -> None:
    """A ValueError unless it is a probability below 1."""
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: must be at least 0 and below 1")


# --- Inputs -----------------------------------------------------------------------------------------------------------


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """A TypeError unless x is a tensor; a ValueError unless it has the weight's device, and its dtype.

    Or autocast will give both the same dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input of type {type(x).__name__}: must be a tensor")
    if x.device != weight.device:  # on `meta`, an op may go on without the numbers, and nobody would notice
        raise ValueError(f"input on {x.device}: must be on {weight.device}, as the layer's parameters are")
    if x.dtype != weight.dtype and not (
        under_autocast(x) and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
    ):
        raise ValueError(f"input of {x.dtype}: must be {weight.dtype}, as the layer's parameters are")


def check_features(x: Tensor, in_features: int, weight: Tensor) -> None:
    """An error unless x is (*, in_features), and as `check_dtype` wants it."""
    check_dtype(x, weight)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"input of shape {tuple(x.shape)}: its last size must be in_features={in_features}")


def check_image(x: Tensor, channels: int, weight: Tensor) -> None:
    """An error unless x is (batch, channels, height, width), or without batch, and as `check_dtype` wants it."""
    check_dtype(x, weight)
    check_input(x, channels)


def check_tokens(x: Tensor, dim: int, weight: Tensor) -> None:
    """An error unless x is (batch, length, dim), and as `check_dtype` wants it."""
    check_dtype(x, weight)
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"input of shape {tuple(x.shape)}: must be (batch, length, dim) with dim={dim}")


def check_token(x: Tensor, weight: Tensor, dim: int) -> None:
    """An error unless x is one token (batch, 1, dim), and as `check_dtype` wants it."""
    check_dtype(x, weight)
    if x.dim() != 3 or x.shape[1:] != (1, dim):
        raise ValueError(f"token of shape {tuple(x.shape)}: must be (batch, 1, dim) with dim={dim}")
