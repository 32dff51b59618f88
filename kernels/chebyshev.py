r"""Chebyshev polynomials of $t = \tanh x$: $T_0 = 1,\ T_1 = t,\ T_{d+1} = 2 t T_d - T_{d-1}$, a basis of KAN layers.

By the recursion, not as $\cos(d \arccos t)$, whose slope is NaN once tanh is 1, from |x| = 9 on in float32. Slopes by
the same recursion differentiated: $T'_{d+1} = 2 T_d + 2 t T'_d - T'_{d-1}$, times $1 - t^2$.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.kernels.basis_linear import Basis


@dataclass(frozen=True)
class Chebyshev(Basis):
    """T_0 .. T_degree of tanh x, for any x."""

    degree: int

    @property
    def size(self) -> int:
        """degree + 1."""
        return self.degree + 1

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs an input: tanh, then three for each polynomial; six for it and its slope, and the slope of tanh."""
        steps = max(self.degree - 1, 0)
        return 1 + 3 * steps, 3 + self.degree + 8 * steps

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """(*, I, R) -> (*, I, K, R)."""
        return torch.stack(self._values(torch.tanh(x)), -2)

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Polynomials and their derivatives by x, (*, I, K, R) each."""
        t = torch.tanh(x)
        values, twice, slope = self._values(t), 2 * t, 1 - t * t
        slopes = [torch.zeros_like(t), slope][: self.size]
        for d in range(1, self.degree):
            slopes.append(torch.addcmul(2 * values[d] * slope - slopes[d - 1], twice, slopes[d]))
        return torch.stack(values, -2), torch.stack(slopes, -2)

    def _values(self, t: Tensor) -> list[Tensor]:
        # 1 that is NaN where t is: a constant function of it too has no value there.
        values, twice = [torch.where(t.isnan(), t, 1), t][: self.size], 2 * t
        for d in range(1, self.degree):
            values.append(twice * values[d] - values[d - 1])
        return values
