"""How a score falls as the parameters grow: the points of each series, and the power law through them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from archzoo.report.contestants import Comparison
from archzoo.report.ranking import Row


@dataclass(frozen=True, slots=True)
class Point:
    """A contestant of a series: its parameters, and its scores over the seeds."""

    row: Row
    parameters: int
    median: float
    low: float
    """The lowest seed's score."""
    high: float


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """score = factor * parameters ^ -exponent, by least squares of log score on log parameters."""

    exponent: float
    error: float | None
    """Standard error of the exponent, of the scatter about the line; None for two points, which have none."""
    factor: float
    points: int

    def __call__(self, parameters: float) -> float:
        """The score that it gives for so many parameters."""
        return self.factor * float(parameters**-self.exponent)


@dataclass(frozen=True, slots=True)
class Series:
    """One contestant at several sizes, on one task."""

    label: str
    layer: str
    points: tuple[Point, ...]
    """Fewest parameters first."""
    law: PowerLaw | None
    """Through all points; None where fewer than two counts have a score, where a score is not positive, and for scores
    that are the better the larger they are."""


def all_series(comparison: Comparison, rows: Sequence[Row]) -> list[Series]:
    """The series of one task, by label. Contestants without a score or a parameter count are no points of it."""
    found: dict[str, list[Point]] = {row.series: [] for row in rows if row.series}
    layers = {row.series: row.layer for row in rows}
    for row in rows:
        if row.series and row.values and row.parameters:
            points = found[row.series]
            points.append(Point(row, row.parameters, statistics.median(row.values), min(row.values), max(row.values)))
    series = []
    for label, points in sorted(found.items()):
        points.sort(key=lambda point: (point.parameters, point.row.label))
        law = power_law([(p.parameters, p.median) for p in points]) if comparison.mode == "min" else None
        series.append(Series(label, layers[label], tuple(points), law))
    return series


def power_law(points: Sequence[tuple[float, float]]) -> PowerLaw | None:
    """The power law through (parameters, score); None where there is none.

    >>> round(power_law([(100, 1e-2), (200, 1e-2 / 16), (400, 1e-2 / 256)]).exponent, 6)
    4.0
    """
    if any(y <= 0 for _, y in points) or len({x for x, _ in points}) < 2:
        return None
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    spread = math.fsum((a - x) ** 2 for a in xs)
    slope = math.fsum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread
    error = None
    if len(points) > 2:
        rest = math.fsum((b - y - slope * (a - x)) ** 2 for a, b in zip(xs, ys, strict=True))
        error = math.sqrt(rest / (len(points) - 2) / spread)
    try:
        factor = math.exp(y - slope * x)
    except OverflowError:
        return None
    return PowerLaw(-slope, error, factor, len(points))
