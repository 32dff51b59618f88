"""What of a run's config decides its result."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from archzoo.report.runs import Run
from archzoo.report.values import clean, number

# Keys of a config that name, place or watch a run and do not change what it computes.
_NOT_SETTINGS = frozenset(
    (
        *("name", "run_id", "experiment", "seed", "device", "devices", "threads", "debug", "resume", "report"),
        *("paths", "data_dir", "output", "output_dir", "hydra", "sweep"),
        *("log", "logger", "logging", "tracker", "tracking"),
    )
)


def settings(run: Run) -> dict[str, str]:
    """What of a run's config decides its result, seed aside, flattened."""
    return flatten(_deciding(run))


def shared_settings(runs: Sequence[Run]) -> dict[str, str]:
    """Config keys that have one value in all runs that have a config."""
    configs = [settings(run) for run in runs if run.config]
    if not configs:
        return {}
    return {k: v for k, v in configs[0].items() if all(other.get(k) == v for other in configs[1:])}


def fingerprint(run: Run, without: Iterable[str]) -> str:
    """A text that is the same for runs whose settings are, but for these dotted keys."""
    return json.dumps(_without(_deciding(run), without), sort_keys=True, default=str)


def task_options(run: Run) -> dict[str, str]:
    """The options of a run's task, flattened."""
    task = run.config.get("task")
    flat = flatten(_settings(task, run.seed, "task")) if isinstance(task, Mapping) else {}
    return {key: value for key, value in flat.items() if key != "name"}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as `{"optimizer.lr": "0.001"}`."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{clean(key)}."))
        else:
            flat[f"{prefix}{clean(key)}"] = _word(value)
    return flat


def _deciding(run: Run) -> dict[str, Any]:
    kept = _settings(run.config, run.seed)
    model, budget = kept.get("model"), kept.get("budget")
    if isinstance(model, dict) and isinstance(budget, dict) and "width" in model:
        vary = budget.get("vary")
        varied = isinstance(vary, dict) and run.layer in vary
        if budget.get("match") in ("params", "flops") and number(budget.get("to")) is not None and not varied:
            del model["width"]  # the budget finds the widths, and they are nobody else's
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


def _without(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A nested config without these dotted keys."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        inner = [key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")]
        if name not in keys:
            kept[name] = _without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_word(item) for item in value) + "]"
    return clean(value)
