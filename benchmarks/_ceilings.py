# mypy: allow-untyped-defs
"""What a GPU can do at most, measured: copies, matrix products, fused multiply-adds, special functions."""

from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks._cases import Ceilings
from benchmarks._measure import Call

CHAINS, STEPS = 4, 512
"""Independent chains of a thread, so that latency does not bind, and steps of each."""


@triton.jit
def _chains_kernel(y_ptr, a, b, SPECIAL: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Four chains of `x <- a x + b`, or of `x <- exp2(x)` of numbers that stay between -1 and 0."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = at.to(tl.float32) * -1e-9
    q, r, s = p - 0.25, p - 0.5, p - 0.75
    for _ in range(STEPS):
        if SPECIAL:
            p, q, r, s = tl.exp2(p) - 1.0, tl.exp2(q) - 1.0, tl.exp2(r) - 1.0, tl.exp2(s) - 1.0
        else:
            p, q, r, s = p * a + b, q * a + b, r * a + b, s * a + b
    tl.store(y_ptr + at, p + q + r + s)


def chains(y: torch.Tensor, special: bool, steps: int = STEPS, block: int = 1024) -> None:
    """Runs the chains, one for each element of y and each of four starts. y has a multiple of `block` elements."""
    _chains_kernel[(y.numel() // block,)](y, 0.999, 0.001, SPECIAL=special, STEPS=steps, BLOCK=block)


def measured(time: Any, gigabytes: float = 1.0, side: int = 8192, elements: int = 2**22) -> Ceilings:
    """Ceilings of the current GPU.

    Args:
        time: For a call its ms.
        gigabytes: Size of what is copied.
        side: Of the matrices.
        elements: Of the chains.
    """

    def rate(amount: float, call: Call) -> float:
        return amount / (time(call) * 1e-3)

    y = torch.empty(elements, device="cuda")
    each = float(elements) * CHAINS * STEPS
    wide = torch.randn(side, side, device="cuda")
    narrow = wide.bfloat16()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        tf32 = rate(2.0 * side**3, lambda: wide @ wide)
    finally:
        torch.set_float32_matmul_precision(before)
    bf16 = rate(2.0 * side**3, lambda: narrow @ narrow)
    source = torch.empty(int(gigabytes * 1e9), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Ceilings(
        copy=rate(2.0 * source.numel(), lambda: target.copy_(source)),
        bf16=bf16,
        tf32=tf32,
        pipe=rate(each, lambda: chains(y, special=False)),
        special=rate(each, lambda: chains(y, special=True)),
    )
