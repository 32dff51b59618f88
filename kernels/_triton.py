# mypy: allow-untyped-defs, allow-incomplete-defs
r"""What Triton kernels share, and how an op gets one. Imports triton, so that it is itself imported late.

**Files.** `kernels/<op>.py` keeps the definition, the CPU's algorithm, the custom ops and the public function, and
never imports triton. The kernels are in `kernels/_<op>_triton.py`: `@triton.jit` functions whose names end in
`_kernel`, one host function for each pass (tensors in, tensors out), and `TUNED`, a tuple of `BlockSizes`. Each such
file is found by its name, by `tune()` and by the test that compiles all kernels. An example:
`_normalized_residual_triton.py`.

**Choice.** The op is a `DifferentiableOp` of `_op.py`. The public function asks
`triton = takes_triton("op", x=x, …)` once, behind `if under_transform():`, in which `refuse_triton` comes first. The
answer is the last argument, `triton: bool = False`, of the forward and the backward, which begin `if triton: from
archzoo.kernels import _<op>_triton`. So one op has one fake, one FLOP formula and one autograd for both backends, a
compiled or exported graph holds the choice, and a backward goes where its forward went. A kernel takes every shape, and
every dtype of `takes_triton`; what it cannot take is refused with a ValueError that says so. For how few numbers plain
torch is the faster, is measured: with a problem in `_threshold_problems.py`, and words for it in `_thresholds.py`.

**A kernel.** Functions that it calls are decorated `@helper`. Offsets of rows by `span`, in int64. A mask for every
dimension that can overrun. `.to(ACC)` right behind each load; narrowing in the store alone, by
`.to(y_ptr.dtype.element_ty)`. Sums for parameters: one row of a partial buffer in `ACC` for each program, then one
`sum(0)` in torch; no atomics. A tensor that may be left out is a None pointer: `if dh_ptr is not None:`. Everything on
grid axis 0, as the others end at 65535. Sizes that differ from batch to batch, and that no load's alignment hangs on,
are `do_not_specialize`: Triton compiles anew where a whole number becomes 1, or a multiple of 16. Host functions start
kernels by `launch`, which minds empty grids and the device. NaN comes through: `tl.maximum(nan, 0)` is 0, so write
`tl.where`.

**Traps.** A literal is rounded to float32 where no operator joins it with a float64 tensor (`tl.maximum(x, 1e-12)`,
`tl.where(c, 1e-12, 1e-9)`). In the interpreter `tl.sum`, `tl.zeros`, `tl.sigmoid` and what else Triton wrote in Triton
take 2 to 4 ms a call, all others 0.1: few programs, and `tl.full`. Results of an op may share no memory, not even as
views of one tensor.

**Tests.** `tests/kernels/triton_support.py` has the checks that every op owes. `python -m tests.kernels.compile_kernels
<op> <op>_backward` compiles an op's kernels for GPUs that are not here, and prints registers, shared memory and spills.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from archzoo.kernels._backend import INTERPRET

INTERPRETED = tl.constexpr(INTERPRET)
"""For kernels: whether they run in the interpreter, which has neither libdevice nor inline assembly."""

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
"""What of a launch's keywords is meant for the compiler."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's dtype of a kernel's arithmetic, of that of `compute_dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products of this dtype: torch's own choice, where Triton would silently take tf32.

    For float32 it is three products by tf32, as exact as float32; "ieee" knows no tensor cores, and spills.
    """
    if dtype != torch.float32:
        return "ieee"
    # `torch.get_float32_matmul_precision` raises where a program has set this; what sets that sets this as well.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Starts a kernel over a grid, on the device of its first tensor; an empty grid does nothing.

    Args:
        kernel: What `@triton.jit` made.
        grid: Number of programs along each axis.
        args: The kernel's arguments, contiguous tensors, whole numbers and None, in order.
        constants: Its constexprs and the compiler's `OPTIONS`, by name.
    """
    if all(grid):
        _start(kernel, grid, args, constants)


def _start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), _as_quiet_as_a_gpu():
        kernel[grid](*args, **constants)


def _as_quiet_as_a_gpu() -> Any:
    """The interpreter computes by NumPy, which would warn of what overflows, also where a mask throws it away."""
    if not INTERPRET:
        return nullcontext()
    import numpy

    return numpy.errstate(all="ignore")


def helper(function: Any) -> Any:
    """Decorator of a function that kernels call: `@triton.jit`, but a plain function in the interpreter.

    There a call of what `@triton.jit` made patches triton's language anew, which takes 2 ms; all else takes 0.1 ms.
    """
    return function if INTERPRET else triton.jit(function)


@helper
def span(index, SIZE: tl.constexpr):
    """Indices of the `index`-th block of SIZE, in int64: a product by a stride may exceed int32."""
    return tl.cast(index, tl.int64) * SIZE + tl.arange(0, SIZE)


@helper
def sigmoid(x):
    """1 / (1 + exp(-x)) of float32 or float64. On a GPU 2 MUFU and 4 more in float32; within 3 ulp, 0 below -87."""
    if INTERPRETED:
        y = tl.sigmoid(x)
    elif x.dtype == tl.float32:
        y = libdevice.fast_dividef(1.0, 1.0 + tl.exp(-x))
    else:
        y = tl.sigmoid(x)
    return y


@helper
def tanh(x, APPROXIMATE: tl.constexpr):
    """tanh of float32 or float64.

    APPROXIMATE, of float32 on a GPU: 1 MUFU, with an error of 2^-11, for results that are stored in 16 bits. Otherwise
    2 MUFU and a polynomial near 0, where exp(-2|x|) would cancel; within a few ulp everywhere.
    """
    if APPROXIMATE and not INTERPRETED and x.dtype == tl.float32:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        z = x * x
        small = 2.0 / 15.0 + z * (-17.0 / 315.0 + z * (62.0 / 2835.0 + z * (-1382.0 / 155925.0)))
        small = x + x * z * (-1.0 / 3.0 + z * small)
        e = tl.exp(-2.0 * tl.abs(x))
        large = (1.0 - e) / (1.0 + e)
        # Up to 1/16 the polynomial is exact for float64, and up to 0.35 for float32, whose exp is 2 ulp off on a GPU.
        near = 0.00390625 if x.dtype == tl.float64 else 0.125
        y = tl.where(z < near, small, tl.where(x < 0, -large, large))
    return y


@helper
def narrow(x, DTYPE: tl.constexpr):
    """x in another dtype, rounded to the nearest in the interpreter too, which cuts off what bfloat16 does not have."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@helper
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, acc being float32, or float64 for float64. Products of bfloat16 are right in the interpreter too."""
    if INTERPRETED:
        if a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
        if b.dtype == tl.bfloat16:
            b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
