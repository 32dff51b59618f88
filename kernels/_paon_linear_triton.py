# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of `paon_linear`, forward; backward its GEMMs are torch's, and the rational function `_pade_triton`'s.

A program has a tile of outputs, and walks the inputs. It loads a tile of x once, makes its powers in registers, and
multiplies each by the weights of its degree: M + N products share one tile, and add into at most four sums in float32.
Where there are more sums, tiles are narrower, so that all stay in registers. The absolute variant with more than three
terms in its denominator would need more of them: there each term is a GEMM of torch's. With SPLIT, what rounding a
power to 16 bits takes away is multiplied too, where it goes into a denominator.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels import _pade_triton
from archzoo.kernels._block_sizes import Blocks, BlockSizes, power_of_two
from archzoo.kernels._pade_triton import smooth_value, store
from archzoo.kernels._triton import accumulator, cdiv, dot, dot_precision, launch, narrow, span
from archzoo.kernels.paon_linear import _accumulators, _degree, _powers, _work_dtype, rounding_matters


@triton.jit(do_not_specialize=["B"])
def _forward_kernel(
    x_ptr, w_ptr, v_ptr, bias_ptr, y_ptr, kept_ptr, B, D, E,
    EPS: tl.constexpr, ABSOLUTE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEGREE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Programs of GROUP blocks of rows come together, so that they share weights in the L2 cache.
    program = tl.program_id(0)
    columns = tl.cdiv(E, BN)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(B, BM) - first, GROUP)
    rows = span(first + program % (GROUP * columns) % height, BM)
    outs = span(program % (GROUP * columns) // height, BN)
    in_rows = (rows < B)[:, None]
    in_outs = (outs < E)[None, :]
    size = tl.cast(E, tl.int64) * D
    p_low = tl.full((BM, BN), 0.0, ACC)
    p = tl.full((BM, BN), 0.0, ACC)
    q_low = tl.full((BM, BN), 0.0, ACC)
    q = tl.full((BM, BN), 0.0, ACC)
    for start in range(0, D, BK):
        at = start + tl.arange(0, BK)
        x = tl.load(x_ptr + rows[:, None] * D + at[None, :], mask=in_rows & (at < D)[None, :], other=0.0)
        weight = outs[None, :] * D + at[:, None]
        inside = in_outs & (at < D)[:, None]
        wide = x.to(ACC)
        power = wide
        for k in tl.static_range(1, DEGREE + 1):
            if k > 1:
                power = power * wide
            a = narrow(power, x_ptr.dtype.element_ty) if k > 1 else x
            if k <= M:
                w = tl.load(w_ptr + (k - 1) * size + weight, mask=inside, other=0.0)
                if k == M or ABSOLUTE or N == 0:
                    p = dot(a, w, p, PRECISION)
                else:
                    p_low = dot(a, w, p_low, PRECISION)
            if k <= N:
                v = tl.load(v_ptr + (k - 1) * size + weight, mask=inside, other=0.0)
                if k == (1 if ABSOLUTE else N):
                    if SPLIT:
                        q = dot((power - a.to(ACC)).to(a.dtype), v, q, PRECISION)
                    q = dot(a, v, q, PRECISION)
                elif k == 3 and ABSOLUTE:
                    p_low = dot(a, v, p_low, PRECISION)  # which that variant has no other use for
                else:
                    if SPLIT and k > 1:
                        q_low = dot((power - a.to(ACC)).to(a.dtype), v, q_low, PRECISION)
                    q_low = dot(a, v, q_low, PRECISION)
    inside = in_rows & in_outs
    at = rows[:, None] * E + outs[None, :]
    step = tl.cast(B, tl.int64) * E
    bias = tl.full((1, BN), 0.0, ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + outs, mask=outs < E, other=0.0).to(ACC)[None, :]
    if N == 0:
        y = bias + p
    elif ABSOLUTE:
        P = bias + p
        if kept_ptr is not None:
            if M >= 1:
                store(kept_ptr, at, P, inside)
                kept_ptr += step
            store(kept_ptr, at, q, inside)
            if N >= 2:
                store(kept_ptr + step, at, q_low, inside)
            if N >= 3:
                store(kept_ptr + 2 * step, at, p_low, inside)
        y = P / (1.0 + tl.abs(q) + tl.abs(q_low) + tl.abs(p_low))
    else:
        P_low = bias + p_low
        P = P_low + p
        Q_low = q_low + 1.0
        Q = Q_low + q
        if kept_ptr is not None:
            if M >= 2:
                store(kept_ptr, at, P_low, inside)
                kept_ptr += step
            if M >= 1:
                store(kept_ptr, at, P, inside)
                kept_ptr += step
            if N >= 2:
                store(kept_ptr, at, Q_low, inside)
                kept_ptr += step
            store(kept_ptr, at, Q, inside)
        if M == 0:
            P_low = tl.full((BM, BN), 0.0, ACC)
        y, _ = smooth_value(P, P_low, Q, Q_low, EPS)
    store(y_ptr, at, y, inside)


def _fused(
    x: Tensor,
    W: Tensor | None,
    V: Tensor | None,
    bias: Tensor | None,
    absolute: bool,
    eps: float,
    y: Tensor,
    kept: Tensor | None,
) -> None:
    """All in one kernel. Tensors are contiguous, and but for the bias and y of one dtype."""
    (B, D), E, M, N = x.shape, y.shape[1], _degree(W), _degree(V)
    sums = max(1, sum(_accumulators(M, N, absolute)))
    blocks = FORWARD.of(x, B, E, sums * max(1, power_of_two(max(M, N)) // 2))
    launch(
        _forward_kernel, (cdiv(B, blocks["BM"]) * cdiv(E, blocks["BN"]),), x, W, V, bias, y, kept, B, D, E,
        EPS=eps, ABSOLUTE=absolute, M=M, N=N, DEGREE=max(M, N), SPLIT=rounding_matters(x.dtype, N, absolute),
        PRECISION=dot_precision(x.dtype), ACC=accumulator(x.dtype), **blocks,
    )  # fmt: skip


def forward(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    absolute: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, E) of x (B, D), in the dtype of x, and with `keep` the accumulators (S, B, E) of `paon_linear`."""
    work, M, N = _work_dtype(True, x, numerator, denominator), _degree(numerator), _degree(denominator)
    z, W, V = (None if t is None else t.to(work).contiguous() for t in (x, numerator, denominator))
    bias = None if bias is None else bias.contiguous()
    weight = V if W is None else W
    assert z is not None
    assert weight is not None
    B, E = x.shape[0], weight.shape[1]
    y = torch.empty(B, E, dtype=x.dtype, device=x.device)
    kept = torch.empty(sum(_accumulators(M, N, absolute)), B, E, dtype=work, device=x.device)
    if not absolute or N <= 3:
        _fused(z, W, V, bias, absolute and N > 0, eps if N > 1 else 0.0, y, kept if keep else None)
        return y, kept if keep else kept.new_empty(0, B, E)
    assert V is not None
    p, q = kept[: min(M, 1)], kept[min(M, 1) :]  # terms, of which the first becomes P
    if W is not None and M == 1:
        torch.mm(z, W[0].t(), out=p[0])
    elif W is not None:
        _fused(z, W, None, None, False, 0.0, p[0], None)
    for k, power in _powers(z, N):
        torch.mm(power, V[k - 1].t(), out=q[k - 1])
    maps = [t.unsqueeze(-1) for t in p.unbind()], q.unsqueeze(-1), bias, y.unsqueeze(-1)
    _pade_triton.forward(*maps, kept.unsqueeze(-1) if keep else None, 0.0)
    return y, kept if keep else kept.new_empty(0, B, E)


def _rule(dtype: torch.dtype, B: int, E: int, sums: int) -> Blocks:
    """By the number of sums; times 2 for degrees 3 and 4, 4 up to 8, ..., as powers and their weights take room too."""
    if dtype == torch.float64:
        return {"BM": 32, "BN": 32, "BK": 16, "GROUP": 8, "num_warps": 4, "num_stages": 2 if sums <= 16 else 1}
    narrow = dtype.itemsize == 2
    rows = max(16, min(B, 64 if sums > 4 else 128))
    cols = (128 if sums == 1 else 64) if narrow else (64 if sums <= 2 else 32)
    if cdiv(B, rows) * cdiv(E, cols) < 128:  # of a small batch, more and smaller programs
        rows, cols = min(rows, 64), 32
    warps = 8 if rows == 128 or sums > 4 else 4
    depth = (64 if sums <= 2 else 32) if narrow else 16
    stages = max(1, min(4, 192 // depth, 32 // sums))
    return {"BM": rows, "BN": cols, "BK": depth, "GROUP": 8, "num_warps": warps, "num_stages": stages}


def _candidates(dtype: torch.dtype, B: int, E: int, sums: int) -> list[Blocks]:
    own = _rule(dtype, B, E, sums)
    tiles = [(128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64), (16, 64), (16, 32)]
    return [
        {**own, "BM": rows, "BN": cols, "BK": depth, "num_warps": warps, "num_stages": stages}
        for rows, cols in tiles
        if rows <= max(16, B)
        for depth in (16, 32, 64)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if rows * cols * sums <= 128 * 32 * warps
    ]


def _problem(dtype: torch.dtype, device: Any, B: int, E: int, sums: int) -> Any:
    M, N = {1: (1, 0), 2: (1, 1), 3: (2, 1), 4: (2, 2), 8: (3, 3)}[sums]
    x, bias = torch.randn(B, 768, dtype=dtype, device=device), torch.randn(E, dtype=dtype, device=device)
    W, V = (torch.randn(n, E, 768, dtype=dtype, device=device) / 28 for n in (M, N))
    return lambda: forward(x, W, V if N else None, bias, False, 1e-6, True)


FORWARD = BlockSizes(
    "paon_linear",
    _rule,
    _candidates,
    _problem,
    [*((8192, 3072, n) for n in (2, 3, 4, 8)), (64, 3072, 4), (64, 3072, 8)],
)
TUNED = (FORWARD,)
