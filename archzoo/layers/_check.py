"""Checks of arguments and inputs that layers share. Each raises an error that says what would be right."""

import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

from archzoo.kernels._conv import check_input

Init = TypeVar("Init", bound=Callable[..., None])

_LARGEST = torch.finfo(torch.float32).max
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# --- Arguments --------------------------------------------------------------------------------------------------------


def typed(init: Init) -> Init:
    """Decorator of a layer's `__init__`: a ValueError for an argument of another type than it is annotated with.

    So that no layer repeats it, and each checks but what its numbers and names may be. Without it `bias="no"` is true,
    and `device=[]` an error of torch that names neither argument nor layer. The layer's own checks come first, for they
    say more. A whole number is no bool, a number is not NaN, a list does for a tuple; classes of ours are left to the
    layer. A device may be one that is not there: `FakeTensorMode` has such.
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
        elif not _fits(value, parameters[name].annotation):
            raise ValueError(f"{name}={value!r}: must be {_described(parameters[name].annotation)}")


def _is_device(value: Any) -> bool:
    if not isinstance(value, str):
        return value is None or isinstance(value, torch.device | int)
    try:
        torch.device(value)
    except RuntimeError:
        return False
    return True


def _fits(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple | list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is Sequence:
        fits = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return fits and all(_fits(v, parts[0]) for v in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if origin is Callable:
        return callable(value)
    if annotation in (int, float):
        size: Any = abs(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        if annotation is int or isinstance(value, Integral):
            return isinstance(value, Integral) and size < 2**63
        return size <= _LARGEST or size == math.inf
    if annotation is str or origin is Literal:  # which of the names, the layer knows
        return isinstance(value, str)
    if annotation in (None, type(None)):
        return value is None
    ours = getattr(annotation, "__module__", "archzoo.").startswith("archzoo.")
    return ours or not isinstance(annotation, type) or isinstance(value, annotation)


_WORDS: dict[Any, str] = {
    int: "a whole number below 2^63",
    float: "a number that float32 can hold",
    bool: "True or False",
    str: "a text",
    type(None): "None",
}


def _described(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"({', '.join(map(_described, parts))})"
    if origin is Sequence:
        return f"a sequence, each {_described(parts[0])}"
    if origin in (Mapping, Callable):
        return "a mapping" if origin is Mapping else "a function"
    return _WORDS.get(annotation) or f"a {getattr(annotation, '__name__', annotation)}"


def check_whole(**values: Any) -> None:
    """A ValueError that names the first value that is not a whole number, 1 or more."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value}: must be a whole number, 1 or more, got {value!r}")


def check_positive(**values: Any) -> None:
    """A ValueError that names the first value that is not a finite number above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: must be a finite number above 0")


def check_dropout(dropout: Any) -> None:
    """A ValueError unless it is a probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
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
    if x.dtype != weight.dtype:
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not (autocast and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)):
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
