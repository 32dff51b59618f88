"""What there is to mind before a verdict is believed."""

from collections.abc import Sequence

from archzoo.report.contestants import Comparison
from archzoo.report.formatting import listing, plural
from archzoo.report.ranking import Row
from archzoo.report.runs import LOST
from archzoo.report.wording import statuses_text

_MOST_NAMED = 4


def caveats(comparison: Comparison, rows: Sequence[Row]) -> tuple[str, ...]:
    """What there is to mind about one task's rows, a sentence each."""
    told = []
    pending = sum(run.status in ("running", "interrupted") for run in comparison.runs)
    if pending:
        told.append(
            f"Provisional: {plural(pending, 'run')} of {len(comparison.runs)} "
            f"{'is' if pending == 1 else 'are'} not finished."
        )
    told += tuned_caveats(rows)
    known = {name for group in comparison.groups for name in (group.label, group.layer)}
    for absent in sorted({run.baseline for run in comparison.runs if run.baseline} - known):
        told.append(f"The baseline that was asked for, {absent}, is not among the contestants.")
    survivors = [
        row.label for row in rows if row.score is not None and any(row.statuses.get(status) for status in LOST)
    ]
    if survivors:
        told.append(f"Mean over the surviving seeds only: {listing(survivors)}.")
    lost = [f"{row.label} ({statuses_text(row.statuses)})" for row in rows if row.score is None]
    if lost and len(lost) < len(rows):
        told.append(f"Without a score: {listing(lost)}.")
    off = [(row, row.budget) for row in rows if row.budget and row.budget.within_tolerance is False]
    if 0 < len(off) <= _MOST_NAMED:
        which = listing([f"{row.label} ({budget})" for row, budget in off])
        told.append(f"Not within the budget's tolerance: {which}.")
    elif off:
        by = [100 * (budget.deviation or 0.0) for _, budget in off]
        which = f"{len(off)} of {len(rows)} contestants, by {min(by):+.1f} to {max(by):+.1f} %"
        told.append(f"Not within the budget's tolerance: {which}; the table of costs has each.")
    for what, values in (
        ("machines", {(run.host, run.cpu, run.device) for run in comparison.runs if run.step_time_s is not None}),
        ("thread counts", {run.threads for run in comparison.runs if run.step_time_s is not None}),
    ):
        if len(values) > 1:
            told.append(f"The runs were timed on {len(values)} {what}: step times do not compare.")
    commits = {(run.commit, run.dirty) for run in comparison.runs if run.commit}
    if len({commit for commit, _ in commits}) > 1:
        told.append(f"The runs come from {len({commit for commit, _ in commits})} commits of the code.")
    if any(dirty for _, dirty in commits):
        told.append("Some runs had uncommitted changes in the code.")
    return tuple(told)


def tuned_caveats(rows: Sequence[Row]) -> list[str]:
    """What there is to mind about what was tuned, contestant by contestant."""
    doubtful = [(row.label, row.tuning.warnings) for row in rows if row.tuning is not None and row.tuning.warnings]
    if len(doubtful) > _MOST_NAMED:
        tuned = sum(row.tuning is not None for row in rows)
        return [f"Tuning: there is something to mind for {len(doubtful)} of {tuned} contestants; the table Tuned says."]
    return [f"Tuning of {label}: {'; '.join(warnings)}." for label, warnings in doubtful]
