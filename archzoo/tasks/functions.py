"""Fitting known functions: the toy and special functions of the KAN paper (Liu et al. 2024, arXiv 2404.19756)."""

from collections.abc import Callable
from dataclasses import dataclass
from math import factorial, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archzoo.tasks.options import choice, number, whole_number
from archzoo.tasks.split import SPLIT_SEED
from archzoo.tasks.task import RegressionTask, TensorSplit, register_task

MAX_VALUES = 2**28
"""Most input values that a split may hold: 1 GiB of float32."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function to fit.

    Args:
        inputs: Number of its inputs, each from -1 to 1.
        formula: Maps the inputs' columns, float64, to its values.
    """

    inputs: int
    formula: Callable[..., Any]


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


FUNCTIONS = {
    # The toy functions of section 3.1.
    "j0": Function(1, bessel_j0),
    "exp_sin": Function(2, lambda x, y: np.exp(np.sin(pi * x) + y**2)),
    "xy": Function(2, lambda x, y: x * y),
    "exp_mean_100d": Function(100, lambda *x: np.exp(np.mean([np.sin(pi * z / 2) ** 2 for z in x], axis=0))),
    "exp_sin_4d": Function(4, lambda a, b, c, d: np.exp((np.sin(pi * (a**2 + b**2)) + np.sin(pi * (c**2 + d**2))) / 2)),
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
}


@register_task("functions")
class Functions(RegressionTask):
    """A known function at random points of [-1, 1]^d, float32, computed in float64; the score is the error's root mean.

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

    The first five are formulas of the paper, word for word; the fifteen others are its special functions. It does not
    say over which arguments it took those. Here both inputs are moved to 0..1 (the second one of `yv` and `kv`, which
    are infinite at 0, to 0.1..1), and those of the spherical harmonics go over the whole sphere. Errors on these are
    therefore not to be compared with the paper's.

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

    def _split(self, part: int, size: int, noise: float) -> TensorSplit:
        """Points of one part; those of the others do not depend on its size, nor any point on the noise."""
        points = np.random.RandomState([SPLIT_SEED, part]).uniform(-1, 1, (size, *self.input_shape))
        inputs = points.astype(np.float32)  # before the function is computed, so that its values are right for these
        values = np.asarray(FUNCTIONS[self.function].formula(*inputs.T.astype(np.float64)))
        if noise:
            values = values + noise * np.random.RandomState([SPLIT_SEED, part, 1]).standard_normal(size)
        return TensorSplit(torch.from_numpy(inputs), torch.from_numpy(values.astype(np.float32)).unsqueeze(1))
