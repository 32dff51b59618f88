"""Convolution by APTx neurons (https://arxiv.org/abs/2507.14270), one of the author's proposals for future work."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from archzoo.kernels.aptx_conv2d import aptx_conv2d
from archzoo.layers._check import check_image, typed
from archzoo.layers._conv import as_pair, check_channels, check_padding
from archzoo.layers.aptx import _check_init, _copy_map, _reset_neurons
from archzoo.layers.start import Start, check_original, fresh
from archzoo.registry import Card, register_layer


@register_layer(
    "aptx_conv2d",
    kind="conv2d",
    nonlinear=True,
    card=Card(
        title="APTx Neuron: A Unified Trainable Neuron Architecture Integrating Activation and Computation",
        authors="Ravin Kumar",
        year=2025,
        arxiv="2507.14270",
        equation=r"y_{op} = \delta_o + \sum_{c,t} (\alpha_{oct} + \tanh(\beta_{oct} x_{c,p+t})) \gamma_{oct} x_{c,p+t}",
        headline="none: the paper has no convolution, and names it as future work",
        reproduced="nothing to reproduce: no results of a convolution are published",
    ),
)
class APTxConv2d(nn.Module):
    r"""Convolution of APTx neurons: every tap is a small activation function with three parameters of its own.

    $y_{op} = \delta_o + \sum_{c,t} (\alpha_{oct} + \tanh(\beta_{oct} x_{c,p+t})) \gamma_{oct} x_{c,p+t}$ for each pixel
    p put out: `APTxLinear` on every patch, without the patches. Padding by zeros adds nothing, as a neuron's term is 0
    at x = 0.

    Stands in for `nn.Conv2d` and needs no activation behind it. Parameters: out (3 in/groups kh kw + 1), or
    out (2 in/groups kh kw + 1) without alpha. It evaluates a tanh for every tap of every pixel put out, which takes far
    longer than the convolution; `beta_groups=G` shares beta among out / G outputs each, and the tanh with it.

    Initial values are those of `APTxLinear`, for in/groups kh kw inputs: alpha and beta N(0, 1), the bias 0, gamma
    N(0, 1 / (1.5217 in/groups kh kw)) (a variance). Weight decay is meant for gamma, as there.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Zeros added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided.
        bias: Whether to add delta.
        train_alpha: Whether alpha is learned; otherwise it is 1, and not stored.
        init: "scaled", as above, or "paper", which has N(0, 1) for gamma too.
        beta_groups: G: row g of beta serves outputs g out / G ... (g + 1) out / G - 1. It divides `out_channels` and is
            a multiple of `groups`: outputs of two groups see different channels, and have no tanh to share. None has
            one row for every output, as the paper's neurons; sharing beta is ours.

    Attributes:
        alpha: (out, in/groups, kh, kw), or None.
        beta: (out, in/groups, kh, kw), or (G, in/groups, kh, kw).
        gamma: (out, in/groups, kh, kw).
        bias: delta (out,), or None.

    Shape: (batch, in, height, width) -> as `nn.Conv2d`, or without batch; in the dtype of the input, or in autocast's.
    tanh and sums are float32 at least.

    Raises:
        ValueError: If a size is out of range, `init` is unknown, or `beta_groups` does not fit; in forward, if the
            input has another number of channels or is smaller than the kernel.
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
        train_alpha: bool = True,
        init: Literal["scaled", "paper"] = "scaled",
        beta_groups: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
        self.padding = check_padding(padding, self.stride)
        _check_init(init)
        rows = out_channels if beta_groups is None else beta_groups
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1 or out_channels % rows or rows % groups:
            raise ValueError(
                f"beta_groups={beta_groups!r}: must be None, or a multiple of groups={groups} that divides "
                f"out_channels={out_channels}"
            )
        self.train_alpha, self.init, self.beta_groups = train_alpha, init, beta_groups
        taps = (in_channels // groups, *self.kernel_size)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.alpha = parameter(out_channels, *taps) if train_alpha else None
        self.beta = parameter(rows, *taps)
        self.gamma = parameter(out_channels, *taps)
        self.bias = parameter(out_channels) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values again."""
        fan_in = self.gamma.shape[1:].numel()
        _reset_neurons(self.alpha, self.beta, self.gamma, self.bias, self.init, fan_in)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, **options: Any) -> Start["APTxConv2d"]:
        """A layer that computes, to rounding, what an `nn.Conv2d` does: alpha = 1, beta = 0, gamma = W and its bias.

        Args:
            conv: The layer to start from; it is left alone.
            options: Of this layer. `init` matters to `reset_parameters` only.

        Returns:
            The layer and its error, 0.0.

        Raises:
            TypeError: If `conv` is no `nn.Conv2d`, or an option is none of this layer's.
            ValueError: If an option is out of range, or is one that `conv` decides, or `conv` pads other than by zeros.
        """
        check_original(conv, nn.Conv2d)
        layer = fresh(cls, conv, **options)
        _copy_map(layer, conv)
        return Start(layer, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """APTx neurons of every patch of x."""
        check_image(x, self.in_channels, self.gamma)
        return aptx_conv2d(
            x,
            self.alpha,
            self.beta,
            self.gamma,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"train_alpha={self.train_alpha}, init={self.init!r}, beta_groups={self.beta_groups}"
        )
