"""Checks of arguments and inputs that layers share. Each raises a ValueError that says what would be right."""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


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


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """A ValueError unless x has the weight's dtype, or autocast will give both the same."""
    if x.dtype != weight.dtype:
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not (autocast and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)):
            raise ValueError(f"input of {x.dtype}: must be {weight.dtype}, as the layer's parameters are")


def check_tokens(x: Tensor, dim: int, weight: Tensor) -> None:
    """A ValueError unless x is (batch, length, dim), in a dtype that goes with the weight's."""
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"input of shape {tuple(x.shape)}: must be (batch, length, dim) with dim={dim}")
    check_dtype(x, weight)


def check_token(x: Tensor, weight: Tensor, dim: int) -> None:
    """A ValueError unless x is one token (batch, 1, dim), in a dtype that goes with the weight's."""
    if x.dim() != 3 or x.shape[1:] != (1, dim):
        raise ValueError(f"token of shape {tuple(x.shape)}: must be (batch, 1, dim) with dim={dim}")
    check_dtype(x, weight)
