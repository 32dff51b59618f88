"""nGPT: attention, MLP and block of a transformer on the hypersphere (https://arxiv.org/abs/2410.01131).

No norm layers. Vectors of the embedding space are unit: those of the matrices (`normalized_linear.py`) and the state
between sub-blocks. With N(x) = x / |x|, once for attention and once for the MLP,

    h <- N(N(h) + |alpha| (N(f(h)) - N(h))),

alpha being learned for each feature ("eigen learning rates"). Each learned vector s is stored so that it starts at
`scale`, and used as s · init / scale: Adam moves what is stored by about the learning rate, so that `scale` sets the
vector's own rate. Weight decay on these vectors must be 0; nGPT has none at all, and no warm-up.

After each optimizer step call `constrain_(model)`; see `normalized_linear.py`, from where it can be imported too.

Where the authors' code differs: its rotary embedding is no rotation (its two products are never added); it multiplies u
by sqrt(d) too, which falls out in N(f(h)).
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import compute_dtype
from archzoo.kernels.normalized_residual import normalized_residual, unit
from archzoo.layers._attention import attend, head_sizes, positions_of
from archzoo.layers._cache import KeyValueCache
from archzoo.layers._check import check_dropout, check_positive, check_tokens, check_whole, typed
from archzoo.layers._rotary import rotary_table, rotate
from archzoo.layers.normalized_linear import (
    NGPT_CARD,
    NormalizedEmbedding,
    NormalizedLinear,
    constrain_,
    register_constraint,
)
from archzoo.registry import Card, register_layer

__all__ = [
    "NormalizedAttention",
    "NormalizedBlock",
    "NormalizedEmbedding",
    "NormalizedLinear",
    "NormalizedMLP",
    "constrain_",
    "register_constraint",
]

Module = TypeVar("Module", bound=nn.Module)


@register_layer(
    "ngpt",
    kind="mixer",
    nonlinear=True,
    card=Card(
        equation=r"y = W_o\, \mathrm{softmax}(\sqrt{k}\, \hat{q} \hat{k}^T) v, \quad \hat{q} = s_{qk} \circ N(R W_q x)",
        reproduced="nothing of the paper's size. Tiny Shakespeare, 1.07 million parameters, 3 seeds, each at its best "
        "rate (experiment ngpt_vs_gpt): 0.69 of the steps of a pre-norm GPT to its last loss at context 64, 0.62 at "
        "256; a GPT with normalised queries and keys 0.73 and 0.62",
        **NGPT_CARD,
    ),
)
class NormalizedAttention(nn.Module):
    r"""nGPT's self-attention: queries and keys of unit norm, times a learned vector, $\sqrt k$ before the softmax.

    With R the rotation by a token's position, for each head $q = s \circ N(R W_q x)$, $k = s \circ N(R W_k x)$,
    $y = W_o\, \mathrm{softmax}(c\, q k^T)\, W_v x$, c being `softmax_scale`. The output is not of unit norm. Rows of
    W_q, W_k and W_v are, and columns of W_o. No biases.

    Args:
        dim: Size d of a token.
        num_heads: Number H of heads; by default max(1, dim // 64).
        head_dim: Size k of a head; by default dim / num_heads.
        causal: Whether a token sees itself and those before it only.
        rotary: Whether queries and keys are turned by their position; needs an even k.
        rope_theta: Base of the angles: pair i turns by position · rope_theta^(-2 i / k).
        qk_norm: Whether queries and keys are normalised. False is the paper's ablation, s and c staying.
        qk_scale_init: Where s starts.
        qk_scale_scale: Where what is stored of s starts; by default 1 / sqrt(dim).
        softmax_scale: c; by default sqrt(k).
        dropout: Probability that a weight of attention is dropped in training.
        reparametrize: As in `NormalizedLinear`.
        device: Of the parameters.
        dtype: As `device`.

    Attributes:
        q_proj: `NormalizedLinear` with a weight (H k, d); `k_proj` and `v_proj` likewise.
        out_proj: `NormalizedLinear` with a weight (d, H k), its columns being unit.
        qk_scale: What is stored of s, (H k,).

    Shape: (batch, length, dim) -> (batch, length, dim). Under autocast the output has autocast's dtype.

    Raises:
        ValueError: If a size is no whole number, 1 or more, H does not divide dim and k is not given, or k is odd with
            `rotary=True`; if another option is out of range; in `forward`, if the input is not (batch, length, dim).
    """

    q_scale: Tensor | None

    @typed
    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        rotary: bool = True,
        rope_theta: float = 10000.0,
        qk_norm: bool = True,
        qk_scale_init: float = 1.0,
        qk_scale_scale: float | None = None,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        reparametrize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_heads, self.head_dim = head_sizes(dim, num_heads, head_dim, rotary)
        self.dim, self.causal, self.rotary, self.qk_norm = dim, causal, rotary, qk_norm
        self.rope_theta, self.dropout = rope_theta, dropout
        self.qk_scale_init, self.qk_scale_scale = qk_scale_init, _or(qk_scale_scale, dim**-0.5)
        self.softmax_scale = _or(softmax_scale, self.head_dim**0.5)
        check_dropout(dropout)
        check_positive(
            rope_theta=rope_theta,
            qk_scale_init=qk_scale_init,
            qk_scale_scale=self.qk_scale_scale,
            softmax_scale=self.softmax_scale,
        )
        inner = self.num_heads * self.head_dim
        options: dict[str, Any] = {"reparametrize": reparametrize, "device": device, "dtype": dtype}
        self.q_proj = NormalizedLinear(dim, inner, bias=False, **options)
        self.k_proj = NormalizedLinear(dim, inner, bias=False, **options)
        self.v_proj = NormalizedLinear(dim, inner, bias=False, **options)
        self.out_proj = NormalizedLinear(inner, dim, bias=False, normalize="out", **options)
        self.qk_scale: nn.Parameter | None = nn.Parameter(torch.empty(inner, device=device, dtype=dtype))
        self.register_buffer("q_scale", None)
        self._reset_scales()

    def reset_parameters(self) -> None:
        """Draws the matrices anew; s as it starts."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            projection.reset_parameters()
        self._reset_scales()

    def _reset_scales(self) -> None:
        _fill_(self.qk_scale, self.qk_scale_scale)

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Maps (batch, length, dim) to the same.

        Args:
            x: The tokens; with a cache, those behind the ones it has.
            attn_mask: Broadcasts to (batch, heads, length, tokens), cached tokens included: bool, True where a token
                may look, or numbers added to the scores. Restricts a causal layer further. A token that may look
                nowhere gets zeros. For padding (batch, tokens), give `mask[:, None, None]`.
            position_ids: Whole numbers (length,) or (batch, length); by default 0, 1, … from the first token on.
            cache: Keys and values of earlier tokens, to which those of x are added.
        """
        check_tokens(x, self.dim, self.q_proj.weight)
        heads = (self.num_heads, self.head_dim)
        q, k, v = (project(x).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q_scale, k_scale = self._scales()
        table = None
        if self.rotary:
            positions = positions_of(x, position_ids, cache.length if cache is not None else 0)
            table = rotary_table(positions, self.head_dim, self.rope_theta, compute_dtype(q))
        q, k = self._place(q, table, q_scale), self._place(k, table, k_scale)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        y: Tensor = self.out_proj(attend(q, k, v, causal=self.causal, attn_mask=attn_mask, dropout=dropout))
        return y

    def _scales(self) -> tuple[Tensor, Tensor | None]:
        """Factors of queries and keys; that of the queries holds c too, and the sqrt(k) that `attend` divides by."""
        if self.qk_scale is None:
            assert self.q_scale is not None
            return self.q_scale, None
        s = (self.qk_scale * (self.qk_scale_init / self.qk_scale_scale)).unflatten(0, (self.num_heads, self.head_dim))
        return s * (self.softmax_scale * self.head_dim**0.5), s

    def _place(self, x: Tensor, table: Tensor | None, scale: Tensor | None) -> Tensor:
        """Queries or keys (B, L, H, k), turned, normalised and scaled in float32 at least, then in their dtype."""
        wide = x.to(compute_dtype(x))
        if table is not None:
            wide = rotate(wide, table)
        if self.qk_norm:
            wide = unit(wide)
        return (wide if scale is None else wide * scale).to(x.dtype)

    @torch.no_grad()
    def fold(self) -> "NormalizedAttention":
        """A copy for inference that computes the same: plain linear layers, and s² on the queries alone.

        Its cache holds keys without s, so that a cache begun by this layer is not one for the copy.
        """
        folded = _copy_folded(self)
        q_scale, k_scale = folded._scales()
        if k_scale is not None:
            folded.qk_scale, folded.q_scale = None, q_scale * k_scale
        return folded

    def extra_repr(self) -> str:
        """Size, heads, and what differs from the default."""
        text = f"{self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"
        text += "" if self.rotary else ", rotary=False"
        text += "" if self.qk_norm else ", qk_norm=False"
        return f"{text}, dropout={self.dropout}" if self.dropout else text


class NormalizedMLP(nn.Module):
    r"""nGPT's gated MLP: $y = W_o (u \circ \mathrm{silu}(\nu))$.

    $u = s_u \circ W_u x$, and $\nu = \sqrt d\, s_\nu \circ W_\nu x$.

    Rows of W_u and W_ν and columns of W_o are unit; no biases. The output is not of unit norm. s_u and s_ν multiply the
    weights, which costs d m a call instead of tokens · m; `fold()` for inference of few tokens.

    Args:
        dim: Size d of a token.
        hidden_dim: Size m of the hidden layer; by default 4 dim.
        scale_init: Where s_u and s_ν start.
        scale_scale: Where what is stored of them starts.
        reparametrize: As in `NormalizedLinear`.
        device: Of the parameters.
        dtype: As `device`.

    Attributes:
        up_proj: `NormalizedLinear` with W_u (m, d); `gate_proj` likewise with W_ν.
        down_proj: `NormalizedLinear` with W_o (d, m).
        up_scale: What is stored of s_u, (m,); `gate_scale` of s_ν.

    Shape: (*, dim) -> (*, dim).

    Raises:
        ValueError: If a size is no whole number, 1 or more, or an initial value is not positive; in `forward`, if the
            last size of the input is not dim.
    """

    @typed
    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        *,
        scale_init: float = 1.0,
        scale_scale: float = 1.0,
        reparametrize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(dim=dim)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        check_whole(hidden_dim=hidden_dim)
        check_positive(scale_init=scale_init, scale_scale=scale_scale)
        self.dim, self.hidden_dim = dim, hidden_dim
        self.scale_init, self.scale_scale = scale_init, scale_scale
        options: dict[str, Any] = {"reparametrize": reparametrize, "device": device, "dtype": dtype}
        self.up_proj = NormalizedLinear(dim, hidden_dim, bias=False, **options)
        self.gate_proj = NormalizedLinear(dim, hidden_dim, bias=False, **options)
        self.down_proj = NormalizedLinear(hidden_dim, dim, bias=False, normalize="out", **options)
        self.up_scale: nn.Parameter | None = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.gate_scale: nn.Parameter | None = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self._reset_scales()

    def reset_parameters(self) -> None:
        """Draws the matrices anew; s_u and s_ν as they start."""
        for projection in (self.up_proj, self.gate_proj, self.down_proj):
            projection.reset_parameters()
        self._reset_scales()

    def _reset_scales(self) -> None:
        _fill_(self.up_scale, self.scale_scale)
        _fill_(self.gate_scale, self.scale_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (*, dim) to (*, dim)."""
        if self.up_scale is None or self.gate_scale is None:  # folded
            u, gate = self.up_proj(x), self.gate_proj(x)
        else:
            up_scale, gate_scale = self._scales(self.up_scale, self.gate_scale)
            u, gate = self.up_proj(x, up_scale), self.gate_proj(x, gate_scale)
        y: Tensor = self.down_proj(u * F.silu(gate))
        return y

    def _scales(self, up_scale: Tensor, gate_scale: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self.scale_init / self.scale_scale
        return up_scale * ratio, gate_scale * (ratio * self.dim**0.5)

    @torch.no_grad()
    def fold(self) -> "NormalizedMLP":
        """A copy for inference that computes the same: plain linear layers, with s_u and sqrt(d) s_ν in their rows."""
        folded = _copy_folded(self)
        if self.up_scale is not None and self.gate_scale is not None:
            up_scale, gate_scale = self._scales(self.up_scale, self.gate_scale)
            folded.register_module("up_proj", self.up_proj._fold(up_scale))
            folded.register_module("gate_proj", self.gate_proj._fold(gate_scale))
            folded.up_scale = folded.gate_scale = None
        return folded

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.dim}, {self.hidden_dim}"


@register_layer(
    "ngpt_block",
    kind="mixer",
    nonlinear=True,
    card=Card(
        equation=r"h \leftarrow N(N(h) + |\alpha| \circ (N(f(h)) - N(h))), \quad f = \mathrm{Att}, \mathrm{MLP}",
        reproduced="nothing of the paper's size. Tiny Shakespeare, 1.07 million parameters, 3 seeds, each at its best "
        "rate (experiment ngpt_vs_gpt): 0.69 of the steps of a pre-norm GPT to its last loss at context 64, 0.62 at "
        "256; a GPT with normalised queries and keys 0.73 and 0.62",
        **NGPT_CARD,
    ),
)
class NormalizedBlock(nn.Module):
    r"""A block of nGPT: $h \leftarrow N(\hat h + |\alpha| \circ (N(f(h)) - \hat h))$, $\hat h = N(h)$.

    f is attention first, and then the MLP. The output is of unit norm; so may the input be, which is normalised anyway.

    Args:
        dim: Size d of a token.
        num_heads: As in `NormalizedAttention`.
        hidden_dim: As in `NormalizedMLP`.
        alpha_init: Where both α start. The paper's 0.05 suits 24 blocks and more; a few want 1 / (number of blocks).
        alpha_scale: Where what is stored of them starts; by default 1 / sqrt(dim).
        head_dim: As in `NormalizedAttention`, like all that follow.
        causal: As there.
        rotary: As there.
        rope_theta: As there.
        qk_norm: As there.
        qk_scale_init: As there.
        qk_scale_scale: As there.
        softmax_scale: As there.
        dropout: As there.
        reparametrize: As in `NormalizedLinear`.
        device: Of the parameters.
        dtype: As `device`.

    Attributes:
        attn: `NormalizedAttention`.
        mlp: `NormalizedMLP`.
        attn_alpha: What is stored of attention's α, (d,); `mlp_alpha` of the MLP's.

    Shape: (batch, length, dim) -> (batch, length, dim). Under autocast the output keeps the dtype of the input, as a
    residual stream should.

    Raises:
        ValueError: As `NormalizedAttention` and `NormalizedMLP`, or if an initial value of α is not positive.
    """

    @typed
    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        hidden_dim: int | None = None,
        alpha_init: float = 0.05,
        alpha_scale: float | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        rotary: bool = True,
        rope_theta: float = 10000.0,
        qk_norm: bool = True,
        qk_scale_init: float = 1.0,
        qk_scale_scale: float | None = None,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        reparametrize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = {"reparametrize": reparametrize, "device": device, "dtype": dtype}
        self.attn = NormalizedAttention(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            causal=causal,
            rotary=rotary,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            qk_scale_init=qk_scale_init,
            qk_scale_scale=qk_scale_scale,
            softmax_scale=softmax_scale,
            dropout=dropout,
            **options,
        )
        self.mlp = NormalizedMLP(dim, hidden_dim, **options)
        self.dim, self.alpha_init, self.alpha_scale = dim, alpha_init, _or(alpha_scale, dim**-0.5)
        check_positive(alpha_init=alpha_init, alpha_scale=self.alpha_scale)
        self.attn_alpha = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.mlp_alpha = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self._reset_alpha()

    def reset_parameters(self) -> None:
        """Draws attention and MLP anew; α as it starts."""
        self.attn.reset_parameters()
        self.mlp.reset_parameters()
        self._reset_alpha()

    def _reset_alpha(self) -> None:
        _fill_(self.attn_alpha, self.alpha_scale)
        _fill_(self.mlp_alpha, self.alpha_scale)

    def forward(
        self,
        h: Tensor,
        *,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Maps (batch, length, dim) to the same; masks, positions and cache as in `NormalizedAttention`."""
        check_tokens(h, self.dim, self.attn_alpha)
        branch = self.attn(h, attn_mask=attn_mask, position_ids=position_ids, cache=cache)
        h = normalized_residual(h, branch, self._used(self.attn_alpha))
        return normalized_residual(h, self.mlp(h), self._used(self.mlp_alpha))

    def _used(self, alpha: Tensor) -> Tensor:
        return (alpha * (self.alpha_init / self.alpha_scale)).abs()

    def fold(self) -> "NormalizedBlock":
        """A copy for inference that computes the same, of a folded attention and MLP."""
        return _copy_folded(self)

    def extra_repr(self) -> str:
        """Size and where α starts; the rest is in its layers."""
        return f"{self.dim}, alpha_init={self.alpha_init:g}"


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _fill_(parameter: nn.Parameter | None, value: float) -> None:
    if parameter is not None:
        nn.init.constant_(parameter, value)


def _copy_folded(module: Module) -> Module:
    """A copy, frozen and without dropout, in which all that can be folded is; shares no memory."""
    memo: dict[int, Any] = {}
    for child in module.children():
        fold = getattr(child, "fold", None)
        memo[id(child)] = fold() if callable(fold) else copy.deepcopy(child)
    return copy.deepcopy(module, memo).eval().requires_grad_(False)
