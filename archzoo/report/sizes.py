"""Which contestants compete at one size, and which are one layer at several sizes."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from archzoo.report.contestants import Contestant

Told: TypeAlias = tuple[Contestant, Mapping[str, str], Mapping[str, str]]
"""A contestant, its settings, and the short names of the keys in which contestants with its layer differ."""

_BUDGET, _WIDTH = "budget.to", "model.width"


def with_sizes(contestants: Sequence[Told]) -> tuple[Contestant, ...]:
    """Fills in `size` and `series`, and orders the contestants by task, size and label.

    The size is the count that the budget asks for, or the width where `model.width` differs. Contestants compete at
    equal size only, if several layers do so at several sizes. Where nothing is matched, a layer's own whole-number
    option (`grid_size`) makes a series too, if more of it means more parameters.
    """
    key = _size_key(contestants)
    values = [settings.get(key, "") if key else "" for _, settings, _ in contestants]
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for (group, _, _), value in zip(contestants, values, strict=True):
        layers[group.task, value].add(group.layer)
    compete = len(set(values)) > 1 and any(len(names) > 1 for names in layers.values())

    sized: list[tuple[Contestant, float]] = []
    keys = _series_keys(contestants, key)
    for (group, settings, short), value in zip(contestants, values, strict=True):
        options = {name: settings.get(full, "unset") for full, name in short.items() if full != keys[group.layer]}
        size = _words(key, value, settings) if key and compete else ""
        series = labelled(group.layer, options) if keys[group.layer] else ""
        sized.append((replace(group, size=size, series=series), _number(value) or math.inf))
    counts: dict[tuple[str, str], set[int]] = defaultdict(set)
    for group, _ in sized:
        counts[group.task, group.series].update(filter(None, [group.parameters]))
    several = {series for (_, series), found in counts.items() if len(found) > 1}
    ordered = sorted(sized, key=lambda pair: (pair[0].task, pair[1], pair[0].size, pair[0].label))
    return tuple(group if group.series in several else replace(group, series="") for group, _ in ordered)


def labelled(name: str, options: Mapping[str, str]) -> str:
    """`name (key=value, …)`; the name alone if there are no options."""
    told = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name} ({told})" if options else name


def _size_key(contestants: Sequence[Told]) -> str | None:
    """The key whose values are sizes; None if there is none. A run without a config has no say."""
    for key in (_BUDGET, _WIDTH):
        values = {settings.get(key, "") for _, settings, _ in contestants if settings}
        differs = any(key in short for _, _, short in contestants)
        matched = not any(settings.get("budget.match") == "none" for _, settings, _ in contestants)
        if differs and all(_number(value) is not None for value in values) and (matched or key == _WIDTH):
            return key
    return None


def _series_keys(contestants: Sequence[Told], size_key: str | None) -> dict[str, str | None]:
    """For each layer, the key in which the contestants of a series differ, if any."""
    by_layer: dict[str, list[Told]] = defaultdict(list)
    for told in contestants:
        by_layer[told[0].layer].append(told)
    return {layer: size_key or _growing_option(group) for layer, group in by_layer.items()}


def _growing_option(contestants: Sequence[Told]) -> str | None:
    """The whole-number option of a layer, of those that differ, with which parameters grow; None if there is none."""
    found = []
    for key in (key for key in contestants[0][2] if key.startswith("layer.")):
        lines: dict[tuple[str, ...], list[tuple[float, int]]] = defaultdict(list)
        for group, settings, short in contestants:
            value = _number(settings.get(key, ""))
            if value is None or value != int(value) or settings.get("budget.match") != "none":
                break
            others = (group.task, *(settings.get(other, "unset") for other in short if other != key))
            if group.parameters is not None:
                lines[others].append((value, group.parameters))
        else:
            counts = [[count for _, count in sorted(line)] for line in lines.values()]
            if counts and all(a < b for line in counts for a, b in zip(line, line[1:], strict=False)):
                found.append((-max(map(len, counts)), key))
    return min(found)[1] if found else None


def _words(key: str, size: str, settings: Mapping[str, str]) -> str:
    if not size:
        return "unknown size"
    if key == _WIDTH:
        return f"width {size}"
    return f"{float(size):,.0f} {'FLOPs' if settings.get('budget.match') == 'flops' else 'parameters'}"


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < 1e15 else None
