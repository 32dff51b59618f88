"""ChebyshevKAN: KAN layers whose edges are Chebyshev polynomials (https://github.com/SynodicMonth/ChebyKAN)."""

import torch
from torch import nn

from archzoo.kernels.chebyshev import Chebyshev
from archzoo.layers._check import typed
from archzoo.layers._kan import _check_whole, _KANConv2d, _KANLinear
from archzoo.layers._start_kan import _FromLinear
from archzoo.registry import Card, register_layer

_EQUATION = r"y_o = b_o + \sum_i \sum_{d \le D} w_{oid}\, T_d(\tanh x_i)"


class _Chebyshev(_KANLinear):
    """What the two forms share: the basis, and how its weights are drawn."""

    _nearer = "a higher degree comes nearer, 1 being the least"

    def _build(self, degree: int) -> None:
        _check_whole(0, degree=degree)
        self.degree, self._functions = degree, Chebyshev(degree)
        self.weight = self._weight(degree + 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws `weight` from a normal distribution of deviation 1/(fan-in (degree + 1)); `bias` is 0."""
        nn.init.normal_(self.weight, std=1 / (self._fan_in * (self.degree + 1)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _options(self) -> str:
        return f", degree={self.degree}"


@register_layer(
    "chebyshev_kan",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="ChebyKAN: Kolmogorov-Arnold networks on Chebyshev polynomials",
        authors="SynodicMonth (a repository without a paper)",
        year=2024,
        arxiv="",
        equation=_EQUATION,
        headline="MNIST, degree 4, [784, 32, 16, 10] with LayerNorm, learning rate 2e-4: 97 % after 20 epochs",
        reproduced="Digits, [64, 32, LayerNorm, 10], 15 epochs, 3 seeds: 96.5-97.2 %; an equal MLP: 97.2-97.7 %. "
        "MNIST was not run",
    ),
)
class ChebyshevKANLinear(_Chebyshev, _FromLinear):
    r"""KAN layer on Chebyshev polynomials: $y_o = b_o + \sum_i \sum_{d \le D} w_{oid} T_d(\tanh x_i)$.

    tanh keeps any input where the polynomials are bounded; stacks of these layers want a norm between them. Kept for
    the backward pass: x and the parameters. The upstream code's NaN gradient beyond |x| = 9 does not occur here.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether to add `bias`.
        degree: Highest degree D, from 0.
        device: Where the parameters are.
        dtype: Of the parameters; polynomials are evaluated in float32 at least.

    State: `weight` (O, I, degree + 1), drawn from N(0, 1/(I (degree + 1))), that being the standard deviation; `bias`
    (O,) or None, 0 at first.

    Start: `from_linear` sets `weight`, to what of tanh's polynomials is nearest to x: error 0.14 by default, 0.26 at
    degree 1 and 0.06 at degree 8. `degree=0` is refused.

    Shape: (*, I) -> (*, O).

    Raises:
        ValueError: If an argument is out of range.
    """

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        degree: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._build(degree)


@register_layer(
    "chebyshev_kan_conv2d",
    kind="conv2d",
    nonlinear=True,
    card=Card(
        title="Convolutional Kolmogorov-Arnold networks, on Chebyshev polynomials",
        authors="Ivan Drokin",
        year=2024,
        arxiv="2407.01092",
        equation=r"y_{op} = b_o + \sum_{c,t,d} w_{ocdt}\, T_d(\tanh x_{c,p+t})",
        headline="CIFAR-10, 8 layers (torch-conv-kan): plain convolution 83.05 %, Gram polynomials 84.3 %",
        reproduced="nothing yet",
    ),
)
class ChebyshevKANConv2d(_Chebyshev, _KANConv2d):
    r"""Convolution by Chebyshev polynomials: $y_{op} = b_o + \sum_{c,t} \sum_{d \le D} w_{ocdt} T_d(\tanh x_{c,p+t})$.

    `ChebyshevKANLinear` on every patch, each pixel's polynomials evaluated once. No norm or activation inside.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Pixels added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided.
        bias: Whether to add `bias`.
        degree: Highest degree D, from 0.
        pad_value: None: padding adds nothing; a number: the pixels that padding adds have this value.
        device: Where the parameters are.
        dtype: Of the parameters; polynomials are evaluated in float32 at least.

    State: `weight` (O, C/groups, degree + 1, kh, kw), drawn as in `ChebyshevKANLinear` for C/groups kh kw inputs;
    `bias` (O,) or None.

    Start: `from_conv2d` is as `ChebyshevKANLinear.from_linear`.

    Shape: (N, C, H, W) -> (N, O, H', W'), or without N.

    Raises:
        ValueError: If an argument is out of range.
    """

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
        degree: int = 4,
        pad_value: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        _KANConv2d.__init__(self, *shape, bias, pad_value, device, dtype)
        self._build(degree)
