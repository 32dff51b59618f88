r"""Arithmetic units: NAU and NMU (https://arxiv.org/abs/2001.05016), NAC and NALU (https://arxiv.org/abs/1808.00508).

At the end are later ones: NPU and RealNPU (https://arxiv.org/abs/2006.01681), iNALU (https://arxiv.org/abs/2003.07629),
and the fully connected layer of MC-LSTM (https://arxiv.org/abs/2101.05186).

A unit whose weights go to {-1, 0, 1} (adding) or {0, 1} (multiplying) computes an exact formula, and so it is right far
outside the range it was trained on. All weights are computed from the parameters in each `forward`. `bias` is False by
default, unlike in other linear layers, for an exact formula has none; it starts at zero and is never regularised.

The training loop of NAU and NMU: set the sparsity weight (`SparsitySchedule.apply_`), forward, task loss plus each
unit's `regularization_loss()`, backward, optimizer step, each unit's `constrain_()`. At the end, `round_()`.

For a recurrent unit give it `torch.cat([x_t, h], -1)` and take its output as the next h.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.nmu_product import nmu_product
from archzoo.registry import Card, register_layer

# --- What the units share ---------------------------------------------------------------------------------------------


def _check_sizes(in_features: Any, out_features: Any) -> None:
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value}: must be a whole number, 1 or more, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}={value!r}: must be a finite number, {'above 0' if positive else '0 or more'}")


def _check_input(x: Tensor, in_features: int, parameter: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"input of shape {tuple(x.shape)}: its last size must be in_features={in_features}")
    if x.dtype != parameter.dtype and not (
        _under_autocast(x) and x.is_floating_point() and torch.float64 not in (x.dtype, parameter.dtype)
    ):
        raise ValueError(f"input of {x.dtype}: must be {parameter.dtype}, as the unit's parameters are")


def _under_autocast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _as_linear_gives(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype that `nn.Linear` would give for x."""
    if _under_autocast(x) and x.dtype != torch.float64:
        return y.to(torch.get_autocast_dtype(x.device.type))
    return y.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _clamp(w: Tensor, low: float, high: float) -> Tensor:
    """w in [low, high], with a gradient where low <= w <= high, both ends included.

    `torch.clamp` has none at the ends in some versions of torch, and a weight that `constrain_()` put there would stay.
    """
    return torch.where((w >= low) & (w <= high), w, w.detach().clamp(low, high))


def _exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for exponents and phases, in the dtype of x also under autocast: exp turns an error into a factor."""
    weight = weight.to(x.dtype)
    if _under_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)
    return F.linear(x, weight)


def _power_product(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """prod_i (|x_i| + eps)^W_oi, in float32 at least."""
    return _exact_linear((_wide(x).abs() + eps).log(), weight).exp()


def _shown(unit: nn.Module, **defaults: Any) -> str:
    """`extra_repr`: the sizes, the bias, and the options that differ from their defaults."""
    text = f"{unit.in_features}, {unit.out_features}, bias={unit.bias is not None}"
    changed = {name: getattr(unit, name) for name, default in defaults.items() if getattr(unit, name) != default}
    return ", ".join([text, *(f"{name}={value!r}" for name, value in changed.items())])


# --- NAU and NMU ------------------------------------------------------------------------------------------------------


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
        _check_sizes(in_features, out_features)
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
            self.weight.clamp_(self.low, 1)
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
        reproduced="subtraction, 1e4 steps, evaluated on 1,000 samples: 10 of 10 seeds, median 4.25e3 steps (CPU, "
        "float32); addition: not re-run",
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

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.weight)
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
        reproduced="(x1 + x2)(x1 + x2 + x3 + x4) from U[1,2] to U[2,6], 3e4 steps, evaluated on 1,000 samples: 179 of "
        "200 seeds, 94 and 85 of each hundred (paper: 94), median 1.4e4 steps (paper: 1.4e4). x1 x2 by one unit, 25 "
        "seeds, 4.5e4 steps: on U[1,2] 25; on U[-2,-1] 24, with noise (1, 5) 25. The product of sums over 100 inputs: "
        "not re-run",
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

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.weight)
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


# --- NAC and NALU -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _nac_bound(fans: int) -> float:
    """r for which tanh(a) sigmoid(b), a and b from U(-r, r), has the variance 2 / fans; by bisection on (0, 10]."""
    low, high = 0.0, 10.0
    for _ in range(60):
        r = (low + high) / 2
        variance = (1 - math.tanh(r) / r) * (r - math.tanh(r / 2)) / (2 * r)
        low, high = (r, high) if max(fans, 5) * variance < 2 else (low, r)
    return high


_NALU_CARD: dict[str, Any] = {
    "title": "Neural Arithmetic Logic Units",
    "authors": "Andrew Trask, Felix Hill, Scott Reed, Jack Rae, Chris Dyer, Phil Blunsom",
    "year": 2018,
    "arxiv": "1808.00508",
}


@register_layer(
    "nac",
    kind="linear",
    nonlinear=False,
    card=Card(
        **_NALU_CARD,
        equation=r"y = x W^T, \quad W = \tanh(\hat W) \odot \sigma(\hat M)",
        headline="sum of two subsets of 100 inputs, extrapolation (as measured by arXiv 2001.05016): "
        "+ and - solved by 100 of 100 seeds, the product by 31",
        reproduced="nothing yet",
    ),
)
class NAC(nn.Module):
    r"""Neural accumulator: $y = x W^T$ with $W = \tanh(\hat W) \odot \sigma(\hat M)$, which tends to {-1, 0, 1}.

    Parameters `w_hat`, `m_hat` (out, in), both from U(-r, r), with r such that Var(W) = 2 / (in + out).

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        mode: `"add"`, or `"multiply"`: y = exp(log(|x| + eps) W^T), which is not affine, loses the sign of x, and
            explodes near x = 0 where W < 0. It is computed in float32 at least, under autocast too.
        eps: Added to |x|, where `mode="multiply"`.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size or an option is wrong, or in `forward` the input's last size or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        mode: Literal["add", "multiply"] = "add",
        eps: float = 1e-7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, out_features)
        _check_choice("mode", mode, ("add", "multiply"))
        _check_number("eps", eps, positive=True)
        self.in_features, self.out_features, self.mode, self.eps = in_features, out_features, mode, eps
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w_hat = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.m_hat = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws both matrices anew, from torch's global generator."""
        bound = _nac_bound(self.in_features + self.out_features)
        for parameter in (self.w_hat, self.m_hat):
            parameter.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def weight(self) -> Tensor:
        """W (out, in), computed at each access. Read-only."""
        return self.w_hat.tanh() * self.m_hat.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.w_hat)
        _check_choice("mode", self.mode, ("add", "multiply"))
        if self.mode == "add":
            return F.linear(x, self.weight, self.bias)
        y = _as_linear_gives(_power_product(x, self.weight, self.eps), x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias, and the options that are not the defaults."""
        return _shown(self, mode="add", eps=1e-7)


@register_layer(
    "nalu",
    kind="linear",
    nonlinear=True,
    card=Card(
        **_NALU_CARD,
        equation=r"y = g \odot (x W^T) + (1 - g) \odot \exp(\log(|x| + \epsilon) M^T), \quad g = \sigma(x G^T)",
        headline="sum of two subsets of 100 inputs, extrapolation (as measured by arXiv 2001.05016): "
        "+ and - solved by 14 of 100 seeds, the product by none",
        reproduced="nothing yet",
    ),
)
class NALU(nn.Module):
    r"""Neural arithmetic logic unit: a gate g between a NAC that adds and a NAC that multiplies.

    $y = g \odot (x W^T) + (1 - g) \odot \exp(\log(|x| + \epsilon) M^T)$, $g = \sigma(x G^T)$. It is the baseline that
    fails: the gate's choice depends on x, the product loses signs and explodes near 0. Nothing here hides that.

    Parameters: `gate_weight` G (out, in), Xavier uniform; `w_hat`, `m_hat` as in NAC; with `shared=False` also
    `w_hat_mul`, `m_hat_mul`.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        shared: Whether the product has the sum's weights, M = W.
        gate_bias: Whether the gate has a bias, `gate_bias` (out,), that starts at zero.
        eps: Added to |x| in the logarithm.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size or an option is wrong, or in `forward` the input's last size or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        shared: bool = True,
        gate_bias: bool = False,
        eps: float = 1e-7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, out_features)
        _check_number("eps", eps, positive=True)
        self.in_features, self.out_features, self.shared, self.eps = in_features, out_features, shared, eps
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = out_features, in_features
        self.gate_weight = nn.Parameter(torch.empty(shape, **factory))
        self.w_hat = nn.Parameter(torch.empty(shape, **factory))
        self.m_hat = nn.Parameter(torch.empty(shape, **factory))
        self.w_hat_mul = None if shared else nn.Parameter(torch.empty(shape, **factory))
        self.m_hat_mul = None if shared else nn.Parameter(torch.empty(shape, **factory))
        self.gate_bias = nn.Parameter(torch.empty(out_features, **factory)) if gate_bias else None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all matrices anew, from torch's global generator."""
        nn.init.xavier_uniform_(self.gate_weight)
        bound = _nac_bound(self.in_features + self.out_features)
        for parameter in (self.w_hat, self.m_hat, self.w_hat_mul, self.m_hat_mul):
            if parameter is not None:
                parameter.uniform_(-bound, bound)
        for vector in (self.gate_bias, self.bias):
            if vector is not None:
                vector.zero_()

    @property
    def weight(self) -> Tensor:
        """W (out, in) of the sum, computed at each access. Read-only."""
        return self.w_hat.tanh() * self.m_hat.sigmoid()

    @property
    def weight_mul(self) -> Tensor:
        """M (out, in) of the product, computed at each access. Read-only."""
        if self.w_hat_mul is None or self.m_hat_mul is None:
            return self.weight
        return self.w_hat_mul.tanh() * self.m_hat_mul.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.w_hat)
        weight = self.weight
        weight_mul = weight if self.w_hat_mul is None else self.weight_mul
        gate = F.linear(x, self.gate_weight, self.gate_bias).sigmoid()
        y = gate * F.linear(x, weight) + (1 - gate) * _power_product(x, weight_mul, self.eps)
        y = _as_linear_gives(y, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias, and the options that are not the defaults."""
        text = _shown(self, shared=True, eps=1e-7)
        return text if self.gate_bias is None else f"{text}, gate_bias=True"


# --- Later units ------------------------------------------------------------------------------------------------------

_NPU_CARD: dict[str, Any] = {
    "title": "Neural Power Units",
    "authors": "Niklas Heim, Tomáš Pevný, Václav Šmídl",
    "year": 2020,
    "arxiv": "2006.01681",
    "headline": "x + y, x y, x / y, sqrt x beyond the training range, mean absolute error: "
    "RealNPU .08, .066, .085, .004 (NMU .2, .005, 11.4, .16)",
    "reproduced": "nothing yet",
}


@register_layer(
    "real_npu",
    kind="linear",
    nonlinear=True,
    card=Card(
        **_NPU_CARD,
        equation=r"y = \exp(\log r\, W^T) \odot \cos(k W^T), \quad r = g (|x| + \epsilon) + 1 - g, "
        r"\quad k = \pi g\,[x < 0]",
    ),
)
class RealNPU(nn.Module):
    r"""Neural power unit with a real weight: the real part of a product of any powers, $\prod_i x_i^{W_{oi}}$.

    A gate g in [0, 1] per input replaces an input that is not used by 1: $r = g (|x| + \epsilon) + 1 - g$,
    $k = \pi g [x < 0]$, $y = \exp(\log r\, W^T) \odot \cos(k W^T)$; eps is the machine's for the parameters' dtype.
    Parameters: `weight` (out, in), Xavier uniform; `gate` (in,), 0.5. Computed in float32 at least.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size is wrong, or in `forward` the input's last size or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.gate = nn.Parameter(torch.empty(in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weight anew, from torch's global generator, and opens the gates half."""
        nn.init.xavier_uniform_(self.weight)
        self.gate.fill_(0.5)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.weight)
        log_r, k = _polar(x, self.gate)
        y = _exact_linear(log_r, self.weight).exp() * _exact_linear(k, self.weight).cos()
        y = _as_linear_gives(y, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes and bias."""
        return _shown(self)


def _polar(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the modulus, and the phase in radians, of each gated input."""
    eps = torch.finfo(gate.dtype).eps
    x = _wide(x)
    g = _clamp(gate.to(x.dtype), 0, 1)
    return (g * (x.abs() + eps) + 1 - g).log(), math.pi * g * (x < 0)


@register_layer(
    "npu",
    kind="linear",
    nonlinear=True,
    card=Card(
        **_NPU_CARD,
        equation=r"y = \exp(\log r\, W^T - k V^T) \odot \cos(k W^T + \log r\, V^T)",
    ),
)
class NPU(nn.Module):
    r"""Neural power unit with a complex weight W + iV.

    $y = \exp(\log r\, W^T - k V^T) \odot \cos(k W^T + \log r\, V^T)$; r, k, the gate and eps are those of `RealNPU`,
    which it starts as. Parameters: `weight` W (out, in), Xavier uniform; `weight_im` V (out, in), zero; `gate` (in,),
    0.5. Computed in float32 at least.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size is wrong, or in `forward` the input's last size or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.weight_im = nn.Parameter(torch.empty(out_features, in_features, **factory))
        self.gate = nn.Parameter(torch.empty(in_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the real weight anew, from torch's global generator; the imaginary one is zero, the gates half open."""
        nn.init.xavier_uniform_(self.weight)
        self.weight_im.zero_()
        self.gate.fill_(0.5)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.weight)
        log_r, k = _polar(x, self.gate)
        log_modulus = _exact_linear(log_r, self.weight) - _exact_linear(k, self.weight_im)
        phase = _exact_linear(k, self.weight) + _exact_linear(log_r, self.weight_im)
        y = _as_linear_gives(log_modulus.exp() * phase.cos(), x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes and bias."""
        return _shown(self)


@register_layer(
    "inalu",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="iNALU: Improved Neural Arithmetic Logic Unit",
        authors="Daniel Schlör, Markus Ring, Andreas Hotho",
        year=2020,
        arxiv="2003.07629",
        equation=r"y = \sigma(g) \odot a + (1 - \sigma(g)) \odot m \odot z, \quad a = x A^T, \quad "
        r"m = \exp(\min(\log\max(|x|, \epsilon) M^T, 20)), \quad "
        r"z_o = \prod_i (\mathrm{sign}(x_i) |M_{oi}| + 1 - |M_{oi}|)",
        headline="x + y, x y, x / y, sqrt x beyond the training range, mean absolute error as measured by "
        "arXiv 2006.01681: 2.2, 3.5, 2.5, .05",
        reproduced="nothing yet",
    ),
)
class INALU(nn.Module):
    r"""Improved NALU: a gate that does not see x, a product that keeps its sign and cannot overflow.

    $y = \sigma(g) \odot a + (1 - \sigma(g)) \odot m \odot z$, with $a = x A^T$, $m = \exp(\min(\log\max(|x|, \epsilon)
    M^T, c))$ and the sign $z_o = \prod_i (\mathrm{sign}(x_i) |M_{oi}| + 1 - |M_{oi}|)$, an NMU of signs.
    A = tanh(`w_hat`) sigmoid(`m_hat`) and M = tanh(`w_hat_mul`) sigmoid(`m_hat_mul`), all (out, in): `w_` from
    N(0.88, 0.2^2), `m_` from N(0.5, 0.2^2); `gate` g (out,) from N(0, 0.2^2). The product is taken in float32 at least.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        eps: Lower bound of |x| in the logarithm.
        max_exponent: Upper bound c of the exponent.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size or an option is wrong, or in `forward` the input's last size or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        eps: float = 1e-7,
        max_exponent: float = 20.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, out_features)
        _check_number("eps", eps, positive=True)
        _check_number("max_exponent", max_exponent, positive=True)
        self.in_features, self.out_features, self.eps, self.max_exponent = in_features, out_features, eps, max_exponent
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = out_features, in_features
        self.w_hat = nn.Parameter(torch.empty(shape, **factory))
        self.m_hat = nn.Parameter(torch.empty(shape, **factory))
        self.w_hat_mul = nn.Parameter(torch.empty(shape, **factory))
        self.m_hat_mul = nn.Parameter(torch.empty(shape, **factory))
        self.gate = nn.Parameter(torch.empty(out_features, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws everything but the bias anew, from torch's global generator."""
        for parameter in (self.w_hat, self.w_hat_mul):
            parameter.normal_(0.88, 0.2)
        for parameter in (self.m_hat, self.m_hat_mul):
            parameter.normal_(0.5, 0.2)
        self.gate.normal_(0, 0.2)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.w_hat)
        wide = _wide(x)
        total = F.linear(x, self.w_hat.tanh() * self.m_hat.sigmoid())
        weight_mul = self.w_hat_mul.tanh() * self.m_hat_mul.sigmoid()
        exponent = _exact_linear(wide.abs().clamp(min=self.eps).log(), weight_mul)
        product = exponent.clamp(max=self.max_exponent).exp() * nmu_product(wide.sign(), weight_mul.abs())
        gate = self.gate.sigmoid()
        y = _as_linear_gives(gate * total + (1 - gate) * product, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias, and the options that are not the defaults."""
        return _shown(self, eps=1e-7, max_exponent=20.0)


@register_layer(
    "mcfc",
    kind="linear",
    nonlinear=False,
    card=Card(
        title="MC-LSTM: Mass-Conserving LSTM",
        authors="Pieter-Jan Hoedt, Frederik Kratzert, Daniel Klotz, Christina Halmich, Markus Holzleitner, "
        "Grey Nearing, Sepp Hochreiter, Günter Klambauer",
        year=2021,
        arxiv="2101.05186",
        equation=r"y = \sigma(g) \odot (x\, \mathrm{softmax}(J))",
        headline="the paper's arithmetic results are for the recurrent MC-LSTM; this layer is its fully connected form",
        reproduced="nothing yet",
    ),
)
class MCFC(nn.Module):
    r"""Mass-conserving fully connected layer: $y = \sigma(g) \odot (x\, \mathrm{softmax}(J))$.

    Each input is divided among the outputs, and each output passes a gate. Parameters: `junction` J (in, out),
    orthogonal, the softmax being over its last axis; `gate` g (out,), zero. With `mode="multiply"` both have one output
    more, into which an input that is not used can flow, and `log_bias` (out,), zero, is added.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add a vector that starts at zero.
        mode: `"add"`, or `"multiply"`: exp(that on log x, the last output dropped, + log_bias), which is not affine and
            is for positive x; the result for x < 0 is NaN. Computed in float32 at least.

    Shape: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: If a size or an option is wrong, or in `forward` the input's last size or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        mode: Literal["add", "multiply"] = "add",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, out_features)
        _check_choice("mode", mode, ("add", "multiply"))
        self.in_features, self.out_features, self.mode = in_features, out_features, mode
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        columns = out_features + (mode == "multiply")
        self.junction = nn.Parameter(torch.empty(in_features, columns, **factory))
        self.gate = nn.Parameter(torch.empty(columns, **factory))
        self.log_bias = nn.Parameter(torch.empty(out_features, **factory)) if mode == "multiply" else None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the junction anew, from torch's global generator; the rest is zero."""
        self.junction.copy_(nn.init.orthogonal_(torch.empty_like(_wide(self.junction))))  # no QR in half precision
        for vector in (self.gate, self.log_bias, self.bias):
            if vector is not None:
                vector.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.junction)
        if self.log_bias is None:
            weight = (self.gate.sigmoid() * self.junction.softmax(-1)).t()
            return F.linear(x, weight, self.bias)
        gate, shares = self.gate.sigmoid()[:-1], self.junction.softmax(-1)[:, :-1]
        y = (_exact_linear(_wide(x).log(), (gate * shares).t()) + self.log_bias).exp()
        y = _as_linear_gives(y, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, bias, and the mode where it is not the default."""
        return _shown(self, mode="add")
