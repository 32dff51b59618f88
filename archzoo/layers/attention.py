"""Self-attention with rotary positions, and the gated feed-forward net: what other mixers are compared with."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import compute_dtype
from archzoo.layers._attention import attend, head_sizes, positions_of
from archzoo.layers._cache import KeyValueCache
from archzoo.layers._check import check_dropout, check_positive, check_tokens, check_whole, typed
from archzoo.layers._rotary import rotary_table, rotate
from archzoo.registry import Card, register_layer

NORM_EPS = 1e-6


@register_layer(
    "attention",
    kind="mixer",
    nonlinear=True,
    card=Card(
        title="RoFormer: Enhanced Transformer with Rotary Position Embedding",
        authors="Jianlin Su, Yu Lu, Shengfeng Pan, Ahmed Murtadha, Bo Wen, Yunfeng Liu",
        year=2021,
        arxiv="2104.09864",
        equation=r"y = W_o\, \mathrm{softmax}(R W_q x\, (R W_k x)^T / \sqrt k)\, W_v x",
        headline="the usual mixer, with which others are compared",
        reproduced="the baseline of ngpt_vs_gpt, mamba_vs_attention and associative_recall",
    ),
)
class RotaryAttention(nn.Module):
    r"""Self-attention with rotary positions and no biases: $\mathrm{softmax}(q k^T / \sqrt k)\, v$ of every head.

    Args:
        dim: Size d of a token.
        num_heads: Number H of heads; by default max(1, dim // 64).
        head_dim: Size k of a head, even; by default dim / num_heads.
        causal: Whether a token sees itself and those before it only.
        rope_theta: Base of the angles.
        qk_norm: Whether queries and keys go through an RMSNorm of their own, shared by the heads, before they are
            turned (https://arxiv.org/abs/2302.05442, with RMSNorm for LayerNorm).
        dropout: Probability that a weight of attention is dropped in training.
        device: Of the parameters.
        dtype: As `device`.

    Attributes:
        q_proj: Linear layer with a weight (H k, d); `k_proj` and `v_proj` likewise.
        out_proj: Linear layer with a weight (d, H k).
        q_norm: RMSNorm of a head (k,), or None; `k_norm` likewise.

    Shape: (batch, length, dim) -> (batch, length, dim).

    Raises:
        ValueError: If a size is no whole number, 1 or more, H does not divide dim and k is not given, or k is odd; in
            `forward`, if the input is not (batch, length, dim).
    """

    @typed
    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_heads, self.head_dim = head_sizes(dim, num_heads, head_dim, rotary=True)
        check_positive(rope_theta=rope_theta)
        check_dropout(dropout)
        self.dim, self.causal, self.rope_theta, self.dropout = dim, causal, rope_theta, dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False, **factory)
        self.k_proj = nn.Linear(dim, inner, bias=False, **factory)
        self.v_proj = nn.Linear(dim, inner, bias=False, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=False, **factory)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS, **factory) if qk_norm else None

    def reset_parameters(self) -> None:
        """Draws the matrices anew as `nn.Linear` does; norms start as 1."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.q_norm, self.k_norm):
            if module is not None:
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Maps (batch, length, dim) to the same; masks, positions and cache as in `NormalizedAttention`."""
        check_tokens(x, self.dim, self.q_proj.weight)
        heads = (self.num_heads, self.head_dim)
        q, k, v = (project(x).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        positions = positions_of(x, position_ids, cache.length if cache is not None else 0)
        table = rotary_table(positions, self.head_dim, self.rope_theta, compute_dtype(q))
        q, k = _place(q, self.q_norm, table), _place(k, self.k_norm, table)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        y: Tensor = self.out_proj(attend(q, k, v, causal=self.causal, attn_mask=attn_mask, dropout=dropout))
        return y

    def extra_repr(self) -> str:
        """Size and heads; the rest is in its layers."""
        text = f"{self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"
        return f"{text}, dropout={self.dropout}" if self.dropout else text


def _place(x: Tensor, norm: nn.RMSNorm | None, table: Tensor) -> Tensor:
    placed = x if norm is None else norm(x.to(norm.weight.dtype))
    return rotate(placed.to(table.dtype), table).to(x.dtype)


class GatedMLP(nn.Module):
    r"""SwiGLU without biases, $W_o (W_u x \circ \mathrm{silu}(W_g x))$ (https://arxiv.org/abs/2002.05202).

    Args:
        dim: Size d of a token.
        hidden_dim: Size m of the hidden layer; by default 4 dim.
        device: Of the parameters.
        dtype: As `device`.

    Attributes:
        up_proj: Linear layer with W_u (m, d); `gate_proj` with W_g.
        down_proj: Linear layer with W_o (d, m).

    Shape: (*, dim) -> (*, dim).

    Raises:
        ValueError: If a size is no whole number, 1 or more.
    """

    @typed
    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(dim=dim)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_whole(hidden_dim=hidden_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False, **factory)
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False, **factory)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (*, dim) to (*, dim)."""
        y: Tensor = self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))
        return y
