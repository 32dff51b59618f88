"""How numbers and lists are written."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from archzoo.report.stats import Interval

NOTHING = "–"
_FRACTION = re.compile(r"(^|_)(accuracy|acc|top\d+|f1|precision|recall|auroc|iou|success|error_rate)($|_)")


@dataclass(frozen=True, slots=True)
class Scale:
    """How scores of one metric are written: fractions such as accuracy in per cent, others as they are."""

    metric: str
    percent: bool
    decimals: int | None
    """Digits behind the point; None: four significant digits each, for scores of very different size."""

    @classmethod
    def of(cls, metric: str, values: Sequence[float]) -> "Scale":
        """The scale that suits these values."""
        if _FRACTION.search(metric.lower()) and all(0 <= value <= 1 for value in values):
            return cls(metric, True, 2)
        sizes = [abs(value) for value in values if value]
        if not sizes or max(sizes) / min(sizes) > 100 or not 1e-3 <= max(sizes) < 1e6:
            return cls(metric, False, None)
        return cls(metric, False, min(6, max(0, 3 - math.floor(math.log10(max(sizes))))))

    @property
    def factor(self) -> float:
        """Multiplies a score into the unit that it is shown in."""
        return 100.0 if self.percent else 1.0

    @property
    def unit(self) -> str:
        """Unit of a score, with its leading space."""
        return " %" if self.percent else ""

    @property
    def difference_unit(self) -> str:
        """Unit of a difference, with its leading space."""
        return " points" if self.percent else ""

    def value(self, score: float | None, sign: bool = False) -> str:
        """A score or, with its sign, a difference; without the unit."""
        if score is None:
            return NOTHING
        shown = self.factor * score
        text = f"{shown:+.4g}" if self.decimals is None else f"{shown:+.{self.decimals}f}"
        if not sign:
            return text.removeprefix("+") if float(text) else text.lstrip("+-")
        return text if float(text) else text.replace("-", "+")

    def amount(self, difference: float) -> str:
        """Size of a difference, with its unit."""
        return self.value(abs(difference)) + self.difference_unit

    def interval(self, interval: Interval | None, sign: bool = False) -> str:
        """`[low, high]`, or a word where there is none."""
        if interval is None:
            return NOTHING
        if interval.low is None:
            return "no CI (1 seed)"
        return f"[{self.value(interval.low, sign)}, {self.value(interval.high, sign)}]"

    def plus_minus(self, interval: Interval | None, sign: bool = False) -> str:
        """`mean ±half`, where half is half the interval's length; the mean alone where there is none."""
        if interval is None:
            return NOTHING
        half = interval.half_width
        told = f"{half:.2g}" if self.decimals is None and half else self.value(half)
        return self.value(interval.mean, sign) + (f" ±{told}" if half is not None else "")


RATIO = Scale("ratio", False, 2)
"""How multiples of the baseline are written."""


def count(value: float | None) -> str:
    """8,957; from a million on 1.23 M."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) < 1e6 else si(value)


def si(value: float | None) -> str:
    """12.3 k, 4.56 M, …"""
    if value is None:
        return NOTHING
    return _prefixed(value, 1000.0, ("", " k", " M", " G", " T", " P", " E"))


def size(value: float | None) -> str:
    """Bytes: 12.3 MiB."""
    if value is None:
        return NOTHING
    return _prefixed(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def duration(value: float | None) -> str:
    """Seconds: 1.20 ms, 12.3 s, 2 min 05 s, 3 h 07 min."""
    if value is None:
        return NOTHING
    if value >= 3570:
        minutes = round(value / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if value >= 99.95:
        seconds = round(value)
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if value <= 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 0.9995:
            return f"{_three(value * factor)} {unit}"
    return f"{_three(value * 1e9)} ns"


def times(value: float | None, reference: float | None) -> str:
    """2.31 x; the dash where one is missing."""
    return NOTHING if value is None or not reference else f"{_three(value / reference)} x"


def p_text(p: float | None) -> str:
    """0.25, 0.031, < 0.001."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def p_words(p: float) -> str:
    """p = 0.031, p < 0.001."""
    return f"p = {p_text(p)}".replace("= <", "<")


def plural(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listing(names: Sequence[str]) -> str:
    """A, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if not value:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    if round(abs(value), decimals) >= 10 ** (3 - decimals) and decimals:  # 9.999 -> 10.0
        decimals -= 1
    return f"{value:.{decimals}f}"


def _prefixed(value: float, base: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if abs(value) < base * 0.9995:
            return f"{value:.0f}{unit}" if unit == units[0] and value == int(value) else f"{_three(value)}{unit}"
        value /= base
    return f"{_three(value)}{units[-1]}"
