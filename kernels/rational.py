r"""The rational function of KAT (arXiv 2409.10594), one for each group of features: an op, and a basis of KAN layers.

$F = P / Q$ with $P = \sum_{d \le 5} a_d x^d$ and one of two denominators, neither of which has a root:

    abs_terms   $Q = 1 + \sum_{j=1}^{4} |b_j|\, |x|^j$      KAT's kernels, hence its published weights
    abs_sum     $Q = 1 + |S|,\ S = \sum_{j=1}^{4} b_j x^j$  the paper's text

Backward, with u = dy / Q: dx = u (P' - F Q'), da_d = sum u x^d, db_j = -sum u F dQ/db_j, sums being over a group.
Derivatives at the kinks: |b| at b = 0 has +1, as in KAT's kernels, and so has |S| at S = 0, or a denominator that
starts at b = 0 would never learn; |x| at x = 0 has 0, the mean of its two sides.

The op computes in float32 at least and keeps x, a and b for backward; 20 FLOPs a number forward, 60 backward. Under
`torch.func` transforms, and for gradients of gradients, plain differentiable torch takes its place; inside
`use_backend("triton")` they raise. So it does inside torch.compile for a CPU, which fuses it. Everything of the basis
is in x's dtype, in place where nothing is differentiated.
Beyond |x| = 3e7, x^5 leaves float32, and F is not finite there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._op import (
    DifferentiableOp,
    check_floating,
    compiled_for_cpu,
    compute_dtype,
    empty_if,
    flop_formula,
    under_transform,
    without_autocast,
)
from archzoo.kernels.basis_linear import Basis, KernelForm

DENOMINATORS = ("abs_terms", "abs_sum")

# Of x at a time. A convolution hands over more than a cache holds, of which ten arrays are worked on here.
_CPU_PIECE = 2**18  # bytes


def rational_reference(x: Tensor, a: Tensor, b: Tensor, denominator: str = "abs_terms") -> Tensor:
    """The definition, in plain torch. x (*, I), a (groups, 6) or (1, 6), b (groups, 4) -> (*, I)."""
    z = x.unflatten(-1, (len(b), x.shape[-1] // len(b)))
    p = sum(c * z**d for d, c in enumerate(_columns(a)))
    if denominator == "abs_terms":
        q = 1 + sum(c * z.abs() ** j for j, c in enumerate(_columns(b * _sign(b)), 1))
    else:
        s = sum(c * z**j for j, c in enumerate(_columns(b), 1))
        q = 1 + s * _sign(s)
    return (p / q).flatten(-2)


@dataclass(frozen=True)
class Rational(Basis):
    """F, each of `groups` equal, contiguous groups of features with coefficients of its own.

    Methods take a (groups, 6), or (1, 6) for one numerator that all groups share, then b (groups, 4).
    """

    groups: int
    denominator: str = "abs_terms"

    @property
    def size(self) -> int:
        """One function."""
        return 1

    @property
    def num_tensors(self) -> int:
        """a and b."""
        return 2

    @property
    def kernel(self) -> KernelForm:
        """For Triton."""
        return KernelForm("rational")

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs an input of `values`, and of `pullback`, of which a third is for the gradients of a and b."""
        return 20, 60

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """(*, I, R) -> (*, I, 1, R)."""
        z = self._rows(x)
        a, b = self._per_row(z, *tensors)
        if _plain():
            values = self._values(z, a, b)
        else:
            values = torch.empty_like(z)
            for piece, own_a, own_b in self._pieces(z, a, b):
                self._values(z[piece], own_a, own_b, out=values[piece])
        return values.reshape(x.shape).unsqueeze(-2)

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """F and its derivative by x, (*, I, 1, R) each."""
        z = self._rows(x)
        values, rise, q, *_ = self._parts(z, *self._per_row(z, *tensors))
        return values.reshape(x.shape).unsqueeze(-2), (rise / q).reshape(x.shape).unsqueeze(-2)

    def pullback(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Values at x (*, I, 1, R); then grad, of that shape, pulled back to x, a and b."""
        z = self._rows(x)
        grad = grad.reshape(z.shape)
        a, b = self._per_row(z, *tensors)
        if _plain():
            values, x_grad, a_grad, b_grad = self._pullback(z, grad, a, b)
        else:
            values, x_grad = torch.empty_like(z), torch.empty_like(z)
            a_grad, b_grad = z.new_zeros(z.shape[1], 6), z.new_zeros(z.shape[1], 4)
            for piece, own_a, own_b in self._pieces(z, a, b):
                parts = self._pullback(z[piece], grad[piece], own_a, own_b, values[piece], x_grad[piece])
                a_grad[piece[1]] += parts[2]
                b_grad[piece[1]] += parts[3]
        a_grad, b_grad = (t.view(self.groups, -1, t.shape[1]).sum(1) for t in (a_grad, b_grad))
        values = values.reshape(x.shape).unsqueeze(-2)
        return values, x_grad.reshape(x.shape), a_grad.sum_to_size(tensors[0].shape), b_grad

    def _rows(self, x: Tensor) -> Tensor:
        """x as (images, rows, numbers): a row is a group, or a feature where that would take a copy of x."""
        *images, features, positions = x.shape
        rows = self.groups if x.is_contiguous() else features
        return x.reshape(prod(images), rows, features // rows * positions)

    def _per_row(self, z: Tensor, *tensors: Tensor) -> list[Tensor]:
        """a and b, (rows or 1, 6) and (rows or 1, 4), in z's dtype."""
        times = z.shape[1] // self.groups
        wide = [t.to(z.dtype) for t in tensors]
        return [t if times == 1 or len(t) == 1 else t.repeat_interleave(times, 0) for t in wide]

    def _pieces(self, z: Tensor, a: Tensor, b: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """What of z stays in cache, and the coefficients for it."""
        images, rows, numbers = z.shape
        whole = z.device.type != "cpu" or not z.is_contiguous()
        at_once = max(1, images * rows if whole else _CPU_PIECE // (z.itemsize * max(1, numbers)))
        for image in range(0, images, max(1, at_once // rows)):
            for row in range(0, rows, at_once):
                own = slice(row, row + at_once)
                piece = slice(image, image + max(1, at_once // rows)), own
                yield piece, a if len(a) == 1 else a[own], b if len(b) == 1 else b[own]

    def _values(self, z: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        free = out is not None
        t, c = self._sum(z, b)
        q, _ = self._positive(_polynomial(t, c, free), free)
        return torch.div(_polynomial(z, _columns(a), free), q, out=out)

    def _parts(
        self, z: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """F, P' - F Q', Q; t and, where Q takes a modulus, its sign."""
        free = out is not None
        t, c = self._sum(z, b)
        total, fall = _polynomial_and_slope(t, c, free)
        q, sign = self._positive(total, free)
        fall = torch.mul(fall, torch.sign(z) if sign is None else sign, out=fall if free else None)
        p, rise = _polynomial_and_slope(z, _columns(a), free)
        values = torch.div(p, q, out=out)
        return values, torch.addcmul(rise, values, fall, value=-1, out=rise if free else None), q, t, sign

    def _pullback(
        self,
        z: Tensor,
        grad: Tensor,
        a: Tensor,
        b: Tensor,
        values_out: Tensor | None = None,
        x_grad_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        free = values_out is not None
        values, rise, q, t, sign = self._parts(z, a, b, values_out)
        above = torch.div(grad, q, out=q if free else None)
        x_grad = torch.mul(rise, above, out=x_grad_out)
        below = torch.mul(values, above, out=rise if free else None)
        for factor in (t, sign):
            if factor is not None:
                below = torch.mul(below, factor, out=below if free else None)
        b_grad = -_moments(below, t, 4, free)
        b_grad = b_grad * _sign(b) if sign is None else b_grad
        return values, x_grad, _moments(above, z, 6, free), b_grad

    def _sum(self, z: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of the polynomial in Q: its variable t, and its coefficients from t^0 on."""
        if self.denominator == "abs_terms":
            return z.abs(), [z.new_ones(()), *_columns(b * _sign(b))]
        return z, [z.new_zeros(()), *_columns(b)]

    def _positive(self, total: Tensor, free: bool) -> tuple[Tensor, Tensor | None]:
        """Q of that polynomial, and its sign where Q takes its modulus."""
        if self.denominator == "abs_terms":
            return total, None
        sign = _sign(total)
        total = torch.mul(total, sign, out=total if free else None)
        return torch.add(total, 1, out=total if free else None), sign


# Below, `free` says that nothing is differentiated: a tensor made here may then be overwritten.


def _plain() -> bool:
    """Whether plain torch is wanted: it may be differentiated, or compiled."""
    return torch.is_grad_enabled() or under_transform() or torch.compiler.is_compiling()


def _sign(y: Tensor) -> Tensor:
    """1, or -1 where y is negative: unlike torch.sign, 1 at 0."""
    return torch.copysign(y.new_ones(()), y + 0)  # -0.0 + 0 is 0.0; torch.where takes ten times as long


def _columns(coefficients: Tensor) -> tuple[Tensor, ...]:
    """(rows, K) as K times (rows, 1)."""
    return coefficients.t().contiguous().unsqueeze(-1).unbind(0)


def _polynomial(x: Tensor, coefficients: Sequence[Tensor], free: bool) -> Tensor:
    """c_0 + c_1 x + c_2 x^2 + ..., by Horner."""
    *rest, last, highest = coefficients
    y = x * highest
    y = torch.add(y, last, out=y if free else None)
    for c in reversed(rest):
        y = torch.addcmul(c, y, x, out=y if free else None)
    return y


def _polynomial_and_slope(x: Tensor, coefficients: Sequence[Tensor], free: bool) -> tuple[Tensor, Tensor]:
    """The same, of three coefficients or more, and its derivative."""
    first, *rest, last, highest = coefficients
    y = x * highest
    slope = torch.add(last, y, alpha=2)
    y = torch.add(y, last, out=y if free else None)
    for c in reversed(rest):
        y = torch.addcmul(c, y, x, out=y if free else None)
        slope = torch.addcmul(y, slope, x, out=slope if free else None)
    return torch.addcmul(first, y, x, out=y if free else None), slope


def _moments(y: Tensor, x: Tensor, count: int, free: bool) -> Tensor:
    """Sums of y, y x, y x^2, ... over all but the rows, (rows, count)."""
    sums = [y.sum((0, 2))]
    for _ in range(count - 1):
        y = torch.mul(y, x, out=y if free else None)
        sums.append(y.sum((0, 2)))
    return torch.stack(sums, -1)


# --- The op -----------------------------------------------------------------------------------------------------------


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, I) as (N, groups, I / groups), contiguous."""
    return x.contiguous().view(len(x), groups, x.shape[1] // groups)


@without_autocast
@torch.no_grad()
def _forward(x: Tensor, a: Tensor, b: Tensor, denominator: str, triton: bool = False) -> Tensor:
    """x (N, I) -> F (N, I) in x's dtype."""
    if triton:
        from archzoo.kernels import _rational_triton

        y = _rational_triton.forward(_grouped(x, len(b)), a, b, denominator == "abs_terms")
        return y.view(x.shape)
    columns = x.to(compute_dtype(x, a, b)).contiguous().unsqueeze(-1)
    return Rational(len(b), denominator).values(columns, a, b).view(x.shape).to(x.dtype)


@without_autocast
@torch.no_grad()
def _backward(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, denominator: str, needed: list[bool], triton: bool = False
) -> list[Tensor]:
    """Gradients of x, a and b; what is not needed comes back with no elements."""
    found: Sequence[Tensor | None]
    if triton:
        from archzoo.kernels import _rational_triton

        inputs, abs_terms = (_grouped(dy, len(b)), _grouped(x, len(b)), a, b), denominator == "abs_terms"
        found = _rational_triton.backward(*inputs, abs_terms, needed[0], needed[1] or needed[2])
    else:
        wide = compute_dtype(x, a, b)
        columns, above = (t.to(wide).contiguous().unsqueeze(-1) for t in (x, dy))
        _, *found = Rational(len(b), denominator).pullback(columns, above.unsqueeze(-2), a, b)
    of_each = zip(found, (x, a, b), needed, strict=False)
    return [
        empty_if(False, t, dy) if g is None or not need else g.reshape(t.shape).to(t.dtype) for g, t, need in of_each
    ]


def _fake(x: Tensor, a: Tensor, b: Tensor, denominator: str, triton: bool = False) -> Tensor:
    return empty_if(True, x, x)


def _definition(x: Tensor, a: Tensor, b: Tensor, denominator: str) -> Tensor:
    wide = compute_dtype(x, a, b)
    return rational_reference(x.to(wide), a.to(wide), b.to(wide), denominator).to(x.dtype)


rational_op = DifferentiableOp("rational", _forward, _backward, fake=_fake, definition=_definition, tensors=3)


@flop_formula(torch.ops.archzoo.rational)
def _flops(x: Any, *args: Any, **kwargs: Any) -> int:
    return int(20 * x[0] * x[1])


@flop_formula(torch.ops.archzoo.rational_backward)
def _backward_flops(
    dy: Any, x: Any, a: Any, b: Any, denominator: str, needed: list[bool], *args: Any, **kwargs: Any
) -> int:
    return int((40 + 20 * (needed[1] or needed[2])) * x[0] * x[1])


def rational(x: Tensor, a: Tensor, b: Tensor, denominator: str = "abs_terms") -> Tensor:
    """F = P / Q of each number, every group of features with coefficients of its own.

    Args:
        x: (*, I), real floating point.
        a: Of the numerator, a_0 to a_5: (groups, 6), or (1, 6) for one that all groups share. `groups` divides I, and a
            group is contiguous.
        b: Of the denominator, b_1 to b_4: (groups, 4).
        denominator: One of `DENOMINATORS`.

    Returns:
        (*, I) in the dtype of x, also under autocast. A gradient has its input's dtype.

    Raises:
        ValueError: If shapes do not fit, a tensor is not floating point, or there is no such denominator; as
            `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    groups = len(b) if b.shape[1:] == (4,) else 0
    if x.dim() == 0 or groups == 0 or a.shape not in ((1, 6), (groups, 6)) or x.shape[-1] % groups:
        raise ValueError(
            f"x, a, b of shapes {tuple(x.shape)}, {tuple(a.shape)}, {tuple(b.shape)}: must be (*, I), "
            "(groups or 1, 6) and (groups, 4), where groups divides I"
        )
    check_floating(x=x, a=a, b=b)
    if denominator not in DENOMINATORS:
        raise ValueError(f"denominator={denominator!r}: must be one of {', '.join(map(repr, DENOMINATORS))}")
    if under_transform():
        refuse_triton("rational", "a torch.func transform")
        return _definition(x, a, b, denominator)
    triton = takes_triton("rational", x=x, a=a, b=b)
    if compiled_for_cpu(x) and not triton:
        return _definition(x, a, b, denominator)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)
    y: Tensor = rational_op(rows, a, b, denominator, triton)
    return y.view(x.shape)
