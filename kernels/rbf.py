r"""Gaussian bumps $r_j(x) = \exp(-((x - c_j) / h)^2)$, FastKAN's stand-in for cubic B-splines (arXiv 2405.06721)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.kernels.basis_linear import Basis, KernelForm


@dataclass(frozen=True)
class RBF(Basis):
    """`count` Gaussians of one bandwidth h, the same for every feature. Methods take their centres (count,)."""

    count: int
    bandwidth: float

    @property
    def size(self) -> int:
        """K, functions an input."""
        return self.count

    @property
    def num_tensors(self) -> int:
        """The centres."""
        return 1

    @property
    def kernel(self) -> KernelForm:
        """For Triton."""
        return KernelForm("rbf", scale=1 / self.bandwidth)

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs an input: subtract, scale, square, negate, exp; then two products for the slope."""
        return 5 * self.count, 7 * self.count

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """(*, I, R) -> (*, I, K, R)."""
        d = self._distance(x, tensors[0])
        return d.square().neg().exp() if torch.is_grad_enabled() else d.mul_(d).neg_().exp_()

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Functions and derivatives, (*, I, K, R) each."""
        d = self._distance(x, tensors[0])
        r = d.square().neg().exp()
        return r, d * r * (-2 / self.bandwidth)

    def pullback(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Values at x, and grad (*, I, K, R) pulled back to x."""
        if torch.is_grad_enabled():
            return super().pullback(x, grad, *tensors)
        d = self._distance(x, tensors[0])
        r = d.square().neg_().exp_()
        return r, d.mul_(r).mul_(grad).sum(-2).mul_(-2 / self.bandwidth)

    def _distance(self, x: Tensor, centres: Tensor) -> Tensor:
        scale = 1 / self.bandwidth
        return (x * scale).unsqueeze(-2) - (centres.to(x.dtype) * scale).unsqueeze(-1)
