# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `normalized_residual`; equations and names as there.

A program walks STEPS blocks of ROWS rows. Where a row fits into a block (WHOLE) it is read once, and alpha's gradient
is summed in registers; longer rows are walked by columns, twice or three times, mostly from L2. Bound by memory: 3 N D
elements are moved forward, 5 N D backward.
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
def _load(ptr, rows, cols, D, inside, ACC: tl.constexpr):
    return tl.load(ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(ACC)


@helper
def _store(ptr, rows, cols, D, inside, value):
    tl.store(ptr + rows[:, None] * D + cols[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@helper
def _inverse_norm(square):
    """One over the clamped norm (ROWS, 1) of rows whose sums of squares are given, 0 for rows of zeros."""
    norm = tl.sqrt(square)
    return tl.where(norm == 0, 0.0, 1.0 / tl.where(norm < 1e-12, 1e-12, norm))[:, None]


@helper
def _along(square, inverse):
    """<unit, gradient> (ROWS, 1), or 0 where the norm is clamped and nothing falls away."""
    return tl.where(inverse > 0.9999999e12, 0.0, square[:, None])


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    h_ptr, f_ptr, alpha_ptr, y_ptr, inverse_ptr, N, D,
    ROWS: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = span(tl.program_id(0), ROWS)
    cols = tl.arange(0, COLS)
    in_rows = rows < N
    if WHOLE:
        inside = in_rows[:, None] & (cols < D)[None, :]
        alpha = tl.load(alpha_ptr + cols, mask=cols < D, other=0.0).to(ACC)[None, :]
        a = _load(h_ptr, rows, cols, D, inside, ACC)
        b = _load(f_ptr, rows, cols, D, inside, ACC)
        n_a = _inverse_norm(tl.sum(a * a, 1))
        n_b = _inverse_norm(tl.sum(b * b, 1))
        a = a * n_a
        r = a + alpha * (b * n_b - a)
        n_r = _inverse_norm(tl.sum(r * r, 1))
        _store(y_ptr, rows, cols, D, inside, r * n_r)
    else:
        aa = tl.zeros((ROWS,), ACC)
        bb = tl.zeros((ROWS,), ACC)
        rr = tl.zeros((ROWS,), ACC)
        for start in range(0, D, COLS):
            at = start + cols
            inside = in_rows[:, None] & (at < D)[None, :]
            a = _load(h_ptr, rows, at, D, inside, ACC)
            b = _load(f_ptr, rows, at, D, inside, ACC)
            aa += tl.sum(a * a, 1)
            bb += tl.sum(b * b, 1)
        n_a = _inverse_norm(aa)
        n_b = _inverse_norm(bb)
        for start in range(0, D, COLS):
            at = start + cols
            inside = in_rows[:, None] & (at < D)[None, :]
            alpha = tl.load(alpha_ptr + at, mask=at < D, other=0.0).to(ACC)[None, :]
            a = _load(h_ptr, rows, at, D, inside, ACC) * n_a
            r = a + alpha * (_load(f_ptr, rows, at, D, inside, ACC) * n_b - a)
            rr += tl.sum(r * r, 1)
        n_r = _inverse_norm(rr)
        for start in range(0, D, COLS):
            at = start + cols
            inside = in_rows[:, None] & (at < D)[None, :]
            alpha = tl.load(alpha_ptr + at, mask=at < D, other=0.0).to(ACC)[None, :]
            a = _load(h_ptr, rows, at, D, inside, ACC) * n_a
            r = a + alpha * (_load(f_ptr, rows, at, D, inside, ACC) * n_b - a)
            _store(y_ptr, rows, at, D, inside, r * n_r)
    out = inverse_ptr + rows[:, None]
    tl.store(out, n_a, mask=in_rows[:, None])
    tl.store(out + N, n_b, mask=in_rows[:, None])
    tl.store(out + 2 * tl.cast(N, tl.int64), n_r, mask=in_rows[:, None])


@helper
def _tile(g_ptr, h_ptr, f_ptr, alpha_ptr, rows, cols, D, in_rows, n_a, n_b, n_r, ACC: tl.constexpr):
    """g, alpha, and what the forward pass had: a, b and y."""
    inside = in_rows[:, None] & (cols < D)[None, :]
    g = _load(g_ptr, rows, cols, D, inside, ACC)
    alpha = tl.load(alpha_ptr + cols, mask=cols < D, other=0.0).to(ACC)[None, :]
    a = _load(h_ptr, rows, cols, D, inside, ACC) * n_a
    b = _load(f_ptr, rows, cols, D, inside, ACC) * n_b
    return g, alpha, a, b, (a + alpha * (b - a)) * n_r, inside


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    g_ptr, h_ptr, f_ptr, alpha_ptr, inverse_ptr, dh_ptr, df_ptr, partial_ptr, N, D,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    dalpha = tl.zeros((COLS,), ACC)
    for step in range(STEPS):
        rows = span(program * STEPS + step, ROWS)
        in_rows = rows < N
        at_row = inverse_ptr + rows[:, None]
        n_a = tl.load(at_row, mask=in_rows[:, None], other=0.0)
        n_b = tl.load(at_row + N, mask=in_rows[:, None], other=0.0)
        n_r = tl.load(at_row + 2 * tl.cast(N, tl.int64), mask=in_rows[:, None], other=0.0)
        if WHOLE:
            g, alpha, a, b, y, inside = _tile(
                g_ptr, h_ptr, f_ptr, alpha_ptr, rows, cols, D, in_rows, n_a, n_b, n_r, ACC
            )
            dr = (g - y * _along(tl.sum(y * g, 1), n_r)) * n_r
            db = alpha * dr
            if partial_ptr is not None:
                dalpha += tl.sum(dr * (b - a), 0)
            if dh_ptr is not None:
                da = dr - db
                _store(dh_ptr, rows, cols, D, inside, (da - a * _along(tl.sum(a * da, 1), n_a)) * n_a)
            if df_ptr is not None:
                _store(df_ptr, rows, cols, D, inside, (db - b * _along(tl.sum(b * db, 1), n_b)) * n_b)
        else:  # STEPS is 1 then, and a program's sums over its rows go out column by column
            yg = tl.zeros((ROWS,), ACC)
            for start in range(0, D, COLS):
                g, alpha, a, b, y, inside = _tile(
                    g_ptr, h_ptr, f_ptr, alpha_ptr, rows, start + cols, D, in_rows, n_a, n_b, n_r, ACC
                )
                yg += tl.sum(y * g, 1)
            along_y = _along(yg, n_r)
            aa = tl.zeros((ROWS,), ACC)
            bb = tl.zeros((ROWS,), ACC)
            for start in range(0, D, COLS):
                at = start + cols
                g, alpha, a, b, y, inside = _tile(
                    g_ptr, h_ptr, f_ptr, alpha_ptr, rows, at, D, in_rows, n_a, n_b, n_r, ACC
                )
                dr = (g - y * along_y) * n_r
                aa += tl.sum(a * (dr - alpha * dr), 1)
                bb += tl.sum(b * (alpha * dr), 1)
                if partial_ptr is not None:
                    tl.store(partial_ptr + program * D + at, tl.sum(dr * (b - a), 0), mask=at < D)
            along_a = _along(aa, n_a)
            along_b = _along(bb, n_b)
            for start in range(0, D, COLS):
                at = start + cols
                g, alpha, a, b, y, inside = _tile(
                    g_ptr, h_ptr, f_ptr, alpha_ptr, rows, at, D, in_rows, n_a, n_b, n_r, ACC
                )
                dr = (g - y * along_y) * n_r
                db = alpha * dr
                if dh_ptr is not None:
                    _store(dh_ptr, rows, at, D, inside, (dr - db - a * along_a) * n_a)
                if df_ptr is not None:
                    _store(df_ptr, rows, at, D, inside, (db - b * along_b) * n_b)
    if WHOLE and partial_ptr is not None:
        tl.store(partial_ptr + program * D + cols, dalpha, mask=cols < D)


def forward(h: Tensor, branch: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """y (N, D) in h's dtype, and one over the norms of h, of branch and of what is between them (3, N, 1)."""
    h, branch, alpha = h.contiguous(), branch.contiguous(), alpha.contiguous()
    wide = compute_dtype(h, branch, alpha)
    N, D = h.shape
    y = torch.empty_like(h)
    inverse = torch.empty(3, N, 1, dtype=wide, device=h.device)
    blocks = FORWARD.of(h, N, D)
    launch(
        _forward_kernel, (cdiv(N, blocks["ROWS"]),), h, branch, alpha, y, inverse, N, D,
        WHOLE=blocks["COLS"] >= D, ACC=accumulator(wide), **blocks,
    )  # fmt: skip
    return y, inverse


def backward(
    dy: Tensor,
    h: Tensor,
    branch: Tensor,
    alpha: Tensor,
    inverse: Tensor,
    need_h: bool,
    need_branch: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, branch and alpha. What is not needed is not computed, and comes back with no elements."""
    dy, h, branch, alpha = dy.contiguous(), h.contiguous(), branch.contiguous(), alpha.contiguous()
    N, D = h.shape
    blocks = BACKWARD.of(h, N, D)
    whole = blocks["COLS"] >= D
    steps = blocks["STEPS"] if whole else 1
    programs = cdiv(N, blocks["ROWS"] * steps)
    dh = torch.empty_like(h) if need_h else None
    dbranch = torch.empty_like(branch) if need_branch else None
    partial = torch.empty(programs, D, dtype=inverse.dtype, device=h.device) if need_alpha else None
    launch(
        _backward_kernel, (programs,), dy, h, branch, alpha, inverse, dh, dbranch, partial, N, D,
        WHOLE=whole, ACC=accumulator(inverse.dtype), **{**blocks, "STEPS": steps},
    )  # fmt: skip
    return (
        h.new_empty(0) if dh is None else dh,
        branch.new_empty(0) if dbranch is None else dbranch,
        alpha.new_empty(0) if partial is None else partial.sum(0).to(alpha.dtype),
    )


_WIDEST, _WIDEST_BACKWARD = 8192, 4096  # columns of a row that is held in registers; beyond, they would spill


def _forward_rule(dtype: torch.dtype, N: int, D: int) -> Blocks:
    if D > _WIDEST:
        return {"ROWS": 1, "COLS": 4096, "num_warps": 8}
    rows = min(N, max(1, 2048 // D))
    return {"ROWS": rows, "COLS": D, "num_warps": _warps(rows * D)}


def _backward_rule(dtype: torch.dtype, N: int, D: int) -> Blocks:
    if D > _WIDEST_BACKWARD:
        return {"ROWS": 8, "COLS": 512, "STEPS": 1, "num_warps": 8}
    rows = min(N, max(1, 2048 // D))
    # 8 rows a program at least, so that the partial sums are at most 4 / 48 of the inputs' bytes; more if N is large.
    steps = max(1, min(64, max(8, N // 1024)) // rows)
    return {"ROWS": rows, "COLS": D, "STEPS": steps, "num_warps": _warps(rows * D)}


def _warps(elements: int) -> int:
    """So many that a thread has 16 elements, and from 4 to 16."""
    return max(4, min(16, elements // 512))


def _forward_candidates(dtype: torch.dtype, N: int, D: int) -> list[Blocks]:
    own = _forward_rule(dtype, N, D)
    rows = [1] if D > _WIDEST else [r for r in (1, 2, 4, 8, 16) if r * D <= 8192]
    return [{**own, "ROWS": r, "num_warps": w} for r in rows for w in (4, 8, 16)]


def _backward_candidates(dtype: torch.dtype, N: int, D: int) -> list[Blocks]:
    if D > _WIDEST_BACKWARD:
        return [{**_backward_rule(dtype, N, D), "num_warps": w} for w in (4, 8, 16)]
    base = [b for b in _forward_candidates(dtype, N, D) if b["ROWS"] * D <= 4096]
    return [{**b, "STEPS": max(1, rows // b["ROWS"])} for b in base for rows in (8, 16, 32, 64)]


def _inputs(dtype: torch.dtype, device: Any, N: int, D: int) -> list[Tensor]:
    h, branch, dy = (torch.randn(N, D, dtype=dtype, device=device) for _ in range(3))
    return [dy, h, branch, torch.rand(D, dtype=torch.float32, device=device)]


def _forward_problem(dtype: torch.dtype, device: Any, N: int, D: int) -> Any:
    _, h, branch, alpha = _inputs(dtype, device, N, D)
    return lambda: forward(h, branch, alpha)


def _backward_problem(dtype: torch.dtype, device: Any, N: int, D: int) -> Any:
    dy, h, branch, alpha = _inputs(dtype, device, N, D)
    inverse = torch.rand(3, N, 1, dtype=torch.float32, device=device)
    return lambda: backward(dy, h, branch, alpha, inverse, True, True, True)


_SIZES = [(8192, 384), (16384, 4096), (2048, 12288)]

FORWARD = BlockSizes(
    "normalized_residual", _forward_rule, _forward_candidates, _forward_problem, [*_SIZES, (8192, 8192)]
)
BACKWARD = BlockSizes("normalized_residual_backward", _backward_rule, _backward_candidates, _backward_problem, _SIZES)
TUNED = (FORWARD, BACKWARD)
