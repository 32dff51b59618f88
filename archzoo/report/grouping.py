"""Which runs make up a contestant, what it is called, and which of its tuned values it is shown at."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from archzoo.report.contestants import Contestant, latest, mode_of
from archzoo.report.runs import Run, by_seed
from archzoo.report.settings import fingerprint, settings
from archzoo.report.sizes import Told, labelled, with_sizes
from archzoo.report.tuning import Trial, choose

# A label's options in the order a reader looks for them; any other group comes after, by name.
_GROUP_ORDER = ("layer", "model", "budget", "optimizer", "trainer")


def contestants_of(runs: Sequence[Run]) -> tuple[Contestant, ...]:
    """Runs with one config apart from the seed, and from what is tuned, form a contestant."""
    keyed: dict[str, dict[str, dict[str, list[Run]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    tuned = _short(sorted({key for run in runs for key in run.tuned}, key=_group_order))
    for run in runs:
        keyed[run.layer][run.task][fingerprint(run, tuned)].append(run)
    contestants: list[Told] = []
    for layer, by_task in keyed.items():
        found: list[tuple[str, tuple[Run, ...], dict[str, str]]] = []
        keys: set[str] = set()
        for task, by_config in by_task.items():
            _adopt(by_config, "{}")
            groups = [by_seed(group) for group in by_config.values()]
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
    _adopt(trials, json.dumps(dict.fromkeys(tuned.values(), "unknown")))
    tried = [Trial(options[name], by_seed(runs), _validation(runs)) for name, runs in trials.items()]
    tuning = choose(tried, mode_of(contestant.runs))
    if tuning.chosen is not None:
        return replace(contestant, runs=tuning.chosen.runs, tuning=tuning)
    # The test score must not choose, and a mean over several values would be nobody's.
    error = f"no validation score to choose {' and '.join(tuned)} by"
    runs = tuple(replace(run, score=None, error=error) if run.counted else run for run in contestant.runs)
    return replace(contestant, runs=runs, tuning=tuning)


def _adopt(groups: dict[str, list[Run]], unknown: str) -> None:
    """Where there is one other group, gives it the runs of the unknown one: they failed before they had a config."""
    if unknown in groups and len(groups) == 2:
        orphans = groups.pop(unknown)
        next(iter(groups.values())).extend(orphans)


def _validation(runs: Iterable[Run]) -> dict[int, float]:
    """Seed -> validation score of the runs that count."""
    told = [(run.seed, run.validation) for run in latest(runs)]
    return {seed: score for seed, score in told if seed is not None and score is not None}


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
