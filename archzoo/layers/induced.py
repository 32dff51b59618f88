"""The vector space that an invertible net induces (https://arxiv.org/abs/2510.08570): sums and scales of latents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.layers.invertible import Invertible, call


@dataclass(frozen=True)
class InducedSpace:
    r"""Points x with $x \oplus x' = g^{-1}(g(x) + g(x'))$ and $a \odot x = g^{-1}(a\,g(x))$.

    Transport of structure: it is a vector space because the latents are, and nothing is approximated.

    Args:
        net: The invertible net g.
        shape: Of one point; its latent is flattened. None: vectors, along the last axis.
    """

    net: Invertible
    shape: tuple[int, ...] | None = None

    def encode(self, x: Tensor) -> Tensor:
        """Latents (*, D) of points (*, *shape).

        Raises:
            ValueError: If the points have another shape.
        """
        if self.shape is None:
            return call(self.net, x)
        axes = len(self.shape)
        if x.dim() < axes or tuple(x.shape[x.dim() - axes :]) != self.shape:
            raise ValueError(f"points of shape {tuple(x.shape)}: must end with {self.shape}")
        z = call(self.net, x.reshape(-1, *self.shape) if x.numel() else x.reshape(0, *self.shape))
        return z.reshape(*x.shape[: x.dim() - axes], math.prod(self.shape))

    def decode(self, z: Tensor) -> Tensor:
        """Points of latents (*, D)."""
        if self.shape is None:
            return self.net.inverse(z)
        count = math.prod(z.shape[:-1])
        return self.net.inverse(z.reshape(count, *self.shape)).reshape(*z.shape[:-1], *self.shape)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """The induced sum of points that broadcast."""
        return self.decode(self.encode(a) + self.encode(b))

    def scale(self, c: float | Tensor, a: Tensor) -> Tensor:
        """The induced multiple of points; c is a number, or has one for each."""
        return self.decode(_factor(c) * self.encode(a))

    def combine(self, coeffs: Sequence[float | Tensor], points: Sequence[Tensor]) -> Tensor:
        """The induced linear combination of points that broadcast.

        Raises:
            ValueError: If there are none, or not as many coefficients.
        """
        if not points or len(coeffs) != len(points):
            raise ValueError(f"{len(coeffs)} coeffs for {len(points)} points: must be as many, and one at least")
        terms = [_factor(c) * self.encode(point) for c, point in zip(coeffs, points, strict=True)]
        return self.decode(torch.stack(torch.broadcast_tensors(*terms)).sum(0))

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """The induced inner products (*) of points that broadcast."""
        return (self.encode(a) * self.encode(b)).sum(-1)

    def norm(self, a: Tensor) -> Tensor:
        """The induced norms (*)."""
        return torch.linalg.vector_norm(self.encode(a), dim=-1)


def _factor(c: float | Tensor) -> float | Tensor:
    return c[..., None] if isinstance(c, Tensor) and c.dim() else c
