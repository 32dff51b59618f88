"""The statistics of a comparison: intervals over seeds, paired tests, and what a number of seeds can show at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

LEVEL = 0.95
ALPHA = 0.05
BOOTSTRAP_FROM = 10
"""Number of seeds from which the interval is a bootstrap one; below, resampling so few values is too narrow."""
RESAMPLES = 9999
EXACT_UP_TO = 13
"""Number of seeds up to which all 2^n sign flips are tried."""

Method = Literal["none", "constant", "t", "BCa"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval. One value has none: `low` and `high` are None."""

    mean: float
    low: float | None
    high: float | None
    count: int
    method: Method

    @property
    def half_width(self) -> float | None:
        """Half the interval's length."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval: Student's t for fewer than 10 values, BCa bootstrap from 10 on.

    Equal values give an interval without width (`method="constant"`); a bootstrap that degenerates falls back to t.
    The bootstrap's random numbers are the same at every call.

    Raises:
        ValueError: If there is no value.
    """
    count = len(values)
    if not count:
        raise ValueError("values=[]: a mean needs at least one value")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None, count, "none")
    if max(values) == min(values):
        return Interval(values[0], values[0], values[0], count, "constant")
    if count >= BOOTSTRAP_FROM:
        low, high = _bca(values)
        if math.isfinite(low) and math.isfinite(high):
            return Interval(mean, low, high, count, "BCa")
    low, high = _student(mean, math.sqrt(_variance(values) / count), count - 1)
    return Interval(mean, low, high, count, "t")


def welch_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of b less mean of a with a 95 % interval that takes neither pairing nor equal variances (Welch)."""
    difference = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    count = min(len(a), len(b))
    if count < 2:
        return Interval(difference, None, None, count, "none")
    parts = [_variance(values) / len(values) for values in (a, b)]
    if not sum(parts):
        return Interval(difference, difference, difference, count, "constant")
    # Welch and Satterthwaite's degrees of freedom
    freedom = sum(parts) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(parts, (a, b), strict=True))
    low, high = _student(difference, math.sqrt(sum(parts)), freedom)
    return Interval(difference, low, high, count, "t")


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired permutation test on the mean; None for fewer than two pairs.

    Under the null hypothesis the two contestants of a pair may be exchanged, which flips its difference's sign. All 2^n
    flips are tried for up to 13 pairs, 9999 random ones beyond.
    """
    count = len(differences)
    if count < 2:
        return None
    if not any(differences):
        return 1.0
    import numpy as np
    from scipy import stats

    result = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=2**EXACT_UP_TO if count <= EXACT_UP_TO else RESAMPLES,
        vectorized=True,
        **_rng(),
    )
    return min(1.0, float(result.pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction. A None stays None and does not count as a comparison."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for done, (p, i) in enumerate(order):
        running = max(running, min(1.0, p * (len(order) - done)))
        adjusted[i] = running
    return adjusted


def smallest_p(count: int) -> float:
    """The smallest two-sided p that a sign-flip test of that many pairs can give: 2 / 2^n."""
    return min(1.0, 2.0 ** (1 - count))


def seeds_needed(comparisons: int = 1, alpha: float = ALPHA) -> int:
    """Common seeds needed before the smallest attainable p, Holm-corrected over that many comparisons, is <= alpha.

    >>> seeds_needed(), seeds_needed(5)
    (6, 8)
    """
    return math.ceil(math.log2(2 * max(1, comparisons) / alpha))


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    from scipy import stats

    interval = stats.binomtest(successes, count).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def _student(mean: float, error: float, freedom: float) -> tuple[float, float]:
    from scipy import stats

    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return mean - half, mean + half


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _bca(values: Sequence[float]) -> tuple[float, float]:
    import warnings

    import numpy as np
    from scipy import stats

    with warnings.catch_warnings():  # degenerate data: the caller sees the NaN
        warnings.simplefilter("ignore")
        interval = stats.bootstrap(
            (np.asarray(values),), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="BCa", **_rng()
        ).confidence_interval
    return float(interval.low), float(interval.high)


def _rng() -> dict[str, Any]:
    """The keyword for a fixed generator; scipy 1.15 renamed it."""
    import numpy as np
    import scipy

    major, minor = (int(part) for part in scipy.__version__.split(".")[:2])
    return {"rng" if (major, minor) >= (1, 15) else "random_state": np.random.default_rng(0)}
