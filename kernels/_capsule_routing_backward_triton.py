# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the backward pass of `capsule_routing`; names and tiles as in `_capsule_routing_triton.py`.

For each round but the first, from the last on, there are two kernels, as forward. Then one, whose programs have a lower
capsule, all samples and all rounds, so that gradients of u and W are whole there. Of several tiles, votes are made
twice: by programs that have a tile and go over all samples, for dW, and by such that have a block of samples and go
over all tiles, for du.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import BlockSizes
from archzoo.kernels._capsule_routing_triton import (
    SIZES,
    Routing,
    Softmax,
    agreements,
    candidates_of,
    couple,
    gather,
    inputs_of,
    lower,
    read,
    rule_of,
    slope,
    square_of,
    votes_of,
    weight_tile,
)
from archzoo.kernels._triton import dot, helper, launch, span


@triton.jit
def _squash_backward_kernel(
    partial_ptr, later_ptr, s_ptr, g_ptr, ds_ptr, R, D, chunks, step,
    TINY: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = span(tl.program_id(0), ROWS)
    d = tl.arange(0, DP)[None, :]
    inside = (rows < R)[:, None] & (d < D)
    at = rows[:, None] * D + d
    g = tl.full((ROWS, DP), 0.0, ACC)
    if later_ptr is not None:
        g += tl.load(later_ptr + at, mask=inside, other=0.0).to(ACC)
    if partial_ptr is not None:
        g = gather(partial_ptr, at, inside, chunks, step, g)
        tl.store(g_ptr + at, g, mask=inside)
    s = tl.load(s_ptr + at, mask=inside, other=0.0)
    square = square_of(s, TINY)
    n = tl.sqrt(square)
    below = 1.0 + square
    along = tl.sum(s * g, 1)[:, None] / n
    tl.store(ds_ptr + at, g * (n / below) + s * (along * ((1.0 - square) / (below * below))), mask=inside)


@triton.jit
def _gradients_kernel(
    u_ptr, w_ptr, totals_ptr, ds_ptr, norm_ptr, mean_ptr, du_ptr, dw_ptr, N, L, J, D, K, T, first, size, parts, steps,
    LEAKY: tl.constexpr, DETACH: tl.constexpr, BY_SAMPLE: tl.constexpr,
    BJ: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # A program has BK of a lower capsule's numbers, and a block of samples, or else a tile; it goes over the other.
    program = tl.program_id(0)
    k0 = program % KT * BK
    part = program // KT % parts
    i = tl.cast(program // KT // parts, tl.int64)
    k = tl.arange(0, BK)
    dw = tl.full((BK, BJ * BD), 0.0, ACC)
    du = tl.full((BN, BK), 0.0, ACC)
    if KT == 1 and not BY_SAMPLE:
        w = weight_tile(w_ptr, i, 0, part // DT * BJ, part % DT * BD, J, D, K, BJ, BD, BK, ACC)
    for step in range(steps):
        rows = span(part if BY_SAMPLE else step, BN)
        tile = step if BY_SAMPLE else part
        j0, d0 = tile // DT * BJ, tile % DT * BD
        u = lower(u_ptr, rows, i, k0, N, L, K, BK, ACC)
        if KT == 1 and not BY_SAMPLE:
            votes = tl.reshape(dot(u, w, tl.full((BN, BJ * BD), 0.0, ACC), PRECISION), (BN, BJ, BD))
        else:
            votes = votes_of(u_ptr, w_ptr, rows, i, j0, d0, N, L, J, D, K, BJ, BD, BK, KT, PRECISION, ACC)
        dvotes = tl.full((BN, BJ, BD), 0.0, ACC)
        if not DETACH:  # the first round, in which all couplings are alike
            dvotes += read(ds_ptr, rows, j0, d0, N, J, D, BJ, BD, ACC) / (tl.full((1, 1, 1), 0.0, ACC) + (J + LEAKY))
        for t in range(first, T):
            V_ptr, of_s = totals_ptr + (t - 1) * size, ds_ptr + t * size
            V = read(V_ptr, rows, j0, d0, N, J, D, BJ, BD, ACC)
            ds = read(of_s, rows, j0, d0, N, J, D, BJ, BD, ACC)
            at = ((t - first) * L + i) * N + rows
            logits, dshares = agreements(
                votes, V, ds, V_ptr, of_s, u_ptr, w_ptr, rows, i, j0, N, L, J, D, K, BK, KT, DT, PRECISION
            )
            shares = couple(logits, norm_ptr, at, rows < N, j0, J, LEAKY, BJ)
            dvotes += shares[:, :, None] * ds
            if not DETACH:
                dvotes += slope(shares, dshares, mean_ptr, at, rows < N)[:, :, None] * V
        if du_ptr is not None:  # K sums over J D numbers: as a product, it would need too many registers
            if not BY_SAMPLE:
                du = tl.full((BN, BK), 0.0, ACC)
            for a in range(tl.minimum(BK, K - k0)):
                of_k = w_ptr + (i * K + k0 + a) * J * D
                column = tl.sum(tl.sum(dvotes * read(of_k, tl.arange(0, 1), j0, d0, 1, J, D, BJ, BD, ACC), 2), 1)
                du += tl.where((k == a)[None, :], column[:, None], 0.0)
            if not BY_SAMPLE:
                _store_lower(du_ptr, du, rows, i, k0 + k, N, L, K)
        if dw_ptr is not None:
            dw = dot(tl.trans(u), tl.reshape(dvotes, (BN, BJ * BD)), dw, PRECISION)
    if BY_SAMPLE:
        _store_lower(du_ptr, du, span(part, BN), i, k0 + k, N, L, K)
    if dw_ptr is not None:
        jd = tl.arange(0, BJ * BD)[None, :]
        j, d = part // DT * BJ + jd // BD, part % DT * BD + jd % BD
        at = ((i * J + j) * D + d) * K + (k0 + k)[:, None]
        tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), mask=(k0 + k < K)[:, None] & (j < J) & (d < D))


@helper
def _store_lower(ptr, value, rows, i, k, N, L, K):
    at = (rows[:, None] * L + i) * K + k[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=(rows < N)[:, None] & (k < K)[None, :])


def backward(
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
    """Gradients of u and the weight, in their dtypes, and of the bias (J, D), in that of `sums`; or None.

    Args:
        dv: Gradient of v (N, J, D).
        u: (N, L, K).
        weight: (L, J, D, K).
        sums: Of every round, (T, N, J, D).
        totals: V before every round but the first, (T - 1, N, J, D).
        leaky: As in the forward pass.
        detach: Likewise.
        need_u: Whether u wants a gradient.
        need_weight: Whether the weight does.
        need_bias: Whether the bias does.
    """
    routing = Routing(u, weight, sums.dtype, leaky)
    N, L, J, D, _ = routing.sizes
    size, T = N * J * D, len(sums)
    detach = detach and T > 1
    # Through each round's s, from the last to the first; through V that reaches all v before it.
    ds, later, partial = routing.empty(T), dv.contiguous(), None
    softmaxes: list[Softmax] = []
    for t in range(T - 1, -1, -1):
        g = None if partial is None else routing.empty()
        chunks = 0 if partial is None else len(partial)
        of_v = later if partial is None or t < T - 2 else None
        routing.by_vector(_squash_backward_kernel, partial, of_v, sums[t], g, ds[t], N * J, D, chunks, size)
        if t:
            softmaxes.insert(0, routing.softmax(totals[t - 1], None if detach else ds[t]))
        if detach:
            break
        if t:
            later = later if g is None else g
            partial = routing.pass_over(totals[t - 1], ds[t], softmaxes[0])
    du = torch.empty_like(routing.u) if need_u else None
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    first = T - 1 if detach else 1
    softmax = Softmax(*(_stacked(some) for some in zip(*softmaxes, strict=True)))
    blocks, of_samples, tiles = routing.blocks(BACKWARD)
    tiles *= blocks["DT"]
    for of_u, of_w, by_sample in [(du, dw, False)] if tiles == 1 else [(du, None, True), (None, dw, False)]:
        if of_u is not None or of_w is not None:
            parts, steps = (of_samples, tiles) if by_sample else (tiles, of_samples)
            launch(
                _gradients_kernel, (L * parts * blocks["KT"],), routing.u, routing.weight, totals, ds, *softmax,
                of_u, of_w, *routing.sizes, T, first, size, parts, steps,
                LEAKY=int(leaky), DETACH=detach, BY_SAMPLE=by_sample, **blocks,
            )  # fmt: skip
    return du, dw, (ds[-1:] if detach else ds).sum((0, 1)) if need_bias else None


def _stacked(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    there = [t for t in tensors if t is not None]
    return torch.stack(there) if there else None


def _backward_problem(dtype: torch.dtype, device: Any, *sizes: int) -> Any:
    u, weight, _ = inputs_of(dtype, device, *sizes)
    sums = torch.randn(3, sizes[0], *weight.shape[1:3], device=device)
    dv = torch.randn(sums.shape[1:], dtype=dtype, device=device)
    return lambda: backward(dv, u, weight, sums, sums[:-1].clone(), False, False, True, True, True)


BACKWARD = BlockSizes("capsule_routing_backward", rule_of, candidates_of, _backward_problem, SIZES)
TUNED = (BACKWARD,)
