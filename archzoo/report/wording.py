"""Numbers and sentences of the report. A lead that the seeds cannot separate is never called a win."""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from archzoo.report.load import Comparison, Run, settings
from archzoo.report.ranking import Row, by_size, improves
from archzoo.report.reaching import EqualScore
from archzoo.report.scaling import PowerLaw, Series, all_series
from archzoo.report.stats import (
    ALPHA,
    BOOTSTRAP_FROM,
    EXACT_UP_TO,
    RESAMPLES,
    Interval,
    seeds_needed,
    smallest_p,
)

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


def seeds_text(number: int) -> str:
    """1 seed, 3 seeds."""
    return plural(number, "seed")


def plural(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def statuses_text(statuses: Mapping[str, int]) -> str:
    """3 done, 1 diverged."""
    order = ("done", "running", "interrupted", "diverged", "failed", "unknown")
    return ", ".join(f"{statuses[status]} {status}" for status in order if statuses.get(status))


def ratio_text(equal: EqualScore, ratio: Interval) -> str:
    """0.52 x; where it may have been less, <= 0.52 x."""
    return f"{'≤ ' if equal.at_most else ''}{RATIO.value(ratio.mean)} x"


def reached_text(equal: EqualScore) -> str:
    """In 2 of 3 seeds; how many have no curve."""
    told = f"in {equal.reached} of {seeds_text(len(equal.seeds))}"
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
    base = _base(rows)
    of = base.label if base and len(by_size(rows)) == 1 else "the baseline"
    return f"To {of}'s best validation {comparison.metric}: {'; '.join(told)}." if told else ""


def tuned_caveats(rows: Sequence[Row]) -> list[str]:
    """What there is to mind about what was tuned, contestant by contestant."""
    doubtful = [(row.label, row.tuning.warnings) for row in rows if row.tuning is not None and row.tuning.warnings]
    if len(doubtful) > _MOST_NAMED:
        tuned = sum(row.tuning is not None for row in rows)
        return [f"Tuning: there is something to mind for {len(doubtful)} of {tuned} contestants; the table Tuned says."]
    return [f"Tuning of {label}: {'; '.join(warnings)}." for label, warnings in doubtful]


def listing(names: Sequence[str]) -> str:
    """A, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who leads, in a sentence; how sure and at what cost, in a few more; what to mind."""

    sentence: str
    details: tuple[str, ...]
    caveats: tuple[str, ...]


def score_name(comparison: Comparison) -> str:
    """Test accuracy."""
    return " ".join(part for part in (comparison.score_split, comparison.metric) if part)


def score_label(comparison: Comparison, scale: Scale) -> str:
    """What an axis of scores is called: Test accuracy (%)."""
    name = score_name(comparison)
    better = ", lower is better" if comparison.mode == "min" else ""
    return f"{name[:1].upper()}{name[1:]}{' (%)' if scale.percent else ''}{better}"


def verdict(comparison: Comparison, rows: Sequence[Row], scale: Scale) -> Verdict:
    """The verdict on one task's rows."""
    caveats = _caveats(comparison, rows)
    contests = by_size(rows)
    if len(contests) > 1:
        judged = _of_sizes(comparison, contests, scale)
    else:
        judged = _of_one_size(comparison, rows, scale, caveats)
    laws = exponents(all_series(comparison, rows), comparison)
    return Verdict(judged.sentence, (*judged.details, laws) if laws else judged.details, caveats)


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


def _of_sizes(comparison: Comparison, contests: Mapping[str, Sequence[Row]], scale: Scale) -> Verdict:
    """Who leads at which size, and the sentence on each size."""
    places: dict[tuple[str, bool], list[str]] = {}
    details: list[str] = []
    power: list[str] = []
    for size, labelled in contests.items():
        rows = [replace(row, label=row.series or row.label) for row in labelled]  # the size is said anyway
        scored = [row for row in rows if row.score is not None]
        judged = _of_one_size(comparison.at(size), rows, scale, ())
        details.append(f"At {size}: {judged.sentence}")
        power += [line for line in _power(scored) if not power]
        if len(scored) > 1:
            won = not any(row.ties_leader for row in scored)
            places.setdefault((scored[0].label, won), []).append(size)
    if not places:
        return Verdict("No winner: at no size are there two contestants with a score.", tuple(details), ())
    ordered = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
    told = []
    for (label, won), at in ordered:
        where = f"all {len(at)} sizes" if len(at) == len(contests) else _sizes(at)
        told.append(f"{label} {'wins' if won else 'leads'} at {where}")
    doubt = "" if any(won for _, won in places) else "; no lead is separable from all others"
    return Verdict(f"{'; '.join(told)}{doubt}.", (*details, *power), ())


def _sizes(sizes: Sequence[str]) -> str:
    """100, 200 and 400 parameters; width 16 and 32."""
    if all(size.startswith("width ") for size in sizes):
        return f"width {listing([size.removeprefix('width ') for size in sizes])}"
    numbers, units = zip(*(size.rsplit(" ", 1) for size in sizes), strict=True)
    return f"{listing(numbers)} {units[0]}" if len(set(units)) == 1 else listing(sizes)


def _of_one_size(comparison: Comparison, rows: Sequence[Row], scale: Scale, caveats: tuple[str, ...]) -> Verdict:
    name = score_name(comparison)
    scored = [row for row in rows if row.score is not None]
    if not scored:
        runs = plural(len(comparison.runs), "run")
        told = statuses_text(
            {s: sum(row.statuses.get(s, 0) for row in rows) for s in ("running", "interrupted", *_BAD)}
        )
        return Verdict(f"No winner: none of {runs} has a score yet ({told or 'all without a score'}).", (), caveats)
    leader = scored[0]
    assert leader.score is not None
    if len(scored) == 1:
        others = f"; {plural(len(rows) - 1, 'other contestant')} has no score" if len(rows) == 2 else ""
        others = f"; {len(rows) - 1} other contestants have no score" if len(rows) > 2 else others
        sentence = f"{leader.label} has nothing to be compared with{others}."
        reached = f"It reached {_score_words(leader, scale)} {name} with {seeds_text(leader.count)}."
        return Verdict(sentence, (reached,), caveats)

    base = next((row for row in scored if row.baseline), None)
    rival = base if base is not None and base is not leader else scored[1]
    if base is leader:
        sentence, details = _against(rival, leader, comparison, scale, leader_is_base=True)
    elif base is not None:
        sentence, details = _against(leader, rival, comparison, scale)
    else:
        sentence, details = _without_baseline(leader, rival, comparison, scale)
    tied = [row.label for row in scored if row.ties_leader and not (row is rival and "not separable" in sentence)]
    if tied:
        also = "also " if "not separable" in sentence else ""
        details.append(f"The lead is {also}not separable from {listing(tied)}.")
    details.extend(_cost(leader, rival, base))
    details.extend(_power(scored))
    return Verdict(sentence, tuple(details), caveats)


_BAD = ("diverged", "failed", "unknown")
_MOST_NAMED = 4


def _score_words(row: Row, scale: Scale) -> str:
    assert row.score is not None
    words = scale.value(row.score.mean) + scale.unit
    return words if row.score.low is None else f"{words} (95 % CI {scale.interval(row.score)})"


def _against(
    row: Row, base: Row, comparison: Comparison, scale: Scale, leader_is_base: bool = False
) -> tuple[str, list[str]]:
    """Sentence and details for a contestant and the baseline, one of which leads."""
    assert row.score is not None
    assert base.score is not None
    first, second = (base, row) if leader_is_base else (row, base)
    assert first.score is not None
    assert second.score is not None
    name = score_name(comparison)
    means = (
        f"{scale.value(first.score.mean)}{scale.unit} against {scale.value(second.score.mean)}{scale.unit} {name}"
        f"{', where lower is better' if comparison.mode == 'min' else ''}"
    )
    who = f"{first.label} (the baseline)" if leader_is_base else first.label
    lead = abs(first.score.mean - second.score.mean)
    if row.difference is None:
        sentence = f"{who} has the best mean, {scale.amount(lead)} ahead of {second.label}, not separable from it: "
        return sentence + "they have no seed in common.", [f"{means}."]
    gain = improves(row.difference.mean, comparison.mode) is not leader_is_base and row.difference.mean != 0
    seeds = seeds_text(row.common_seeds)
    test = f"paired difference {_signed(row.difference, scale)} over {seeds}"
    test += f", p = {p_text(row.p_holm)}".replace("= <", "<") if row.p_holm is not None else ", too few for a test"
    detail = f"{means}; {test}."
    if row.difference.mean == 0:
        same = "have the same mean" if lead == 0 else f"have the same mean over the {seeds} in common"
        return f"{who} and {second.label} {same}, not separable.", [detail]
    by = scale.amount(row.difference.mean)
    if not gain:  # the seeds that only one of them has made it the leader
        what = "it is not separable from" if row.tie else "it is beaten by"
        behind = f"over the {seeds} in common {what} {second.label}, {by} ahead"
        return f"{who} has the best mean, but {behind}.", [detail]
    if row.tie is False:
        nearest = ", the best of the others," if leader_is_base else ""
        return f"{who} beats {second.label}{nearest} by {by}.", [detail]
    return f"{who} leads by {by}, not separable from {second.label} with {seeds}.", [detail]


def _without_baseline(leader: Row, rival: Row, comparison: Comparison, scale: Scale) -> tuple[str, list[str]]:
    assert leader.score is not None
    assert rival.score is not None
    name = score_name(comparison)
    lead = scale.amount(leader.score.mean - rival.score.mean)
    seeds = seeds_text(min(leader.count, rival.count))
    p = f"p = {p_text(rival.p_leader)}".replace("= <", "<") if rival.p_leader is not None else "too few for a test"
    details = [
        f"{scale.value(leader.score.mean)}{scale.unit} against {scale.value(rival.score.mean)}{scale.unit} {name}"
        f"{', where lower is better' if comparison.mode == 'min' else ''}; {p}. The comparison has no baseline."
    ]
    if rival.ties_leader:
        return f"{leader.label} leads by {lead}, not separable from {rival.label} with {seeds}.", details
    return f"{leader.label} beats {rival.label}, the second, by {lead}.", details


def _signed(interval: Interval, scale: Scale) -> str:
    words = scale.value(interval.mean, sign=True) + scale.difference_unit
    return words if interval.low is None else f"{words} (95 % CI {scale.interval(interval, sign=True)})"


def _cost(leader: Row, rival: Row, base: Row | None) -> list[str]:
    """What the leader costs against the baseline, or the second where it is the baseline or there is none."""
    other = base if base is not None and base is not leader else rival
    parts = []
    steps = f" ({duration(leader.step_time_s)} against {duration(other.step_time_s)})"
    for ratio, words in (
        (times(leader.step_time_s, other.step_time_s), f"the step time{steps}"),
        (times(leader.parameters, other.parameters), "the parameters"),
        (times(leader.flops, other.flops), "the FLOPs"),
        (times(leader.memory_bytes, other.memory_bytes), f"the memory ({leader.memory_kind})"),
    ):
        if ratio != NOTHING:
            parts.append(f"{ratio} {words}")
    if not parts:
        return []
    return [f"Against {other.label}, {leader.label} takes {listing(parts)}."]


def _power(scored: Sequence[Row]) -> list[str]:
    """Says so where so few seeds could not have separated anything."""
    tested = [row for row in scored if row.p_value is not None] or [row for row in scored if row.p_leader is not None]
    most, m = max((row.common_seeds or row.count for row in tested), default=1), max(1, len(tested))
    smallest = min(1.0, smallest_p(most) * m)
    if smallest <= ALPHA or not any(row.tie or row.ties_leader for row in scored):
        return []
    corrected = f", {smallest:.3g} after Holm's correction over {m} comparisons" if m > 1 else ""
    more = f"; with the correction, {seeds_needed(m)}" if seeds_needed(m) > seeds_needed() else ""
    return [
        f"With {seeds_text(most)} the smallest two-sided p that the test can give is {smallest_p(most):.3g}"
        f"{corrected}: {seeds_needed()} common seeds are needed to reach {ALPHA} in one comparison{more}."
    ]


def _caveats(comparison: Comparison, rows: Sequence[Row]) -> tuple[str, ...]:
    caveats = []
    pending = sum(run.status in ("running", "interrupted") for run in comparison.runs)
    if pending:
        caveats.append(
            f"Provisional: {plural(pending, 'run')} of {len(comparison.runs)} "
            f"{'is' if pending == 1 else 'are'} not finished."
        )
    caveats += tuned_caveats(rows)
    known = {name for group in comparison.groups for name in (group.label, group.layer)}
    for absent in sorted({run.baseline for run in comparison.runs if run.baseline} - known):
        caveats.append(f"The baseline that was asked for, {absent}, is not among the contestants.")
    survivors = [
        row.label for row in rows if row.score is not None and any(row.statuses.get(status) for status in _BAD)
    ]
    if survivors:
        caveats.append(f"Mean over the surviving seeds only: {listing(survivors)}.")
    lost = [f"{row.label} ({statuses_text(row.statuses)})" for row in rows if row.score is None]
    if lost and len(lost) < len(rows):
        caveats.append(f"Without a score: {listing(lost)}.")
    off = [(row, row.budget) for row in rows if row.budget and row.budget.within_tolerance is False]
    if 0 < len(off) <= _MOST_NAMED:
        told = listing([f"{row.label} ({budget})" for row, budget in off])
        caveats.append(f"Not within the budget's tolerance: {told}.")
    elif off:
        by = [100 * (budget.deviation or 0.0) for _, budget in off]
        told = f"{len(off)} of {len(rows)} contestants, by {min(by):+.1f} to {max(by):+.1f} %"
        caveats.append(f"Not within the budget's tolerance: {told}; the table of costs has each.")
    for what, values in (
        ("machines", {(run.host, run.cpu, run.device) for run in comparison.runs if run.step_time_s is not None}),
        ("thread counts", {run.threads for run in comparison.runs if run.step_time_s is not None}),
    ):
        if len(values) > 1:
            caveats.append(f"The runs were timed on {len(values)} {what}: step times do not compare.")
    commits = {(run.commit, run.dirty) for run in comparison.runs if run.commit}
    if len({commit for commit, _ in commits}) > 1:
        caveats.append(f"The runs come from {len({commit for commit, _ in commits})} commits of the code.")
    if any(dirty for _, dirty in commits):
        caveats.append("Some runs had uncommitted changes in the code.")
    return tuple(caveats)


def methods(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """How intervals, tests and costs were computed, for the foot of a report."""
    used = {interval.method for row in rows for interval in (row.score, row.difference) if interval is not None}
    tested = sum(row.p_value is not None for row in rows)
    base = next((row.label for row in rows if row.baseline), None)
    shared = max(
        (
            sum(row.layer == base_row.layer for row in contest)
            for contest in by_size(rows).values()
            if (base_row := _base(contest))
        ),
        default=0,
    )
    lines = []
    kinds = []
    sizes = by_size(rows)
    if len(sizes) > 1:
        tested = max(sum(row.p_value is not None for row in contest) for contest in sizes.values())
        base = "the baseline of the same size"
        lines.append("Ranks, differences, tests and ties are among the contestants of one size.")
    if "t" in used:
        kinds.append(f"Student's t over seeds (fewer than {BOOTSTRAP_FROM} seeds)")
    if "BCa" in used:
        kinds.append(
            f"BCa bootstrap over seeds ({BOOTSTRAP_FROM} seeds or more; {RESAMPLES} resamples, fixed generator)"
        )
    if kinds:
        lines.append(f"95 % confidence intervals: {listing(kinds)}. They are of the mean over seeds.")
    if "none" in used:
        lines.append("A contestant with one seed has no confidence interval.")
    if "constant" in used:
        lines.append("Where all seeds gave one value the interval has no width; that is no proof of no variance.")
    if base is not None:
        lines.append(
            f"Differences are contestant minus {base}, paired by seed. Test: paired permutation test (sign flips of "
            f"the paired differences, two-sided; exact up to {EXACT_UP_TO} pairs, {RESAMPLES} random flips beyond)."
        )
        if shared > 1:
            lines.append(f"Of {shared} contestants with its layer the one with the best mean is the baseline.")
    else:
        lines.append("No contestant is the baseline; the others are tested against the leader only.")
    if tested > 1:
        lines.append(f"p values are Holm-corrected over the {tested} comparisons with the baseline.")
    elif tested == 1:
        lines.append("There is one comparison with the baseline, so p needs no correction.")
    lines.append(
        f"Not separable, a tie: p > {ALPHA}, or no test possible. {seeds_needed()} common seeds are the fewest with "
        f"which one comparison can reach {ALPHA}: n pairs give no p below 2/2^n."
        + (
            f" With {tested} comparisons it takes {seeds_needed(tested)}."
            if seeds_needed(tested) > seeds_needed()
            else ""
        )
    )
    if any(row.tie and row.difference and _excludes_zero(row.difference) for row in rows):
        lines.append(
            "An interval may leave out 0 beside a tie: it is of one difference alone and, as Student's t, takes the "
            "differences for normal; the test assumes neither, and is corrected."
        )
    lines.append(
        "Ties with the leader are found by the same test, Holm-corrected over its rivals. The leader was picked by its "
        "mean, so that this test is a guide."
    )
    lines.append(
        f"Only runs that are done count. Scores are {score_name(comparison)}"
        f" ({'lower' if comparison.mode == 'min' else 'higher'} is better). Step time, samples/s and memory are "
        "medians over runs; step time is each run's median. FLOPs are of one sample's forward pass; a multiply and "
        "an add count 1 each."
    )
    series = all_series(comparison, rows)
    if series:
        drawn = "Score against parameters: medians over seeds"
        fitted = [s.law for s in series if s.law]
        lines.append(
            f"{drawn}, all points of a series; the exponent is of a least-squares line through the logarithms of both, "
            "its standard error of the scatter about it. A score that has reached its floor (rounding, noise, "
            "optimisation) makes it smaller."
            if fitted
            else f"{drawn}."
        )
    if any(row.tuning is not None for row in rows):
        keys = sorted({key for run in comparison.runs for key in run.tuned})
        lines.append(
            f"Tuned: {listing(keys)}. Of the values tried a contestant is shown at the one with the best validation "
            "score (each run's best evaluation), mean over the seeds that all its values have; a value of which a run "
            "diverged loses. The test score has no say. All other figures are of the runs at the chosen value."
        )
    if any(row.equal is not None and not row.baseline for row in rows):
        lines.append(
            "Steps and seconds to equal score: where a contestant's best validation score so far first is the best "
            "one of the baseline in the same seed, in units of what the baseline itself takes to get there; linear "
            "between evaluations; mean and 95 % confidence interval over seeds. No mean is given unless every seed "
            "gets there; a diverged run does not. ≤: the first evaluation was already as good. Seconds are of "
            "training, evaluations and checkpoints left out."
        )
    if any("success" in row.figures for row in rows):
        lines.append(
            "Success rates are over the runs that ended, where a diverged run is no success, and over the seeds of "
            "runs that train several; intervals are Wilson's, 95 %."
        )
    others = sorted({name for row in rows for name in row.figures if name != "success"})
    if others:
        lines.append(f"Medians over the runs that have the figure: {listing(others)}.")
    return lines


def overview_notes(rows: Sequence[Row], series: Sequence[Series]) -> list[str]:
    """How mean ranks, firsts and exponents over several tasks are meant."""
    sized = len({row.size for row in rows}) > 1
    lines = [
        "Mean rank: mean of a contestant's places over the tasks"
        + (", at equal size" if sized else "")
        + ". Equal scores share their places, and so do all contestants without a score, behind the others. First in: "
        "how often none was better; separable: how often the seeds tell it from every other."
    ]
    if any(line.law for line in series):
        points = sorted({len(line.points) for line in series if line.law})
        counts = [point.parameters for line in series if line.law for point in line.points]
        lines.append(
            "α: exponent of the power law score ~ parameters^-α, by least squares in log-log on the medians over "
            f"seeds, through all points ({' or '.join(map(str, points))} a series, from {min(counts):,} to "
            f"{max(counts):,} parameters), ± its standard error."
        )
    return lines


def _excludes_zero(interval: Interval) -> bool:
    return interval.low is not None and interval.high is not None and (interval.low > 0 or interval.high < 0)


def _base(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.baseline), None)


def setting(comparison: Comparison) -> list[tuple[str, str]]:
    """What all contestants share, as terms and values. A value that differs between runs is listed as such."""
    runs = comparison.runs
    shared = shared_settings(runs)

    def group(name: str, skip: Iterable[str] = ()) -> str:
        prefix = f"{name}."
        options = {k.removeprefix(prefix): v for k, v in shared.items() if k.startswith(prefix)}
        title = options.pop("name", "")
        told = ", ".join(f"{key} = {value}" for key, value in options.items() if key not in skip and value != "none")
        return f"{title} ({told})" if title and told else title or told

    seeds = sorted({run.seed for run in runs if run.seed is not None})
    facts = [
        ("Task", group("task") or _either(run.task for run in runs)),
        ("Score", f"{score_name(comparison)}, {'lower' if comparison.mode == 'min' else 'higher'} is better"),
        ("Model", group("model") or _either(run.model for run in runs)),
        ("Budget", _budget(runs)),
        ("Training", group("trainer")),
        ("Optimiser", group("optimizer")),
        ("Seeds", f"{len(seeds)}: {_ranges(seeds)}" if seeds else ""),
        ("Runs", statuses_text({status: sum(r.status == status for r in runs) for status in {r.status for r in runs}})),
        ("Device", _either(run.device for run in runs)),
        ("Threads", _either(str(run.threads) if run.threads else None for run in runs)),
        ("Machine", _either(_machine(run) for run in runs)),
        ("Versions", _versions(runs)),
        (
            "Commit",
            _either(
                f"{run.commit}{' with uncommitted changes' if run.dirty else ''}" if run.commit else None
                for run in runs
            ),
        ),
        ("Period", _period(runs)),
    ]
    return [(term, value) for term, value in facts if value]


def command(comparison: Comparison) -> str | None:
    """The command that runs the comparison again."""
    names = sorted({run.experiment for run in comparison.runs if run.experiment})
    return f"python train.py experiment={shlex.quote(names[0])}" if len(names) == 1 else None  # to be pasted


def shared_settings(runs: Sequence[Run]) -> dict[str, str]:
    """Config keys that have one value in all runs that have a config."""
    configs = [settings(run) for run in runs if run.config]
    if not configs:
        return {}
    return {k: v for k, v in configs[0].items() if all(other.get(k) == v for other in configs[1:])}


def _budget(runs: Sequence[Run]) -> str:
    budgets = {(b.match, b.to, b.target, b.tolerance) for run in runs if (b := run.budget) is not None}
    names = {"params": "parameters", "flops": "FLOPs", "time": "time"}
    told = []
    for match, to, target, tolerance in sorted(budgets, key=str):
        if match == "none":
            told.append("not matched")
            continue
        of = f" those of {to}" if to and not to.replace(".", "").isdigit() else ""
        at = f" ({count(target)})" if target is not None else ""
        within = f" to within {100 * tolerance:g} %" if tolerance is not None else ""
        told.append(f"{names.get(match, match)} matched to{of}{at}{within}")
    return " / ".join(told)


def _machine(run: Run) -> str | None:
    cores = plural(run.cores, "core") if run.cores else None
    return ", ".join(part for part in (run.host, run.cpu, cores) if part) or None


def _versions(runs: Sequence[Run]) -> str:
    names = sorted({name for run in runs for name in run.versions}, key=lambda n: (n not in ("archzoo", "torch"), n))
    return ", ".join(f"{name} {_either(run.versions.get(name) for run in runs)}" for name in names)


def _period(runs: Sequence[Run]) -> str:
    started = min((run.started for run in runs if run.started), default=None)
    ended = max((run.ended for run in runs if run.ended), default=None)
    return " to ".join(part[:19].replace("T", " ") for part in (started, ended) if part)


def _either(values: Iterable[str | None]) -> str:
    different = sorted({value for value in values if value})
    if len(different) > 3:
        return f"{', '.join(different[:3])} and {len(different) - 3} more"
    return " / ".join(different)


def _ranges(numbers: Sequence[int]) -> str:
    """0-4, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)


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
