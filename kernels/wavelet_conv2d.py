r"""Convolutions of wavelets: $y_{op} = b_o + \sum_{c,j} w_{ocj}\, \psi((x_{c,p+j} - t_{ocj}) / s_{ocj})$, j a tap.

Each tap of each output shifts and stretches the pixels for itself, so the patches that a pixel is in have nothing in
common: this is `wavelet_linear` on patches, at its cost, gathered for one block of pixels at a time. Kept for the
backward pass are x and the parameters. Where padding is to add nothing, x is padded by infinity, where psi is 0. The
Triton kernels are those of `wavelet_linear`, with all groups at once.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._conv import blocks, check_input, check_output, output_size, windows
from archzoo.kernels._op import (
    DifferentiableOp,
    autocast_dtype,
    compute_dtype,
    flop_formula,
    under_transform,
    without_autocast,
)
from archzoo.kernels._patches import Patches, unpad
from archzoo.kernels.basis_conv2d import padding_sides
from archzoo.kernels.wavelet import (
    FORWARD_FLOPS,
    add_edge_gradients,
    as_edges,
    as_results,
    backward_flops_per_edge,
    bias_gradient,
    check_parameters,
    check_wavelet,
    edge_sums,
    finish,
    new_sums,
    wavelet_reference,
)

_PATCHES = 2**20  # elements of the patches of a block of pixels


def _pad(x: Tensor, padding: Sequence[int], value: float | None) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom), value=math.inf if value is None else value)


def wavelet_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None,
    wavelet: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: float | None,
) -> Tensor:
    """The definition. x (B, C, H, W); weight, scale and translation (O, C / groups, kh, kw) -> (B, O, H', W')."""
    wide = compute_dtype(x, weight, scale, translation)

    def patches(t: Tensor, value: float) -> Tensor:  # (B, groups, 1, C / groups, H', W', kh, kw)
        return windows(_pad(t, padding, value), weight.shape[2:], stride, dilation).unflatten(1, (groups, 1, -1))

    def edges(t: Tensor) -> Tensor:  # (groups, O / groups, C / groups, 1, 1, kh, kw)
        return t.to(wide).unflatten(0, (groups, -1))[..., None, None, :, :]

    u = (patches(x.to(wide), pad_value or 0.0) - edges(translation)) / edges(scale)
    terms = edges(weight) * wavelet_reference(u, wavelet)
    if pad_value is None:
        terms = terms * patches(torch.ones_like(x[:1], dtype=wide), 0.0)
    y = terms.sum((3, 6, 7)).flatten(1, 2)
    return (y if bias is None else y + bias.to(wide)[:, None, None]).to(x.dtype)


def _blocks(view: Tensor) -> list[tuple[slice, slice, slice]]:
    """Blocks of pixels of the output, for windows (B, C, H', W', kh, kw): images, lines and columns."""
    _, channels, *size, height, width = view.shape
    return blocks(view.shape[0], size, _PATCHES // (channels * height * width))


def _patches(view: Tensor, block: tuple[slice, slice, slice], groups: int) -> Tensor:
    """(groups, 1, C / groups · kh · kw, pixels) of windows (B, C, H', W', kh, kw)."""
    b, h, w = block
    return view[b, :, h, w].permute(1, 4, 5, 0, 2, 3).flatten(3).unflatten(0, (groups, 1, -1)).flatten(2, 4)


def _under(tap: int, pixels: slice, stride: int, dilation: int) -> slice:
    """Where in the padded input a tap lies, for these pixels of the output."""
    first = tap * dilation
    return slice(first + pixels.start * stride, first + (pixels.stop - 1) * stride + 1, stride)


@without_autocast
def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None,
    wavelet: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pad_value: float | None,
    triton: bool = False,
) -> Tensor:
    """y (B, O, H', W') of x (B, C, H, W), in x's dtype."""
    if triton:
        from archzoo.kernels import _wavelet_triton

        own = _wavelet_triton.edges(x, weight, scale, translation, wavelet, groups)
        patches = Patches(_pad(x, padding, pad_value), weight.shape[2:], stride, dilation, groups)
        return patches.map(lambda rows: _wavelet_triton.forward(rows, own, bias))
    wide = compute_dtype(x, weight, scale, translation)
    edges = as_edges([t.to(wide) for t in (weight, scale, translation)], wavelet, groups)
    view = windows(_pad(x.to(wide), padding, pad_value), weight.shape[2:], stride, dilation)
    y = x.new_empty(x.shape[0], weight.shape[0], *view.shape[2:4])
    for b, h, w in _blocks(view):
        total = edge_sums(_patches(view, (b, h, w), groups), edges).flatten(0, 2)
        if bias is not None:
            total += bias.to(wide)[:, None]
        place = y[b, :, h, w].transpose(0, 1)
        place.copy_(total.view(place.shape))
    return y


@without_autocast
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None,
    wavelet: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pad_value: float | None,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of x, weight, scale, translation and bias; one that is not needed comes back without elements."""
    wide = compute_dtype(x, weight, scale, translation)
    inputs = (x, weight, scale, translation)
    found: list[Tensor | None] = [None] * 4
    if any(needed[:4]):
        gradients = _triton_gradients if triton else _gradients
        found = gradients(dy, *inputs, wavelet, stride, padding, dilation, groups, pad_value, needed)
    return [*as_results(found, inputs), bias_gradient(bias, dy, needed[4], wide)]


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    wavelet: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pad_value: float | None,
    needed: list[bool],
) -> list[Tensor | None]:
    """Those of x, weight, scale and translation, by blocks of pixels."""
    wide = compute_dtype(x, weight, scale, translation)
    edges = as_edges([t.to(wide) for t in (weight, scale, translation)], wavelet, groups)
    sums = new_sums(edges, needed[1:4])
    padded = _pad(x.to(wide), padding, pad_value)
    view = windows(padded, weight.shape[2:], stride, dilation)
    dx = torch.zeros_like(padded) if needed[0] else None
    for b, h, w in _blocks(view):
        above = dy[b, :, h, w].to(wide).transpose(0, 1)
        rows = above.flatten(1).unflatten(0, (groups, -1)).unsqueeze(2)
        below = add_edge_gradients(rows, _patches(view, (b, h, w), groups), edges, sums, needed[0])
        if dx is not None and below is not None:
            taps = below.view(x.shape[1], *weight.shape[2:], *above.shape[1:]).transpose(0, 3)  # (b, kh, kw, C, h, w)
            for i, j in product(*map(range, weight.shape[2:])):
                down, across = (_under(*of) for of in zip((i, j), (h, w), stride, dilation, strict=True))
                dx[b, :, down, across] += taps[:, i, j]
    return [None if dx is None else unpad(dx, padding, x.shape[2:]), *finish(sums, edges)]


def _triton_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    wavelet: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pad_value: float | None,
    needed: list[bool],
) -> list[Tensor | None]:
    from archzoo.kernels import _wavelet_triton as kernels

    edges = kernels.edges(x, weight, scale, translation, wavelet, groups)
    wide = edges.weight.dtype
    patches = Patches(_pad(x, padding, pad_value), weight.shape[2:], stride, dilation, groups)
    dx, sums = patches.gradients(
        dy,
        (lambda above, rows: kernels.input_gradient(above, rows, edges, wide)) if needed[0] else None,
        (lambda above, rows: kernels.parameter_sums(above, rows, edges, needed[1:4])) if any(needed[1:4]) else None,
        wide,
    )
    return [None if dx is None else unpad(dx, padding, x.shape[2:]), *kernels.finish(sums or [None] * 3, edges)]


def _out_size(
    x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of the output, of the shapes of x and weight."""
    padded = (x[2] + padding[0] + padding[1], x[3] + padding[2] + padding[3])
    return [output_size(padded[a], weight[2 + a], stride[a], 0, dilation[a]) for a in (0, 1)]


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None,
    wavelet: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pad_value: float | None,
    triton: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *_out_size(x.shape, weight.shape, stride, padding, dilation))


wavelet_conv2d_op = DifferentiableOp(
    "wavelet_conv2d", _forward, _backward, fake=_fake, definition=wavelet_conv2d_reference, tensors=5
)


@flop_formula(torch.ops.archzoo.wavelet_conv2d)
def _conv_flops(
    x: Any, weight: Any, scale: Any, translation: Any, bias: Any, wavelet: str, *geometry: Any, **kwargs: Any
) -> int:
    return FORWARD_FLOPS[wavelet] * x[0] * math.prod(weight) * math.prod(_out_size(x, weight, *geometry[:3]))


@flop_formula(torch.ops.archzoo.wavelet_conv2d_backward)
def _conv_backward_flops(
    dy: Any, x: Any, weight: Any, scale: Any, translation: Any, bias: Any, wavelet: str, *rest: Any, **kwargs: Any
) -> int:
    return backward_flops_per_edge(wavelet, rest[5]) * x[0] * math.prod(weight) * math.prod(dy[2:])


def wavelet_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    translation: Tensor,
    bias: Tensor | None = None,
    *,
    wavelet: str = "mexican_hat",
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    pad_value: float | None = None,
) -> Tensor:
    """The same sum over channels and taps, strided and padded as a convolution.

    Args:
        x: (B, C, H, W) or (C, H, W), of a floating-point dtype.
        weight: (O, C / groups, kh, kw).
        scale: Of the same shape, in units of x; nowhere 0.
        translation: Of the same shape, in units of x.
        bias: (O,) or None.
        wavelet: "mexican_hat", "morlet" or "dog".
        stride: Down and across, in pixels.
        padding: Pixels added on each side, down and across; "same" or "valid" as `nn.Conv2d` has them.
        dilation: Distance of the taps, down and across.
        groups: Into how many groups channels and outputs are divided.
        pad_value: None: padding adds nothing. A number: x is padded by it, and psi is evaluated there too.

    Returns:
        (B, O, H', W') or (O, H', W'), in the dtype of x; under autocast in autocast's.

    Raises:
        ValueError: If shapes do not fit, x is not floating point, or the wavelet is unknown; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    wavelet = check_wavelet(wavelet)
    check_parameters(weight, scale, translation, bias, "(out, in / groups, height, width)")
    if len(weight) % groups:
        raise ValueError(f"groups={groups}: must divide the {len(weight)} outputs of weight")
    check_input(x, weight.shape[1] * groups)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    geometry = list(stride), padding_sides(padding, weight.shape[2:], dilation), list(dilation)
    size = _out_size(images.shape, weight.shape, *geometry)
    check_output(x, size)
    if under_transform():
        refuse_triton("wavelet_conv2d", "a torch.func transform")
        y = wavelet_conv2d_reference(images, weight, scale, translation, bias, wavelet, *geometry, groups, pad_value)
    else:
        tensors = {"x": x, "weight": weight, "scale": scale, "translation": translation, "bias": bias}
        triton = takes_triton("wavelet_conv2d", images.shape[0] * math.prod(size) * weight.numel(), **tensors)
        parameters = weight, scale, translation, bias
        y = wavelet_conv2d_op(images, *parameters, wavelet, *geometry, groups, pad_value, triton)
    y = y.to(autocast_dtype(x))
    return y if x.dim() == 4 else y.squeeze(0)
