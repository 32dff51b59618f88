"""A comparison, and the contestants that its runs make up."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from archzoo.report.runs import Run, by_seed
from archzoo.report.tuning import Tuning


@dataclass(frozen=True, slots=True)
class Contestant:
    """Runs that are equal but for the seed."""

    label: str
    layer: str
    task: str
    runs: tuple[Run, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    """The config keys that tell this contestant from others with the same layer."""
    size: str = ""
    """What it competes at, as `"200 parameters"`, where a comparison has several sizes of several layers."""
    series: str = ""
    """Label without the size: that of all contestants which differ from this one in nothing but their size."""
    tuning: Tuning | None = None
    """What was tried of the settings that are tuned; `runs` are those of the chosen value."""

    @property
    def parameters(self) -> int | None:
        """Parameters of a run that is done, else of any run that tells."""
        runs = sorted(self.runs, key=lambda run: run.status != "done")
        return next((run.parameters for run in runs if run.parameters is not None), None)

    @property
    def scores(self) -> dict[int, float]:
        """Seed -> score of the runs that count. Of runs with one seed, the one that ended last counts."""
        return {run.seed: run.score for run in self.counted if run.seed is not None and run.score is not None}

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs whose scores count, by seed; one per seed."""
        return latest(self.runs)

    @property
    def statuses(self) -> Counter[str]:
        """How many runs have which status."""
        return Counter(run.status for run in self.runs)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The runs of one folder, and the contestants that they make up."""

    folder: Path
    name: str
    runs: tuple[Run, ...]
    groups: tuple[Contestant, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order of their names. Scores are compared within a task only."""
        return tuple(sorted({run.task for run in self.runs}))

    def split(self) -> tuple["Comparison", ...]:
        """One comparison per task."""
        return tuple(
            Comparison(
                self.folder,
                self.name,
                tuple(run for run in self.runs if run.task == task),
                tuple(group for group in self.groups if group.task == task),
            )
            for task in self.tasks
        )

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes that contestants compete at, smallest first; `("",)` where they all compete with each other."""
        return tuple(dict.fromkeys(group.size for group in self.groups))

    def at(self, size: str) -> "Comparison":
        """The contestants of one size."""
        groups = tuple(group for group in self.groups if group.size == size)
        return Comparison(self.folder, self.name, tuple(run for group in groups for run in group.runs), groups)

    @property
    def metric(self) -> str:
        """Name of the score, the commonest one if the runs differ."""
        return metric_of(self.runs)

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a larger or a smaller score is better."""
        return mode_of(self.runs)

    @property
    def score_split(self) -> str | None:
        """The split that the score was taken on."""
        return commonest(run.split for run in self.runs)


def latest(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The runs that count, by seed; of runs with one seed, the one that ended last."""
    kept: dict[Any, Run] = {}
    for run in sorted((run for run in runs if run.counted), key=lambda run: (run.ended or "", run.id)):
        kept[run.folder if run.seed is None else run.seed] = run
    return by_seed(kept.values())


def metric_of(runs: Iterable[Run]) -> str:
    """The commonest name of the score."""
    return commonest(run.metric for run in runs) or "score"


def mode_of(runs: Sequence[Run]) -> Literal["max", "min"]:
    """Whether a larger or a smaller score is better: as most runs say, else as the metric's name does."""
    stated: Literal["max", "min"] | None = commonest(run.mode for run in runs)
    if stated is not None:
        return stated
    lower = any(word in metric_of(runs) for word in ("loss", "error", "mse", "mae", "rmse", "perplexity", "nll"))
    return "min" if lower else "max"


def commonest(values: Iterable[Any]) -> Any:
    """The value that there are most of, None aside; None if there is no other."""
    counts = Counter(value for value in values if value is not None)
    return max(counts, key=lambda value: (counts[value], str(value))) if counts else None
