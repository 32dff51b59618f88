r"""PHC: a convolution whose weight is a sum of Kronecker products, $W = \sum_i A_i \otimes S_i$.

From "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions" (https://arxiv.org/abs/2110.04176).
`archzoo.layers.phm` with the axes of the kernel carried along; with the quaternions' rule it is the quaternion
convolution (https://arxiv.org/abs/1806.04418). It saves parameters, not arithmetic.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._conv import check_output, output_size
from archzoo.layers._check import check_image, check_whole, typed
from archzoo.layers._conv import as_pair, check_channels, check_padding, pad
from archzoo.layers._phm import _Hypercomplex, check_multiples
from archzoo.layers.start import Start, check_original, copy_bias, fresh, relative_error
from archzoo.registry import Card, register_layer


@register_layer(
    "phm_conv2d",
    kind="conv2d",
    nonlinear=False,
    card=Card(
        title="PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions",
        authors="Eleonora Grassucci, Aston Zhang, Danilo Comminiello",
        year=2022,
        arxiv="2110.04176",
        equation=r"y = \Big(\sum_{i=1}^n A_i \otimes S_i\Big) * x + b",
        headline="CIFAR-10, best of its ResNets with 1/n of the parameters: 90.54 %; CIFAR-100 66.50 %, SVHN 94.89 % "
        "(as others cite it)",
        reproduced="nothing yet",
    ),
)
class PHMConv2d(_Hypercomplex):
    r"""Convolution whose weight is a sum of n Kronecker products: $y = W * x + b$, $W = \sum_i A_i \otimes S_i$.

    Stands in for `nn.Conv2d` with about 1/n of its parameters, and pads with zeros as that does by default.
    W[p out/n + k, q in/n + d] = sum_i A[i,p,q] S[i,k,d], all kernels kh x kw, where in stands for in_channels / groups.
    At init Var(W) = 2 / (fan_in + fan_out) (Glorot) for every rule but a given one, with fan_in = in kh kw and
    fan_out = out kh kw. For the backward pass the weight is kept beside the input. Colour images suit n = 3; else let
    the first layer be an `nn.Conv2d`.

    Parameters: `A` (n, n, n), or (n, n) for `"mixing"`, a buffer where the rule is fixed; `S` (n, out/n, in/n, kh, kw);
    `bias` (out,).

    Args:
        in_channels: Channels of the input; a multiple of n in each group.
        out_channels: Channels of the output, a multiple of n.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Zeros added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided.
        bias: Whether to add b.
        n: Number of Kronecker products, and of the blocks that channels are cut into.
        rule: How blocks mix, A, as in `PHMLinear`. `"mixing"`: W_pq = A[p,q] S_q, with n times fewer FLOPs than
            `nn.Conv2d` if groups = 1.
        learn_rule: Whether A is a parameter. None: yes, unless the rule is an algebra's or a given tensor that is no
            `nn.Parameter`.
        device: Of parameters and buffers; also a given tensor is moved there, but not a given `nn.Parameter`.
        dtype: As `device`.

    Shape: (batch, in_channels, height, width) -> (batch, out_channels, height', width'), or without the batch axis.

    Raises:
        ValueError: If out_channels or in_channels / groups is not a multiple of n, the rule is unknown or does not fit
            n, `learn_rule=False` meets an `nn.Parameter`, or an argument of the convolution is out of range; in
            `forward`, if the input's channels or dtype are wrong.
    """

    S: nn.Parameter
    bias: nn.Parameter | None

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
        n: int = 4,
        rule: str | Tensor = "learned",
        learn_rule: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_whole(n=n)
        sizes = {"in_channels": in_channels} if groups == 1 else {"in_channels / groups": in_channels // groups}
        check_multiples(n, **sizes, out_channels=out_channels)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
        self.padding = check_padding(padding, self.stride)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_rule(n, rule, learn_rule, factory)
        shape = (n, out_channels // n, in_channels // groups // n, *self.kernel_size)
        self.S = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator, but for a given rule."""
        taps = math.prod(self.kernel_size)
        fan_in, fan_out = self.in_channels // self.groups * taps, self.out_channels * taps
        self._reset_rule()
        bound = math.sqrt(6 / (fan_in + fan_out))
        self.S.uniform_(-bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(fan_in)
            self.bias.uniform_(-bound, bound)

    @classmethod
    @torch.no_grad()
    def from_conv2d(cls, conv: nn.Conv2d, **options: Any) -> Start["PHMConv2d"]:
        """The layer whose weight is nearest to that of an `nn.Conv2d`; the bias is copied.

        A and S are chosen as `PHMLinear.from_linear` says, where a kernel counts as one number.

        Args:
            conv: The original.
            options: n, rule, learn_rule.

        Returns:
            The layer, and its error, the relative one of the weight in the Frobenius norm. That is also the error of
            the outputs where no padding is.

        Raises:
            TypeError: If the original is no `nn.Conv2d`, or there is no such option.
            ValueError: If channels are not multiples of n, an option is wrong, the original pads otherwise than with
                zeros, or its weight is not finite.
        """
        check_original(conv, nn.Conv2d)
        layer = fresh(cls, conv, **options)
        layer.S.copy_(layer._fit(conv.weight.flatten(1)).view_as(layer.S))
        copy_bias(layer, conv)
        return Start(layer, relative_error(layer.weight, conv.weight))

    @property
    def weight(self) -> Tensor:
        """W (out, in/groups, kh, kw), built anew at each access and differentiable. Read-only."""
        W = self._sum(self.S.flatten(2))  # channels before taps, in S as in W
        return W.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, height', width')."""
        check_image(x, self.in_channels, self.S)
        if self.rule == "mixing" and self.groups == 1:
            return self._mixing(x)
        return self._convolve(x, self.weight, self.groups, self.bias)

    def _convolve(self, x: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
        x, padding = pad(x, self.padding, self.kernel_size, self.dilation)
        geometry = zip(x.shape[-2:], self.kernel_size, self.stride, padding, self.dilation, strict=True)
        check_output(x, [output_size(*side) for side in geometry])
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def _mixing(self, x: Tensor) -> Tensor:
        """y_p = sum_q A[p,q] S_q * x_q: the convolutions of the n blocks, then their sums, a 1 x 1 convolution."""
        z = self._convolve(x, self.S.flatten(0, 1), self.n).unflatten(-3, (self.n, -1))
        y = torch.einsum("pq,...qkhw->...pkhw", self.A, z).flatten(-4, -3)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def extra_repr(self) -> str:
        """Channels, kernel, what differs from the defaults of `nn.Conv2d`, n and rule."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        text += "".join(f", {key}={getattr(self, key)}" for key, value in usual.items() if getattr(self, key) != value)
        return f"{text}, bias={self.bias is not None}, {self._rule_repr()}"
