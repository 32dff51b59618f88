"""NAC and NALU: the neural accumulator and the neural arithmetic logic unit (https://arxiv.org/abs/1808.00508)."""

import math
from functools import lru_cache
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers._arithmetic import (
    _as_linear_gives,
    _check_choice,
    _check_number,
    _distance_to_integers,
    _power_product,
    _shown,
)
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.layers.start import Start, check_original, copy_bias, fresh, relative_error
from archzoo.registry import Card, register_layer

_LARGEST = 0.999  # of |W| where a start cannot be exact: nearer to 1, tanh and sigmoid have next to no gradient


@lru_cache(maxsize=1024)
def _nac_bound(fans: int) -> float:
    """r for which tanh(a) sigmoid(b), a and b from U(-r, r), has the variance 2 / fans; by bisection on (0, 10]."""
    low, high = 0.0, 10.0
    for _ in range(60):
        r = (low + high) / 2
        variance = (1 - math.tanh(r) / r) * (r - math.tanh(r / 2)) / (2 * r)
        low, high = (r, high) if max(fans, 5) * variance < 2 else (low, r)
    return high


_NALU_CARD: dict[str, Any] = {
    "title": "Neural Arithmetic Logic Units",
    "authors": "Andrew Trask, Felix Hill, Scott Reed, Jack Rae, Chris Dyer, Phil Blunsom",
    "year": 2018,
    "arxiv": "1808.00508",
}


@register_layer(
    "nac",
    kind="linear",
    nonlinear=False,
    card=Card(
        **_NALU_CARD,
        equation=r"y = x W^T, \quad W = \tanh(\hat W) \odot \sigma(\hat M)",
        headline="sum of two subsets of 100 inputs, extrapolation (as measured by arXiv 2001.05016): "
        "+ and - solved by 100 of 100 seeds, the product by 31",
        reproduced="differences of 100 inputs, 3e4 steps (experiment arithmetic): 18 of 20 seeds, median 9e3 steps "
        "(paper: 100 %, 9e3); sums need 2.5e5 steps in the paper, and none of 20 seeds had them in 3e4",
    ),
)
class NAC(nn.Module):
    r"""Neural accumulator: $y = x W^T$ with $W = \tanh(\hat W) \odot \sigma(\hat M)$, which tends to {-1, 0, 1}.

    Parameters `w_hat`, `m_hat` (out, in), both from U(-r, r), with r such that Var(W) = 2 / (in + out).

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        mode: `"add"`, or `"multiply"`: y = exp(log(|x| + eps) W^T), which is not affine, loses the sign of x, and
            explodes near x = 0 where W < 0. It is computed in float32 at least, under autocast too.
        eps: Added to |x|, where `mode="multiply"`.

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
        mode: Literal["add", "multiply"] = "add",
        eps: float = 1e-7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        _check_choice("mode", mode, ("add", "multiply"))
        _check_number("eps", eps, positive=True)
        self.in_features, self.out_features, self.mode, self.eps = in_features, out_features, mode, eps
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w_hat = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.m_hat = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws both matrices anew, from torch's global generator."""
        bound = _nac_bound(self.in_features + self.out_features)
        for parameter in (self.w_hat, self.m_hat):
            parameter.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def weight(self) -> Tensor:
        """W (out, in), computed at each access. Read-only."""
        return self.w_hat.tanh() * self.m_hat.sigmoid()

    def sparsity_error(self) -> float:
        """Largest distance of a weight W from an integer of [-1, 1]: max min(|W|, |1 - |W||)."""
        return _distance_to_integers(self.weight)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Start["NAC"]:
        """The linear layer itself where all its weights are in (-1, 1), else the nearest unit but for a thousandth.

        A weight of 1 or more has no finite parameters, and becomes 0.999, its sign kept. Sets `m_hat` so that
        sigmoid(m_hat) is (1 + |W|) / 2, `w_hat` so that tanh(w_hat) is the rest, 2 W / (1 + |W|), and `bias` to the
        layer's: neither factor is nearer to its bounds than it has to be. Where W is 0, `m_hat` has no gradient until
        `w_hat` has moved.

        Raises:
            TypeError: If the original is not an `nn.Linear`, or there is no such option.
            ValueError: If `mode="multiply"`, which is not linear; if an option is wrong, or one that the original
                decides.
        """
        check_original(linear, nn.Linear)
        unit = fresh(cls, linear, **options)
        if unit.mode == "multiply":
            raise ValueError("mode='multiply': multiplies its inputs, and no product is a weighted sum; use mode='add'")
        truth = linear.weight.double()
        weight = torch.where(truth.abs() < 1, truth, _LARGEST * truth.sign())
        share = (1 + weight.abs()) / 2
        unit.m_hat.copy_(share.logit())
        unit.w_hat.copy_((weight / share).atanh())
        copy_bias(unit, linear)
        return Start(unit, relative_error(weight, truth))

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        check_features(x, self.in_features, self.w_hat)
        _check_choice("mode", self.mode, ("add", "multiply"))
        if self.mode == "add":
            return F.linear(x, self.weight, self.bias)
        y = _as_linear_gives(_power_product(x, self.weight, self.eps), x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias, and the options that are not the defaults."""
        return _shown(self, mode="add", eps=1e-7)


@register_layer(
    "nalu",
    kind="linear",
    nonlinear=True,
    card=Card(
        **_NALU_CARD,
        equation=r"y = g \odot (x W^T) + (1 - g) \odot \exp(\log(|x| + \epsilon) M^T), \quad g = \sigma(x G^T)",
        headline="sum of two subsets of 100 inputs, extrapolation (as measured by arXiv 2001.05016): "
        "+ and - solved by 14 of 100 seeds, the product by none",
        reproduced="it fails, as published: 0 of 20 seeds on sums in 3e4 steps (experiment arithmetic), 0 of 100 on "
        "(x1 + x2)(x1 + x2 + x3 + x4) (experiment arithmetic_function10; paper: 26 % after 2e5 steps)",
    ),
)
class NALU(nn.Module):
    r"""Neural arithmetic logic unit: a gate g between a NAC that adds and a NAC that multiplies.

    $y = g \odot (x W^T) + (1 - g) \odot \exp(\log(|x| + \epsilon) M^T)$, $g = \sigma(x G^T)$. It is the baseline that
    fails: the gate's choice depends on x, the product loses signs and explodes near 0. Nothing here hides that.

    Parameters: `gate_weight` G (out, in), Xavier uniform; `w_hat`, `m_hat` as in NAC; with `shared=False` also
    `w_hat_mul`, `m_hat_mul`.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        shared: Whether the product has the sum's weights, M = W.
        gate_bias: Whether the gate has a bias, `gate_bias` (out,), that starts at zero.
        eps: Added to |x| in the logarithm.

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
        shared: bool = True,
        gate_bias: bool = False,
        eps: float = 1e-7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        _check_number("eps", eps, positive=True)
        self.in_features, self.out_features, self.shared, self.eps = in_features, out_features, shared, eps
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = out_features, in_features
        self.gate_weight = nn.Parameter(torch.empty(shape, **factory))
        self.w_hat = nn.Parameter(torch.empty(shape, **factory))
        self.m_hat = nn.Parameter(torch.empty(shape, **factory))
        self.w_hat_mul = None if shared else nn.Parameter(torch.empty(shape, **factory))
        self.m_hat_mul = None if shared else nn.Parameter(torch.empty(shape, **factory))
        self.gate_bias = nn.Parameter(torch.empty(out_features, **factory)) if gate_bias else None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all matrices anew, from torch's global generator."""
        nn.init.xavier_uniform_(self.gate_weight)
        bound = _nac_bound(self.in_features + self.out_features)
        for parameter in (self.w_hat, self.m_hat, self.w_hat_mul, self.m_hat_mul):
            if parameter is not None:
                parameter.uniform_(-bound, bound)
        for vector in (self.gate_bias, self.bias):
            if vector is not None:
                vector.zero_()

    @property
    def weight(self) -> Tensor:
        """W (out, in) of the sum, computed at each access. Read-only."""
        return self.w_hat.tanh() * self.m_hat.sigmoid()

    @property
    def weight_mul(self) -> Tensor:
        """M (out, in) of the product, computed at each access. Read-only."""
        if self.w_hat_mul is None or self.m_hat_mul is None:
            return self.weight
        return self.w_hat_mul.tanh() * self.m_hat_mul.sigmoid()

    def sparsity_error(self) -> float:
        """Largest distance of a weight of the sum or of the product from an integer of [-1, 1]."""
        return max(_distance_to_integers(self.weight), _distance_to_integers(self.weight_mul))

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> NoReturn:
        """Refuses: the gate cannot choose the sum.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "NALU computes a weighted sum only where its gate, sigmoid(x G^T), is 1 for every x, which no finite G "
            "gives, and where the gate would have no gradient; use NAC.from_linear"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        check_features(x, self.in_features, self.w_hat)
        weight = self.weight
        weight_mul = weight if self.w_hat_mul is None else self.weight_mul
        gate = F.linear(x, self.gate_weight, self.gate_bias).sigmoid()
        y = gate * F.linear(x, weight) + (1 - gate) * _power_product(x, weight_mul, self.eps)
        y = _as_linear_gives(y, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias, and the options that are not the defaults."""
        text = _shown(self, shared=True, eps=1e-7)
        return text if self.gate_bias is None else f"{text}, gate_bias=True"
