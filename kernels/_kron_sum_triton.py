# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `kron_sum` and `kron_linear`: the sum H itself, and its gradient pulled back to A and S.

With e = k D + d an element of every S_i, and pq = p Q + q a block of H, H[pq, e] = sum_i A[i, pq] S[i, e]. A program
has a tile of elements e, and of H that of some (forward) or all (backward) blocks. Forward is bound by memory: S is
read P times, mostly from L2, and H written once. Backward keeps a tile of dH in registers, reads it once, and goes
through the n terms: a tile of dS is whole in its program, and dA is summed over programs afterwards.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes, power_of_two
from archzoo.kernels._op import compute_dtype
from archzoo.kernels._triton import accumulator, cdiv, launch, span


@triton.jit
def _forward_kernel(
    a_ptr, s_ptr, h_ptr, n, P, Q, K, D, tiles, q_blocks,
    BLOCKS: tl.constexpr, ELEMENTS: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Programs of one tile come together: they read the same of S.
    program = tl.program_id(0)
    e = span(program // (P * q_blocks), ELEMENTS)
    p = program // q_blocks % P
    q = program % q_blocks * BLOCKS + tl.arange(0, BLOCKS)
    in_tile = e < tl.cast(K, tl.int64) * D
    H = tl.full((BLOCKS, ELEMENTS), 0.0, ACC)
    for i in range(n):
        a = tl.load(a_ptr + (i * P + p) * Q + q, mask=q < Q, other=0.0).to(ACC)
        s = tl.load(s_ptr + tl.cast(i, tl.int64) * K * D + e, mask=in_tile, other=0.0).to(ACC)
        H += a[:, None] * s[None, :]
    row = tl.cast(p, tl.int64) * K + e // D
    at = row * Q * D + e % D
    if ALIGNED:  # as D is a multiple of 8, so many neighbours in a tile are neighbours in H
        at = tl.max_contiguous(tl.multiple_of(at, 8), 8)
    inside = (q < Q)[:, None] & in_tile[None, :]
    tl.store(h_ptr + at[None, :] + (q * D)[:, None], H.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dh_ptr, a_ptr, s_ptr, da_ptr, ds_ptr, n, P, Q, K, D, row_step, tiles,
    TERMS: tl.constexpr, BLOCKS: tl.constexpr, ELEMENTS: tl.constexpr, STEPS: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = tl.cast(program % tiles, tl.int64)
    chunk = tl.cast(program // tiles, tl.int64)
    pq = chunk * BLOCKS + tl.arange(0, BLOCKS)
    in_blocks = pq < P * Q
    block = pq // Q * K * row_step + pq % Q * D
    size = tl.cast(K, tl.int64) * D
    term = tl.arange(0, TERMS)
    dA = tl.full((TERMS, BLOCKS), 0.0, ACC)
    for step in range(STEPS):
        e = span(tile * STEPS + step, ELEMENTS)
        in_tile = e < size
        at = e // D * row_step + e % D
        if ALIGNED:
            at = tl.max_contiguous(tl.multiple_of(at, 8), 8)
        inside = in_blocks[:, None] & in_tile[None, :]
        dH = tl.load(dh_ptr + block[:, None] + at[None, :], mask=inside, other=0.0).to(ACC)
        for i in range(n):
            if ds_ptr is not None:
                a = tl.load(a_ptr + tl.cast(i, tl.int64) * P * Q + pq, mask=in_blocks, other=0.0).to(ACC)
                tl.store(ds_ptr + (chunk * n + i) * size + e, tl.sum(a[:, None] * dH, 0), mask=in_tile)
            if da_ptr is not None:
                s = tl.load(s_ptr + i * size + e, mask=in_tile, other=0.0).to(ACC)
                dA += tl.where((term == i)[:, None], tl.sum(dH * s[None, :], 1)[None, :], 0.0)
    if da_ptr is not None:
        out = da_ptr + (tile * n + term)[:, None] * P * Q + pq[None, :]
        tl.store(out, dA, mask=(term < n)[:, None] & in_blocks[None, :])


def forward(A: Tensor, S: Tensor, dtype: torch.dtype) -> Tensor:
    """H (P K, Q D) in the given dtype, of A (n, P, Q) and S (n, K, D)."""
    (n, P, Q), (_, K, D) = A.shape, S.shape
    H = torch.empty(P * K, Q * D, dtype=dtype, device=S.device)
    blocks = FORWARD.of(H, n, Q, K * D)
    tiles, q_blocks = cdiv(K * D, blocks["ELEMENTS"]), cdiv(Q, blocks["BLOCKS"])
    launch(
        _forward_kernel, (tiles * P * q_blocks,), A.contiguous(), S.contiguous(), H, n, P, Q, K, D, tiles, q_blocks,
        ALIGNED=D % 8 == 0, ACC=accumulator(compute_dtype(A, S)), **blocks,
    )  # fmt: skip
    return H


def backward(dH: Tensor, A: Tensor, S: Tensor, need_A: bool, need_S: bool) -> tuple[Tensor | None, Tensor | None]:
    """dA (n, P, Q) and dS (n, K, D) in float32 at least; None for what is not needed. dH (P K, Q D)."""
    (n, P, Q), (_, K, D) = A.shape, S.shape
    dH, A, S = dH.contiguous(), A.contiguous(), S.contiguous()
    wide = compute_dtype(A, S, dH)
    blocks = BACKWARD.of(dH, n, P * Q, K * D)
    tiles, chunks = cdiv(K * D, blocks["ELEMENTS"] * blocks["STEPS"]), cdiv(P * Q, blocks["BLOCKS"])
    dA = torch.empty(tiles, n, P, Q, dtype=wide, device=S.device) if need_A else None
    dS = torch.empty(chunks, n, K, D, dtype=wide, device=S.device) if need_S else None
    launch(
        _backward_kernel, (tiles * chunks,), dH, A, S, dA, dS, n, P, Q, K, D, Q * D, tiles,
        TERMS=power_of_two(n), ALIGNED=D % 8 == 0, ACC=accumulator(wide), **blocks,
    )  # fmt: skip
    return None if dA is None else dA.sum(0), None if dS is None else dS.sum(0) if chunks > 1 else dS[0]


def _forward_rule(dtype: torch.dtype, n: int, Q: int, size: int) -> Blocks:
    blocks = min(Q, 8)
    # 4096 numbers of 16 bits a program are 32 a thread; fewer where few programs would be left.
    elements = max(128, min(4096 // blocks, 1024, size // 32))
    return {"BLOCKS": blocks, "ELEMENTS": elements, "num_warps": 4}


def _forward_candidates(dtype: torch.dtype, n: int, Q: int, size: int) -> list[Blocks]:
    return [
        {"BLOCKS": blocks, "ELEMENTS": elements, "num_warps": warps}
        for blocks in (1, 2, 4, 8, 16)
        if blocks <= max(1, Q)
        for elements in (128, 256, 512, 1024)
        for warps in (4, 8)
        if blocks * elements <= 1024 * warps
    ]


def _backward_rule(dtype: torch.dtype, n: int, count: int, size: int) -> Blocks:
    blocks = min(count, 1024)
    warps = 4 if blocks <= 64 else 8 if blocks <= 256 else 16
    elements = max(16, min(256, 2048 * warps // blocks))
    # The partial sums of dA are 2 n / (ELEMENTS STEPS) of the bytes of dH, in 16 bits; those of dS 2 n / BLOCKS.
    steps = max(1, 32 * n // elements)
    return {"BLOCKS": blocks, "ELEMENTS": elements, "STEPS": steps, "num_warps": warps}


def _backward_candidates(dtype: torch.dtype, n: int, count: int, size: int) -> list[Blocks]:
    own = _backward_rule(dtype, n, count, size)
    return [
        {**own, "ELEMENTS": elements, "STEPS": max(1, 32 * n // elements), "num_warps": warps}
        for elements in (16, 32, 64, 128, 256, 512)
        for warps in (4, 8, 16)
        if own["BLOCKS"] * elements <= 2048 * warps
    ]


def _inputs(dtype: torch.dtype, device: Any, n: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    K = 1 << (size.bit_length() - 1) // 2
    A, S = torch.randn(n, n, n, dtype=dtype, device=device), torch.randn(n, K, size // K, dtype=dtype, device=device)
    return A, S, torch.randn(n * K, n * (size // K), dtype=dtype, device=device)


def _forward_problem(dtype: torch.dtype, device: Any, n: int, Q: int, size: int) -> Any:
    A, S, _ = _inputs(dtype, device, n, size)
    return lambda: forward(A, S, dtype)


def _backward_problem(dtype: torch.dtype, device: Any, n: int, count: int, size: int) -> Any:
    A, S, dH = _inputs(dtype, device, n, size)
    return lambda: backward(dH, A, S, True, True)


FORWARD = BlockSizes(
    "kron_sum", _forward_rule, _forward_candidates, _forward_problem, [(4, 4, 2**20), (4, 4, 2**14), (16, 16, 2**16)]
)
BACKWARD = BlockSizes(
    "kron_sum_backward",
    _backward_rule,
    _backward_candidates,
    _backward_problem,
    [(4, 16, 2**20), (4, 16, 2**14), (16, 256, 2**16)],
)
TUNED = (FORWARD, BACKWARD)
