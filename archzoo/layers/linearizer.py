"""Linearizer: a network that is exactly linear in the vector spaces that invertible nets induce.

"Who Said Neural Networks Aren't Linear?" (https://arxiv.org/abs/2510.08570). SVD, pseudo-inverse, transpose,
projection, composition and powers of the network are those of its matrix. That is transport of structure: nothing is
approximated, and nothing is gained beyond what the nets and the matrix express. The network has the matrix's rank;
with one net on both sides it is conjugate to a linear map. Of use are exact inversion, exact collapse of many steps of
a flow into one (`archzoo.layers.linear_flow`), and what is a projection by construction.

Invertible nets of moderate depth bound the quality. Deep or wild ones are ill-conditioned: sums of points far apart
decode to huge values. `clamp` and float64 help.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archzoo.layers._check import check_dtype, typed
from archzoo.layers._operators import FrozenOperator, LowRankOperator, ProductOperator, constant
from archzoo.layers.induced import InducedSpace
from archzoo.layers.invertible import Invertible, checked, same_net, widened, without_autocast
from archzoo.layers.linear_operators import ConstantOperator, LinearOperator
from archzoo.registry import Card, register_layer

Space = Literal["x", "y"]


@register_layer(
    "linearizer",
    kind="module",
    nonlinear=True,
    card=Card(
        title="Who Said Neural Networks Aren't Linear?",
        authors="Nimrod Berman, Assaf Hallak, Assaf Shocher",
        year=2025,
        arxiv="2510.08570",
        equation=r"f(x) = g_y^{-1}(A\, g_x(x)), \quad x \oplus x' = g^{-1}(g(x) + g(x')), \quad a \odot x = "
        r"g^{-1}(a\, g(x))",
        headline="a flow's 100 steps collapse into one: mean squared error 3.0e-4 (32.4 dB) between both on MNIST, "
        "picture to noise and back at 31.6 dB; projectors and mixed styles by construction",
        reproduced="the algebra to 1e-6 in float64, and the collapse, Euler and Runge-Kutta, to 60 dB and more in "
        "float32 (upstream's Runge-Kutta collapse is of first order only); one-step samples of two moons at "
        "0.23 of the energy distance of a Gaussian (experiment flow_two_moons). The algebra is textbook; "
        "invertible nets of moderate depth bound the quality",
    ),
)
class Linearizer(nn.Module):
    r"""$f(x) = g_y^{-1}(A\, g_x(x))$, linear from g_x's induced vector space to g_y's.

    Methods that return a Linearizer share the nets' parameters. `T`, `compose` and `at` follow A as it is trained;
    `pinv`, `power`, `exp`, and what `svd` and `project` compute are of A as it is now. Singular vectors have norm 1 in
    latent space, while latents of data have about sqrt(dim): `scale` them before looking at them.

    Args:
        g_x: Invertible net of the inputs: forward(x) and inverse(z).
        A: A `LinearOperator`, or a matrix (out, in), which is then not trained.
        g_y: Invertible net of the outputs; None: g_x.
        x_shape: Shape of one input, whose latent is flattened; None: vectors.
        y_shape: Shape of one output; None: as x_shape.

    Attributes:
        g_x: The net of the inputs.
        g_y: The net of the outputs.
        A: The operator.

    Shape: (*, *x_shape) -> (*, *y_shape).

    Raises:
        TypeError: If a net cannot be inverted, or A is neither of the two.
        ValueError: If A does not fit the shapes.
    """

    @typed
    def __init__(
        self,
        g_x: Invertible,
        A: LinearOperator | Tensor,
        g_y: Invertible | None = None,
        *,
        x_shape: Sequence[int] | None = None,
        y_shape: Sequence[int] | None = None,
    ):
        super().__init__()
        if isinstance(A, Tensor):
            A = ConstantOperator(A)
        if not isinstance(A, LinearOperator):
            raise TypeError(f"A={A!r}: must be a LinearOperator, as DenseOperator(8), or a matrix")
        self.g_x = checked("g_x", g_x)
        self.A = A
        self.g_y = self.g_x if g_y is None else checked("g_y", g_y)
        self.x_shape = None if x_shape is None else tuple(x_shape)
        self.y_shape = self.x_shape if y_shape is None else tuple(y_shape)
        shapes = ("x_shape", x_shape, A.in_features), ("y_shape", self.y_shape, A.out_features)
        for name, given, size in shapes:
            if given is not None and math.prod(given) != size:
                raise ValueError(f"{name}={given}: has {math.prod(given)} numbers, and A {size}")

    # ---- the map

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """f(x); further arguments, as a time or a style, go to the operator. Autocast is off inside."""
        like = next((t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), None)
        if like is not None:
            check_dtype(x, like)
        x = widened(x)
        with without_autocast(x):
            return self.space("y").decode(self.A(self.space("x").encode(x), *args))

    def matrix(self, *args: Any) -> Tensor:
        """A (out, in)."""
        return self.A.matrix(*args)

    def at(self, t: Any) -> "Linearizer":
        """f at a fixed time or style, where A depends on one."""
        return self._new("x", FrozenOperator(self.A, t), "y")

    def inverse(self, y: Tensor) -> Tensor:
        """The x whose f(x) is y.

        Raises:
            ValueError: If A is not square or singular; `pinv` is there for these.
        """
        if self.A.in_features != self.A.out_features:
            sizes = f"{self.A.out_features} x {self.A.in_features}"
            raise ValueError(f"A of {sizes}: must be square to have an inverse; use pinv()")
        z, A = self.space("y").encode(y), self.matrix()
        wide = torch.promote_types(A.dtype, z.dtype)
        columns = z.reshape(-1, z.shape[-1]).mT.to(wide)
        solved, failed = torch.linalg.solve_ex(A.to(wide), columns)
        if failed:
            raise ValueError("A: is singular and has no inverse; use pinv()")
        return self.space("x").decode(solved.mT.reshape(z.shape).to(z.dtype))

    # ---- the induced spaces

    def space(self, space: Space = "x") -> InducedSpace:
        """The vector space of the inputs, "x", or of the outputs, "y"."""
        if space not in ("x", "y"):
            raise ValueError(f"space={space!r}: must be 'x' or 'y'")
        return InducedSpace(self.g_x, self.x_shape) if space == "x" else InducedSpace(self.g_y, self.y_shape)

    def add(self, a: Tensor, b: Tensor, space: Space = "x") -> Tensor:
        """The induced sum."""
        return self.space(space).add(a, b)

    def scale(self, c: float | Tensor, a: Tensor, space: Space = "x") -> Tensor:
        """The induced multiple; c is a number, or has one for each point."""
        return self.space(space).scale(c, a)

    def combine(self, coeffs: Sequence[float | Tensor], points: Sequence[Tensor], space: Space = "x") -> Tensor:
        """The induced linear combination."""
        return self.space(space).combine(coeffs, points)

    def zero(self, space: Space = "x") -> Tensor:
        """The induced zero, (1, *shape)."""
        found = self.space(space)
        like = next((t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), None)
        size = self.A.in_features if space == "x" else self.A.out_features
        return found.decode(torch.zeros(1, size) if like is None else like.new_zeros(1, size))

    def inner(self, a: Tensor, b: Tensor, space: Space = "x") -> Tensor:
        """The induced inner product."""
        return self.space(space).inner(a, b)

    def norm(self, a: Tensor, space: Space = "x") -> Tensor:
        """The induced norm."""
        return self.space(space).norm(a)

    # ---- the algebra

    @property
    def T(self) -> "Linearizer":  # noqa: N802 - as torch's
        """The transpose: the adjoint for the induced inner products."""
        return self._new("y", self.A.transposed(), "x")

    def transpose(self) -> "Linearizer":
        """The transpose, as `T`."""
        return self.T

    def pinv(self, rtol: float | None = None) -> "Linearizer":
        """The pseudo-inverse, which meets the four Penrose rules in the induced spaces.

        Args:
            rtol: Singular values of at most so many times the largest are taken for 0; None: max(out, in) eps.
        """
        return self._new("y", self.A.pinv(rtol), "x")

    def compose(self, other: "Linearizer") -> "Linearizer":
        """self after other, also as `self @ other`: the nets in the middle cancel.

        Raises:
            TypeError: If it is no Linearizer.
            ValueError: If self.g_x is not other.g_y: the same net, or the same in `Conditioned` at an equal context.
        """
        if not isinstance(other, Linearizer):
            raise TypeError(f"other={other!r}: must be a Linearizer")
        if not same_net(self.g_x, other.g_y):
            raise ValueError("other: its g_y must be the g_x of the one that comes after it, or they do not cancel")
        result = ProductOperator(self.A, other.A)
        return Linearizer(other.g_x, result, self.g_y, x_shape=other.x_shape, y_shape=self.y_shape)

    def __matmul__(self, other: "Linearizer") -> "Linearizer":
        return self.compose(other)

    def power(self, n: int) -> "Linearizer":
        """f applied n times, in one; a negative n is that of the inverse.

        Raises:
            ValueError: If g_x is not g_y, or n no whole number.
        """
        if isinstance(n, bool) or not isinstance(n, int):
            raise ValueError(f"n={n!r}: must be a whole number")
        return self._function("power", lambda A: torch.linalg.matrix_power(A, n))

    def exp(self, c: float = 1.0) -> "Linearizer":
        """The exponential of c f: what its flow dx/dt = f(x), in the induced space, does in the time c.

        Raises:
            ValueError: If g_x is not g_y.
        """
        return self._function("exp", lambda A: torch.linalg.matrix_exp(c * A))

    @torch.no_grad()
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points u (k, *y_shape) and v (k, *x_shape), and numbers s (k,), largest first: f(v_k) is s_k times u_k.

        They are orthonormal in the induced inner products. k is the smaller size of A, or less where it is known to
        have no higher rank.
        """
        left, values, right = self.A.svd()
        return self.space("y").decode(left.mT), values, self.space("x").decode(right.mT)

    def project(self, y: Tensor, rank: int | None = None) -> Tensor:
        """Orthogonal projection of outputs onto the range of f, or onto its first `rank` singular directions.

        Raises:
            ValueError: If `rank` is below 0 or above the rank of f.
        """
        left, values, _ = self.A.svd()
        floor = torch.finfo(values.dtype).eps * max(self.A.in_features, self.A.out_features) * values[:1]
        full = int((values > floor).sum())
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= full):
            raise ValueError(f"rank={rank!r}: must be a whole number from 0 to {full}, the rank of f")
        basis = left[:, : full if rank is None else rank]
        return self._new("y", LowRankOperator(basis, basis), "y")(y)

    @torch.no_grad()
    def _function(self, name: str, function: Callable[[Tensor], Tensor]) -> "Linearizer":
        if not same_net(self.g_x, self.g_y):
            raise ValueError(f"{name}: f must map a space to itself, and g_x is not g_y")
        return self._new("x", constant(function(self.matrix())), "y")

    def _new(self, source: Space, A: LinearOperator, target: Space) -> "Linearizer":
        start, end = self.space(source), self.space(target)
        return Linearizer(start.net, A, end.net, x_shape=start.shape, y_shape=end.shape)

    def extra_repr(self) -> str:
        """Shapes, for `repr`."""
        return f"x_shape={self.x_shape}, y_shape={self.y_shape}"
