"""Linear operators that the algebra of Linearizers returns."""

from typing import Any

import torch
from torch import Tensor

from archzoo.layers.linear_operators import ConstantOperator, LinearOperator, apply


class TransposedOperator(LinearOperator):
    """A^T of an operator A, which it follows as that is trained."""

    def __init__(self, operator: LinearOperator):
        super().__init__(operator.out_features, operator.in_features)
        self.operator = operator

    def matrix(self, t: Any = None) -> Tensor:
        """A^T."""
        return self.operator.matrix(t).mT

    def transposed(self) -> LinearOperator:
        """A itself."""
        return self.operator


class ProductOperator(LinearOperator):
    """A B of two operators, which it follows as they are trained. Each depends on what it was given, not on `t`."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator):
        if outer.in_features != inner.out_features:
            raise ValueError(f"operators of {inner.out_features} outputs and {outer.in_features} inputs: must agree")
        super().__init__(inner.in_features, outer.out_features)
        self.outer, self.inner = outer, inner

    def matrix(self, t: Any = None) -> Tensor:
        """A B, both at t."""
        return self.outer.matrix(t) @ self.inner.matrix(t)

    def forward(self, z: Tensor, t: Any = None) -> Tensor:
        """z B^T A^T, both at t."""
        self._check(z)
        return self.outer(self.inner(z, t), t)

    def transposed(self) -> LinearOperator:
        """B^T A^T."""
        return ProductOperator(self.inner.transposed(), self.outer.transposed())


class FrozenOperator(LinearOperator):
    """An operator at a fixed t, which it follows as that is trained."""

    def __init__(self, operator: LinearOperator, t: Any):
        super().__init__(operator.in_features, operator.out_features)
        self.operator = operator
        if isinstance(t, Tensor):
            self.register_buffer("t", t, persistent=False)
        else:
            self.t = t

    def matrix(self, t: Any = None) -> Tensor:
        """A_t."""
        self._refuse(t)
        return self.operator.matrix(self.t)

    def forward(self, z: Tensor, t: Any = None) -> Tensor:
        """z A_t^T."""
        self._refuse(t)
        return self.operator(z, self.t)

    def _refuse(self, t: Any) -> None:
        if t is not None:
            raise ValueError(f"t={t!r}: this operator's is fixed to {self.t!r}; leave it out")


class LowRankOperator(LinearOperator):
    """c I + U W^T, never formed.

    Args:
        left: U (out, k).
        right: W (in, k).
        scale: c; 0 unless the matrix is square.
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor, scale: float = 0.0):
        if scale and len(left) != len(right):
            raise ValueError(f"scale={scale}: must be 0 for a matrix {len(left)} x {len(right)}, which is not square")
        super().__init__(len(right), len(left))
        self.scale = scale
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def matrix(self, t: Any = None) -> Tensor:
        """c I + U W^T."""
        product = self.left @ self.right.mT
        if self.scale:
            product.diagonal().add_(self.scale)
        return product

    def forward(self, z: Tensor, t: Any = None) -> Tensor:
        """c z + (z W) U^T."""
        self._check(z)
        y = apply(self.left, apply(self.right.mT, z))
        return y + self.scale * z if self.scale else y

    def transposed(self) -> LinearOperator:
        """c I + W U^T."""
        return LowRankOperator(self.right, self.left, self.scale)

    @torch.no_grad()
    def pinv(self, rtol: float | None = None, t: Any = None) -> LinearOperator:
        """As of any operator; of low rank again, and at its cost, where c is 0."""
        if not self._is_thin():
            return super().pinv(rtol)
        left, values, right = self.svd()
        floor = (torch.finfo(values.dtype).eps * max(len(left), len(right)) if rtol is None else rtol) * values.max()
        inverse = torch.where(values > floor, values.reciprocal(), 0.0)
        return LowRankOperator(right * inverse, left)

    @torch.no_grad()
    def svd(self, t: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """As of any operator; k singular values only, and at their cost, where c is 0."""
        if not self._is_thin():
            return super().svd()
        left, left_triangle = torch.linalg.qr(self.left)
        right, right_triangle = torch.linalg.qr(self.right)
        u, values, v = torch.linalg.svd(left_triangle @ right_triangle.mT)
        return left @ u, values, right @ v.mT

    def _is_thin(self) -> bool:
        return not self.scale and 0 < self.left.shape[1] <= min(self.in_features, self.out_features)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.in_features}, {self.out_features}, rank={self.left.shape[1]}, scale={self.scale:g}"


def constant(matrix: Tensor) -> LinearOperator:
    """A matrix as it is now."""
    return ConstantOperator(matrix.detach())
