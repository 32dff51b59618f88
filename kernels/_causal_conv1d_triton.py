# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the causal convolution; equations and names as in `causal_conv1d.py`.

A program has STEPS steps of CHANNELS channels, a row of channels in registers for each, so that all W taps of all
steps are made of what was loaded once. Backward it makes the activation's argument of the W - 1 steps behind its own
as well, and writes sums for the weights over its steps. Bound by memory: 2 numbers are moved forward, 3 backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._op import compute_dtype
from archzoo.kernels._triton import accumulator, cdiv, helper, launch, sigmoid, span


@helper
def _nothing():
    """A tuple to begin with, of any type."""
    return ()


@helper
def _place(program, time_blocks, channel_blocks, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a program: its sequence, its first step, and its channels."""
    rest = program // channel_blocks
    t0 = tl.cast(rest % time_blocks, tl.int64) * STEPS
    return tl.cast(rest // time_blocks, tl.int64), t0, span(program % channel_blocks, CHANNELS)


@helper
def _rows(x_ptr, state_ptr, t0, L, d, x_t, x_c, c, in_c, COUNT: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr):
    """x from step t0 - W + 1 on, in so many rows: before step 0 those of the state, or zeros."""
    rows = _nothing()
    for i in tl.static_range(COUNT):
        t = t0 + i - (W - 1)
        row = tl.load(x_ptr + t * x_t + c * x_c, mask=in_c & (t >= 0) & (t < L), other=0.0).to(ACC)
        if i < W - 1 and state_ptr is not None:
            row += tl.load(state_ptr + (t + W - 1) * d + c, mask=in_c & (t < 0), other=0.0).to(ACC)
        rows = rows + (row,)
    return rows


@helper
def _owners(seq_ptr, t0, L, COUNT: tl.constexpr, W: tl.constexpr):
    """To which sequence rows belong, those of the state to the first; a scalar for each."""
    owners = _nothing()
    for i in tl.static_range(COUNT):
        t = tl.maximum(t0 + i - (W - 1), 0)
        owners = owners + (tl.load(seq_ptr + t, mask=t < L, other=0),)
    return owners


@helper
def _weights(weight_ptr, d, c, in_c, W: tl.constexpr, ACC: tl.constexpr):
    """A row of channels for each tap, of weights (W, d)."""
    weights = _nothing()
    for i in tl.static_range(W):
        weights = weights + (tl.load(weight_ptr + i * d + c, mask=in_c, other=0.0).to(ACC),)
    return weights


@triton.jit(do_not_specialize=["L", "time_blocks"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, y_ptr, x_b, x_t, x_c, L, d, time_blocks, channel_blocks,
    W: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, t0, c = _place(tl.program_id(0), time_blocks, channel_blocks, STEPS, CHANNELS)
    in_c = c < d
    if state_ptr is not None:
        state_ptr += b * (W - 1) * d
    weights = _weights(weight_ptr, d, c, in_c, W, ACC)
    bias = tl.full((CHANNELS,), 0.0, ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(ACC)
    rows = _rows(x_ptr + b * x_b, state_ptr, t0, L, d, x_t, x_c, c, in_c, STEPS + W - 1, W, ACC)
    if seq_ptr is not None:
        owners = _owners(seq_ptr + b * L, t0, L, STEPS + W - 1, W)
    for i in tl.static_range(STEPS):
        y = bias
        for j in tl.static_range(W):
            row = rows[i + j]
            if seq_ptr is not None:
                row = tl.where(owners[i + j] == owners[i + W - 1], row, 0.0)
            y += weights[j] * row
        if SILU:
            y *= sigmoid(y)
        tl.store(y_ptr + (b * L + t0 + i) * d + c, y.to(y_ptr.dtype.element_ty), mask=in_c & (t0 + i < L))


@triton.jit(do_not_specialize=["L", "time_blocks"])
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, state_ptr, seq_ptr, dx_ptr, partial_ptr, dstate_ptr,
    dy_b, dy_t, dy_c, x_b, x_t, x_c, L, d, time_blocks, channel_blocks,
    W: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, t0, c = _place(tl.program_id(0), time_blocks, channel_blocks, STEPS, CHANNELS)
    in_c = c < d
    if state_ptr is not None:
        state_ptr += b * (W - 1) * d
    weights = _weights(weight_ptr, d, c, in_c, W, ACC)
    bias = tl.full((CHANNELS,), 0.0, ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(ACC)
    rows = _rows(x_ptr + b * x_b, state_ptr, t0, L, d, x_t, x_c, c, in_c, STEPS + 2 * (W - 1), W, ACC)
    if seq_ptr is not None:
        owners = _owners(seq_ptr + b * L, t0, L, STEPS + 2 * (W - 1), W)
    zero = tl.full((CHANNELS,), 0.0, ACC)
    dbias = zero
    dweights = _nothing()
    for _j in tl.static_range(W):
        dweights = dweights + (zero,)
    gs = _nothing()  # gradients of the activation's argument, from step t0 on
    for i in tl.static_range(STEPS + W - 1):
        t = t0 + i
        g = tl.load(dy_ptr + b * dy_b + t * dy_t + c * dy_c, mask=in_c & (t < L), other=0.0).to(ACC)
        taps = _nothing()
        y = bias
        for j in tl.static_range(W):
            row = rows[i + j]
            if seq_ptr is not None:
                row = tl.where(owners[i + j] == owners[i + W - 1], row, 0.0)
            y += weights[j] * row
            taps = taps + (row,)
        if SILU:
            s = sigmoid(y)
            g *= s * (1.0 + y * (1.0 - s))
            g = tl.where(t < L, g, 0.0)
        gs = gs + (g,)
        if i < STEPS and partial_ptr is not None:
            dbias += g
            more = _nothing()
            for j in tl.static_range(W):
                more = more + (dweights[j] + g * taps[j],)
            dweights = more
        if i >= W - 1 and dx_ptr is not None:
            dx = _gathered(gs, owners if seq_ptr is not None else None, weights, zero, i - (W - 1), W)
            t -= W - 1
            tl.store(dx_ptr + (b * L + t) * d + c, dx.to(dx_ptr.dtype.element_ty), mask=in_c & (t < L))
    if partial_ptr is not None:
        out = partial_ptr + (b * time_blocks + t0 // STEPS) * (W + 1) * d + c
        for j in tl.static_range(W):
            tl.store(out + j * d, dweights[j], mask=in_c)
        tl.store(out + W * d, dbias, mask=in_c)
    if dstate_ptr is not None:
        for i in tl.static_range(W - 1):
            dstate = _gathered(gs, owners if seq_ptr is not None else None, weights, zero, i - (W - 1), W)
            at = dstate_ptr + (b * (W - 1) + i) * d + c
            tl.store(at, dstate.to(dstate_ptr.dtype.element_ty), mask=in_c & (t0 == 0))


@helper
def _gathered(gs, owners, weights, total, i: tl.constexpr, W: tl.constexpr):
    """The gradient of x at step t0 + i, i >= 1 - W, from those steps that see it and are not before t0."""
    for lag in tl.static_range(W):
        if i + lag >= 0:
            g = gs[i + lag]
            if owners is not None:
                g = tl.where(owners[i + W - 1] == owners[i + lag + W - 1], g, 0.0)
            total += weights[W - 1 - lag] * g
    return total


class _Problem:
    """What kernels of both passes are given."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        seq_idx: Tensor | None,
        silu: bool,
        blocks: Blocks,
    ):
        batch, self.length, d = x.shape
        self.dtype = compute_dtype(x)
        self.time_blocks = cdiv(self.length, blocks["STEPS"])
        channel_blocks = cdiv(d, blocks["CHANNELS"])
        rest = [None if t is None else t.contiguous() for t in (bias, state, seq_idx)]
        self.inputs = (x, weight.t().contiguous(), *rest)
        self.sizes = (*x.stride(), self.length, d, self.time_blocks, channel_blocks)
        self.grid = (batch * self.time_blocks * channel_blocks,)
        self.constants = {"W": weight.shape[1], "SILU": silu, "ACC": accumulator(self.dtype), **blocks}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> Tensor:
    """y (batch, L, d), contiguous, of x (batch, L, d) and state (batch, W - 1, d), in x's dtype."""
    p = _Problem(x, weight, bias, state, seq_idx, silu, FORWARD.of(x, x.shape[0] * x.shape[1], x.shape[2]))
    y = x.new_empty(x.shape)
    launch(_forward_kernel, p.grid, *p.inputs, y, *p.sizes, **p.constants)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and state, those of weight and bias in float32 at least; None if not needed."""
    (batch, _, d), W = x.shape, weight.shape[1]
    blocks = BACKWARD.of(x, x.shape[0] * x.shape[1], d)
    if W > 4:  # all is unrolled: with twice the steps ptxas takes a minute, and all registers
        blocks = {**blocks, "STEPS": min(16, blocks["STEPS"])}
    if seq_idx is not None:  # takes registers for whose each step is
        blocks = {**blocks, "STEPS": min(4 if x.dtype == torch.float64 else 16, blocks["STEPS"])}
    p = _Problem(x, weight, bias, state, seq_idx, silu, blocks)
    dx = x.new_empty(x.shape) if needed[0] else None
    dstate = torch.empty(state.shape, dtype=state.dtype, device=x.device) if needed[3] and state is not None else None
    if dstate is not None and p.length == 0:
        dstate.zero_()
    sums = needed[1] or needed[2]
    partial = torch.empty(batch * p.time_blocks, W + 1, d, dtype=p.dtype, device=x.device) if sums else None
    launch(_backward_kernel, p.grid, dy, *p.inputs, dx, partial, dstate, *dy.stride(), *p.sizes, **p.constants)
    if partial is None:
        return dx, None, None, dstate
    total = partial.sum(0)
    return dx, total[:W].t().contiguous(), total[W].clone(), dstate


def _forward_rule(dtype: torch.dtype, rows: int, d: int) -> Blocks:
    return {"STEPS": 16, "CHANNELS": min(d, 128), "num_warps": 1}


def _backward_rule(dtype: torch.dtype, rows: int, d: int) -> Blocks:
    """Two channels a thread, and as many steps as there are registers for: sums for the weights are 5 / 32 an input."""
    return {"STEPS": 16 if dtype == torch.float64 else 32, "CHANNELS": min(d, 64), "num_warps": 1}


def _candidates(dtype: torch.dtype, rows: int, d: int) -> list[Blocks]:
    return [
        {"STEPS": steps, "CHANNELS": channels, "num_warps": warps}
        for steps in (8, 16, 32)
        for channels in (64, 128, 256, 512)
        for warps in (1, 2, 4)
        if channels <= d and 32 * warps <= channels <= 256 * warps
    ]


def _inputs(dtype: torch.dtype, device: Any, rows: int, d: int) -> tuple[Any, ...]:
    x = torch.randn(1, rows, 2 * d, dtype=dtype, device=device)[..., :d]  # half of a projection, as Mamba has it
    weight, bias = torch.randn(d, 4, dtype=dtype, device=device), torch.randn(d, dtype=dtype, device=device)
    return x, weight, bias, None, None, True


def _forward_problem(dtype: torch.dtype, device: Any, rows: int, d: int) -> Any:
    inputs = _inputs(dtype, device, rows, d)
    return lambda: forward(*inputs)


def _backward_problem(dtype: torch.dtype, device: Any, rows: int, d: int) -> Any:
    inputs = _inputs(dtype, device, rows, d)
    arguments: Any = (torch.randn(inputs[0].shape, dtype=dtype, device=device), *inputs, [True] * 4)
    return lambda: backward(*arguments)


_SIZES = [(8 * 2048, 1536)]

FORWARD = BlockSizes("causal_conv1d", _forward_rule, _candidates, _forward_problem, _SIZES)
BACKWARD = BlockSizes("causal_conv1d_backward", _backward_rule, _candidates, _backward_problem, _SIZES)
TUNED = (FORWARD, BACKWARD)
