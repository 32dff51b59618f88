# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the selective scan; equations and names as in `selective_scan.py`.

A program has one sequence and a block of CHANNELS of one group, and walks blocks of `STEPS` steps, and in each the
states, STATES at a time. A tile is (STEPS, STATES, CHANNELS), time in the registers of a thread, channels over its
lanes: the recurrence is then a serial scan in registers, one exp2 and 4 products or sums a state, and sums over states
need no other thread. The states between blocks are in memory, where the backward pass wants them anyway. B and C are
laid out as (batch, groups, N, L) first, so that a thread reads 4 steps at once.

Where batch and channels are too few to fill a GPU, time is cut into segments of SEGMENT blocks: `_forward_kernel`
without an output finds what each adds to a state of zeros, and by how much it decays one; `_carry_kernel` goes through
the segments, of which the backward pass has the same in reverse.

Bound by exp2: E N of them forward, and as many backward, where 12 products and sums a state weigh more.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._scan import STEPS, common_groups, state_dtype, steps_of
from archzoo.kernels._triton import INTERPRETED, accumulator, cdiv, helper, launch, sigmoid, span

LOG2E = tl.constexpr(1.4426950408889634)


@helper
def total_of(x, axis: tl.constexpr):
    """`tl.sum`, which takes 3 ms in the interpreter."""
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def _either(a, b):
    return a | b


@helper
def row_of(x, now):
    """x where it is `now`, one step. With time in registers that is one register: selects and bits of 0 are folded."""
    if INTERPRETED:
        row = total_of(tl.where(now, x, 0.0), 0)
    else:
        bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
        row = tl.reduce(tl.where(now, bits, 0), 0, _either).to(x.dtype, bitcast=True)
    return row


@helper
def recur(a, b, h, rows, STEPS: tl.constexpr):
    """h <- a h + b along the first axis: h before, and behind, each step."""
    before, behind = b, b
    for i in tl.static_range(STEPS):
        now = rows == i
        before = tl.where(now, h[None], before)
        h = row_of(a, now) * h + row_of(b, now)
        behind = tl.where(now, h[None], behind)
    return before, behind


@helper
def _ratio(a, b):
    """a / b; in float32 within 2 ulp, for b of moderate size."""
    if INTERPRETED:
        y = a / b
    elif b.dtype == tl.float32:
        y = libdevice.fast_dividef(a, b)
    else:
        y = a / b
    return y


@helper
def softplus_of(x):
    """log(1 + exp(x)), x itself above 20, and its slope. With e = exp(-|x|), log(1 + e) = 2 artanh(e / (2 + e))."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    if x.dtype == tl.float64:
        w = 1.0 + e
        small = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    else:
        s = _ratio(e, 2.0 + e)
        q = s * s
        p = 0.1111111 + q * (0.0909091 + q * (0.0769231 + q * 0.0666667))
        small = 2.0 * s * (1.0 + q * (0.33333333 + q * (0.2 + q * (0.14285714 + q * p))))
    large = x > 20.0
    value = tl.where(large, x, tl.where(x > 0, x, 0.0) + small)
    return value, tl.where(large, 1.0, _ratio(tl.where(x > 0, 1.0, e), 1.0 + e))


@helper
def place(program, channel_blocks, groups, batch):
    """Of a program: its block of channels, its group, its sequence, and its segment; in int64, as offsets are."""
    rest = program // channel_blocks
    block = tl.cast(program % channel_blocks, tl.int64)
    group = tl.cast(rest % groups, tl.int64)
    return block, group, tl.cast(rest // groups % batch, tl.int64), tl.cast(rest // groups // batch, tl.int64)


@helper
def zero_of(t):
    """0, for t >= 0. No compiler knows; so none makes before a loop, and keeps in registers, what it is added to."""
    zero = 0
    if not INTERPRETED:
        zero = tl.multiple_of(tl.minimum(t, 0).to(tl.int32), 16)
    return zero


@helper
def load(ptr, t, stride_t, stride_c, inside, STEPS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    """A tile (STEPS, CHANNELS) of a sequence, from step t on."""
    step, c = tl.arange(0, STEPS) + zero_of(t), tl.arange(0, CHANNELS) + zero_of(t)
    at = step[:, None] * stride_t + c[None, :] * stride_c
    return tl.load(ptr + t * stride_t + at, mask=inside, other=0.0).to(ACC)


@helper
def step_sizes(
    ptr, bias_ptr, t, c0, stride_t, stride_c, inside, in_c,
    SOFTPLUS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Delta, 0 behind the end, so that nothing happens there; and its slope by delta."""
    delta = load(ptr, t, stride_t, stride_c, inside, STEPS, CHANNELS, ACC)
    if bias_ptr is not None:
        delta += tl.load(bias_ptr + c0 + (tl.arange(0, CHANNELS) + zero_of(t)), mask=in_c, other=0.0).to(ACC)[None, :]
    slope = delta
    if SOFTPLUS:
        delta, slope = softplus_of(delta)
    return tl.where(inside, delta, 0.0), slope


@helper
def weights_start(ptr, b, group, c, groups, per, channels, PADDED, LENGTH, CONSTANT: tl.constexpr):
    """Where B or C has the weights of a program: in (groups, PADDED, channels), or (batch, per, PADDED, LENGTH)."""
    if CONSTANT:
        start = ptr + (group * PADDED * channels + c)
    else:
        start = ptr + (b * per + group * per // groups) * PADDED * LENGTH
    return start


@helper
def weights(
    ptr, n, t, LENGTH, channels, in_c,
    CONSTANT: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """B or C of the states from n on: (1, STATES, CHANNELS) if constant, else (STEPS, STATES, 1)."""
    states = tl.arange(0, STATES)
    if CONSTANT:
        at = (n + states)[:, None] * channels + tl.arange(0, CHANNELS)[None, :]
        w = tl.load(ptr + at, mask=in_c[None, :], other=0.0)[None]
    else:
        at = (n + states)[None, :] * LENGTH + tl.arange(0, STEPS)[:, None]
        w = tl.load(ptr + t + at)[:, :, None]
    return w


@helper
def resets_of(ptr, t, L, STEPS: tl.constexpr):
    """Which steps from t on begin a sequence: a bit for each, as registers are few."""
    step = tl.arange(0, STEPS)
    at = t + step
    inside = (at > 0) & (at < L)
    now = tl.load(ptr + at, mask=inside, other=0)
    return total_of((now != tl.load(ptr + at - 1, mask=inside, other=0)).to(tl.int32) << step, 0)


@helper
def store_decay(
    ptr, A_ptr, total, reset, N, channels, in_c, STATES: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """By how much a segment decays a state."""
    c = tl.arange(0, CHANNELS)[None, :]
    for start in range(0, N, STATES):
        n = (start + tl.arange(0, STATES))[:, None]
        mask = (n < N) & in_c[None, :]
        A = tl.load(A_ptr + n * channels + c, mask=mask, other=0.0)
        decay = tl.where(reset != 0, 0.0, tl.exp2(total[None, :] * (A * LOG2E)))
        tl.store(ptr + n * channels + c, decay, mask=mask)


@triton.jit
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, seq_ptr, z_ptr,
    out_ptr, last_ptr, border_ptr, local_ptr, decay_ptr,
    u_b, u_t, u_c, delta_b, delta_t, delta_c, z_b, z_t, z_c,
    L, count, N, channels, groups, batch, per_B, per_C, LENGTH, PADDED, channel_blocks, segment,
    SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    STEPS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Without `out_ptr`: what a segment adds to a state of zeros, and by how much it decays one, to local and decay."""
    block, group, b, part = place(tl.program_id(0), channel_blocks, groups, batch)
    d = groups * channels
    slab = tl.cast(batch, tl.int64) * d * N
    c0 = block * CHANNELS
    states = (b * groups + group) * N * channels + c0  # of this program in a slab
    B_ptr = weights_start(B_ptr, b, group, c0, groups, per_B, channels, PADDED, LENGTH, B_CONSTANT)
    C_ptr = weights_start(C_ptr, b, group, c0, groups, per_C, channels, PADDED, LENGTH, C_CONSTANT)
    A_ptr += group * N * channels + c0
    c = tl.arange(0, CHANNELS)
    in_c = c < channels - c0
    c0 += group * channels
    u_ptr += b * u_b + c0 * u_c
    delta_ptr += b * delta_b + c0 * delta_c
    step = tl.arange(0, STEPS)
    rows = step[:, None, None]
    total = tl.full((CHANNELS,), 0.0, ACC)
    reset = 0
    first = part * segment
    stop = tl.minimum(first + segment, count)
    for k in range(first, stop):
        t = tl.cast(k, tl.int64) * STEPS
        inside = (step < L - t)[:, None] & in_c[None, :]
        u = load(u_ptr, t, u_t, u_c, inside, STEPS, CHANNELS, ACC)
        delta, _slope = step_sizes(
            delta_ptr, bias_ptr, t, c0, delta_t, delta_c, inside, in_c, SOFTPLUS, STEPS, CHANNELS, ACC
        )
        x = delta * u
        if out_ptr is None:
            total += total_of(delta, 0)
        else:
            y = tl.full((STEPS, STATES, CHANNELS), 0.0, ACC)
        if seq_ptr is not None:
            resets = resets_of(seq_ptr + b * L, t, L, STEPS)
            reset |= resets
        for start in tl.range(0, N, STATES, num_stages=2):  # what is read is read a turn before
            n = start + tl.arange(0, STATES)[:, None]
            mask = (n < N) & in_c[None, :]
            at = n * channels + c[None, :]
            A = tl.load(A_ptr + at, mask=mask, other=0.0) * LOG2E
            if out_ptr is None:
                before = tl.load(local_ptr + part * slab + states + at, mask=mask & (k > first), other=0.0)
            else:
                before = tl.load(border_ptr + k * slab + states + at, mask=mask, other=0.0)
            a = tl.exp2(delta[:, None, :] * A[None])
            if seq_ptr is not None:
                a = tl.where((resets >> rows) & 1 != 0, 0.0, a)
            B = weights(B_ptr, start, t, LENGTH, channels, in_c, B_CONSTANT, STEPS, STATES, CHANNELS)
            _before, h = recur(a, x[:, None, :] * B, before, rows, STEPS)
            last = row_of(h, rows == STEPS - 1)
            if out_ptr is None:
                tl.store(local_ptr + part * slab + states + at, last, mask=mask)
            else:
                C = weights(C_ptr, start, t, LENGTH, channels, in_c, C_CONSTANT, STEPS, STATES, CHANNELS)
                y += h * C
                if k + 1 == count:
                    tl.store(last_ptr + (b * d + c0 + c[None, :]) * N + n, last, mask=mask)
                elif k + 1 < stop:
                    tl.store(border_ptr + (k + 1) * slab + states + at, last, mask=mask)
        if out_ptr is not None:
            out = total_of(y, 1)
            if D_ptr is not None:
                out += tl.load(D_ptr + c0 + c, mask=in_c, other=0.0).to(ACC)[None, :] * u
            if z_ptr is not None:
                z = load(z_ptr + b * z_b + c0 * z_c, t, z_t, z_c, inside, STEPS, CHANNELS, ACC)
                out *= z * sigmoid(z)
            at = out_ptr + (b * L + t) * d + c0 + (step[:, None] * d + c[None, :])
            tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next block reads what this one has stored
    if out_ptr is None:
        store_decay(decay_ptr + part * slab + states, A_ptr, total, reset, N, channels, in_c, STATES, CHANNELS)


@triton.jit
def _carry_kernel(
    start_ptr, local_ptr, decay_ptr, segments, slab, stride, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The state before each segment, from that before the first, or in reverse the last, which is there already."""
    at = span(tl.program_id(0), BLOCK)
    inside = at < slab
    s = tl.cast(segments - 1 if REVERSE else 0, tl.int64)
    state = tl.load(start_ptr + s * stride + at, mask=inside, other=0.0)
    for i in range(1, segments):
        s = tl.cast(segments - i if REVERSE else i - 1, tl.int64)
        local = tl.load(local_ptr + s * slab + at, mask=inside, other=0.0)
        state = tl.load(decay_ptr + s * slab + at, mask=inside, other=0.0) * state + local
        tl.store(start_ptr + (s - 1 if REVERSE else s + 1) * stride + at, state, mask=inside)


class Problem:
    """What kernels of both passes are given: sizes, parameters in the dtype of the states, B and C laid out anew."""

    def __init__(
        self,
        u: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        seq_idx: Tensor | None,
        softplus: bool,
        blocks: Blocks,
    ):
        self.batch, self.length, self.d = u.shape
        self.N, self.dtype, self.groups = A.shape[1], state_dtype(u), common_groups(B, C)
        self.channels = self.d // self.groups
        self.blocks = {name: size for name, size in blocks.items() if name != "SEGMENT"}
        self.per_block = steps_of(self.dtype)
        self.count = cdiv(self.length, self.per_block)
        self.segment = max(1, min(self.count, blocks["SEGMENT"]))
        self.segments = cdiv(self.count, self.segment)
        self.channel_blocks = cdiv(self.channels, blocks["CHANNELS"])
        self.padded, self.steps = cdiv(self.N, blocks["STATES"]) * blocks["STATES"], self.count * self.per_block
        self.A = A.to(self.dtype).unflatten(0, (self.groups, self.channels)).mT.contiguous()
        self.B, self.C = self._weights(B), self._weights(C)
        self.vectors = [None if t is None else t.contiguous() for t in (D, delta_bias, seq_idx)]
        self.constants = {
            "SOFTPLUS": softplus, "B_CONSTANT": B.dim() == 2, "C_CONSTANT": C.dim() == 2,
            "STEPS": self.per_block, "ACC": accumulator(self.dtype), **self.blocks,
        }  # fmt: skip
        self.slab = (self.batch, self.groups, self.N, self.channels)

    def _weights(self, t: Tensor) -> Tensor:
        """B or C as (batch, groups, N, L), or (groups, N, channels) if constant, filled up with zeros."""
        of: tuple[int, ...]
        if t.dim() == 2:
            new, of = t.unflatten(0, (self.groups, self.channels)).mT, (self.groups, self.padded, self.channels)
        else:
            new, of = t.permute(0, 2, 3, 1), (self.batch, t.shape[2], self.padded, self.steps)
        make = torch.empty if new.shape == of else torch.zeros
        memory = make(of, dtype=self.dtype, device=t.device)
        memory[..., : new.shape[-2], : new.shape[-1]] = new
        return memory

    def sequences(self, *given: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
        """u, delta, z or a gradient, and their strides; copied only if offsets in a tile would exceed int32.

        Or in float64 if not channel-last, as there are no registers for a transposition then.
        """
        found = list(given)
        for i, t in enumerate(given):
            if t is None:
                continue
            farthest = max(t.stride()[1] * self.per_block, t.stride()[2] * self.blocks["CHANNELS"])
            if farthest >= 2**31 or (self.dtype == torch.float64 and t.stride()[2] != 1):
                found[i] = t.contiguous()
        return found, [stride for t in found for stride in ((0, 0, 0) if t is None else t.stride())]

    def sizes(self) -> tuple[int, ...]:
        """Of both kernels, in their order."""
        per = [t.shape[1] if t.dim() == 4 else 1 for t in (self.B, self.C)]
        return (
            self.length, self.count, self.N, self.channels, self.groups, self.batch, *per,
            self.steps, self.padded, self.channel_blocks, self.segment,
        )  # fmt: skip

    def grid(self, segments: int) -> tuple[int]:
        """Programs of so many segments."""
        return (segments * self.batch * self.groups * self.channel_blocks,)

    def memory(self, *leading: int) -> Tensor:
        """Of states."""
        return torch.empty(*leading, *self.slab, dtype=self.dtype, device=self.A.device)

    def to_slab(self, state: Tensor) -> Tensor:
        """(batch, d, N) -> (batch, groups, N, channels), a view."""
        return state.unflatten(1, (self.groups, self.channels)).mT

    def from_slab(self, states: Tensor) -> Tensor:
        """And back, in fresh memory."""
        return states.mT.reshape(self.batch, self.d, self.N).contiguous()

    def carry(self, start: Tensor, local: Tensor, decay: Tensor, stride: int, reverse: bool) -> None:
        """Fills in the states before each segment; `stride` is that of `start`."""
        size = local[0].numel()
        launch(
            _carry_kernel, (cdiv(size, 256),), start, local, decay, self.segments, size, stride,
            REVERSE=reverse, BLOCK=256, num_warps=2,
        )  # fmt: skip


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out (batch, L, d), the last state (batch, d, N), and the states before blocks; arguments as the op has them."""
    blocks = FORWARD.of(u, u.shape[0] * u.shape[2], u.shape[1])
    p = Problem(u, A, B, C, D, delta_bias, seq_idx, softplus, blocks)
    out = u.new_empty(u.shape)
    last = torch.empty(p.batch, p.d, p.N, dtype=p.dtype, device=u.device)
    borders = p.memory(p.count)
    if p.count == 0:
        return out, last.zero_() if initial_state is None else last.copy_(initial_state), borders
    if initial_state is None:
        borders[0].zero_()
    else:
        borders[0].copy_(p.to_slab(initial_state))
    sequences, strides = p.sequences(u, delta, z)
    inputs = (*sequences[:2], p.A, p.B, p.C, *p.vectors, sequences[2])
    sizes = (*strides, *p.sizes())
    if p.segments > 1:
        local, decay = p.memory(p.segments - 1), p.memory(p.segments - 1)
        launch(_forward_kernel, p.grid(p.segments - 1), *inputs, None, None, None, local, decay, *sizes, **p.constants)
        p.carry(borders, local, decay, p.segment * local[0].numel(), False)
    constants = {**p.constants, "maxnreg": 255}  # ptxas may stop at 168 where it could have more, and spill
    launch(_forward_kernel, p.grid(p.segments), *inputs, out, last, borders, None, None, *sizes, **constants)
    return out, last, borders


def block_sizes(states: int, sequences: int, length: int) -> Blocks:
    """A warp for each of so many states of 32 channels; and segments, if there are less than 1024 warps even then.

    Fewer states at once do less twice, and so many warps hide the latency of what they read.
    """
    segments = max(1, 1024 * 32 // (states * max(1, sequences)))
    return {
        "STATES": states, "CHANNELS": 32, "SEGMENT": max(4, cdiv(length, STEPS * segments)), "num_warps": states
    }  # fmt: skip


def block_size_candidates(sequences: int, length: int) -> list[Blocks]:
    """What may be faster, for both passes."""
    found = [block_sizes(states, sequences, length) for states in (1, 2, 4)]
    count = cdiv(length, STEPS)
    return [{**blocks, "SEGMENT": max(4, cdiv(count, parts))} for blocks in found for parts in (1, 2, 4, 8, 16)]


def _rule(dtype: torch.dtype, sequences: int, length: int) -> Blocks:
    return block_sizes(2 if sequences < 2**15 else 1, sequences, length)


def _candidates(dtype: torch.dtype, sequences: int, length: int) -> list[Blocks]:
    return block_size_candidates(sequences, length)


def example(dtype: torch.dtype, device: Any, sequences: int, length: int) -> Any:
    """As Mamba has them: B and C of 16 states are a part of a projection, A and D float32."""
    d, N = min(sequences, 1536), 16
    batch = sequences // d
    u, delta, z = (torch.randn(batch, length, d, dtype=dtype, device=device) for _ in range(3))
    B, C = torch.randn(batch, length, 1, 2 * N, dtype=dtype, device=device).chunk(2, -1)
    A = -torch.rand(d, N, device=device)
    return u, delta, A, B, C, torch.ones(d, device=device), z, torch.zeros(d, device=device), None, None


def _problem(dtype: torch.dtype, device: Any, sequences: int, length: int) -> Any:
    inputs = (*example(dtype, device, sequences, length), True)
    return lambda: forward(*inputs)


SIZES = [(8 * 1536, 2048), (8 * 4096, 2048), (2 * 1536, 4096)]
"""Batch times channels, and length: Mamba of 130M and of 1.4B parameters in training, and a small batch."""

FORWARD = BlockSizes("selective_scan", _rule, _candidates, _problem, SIZES)
TUNED = (FORWARD,)
