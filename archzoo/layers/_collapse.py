"""Many steps of a flow as one matrix, at the cost of its low rank (https://arxiv.org/abs/2510.08570, section 4.1).

The flow is dz/dt = V(t) z, V(t) = (A_t - I) / (1 - t), A_t = L R^T of rank r. A step's matrix is c I + P Q^T: P has
the columns of L at the step's times, so that it costs r columns for Euler's rule and 3 r for Runge and Kutta's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels._op import compute_dtype
from archzoo.layers._operators import LowRankOperator, constant
from archzoo.layers.linear_operators import LinearOperator, TimeLowRankOperator

Factors = tuple[float, Tensor, Tensor]
"""c, P and Q of c I + P Q^T."""


def collapse(operator: TimeLowRankOperator, steps: int, method: str, denoise_last: bool) -> LinearOperator:
    """The product of all steps' matrices, the first rightmost, in float32 at least."""
    if denoise_last:
        # The last step is A itself: its R^T is taken through the steps before it, last first, and no rank is added.
        left, right = (factor[0] for factor in _factors(operator, [1 - 1 / steps]))
        for c, P, Q in reversed(StepMatrices(operator, steps, method)):
            right = c * right + Q @ (P.mT @ right)
        return LowRankOperator(left, right)
    return _product(StepMatrices(operator, steps, method)) or _identity(operator)


class StepMatrices(Sequence[Factors]):
    """The matrices of all steps but the last, each made when it is asked for.

    The perceptrons are asked for all times at once: one by one, reading their weights takes longer than the rest.
    """

    def __init__(self, operator: TimeLowRankOperator, steps: int, method: str):
        self.steps, self.stages = steps, 1 if method == "euler" else 2
        # Runge and Kutta's rule looks half-way too, and at the end, where the next step begins.
        count = steps - 1 if method == "euler" else 2 * steps - 1 if steps > 1 else 0
        self.times = [i / (self.stages * steps) for i in range(count)]
        self.left, self.right = _factors(operator, self.times)

    def __len__(self) -> int:
        return self.steps - 1

    def __getitem__(self, index: Any) -> Any:
        i, h = range(len(self))[index], 1 / self.steps
        if self.stages == 1:
            a = h / (1 - self.times[i])
            return 1 - a, self.left[i], a * self.right[i]
        return rk4_step(self.left[2 * i : 2 * i + 3], self.right[2 * i : 2 * i + 3], self.times[2 * i], h)


def rk4_step(left: Tensor, right: Tensor, t: float, h: float) -> Factors:
    """The matrix of a step from t to t + h, of L and R (3, d, r) at t, t + h/2 and t + h."""
    rates = [1 / (1 - time) for time in (t, t + h / 2, t + h)]
    P, rank = torch.cat(list(left), 1), left.shape[2]

    def velocity(stage: int, c: float, Q: Tensor) -> tuple[float, Tensor]:
        """V of that stage times c I + P Q^T: columns of P stay what they are."""
        rate = rates[stage]
        new = -rate * Q
        new[:, stage * rank : (stage + 1) * rank] += rate * (c * right[stage] + Q @ (P.mT @ right[stage]))
        return -rate * c, new

    c1, Q1 = velocity(0, 1.0, torch.zeros_like(P))
    c2, Q2 = velocity(1, 1 + h / 2 * c1, h / 2 * Q1)
    c3, Q3 = velocity(1, 1 + h / 2 * c2, h / 2 * Q2)
    c4, Q4 = velocity(2, 1 + h * c3, h * Q3)
    return 1 + h / 6 * (c1 + 2 * c2 + 2 * c3 + c4), P, h / 6 * (Q1 + 2 * Q2 + 2 * Q3 + Q4)


def _product(matrices: Iterable[Factors]) -> LinearOperator | None:
    """The product, the first rightmost, as c I + U W^T while that is narrower than the matrix; None of none."""
    scale, dense = 1.0, None
    left = right = torch.empty(0)
    started = False
    for c, P, Q in matrices:
        if not started:
            scale, left, right, started = c, P, Q, True
            continue
        if dense is None and left.shape[1] + P.shape[1] > len(P):
            dense = LowRankOperator(left, right, scale).matrix()
        if dense is not None:
            dense = c * dense + P @ (Q.mT @ dense)
            continue
        # (c I + P Q^T)(s I + U W^T) = c s I + c U W^T + P (s Q + W U^T Q)^T
        added = scale * Q + right @ (left.mT @ Q)
        scale, left, right = c * scale, torch.cat([c * left, P], 1), torch.cat([right, added], 1)
    if not started:
        return None
    return LowRankOperator(left, right, scale) if dense is None else constant(dense)


def _identity(operator: TimeLowRankOperator) -> LinearOperator:
    left, right = (factor[0, :, :0] for factor in _factors(operator, [0.0]))
    return LowRankOperator(left, right, 1.0)


def _factors(operator: TimeLowRankOperator, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """L and R (times, d, r)."""
    left, right = operator.factors(torch.tensor(times, dtype=torch.float64))
    wide = compute_dtype(left)
    return left.to(wide), right.to(wide)
