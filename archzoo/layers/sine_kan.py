"""SineKAN: KAN layers whose edges are sums of sines (https://arxiv.org/abs/2407.04149)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.kernels.sine import Sine
from archzoo.layers._check import typed
from archzoo.layers._kan import _check_whole, _KANConv2d, _KANLinear
from archzoo.layers._start_kan import _FromLinear, _nearest, _normal, _on_edges
from archzoo.registry import Card, register_layer

# The paper's fit to how phases must grow with the number of sines, so that outputs keep their distribution.
_A, _K, _C = 0.9724108095811765, 0.9884401790754128, 0.999449553483052

_START_BLOCK = 2**21  # values of functions at a time, while a start is solved for


class _Sines(_KANLinear):
    """What the two forms share: the basis, its frequencies and phases, and how weights are drawn."""

    _tensors = "freq", "phase"
    _nearer = "is_first=False and a larger grid_size come nearer"

    phase: Tensor

    def _build(self, grid_size: int, is_first: bool) -> None:
        _check_whole(1, grid_size=grid_size)
        self.grid_size, self.is_first, self._functions = grid_size, is_first, Sine(grid_size)
        self.weight, self.freq = self._weight(grid_size), self._parameter(grid_size)
        self.register_buffer("phase", torch.empty(self._features, grid_size, **self._factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Restores `freq`, `phase` and `bias`, and draws `weight` again: one number an edge, over j and O."""
        if self.weight.is_meta:
            return  # there is nothing to fill, in `grid_size` steps
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.weight.device}
        j = torch.arange(1, self.grid_size + 1, **options)
        self.freq.copy_(j if self.is_first else j / (self.grid_size + 1))
        phase = j / (self.grid_size + 1) + torch.linspace(0, math.pi, self._features, **options).unsqueeze(1)
        for n in range(1, self.grid_size):
            phase *= _A * n**-_K + _C
        self.phase.copy_(phase)
        outputs = len(self.weight)
        amplitude = torch.empty_like(self.weight[:, :, :1])
        amplitude = amplitude.normal_(0, 0.4) if self.is_first else amplitude.uniform_(-1, 1)
        self.weight.copy_(amplitude / (outputs * j).view(-1, *[1] * (self.weight.dim() - 3)))
        if self.bias is not None:
            nn.init.constant_(self.bias, 1 / outputs)

    @torch.no_grad()
    def _become(self, weight: Tensor) -> Tensor:
        points, freq, phase = _normal()[0], self.freq.detach().cpu().double(), self.phase.cpu().double()
        blocks = phase.split(max(1, _START_BLOCK // (len(points) * self.grid_size)))
        values = (self._functions.values(points.expand(len(own), -1), freq, own) for own in blocks)
        c, deviation = _nearest(values, self._nearer)
        self.weight.copy_(_on_edges(weight, c))
        return deviation

    def _options(self) -> str:
        return f", grid_size={self.grid_size}, is_first={self.is_first}"


@register_layer(
    "sine_kan",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="SineKAN: Kolmogorov-Arnold Networks Using Sinusoidal Activation Functions",
        authors="Eric A. F. Reinhardt, P. R. Dinesh, Sergei Gleyzer",
        year=2024,
        arxiv="2407.04149",
        equation=r"y_o = b_o + \sum_i \sum_{j=1}^{G} w_{oij} \sin(f_j x_i + p_{ij})",
        headline="MNIST: better than or comparable to B-spline KANs, 4 to 8 times as fast",
        reproduced="Digits, [64, 32, LayerNorm, 10], 15 epochs, 3 seeds: 97.5-98.0 %; an MLP of equal size: 97.5 %. "
        "The speed against B-spline KANs was not compared",
    ),
)
class SineKANLinear(_Sines, _FromLinear):
    r"""KAN layer on sines: $y_o = b_o + \sum_i \sum_{j=1}^{G} w_{oij} \sin(f_j x_i + p_{ij})$.

    The frequencies f are learned, one set for all edges; the phases p are fixed. Kept for the backward pass: x, the
    parameters and the phases.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether to add `bias`.
        grid_size: Number of sines G an edge, from 1.
        is_first: Whether the layer sees the data itself: frequencies start at 1 .. G instead of below 1.
        device: Where the parameters are.
        dtype: Of the parameters; sines are evaluated in float32 at least.

    State: `freq` (grid_size,), j/(grid_size + 1) at first, or j with `is_first`; `weight` (O, I, grid_size), a/(O j)
    with a from U(-1, 1), or from N(0, 0.4) with `is_first`, the same for all j; `bias` (O,) or None, 1/O at first;
    and the buffer `phase` (I, grid_size), in radians.

    Start: `from_linear` sets `weight`, to what of each input's sines is nearest to x, and leaves `freq` and `phase`:
    error about 0.01 by default, 0.1 with 4 sines. One or two sines, and `is_first=True`, may be refused: those of a
    given phase and a whole frequency need not come near to x.

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
        grid_size: int = 8,
        is_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._build(grid_size, is_first)


@register_layer(
    "sine_kan_conv2d",
    kind="conv2d",
    nonlinear=True,
    card=Card(
        title="Convolutional Kolmogorov-Arnold Networks, on sines",
        authors="Alexander Dylan Bodner, Antonio Santiago Tepsich, Jack Natan Spolski, Santiago Pourteau",
        year=2024,
        arxiv="2406.13155",
        equation=r"y_{op} = b_o + \sum_{c,t} \sum_{j=1}^{G} w_{ocjt} \sin(f_j x_{c,p+t} + p_{cj})",
        headline="none with sines; with B-splines, Fashion-MNIST: 88.99 % with 9.9k parameters, a CNN 88.34 % with "
        "3.0k",
        reproduced="nothing yet",
    ),
)
class SineKANConv2d(_Sines, _KANConv2d):
    r"""Convolution by sines: $y_{op} = b_o + \sum_{c,t} \sum_{j=1}^{G} w_{ocjt} \sin(f_j x_{c,p+t} + p_{cj})$.

    `SineKANLinear` on every patch, but the phases differ from channel to channel only, not from tap to tap: so each
    pixel's sines are evaluated once. No norm or activation inside.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Pixels added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided.
        bias: Whether to add `bias`.
        grid_size: Number of sines G, from 1.
        is_first: Whether the layer sees the data itself: frequencies start at 1 .. G instead of below 1.
        pad_value: None: padding adds nothing; a number: the pixels that padding adds have this value.
        device: Where the parameters are.
        dtype: Of the parameters; sines are evaluated in float32 at least.

    State: `freq` (grid_size,) and `weight` (O, C/groups, grid_size, kh, kw) as in `SineKANLinear`: a/(O j), one a for
    all j of a tap, and O the output channels, whatever the groups and the size of the kernel; `bias` (O,) or None, 1/O;
    and the buffer `phase` (C, grid_size), I being C.

    Start: `from_conv2d` is as `SineKANLinear.from_linear`.

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
        grid_size: int = 8,
        is_first: bool = False,
        pad_value: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        _KANConv2d.__init__(self, *shape, bias, pad_value, device, dtype)
        self._build(grid_size, is_first)
