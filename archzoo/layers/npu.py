"""NPU and RealNPU: products of any real or complex powers of the inputs (https://arxiv.org/abs/2006.01681)."""

import math
from abc import abstractmethod
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from archzoo.layers._arithmetic import (
    _as_linear_gives,
    _clamp,
    _exact_linear,
    _shown,
    _wide,
)
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.registry import Card, register_layer

_NPU_CARD: dict[str, Any] = {
    "title": "Neural Power Units",
    "authors": "Niklas Heim, Tomáš Pevný, Václav Šmídl",
    "year": 2020,
    "arxiv": "2006.01681",
    "headline": "x + y, x y, x / y, sqrt x beyond the training range, mean absolute error: "
    "RealNPU .08, .066, .085, .004 (NMU .2, .005, 11.4, .16)",
    "reproduced": "nothing yet",
}
_REFUSED = (
    "{0} multiplies powers of its inputs, and no product of two of them is a weighted sum; start from nn.Linear by "
    "NAU.from_linear, and put the {0} behind it"
)


class _PowerUnit(nn.Module):
    """What both units share: sizes, gate, bias and start. They differ in the exponents: real or complex."""

    _complex: ClassVar[bool]
    """Whether the exponents have an imaginary part, `weight_im`."""

    weight_im: nn.Parameter

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        if self._complex:
            self.weight_im = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.gate = nn.Parameter(torch.empty(in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the real weight anew, from torch's global generator; an imaginary one is zero, the gates half open."""
        nn.init.xavier_uniform_(self.weight)
        if self._complex:
            self.weight_im.zero_()
        self.gate.fill_(0.5)
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> NoReturn:
        """Refuses: a product is no sum.

        Raises:
            ValueError: Always.
        """
        raise ValueError(_REFUSED.format(cls.__name__))

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        check_features(x, self.in_features, self.weight)
        log_modulus, phase = self._polar_product(*_polar(x, self.gate))
        y = _as_linear_gives(log_modulus.exp() * phase.cos(), x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @abstractmethod
    def _polar_product(self, log_r: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the modulus, and the phase, of the products of powers of the inputs."""

    def extra_repr(self) -> str:
        """Sizes and bias."""
        return _shown(self)


def _polar(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the modulus, and the phase in radians, of each gated input."""
    eps = torch.finfo(gate.dtype).eps
    x = _wide(x)
    g = _clamp(gate.to(x.dtype), 0, 1)
    return (g * (x.abs() + eps) + 1 - g).log(), math.pi * g * (x < 0)


@register_layer(
    "real_npu",
    kind="linear",
    nonlinear=True,
    card=Card(
        **_NPU_CARD,
        equation=r"y = \exp(\log r\, W^T) \odot \cos(k W^T), \quad r = g (|x| + \epsilon) + 1 - g, "
        r"\quad k = \pi g\,[x < 0]",
    ),
)
class RealNPU(_PowerUnit):
    r"""Neural power unit with a real weight: the real part of a product of any powers, $\prod_i x_i^{W_{oi}}$.

    A gate g in [0, 1] per input replaces an input that is not used by 1: $r = g (|x| + \epsilon) + 1 - g$,
    $k = \pi g [x < 0]$, $y = \exp(\log r\, W^T) \odot \cos(k W^T)$; eps is the machine's for the parameters' dtype.
    Parameters: `weight` (out, in), Xavier uniform; `gate` (in,), 0.5. Computed in float32 at least.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size is wrong, or in `forward` the input's last size or dtype.
    """

    _complex = False

    def _polar_product(self, log_r: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _exact_linear(log_r, self.weight), _exact_linear(k, self.weight)


@register_layer(
    "npu",
    kind="linear",
    nonlinear=True,
    card=Card(
        **_NPU_CARD,
        equation=r"y = \exp(\log r\, W^T - k V^T) \odot \cos(k W^T + \log r\, V^T)",
    ),
)
class NPU(_PowerUnit):
    r"""Neural power unit with a complex weight W + iV.

    $y = \exp(\log r\, W^T - k V^T) \odot \cos(k W^T + \log r\, V^T)$; r, k, the gate and eps are those of `RealNPU`,
    which it starts as. Parameters: `weight` W (out, in), Xavier uniform; `weight_im` V (out, in), zero; `gate` (in,),
    0.5. Computed in float32 at least.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size is wrong, or in `forward` the input's last size or dtype.
    """

    _complex = True

    def _polar_product(self, log_r: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        log_modulus = _exact_linear(log_r, self.weight) - _exact_linear(k, self.weight_im)
        return log_modulus, _exact_linear(k, self.weight) + _exact_linear(log_r, self.weight_im)
