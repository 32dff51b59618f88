"""The passes of `basis_conv2d.py` on a GPU: functions by the kernel of `_basis_triton.py`, products by cuDNN.

Images lie channels last, as cuDNN's tensor-core kernels want them: then a pixel is a row of the linear layer, the
kernel is the same, and the maps (N, H, W, C·K) are convolved as they are written, by the weight laid out likewise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from archzoo.kernels._basis_linear_triton import Sums
from archzoo.kernels._basis_triton import Term, evaluate
from archzoo.kernels._block_sizes import BlockSizes
from archzoo.kernels._triton import cdiv
from archzoo.kernels.basis_conv2d import Geometry, convolve, out_shape, padded
from archzoo.kernels.basis_linear import Basis, split

_BLOCK = 2**27  # bytes of maps at a time

TUNED: tuple[BlockSizes, ...] = ()


def _blocks(x: Tensor, bases: Sequence[Basis], dtype: torch.dtype) -> list[slice]:
    """Slices of images whose maps fit the block, as even as can be; one image at least."""
    if not len(x):
        return []
    most = max(1, _BLOCK // max(1, dtype.itemsize * x[0].numel() * sum(b.size for b in bases)))
    step = cdiv(len(x), cdiv(len(x), most))
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def _pixels(images: Tensor) -> Tensor:
    """(N, C, H, W) as rows (N·H·W, C), contiguous."""
    return images.permute(0, 2, 3, 1).contiguous().view(-1, images.shape[1])


def _images(rows: Tensor, size: Sequence[int]) -> Tensor:
    """Rows as images, channels last; `size` is that of N, H, W in images of any number of channels."""
    return rows.view(size[0], *size[2:], rows.shape[1]).permute(0, 3, 1, 2)


def _kernels(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.flatten(1, 2).contiguous(memory_format=torch.channels_last) for w in weights]


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    bases: Sequence[Basis],
    geometry: Geometry,
) -> Tensor:
    """As `basis_conv2d_op`: (N, O, H', W') in the weights' dtype."""
    dtype, kernels = weights[0].dtype, _kernels(weights)
    y = x.new_empty(len(x), len(weights[0]), *out_shape(x, weights[0], *geometry[:3]), dtype=dtype)
    for images in _blocks(x, bases, dtype):
        terms = [Term(b, own) for b, own in zip(bases, split(bases, tensors), strict=True)]
        evaluate(_pixels(x[images]), terms, dtype)
        total: Tensor | None = None
        for term, kernel in zip(terms, kernels, strict=True):
            assert term.values is not None
            maps, term.values = _images(term.values, x[images].shape), None
            part = convolve(maps, kernel, bias if total is None else None, *geometry)
            total = part if total is None else total.add_(part)
        assert total is not None, "no terms"
        y[images] = total
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    tensors: Sequence[Tensor],
    bases: Sequence[Basis],
    geometry: Geometry,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `basis_conv2d_backward_op`: gradients of x, the weights and the tensors, those that `needs` asks for."""
    dtype, kernels = weights[0].dtype, _kernels(weights)
    needs_weights, needs_tensors = needs[1 : 1 + len(bases)], split(bases, needs[1 + len(bases) :])
    stride, (top, bottom, left, right), dilation, groups = geometry
    sums, height, width = Sums(bases), x.shape[2], x.shape[3]
    dx = x.new_empty(x.shape) if needs[0] else None
    for images in _blocks(x, bases, dtype):
        above = grad[images].contiguous(memory_format=torch.channels_last)
        terms = []
        each = zip(bases, split(bases, tensors), kernels, needs_weights, needs_tensors, strict=True)
        for basis, own, kernel, wanted, learned in each:
            term = Term(basis, own, None, wanted, any(learned))
            if needs[0] or term.learns:
                size = [len(above), x.shape[1] * basis.size, height + top + bottom, width + left + right]
                whole = conv2d_input(size, kernel, above, stride, 0, dilation, groups)
                term.grad = _pixels(whole[..., top : top + height, left : left + width])
            terms.append(term)
        part = evaluate(_pixels(x[images]), terms, dtype, needs[0])
        if dx is not None and part is not None:
            dx[images] = _images(part, x[images].shape)
        for n, (term, kernel) in enumerate(zip(terms, kernels, strict=True)):
            weight_grad, term.grad = None, None
            if term.values is not None:
                maps, even = padded(_images(term.values, x[images].shape), geometry[1])
                weight_grad = conv2d_weight(maps, kernel.shape, above, stride, even, dilation, groups)
            sums.add(n, weight_grad, term.pulled)
            term.values = None
    return sums.gradients(dx, x, weights, tensors, needs)
