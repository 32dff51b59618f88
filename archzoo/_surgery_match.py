"""The sizes or the option of new layers at which a whole model costs what it did."""

import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from archzoo._surgery_links import Link, find_links, find_splits
from archzoo._surgery_measure import Measured, flops_of_calls, resized
from archzoo._surgery_sites import Site
from archzoo.budget import LARGEST_VALUE, Match, count_parameters, match_option, match_widths
from archzoo.registry import LayerEntry, layer_options

TOLERANCE = 0.01
"""Largest accepted deviation of a model's count from the original's, as a fraction of it."""


@dataclass(frozen=True)
class Fit:
    """What is changed of the new layers: hidden widths, one option of one layer, or both."""

    widths: Mapping[Link, int] = field(default_factory=dict)
    layer: str = ""
    option: str = ""
    value: int = 0
    count: int = 0
    """That the model has then."""

    def options(self, site: Site) -> dict[str, Any]:
        """All options of the layer at a site."""
        changed = {self.option: self.value} if self.layer == site.target.name and self.option else {}
        return {**site.target.options, **changed}

    def sizes(self, site: Site) -> dict[str, int]:
        """The sizes of the layer at a site that are not the original's."""
        found = {}
        for link, width in self.widths.items():
            if width == link.width and not link.splits:
                continue
            inside = link.source is link.target
            for end, key in (
                (link.source, "inner" if inside else "outputs"),
                (link.target, "inner" if inside else "inputs"),
            ):
                if end is site:
                    found[getattr(site.adapter, key)] = width
        return found

    def __str__(self) -> str:
        texts = [f"{self.option}={self.value} of {self.layer}"] if self.option else []
        changed = sorted({(link.width, width) for link, width in self.widths.items() if not link.splits})
        if changed:
            texts.append("hidden widths " + ", ".join(f"{before} -> {after}" for before, after in changed))
        splits = sorted({width for link, width in self.widths.items() if link.splits})
        if splits:
            texts.append(f"layers of two, through {', '.join(map(str, splits))}")
        return ", ".join(texts)


class Costs:
    """What a model costs with its new layers, by rebuilding these alone, on the meta device.

    Args:
        sites: What is replaced.
        match: What to count.
        total: The original model's count.
        measured: The original's run on the calibration batch, for FLOPs.
    """

    def __init__(self, sites: Sequence[Site], match: Literal["params", "flops"], total: int, measured: Measured | None):
        self.sites, self.match, self.total, self.measured = sites, match, total, measured
        self._known: dict[tuple[Any, ...], int] = {}
        old = sum(count_parameters(site.module) for site in sites)
        if measured is not None and match == "flops":
            old = sum(measured.of[site.module] for site in sites)
        self._rest = total - old

    def count(self, fit: Fit) -> int:
        """The model's count; a ValueError that names the layer that cannot be so."""
        count = self._rest
        for site in self.sites:
            try:
                count += self._of(site, fit.options(site), fit.sizes(site))
            except ValueError as error:
                raise ValueError(f"{site.name}: {error}") from error
            except TypeError as error:
                raise TypeError(f"{site.name}: {error}") from error
        if self.match == "flops" and self.measured is not None:
            for link, width in fit.widths.items():
                if link.source is link.target:
                    continue
                between = self.measured.between.get((link.source.module, link.target.module), 0)
                count += between * width // link.width - between
        return count

    def try_count(self, fit: Fit) -> int | None:
        """The model's count; None where a layer cannot be so."""
        try:
            return self.count(fit)
        except ValueError:
            return None

    def _of(self, site: Site, options: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
        key = (
            site.target.entry and (site.target.name, site.adapter),
            id(site) if site.made is not None else repr(site.arguments),
            repr(options),
            tuple(sorted(sizes.items())),
            repr(self._calls(site)),  # of tensors on meta, which show their sizes
        )
        if key not in self._known:
            with torch.random.fork_rng(devices=[]):
                layer = site.build(options, sizes, device="meta")
            self._known[key] = self._cost(site, layer, sizes)
        return self._known[key]

    def _calls(self, site: Site) -> Sequence[Any]:
        return self.measured.calls[site.module] if self.measured is not None and self.match == "flops" else ()

    def _cost(self, site: Site, layer: nn.Module, sizes: Mapping[str, int]) -> int:
        if self.match == "params":
            return count_parameters(layer)
        calls = self._calls(site)
        if site.adapter is not None and site.adapter.inputs in sizes:
            calls = [resized(call, site.adapter.axis, sizes[site.adapter.inputs]) for call in calls]
        return flops_of_calls(layer, calls)


def fit(costs: Costs, *, options_first: bool) -> Fit:
    """What to change of the new layers so that the model costs what it did, within `TOLERANCE`.

    Nothing, if that will do; else the hidden widths, all by one factor, or as nearly so as it takes; else one option of
    one layer that is a whole number and was not given; else widths and such an option; else, if that
    is too many, the hidden widths and those of layers that are split in two, and an option too.

    Args:
        costs: What the model costs.
        options_first: Whether to try options before widths, because other widths would lose the trained weights.

    Raises:
        ValueError: If nothing comes that near; names the nearest reachable count.
    """
    links = find_links(costs.sites)
    steps = {link: step for link in links if (step := _steps(costs, links, link))}
    refused: ValueError | None = None
    seen: list[Fit] = []
    try:
        seen.append(Fit(count=costs.count(Fit())))
    except ValueError as error:
        refused = error
    moves = [_widths(costs, steps, Fit()), _options(costs)]
    moves = [*(reversed(moves) if options_first else moves), _both(costs, steps)]
    if seen and seen[0].count > costs.total:
        moves.append(_split(costs, steps))
    for found in itertools.chain(*moves) if not _near(seen, costs) else ():
        seen.append(found)
        if _near([found], costs):
            break
    if not seen:
        assert refused is not None
        raise refused
    best = min(seen, key=lambda found: abs(found.count - costs.total))
    best = _nearest_neighbour(costs, best)
    if not _near([best], costs):
        what = "parameters" if costs.match == "params" else "FLOPs"
        how = str(best) if best.option or best.widths else "as the layers are"
        raise ValueError(
            f"match={costs.match!r}: no hidden width and no option of the new layers gives the model its "
            f"{costs.total:,} {what} within {TOLERANCE:.0%}; the nearest reachable count is {best.count:,} "
            f"({(best.count - costs.total) / costs.total:+.1%}, {how})"
        )
    return best


def _near(fits: Sequence[Fit], costs: Costs) -> bool:
    return any(abs(found.count - costs.total) <= TOLERANCE * costs.total for found in fits)


def _nearest_neighbour(costs: Costs, fit: Fit) -> Fit:
    """The fit; where it is not near, what comes of changing single widths by a step while that brings it nearer."""
    steps = {link: step for link in fit.widths if (step := _steps(costs, list(fit.widths), link))}
    while not _near([fit], costs):
        found = fit
        for link, (low, each) in steps.items():
            for width in (fit.widths[link] - each, fit.widths[link] + each):
                other = replace(fit, widths={**fit.widths, link: width})
                count = costs.try_count(other) if width >= low else None
                if count is not None and abs(count - costs.total) < abs(found.count - costs.total):
                    found = replace(other, count=count)
        if found is fit:
            break
        fit = found
    return fit


def _steps(costs: Costs, links: Sequence[Link], link: Link) -> tuple[int, int] | None:
    """The smallest width that both layers of a link can have, and how far it is to the next."""
    ends = [site for site in costs.sites if site in (link.source, link.target)]
    within = Costs(ends, "params", 0, None)
    both = [other for other in links if other.source in ends or other.target in ends]
    widths = (w for w in range(1, 257) if within.try_count(Fit(dict.fromkeys(both, w))) is not None)
    pair = list(itertools.islice(widths, 2))
    return (pair[0], pair[1] - pair[0]) if len(pair) == 2 else None


def _widths(costs: Costs, steps: Mapping[Link, tuple[int, int]], base: Fit) -> Iterator[Fit]:
    """The nearest hidden widths in the originals' proportions; then the nearest where some are a step wider.

    In units of each link's step; the width of the widest is the one that is searched. `base` has the option.
    """
    if not steps:
        return
    links = list(steps)
    common = math.lcm(*(step for _, step in steps.values()))
    parts = {link: link.width * common // steps[link][1] for link in links}
    largest = max(parts.values())

    def fit_at(time: int) -> Fit:
        widths = {}
        for index, link in enumerate(links):
            low, step = steps[link]
            widths[link] = low + step * ((time * parts[link] // largest + index) // len(links))
        return replace(base, widths=widths)

    def count(each: int, value: tuple[int, ...]) -> int | None:
        return costs.try_count(fit_at(each * (value[0] - 1))) if value[0] <= LARGEST_VALUE else None

    for each in (len(links), 1) if len(links) > 1 else (1,):
        smallest = costs.try_count(fit_at(0))
        if smallest is None:
            return
        if costs.total < smallest:
            yield replace(fit_at(0), count=smallest)
            return
        match = match_widths(functools.partial(count, each), 1, costs.total, TOLERANCE)
        yield replace(fit_at(each * (match.widths[0] - 1)), count=match.count)


def _options(costs: Costs) -> Iterator[Fit]:
    """For every whole-number option that was not given, the value at which the count comes nearest."""
    for entry, option in _free_options(costs):
        yield from _option(costs, entry, option)


def _free_options(costs: Costs) -> Iterator[tuple[LayerEntry, str]]:
    entries: dict[str, LayerEntry] = {s.target.entry.name: s.target.entry for s in costs.sites if s.target.entry}
    for entry in entries.values():
        given = {key for site in costs.sites if site.target.entry is entry for key in site.target.options}
        yield from ((entry, option) for option in whole_options(entry) if option not in given)


def _both(costs: Costs, steps: Mapping[Link, tuple[int, int]]) -> Iterator[Fit]:
    """The nearest hidden widths for other values of one option, those nearest to its default first."""
    for entry, option in _free_options(costs):
        default = layer_options(entry.name)[option] or 1
        for value in sorted(range(1, 2 * default + 9), key=lambda value: abs(value - default)):
            yield from _widths(costs, steps, Fit(layer=entry.name, option=option, value=value))


def _split(costs: Costs, steps: Mapping[Link, tuple[int, int]]) -> Iterator[Fit]:
    """The nearest widths where layers that have none are split in two, which saves; then with other options."""
    splits = find_splits(costs.sites, list(steps))
    more = dict(steps) | {link: step for link in splits if (step := _steps(costs, splits, link))}
    if len(more) > len(steps):
        yield from _widths(costs, more, Fit())
        yield from _both(costs, more)


def _option(costs: Costs, entry: LayerEntry, option: str) -> Iterator[Fit]:
    def count(value: int) -> int | None:
        return costs.try_count(Fit(layer=entry.name, option=option, value=value))

    allowed = ((value, c) for value in range(1, 33) if (c := count(value)) is not None)
    small = list(itertools.islice(allowed, 2))
    if not small or (len(small) == 2 and small[0][1] == small[1][1]):
        return
    if len(small) == 1 or costs.total < small[0][1] < small[1][1]:
        yield Fit(layer=entry.name, option=option, value=small[0][0], count=small[0][1])
        return
    if small[0][1] > small[1][1]:  # as n of a hypercomplex layer: few values are allowed, so all are tried
        tried = {value: c for value in range(1, 257) if (c := count(value)) is not None}
        value = min(tried, key=lambda v: abs(tried[v] - costs.total))
        yield Fit(layer=entry.name, option=option, value=value, count=tried[value])
        return
    match: Match = match_option(count, option, costs.total, TOLERANCE, ())
    assert match.value is not None
    yield Fit(layer=entry.name, option=option, value=match.value, count=match.count)


def whole_options(entry: LayerEntry) -> list[str]:
    """The options of a layer that are whole numbers, or may be."""
    signature = inspect.signature(entry.cls).parameters
    found = []
    for option, default in layer_options(entry.name).items():
        optional = default is None and "int" in str(signature[option].annotation).replace(" ", "").split("|")
        if optional or (isinstance(default, int) and not isinstance(default, bool)):
            found.append(option)
    return found
