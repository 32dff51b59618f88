r"""B-splines of any order on uniform or adaptive knots, the basis of Kolmogorov-Arnold networks.

$B_{j,0}(x) = [t_j \le x < t_{j+1}]$ and, with 0/0 := 0 where knots repeat,
$B_{j,d}(x) = \frac{x - t_j}{t_{j+d} - t_j} B_{j,d-1}(x) + \frac{t_{j+d+1} - x}{t_{j+d+1} - t_{j+1}} B_{j+1,d-1}(x)$
(Cox, de Boor). On uniform cubic knots this is, with $d = |x - \text{centre}_j| / h$,
$B_j = (\max(2-d, 0)^3 - 4\max(1-d, 0)^3) / 6$: no recursion, no gather, 12 FLOPs a function against 21 (5 cells).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels.basis_linear import Basis, KernelForm

OUTSIDE = ("zero", "clamp", "linear")
_S = (2 / 3) ** (1 / 3)  # scales u so that the 4/6 of the cubic comes for nothing: (S p)^3 = 4 p^3 / 6


def cox_de_boor(x: Tensor, knots: Tensor, order: int, derivative: int = 0) -> Tensor:
    """All B-splines of one order, or a derivative of theirs: the definition.

    Args:
        x: (*, I, R).
        knots: (I, T) or (1, T), not decreasing along T, in x's dtype.
        order: Degree k of the pieces, from 0.
        derivative: Which derivative, from 0. At a knot where it jumps, the one from the right.

    Returns:
        (*, I, T - k - 1, R).
    """
    x, t = x.unsqueeze(-2), knots.unsqueeze(-1)
    if derivative > order:
        return torch.where(x.isnan(), x, torch.zeros_like(t[..., order + 1 :, :]))
    b = ((t[..., :-1, :] <= x) & (x < t[..., 1:, :])).to(x.dtype)
    if derivative == order:
        b = torch.where(x.isnan(), x, b)  # no factor below carries a NaN any more
    for degree in range(1, order - derivative + 1):
        b = _raised(b, x, t, degree)
    for degree in range(order - derivative + 1, order + 1):
        b = _differentiated(b, t, degree)
    return b


def _per_width(t: Tensor, degree: int) -> Tensor:
    width = t[..., degree:, :] - t[..., :-degree, :]
    return torch.where(width > 0, 1 / width, 0)


def _raised(b: Tensor, x: Tensor, t: Tensor, degree: int) -> Tensor:
    """One step of the recursion, from degree - 1 to degree."""
    x = x.clamp(t[..., :1, :], t[..., -1:, :])  # beyond the knots all of b is 0, but infinity times 0 is not
    rising = (x - t[..., :-degree, :]) * _per_width(t, degree) * b
    # The falling factor (t_{j+d+1} - x) / width is 1 - (x - t_{j+1}) / width.
    return rising[..., :-1, :] + (b[..., 1:, :] - rising[..., 1:, :])


def _differentiated(b: Tensor, t: Tensor, degree: int) -> Tensor:
    """The derivatives of degree `degree`, from the functions (or derivatives) of degree - 1."""
    b = b * _per_width(t, degree)
    return degree * (b[..., :-1, :] - b[..., 1:, :])


@dataclass(frozen=True)
class BSpline(Basis):
    """B-splines on a grid of `intervals` cells, `order` more on each side: K = intervals + order functions.

    On a uniform grid `start` is the lower end of the inner grid and `step` its spacing, Python floats that hold for all
    features. If they are None the grid is adaptive, and methods take the knots (I, T) as a tensor.
    `outside` says what lies outside the inner grid: `"zero"` the splines as they are, which fade out; `"clamp"` their
    value at the end; `"linear"` their tangent there.
    """

    order: int
    intervals: int
    start: float | None
    step: float | None
    outside: str = "zero"

    @property
    def num_tensors(self) -> int:
        """The knots, unless they are uniform."""
        return int(self.step is None)

    @property
    def size(self) -> int:
        """K, functions an input."""
        return self.intervals + self.order

    @property
    def kernel(self) -> KernelForm:
        """For Triton: the closed form, or the recursion over knots."""
        if self.order == 3 and self.start is not None and self.step is not None:
            return KernelForm("cubic", shift=self.start, scale=_S / self.step, outside=self.outside)
        return KernelForm("spline", self.order, (self.size + self.order + 1).bit_length(), outside=self.outside)

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs an input of the path taken; `outside="linear"` adds its tangent."""
        if self._closed:
            values, both = 12 * self.size + 2, 16 * self.size + 2
        else:
            cells = self.intervals + 2 * self.order
            values = 3 * cells + 5 * sum(cells - degree for degree in range(1, self.order + 1))
            both = values + 3 * self.size
        return (both + 2 * self.size, both + 2 * self.size) if self.outside == "linear" else (values, both)

    @property
    def _closed(self) -> bool:
        # What dynamo traces is differentiated by autograd, which the recursion suits and in-place work does not.
        return self.order == 3 and self.step is not None and not torch.compiler.is_compiling()

    def knots(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """Knots in x's dtype and on its device: (I, T), or (1, T) on a uniform grid."""
        if self.start is None or self.step is None:
            return tensors[0].to(x)
        j = torch.arange(-self.order, self.intervals + self.order + 1, device=x.device)
        return (j.to(torch.float64) * self.step + self.start).to(x.dtype).unsqueeze(0)

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """(*, I, R) -> (*, I, K, R)."""
        return self.derivative(x, 0, *tensors)

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Functions and first derivatives, (*, I, K, R) each."""
        if torch.is_grad_enabled():
            return self.derivative(x, 0, *tensors), self.derivative(x, 1, *tensors)
        inner = self._inner(x, *tensors)
        values, slopes = self._values_and_slopes(inner, *tensors)
        if self.outside == "linear":
            values = torch.addcmul(values, slopes, (x - inner).unsqueeze(-2))
        elif self.outside == "clamp":
            slopes = slopes * (inner == x).unsqueeze(-2)
        return values, slopes

    def derivative(self, x: Tensor, derivative: int, *tensors: Tensor) -> Tensor:
        """Any derivative by x, (*, I, K, R), itself differentiable by x any number of times."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Derivative.apply(x, self, derivative, *tensors)
        return self._derivative(x, derivative, *tensors)

    def _derivative(self, x: Tensor, derivative: int, *tensors: Tensor) -> Tensor:
        inner = self._inner(x, *tensors)
        if self.outside == "linear" and derivative == 0:
            values, slopes = self._values_and_slopes(inner, *tensors)
            return torch.addcmul(values, slopes, (x - inner).unsqueeze(-2))
        if self._closed and derivative <= 1:
            b = self._values_and_slopes(inner)[1] if derivative else self._cubic(inner)
        else:
            b = cox_de_boor(inner, self.knots(x, *tensors), self.order, derivative)
        constant_outside = self.outside == "clamp" or (self.outside == "linear" and derivative > 1)
        return b * (inner == x).unsqueeze(-2) if derivative and constant_outside else b

    def _inner(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """Where the splines themselves are evaluated for x."""
        if self.outside == "zero":
            return x
        t = self.knots(x, *tensors)
        first, last = t[:, self.order, None], t[:, self.order + self.intervals, None]
        # Cells are open on the right, but the last one must count as closed here, or its end lies beyond it.
        return x.clamp(first, torch.nextafter(last, first))

    def _values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        if self._closed:
            values, slopes, scale = self._cubic_slopes(x)
            return values, slopes.mul_(scale)
        knots = self.knots(x, *tensors)
        if self.order == 0:
            return cox_de_boor(x, knots, 0), cox_de_boor(x, knots, 0, 1)
        lower, t = cox_de_boor(x, knots, self.order - 1), knots.unsqueeze(-1)
        return _raised(lower, x.unsqueeze(-2), t, self.order), _differentiated(lower, t, self.order)

    def pullback(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Values at x, and grad (*, I, K, R) pulled back to x."""
        if not self._closed or self.outside != "zero" or torch.is_grad_enabled():
            return super().pullback(x, grad, *tensors)
        values, slopes, scale = self._cubic_slopes(x)
        return values, slopes.mul_(grad).sum(-2).mul_(scale)

    # The closed form, p = max(1 - d, 0), q = max(2 - d, 0): B = (q^3 - 4 p^3) / 6 and B' = -sign(u) (q^2 - 4 p^2) / 2h.
    # Scaled by S, with signs turned so that each step is one pass in place: B = (-Sp)^3 - (-Sq)^3 / 4.

    def _distance(self, x: Tensor) -> Tensor:
        """S (x - centre) / h, (*, I, K, R)."""
        assert self.start is not None
        assert self.step is not None
        centres = torch.arange(-1, self.size - 1, dtype=x.dtype, device=x.device) * _S
        return ((x - self.start) * (_S / self.step)).unsqueeze(-2) - centres.unsqueeze(-1)

    def _cubic(self, x: Tensor) -> Tensor:
        q = self._distance(x).abs_().sub_(2 * _S).clamp_max_(0)
        return (q + _S).clamp_max_(0).pow_(3).sub_(q.pow_(3), alpha=0.25)

    def _cubic_slopes(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Values, and slopes in units of the number that comes with them."""
        assert self.step is not None
        u = self._distance(x)
        q = u.abs().sub_(2 * _S).clamp_max_(0)
        p = (q + _S).clamp_max_(0)
        p2, q2 = p * p, q * q
        values = p.mul_(p2).sub_(q.mul_(q2), alpha=0.25)
        return values, p2.sub_(q2, alpha=0.25).mul_(u.sign_()), 3 * _S / self.step


class _Derivative(torch.autograd.Function):
    """The n-th derivative of a B-spline basis, whose derivative is the next one.

    Autograd would go wrong at the knots of the closed form, where |u| has no derivative but its cube has; this is
    right everywhere, keeps x alone, and lets the evaluation work in place.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, basis: BSpline, derivative: int, *tensors: Tensor) -> Tensor:
        return basis._derivative(x, derivative, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.basis, ctx.derivative, *tensors = inputs
        ctx.save_for_backward(x, *tensors)
        ctx.save_for_forward(x, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        slopes = _Derivative.apply(x, ctx.basis, ctx.derivative + 1, *tensors)
        return (grad * slopes).sum(-2), None, None, *(None for _ in tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        x, *tensors = ctx.saved_tensors
        return tangent.unsqueeze(-2) * _Derivative.apply(x, ctx.basis, ctx.derivative + 1, *tensors)
