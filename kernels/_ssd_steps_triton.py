# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the step sizes of `ssd`, and of sums of their products with A; they move a number a token and head.

The sums are made in float64, in units of log 2, and kept as two numbers of float32, hi + lo: their differences are
exact to float32's last bits however large the sums, at three subtractions and one MUFU for each decay.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._ssd import Options
from archzoo.kernels._triton import accumulator, cdiv, helper, launch, narrow, sigmoid, span


@helper
def _softplus(x):
    """log(1 + exp(x)), x itself above 20; as exact as log1p, by what rounding did to 1 + exp(x)."""
    e = tl.exp(tl.where(x > 20, 20.0, x))
    u = 1.0 + e
    return tl.where(x > 20, x, tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0))))


@helper
def _step_sizes(
    dt_ptr, bias_ptr, at, inside, h, in_h,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dt and its bias, Delta before it is clamped, and Delta, which is 0 outside, (Q, HEADS)."""
    raw = tl.load(dt_ptr + at, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + h, mask=in_h, other=0.0).to(ACC)[None, :]
    positive = raw
    if SOFTPLUS:
        positive = _softplus(raw)
    delta = positive
    if LOW is not None:
        delta = tl.where(delta < LOW, tl.full(delta.shape, LOW, ACC), delta)
    if HIGH is not None:
        delta = tl.where(delta > HIGH, tl.full(delta.shape, HIGH, ACC), delta)
    return raw, positive, tl.where(inside, delta, 0.0)


@triton.jit(do_not_specialize=["L", "K"])
def _sums_kernel(
    dt_ptr, bias_ptr, a_ptr, delta_ptr, hi_ptr, lo_ptr, dt_batch, dt_token, a_batch, a_token, L, H, K, blocks,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    Q: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = tl.cast(program // blocks // K, tl.int64)
    rows = span(program // blocks % K, Q)
    h = program % blocks * HEADS + tl.arange(0, HEADS)
    in_h = h < H
    inside = (rows < L)[:, None] & in_h[None, :]
    at = batch * dt_batch + rows[:, None] * dt_token + h[None, :]
    _, _, delta = _step_sizes(dt_ptr, bias_ptr, at, inside, h, in_h, SOFTPLUS, LOW, HIGH, ACC)
    a = tl.load(a_ptr + batch * a_batch + rows[:, None] * a_token + h[None, :], mask=inside, other=0.0).to(ACC)
    sums = tl.cumsum((delta * a).to(tl.float64), 0) * 1.4426950408889634  # exp(x) = 2^(x / log 2)
    hi = sums.to(ACC)
    out = (batch * H + h[None, :]) * K * Q + rows[:, None]
    tl.store(delta_ptr + out, delta, mask=in_h[None, :])
    tl.store(hi_ptr + out, hi, mask=in_h[None, :])
    tl.store(lo_ptr + out, (sums - hi.to(tl.float64)).to(ACC), mask=in_h[None, :])


@triton.jit(do_not_specialize=["L", "K"])
def _steps_backward_kernel(
    dt_ptr, bias_ptr, a_ptr, dlog_ptr, ddelta_ptr, ddt_ptr, da_ptr, dbias_ptr,
    dt_batch, dt_token, a_batch, a_token, L, H, K, blocks, dlog_parts, ddelta_parts, part,
    SOFTPLUS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, A_OF_TOKENS: tl.constexpr,
    Q: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = tl.cast(program // blocks // K, tl.int64)
    rows = span(program // blocks % K, Q)
    h = program % blocks * HEADS + tl.arange(0, HEADS)
    in_h = h < H
    inside = (rows < L)[:, None] & in_h[None, :]
    at = batch * dt_batch + rows[:, None] * dt_token + h[None, :]
    raw, positive, delta = _step_sizes(dt_ptr, bias_ptr, at, inside, h, in_h, SOFTPLUS, LOW, HIGH, ACC)
    a = tl.load(a_ptr + batch * a_batch + rows[:, None] * a_token + h[None, :], mask=inside, other=0.0).to(ACC)
    at = (batch * H + h[None, :]) * K * Q + rows[:, None]
    dlog = tl.full((Q, HEADS), 0.0, ACC)
    for index in range(dlog_parts):
        dlog += tl.load(dlog_ptr + tl.cast(index, tl.int64) * part + at, mask=inside, other=0.0)
    ddt = dlog * a
    for index in range(ddelta_parts):
        ddt += tl.load(ddelta_ptr + tl.cast(index, tl.int64) * part + at, mask=inside, other=0.0)
    if LOW is not None:
        ddt = tl.where(positive < LOW, 0.0, ddt)
    if HIGH is not None:
        ddt = tl.where(positive > HIGH, 0.0, ddt)
    if SOFTPLUS:
        ddt = tl.where(raw > 20, ddt, ddt * sigmoid(raw))
    ddt = tl.where(inside, ddt, 0.0)
    at = (batch * L + rows[:, None]) * H + h[None, :]
    row = tl.cast(program // blocks, tl.int64) * H + h
    if ddt_ptr is not None:
        tl.store(ddt_ptr + at, narrow(ddt, ddt_ptr.dtype.element_ty), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + row, tl.sum(ddt, 0), mask=in_h)
    if da_ptr is not None:
        if A_OF_TOKENS:
            tl.store(da_ptr + at, narrow(dlog * delta, da_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(da_ptr + row, tl.sum(dlog * delta, 0), mask=in_h)


class Steps:
    """Step sizes Delta, and sums of Delta A in each chunk, (batch, H, K Q) each.

    Args:
        dt: (batch, L, H), each token's numbers side by side.
        A: (H,), or (batch, L, H).
        bias: (H,).
        options: The op's.
        dtype: Of the arithmetic.
    """

    def __init__(self, dt: Tensor, A: Tensor, bias: Tensor | None, options: Options, dtype: torch.dtype):
        self.dt, self.A, self.dtype = dt, A.contiguous(), dtype
        self.bias = None if bias is None else bias.contiguous()
        self.batch, self.length, self.heads = dt.shape
        self.steps, self.chunks = options.chunk_size, cdiv(self.length, options.chunk_size)
        self._options = {
            "SOFTPLUS": options.dt_softplus,
            "LOW": None if options.dt_min == -math.inf else options.dt_min,
            "HIGH": None if options.dt_max == math.inf else options.dt_max,
        }
        self.delta, self.hi, self.lo = self.vector(3).unbind()
        self.sum()

    def vector(self, parts: int) -> Tensor:
        """Memory for so many numbers a token and head, (parts, batch, H, K Q)."""
        shape = parts, self.batch, self.heads, self.chunks * self.steps
        return torch.empty(shape, dtype=self.dtype, device=self.dt.device)

    def sum(self) -> None:
        """Fills Delta and the sums."""
        self._launch(_sums_kernel, SUMS, (self.delta, self.hi, self.lo))

    def backward(
        self, dlog: Tensor, ddelta: Tensor, ddt: Tensor | None, dA: Tensor | None, dbias: Tensor | None
    ) -> None:
        """Fills the gradients of dt, A and dt_bias, from all parts of those of Delta A and of Delta x, as `vector`."""
        of_tokens = self.A.dim() == 3
        sums = torch.empty(2, self.batch * self.chunks, self.heads, dtype=self.dtype, device=self.dt.device)
        own = dlog, ddelta, ddt, dA if dA is None or of_tokens else sums[0], None if dbias is None else sums[1]
        numbers = len(dlog), len(ddelta), self.delta.numel()
        self._launch(_steps_backward_kernel, SUMS_BACKWARD, own, numbers, A_OF_TOKENS=of_tokens)
        if dA is not None and not of_tokens:
            dA.copy_(sums[0].sum(0))
        if dbias is not None:
            dbias.copy_(sums[1].sum(0))

    def _launch(
        self,
        kernel: Any,
        sizes: BlockSizes,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int, ...] = (),
        **constants: Any,
    ) -> None:
        blocks = sizes.of(self.dt, self.steps, self.heads)
        tiles = cdiv(self.heads, blocks["HEADS"])
        of_A = self.A.stride()[:2] if self.A.dim() == 3 else (0, 0)
        launch(
            kernel, (self.batch * self.chunks * tiles,), self.dt, self.bias, self.A, *tensors,
            *self.dt.stride()[:2], *of_A, self.length, self.heads, self.chunks, tiles, *numbers,
            Q=self.steps, ACC=accumulator(self.dtype), **self._options, **blocks, **constants,
        )  # fmt: skip


def _rule(dtype: torch.dtype, Q: int, heads: int) -> Blocks:
    return {"HEADS": min(16, heads), "num_warps": 4}


def _candidates(dtype: torch.dtype, Q: int, heads: int) -> list[Blocks]:
    return [{"HEADS": size, "num_warps": warps} for size in (8, 16, 32) if size <= heads for warps in (2, 4, 8)]


def _steps(dtype: torch.dtype, device: Any, Q: int, heads: int) -> Steps:
    dt, A = torch.randn(8, 2048, heads, dtype=dtype, device=device), -torch.rand(heads, device=device)
    return Steps(dt, A, torch.zeros(heads, device=device), Options(Q, True, 0.0, math.inf), torch.float32)


def _problem(dtype: torch.dtype, device: Any, Q: int, heads: int) -> Any:
    return _steps(dtype, device, Q, heads).sum


def _backward_problem(dtype: torch.dtype, device: Any, Q: int, heads: int) -> Any:
    steps = _steps(dtype, device, Q, heads)
    parts, ddt, sums = steps.vector(3), torch.empty_like(steps.dt), torch.empty(2, heads, device=device)
    return lambda: steps.backward(parts, parts[:1], ddt, sums[0], sums[1])


SUMS = BlockSizes("ssd_sums", _rule, _candidates, _problem, [(64, 32)])
SUMS_BACKWARD = BlockSizes("ssd_backward_sums", _rule, _candidates, _backward_problem, [(64, 32)])
TUNED = (SUMS, SUMS_BACKWARD)
