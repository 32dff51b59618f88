# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the backward pass of `ssd`; equations and names as there, the plan as in `_ssd_triton.py`."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._ssd_triton import (
    SIZES,
    Problem,
    borders_of,
    candidates_of,
    decay_across,
    decay_between,
    decay_from,
    decay_to,
    problem_of,
    products,
    rows_of,
    strides,
    tile,
    tiles_rule,
)
from archzoo.kernels._triton import cdiv, dot, launch, narrow


@triton.jit(do_not_specialize=["L", "K"])
def _inputs_backward_kernel(
    x_ptr, b_ptr, c_ptr, d_ptr, delta_ptr, hi_ptr, lo_ptr, order_ptr, dy_ptr, behind_ptr,
    dx_ptr, dd_ptr, dlog_ptr, ddelta_ptr,
    x_batch, x_token, b_batch, b_token, c_batch, c_token, dy_batch, dy_token, d_head, d_width,
    L, H, heads, K, p_tiles, part,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x, D and Delta x; and of Delta A, as far as what leaves the chunk has it."""
    program = tl.program_id(0)
    p_tile = program % p_tiles
    p = p_tile * BP + tl.arange(0, BP)
    head = program // p_tiles % H
    chunk = program // p_tiles // H % K
    batch = tl.cast(program // p_tiles // H // K, tl.int64)
    group, in_group = head // heads, head % heads
    q, first = tl.arange(0, Q), tl.cast(chunk, tl.int64) * Q
    in_rows = q < L - first
    at = (batch * H + head) * K * Q + first
    hi_ptr += at
    lo_ptr += at
    if order_ptr is not None:
        order_ptr += batch * L
    scores, from_behind = products(
        b_ptr + batch * b_batch + first * b_token + group * N, c_ptr + batch * c_batch + first * c_token + group * N,
        behind_ptr + (((batch * K + chunk) * (H // heads) + group) * N * heads + in_group) * P,
        q, in_rows, p, b_token, c_token, heads * P, N, P, Q, BN, BP, ACC, DOT, PRECISION,
    )  # fmt: skip
    delta = tl.load(delta_ptr + at + q)
    from_behind *= decay_from(hi_ptr, lo_ptr, order_ptr, first, L, Q)[:, None]
    mixing = scores * decay_between(hi_ptr, lo_ptr, order_ptr, first, L, False, Q)  # s by t
    dy = tile(dy_ptr + batch * dy_batch + first * dy_token + head * P, q, p, dy_token, in_rows, P, BP)
    x = tile(x_ptr + batch * x_batch + first * x_token + head * P, q, p, x_token, in_rows, P, BP)
    dinput = dot(narrow(mixing, DOT), dy.to(DOT), from_behind, PRECISION)
    if dx_ptr is not None:
        dx = dinput * delta[:, None]
        if d_ptr is not None:
            d = tl.load(d_ptr + head * d_head + p * d_width, mask=p < P, other=0.0).to(ACC)
            dx += d[None, :] * dy.to(ACC)
        inside = in_rows[:, None] & (p < P)[None, :]
        out = dx_ptr + ((batch * L + first) * H + head) * P + (q[:, None] * (H * P) + p[None, :])
        tl.store(out, narrow(dx, dx_ptr.dtype.element_ty), mask=inside)
    if dd_ptr is not None:
        out = dd_ptr + ((batch * K + chunk) * H + head) * P + p
        tl.store(out, tl.sum(dy.to(ACC) * x.to(ACC), 0), mask=p < P)
    if dlog_ptr is not None:
        out = tl.cast(p_tile, tl.int64) * part + at
        wide = x.to(ACC)
        tl.store(ddelta_ptr + out + q, tl.sum(wide * dinput, 1))
        leaving = tl.cumsum(tl.sum(wide * from_behind, 1) * delta, 0)
        # What a step and those before it leave behind the chunk is decayed by the next one; by the first comes nothing.
        tl.store(dlog_ptr + out + (q + 1) % Q, tl.where(q == Q - 1, 0.0, leaving))


@triton.jit(do_not_specialize=["L", "K", "splits", "own_heads"])
def _scores_backward_kernel(
    x_ptr, b_ptr, c_ptr, dy_ptr, delta_ptr, hi_ptr, lo_ptr, order_ptr, dscores_ptr, dlog_ptr,
    x_batch, x_token, b_batch, b_token, c_batch, c_token, dy_batch, dy_token, L, H, G, heads, K, splits, own_heads,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a group's scores C B^T; and of Delta A, as far as two steps of the chunk have it."""
    program = tl.program_id(0)
    split = program % splits
    group = program // splits % G
    chunk = program // splits // G % K
    batch = tl.cast(program // splits // G // K, tl.int64)
    q, first = tl.arange(0, Q), tl.cast(chunk, tl.int64) * Q
    in_rows = q < L - first
    x_ptr += batch * x_batch + first * x_token
    dy_ptr += batch * dy_batch + first * dy_token
    if order_ptr is not None:
        order_ptr += batch * L
    scores = tl.full((Q, Q), 0.0, ACC)  # s by t, as all that follows
    if dlog_ptr is not None:
        b_ptr += batch * b_batch + first * b_token + group * N
        c_ptr += batch * c_batch + first * c_token + group * N
        for at in range(0, N, BN):
            n = at + tl.arange(0, BN)
            b = tile(b_ptr, q, n, b_token, in_rows, N, BN).to(DOT)
            c = tile(c_ptr, q, n, c_token, in_rows, N, BN).to(DOT)
            scores = dot(b, tl.trans(c), scores, PRECISION)
    dscores = tl.full((Q, Q), 0.0, ACC)
    for step in range(own_heads):
        in_group = split * own_heads + step
        real = in_group < heads
        head = group * heads + tl.where(real, in_group, 0)
        sums = (batch * H + head) * K * Q + first
        part = tl.full((Q, Q), 0.0, ACC)
        for start in range(0, P, BP):
            p = start + tl.arange(0, BP)
            x = tile(x_ptr + head * P, q, p, x_token, in_rows & real, P, BP).to(DOT)
            dy = tile(dy_ptr + head * P, q, p, dy_token, in_rows & real, P, BP).to(DOT)
            part = dot(x, tl.trans(dy), part, PRECISION)
        part *= decay_between(hi_ptr + sums, lo_ptr + sums, order_ptr, first, L, False, Q)
        part *= tl.load(delta_ptr + sums + q)[:, None]
        dscores += part
        if dlog_ptr is not None:
            # Step i decays what goes from s < i to t >= i. Summed by pairs, as sums by t less those by s would drown
            # what is small in rounding. Row s has the sums of the step behind s; those of the first are 0.
            passing = tl.where(q[:, None] < q[None, :], tl.cumsum(part * scores, 0), 0.0)
            tl.store(dlog_ptr + sums + (q + 1) % Q, tl.sum(passing, 1), mask=real)
    if dscores_ptr is not None:
        out = dscores_ptr + tl.cast(program, tl.int64) * Q * Q
        tl.store(out + (q[:, None] * Q + q[None, :]), dscores)


@triton.jit(do_not_specialize=["L", "K", "splits", "own_heads", "dscores_parts"])
def _weights_backward_kernel(
    x_ptr, b_ptr, c_ptr, dy_ptr, delta_ptr, hi_ptr, lo_ptr, order_ptr, borders_ptr, behind_ptr, dscores_ptr,
    db_ptr, dc_ptr, dlog_ptr,
    x_batch, x_token, b_batch, b_token, c_batch, c_token, dy_batch, dy_token,
    L, H, G, heads, K, n_tiles, splits, own_heads, dscores_parts, part,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C, summed over heads of a group; and of Delta A, as far as the state before the chunk has it.

    With several splits of a group's heads, each writes its own sums.
    """
    program = tl.program_id(0)
    n_tile = program % n_tiles
    n = n_tile * BN + tl.arange(0, BN)
    group = program // n_tiles % G
    chunk = program // n_tiles // G % K
    split = program // n_tiles // G // K % splits
    batch = tl.cast(program // n_tiles // G // K // splits, tl.int64)
    q, first = tl.arange(0, Q), tl.cast(chunk, tl.int64) * Q
    in_rows = q < L - first
    x_ptr += batch * x_batch + first * x_token
    dy_ptr += batch * dy_batch + first * dy_token
    if order_ptr is not None:
        order_ptr += batch * L
    c = tile(c_ptr + batch * c_batch + first * c_token + group * N, q, n, c_token, in_rows, N, BN).to(DOT)
    db = tl.full((Q, BN), 0.0, ACC)
    dc = tl.full((Q, BN), 0.0, ACC)
    for step in range(own_heads):
        in_group = split * own_heads + step
        real = in_group < heads
        head = group * heads + tl.where(real, in_group, 0)
        at = (batch * H + head) * K * Q + first
        leave = decay_from(hi_ptr + at, lo_ptr + at, order_ptr, first, L, Q) * tl.load(delta_ptr + at + q)
        state = (((batch * K + chunk) * G + group) * N * heads + head % heads) * P
        entering = tl.full((Q, BN), 0.0, ACC)
        kept = tl.full((), 0.0, ACC)
        for start in range(0, P, BP):
            p = start + tl.arange(0, BP)
            x = tile(x_ptr + head * P, q, p, x_token, in_rows & real, P, BP)
            dy = tile(dy_ptr + head * P, q, p, dy_token, in_rows & real, P, BP).to(DOT)
            border = tile(borders_ptr + state, n, p, heads * P, (n < N) & real, P, BP)
            behind = tile(behind_ptr + state, n, p, heads * P, (n < N) & real, P, BP)
            entering = dot(dy, tl.trans(border), entering, PRECISION)
            db = dot(narrow(x.to(ACC) * leave[:, None], DOT), tl.trans(behind), db, PRECISION)
            if dlog_ptr is not None:
                kept += tl.sum(tl.sum(border.to(ACC) * behind.to(ACC), 1), 0)
        entering *= decay_to(hi_ptr + at, order_ptr, first, L, Q)[:, None]
        dc += entering
        if dlog_ptr is not None:
            through = kept * decay_across(hi_ptr + at, order_ptr, first, L, Q)
            entered = tl.cumsum(tl.sum(entering * c.to(ACC), 1), 0, reverse=True)
            tl.store(dlog_ptr + tl.cast(n_tile, tl.int64) * part + at + q, entered + through, mask=real)
    inside = in_rows[:, None] & (n < N)[None, :]
    out = (((batch * splits + split) * L + first) * G + group) * N + (q[:, None] * (G * N) + n[None, :])
    if dscores_ptr is not None:  # in slices, or registers spill
        b_ptr += batch * b_batch + first * b_token + group * N
        c_ptr += batch * c_batch + first * c_token + group * N
        dscores_ptr += ((batch * K + chunk) * G + group) * dscores_parts * Q * Q
        for begin in range(0, tl.where(split == 0, Q, 0), 16):
            own = begin + tl.arange(0, 16)
            by_t = tl.full((Q, 16), 0.0, ACC)
            by_s = tl.full((Q, 16), 0.0, ACC)
            for index in range(dscores_parts):
                by_t += tl.load(dscores_ptr + (index * (Q * Q) + q[:, None] * Q + own[None, :]))
                by_s += tl.load(dscores_ptr + (index * (Q * Q) + own[None, :] * Q + q[:, None]))
            in_own = own < L - first
            db = dot(narrow(by_t, DOT), tile(c_ptr, own, n, c_token, in_own, N, BN).to(DOT), db, PRECISION)
            dc = dot(narrow(by_s, DOT), tile(b_ptr, own, n, b_token, in_own, N, BN).to(DOT), dc, PRECISION)
    if db_ptr is not None:
        tl.store(db_ptr + out, narrow(db, db_ptr.dtype.element_ty), mask=inside)
    if dc_ptr is not None:
        tl.store(dc_ptr + out, narrow(dc, dc_ptr.dtype.element_ty), mask=inside)


# --- Host -------------------------------------------------------------------------------------------------------------


def _inputs(
    problem: Problem,
    dy: Tensor,
    behind: Tensor,
    dx: Tensor | None,
    dD: Tensor | None,
    dlog: Tensor | None,
    ddelta: Tensor | None,
) -> None:
    """Fills the gradients of x and D, and first parts of those of Delta A and Delta x."""
    sums = None
    if dD is not None:
        shape = problem.batch * problem.chunks, problem.heads, problem.width
        sums = torch.empty(shape, dtype=problem.dtype, device=dy.device)
    blocks = INPUTS.of(problem.x, problem.steps, problem.width, problem.states)
    problem.over_chunks(_inputs_backward_kernel, (dy, behind, dx, sums, dlog, ddelta), (dy,), blocks)
    if dD is not None and sums is not None:
        dD.copy_(sums.sum(0 if dD.dim() == 2 else (0, 2)))


def _scores(problem: Problem, dy: Tensor, need_scores: bool, dlog: Tensor | None) -> Tensor | None:
    """Gradients of the scores (batch, K, G, parts, Q, Q), to be summed, and a part of that of Delta A."""
    blocks, heads = dict(SCORES.of(problem.x, *_groups(problem))), problem.heads // problem.groups
    own = cdiv(heads, blocks.pop("SPLITS"))
    splits, Q = cdiv(heads, own), problem.steps
    shape = problem.batch, problem.chunks, problem.groups, splits, Q, Q
    dscores = torch.empty(shape, dtype=problem.dtype, device=dy.device) if need_scores else None
    launch(
        _scores_backward_kernel, (problem.batch * problem.chunks * problem.groups * splits,),
        problem.x, problem.B, problem.C, dy, *problem.sums, dscores, dlog,
        *strides(problem.x, problem.B, problem.C, dy),
        problem.length, problem.heads, problem.groups, heads, problem.chunks, splits, own,
        **problem.sizes, **problem.products, **blocks,
    )  # fmt: skip
    return dscores


def _weights(
    problem: Problem,
    dy: Tensor,
    borders: Tensor,
    behind: Tensor,
    dscores: Tensor | None,
    dB: Tensor | None,
    dC: Tensor | None,
    dlog: Tensor | None,
) -> None:
    """Fills the gradients of B and C, and last parts of that of Delta A."""
    blocks, heads = dict(WEIGHTS.of(problem.x, *_groups(problem))), problem.heads // problem.groups
    own = cdiv(heads, blocks.pop("SPLITS"))
    splits, tiles = cdiv(heads, own), cdiv(problem.states, blocks["BN"])
    shape = problem.batch, splits, problem.length, problem.groups, problem.states
    parts = [
        t if t is None or splits == 1 else torch.empty(shape, dtype=problem.dtype, device=t.device) for t in (dB, dC)
    ]
    launch(
        _weights_backward_kernel, (problem.batch * splits * problem.chunks * problem.groups * tiles,),
        problem.x, problem.B, problem.C, dy, *problem.sums, borders, behind, dscores, *parts, dlog,
        *strides(problem.x, problem.B, problem.C, dy),
        problem.length, problem.heads, problem.groups, heads, problem.chunks, tiles, splits, own,
        1 if dscores is None else dscores.shape[3], problem.part,
        **problem.sizes, **problem.products, **blocks,
    )  # fmt: skip
    for t, part in zip((dB, dC), parts, strict=True):
        if t is not None and part is not None and splits > 1:
            t.copy_(part.sum(1))


def _groups(problem: Problem) -> tuple[int, ...]:
    """Sizes by which kernels of groups choose their blocks."""
    programs, heads = problem.batch * problem.chunks * problem.groups, problem.heads // problem.groups
    return programs, heads, problem.steps, problem.width, problem.states


def backward(
    problem: Problem,
    dout: Tensor | None,
    dfinal: Tensor | None,
    inputs: Sequence[Tensor | None],
    borders: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; not needed, they come back with no elements."""
    x, z = inputs[0], inputs[6]
    assert x is not None
    found = [
        None if t is None or not need else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t, need in zip(inputs, needed, strict=False)
    ]
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = found
    dy = torch.zeros_like(x) if dout is None else dout
    if z is not None:
        dout, dy = dy, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        problem.gate_backward(z, borders, dout, dz, dy)
    dy, behind = rows_of(dy), torch.empty_like(borders)
    problem.walk(dy, problem.C, dfinal, behind, dinitial, reverse=True)
    dlog = ddelta = None
    leaving = within = entering = None  # the parts of dlog
    if ddt is not None or dA is not None or dbias is not None:
        early = cdiv(problem.width, INPUTS.of(problem.x, problem.steps, problem.width, problem.states)["BP"])
        late = cdiv(problem.states, WEIGHTS.of(problem.x, *_groups(problem))["BN"])
        dlog, ddelta = problem.own_steps.vector(early + 1 + late), problem.own_steps.vector(early)
        leaving, within, entering = dlog.split((early, 1, late))
    if dx is not None or dD is not None or dlog is not None:
        _inputs(problem, dy, behind, dx, dD, leaving, ddelta)
    need_scores = dB is not None or dC is not None
    if need_scores or dlog is not None:
        dscores = _scores(problem, dy, need_scores, within)
        _weights(problem, dy, borders, behind, dscores, dB, dC, entering)
    if dlog is not None and ddelta is not None:
        problem.own_steps.backward(dlog, ddelta, ddt, dA, dbias)
    return [x.new_empty(0) if t is None else t for t in found]


# --- Block sizes ------------------------------------------------------------------------------------------------------


def _inputs_rule(dtype: torch.dtype, Q: int, P: int, N: int) -> Blocks:
    return tiles_rule(dtype, Q, P, N, (64, 64), (16, 32))


def _splits(programs: int, heads: int, at_least: int) -> int:
    """Of a group's heads, where chunks alone do not give two programs for each of 132 multiprocessors."""
    return max(1, min(heads // at_least, 264 // max(1, programs)))


def _scores_rule(dtype: torch.dtype, programs: int, heads: int, Q: int, P: int, N: int) -> Blocks:
    return {**tiles_rule(dtype, Q, P, N, (64, 64), (32, 16)), "SPLITS": _splits(programs, heads, 8)}


def _weights_rule(dtype: torch.dtype, programs: int, heads: int, Q: int, P: int, N: int) -> Blocks:
    blocks = tiles_rule(dtype, Q, P, N, (64, 32), (32, 16))
    return {**blocks, "SPLITS": _splits(programs * max(1, N // blocks["BN"]), heads, 8)}


def _inputs_problem(dtype: torch.dtype, device: Any, Q: int, P: int, N: int) -> Any:
    problem = problem_of(dtype, device, 4096, 64, Q, P, N)
    dx, behind, early = torch.randn_like(problem.x), borders_of(problem), P // 16 + 1
    return lambda: _inputs(
        problem, problem.x, behind, dx, None, problem.own_steps.vector(early), problem.own_steps.vector(early)
    )


def _weights_problem(dtype: torch.dtype, device: Any, programs: int, heads: int, Q: int, P: int, N: int) -> Any:
    problem = problem_of(dtype, device, programs * Q, heads, Q, P, N)
    borders, behind, dlog = borders_of(problem), borders_of(problem), problem.own_steps.vector(N // 16 + 1)
    dB, dC = torch.empty(2, 1, programs * Q, 1, N, dtype=dtype, device=device).unbind()
    dscores = torch.randn(1, programs, 1, 1, Q, Q, dtype=problem.dtype, device=device)
    return lambda: _weights(problem, problem.x, borders, behind, dscores, dB, dC, dlog)


def _scores_problem(dtype: torch.dtype, device: Any, programs: int, heads: int, Q: int, P: int, N: int) -> Any:
    problem = problem_of(dtype, device, programs * Q, heads, Q, P, N)
    dlog = problem.own_steps.vector(1)
    return lambda: _scores(problem, problem.x, True, dlog)


_SIZES_OF_GROUPS = [(256, 24, *SIZES[0]), (32, 24, *SIZES[1])]

INPUTS = BlockSizes("ssd_backward_inputs", _inputs_rule, candidates_of(_inputs_rule), _inputs_problem, SIZES)
SCORES = BlockSizes("ssd_backward_scores", _scores_rule, candidates_of(_scores_rule), _scores_problem, _SIZES_OF_GROUPS)
WEIGHTS = BlockSizes(
    "ssd_backward_weights", _weights_rule, candidates_of(_weights_rule), _weights_problem, _SIZES_OF_GROUPS
)
TUNED = (INPUTS, SCORES, WEIGHTS)
