"""A comparison as it lies on disk, one folder per run; its runs are told apart by task."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from archzoo.report.contestants import Comparison, commonest
from archzoo.report.grouping import contestants_of
from archzoo.report.runs import Run, load_run
from archzoo.report.settings import task_options
from archzoo.report.sizes import labelled
from archzoo.report.values import clean


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
    return comparison_of(folder, label_tasks([load_run(path) for path in paths]))


def comparison_of(folder: Path, runs: Sequence[Run]) -> Comparison:
    """The comparison that these runs of one folder are."""
    runs = _one_metric(runs)
    return Comparison(folder, clean(folder.absolute().name), runs, contestants_of(runs))


def label_tasks(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Tells tasks of one name apart by their options: scores on other functions or data sets do not compare.

    Where nothing but one option differs, and its values are words, these are the labels: `xy`, `exp_sin`. Else a label
    is as `functions (function=xy, noise=0.1)`.
    """
    tasks = [(run, task_options(run) if run.config else None) for run in runs]
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


def _one_metric(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Takes the score from runs that measured something else than the rest of their task: means must not mix them."""
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    usual = {
        task: commonest((r.metric, r.mode, r.split) for r in group if r.counted) for task, group in by_task.items()
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
