"""Group-rational KAN: the layer of the Kolmogorov-Arnold Transformer, KAT (https://arxiv.org/abs/2409.10594)."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from archzoo.kernels.basis_linear import widen
from archzoo.kernels.rational import DENOMINATORS, Rational
from archzoo.layers._check import typed
from archzoo.layers._kan import _check_whole, _KANConv2d, _KANLinear
from archzoo.layers._start_kan import _FromLinear, _no_deviation
from archzoo.registry import Card, register_layer

# a, b, and the gain 1 / E[F(z)^2] for z ~ N(0, 1). KAT's own "gelu" was fitted under "abs_sum", and is off by up to
# 1.46 on [-3, 3] under "abs_terms", which is what KAT's kernels compute. These serve under both: there, "swish" is off
# by up to 1.2e-6 (abs_terms) and 7.9e-6 (abs_sum), "gelu" by 1.4e-3 and 2.2e-3; the gains differ by less than 2e-4.
_STARTS: dict[str, tuple[tuple[float, ...], tuple[float, ...], float]] = {
    "identity": ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), 1.0),
    "swish": (
        (
            3.054879741161051e-07,
            0.5000007853744493,
            0.24999783422824703,
            0.05326628273219478,
            0.005803034571292244,
            0.0002751961022402342,
        ),
        (4.111554955950634e-06, 0.10652899335007572, 1.2690007399796238e-06, 0.0005502331264140556),
        2.8108,
    ),
    "gelu": (
        (-0.00130959362, 0.499490277, 0.408078087, 0.108144787, 0.00946546817, 0.000145452592),
        (2.95436909e-13, 0.213997269, 0.00159160803, 1.18497478e-20),
        2.3519,
    ),
}


class _Rational(_KANLinear):
    """What the two forms share: the function, and how its coefficients and weights start."""

    _functions: Rational
    _tensors = "numerator", "denominator"
    _start_options: ClassVar[dict[str, Any]] = {"init": "identity"}

    _names = "groups", "in_features"
    """What the form calls the groups of the function, and the features that they divide."""

    def _build(self, groups: int | None, init: str, denominator: str, share_numerator: bool) -> None:
        option, features = self._names
        if groups is None:
            groups = math.gcd(self._features, 8)
        _check_whole(1, **{option: groups})
        if self._features % groups:
            raise ValueError(f"{option}={groups}: must divide {features}={self._features}; None takes the gcd with 8")
        if init not in _STARTS:
            raise ValueError(f"init={init!r}: must be one of {', '.join(map(repr, _STARTS))}")
        if denominator not in DENOMINATORS:
            raise ValueError(f"denominator={denominator!r}: must be one of {', '.join(map(repr, DENOMINATORS))}")
        self._functions, self.init, self.share_numerator = Rational(groups, denominator), init, bool(share_numerator)
        setattr(self, option, groups)
        self.weight = self._weight()
        self.numerator = self._parameter(1 if share_numerator else groups, 6)
        self.denominator = self._parameter(groups, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts F at `init` and draws `weight` so that inputs from N(0, 1) give outputs of variance 1; `bias` is 0."""
        a, b, gain = _STARTS[self.init]
        with torch.no_grad():
            self.numerator.copy_(torch.tensor(a, dtype=torch.float64))
            self.denominator.copy_(torch.tensor(b, dtype=torch.float64))
        nn.init.normal_(self.weight, std=math.sqrt(gain / self._fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def _become(self, weight: Tensor) -> Tensor:
        if self.init != "identity":
            raise ValueError(f"init={self.init!r}: a start has F(x) = x, which is init='identity'; leave init out")
        self.weight.copy_(weight)  # and F is x already: its denominator of 0 learns, since d|b|/db is 1 at 0
        return _no_deviation()

    def _activate(self, x: Tensor, axis: int) -> Tensor:
        """F(x), the features of x along an axis."""
        if x.ndim < -axis or x.shape[axis] != self._features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but its dimension {axis} must be {self._names[1]}={self._features}"
            )
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}; it must be floating point, as the weight ({self.weight.dtype})")
        first = x.movedim(axis, 0)
        columns = first.unsqueeze(-1).flatten(1).to(widen(x.dtype))
        values = self._functions.values(columns, self.numerator, self.denominator)
        return values.to(x.dtype).view(first.shape).movedim(0, axis)

    def _options(self) -> str:
        return (
            f", {self._names[0]}={self._functions.groups}, init={self.init!r}, "
            f"denominator={self._functions.denominator!r}, share_numerator={self.share_numerator}"
        )


@register_layer(
    "rational_kan",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="Kolmogorov-Arnold Transformer",
        authors="Xingyi Yang, Xinchao Wang",
        year=2024,
        arxiv="2409.10594",
        equation=r"y_o = b_o + \sum_i w_{oi} F_{g(i)}(x_i),"
        r"\quad F_g(x) = \frac{\sum_{d \le 5} a_{gd} x^d}{1 + \sum_{j=1}^{4} |b_{gj}| |x|^j}",
        headline="ImageNet-1k, 300 epochs: KAT-T 74.6 % (5.7M parameters), KAT-S 81.2 % (22.1M), KAT-B 82.3 % (86.6M)",
        reproduced="Digits, [64, 32, LayerNorm, 10], 15 epochs, 3 seeds: 96.2-97.2 %; an MLP of equal size: "
        "96.7-97.5 %. ImageNet was not run",
    ),
)
class RationalKANLinear(_Rational, _FromLinear):
    r"""KAN layer on rational functions: $y_o = b_o + \sum_i w_{oi} F_{g(i)}(x_i)$, F = P / Q, one for each group.

    $P = \sum_{d \le 5} a_d x^d$ and, by default, $Q = 1 + \sum_{j=1}^{4} |b_j| |x|^j$. An edge is a scalar times a
    function that its group of inputs shares, so the layer has hardly more parameters than `nn.Linear`. KAT's MLP is
    one with `init="identity"`, then one with `init="swish"`, nothing between. Kept for the backward pass: x and the
    parameters.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether to add `bias`.
        groups: Into how many equal, contiguous groups the inputs are divided; a divisor of I. None: gcd(I, 8).
        init: What F is at first: `"swish"`, `"gelu"` or `"identity"`.
        denominator: `"abs_terms"`: Q as above, that of KAT's kernels and published weights. `"abs_sum"`:
            $1 + |\sum_{j=1}^{4} b_j x^j|$, that of the paper's text.
        share_numerator: Whether all groups have the same P.
        device: Where the parameters are.
        dtype: Of the parameters; F is evaluated in float32 at least.

    State: `weight` (O, I), drawn from N(0, g/I), that being the variance, with g = 1 / E[F(z)^2] for z from N(0, 1):
    inputs of variance 1 give outputs of variance 1. `numerator` (1, 6), or (groups, 6) if not shared: a_0 to a_5.
    `denominator` (groups, 4): b_1 to b_4. `bias` (O,) or None, 0 at first.

    Start: `from_linear` has `init="identity"`, and is exact; another `init` is refused. The denominators are 0, and
    learn from there.

    Shape: (*, I) -> (*, O).

    Raises:
        ValueError: If an argument is out of range, or `groups` does not divide I.
    """

    groups: int

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        groups: int | None = None,
        init: str = "swish",
        denominator: str = "abs_terms",
        share_numerator: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._build(groups, init, denominator, share_numerator)

    def activation(self, x: Tensor) -> Tensor:
        """F(x), (*, I) -> (*, I), in x's dtype. Differentiable, in plain torch. A ValueError as for `forward`."""
        return self._activate(x, -1)


@register_layer(
    "rational_kan_conv2d",
    kind="conv2d",
    nonlinear=True,
    card=Card(
        title="Kolmogorov-Arnold Transformer (its layer, as a convolution)",
        authors="Xingyi Yang, Xinchao Wang",
        year=2024,
        arxiv="2409.10594",
        equation=r"y_{op} = b_o + \sum_{c,t} w_{oct} F_{g(c)}(x_{c,p+t}),"
        r"\quad F_g(x) = \frac{\sum_{d \le 5} a_{gd} x^d}{1 + \sum_{j=1}^{4} |b_{gj}| |x|^j}",
        headline="of the linear form only: ImageNet-1k, KAT-B 82.3 %; the convolution is this zoo's own",
        reproduced="nothing yet",
    ),
)
class RationalKANConv2d(_Rational, _KANConv2d):
    r"""Convolution by rational functions: $y_{op} = b_o + \sum_{c,t} w_{oct} F_{g(c)}(x_{c,p+t})$.

    `RationalKANLinear` on every patch, each pixel's function evaluated once, and one function for all taps of a
    channel. No norm or activation inside.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Pixels added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided, as in `nn.Conv2d`; not those of F.
        bias: Whether to add `bias`.
        rational_groups: Into how many equal, contiguous groups, each with an F of its own, the channels are divided:
            what `RationalKANLinear` calls `groups`. A divisor of C. None: gcd(C, 8).
        init: What F is at first: `"swish"`, `"gelu"` or `"identity"`.
        denominator: `"abs_terms"` or `"abs_sum"`, as in `RationalKANLinear`.
        share_numerator: Whether all groups have the same P.
        pad_value: None: padding adds nothing; a number: the pixels that padding adds have this value.
        device: Where the parameters are.
        dtype: Of the parameters; F is evaluated in float32 at least.

    State: `weight` (O, C/groups, kh, kw), drawn as in `RationalKANLinear` for C/groups kh kw inputs; `numerator`
    (1, 6), or (rational_groups, 6) if not shared; `denominator` (rational_groups, 4); `bias` (O,) or None.

    Start: `from_conv2d` is as `RationalKANLinear.from_linear`.

    Shape: (N, C, H, W) -> (N, O, H', W'), or without N.

    Raises:
        ValueError: If an argument is out of range, or `rational_groups` does not divide C.
    """

    rational_groups: int
    _names = "rational_groups", "in_channels"

    @typed
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rational_groups: int | None = None,
        init: str = "swish",
        denominator: str = "abs_terms",
        share_numerator: bool = True,
        pad_value: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        _KANConv2d.__init__(self, *shape, bias, pad_value, device, dtype)
        self._build(rational_groups, init, denominator, share_numerator)

    def activation(self, x: Tensor) -> Tensor:
        """F(x), (N, C, H, W) or (C, H, W), in x's shape and dtype. Differentiable, in plain torch."""
        return self._activate(x, -3)
