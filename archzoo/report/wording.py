"""Words that several parts of a report share."""

from collections.abc import Mapping, Sequence

from archzoo.report.contestants import Comparison
from archzoo.report.formatting import NOTHING, RATIO, Scale, listing, plural
from archzoo.report.ranking import Row, baseline_row, by_size
from archzoo.report.reaching import EqualScore
from archzoo.report.runs import STATUSES
from archzoo.report.scaling import PowerLaw, Series
from archzoo.report.stats import Interval


def score_name(comparison: Comparison) -> str:
    """Test accuracy."""
    return " ".join(part for part in (comparison.score_split, comparison.metric) if part)


def score_label(comparison: Comparison, scale: Scale) -> str:
    """What an axis of scores is called: Test accuracy (%)."""
    name = score_name(comparison)
    told = f"{name[:1].upper()}{name[1:]}{' (%)' if scale.percent else ''}"
    return f"{told}, {better(comparison)}" if comparison.mode == "min" else told


def better(comparison: Comparison) -> str:
    """Lower is better."""
    return f"{'lower' if comparison.mode == 'min' else 'higher'} is better"


def statuses_text(statuses: Mapping[str, int]) -> str:
    """3 done, 1 diverged."""
    return ", ".join(f"{statuses[status]} {status}" for status in STATUSES if statuses.get(status))


def ratio_text(equal: EqualScore, ratio: Interval) -> str:
    """0.52 x; where it may have been less, <= 0.52 x."""
    return f"{'≤ ' if equal.at_most else ''}{RATIO.value(ratio.mean)} x"


def reached_text(equal: EqualScore) -> str:
    """In 2 of 3 seeds; how many have no curve."""
    told = f"in {equal.reached} of {plural(len(equal.seeds), 'seed')}"
    return told + (f", {equal.without_curve} more without a curve" if equal.without_curve else "")


def equal_score(comparison: Comparison, rows: Sequence[Row]) -> str:
    """A sentence on the steps and seconds to the baseline's validation score; empty without curves."""
    told = []
    for row in rows:
        equal = row.equal
        if equal is None or row.baseline:
            continue
        if equal.steps is None:
            told.append(f"{row.label} got there {reached_text(equal)}")
            continue
        most = "≤ " if equal.at_most else ""
        words = f"{row.label} {most}{RATIO.plus_minus(equal.steps)} x its steps"
        if equal.seconds is not None:
            words += f" and {most}{RATIO.plus_minus(equal.seconds)} x its seconds"
        told.append(words)
    base = baseline_row(rows)
    of = base.label if base and len(by_size(rows)) == 1 else "the baseline"
    return f"To {of}'s best validation {comparison.metric}: {'; '.join(told)}." if told else ""


def exponents(series: Sequence[Series], comparison: Comparison) -> str:
    """A sentence on how the score falls with the parameters; empty where no power law could be fitted."""
    told = exponents_of(series)
    return f"Exponent α of {score_name(comparison)} ~ parameters^-α, ± its standard error: {told}." if told else ""


def exponents_of(series: Sequence[Series]) -> str:
    """kan 3.18 ± 0.09 and linear 1.43 ± 0.10."""
    told = [f"{s.label} {exponent(s.law)}" for s in series if s.law]
    return listing(told) if told else ""


def exponent(law: PowerLaw | None) -> str:
    """3.92 ± 0.21; without an error where there are two points only."""
    if law is None:
        return NOTHING
    return f"{law.exponent:z.2f}" + (f" ± {law.error:.2f}" if law.error is not None else "")
