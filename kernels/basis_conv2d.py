r"""Convolutions of functions of each pixel, $y_{op} = b_o + \sum_{c,j,t} w_{ocjt}\, B_j(x_{c,p+t})$.

The same as `basis_linear` on every patch, at a fraction of its work: a pixel's functions are evaluated once, not once
for each patch that it is in. They form maps (N, C·K, H, W), feature c·K + j, which one convolution by the weight
(O, C/groups, K, kh, kw) sums. Padding adds nothing: it is the maps that are padded by zeros, not the pixels.

Cost for P' pixels put out, C channels, O outputs, K functions and T taps: 2·P'·O·(C/groups)·K·T FLOPs forward, twice
that backward, and the basis of every pixel once each way. The maps are K times as large as x, so both passes make them
for a few images at a time. Kept for the backward pass: x and the parameters.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from archzoo.kernels._backend import refuse_triton
from archzoo.kernels._conv import check_input, check_output, output_size
from archzoo.kernels._op import (
    autocast_dtype,
    differentiable_gradients,
    flop_formula,
    plain_eager,
    under_transform,
    without_autocast,
)
from archzoo.kernels.basis_linear import Basis, parse, product_dtype, split, takes_kernels, widen

# Maps of a block. A convolution wants more at once than a GEMM: its library lays the weight out anew on every call.
_CPU_BLOCK, _GPU_BLOCK = 2**23, 2**28  # bytes

Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding (top, bottom, left, right), dilation, groups."""


def _blocks(x: Tensor, functions: int) -> Iterator[slice]:
    """Slices of images whose maps fit the block, one image at least."""
    budget = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    step = max(1, budget // max(1, widen(x.dtype).itemsize * functions * x[0].numel() if len(x) else 1))
    return (slice(start, min(start + step, len(x))) for start in range(0, len(x), step))


def _maps(values: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, K, H·W) as images (N, C·K, H, W)."""
    return values.flatten(1, 2).unflatten(2, size)


def padded(maps: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """What is left for the convolution to pad: it can only do both ends alike."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return maps, [top, left]
    return F.pad(maps, (left, right, top, bottom)), [0, 0]


def convolve(
    maps: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Maps (N, C·K, H, W) by a kernel (O, C/groups·K, kh, kw)."""
    maps, even = padded(maps, padding)
    return F.conv2d(maps, kernel, bias, stride, even, dilation, groups)


def basis_conv2d_reference(
    x: Tensor,
    terms: Sequence[tuple[Basis, Tensor, *tuple[Tensor, ...]]],
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The definition, in plain torch: the maps of the whole batch, then one convolution a term. x is (N, C, H, W)."""
    y: Tensor | None = None
    for basis, weight, *tensors in terms:
        values = basis.values(x.flatten(2).to(widen(x.dtype)), *tensors)
        part = convolve(
            _maps(values, x.shape[2:]), weight.to(values.dtype).flatten(1, 2), None, stride, padding, dilation, groups
        )
        y = part if y is None else y + part
    assert y is not None, "no terms"
    return (y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)).to(x.dtype)


def out_shape(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    """H' and W' for x (N, C, H, W) and a weight (O, C/groups, K, kh, kw)."""
    sides = zip(x.shape[2:], weight.shape[3:], stride, (sum(padding[:2]), sum(padding[2:])), dilation, strict=True)
    return [output_size(size + around, kernel, step, 0, spread) for size, kernel, step, around, spread in sides]


@without_autocast
@torch.no_grad()
def _forward(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    tensors: list[Tensor],
    terms: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    triton: bool,  # no default, as in basis_linear.py
) -> Tensor:
    """x (N, C, H, W), one weight (O, C/groups, K, kh, kw) a term -> (N, O, H', W') in the weights' dtype."""
    bases, product = parse(terms), product_dtype(weights[0])
    if triton:
        from archzoo.kernels import _basis_conv2d_triton

        geometry = stride, padding, dilation, groups
        return _basis_conv2d_triton.forward(x, weights, bias, tensors, bases, geometry)
    y = x.new_empty(
        x.shape[0], weights[0].shape[0], *out_shape(x, weights[0], stride, padding, dilation), dtype=weights[0].dtype
    )
    kernels = [w.to(product).flatten(1, 2) for w in weights]
    for images in _blocks(x, max(b.size for b in bases)):
        block = x[images].flatten(2).to(widen(x.dtype)).contiguous()  # (n, C, H·W)
        total: Tensor | None = None
        for basis, kernel, own in zip(bases, kernels, split(bases, tensors), strict=True):
            maps = _maps(basis.values(block, *own).to(product), x.shape[2:])
            part = convolve(maps, kernel, None, stride, padding, dilation, groups).to(widen(product))
            total = part if total is None else total.add_(part)
        assert total is not None
        y[images] = total if bias is None else total.add_(bias.to(total.dtype).view(-1, 1, 1))
    return y


@without_autocast
@torch.no_grad()
def _gradients(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    tensors: list[Tensor],
    terms: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
    triton: bool,
) -> list[Tensor]:
    """Gradients by x, each weight and each tensor, in this order; only those that `needs` asks for."""
    bases, product = parse(terms), product_dtype(weights[0])
    if triton:
        from archzoo.kernels import _basis_conv2d_triton

        geometry = stride, padding, dilation, groups
        return _basis_conv2d_triton.backward(grad, x, weights, tensors, bases, geometry, needs)
    needs_x, needs_weights, needs_tensors = needs[0], needs[1 : 1 + len(bases)], split(bases, needs[1 + len(bases) :])
    x_grad = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    weight_grads = [
        torch.zeros(w.shape if need else [0] * 5, dtype=widen(product), device=w.device).flatten(1, 2)
        for w, need in zip(weights, needs_weights, strict=True)
    ]
    tensor_grads = [torch.zeros_like(t, dtype=widen(t.dtype)) for t in tensors]
    kernels = [w.to(product).flatten(1, 2) for w in weights]
    top, bottom, left, right = padding
    height, width = x.shape[2:]
    for images in _blocks(x, max(b.size for b in bases)):
        block = x[images].flatten(2).to(widen(x.dtype)).contiguous()  # (n, C, H·W)
        above = grad[images].to(product)
        below: Tensor | None = None
        for term, (basis, kernel, own, own_grads) in enumerate(
            zip(bases, kernels, split(bases, tensors), split(bases, tensor_grads), strict=True)
        ):
            if needs_x or any(needs_tensors[term]):
                size = [len(block), x.shape[1] * basis.size, height + top + bottom, width + left + right]
                maps_grad = conv2d_input(size, kernel, above, stride, 0, dilation, groups)
                maps_grad = maps_grad[..., top : top + height, left : left + width]
                values_grad = maps_grad.reshape(len(block), x.shape[1], basis.size, -1).to(block.dtype)
                values, own_below, *pulled = basis.pullback(block, values_grad, *own)
                below = own_below if below is None else below.add_(own_below)
                for total, part in zip(own_grads, pulled, strict=False):
                    total += part
            else:
                values = basis.values(block, *own)
            if needs_weights[term]:
                maps, even = padded(_maps(values.to(product), (height, width)), padding)
                weight_grads[term] += conv2d_weight(maps, kernel.shape, above, stride, even, dilation, groups)
        if needs_x and below is not None:
            x_grad[images] = below.view(x[images].shape)
    inputs, grads = [x, *weights, *tensors], [x_grad, *weight_grads, *tensor_grads]
    return [g.view(t.shape).to(t.dtype) for g, t, need in zip(grads, inputs, needs, strict=True) if need]


basis_conv2d_op = torch.library.custom_op("archzoo::basis_conv2d", mutates_args=())(_forward)
basis_conv2d_backward_op = torch.library.custom_op("archzoo::basis_conv2d_backward", mutates_args=())(_gradients)


@basis_conv2d_op.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    tensors: list[Tensor],
    terms: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    triton: bool,
) -> Tensor:
    out = out_shape(x, weights[0], stride, padding, dilation)
    return x.new_empty(x.shape[0], weights[0].shape[0], *out, dtype=weights[0].dtype)


@basis_conv2d_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    tensors: list[Tensor],
    terms: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
    triton: bool,
) -> list[Tensor]:
    inputs = zip([x, *weights, *tensors], needs, strict=True)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in inputs if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, _, tensors, ctx.terms, *ctx.geometry, ctx.triton = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, *weights, *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    count = ctx.count
    x_need, weight_needs, bias_need, tensor_needs, *_ = ctx.needs_input_grad
    needs = [x_need, *weight_needs, *tensor_needs]
    grads = _any_gradients(ctx, grad, x, rest, needs, basis_conv2d_backward_op)
    bias_grad = grad.sum((0, 2, 3)) if bias_need else None
    return grads[0], grads[1 : 1 + count], bias_grad, grads[1 + count :], *(None,) * 6


def _any_gradients(
    ctx: Any, grad: Tensor, x: Tensor, rest: Sequence[Tensor], needs: list[bool], opaque: Any
) -> list[Tensor | None]:
    """Gradients by x and the rest, None where not needed. Differentiable again with create_graph=True."""
    count, geometry = ctx.count, ctx.geometry
    if not torch.is_grad_enabled():
        tensors = list(rest[:count]), list(rest[count:])
        found = iter(opaque(grad, x, *tensors, ctx.terms, *geometry, needs, ctx.triton))
        return [next(found) if need else None for need in needs]
    refuse_triton("basis_conv2d", "a gradient of a gradient")
    bases = parse(ctx.terms)

    def definition(x: Tensor, *rest: Tensor) -> Tensor:
        own = split(bases, rest[count:])
        all_terms = [(b, w, *t) for b, w, t in zip(bases, rest[:count], own, strict=True)]
        y = basis_conv2d_reference(x.to(widen(x.dtype)), all_terms, None, *geometry)
        return y.to(grad.dtype)

    return differentiable_gradients(without_autocast(definition), grad, [x, *rest], needs)


basis_conv2d_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, whose price a small layer feels."""

    @staticmethod
    def forward(
        ctx: Any, terms: str, triton: bool, count: int, geometry: Geometry, bias: Any, x: Tensor, *rest: Tensor
    ) -> Tensor:
        ctx.terms, ctx.triton, ctx.count, ctx.geometry = terms, triton, count, geometry
        ctx.save_for_backward(x, *rest)
        return _forward(x, list(rest[:count]), bias, list(rest[count:]), terms, *geometry, triton)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        _, _, _, _, bias_need, *needs = ctx.needs_input_grad
        grads = _any_gradients(ctx, grad, x, rest, needs, _gradients)
        return None, None, None, None, grad.sum((0, 2, 3)) if bias_need else None, *grads


def _gemm_flops(weight: Sequence[int], out: Sequence[int]) -> int:
    return 2 * prod(weight) * out[0] * out[2] * out[3]


@flop_formula(torch.ops.archzoo.basis_conv2d)
def _flops(
    x: Sequence[int],
    weights: Sequence[Sequence[int]],
    bias: Any,
    tensors: Any,
    terms: str,
    *geometry: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    terms_and_weights = zip(parse(terms), weights, strict=True)
    return sum(prod(x) * basis.flops[0] + _gemm_flops(weight, out_shape) for basis, weight in terms_and_weights)


@flop_formula(torch.ops.archzoo.basis_conv2d_backward)
def _backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weights: Sequence[Sequence[int]],
    tensors: Any,
    terms: str,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    needs: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    bases, total = parse(terms), 0
    learned = split(bases, needs[1 + len(bases) :])
    for basis, weight, need, own_needs in zip(bases, weights, needs[1:], learned, strict=False):
        gemm, pulled = _gemm_flops(weight, grad), needs[0] or any(own_needs)
        total += gemm * need + prod(x) * basis.flops[int(pulled)]
        total += gemm + 2 * basis.size * prod(x) if pulled else 0
    return total


def basis_conv2d(
    x: Tensor,
    terms: Sequence[tuple[Basis, Tensor, *tuple[Tensor, ...]]],
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    pad_value: float | None = None,
) -> Tensor:
    r"""Sum of terms $\sum_{c,j,t} w_{ocjt} B_j(x_{c,p+t})$ plus a bias, strided and padded as a convolution.

    Dtypes, autocast and higher derivatives as in `basis_linear`.

    Args:
        x: (N, C, H, W) or (C, H, W), any floating dtype.
        terms: For each term its basis, its weight (O, C/groups, K, kh, kw), and the basis's tensors, if it has any.
        bias: (O,) or None.
        stride: Down and across, in pixels.
        padding: Pixels added on each side, down and across; "same" or "valid" as `nn.Conv2d` has them.
        dilation: Distance of the taps, down and across.
        groups: Into how many groups channels and outputs are divided.
        pad_value: None: padding adds nothing, the functions' maps being padded by zeros. A number: x is padded by it,
            and the functions are evaluated there too.

    Returns:
        (N, O, H', W') or (O, H', W').

    Raises:
        ValueError: If shapes or dtypes do not fit, or the kernel does not fit into the padded input; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform, or of a basis without a kernel.
    """
    outputs, per_group, _, *kernel = terms[0][1].shape
    channels = per_group * groups
    check_input(x, channels)
    for basis, weight, *own in terms:
        right = (outputs, per_group, basis.size, *kernel)
        if tuple(weight.shape) != right or len(own) != basis.num_tensors:
            raise ValueError(
                f"the term of {basis} has weight {tuple(weight.shape)} and {len(own)} tensors; "
                f"it needs {right} and {basis.num_tensors}"
            )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({outputs},)")
    sides = padding_sides(padding, kernel, dilation)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    if pad_value is not None and any(sides):
        images = F.pad(images, (sides[2], sides[3], sides[0], sides[1]), value=pad_value)
        sides = [0, 0, 0, 0]
    check_output(x, out_shape(images, terms[0][1], list(stride), sides, list(dilation)))
    geometry = (list(stride), sides, list(dilation), groups)
    if under_transform():
        refuse_triton("basis_conv2d", "a torch.func transform")
        y = basis_conv2d_reference(images, terms, bias, *geometry)
        return y if x.dim() == 4 else y.squeeze(0)
    triton = takes_kernels("basis_conv2d", x, terms, bias)
    # Under autocast the weights are narrowed, as nn.Conv2d's are; x is not, since the functions need its digits.
    narrow, dtype = autocast_dtype(x), terms[0][1].dtype
    dtype = narrow if narrow.itemsize < dtype.itemsize else torch.promote_types(narrow, dtype)
    weights = [term[1].to(dtype) for term in terms]
    tensors = [tensor for term in terms for tensor in term[2:]]
    text = "[" + ", ".join(term[0].spec for term in terms) + "]"
    bias = None if bias is None else bias.to(dtype)
    if plain_eager(images):
        y = _Eager.apply(text, triton, len(weights), geometry, bias, images, *weights, *tensors)
    else:
        y = basis_conv2d_op(images, weights, bias, tensors, text, *geometry, triton)
    y = y.to(narrow)
    return y if x.dim() == 4 else y.squeeze(0)


def padding_sides(padding: tuple[int, int] | str, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Pixels added at the top, bottom, left and right, for what `nn.Conv2d` takes as padding."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if isinstance(padding, str):  # "same": an odd pixel goes to the end, as nn.Conv2d puts it
        totals = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        return [part for total in totals for part in (total // 2, total - total // 2)]
    return [padding[0], padding[0], padding[1], padding[1]]
