# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `capsule_routing`; equations and names as there, but for L, the I there.

Votes of one lower capsule for a block of samples are one product of BN x K by K x J D numbers, made where they are
needed, and stay in registers. A round is one kernel, whose programs have a block of samples and STEPS lower capsules,
and one that adds up what they leave, and squashes. Backward has such a pair for each round but the first, and then one
kernel whose programs have a lower capsule, all samples and all rounds, so that gradients of u and W are whole there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes, power_of_two
from archzoo.kernels._triton import accumulator, cdiv, dot, dot_precision, helper, launch, span


@helper
def _vectors(ptr, rows, N, J, D, JP: tl.constexpr, DP: tl.constexpr):
    """Where vectors (N, J, D) of a block of samples are, (BN, JP, DP), and which of them there are."""
    j = tl.arange(0, JP)[None, :, None]
    d = tl.arange(0, DP)[None, None, :]
    n = rows[:, None, None]
    return ptr + (n * J + j) * D + d, (n < N) & (j < J) & (d < D)


@helper
def _read(ptr, rows, N, J, D, JP: tl.constexpr, DP: tl.constexpr, ACC: tl.constexpr):
    at, inside = _vectors(ptr, rows, N, J, D, JP, DP)
    return tl.load(at, mask=inside, other=0.0).to(ACC)


@helper
def _lower(u_ptr, rows, i, N, L, K, KP: tl.constexpr, ACC: tl.constexpr):
    """u_i of a block of samples, (BN, KP)."""
    k = tl.arange(0, KP)[None, :]
    n = rows[:, None]
    return tl.load(u_ptr + (n * L + i) * K + k, mask=(n < N) & (k < K) & (i < L), other=0.0).to(ACC)


@helper
def _weight(w_ptr, i, J, D, K, JP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, ACC: tl.constexpr):
    """W_i, (KP, JP DP), of W as (L, K, J, D)."""
    k = tl.arange(0, KP)[:, None]
    jd = tl.arange(0, JP * DP)[None, :]
    inside = (k < K) & (jd // DP < J) & (jd % DP < D)
    return tl.load(w_ptr + ((i * K + k) * J + jd // DP) * D + jd % DP, mask=inside, other=0.0).to(ACC)


@helper
def _couple(logits, J, LEAKY: tl.constexpr, JP: tl.constexpr):
    """Softmax of (BN, JP) over the upper capsules; leaky: with one logit of 0 more."""
    there = (tl.arange(0, JP) < J)[None, :]
    logits = tl.where(there, logits, float("-inf"))
    most = tl.max(logits, 1)
    if LEAKY:
        most = tl.where(most < 0, most * 0.0, most)
    shares = tl.where(there, tl.exp(logits - most[:, None]), 0.0)
    total = tl.sum(shares, 1)
    if LEAKY:
        total += tl.exp(-most)
    return shares / total[:, None]


@helper
def _slope(shares, dshares):
    """Gradient of the logits by that of their softmax."""
    return shares * (dshares - tl.sum(shares * dshares, 1)[:, None])


@triton.jit
def _round_kernel(
    u_ptr, w_ptr, total_ptr, ds_ptr, partial_ptr, N, L, J, D, K, tiles,
    LEAKY: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Programs of the same capsules come together: they read the same weights.
    program = tl.program_id(0)
    chunk = tl.cast(program // tiles, tl.int64)
    rows = span(program % tiles, BN)
    s = tl.full((BN, JP, DP), 0.0, ACC)
    if total_ptr is not None:
        V = _read(total_ptr, rows, N, J, D, JP, DP, ACC)
    if ds_ptr is not None:
        ds = _read(ds_ptr, rows, N, J, D, JP, DP, ACC)
    for step in range(STEPS):
        i = chunk * STEPS + step
        u = _lower(u_ptr, rows, i, N, L, K, KP, ACC)
        w = _weight(w_ptr, tl.minimum(i, L - 1), J, D, K, JP, DP, KP, ACC)
        votes = tl.reshape(dot(u, w, tl.full((BN, JP * DP), 0.0, ACC), PRECISION), (BN, JP, DP))
        if total_ptr is None:
            s += votes
        else:
            shares = _couple(tl.sum(votes * V, 2), J, LEAKY, JP)
            if ds_ptr is not None:
                shares = _slope(shares, tl.sum(votes * ds, 2))
            s += shares[:, :, None] * votes
    if total_ptr is None:
        s = s / (tl.full((1, 1, 1), 0.0, ACC) + (J + LEAKY))
    at, inside = _vectors(partial_ptr + chunk * N * J * D, rows, N, J, D, JP, DP)
    tl.store(at, s, mask=inside)


@helper
def _square(s, TINY: tl.constexpr):
    """|s|^2 (ROWS, 1), at least TINY."""
    square = tl.sum(s * s, 1)[:, None]
    return tl.where(square < TINY, square * 0.0 + TINY, square)


@helper
def _gather(partial_ptr, at, inside, chunks, step, start):
    for chunk in range(chunks):
        start += tl.load(partial_ptr + chunk * step + at, mask=inside, other=0.0)
    return start


@triton.jit
def _squash_kernel(
    partial_ptr, bias_ptr, s_ptr, before_ptr, total_ptr, v_ptr, R, J, D, chunks, step,
    TINY: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = span(tl.program_id(0), ROWS)
    d = tl.arange(0, DP)[None, :]
    inside = (rows < R)[:, None] & (d < D)
    at = rows[:, None] * D + d
    s = _gather(partial_ptr, at, inside, chunks, step, tl.full((ROWS, DP), 0.0, ACC))
    if bias_ptr is not None:
        s += tl.load(bias_ptr + (rows % J)[:, None] * D + d, mask=inside, other=0.0).to(ACC)
    tl.store(s_ptr + at, s, mask=inside)
    square = _square(s, TINY)
    v = s * (tl.sqrt(square) / (1.0 + square))
    if v_ptr is not None:
        tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=inside)
    else:
        if before_ptr is not None:
            v += tl.load(before_ptr + at, mask=inside, other=0.0)
        tl.store(total_ptr + at, v, mask=inside)


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
        g = _gather(partial_ptr, at, inside, chunks, step, g)
        tl.store(g_ptr + at, g, mask=inside)
    s = tl.load(s_ptr + at, mask=inside, other=0.0)
    square = _square(s, TINY)
    n = tl.sqrt(square)
    below = 1.0 + square
    along = tl.sum(s * g, 1)[:, None] / n
    tl.store(ds_ptr + at, g * (n / below) + s * (along * ((1.0 - square) / (below * below))), mask=inside)


@triton.jit
def _gradients_kernel(
    u_ptr, w_ptr, totals_ptr, ds_ptr, du_ptr, dw_ptr, N, L, J, D, K, T, first, step,
    LEAKY: tl.constexpr, DETACH: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    w = _weight(w_ptr, i, J, D, K, JP, DP, KP, ACC)
    dw = tl.full((KP, JP * DP), 0.0, ACC)
    k = tl.arange(0, KP)
    for start in range(0, N, BN):
        rows = start + tl.arange(0, BN).to(tl.int64)
        u = _lower(u_ptr, rows, i, N, L, K, KP, ACC)
        votes = tl.reshape(dot(u, w, tl.full((BN, JP * DP), 0.0, ACC), PRECISION), (BN, JP, DP))
        dvotes = tl.full((BN, JP, DP), 0.0, ACC)
        if not DETACH:  # the first round, in which all couplings are alike
            dvotes += _read(ds_ptr, rows, N, J, D, JP, DP, ACC) / (tl.full((1, 1, 1), 0.0, ACC) + (J + LEAKY))
        for t in range(first, T):
            V = _read(totals_ptr + (t - 1) * step, rows, N, J, D, JP, DP, ACC)
            ds = _read(ds_ptr + t * step, rows, N, J, D, JP, DP, ACC)
            shares = _couple(tl.sum(votes * V, 2), J, LEAKY, JP)
            dvotes += shares[:, :, None] * ds
            if not DETACH:
                dvotes += _slope(shares, tl.sum(votes * ds, 2))[:, :, None] * V
        if du_ptr is not None:  # K sums over J D numbers: as a product, it would need too many registers
            for a in range(K):
                of_k, there = _vectors(w_ptr + (i * K + a) * J * D, tl.arange(0, 1), 1, J, D, JP, DP)
                column = tl.sum(tl.sum(dvotes * tl.load(of_k, mask=there, other=0.0).to(ACC), 2), 1)
                at = du_ptr + (rows * L + i) * K + a
                tl.store(at, column.to(du_ptr.dtype.element_ty), mask=rows < N)
        if dw_ptr is not None:
            dw = dot(tl.trans(u), tl.reshape(dvotes, (BN, JP * DP)), dw, PRECISION)
    if dw_ptr is not None:
        jd = tl.arange(0, JP * DP)[None, :]
        at = ((i * J + jd // DP) * D + jd % DP) * K + k[:, None]
        inside = (k < K)[:, None] & (jd // DP < J) & (jd % DP < D)
        tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), mask=inside)


class _Routing:
    """Sizes and launches that the two passes have in common."""

    def __init__(self, u: Tensor, weight: Tensor, wide: torch.dtype, leaky: bool):
        self.N, self.L, self.K = u.shape
        self.J, self.D = weight.shape[1:3]
        self.u, self.weight, self.wide, self.leaky = (
            u.contiguous(),
            weight.permute(0, 3, 1, 2).contiguous(),
            wide,
            leaky,
        )
        exact = u.dtype.itemsize == weight.dtype.itemsize == 2  # such numbers are tf32's too
        self.constants = {
            "LEAKY": int(leaky),
            "JP": max(4, power_of_two(self.J)),
            "DP": max(4, power_of_two(self.D)),
            "KP": max(16, power_of_two(self.K)),
            "PRECISION": "tf32" if exact else dot_precision(wide),
            "ACC": accumulator(wide),
        }

    def empty(self, *leading: int) -> Tensor:
        """Vectors of the upper capsules, (*, N, J, D)."""
        return torch.empty(*leading, self.N, self.J, self.D, dtype=self.wide, device=self.u.device)

    def pass_over(self, total: Tensor | None, ds: Tensor | None = None) -> Tensor:
        """What the chunks of lower capsules add to s, or with `ds` to the gradient of V, (chunks, N, J, D)."""
        N, L, J, D, K = self.N, self.L, self.J, self.D, self.K
        blocks = FORWARD.of(self.u, N, L, J * D, K)
        tiles, chunks = cdiv(N, blocks["BN"]), cdiv(L, blocks["STEPS"])
        partial = self.empty(chunks)
        launch(
            _round_kernel, (tiles * chunks,), self.u, self.weight, total, ds, partial, N, L, J, D, K, tiles,
            **self.constants, **blocks,
        )  # fmt: skip
        return partial

    def by_vector(self, kernel: Any, *args: Any) -> None:
        """Starts a kernel that has some vectors a program."""
        size = {name: self.constants[name] for name in ("DP", "ACC")}
        rows, tiny = max(1, 512 // size["DP"]), torch.finfo(self.wide).tiny
        launch(kernel, (cdiv(self.N * self.J, rows),), *args, TINY=tiny, ROWS=rows, num_warps=4, **size)


def forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool, dtype: torch.dtype, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """v (N, J, D) in the given dtype, and the s of every round (T, N, J, D) in the dtype `wide`."""
    routing = _Routing(u, weight, wide, leaky)
    J, D, size = routing.J, routing.D, routing.N * routing.J * routing.D
    bias = None if bias is None else bias.contiguous()
    sums, v = routing.empty(iterations), routing.empty().to(dtype)
    totals: list[Tensor | None] = [None]
    for t in range(iterations):
        partial, last = routing.pass_over(totals[-1]), t == iterations - 1
        total = None if last else routing.empty()
        routing.by_vector(
            _squash_kernel, partial, bias, sums[t], totals[-1], total, v if last else None,
            routing.N * J, J, D, len(partial), size,
        )  # fmt: skip
        totals = [total]
    return v, sums


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
    routing = _Routing(u, weight, sums.dtype, leaky)
    N, L, J, D, K, T = routing.N, routing.L, routing.J, routing.D, routing.K, len(sums)
    size, detach = N * J * D, detach and T > 1
    # Through each round's s, from the last to the first; through V that reaches all v before it.
    ds, later, partial = routing.empty(T), dv.contiguous(), None
    for t in range(T - 1, -1, -1):
        g = None if partial is None else routing.empty()
        chunks = 0 if partial is None else len(partial)
        of_v = later if partial is None or t < T - 2 else None
        routing.by_vector(_squash_backward_kernel, partial, of_v, sums[t], g, ds[t], N * J, D, chunks, size)
        if detach:
            break
        if t:
            later = later if g is None else g
            partial = routing.pass_over(totals[t - 1], ds[t])
    du = torch.empty_like(routing.u) if need_u else None
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    if du is not None or dw is not None:
        blocks = BACKWARD.of(u, N, L, J * D, K)
        launch(
            _gradients_kernel, (L,), routing.u, routing.weight, totals, ds, du, dw, N, L, J, D, K, T,
            T - 1 if detach else 1, size, DETACH=detach, **routing.constants, **blocks,
        )  # fmt: skip
    return du, dw, (ds[-1:] if detach else ds).sum((0, 1)) if need_bias else None


def _rule(dtype: torch.dtype, N: int, L: int, JD: int, K: int) -> Blocks:
    return {"BN": 16, "num_warps": 4 if JD <= 128 else 8}


def _forward_rule(dtype: torch.dtype, N: int, L: int, JD: int, K: int) -> Blocks:
    # The partial sums are at most a fifth of the inputs' bytes, which at 256 samples leaves two programs a processor.
    chunks = min(max(1, L * K * (N + JD) // (5 * N * JD)), max(1, 512 * 16 // N))
    return {**_rule(dtype, N, L, JD, K), "STEPS": cdiv(L, chunks)}


def _candidates(dtype: torch.dtype, N: int, L: int, JD: int, K: int) -> list[Blocks]:
    return [{"BN": rows, "num_warps": warps} for rows in (16, 32) for warps in (4, 8, 16) if rows * JD <= 2048 * warps]


def _forward_candidates(dtype: torch.dtype, N: int, L: int, JD: int, K: int) -> list[Blocks]:
    steps = _forward_rule(dtype, N, L, JD, K)["STEPS"]
    return [{**b, "STEPS": s} for b in _candidates(dtype, N, L, JD, K) for s in (steps, 2 * steps)]


def _inputs(dtype: torch.dtype, device: Any, N: int, L: int, JD: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    u, weight = torch.randn(N, L, K, dtype=dtype, device=device), torch.randn(L, JD // 16, 16, K, device=device)
    return u, weight.to(dtype), torch.randn(JD // 16, 16, dtype=dtype, device=device)


def _forward_problem(dtype: torch.dtype, device: Any, *sizes: int) -> Any:
    inputs = _inputs(dtype, device, *sizes)
    return lambda: forward(*inputs, 3, False, dtype, torch.float32)


def _backward_problem(dtype: torch.dtype, device: Any, *sizes: int) -> Any:
    u, weight, _ = _inputs(dtype, device, *sizes)
    sums = torch.randn(3, sizes[0], *weight.shape[1:3], device=device)
    dv = torch.randn(sums.shape[1:], dtype=dtype, device=device)
    return lambda: backward(dv, u, weight, sums, sums[:-1].clone(), False, False, True, True, True)


_SIZES = [(256, 1152, 160, 8), (16, 2048, 256, 16)]

FORWARD = BlockSizes("capsule_routing", _forward_rule, _forward_candidates, _forward_problem, _SIZES)
BACKWARD = BlockSizes("capsule_routing_backward", _rule, _candidates, _backward_problem, _SIZES)
TUNED = (FORWARD, BACKWARD)
