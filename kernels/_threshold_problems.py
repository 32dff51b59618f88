"""For every op with a threshold a call that `tune_thresholds` can make as small or large as it likes.

Features are few and examples many: as the layers of small models are, for which plain torch may be the faster.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels.aptx_conv2d import aptx_conv2d
from archzoo.kernels.aptx_linear import aptx_linear
from archzoo.kernels.basis_conv2d import basis_conv2d
from archzoo.kernels.basis_linear import Basis, basis_linear
from archzoo.kernels.capsule_routing import capsule_routing
from archzoo.kernels.causal_conv1d import causal_conv1d
from archzoo.kernels.chebyshev import Chebyshev
from archzoo.kernels.fourier import Fourier
from archzoo.kernels.kan_spline import BSpline
from archzoo.kernels.kron_sum import kron_linear, kron_sum
from archzoo.kernels.nmu_product import nmu_product
from archzoo.kernels.normalize import normalize_
from archzoo.kernels.normalized_residual import normalized_residual
from archzoo.kernels.paon_conv2d import paon_conv2d
from archzoo.kernels.paon_linear import paon_linear
from archzoo.kernels.rational import Rational, rational
from archzoo.kernels.rbf import RBF
from archzoo.kernels.selective_scan import selective_scan
from archzoo.kernels.selective_state_update import selective_state_update
from archzoo.kernels.sine import Sine
from archzoo.kernels.ssd import ssd
from archzoo.kernels.wavelet import wavelet_linear
from archzoo.kernels.wavelet_conv2d import wavelet_conv2d


class Draw:
    """Makes tensors, uniform between two numbers; the same in every run."""

    def __init__(self, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        unit = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return unit * (high - low) + low


Problem = tuple[Callable[..., Any], Sequence[Tensor]]
"""A function, and its tensors."""
Maker = Callable[[Draw, int], Problem]
"""Of a problem of so many numbers, a power of two from 2^12 on, or up to an eighth fewer."""

WITHOUT_BACKWARD = ("selective_state_update", "normalize")


def _scan(draw: Draw, n: int) -> Problem:
    sequence, weights = (1, n // 1024, 64), (1, n // 1024, 16)
    tensors = draw(*sequence).mT, draw(*sequence).mT, draw(64, 16, low=-1.0, high=-0.5)
    rest = draw(*weights).mT, draw(*weights).mT, draw(64), draw(*sequence).mT
    return partial(selective_scan, delta_softplus=True), (*tensors, *rest)


def _ssd(draw: Draw, n: int) -> Problem:
    length = n // 512
    weights = draw(1, length, 1, 16), draw(1, length, 1, 16)
    decay = draw(1, length, 2), draw(2, low=-1.0, high=-0.5)
    return partial(ssd, dt_softplus=True), (draw(1, length, 2, 16), *decay, *weights)


def _update(draw: Draw, n: int) -> Problem:
    batch, decay = n // 1024, draw(64, 16, low=-1.0, high=-0.5)
    tensors = draw(batch, 64, 16), draw(batch, 64), draw(batch, 64), decay, draw(batch, 16), draw(batch, 16)
    return partial(selective_state_update, dt_softplus=True), tensors


def _linear_basis(basis: Basis, *own: tuple[int, ...]) -> Maker:
    def make(draw: Draw, n: int) -> Problem:
        tensors = draw(n // 64, 64), draw(64, 64, basis.size), *(draw(*shape) for shape in own)
        return lambda x, *rest: basis_linear(x, [(basis, *rest)]), tensors

    return make


def _conv_basis(basis: Basis, *own: tuple[int, ...]) -> Maker:
    def make(draw: Draw, n: int) -> Problem:
        tensors = draw(n // 256, 4, 8, 8), draw(4, 4, basis.size, 3, 3), *(draw(*shape) for shape in own)
        return lambda x, *rest: basis_conv2d(x, [(basis, *rest)], padding=(1, 1)), tensors

    return make


def _bases(op: str, make: Callable[..., Maker], features: int) -> dict[str, Maker]:
    return {
        f"{op}:cubic": make(BSpline(3, 8, -1.0, 0.25)),
        f"{op}:spline": make(BSpline(2, 8, -1.0, 0.25)),
        f"{op}:rbf": make(RBF(8, 0.25), (8,)),
        f"{op}:chebyshev": make(Chebyshev(4)),
        f"{op}:fourier": make(Fourier(5)),
        f"{op}:sine": make(Sine(8), (8,), (features, 8)),
        f"{op}:rational": make(Rational(2), (1, 6), (2, 4)),
    }


def _per_edge(function: Callable[..., Tensor], weights: int) -> Maker:
    """Of a linear map of 32 features with so many numbers an edge."""
    return lambda draw, n: (function, [draw(n // 1024, 32), *(draw(32, 32, low=0.5) for _ in range(weights))])


def _per_tap(function: Callable[..., Tensor], weights: int) -> Maker:
    """Of a convolution of 2 channels: 576 products an image."""

    def make(draw: Draw, n: int) -> Problem:
        tensors = draw(n // 576, 2, 4, 4), *(draw(2, 2, 3, 3, low=0.5) for _ in range(weights))
        return partial(function, padding=(1, 1)), tensors

    return make


PROBLEMS: dict[str, Maker] = {
    "selective_scan": _scan,
    "ssd": _ssd,
    "selective_state_update": _update,
    "causal_conv1d": lambda draw, n: (
        partial(causal_conv1d, activation="silu"),
        (draw(1, n // 64, 64).mT, draw(64, 4), draw(64)),
    ),
    "rational": lambda draw, n: (rational, (draw(n // 64, 64), draw(1, 6), draw(8, 4))),
    "normalized_residual": lambda draw, n: (normalized_residual, (draw(n // 64, 64), draw(n // 64, 64), draw(64))),
    "normalize": lambda draw, n: (partial(normalize_, dim=1), (draw(n // 64, 64),)),
    "aptx_linear": _per_edge(aptx_linear, 3),
    "nmu_product": _per_edge(nmu_product, 1),
    "wavelet_linear": _per_edge(wavelet_linear, 3),
    "paon_linear": lambda draw, n: (paon_linear, (draw(n // 64, 64), draw(2, 64, 64), draw(1, 64, 64))),
    "kron_sum": lambda draw, n: (kron_sum, (draw(4, 4, 4), draw(4, n // 1024, 16))),
    "kron_linear": lambda draw, n: (kron_linear, (draw(64, 64), draw(4, 4, 4), draw(4, n // 1024, 16))),
    "capsule_routing": lambda draw, n: (capsule_routing, (draw(n // 1024, 8, 4), draw(8, 4, 8, 4))),
    **_bases("basis_linear", _linear_basis, 64),
    "aptx_conv2d": _per_tap(aptx_conv2d, 3),
    "wavelet_conv2d": _per_tap(wavelet_conv2d, 3),
    "paon_conv2d": lambda draw, n: (
        partial(paon_conv2d, padding=(1, 1)),
        (draw(n // 256, 4, 8, 8), draw(2, 4, 4, 3, 3), draw(1, 4, 4, 3, 3)),
    ),
    **_bases("basis_conv2d", _conv_basis, 4),
}
"""What matters most first, as `benchmarks._ops`."""
