"""What the KAN layers share beside their operator."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _check_whole(least: int, **sizes: Any) -> None:
    """Raises a ValueError unless each is a whole number, at least `least`."""
    for name, size in sizes.items():
        try:
            whole = operator.index(size)
        except TypeError:
            whole = least - 1
        if whole < least or isinstance(size, bool):
            raise ValueError(f"{name}={size!r}: must be a whole number, at least {least}")


def _check_finite(**factors: float) -> None:
    """Raises a ValueError unless each is a finite number, 0 or more."""
    for name, factor in factors.items():
        if not 0 <= factor < math.inf:
            raise ValueError(f"{name}={factor}: must be finite, 0 or more")


def _checked_range(grid_range: Sequence[float]) -> tuple[float, float]:
    """The two ends as floats; a ValueError unless they are finite and increase."""
    low, high = map(float, grid_range)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"grid_range={tuple(grid_range)}: must be finite and increasing, as (-1.0, 1.0)")
    return low, high


def _as_index(name: str, index: Sequence[int] | Tensor, size: int, device: torch.device) -> Tensor:
    """Which of `size` things are kept: indices in any order, or a mask of bools. A ValueError if they do not fit."""
    chosen = torch.as_tensor(index, device=device)
    if chosen.ndim == 1 and chosen.dtype == torch.bool and len(chosen) == size:
        chosen = chosen.nonzero().flatten()
    whole = chosen.ndim == 1 and not chosen.is_floating_point() and chosen.dtype != torch.bool
    if not whole or len(chosen) == 0 or not bool(((chosen >= 0) & (chosen < size)).all()):
        raise ValueError(
            f"{name}={index!r}: must be at least one index from 0 to {size - 1}, or a mask of {size} bools"
        )
    return chosen.long()
