# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the rational function of Padé neurons, for linear layers and convolutions; letters as in `_pade`.

Maps are (outer, channels, inner), contiguous: rows of features with inner = 1, or images of channels. A program has a
tile of the maps as a matrix, the channels being its columns if inner = 1, or else its rows. Bound by memory: a forward
pass reads each sum of terms once, and writes y and, for a backward pass, the accumulators; that reads those and dy, and
writes the gradient of each term, and a partial sum of w_0's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._op import compute_dtype
from archzoo.kernels._pade import TermGradients
from archzoo.kernels._triton import accumulator, cdiv, helper, launch, narrow, span


@helper
def smooth_value(P, P_low, Q, Q_low, EPS: tl.constexpr):
    """y, and its denominator."""
    D = Q * Q + (Q_low * Q_low + EPS)
    return (Q * P + Q_low * P_low) / D, D


@helper
def _bias(bias_ptr, rows, cols, R, C, channels, BY_COLUMN: tl.constexpr, ACC: tl.constexpr):
    """w_0 of a tile, (1, COLS) or (ROWS, 1); 0 if there is none."""
    if BY_COLUMN:
        if bias_ptr is not None:
            w0 = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(ACC)[None, :]
        else:
            w0 = tl.full((1, 1), 0.0, ACC)
    elif bias_ptr is not None:
        w0 = tl.load(bias_ptr + rows % channels, mask=rows < R, other=0.0).to(ACC)[:, None]
    else:
        w0 = tl.full((1, 1), 0.0, ACC)
    return w0


@helper
def store(ptr, at, value, inside):
    """A value at those places that are inside, in the dtype there."""
    tl.store(ptr + at, narrow(value, ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "tiles"])
def _forward_kernel(
    p_low_ptr, p_ptr, q_low_ptr, q_ptr, bias_ptr, y_ptr, kept_ptr, R, C, channels, tiles, q_step, kept_step,
    EPS: tl.constexpr, ABSOLUTE: tl.constexpr, N: tl.constexpr, BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = span(program // tiles, ROWS)
    cols = span(program % tiles, COLS)
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    P_low = tl.full((ROWS, COLS), 0.0, ACC)
    P = P_low + _bias(bias_ptr, rows, cols, R, C, channels, BY_COLUMN, ACC)
    if p_ptr is not None:
        if p_low_ptr is not None:
            P += tl.load(p_low_ptr + at, mask=inside, other=0.0).to(ACC)
            if not ABSOLUTE and kept_ptr is not None:
                store(kept_ptr, at, P, inside)
                kept_ptr += kept_step
        P_low = P
        P += tl.load(p_ptr + at, mask=inside, other=0.0).to(ACC)
        if kept_ptr is not None:
            store(kept_ptr, at, P, inside)
            kept_ptr += kept_step
    if q_ptr is None:
        y = P
    elif ABSOLUTE:
        D = tl.full((ROWS, COLS), 1.0, ACC)
        for _ in range(N):
            D += tl.abs(tl.load(q_ptr + at, mask=inside, other=0.0).to(ACC))
            q_ptr += q_step
        y = P / D
    else:
        Q_low = tl.full((ROWS, COLS), 1.0, ACC)
        if q_low_ptr is not None:
            Q_low += tl.load(q_low_ptr + at, mask=inside, other=0.0).to(ACC)
            if kept_ptr is not None:
                store(kept_ptr, at, Q_low, inside)
                kept_ptr += kept_step
        Q = Q_low + tl.load(q_ptr + at, mask=inside, other=0.0).to(ACC)
        if kept_ptr is not None:
            store(kept_ptr, at, Q, inside)
        y, _ = smooth_value(P, P_low, Q, Q_low, EPS)
    store(y_ptr, at, y, inside)


@triton.jit(do_not_specialize=["R", "tiles"])
def _backward_kernel(
    dy_ptr, kept_ptr, bias_ptr, dp_ptr, dq_ptr, partial_ptr, R, C, channels, tiles, kept_step, d_step,
    EPS: tl.constexpr, ABSOLUTE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = tl.cast(program // tiles, tl.int64)
    cols = span(program % tiles, COLS)
    total = tl.full((ROWS, COLS), 0.0, ACC)
    for step in range(STEPS):
        rows = span(block * STEPS + step, ROWS)
        inside = (rows < R)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(ACC)
        w0 = _bias(bias_ptr, rows, cols, R, C, channels, BY_COLUMN, ACC)
        kept = kept_ptr + at
        if M >= 2:
            if not ABSOLUTE:
                P_low = tl.load(kept, mask=inside, other=0.0).to(ACC)
                kept += kept_step
            P = tl.load(kept, mask=inside, other=0.0).to(ACC)
            kept += kept_step
        elif M == 1:
            P = tl.load(kept, mask=inside, other=0.0).to(ACC)
            kept += kept_step
            P_low = tl.full((ROWS, COLS), 0.0, ACC) + w0
        else:
            P = tl.full((ROWS, COLS), 0.0, ACC) + w0
            P_low = tl.full((ROWS, COLS), 0.0, ACC)
        if ABSOLUTE:
            D = tl.full((ROWS, COLS), 1.0, ACC)
            for k in range(N):
                D += tl.abs(tl.load(kept + k * kept_step, mask=inside, other=0.0).to(ACC))
            dP = dy / D
            shared = -(P / D) * dP
            for k in range(N):
                q = tl.load(kept + k * kept_step, mask=inside, other=0.0).to(ACC)
                dq = tl.where(q > 0, shared, tl.where(q < 0, -shared, 0.0 * shared))
                store(dq_ptr + k * d_step, at, dq, inside)
            if M > 0:
                store(dp_ptr, at, dP, inside)
            above = dP
        else:
            Q_low = tl.full((ROWS, COLS), 1.0, ACC)
            if N >= 2:
                Q_low = tl.load(kept, mask=inside, other=0.0).to(ACC)
                kept += kept_step
            Q = tl.load(kept, mask=inside, other=1.0).to(ACC)
            y, D = smooth_value(P, P_low, Q, Q_low, EPS)
            r = dy / D
            dP = r * Q
            above = dP + r * Q_low if M > 0 else dP  # of every lower term of the numerator, and of w_0
            dQ = r * (P - 2.0 * Q * y)
            if N >= 2:
                store(dq_ptr, at, dQ + r * (P_low - 2.0 * Q_low * y), inside)
                store(dq_ptr + d_step, at, dQ, inside)
            else:
                store(dq_ptr, at, dQ, inside)
            if M >= 2:
                store(dp_ptr, at, above, inside)
                store(dp_ptr + d_step, at, dP, inside)
            elif M == 1:
                store(dp_ptr, at, dP, inside)
        if partial_ptr is not None:
            if BY_COLUMN:
                total += above  # 0 outside, where dy is
            else:
                tl.store(partial_ptr + rows * tiles + program % tiles, tl.sum(above, 1), mask=rows < R)
    if BY_COLUMN and partial_ptr is not None:
        tl.store(partial_ptr + block * C + cols, tl.sum(total, 0), mask=cols < C)


def _matrix(shape: Any) -> tuple[int, int]:
    """Rows and columns of maps."""
    outer, channels, inner = shape
    return (outer, channels) if inner == 1 else (outer * channels, inner)


def forward(
    p: list[Tensor], q: list[Tensor] | Tensor, bias: Tensor | None, y: Tensor, kept: Tensor | None, eps: float
) -> None:
    """Writes the rational function of terms into y, and the accumulators into `kept`.

    Args:
        p: The sum of all terms of the numerator but the last, and the last; or the last alone; or nothing. Contiguous.
        q: Likewise of the denominator, for the smooth variant; a stack of all terms, for the absolute one.
        bias: w_0.
        y: (outer, channels, inner), contiguous.
        kept: (S, outer, channels, inner), or a slice of such by `outer`; the first of its maps may be p's. In the
            absolute variant only that of the numerator, if there is one, is written. None: nothing is.
        eps: Of the smooth variant.
    """
    (R, C), stacked = _matrix(y.shape), isinstance(q, Tensor)
    p_low, p_top = [None] * (2 - len(p)) + p
    q_low, q_top = (None, q) if isinstance(q, Tensor) else [None] * (2 - len(q)) + q
    wide = compute_dtype(y, p_top, q_top)
    blocks = FORWARD.of(y, R, C, 1 if y.shape[2] == 1 else 2)
    tiles = cdiv(C, blocks["COLS"])
    launch(
        _forward_kernel, (cdiv(R, blocks["ROWS"]) * tiles,),
        p_low, p_top, q_low, q_top, None if bias is None else bias.contiguous(), y, kept, R, C, y.shape[1], tiles,
        q.stride(0) if isinstance(q, Tensor) else 0, 0 if kept is None else kept.stride(0),
        EPS=eps, ABSOLUTE=stacked, N=len(q), BY_COLUMN=y.shape[2] == 1, ACC=accumulator(wide), **blocks,
    )  # fmt: skip


def backward(
    dy: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    M: int,
    N: int,
    absolute: bool,
    eps: float,
    dtype: torch.dtype,
    need_bias: bool,
) -> tuple[TermGradients, Tensor | None]:
    """Gradients of the terms in the given dtype, those that there are; and that of w_0 in float32 at least.

    Args:
        dy: (outer, channels, inner).
        kept: What `forward` wrote, (S, outer, channels, inner) or a slice of such by `outer`.
        bias: w_0.
        M: Degree of the numerator.
        N: Degree of the denominator, 1 or more.
        absolute: Which variant.
        eps: Of the smooth variant.
        dtype: Of the result.
        need_bias: Whether w_0 wants a gradient.
    """
    (R, C), by_column = _matrix(dy.shape), dy.shape[2] == 1
    dy, wide = dy.contiguous(), compute_dtype(dy, kept)
    n_p, n_q = (min(M, 1), N) if absolute else (min(M, 2), min(N, 2))
    dp, dq = (torch.empty(n, *dy.shape, dtype=dtype, device=dy.device) for n in (n_p, n_q))
    blocks = BACKWARD.of(dy, R, C, 1 if by_column else 2)
    tiles, programs = cdiv(C, blocks["COLS"]), cdiv(R, blocks["ROWS"] * blocks["STEPS"])
    shape = (programs, C) if by_column else (dy.shape[0], dy.shape[1], tiles)
    partial = torch.empty(shape, dtype=wide, device=dy.device) if need_bias else None
    launch(
        _backward_kernel, (programs * tiles,),
        dy, kept, None if bias is None else bias.contiguous(), dp, dq, partial, R, C, dy.shape[1], tiles,
        kept.stride(0), dy.numel(),
        EPS=eps, ABSOLUTE=absolute, M=min(M, 2), N=N, BY_COLUMN=by_column, ACC=accumulator(wide), **blocks,
    )  # fmt: skip
    # Where there is no such term nobody asks for its gradient.
    d = TermGradients(dp[-1] if n_p else dy, dp[0] if n_p else dy, dq if absolute else dq[-1], dq[0])
    return d, None if partial is None else partial.sum(0 if by_column else (0, 2))


def _rule(elements: int, R: int, C: int) -> Blocks:
    cols = min(C, 256)
    return {"ROWS": max(1, min(R, elements // cols)), "COLS": cols, "num_warps": 4}


def _forward_rule(dtype: torch.dtype, R: int, C: int, channels: int) -> Blocks:
    return _rule(1024, R, C)


def _backward_rule(dtype: torch.dtype, R: int, C: int, channels: int) -> Blocks:
    blocks = _rule(1024 if dtype.itemsize == 2 else 512, R, C)
    # 16 rows a program, so that the partial sums are at most 4 / 96 of the inputs' bytes.
    return {**blocks, "STEPS": max(1, min(16, R) // blocks["ROWS"]) if channels == 1 else 1}


def _forward_candidates(dtype: torch.dtype, R: int, C: int, channels: int) -> list[Blocks]:
    columns = [c for c in (64, 128, 256, 512, 1024) if c <= C] or [C]
    return [
        {"ROWS": max(1, min(R, size // cols)), "COLS": cols, "num_warps": warps}
        for cols in columns
        for size in (512, 1024, 2048)
        for warps in (4, 8)
    ]


def _backward_candidates(dtype: torch.dtype, R: int, C: int, channels: int) -> list[Blocks]:
    some = [b for b in _forward_candidates(dtype, R, C, channels) if b["ROWS"] * b["COLS"] <= 256 * b["num_warps"]]
    return [{**b, "STEPS": steps} for b in some for steps in ((4, 16, 64) if channels == 1 else (1, 4))]


def _shape(R: int, C: int, channels: int) -> tuple[int, int, int]:
    return (R, C, 1) if channels == 1 else (R // 64, 64, C)


def _forward_problem(dtype: torch.dtype, device: Any, R: int, C: int, channels: int) -> Any:
    shape = _shape(R, C, channels)
    p_low, p, q, y = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    kept, bias = torch.empty(3, *shape, dtype=dtype, device=device), torch.randn(shape[1], device=device)

    def run() -> None:
        forward([p_low, p], [q], bias, y, kept, 0.0)
        forward([p], kept[1:], bias, y, kept[:1], 0.0)

    return run


def _backward_problem(dtype: torch.dtype, device: Any, R: int, C: int, channels: int) -> Any:
    shape = _shape(R, C, channels)
    dy, kept = torch.randn(shape, dtype=dtype, device=device), torch.randn(3, *shape, dtype=dtype, device=device)
    bias = torch.randn(shape[1], device=device)

    def run() -> None:
        backward(dy, kept, bias, 2, 1, False, 0.0, dtype, True)
        backward(dy, kept, bias, 1, 2, True, 0.0, dtype, True)

    return run


# 1 where channels are columns, 2 where they are rows.
_SIZES = [(8192, 3072, 1), (64 * 64, 56 * 56, 2)]

FORWARD = BlockSizes("pade", _forward_rule, _forward_candidates, _forward_problem, _SIZES)
BACKWARD = BlockSizes("pade_backward", _backward_rule, _backward_candidates, _backward_problem, _SIZES)
TUNED = (FORWARD, BACKWARD)
