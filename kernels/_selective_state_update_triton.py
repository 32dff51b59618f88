# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of one step of the selective scan; equations and names as in `selective_state_update.py`.

A program has CHANNELS channels of a sequence, and walks their states STATES at a time. Whatever is broadcast, as the
one decay of all channels and states of a head, is read with strides of 0. Bound by memory: the state is read and
written once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._op import compute_dtype
from archzoo.kernels._selective_scan_triton import LOG2E, softplus_of, total_of
from archzoo.kernels._triton import accumulator, cdiv, launch, sigmoid


@triton.jit
def _update_kernel(
    state_ptr, x_ptr, dt_ptr, z_ptr, A_ptr, D_ptr, bias_ptr, B_ptr, C_ptr, out_ptr,
    state_b, state_h, state_p, state_n, x_b, x_h, x_p, dt_b, dt_h, dt_p, z_b, z_h, z_p,
    A_h, A_p, A_n, D_h, D_p, bias_h, bias_p, B_b, B_g, B_n, C_b, C_g, C_n, H, P, N, per_B, per_C, blocks,
    SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.cast(tl.program_id(0) // blocks, tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    in_c = c < H * P
    h = tl.cast(c // P, tl.int64)
    p = tl.cast(c % P, tl.int64)
    x = tl.load(x_ptr + b * x_b + h * x_h + p * x_p, mask=in_c, other=0.0).to(ACC)
    delta = tl.load(dt_ptr + b * dt_b + h * dt_h + p * dt_p, mask=in_c, other=0.0).to(ACC)
    if bias_ptr is not None:
        delta += tl.load(bias_ptr + h * bias_h + p * bias_p, mask=in_c, other=0.0).to(ACC)
    if SOFTPLUS:
        delta, _slope = softplus_of(delta)
    state_at = state_ptr + (b * state_b + h * state_h + p * state_p)[:, None]
    A_at = A_ptr + (h * A_h + p * A_p)[:, None]
    B_at = B_ptr + (b * B_b + h * per_B // H * B_g)[:, None]
    C_at = C_ptr + (b * C_b + h * per_C // H * C_g)[:, None]
    y = tl.full((CHANNELS,), 0.0, ACC)
    for start in range(0, N, STATES):
        n = tl.cast(start + tl.arange(0, STATES), tl.int64)[None, :]
        inside = in_c[:, None] & (n < N)
        A = tl.load(A_at + n * A_n, mask=inside, other=0.0).to(ACC)
        B = tl.load(B_at + n * B_n, mask=inside, other=0.0).to(ACC)
        C = tl.load(C_at + n * C_n, mask=inside, other=0.0).to(ACC)
        state = tl.load(state_at + n * state_n, mask=inside, other=0.0).to(ACC)
        state = tl.exp2(delta[:, None] * (A * LOG2E)) * state + (delta * x)[:, None] * B
        tl.store(state_at + n * state_n, state.to(state_ptr.dtype.element_ty), mask=inside)
        y += total_of(state * C, 1)
    if D_ptr is not None:
        y += tl.load(D_ptr + h * D_h + p * D_p, mask=in_c, other=0.0).to(ACC) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + b * z_b + h * z_h + p * z_p, mask=in_c, other=0.0).to(ACC)
        y *= z * sigmoid(z)
    tl.store(out_ptr + b * H * P + c, y.to(out_ptr.dtype.element_ty), mask=in_c)


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """Advances the state in place, and returns the output; arguments as those of `selective_state_update`."""
    if any(size > 1 and stride == 0 for size, stride in zip(state.shape, state.stride(), strict=True)):
        raise ValueError(f"state of strides {state.stride()}: must be memory of its own for each number, to be updated")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, H, *heads, N = state.shape
    P = heads[0] if heads else 1  # without heads each channel is one
    strides: list[int] = []
    for t, axis, shape in (
        (state, 2, (batch, H, P, N)), (x, 2, (batch, H, P)), (dt, 2, (batch, H, P)), (z, 2, (batch, H, P)),
        (A, 1, (H, P, N)), (D, 1, (H, P)), (dt_bias, 1, (H, P)),
    ):  # fmt: skip
        if t is None:
            strides += [0] * len(shape)
        else:
            strides += (t if heads else t.unsqueeze(axis)).expand(shape).stride()
    groups = []
    for t in (B, C):
        own = t if t.dim() == 3 else t.unsqueeze(1)
        strides += own.stride()
        groups.append(own.shape[1])
    blocks = UPDATE.of(x, batch * H * P, N)
    per_sequence = cdiv(H * P, blocks["CHANNELS"])
    launch(
        _update_kernel, (batch * per_sequence,), state, x, dt, z, A, D, dt_bias, B, C, out, *strides,
        H, P, N, *groups, per_sequence, SOFTPLUS=softplus, ACC=accumulator(compute_dtype(x, state)), **blocks,
    )  # fmt: skip
    return out


def _rule(dtype: torch.dtype, channels: int, N: int) -> Blocks:
    """512 states a warp, and 4 warps where there are many; in float64 half as many, for want of registers."""
    states, warps = min(N, 128), 1 if channels * N < 2**19 else 4
    elements = warps * (256 if dtype == torch.float64 else 512)
    return {"CHANNELS": min(channels, max(1, elements // states)), "STATES": states, "num_warps": warps}


def _candidates(dtype: torch.dtype, channels: int, N: int) -> list[Blocks]:
    return [
        {"CHANNELS": elements // states, "STATES": states, "num_warps": warps}
        for states in (16, 32, 64, 128)
        if states <= N
        for elements in (256, 512, 1024, 2048, 4096)
        for warps in (1, 2, 4)
        if states <= elements <= 2048 * warps
    ]


def _problem(dtype: torch.dtype, device: Any, channels: int, N: int) -> Any:
    d = min(channels, 1536)
    batch = channels // d
    x, dt, z = (torch.randn(batch, d, dtype=dtype, device=device) for _ in range(3))
    B, C = torch.randn(batch, 2 * N, dtype=dtype, device=device).chunk(2, -1)
    state, A, D = (
        torch.zeros(batch, d, N, device=device),
        -torch.rand(d, N, device=device),
        torch.ones(d, device=device),
    )
    return lambda: update(state, x, dt, A, B, C, D, z, D, True)


UPDATE = BlockSizes("selective_state_update", _rule, _candidates, _problem, [(1536, 16), (128 * 1536, 128)])
TUNED = (UPDATE,)
