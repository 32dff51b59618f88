# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `capsule_routing`; equations and names as there, but for L, the I there.

Votes of one lower capsule for a block of samples are one product of BN x K by K x J D numbers, made where they are
needed, and stay in registers. A round is one kernel, whose programs have a block of samples and STEPS lower capsules,
and one that adds up what they leave, and squashes.

Votes of more upper capsules than fit are made in tiles of BJ x BD numbers, each a program's own. Then a kernel comes
before the round's that takes the softmax of each tile alone: put together, N L numbers, they are those of all. Beyond
BD numbers, an upper capsule's scalar products are sums over its tiles, made again by each; beyond BK, votes are sums
over parts of u and W.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes, power_of_two
from archzoo.kernels._triton import accumulator, cdiv, dot, dot_precision, helper, launch, span


@helper
def vectors(ptr, rows, j0, d0, N, J, D, BJ: tl.constexpr, BD: tl.constexpr):
    """Where a tile of vectors (N, J, D) of a block of samples is, (BN, BJ, BD), and what of it there is."""
    j = j0 + tl.arange(0, BJ)[None, :, None]
    d = d0 + tl.arange(0, BD)[None, None, :]
    n = rows[:, None, None]
    return ptr + (n * J + j) * D + d, (n < N) & (j < J) & (d < D)


@helper
def read(ptr, rows, j0, d0, N, J, D, BJ: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    at, inside = vectors(ptr, rows, j0, d0, N, J, D, BJ, BD)
    return tl.load(at, mask=inside, other=0.0).to(ACC)


@helper
def lower(u_ptr, rows, i, k0, N, L, K, BK: tl.constexpr, ACC: tl.constexpr):
    """BK numbers of u_i of a block of samples, (BN, BK)."""
    k = k0 + tl.arange(0, BK)[None, :]
    n = rows[:, None]
    return tl.load(u_ptr + (n * L + i) * K + k, mask=(n < N) & (k < K) & (i < L), other=0.0).to(ACC)


@helper
def weight_tile(w_ptr, i, k0, j0, d0, J, D, K, BJ: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """A tile of W_i, (BK, BJ BD), of W as (L, K, J, D)."""
    k = k0 + tl.arange(0, BK)[:, None]
    jd = tl.arange(0, BJ * BD)[None, :]
    j, d = j0 + jd // BD, d0 + jd % BD
    return tl.load(w_ptr + ((i * K + k) * J + j) * D + d, mask=(k < K) & (j < J) & (d < D), other=0.0).to(ACC)


@helper
def votes_of(
    u_ptr, w_ptr, rows, i, j0, d0, N, L, J, D, K,
    BJ: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of the votes of i for a block of samples, (BN, BJ, BD); 0 for an i beyond the last."""
    own = tl.minimum(i, L - 1)
    votes = tl.full((rows.shape[0], BJ * BD), 0.0, ACC)
    for part in range(KT):
        u = lower(u_ptr, rows, i, part * BK, N, L, K, BK, ACC)
        w = weight_tile(w_ptr, own, part * BK, j0, d0, J, D, K, BJ, BD, BK, ACC)
        votes = dot(u, w, votes, PRECISION)
    return tl.reshape(votes, (rows.shape[0], BJ, BD))


@helper
def agreements(
    votes, V, ds, V_ptr, ds_ptr, u_ptr, w_ptr, rows, i, j0, N, L, J, D, K,
    BK: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scalar products of the votes with V, and with ds if it is there, (BN, BJ): of their one tile, or made again."""
    BJ: tl.constexpr = votes.shape[1]
    BD: tl.constexpr = votes.shape[2]
    if DT == 1:
        logits = tl.sum(votes * V, 2)
        dshares = tl.sum(votes * ds, 2) if ds_ptr is not None else logits
    else:
        logits = tl.full((votes.shape[0], BJ), 0.0, votes.dtype)
        dshares = logits
        for tile in range(DT):
            d0 = tile * BD
            some = votes_of(u_ptr, w_ptr, rows, i, j0, d0, N, L, J, D, K, BJ, BD, BK, KT, PRECISION, votes.dtype)
            logits += tl.sum(some * read(V_ptr, rows, j0, d0, N, J, D, BJ, BD, votes.dtype), 2)
            if ds_ptr is not None:
                dshares += tl.sum(some * read(ds_ptr, rows, j0, d0, N, J, D, BJ, BD, votes.dtype), 2)
    return logits, dshares


@helper
def couple(logits, norm_ptr, at, inside, j0, J, LEAKY: tl.constexpr, BJ: tl.constexpr):
    """Softmax of (BN, BJ) over the upper capsules, by the given logarithm of its denominator, or of these alone.

    Leaky: with one logit of 0 more.
    """
    there = (j0 + tl.arange(0, BJ) < J)[None, :]
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + at, mask=inside, other=0.0)
        shares = tl.where(there, tl.exp(logits - norm[:, None]), 0.0)
    else:
        logits = tl.where(there, logits, float("-inf"))
        most = tl.max(logits, 1)
        if LEAKY:
            most = tl.where(most < 0, most * 0.0, most)
        shares = tl.where(there, tl.exp(logits - most[:, None]), 0.0)
        total = tl.sum(shares, 1)
        if LEAKY:
            total += tl.exp(-most)
        shares = shares / total[:, None]
    return shares


@helper
def slope(shares, dshares, mean_ptr, at, inside):
    """Gradient of the logits by that of their softmax, whose mean is given where these are not all."""
    mean = tl.sum(shares * dshares, 1) if mean_ptr is None else tl.load(mean_ptr + at, mask=inside, other=0.0)
    return shares * (dshares - mean[:, None])


@triton.jit
def _softmax_kernel(
    u_ptr, w_ptr, total_ptr, ds_ptr, norm_ptr, mean_ptr, N, L, J, D, K, blocks, tiles,
    BJ: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = span(program % blocks, BN)
    tile = program // blocks % tiles
    chunk = tl.cast(program // blocks // tiles, tl.int64)
    j0 = tile * BJ
    there = (j0 + tl.arange(0, BJ) < J)[None, :]
    V = read(total_ptr, rows, j0, 0, N, J, D, BJ, BD, ACC)
    ds = read(ds_ptr, rows, j0, 0, N, J, D, BJ, BD, ACC) if ds_ptr is not None else V
    for step in range(STEPS):
        i = chunk * STEPS + step
        votes = votes_of(u_ptr, w_ptr, rows, i, j0, 0, N, L, J, D, K, BJ, BD, BK, KT, PRECISION, ACC)
        logits, dshares = agreements(
            votes, V, ds, total_ptr, ds_ptr, u_ptr, w_ptr, rows, i, j0, N, L, J, D, K, BK, KT, DT, PRECISION
        )
        logits = tl.where(there, logits, float("-inf"))
        most = tl.max(logits, 1)
        shares = tl.where(there, tl.exp(logits - most[:, None]), 0.0)
        total = tl.sum(shares, 1)
        at, inside = (tile * L + i) * N + rows, (rows < N) & (i < L)
        tl.store(norm_ptr + at, most + tl.log(total), mask=inside)
        if ds_ptr is not None:
            tl.store(mean_ptr + at, tl.sum(shares * dshares, 1) / total, mask=inside)


@triton.jit
def _round_kernel(
    u_ptr, w_ptr, total_ptr, ds_ptr, norm_ptr, mean_ptr, partial_ptr, N, L, J, D, K, blocks, tiles,
    LEAKY: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, KT: tl.constexpr, DT: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Programs of the same capsules come together: they read the same weights.
    program = tl.program_id(0)
    rows = span(program % blocks, BN)
    tile = program // blocks % tiles
    chunk = tl.cast(program // blocks // tiles, tl.int64)
    j0, d0 = tile // DT * BJ, tile % DT * BD
    s = tl.full((BN, BJ, BD), 0.0, ACC)
    if total_ptr is not None:
        V = read(total_ptr, rows, j0, d0, N, J, D, BJ, BD, ACC)
        ds = read(ds_ptr, rows, j0, d0, N, J, D, BJ, BD, ACC) if ds_ptr is not None else V
    for step in range(STEPS):
        i = chunk * STEPS + step
        votes = votes_of(u_ptr, w_ptr, rows, i, j0, d0, N, L, J, D, K, BJ, BD, BK, KT, PRECISION, ACC)
        if total_ptr is None:
            s += votes
        else:
            at, inside = i * N + rows, (rows < N) & (i < L)
            logits, dshares = agreements(
                votes, V, ds, total_ptr, ds_ptr, u_ptr, w_ptr, rows, i, j0, N, L, J, D, K, BK, KT, DT, PRECISION
            )
            shares = couple(logits, norm_ptr, at, inside, j0, J, LEAKY, BJ)
            if ds_ptr is not None:
                shares = slope(shares, dshares, mean_ptr, at, inside)
            s += shares[:, :, None] * votes
    if total_ptr is None:
        s = s / (tl.full((1, 1, 1), 0.0, ACC) + (J + LEAKY))
    at, inside = vectors(partial_ptr + chunk * N * J * D, rows, j0, d0, N, J, D, BJ, BD)
    tl.store(at, s, mask=inside)


@helper
def square_of(s, TINY: tl.constexpr):
    """|s|^2 (ROWS, 1), at least TINY."""
    square = tl.sum(s * s, 1)[:, None]
    return tl.where(square < TINY, square * 0.0 + TINY, square)


@helper
def gather(partial_ptr, at, inside, chunks, step, start):
    for chunk in range(chunks):
        start += tl.load(partial_ptr + chunk * step + at, mask=inside, other=0.0)
    return start


@triton.jit
def _squash_kernel(
    partial_ptr, bias_ptr, s_ptr, before_ptr, total_ptr, v_ptr, R, J, D, chunks, step,
    TINY: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = span(tl.program_id(0), ROWS)
    d = tl.arange(0, DP)[None, :]
    inside = (rows < R)[:, None] & (d < D)
    at = rows[:, None] * D + d
    s = gather(partial_ptr, at, inside, chunks, step, tl.full((ROWS, DP), 0.0, ACC))
    if bias_ptr is not None:
        s += tl.load(bias_ptr + (rows % J)[:, None] * D + d, mask=inside, other=0.0).to(ACC)
    tl.store(s_ptr + at, s, mask=inside)
    square = square_of(s, TINY)
    v = s * (tl.sqrt(square) / (1.0 + square))
    if v_ptr is not None:
        tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=inside)
    else:
        if before_ptr is not None:
            v += tl.load(before_ptr + at, mask=inside, other=0.0)
        tl.store(total_ptr + at, v, mask=inside)


class Softmax(NamedTuple):
    """Of every lower capsule (*, L, N), what a tile of upper ones does not tell; None where one tile is all."""

    norm: Tensor | None = None
    """Logarithm of the denominator."""
    mean: Tensor | None = None
    """Mean of the gradients of the couplings, weighted by these."""


WHOLE = Softmax()


class Routing:
    """Sizes and launches that the two passes have in common."""

    def __init__(self, u: Tensor, weight: Tensor, wide: torch.dtype, leaky: bool):
        self.N, self.L, self.K = u.shape
        self.J, self.D = weight.shape[1:3]
        self.sizes = self.N, self.L, self.J, self.D, self.K
        self.u, self.weight = u.contiguous(), weight.permute(0, 3, 1, 2).contiguous()
        self.wide, self.leaky = wide, leaky
        exact = u.dtype.itemsize == weight.dtype.itemsize == 2  # such numbers are tf32's too
        self.arithmetic = {"PRECISION": "tf32" if exact else dot_precision(wide), "ACC": accumulator(wide)}

    def empty(self, *leading: int) -> Tensor:
        """Vectors of the upper capsules, (*, N, J, D)."""
        return torch.empty(*leading, self.N, self.J, self.D, dtype=self.wide, device=self.u.device)

    def blocks(self, sizes: BlockSizes) -> tuple[dict[str, Any], int, int]:
        """Constexprs of a kernel, how many blocks of samples there are, and how many tiles of upper capsules."""
        wider = max(self.u, self.weight, key=lambda t: t.itemsize)
        height, width, depth = tile_of(wider.dtype, self.J, self.D, self.K)
        tile = {"BJ": height, "BD": width, "BK": depth, "KT": cdiv(self.K, depth), "DT": cdiv(self.D, width)}
        blocks = sizes.of(wider, *self.sizes)
        return {**self.arithmetic, **tile, **blocks}, cdiv(self.N, blocks["BN"]), cdiv(self.J, height)

    def softmax(self, total: Tensor, ds: Tensor | None = None) -> Softmax:
        """That of the round that V is for; with `ds`, also the mean."""
        blocks, of_samples, tiles = self.blocks(FORWARD)
        if tiles * blocks["DT"] == 1:
            return WHOLE
        norms = torch.empty(tiles, self.L, self.N, dtype=self.wide, device=self.u.device)
        means = None if ds is None else torch.empty_like(norms)
        launch(
            _softmax_kernel, (of_samples * tiles * cdiv(self.L, blocks["STEPS"]),),
            self.u, self.weight, total, ds, norms, means, *self.sizes, of_samples, tiles, **blocks,
        )  # fmt: skip
        norm = norms.logsumexp(0)
        if self.leaky:
            norm = norm.logaddexp(norm.new_zeros(()))
        return Softmax(norm, None if means is None else means.mul_(norms.sub_(norm).exp_()).sum(0))

    def pass_over(self, total: Tensor | None, ds: Tensor | None = None, softmax: Softmax = WHOLE) -> Tensor:
        """What the chunks of lower capsules add to s, or with `ds` to the gradient of V, (chunks, N, J, D)."""
        blocks, of_samples, tiles = self.blocks(FORWARD)
        tiles, chunks = tiles * blocks["DT"], cdiv(self.L, blocks["STEPS"])
        partial = self.empty(chunks)
        launch(
            _round_kernel, (of_samples * tiles * chunks,), self.u, self.weight, total, ds, *softmax, partial,
            *self.sizes, of_samples, tiles, LEAKY=int(self.leaky), **blocks,
        )  # fmt: skip
        return partial

    def by_vector(self, kernel: Any, *args: Any) -> None:
        """Starts a kernel that has some vectors a program."""
        width, tiny = max(4, power_of_two(self.D)), torch.finfo(self.wide).tiny
        rows, acc = max(1, 512 // width), self.arithmetic["ACC"]
        launch(kernel, (cdiv(self.N * self.J, rows),), *args, TINY=tiny, ROWS=rows, DP=width, ACC=acc, num_warps=4)


def forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, leaky: bool, dtype: torch.dtype, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """v (N, J, D) in the given dtype, and the s of every round (T, N, J, D) in the dtype `wide`."""
    routing = Routing(u, weight, wide, leaky)
    J, D, size = routing.J, routing.D, routing.N * routing.J * routing.D
    bias = None if bias is None else bias.contiguous()
    sums, v = routing.empty(iterations), routing.empty().to(dtype)
    total: Tensor | None = None
    for t in range(iterations):
        before = total
        softmax = WHOLE if before is None else routing.softmax(before)
        partial, last = routing.pass_over(before, None, softmax), t == iterations - 1
        total = None if last else routing.empty()
        routing.by_vector(
            _squash_kernel, partial, bias, sums[t], before, total, v if last else None,
            routing.N * J, J, D, len(partial), size,
        )  # fmt: skip
    return v, sums


def tile_of(dtype: torch.dtype, J: int, D: int, K: int) -> tuple[int, int, int]:
    """BJ, BD and BK: at most 256 votes of a sample, in float64 128, and 16 KiB of weights. Products want 16 of each."""
    J, D, K = max(4, power_of_two(J)), max(4, power_of_two(D)), max(16, power_of_two(K))
    most = 128 if dtype == torch.float64 else 256
    if most < D:  # votes are made again, and registers go into addresses
        most //= 4
    width = min(D, most)
    height = min(J, most // width)
    return height, width, K if height * width * K * dtype.itemsize <= 2**14 else 16


def rule_of(dtype: torch.dtype, N: int, L: int, J: int, D: int, K: int) -> Blocks:
    height, width, depth = tile_of(dtype, J, D, K)
    if depth < K or width < D:
        return {"BN": 16, "num_warps": 8, "num_stages": 1}
    return {"BN": 16, "num_warps": 4 if height * width <= 128 else 8}


def _forward_rule(dtype: torch.dtype, N: int, L: int, J: int, D: int, K: int) -> Blocks:
    # The partial sums are at most a fifth of the inputs' bytes, which at 256 samples leaves two programs a processor.
    chunks = min(max(1, L * K * (N + J * D) // (5 * N * J * D)), max(1, 512 * 16 // N))
    return {**rule_of(dtype, N, L, J, D, K), "STEPS": cdiv(L, chunks)}


def candidates_of(dtype: torch.dtype, N: int, L: int, J: int, D: int, K: int) -> list[Blocks]:
    own, (height, width, _) = rule_of(dtype, N, L, J, D, K), tile_of(dtype, J, D, K)
    some = [{**own, "BN": rows, "num_warps": warps} for rows in (16, 32) for warps in (4, 8, 16)]
    return [b for b in some if b["BN"] * height * width <= 2048 * b["num_warps"]]


def _forward_candidates(dtype: torch.dtype, *sizes: int) -> list[Blocks]:
    steps = _forward_rule(dtype, *sizes)["STEPS"]
    return [{**b, "STEPS": s} for b in candidates_of(dtype, *sizes) for s in (steps, 2 * steps)]


def inputs_of(dtype: torch.dtype, device: Any, N: int, L: int, J: int, D: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (N, L, K), (L, J, D, K), (J, D)
    u, weight, bias = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    return u, weight, bias


def _forward_problem(dtype: torch.dtype, device: Any, *sizes: int) -> Any:
    inputs = inputs_of(dtype, device, *sizes)
    return lambda: forward(*inputs, 3, False, dtype, torch.float32)


# One tile; a hundred classes; long capsules, below, above and both.
SIZES = [(256, 1152, 10, 16, 8), (16, 2048, 16, 16, 16), (128, 1152, 100, 16, 8)]
SIZES += [(16, 64, 16, 16, 64), (16, 64, 4, 512, 64)]

FORWARD = BlockSizes("capsule_routing", _forward_rule, _forward_candidates, _forward_problem, SIZES)
TUNED = (FORWARD,)
