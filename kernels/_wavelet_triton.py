# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Triton kernels of `wavelet_linear`, and of `wavelet_conv2d` on patches; equations and names as there, how they walk:
`_per_edge.py`.

u comes as v = (x - t) r, where r = sqrt(log2(e) / 2) / s, for which the envelope is 2^(-v^2): 1 MUFU. "morlet" has a
cosine too, of another MUFU, and backward a sine; both take their angle, of 200 at most, in radians. Instructions beside
those: 8 forward ("mexican_hat"), so that MUFU's rate is the floor, 10 for the gradient of x and 13 for those of the
parameters, which are bound by all instructions together.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from archzoo.kernels._op import compute_dtype
from archzoo.kernels._per_edge import (
    edge_block_sizes,
    exp2,
    partial_sums,
    place,
    tiling,
    zeros,
)
from archzoo.kernels._triton import INTERPRETED, accumulator, cdiv, helper, launch, span
from archzoo.kernels.wavelet import FACTOR, FAR, FREQUENCY

_ROOT = math.sqrt(0.5 / math.log(2))  # v / u
_SQUARE = tl.constexpr(2 * math.log(2))  # u^2 / v^2
_END = tl.constexpr(FAR * _ROOT)
_ANGLE = tl.constexpr(FREQUENCY / _ROOT)
_FREQUENCY = tl.constexpr(FREQUENCY)
_UNIT = tl.constexpr(1 / _ROOT)

# psi, and its derivative by u, are these times what the kernels have.
_PSI = {**FACTOR, "dog": FACTOR["dog"] / _ROOT}
_SLOPE = {**FACTOR, "mexican_hat": FACTOR["mexican_hat"] / _ROOT}


@helper
def _cos(x):
    return tl.cos(x) if INTERPRETED or x.dtype == tl.float64 else libdevice.fast_cosf(x)


@helper
def _sin(x):
    return tl.sin(x) if INTERPRETED or x.dtype == tl.float64 else libdevice.fast_sinf(x)


@helper
def _argument(x, t, r):
    """v, clamped to where every wavelet is 0. NaN stays."""
    v = (x - t) * r
    if v.dtype == tl.float64:  # which has no instruction for it, and Triton does not know
        v = tl.where(v > _END, _END, tl.where(v < -_END, -_END, v))
    else:
        v = tl.clamp(v, -_END, _END, propagate_nan=tl.PropagateNan.ALL)
    return v


@helper
def _psi(v, WAVELET: tl.constexpr):
    """psi, but for a factor."""
    minus = v * -v
    envelope = exp2(minus)
    if WAVELET == "mexican_hat":
        psi = (1.0 + _SQUARE * minus) * envelope
    elif WAVELET == "dog":
        psi = v * envelope
    else:
        psi = _cos(v * _ANGLE) * envelope
    return psi


@helper
def _psi_and_slope(v, g, WAVELET: tl.constexpr):
    """g times psi and times its derivative by u, but for a factor of each."""
    minus = v * -v
    envelope = exp2(minus) * g
    if WAVELET == "mexican_hat":
        psi = (1.0 + _SQUARE * minus) * envelope
        slope = (-3.0 - _SQUARE * minus) * (v * envelope)
    elif WAVELET == "dog":
        psi = v * envelope
        slope = (1.0 + _SQUARE * minus) * envelope
    else:
        angle = v * _ANGLE
        psi = _cos(angle) * envelope
        slope = -_FREQUENCY * (_sin(angle) * envelope) - (v * _UNIT) * psi
    return psi, slope


@triton.jit(do_not_specialize=["M", "tiles_m"])
def _forward_kernel(
    x_ptr, w_ptr, r_ptr, t_ptr, bias_ptr, y_ptr, M, N, K, tiles_m, tiles_n,
    WAVELET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    group, tile_m, tile_n = place(tl.program_id(0).to(tl.int64), tiles_m, tiles_n)
    rows = span(tile_m, BM)
    cols = span(tile_n, BN)
    row = tl.minimum(rows, M - 1)
    in_cols = cols < N
    at_row = (group * M + row) * K
    at_col = group * K * N + cols
    # As a tile of loads, not of a row that is spread: the layout of a tile follows such a load, and has long runs in n.
    y = tl.load(bias_ptr + (group * N + cols)[None, :] + 0 * row[:, None], mask=in_cols[None, :], other=0.0)
    for k in tl.range(0, K, loop_unroll_factor=2):
        below = tl.cast(k, tl.int64) * N
        x = tl.load(x_ptr + k + at_row).to(ACC)[:, None]
        w = tl.load(w_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        r = tl.load(r_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        t = tl.load(t_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        y += w * _psi(_argument(x, t, r), WAVELET)
    out = y_ptr + (group * M + row)[:, None] * N + cols[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=["M", "tiles_m"])
def _input_kernel(
    dy_ptr, x_ptr, w_ptr, r_ptr, t_ptr, dx_ptr, M, N, K, tiles_m, tiles_n,
    WAVELET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    group, tile_m, tile_n = place(tl.program_id(0).to(tl.int64), tiles_m, tiles_n)
    rows = span(tile_m, BM)
    cols = span(tile_n, BN)
    row = tl.minimum(rows, M - 1)
    in_cols = cols < N
    here = (group * M + row)[:, None] * N + cols[None, :]
    x = tl.load(x_ptr + here, mask=in_cols[None, :], other=0.0).to(ACC)
    at_row = (group * M + row) * K
    at_col = group * K * N + cols
    dx = zeros(w_ptr, here, K)
    for k in range(K):
        below = tl.cast(k, tl.int64) * N
        dy = tl.load(dy_ptr + k + at_row).to(ACC)[:, None]
        w = tl.load(w_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        r = tl.load(r_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        t = tl.load(t_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        _, slope = _psi_and_slope(_argument(x, t, r), dy * w, WAVELET)
        dx += slope
    tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=(rows < M)[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=["K", "steps"])
def _parameters_kernel(
    dy_ptr, x_ptr, r_ptr, t_ptr, of_psi_ptr, of_slope_v_ptr, of_slope_ptr, M, N, K, groups, tiles_m, tiles_n, steps,
    WAVELET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    of_all, tile_m, tile_n = place(tl.program_id(0).to(tl.int64), tiles_m, tiles_n)
    group = of_all % groups
    first = of_all // groups * steps
    rows = span(tile_m, BM)
    cols = span(tile_n, BN)
    row = tl.minimum(rows, M - 1)
    in_cols = cols < N
    here = row[:, None] * N + cols[None, :]
    r = tl.load(r_ptr + group * M * N + here, mask=in_cols[None, :], other=0.0)
    t = tl.load(t_ptr + group * M * N + here, mask=in_cols[None, :], other=0.0)
    of_psi = zeros(r_ptr, here, K)
    of_slope_v = of_psi
    of_slope = of_psi
    for k in tl.range(first, tl.minimum(first + steps, K), loop_unroll_factor=2):
        at = group * K + k
        dy = tl.load(dy_ptr + at * M + row).to(ACC)[:, None]
        x = tl.load(x_ptr + at * N + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
        v = _argument(x, t, r)
        psi, slope = _psi_and_slope(v, dy, WAVELET)
        if of_psi_ptr is not None:
            of_psi += psi
        if of_slope_ptr is not None:
            of_slope += slope
        if of_slope_v_ptr is not None:
            of_slope_v += slope * v
    out = of_all * M * N + here
    inside = (rows < M)[:, None] & in_cols[None, :]
    if of_psi_ptr is not None:
        tl.store(of_psi_ptr + out, of_psi, mask=inside)
    if of_slope_v_ptr is not None:
        tl.store(of_slope_v_ptr + out, of_slope_v, mask=inside)
    if of_slope_ptr is not None:
        tl.store(of_slope_ptr + out, of_slope, mask=inside)


class Edges(NamedTuple):
    """Parameters (groups, outputs, inputs) as the kernels want them, in the dtype of the arithmetic."""

    wavelet: str
    weight: Tensor  # with the factor of psi
    steepness: Tensor  # weight / s, with that of its derivative
    inverse: Tensor  # r
    translation: Tensor


def edges(x: Tensor, weight: Tensor, scale: Tensor, translation: Tensor, wavelet: str, groups: int = 1) -> Edges:
    """Those of parameters (groups · outputs, …)."""
    wide = compute_dtype(x, weight, scale, translation)
    weight, scale, translation = (
        p.to(wide).reshape(groups, len(p) // groups, -1).contiguous() for p in (weight, scale, translation)
    )
    inverse = scale.reciprocal()
    steepness = weight * inverse * _SLOPE[wavelet]
    return Edges(wavelet, weight * _PSI[wavelet], steepness, inverse * _ROOT, translation)


def forward(x: Tensor, e: Edges, bias: Tensor | None) -> Tensor:
    """y (groups, rows, outputs) of x (groups, rows, inputs), in its dtype. bias (groups · outputs,)."""
    groups, outputs, inputs = e.weight.shape
    x, rows = x.contiguous(), x.shape[1]
    y = x.new_empty(groups, rows, outputs)
    blocks = FORWARD.of(x, rows, outputs, inputs)
    programs, *tiles = tiling(blocks, groups, rows, outputs)
    by_input = (t.mT.contiguous() for t in (e.weight, e.inverse, e.translation))
    first = e.weight.new_zeros(groups * outputs) if bias is None else bias.to(e.weight.dtype).contiguous()
    launch(
        _forward_kernel, (programs,), x, *by_input, first, y, rows, outputs, inputs, *tiles,
        WAVELET=e.wavelet, ACC=accumulator(e.weight.dtype), **blocks,
    )  # fmt: skip
    return y


def input_gradient(dy: Tensor, x: Tensor, e: Edges, dtype: torch.dtype | None = None) -> Tensor:
    """dx (groups, rows, inputs) of dy (groups, rows, outputs), in that dtype, or else in x's."""
    groups, outputs, inputs = e.weight.shape
    dy, x, rows = dy.contiguous(), x.contiguous(), x.shape[1]
    dx = torch.empty_like(x, dtype=dtype)
    blocks = INPUT.of(x, rows, inputs, outputs)
    programs, *tiles = tiling(blocks, groups, rows, inputs)
    launch(
        _input_kernel, (programs,), dy, x, e.steepness, e.inverse, e.translation, dx, rows, inputs, outputs, *tiles,
        WAVELET=e.wavelet, ACC=accumulator(e.weight.dtype), **blocks,
    )  # fmt: skip
    return dx


def parameter_sums(dy: Tensor, x: Tensor, e: Edges, needed: list[bool]) -> list[Tensor | None]:
    """Sums over rows for the gradients of weight, scale and translation; None for what is not needed."""
    groups, outputs, inputs = e.weight.shape
    dy, x, rows = dy.contiguous(), x.contiguous(), x.shape[1]
    blocks = dict(PARAMETERS.of(x, outputs, inputs, rows))
    steps = blocks.pop("ROWS")
    splits = cdiv(rows, steps)
    programs, *tiles = tiling(blocks, groups * splits, outputs, inputs)
    partial = partial_sums(splits, e.weight, e.weight.dtype, needed)
    launch(
        _parameters_kernel, (programs,), dy, x, e.inverse, e.translation, *partial,
        outputs, inputs, rows, groups, *tiles, steps,
        WAVELET=e.wavelet, ACC=accumulator(e.weight.dtype), **blocks,
    )  # fmt: skip
    return [None if p is None else p.sum(0) for p in partial]


def finish(sums: list[Tensor | None], e: Edges) -> list[Tensor | None]:
    """These sums as gradients of weight, scale and translation, (groups · outputs, inputs)."""
    factors = _PSI[e.wavelet], -e.steepness / _ROOT, -e.steepness
    return [None if s is None else (s * factor).flatten(0, 1) for s, factor in zip(sums, factors, strict=True)]


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, translation: Tensor, wavelet: str, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight, scale and translation of a linear layer; None for what is not needed."""
    e = edges(x, weight, scale, translation, wavelet)
    dy, x = dy[None], x[None]
    dx = input_gradient(dy, x, e)[0] if needed[0] else None
    return [dx, *(finish(parameter_sums(dy, x, e, needed[1:4]), e) if any(needed[1:4]) else [None] * 3)]


# --- Block sizes ------------------------------------------------------------------------------------------------------


def _problem(dtype: torch.dtype, device: Any, rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Edges]:
    dy, x = (torch.randn(1, rows, n, dtype=dtype, device=device) for n in (outputs, inputs))
    wavelet = "mexican_hat" if rows > 1024 else "morlet"  # the layer's default, and the one of the largest kernels
    weight, scale, translation = 1 + torch.rand(3, outputs, inputs, device=device)
    return dy, x, edges(x, weight, scale, translation, wavelet)


FORWARD, INPUT, PARAMETERS = TUNED = edge_block_sizes(
    "wavelet_linear", _problem, forward, input_gradient, parameter_sums
)
