"""How a report's numbers were computed, for its foot."""

from collections.abc import Sequence

from archzoo.report.contestants import Comparison
from archzoo.report.formatting import listing
from archzoo.report.ranking import Row, baseline_row, by_size
from archzoo.report.scaling import Series, all_series
from archzoo.report.stats import ALPHA, BOOTSTRAP_FROM, EXACT_UP_TO, RESAMPLES, Interval, seeds_needed
from archzoo.report.wording import better, score_name


def methods(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """How intervals, tests and costs were computed, for the foot of a report."""
    used = {interval.method for row in rows for interval in (row.score, row.difference) if interval is not None}
    tested = sum(row.p_value is not None for row in rows)
    base_row = baseline_row(rows)
    base = base_row.label if base_row else None
    sizes = by_size(rows)
    shared = max(
        (
            sum(row.layer == base_row.layer for row in contest)
            for contest in sizes.values()
            if (base_row := baseline_row(contest))
        ),
        default=0,
    )
    lines = []
    kinds = []
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
        f" ({better(comparison)}). Step time, samples/s and memory are "
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
