# mypy: allow-untyped-defs, allow-incomplete-defs
"""A kernel of all helpers of `kernels/_triton.py`: run by `test_triton.py`, and compiled like those of the ops."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._triton import accumulator, dot, dot_precision, launch, sigmoid, span, tanh


@triton.jit
def _helpers_kernel(x_ptr, y_ptr, N, APPROXIMATE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    at = span(tl.program_id(0), 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + at)
    wide = x.to(ACC)
    out = y_ptr + at
    tl.store(out, sigmoid(wide))
    tl.store(out + N, tanh(wide, APPROXIMATE))
    tl.store(out + 2 * N, dot(x, x, tl.full((32, 32), 0.0, ACC), PRECISION))


def run(x: Tensor, approximate: bool) -> Tensor:
    """(3, 32, 32): sigmoid and tanh of x (32, 32), and x times x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(3, 32, 32, dtype=wide, device=x.device)
    launch(
        _helpers_kernel,
        (1,),
        x,
        y,
        x.numel(),
        APPROXIMATE=approximate,
        PRECISION=dot_precision(x.dtype),
        ACC=accumulator(wide),
    )
    return y
