"""How soon a contestant is where the baseline ends: steps and seconds to equal validation score, paired by seed."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from archzoo.report.contestants import Contestant
from archzoo.report.runs import Run
from archzoo.report.stats import Interval, mean_interval
from archzoo.report.values import number


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One point of a validation curve."""

    step: float
    seconds: float | None
    """Of training, without evaluations and checkpoints; None in runs from before these were told apart."""
    score: float | None
    """None where it was not finite."""


@dataclass(frozen=True, slots=True)
class Reached:
    """When a curve first has a score."""

    step: float
    seconds: float | None
    at_first: bool
    """Whether the first evaluation has it already: it may have been there sooner."""


Curve: TypeAlias = tuple[Evaluation, ...]


@dataclass(frozen=True, slots=True)
class EqualScore:
    """A contestant against the baseline: when it reaches the baseline's own best validation score, seed by seed.

    A seed counts where the baseline has a score and the contestant has one or diverged, which reaches nothing.
    """

    seeds: tuple[int, ...]
    """The seeds with curves of both."""
    without_curve: int
    """In how many more seeds a curve is missing."""
    own: tuple[Reached | None, ...]
    """When the contestant has the baseline's best score, in the order of `seeds`; None: never."""
    base: tuple[Reached, ...]
    """When the baseline itself has it."""

    @property
    def reached(self) -> int:
        """In how many seeds the contestant reaches it."""
        return sum(own is not None for own in self.own)

    @property
    def complete(self) -> bool:
        """Whether it does so in every seed; else there is no mean."""
        return self.reached == len(self.seeds) and not self.without_curve

    @property
    def at_most(self) -> bool:
        """Whether some first evaluation is already there, so that the ratios are upper bounds."""
        return any(own is not None and own.at_first for own in self.own)

    @property
    def base_steps(self) -> float:
        """Steps that the baseline itself needs, mean over these seeds."""
        return statistics.fmean(base.step for base in self.base)

    @property
    def base_seconds(self) -> float | None:
        """Seconds that the baseline itself needs; None where a time is not recorded."""
        times = [base.seconds for base in self.base if base.seconds is not None]
        return statistics.fmean(times) if len(times) == len(self.base) else None

    @property
    def step_ratios(self) -> tuple[float | None, ...]:
        """Steps that the contestant needs, as a multiple of the baseline's; None where it does not get there."""
        return self._ratios(lambda reached: reached.step)

    @property
    def second_ratios(self) -> tuple[float | None, ...]:
        """The same of seconds; None also where a time is not recorded."""
        return self._ratios(lambda reached: reached.seconds)

    @property
    def steps(self) -> Interval | None:
        """Mean ratio of steps with its interval over seeds; None unless it is reached in every seed."""
        return self._mean(self.step_ratios)

    @property
    def seconds(self) -> Interval | None:
        """Mean ratio of seconds with its interval over seeds; None unless it is reached, and timed, in every seed."""
        return self._mean(self.second_ratios)

    def _ratios(self, of: Callable[[Reached], float | None]) -> tuple[float | None, ...]:
        ratios: list[float | None] = []
        for own, base in zip(self.own, self.base, strict=True):
            mine, theirs = of(own) if own is not None else None, of(base)
            ratios.append(mine / theirs if mine is not None and theirs is not None and theirs > 0 else None)
        return tuple(ratios)

    def _mean(self, ratios: Sequence[float | None]) -> Interval | None:
        known = [ratio for ratio in ratios if ratio is not None]
        return mean_interval(known) if self.complete and len(known) == len(ratios) else None


def curve(records: Iterable[Mapping[str, Any]], metric: str) -> Curve:
    """The validation curve in the lines of `metrics.jsonl`, by step."""
    key = f"val/{metric}"
    points = [
        Evaluation(step, number(record.get("train_s")), number(record[key]))
        for record in records
        if key in record and (step := number(record.get("step"))) is not None
    ]
    return tuple(sorted(points, key=lambda point: point.step))


def best(points: Curve, mode: Literal["max", "min"]) -> float | None:
    """The best score of a curve; None if it has none."""
    scores = [point.score for point in points if point.score is not None]
    return (max(scores) if mode == "max" else min(scores)) if scores else None


def reach(points: Curve, target: float, mode: Literal["max", "min"]) -> Reached | None:
    """When the best score so far first is the target, by linear interpolation between evaluations; None: never.

    >>> reach((Evaluation(10, 1.0, 4.0), Evaluation(20, 3.0, 2.0)), 2.5, "min")
    Reached(step=17.5, seconds=2.5, at_first=False)
    """
    sign = 1.0 if mode == "max" else -1.0
    before: Evaluation | None = None
    height = 0.0  # the best score before, sign * score
    for point in points:
        if point.score is not None and sign * point.score >= sign * target:
            if before is None:
                return Reached(point.step, point.seconds, True)
            share = (sign * target - height) / (sign * point.score - height)
            timed = before.seconds is not None and point.seconds is not None
            seconds = _between(before.seconds or 0.0, point.seconds or 0.0, share) if timed else None
            return Reached(_between(before.step, point.step, share), seconds, False)
        if point.score is not None:
            height = sign * point.score if before is None else max(height, sign * point.score)
        if point.score is not None or before is not None:
            before = point
    return None


def _between(start: float, end: float, share: float) -> float:
    return end if share == 1 else start + share * (end - start)


def equal_score(
    contestant: Contestant, base: Contestant, mode: Literal["max", "min"], read: Callable[[Run], Curve]
) -> EqualScore | None:
    """Compares a contestant with the baseline; None where no seed has curves of both.

    Args:
        contestant: The contestant, or the baseline itself.
        base: The baseline.
        mode: Whether a larger or a smaller score is better.
        read: Gives the curve of a run.
    """
    ended = {run.seed: run for run in contestant.runs if run.status == "diverged"}
    ended |= {run.seed: run for run in contestant.counted}
    seeds, own, theirs, missing = [], [], [], 0
    for run in base.counted:
        if run.seed is None or run.seed not in ended:
            continue
        target = best(baseline := read(run), mode)
        arrived = None if target is None else reach(baseline, target, mode)
        mine = ended[run.seed]
        points = read(mine)
        if target is None or arrived is None or arrived.step <= 0 or (mine.counted and not points):
            missing += 1
            continue
        seeds.append(run.seed)
        theirs.append(arrived)
        own.append(reach(points, target, mode) if mine.counted else None)
    return EqualScore(tuple(seeds), missing, tuple(own), tuple(theirs)) if seeds else None


class Curves:
    """Validation curves of runs, each read once."""

    def __init__(self, metric: str):
        self.metric = metric
        self._read: dict[str, Curve] = {}

    def __call__(self, run: Run) -> Curve:
        """The curve of a run; empty where it has none."""
        key = str(run.folder)
        if key not in self._read:
            self._read[key] = curve(run.metrics(containing=f"val/{self.metric}"), self.metric)
        return self._read[key]
