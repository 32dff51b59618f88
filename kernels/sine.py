r"""Sines $\sin(f_j x + p_{ij})$ of learned frequencies and given phases, the basis of SineKAN (arXiv 2407.04149).

On a GPU in float32 they are exact for angles up to 1e6 radians, and no more than numbers from -1 to 1 beyond.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.kernels._op import under_transform
from archzoo.kernels.basis_linear import Basis, KernelForm


@dataclass(frozen=True)
class Sine(Basis):
    """`count` sines an input. Methods take the frequencies (count,), which are learned, and the phases (I, count)."""

    count: int

    @property
    def size(self) -> int:
        """K, functions an input."""
        return self.count

    @property
    def num_tensors(self) -> int:
        """Frequencies and phases."""
        return 2

    @property
    def kernel(self) -> KernelForm | None:
        """For Triton."""
        return KernelForm("sine")

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs an input: multiply, add, sine; then a cosine and its product with the frequency."""
        return 3 * self.count, 5 * self.count

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """(*, I, R) -> (*, I, K, R)."""
        angle = self._angle(x, *tensors)
        return torch.sin(angle) if _recorded() else angle.sin_()

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Functions and derivatives by x, (*, I, K, R) each."""
        angle = self._angle(x, *tensors)
        return torch.sin(angle), torch.cos(angle) * tensors[0].to(x.dtype).unsqueeze(-1)

    def pullback(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Values at x; grad (*, I, K, R) pulled back to x and to the frequencies.

        Where no gradients are recorded it overwrites grad, and takes sine and cosine a from one function: with
        t = tan(a/2), they are 2t / (1 + t^2) and 2 / (1 + t^2) - 1.
        """
        frequency, rows = tensors[0].to(x.dtype), x.reshape(-1, 1, x.shape[-1])  # rows (*·I, 1, R)
        if _recorded():
            angle = self._angle(x, *tensors)
            sin, turned = torch.sin(angle), torch.cos(angle) * grad
        else:
            sin = self._angle(x / 2, frequency, tensors[1].to(x.dtype) / 2).tan_()
            factor = torch.addcmul(x.new_full((), 0.5), sin, sin, value=0.5).reciprocal_()  # 2 / (1 + t^2)
            sin.mul_(factor)
            turned = torch.mul(factor.sub_(1), grad, out=grad)
        turned = turned.flatten(0, -3)  # (*·I, K, R)
        x_grad = torch.bmm(frequency.expand(len(rows), 1, -1), turned).view(x.shape)
        return sin, x_grad, torch.bmm(rows, turned.mT).sum((0, 1))

    def _angle(self, x: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
        angle = x.unsqueeze(-2) * frequency.to(x.dtype).unsqueeze(-1)
        phase = phase.to(x.dtype).unsqueeze(-1)
        return angle + phase if _recorded() else angle.add_(phase)


def _recorded() -> bool:
    """Whether a graph is being built, or a transform at work that might batch one operand and not the other."""
    return torch.is_grad_enabled() or under_transform()
