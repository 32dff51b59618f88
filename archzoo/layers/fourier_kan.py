"""FourierKAN: KAN layers whose edges are Fourier series (https://github.com/GistNoesis/FourierKAN)."""

import torch
from torch import nn

from archzoo.kernels.fourier import Fourier
from archzoo.layers._check import typed
from archzoo.layers._kan import _check_whole, _KANConv2d, _KANLinear
from archzoo.layers._start_kan import _FromLinear
from archzoo.registry import Card, register_layer


class _Fourier(_KANLinear):
    """What the two forms share: the basis, and how its weights are drawn."""

    def _build(self, grid_size: int, smooth_init: bool) -> None:
        _check_whole(1, grid_size=grid_size)
        self.grid_size, self.smooth_init, self._functions = grid_size, smooth_init, Fourier(grid_size)
        self.weight = self._weight(2, grid_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws `weight` from a normal distribution; `bias` is 0.

        Its deviation is 1/sqrt(fan-in grid_size), or with `smooth_init` 1/(sqrt(fan-in) j^2) for harmonic j, whose
        functions are smooth: their slopes are bounded whatever `grid_size`.
        """
        nn.init.normal_(self.weight, std=self._fan_in**-0.5)
        if self.smooth_init:
            j = torch.arange(1, self.grid_size + 1, dtype=torch.float64, device=self.weight.device)
            after = self.weight.dim() - 4  # dimensions of the kernel
            self.weight.copy_(self.weight / j.square().view(-1, *[1] * after))
        else:
            self.weight.mul_(self.grid_size**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _options(self) -> str:
        return f", grid_size={self.grid_size}, smooth_init={self.smooth_init}"


@register_layer(
    "fourier_kan",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="FourierKAN: Kolmogorov-Arnold networks on Fourier series",
        authors="GistNoesis (a repository without a paper)",
        year=2024,
        arxiv="",
        equation=r"y_o = b_o + \sum_i \sum_{j=1}^{G} ( w_{oi0j} \cos j x_i + w_{oi1j} \sin j x_i )",
        headline="none by its author; KAN-benchmarking on an A5000, 10 M parameters: forward 17.9 ms and 1.96 GB "
        "(an MLP 0.49 ms), backward 14.4 ms (1.07 ms)",
        reproduced="Digits, [64, 32, LayerNorm, 10], 15 epochs, 3 seeds: 96.5-97.0 %; an MLP of equal size: "
        "97.2-98.0 %",
    ),
)
class FourierKANLinear(_Fourier, _FromLinear):
    r"""KAN layer on Fourier series: $y_o = b_o + \sum_i \sum_{j=1}^{G} ( w_{oi0j} \cos j x_i + w_{oi1j} \sin j x_i )$.

    Every edge has period 2 pi. Kept for the backward pass: x and the parameters; no (N, O, I) tensor is ever made.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether to add `bias`.
        grid_size: Number of harmonics G, from 1.
        smooth_init: Whether the initial weights fall with the square of the frequency, for large `grid_size`.
        device: Where the parameters are.
        dtype: Of the parameters; harmonics are evaluated in float32 at least.

    State: `weight` (O, I, 2, grid_size), cosines then sines, drawn from N(0, 1/sqrt(I grid_size)), that being the
    standard deviation, or from N(0, 1/(sqrt(I) j^2)) with `smooth_init`; `bias` (O,) or None, 0 at first.

    Start: `from_linear` sets `weight`, to the sines that are nearest to x: error 0.23 by default, and hardly less with
    more harmonics, since a series of period 2 pi leaves x at |x| = pi.

    Shape: (*, I) -> (*, O), x in radians.

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
        grid_size: int = 5,
        smooth_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._build(grid_size, smooth_init)


@register_layer(
    "fourier_kan_conv2d",
    kind="conv2d",
    nonlinear=True,
    card=Card(
        title="Convolutional Kolmogorov-Arnold Networks, on Fourier series",
        authors="Alexander Dylan Bodner, Antonio Santiago Tepsich, Jack Natan Spolski, Santiago Pourteau",
        year=2024,
        arxiv="2406.13155",
        equation=r"y_{op} = b_o + \sum_{c,t} \sum_{j=1}^{G} ( w_{oc0jt} \cos j x_q + w_{oc1jt} \sin j x_q ),"
        r"\quad q = (c, p+t)",
        headline="none with Fourier series; with B-splines, Fashion-MNIST: 88.99 % with 9.9k parameters, a CNN 88.34 % "
        "with 3.0k",
        reproduced="nothing yet",
    ),
)
class FourierKANConv2d(_Fourier, _KANConv2d):
    r"""Convolution by Fourier series: $y_{op} = b_o + \sum_{c,t,j} ( w_{oc0jt} \cos j x_q + w_{oc1jt} \sin j x_q )$.

    `FourierKANLinear` on every patch, q = (c, p+t) a pixel of it; each pixel's harmonics are evaluated once. No norm or
    activation inside.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Pixels added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided.
        bias: Whether to add `bias`.
        grid_size: Number of harmonics G, from 1.
        smooth_init: Whether the initial weights fall with the square of the frequency, for large `grid_size`.
        pad_value: None: padding adds nothing; a number: the pixels that padding adds have this value.
        device: Where the parameters are.
        dtype: Of the parameters; harmonics are evaluated in float32 at least.

    State: `weight` (O, C/groups, 2, grid_size, kh, kw), drawn as in `FourierKANLinear` for I = C/groups kh kw inputs;
    `bias` (O,) or None.

    Start: `from_conv2d` is as `FourierKANLinear.from_linear`.

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
        grid_size: int = 5,
        smooth_init: bool = False,
        pad_value: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        _KANConv2d.__init__(self, *shape, bias, pad_value, device, dtype)
        self._build(grid_size, smooth_init)
