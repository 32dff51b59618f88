# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of `normalize_`: one launch a matrix, in place; equations and names as in `normalize.py`.

A program has ROWS rows by COLS columns at a time, and walks along its vectors twice, for their norms and to write them:
the second read of a row, or of a narrow block of columns, mostly comes from L2. A vector that fits into a block is read
once. Bound by memory: one read, at most two, and one write.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._op import compute_dtype
from archzoo.kernels._triton import accumulator, cdiv, helper, launch, span


@helper
def _factors(square, TOLERANCE: tl.constexpr, EPS: tl.constexpr):
    """By what vectors of those squared norms are multiplied; 1 for those that are unit already."""
    norm = tl.sqrt(square)
    inverse = 1.0 / tl.where(norm < EPS, norm * 0.0 + EPS, norm)
    return tl.where(tl.abs(norm - 1.0) <= TOLERANCE, norm * 0.0 + 1.0, inverse)


@triton.jit
def _normalize_kernel(
    w_ptr, R, C, TOLERANCE: tl.constexpr, EPS: tl.constexpr, BY_ROW: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    rows = span(own if BY_ROW else 0, ROWS)
    cols = span(0 if BY_ROW else own, COLS)
    along: tl.constexpr = 1 if BY_ROW else 0
    if WHOLE:
        inside = (rows < R)[:, None] & (cols < C)[None, :]
        at = w_ptr + rows[:, None] * C + cols[None, :]
        w = tl.load(at, mask=inside, other=0.0).to(ACC)
        factors = tl.expand_dims(_factors(tl.sum(w * w, along), TOLERANCE, EPS), along)
        tl.store(at, (w * factors).to(w_ptr.dtype.element_ty), mask=inside)
    else:
        square = tl.full((ROWS, COLS), 0.0, ACC)
        for start in range(0, C if BY_ROW else R, COLS if BY_ROW else ROWS):
            r = rows if BY_ROW else rows + start
            c = cols + start if BY_ROW else cols
            inside = (r < R)[:, None] & (c < C)[None, :]
            w = tl.load(w_ptr + r[:, None] * C + c[None, :], mask=inside, other=0.0).to(ACC)
            square += w * w
        factors = tl.expand_dims(_factors(tl.sum(square, along), TOLERANCE, EPS), along)
        for start in range(0, C if BY_ROW else R, COLS if BY_ROW else ROWS):
            r = rows if BY_ROW else rows + start
            c = cols + start if BY_ROW else cols
            inside = (r < R)[:, None] & (c < C)[None, :]
            at = w_ptr + r[:, None] * C + c[None, :]
            w = tl.load(at, mask=inside, other=0.0).to(ACC)
            tl.store(at, (w * factors).to(w_ptr.dtype.element_ty), mask=inside)


def normalize_(weight: Tensor, dim: int, tolerance: float, eps: float) -> None:
    """Brings the vectors of weight (R, C), contiguous, along an axis to unit norm; leaves those that are so already."""
    (R, C), by_row = weight.shape, dim == 1
    blocks = NORMALIZE.of(weight, R, C, 1 if by_row else 2)
    programs = cdiv(R, blocks["ROWS"]) if by_row else cdiv(C, blocks["COLS"])
    whole = blocks["COLS"] >= C if by_row else blocks["ROWS"] >= R
    launch(
        _normalize_kernel, (programs if weight.numel() else 0,), weight, R, C,
        TOLERANCE=tolerance, EPS=eps, BY_ROW=by_row, WHOLE=whole,
        ACC=accumulator(compute_dtype(weight)), **blocks,
    )  # fmt: skip


_WIDEST = 8192  # numbers of a row that is held in registers


def _rule(dtype: torch.dtype, R: int, C: int, axis: int) -> Blocks:
    if axis == 1:
        cols = C if C <= _WIDEST else 4096
        rows = max(1, min(R, 2048 // cols))
        return {"ROWS": rows, "COLS": cols, "num_warps": max(4, min(16, rows * cols // 512))}
    # Columns of 64 bytes, so that a matrix has programs enough for all processors and sectors are used whole; many rows
    # at a time, as one program a processor has to keep all of its bandwidth busy.
    cols = min(C, 64 // dtype.itemsize)
    rows = max(1, min(R, 16384 // cols))
    return {"ROWS": rows, "COLS": cols, "num_warps": max(4, min(16, rows * cols // 512))}


def _candidates(dtype: torch.dtype, R: int, C: int, axis: int) -> list[Blocks]:
    own = _rule(dtype, R, C, axis)
    if axis == 1:
        rows = [r for r in (1, 2, 4, 8) if r == 1 or r * own["COLS"] <= 8192]
        return [{**own, "ROWS": r, "num_warps": w} for r in rows for w in (4, 8, 16) if r * own["COLS"] <= 1024 * w]
    return [
        {"ROWS": max(1, min(R, size // cols)), "COLS": cols, "num_warps": warps}
        for cols in (16, 32, 64)
        for size in (2048, 4096, 8192, 16384)
        for warps in (4, 8, 16)
        if size <= 1024 * warps
    ]


def _problem(dtype: torch.dtype, device: Any, R: int, C: int, axis: int) -> Any:
    weight = torch.randn(R, C, dtype=dtype, device=device)
    return lambda: normalize_(weight, 2 - axis, 1e-3, 1e-12)


# 1 where rows are unit, 2 where columns are.
NORMALIZE = BlockSizes(
    "normalize", _rule, _candidates, _problem, [(4096, 1024, 1), (4096, 16384, 1), (1024, 4096, 2), (256, 256, 2)]
)
TUNED = (NORMALIZE,)
