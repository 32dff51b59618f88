"""A comparison as it lies on disk: one folder per run, read from `run.json` and `metrics.jsonl` and nothing else."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from archzoo.report.files import read_own
from archzoo.report.sizes import labelled, with_sizes
from archzoo.report.tuning import Trial, Tuning, choose

STATUSES = ("done", "running", "interrupted", "diverged", "failed", "unknown")

# Keys of a config that name, place or watch a run and do not change what it computes.
_NOT_SETTINGS = frozenset(
    (
        *("name", "run_id", "experiment", "seed", "device", "devices", "threads", "debug", "resume", "report"),
        *("paths", "data_dir", "output", "output_dir", "hydra", "sweep"),
        *("log", "logger", "logging", "tracker", "tracking"),
    )
)
_LARGEST = 1e70  # so that the square of a variance is still a float
# A label's options in the order a reader looks for them; any other group comes after, by name.
_GROUP_ORDER = ("layer", "model", "budget", "optimizer", "trainer")


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
        return _latest(self.runs)

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
        return _metric(self.runs)

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a larger or a smaller score is better."""
        return _mode(self.runs)

    @property
    def score_split(self) -> str | None:
        """The split that the score was taken on."""
        return _commonest(run.split for run in self.runs)


def load_comparison(folder: str | Path) -> Comparison:
    """Reads a comparison folder, `outputs/NAME`, whose sub-folders with a `run.json` are its runs.

    Runs with one config apart from the seed form a contestant. Its label is the layer's name, with the config keys that
    differ where several contestants share a layer and a task. Another option of a task (`task.function=xy`) is another
    task. Of the settings that a run says are tuned (`sweep.tune`), a contestant has the value with the best validation
    score. A run whose `run.json` cannot be read counts as failed.

    Args:
        folder: The comparison's folder.

    Raises:
        ValueError: If the folder does not exist or holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r}: there is no such folder; give a comparison's, as outputs/digits")
    paths = sorted(path for path in folder.iterdir() if (path / "run.json").is_file())
    if not paths:
        hint = "no sub-folder has a run.json"
        if (folder / "run.json").is_file():
            hint = f"it is a run itself, so give the folder around it, {str(folder.absolute().parent)!r}"
        elif any(folder.glob("*/*/run.json")):
            hint = "its sub-folders are comparisons: give one of them"
        raise ValueError(f"folder={str(folder)!r} holds no run: {hint}")
    return comparison_of(folder, label_tasks([_load_run(path) for path in paths]))


def comparison_of(folder: Path, runs: Sequence[Run]) -> Comparison:
    """The comparison that these runs of one folder are."""
    runs = _one_metric(runs)
    return Comparison(folder, clean(folder.absolute().name), runs, _contestants(runs))


def label_tasks(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Tells tasks of one name apart by their options: scores on other functions or data sets do not compare.

    Where nothing but one option differs, and its values are words, these are the labels: `xy`, `exp_sin`. Else a label
    is as `functions (function=xy, noise=0.1)`.
    """
    tasks = [(run, _task_options(run) if run.config else None) for run in runs]
    by_name: dict[str, list[dict[str, str]]] = defaultdict(list)
    for run, options in tasks:
        if options is not None:
            by_name[run.task_name].append(options)
    keys = {name: sorted(_contradicting(different)) for name, different in by_name.items()}
    named = []
    for run, options in tasks:
        label = run.task_name
        if options is not None and (differing := keys[label]):
            told = {key: options.get(key, "unset") for key in differing}
            values = {config.get(differing[0], "unset") for config in by_name[label]}
            if len(by_name) == len(differing) == 1 and all(_is_word(value) for value in values):
                label = told[differing[0]]
            else:
                label = labelled(label, told)
        named.append(replace(run, task=label))
    return tuple(named)


def _contradicting(configs: Sequence[Mapping[str, str]]) -> set[str]:
    """The keys with several values. Some may lack a key: it is younger than they are."""
    values: dict[str, set[str]] = defaultdict(set)
    for config in configs:
        for key, value in config.items():
            values[key].add(value)
    return {key for key, found in values.items() if len(found) > 1}


def _is_word(value: str) -> bool:
    """Whether a value says by itself what it is of, as `xy` does, and 0.1 or `true` does not."""
    return value[:1].isalpha() and value not in ("true", "false", "none", "unset")


def _task_options(run: Run) -> dict[str, str]:
    task = run.config.get("task")
    flat = flatten(_settings(task, run.seed, "task")) if isinstance(task, Mapping) else {}
    return {key: value for key, value in flat.items() if key != "name"}


def clean(text: object) -> str:
    """Text in one line that every format can hold: no control characters, no lone surrogates, single spaces."""
    string = str(text).encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in string).split())


def number(value: object) -> float | None:
    """The value as a finite float, or None; what is far beyond float32's range counts as infinite, or as zero."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value) if abs(value) >= 1 / _LARGEST else 0.0
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as `{"optimizer.lr": "0.001"}`."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{clean(key)}."))
        else:
            flat[f"{prefix}{clean(key)}"] = _word(value)
    return flat


def settings(run: Run) -> dict[str, str]:
    """What of a run's config decides its result, seed aside, flattened."""
    return flatten(_deciding(run))


def _deciding(run: Run) -> dict[str, Any]:
    kept = _settings(run.config, run.seed)
    model, budget = kept.get("model"), kept.get("budget")
    if isinstance(model, dict) and isinstance(budget, dict) and "width" in model:
        vary = budget.get("vary")
        varied = isinstance(vary, dict) and run.layer in vary
        if budget.get("match") in ("params", "flops") and number(budget.get("to")) is not None and not varied:
            del model["width"]  # the budget finds the widths, and they are nobody else's
    return kept


def _without(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A nested config without these dotted keys."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        inner = [key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")]
        if name not in keys:
            kept[name] = _without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def _settings(config: Mapping[str, Any], seed: int | None, group: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in config.items():
        # A task may have the run's seed. Elsewhere one that all runs share, as of sampled texts, may equal it.
        own_seed = key == "seed" and value == seed and group in ("", "task")
        if own_seed or (not group and key in _NOT_SETTINGS):
            continue
        kept[key] = _settings(value, seed, f"{group}.{key}".lstrip(".")) if isinstance(value, Mapping) else value
    return kept


def _load_run(folder: Path) -> Run:
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
        return _text(record.get(key)) or _text(inner.get("name") if isinstance(inner, dict) else inner)

    seed = _integer(record.get("seed"))
    mode = score.get("mode")
    diverged = part("diverged")
    status = _text(record.get("status")) or ("failed" if error else "unknown")
    metric, summary = _text(score.get("metric")), part("summary")
    task_summary, best = summary.get("task"), summary.get("best")
    return Run(
        folder=folder,
        id=_text(record.get("run_id")) or clean(folder.name),
        name=_text(record.get("name")) or clean(folder.name),
        experiment=_text(record.get("experiment")),
        status=status if status in STATUSES else "unknown",
        error=error or _first_line(record.get("error")),
        diverged=Divergence(_integer(diverged.get("step")), _text(diverged.get("module")), _text(diverged.get("what")))
        if diverged
        else None,
        config=config,
        layer=named("layer") or "unknown layer",
        task=(task := named("task") or "unknown task"),
        task_name=task,
        model=named("model"),
        seed=_integer(config.get("seed")) if seed is None else seed,
        budget=_budget(part("budget")),
        parameters=_integer(record.get("parameters")),
        flops=number(record.get("flops")),
        bytes_per_step=number(record.get("bytes_per_step")),
        score=number(score.get("value")),
        metric=metric,
        mode="max" if mode == "max" else "min" if mode == "min" else None,
        split=_text(score.get("split")),
        score_step=_integer(score.get("step")),
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
        commit=_text(part("git").get("commit")),
        dirty=part("git").get("dirty") is True,
        host=_text(machine.get("host")),
        cpu=_text(machine.get("cpu")),
        cores=_integer(machine.get("cores")),
        device=_text(record.get("device")),
        threads=_integer(record.get("threads")),
        started=_text(record.get("started")),
        ended=_text(record.get("ended")),
    )


def _budget(record: dict[str, Any]) -> Budget | None:
    if not record:
        return None
    within = record.get("within_tolerance")
    widths = record.get("widths")
    return Budget(
        match=_text(record.get("match")) or "none",
        to=_text(record.get("to")),
        target=number(record.get("target")),
        reached=number(record.get("reached")),
        deviation=number(record.get("deviation")),
        within_tolerance=within if isinstance(within, bool) else None,
        tolerance=number(record.get("tolerance")),
        widths=tuple(w for w in widths if isinstance(w, int)) if isinstance(widths, list) else (),
        option=_text(record.get("option")),
        value=_integer(record.get("value")),
    )


def _one_metric(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Takes the score from runs that measured something else than the rest of their task: means must not mix them."""
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    usual = {
        task: _commonest((r.metric, r.mode, r.split) for r in group if r.counted) for task, group in by_task.items()
    }
    out = []
    for run in runs:
        what = usual[run.task]
        if run.counted and what is not None and (run.metric, run.mode, run.split) != what:
            words = (
                f"its score is {run.split} {run.metric} ({run.mode}), not {what[1]} {what[2]} {what[0]} as elsewhere"
            )
            run = replace(run, score=None, error=clean(words), metric=what[0], mode=what[1], split=what[2])
        out.append(run)
    return tuple(out)


def _contestants(runs: Sequence[Run]) -> tuple[Contestant, ...]:
    keyed: dict[str, dict[str, dict[str, list[Run]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    tuned = _short(sorted({key for run in runs for key in run.tuned}, key=_group_order))
    for run in runs:
        key = json.dumps(_without(_deciding(run), tuned), sort_keys=True, default=str)
        keyed[run.layer][run.task][key].append(run)
    contestants = []
    for layer, by_task in keyed.items():
        found: list[tuple[str, tuple[Run, ...], dict[str, str]]] = []
        keys: set[str] = set()
        for task, by_config in by_task.items():
            if (
                "{}" in by_config and len(by_config) == 2
            ):  # a run that failed before it had a config can only be of the other
                orphans = by_config.pop("{}")
                next(iter(by_config.values())).extend(orphans)
            groups = [tuple(sorted(group, key=_seed_order)) for group in by_config.values()]
            configs = [settings(next((run for run in group if run.config), group[0])) for group in groups]
            flat = [{key: value for key, value in config.items() if key not in tuned} for config in configs]
            keys |= _differing(flat)
            found += [(task, *both) for both in zip(groups, flat, strict=True)]
        short = _short(sorted(keys, key=_group_order))  # the same for all tasks: a contestant has one name
        for task, group, config in found:
            options = {short[key]: config.get(key, "unset") for key in short}
            contestant = _tuned(Contestant(labelled(layer, options), layer, task, group, options), tuned)
            contestants.append((contestant, config, short))
    return with_sizes(contestants)


def _tuned(contestant: Contestant, tuned: Mapping[str, str]) -> Contestant:
    """The contestant with its runs at the best of the values that were tried; as it is, where nothing is tuned.

    Args:
        contestant: All its runs.
        tuned: Key -> short name of what is tuned.
    """
    if not tuned:
        return contestant
    trials: dict[str, list[Run]] = defaultdict(list)
    options: dict[str, dict[str, str]] = {}
    for run in contestant.runs:
        config = settings(run) if run.config else dict.fromkeys(tuned, "unknown")
        values = {name: config.get(key, "unset") for key, name in tuned.items()}
        options[name := json.dumps(values)] = values
        trials[name].append(run)
    if all(value in ("unset", "unknown") for values in options.values() for value in values.values()):
        return contestant
    unknown = json.dumps(dict.fromkeys(tuned.values(), "unknown"))
    if unknown in trials and len(trials) == 2:  # a run that failed before it had a config can only be of the other
        orphans = trials.pop(unknown)
        next(iter(trials.values())).extend(orphans)
    tried = [
        Trial(options[name], tuple(sorted(runs, key=_seed_order)), _validation(runs)) for name, runs in trials.items()
    ]
    tuning = choose(tried, _mode(contestant.runs))
    if tuning.chosen is not None:
        return replace(contestant, runs=tuning.chosen.runs, tuning=tuning)
    # The test score must not choose, and a mean over several values would be nobody's.
    error = f"no validation score to choose {' and '.join(tuned)} by"
    runs = tuple(replace(run, score=None, error=error) if run.counted else run for run in contestant.runs)
    return replace(contestant, runs=runs, tuning=tuning)


def _validation(runs: Iterable[Run]) -> dict[int, float]:
    """Seed -> validation score of the runs that count."""
    told = [(run.seed, run.validation) for run in _latest(runs)]
    return {seed: score for seed, score in told if seed is not None and score is not None}


def _latest(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The runs that count, by seed; of runs with one seed, the one that ended last."""
    latest: dict[Any, Run] = {}
    for run in sorted((run for run in runs if run.counted), key=lambda run: (run.ended or "", run.id)):
        latest[run.folder if run.seed is None else run.seed] = run
    return tuple(sorted(latest.values(), key=_seed_order))


def _metric(runs: Iterable[Run]) -> str:
    return _commonest(run.metric for run in runs) or "score"


def _mode(runs: Sequence[Run]) -> Literal["max", "min"]:
    stated: Literal["max", "min"] | None = _commonest(run.mode for run in runs)
    if stated is not None:
        return stated
    lower = any(word in _metric(runs) for word in ("loss", "error", "mse", "mae", "rmse", "perplexity", "nll"))
    return "min" if lower else "max"


def _differing(configs: Sequence[Mapping[str, str]]) -> set[str]:
    """The keys that not all of these have with one value."""
    keys = {key for config in configs for key in config}
    return {key for key in keys if len({config.get(key) for config in configs}) > 1}


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Key -> the shortest unmistakable name of it."""
    last = Counter(key.rsplit(".", 1)[-1] for key in keys)
    return {key: tail if last[tail := key.rsplit(".", 1)[-1]] == 1 and tail != "name" else key for key in keys}


def _group_order(key: str) -> tuple[int, str]:
    group = key.split(".", 1)[0]
    return (_GROUP_ORDER.index(group) if group in _GROUP_ORDER else len(_GROUP_ORDER), key)


def _seed_order(run: Run) -> tuple[bool, int, str]:
    return (run.seed is None, run.seed or 0, run.id)


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_word(item) for item in value) + "]"
    return clean(value)


def _text(value: object) -> str | None:
    return clean(value) or None if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def _first_line(value: object) -> str | None:
    lines = [text for line in str(value).splitlines() if (text := clean(line))] if value is not None else []
    return lines[0] if lines else None


def _integer(value: object) -> int | None:
    whole = number(value)
    return int(whole) if whole is not None and whole == int(whole) else None


def _json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _commonest(values: Iterable[Any]) -> Any:
    counts = Counter(value for value in values if value is not None)
    return max(counts, key=lambda value: (counts[value], str(value))) if counts else None
