# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the rational function of groups; equations and names as in `rational.py`.

x is seen as (outer, groups, inner), contiguous: rows of features, or images of channels. A program has one group, so
that its ten coefficients are scalars, and ROWS by COLS numbers of it; backward it walks STEPS blocks of rows and adds
up the coefficients' gradients in registers. Bound by memory: 2 numbers are moved forward, 3 backward.
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
def _place(program, tiles, groups):
    """Of a program: its block of rows, its group, and its tile of columns."""
    return program // tiles // groups, program // tiles % groups, program % tiles


@helper
def _coefficients(a_ptr, b_ptr, a_group, group, ABS_TERMS: tl.constexpr, ACC: tl.constexpr):
    """a_0 to a_5, and b_1 to b_4 as Q has them."""
    a_ptr += a_group * 6
    b_ptr += group * 4
    b1 = tl.load(b_ptr).to(ACC)
    b2 = tl.load(b_ptr + 1).to(ACC)
    b3 = tl.load(b_ptr + 2).to(ACC)
    b4 = tl.load(b_ptr + 3).to(ACC)
    if ABS_TERMS:
        b1, b2, b3, b4 = tl.abs(b1), tl.abs(b2), tl.abs(b3), tl.abs(b4)
    return (
        tl.load(a_ptr).to(ACC),
        tl.load(a_ptr + 1).to(ACC),
        tl.load(a_ptr + 2).to(ACC),
        tl.load(a_ptr + 3).to(ACC),
        tl.load(a_ptr + 4).to(ACC),
        tl.load(a_ptr + 5).to(ACC),
        b1,
        b2,
        b3,
        b4,
    )


@triton.jit(do_not_specialize=["outer"])
def _forward_kernel(
    x_ptr, a_ptr, b_ptr, y_ptr, outer, groups, inner, tiles,
    SHARED: tl.constexpr, ABS_TERMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block, group, tile = _place(tl.program_id(0), tiles, groups)
    a0, a1, a2, a3, a4, a5, b1, b2, b3, b4 = _coefficients(a_ptr, b_ptr, 0 if SHARED else group, group, ABS_TERMS, ACC)
    rows = span(block, ROWS)
    cols = span(tile, COLS)
    inside = (rows < outer)[:, None] & (cols < inner)[None, :]
    at = (rows[:, None] * groups + group) * inner + cols[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
    t = tl.abs(x) if ABS_TERMS else x
    q = t * (b1 + t * (b2 + t * (b3 + t * b4)))
    q = 1.0 + (q if ABS_TERMS else tl.abs(q))
    p = a0 + x * (a1 + x * (a2 + x * (a3 + x * (a4 + x * a5))))
    tl.store(y_ptr + at, (p / q).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["outer"])
def _backward_kernel(
    dy_ptr, x_ptr, a_ptr, b_ptr, y_ptr, dx_ptr, partial_ptr, outer, groups, inner, tiles,
    SHARED: tl.constexpr, ABS_TERMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    block, group, tile = _place(tl.program_id(0), tiles, groups)
    a0, a1, a2, a3, a4, a5, b1, b2, b3, b4 = _coefficients(a_ptr, b_ptr, 0 if SHARED else group, group, ABS_TERMS, ACC)
    cols = span(tile, COLS)
    da0 = tl.full((ROWS, COLS), 0.0, ACC)
    da1, da2, da3, da4, da5, db1, db2, db3, db4 = da0, da0, da0, da0, da0, da0, da0, da0, da0
    for step in range(STEPS):
        rows = span(tl.cast(block, tl.int64) * STEPS + step, ROWS)
        inside = (rows < outer)[:, None] & (cols < inner)[None, :]
        at = (rows[:, None] * groups + group) * inner + cols[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(ACC)
        t = tl.abs(x) if ABS_TERMS else x
        s = t * (b1 + t * (b2 + t * (b3 + t * b4)))
        fall = b1 + t * (2.0 * b2 + t * (3.0 * b3 + t * (4.0 * b4)))
        if ABS_TERMS:
            q = 1.0 + s
            fall = tl.where(x > 0, fall, tl.where(x < 0, -fall, 0.0 * fall))
        else:
            q = 1.0 + tl.abs(s)
            sign = tl.where(s < 0, -1.0, 1.0).to(ACC)
            fall = fall * sign
        p = a0 + x * (a1 + x * (a2 + x * (a3 + x * (a4 + x * a5))))
        rise = a1 + x * (2.0 * a2 + x * (3.0 * a3 + x * (4.0 * a4 + x * (5.0 * a5))))
        y = p / q
        u = dy / q
        if y_ptr is not None:
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            tl.store(dx_ptr + at, (u * (rise - y * fall)).to(dx_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            below = -(y * u) * t if ABS_TERMS else -(y * u) * t * sign
            da0 += u
            db1 += below
            u *= x
            below *= t
            da1 += u
            db2 += below
            u *= x
            below *= t
            da2 += u
            db3 += below
            u *= x
            below *= t
            da3 += u
            db4 += below
            u *= x
            da4 += u
            da5 += u * x
    if partial_ptr is not None:
        out = partial_ptr + tl.program_id(0).to(tl.int64) * 10
        tl.store(out, tl.sum(da0))
        tl.store(out + 1, tl.sum(da1))
        tl.store(out + 2, tl.sum(da2))
        tl.store(out + 3, tl.sum(da3))
        tl.store(out + 4, tl.sum(da4))
        tl.store(out + 5, tl.sum(da5))
        tl.store(out + 6, tl.sum(db1))
        tl.store(out + 7, tl.sum(db2))
        tl.store(out + 8, tl.sum(db3))
        tl.store(out + 9, tl.sum(db4))


def forward(x: Tensor, a: Tensor, b: Tensor, abs_terms: bool, dtype: torch.dtype | None = None) -> Tensor:
    """F of x (outer, groups, inner), contiguous, in its dtype or another. a (groups or 1, 6), b (groups, 4)."""
    outer, groups, inner = x.shape
    y = torch.empty_like(x, dtype=dtype)
    blocks = FORWARD.of(x, outer, inner)
    tiles = cdiv(inner, blocks["COLS"])
    launch(
        _forward_kernel, (cdiv(outer, blocks["ROWS"]) * groups * tiles,),
        x, a.contiguous(), b.contiguous(), y, outer, groups, inner, tiles,
        SHARED=len(a) == 1, ABS_TERMS=abs_terms, ACC=accumulator(compute_dtype(x, a, b)), **blocks,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, abs_terms: bool, need_x: bool, need_a_and_b: bool, need_y: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x in its dtype, of a and b in float32 at least, y itself in dy's; None for what is not needed."""
    outer, groups, inner = x.shape
    wide = compute_dtype(x, a, b)
    y, dx = torch.empty_like(dy) if need_y else None, torch.empty_like(x) if need_x else None
    blocks = BACKWARD.of(x, outer, inner)
    tiles, rows = cdiv(inner, blocks["COLS"]), cdiv(outer, blocks["ROWS"] * blocks["STEPS"])
    partial = torch.empty(rows, groups, tiles, 10, dtype=wide, device=x.device) if need_a_and_b else None
    launch(
        _backward_kernel, (rows * groups * tiles,),
        dy, x, a.contiguous(), b.contiguous(), y, dx, partial, outer, groups, inner, tiles,
        SHARED=len(a) == 1, ABS_TERMS=abs_terms, ACC=accumulator(wide), **blocks,
    )  # fmt: skip
    if partial is None:
        return dx, None, None, y
    da, db = partial.sum((0, 2)).split((6, 4), 1)
    if abs_terms:  # +1 at b = 0
        db = torch.where(b < 0, -db, db)
    return dx, da.sum_to_size(a.shape).clone(), db.clone(), y  # an op's results share no memory


def _rule(elements: int, outer: int, inner: int) -> Blocks:
    """Blocks of so many elements; columns of a group of any width in tiles of which little is left empty."""
    cols = min(inner, 32 if inner <= 512 else elements)  # 32 divides a group of 96, which KAT has; 128 would not
    return {"ROWS": max(1, min(outer, elements // cols)), "COLS": cols, "num_warps": 4}


def _forward_rule(dtype: torch.dtype, outer: int, inner: int) -> Blocks:
    return _rule(1024, outer, inner)


def _backward_rule(dtype: torch.dtype, outer: int, inner: int) -> Blocks:
    blocks = _rule(512, outer, inner)
    return {**blocks, "STEPS": max(1, min(16, outer // blocks["ROWS"] // 128))}


def _forward_candidates(dtype: torch.dtype, outer: int, inner: int) -> list[Blocks]:
    columns = [c for c in (32, 64, 128, 256, 512, 1024) if c <= inner] or [inner]
    return [
        {"ROWS": max(1, min(outer, size // cols)), "COLS": cols, "num_warps": warps}
        for cols in columns
        for size in (512, 1024, 2048, 4096)
        for warps in (4, 8)
    ]


def _backward_candidates(dtype: torch.dtype, outer: int, inner: int) -> list[Blocks]:
    small = [c for c in _forward_candidates(dtype, outer, inner) if c["ROWS"] * c["COLS"] <= 1024]
    return [{**c, "STEPS": steps} for c in small for steps in (1, 4, 16, 64) if c["ROWS"] * steps <= outer]


def _inputs(dtype: torch.dtype, device: Any, outer: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(outer, 8, inner, dtype=dtype, device=device)
    return x, torch.randn(1, 6, device=device), torch.randn(8, 4, device=device)


def _forward_problem(dtype: torch.dtype, device: Any, outer: int, inner: int) -> Any:
    x, a, b = _inputs(dtype, device, outer, inner)
    return lambda: forward(x, a, b, True)


def _backward_problem(dtype: torch.dtype, device: Any, outer: int, inner: int) -> Any:
    x, a, b = _inputs(dtype, device, outer, inner)
    dy = torch.randn_like(x)
    return lambda: backward(dy, x, a, b, True, True, True)


_SIZES = [(25216, 96), (64, 12544)]  # ViT-B's MLP by KAT; 32 channels of 56 by 56 pixels of each of 8 groups

FORWARD = BlockSizes("rational", _forward_rule, _forward_candidates, _forward_problem, _SIZES)
BACKWARD = BlockSizes("rational_backward", _backward_rule, _backward_candidates, _backward_problem, _SIZES)
TUNED = (FORWARD, BACKWARD)
