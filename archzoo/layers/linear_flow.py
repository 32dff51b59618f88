"""Flow matching in the latent space of a Linearizer, whose many steps are one (https://arxiv.org/abs/2510.08570)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers._check import check_whole
from archzoo.layers._collapse import collapse
from archzoo.layers._operators import constant
from archzoo.layers.induced import InducedSpace
from archzoo.layers.invertible import Invertible, checked, widened, without_autocast
from archzoo.layers.linear_operators import LinearOperator, TimeLowRankOperator
from archzoo.layers.linearizer import Linearizer

Metric = Callable[[Tensor, Tensor], Tensor]
METHODS = ("euler", "rk4")


class LinearFlow(nn.Module):
    r"""A flow from noise to data that is linear in latent space, so that `collapse` makes its steps one, exactly.

    The path is a straight line from $z_0 = g_{noise}(x_0)$ to $z_1 = g_{data}(x_1)$. $A_t$ predicts its end,
    $z_1 \approx A_t z_t$, and the velocity is $(A_t - I) z_t / (1 - t)$. A linear core matches second moments only:
    good samples need nets that carry images of the Gaussian onto the data, which the loss rewards indirectly. Early in
    training samples can be worse than noise.

    Args:
        operator: A_t, square; called with (z, t).
        g_noise: Invertible net of the noise.
        g_data: Invertible net of the data; None: g_noise. For one net with two faces: `Conditioned(net, 0.0)` and
            `Conditioned(net, 1.0)`.
        shape: Of one point, whose latent is flattened; None: vectors.

    Shape: (batch, *shape) -> the same.

    Raises:
        TypeError: If a net cannot be inverted, or the operator is no `LinearOperator`.
        ValueError: If the operator is not square.
    """

    def __init__(
        self,
        operator: LinearOperator,
        g_noise: Invertible,
        g_data: Invertible | None = None,
        *,
        shape: Sequence[int] | None = None,
    ):
        super().__init__()
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"operator={operator!r}: must be a LinearOperator, as TimeLowRankOperator(8)")
        if operator.in_features != operator.out_features:
            raise ValueError(f"operator of {operator.out_features} x {operator.in_features}: must be square")
        self.operator = operator
        self.g_noise = checked("g_noise", g_noise)
        self.g_data = self.g_noise if g_data is None else checked("g_data", g_data)
        self.shape = None if shape is None else tuple(shape)
        Linearizer(self.g_noise, operator, self.g_data, x_shape=self.shape)  # checks the shape

    @property
    def noise_space(self) -> InducedSpace:
        """The vector space of the noise."""
        return InducedSpace(self.g_noise, self.shape)

    @property
    def data_space(self) -> InducedSpace:
        """The vector space of the data."""
        return InducedSpace(self.g_data, self.shape)

    def loss(
        self,
        x1: Tensor,
        x0: Tensor | None = None,
        t: Tensor | None = None,
        *,
        noise_level: float = 0.3,
        noise: tuple[Tensor, Tensor] | None = None,
        metric: Metric | None = None,
    ) -> Tensor:
        """End-point error of the latents, and reconstruction of noise and data from latents that are disturbed.

        The disturbance fixes the scale of the latents: without it the first term is least when all shrink to a point.

        Args:
            x1: Data (batch, *shape).
            x0: Noise of the same shape; None: drawn, normal.
            t: Times (batch,) below 1; None: drawn, uniform.
            noise_level: Standard deviation of the disturbance.
            noise: The disturbances of the noise's and the data's latents, (batch, D) each; None: drawn, normal.
            metric: Maps (data, reconstruction) to a number; None: mean squared error.
        """
        metric = metric or F.mse_loss
        x0 = torch.randn_like(x1) if x0 is None else x0
        z1 = self.data_space.encode(x1)  # first, so that a shared net's ActNorm starts from data
        z0 = self.noise_space.encode(x0)
        t = torch.rand(len(x1), device=x1.device, dtype=z1.dtype) if t is None else t
        e0, e1 = (torch.randn_like(z0), torch.randn_like(z1)) if noise is None else noise
        along = t[:, None]
        p = self.operator((1 - along) * z0 + along * z1, t)
        x0_again = self.noise_space.decode(z0 + noise_level * e0)
        x1_again, x1_predicted = self.data_space.decode(torch.cat([z1 + noise_level * e1, p.to(z1)])).chunk(2)
        ends, noises = F.mse_loss(p, z1), F.mse_loss(x0_again, x0)
        return ends + noises + metric(x1, x1_again) + metric(x1, x1_predicted)

    def sample(self, x0: Tensor, steps: int = 100, method: str = "euler", denoise_last: bool = True) -> Tensor:
        """Data from noise, step by step in latent space: `steps - 1` steps of size 1/steps, decoded once.

        Args:
            x0: Noise (batch, *shape).
            steps: Number of steps.
            method: `"euler"` or `"rk4"`, the classical rule of Runge and Kutta.
            denoise_last: Whether A takes the last step, to t = 1; else the flow stops at 1 - 1/steps, as upstream's.
        """
        _check(steps, method)
        x0 = widened(x0)
        with without_autocast(x0):
            z = self._integrate(self.noise_space.encode(x0), steps, method, denoise_last)
            return self.data_space.decode(z)

    def forward(self, x0: Tensor, steps: int = 100, method: str = "euler", denoise_last: bool = True) -> Tensor:
        """What `sample` gives, to rounding, in one step by way of `collapse`."""
        return self.collapse(steps, method, denoise_last)(x0)

    @torch.no_grad()
    def collapse(self, steps: int = 100, method: str = "euler", denoise_last: bool = True) -> Linearizer:
        """All of the steps of `sample` as one Linearizer, with the operator as it is now.

        A `TimeLowRankOperator` is never formed where its steps are of low rank together. With `denoise_last` the result
        has the operator's rank, and pictures can be encoded into noise, by `pinv()`, without it only.
        """
        _check(steps, method)
        parameter = next(self.operator.parameters(), torch.empty(0))
        with without_autocast(parameter):
            if isinstance(self.operator, TimeLowRankOperator):
                matrix = collapse(self.operator, steps, method, denoise_last)
            else:
                basis = torch.eye(self.operator.in_features, device=parameter.device, dtype=self._wide(parameter))
                matrix = constant(self._integrate(basis, steps, method, denoise_last).mT)
        return Linearizer(self.g_noise, matrix, self.g_data, x_shape=self.shape)

    @staticmethod
    def _wide(parameter: Tensor) -> torch.dtype:
        return torch.promote_types(parameter.dtype, torch.float32)

    def _velocity(self, z: Tensor, t: float) -> Tensor:
        return (self.operator(z, t) - z) / (1 - t)

    def _integrate(self, z: Tensor, steps: int, method: str, denoise_last: bool) -> Tensor:
        h = 1 / steps
        for i in range(steps - 1):
            t, v = i * h, self._velocity
            k1 = v(z, t)
            if method == "rk4":
                k2 = v(z + h / 2 * k1, t + h / 2)
                k3 = v(z + h / 2 * k2, t + h / 2)
                k4 = v(z + h * k3, t + h)
                k1 = (k1 + 2 * k2 + 2 * k3 + k4) / 6
            z = z + h * k1
        return self.operator(z, 1 - h) if denoise_last else z

    def extra_repr(self) -> str:
        """The shape, for `repr`."""
        return f"shape={self.shape}"


def _check(steps: Any, method: Any) -> None:
    check_whole(steps=steps)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(map(repr, METHODS))}")
