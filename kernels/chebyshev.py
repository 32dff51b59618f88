r"""Chebyshev polynomials of $t = \tanh x$: $T_0 = 1,\ T_1 = t,\ T_{d+1} = 2 t T_d - T_{d-1}$, a basis of KAN layers.

By the recursion, not as $\cos(d \arccos t)$, whose slope is NaN once tanh is 1, from |x| = 9 on in float32. Gradients
by Clenshaw's: $\sum_d g_d T'_d(t) = b_1$ with $b_d = d g_d + 2 t b_{d+1} - b_{d+2}$, times $1 - t^2$.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.kernels._op import under_transform
from archzoo.kernels.basis_linear import Basis, KernelForm


@dataclass(frozen=True)
class Chebyshev(Basis):
    """T_0 .. T_degree of tanh x, for any x."""

    degree: int

    @property
    def size(self) -> int:
        """K, functions an input: degree + 1."""
        return self.degree + 1

    @property
    def kernel(self) -> KernelForm:
        """For Triton."""
        return KernelForm("chebyshev")

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs an input: tanh, 2 t, then two for each polynomial; five for its slope, and two for that of tanh."""
        steps = max(self.degree - 1, 0)
        return 2 + 2 * steps, 4 + 7 * steps

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """(*, I, R) -> (*, I, K, R)."""
        return self._values(torch.tanh(x))

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Polynomials and their derivatives by x, (*, I, K, R) each."""
        t = torch.tanh(x)
        values = self._values(t)
        slopes = [torch.zeros_like(t), 1 - t * t][: self.size]
        for d in range(1, self.degree):
            slopes.append(2 * (values[..., d, :] * slopes[1] + t * slopes[d]) - slopes[d - 1])
        return values, torch.stack(slopes, -2)

    def pullback(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Values at x; grad (*, I, K, R) pulled back to x."""
        t = torch.tanh(x)
        twice, now, before = 2 * t, self.degree * grad[..., self.degree, :], torch.zeros_like(t)
        for d in range(self.degree - 1, 0, -1):
            now, before = torch.add(twice * now - before, grad[..., d, :], alpha=d), now
        return self._values(t), now * (1 - t * t)

    def _values(self, t: Tensor) -> Tensor:
        twice = 2 * t
        if torch.is_grad_enabled() or under_transform():
            # 1 that is NaN where t is: a constant function of it too has no value there.
            made = [torch.where(t.isnan(), t, 1), t][: self.size]
            for d in range(1, self.degree):
                made.append(twice * made[d] - made[d - 1])
            return torch.stack(made, -2)
        values = t.new_empty(*t.shape[:-1], self.size, t.shape[-1])
        rows = values.unbind(-2)
        torch.mul(t, 0, out=rows[0]).add_(1)
        if self.degree:
            rows[1].copy_(t)
        for d in range(1, self.degree):
            torch.mul(twice, rows[d], out=rows[d + 1]).sub_(rows[d - 1])
        return values
