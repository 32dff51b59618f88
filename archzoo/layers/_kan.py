"""What the KAN layers share beside their operators: a linear and a convolutional layer of any basis, and checks."""

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._conv import check_input
from archzoo.kernels.basis_conv2d import basis_conv2d, padding_sides
from archzoo.kernels.basis_linear import Basis, basis_linear
from archzoo.layers._check import check_features, check_image
from archzoo.layers._conv import as_pair, check_channels, check_padding
from archzoo.layers._start_kan import _FromConv2d, _nearest, _normal, _on_edges


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
        if not (_is_finite(factor) and factor >= 0):
            raise ValueError(f"{name}={factor!r}: must be finite, 0 or more")


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _checked_range(grid_range: Sequence[float]) -> tuple[float, float]:
    """The two ends as floats; a ValueError unless they are two finite numbers that increase."""
    ends = list(grid_range) if isinstance(grid_range, Iterable) else []
    if len(ends) != 2 or not all(map(_is_finite, ends)) or not ends[0] < ends[1]:
        raise ValueError(f"grid_range={grid_range!r}: must be finite and increasing, two numbers as (-1.0, 1.0)")
    return float(ends[0]), float(ends[1])


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


class _KANLinear(nn.Module):
    """Sizes, bias and methods of a KAN layer in the place of `nn.Linear`; (*, I) -> (*, O).

    A subclass sets `_functions` and `weight`, names in `_tensors` what the functions take besides x, and calls
    `reset_parameters`. One with several terms, or other weights, overrides `forward`, `_per_output` and `_become`.
    """

    bias: nn.Parameter | None
    weight: nn.Parameter
    _functions: Basis
    _tensors: tuple[str, ...] = ()
    _nearer: ClassVar[str] = ""
    """Which options bring a start nearer, for the message that it is too far."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        _check_whole(1, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self._factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias = self._parameter(out_features) if bias else None

    @property
    def _edges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What comes before the functions in a weight's shape, and what comes after them."""
        return (self.out_features, self.in_features), ()

    @property
    def _features(self) -> int:
        """How many inputs have functions of their own."""
        return self.in_features

    @property
    def _fan_in(self) -> int:
        """Inputs that an output sums over."""
        return self.in_features

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **self._factory))

    def _weight(self, *functions: int) -> nn.Parameter:
        """An empty parameter: one number for every edge and function."""
        before, after = self._edges
        return self._parameter(*before, *functions, *after)

    def forward(self, x: Tensor) -> Tensor:
        """As the usual layer. A ValueError if x has another number of features."""
        before, after = self._edges
        weight = self.weight.reshape(*before, self._functions.size, *after)
        return self._sum(x, [(self._functions, weight, *(getattr(self, name) for name in self._tensors))])

    def _checked(self, x: Tensor) -> Tensor:
        """x; a ValueError if it has another number of features."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but its last dimension must be in_features={self.in_features}"
            )
        return x

    def _rows(self, x: Tensor) -> Tensor:
        """Samples as (N, features)."""
        return self._checked(x).reshape(-1, self.in_features)

    def _check(self, x: Tensor, weight: Tensor) -> None:
        """An error unless x goes with a weight of the layer."""
        check_features(x, self.in_features, weight)

    def _sum(self, x: Tensor, terms: Sequence[Any]) -> Tensor:
        """The terms of x, and the bias."""
        self._check(x, terms[0][1])
        return basis_linear(x, terms, self.bias)

    def _map(self, function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        """The usual layer of a function of x, without a bias."""
        return F.linear(function(x), weight)

    @torch.no_grad()
    def _become(self, weight: Tensor) -> Tensor:
        """Sets all parameters but the bias so that y = weight x, as near as can be.

        Args:
            weight: That of the usual layer, in float64, on the CPU.

        Returns:
            Deviations from x: see `_start_kan._become`.
        """
        c, deviation = _nearest([self._functions.values(_normal()[0].unsqueeze(0))], self._nearer)
        self.weight.copy_(_on_edges(weight, c).view_as(self.weight))
        return deviation

    @property
    def _per_output(self) -> tuple[str, ...]:
        """Names of the parameters and buffers whose first dimension is that of the outputs."""
        return "weight", "bias"

    def keep_outputs_(self, index: Sequence[int] | Tensor) -> None:
        """Keeps only these outputs, in this order. Parameters become new objects: build the optimizer again."""
        kept = _as_index("index", index, self.out_features, next(self.parameters()).device)
        self.out_features = self._keep(kept)

    def _keep(self, index: Tensor) -> int:
        for name in self._per_output:
            old = getattr(self, name)
            if isinstance(old, nn.Parameter):
                setattr(self, name, nn.Parameter(old.detach()[index], old.requires_grad))
            elif old is not None:
                setattr(self, name, old[index])
        return len(index)

    def _options(self) -> str:
        """The family's own options, as `extra_repr` shows them."""
        return ""

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{self._options()}"


class _KANConv2d(_KANLinear, _FromConv2d):
    """The same in the place of `nn.Conv2d`: (N, C, H, W) -> (N, O, H', W'), or without N.

    Weights are (O, C/groups, functions, kh, kw); otherwise a subclass of it is written as one of `_KANLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int] | str,
        dilation: int | tuple[int, int],
        groups: int,
        bias: bool,
        pad_value: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        nn.Module.__init__(self)
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
        self.padding = check_padding(padding, self.stride)
        if pad_value is not None and not _is_finite(pad_value):
            raise ValueError(f"pad_value={pad_value!r}: must be a finite number, or None for padding that adds nothing")
        self.pad_value = pad_value
        self._factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias = self._parameter(out_channels) if bias else None

    @property
    def _edges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.out_channels, self.in_channels // self.groups), self.kernel_size

    @property
    def _features(self) -> int:
        return self.in_channels

    @property
    def _fan_in(self) -> int:
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def _checked(self, x: Tensor) -> Tensor:
        check_input(x, self.in_channels)
        return x

    def _rows(self, x: Tensor) -> Tensor:
        return self._checked(x).movedim(-3, -1).reshape(-1, self.in_channels)

    def _check(self, x: Tensor, weight: Tensor) -> None:
        check_image(x, self.in_channels, weight)

    def _sum(self, x: Tensor, terms: Sequence[Any]) -> Tensor:
        self._check(x, terms[0][1])
        return basis_conv2d(
            x,
            terms,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            pad_value=self.pad_value,
        )

    def _map(self, function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        padding = self.padding
        if self.pad_value is not None:
            top, bottom, left, right = padding_sides(padding, self.kernel_size, self.dilation)
            x, padding = F.pad(x, (left, right, top, bottom), value=self.pad_value), (0, 0)
        return F.conv2d(function(x), weight, None, self.stride, padding, self.dilation, self.groups)

    def keep_outputs_(self, index: Sequence[int] | Tensor) -> None:
        """Keeps only these output channels, in this order. Parameters become new objects: build the optimizer again.

        Raises:
            ValueError: If an index is out of range, or there are groups, which other channels would not fill evenly.
        """
        if self.groups > 1:
            raise ValueError(f"groups={self.groups}: outputs can only be chosen without groups, groups=1")
        kept = _as_index("index", index, self.out_channels, next(self.parameters()).device)
        self.out_channels = self._keep(kept)

    def extra_repr(self) -> str:
        """Sizes and options."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, usual in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("pad_value", None)):
            value = getattr(self, name)
            text += f", {name}={value!r}" if value != usual else ""
        return f"{text}, bias={self.bias is not None}{self._options()}"
