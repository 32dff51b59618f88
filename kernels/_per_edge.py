# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the Triton kernels of ops with a function on every edge share: APTx neurons, wavelets, and the NMU's factors.

Each sums, or multiplies, over k some function of a number of (m, k) and of numbers of (n, k), for all (m, n), which no
GEMM does. A program has a tile (BM, BN) in registers and walks k alone, for each of `groups` such problems. What goes
by n is read as (k, n), a few neighbours at a time; what goes by m is the same for most threads of a warp, so its layout
matters little. Of two passes over the edges the first walks inputs, for y; then one walks outputs, for the gradient of
x; and one walks rows, some of them in each program where there are few parameters, for the gradients of these.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._triton import INTERPRETED, cdiv, helper

_PROGRAMS = 512  # that fill a GPU of 132 multiprocessors: about four for each


@helper
def place(program, tiles_m, tiles_n):
    """Of a program: its group, its tile of m, and its tile of n."""
    return program // tiles_n // tiles_m, program // tiles_n % tiles_m, program % tiles_n


@helper
def zeros(ptr, at, size):
    """A tile of 0, laid out in threads as loads from `ptr + at` would be; a tile of a constant has runs of 1 in n.

    No load is done, as no `size` is negative, which the compiler does not know.
    """
    return tl.load(ptr + at, mask=(at < 0) & (size < 0), other=0.0)


@helper
def reciprocal(x):
    """1 / x of float32 or float64. On a GPU, for float32, 1 MUFU, within 1 ulp; denormals count as 0."""
    if INTERPRETED or x.dtype == tl.float64:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@helper
def exp2(x):
    """2^x of float32 or float64. On a GPU, for float32, 1 MUFU; what would be denormal is 0."""
    if INTERPRETED or x.dtype == tl.float64:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


def tile_rule(M: int, N: int, elements: int, each: int) -> Blocks:
    """A tile of at most so many elements, `each` a thread, but smaller where a GPU would not be filled.

    Its sides are less than the number of threads, where they can be: what goes by m or by n is then loaded by each
    thread for itself, and otherwise passes through shared memory, with a barrier each time.
    """
    bn = min(N, 64 if elements <= 4096 else 128)
    bm = min(M, elements // bn)
    bn = min(N, 256, elements // bm)
    while bm * bn > 256 and cdiv(M, bm) * cdiv(N, bn) < _PROGRAMS:
        if bn > 2 * bm:
            bn //= 2
        else:
            bm //= 2
    warps = max(1, min(8, bm * bn // (32 * each)))
    while max(bm, bn) >= 32 * warps and bm * bn >= 256 * warps:
        warps *= 2
    return {"BM": bm, "BN": bn, "num_warps": warps}


def rows_rule(outputs: int, inputs: int, rows: int, sums: int, elements: int, each: int) -> Blocks:
    """The same for sums over rows, of which there are `sums`; ROWS is the number of rows in a program.

    Partial sums take at most an eighth of the memory of the rows.
    """
    blocks = tile_rule(outputs, inputs, elements, each)
    tiles = cdiv(outputs, blocks["BM"]) * cdiv(inputs, blocks["BN"])
    splits = min(cdiv(_PROGRAMS, tiles), rows * (outputs + inputs) // (8 * sums * outputs * inputs), cdiv(rows, 16))
    return {**blocks, "ROWS": cdiv(rows, max(1, splits))}


def tile_candidates(M: int, N: int, elements: int) -> list[Blocks]:
    """Tiles for `tune()` to try."""
    return [
        {"BM": bm, "BN": bn, "num_warps": warps}
        for bm in (8, 16, 32, 64, 128)
        for bn in (16, 32, 64, 128)
        for warps in (1, 2, 4, 8)
        if bm <= M and bn <= N and max(bm, bn) < 32 * warps and 256 * warps <= bm * bn <= min(elements, 2048 * warps)
    ]


def rows_candidates(outputs: int, inputs: int, rows: int, sums: int, elements: int) -> list[Blocks]:
    """The same for sums over rows."""
    own = rows_rule(outputs, inputs, rows, sums, elements, 16)["ROWS"]
    return [{**tile, "ROWS": own} for tile in tile_candidates(outputs, inputs, elements)]


def tiling(blocks: Blocks, groups: int, M: int, N: int) -> tuple[int, int, int]:
    """Number of programs, and of tiles in m and in n."""
    tiles_m, tiles_n = cdiv(M, blocks["BM"]), cdiv(N, blocks["BN"])
    return groups * tiles_m * tiles_n, tiles_m, tiles_n


def partial_sums(splits: int, like: Tensor, dtype: torch.dtype, needed: Sequence[bool]) -> list[Any]:
    """Memory for sums over rows, one of each program; None for one that is not needed."""
    return [torch.empty(splits, *like.shape, dtype=dtype, device=like.device) if need else None for need in needed]


def edge_block_sizes(
    op: str,
    problem: Callable[[torch.dtype, Any, int, int, int], tuple[Tensor, Tensor, Any]],
    forward: Callable[..., Any],
    input_gradient: Callable[..., Any],
    parameter_sums: Callable[..., Any],
) -> tuple[BlockSizes, BlockSizes, BlockSizes]:
    """Those of the three passes of an op with three parameters an edge: forward, dx, and the sums for parameters.

    Args:
        op: Name of the forward pass.
        problem: For (dtype, device, rows, outputs, inputs) dy and x (1, rows, features), and the prepared parameters.
        forward: Of x and these, and a bias.
        input_gradient: Of dy, x and these.
        parameter_sums: The same, and which are needed.
    """

    def forward_problem(dtype: torch.dtype, device: Any, rows: int, outputs: int, inputs: int) -> Any:
        _, x, edges = problem(dtype, device, rows, outputs, inputs)
        return lambda: forward(x, edges, None)

    def input_problem(dtype: torch.dtype, device: Any, rows: int, inputs: int, outputs: int) -> Any:
        dy, x, edges = problem(dtype, device, rows, outputs, inputs)
        return lambda: input_gradient(dy, x, edges)

    def parameters_problem(dtype: torch.dtype, device: Any, outputs: int, inputs: int, rows: int) -> Any:
        dy, x, edges = problem(dtype, device, rows, outputs, inputs)
        return lambda: parameter_sums(dy, x, edges, [True] * 3)

    def rule(dtype: torch.dtype, M: int, N: int, K: int) -> Blocks:
        return tile_rule(M, N, 4096, 32)

    def candidates(dtype: torch.dtype, M: int, N: int, K: int) -> list[Blocks]:
        return tile_candidates(M, N, 4096)

    def parameters_rule(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> Blocks:
        return rows_rule(outputs, inputs, rows, 3, 2048, 16)

    def parameters_candidates(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> list[Blocks]:
        return rows_candidates(outputs, inputs, rows, 3, 2048)

    return (
        BlockSizes(op, rule, candidates, forward_problem, [(8192, 3072, 768), (256, 128, 784)]),
        BlockSizes(f"{op}_dx", rule, candidates, input_problem, [(8192, 768, 3072), (256, 784, 128)]),
        BlockSizes(
            f"{op}_dparameters",
            parameters_rule,
            parameters_candidates,
            parameters_problem,
            [(3072, 768, 8192), (128, 784, 256)],
        ),
    )
