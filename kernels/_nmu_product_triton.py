# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Triton kernels of `nmu_product`; equation and names as there, how they walk: `_per_edge.py`.

Forward is a running product, 2 instructions a factor. Backward, the product E of all factors but one is that of all of
them, made again, by that one: 1 MUFU, and the floor of both gradients. That is right wherever E is in range, since

- the product is kept as m 2^k, with 1 <= |m| < 2. It is made of 16 factors at a time where no 16 leave the range, and
  else, in a tile where any do, of the mantissas and exponents of all of them;
- factors of 0 are left out and counted. Where there is one, E is the product for it, and 0 for all others; where there
  are more, E is 0. A denormal counts as 0.

(product) dy comes as two numbers, P = dy m 2^(k/2) and R = 2^(k - k/2), so that (P / t) R goes through no number that
is out of range if its result is not. R < 0 says that one factor is 0. R needs no digits, and has 16 bits for float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._op import compute_dtype
from archzoo.kernels._per_edge import (
    partial_sums,
    place,
    reciprocal,
    rows_candidates,
    rows_rule,
    tile_candidates,
    tile_rule,
    tiling,
    zeros,
)
from archzoo.kernels._triton import accumulator, cdiv, helper, launch, span

_CHUNK = tl.constexpr(16)  # factors that are multiplied without a look at their range


@helper
def _factor(x, w, rest):
    """w x + (1 - w); the same bits in all kernels, for they are divided by each other."""
    return tl.fma(w, x, rest)


@helper
def _is_zero(t):
    return tl.abs(t) < (2.2250738585072014e-308 if t.dtype == tl.float64 else 1.1754943508222875e-38)


@helper
def _split(t):
    """Mantissa, 1 <= |m| < 2, and exponent of normal numbers. Of others: 1 and 0 for 0; infinity or NaN, and 0."""
    if t.dtype == tl.float64:
        bits = t.to(tl.int64, bitcast=True)
        power = (bits >> 52) & 2047
        m = ((bits & -0x7FF0000000000001) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
        special = power == 2047
        k = (power - 1023).to(tl.int32)
    else:
        bits = t.to(tl.int32, bitcast=True)
        power = (bits >> 23) & 255
        m = ((bits & -0x7F800001) | 0x3F800000).to(tl.float32, bitcast=True)
        special = power == 255
        k = power - 127
    zero = power == 0
    return tl.where(zero, 1.0, tl.where(special, t, m)), tl.where(zero | special, 0, k), zero


@helper
def _power(k, like):
    """2^k in the dtype of `like`, for |k| <= 126, or 1022 in float64."""
    if like.dtype == tl.float64:
        p = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        p = ((k + 127) << 23).to(tl.float32, bitcast=True)
    return p


@triton.jit(do_not_specialize=["M", "tiles_m"])
def _forward_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K, tiles_m, tiles_n,
    BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    _, tile_m, tile_n = place(tl.program_id(0).to(tl.int64), tiles_m, tiles_n)
    rows = span(tile_m, BM)
    cols = span(tile_n, BN)
    row = tl.minimum(rows, M - 1)
    in_cols = cols < N
    here = row[:, None] * N + cols[None, :]
    y = 1.0 + zeros(y_ptr, here, K).to(ACC)
    at_row = row * K
    for k in range(K):
        x = tl.load(x_ptr + k + at_row).to(ACC)[:, None]
        w = tl.load(w_ptr + tl.cast(k, tl.int64) * N + cols, mask=in_cols, other=0.0).to(ACC)
        y *= _factor(x, w[None, :], (1.0 - w)[None, :])
    tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=["M", "tiles_m"])
def _products_kernel(
    dy_ptr, x_ptr, w_ptr, p_ptr, r_ptr, M, N, K, tiles_m, tiles_n,
    BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    _, tile_m, tile_n = place(tl.program_id(0).to(tl.int64), tiles_m, tiles_n)
    rows = span(tile_m, BM)
    cols = span(tile_n, BN)
    row = tl.minimum(rows, M - 1)
    in_cols = cols < N
    here = row[:, None] * N + cols[None, :]
    at_row = row * K
    one = 1.0 + zeros(p_ptr, here, K)
    none = (one < 0).to(tl.int32)
    m = one
    power = none
    for start in range(0, K, _CHUNK):
        product = one * 2.0**80  # so that no part of a chunk is denormal, unless the rest of it makes up for 2^106
        for k in tl.range(start, tl.minimum(start + _CHUNK, K), loop_unroll_factor=2):
            x = tl.load(x_ptr + k + at_row).to(ACC)[:, None]
            w = tl.load(w_ptr + tl.cast(k, tl.int64) * N + cols, mask=in_cols, other=0.0).to(ACC)
            product *= _factor(x, w[None, :], (1.0 - w)[None, :])
        size = tl.abs(product)
        m, k_of_m, is_zero = _split(tl.where((size > 2.0**-20) & (size < 2.0**126), m * product, float("nan")))
        power += k_of_m - 80
    zero = none
    if tl.max((m != m).to(tl.int32)) > 0:
        m = one
        power = none
        for k in range(K):
            x = tl.load(x_ptr + k + at_row).to(ACC)[:, None]
            w = tl.load(w_ptr + tl.cast(k, tl.int64) * N + cols, mask=in_cols, other=0.0).to(ACC)
            t, k_of_t, is_zero = _split(_factor(x, w[None, :], (1.0 - w)[None, :]))
            zero += is_zero.to(tl.int32)
            m, k_of_m, is_zero = _split(m * t)
            power += k_of_t + k_of_m
    most = 2044 if m.dtype == tl.float64 else 252
    power = tl.where(power > most, most, tl.where(power < -most, -most, power))
    half = power >> 1
    r = _power(power - half, m)
    dy = tl.load(dy_ptr + here, mask=in_cols[None, :], other=0.0).to(ACC)
    p = tl.where(zero > 1, 0.0 * m, dy * (m * _power(half, m)))
    r = tl.where(zero == 1, -r, r)
    inside = (rows < M)[:, None] & in_cols[None, :]
    tl.store(p_ptr + here, p, mask=inside)
    tl.store(r_ptr + here, r.to(r_ptr.dtype.element_ty), mask=inside)


@helper
def _others(t, p, r):
    """dy E of a factor."""
    return tl.where(_is_zero(t), p, tl.where(r < 0, 0.0 * p, p) * reciprocal(t)) * tl.abs(r)


@triton.jit(do_not_specialize=["M", "tiles_m"])
def _input_kernel(
    p_ptr, r_ptr, x_ptr, w_ptr, dx_ptr, M, N, K, tiles_m, tiles_n,
    BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    _, tile_m, tile_n = place(tl.program_id(0).to(tl.int64), tiles_m, tiles_n)
    rows = span(tile_m, BM)
    cols = span(tile_n, BN)
    row = tl.minimum(rows, M - 1)
    in_cols = cols < N
    here = row[:, None] * N + cols[None, :]
    x = tl.load(x_ptr + here, mask=in_cols[None, :], other=1.0).to(ACC)
    at_row = row * K
    dx = tl.full((BM, BN), 0.0, ACC)
    for k in tl.range(0, K, loop_unroll_factor=2):
        p = tl.load(p_ptr + k + at_row)[:, None]
        r = tl.load(r_ptr + k + at_row).to(ACC)[:, None]
        w = tl.load(w_ptr + tl.cast(k, tl.int64) * N + cols, mask=in_cols, other=0.0).to(ACC)
        dx += w[None, :] * _others(_factor(x, w[None, :], (1.0 - w)[None, :]), p, r)
    tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=(rows < M)[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=["K", "steps"])
def _parameters_kernel(
    p_ptr, r_ptr, x_ptr, w_ptr, dw_ptr, M, N, K, tiles_m, tiles_n, steps,
    BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    split, tile_m, tile_n = place(tl.program_id(0).to(tl.int64), tiles_m, tiles_n)
    rows = span(tile_m, BM)
    cols = span(tile_n, BN)
    row = tl.minimum(rows, M - 1)
    in_cols = cols < N
    here = row[:, None] * N + cols[None, :]
    w = tl.load(w_ptr + here, mask=in_cols[None, :], other=0.0).to(ACC)
    rest = 1.0 - w
    dw = tl.full((BM, BN), 0.0, ACC)
    for k in tl.range(split * steps, tl.minimum(split * steps + steps, K), loop_unroll_factor=2):
        p = tl.load(p_ptr + k * M + row)[:, None]
        r = tl.load(r_ptr + k * M + row).to(ACC)[:, None]
        x = tl.load(x_ptr + k * N + cols, mask=in_cols, other=1.0).to(ACC)[None, :]
        dw += (x - 1.0) * _others(_factor(x, w, rest), p, r)
    tl.store(dw_ptr + split * M * N + here, dw, mask=(rows < M)[:, None] & in_cols[None, :])


def forward(x: Tensor, w: Tensor) -> Tensor:
    """y (rows, outputs) of x (rows, inputs), in its dtype, and w (outputs, inputs)."""
    x, rows = x.contiguous(), len(x)
    outputs, inputs = w.shape
    y = x.new_empty(rows, outputs)
    blocks = FORWARD.of(x, rows, outputs, inputs)
    programs, *tiles = tiling(blocks, 1, rows, outputs)
    launch(
        _forward_kernel, (programs,), x, w.t().contiguous(), y, rows, outputs, inputs, *tiles,
        ACC=accumulator(compute_dtype(x, w)), **blocks,
    )  # fmt: skip
    return y


def products(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """P and R (rows, outputs)."""
    dy, x, rows, wide = dy.contiguous(), x.contiguous(), len(x), compute_dtype(x, w)
    outputs, inputs = w.shape
    p = torch.empty(dy.shape, dtype=wide, device=x.device)
    r = torch.empty(dy.shape, dtype=torch.bfloat16 if wide == torch.float32 else wide, device=x.device)
    blocks = PRODUCTS.of(x, rows, outputs, inputs)
    programs, *tiles = tiling(blocks, 1, rows, outputs)
    launch(
        _products_kernel, (programs,), dy, x, w.t().contiguous(), p, r, rows, outputs, inputs, *tiles,
        ACC=accumulator(wide), **blocks,
    )  # fmt: skip
    return p, r


def input_gradient(p: Tensor, r: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dx (rows, inputs), in x's dtype."""
    x, w, rows = x.contiguous(), w.contiguous(), len(x)
    outputs, inputs = w.shape
    dx = torch.empty_like(x)
    blocks = INPUT.of(x, rows, inputs, outputs)
    programs, *tiles = tiling(blocks, 1, rows, inputs)
    launch(
        _input_kernel, (programs,), p, r, x, w, dx, rows, inputs, outputs, *tiles,
        ACC=accumulator(p.dtype), **blocks,
    )  # fmt: skip
    return dx


def weight_gradient(p: Tensor, r: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dw (outputs, inputs), in w's dtype."""
    x, w, rows = x.contiguous(), w.contiguous(), len(x)
    outputs, inputs = w.shape
    blocks = dict(PARAMETERS.of(x, outputs, inputs, rows))
    steps = blocks.pop("ROWS")
    splits = cdiv(rows, steps)
    programs, *tiles = tiling(blocks, splits, outputs, inputs)
    (partial,) = partial_sums(splits, w, p.dtype, [True])
    launch(
        _parameters_kernel, (programs,), p, r, x, w, partial, outputs, inputs, rows, *tiles, steps,
        ACC=accumulator(p.dtype), **blocks,
    )  # fmt: skip
    return partial.sum(0).to(w.dtype)


def backward(dy: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool) -> list[Tensor | None]:
    """Gradients of x and w; None for what is not needed."""
    p, r = products(dy, x, w)
    return [input_gradient(p, r, x, w) if need_x else None, weight_gradient(p, r, x, w) if need_w else None]


def _problem(dtype: torch.dtype, device: Any, rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    dy, x = (torch.randn(rows, n, dtype=dtype, device=device) for n in (outputs, inputs))
    return dy, 1 + x / inputs**0.5, torch.rand(outputs, inputs, device=device)


def _forward_problem(dtype: torch.dtype, device: Any, rows: int, outputs: int, inputs: int) -> Any:
    _, x, w = _problem(dtype, device, rows, outputs, inputs)
    return lambda: forward(x, w)


def _products_problem(dtype: torch.dtype, device: Any, rows: int, outputs: int, inputs: int) -> Any:
    dy, x, w = _problem(dtype, device, rows, outputs, inputs)
    return lambda: products(dy, x, w)


def _input_problem(dtype: torch.dtype, device: Any, rows: int, inputs: int, outputs: int) -> Any:
    dy, x, w = _problem(dtype, device, rows, outputs, inputs)
    p, r = products(dy, x, w)
    return lambda: input_gradient(p, r, x, w)


def _parameters_problem(dtype: torch.dtype, device: Any, outputs: int, inputs: int, rows: int) -> Any:
    dy, x, w = _problem(dtype, device, rows, outputs, inputs)
    p, r = products(dy, x, w)
    return lambda: weight_gradient(p, r, x, w)


def _rule(dtype: torch.dtype, M: int, N: int, K: int) -> Blocks:
    return tile_rule(M, N, 4096, 32)


def _products_rule(dtype: torch.dtype, M: int, N: int, K: int) -> Blocks:
    return tile_rule(M, N, 2048, 16)


def _forward_rule(dtype: torch.dtype, M: int, N: int, K: int) -> Blocks:
    blocks = tile_rule(M, N, 16384, 64)
    # 64 registers are few enough for all warps that there are; for small tiles ptxas takes 40, and spills.
    return blocks if blocks["num_warps"] > 2 or dtype == torch.float64 else {**blocks, "maxnreg": 64}


def _candidates(dtype: torch.dtype, M: int, N: int, K: int) -> list[Blocks]:
    return tile_candidates(M, N, 4096)


def _parameters_rule(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> Blocks:
    return rows_rule(outputs, inputs, rows, 1, 2048, 16)


def _parameters_candidates(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> list[Blocks]:
    return rows_candidates(outputs, inputs, rows, 1, 4096)


_SIZES = [(8192, 3072, 768), (1024, 256, 256)]

FORWARD = BlockSizes("nmu_product", _forward_rule, _candidates, _forward_problem, _SIZES)
PRODUCTS = BlockSizes("nmu_product_products", _products_rule, _candidates, _products_problem, _SIZES)
INPUT = BlockSizes("nmu_product_dx", _rule, _candidates, _input_problem, [(m, k, n) for m, n, k in _SIZES])
PARAMETERS = BlockSizes(
    "nmu_product_dw", _parameters_rule, _parameters_candidates, _parameters_problem, [(n, k, m) for m, n, k in _SIZES]
)
TUNED = (FORWARD, PRODUCTS, INPUT, PARAMETERS)
