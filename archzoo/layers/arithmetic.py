"""Arithmetic units: NAU and NMU (https://arxiv.org/abs/2001.05016), and the schedule of their regulariser.

The other units have files of their own, and can be imported from here too: NAC and NALU, `nalu.py`; NPU and RealNPU,
`npu.py`; iNALU, `inalu.py`; the fully connected layer of MC-LSTM, `mcfc.py`.

A unit whose weights go to {-1, 0, 1} (adding) or {0, 1} (multiplying) computes an exact formula, and so it is right far
outside the range it was trained on. All weights are computed from the parameters in each `forward`. `bias` is False by
default, unlike in other linear layers, for an exact formula has none; it starts at zero and is never regularised.

The training loop of NAU and NMU: set the sparsity weight (`SparsitySchedule.apply_`), forward, task loss plus each
unit's `regularization_loss()`, backward, optimizer step, each unit's `constrain_()`. At the end, `round_()`.

For a recurrent unit give it `torch.cat([x_t, h], -1)` and take its output as the next h.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.nmu_product import nmu_product
from archzoo.layers._arithmetic import (
    _as_linear_gives,
    _check_choice,
    _check_number,
    _clamp,
    _shown,
    _wide,
)
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.layers.inalu import INALU
from archzoo.layers.mcfc import MCFC
from archzoo.layers.nalu import NAC, NALU
from archzoo.layers.npu import NPU, RealNPU
from archzoo.layers.start import Start, check_original, copy_bias, fresh, relative_error
from archzoo.registry import Card, register_layer

__all__ = ["INALU", "MCFC", "NAC", "NALU", "NAU", "NMU", "NPU", "RealNPU", "SparsitySchedule"]


@dataclass(frozen=True)
class SparsitySchedule:
    """Warm-up of the sparsity weight: weight * clamp((t - start) / (end - start), 0, 1) at optimizer step t, from 0.

    Too early, the regulariser freezes weights on the wrong side of 1/2.

    Args:
        weight: The value from step `end` on.
        start: The last step at which it is 0.
        end: The first step of the full weight.

    Raises:
        ValueError: If `weight` or `start` is negative, or `end` is not after `start`.

    >>> schedule = SparsitySchedule(weight=10.0, start=1000, end=2000)
    >>> [schedule(step) for step in (0, 1000, 1500, 3000)]
    [0.0, 0.0, 5.0, 10.0]
    """

    weight: float
    start: float
    end: float

    def __post_init__(self) -> None:
        _check_number("weight", self.weight)
        _check_number("start", self.start)
        _check_number("end", self.end)
        if self.end <= self.start:
            raise ValueError(f"end={self.end!r}: must be after start={self.start!r}")

    def __call__(self, step: int) -> float:
        """The weight at an optimizer step."""
        return float(self.weight) * min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)

    def apply_(self, module: nn.Module, step: int) -> None:
        """Sets `sparsity_weight` on `module` and on each submodule that has it."""
        for submodule in module.modules():
            if hasattr(submodule, "sparsity_weight"):
                setattr(submodule, "sparsity_weight", self(step))  # noqa: B010 - mypy knows no such attribute


class _BoxedUnit(nn.Module):
    """What NAU and NMU share: a weight that is pulled to integers in a box [low, 1], and the losses that pull."""

    low: ClassVar[float]
    neutral: ClassVar[float]
    """What an input that is not used should be: 0 for a sum, 1 for a product."""

    in_features: int
    out_features: int
    sparsity_weight: float
    bounds_weight: float
    input_weight: float
    weight: nn.Parameter
    bias: nn.Parameter | None
    _input_sum: Tensor | None
    _input_rows: Tensor | None

    def _build(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        constraint: str,
        sparsity: str,
        weights: dict[str, float],
        factory: dict[str, Any],
    ) -> None:
        check_whole(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.constraint, self.sparsity = constraint, sparsity
        self._check_options()
        for name, value in weights.items():
            _check_number(name, value)
            setattr(self, name, value)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self._forget_inputs()

    def _check_options(self) -> None:
        _check_choice("constraint", self.constraint, ("clip", "penalty"))
        _check_choice("sparsity", self.sparsity, ("linear", "squared"))

    def _magnitude(self) -> Tensor:
        """|W|, or W itself where the box has no negative side."""
        return self.weight.abs() if self.low < 0 else self.weight

    def sparsity_loss(self) -> Tensor:
        """Mean distance of the weights from the integers of the box: min(|W|, |1 - |W||), or W^2 (1 - |W|)^2."""
        self._check_options()
        magnitude = self._magnitude()
        if self.sparsity == "squared":
            return (magnitude * (1 - magnitude)).square().mean()
        return torch.minimum(magnitude.abs(), (1 - magnitude).abs()).mean()

    def bounds_loss(self) -> Tensor:
        """Mean distance of the weights from the box, squared where `sparsity="squared"`."""
        self._check_options()
        centre, radius = (1 + self.low) / 2, (1 - self.low) / 2
        outside = F.relu((self.weight - centre).abs() - radius)
        return (outside.square() if self.sparsity == "squared" else outside).mean()

    def input_loss(self) -> Tensor:
        """Mean of (1 - |W_oi|) (neutral - m_i)^2: asks the layers below for 0 (NAU) or 1 (NMU) where x_i is not used.

        m is the mean over the rows of all training-mode forwards since the last `constrain_()`; gradients flow to them.
        They are stored only while `input_weight` is not 0; the loss is zero where nothing is stored.
        """
        if self._input_sum is None or self._input_rows is None:
            return self.weight.new_zeros(())
        mean = self._input_sum / self._input_rows
        return ((1 - self._magnitude()) * (self.neutral - mean).square()).mean()

    def regularization_loss(self) -> Tensor:
        """What the training loop adds to the task's loss; zero by default.

        sparsity_weight * sparsity_loss + (penalty mode) bounds_weight * bounds_loss + input_weight * input_loss.
        """
        self._check_options()
        loss = self.weight.new_zeros(())
        if self.sparsity_weight:
            loss = loss + self.sparsity_weight * self.sparsity_loss()
        if self.constraint == "penalty" and self.bounds_weight:
            loss = loss + self.bounds_weight * self.bounds_loss()
        if self.input_weight:
            loss = loss + self.input_weight * self.input_loss()
        return loss

    @torch.no_grad()
    def constrain_(self) -> None:
        """Clamps the weight to its box (`constraint="clip"`) and forgets the stored inputs.

        The training loop calls it after each optimizer step.
        """
        self._check_options()
        if self.constraint == "clip":
            self.weight.copy_(self.weight.clamp(self.low, 1))  # vmap, which trains seeds side by side, has no clamp_
        self._forget_inputs()

    @torch.no_grad()
    def sparsity_error(self) -> float:
        """Largest distance of a weight from an integer of the box: max min(|W|, |1 - |W||)."""
        magnitude = self._magnitude()
        return torch.minimum(magnitude.abs(), (1 - magnitude).abs()).max().item()

    @torch.no_grad()
    def round_(self) -> None:
        """Rounds the weight to integers in the box: afterwards the unit is an exact formula."""
        self.weight.round_().clamp_(self.low, 1)

    def _remember(self, x: Tensor) -> None:
        """Adds the rows of x to what `input_loss` averages. Compiled code would guard on a count that is no tensor."""
        if not (self.training and self.input_weight):
            return
        rows = _wide(x).reshape(-1, self.in_features)
        total, count = rows.sum(0), torch.full((), rows.shape[0], dtype=rows.dtype, device=x.device)
        self._input_sum = total if self._input_sum is None else self._input_sum + total
        self._input_rows = count if self._input_rows is None else self._input_rows + count

    def _forget_inputs(self) -> None:
        self._input_sum = self._input_rows = None

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles leave out the stored inputs: they belong to a graph
        return {**self.__dict__, "_input_sum": None, "_input_rows": None}


_OPTIONS = {
    "constraint": "clip",
    "sparsity": "linear",
    "sparsity_weight": 0.0,
    "bounds_weight": 1.0,
    "input_weight": 0.0,
}


@register_layer(
    "nau",
    kind="linear",
    nonlinear=False,
    card=Card(
        title="Neural Arithmetic Units",
        authors="Andreas Madsen, Alexander Rosenberg Johansen",
        year=2020,
        arxiv="2001.05016",
        equation=r"y_o = \sum_i \mathrm{clamp}(W_{oi}, -1, 1)\, x_i",
        headline="sum of two subsets of 100 inputs, extrapolation: solved by 100 of 100 seeds for + and for -",
        reproduced="sums and differences of 100 inputs, 3e4 steps (experiment arithmetic): 20 of 20 seeds each, median "
        "1.7e4 and 5e3 steps (paper: 1.8e4 and 5e3). Sums of handwritten digits (experiment mnist_arithmetic): as good "
        "as the exact sum for 1000 digits after 10 in training, 2 of 3 seeds",
    ),
)
class NAU(_BoxedUnit):
    r"""Neural addition unit: $y = x\,\mathrm{clamp}(W, -1, 1)^T$, with W pulled to {-1, 0, 1}.

    Parameter `weight` (out, in), from U(-r, r) with r = min(0.5, sqrt(6 / (in + out))). The options are plain
    attributes that may be changed while training. No gradient reaches a weight outside the box: call `constrain_()`.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        constraint: `"clip"`: `constrain_()` clamps the weight to [-1, 1]. `"penalty"`: it does not, and
            `bounds_loss()` is added to the loss.
        sparsity: Shape of the losses: `"linear"`, mean min(|W|, |1 - |W||), or `"squared"`, mean W^2 (1 - |W|)^2.
        sparsity_weight: Factor on `sparsity_loss()`; see `SparsitySchedule`.
        bounds_weight: Factor on `bounds_loss()`, in penalty mode only.
        input_weight: Factor on `input_loss()`.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size or an option is wrong, or in `forward` the input's last size or dtype.
    """

    low = -1.0
    neutral = 0.0

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        constraint: Literal["clip", "penalty"] = "clip",
        sparsity: Literal["linear", "squared"] = "linear",
        sparsity_weight: float = 0.0,
        bounds_weight: float = 1.0,
        input_weight: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        weights = {"sparsity_weight": sparsity_weight, "bounds_weight": bounds_weight, "input_weight": input_weight}
        factory = {"device": device, "dtype": dtype}
        self._build(in_features, out_features, bias, constraint, sparsity, weights, factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weight anew, from torch's global generator."""
        bound = min(0.5, math.sqrt(6 / (self.in_features + self.out_features)))
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()
        self._forget_inputs()

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Start["NAU"]:
        """The linear layer itself where all its weights are in [-1, 1], else the nearest unit.

        Sets `weight` to the layer's, clamped to the box, and `bias` to the layer's. Weights on the box's ends are free
        to move inwards.

        Raises:
            TypeError: If the original is not an `nn.Linear`, or there is no such option.
            ValueError: If an option is wrong, or one that the original decides.
        """
        check_original(linear, nn.Linear)
        unit = fresh(cls, linear, **options)
        unit.weight.copy_(linear.weight.clamp(-1, 1))
        copy_bias(unit, linear)
        return Start(unit, relative_error(unit.weight, linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        check_features(x, self.in_features, self.weight)
        self._remember(x)
        return F.linear(x, _clamp(self.weight, -1, 1), self.bias)

    def extra_repr(self) -> str:
        """Sizes, bias, and the options that are not the defaults."""
        return _shown(self, **_OPTIONS)


@register_layer(
    "nmu",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="Neural Arithmetic Units",
        authors="Andreas Madsen, Alexander Rosenberg Johansen",
        year=2020,
        arxiv="2001.05016",
        equation=r"y_o = \prod_i (W_{oi} x_i + 1 - W_{oi})",
        headline="product of two sums of subsets of 100 inputs, extrapolation: solved by 98 of 100 seeds "
        "(NAC multiply 31, NALU 0)",
        reproduced="(x1 + x2)(x1 + x2 + x3 + x4) from U[1,2] to U[2,6], 3e4 steps (experiment arithmetic_function10): "
        "94 of 100 seeds (paper: 94), median 1.4e4 steps (paper: 1.4e4). The product of sums over 100 inputs: not "
        "re-run",
    ),
)
class NMU(_BoxedUnit):
    r"""Neural multiplication unit: $y_o = \prod_i (W_{oi} x_i + 1 - W_{oi})$, with W pulled to {0, 1}.

    W_oi = 1 takes x_i as a factor, W_oi = 0 leaves it out. It works for negative, zero and small x; it does not divide.
    Parameter `weight` (out, in). The options are plain attributes that may be changed while training.

    Range: at init y shrinks or grows with 2^in. With inputs from N(0, 1) a unit with more than about 110 inputs gives 0
    and has no gradient; with inputs from U(1, 2) it overflows above about 400. For wide units use `init="identity"`.
    bf16 and fp16 inputs are multiplied in float32. See `archzoo.kernels.nmu_product`.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        noise: The stochastic NMU (https://arxiv.org/abs/2211.05624): in training y = NMU(x n) / NMU(n) with n of x's
            shape from U(low, high). At a weight of 0 or 1 it cancels; elsewhere it shakes the unit out of false optima.
            `(low, high)`, the authors' is (1, 5); `"batch"`: (1, 1 + 1 / std of all of x); None: no noise. For narrow
            units: NMU(n) grows with the number of inputs as y does.
        init: `"uniform"`, U(0.25, 0.75), or `"identity"`, U(0, min(1, 2/in)), for wide units.
        constraint: `"clip"`: `constrain_()` clamps the weight to [0, 1], `forward` does not. `"penalty"`: `forward`
            does, and `bounds_loss()` is added to the loss.
        sparsity: Shape of the losses: `"linear"`, mean min(|W|, |1 - W|), or `"squared"`, mean W^2 (1 - W)^2.
        sparsity_weight: Factor on `sparsity_loss()`; see `SparsitySchedule`.
        bounds_weight: Factor on `bounds_loss()`, in penalty mode only.
        input_weight: Factor on `input_loss()`.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size or an option is wrong, or in `forward` the input's last size or dtype.
    """

    low = 0.0
    neutral = 1.0

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        noise: tuple[float, float] | Literal["batch"] | None = None,
        init: Literal["uniform", "identity"] = "uniform",
        constraint: Literal["clip", "penalty"] = "clip",
        sparsity: Literal["linear", "squared"] = "linear",
        sparsity_weight: float = 0.0,
        bounds_weight: float = 1.0,
        input_weight: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_choice("init", init, ("uniform", "identity"))
        self.init = init
        self.noise = noise
        if noise is not None and noise != "batch":
            _noise_range(noise)
        weights = {"sparsity_weight": sparsity_weight, "bounds_weight": bounds_weight, "input_weight": input_weight}
        factory = {"device": device, "dtype": dtype}
        self._build(in_features, out_features, bias, constraint, sparsity, weights, factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weight anew, from torch's global generator."""
        if self.init == "identity":
            self.weight.uniform_(0, min(1, 2 / self.in_features))
        else:
            self.weight.uniform_(0.25, 0.75)
        if self.bias is not None:
            self.bias.zero_()
        self._forget_inputs()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> NoReturn:
        """Refuses: a product is no sum.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "NMU multiplies its inputs, and no product of two of them is a weighted sum; start from nn.Linear by "
            "NAU.from_linear, and put an NMU behind it"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        check_features(x, self.in_features, self.weight)
        self._remember(x)
        weight = _clamp(self.weight, 0, 1) if self.constraint == "penalty" else self.weight
        if self.noise is None or not self.training:
            y = nmu_product(x, weight)
        else:
            wide = _wide(x)  # in half precision x n would be rounded, and n no longer cancel
            noise = self._draw(wide)
            y = _as_linear_gives(nmu_product(wide * noise, weight) / nmu_product(noise, weight), x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _draw(self, x: Tensor) -> Tensor:
        if self.noise == "batch":
            x = x.detach()
            std = ((x - x.mean()).square().sum() / max(x.numel() - 1, 1)).sqrt()
            return 1 + torch.rand_like(x) * torch.where(std > 0, 1 / std, 0)  # no noise where there is no spread
        low, high = _noise_range(self.noise)
        return low + torch.rand_like(x) * (high - low)

    def extra_repr(self) -> str:
        """Sizes, bias, and the options that are not the defaults."""
        return _shown(self, noise=None, init="uniform", **_OPTIONS)


def _noise_range(noise: Any) -> tuple[float, float]:
    is_range = isinstance(noise, tuple | list) and len(noise) == 2 and all(isinstance(end, Real) for end in noise)
    if not is_range or not 0 < noise[0] <= noise[1] < math.inf:
        raise ValueError(f"noise={noise!r}: must be None, 'batch', or (low, high) with 0 < low <= high, as (1, 5)")
    return float(noise[0]), float(noise[1])
