"""From where to where the axes of a picture go."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from archzoo.report.contestants import Comparison
from archzoo.report.formatting import Scale
from archzoo.report.ranking import Row

if TYPE_CHECKING:
    import numpy as np


def score_limits(rows: Sequence[Row], scale: Scale, log: bool) -> tuple[float, float]:
    """Shows every seed; of intervals, no more than as much again as the seeds span (few seeds have huge ones)."""
    values = [scale.factor * value for row in rows for value in row.values]
    ends = [scale.factor * e for row in rows if row.score for e in (row.score.low, row.score.high) if e is not None]
    low, high = min(values), max(values)
    if log:
        ratio = (high / low) ** 0.25
        return max(min([low, *(e for e in ends if e > 0)]), low / ratio) / 1.15, min(
            max([high, *ends]), high * ratio
        ) * 1.15
    span = high - low or abs(high) * 0.02 or 1.0
    shown_low, shown_high = max(min([low, *ends]), low - 0.6 * span), min(max([high, *ends]), high + 0.6 * span)
    margin = 0.05 * (shown_high - shown_low) or span / 2
    shown_low, shown_high = shown_low - margin, shown_high + margin
    if scale.percent:
        shown_high = min(shown_high, 100 + 0.04 * (100 - shown_low))
        shown_low = max(shown_low, -0.04 * shown_high)
    return shown_low, shown_high


def log_scores(comparison: Comparison, rows: Sequence[Row]) -> bool:
    """Whether the axis of scores is to be logarithmic: errors of very different size."""
    values = [value for row in rows for value in row.values]
    return comparison.mode == "min" and min(values) > 0 and max(values) / min(values) > 20


def cost_limits(xs: Sequence[float], log: bool) -> tuple[float, float]:
    """Shows every cost."""
    low, high = min(xs), max(xs)
    if log:
        ratio = (high / low) ** 0.12
        return low / ratio, high * ratio
    margin = max(0.12 * (high - low), 0.12 * high)  # equal costs must not be blown up to a difference
    return max(0.0, low - margin), high + margin


def curve_limits(values: "np.ndarray", last: "np.ndarray", mode: str, log: bool) -> tuple[float, float]:
    """The range of all curves, less the far-off beginning that would press their ends together."""
    lowest, highest = float(values.min()), float(values.max())
    if log:
        return lowest / 1.15, highest * 1.15
    room = max(4 * float(last.max() - last.min()), 0.12 * (highest - lowest))
    if mode == "max":
        lowest = max(lowest, float(last.min()) - room)
    else:
        highest = min(highest, float(last.max()) + room)
    margin = 0.04 * (highest - lowest) or abs(highest) * 0.05 or 0.05
    return lowest - margin, highest + margin
