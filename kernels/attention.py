r"""Softmax attention, $y = \mathrm{softmax}(q k^T / \sqrt D)\, v$, from q, k, v (B, H, L, D).

It is torch's `scaled_dot_product_attention`. On a CPU torch's fused kernel cannot be differentiated twice, nobody
counts its FLOPs, and it hides NaN: where all scores of a position are NaN or -inf, it gives 0. The op here runs that
same kernel, and mends all three; such a position gets NaN, in its gradients too. It keeps q, k, v, y and one number a
row: memory is linear in L, where softmax written out keeps L^2 weights a head. A GPU, dropout or a mask that is learned
takes torch's function as it is. There is no Triton kernel: on a GPU torch runs FlashAttention or cuDNN's, which are the
peers that one would be held to, and `use_backend` changes nothing.

In multiply-adds, with B, H and L^2 D left out: forward 2, backward 5, for the weights are computed again. A causal mask
saves half of them, which is not counted.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._op import (
    autocast_dtype,
    compute_dtype,
    differentiable_gradients,
    flop_formula,
    plain_eager,
    under_transform,
    without_autocast,
)

aten = torch.ops.aten


def attention_reference(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """The definition. q (B, H, L, D), k and v (B, H, M, D), mask like (B, H, L, M) of numbers -> (B, H, L, D)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    if causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~past, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def _features_last(*tensors: Tensor) -> list[Tensor]:
    """With the features of a position side by side: the kernel lays y out as q, but writes it as if they were.

    That of torch 2.11 reads all others as if they were, too.
    """
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


@without_autocast
def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (B, H, L, D) and the logarithms of the sums of exponentials (B, H, L), laid out as the kernel leaves them."""
    if q.numel() == 0 or k.numel() == 0:  # which the kernel does not take; a sum over no keys is 0
        B, H, L, _ = q.shape
        return torch.zeros_like(q), q.new_zeros(B, L, H, dtype=compute_dtype(q)).transpose(1, 2)
    q, k, v = _features_last(q, k, v)
    y, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    if math.isnan(sums.div(sums).sum()):  # one of them is 0, infinite or NaN
        # By 0 the kernel marks rows whose weights it left at 0, and by infinity, in half precision, those with an
        # infinite score; but a sum of 1 has the logarithm 0 too.
        ones = torch.ones_like(v)
        weights, _ = aten._scaled_dot_product_flash_attention_for_cpu(q, k, ones, 0.0, causal, attn_mask=mask)
        hidden = (weights[..., 0] == 0) | sums.isinf()
        y.masked_fill_(hidden.unsqueeze(-1), math.nan)
        sums.masked_fill_(hidden, math.nan)
    return y, sums


@without_autocast
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, laid out as the kernel leaves them."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dy, q, k, v = _features_last(dy, q, k, v)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy, q, k, v, y, sums, 0.0, causal, attn_mask=mask
    )
    return dq, dk, dv


attention_op = torch.library.custom_op("archzoo::attention", _forward, mutates_args=())
attention_backward_op = torch.library.custom_op("archzoo::attention_backward", _backward, mutates_args=())


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, k, v = _features_last(q, k, v)
    y, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    return y, sums


@attention_backward_op.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dy, q, k, v = _features_last(dy, q, k, v)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy, q, k, v, y, sums, 0.0, causal, attn_mask=mask
    )
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, ctx.causal, mask = inputs
    ctx.save_for_backward(*qkv, *output, mask)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, dsums: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, y, sums, mask = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # create_graph=True

        def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_reference(q, k, v, ctx.causal, mask)

        return *differentiable_gradients(definition, dy, (q, k, v), needed), None, None
    backward = _backward if plain_eager(dy) else attention_backward_op
    gradients = backward(dy, q, k, v, y, sums, ctx.causal, mask)
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None


attention_op.register_autograd(_gradients, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *dys)


@flop_formula(torch.ops.archzoo.attention)
def _flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    B, H, L, D = q
    return int(4 * B * H * L * k[2] * D)


@flop_formula(torch.ops.archzoo.attention_backward)
def _backward_flops(dy: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(q, k) // 2 * 5


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of every head, differentiable.

    Args:
        q: (B, H, L, D), real floating point.
        k: (B, H, M, D).
        v: As k.
        causal: Whether a position sees itself and those before it only; then M = L.
        attn_mask: Broadcasts to (B, H, L, M): of bool, True where a position may look; or of numbers that are added to
            the scores. Not beside causal=True. Every position must be let look somewhere.
        dropout: Probability that a weight is dropped; what remains is scaled up.

    Returns:
        y (B, H, L, D) in the dtype of q; under autocast in autocast's.

    Raises:
        ValueError: If the shapes do not fit, or the mask is of another dtype.
    """
    (*rows, L, D), M = q.shape, k.shape[-2]
    if q.dim() != 4 or k.shape != (*rows, M, D) or v.shape != k.shape or (causal and M != L):
        raise ValueError(
            f"q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: must be (B, H, L, D), "
            "(B, H, M, D) twice, and M = L if causal=True"
        )
    if not q.dtype == k.dtype == v.dtype == autocast_dtype(q):
        q, k, v = (t.to(autocast_dtype(t)) for t in (q, k, v))
    mask = None if attn_mask is None else _scores_of(attn_mask, q, k, causal)
    if q.is_cuda or dropout or (mask is not None and mask.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    if under_transform():
        return attention_reference(q, k, v, causal, mask)
    op: Any = attention_op
    if plain_eager(q):
        op = _Eager.apply if torch.is_grad_enabled() else _forward
    y: Tensor = op(q, k, v, causal, mask)[0]
    return y


def check_mask(mask: Tensor, q: Tensor, k: Tensor) -> None:
    """A ValueError unless a mask is of bool or floats, and broadcasts to the scores of q and k."""
    full = (*q.shape[:3], k.shape[2])
    fits = mask.dim() <= 4 and all(m in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False))
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attn_mask of shape {tuple(mask.shape)} and {mask.dtype}: must be of bool or floats, and broadcast to "
            f"(batch, heads, length, tokens) = {full}"
        )


def _scores_of(mask: Tensor, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """The numbers that a mask adds, with the axes and the dtype that the kernel wants."""
    check_mask(mask, q, k)
    if causal:
        raise ValueError("causal=True: must be False beside attn_mask; let the mask say who sees whom")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    return mask.to(q.dtype)[(None,) * (4 - mask.dim())]


def self_attention(qkv: Tensor, heads: int, *, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """Attention of a sequence on itself, its heads side by side.

    Args:
        qkv: (B, L, 3 E): the queries of all heads, then the keys, then the values. `heads` divides E.
        heads: Number H of heads.
        causal: As in `attention`.
        dropout: As in `attention`.

    Returns:
        y (B, L, E).
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention(q, k, v, causal=causal, dropout=dropout).transpose(1, 2).flatten(-2)
