# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the state space dual; equations and names as in `ssd.py`, with K chunks of Q steps.

`_states_kernel` walks the chunks in order with the state of a head in registers, and leaves a copy of it before each
chunk in the dtype of the products; backward it walks from the end, with C for B and dy for x. Where heads are too few
for all multiprocessors, time is cut into segments: each is walked from zero first, and the second time from what those
before it left. All else is one program a chunk and head, or a chunk and group for the gradients of B and C, which adds
up over heads in registers. Products of a chunk's C and B are made again for each head: tensor cores wait for memory,
which moves x twice and out once, and N / Q numbers of states for each of x twice; backward about three times that.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._scan import state_dtype
from archzoo.kernels._ssd import Options, product_dtype
from archzoo.kernels._ssd_steps_triton import Steps
from archzoo.kernels._triton import accumulator, cdiv, dot, dot_precision, helper, launch, narrow, sigmoid

# --- What a chunk's kernels share -------------------------------------------------------------------------------------


@helper
def tile(ptr, rows, cols, stride, in_rows, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and a BLOCK of columns, in int32, of a matrix of COLS columns, in its own dtype; 0 outside."""
    inside = in_rows[:, None]
    if COLS % BLOCK != 0:
        inside = inside & (cols < COLS)[None, :]
    return tl.load(ptr + (rows[:, None] * stride + cols[None, :]), mask=inside, other=0.0)


# Of a chunk whose first step is `first` of L: its sums are at hi and lo; `order` numbers the sequences of the row, and
# is None if it has only one.


@helper
def _sequence_before(order, first):
    return tl.load(order + first - 1, mask=first > 0, other=0)


@helper
def _sequences(order, first, L, Q: tl.constexpr):
    """Of each step, and of the last one."""
    q = tl.arange(0, Q)
    return tl.load(order + first + q, mask=q < L - first, other=-1), tl.load(order + tl.minimum(first + Q, L) - 1)


@helper
def decay_to(hi, order, first, L, Q: tl.constexpr):
    """exp(cs_t), what is left at a token of the state before its chunk, (Q,)."""
    decay = tl.exp2(tl.load(hi + tl.arange(0, Q)))
    if order is not None:
        own, _ = _sequences(order, first, L, Q)
        decay = tl.where(own == _sequence_before(order, first), decay, 0.0)
    return decay


@helper
def decay_from(hi, lo, order, first, L, Q: tl.constexpr):
    """exp(cs_end - cs_s), what is left of a token behind its chunk, (Q,)."""
    q = tl.arange(0, Q)
    decay = tl.exp2((tl.load(hi + Q - 1) - tl.load(hi + q)) + (tl.load(lo + Q - 1) - tl.load(lo + q)))
    if order is not None:
        own, last = _sequences(order, first, L, Q)
        decay = tl.where(own == last, decay, 0.0)
    return decay


@helper
def decay_across(hi, order, first, L, Q: tl.constexpr):
    """exp(cs_end), what is left of a state behind a chunk."""
    decay = tl.exp2(tl.load(hi + Q - 1))
    if order is not None:
        _, last = _sequences(order, first, L, Q)
        decay = tl.where(last == _sequence_before(order, first), decay, 0.0)
    return decay


@helper
def decay_between(hi, lo, order, first, L, ROWS_ARE_LATER: tl.constexpr, Q: tl.constexpr):
    """exp(cs_t - cs_s) for t >= s and 0 elsewhere: (t, s) if ROWS_ARE_LATER, or else (s, t)."""
    q = tl.arange(0, Q)
    high, low = tl.load(hi + q), tl.load(lo + q)
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    keep = q[:, None] >= q[None, :]
    if not ROWS_ARE_LATER:
        difference = -difference
        keep = q[:, None] <= q[None, :]
    if order is not None:
        own, _ = _sequences(order, first, L, Q)
        keep &= own[:, None] == own[None, :]
    return tl.where(keep, tl.exp2(difference), 0.0)


@helper
def products(
    u_ptr, w_ptr, state_ptr, q, in_rows, p, u_token, w_token, state_row,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u w^T (Q, Q) and u state (Q, BP), of a chunk's u and w (Q, N) and a state (N, P)."""
    scores = tl.full((Q, Q), 0.0, ACC)
    y = tl.full((Q, BP), 0.0, ACC)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        u = tile(u_ptr, q, n, u_token, in_rows, N, BN).to(DOT)
        w = tile(w_ptr, q, n, w_token, in_rows, N, BN).to(DOT)
        scores = dot(u, tl.trans(w), scores, PRECISION)
        y = dot(u, tile(state_ptr, n, p, state_row, n < N, P, BP).to(DOT), y, PRECISION)
    return scores, y


# --- States -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["L", "K", "segments", "chunks"])
def _states_kernel(
    v_ptr, w_ptr, delta_ptr, hi_ptr, lo_ptr, order_ptr, first_ptr, totals_ptr, scales_ptr, borders_ptr, last_ptr,
    v_batch, v_token, w_batch, w_token, L, H, heads, K, segments, chunks, n_tiles, p_tiles,
    REVERSE: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    q = tl.arange(0, Q)
    n = program % n_tiles * BN + tl.arange(0, BN)
    p = program // n_tiles % p_tiles * BP + tl.arange(0, BP)
    program = program // n_tiles // p_tiles
    segment, head = program % segments, program // segments % H
    row = tl.cast(program // segments, tl.int64)  # batch * H + head
    batch = row // H
    inside = (n < N)[:, None] & (p < P)[None, :]
    v_ptr += batch * v_batch + head * P
    w_ptr += batch * w_batch + head // heads * N
    if order_ptr is not None:
        order_ptr += batch * L
    state = tl.full((BN, BP), 0.0, ACC)
    scale = tl.full((), 1.0, ACC)
    across = n[:, None] * P + p[None, :]
    if borders_ptr is not None:
        if first_ptr is not None:
            turned = first_ptr + row * P * N + (p[None, :] * N + n[:, None])
            state = tl.load(turned, mask=inside, other=0.0).to(ACC)
        if totals_ptr is not None:
            for earlier in range(segment):
                at = row * segments + earlier
                total = tl.load(totals_ptr + at * N * P + across, mask=inside, other=0.0)
                state = state * tl.load(scales_ptr + at) + total
    for step in range(chunks):
        index = segment * chunks + step
        chunk = tl.where(index < K, K - 1 - index if REVERSE else index, 0)
        first = tl.cast(chunk, tl.int64) * Q
        in_rows = (q < L - first) & (index < K)
        at = row * K * Q + first
        if REVERSE:
            factor = decay_to(hi_ptr + at, order_ptr, first, L, Q)
        else:
            factor = decay_from(hi_ptr + at, lo_ptr + at, order_ptr, first, L, Q) * tl.load(delta_ptr + at + q)
        through = tl.where(index < K, decay_across(hi_ptr + at, order_ptr, first, L, Q), 1.0)
        v = tile(v_ptr + first * v_token, q, p, v_token, in_rows, P, BP).to(ACC) * factor[:, None]
        w = tile(w_ptr + first * w_token, q, n, w_token, in_rows, N, BN).to(DOT)
        if borders_ptr is not None:
            # (batch, K, G, N, heads of a group, P)
            out = borders_ptr + (((batch * K + chunk) * (H // heads) + head // heads) * N * heads + head % heads) * P
            tl.store(
                out + (n[:, None] * (heads * P) + p[None, :]),
                narrow(state, borders_ptr.dtype.element_ty),
                mask=inside & (index < K),
            )
        else:
            scale *= through
        state = dot(tl.trans(w), narrow(v, DOT), state * through, PRECISION)
    if borders_ptr is None:
        at = row * segments + segment
        tl.store(totals_ptr + at * N * P + across, state, mask=inside)
        tl.store(scales_ptr + at, scale)
    elif last_ptr is not None:
        out = last_ptr + row * P * N + (p[None, :] * N + n[:, None])
        tl.store(out, narrow(state, last_ptr.dtype.element_ty), mask=inside & (segment == segments - 1))


# --- Outputs ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["L", "K"])
def _outputs_kernel(
    x_ptr, b_ptr, c_ptr, d_ptr, delta_ptr, hi_ptr, lo_ptr, order_ptr, borders_ptr,
    z_ptr, out_ptr, dout_ptr, dz_ptr, dy_ptr,
    x_batch, x_token, b_batch, b_token, c_batch, c_token, z_batch, z_token, dout_batch, dout_token, d_head, d_width,
    L, H, heads, K, p_tiles, part,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out; or dz and dy, from dout."""
    program = tl.program_id(0)
    p = program % p_tiles * BP + tl.arange(0, BP)
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
    scores, y = products(
        c_ptr + batch * c_batch + first * c_token + group * N, b_ptr + batch * b_batch + first * b_token + group * N,
        borders_ptr + (((batch * K + chunk) * (H // heads) + group) * N * heads + in_group) * P,
        q, in_rows, p, c_token, b_token, heads * P, N, P, Q, BN, BP, ACC, DOT, PRECISION,
    )  # fmt: skip
    y *= decay_to(hi_ptr, order_ptr, first, L, Q)[:, None]
    mixing = scores * decay_between(hi_ptr, lo_ptr, order_ptr, first, L, True, Q)
    mixing *= tl.load(delta_ptr + at + q)[None, :]
    x = tile(x_ptr + batch * x_batch + first * x_token + head * P, q, p, x_token, in_rows, P, BP)
    y = dot(narrow(mixing, DOT), x.to(DOT), y, PRECISION)
    if d_ptr is not None:
        d = tl.load(d_ptr + head * d_head + p * d_width, mask=p < P, other=0.0).to(ACC)
        y += d[None, :] * x.to(ACC)
    out = ((batch * L + first) * H + head) * P
    across = q[:, None] * (H * P) + p[None, :]
    inside = in_rows[:, None] & (p < P)[None, :]
    if z_ptr is not None:
        z = tile(z_ptr + batch * z_batch + first * z_token + head * P, q, p, z_token, in_rows, P, BP).to(ACC)
        s = sigmoid(z)
        if dout_ptr is None:
            y *= z * s
        else:
            dout = dout_ptr + batch * dout_batch + first * dout_token + head * P
            dout = tile(dout, q, p, dout_token, in_rows, P, BP).to(ACC)
            dz = dout * y * (s * (1.0 + z * (1.0 - s)))
            if dz_ptr is not None:
                tl.store(dz_ptr + out + across, narrow(dz, dz_ptr.dtype.element_ty), mask=inside)
            tl.store(dy_ptr + out + across, narrow(dout * (z * s), dy_ptr.dtype.element_ty), mask=inside)
    if dout_ptr is None:
        tl.store(out_ptr + out + across, narrow(y, out_ptr.dtype.element_ty), mask=inside)


# --- Host -------------------------------------------------------------------------------------------------------------


def rows_of(t: Tensor) -> Tensor:
    """(batch, L, H) or (batch, L, H, P) as (batch, L, columns), whose columns lie side by side: a view if they do.

    Within a chunk kernels count in int32, so that its tokens must lie near each other.
    """
    rows = t if t.dim() == 3 else t.flatten(2)
    return rows if rows.stride(2) == 1 and rows.stride(1) < 2**24 else rows.contiguous()


def strides(*rows: Tensor | None) -> tuple[int, ...]:
    """Those of batch and time, of each."""
    return tuple(stride for t in rows for stride in ((0, 0) if t is None else t.stride()[:2]))


class Problem:
    """The op's arguments without z and the initial state; step sizes Delta, and sums of Delta A."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        seq_idx: Tensor | None,
        options: Options,
    ):
        self.batch, self.length, self.heads, self.width = x.shape
        (self.groups, self.states), self.steps = B.shape[2:], options.chunk_size
        self.chunks = cdiv(self.length, self.steps)
        self.x, self.B, self.C, self.D = rows_of(x), rows_of(B), rows_of(C), D
        self.order: Tensor | None = None
        if seq_idx is not None and self.length > 0:
            begins = seq_idx[:, 1:] != seq_idx[:, :-1]
            self.order = torch.nn.functional.pad(begins, (1, 0)).cumsum(1, dtype=torch.int32)
        self.dtype, product = state_dtype(x), product_dtype(x, B, C)
        acc = accumulator(self.dtype)
        half = all(t.dtype in (torch.float16, torch.bfloat16) for t in (x, B, C))  # of which tf32 has all digits
        self.sizes: dict[str, Any] = {"N": self.states, "P": self.width, "Q": self.steps}
        self.products: dict[str, Any] = {
            "ACC": acc,
            "DOT": tl.bfloat16 if product == torch.bfloat16 else acc,
            "PRECISION": "tf32" if half and product == torch.float32 else dot_precision(product),
        }
        self.own_steps = Steps(rows_of(dt), A, dt_bias, options, self.dtype)
        self.sums = self.own_steps.delta, self.own_steps.hi, self.own_steps.lo, self.order
        self.part = self.own_steps.delta.numel()

    def over_chunks(
        self, kernel: Any, tensors: tuple[Tensor | None, ...], rows: Sequence[Tensor | None], blocks: Blocks
    ) -> None:
        """Starts a kernel of chunks and heads; `rows` are those of `tensors` of which it takes strides."""
        tiles = cdiv(self.width, blocks["BP"])
        of_D = (0, 0) if self.D is None else (self.D.stride(0), self.D.stride(1) if self.D.dim() == 2 else 0)
        launch(
            kernel, (self.batch * self.chunks * self.heads * tiles,),
            self.x, self.B, self.C, self.D, *self.sums, *tensors, *strides(self.x, self.B, self.C, *rows), *of_D,
            self.length, self.heads, self.heads // self.groups, self.chunks, tiles, self.part,
            **self.sizes, **self.products, **blocks,
        )  # fmt: skip

    def walk(
        self, v: Tensor, w: Tensor, first: Tensor | None, borders: Tensor, last: Tensor | None, reverse: bool = False
    ) -> None:
        """Fills the states before chunks and the last, from x and B; or in reverse their gradients, from dy and C."""
        rows = self.batch * self.heads
        blocks = dict(STATES.of(v, rows, self.chunks, self.steps, self.width, self.states))
        tiles = cdiv(self.states, blocks["BN"]), cdiv(self.width, blocks["BP"])
        chunks = cdiv(self.chunks, blocks.pop("SEGMENTS"))  # of a segment
        segments = cdiv(self.chunks, chunks) if chunks else 1
        totals = scales = None
        if segments > 1:
            totals = borders.new_empty(rows, segments, self.states, self.width, dtype=self.dtype)
            scales = borders.new_empty(rows, segments, dtype=self.dtype)
        for out in (None, borders)[segments == 1 :]:
            launch(
                _states_kernel, (rows * segments * tiles[0] * tiles[1],), v, w, *self.sums,
                None if first is None else first.contiguous(), totals, scales, out, last, *strides(v, w),
                self.length, self.heads, self.heads // self.groups, self.chunks, segments, chunks, *tiles,
                REVERSE=reverse, **self.sizes, **self.products, **blocks,
            )  # fmt: skip

    def outputs(self, z: Tensor | None, borders: Tensor, out: Tensor) -> None:
        """Fills out (batch, L, H, P)."""
        z = None if z is None else rows_of(z)
        blocks = OUTPUTS.of(self.x, self.steps, self.width, self.states)
        self.over_chunks(_outputs_kernel, (borders, z, out, None, None, None), (z, None), blocks)

    def gate_backward(self, z: Tensor, borders: Tensor, dout: Tensor, dz: Tensor | None, dy: Tensor) -> None:
        """Fills dz and dy, the gradients on both sides of the gate, from that of out."""
        z, dout = rows_of(z), rows_of(dout)
        blocks = OUTPUTS.of(self.x, self.steps, self.width, self.states)
        self.over_chunks(_outputs_kernel, (borders, z, None, dout, dz, dy), (z, dout), blocks)


def forward(
    problem: Problem, z: Tensor | None, initial_state: Tensor | None, out: Tensor, final: Tensor, borders: Tensor
) -> None:
    """Fills out (batch, L, H, P), the last state, and the states before chunks (batch, K, G, N, heads of a group P)."""
    problem.walk(problem.x, problem.B, initial_state, borders, final)
    problem.outputs(z, borders, out)


# --- Block sizes ------------------------------------------------------------------------------------------------------


def tiles_rule(dtype: torch.dtype, Q: int, P: int, N: int, narrow: tuple[int, int], wide: tuple[int, int]) -> Blocks:
    """Tiles of N and P, at most those given for bfloat16 and for float32, at which registers do not spill."""
    most_n, most_p = narrow if dtype == torch.bfloat16 else (16, 16) if dtype == torch.float64 else wide
    # 16 rows a warp: on sm_80 further warps would repeat what the others do.
    warps = max(1, Q // 16)
    return {"BN": max(16, min(most_n, N)), "BP": max(16, min(most_p, P)), "num_warps": warps, "num_stages": 2}


def candidates_of(rule: Any) -> Any:
    """What `tune()` tries beside a rule's: other tiles, numbers of warps, and stages of loads."""

    def candidates(dtype: torch.dtype, *sizes: int) -> list[Blocks]:
        own, (P, N) = rule(dtype, *sizes), sizes[-2:]
        return [
            {**own, "BN": n, "BP": p, "num_warps": warps, "num_stages": stages}
            for n in (32, 64, 128)
            for p in (32, 64)
            if n <= max(32, N) and p <= max(32, P)
            for warps in (4, 8)
            for stages in (1, 2, 3)
        ]

    return candidates


def problem_of(dtype: torch.dtype, device: Any, length: int, heads: int, Q: int, P: int, N: int) -> Problem:
    """One sequence with one group, for `tune()`."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    A, bias, options = (
        -torch.rand(heads, device=device),
        torch.zeros(heads, device=device),
        Options(Q, True, 0, math.inf),
    )
    x, dt, B, C = randn(1, length, heads, P), randn(1, length, heads), randn(1, length, 1, N), randn(1, length, 1, N)
    return Problem(x, dt, A, B, C, None, bias, None, options)


def borders_of(problem: Problem) -> Tensor:
    """Random states before chunks, for `tune()`."""
    shape = (1, problem.chunks, 1, problem.states, problem.heads * problem.width)
    dtype = torch.bfloat16 if problem.x.dtype == torch.bfloat16 else problem.dtype
    return torch.randn(shape, dtype=dtype, device=problem.x.device)


def _states_rule(dtype: torch.dtype, rows: int, chunks: int, Q: int, P: int, N: int) -> Blocks:
    blocks = tiles_rule(dtype, Q, P, N, (64, 64), (32, 32))
    programs = max(1, rows * N * P // (blocks["BN"] * blocks["BP"]))
    # Two programs for each of 132 multiprocessors; a segment has four chunks at least, as all are walked twice.
    segments = max(1, min(16, chunks // 4, 264 // programs))
    warps = blocks["num_warps"] * (2 if dtype == torch.bfloat16 else 1)  # the walk waits for each chunk's loads
    return {**blocks, "SEGMENTS": segments, "num_warps": warps, "num_stages": 3}


def _outputs_rule(dtype: torch.dtype, Q: int, P: int, N: int) -> Blocks:
    return tiles_rule(dtype, Q, P, N, (64, 64), (16, 32))


def _states_problem(dtype: torch.dtype, device: Any, rows: int, chunks: int, Q: int, P: int, N: int) -> Any:
    problem = problem_of(dtype, device, chunks * Q, rows, Q, P, N)
    borders, last = borders_of(problem), torch.empty(1, rows, P, N, dtype=problem.dtype, device=device)
    return lambda: problem.walk(problem.x, problem.B, None, borders, last)


def _outputs_problem(dtype: torch.dtype, device: Any, Q: int, P: int, N: int) -> Any:
    problem = problem_of(dtype, device, 4096, 64, Q, P, N)
    borders, out = borders_of(problem), torch.empty(1, 4096, 64, P, dtype=dtype, device=device)
    return lambda: problem.outputs(None, borders, out)


# Q, P and N of Mamba-2, and of a model as small as kernels go.
SIZES = [(64, 64, 128), (16, 16, 16)]

STATES = BlockSizes(
    "ssd_states",
    _states_rule,
    candidates_of(_states_rule),
    _states_problem,
    [(192, 32, *SIZES[0]), (24, 64, *SIZES[1])],
)
OUTPUTS = BlockSizes("ssd", _outputs_rule, candidates_of(_outputs_rule), _outputs_problem, SIZES)
TUNED = (STATES, OUTPUTS)
