r"""Linear layers of wavelets: $y_o = b_o + \sum_i w_{oi}\, \psi((x_i - t_{oi}) / s_{oi})$ (arXiv 2405.12832).

Each edge shifts and stretches its input for itself, so no basis is shared, and no GEMM does the work: with N rows, I
inputs and O outputs, psi is evaluated N O I times, which is far too much to keep. Both passes walk tiles of (O, I, N)
that stay in cache, in place, in three or four buffers. Kept for the backward pass are x and the parameters; it
evaluates a tile again and makes all gradients of it. With u = (x - t) / s and p_oin = dy_on psi'(u_oin),

    dw = sum_n dy psi(u),    dt = -(w / s) sum_n p,    ds = -(w / s) sum_n p u,    dx = sum_o (w / s) p.

An edge takes one exponential, as a power of two: on a CPU, exp takes four times as long (float32, AVX-512). "morlet"
takes a cosine too, and in the backward pass a tangent, since that of half an angle gives its sine and cosine. Beyond
|u| = 40 every psi is 0, in float64 too, and u is clamped there: so u^2 does not overflow, inf * 0 being NaN, and an
input at infinity adds nothing.

FLOPs an edge, where exp, cos and tan count one: forward 9 ("mexican_hat"), 8 ("dog"), 10 ("morlet"), backward 17, 15
and 26.

Measured by `python -m benchmarks kan_speed` (CPU, one thread, float32, forward + backward), whose record says how many
times as long the equation under autograd takes. With one row the calls of torch are what costs: twice its time.

On a GPU Triton kernels walk the edges, with tiles of (N, O), (N, I) and (O, I) in registers, the exponential being 1
MUFU. That function unit's rate, 3.9e12 a second on an H200, is the floor (`_wavelet_triton.py`).

Arithmetic is in float32 at least. `torch.func` transforms and gradients of gradients go through the definition in plain
torch, which does hold (N, O, I); inside `use_backend("triton")` they raise.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._op import (
    DifferentiableOp,
    autocast_dtype,
    compute_dtype,
    empty_if,
    flop_formula,
    under_transform,
    without_autocast,
)

Wavelet = Literal["mexican_hat", "morlet", "dog"]
WAVELETS: tuple[str, ...] = get_args(Wavelet)

FREQUENCY = 5.0  # of the Morlet wavelet, in radians per unit of u
FAR = 40.0  # from 38.6 on, exp(-u^2 / 2) is 0 in float64
_EXPONENT = -0.5 / math.log(2)  # exp(-u^2 / 2) = 2^(_EXPONENT u^2)
_HAT = 2 / (math.sqrt(3) * math.pi**0.25)  # gives the Mexican hat a square that integrates to 1
FACTOR = {"mexican_hat": -_HAT, "morlet": 1.0, "dog": -1.0}  # psi is this times what `_evaluate` gives

# Edges of a tile: on a CPU 512 KiB of float32. Smaller ones pay for Python, larger ones leave the cache.
_CPU_TILE, _GPU_TILE = 2**17, 2**23
_ROWS = 1024  # of a tile, where there are so many: long runs in memory


def check_wavelet(wavelet: str) -> Wavelet:
    """The wavelet; a ValueError with the choices if there is none of that name."""
    if wavelet not in WAVELETS:
        raise ValueError(f"wavelet={wavelet!r}: must be one of {', '.join(map(repr, WAVELETS))}")
    return wavelet  # type: ignore[return-value]


def wavelet_reference(u: Tensor, wavelet: str) -> Tensor:
    """psi(u), in plain torch."""
    u = u.clamp(-FAR, FAR)
    envelope = torch.exp(-u.square() / 2)
    if wavelet == "mexican_hat":
        return _HAT * (u.square() - 1) * envelope
    if wavelet == "morlet":
        return torch.cos(FREQUENCY * u) * envelope
    return -u * envelope


def wavelet_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor, translation: Tensor, bias: Tensor | None, wavelet: str
) -> Tensor:
    """The definition. x (*, I); weight, scale and translation (O, I); bias (O,) -> (*, O)."""
    wide = compute_dtype(x, weight, scale, translation)
    u = (x.to(wide).unsqueeze(-2) - translation.to(wide)) / scale.to(wide)
    y = (weight.to(wide) * wavelet_reference(u, wavelet)).sum(-1)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


# --- Both passes over the edges ---------------------------------------------------------------------------------------
#
# An edge is evaluated for each of G groups (a linear layer has one), their O outputs, their I inputs, and N rows. All
# tensors here have these four dimensions, of size 1 where nothing depends on one: x is (G, 1, I, N), y is (G, O, 1, N),
# and a parameter is (G, O, I, 1).


class Edges(NamedTuple):
    """Parameters, in the dtype of the arithmetic; the factor of psi is in `weight`, and `inverse` is 1 / s."""

    wavelet: str
    weight: Tensor
    inverse: Tensor
    translation: Tensor


def as_edges(parameters: Sequence[Tensor], wavelet: str, groups: int = 1) -> Edges:
    """The edges of weight, scale and translation (G · O, ...)."""
    weight, scale, translation = (t.reshape(groups, len(t) // groups, -1, 1) for t in parameters)
    return Edges(wavelet, weight * FACTOR[wavelet], scale.reciprocal(), translation)


def _tile_shape(groups: int, outputs: int, inputs: int, rows: int, room: int) -> tuple[int, ...]:
    """Rows enough for long runs in memory; then near-square, so that values are reused; then what groups fit in."""
    n = min(rows, max(_ROWS, room // (groups * outputs * inputs)))
    room = max(1, room // n)
    o = min(outputs, max(math.isqrt(room), room // inputs))
    i = min(inputs, room // o)
    return min(groups, room // (o * i)), o, i, n


def _cut(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class _Tile(NamedTuple):
    """Where a tile is (None: it is all there is), and the buffers (g, o, i, n) that it is computed in."""

    slices: tuple[slice, ...] | None
    buffers: list[Tensor]

    def of(self, t: Tensor) -> Tensor:
        """What a tensor has to do with the tile."""
        if self.slices is None:
            return t
        return t[tuple(s if size > 1 else slice(None) for s, size in zip(self.slices, t.shape, strict=True))]


def _tiles(x: Tensor, edges: Edges, buffers: int) -> Iterator[_Tile]:
    """The tiles of all edges, one after the other in the same buffers, the first of which holds u."""
    if x.numel() == 0:
        return
    groups, outputs, inputs, _ = edges.weight.shape
    sizes = (groups, outputs, inputs, x.shape[3])
    shape = _tile_shape(*sizes, room=_CPU_TILE if x.device.type == "cpu" else _GPU_TILE)
    rows_last = shape[3] >= min(shape[2], 64)  # in memory: the last axis must be a long one
    x = x.contiguous() if rows_last else x.mT.contiguous().mT
    memory = [x.new_empty(math.prod(shape)) for _ in range(buffers)]
    for slices in product(*map(_cut, sizes, shape)):
        g, o, i, n = (s.stop - s.start for s in slices)
        flat = memory if shape == sizes else [m[: g * o * i * n] for m in memory]
        if rows_last:
            own = [m.view(g, o, i, n) for m in flat]
        else:
            own = [m.view(n, g, o, i).permute(1, 2, 3, 0) for m in flat]
        tile = _Tile(None if shape == sizes else slices, own)
        torch.sub(tile.of(x), tile.of(edges.translation), out=tile.buffers[0])
        tile.buffers[0].mul_(tile.of(edges.inverse)).clamp_(-FAR, FAR)
        yield tile


def _evaluate(wavelet: str, u: Tensor, envelope: Tensor, psi: Tensor, dy: Tensor | None = None) -> None:
    """The envelope exp(-u^2 / 2), times dy if given; and with it psi without its factor."""
    torch.mul(u, u, out=psi)
    torch.mul(psi, _EXPONENT, out=envelope).exp2_()
    if dy is not None:
        envelope.mul_(dy)
    if wavelet == "mexican_hat":
        torch.sub(envelope, psi.mul_(envelope), out=psi)
    elif wavelet == "dog":
        torch.mul(u, envelope, out=psi)
    else:
        torch.mul(u, FREQUENCY, out=psi).cos_().mul_(envelope)


def _evaluate_with_slope(
    wavelet: str, dy: Tensor, u: Tensor, envelope: Tensor, psi: Tensor, *scratch: Tensor
) -> Tensor:
    """The same psi, times dy, and its derivative by u in the memory of the envelope."""
    if wavelet == "mexican_hat":
        _evaluate(wavelet, u, envelope, psi, dy)
        return envelope.mul_(-2).sub_(psi).mul_(u)
    if wavelet == "dog":
        _evaluate(wavelet, u, envelope, psi, dy)
        return envelope.addcmul_(u, psi, value=-1)
    torch.mul(u, u, out=envelope).mul_(_EXPONENT).exp2_().mul_(dy)
    tangent = torch.mul(u, FREQUENCY / 2, out=scratch[0]).tan_()
    torch.mul(tangent, tangent, out=psi).add_(1).reciprocal_()  # the squared cosine of half the angle
    sine = tangent.mul_(psi).mul_(2)
    psi.mul_(2).sub_(1).mul_(envelope)
    return envelope.mul_(sine).mul_(-FREQUENCY).addcmul_(u, psi, value=-1)


def edge_sums(x: Tensor, edges: Edges) -> Tensor:
    """sum_i w psi(u): y (G, O, 1, N) of x (G, 1, I, N)."""
    y = x.new_zeros(*edges.weight.shape[:2], 1, x.shape[3])
    for tile in _tiles(x, edges, buffers=3):
        u, envelope, psi = tile.buffers
        _evaluate(edges.wavelet, u, envelope, psi)
        tile.of(y).add_(tile.of(edges.weight).mT @ psi)
    return y


Sums = Sequence[Tensor | None]


def new_sums(edges: Edges, needed: Sequence[bool]) -> Sums:
    """Zeros, for the gradients of weight, scale and translation that are needed."""
    return [edges.weight.new_zeros(edges.weight.shape) if need else None for need in needed]


def add_edge_gradients(dy: Tensor, x: Tensor, edges: Edges, sums: Sums, need_x: bool) -> Tensor | None:
    """Adds sum_n dy psi, -sum_n p u and -sum_n p of x and dy (G, O, 1, N) to the sums; returns dx."""
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
    of_psi, of_slope_u, of_slope = sums
    steepness = edges.weight * edges.inverse
    for tile in _tiles(x, edges, buffers=4 if edges.wavelet == "morlet" else 3):
        u, envelope, psi, *scratch = tile.buffers
        p = _evaluate_with_slope(edges.wavelet, tile.of(dy), u, envelope, psi, *scratch)
        if of_psi is not None:
            tile.of(of_psi).add_(psi.sum(3, keepdim=True))
        if of_slope is not None:
            tile.of(of_slope).sub_(p.sum(3, keepdim=True))
        if of_slope_u is not None:
            tile.of(of_slope_u).sub_(u.mul_(p).sum(3, keepdim=True))
        if dx is not None:
            tile.of(dx).add_(p.mul_(tile.of(steepness)).sum(1, keepdim=True))
    return dx


def finish(sums: Sums, edges: Edges) -> list[Tensor | None]:
    """The sums as gradients of weight, scale and translation; None where there is none."""
    steepness = edges.weight * edges.inverse
    factors = (FACTOR[edges.wavelet], steepness, steepness)
    return [None if total is None else total.mul_(factor) for total, factor in zip(sums, factors, strict=True)]


# --- Linear -----------------------------------------------------------------------------------------------------------


def bias_gradient(bias: Tensor | None, dy: Tensor, needed: bool, wide: torch.dtype) -> Tensor:
    """The sum of dy (N, O, ...) over all but outputs; without elements if it is not needed."""
    if bias is None or not needed:
        return empty_if(False, bias, dy)
    return dy.sum([axis for axis in range(dy.dim()) if axis != 1], dtype=wide).to(bias.dtype)


def as_results(found: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in shape and dtype of the inputs; without elements where there is none."""
    return [
        t.new_empty(0) if g is None else g.reshape(t.shape).to(t.dtype).contiguous()
        for g, t in zip(found, inputs, strict=True)
    ]


@without_autocast
def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None,
    wavelet: str,
    triton: bool = False,
) -> Tensor:
    """y (N, O) of x (N, I), in x's dtype."""
    if triton:
        from archzoo.kernels import _wavelet_triton

        return _wavelet_triton.forward(x[None], _wavelet_triton.edges(x, weight, scale, translation, wavelet), bias)[0]
    wide = compute_dtype(x, weight, scale, translation)
    edges = as_edges([t.to(wide) for t in (weight, scale, translation)], wavelet)
    y = edge_sums(x.to(wide).t()[None, None], edges)[0, :, 0]
    if bias is not None:
        y += bias.to(wide)[:, None]
    return y.t().to(x.dtype).contiguous()


@without_autocast
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None,
    wavelet: str,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of x, weight, scale, translation and bias; one that is not needed comes back without elements."""
    wide = compute_dtype(x, weight, scale, translation)
    inputs = x, weight, scale, translation
    found: list[Tensor | None] = [None] * 4
    if triton:
        from archzoo.kernels import _wavelet_triton

        found = _wavelet_triton.backward(dy, *inputs, wavelet, needed)
    elif any(needed[:4]):
        edges = as_edges([t.to(wide) for t in (weight, scale, translation)], wavelet)
        sums = new_sums(edges, needed[1:4])
        rows = dy.to(wide).t().contiguous()[None, :, None]
        dx = add_edge_gradients(rows, x.to(wide).t()[None, None], edges, sums, needed[0])
        found = [None if dx is None else dx[0, 0].t(), *finish(sums, edges)]
    return [*as_results(found, inputs), bias_gradient(bias, dy, needed[4], wide)]


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None,
    wavelet: str,
    triton: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


wavelet_linear_op = DifferentiableOp(
    "wavelet_linear", _forward, _backward, fake=_fake, definition=wavelet_linear_reference, tensors=5
)


# u 2, its square 1, the envelope 2, the product with w and the sum 2; then psi.
FORWARD_FLOPS = {"mexican_hat": 7 + 2, "morlet": 7 + 3, "dog": 7 + 1}
# u, square and envelope 5, times dy 1; then psi and slope.
_BACKWARD_FLOPS = {"mexican_hat": 6 + 5, "morlet": 6 + 14, "dog": 6 + 3}


def backward_flops_per_edge(wavelet: str, needed: Sequence[bool]) -> int:
    """FLOPs of the needed gradients of x, weight, scale and translation; that of the bias is not counted."""
    need_x, need_weight, need_scale, need_translation = needed[:4]
    if not any(needed[:4]):
        return 0
    return _BACKWARD_FLOPS[wavelet] + 2 * need_x + need_weight + 2 * need_scale + need_translation


@flop_formula(torch.ops.archzoo.wavelet_linear)
def _flops(
    x: Any, weight: Any, scale: Any, translation: Any, bias: Any, wavelet: str, *args: Any, **kwargs: Any
) -> int:
    return FORWARD_FLOPS[wavelet] * x[0] * math.prod(weight)


@flop_formula(torch.ops.archzoo.wavelet_linear_backward)
def _backward_flops(
    dy: Any,
    x: Any,
    weight: Any,
    scale: Any,
    translation: Any,
    bias: Any,
    wavelet: str,
    needed: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    return backward_flops_per_edge(wavelet, needed) * x[0] * math.prod(weight)


def check_parameters(weight: Tensor, scale: Tensor, translation: Tensor, bias: Tensor | None, shape: str) -> None:
    """A ValueError unless the parameters fit each other, and have as many dimensions as `shape` names."""
    if weight.dim() != len(shape.split(",")) or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: must be {shape}, none of them 0")
    for name, t in (("scale", scale), ("translation", translation)):
        if t.shape != weight.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: must be that of weight, {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: must be ({len(weight)},)")


def wavelet_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None = None,
    *,
    wavelet: str = "mexican_hat",
) -> Tensor:
    """y_o = b_o + sum_i w_oi psi((x_i - t_oi) / s_oi).

    Args:
        x: (*, I), of a floating-point dtype.
        weight: w (O, I).
        scale: s (O, I), in units of x; nowhere 0.
        translation: t (O, I), in units of x.
        bias: b (O,) or None.
        wavelet: "mexican_hat", "morlet" or "dog".

    Returns:
        (*, O) in the dtype of x; under autocast in autocast's. Only the result is rounded to it.

    Raises:
        ValueError: If shapes do not fit, x is not floating point, or the wavelet is unknown; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    wavelet = check_wavelet(wavelet)
    check_parameters(weight, scale, translation, bias, "(out, in)")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: must be a floating-point one")
    features = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must be {features}")
    if under_transform():
        refuse_triton("wavelet_linear", "a torch.func transform")
        y = wavelet_linear_reference(x, weight, scale, translation, bias, wavelet)
    else:
        tensors = {"x": x, "weight": weight, "scale": scale, "translation": translation, "bias": bias}
        triton = takes_triton("wavelet_linear", x.numel() * len(weight), **tensors)
        y = wavelet_linear_op(x.reshape(-1, features), weight, scale, translation, bias, wavelet, triton)
        y = y.view(*x.shape[:-1], len(weight))
    return y.to(autocast_dtype(x))
