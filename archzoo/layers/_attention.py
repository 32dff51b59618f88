"""What attention layers with rotary positions share: sizes, checks, masks and the cache."""

import math

import torch
from torch import Tensor

from archzoo.kernels._op import autocast_dtype
from archzoo.kernels.attention import attention, check_mask
from archzoo.layers._check import check_whole


def head_sizes(dim: int, num_heads: int | None, head_dim: int | None, rotary: bool) -> tuple[int, int]:
    """Number and size of the heads: by default max(1, dim // 64), and what makes them dim together.

    Raises:
        ValueError: If a size is no whole number, 1 or more; if dim is no multiple of the heads and no size of a head is
            given; if that is odd, and positions are to be rotary.
    """
    check_whole(dim=dim)
    heads = max(1, dim // 64) if num_heads is None else num_heads
    check_whole(num_heads=heads)
    if head_dim is None:
        if dim % heads:
            default = ", the default," if num_heads is None else ""
            raise ValueError(f"num_heads={heads}{default} does not divide dim={dim}: choose one that does, or head_dim")
        head_dim = dim // heads
    check_whole(head_dim=head_dim)
    if rotary and head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: must be even, for rotary=True turns pairs of features")
    return heads, head_dim


def positions_of(x: Tensor, position_ids: Tensor | None, past: int) -> Tensor:
    """Positions of the tokens of x (B, L, dim), (L,) or (B, L): those given, or the next ones behind `past` tokens."""
    batch, length, _ = x.shape
    if position_ids is None:
        return torch.arange(past, past + length, device=x.device)
    if position_ids.shape not in ((length,), (batch, length), (1, length)) or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} and {position_ids.dtype}: must be whole numbers, "
            f"({length},) or ({batch}, {length})"
        )
    return position_ids


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, attn_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of every head, heads side by side.

    Args:
        q: (B, L, heads, head_dim).
        k: (B, M, heads, head_dim). Where M > L, the queries are the last L of M tokens.
        v: As k.
        causal: Whether a token sees itself and those before it only.
        attn_mask: Broadcasts to (B, heads, L, M): of bool, True where a token may look; or of numbers that are added to
            the scores. A token that may look nowhere gets zeros, and gives no gradient.
        dropout: Probability that a weight is dropped.

    Returns:
        (B, L, heads · head_dim), in the dtype of q; under autocast in autocast's.

    Raises:
        ValueError: If the mask is of another dtype, or does not broadcast.
    """
    q, k, v = (t.to(autocast_dtype(t)).transpose(1, 2) for t in (q, k, v))
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    if attn_mask is None and (not causal or past == 0 or length == 1):
        y = attention(q, k, v, causal=causal and past == 0, dropout=dropout)
    else:
        mask, blind = _combine(q, k, causal, attn_mask)
        y = attention(q, k, v, attn_mask=mask, dropout=dropout).masked_fill(blind, 0.0)
    return y.transpose(1, 2).flatten(-2)


def _combine(q: Tensor, k: Tensor, causal: bool, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """One mask of both, in which every token may look somewhere, and which tokens had nowhere to look."""
    length, total = q.shape[2], k.shape[2]
    seen = torch.ones(length, total, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(total - length)
    if attn_mask is not None:
        check_mask(attn_mask, q, k)
        if attn_mask.is_floating_point():
            scores = attn_mask.to(q.dtype).masked_fill(~seen, -math.inf)
            blind = (scores == -math.inf).all(-1, keepdim=True)
            return scores.masked_fill(blind, 0.0), blind
        seen = seen & attn_mask
    blind = ~seen.any(-1, keepdim=True)
    return seen | blind, blind
