"""Distributions in the plane, for generators."""

from collections.abc import Callable
from math import pi

import numpy as np

Array = np.ndarray


def _two_moons(rng: np.random.RandomState, count: int) -> Array:
    """Two half circles of radius 1 that reach into each other, with noise of 0.05; as scikit-learn's."""
    angle, lower = rng.uniform(0, pi, count), rng.randint(0, 2, count) == 1
    x = np.where(lower, 1 - np.cos(angle), np.cos(angle))
    y = np.where(lower, 0.5 - np.sin(angle), np.sin(angle))
    return np.stack([x, y], 1) + 0.05 * rng.standard_normal((count, 2))


def _eight_gaussians(rng: np.random.RandomState, count: int) -> Array:
    """Eight normal distributions, of deviation 0.2, on a circle of radius 2."""
    angle = rng.randint(0, 8, count) * (pi / 4)
    return 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.2 * rng.standard_normal((count, 2))


def _checkerboard(rng: np.random.RandomState, count: int) -> Array:
    """The black squares of a board of 4 x 4, from -2 to 2."""
    row = rng.randint(0, 4, count)
    column = 2 * rng.randint(0, 2, count) + row % 2
    return np.stack([column, row], 1) - 2 + rng.uniform(0, 1, (count, 2))


def _circles(rng: np.random.RandomState, count: int) -> Array:
    """Two circles of radius 0.75 and 1.5, with noise of 0.05."""
    angle, radius = rng.uniform(0, 2 * pi, count), 0.75 * rng.randint(1, 3, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) + 0.05 * rng.standard_normal((count, 2))


SHAPES: dict[str, Callable[[np.random.RandomState, int], Array]] = {
    "two_moons": _two_moons,
    "eight_gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
    "circles": _circles,
}
"""Name -> a function of (generator, count) that draws points (count, 2)."""
