"""Who won: contestants ordered by score, tested against a baseline and against the leader, with what they cost."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TypeVar

from archzoo.report.contestants import Comparison, Contestant
from archzoo.report.reaching import Curves, EqualScore, equal_score
from archzoo.report.runs import Budget, Run
from archzoo.report.stats import ALPHA, Interval, holm, mean_interval, sign_flip_p, wilson
from archzoo.report.tuning import Tuning

T = TypeVar("T")

DEFAULT_BASELINE = "linear"

MEMORY_KINDS = ("peak GPU memory", "kept for backward", "peak RSS")


@dataclass(frozen=True, slots=True)
class TaskFigure:
    """A figure of a task's own summary over a contestant's runs: a success rate, or the median of anything else."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    """Ends of Wilson's 95 % interval of a success rate."""
    successes: int | None = None
    count: int = 0
    """Number of runs that the value is of; of a success rate, of seeds where a run trains several."""


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant's line of the table. A number that no run tells is None.

    Times, throughput and memory are medians over runs. Differences are contestant minus baseline, paired by seed. Where
    contestants compete at several sizes, rank, leader, baseline and tests are among those of one size.
    """

    label: str
    layer: str
    task: str
    size: str
    """The size that it competes at; empty where all compete with each other."""
    series: str
    """Label without the size, where the same contestant is there in several sizes; else empty."""
    rank: int | None
    """1 is best; None without a score."""
    seeds: tuple[int | None, ...]
    """Seeds of the runs that count."""
    score: Interval | None
    values: tuple[float, ...]
    """Scores of the runs that count, in the order of `seeds`."""
    difference: Interval | None
    """To the baseline, over the common seeds."""
    common_seeds: int
    p_value: float | None
    """Of the paired permutation test against the baseline, uncorrected; None for fewer than two common seeds."""
    p_holm: float | None
    """The same, Holm-corrected over all contestants of that task and size that are tested against the baseline."""
    tie: bool | None
    """Whether the contestant is not separable from the baseline at 5 %; None where there is nothing to compare."""
    baseline: bool
    leader: bool
    ties_leader: bool
    """Whether it is not separable from the leader at 5 %; False for the leader itself."""
    p_leader: float | None
    """Of the test against the leader, Holm-corrected over the others; for the baseline, the leader's `p_holm`."""
    parameters: int | None
    budget: Budget | None
    flops: float | None
    bytes_per_step: float | None
    step_time_s: float | None
    samples_per_s: float | None
    memory_bytes: float | None
    """Of the kind that `memory_kind` names, which is one for all rows of a task."""
    memory_kind: str
    saved_bytes: float | None
    rss_bytes: float | None
    cuda_bytes: float | None
    statuses: Mapping[str, int]
    figures: Mapping[str, TaskFigure] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tuning: Tuning | None = None
    """What was tried of the settings that are tuned."""
    equal: EqualScore | None = None
    """When it reaches the baseline's best validation score; None without curves. Of the baseline, its own steps."""

    @property
    def count(self) -> int:
        """Number of seeds with a score."""
        return len(self.values)

    @property
    def deviation(self) -> float | None:
        """Deviation from the budget's target, as a fraction."""
        return self.budget.deviation if self.budget else None


def rank(comparison: Comparison, baseline: str | None = DEFAULT_BASELINE) -> list[Row]:
    """The table of a comparison, best contestant first; those without a score at the bottom.

    Several tasks are ranked one after the other, each for itself; so are several sizes of a task.

    Args:
        comparison: What `load_comparison` read.
        baseline: Label or layer name of the contestant to test the others against. If several contestants share that
            layer, the best of them is taken. None, or a missing `"linear"`: there is no baseline.

    Raises:
        ValueError: If no contestant has that label or layer (unless it is the default, `"linear"`).
    """
    find_baseline(comparison, baseline)
    return [
        row
        for part in comparison.split()
        for size in part.sizes
        for row in _rank_size(part.at(size), baseline, _memory_kind(part.runs))
    ]


def find_baseline(comparison: Comparison, baseline: str | None) -> Contestant | None:
    """The contestant that `baseline` names: by label, else the best one with that layer.

    Raises:
        ValueError: If there is none, and the name is not the default.
    """
    if baseline is None:
        return None
    named = [group for group in comparison.groups if group.label == baseline] or [
        group for group in comparison.groups if group.layer == baseline
    ]
    if not named and baseline != DEFAULT_BASELINE:
        known = sorted({name for group in comparison.groups for name in (group.label, group.layer)})
        near = get_close_matches(baseline, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose one of {', '.join(known)}"
        raise ValueError(f"baseline={baseline!r}: no contestant has that label or layer; {hint}")
    return min(named, key=lambda group: _order(group, comparison.mode), default=None)


def default_baseline(comparison: Comparison) -> str | None:
    """What the sweep names, `"linear"`, or the layer that the budget was matched to: the first that takes part."""
    known = {name for group in comparison.groups for name in (group.label, group.layer)}
    named = sorted({run.baseline for run in comparison.runs if run.baseline})
    matched = sorted({run.budget.to for run in comparison.runs if run.budget and run.budget.to})
    return next((name for name in (*named, DEFAULT_BASELINE, *matched) if name in known), None)


def by_size(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """One task's rows, as they compete; smallest size first."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(row.size, []).append(row)
    return out


def baseline_row(rows: Iterable[Row]) -> Row | None:
    """The first row that the others are tested against; None where there is no baseline."""
    return next((row for row in rows if row.baseline), None)


@dataclass(frozen=True, slots=True)
class Standing:
    """How one contestant, or one series of contestants, did over all tasks and sizes."""

    label: str
    mean_rank: float | None
    """Mean of its places; equal scores share theirs, and so do all that have no score, behind the others."""
    contests: int
    """In how many tasks and sizes it took part."""
    firsts: int
    """In how many of these none was better, alone or not."""
    wins: int
    """In how many the seeds separate it from every other contestant."""


def standings(rows: Sequence[Row], label: Callable[[Row], str]) -> dict[str, Standing]:
    """Places over all contests, that is tasks and sizes with more than one contestant, of what has one label."""
    contests: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        contests.setdefault((row.task, row.size), []).append(row)
    places: dict[str, list[tuple[float, bool, bool]]] = {}
    for contest in contests.values():
        means = [row.score.mean if row.score else None for row in contest]  # best first
        alone = sum(mean is not None for mean in means) > 1 and not any(row.ties_leader for row in contest)
        if means[0] is None or len(contest) < 2:
            continue
        for row, mean in zip(contest, means, strict=True):
            shared = [place for place, other in enumerate(means, 1) if other == mean]
            first = mean == means[0]
            places.setdefault(label(row), []).append((statistics.fmean(shared), first, first and row.leader and alone))
    return {
        label(row): Standing(
            label(row),
            statistics.fmean(place for place, _, _ in had) if had else None,
            len(had),
            sum(first for _, first, _ in had),
            sum(win for _, _, win in had),
        )
        for row in rows
        for had in [places.get(label(row), [])]
    }


def improves(difference: float, mode: str) -> bool:
    """Whether a difference of scores is for the better."""
    return difference > 0 if mode == "max" else difference < 0


def _order(group: Contestant, mode: str) -> tuple[bool, float, str]:
    values = [run.score for run in group.counted if run.score is not None]
    mean = statistics.fmean(values) if values else 0.0
    return (not values, -mean if mode == "max" else mean, group.label)


def _rank_size(comparison: Comparison, baseline: str | None, memory_kind: str) -> list[Row]:
    mode = comparison.mode
    groups = sorted(comparison.groups, key=lambda group: _order(group, mode))
    try:
        base = find_baseline(comparison, baseline)
    except ValueError:  # another task or size of the comparison has it
        base = None
    leader = groups[0] if groups and groups[0].counted else None

    against_base = [_paired(group, base) for group in groups]
    p_values = [sign_flip_p(pairs) for pairs in against_base]
    corrected = holm(p_values)
    against_leader = [_paired(group, leader) for group in groups]
    to_leader = holm([sign_flip_p(pairs) for pairs in against_leader])
    curves = Curves(comparison.metric)

    rows = []
    for place, group in enumerate(groups, 1):
        pairs, p_holm = against_base[place - 1], corrected[place - 1]
        scored = bool(group.counted)
        tested = scored and base is not None and group is not base and bool(base.counted)
        tie = (p_holm is None or p_holm > ALPHA) if tested else None
        # The baseline against the leader is the leader against the baseline: one question, one answer.
        p_leader = corrected[0] if group is base and group is not leader else to_leader[place - 1]
        behind = improves(-sum(against_leader[place - 1]), mode)  # over the common seeds it may be ahead all the same
        values = tuple(run.score for run in group.counted if run.score is not None)
        rows.append(
            Row(
                label=group.label,
                layer=group.layer,
                task=group.task,
                size=group.size,
                series=group.series,
                rank=place if scored else None,
                seeds=tuple(run.seed for run in group.counted),
                score=mean_interval(values) if values else None,
                values=values,
                difference=mean_interval(pairs) if pairs else None,
                common_seeds=len(pairs),
                p_value=p_values[place - 1],
                p_holm=p_holm,
                tie=tie,
                baseline=group is base,
                leader=group is leader,
                ties_leader=scored and group is not leader and (p_leader is None or p_leader > ALPHA or not behind),
                p_leader=p_leader,
                parameters=group.parameters,
                budget=_first(run.budget for run in _best_first(group.runs)),
                flops=_first(run.flops for run in _best_first(group.runs)),
                bytes_per_step=_median(group.runs, lambda run: run.bytes_per_step),
                step_time_s=_median(group.runs, lambda run: run.step_time_s),
                samples_per_s=_median(group.runs, lambda run: run.samples_per_s),
                memory_bytes=_median(group.runs, _MEMORY[memory_kind]),
                memory_kind=memory_kind,
                saved_bytes=_median(group.runs, lambda run: run.saved_bytes),
                rss_bytes=_median(group.runs, lambda run: run.rss_bytes),
                cuda_bytes=_median(group.runs, lambda run: run.cuda_bytes),
                statuses=dict(group.statuses),
                figures=_task_figures(group),
                notes=_notes(group, base, len(pairs) if tested else None),
                tuning=group.tuning,
                equal=equal_score(group, base, mode, curves) if base is not None else None,
            )
        )
    return rows


def _paired(group: Contestant, other: Contestant | None) -> list[float]:
    """Differences group - other over their common seeds."""
    if other is None or group is other:
        return []
    mine, theirs = group.scores, other.scores
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


_MEMORY: dict[str, Callable[[Run], float | None]] = dict(
    zip(
        MEMORY_KINDS,
        (lambda run: run.cuda_bytes or None, lambda run: run.saved_bytes, lambda run: run.rss_bytes),
        strict=True,
    )
)


def _memory_kind(runs: Sequence[Run]) -> str:
    """The kind of memory that most runs tell; the first of several such."""
    return max(MEMORY_KINDS, key=lambda kind: sum(_MEMORY[kind](run) is not None for run in runs))


def _best_first(runs: Iterable[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: run.status != "done")


def _first(values: Iterable[T | None]) -> T | None:
    return next((value for value in values if value is not None), None)


def _median(runs: Sequence[Run], of: Callable[[Run], float | None]) -> float | None:
    """Median over the runs that are done; over all runs if none is, as their cost is still worth knowing."""
    for chosen in ([run for run in runs if run.status == "done"], runs):
        values = [value for run in chosen if (value := of(run)) is not None]
        if values:
            return statistics.median(values)
    return None


def _task_figures(group: Contestant) -> dict[str, TaskFigure]:
    """`success` as a rate over the runs that ended, where a divergence is no success; medians of all other figures.

    A run that trains several seeds says of how many (`seeds`) how many succeeded (`successes`), and counts as so many.
    What only qualifies another figure, as the ends of its interval within a run, is left out.
    """
    ended = [run for run in group.runs if run.status in ("done", "diverged")]
    figures = {}
    names = {name for run in ended for name in run.task_summary}
    names -= {"successes", "seeds"} if "success" in names else set()
    names -= {f"{name}_{end}" for name in names for end in ("low", "high")}
    for name in sorted(names, key=lambda name: (name != "success", name)):
        values = [run.task_summary[name] for run in ended if name in run.task_summary]
        if name == "success":
            summaries = [run.task_summary for run in ended]
            successes = sum(int(s.get("successes", s.get(name, 0.0) >= 0.5)) for s in summaries)
            count = sum(int(s.get("seeds", 1)) for s in summaries)
            low, high = wilson(successes, count)
            figures[name] = TaskFigure(name, successes / count, low, high, successes, count)
        else:
            figures[name] = TaskFigure(name, statistics.median(values), count=len(values))
    return figures


def _notes(group: Contestant, base: Contestant | None, common: int | None) -> tuple[str, ...]:
    notes = []
    if group.tuning is not None and group.tuning.chosen is not None and len(group.tuning.trials) > 1:
        notes.append(f"{group.tuning.chosen.name}, the best of {len(group.tuning.trials)} by validation score")
    counted, total = len(group.counted), len(group.runs)
    seeds = Counter(run.seed for run in group.runs if run.counted and run.seed is not None)
    for seed, times in sorted(seeds.items()):
        if times > 1:
            notes.append(f"seed {seed} was run {times} times; the last counts")
    if counted and total - sum(times - 1 for times in seeds.values()) > counted:
        notes.append(f"mean over {counted} of {total} runs")
    if any(run.counted and run.seed is None for run in group.runs):
        notes.append("runs without a seed cannot be paired")
    if common is not None and base is not None and common < counted:
        notes.append(
            f"{common} seed{'s' if common > 1 else ''} in common with {base.label}"
            if common
            else f"no seed in common with {base.label}"
        )
    values = {run.score for run in group.counted}
    if counted > 1 and len(values) == 1:
        notes.append("all seeds gave the same score, so its interval has no width")
    troubles = Counter(trouble for run in group.runs if (trouble := run.trouble))
    notes.extend(f"{times} x {trouble}" if times > 1 else trouble for trouble, times in troubles.items())
    return tuple(notes)
