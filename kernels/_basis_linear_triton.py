"""The passes of `basis_linear.py` on a GPU: functions by the kernel of `_basis_triton.py`, products by cuBLAS.

Rows are walked in blocks, so that the functions take no more than `_BLOCK` bytes, and as many for their gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from archzoo.kernels._basis_triton import Term, evaluate
from archzoo.kernels._block_sizes import BlockSizes
from archzoo.kernels._triton import cdiv
from archzoo.kernels.basis_linear import Basis, split, widen

_BLOCK = 2**27  # bytes of functions at a time: enough for every SM, of what a GPU has next to nothing

TUNED: tuple[BlockSizes, ...] = ()


def _blocks(x: Tensor, bases: Sequence[Basis], dtype: torch.dtype) -> list[slice]:
    """Slices of rows whose functions fit the block, as even as can be."""
    most = max(64, _BLOCK // max(1, dtype.itemsize * x.shape[1] * sum(b.size for b in bases)))
    step = cdiv(len(x), cdiv(len(x), most)) if len(x) else 1
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, tensors: Sequence[Tensor], bases: Sequence[Basis]
) -> Tensor:
    """As `basis_linear_op`: (N, O) in the weights' dtype."""
    dtype, outputs = weights[0].dtype, weights[0].shape[0]
    x, matrices = x.contiguous(), [w.reshape(outputs, -1).t() for w in weights]
    y = x.new_empty(len(x), outputs, dtype=dtype)
    for rows in _blocks(x, bases, dtype):
        terms = [Term(b, own) for b, own in zip(bases, split(bases, tensors), strict=True)]
        evaluate(x[rows], terms, dtype)
        for n, (term, matrix) in enumerate(zip(terms, matrices, strict=True)):
            assert term.values is not None
            before = y[rows] if n else bias
            if before is None:
                torch.mm(term.values, matrix, out=y[rows])
            else:
                torch.addmm(before, term.values, matrix, out=y[rows])
            term.values = None
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    tensors: Sequence[Tensor],
    bases: Sequence[Basis],
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `basis_linear_backward_op`: gradients of x, the weights and the tensors, those that `needs` asks for."""
    dtype, outputs = weights[0].dtype, weights[0].shape[0]
    needs_weights, needs_tensors = needs[1 : 1 + len(bases)], split(bases, needs[1 + len(bases) :])
    x, grad, matrices = x.contiguous(), grad.contiguous(), [w.reshape(outputs, -1) for w in weights]
    blocks, sums = _blocks(x, bases, dtype), Sums(bases)
    dx = x.new_empty(x.shape) if needs[0] and len(blocks) > 1 else None
    for rows in blocks:
        above = grad[rows]
        each = zip(bases, split(bases, tensors), matrices, needs_weights, needs_tensors, strict=True)
        terms = [
            Term(basis, own, above @ matrix if needs[0] or any(learned) else None, wanted, any(learned))
            for basis, own, matrix, wanted, learned in each
        ]
        part = evaluate(x[rows], terms, dtype, needs[0])
        if dx is None:
            dx = part
        elif part is not None:
            dx[rows] = part
        for n, term in enumerate(terms):
            term.grad = None
            sums.add(n, None if term.values is None else above.t() @ term.values, term.pulled)
            term.values = None
    return sums.gradients(dx, x, weights, tensors, needs)


class Sums:
    """Gradients of weights and tensors, over blocks: wide, unless there is but one."""

    def __init__(self, bases: Sequence[Basis]):
        self.weights: list[Tensor | None] = [None] * len(bases)
        self.tensors: list[list[Tensor | None]] = [[None] * basis.num_tensors for basis in bases]

    def add(self, term: int, weight: Tensor | None, pulled: Sequence[Tensor]) -> None:
        """A block's part."""
        self.weights[term] = _added(self.weights[term], weight)
        for n, part in enumerate(pulled):
            self.tensors[term][n] = _added(self.tensors[term][n], part)

    def gradients(
        self, dx: Tensor | None, x: Tensor, weights: Sequence[Tensor], tensors: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        """Those needed, in the shapes and dtypes of what they are of; 0 of what has no influence, or no rows."""
        found = [dx, *self.weights, *(t for own in self.tensors for t in own)]
        return [
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            if g is None
            else g.to(t.dtype).contiguous().view(t.shape)
            for g, t, need in zip(found, [x, *weights, *tensors], needs, strict=True)
            if need
        ]


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if part is not None else total
    return total.to(widen(total.dtype)).add_(part)
