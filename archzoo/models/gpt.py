"""A plain pre-norm GPT, and one with normalised queries and keys: what nGPT is compared with, of the same parts."""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import compute_dtype
from archzoo.layers._attention import attend, head_sizes, positions_of
from archzoo.layers._cache import KeyValueCache, one_each
from archzoo.layers._check import check_dropout, check_positive, check_tokens, check_whole
from archzoo.layers._rotary import rotary_table, rotate
from archzoo.layers.normalized_linear import check_ids
from archzoo.models.generation import stream

NORM_EPS = 1e-6


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


class GPTBlock(nn.Module):
    r"""$u = x + \mathrm{Att}(N_1(x))$, $y = u + \mathrm{MLP}(N_2(u))$, N being RMSNorms.

    Args:
        dim: Size of a token.
        hidden_dim: As in `GatedMLP`.
        dropout: Probability that a weight of attention, or a value behind attention or MLP, is dropped in training.
        device: Of the parameters.
        dtype: As `device`.
        attention_arguments: Further options of `RotaryAttention`.

    Shape: (batch, length, dim) -> (batch, length, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention_arguments: Any,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn = RotaryAttention(dim, dropout=dropout, **attention_arguments, **factory)
        self.mlp = GatedMLP(dim, hidden_dim, **factory)
        self.norm1 = nn.RMSNorm(dim, eps=NORM_EPS, **factory)
        self.norm2 = nn.RMSNorm(dim, eps=NORM_EPS, **factory)
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Maps (batch, length, dim) to the same; masks, positions and cache as in `NormalizedAttention`."""
        branch = self.attn(self.norm1(x), attn_mask=attn_mask, position_ids=position_ids, cache=cache)
        x = x + F.dropout(branch, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer: RMSNorm before each sub-block, rotary positions, SwiGLU, no biases.

    Matrices start as N(0, 0.02²), those that write to the residual stream divided by sqrt(2 depth), as in GPT-2.

    Args:
        vocab_size: Number V of tokens.
        dim: Size d of a token's vector.
        depth: Number of blocks.
        num_heads: As in `RotaryAttention`.
        hidden_dim: As in `GatedMLP`.
        qk_norm: As in `RotaryAttention`: the second baseline.
        dropout: As in `GPTBlock`.
        tie_embeddings: Whether the head's weight is the embedding.
        device: Of the parameters.
        dtype: As `device`.
        attention_arguments: Further options of `RotaryAttention`.

    Attributes:
        embed: Embedding (V, d).
        blocks: `nn.ModuleList` of `GPTBlock`s.
        norm: The last RMSNorm.
        head: Linear layer with a weight (V, d).

    Shape: ids (batch, length) -> logits (batch, length, vocab_size).

    Raises:
        ValueError: If a size is no whole number, 1 or more, or as `RotaryAttention`; in `forward`, if the input is not
            (batch, length) of whole numbers.
        TypeError: If `RotaryAttention` has no such option.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_heads: int | None = None,
        hidden_dim: int | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention_arguments: Any,
    ):
        super().__init__()
        check_whole(vocab_size=vocab_size, dim=dim, depth=depth)
        self.vocab_size, self.dim = vocab_size, dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        block: dict[str, Any] = {"num_heads": num_heads, "hidden_dim": hidden_dim, "qk_norm": qk_norm}
        self.embed = nn.Embedding(vocab_size, dim, **factory)
        self.blocks = nn.ModuleList(
            GPTBlock(dim, dropout=dropout, **block, **attention_arguments, **factory) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS, **factory)
        self.head = nn.Linear(dim, vocab_size, bias=False, **factory)
        if tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all matrices anew; norms start as 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("out_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if writes else 0.02)

    def forward(
        self,
        ids: Tensor,
        *,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits (batch, length, vocab_size) of ids (batch, length); the rest as in `NGPT`."""
        logits: Tensor = self.head(self._states(ids, attn_mask, position_ids, cache))
        return logits

    def _states(
        self,
        ids: Tensor,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        check_ids(ids, 2)
        x: Tensor = self.embed(ids)
        for block, own in zip(self.blocks, one_each(cache, len(self.blocks)), strict=True):
            x = block(x, attn_mask=attn_mask, position_ids=position_ids, cache=own)
        return self.norm(x)

    def new_cache(self) -> list[KeyValueCache]:
        """An empty cache for each block, to be given to `forward` with every piece of a sequence."""
        return [KeyValueCache() for _ in self.blocks]

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Yields the tokens (B,) that follow a prompt (B, L), as they are drawn: by a copy, without dropout.

        `torch.stack(list(model.generate(ids, 10)), 1)` are the next 10. Arguments as in `archzoo.models.generation`.
        """
        model, cache = copy.deepcopy(self).eval(), self.new_cache()
        return stream(
            lambda new: model.head(model._states(new, cache=cache)[:, -1]),
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone, for timm's `create_optimizer_v2`: those of norms."""
        return {name for name, parameter in self.named_parameters() if parameter.dim() == 1}

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.vocab_size}, {self.dim}, depth={len(self.blocks)}"
