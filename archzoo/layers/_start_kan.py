"""Starts of KAN layers: a trained weight, times a function on every edge that is the identity, or comes near to it.

With c such that sum_j c_j B_j(x) ~ x, the edge weights w_oij = W_oi c_j make a layer of basis B compute y ~ W x + b.
Where c is not known exactly it is the least-squares one for x from N(0, 1), the inputs that `Start.error` speaks of:
one small system that all edges share, solved in float64 on the CPU.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from archzoo.kernels.activation import Activation
from archzoo.layers.start import Start, check_original, copy_bias, fresh

# Of the mean square of the functions. The last digits of the error would cost coefficients that cancel each other:
# eight slow sines then weigh 5 in all, not 2.7, for 0.001 instead of 0.013.
_RIDGE = 1e-4

_WORST = 0.5
"""Error of one edge from which on there is nothing worth starting from; a function of 0 has 1."""


class _Starts(nn.Module):
    """A layer that has `_become(weight)`, which sets its parameters, and this."""

    _start_options: ClassVar[dict[str, Any]] = {}
    """What options are in a start, unless given, where that is not their default."""


class _FromLinear(_Starts):
    """A KAN layer that can start from an `nn.Linear`."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Start[Self]:
        """Starts as a trained `nn.Linear`, exactly or as near as the functions on the edges come.

        Every edge carries the identity, or what is nearest to it for standard normal inputs, times the linear layer's
        weight; the bias is the linear layer's. The class says under "Start" which parameters that sets, and how near
        it comes with its default options.

        Args:
            linear: The layer to start from, which stays as it is.
            options: Options of the class; sizes, bias, device, dtype and training mode are the linear layer's.

        Returns:
            The layer, and the error of its outputs.

        Raises:
            TypeError: If `linear` is no `nn.Linear`, or the class has no such option.
            ValueError: If `linear` holds no numbers yet (lazy, or on the meta device), or with these options no start
                comes near.
        """
        check_original(linear, nn.Linear)
        return _started(cls, linear, options)


class _FromConv2d(_Starts):
    """The same from an `nn.Conv2d`."""

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **options: Any) -> Start[Self]:
        """Starts as a trained `nn.Conv2d`, exactly or as near as the functions on the edges come.

        Every tap carries the identity, or what is nearest to it for standard normal inputs, times the convolution's
        weight; the bias is the convolution's. Padding adds nothing to either, so an exact start is exact at the borders
        too. The class says under "Start" which parameters that sets, and how near it comes with its default options.

        Args:
            conv: The layer to start from, which stays as it is.
            options: Options of the class; sizes, stride, padding, dilation, groups, bias, device, dtype and training
                mode are the convolution's.

        Returns:
            The layer, and the error of its outputs, where no padding is in them.

        Raises:
            TypeError: If `conv` is no `nn.Conv2d`, or the class has no such option.
            ValueError: If `conv` holds no numbers yet (lazy, or on the meta device), or pads otherwise than with zeros,
                or with these options no start comes near.
        """
        check_original(conv, nn.Conv2d)
        return _started(cls, conv, options)


@torch.no_grad()
def _started(cls: Any, original: nn.Linear | nn.Conv2d, options: dict[str, Any]) -> Start[Any]:
    layer = fresh(cls, original, **{**cls._start_options, **options})
    weight = original.weight.detach().cpu().double()
    deviation = _become(layer, weight)
    copy_bias(layer, original)
    return Start(layer, _output_error(weight, deviation))


def _become(layer: Any, weight: Tensor) -> Tensor:
    """Sets all parameters of a KAN layer but the bias for y = weight x.

    Returns:
        How far the function of an edge, divided by its weight, is from x at the points of `_normal`: (I, R), or (1, R)
        if all inputs have the same; exactly 0 if it is x.
    """
    if getattr(layer, "pad_value", None):
        raise ValueError(
            f"pad_value={layer.pad_value!r}: nn.Conv2d pads with zeros; take None or 0.0 to start as it does"
        )
    return layer._become(weight)


def _start_kwargs(pool: Mapping[str, Any], kwargs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The options of a pool's layers in a start; a ValueError if one of them cannot start."""
    for name, cls in pool.items():
        if not (issubclass(cls, _Starts) and hasattr(cls, "_become")):
            raise ValueError(f"pool={tuple(pool)!r}: layer {name!r} cannot start from another; leave it out")
    return {name: {**cls._start_options, **kwargs[name]} for name, cls in pool.items()}


def _become_all(layers: Iterable[Any], weight: Tensor) -> Tensor:
    """`_become` of layers that are summed, all weighted alike: deviations have the mean of theirs."""
    return torch.stack(torch.broadcast_tensors(*[_become(layer, weight) for layer in layers])).mean(0)


def _normal() -> tuple[Tensor, Tensor]:
    """Points on the line, (R,), and the weight of each in a mean over N(0, 1)."""
    points = torch.linspace(-8, 8, 2001, dtype=torch.float64, device="cpu")
    density = torch.exp(-points.square() / 2)
    return points, density / density.sum()


def _nearest(values: Iterable[Tensor], advice: str) -> tuple[Tensor, Tensor]:
    """The coefficients by which functions come nearest to x.

    Args:
        values: The functions at the points of `_normal`, (I, K, R), or (1, K, R) if all inputs have the same; in blocks
            of inputs.
        advice: What would be right, where they do not come near.

    Returns:
        Coefficients (I, K) and the deviations of their sums from x, (I, R).

    Raises:
        ValueError: If the best sum is no approximation of x.
    """
    density = _normal()[1]
    c, deviation = (torch.cat(parts) for parts in zip(*map(_solved, values), strict=True))
    error = math.sqrt(float((deviation.square() @ density).mean()))
    if error > _WORST:
        raise ValueError(f"the nearest start is off by {error:.2f} of its outputs for standard normal inputs; {advice}")
    return c, deviation


def _solved(values: Tensor) -> tuple[Tensor, Tensor]:
    """What `_nearest` returns, of one block."""
    points, density = _normal()
    gram = (values * density) @ values.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = (_RIDGE * diagonal.mean(1, keepdim=True)).clamp(min=torch.finfo(gram.dtype).tiny ** 0.5)
    c = torch.linalg.solve(gram + torch.diag_embed(ridge.expand_as(diagonal)), values @ (density * points))
    return c, (c.unsqueeze(1) @ values).squeeze(1) - points


def _start_branches(layer: Any, weight: Tensor, values: Callable[[Tensor], Tensor], advice: str) -> Tensor:
    """`_become` of a layer with a weight for each of its functions, and for its base: both together, by least squares.

    Args:
        layer: Has `spline_weight`, `_base` and, unless that is None, `base_weight`.
        weight: As for `_become`.
        values: (1, R) -> (1, K, R), the layer's functions.
        advice: As for `_nearest`.
    """
    base = layer._base
    if _is_identity(base):
        layer.base_weight.copy_(weight)
        layer.spline_weight.zero_()
        return _no_deviation()
    points = _normal()[0].unsqueeze(0)
    functions = values(points)
    if isinstance(base, Activation):
        functions = torch.cat([functions, base.values(points)], 1)
    elif base is not None:  # a callable may hold parameters: it is called as the layer will call it
        own = base(points.to(layer.spline_weight)).detach().cpu().double()
        if not bool(own.isfinite().all()):
            raise ValueError(
                f"base_activation={base!r}: is not finite everywhere in [-8, 8], so that no sum with it comes near to x"
            )
        functions = torch.cat([functions, own.unsqueeze(1)], 1)
    c, deviation = _nearest([functions], advice)
    if base is not None:
        layer.base_weight.copy_(_on_edges(weight, c[:, -1:]).squeeze(2))
        c = c[:, :-1]
    layer.spline_weight.copy_(_on_edges(weight, c))
    return deviation


def _is_identity(base: Any) -> bool:
    """Whether a base activation is x itself."""
    return isinstance(base, Activation) and base.name == "identity"


def _no_deviation() -> Tensor:
    return torch.zeros_like(_normal()[0]).unsqueeze(0)


def _by_output(per_input: Tensor, weight: Tensor) -> Tensor:
    """Numbers of every input, (I, *), as each output has them: (O, I/groups, *); (1, *) as (1, 1, *)."""
    if len(per_input) == 1:
        return per_input.unsqueeze(0)
    grouped = per_input.unflatten(0, (-1, weight.shape[1]))
    return grouped.repeat_interleave(len(weight) // len(grouped), 0)


def _on_edges(weight: Tensor, c: Tensor) -> Tensor:
    """W_oi c_ij: a weight (O, I/groups, *taps) and coefficients (I or 1, K) -> (O, I/groups, K, *taps)."""
    c = _by_output(c, weight)
    return weight.unsqueeze(2) * c.view(*c.shape, *[1] * (weight.ndim - 2))


def _output_error(weight: Tensor, deviation: Tensor) -> float:
    """The error of `Start`, of y = sum_i W_oi (x_i + d_i(x_i)) with independent inputs from N(0, 1).

    An output is off by sum_i W_oi d_i, whose mean square is sum_i W_oi^2 Var d_i + (sum_i W_oi E d_i)^2.
    """
    if not (deviation.any() and weight.any()):
        return 0.0
    density = _normal()[1]
    mean = deviation @ density
    variance = _by_output((deviation - mean.unsqueeze(1)).square() @ density, weight)
    taps = weight.unsqueeze(-1).flatten(2)  # (O, I/groups, taps), one tap in a linear layer
    squares, offset = taps.square().sum(2), (taps.sum(2) * _by_output(mean, weight)).sum(1)
    return math.sqrt(float(((squares * variance).sum() + offset.square().sum()) / squares.sum()))
