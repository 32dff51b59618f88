# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Triton kernels of `aptx_linear`, and of `aptx_conv2d` on patches, for one beta an output. How they walk:
`_per_edge.py`.

A neuron's tanh comes from one number w of z = S beta x. Where x has 16 bits w is tanh z itself, by one MUFU, and S is
1. Otherwise w = 1 / (1 + 2^z), by two, S being 2 / ln 2: then tanh(beta x) is 1 - 2 w. So with t = o + q w

    y = bias + sum_i x (P + Q w),    P = (alpha + o) gamma,    Q = q gamma,
    dx = sum_o dy (P + Q (w + z w')),
    T = sum_b dy x,  U = sum_b dy x w,  V = sum_b dy x^2 w':
    dalpha = gamma T,    dgamma = (alpha + o) T + q U,    dbeta = S Q V.

alpha comes for nothing: P takes the place of a 0 in a fused multiply-add. The floor is MUFU's rate, with room for 8
other instructions beside each of them; forward takes 3, the gradient of x 5, and those of the parameters 7.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._op import compute_dtype
from archzoo.kernels._per_edge import (
    edge_block_sizes,
    exp2,
    partial_sums,
    place,
    reciprocal,
    tiling,
    zeros,
)
from archzoo.kernels._triton import accumulator, cdiv, helper, launch, span, tanh

_LN2 = tl.constexpr(math.log(2))


@helper
def _bend(z, APPROXIMATE: tl.constexpr):
    """w."""
    return tanh(z, True) if APPROXIMATE else reciprocal(1.0 + exp2(z))


@helper
def _slope(w, APPROXIMATE: tl.constexpr):
    """The derivative of w by z."""
    return 1.0 - w * w if APPROXIMATE else (w * w - w) * _LN2


@triton.jit(do_not_specialize=["M", "tiles_m"])
def _forward_kernel(
    x_ptr, c_ptr, p_ptr, q_ptr, bias_ptr, y_ptr, M, N, K, tiles_m, tiles_n,
    APPROXIMATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
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
        c = tl.load(c_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        p = tl.load(p_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        q = tl.load(q_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        y += x * (p + q * _bend(c * x, APPROXIMATE))
    out = y_ptr + (group * M + row)[:, None] * N + cols[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=["M", "tiles_m"])
def _input_kernel(
    dy_ptr, x_ptr, c_ptr, p_ptr, q_ptr, dx_ptr, M, N, K, tiles_m, tiles_n,
    APPROXIMATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
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
    dx = tl.full((BM, BN), 0.0, ACC)
    for k in tl.range(0, K, loop_unroll_factor=2):
        below = tl.cast(k, tl.int64) * N
        dy = tl.load(dy_ptr + k + at_row).to(ACC)[:, None]
        c = tl.load(c_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        p = tl.load(p_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        q = tl.load(q_ptr + below + at_col, mask=in_cols, other=0.0)[None, :]
        z = c * x
        w = _bend(z, APPROXIMATE)
        dx += dy * (p + q * (w + z * _slope(w, APPROXIMATE)))
    tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=(rows < M)[:, None] & in_cols[None, :])


@triton.jit(do_not_specialize=["K", "steps"])
def _parameters_kernel(
    dy_ptr, x_ptr, c_ptr, t_ptr, u_ptr, v_ptr, M, N, K, groups, tiles_m, tiles_n, steps,
    APPROXIMATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    of_all, tile_m, tile_n = place(tl.program_id(0).to(tl.int64), tiles_m, tiles_n)
    group = of_all % groups
    first = of_all // groups * steps
    rows = span(tile_m, BM)
    cols = span(tile_n, BN)
    row = tl.minimum(rows, M - 1)
    in_cols = cols < N
    here = row[:, None] * N + cols[None, :]
    c = tl.load(c_ptr + group * M * N + here, mask=in_cols[None, :], other=0.0)
    t = zeros(c_ptr, here, K)
    u = t
    v = t
    for k in tl.range(first, tl.minimum(first + steps, K), loop_unroll_factor=2):
        at = group * K + k
        dy = tl.load(dy_ptr + at * M + row).to(ACC)[:, None]
        x = tl.load(x_ptr + at * N + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
        g = dy * x
        if t_ptr is not None:
            t += g
        if u_ptr is not None or v_ptr is not None:
            w = _bend(c * x, APPROXIMATE)
        if u_ptr is not None:
            u += g * w
        if v_ptr is not None:
            v += g * x * _slope(w, APPROXIMATE)
    out = of_all * M * N + here
    if t_ptr is not None:
        tl.store(t_ptr + out, t, mask=(rows < M)[:, None] & in_cols[None, :])
    if u_ptr is not None:
        tl.store(u_ptr + out, u, mask=(rows < M)[:, None] & in_cols[None, :])
    if v_ptr is not None:
        tl.store(v_ptr + out, v, mask=(rows < M)[:, None] & in_cols[None, :])


class Neurons(NamedTuple):
    """Parameters (groups, outputs, inputs) as the kernels want them, in the dtype of the arithmetic."""

    c: Tensor  # S beta
    p: Tensor
    q: Tensor
    alpha: Tensor | None
    gamma: Tensor
    approximate: bool

    @property
    def unfolded(self) -> tuple[float, float, float]:
        """S, o and q."""
        return (1.0, 0.0, 1.0) if self.approximate else (2 / math.log(2), 1.0, -2.0)


def neurons(x: Tensor, alpha: Tensor | None, beta: Tensor, gamma: Tensor, groups: int = 1) -> Neurons:
    """Those of alpha and gamma (groups · outputs, …), and of as many rows of beta, or a divisor of it."""
    wide, approximate = compute_dtype(x, alpha, beta, gamma), x.dtype.itemsize == 2
    beta = beta.to(wide).repeat_interleave(len(gamma) // len(beta), 0)
    shape = groups, len(gamma) // groups, -1
    of_alpha = None if alpha is None else alpha.to(wide).reshape(shape)
    beta, gamma = beta.reshape(shape), gamma.to(wide).reshape(shape)
    found = Neurons(beta, beta, beta, of_alpha, gamma, approximate)
    scale, offset, factor = found.unfolded
    p = gamma * (1 + offset) if of_alpha is None else (of_alpha + offset) * gamma
    return found._replace(c=(beta * scale).contiguous(), p=p.contiguous(), q=(gamma * factor).contiguous())


def forward(x: Tensor, n: Neurons, bias: Tensor | None) -> Tensor:
    """y (groups, rows, outputs) of x (groups, rows, inputs), in its dtype. bias (groups · outputs,)."""
    groups, outputs, inputs = n.gamma.shape
    x, rows = x.contiguous(), x.shape[1]
    y = x.new_empty(groups, rows, outputs)
    blocks = FORWARD.of(x, rows, outputs, inputs)
    programs, *tiles = tiling(blocks, groups, rows, outputs)
    by_input = (t.mT.contiguous() for t in (n.c, n.p, n.q))
    first = n.gamma.new_zeros(groups * outputs) if bias is None else bias.to(n.gamma.dtype).contiguous()
    launch(
        _forward_kernel, (programs,), x, *by_input, first, y, rows, outputs, inputs, *tiles,
        APPROXIMATE=n.approximate, ACC=accumulator(n.gamma.dtype), **blocks,
    )  # fmt: skip
    return y


def input_gradient(dy: Tensor, x: Tensor, n: Neurons, dtype: torch.dtype | None = None) -> Tensor:
    """dx (groups, rows, inputs) of dy (groups, rows, outputs), in that dtype, or else in x's."""
    groups, outputs, inputs = n.gamma.shape
    dy, x, rows = dy.contiguous(), x.contiguous(), x.shape[1]
    dx = torch.empty_like(x, dtype=dtype)
    blocks = INPUT.of(x, rows, inputs, outputs)
    programs, *tiles = tiling(blocks, groups, rows, inputs)
    launch(
        _input_kernel, (programs,), dy, x, n.c, n.p, n.q, dx, rows, inputs, outputs, *tiles,
        APPROXIMATE=n.approximate, ACC=accumulator(n.gamma.dtype), **blocks,
    )  # fmt: skip
    return dx


def parameter_sums(dy: Tensor, x: Tensor, n: Neurons, needed: list[bool]) -> list[Tensor | None]:
    """T, U and V (groups, outputs, inputs); None if neither alpha, nor beta, nor gamma needs it."""
    groups, outputs, inputs = n.gamma.shape
    need_alpha, need_beta, need_gamma = needed
    dy, x, rows = dy.contiguous(), x.contiguous(), x.shape[1]
    blocks = dict(PARAMETERS.of(x, outputs, inputs, rows))
    steps = blocks.pop("ROWS")
    splits = cdiv(rows, steps)
    programs, *tiles = tiling(blocks, groups * splits, outputs, inputs)
    partial = partial_sums(splits, n.gamma, n.gamma.dtype, [need_alpha or need_gamma, need_gamma, need_beta])
    launch(
        _parameters_kernel, (programs,), dy, x, n.c, *partial, outputs, inputs, rows, groups, *tiles, steps,
        APPROXIMATE=n.approximate, ACC=accumulator(n.gamma.dtype), **blocks,
    )  # fmt: skip
    return [None if t is None else t.sum(0) for t in partial]


def finish(sums: list[Tensor | None], n: Neurons, groups: int) -> list[Tensor | None]:
    """Gradients of alpha, beta and gamma of these sums, as rows; beta has as many as it shares among outputs."""
    t, u, v = sums
    scale, offset, factor = n.unfolded
    dalpha = dgamma = dbeta = None
    if t is not None:
        dalpha = (t * n.gamma).flatten(0, 1)
    if t is not None and u is not None:
        share = t * (1 + offset) if n.alpha is None else t * (n.alpha + offset)
        dgamma = share.add_(u, alpha=factor).flatten(0, 1)
    if v is not None:
        dbeta = (v * n.q * scale).flatten(0, 1).unflatten(0, (groups, -1)).sum(1)
    return [dalpha, dbeta, dgamma]


def backward(
    dy: Tensor, x: Tensor, alpha: Tensor | None, beta: Tensor, gamma: Tensor, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, alpha, beta and gamma of a linear layer; what is not needed may be None."""
    n = neurons(x, alpha, beta, gamma)
    dy, x = dy[None], x[None]
    dx = input_gradient(dy, x, n)[0] if needed[0] else None
    return [dx, *(finish(parameter_sums(dy, x, n, needed[1:4]), n, len(beta)) if any(needed[1:4]) else [None] * 3)]


# --- Block sizes: of 16 numbers a thread, or less where a GPU would not be filled ------------------------------------


def _problem(dtype: torch.dtype, device: Any, rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Neurons]:
    dy, x = (torch.randn(1, rows, n, dtype=dtype, device=device) for n in (outputs, inputs))
    alpha, beta, gamma = torch.randn(3, outputs, inputs, device=device)
    return dy, x, neurons(x, alpha, beta, gamma)


FORWARD, INPUT, PARAMETERS = TUNED = edge_block_sizes("aptx_linear", _problem, forward, input_gradient, parameter_sums)
