r"""Harmonics $\cos jx, \sin jx,\ j = 1 \ldots G$, the Fourier series of KAN layers.

One cosine and one sine an input, the rest by angle addition: $e^{i(j+1)x} = e^{ijx} e^{ix}$. The error grows as j, to
1e-6 in float32 at j = 64, and is the same for any x (on a GPU in float32, up to |x| = 1e6); cos(jx) would round its
argument, which costs |x| times as much.
Slopes cost no further function: $(\cos jx)' = -j \sin jx$.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.kernels._op import under_transform
from archzoo.kernels.basis_linear import Basis, KernelForm


@dataclass(frozen=True)
class Fourier(Basis):
    """Cosines of 1 .. `harmonics` times x, then as many sines. x in radians, of any magnitude."""

    harmonics: int

    @property
    def size(self) -> int:
        """K, functions an input: 2 G."""
        return 2 * self.harmonics

    @property
    def kernel(self) -> KernelForm:
        """For Triton."""
        return KernelForm("fourier", self.harmonics, self.harmonics.bit_length())

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs an input: cosine and sine as 1 each, six for each further pair; two more for the slopes of a pair."""
        values = 2 + 6 * (self.harmonics - 1)
        return values, values + 2 * self.harmonics

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """(*, I, R) -> (*, I, K, R)."""
        cos, sin = [torch.cos(x)], [torch.sin(x)]
        for _ in range(1, self.harmonics):
            c, s = cos[-1], sin[-1]
            cos.append(torch.addcmul(c * cos[0], s, sin[0], value=-1))
            sin.append(torch.addcmul(s * cos[0], c, sin[0]))
        return torch.stack(cos + sin, -2)

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Harmonics and their derivatives by x, (*, I, K, R) each."""
        values = self.values(x)
        cos, sin = values.split(self.harmonics, -2)
        j = self._orders(x).unsqueeze(-1)
        return values, torch.cat([-j * sin, j * cos], -2)

    def pullback(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Values at x; grad (*, I, K, R) pulled back to x. Where no gradients are recorded it overwrites grad."""
        values = self.values(x)
        (cos, sin), (cos_grad, sin_grad) = (t.split(self.harmonics, -2) for t in (values, grad))
        recorded = torch.is_grad_enabled() or under_transform()
        turned = cos * sin_grad if recorded else sin_grad.mul_(cos)
        turned = torch.addcmul(turned, sin, cos_grad, value=-1).flatten(0, -3)
        return values, torch.bmm(self._orders(x).expand(len(turned), 1, -1), turned).view(x.shape)

    def _orders(self, x: Tensor) -> Tensor:
        return torch.arange(1, self.harmonics + 1, dtype=x.dtype, device=x.device)
