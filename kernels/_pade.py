r"""What linear and convolutional Padé neurons share: the definition, and the rational function of the accumulators.

With P = P_M, P_low = P_{M-1}, Q = Q_N, Q_low = Q_{N-1} (https://arxiv.org/abs/2403.11791):

    smooth     y = (Q P + Q_low P_low) / (Q^2 + Q_low^2 + e)
    absolute   y = P / (1 + |q_1| + ... + |q_N|)

A Padé neuron needs no more than these: a linear and a convolutional layer differ in how they accumulate, and share
this, for any shape. The backward gives the gradients of the *terms* p_k, q_k, of which each side has two at most: that
of the top degree, and that of all lower degrees, which enter P and P_low (Q and Q_low) alike. Everything is in the
accumulators' dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from archzoo.kernels._op import compute_dtype


def definition(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor],
    absolute: bool,
    eps: float,
) -> Tensor:
    """The neuron's definition, in plain torch, in the dtype of x; its sums in float32 at least.

    `product` is the linear map of a power of x and the weights of its degree; the bias w_0 broadcasts to what it gives.
    """
    wide = compute_dtype(x, numerator, denominator)
    z = x.to(wide)

    def terms(weight: Tensor | None) -> list[Tensor]:
        found, power = [], z
        for w in () if weight is None else weight.to(wide):
            found.append(product(power, w))
            power = power * z
        return found

    p, q = terms(numerator), terms(denominator)
    w0 = 0.0 if bias is None else bias.to(wide)
    P_low = w0 + sum(p[:-1]) if p else 0.0
    P = P_low + p[-1] if p else w0
    if not q:
        y = P
    elif absolute:
        y = P / (1 + sum(t.abs() for t in q))
    else:
        Q_low = 1 + sum(q[:-1])
        Q = Q_low + q[-1]
        y = (Q * P + Q_low * P_low) / (Q * Q + Q_low * Q_low + (eps if len(q) > 1 else 0.0))
    assert isinstance(y, Tensor)
    return y.to(x.dtype)


class TermGradients(NamedTuple):
    """Gradients of the terms of a Padé neuron."""

    p: Tensor
    """Of p_M."""
    p_low: Tensor
    """Of p_k for every k < M, and of the constant term w_0 if M >= 1."""
    q: Tensor
    """Of q_N; in the absolute variant of all q_k, stacked."""
    q_low: Tensor
    """Of q_k for every k < N; not meant for the absolute variant."""


def _smooth(P: Tensor, P_low: Tensor | float, Q: Tensor, Q_low: Tensor | float, eps: float) -> tuple[Tensor, Tensor]:
    """y, and the denominator. Here and below in place where it can be: new memory is what an operation waits for."""
    D = (Q * Q).add_(Q_low * Q_low + eps)
    return (Q * P).add_(Q_low * P_low).div_(D), D


def smooth(P: Tensor, P_low: Tensor | float, Q: Tensor, Q_low: Tensor | float, eps: float) -> Tensor:
    """y of the smooth variant. A constant accumulator is a float: Q_low = 1 if N = 1, P_low = 0 if M = 0."""
    return _smooth(P, P_low, Q, Q_low, eps)[0]


def smooth_backward(
    dy: Tensor, P: Tensor, P_low: Tensor | float, Q: Tensor, Q_low: Tensor | float, eps: float
) -> TermGradients:
    """Gradients of the terms, from the accumulators that `smooth` was given."""
    y, D = _smooth(P, P_low, Q, Q_low, eps)
    r = dy / D
    dP = r * Q
    dQ_low = (y * Q_low).mul_(-2).add_(P_low).mul_(r) if isinstance(Q_low, Tensor) else None
    dQ = y.mul_(Q).mul_(-2).add_(P).mul_(r)
    q_low = dQ if dQ_low is None else dQ_low.add_(dQ)  # N = 1 has no lower terms
    r = r.mul_(Q_low) if isinstance(Q_low, Tensor) else r  # 1 if N = 1
    return TermGradients(dP, r.add_(dP), dQ, q_low)


def absolute(P: Tensor, q: Tensor) -> Tensor:
    """y of the absolute variant, from P and the terms q (N, *)."""
    return P / _sum_of_sizes(q)


def _sum_of_sizes(q: Tensor) -> Tensor:
    """1 + |q_1| + ... + |q_N|."""
    D = q[0].abs().add_(1)
    for term in q[1:]:
        D.add_(term.abs())
    return D


def absolute_backward(dy: Tensor, P: Tensor, q: Tensor) -> TermGradients:
    """Gradients of the terms, from what `absolute` was given. Like autograd's, that of |q| is 0 at q = 0."""
    D = _sum_of_sizes(q)
    dP = dy / D
    dq = q.sign().mul_(D.reciprocal_().mul_(P).mul_(dP).neg_())
    return TermGradients(dP, dP, dq, dq)
