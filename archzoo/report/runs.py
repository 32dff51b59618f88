"""A run as its folder tells it: `run.json` and `metrics.jsonl`, and nothing else."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from archzoo.report.files import read_own
from archzoo.report.values import clean, first_line, integer, number, text

STATUSES = ("done", "running", "interrupted", "diverged", "failed", "unknown")
LOST = ("diverged", "failed", "unknown")
"""Statuses of runs that will have no score any more."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a run's loss stopped being finite."""

    step: int | None
    module: str | None
    what: str | None

    def __str__(self) -> str:
        at = f"at step {self.step}" if self.step is not None else "at an unknown step"
        where = f" in {self.module}" if self.module else ""
        return f"diverged {at}{where}{f' ({self.what})' if self.what else ''}"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a contestant's size was matched to, and how near it came."""

    match: str
    to: str | None = None
    target: float | None = None
    reached: float | None = None
    deviation: float | None = None
    """(reached - target) / target."""
    within_tolerance: bool | None = None
    tolerance: float | None = None
    widths: tuple[int, ...] = ()
    option: str | None = None
    """The layer's option that was varied instead of the widths (`budget.vary`), and the value chosen."""
    value: int | None = None

    def __str__(self) -> str:
        if self.deviation is None:
            return ""
        if self.within_tolerance is False:
            return f"nearest reachable: {100 * self.deviation:+.1f} %"
        rounded = 100 * self.deviation
        return "0.0 %" if abs(rounded) < 0.05 else f"{rounded:+.1f} %"


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as its `run.json` tells it. What the file leaves out, or holds in a wrong type, is None."""

    folder: Path
    id: str
    name: str
    experiment: str | None
    status: str
    """One of `STATUSES`; only a `"done"` run's score counts."""
    error: str | None
    """First line of the error."""
    diverged: Divergence | None
    config: Mapping[str, Any]
    layer: str
    task: str
    """Name of the task; with the options in which runs of one task differ, as `label_tasks` has it."""
    task_name: str
    model: str | None
    seed: int | None
    budget: Budget | None
    parameters: int | None
    flops: float | None
    """Forward FLOPs per sample."""
    bytes_per_step: float | None
    score: float | None
    """A finite number, or None."""
    metric: str | None
    mode: Literal["max", "min"] | None
    split: str | None
    score_step: int | None
    validation: float | None
    """Validation score of the best evaluation, of the metric of `score`."""
    task_summary: Mapping[str, float]
    step_time_s: float | None
    samples_per_s: float | None
    wall_s: float | None
    saved_bytes: float | None
    """Bytes kept for the backward pass."""
    rss_bytes: float | None
    cuda_bytes: float | None
    versions: Mapping[str, str]
    commit: str | None
    dirty: bool
    host: str | None
    cpu: str | None
    cores: int | None
    device: str | None
    threads: int | None
    started: str | None
    ended: str | None

    @property
    def counted(self) -> bool:
        """Whether the run's score enters the comparison."""
        return self.status == "done" and self.score is not None

    @property
    def trouble(self) -> str | None:
        """What went wrong, in a line; None for a run that is done and has a score."""
        if self.status == "diverged":
            return str(self.diverged or Divergence(None, None, None)) + (f": {self.error}" if self.error else "")
        if self.status == "done":
            return None if self.score is not None else self.error or "done, but without a finite score"
        if self.status == "running":
            return "still marked as running"
        return f"{self.status}: {self.error}" if self.error else self.status

    @property
    def baseline(self) -> str | None:
        """The contestant, by label or layer, that its sweep compares the others with (`sweep.baseline`)."""
        sweep = self.config.get("sweep")
        name = sweep.get("baseline") if isinstance(sweep, Mapping) else None
        return name if isinstance(name, str) else None

    @property
    def tuned(self) -> tuple[str, ...]:
        """The config keys that its sweep tunes (`sweep.tune`)."""
        sweep = self.config.get("sweep")
        keys = sweep.get("tune") if isinstance(sweep, Mapping) else None
        return tuple(clean(key) for key in keys if isinstance(key, str)) if isinstance(keys, list) else ()

    def metrics(self, containing: str = "") -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, in order. A line that is not whole, as a crash leaves it, is skipped.

        Args:
            containing: Only lines with this key; the others are not even parsed.
        """
        key = json.dumps(containing).encode() if containing else b""
        try:
            data = read_own(self.folder / "metrics.jsonl", self.folder.parent)
            lines = [line for line in data.splitlines() if key in line]
        except OSError:
            return []
        try:  # one parse of the whole file is several times faster than one a line
            records = json.loads(b"[" + b",".join(line for line in lines if line.strip()) + b"]")
        except (ValueError, RecursionError):
            records = [record for line in lines if (record := _json_or_none(line)) is not None]
        return [record for record in records if isinstance(record, dict)]


def load_run(folder: Path) -> Run:
    """The run of a folder; a failed one where its `run.json` cannot be read."""
    error: str | None = None
    record: dict[str, Any] = {}
    try:
        loaded = json.loads(read_own(folder / "run.json", folder.parent))
        if isinstance(loaded, dict):
            record = loaded
        else:
            error = f"run.json holds a {type(loaded).__name__}, not an object"
    except (OSError, ValueError, RecursionError) as problem:
        error = f"run.json cannot be read: {clean(problem)}"

    def part(key: str) -> dict[str, Any]:
        value = record.get(key)
        return value if isinstance(value, dict) else {}

    config, score, timing, memory, machine = (part(key) for key in ("config", "score", "timing", "memory", "machine"))

    def named(key: str) -> str | None:
        inner = config.get(key)
        return text(record.get(key)) or text(inner.get("name") if isinstance(inner, dict) else inner)

    seed = integer(record.get("seed"))
    mode = score.get("mode")
    diverged = part("diverged")
    status = text(record.get("status")) or ("failed" if error else "unknown")
    metric, summary = text(score.get("metric")), part("summary")
    task_summary, best = summary.get("task"), summary.get("best")
    return Run(
        folder=folder,
        id=text(record.get("run_id")) or clean(folder.name),
        name=text(record.get("name")) or clean(folder.name),
        experiment=text(record.get("experiment")),
        status=status if status in STATUSES else "unknown",
        error=error or first_line(record.get("error")),
        diverged=Divergence(integer(diverged.get("step")), text(diverged.get("module")), text(diverged.get("what")))
        if diverged
        else None,
        config=config,
        layer=named("layer") or "unknown layer",
        task=(task := named("task") or "unknown task"),
        task_name=task,
        model=named("model"),
        seed=integer(config.get("seed")) if seed is None else seed,
        budget=_budget(part("budget")),
        parameters=integer(record.get("parameters")),
        flops=number(record.get("flops")),
        bytes_per_step=number(record.get("bytes_per_step")),
        score=number(score.get("value")),
        metric=metric,
        mode="max" if mode == "max" else "min" if mode == "min" else None,
        split=text(score.get("split")),
        score_step=integer(score.get("step")),
        validation=number(best.get(f"val/{metric}")) if isinstance(best, dict) else None,
        task_summary={
            clean(key): float(value) if isinstance(value, bool) else float(number(value) or 0.0)
            for key, value in (task_summary if isinstance(task_summary, dict) else {}).items()
            if isinstance(value, bool) or number(value) is not None
        },
        step_time_s=number(timing.get("step_time_p50_s")),
        samples_per_s=number(timing.get("samples_per_s")),
        wall_s=number(timing.get("wall_s")),
        saved_bytes=number(memory.get("saved_for_backward_bytes")),
        rss_bytes=number(memory.get("peak_rss_bytes")),
        cuda_bytes=number(memory.get("peak_cuda_bytes")),
        versions={clean(key): clean(value) for key, value in part("versions").items() if value is not None},
        commit=text(part("git").get("commit")),
        dirty=part("git").get("dirty") is True,
        host=text(machine.get("host")),
        cpu=text(machine.get("cpu")),
        cores=integer(machine.get("cores")),
        device=text(record.get("device")),
        threads=integer(record.get("threads")),
        started=text(record.get("started")),
        ended=text(record.get("ended")),
    )


def by_seed(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Runs in the order of their seeds, those without one last."""
    return tuple(sorted(runs, key=lambda run: (run.seed is None, run.seed or 0, run.id)))


def _budget(record: dict[str, Any]) -> Budget | None:
    if not record:
        return None
    within = record.get("within_tolerance")
    widths = record.get("widths")
    return Budget(
        match=text(record.get("match")) or "none",
        to=text(record.get("to")),
        target=number(record.get("target")),
        reached=number(record.get("reached")),
        deviation=number(record.get("deviation")),
        within_tolerance=within if isinstance(within, bool) else None,
        tolerance=number(record.get("tolerance")),
        widths=tuple(w for w in widths if isinstance(w, int)) if isinstance(widths, list) else (),
        option=text(record.get("option")),
        value=integer(record.get("value")),
    )


def _json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
