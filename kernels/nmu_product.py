r"""Product of gated factors, the heart of the NMU: $y_{bo} = \prod_i (w_{oi} x_{bi} + 1 - w_{oi})$ (arXiv 2001.05016).

A factor is t = w x + (1 - w), with 1 - w rounded once: at w = 1 it is x to the last digit, however small x is. With
E_boi the product of the factors of all j != i, dx_bi = sum_o dy_bo E_boi w_oi and dw_oi = sum_b dy_bo E_boi (x_bi - 1).
E is (product before i) (product after i), finite where a factor is 0. Of a block of factors it is (product of all) /
t_boi, which is faster, only where that leaves no doubt: no factor 0, and all products far from under- and overflow.

With B rows, I inputs and O outputs, no temporary is (B, O, I). Tiles of (B, O) are walked one by one, and within a tile
chunks of about sqrt(I) factors. Forward: a running product. Backward: the products before each chunk ("marks") are made
again, then the chunks are walked from the last to the first with a running product of dy and all factors behind. Only
x and w are saved; temporaries are three blocks of 1 MiB at most. A small problem is done in one go, and one of three
factors or less is left to autograd. FLOPs: 3 B O I forward, 11 B O I backward.

Measured beside the definition under autograd: `python -m benchmarks neuron_speed`.

On a GPU Triton kernels walk the factors, with tiles of (B, O), (B, I) and (O, I) in registers. Forward is bound by the
multiplier, 2 instructions a factor; each gradient by the special functions, with one quotient a factor, which a product
kept with an exponent of its own makes safe (`_nmu_product_triton.py`).

Arithmetic is in float32 at least. Under `torch.func` transforms, and for gradients of gradients, plain differentiable
torch takes the op's place, and holds (B, O, I); inside `use_backend("triton")` they raise.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._op import (
    DifferentiableOp,
    autocast_dtype,
    cast,
    compute_dtype,
    empty_if,
    flop_formula,
    plain_eager,
    under_transform,
    without_autocast,
)

_SMALL = 2**16  # factors, B O I, up to which all of them are held at once
_FEW = 3  # factors up to which a small problem has no op
_BLOCK = 2**20  # bytes of a temporary; about one core's L2 cache
_TILE = 2**15  # elements of (B, O): longer runs gain nothing and leave L2 earlier


def nmu_product_reference(x: Tensor, w: Tensor) -> Tensor:
    """The definition. x (*, I), w (O, I) -> y (*, O)."""
    return torch.prod(x[..., None, :] * w + (1 - w), -1)


def _plain(x: Tensor, w: Tensor) -> Tensor:
    """The definition as a tree of products, which torch can differentiate again and again, at zeros too."""
    t = x[..., None, :] * w + (1 - w)
    while t.shape[-1] > 1:
        half = t.shape[-1] // 2
        pairs = t[..., :half] * t[..., half : 2 * half]
        t = pairs if t.shape[-1] == 2 * half else torch.cat([pairs, t[..., 2 * half :]], -1)
    return t[..., 0]


def _is_small(x: Tensor, w: Tensor) -> bool:
    return x.shape[0] * w.numel() <= _SMALL


def _chunks(features: int) -> list[slice]:
    """Chunks of the factors: as many as there are factors in one, but at least 16 in one."""
    size = max(math.isqrt(features), min(features, 16))
    return [slice(start, min(start + size, features)) for start in range(0, features, size)]


def _axes(x: Tensor, w: Tensor) -> tuple[int, int]:
    """Axes of b and o in a block (factors, ., .). The last one, contiguous in memory, is o unless it is too short."""
    return (2, 1) if w.shape[0] < min(x.shape[0], 64) else (1, 2)


def _tiles(x: Tensor, w: Tensor, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """Tiles of (B, O) in which a chunk of factors, and the marks, fill a block at most; long in the last axis."""
    rows, outputs = x.shape[0], w.shape[0]
    chunks = _chunks(x.shape[1])
    deep = max(len(chunks), chunks[0].stop)
    size = min(_TILE, max(1, _BLOCK // (dtype.itemsize * deep)))
    if _axes(x, w) == (1, 2):
        width = min(outputs, size)
        height = min(rows, size // width)
    else:
        height = min(rows, size)
        width = min(outputs, size // height)
    return [
        (slice(b, min(b + height, rows)), slice(o, min(o + width, outputs)))
        for b in range(0, rows, height)
        for o in range(0, outputs, width)
    ]


def _orient(tile: Tensor, axes: tuple[int, int]) -> Tensor:
    """A tile (b, o), or its transpose, as the axes have it."""
    return tile if axes == (1, 2) else tile.t()


def _memory(depth: int, tile: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for `depth` times the first tile, the largest one; taken once, so that blocks are never held twice."""
    return torch.empty(depth * tile.numel(), dtype=dtype, device=tile.device)


def _part(memory: Tensor, depth: int, tile: Tensor) -> Tensor:
    """A contiguous (depth, *tile.shape) in that memory."""
    return memory[: depth * tile.numel()].view(depth, *tile.shape)


def _chunk(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A piece (b, c) of x, or (o, c) of w, with the factors first: contiguous, or each step would gather. Read-only."""
    return t.t().to(dtype).contiguous()


def _factors(x: Tensor, w: Tensor, axes: tuple[int, int], out: Tensor) -> Tensor:
    """The factors of x (c, b) and w (c, o), into `out`."""
    w = w.unsqueeze(axes[0])
    return torch.addcmul(1 - w, x.unsqueeze(axes[1]), w, out=out)


@without_autocast
def _forward(x: Tensor, w: Tensor, triton: bool = False) -> Tensor:
    """y (B, O) of x (B, I) and w (O, I), in x's dtype."""
    if triton:
        from archzoo.kernels import _nmu_product_triton

        return _nmu_product_triton.forward(x, w)
    wide = compute_dtype(x, w)
    if _is_small(x, w):
        dtype, x, w = x.dtype, cast(x, wide), cast(w, wide)
        return cast(torch.addcmul(1 - w, x.unsqueeze(1), w).prod(-1), dtype)
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    chunks, axes = _chunks(x.shape[1]), _axes(x, w)
    tiles = _tiles(x, w, wide)
    memory = _memory(chunks[0].stop, _orient(y[tiles[0]], axes), wide)
    for b, o in tiles:
        tile = _orient(y[b, o], axes)
        product = torch.ones(tile.shape, dtype=wide, device=x.device)
        for c in chunks:
            t = _part(memory, c.stop - c.start, tile)
            product.mul_(_factors(_chunk(x[b, c], wide), _chunk(w[o, c], wide), axes, t).prod(0))
        tile.copy_(product)
    return y


@without_autocast
def _backward(dy: Tensor, x: Tensor, w: Tensor, needed: list[bool], triton: bool = False) -> list[Tensor]:
    """dx and dw. What is not needed is not computed, and comes back with no elements."""
    need_x, need_w = needed
    if triton:
        from archzoo.kernels import _nmu_product_triton

        found = _nmu_product_triton.backward(dy, x, w, need_x, need_w)
        return [empty_if(False, t, dy) if g is None else g for g, t in zip(found, (x, w), strict=True)]
    wide = compute_dtype(x, w)
    if _is_small(x, w):
        return _small_backward(cast(dy, wide), x, w, need_x, need_w, wide)
    dx, dw = _gradient(x, need_x, wide), _gradient(w, need_w, wide)
    _tiled_backward(dy, x, w, dx, dw)
    return [dx.to(x.dtype), dw.to(w.dtype)]


def _gradient(like: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape if needed else 0, dtype=dtype, device=like.device)


def _extremes(x: Tensor, w: Tensor) -> tuple[float, float]:
    """Bounds of the factors: w x + 1 - w is linear in w and in x, so that they are at ends of the ranges of both."""
    if x.is_cuda or not x.numel():  # on a GPU, to ask would be to wait
        return -math.inf, math.inf
    ends = [[end.item() for end in t.aminmax()] for t in (x, w)]
    corners = [1 - b + a * b for a in ends[0] for b in ends[1]]
    return min(corners), max(corners)


def _may_divide(x: Tensor, w: Tensor, count: int, powers: float) -> bool:
    """Whether all factors are positive, and no product of so many of them leaves 2^-powers ... 2^powers."""
    least, most = _extremes(x, w)
    return least > 2 ** (-powers / count) and most < 2 ** (powers / count)


def _least_divisible(x: Tensor, w: Tensor, count: int, dtype: torch.dtype) -> float:
    """From what size on a product of so many factors, divided by one of them, is that of the others, but for rounding.

    Then no factor is 0, and no partial product was too small to have all its digits: what came after it can have made
    it larger by no more than the largest product there can be.
    """
    bound = max(1.0, *map(abs, _extremes(x, w)))
    powers = count * math.log2(bound) + math.log2(torch.finfo(dtype).tiny) + 24
    return 2**powers if powers < -math.log2(torch.finfo(dtype).tiny) - 24 else math.inf


def _others(x: Tensor, w: Tensor, dy: Tensor) -> Tensor:
    """dy (b, o, 1) times the product of all factors but one, for x (b, 1, i) and w (o, i)."""
    t = torch.addcmul(1 - w, x, w)
    if _may_divide(x, w, w.shape[1], -0.75 * math.log2(torch.finfo(t.dtype).tiny)):
        return (t.prod(-1, keepdim=True) * dy).div(t)
    e = torch.cat([torch.ones_like(t[..., :1]), t[..., :-1]], -1).cumprod(-1)
    return e.mul_(torch.cat([dy, t[..., 1:].flip(-1)], -1).cumprod(-1).flip(-1))


def _small_backward(dy: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool, wide: torch.dtype) -> list[Tensor]:
    x_wide, w_wide = cast(x, wide).unsqueeze(1), cast(w, wide)
    e = _others(x_wide, w_wide, dy.unsqueeze(-1))
    dx = cast(_sum_over_outputs(e * w_wide), x.dtype) if need_x else _gradient(x, False, x.dtype)
    dw = cast(e.mul_(x_wide - 1).sum(0), w.dtype) if need_w else _gradient(w, False, w.dtype)
    return [dx, dw]


def _sum_over_outputs(t: Tensor) -> Tensor:
    """(b, o, i) -> (b, i). Torch's sum of two or three takes several times as long as adding them."""
    return functools.reduce(torch.add, t.unbind(1)) if t.shape[1] <= 3 else t.sum(1)


def _tiled_backward(dy: Tensor, x: Tensor, w: Tensor, dx: Tensor, dw: Tensor) -> None:
    chunks, axes, wide = _chunks(x.shape[1]), _axes(x, w), dx.dtype
    tiles = _tiles(x, w, wide)
    t_memory, e_memory, marks_memory = (
        _memory(depth, _orient(dy[tiles[0]], axes), wide) for depth in (chunks[0].stop, chunks[0].stop, len(chunks))
    )
    divisible = _least_divisible(x, w, chunks[0].stop, wide)
    for b, o in tiles:
        tile = _orient(dy[b, o], axes)
        behind = torch.empty(tile.shape, dtype=wide, device=x.device).copy_(tile)  # dy and the factors behind
        marks = _part(marks_memory, len(chunks), tile)
        marks[0] = 1
        for n, c in enumerate(chunks[:-1]):
            t = _part(t_memory, c.stop - c.start, tile)
            _factors(_chunk(x[b, c], wide), _chunk(w[o, c], wide), axes, t)
            torch.mul(t.prod(0), marks[n], out=marks[n + 1])
        for n, c in reversed(list(enumerate(chunks))):
            x_chunk, w_chunk = _chunk(x[b, c], wide), _chunk(w[o, c], wide)
            t, e = (_part(memory, c.stop - c.start, tile) for memory in (t_memory, e_memory))
            _factors(x_chunk, w_chunk, axes, t)
            own = t.prod(0) if divisible < math.inf else None
            if own is not None and own.abs().amin().item() >= divisible:
                torch.div(own, t, out=e).mul_(marks[n].mul_(behind))
                behind.mul_(own)
            else:
                ts, es = t.unbind(), e.unbind()
                es[0].copy_(marks[n])
                for i in range(1, len(ts)):
                    torch.mul(es[i - 1], ts[i - 1], out=es[i])
                for i in reversed(range(len(ts))):
                    es[i].mul_(behind)
                    behind.mul_(ts[i])
            by_row = e if axes == (1, 2) else e.mT  # (c, b, o)
            if dx.numel():
                dx[b, c] += torch.bmm(w_chunk.unsqueeze(1), by_row.mT).squeeze(1).t()
            if dw.numel():
                dw[o, c] += torch.bmm((x_chunk - 1).unsqueeze(1), by_row).squeeze(1).t()


def _fake(x: Tensor, w: Tensor, triton: bool = False) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


def _wide_plain(x: Tensor, w: Tensor) -> Tensor:
    wide = compute_dtype(x, w)
    return _plain(x.to(wide), w.to(wide)).to(x.dtype)


def _few(x: Tensor, w: Tensor) -> Tensor:
    """The product, factor by factor: for a few of them torch's own gradient is the fastest, and takes no quotients."""
    dtype, wide = x.dtype, compute_dtype(x, w)
    if not dtype == w.dtype == wide:
        x, w = x.to(wide), w.to(wide)
    y = functools.reduce(torch.mul, torch.addcmul(1 - w, x.unsqueeze(-2), w).unbind(-1))
    return y if dtype == wide else y.to(dtype)


nmu_product_op = DifferentiableOp("nmu_product", _forward, _backward, fake=_fake, definition=_wide_plain, tensors=2)


@flop_formula(torch.ops.archzoo.nmu_product)
def _flops(x: Any, w: Any, *args: Any, **kwargs: Any) -> int:
    return int(3 * x[0] * w[0] * w[1])


@flop_formula(torch.ops.archzoo.nmu_product_backward)
def _backward_flops(dy: Any, x: Any, w: Any, needed: list[bool], *args: Any, **kwargs: Any) -> int:
    return int((7 + 2 * sum(needed)) * x[0] * w[0] * w[1])


def nmu_product(x: Tensor, w: Tensor) -> Tensor:
    """y_o = prod_i (w_oi x_i + 1 - w_oi).

    Args:
        x: (*, I), real floating point.
        w: (O, I), real floating point; of any value, though 0 and 1 are what it is made for.

    Returns:
        y (*, O) in the dtype of x; under autocast in autocast's. Factors and product are computed in float32 at least,
        from x and w as they come: autocast rounds the result only, or I rounded factors would make I roundings.

    Raises:
        ValueError: If the shapes do not fit, or x is not floating point; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    if w.dim() != 2 or 0 in w.shape:
        raise ValueError(f"w of shape {tuple(w.shape)}: must be (O, I), neither of them 0")
    outputs, features = w.shape
    if x.dim() == 0 or x.shape[-1] != features or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {x.dtype}: must be (*, {features}) and floating point, "
            f"for w of shape {tuple(w.shape)}"
        )
    if under_transform():
        refuse_triton("nmu_product", "a torch.func transform")
        return _wide_plain(x, w).to(autocast_dtype(x))
    triton = takes_triton("nmu_product", x.numel() * outputs, x=x, w=w)
    if features <= _FEW and x.numel() * outputs <= _SMALL and plain_eager(x) and not triton:
        y = _few(x, w)
    elif x.dim() == 2:
        y = nmu_product_op(x, w, triton)
    else:
        y = nmu_product_op(x.reshape(-1, features), w, triton).view(*x.shape[:-1], outputs)
    return cast(y, autocast_dtype(x))
