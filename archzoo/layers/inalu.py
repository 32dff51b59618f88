"""iNALU: a NALU whose gate does not see x, and whose product keeps its sign (https://arxiv.org/abs/2003.07629)."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.nmu_product import nmu_product
from archzoo.layers._arithmetic import (
    _as_linear_gives,
    _check_number,
    _exact_linear,
    _shown,
    _wide,
)
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.registry import Card, register_layer


@register_layer(
    "inalu",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="iNALU: Improved Neural Arithmetic Logic Unit",
        authors="Daniel Schlör, Markus Ring, Andreas Hotho",
        year=2020,
        arxiv="2003.07629",
        equation=r"y = \sigma(g) \odot a + (1 - \sigma(g)) \odot m \odot z, \quad a = x A^T, \quad "
        r"m = \exp(\min(\log\max(|x|, \epsilon) M^T, 20)), \quad "
        r"z_o = \prod_i (\mathrm{sign}(x_i) |M_{oi}| + 1 - |M_{oi}|)",
        headline="x + y, x y, x / y, sqrt x beyond the training range, mean absolute error as measured by "
        "arXiv 2006.01681: 2.2, 3.5, 2.5, .05",
        reproduced="nothing yet",
    ),
)
class INALU(nn.Module):
    r"""Improved NALU: a gate that does not see x, a product that keeps its sign and cannot overflow.

    $y = \sigma(g) \odot a + (1 - \sigma(g)) \odot m \odot z$, with $a = x A^T$, $m = \exp(\min(\log\max(|x|, \epsilon)
    M^T, c))$ and the sign $z_o = \prod_i (\mathrm{sign}(x_i) |M_{oi}| + 1 - |M_{oi}|)$, an NMU of signs.
    A = tanh(`w_hat`) sigmoid(`m_hat`) and M = tanh(`w_hat_mul`) sigmoid(`m_hat_mul`), all (out, in): `w_` from
    N(0.88, 0.2^2), `m_` from N(0.5, 0.2^2); `gate` g (out,) from N(0, 0.2^2). The product is taken in float32 at least.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        eps: Lower bound of |x| in the logarithm.
        max_exponent: Upper bound c of the exponent.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size or an option is wrong, or in `forward` the input's last size or dtype.
    """

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        eps: float = 1e-7,
        max_exponent: float = 20.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        _check_number("eps", eps, positive=True)
        _check_number("max_exponent", max_exponent, positive=True)
        self.in_features, self.out_features, self.eps, self.max_exponent = in_features, out_features, eps, max_exponent
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = out_features, in_features
        self.w_hat = nn.Parameter(torch.empty(shape, **factory))
        self.m_hat = nn.Parameter(torch.empty(shape, **factory))
        self.w_hat_mul = nn.Parameter(torch.empty(shape, **factory))
        self.m_hat_mul = nn.Parameter(torch.empty(shape, **factory))
        self.gate = nn.Parameter(torch.empty(out_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws everything but the bias anew, from torch's global generator."""
        for parameter in (self.w_hat, self.w_hat_mul):
            parameter.normal_(0.88, 0.2)
        for parameter in (self.m_hat, self.m_hat_mul):
            parameter.normal_(0.5, 0.2)
        self.gate.normal_(0, 0.2)
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> NoReturn:
        """Refuses: the gate cannot choose the sum.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "INALU computes a weighted sum only where its gate, sigmoid(g), is 1, which no finite g gives, and where "
            "the gate would have no gradient; use NAC.from_linear"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        check_features(x, self.in_features, self.w_hat)
        wide = _wide(x)
        total = F.linear(x, self.w_hat.tanh() * self.m_hat.sigmoid())
        weight_mul = self.w_hat_mul.tanh() * self.m_hat_mul.sigmoid()
        exponent = _exact_linear(wide.abs().clamp(min=self.eps).log(), weight_mul)
        product = exponent.clamp(max=self.max_exponent).exp() * nmu_product(wide.sign(), weight_mul.abs())
        gate = self.gate.sigmoid()
        y = _as_linear_gives(gate * total + (1 - gate) * product, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias, and the options that are not the defaults."""
        return _shown(self, eps=1e-7, max_exponent=20.0)
