"""Linear operators: the matrix A of a Linearizer (https://arxiv.org/abs/2510.08570), formed only where it must be.

Each acts on columns: `matrix(t)` is (out, in), and `forward(z, t)` maps rows (*, in) to (*, out) by z A^T. `t` is what
a matrix may depend on, as the time of a flow or the number of a style. Those of a style are in
`archzoo.layers.style_operators`, and `archzoo.layers._operators` has those that the algebra returns.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import compute_dtype
from archzoo.layers._check import check_whole, typed

__all__ = [
    "ConstantOperator",
    "DenseOperator",
    "LinearOperator",
    "ProjectorOperator",
    "TimeLowRankOperator",
]


class LinearOperator(nn.Module):
    """Base class of operators. A subclass gives `matrix`, and what it can do without forming it.

    Args:
        in_features: Columns of the matrix.
        out_features: Its rows.

    Shape: (*, in_features) -> (*, out_features).
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features

    def matrix(self, t: Any = None) -> Tensor:
        """A (out_features, in_features), at one t where it depends on any."""
        raise TypeError(f"{type(self).__name__}: an operator must define matrix()")

    def forward(self, z: Tensor, t: Any = None) -> Tensor:
        """z A^T.

        Raises:
            ValueError: If the last size of z is not `in_features`.
        """
        self._check(z)
        return apply(self.matrix(t), z)

    def transposed(self) -> "LinearOperator":
        """A^T, which follows A as it is trained."""
        from archzoo.layers._operators import TransposedOperator

        return TransposedOperator(self)

    @torch.no_grad()
    def pinv(self, rtol: float | None = None, t: Any = None) -> "LinearOperator":
        """The pseudo-inverse A^+ as A is now.

        Args:
            rtol: Singular values of at most so many times the largest are taken for 0; None: max(out, in) eps.
            t: What A depends on, if on anything.
        """
        return ConstantOperator(torch.linalg.pinv(_wide(self.matrix(t)), rtol=rtol))

    @torch.no_grad()
    def svd(self, t: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, k), s (k,), largest first, and V (in, k) of A = U diag(s) V^T as it is now."""
        left, values, right = torch.linalg.svd(_wide(self.matrix(t)), full_matrices=False)
        return left, values, right.mT

    def _check(self, z: Tensor) -> None:
        if not z.dim() or z.shape[-1] != self.in_features:
            raise ValueError(f"input of shape {tuple(z.shape)}: its last size must be in_features={self.in_features}")

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.in_features}, {self.out_features}"


class ConstantOperator(LinearOperator):
    """A matrix that is not trained.

    Args:
        matrix: A (out, in), floating point.

    Attributes:
        value: A, a buffer.

    Raises:
        ValueError: If it is no matrix, or has a gradient to be trained by: that is `DenseOperator`.
    """

    value: Tensor

    def __init__(self, matrix: Tensor):
        if matrix.dim() != 2 or not matrix.is_floating_point():
            raise ValueError(f"matrix of shape {tuple(matrix.shape)} and {matrix.dtype}: must be (out, in) and real")
        if matrix.requires_grad:
            raise ValueError("matrix: would not be trained; use DenseOperator, or matrix.detach()")
        super().__init__(matrix.shape[1], matrix.shape[0])
        self.register_buffer("value", matrix)

    def matrix(self, t: Any = None) -> Tensor:
        """A."""
        return self.value


class DenseOperator(LinearOperator):
    """A trained matrix, which starts orthogonal.

    Args:
        in_features: Columns of A.
        out_features: Rows of A; None: as many.

    Attributes:
        weight: A (out_features, in_features).
    """

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, in_features if out_features is None else out_features)
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a matrix with orthonormal rows or columns."""
        with torch.no_grad():
            self.weight.copy_(nn.init.orthogonal_(torch.empty_like(self.weight, dtype=compute_dtype(self.weight))))

    def matrix(self, t: Any = None) -> Tensor:
        """A."""
        return self.weight


class TimeLowRankOperator(LinearOperator):
    r"""A matrix of low rank that changes with time, $A_t = L(t) R(t)^T$.

    Two perceptrons make L and R from the embedding [sin(t w), cos(t w)], w_k = 10000^(-k / (time_dim/2 - 1)).

    Args:
        features: Size of the square matrix.
        rank: Columns of L and R.
        time_dim: Length of the embedding, even, 4 or more.

    Attributes:
        left: Perceptron of L: three linear layers with GELU between, of widths 4 time_dim.
        right: That of R.

    Raises:
        ValueError: If a size is wrong; in `forward`, if t does not fit.
    """

    @typed
    def __init__(
        self,
        features: int,
        rank: int = 8,
        time_dim: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(features, features)
        check_whole(rank=rank, time_dim=time_dim)
        if time_dim < 4 or time_dim % 2:
            raise ValueError(f"time_dim={time_dim}: must be even, 4 or more: a sine and a cosine of each frequency")
        self.features, self.rank, self.time_dim = features, rank, time_dim

        def perceptron() -> nn.Sequential:
            sizes = (time_dim, 4 * time_dim, 4 * time_dim, features * rank)
            one, two, three = (
                nn.Linear(a, b, device=device, dtype=dtype) for a, b in zip(sizes, sizes[1:], strict=False)
            )
            return nn.Sequential(one, nn.GELU(), two, nn.GELU(), three)

        self.left, self.right = perceptron(), perceptron()

    def reset_parameters(self) -> None:
        """Draws both perceptrons anew."""
        for module in (*self.left, *self.right):
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def factors(self, t: float | Tensor | None) -> tuple[Tensor, Tensor]:
        """L and R, each (*t.shape, features, rank)."""
        if t is None:
            raise ValueError("t=None: this operator's matrix depends on the time; give a number or a tensor")
        weight = next(self.left.parameters())
        time = torch.as_tensor(t, dtype=weight.dtype, device=weight.device)
        half = self.time_dim // 2
        steps = torch.arange(half, dtype=weight.dtype, device=weight.device)
        angles = time[..., None] * torch.exp(steps * (-math.log(10_000) / (half - 1)))
        embedding = torch.cat([angles.sin(), angles.cos()], -1)
        shape = (*time.shape, self.features, self.rank)
        return self.left(embedding).view(shape), self.right(embedding).view(shape)

    def matrix(self, t: Any = None) -> Tensor:
        """A_t, (*t.shape, features, features)."""
        left, right = self.factors(t)
        return left @ right.mT

    def forward(self, z: Tensor, t: Any = None) -> Tensor:
        """z A_t^T; t is a number, or has one element for each z[i]."""
        self._check(z)
        left, right = self.factors(t)
        if left.dim() == 2:
            return (z @ right) @ left.mT
        if left.dim() != 3 or z.dim() < 2 or z.shape[0] != left.shape[0]:
            raise ValueError(
                f"t of shape {tuple(left.shape[:-2])}: must be a number or (batch,), for an input of {tuple(z.shape)}"
            )
        rows = z.reshape(z.shape[0], math.prod(z.shape[1:-1]), self.features)
        return ((rows @ right) @ left.mT).view(z.shape)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.features}, rank={self.rank}, time_dim={self.time_dim}"


class ProjectorOperator(LinearOperator):
    """A diagonal of zeros and ones, each chosen by a gate: a projection, whatever is trained.

    The gradient of a gate is that of its sigmoid (straight through).

    Args:
        features: Size of the square matrix.
        rank_weight: Of `regularization_loss`, the sum of the gates' sigmoids.

    Attributes:
        gates: (features,); open where they are above 0. They start normal.
    """

    @typed
    def __init__(
        self,
        features: int,
        *,
        rank_weight: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(features, features)
        if isinstance(rank_weight, bool) or not 0 <= rank_weight < math.inf:
            raise ValueError(f"rank_weight={rank_weight!r}: must be a finite number, 0 or more")
        self.rank_weight = rank_weight
        self.gates = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the gates."""
        nn.init.normal_(self.gates)

    @property
    def rank(self) -> int:
        """Number of open gates."""
        return int((self.gates > 0).sum())

    def mask(self) -> Tensor:
        """Zeros and ones, exactly, with the gradient of the sigmoids."""
        soft = self.gates.sigmoid()
        return (self.gates > 0).to(soft) + (soft - soft.detach())

    def regularization_loss(self) -> Tensor:
        """rank_weight times the sum of the sigmoids. The training loop adds it to the loss."""
        return self.rank_weight * self.gates.sigmoid().sum()

    def matrix(self, t: Any = None) -> Tensor:
        """The diagonal matrix."""
        return self.mask().diag()

    def forward(self, z: Tensor, t: Any = None) -> Tensor:
        """z, with zeros where a gate is shut."""
        self._check(z)
        return z * self.mask()

    def transposed(self) -> LinearOperator:
        """Itself."""
        return self

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.in_features}, rank_weight={self.rank_weight:g}"


def apply(matrix: Tensor, z: Tensor) -> Tensor:
    """z A^T in the wider of their dtypes, rounded to that of z."""
    wide = torch.promote_types(matrix.dtype, z.dtype)
    return F.linear(z.to(wide), matrix.to(wide)).to(z.dtype)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(compute_dtype(matrix))
