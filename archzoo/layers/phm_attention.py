"""Attention and a transformer's block of PHM layers (https://arxiv.org/abs/2102.08597, section 4.1).

Queries, keys and values come from one PHM layer d -> 3 d; the output projection and the feed-forward layers are PHM
layers too. Attention itself is the usual one, and without parameters.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.attention import self_attention
from archzoo.layers._check import check_dropout, check_positive, check_tokens, check_whole, typed
from archzoo.layers._phm import check_multiples, share_rule_
from archzoo.layers.phm import PHMLinear
from archzoo.registry import Card, register_layer

_CARD = Card(
    title="Beyond Fully-Connected Layers with Quaternions: "
    "Parameterization of Hypercomplex Multiplications with 1/n Parameters",
    authors="Aston Zhang, Yi Tay, Shuai Zhang, Alvin Chan, Anh Tuan Luu, Siu Cheung Hui, Jie Fu",
    year=2021,
    arxiv="2102.08597",
    equation=r"Q, K, V = \mathrm{PHM}(x), \quad y = \mathrm{PHM}(\mathrm{softmax}(Q K^T / \sqrt{d_h}) V)",
    headline="Transformer, En-Vi: BLEU 28.43; with 1/n of the parameters, "
    "n = 2 / 4 / 8 / 16: 29.25 / 29.13 / 29.34 / 29.04",
    reproduced="none of the paper's tasks",
)


@register_layer("phm_attention", kind="mixer", nonlinear=True, card=_CARD)
class PHMAttention(nn.Module):
    r"""Multi-head self-attention whose projections are PHM layers.

    Modules: `qkv`, a `PHMLinear` from dim to 3 dim, and `proj`, one from dim to dim.

    Args:
        dim: Size of a token; a multiple of n and of num_heads.
        num_heads: Number of heads.
        n: Number of Kronecker products in each layer.
        causal: Whether a token sees itself and those before it only.
        dropout: Probability that a weight of attention is dropped in training.
        bias: Whether the layers have a bias.
        rule: As in `PHMLinear`. An `nn.Parameter` is shared by both layers.
        learn_rule: As in `PHMLinear`.
        rank: As in `PHMLinear`.
        device: Of parameters and buffers.
        dtype: As `device`.

    Shape: (batch, length, dim) -> (batch, length, dim). Under autocast the output has autocast's dtype.

    Raises:
        ValueError: As `PHMLinear`, or if num_heads does not divide dim or dropout is out of range; in `forward`, if the
            input is not (batch, length, dim).
    """

    @typed
    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        n: int = 4,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        rule: str | Tensor = "learned",
        learn_rule: bool | None = None,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(dim=dim, num_heads=num_heads, n=n)
        check_multiples(n, dim=dim)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide dim={dim}")
        check_dropout(dropout)
        self.dim, self.num_heads, self.causal, self.dropout = dim, num_heads, causal, dropout
        options: dict[str, Any] = {"n": n, "rule": rule, "learn_rule": learn_rule, "rank": rank}
        self.qkv = PHMLinear(dim, 3 * dim, bias, **options, device=device, dtype=dtype)
        self.proj = PHMLinear(dim, dim, bias, **options, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws both layers anew."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, dim) -> (batch, length, dim)."""
        check_tokens(x, self.dim, self.qkv._a_weight)
        dropout = self.dropout if self.training else 0.0
        y: Tensor = self.proj(self_attention(self.qkv(x), self.num_heads, causal=self.causal, dropout=dropout))
        return y

    def extra_repr(self) -> str:
        """Size, heads, and whether it is causal; the rest is in its layers."""
        text = f"{self.dim}, num_heads={self.num_heads}, causal={self.causal}"
        return f"{text}, dropout={self.dropout}" if self.dropout else text


@register_layer(
    "phm_block",
    kind="mixer",
    nonlinear=True,
    card=replace(
        _CARD, equation=r"u = x + \mathrm{Att}(N(x)), \quad y = u + \mathrm{PHM}(\mathrm{gelu}(\mathrm{PHM}(N(u))))"
    ),
)
class PHMTransformerBlock(nn.Module):
    r"""A transformer's block of PHM layers, norms first: $u = x + \mathrm{Att}(N(x))$, $y = u + \mathrm{MLP}(N(u))$.

    Modules: `norm1` and `norm2`, LayerNorms; `attention`, a `PHMAttention`; `fc1` and `fc2`, PHM layers with a GELU
    between them.

    Args:
        dim: Size of a token; a multiple of n and of num_heads.
        num_heads: Number of heads.
        n: Number of Kronecker products in each PHM layer.
        mlp_ratio: Size of the hidden layer of the MLP, in units of dim; dim times it is rounded to a multiple of n.
        causal: Whether a token sees itself and those before it only.
        dropout: Probability that a value behind attention or MLP, or a weight of attention, is dropped in training.
        bias: Whether the PHM layers have a bias.
        rule: As in `PHMLinear`.
        learn_rule: As in `PHMLinear`.
        share_rule: Whether the four PHM layers share one learned rule. To share it among blocks, call `share_rule_`
            on the whole model, or pass one `nn.Parameter` as rule.
        rank: As in `PHMLinear`.
        device: Of parameters and buffers.
        dtype: As `device`.

    Shape: (batch, length, dim) -> (batch, length, dim). Under autocast the output keeps the input's dtype, as sums of
    a residual stream should.

    Raises:
        ValueError: As `PHMAttention`, or if mlp_ratio leaves no hidden layer, or `share_rule=True` meets a rule that
            is not learned.
    """

    @typed
    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        n: int = 4,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        rule: str | Tensor = "learned",
        learn_rule: bool | None = None,
        share_rule: bool = False,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(dim=dim, num_heads=num_heads, n=n)
        check_positive(mlp_ratio=mlp_ratio)
        hidden = round(mlp_ratio * dim / n) * n
        if not 1 <= hidden < 2**31:
            raise ValueError(f"mlp_ratio={mlp_ratio}: times dim={dim}, must be n={n} or more, and below 2^31")
        layer: dict[str, Any] = {"n": n, "rule": rule, "learn_rule": learn_rule, "rank": rank}
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.dropout = dim, dropout
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attention = PHMAttention(
            dim, num_heads=num_heads, causal=causal, dropout=dropout, bias=bias, **layer, **factory
        )
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.fc1 = PHMLinear(dim, hidden, bias, **layer, **factory)
        self.fc2 = PHMLinear(hidden, dim, bias, **layer, **factory)
        if share_rule and share_rule_(self) == 0:
            raise ValueError(f"share_rule=True: rule={self.fc1.rule!r} is not learned, so that there is none to share")

    def reset_parameters(self) -> None:
        """Draws every layer anew."""
        for module in (self.norm1, self.attention, self.norm2, self.fc1, self.fc2):
            module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, dim) -> (batch, length, dim)."""
        check_tokens(x, self.dim, self.norm1.weight)
        x = x + F.dropout(self.attention(self.norm1(x)), self.dropout, self.training)
        y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + F.dropout(y, self.dropout, self.training)

    def extra_repr(self) -> str:
        """Size and dropout; the rest is in its layers."""
        return f"{self.dim}, dropout={self.dropout}" if self.dropout else f"{self.dim}"
