# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of the selective scan's backward pass; as `_selective_scan_triton.py`, with h made again.

In a block of steps the states are made again from the one before it, then the adjoints G_t = C_t dy_t + a_{t+1} G_{t+1}
go back in the same registers. Sums over channels, for B and C, are done for a block of channels in a program; what is
left, 2 N / CHANNELS numbers an input, is summed in torch. Sums over steps, for A, are memory that one program adds to.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._scan import common_groups, state_dtype, steps_of
from archzoo.kernels._selective_scan_triton import (
    LOG2E,
    SIZES,
    Problem,
    block_size_candidates,
    block_sizes,
    example,
    load,
    place,
    recur,
    resets_of,
    row_of,
    step_sizes,
    store_decay,
    total_of,
    weights,
    weights_start,
    zero_of,
)
from archzoo.kernels._triton import cdiv, helper, launch, sigmoid


@helper
def _add(ptr, value, mask, i):
    """Adds to memory that this program alone writes, and that holds nothing before the first block."""
    tl.store(ptr, value + tl.load(ptr, mask=mask & (i > 0), other=0.0), mask=mask)


@helper
def _store_sums(ptr, x, PRECISION: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr):
    """The sums of x (STEPS, STATES, CHANNELS) over channels, contiguous.

    By tensor cores unless PRECISION is "": lanes hold channels, and to add them by shuffles takes longer.
    """
    if PRECISION == "":
        at = tl.arange(0, STEPS)[:, None] * STATES + tl.arange(0, STATES)[None, :]
        tl.store(ptr + at, total_of(x, 2))
    else:
        x = tl.reshape(x, (STEPS * STATES, CHANNELS))
        sums = tl.dot(x, tl.full((CHANNELS, 8), 1.0, tl.float32), input_precision=PRECISION)
        at = tl.broadcast_to(tl.arange(0, STEPS * STATES)[:, None], (STEPS * STATES, 8))
        tl.store(ptr + at, sums, mask=(tl.arange(0, 8) == 0)[None, :])


@helper
def _adjoints(a, b, behind, rows, STEPS: tl.constexpr):
    """G <- b + a G against time: G of each step, and a G of each."""
    G, aG = b, b
    for i in tl.static_range(STEPS):
        now = rows == STEPS - 1 - i
        g = row_of(b, now) + behind
        behind = row_of(a, now) * g
        G = tl.where(now, g[None], G)
        aG = tl.where(now, behind[None], aG)
    return G, aG


@triton.jit
def _backward_kernel(
    dout_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, seq_ptr, z_ptr, border_ptr,
    carry_ptr, decay_ptr, du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr,
    dout_b, dout_t, dout_c, u_b, u_t, u_c, delta_b, delta_t, delta_c, z_b, z_t, z_c,
    L, count, N, channels, groups, batch, per_B, per_C, LENGTH, PADDED, channel_blocks, segment, skipped,
    SOFTPLUS: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    PRECISION: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Without `border_ptr`: the adjoints that a segment adds before itself, to carry, and its decay."""
    block, group, b, part = place(tl.program_id(0), channel_blocks, groups, batch)
    part += skipped
    d = groups * channels
    slab = tl.cast(batch, tl.int64) * d * N
    c0 = block * CHANNELS
    states = (b * groups + group) * N * channels + c0  # of this program in a slab
    own = part * slab + states
    # Sums over a block's channels: (channel_blocks, batch, groups, count, PADDED / STATES, STEPS, STATES).
    summed = ((block * batch + b) * groups + group) * PADDED * LENGTH
    B_ptr = weights_start(B_ptr, b, group, c0, groups, per_B, channels, PADDED, LENGTH, B_CONSTANT)
    C_ptr = weights_start(C_ptr, b, group, c0, groups, per_C, channels, PADDED, LENGTH, C_CONSTANT)
    A_ptr += group * N * channels + c0
    c = tl.arange(0, CHANNELS)
    in_c = c < tl.cast(channels - c0, tl.int32)
    c0 += group * channels
    step = tl.arange(0, STEPS)
    rows = step[:, None, None]
    total = tl.full((CHANNELS,), 0.0, ACC)
    reset = 0
    first = part * segment
    stop = tl.minimum(first + segment, count)
    for i in range(stop - first):
        k = stop - 1 - i
        t = tl.cast(k, tl.int64) * STEPS
        inside = (step < L - t)[:, None] & in_c[None, :]
        delta, _slope = step_sizes(
            delta_ptr + b * delta_b + c0 * delta_c, bias_ptr, t, c0, delta_t, delta_c, inside, in_c,
            SOFTPLUS, STEPS, CHANNELS, ACC,
        )  # fmt: skip
        if dout_ptr is None:
            dy = tl.full((STEPS, CHANNELS), 0.0, ACC)
        else:
            dy = load(dout_ptr + b * dout_b + c0 * dout_c, t, dout_t, dout_c, inside, STEPS, CHANNELS, ACC)
        if z_ptr is not None:
            z = load(z_ptr + b * z_b + c0 * z_c, t, z_t, z_c, inside, STEPS, CHANNELS, ACC)
            dy *= z * sigmoid(z)
        if border_ptr is None:
            total += total_of(delta, 0)
        else:
            x = delta * load(u_ptr + b * u_b + c0 * u_c, t, u_t, u_c, inside, STEPS, CHANNELS, ACC)
            y = tl.full((STEPS, STATES, CHANNELS), 0.0, ACC)
            dx = tl.full((STEPS, STATES, CHANNELS), 0.0, ACC)
            dlog = tl.full((STEPS, STATES, CHANNELS), 0.0, ACC)
        if seq_ptr is not None:
            resets = resets_of(seq_ptr + b * L, t, L, STEPS)
            reset |= resets
        same = tl.cast(k, tl.int32)
        for start in range(0, N, STATES):
            same = tl.maximum(same, -start)  # k still, but no compiler knows before the loop's end
            n = start + tl.arange(0, STATES)[:, None]
            mask = (n < N) & in_c[None, :]
            at = n * channels + c[None, :]
            A = tl.load(A_ptr + at, mask=mask, other=0.0)
            a = tl.exp2(delta[:, None, :] * (A * LOG2E)[None])
            if seq_ptr is not None:
                a = tl.where((resets >> rows) & 1 != 0, 0.0, a)
            C = weights(C_ptr, start, t, LENGTH, channels, in_c, C_CONSTANT, STEPS, STATES, CHANNELS)
            if border_ptr is None:
                behind = tl.load(carry_ptr + own + at, mask=mask & (i > 0), other=0.0)
            else:
                at_sums = summed + (k * PADDED + start) * STEPS
                B = weights(B_ptr, start, t, LENGTH, channels, in_c, B_CONSTANT, STEPS, STATES, CHANNELS)
                before = tl.load(border_ptr + k * slab + states + at, mask=mask, other=0.0)
                before, h = recur(a, x[:, None, :] * B, before, rows, STEPS)
                if dz_ptr is not None:
                    y += h * C
                if dC_ptr is not None:
                    if C_CONSTANT:
                        _add(dC_ptr + own + at, total_of(h * dy[:, None, :], 0), mask, i)
                    else:
                        _store_sums(dC_ptr + at_sums, h * dy[:, None, :], PRECISION, STEPS, STATES, CHANNELS)
                behind = tl.load(carry_ptr + own + at, mask=mask, other=0.0)
            G, aG = _adjoints(a, dy[:, None, :] * C, behind, rows, STEPS)
            tl.store(carry_ptr + own + at, row_of(aG, rows == 0), mask=mask)
            if border_ptr is not None:
                before *= aG  # the gradient of log a
                dlog += before * A[None]
                if dA_ptr is not None:
                    _add(dA_ptr + own + at, total_of(before * delta[:, None, :], 0), mask, i)
                # Read again: there are no registers for both.
                B = weights(B_ptr, start, t, LENGTH, channels, in_c, B_CONSTANT, STEPS, STATES, CHANNELS)
                dx += G * B
                if dB_ptr is not None:
                    if B_CONSTANT:
                        _add(dB_ptr + own + at, total_of(G * x[:, None, :], 0), mask, i)
                    else:
                        _store_sums(dB_ptr + at_sums, G * x[:, None, :], PRECISION, STEPS, STATES, CHANNELS)
        if border_ptr is not None:
            # Loaded again: above, all registers are in use. None is to hold addresses, so these are made of `same`.
            t = tl.cast(same, tl.int64) * STEPS
            zero = zero_of(t)
            b += zero
            c0 += zero
            lane = c + zero
            channel = (part * batch + b) * d + c0
            inside = (step + zero < L - t)[:, None] & in_c[None, :]
            u = load(u_ptr + b * u_b + c0 * u_c, t, u_t, u_c, inside, STEPS, CHANNELS, ACC)
            delta, slope = step_sizes(
                delta_ptr + b * delta_b + c0 * delta_c, bias_ptr, t, c0, delta_t, delta_c, inside, in_c,
                SOFTPLUS, STEPS, CHANNELS, ACC,
            )  # fmt: skip
            du = total_of(dx, 1)
            ddelta = total_of(dlog, 1) + u * du
            if SOFTPLUS:
                ddelta *= slope
            du *= delta
            at = (b * L + t) * d + c0 + ((step + zero)[:, None] * d + lane[None, :])
            if dout_ptr is not None:
                dy = load(dout_ptr + b * dout_b + c0 * dout_c, t, dout_t, dout_c, inside, STEPS, CHANNELS, ACC)
                if z_ptr is not None:
                    z = load(z_ptr + b * z_b + c0 * z_c, t, z_t, z_c, inside, STEPS, CHANNELS, ACC)
                    gate = sigmoid(z)
                    if dz_ptr is not None:
                        out = total_of(y, 1)
                        if D_ptr is not None:
                            out += tl.load(D_ptr + c0 + lane, mask=in_c, other=0.0).to(ACC)[None, :] * u
                        dz = dy * out * gate * (1.0 + z * (1.0 - gate))
                        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
                    dy *= z * gate
                if D_ptr is not None:
                    du += tl.load(D_ptr + c0 + lane, mask=in_c, other=0.0).to(ACC)[None, :] * dy
                if dD_ptr is not None:
                    _add(dD_ptr + channel + lane, total_of(dy * u, 0), in_c, i)
            if du_ptr is not None:
                tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=inside)
            if ddelta_ptr is not None:
                tl.store(ddelta_ptr + at, ddelta.to(ddelta_ptr.dtype.element_ty), mask=inside)
            if dbias_ptr is not None:
                _add(dbias_ptr + channel + lane, total_of(tl.where(inside, ddelta, 0.0), 0), in_c, i)
        tl.debug_barrier()
    if border_ptr is None:
        store_decay(decay_ptr + own, A_ptr, total, reset, N, channels, in_c, STATES, CHANNELS)


def backward(
    dout: Tensor | None,
    dlast: Tensor | None,
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
    borders: Tensor,
    softplus: bool,
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients of u to initial_state, sums over batch and time in the dtype of the states; None where not needed."""
    blocks = BACKWARD.of(u, u.shape[0] * u.shape[2], u.shape[1])
    if blocks["STATES"] == 1 and u.dtype != torch.float64 and (seq_idx is not None or common_groups(B, C) > 1):
        blocks = {**blocks, "STATES": 2, "num_warps": 2}  # one warp would spill
    p = Problem(u, A, B, C, D, delta_bias, seq_idx, softplus, blocks)
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    need = [t is not None and n for t, n in zip(given, needed, strict=True)]
    if p.count == 0:
        nothing = [torch.zeros_like(t) if n and t is not None else None for t, n in zip(given, need, strict=True)]
        if need[8] and dlast is not None:
            nothing[8] = dlast.clone()
        return nothing
    carry = p.memory(p.segments)
    if dlast is None:
        carry[-1].zero_()
    else:
        carry[-1].copy_(p.to_slab(dlast))

    def like(t: Tensor | None, wanted: bool) -> Tensor | None:
        return torch.empty(t.shape, dtype=t.dtype, device=t.device) if wanted and t is not None else None

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(*shape, dtype=p.dtype, device=u.device) if wanted else None

    def weights(t: Tensor, wanted: bool) -> Tensor | None:
        if t.dim() == 2:
            return p.memory(p.segments) if wanted else None
        states = blocks["STATES"]
        return sums(wanted, p.channel_blocks, p.batch, p.groups, p.count, p.padded // states, p.per_block, states)

    du, ddelta, dz = like(u, need[0]), like(delta, need[1]), like(z, need[6])
    dA = p.memory(p.segments) if need[2] else None
    dB, dC = weights(B, need[3]), weights(C, need[4])
    dD, dbias = (sums(need[i], p.segments, p.batch, p.d) for i in (5, 7))
    sequences, strides = p.sequences(dout, u, delta, None if dout is None else z)
    inputs = (*sequences[:3], p.A, p.B, p.C, *p.vectors, sequences[3])
    constants = {**p.constants, "PRECISION": _precision(p.dtype, B, C)}
    if (u.dtype == torch.float64 and not need[6]) or not (need[3] or need[4]):
        constants["maxnreg"] = 255  # ptxas may stop at 168 where it could have more, and spill
    if p.segments > 1:
        local, decay = p.memory(p.segments), p.memory(p.segments)
        launch(
            _backward_kernel, p.grid(p.segments - 1), *inputs, None, local, decay, *[None] * 8,
            *strides, *p.sizes(), 1, **constants,
        )  # fmt: skip
        p.carry(carry, local, decay, local[0].numel(), True)
    launch(
        _backward_kernel, p.grid(p.segments), *inputs, borders, carry, None, du, ddelta, dA, dB, dC, dD, dz, dbias,
        *strides, *p.sizes(), 0, **constants,
    )  # fmt: skip
    for gradient in (dz, dD) if dout is None else ():
        if gradient is not None:
            gradient.zero_()

    def of_weights(t: Tensor, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        if t.dim() == 2:
            return gradient.sum((0, 1)).mT.reshape(t.shape)
        gradient = gradient.sum(0).transpose(3, 4).reshape(p.batch, p.groups, p.steps, p.padded)
        return gradient[:, :, : p.length, : p.N].transpose(1, 2)

    return [
        du,
        ddelta,
        None if dA is None else dA.sum((0, 1)).mT.reshape(A.shape),
        of_weights(B, dB),
        of_weights(C, dC),
        None if dD is None else dD.sum((0, 1)),
        dz,
        None if dbias is None else dbias.sum((0, 1)),
        p.from_slab(carry[0]) if need[8] else None,
    ]


def _precision(dtype: torch.dtype, *weights: Tensor) -> str:
    """Of the sums over channels: tensor cores round a term to tf32, which is more than 16 bits hold."""
    narrow = dtype == torch.float32 and all(t.dtype in (torch.float16, torch.bfloat16) for t in weights)
    return "tf32" if narrow else ""


def _rule(dtype: torch.dtype, sequences: int, length: int) -> Blocks:
    """One stage: registers are full, and loads ahead would spill; as two states would in float64."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    states = 1 if dtype == torch.float64 or (narrow and sequences >= 2**15) else 2
    return {**block_sizes(states, sequences, length), "num_stages": 1}


def _candidates(dtype: torch.dtype, sequences: int, length: int) -> list[Blocks]:
    return [{**blocks, "num_stages": 1} for blocks in block_size_candidates(sequences, length)]


def _problem(dtype: torch.dtype, device: Any, sequences: int, length: int) -> Any:
    inputs = example(dtype, device, sequences, length)
    u, A = inputs[0], inputs[2]
    wide = state_dtype(u)
    borders = torch.zeros(
        cdiv(length, steps_of(wide)), u.shape[0], 1, A.shape[1], u.shape[2], dtype=wide, device=device
    )
    arguments: Any = (u, None, *inputs, borders, True, [True] * 9)
    return lambda: backward(*arguments)


BACKWARD = BlockSizes("selective_scan_backward", _rule, _candidates, _problem, SIZES)
TUNED = (BACKWARD,)
