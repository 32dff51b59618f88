"""Fitting known functions: those of the KAN paper (Liu et al. 2024, arXiv 2404.19756), toy, special and physical."""

from collections.abc import Callable
from dataclasses import dataclass
from math import factorial, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from archzoo.pictures import Picture, compared, outputs
from archzoo.tasks.options import choice, number, whole_number
from archzoo.tasks.split import SPLIT_SEED
from archzoo.tasks.task import RegressionTask, TensorSplit, register_task

CELLS = 80
"""Cells of a picture, along each of two inputs."""
MAX_VALUES = 2**28
"""Most input values that a split may hold: 1 GiB of float32."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function to fit.

    Args:
        inputs: Number of its inputs.
        formula: Maps the inputs' columns, float64, to its values.
        text: The same as sympy reads it, with inputs x0, x1, …; empty where there is no closed formula.
        ranges: The ends between which each input lies; empty for -1 and 1.
        hidden: Hidden levels of a small `KAN` that can be this function: numbers of sums, or pairs (sums, products).
    """

    inputs: int
    formula: Callable[..., Any]
    text: str = ""
    ranges: tuple[tuple[float, float], ...] = ()
    hidden: tuple[int | tuple[int, int], ...] = ()


def bessel_j0(x: np.ndarray) -> Any:
    """J0(20 x)."""
    import scipy.special

    return scipy.special.j0(20 * x)


def special(name: str, *order: int, low: float = 0.0) -> Function:
    """A function of scipy.special: after its order, if it has one, an argument from 0 to 1 and one from `low` to 1."""

    def formula(x: np.ndarray, y: np.ndarray) -> Any:
        import scipy.special

        value = getattr(scipy.special, name)(*order, (x + 1) / 2, low + (1 - low) * (y + 1) / 2)
        return value[0] if isinstance(value, tuple) else value

    return Function(2, formula)


def spherical_harmonic(m: int, n: int) -> Function:
    """Real part of a spherical harmonic of order m and degree n: longitude pi x, colatitude pi (y + 1) / 2."""
    # Not by scipy's own function, which had one name and order of arguments before 1.15 and another one after 1.17.
    norm = sqrt((2 * n + 1) / (4 * pi) * factorial(n - m) / factorial(n + m))

    def formula(x: np.ndarray, y: np.ndarray) -> Any:
        import scipy.special

        return norm * scipy.special.lpmv(m, n, np.cos(pi * (y + 1) / 2)) * np.cos(m * pi * x)

    return Function(2, formula)


Range = tuple[float, float]
Levels = tuple[int | tuple[int, int], ...]


def closed(text: str, formula: Callable[..., Any], hidden: Levels, *ranges: Range) -> Function:
    """A formula of section 3.3, with the range of each of its inputs."""
    return Function(len(ranges), formula, text, ranges, hidden)


UNIT: Range = (-1.0, 1.0)
SUM: Levels = (1,)
PRODUCT: Levels = ((0, 1),)
SUM_AND_PRODUCT: Levels = ((1, 1),)

FUNCTIONS = {
    # The toy functions of section 3.1.
    "j0": Function(1, bessel_j0),
    "exp_sin": Function(2, lambda x, y: np.exp(np.sin(pi * x) + y**2), "exp(sin(pi*x0) + x1**2)", hidden=SUM),
    "xy": Function(2, lambda x, y: x * y, "x0*x1", hidden=PRODUCT),
    "exp_mean_100d": Function(100, lambda *x: np.exp(np.mean([np.sin(pi * z / 2) ** 2 for z in x], axis=0))),
    "exp_sin_4d": Function(
        4,
        lambda a, b, c, d: np.exp((np.sin(pi * (a**2 + b**2)) + np.sin(pi * (c**2 + d**2))) / 2),
        "exp((sin(pi*(x0**2 + x1**2)) + sin(pi*(x2**2 + x3**2)))/2)",
        hidden=(2, 1),
    ),
    # The special functions of section 3.2. yv and kv are infinite at 0.
    "ellipj": special("ellipj"),
    "ellipkinc": special("ellipkinc"),
    "ellipeinc": special("ellipeinc"),
    "jv": special("jv"),
    "yv": special("yv", low=0.1),
    "kv": special("kv", low=0.1),
    "iv": special("iv"),
    "lpmv_0": special("lpmv", 0),
    "lpmv_1": special("lpmv", 1),
    "lpmv_2": special("lpmv", 2),
    "sph_harm_0_1": spherical_harmonic(0, 1),
    "sph_harm_1_1": spherical_harmonic(1, 1),
    "sph_harm_0_2": spherical_harmonic(0, 2),
    "sph_harm_1_2": spherical_harmonic(1, 2),
    "sph_harm_2_2": spherical_harmonic(2, 2),
    # The formulas of section 3.3, without units. Ranges keep away from poles, and from where a root is not smooth.
    "feynman_i_6_2": closed(
        "exp(-x0**2/(2*x1**2))/sqrt(2*pi*x1**2)",
        lambda t, s: np.exp(-(t**2) / (2 * s**2)) / np.sqrt(2 * pi * s**2),
        ((1, 1), 1),
        UNIT,
        (0.5, 2),
    ),
    "feynman_i_12_11": closed("1 + x0*sin(x1)", lambda a, t: 1 + a * np.sin(t), PRODUCT, UNIT, (-pi, pi)),
    "feynman_i_13_12": closed("x0*(1/x1 - 1)", lambda a, b: a * (1 / b - 1), PRODUCT, UNIT, (0.5, 2)),
    "feynman_i_15_3x": closed(
        "(1 - x0)/sqrt(1 - x1**2)", lambda a, b: (1 - a) / np.sqrt(1 - b**2), (2, (0, 1)), UNIT, (-0.8, 0.8)
    ),
    "feynman_i_16_6": closed(
        "(x0 + x1)/(1 + x0*x1)", lambda a, b: (a + b) / (1 + a * b), SUM, (-0.8, 0.8), (-0.8, 0.8)
    ),
    "feynman_i_18_4": closed("(1 + x0*x1)/(1 + x0)", lambda a, b: (1 + a * b) / (1 + a), PRODUCT, (0.1, 2), UNIT),
    "feynman_i_26_2": closed(
        "asin(x0*sin(x1))", lambda n, t: np.arcsin(n * np.sin(t)), PRODUCT, (0.1, 0.9), (-pi / 2, pi / 2)
    ),
    "feynman_i_27_6": closed("1/(1 + x0*x1)", lambda a, b: 1 / (1 + a * b), PRODUCT, (0, 2), (0, 2)),
    "feynman_i_29_16": closed(
        "sqrt(1 + x0**2 - 2*x0*cos(x1 - x2))",
        lambda a, t, u: np.sqrt(1 + a**2 - 2 * a * np.cos(t - u)),
        (2, (1, 1)),
        (0.1, 0.8),
        (-pi / 2, pi / 2),
        (-pi / 2, pi / 2),
    ),
    "feynman_i_30_5": closed("asin(x0/x1)", lambda a, n: np.arcsin(a / n), PRODUCT, (-0.9, 0.9), (1, 3)),
    "feynman_i_37_4": closed(
        "1 + x0 + 2*sqrt(x0)*cos(x1)",
        lambda a, d: 1 + a + 2 * np.sqrt(a) * np.cos(d),
        SUM_AND_PRODUCT,
        (0.1, 1),
        (-pi, pi),
    ),
    "feynman_i_40_1": closed("x0*exp(-x1)", lambda n, a: n * np.exp(-a), PRODUCT, UNIT, UNIT),
    "feynman_i_44_4": closed("x0*log(x1)", lambda n, a: n * np.log(a), PRODUCT, UNIT, (0.3, 3)),
    "feynman_i_50_26": closed(
        "cos(x0) + x1*cos(x0)**2", lambda a, b: np.cos(a) + b * np.cos(a) ** 2, SUM_AND_PRODUCT, (-pi / 2, pi / 2), UNIT
    ),
    "feynman_ii_2_42": closed("(x0 - 1)*x1", lambda a, b: (a - 1) * b, PRODUCT, (0, 2), UNIT),
    "feynman_ii_6_15a": closed(
        "x2*sqrt(x0**2 + x1**2)/(4*pi)",
        lambda a, b, c: c * np.sqrt(a**2 + b**2) / (4 * pi),
        (2, (0, 1)),
        (0.1, 1),
        (0.1, 1),
        UNIT,
    ),
    "feynman_ii_11_27": closed("x0*x1/(1 - x0*x1/3)", lambda n, a: n * a / (1 - n * a / 3), PRODUCT, UNIT, (0, 2)),
    "feynman_ii_35_18": closed(
        "x0/(exp(x1) + exp(-x1))", lambda n, a: n / (np.exp(a) + np.exp(-a)), ((0, 2), 1), UNIT, (-2, 2)
    ),
    "feynman_ii_36_38": closed("x0 + x1*x2", lambda a, b, c: a + b * c, SUM_AND_PRODUCT, UNIT, UNIT, UNIT),
    "feynman_ii_38_3": closed("x0/x1", lambda a, b: a / b, PRODUCT, UNIT, (0.5, 2)),
    "feynman_iii_10_19": closed(
        "sqrt(1 + x0**2 + x1**2)", lambda a, b: np.sqrt(1 + a**2 + b**2), SUM, (-2, 2), (-2, 2)
    ),
    "feynman_iii_17_37": closed(
        "x0*(1 + x1*cos(x2))", lambda b, a, t: b * (1 + a * np.cos(t)), ((1, 1), (0, 1)), UNIT, UNIT, (-pi, pi)
    ),
}


@register_task("functions")
class Functions(RegressionTask):
    """A known function at random points of a box, float32, computed in float64; the score is the error's root mean.

    The box is [-1, 1]^d, but for the formulas of physics.

    | function | value |
    |---|---|
    | `j0` | J0(20 x) |
    | `exp_sin` | exp(sin(pi x) + y^2) |
    | `xy` | x y |
    | `exp_mean_100d` | exp(mean of sin^2(pi xi / 2)), i = 1..100 |
    | `exp_sin_4d` | exp((sin(pi (x1^2 + x2^2)) + sin(pi (x3^2 + x4^2))) / 2) |
    | `ellipj` (sn), `ellipkinc`, `ellipeinc`, `jv`, `yv`, `kv`, `iv` | scipy.special's function of that name |
    | `lpmv_0`, `lpmv_1`, `lpmv_2` | associated Legendre function of order 0, 1, 2 and real degree |
    | `sph_harm_0_1`, `_1_1`, `_0_2`, `_1_2`, `_2_2` | real part of the spherical harmonic of that order and degree |
    | `feynman_i_6_2`, …, `feynman_iii_17_37` | 22 formulas of physics: `FUNCTIONS[name].text` |

    The first five are formulas of the paper, word for word; the fifteen next are its special functions. It does not
    say over which arguments it took those. Here both inputs are moved to 0..1 (the second one of `yv` and `kv`, which
    are infinite at 0, to 0.1..1), and those of the spherical harmonics go over the whole sphere. Errors on these are
    therefore not to be compared with the paper's.

    The formulas of physics are those of its table of the Feynman data set, without units, but for five of it. Their
    inputs lie in `FUNCTIONS[name].ranges`, chosen here, so that no pole is within.

    The seven functions of S-KAN (arXiv 2408.08338) are not here as such: which they are could not be verified.

    Args:
        function: Which function.
        train_size: Number of points to train on.
        test_size: Number of points to validate on, and of others to test on.
        noise: Standard deviation of the Gaussian noise on training and validation targets, in the function's own unit.
            Test targets are exact.
        data_dir: Not needed.
        seed: Not needed: the points are the same in every run.

    Raises:
        ValueError: If there is no such function, or another option is out of range.
    """

    def __init__(
        self,
        *,
        function: str = "exp_sin",
        train_size: int = 1000,
        test_size: int = 1000,
        noise: float = 0.0,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        self.function = choice("function", function, FUNCTIONS)
        self.input_shape = (FUNCTIONS[function].inputs,)
        most = MAX_VALUES // FUNCTIONS[function].inputs
        whole_number("train_size", train_size, 1, most)
        whole_number("test_size", test_size, 1, most)
        number("noise", noise, 0.0, 1e6)
        self.train = self._split(0, train_size, noise)
        self.val = self._split(1, test_size, noise)
        self.test = self._split(2, test_size, 0.0)

    @property
    def hidden(self) -> list[Any]:
        """Hidden levels of a small `KAN` that can be this function, for `model.hidden=task`; empty if none is known."""
        levels = FUNCTIONS[self.function].hidden
        return [level if isinstance(level, int) else list(level) for level in levels]

    def truth(self, inputs: torch.Tensor) -> torch.Tensor:
        """Values (N, 1) of the function at inputs (N, d), float64, without noise and without the targets' rounding."""
        values = FUNCTIONS[self.function].formula(*inputs.detach().cpu().double().numpy().T)
        return torch.from_numpy(np.asarray(values, dtype=np.float64)).unsqueeze(1)

    @property
    def formula(self) -> str:
        """The function as sympy reads it, with inputs x0, x1, …; empty where there is no closed formula."""
        return FUNCTIONS[self.function].text

    def pictures(self, model: nn.Module) -> dict[str, Picture]:
        """A function of two inputs, and the model's, over the box; none of functions of fewer or more."""
        if self.input_shape != (2,):
            return {}
        (x0, x1), (y0, y1) = FUNCTIONS[self.function].ranges or (UNIT, UNIT)
        middles = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
        y, x = torch.meshgrid(y0 + (y1 - y0) * middles, x0 + (x1 - x0) * middles, indexing="ij")
        points = torch.stack([x, y], -1).flatten(0, 1)
        target, output = (values.reshape(CELLS, CELLS) for values in (self.truth(points), outputs(model, points)))
        figure = compared(target, output, (x0, x1, y0, y1))
        return {"function": Picture(figure, f"{self.function} over its box, the first input to the right.")}

    def _split(self, part: int, size: int, noise: float) -> TensorSplit:
        """Points of one part; those of the others do not depend on its size, nor any point on the noise."""
        points = np.random.RandomState([SPLIT_SEED, part]).uniform(-1, 1, (size, *self.input_shape))
        if ranges := FUNCTIONS[self.function].ranges:
            low, high = np.array(ranges).T
            points = low + (high - low) * (points + 1) / 2
        inputs = points.astype(np.float32)  # before the function is computed, so that its values are right for these
        values = np.asarray(FUNCTIONS[self.function].formula(*inputs.T.astype(np.float64)))
        if noise:
            values = values + noise * np.random.RandomState([SPLIT_SEED, part, 1]).standard_normal(size)
        return TensorSplit(torch.from_numpy(inputs), torch.from_numpy(values.astype(np.float32)).unsqueeze(1))
