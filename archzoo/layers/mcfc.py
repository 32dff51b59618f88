"""MCFC: the fully connected layer of MC-LSTM, which conserves mass (https://arxiv.org/abs/2101.05186)."""

from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers._arithmetic import (
    _as_linear_gives,
    _check_choice,
    _exact_linear,
    _shown,
    _wide,
)
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.registry import Card, register_layer


@register_layer(
    "mcfc",
    kind="linear",
    nonlinear=False,
    card=Card(
        title="MC-LSTM: Mass-Conserving LSTM",
        authors="Pieter-Jan Hoedt, Frederik Kratzert, Daniel Klotz, Christina Halmich, Markus Holzleitner, "
        "Grey Nearing, Sepp Hochreiter, Günter Klambauer",
        year=2021,
        arxiv="2101.05186",
        equation=r"y = \sigma(g) \odot (x\, \mathrm{softmax}(J))",
        headline="the paper's arithmetic results are for the recurrent MC-LSTM; this layer is its fully connected form",
        reproduced="nothing yet",
    ),
)
class MCFC(nn.Module):
    r"""Mass-conserving fully connected layer: $y = \sigma(g) \odot (x\, \mathrm{softmax}(J))$.

    Each input is divided among the outputs, and each output passes a gate. Parameters: `junction` J (in, out),
    orthogonal, the softmax being over its last axis; `gate` g (out,), zero. With `mode="multiply"` both have one output
    more, into which an input that is not used can flow, and `log_bias` (out,), zero, is added.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        mode: `"add"`, or `"multiply"`: exp(that on log x, the last output dropped, + log_bias), which is not affine and
            is for positive x; the result for x < 0 is NaN. Computed in float32 at least.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        _check_choice("mode", mode, ("add", "multiply"))
        self.in_features, self.out_features, self.mode = in_features, out_features, mode
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        columns = out_features + (mode == "multiply")
        self.junction = nn.Parameter(torch.empty(in_features, columns, **factory))
        self.gate = nn.Parameter(torch.empty(columns, **factory))
        self.log_bias = nn.Parameter(torch.empty(out_features, **factory)) if mode == "multiply" else None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the junction anew, from torch's global generator; the rest is zero."""
        self.junction.copy_(nn.init.orthogonal_(torch.empty_like(_wide(self.junction))))  # no QR in half precision
        for vector in (self.gate, self.log_bias, self.bias):
            if vector is not None:
                vector.zero_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> NoReturn:
        """Refuses: mass is conserved.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "MCFC divides each input among the outputs by positive shares that sum to 1 before the gate, and a linear "
            "layer's weights have signs and sizes of their own; use NAU.from_linear or NAC.from_linear"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        check_features(x, self.in_features, self.junction)
        if self.log_bias is None:
            weight = (self.gate.sigmoid() * self.junction.softmax(-1)).t()
            return F.linear(x, weight, self.bias)
        gate, shares = self.gate.sigmoid()[:-1], self.junction.softmax(-1)[:, :-1]
        y = (_exact_linear(_wide(x).log(), (gate * shares).t()) + self.log_bias).exp()
        y = _as_linear_gives(y, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias, and the mode where it is not the default."""
        return _shown(self, mode="add")
