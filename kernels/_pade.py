r"""The rational function at the end of a Padé neuron, given its accumulators: forward and backward, for any shape.

With P = P_M, P_low = P_{M-1}, Q = Q_N, Q_low = Q_{N-1} (https://arxiv.org/abs/2403.11791):

    smooth     y = (Q P + Q_low P_low) / (Q^2 + Q_low^2 + e)
    absolute   y = P / (1 + |q_1| + ... + |q_N|)

A Padé neuron needs no more than these: a linear and a convolutional layer differ in how they accumulate, and share
this. The backward gives the gradients of the *terms* p_k, q_k, of which each side has two at most: that of the top
degree, and that of all lower degrees, which enter P and P_low (Q and Q_low) alike. Everything is in the accumulators'
dtype.
"""

from typing import NamedTuple

from torch import Tensor


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


def smooth(P: Tensor, P_low: Tensor | float, Q: Tensor, Q_low: Tensor | float, eps: float) -> Tensor:
    """y of the smooth variant. A constant accumulator is a float: Q_low = 1 if N = 1, P_low = 0 if M = 0."""
    return (Q * P + Q_low * P_low) / (Q * Q + (Q_low * Q_low + eps))


def smooth_backward(
    dy: Tensor, P: Tensor, P_low: Tensor | float, Q: Tensor, Q_low: Tensor | float, eps: float
) -> TermGradients:
    """Gradients of the terms, from the accumulators that `smooth` was given."""
    D = Q * Q + (Q_low * Q_low + eps)
    r = dy / D
    s = (r * 2) * ((Q * P + Q_low * P_low) / D)
    dP, dQ = r * Q, r * P - s * Q
    q_low = dQ + (r * P_low - s * Q_low) if isinstance(Q_low, Tensor) else dQ  # N = 1 has no lower terms
    return TermGradients(dP, dP + r * Q_low, dQ, q_low)


def absolute(P: Tensor, q: Tensor) -> Tensor:
    """y of the absolute variant, from P and the terms q (N, *)."""
    return P / (1 + q.abs().sum(0))


def absolute_backward(dy: Tensor, P: Tensor, q: Tensor) -> TermGradients:
    """Gradients of the terms, from what `absolute` was given. Like autograd's, that of |q| is 0 at q = 0."""
    D = 1 + q.abs().sum(0)
    dP = dy / D
    dq = q.sign() * -(dP * (P / D))
    return TermGradients(dP, dP, dq, dq)
