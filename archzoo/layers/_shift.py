r"""Sub-pixel shifts of feature maps, one for each channel: the shifts of super neurons.

    out[c, i, j] = x[c] at (i + dy_c, j + dx_c), bilinear between pixels

A shift moves every pixel of a channel alike, so that it is a weighted sum of two lines and then of two columns, and
needs no grid of coordinates, which is twice as large as x. Outside of the image, as in `grid_sample` with
`align_corners=True`: "border" repeats the pixels at the border, "zeros" has none, "reflection" mirrors at them. The
gradient by a shift is the difference of neighbouring pixels, as there. Kept for the backward: x and the shifts, against
three times as much by `grid_sample`, which is as fast.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archzoo.kernels._op import (
    compute_dtype,
    differentiable_gradients,
    flop_formula,
    under_transform,
    without_autocast,
)

SHIFT_PADDINGS = ("border", "zeros", "reflection")

_BLOCK = 2**20  # elements of the images that are shifted at a time


class _Taps(NamedTuple):
    """Where the lines of an output come from, each from two lines of the input; or its columns."""

    indices: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    slopes: tuple[Tensor, Tensor]
    """Derivatives of the weights by the shift."""


@torch.no_grad()
def _taps(shift: Tensor, size: int, padding: str) -> _Taps:
    """Taps (*, size) of shifts (*)."""
    start = torch.arange(size, device=shift.device, dtype=shift.dtype) + shift[..., None]
    slope, last = torch.ones_like(start), size - 1
    if padding == "reflection":
        turns = torch.div(start.abs(), max(last, 1), rounding_mode="floor")
        rest, back = start.abs() - turns * max(last, 1), turns.remainder(2) == 1
        slope = torch.where((start < 0) != back, -slope, slope)
        start = torch.where(back, last - rest, rest)
    if padding != "zeros":
        slope = torch.where((start > 0) & (start < last), slope, 0.0)
        start = start.clamp(0, last)
    low = start.floor()
    weight, steps = start - low, (low, low + 1)
    inside = [(step >= 0) & (step <= last) for step in steps]
    # Clamped twice: numbers too large for an index first, then what a NaN is as an index.
    near, far = (step.clamp(0, last).long().clamp(0, max(last, 0)) for step in steps)

    def masked(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:  # a NaN stays one
        return torch.where(inside[0], near, near * 0), torch.where(inside[1], far, far * 0)

    return _Taps((near, far), masked(1 - weight, weight), masked(-slope, slope))


def shift_images_reference(x: Tensor, shift: Tensor, padding: str) -> Tensor:
    """The definition, in plain torch. x (B, C, H, W), shift (B or 1, C, 2) as (dx, dy) -> (B, C, H, W)."""
    wide = compute_dtype(x, shift)
    z = x.to(wide)
    for dim, by in ((-2, shift[..., 1]), (-1, shift[..., 0])):
        by = by.to(wide)
        taps, parts = _taps(by, x.shape[dim], padding), []
        moved = (by - by.detach())[..., None]  # 0, for its gradient
        for index, weight, slope in zip(*taps, strict=True):
            index, weight = (t.unsqueeze(-1 if dim == -2 else -2) for t in (index, weight + slope * moved))
            parts.append(z.gather(dim, index.expand(z.shape)) * weight)
        z = parts[0] + parts[1]
    return z.to(x.dtype)


def _blocks(x: Tensor) -> list[slice]:
    step = max(1, _BLOCK // max(1, x.shape[1] * x.shape[2] * x.shape[3]))
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def _tables(shift: Tensor, images: slice, size: torch.Size, wide: torch.dtype, padding: str) -> tuple[_Taps, _Taps]:
    """Taps of the lines (n, C, H, 1), and of the columns (n, C, 1, W); n is 1 if all images are shifted alike."""
    by = (shift if len(shift) == 1 else shift[images]).to(wide)
    lines, columns = _taps(by[..., 1], size[2], padding), _taps(by[..., 0], size[3], padding)

    def at(taps: _Taps, dim: int) -> _Taps:
        return _Taps(*((pair[0].unsqueeze(dim), pair[1].unsqueeze(dim)) for pair in taps))

    return at(lines, -1), at(columns, -2)


def _numbered(index: Tensor, z: Tensor) -> Tensor:
    """Of which line of all lines of z (n, C, H, W) each line is made."""
    first = torch.arange(z.shape[0] * z.shape[1], device=z.device).view(*z.shape[:2], 1, 1) * z.shape[2]
    return (first + index).flatten()


def _pick_lines(z: Tensor, index: Tensor) -> Tensor:
    return z.flatten(0, 2).index_select(0, _numbered(index, z)).view_as(z)


def _pick_columns(z: Tensor, index: Tensor) -> Tensor:
    return z.gather(3, index.expand(z.shape))


@torch.library.custom_op("archzoo::shift_images", mutates_args=())
@without_autocast
@torch.no_grad()
def shift_images_op(x: Tensor, shift: Tensor, padding: str) -> Tensor:
    """x (B, C, H, W), each channel moved by shift (B or 1, C, 2), in x's dtype."""
    out, wide = torch.empty_like(x, memory_format=torch.contiguous_format), compute_dtype(x, shift)
    for images in _blocks(x):
        z = x[images].to(wide).contiguous()
        lines, columns = _tables(shift, images, x.shape, wide, padding)
        v = _mix(_pick_lines, z, lines)
        out[images] = _mix(_pick_columns, v, columns)
    return out


def _mix(pick: Any, z: Tensor, taps: _Taps) -> Tensor:
    near = pick(z, taps.indices[0]).mul_(taps.weights[0])
    return near.add_(pick(z, taps.indices[1]).mul_(taps.weights[1]))


@torch.library.custom_op("archzoo::shift_images_backward", mutates_args=())
@without_autocast
@torch.no_grad()
def shift_images_backward_op(
    dy: Tensor, x: Tensor, shift: Tensor, padding: str, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the shift; one that is not needed comes back without elements."""
    wide = compute_dtype(x, shift)
    dx = torch.empty(x.shape if needed[0] else (0,), dtype=x.dtype, device=x.device)
    d_shift = torch.zeros(shift.shape if needed[1] else (0,), dtype=wide, device=x.device)
    for images in _blocks(x):
        z, above = x[images].to(wide).contiguous(), dy[images].to(wide)
        lines, columns = _tables(shift, images, x.shape, wide, padding)
        dv = torch.zeros_like(z)
        for index, weight in zip(columns.indices, columns.weights, strict=True):
            dv.scatter_add_(3, index.expand(z.shape), above * weight)
        if needed[1]:
            v = _mix(_pick_lines, z, lines)
            by_dx = [
                (above * _pick_columns(v, index)).sum(2, keepdim=True) * slope
                for index, slope in zip(columns.indices, columns.slopes, strict=True)
            ]
            by_dy = [
                (dv * _pick_lines(z, index)).sum(3, keepdim=True) * slope
                for index, slope in zip(lines.indices, lines.slopes, strict=True)
            ]
            found = torch.stack([(near + far).sum((2, 3)) for near, far in (by_dx, by_dy)], -1)
            if len(shift) == 1:
                d_shift += found.sum(0, keepdim=True)
            else:
                d_shift[images] = found
        if needed[0]:
            dz = torch.zeros_like(z)
            for index, weight in zip(lines.indices, lines.weights, strict=True):
                dz.flatten(0, 2).index_add_(0, _numbered(index, z), (dv * weight).flatten(0, 2))
            dx[images] = dz
    return dx, d_shift.to(shift.dtype)


@shift_images_op.register_fake
def _(x: Tensor, shift: Tensor, padding: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@shift_images_backward_op.register_fake
def _(dy: Tensor, x: Tensor, shift: Tensor, padding: str, needed: list[bool]) -> tuple[Tensor, Tensor]:
    dx, d_shift = (t.new_empty(t.shape if need else (0,)) for t, need in zip((x, shift), needed, strict=True))
    return dx, d_shift


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, ctx.padding = inputs
    ctx.save_for_backward(x, shift)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, shift = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():

        def definition(x: Tensor, shift: Tensor) -> Tensor:
            return shift_images_reference(x, shift, ctx.padding)

        return *differentiable_gradients(definition, dy, (x, shift), needed), None
    found = shift_images_backward_op(dy, x, shift, ctx.padding, needed)
    return *(g if need else None for g, need in zip(found, needed, strict=True)), None


shift_images_op.register_autograd(_backward, setup_context=_setup_context)


@flop_formula(torch.ops.archzoo.shift_images)
def _flops(x: Any, *args: Any, **kwargs: Any) -> int:
    return 6 * prod(x)  # two means of two


@flop_formula(torch.ops.archzoo.shift_images_backward)
def _backward_flops(dy: Any, x: Any, shift: Any, padding: str, needed: list[bool], *args: Any, **kwargs: Any) -> int:
    return (4 + 4 * needed[0] + 11 * needed[1]) * prod(x)


def shift_images(x: Tensor, shift: Tensor, padding: str) -> Tensor:
    """Moves each channel of images by a shift of its own.

    Args:
        x: (B, C, H, W), of a floating-point dtype.
        shift: (C, 2), or (B, C, 2) for one per image and channel: (dx, dy) in pixels, to the right and down, of where a
            pixel is taken from.
        padding: "border", "zeros" or "reflection".

    Returns:
        (B, C, H, W) in the dtype of x; the arithmetic is float32 at least.
    """
    shift = shift if shift.dim() == 3 else shift.unsqueeze(0)
    if under_transform():
        return shift_images_reference(x, shift, padding)
    return shift_images_op(x, shift, padding)
