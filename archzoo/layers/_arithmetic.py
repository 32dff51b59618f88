"""What the arithmetic units share: checks, dtypes, and linear maps that keep their digits under autocast."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import under_autocast


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}={value!r}: must be a finite number, {'above 0' if positive else '0 or more'}")


def _as_linear_gives(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype that `nn.Linear` would give for x."""
    if under_autocast(x) and x.dtype != torch.float64:
        return y.to(torch.get_autocast_dtype(x.device.type))
    return y.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _clamp(w: Tensor, low: float, high: float) -> Tensor:
    """w in [low, high], with a gradient where low <= w <= high, both ends included.

    `torch.clamp` has none at the ends in some versions of torch, and a weight that `constrain_()` put there would stay.
    """
    return torch.where((w >= low) & (w <= high), w, w.detach().clamp(low, high))


def _exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for exponents and phases, in the dtype of x also under autocast: exp turns an error into a factor."""
    weight = weight.to(x.dtype)
    if under_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)
    return F.linear(x, weight)


def _power_product(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """prod_i (|x_i| + eps)^W_oi, in float32 at least."""
    return _exact_linear((_wide(x).abs() + eps).log(), weight).exp()


@torch.no_grad()
def _distance_to_integers(weight: Tensor) -> float:
    """Largest distance of a weight from -1, 0 and 1: max min(|W|, |1 - |W||)."""
    magnitude = weight.abs()
    return torch.minimum(magnitude, (1 - magnitude).abs()).max().item()


def _shown(unit: nn.Module, **defaults: Any) -> str:
    """`extra_repr`: the sizes, the bias, and the options that differ from their defaults."""
    text = f"{unit.in_features}, {unit.out_features}, bias={unit.bias is not None}"
    changed = {name: getattr(unit, name) for name, default in defaults.items() if getattr(unit, name) != default}
    return ", ".join([text, *(f"{name}={value!r}" for name, value in changed.items())])
