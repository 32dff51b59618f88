r"""Routing by agreement between capsules (arXiv 1710.09829), without ever holding the votes.

Lower capsule i votes for the vector of upper capsule j by u^_ij = W_ij u_i. Over T rounds, from b_ij = 0 on,

    c_ij = softmax_j(b_ij),  s_j = sum_i c_ij u^_ij + bias_j,  v_j = squash(s_j),  b_ij += <u^_ij, v_j>.

As b only grows, before a round it is <u^_ij, V_j> with V the sum of all v so far, N J D numbers instead of N I J D
votes and N I J logits. So a round is one stateless pass over chunks of lower capsules:

    p_ij = W_ij^T V_j,  b_ij = <u_i, p_ij>,  c = softmax(b),  s_j += sum_i W_ij (c_ij u_i),

two batched GEMMs of rows N and inner size D or K, and element-wise work on (J, N, K) a lower capsule: of a vote's K
numbers before the map, not its D after it. In the first round c = 1/J, and s is one GEMM. (Of a few samples, votes
are no more than weights, and are held while the op runs.) Backward goes through the rounds from the last to the first;
with ds the gradient of s_j in that round, and q_ij = W_ij^T ds_j,

    dc_ij = <u_i, q_ij>,  db_ij = c_ij (dc_ij - sum_k c_ik dc_ik),  dV_j = sum_i W_ij (db_ij u_i),
    dW_ij += ds_j (c_ij u_i)^T + V_j (db_ij u_i)^T,  du_i += sum_j c_ij q_ij + db_ij p_ij.

Every earlier v is a summand of V, so that its gradient is the sum of all dV so far. "Detached" differentiates the last
round's sum alone, with its couplings held constant: one pass, and no db.

Kept for backward: u, W, and the s of every round, T N J D numbers (60 KiB at batch 32 of the paper's network, where
the textbook form keeps 200 MB). Arithmetic is in float32 at least. FLOP formulas count the definition's work, votes
made once; made again they are 2 (T - 1) GEMMs more.

Under `torch.func` transforms, and for gradients of gradients, plain differentiable torch takes the op's place, and
holds the votes; inside `use_backend("triton")` they raise. Measured beside the textbook form: `python -m benchmarks
capsule_speed`.

Triton: votes are made in registers, again in every round, and a round is two kernels. Floor 0.014 ms at 256 samples of
the paper's network, H200, three rounds; with votes kept in bfloat16 it would be 0.133. Of more than 256 votes a lower
capsule they are made in tiles, twice a round: first for the softmax, of which N I numbers are held, then for the sums.
"""

from typing import Any

import torch
from torch import Tensor

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._capsule_passes import couple, passes
from archzoo.kernels._op import (
    DifferentiableOp,
    check_floating,
    compute_dtype,
    empty_if,
    flop_formula,
    running_sum,
    under_transform,
    without_autocast,
)

_COUPLED = 128  # lower capsules whose couplings are computed at once


def squash(s: Tensor, dim: int = -1) -> Tensor:
    """Shortens vectors to a length below 1 and keeps their direction: v = s n / (1 + n^2), n = |s|.

    The length becomes n^2 / (1 + n^2). In float32 at least: n^2 overflows float16. Value and gradient at 0 are 0,
    where the textbook form n^2 / (1 + n^2) s / n divides by 0.

    Args:
        s: Any shape, real floating point.
        dim: The axis along which vectors lie.

    Returns:
        The shortened vectors, in the dtype of s.
    """
    wide = s.to(compute_dtype(s))
    square = wide.square().sum(dim, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    return (wide * (square.sqrt() / (1 + square))).to(s.dtype)


def _squash_backward(dv: Tensor, s: Tensor) -> Tensor:
    """The gradient of s by that of v = squash(s)."""
    square = s.square().sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    n, below = square.sqrt(), 1 + square
    along = (s * dv).sum(-1, keepdim=True)
    return dv * (n / below) + s * (along / n * ((1 - square) / below.square()))


def capsule_routing_reference(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition. u (*, I, K), weight (I, J, D, K), bias (J, D) -> v (*, J, D), last couplings (*, I, J)."""
    votes = torch.einsum("ijdk,...ik->...ijd", weight, u)
    offset = votes.new_zeros(()) if bias is None else bias
    early = (votes.detach(), offset.detach()) if detach else (votes, offset)
    logits = torch.zeros_like(votes[..., 0])
    for _ in range(iterations - 1):
        s = (couple(logits, leaky, -1).unsqueeze(-1) * early[0]).sum(-3) + early[1]
        logits = logits + (early[0] * squash(s).unsqueeze(-3)).sum(-1)
    coupling = couple(logits, leaky, -1)
    return squash((coupling.unsqueeze(-1) * votes).sum(-3) + offset), coupling.detach()


def _definition(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool, detach: bool
) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(u, weight, bias)
    offset = None if bias is None else bias.to(wide)
    v, coupling = capsule_routing_reference(u.to(wide), weight.to(wide), offset, iterations, leaky, detach)
    return v.to(torch.promote_types(u.dtype, weight.dtype)), coupling


# --- The op -----------------------------------------------------------------------------------------------------------


@without_autocast
@torch.no_grad()
def _forward(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """v (N, J, D), and the s of every round (T, N, J, D) in the dtype of the arithmetic."""
    wide, dtype = compute_dtype(u, weight, bias), torch.promote_types(u.dtype, weight.dtype)
    if triton:
        from archzoo.kernels import _capsule_routing_triton

        return _capsule_routing_triton.forward(u, weight, bias, iterations, leaky, dtype, wide)
    work = passes(u, weight, wide)
    sums = torch.empty(iterations, u.shape[0], *weight.shape[1:3], dtype=wide, device=u.device)
    offset = 0.0 if bias is None else bias.to(wide)
    total = torch.zeros_like(sums[0])
    for t in range(iterations):
        torch.add(work.round(total, leaky) if t else work.first(leaky), offset, out=sums[t])
        total += squash(sums[t])
    return squash(sums[-1]).to(dtype), sums


@without_autocast
@torch.no_grad()
def _backward(
    dv: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sums: Tensor,
    iterations: int,
    leaky: bool,
    detach: bool,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of u, weight and bias. What is not needed is not computed, and comes back with no elements."""
    totals = running_sum(squash(sums[:-1]), 0)
    if triton:
        from archzoo.kernels import _capsule_routing_backward_triton

        found = _capsule_routing_backward_triton.backward(dv, u, weight, sums, totals, leaky, detach, *needed)
    else:
        found = _plain_backward(dv, u, weight, sums, totals, leaky, detach, *needed)
    return [
        empty_if(False, t, dv) if t is None or g is None else g.to(t.dtype).contiguous()
        for g, t in zip(found, (u, weight, bias), strict=True)
    ]


def _plain_backward(
    dv: Tensor,
    u: Tensor,
    weight: Tensor,
    sums: Tensor,
    totals: Tensor,
    leaky: bool,
    detach: bool,
    need_u: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    work = passes(u, weight, sums.dtype, need_u, need_weight)
    dbias = sums.new_zeros(weight.shape[1:3])
    gradient = dv.to(sums.dtype)
    for t in range(len(sums) - 1, -1, -1):
        ds = _squash_backward(gradient, sums[t])
        dbias += ds.sum(0)
        if t == 0:
            work.first_backward(ds, leaky)
            break
        dtotal = work.round_backward(ds, totals[t - 1], leaky, not detach)
        if dtotal is None:
            break
        gradient = dtotal if t == len(sums) - 1 else gradient + dtotal
    return *work.gradients(), dbias if need_bias else None


def _fake(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    shape = (u.shape[0], *weight.shape[1:3])
    dtype = torch.promote_types(u.dtype, weight.dtype)
    wide = compute_dtype(u, weight, bias)
    return u.new_empty(shape, dtype=dtype), u.new_empty((iterations, *shape), dtype=wide)


def _vectors(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool, detach: bool) -> Tensor:
    return _definition(u, weight, bias, iterations, leaky, detach)[0]


capsule_routing_op = DifferentiableOp(
    "capsule_routing", _forward, _backward, fake=_fake, definition=_vectors, tensors=3, kept=1
)


def _round_flops(lower: int, upper: int, d: int, iterations: int) -> int:
    return 2 * lower * upper * d * (2 * iterations - 1) + 4 * lower * upper * (iterations - 1)


@flop_formula(torch.ops.archzoo.capsule_routing)
def _flops(u: Any, weight: Any, bias: Any, iterations: int, *args: Any, **kwargs: Any) -> int:
    lower, upper, d, k = weight
    return int(u[0] * (2 * lower * upper * d * k + _round_flops(lower, upper, d, iterations)))


@flop_formula(torch.ops.archzoo.capsule_routing_backward)
def _backward_flops(
    dv: Any,
    u: Any,
    weight: Any,
    bias: Any,
    sums: Any,
    iterations: int,
    leaky: bool,
    detach: bool,
    needed: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    need_u, need_weight, _ = needed
    lower, upper, d, k = weight
    rounds = _round_flops(lower, upper, d, 1 if detach else iterations)
    return int(u[0] * (2 * (need_u + need_weight) * lower * upper * d * k + 2 * rounds))


# --- Public -----------------------------------------------------------------------------------------------------------


def _check(u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int) -> None:
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}: must be (in_capsules, out_capsules, out_dim, in_dim), none 0"
        )
    lower, upper, d, k = weight.shape
    if u.dim() < 2 or u.shape[-2:] != (lower, k):
        raise ValueError(
            f"u of shape {tuple(u.shape)}: must be (*, in_capsules, in_dim) = (*, {lower}, {k}), "
            f"for weight of shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (upper, d):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: must be (out_capsules, out_dim) = ({upper}, {d})")
    check_floating(u=u, weight=weight, bias=bias)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r}: must be a whole number, 1 or more")


@torch.no_grad()
def _couplings(u: Tensor, weight: Tensor, total: Tensor, leaky: bool) -> Tensor:
    """The couplings (N, I, J) that belong to V (N, J, D), chunk by chunk of the lower capsules."""
    u, weight = u.to(total.dtype), weight.to(total.dtype)
    parts = [
        (torch.einsum("njd,ijdk->nijk", total, some_weight) * some_u.unsqueeze(2)).sum(-1)
        for some_u, some_weight in zip(u.split(_COUPLED, 1), weight.split(_COUPLED), strict=True)
    ]
    return couple(torch.cat(parts, 1), leaky, -1)


def capsule_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The vectors of upper capsules, by routing the votes of lower ones.

    Args:
        u: Lower capsules (*, I, K), real floating point.
        weight: (I, J, D, K); the vote of i for j is weight[i, j] u_i.
        bias: (J, D), added to s in every round.
        iterations: Rounds T.
        leaky: Whether the softmax has one logit of 0 more, whose share goes nowhere.
        detach: Whether the gradient runs through the last round's sum only, and its couplings are constants.
        return_coupling: Whether to return the couplings of the last round too.

    Returns:
        v (*, J, D) in the wider dtype of u and weight, under autocast too; if asked for, also c (*, I, J), which has no
        gradient and is float32 at least.

    Raises:
        ValueError: If a shape or dtype does not fit, or there are no rounds; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    _check(u, weight, bias, iterations)
    if under_transform():
        refuse_triton("capsule_routing", "a torch.func transform")
        v, coupling = _definition(u, weight, bias, iterations, leaky, detach)
        return (v, coupling) if return_coupling else v
    leading = u.shape[:-2]
    flat = u.reshape(-1, *u.shape[-2:])
    triton = takes_triton("capsule_routing", flat.shape[0] * weight.numel(), u=u, weight=weight, bias=bias)
    inputs = flat, weight, bias, iterations, leaky, detach, triton
    if not return_coupling:
        only: Tensor = capsule_routing_op(*inputs)
        return only.view(*leading, *only.shape[1:])
    v, sums = capsule_routing_op.op(*inputs)
    v = v.view(*leading, *v.shape[1:])
    coupling = _couplings(flat, weight, squash(sums[:-1]).sum(0), leaky)
    return v, coupling.view(*leading, *coupling.shape[1:])
