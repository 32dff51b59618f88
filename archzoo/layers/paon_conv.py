"""PAON as convolutions, with the shifts of super neurons (https://arxiv.org/abs/2403.11791, 2601.04005)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.paon_conv2d import paon_conv2d, paon_conv_transpose2d
from archzoo.layers._check import check_image, typed
from archzoo.layers._conv import PADDING_MODES, as_pair, check_channels, check_padding, pad
from archzoo.layers._shift import SHIFT_PADDINGS, shift_images
from archzoo.layers.paon import (
    _CARD,
    Variant,
    _a_weight,
    _become_affine_,
    _check_degrees,
    _check_non_negative,
    _check_variant,
    _reset_pade_parameters,
)
from archzoo.layers.start import Start, check_original, fresh
from archzoo.registry import register_layer

Pair = int | Sequence[int]
_SHIFTS = ("none", "learned", "predicted")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")
    return value


@register_layer(
    "paon_conv2d",
    kind="conv2d",
    nonlinear=True,
    card=replace(
        _CARD,
        equation=_CARD.equation.replace("x^k", "* x^k"),
        reproduced=(
            "none of the papers' own tables. Fashion-MNIST at twice its resolution, three convolutions, 3 seeds"
            " (experiment super_resolution): absolute [2/2] 22.59 dB, smooth [2/2] 22.33, ReLU 22.16 at equal depth,"
            " and 23.11 with two more convolutions and fewer parameters than [2/2]"
        ),
    ),
)
class PaonConv2d(nn.Module):
    r"""Convolution by Padé neurons of degrees [M/N], with M + N weights per tap.

    With $P_m = w_0 + \sum_{k \le m} W_k * x^k$, $Q_n = 1 + \sum_{k \le n} V_k * x^k$ (element-wise powers, * a
    convolution, $P_{-1} = 0$):

    - `"smooth"` (Paon-S): $y = (Q_N P_M + Q_{N-1} P_{M-1}) / (Q_N^2 + Q_{N-1}^2 + e)$, e = `eps` if N >= 2, else 0;
    - `"absolute"` (Paon-A): $y = P_M / (1 + \sum_k |V_k * x^k|)$;
    - N = 0, both variants: $y = P_M$. [1/0] is `nn.Conv2d`, [2/0] the quadratic, [Q/0] the generative neuron
      (Self-ONN), and that with a shift the super neuron.

    Stands in for `nn.Conv2d` and needs no activation behind it. Costs M + N times as much. Initial values, and what is
    said of high powers, are those of `PaonLinear`, with in = C/groups kh kw.

    A shift moves each channel of x, before the powers, by (dx, dy) pixels: $x_c(i, j)$ becomes
    $x_c(i + dy_c, j + dx_c)$, bilinear between pixels. `"learned"`: one shift per channel, uniform within `max_shift`
    at the start, and clamped to it: one that an optimizer takes out of it has no gradient there. `"predicted"`:
    (dx, dy) = PReLU(`shift_weight` mean(x) + `shift_bias`) of each image, unbounded, 0 at the start. The published code
    pools over the whole batch, so that an image's output depends on the others; here it does not.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Pixels added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided.
        bias: Whether to add w_0.
        degrees: (M, N), the degrees of numerator and denominator.
        variant: "smooth" or "absolute"; "s" and "a" for short.
        eps: Keeps the smooth denominator from 0 where Q_N = Q_{N-1} = 0, which N >= 2 allows; N = 1 does not use it.
        denominator_init: Scale of the initial denominators, as in `PaonLinear`; None is the smallest that trains.
        padding_mode: "zeros", "reflect", "replicate" or "circular": what padding adds to x, as in `nn.Conv2d`.
        shift: "none", "learned" or "predicted".
        max_shift: Bound of the learned shifts, in pixels.
        shift_padding: What is outside of an image that is shifted: "border", "zeros" or "reflection".

    Attributes:
        numerator: W (M, O, C/groups, kh, kw), degree k at index k - 1; None if M = 0.
        denominator: V (N, O, C/groups, kh, kw); None if N = 0.
        bias: w_0 (O,), or None.
        shift: (C, 2) as (dx, dy), if learned; else None.
        shift_weight: (2 C, C), if predicted, as are `shift_bias` (2 C,) and `shift_slope` (2 C,); else None.
        shift_mode: The option `shift`.

    Shape: (B, C, H, W) -> (B, O, H', W'), or without B; in the dtype of the input, or in autocast's. Powers, sums and
        shifts are float32 at least.

    Raises:
        ValueError: As for `PaonLinear`; if an argument of the convolution or of the shift is out of range; in forward,
            if the input is not of C channels or smaller than the kernel.
    """

    @typed
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        degrees: Sequence[int] = (1, 1),
        variant: Variant = "smooth",
        eps: float = 1e-6,
        denominator_init: float | None = None,
        padding_mode: str = "zeros",
        shift: Literal["none", "learned", "predicted"] = "none",
        max_shift: float = 1.0,
        shift_padding: Literal["border", "zeros", "reflection"] = "border",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
        self.padding = check_padding(padding, self.stride)
        self.degrees = M, N = _check_degrees(degrees, bias)
        self.variant = _check_variant(variant)
        self.eps = _check_non_negative("eps", eps)
        if denominator_init is not None:
            denominator_init = _check_non_negative("denominator_init", denominator_init)
        self.denominator_init = denominator_init
        self.padding_mode = _check_choice("padding_mode", padding_mode, PADDING_MODES)
        self.shift_mode = _check_choice("shift", shift, _SHIFTS)
        self.max_shift = _check_non_negative("max_shift", max_shift)
        if not self.max_shift:
            raise ValueError(f"max_shift={max_shift!r}: must be positive; shift='none' shifts nothing")
        self.shift_padding = _check_choice("shift_padding", shift_padding, SHIFT_PADDINGS)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        taps = (out_channels, in_channels // groups, *self.kernel_size)
        self.numerator = parameter(M, *taps) if M else None
        self.denominator = parameter(N, *taps) if N else None
        self.bias = parameter(out_channels) if bias else None
        predicted = shift == "predicted"
        self.shift = parameter(in_channels, 2) if shift == "learned" else None
        self.shift_weight = parameter(2 * in_channels, in_channels) if predicted else None
        self.shift_bias = parameter(2 * in_channels) if predicted else None
        self.shift_slope = parameter(2 * in_channels) if predicted else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial values again."""
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        _reset_pade_parameters(self.numerator, self.denominator, self.bias, fan_in, self.variant, self.denominator_init)
        if self.shift is not None:
            nn.init.uniform_(self.shift, -self.max_shift, self.max_shift)
        for values, constant in ((self.shift_weight, 0.0), (self.shift_bias, 0.0), (self.shift_slope, 0.25)):
            if values is not None:
                values.fill_(constant)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **options: Any) -> Start["PaonConv2d"]:
        """Neurons that compute, at first, what a trained convolution computes; exact, with an error of 0.0.

        Sets the parameters as `PaonLinear.from_linear` does. Learned shifts start at 0, predicted ones do anyway.

        Args:
            conv: The original.
            options: Those of the layer.

        Raises:
            TypeError: If the original is no `nn.Conv2d`.
            ValueError: As `PaonLinear.from_linear`.
        """
        check_original(conv, nn.Conv2d)
        layer = fresh(cls, conv, **options)
        _become_affine_(layer, conv, layer.degrees, layer.variant, layer.eps, layer.denominator_init)
        if layer.shift is not None:
            nn.init.zeros_(layer.shift)
        return Start(layer, 0.0)

    def shifts(self, x: Tensor) -> Tensor | None:
        """(dx, dy) of each channel of images (B, C, H, W): (C, 2) if learned, (B, C, 2) if predicted, else None."""
        if self.shift is not None:
            return self.shift.clamp(-self.max_shift, self.max_shift)
        if self.shift_weight is None or self.shift_slope is None:
            return None
        pooled = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).to(self.shift_weight.dtype)
        moves = F.linear(pooled, self.shift_weight, self.shift_bias)
        return torch.where(moves > 0, moves, self.shift_slope * moves).unflatten(-1, (self.in_channels, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Padé neurons of x (B, C, H, W) -> (B, O, H', W'), or without B."""
        check_image(x, self.in_channels, _a_weight(self.numerator, self.denominator))
        if self.shift_mode != "none":
            images = x if x.dim() == 4 else x.unsqueeze(0)
            shifts = self.shifts(images)
            assert shifts is not None
            x = shift_images(images, shifts, self.shift_padding).view(x.shape)
        x, padding = pad(x, self.padding, self.kernel_size, self.dilation, self.padding_mode)
        return paon_conv2d(
            x,
            self.numerator,
            self.denominator,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            variant=self.variant,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        text = _sizes(self, (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")))
        if self.shift_mode != "none":
            text += f", shift={self.shift_mode!r}, shift_padding={self.shift_padding!r}"
        return text + (f", max_shift={self.max_shift:g}" if self.shift_mode == "learned" else "")


def _sizes(layer: "PaonConv2d | PaonConvTranspose2d", usual: Sequence[tuple[str, Any]]) -> str:
    """What `repr` shows of either layer; of the options with a usual value, those that differ from it."""
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}"
    for name, value in (*usual, ("denominator_init", None)):
        if getattr(layer, name) != value:
            text += f", {name}={getattr(layer, name)!r}"
    return (
        f"{text}, bias={layer.bias is not None}, degrees={layer.degrees}, variant={layer.variant!r}, eps={layer.eps:g}"
    )


@register_layer(
    "paon_conv_transpose2d",
    kind="module",
    nonlinear=True,
    card=replace(
        _CARD, equation=_CARD.equation.replace("x^k", "*^T x^k"), reproduced="none of the papers' results yet"
    ),
)
class PaonConvTranspose2d(nn.Module):
    r"""Transposed convolution by Padé neurons of degrees [M/N]: `PaonConv2d`, with the sums of `nn.ConvTranspose2d`.

    Stands in for `nn.ConvTranspose2d` and needs no activation behind it. An output pixel that no tap reaches is
    $w_0$, or half of it for smooth M = 0. The initial values are those of `PaonConv2d`, with the mean number of inputs
    that an output pixel sees, in = C/groups kh kw / (sh sw).

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.ConvTranspose2d`.
        stride: Pixels of the output from one input to the next.
        padding: Pixels cut off the output on each side.
        output_padding: Pixels added to the output at the bottom and on the right; less than stride or dilation.
        groups: Into how many groups channels and outputs are divided.
        bias: Whether to add w_0.
        dilation: Pixels between taps.
        degrees: (M, N), the degrees of numerator and denominator.
        variant: "smooth" or "absolute"; "s" and "a" for short.
        eps: Keeps the smooth denominator from 0 where Q_N = Q_{N-1} = 0, which N >= 2 allows; N = 1 does not use it.
        denominator_init: Scale of the initial denominators, as in `PaonLinear`; None is the smallest that trains.

    Attributes:
        numerator: W (M, C, O/groups, kh, kw), degree k at index k - 1; None if M = 0.
        denominator: V (N, C, O/groups, kh, kw); None if N = 0.
        bias: w_0 (O,), or None.

    Shape: (B, C, H, W) -> (B, O, H', W'), or without B, with H' = (H - 1) sh - 2 padding + dilation (kh - 1) +
        output_padding + 1, and W' alike; dtypes as `PaonConv2d`.

    Raises:
        ValueError: As for `PaonConv2d`.
    """

    @typed
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        output_padding: Pair = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Pair = 1,
        *,
        degrees: Sequence[int] = (1, 1),
        variant: Variant = "smooth",
        eps: float = 1e-6,
        denominator_init: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
        self.padding = as_pair("padding", padding, 0)
        self.output_padding = as_pair("output_padding", output_padding, 0)
        if any(extra >= max(s, d) for extra, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True)):
            raise ValueError(
                f"output_padding={output_padding!r}: must be less than stride={self.stride} or dilation={self.dilation}"
            )
        self.degrees = M, N = _check_degrees(degrees, bias)
        self.variant = _check_variant(variant)
        self.eps = _check_non_negative("eps", eps)
        if denominator_init is not None:
            denominator_init = _check_non_negative("denominator_init", denominator_init)
        self.denominator_init = denominator_init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        taps = (in_channels, out_channels // groups, *self.kernel_size)
        self.numerator = parameter(M, *taps) if M else None
        self.denominator = parameter(N, *taps) if N else None
        self.bias = parameter(out_channels) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values again."""
        seen = math.prod(max(1.0, k / s) for k, s in zip(self.kernel_size, self.stride, strict=True))
        fan_in = self.in_channels // self.groups * seen
        _reset_pade_parameters(self.numerator, self.denominator, self.bias, fan_in, self.variant, self.denominator_init)

    def forward(self, x: Tensor) -> Tensor:
        """Padé neurons of x (B, C, H, W) -> (B, O, H', W'), or without B."""
        check_image(x, self.in_channels, _a_weight(self.numerator, self.denominator))
        return paon_conv_transpose2d(
            x,
            self.numerator,
            self.denominator,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            groups=self.groups,
            dilation=self.dilation,
            variant=self.variant,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        return _sizes(self, (("padding", (0, 0)), ("output_padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)))
