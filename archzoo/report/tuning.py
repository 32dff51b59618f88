"""Settings that were tuned: of all values tried, each contestant is shown at the one with the best validation score."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from archzoo.report.formatting import listing
from archzoo.report.runs import Run

_UNFINISHED = ("running", "interrupted")


@dataclass(frozen=True, slots=True)
class Trial:
    """The runs of a contestant at one value of what is tuned."""

    options: Mapping[str, str]
    """Short name of each tuned key -> its value."""
    runs: tuple[Run, ...]
    scores: Mapping[int, float]
    """Seed -> validation score of the runs that count."""
    mean: float | None = None
    """Mean validation score over the seeds that are compared; None for a trial that was not compared."""
    chosen: bool = False

    @property
    def name(self) -> str:
        """`lr=0.001, weight_decay=0.1`."""
        return ", ".join(f"{key}={value}" for key, value in self.options.items())

    @property
    def diverged(self) -> bool:
        """Whether it lost because a run of it diverged."""
        return any(run.status == "diverged" for run in self.runs)

    def trouble(self) -> list[str]:
        """What went wrong with its runs, as `diverged in seed 3`."""
        told = []
        for status, words in (("diverged", "diverged"), ("failed", "failed"), ("unknown", "has no known end")):
            if any(run.status == status for run in self.runs):
                told.append(f"{words} in {_seeds(run for run in self.runs if run.status == status)}")
        if any(run.status in _UNFINISHED for run in self.runs):
            told.append(f"is not finished in {_seeds(run for run in self.runs if run.status in _UNFINISHED)}")
        blind = [run for run in self.runs if run.counted and run.validation is None]
        if blind:
            told.append(f"has no validation score in {_seeds(blind)}")
        return told


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was tried for one contestant, and what was chosen."""

    trials: tuple[Trial, ...]
    """Smallest value first."""
    seeds: tuple[int, ...]
    """The seeds over which the trials were compared."""
    paired: bool
    """Whether all trials that were compared have these seeds; else each mean is over the seeds that the trial has."""

    @property
    def chosen(self) -> Trial | None:
        """The trial that the contestant is shown with; None if no trial has a validation score."""
        return next((trial for trial in self.trials if trial.chosen), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there is to mind about the choice."""
        told = []
        chosen = self.chosen
        if len(self.trials) == 1:
            told.append(f"only {self.trials[0].name} was tried")
        elif chosen is None:
            told.append("nothing could be chosen: no run has a validation score")
        else:
            told += self._edges(chosen)
            if not self.paired:
                told.append("the values have no seed in common, so that their means are over different seeds")
            if chosen.diverged:
                told.append("every value with a score diverged in some seed")
        told += [f"{trial.name} {trouble}" for trial in self.trials for trouble in trial.trouble()]
        return tuple(told)

    def _edges(self, chosen: Trial) -> list[str]:
        """Of every number that is tuned, whether a better one may lie beyond: no worse value there ends the search."""
        known = [trial for trial in self.trials if trial.scores or trial.diverged]
        told = []
        for key, text in chosen.options.items():
            value = _number(text)
            others = {_number(trial.options[key]) for trial in known} - {value}
            tried = [other for other in others if other is not None]
            if value is None or not tried:
                continue
            if not any(other > value for other in tried):
                told.append(f"{key}={text} is the largest tried")
            elif not any(other < value for other in tried):
                told.append(f"{key}={text} is the smallest tried")
        return told


def choose(trials: Sequence[Trial], mode: str) -> Tuning:
    """Chooses the trial with the best mean validation score over the seeds that all of them have.

    More seeds of one trial alone do not change the choice. A trial of which a run diverged loses to any other with a
    score. Where there is one trial only, there is nothing to choose. The test score has no say.

    Args:
        trials: What was tried, each value once.
        mode: `max` or `min`: whether a larger or a smaller score is better.
    """
    ordered = sorted(trials, key=_order)
    rated = [trial for trial in ordered if trial.scores]
    sound = [trial for trial in rated if not trial.diverged] or rated
    common: set[int] = set.intersection(*(set(trial.scores) for trial in sound)) if sound else set()
    means = {
        trial.name: statistics.fmean(score for seed, score in trial.scores.items() if seed in common or not common)
        for trial in sound
    }
    sign = 1 if mode == "max" else -1
    best = max(means, key=lambda name: sign * means[name]) if means else None
    if len(ordered) == 1:
        best = ordered[0].name
    return Tuning(
        tuple(replace(trial, mean=means.get(trial.name), chosen=trial.name == best) for trial in ordered),
        tuple(sorted(common)),
        bool(common) or len(sound) < 2,
    )


def _order(trial: Trial) -> list[tuple[float, str]]:
    return [(math.inf if (value := _number(text)) is None else value, text) for text in trial.options.values()]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _seeds(runs: Iterable[Run]) -> str:
    """Seed 3; seeds 0 and 2."""
    names = list(dict.fromkeys("none" if run.seed is None else str(run.seed) for run in runs))
    return f"{'seed' if len(names) == 1 else 'seeds'} {listing(names)}"
