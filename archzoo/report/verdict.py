"""Who won, in sentences. A lead that the seeds cannot separate is never called a win."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from archzoo.report.caveats import caveats
from archzoo.report.contestants import Comparison
from archzoo.report.formatting import NOTHING, Scale, duration, listing, p_words, plural, times
from archzoo.report.ranking import Row, baseline_row, by_size, improves
from archzoo.report.runs import LOST
from archzoo.report.scaling import all_series
from archzoo.report.stats import ALPHA, Interval, seeds_needed, smallest_p
from archzoo.report.wording import better, exponents, score_name, statuses_text


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who leads, in a sentence; how sure and at what cost, in a few more; what to mind."""

    sentence: str
    details: tuple[str, ...]
    caveats: tuple[str, ...]


def verdict(comparison: Comparison, rows: Sequence[Row], scale: Scale) -> Verdict:
    """The verdict on one task's rows."""
    contests = by_size(rows)
    several = len(contests) > 1
    sentence, details = _of_sizes(comparison, contests, scale) if several else _of_one_size(comparison, rows, scale)
    laws = exponents(all_series(comparison, rows), comparison)
    return Verdict(sentence, (*details, laws) if laws else tuple(details), caveats(comparison, rows))


def _of_sizes(comparison: Comparison, contests: Mapping[str, Sequence[Row]], scale: Scale) -> tuple[str, list[str]]:
    """Who leads at which size, and the sentence on each size."""
    places: dict[tuple[str, bool], list[str]] = {}
    details: list[str] = []
    power: list[str] = []
    for size, labelled in contests.items():
        rows = [replace(row, label=row.series or row.label) for row in labelled]  # the size is said anyway
        scored = [row for row in rows if row.score is not None]
        sentence, _ = _of_one_size(comparison.at(size), rows, scale)
        details.append(f"At {size}: {sentence}")
        power += [line for line in _power(scored) if not power]
        if len(scored) > 1:
            won = not any(row.ties_leader for row in scored)
            places.setdefault((scored[0].label, won), []).append(size)
    if not places:
        return "No winner: at no size are there two contestants with a score.", details
    ordered = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
    told = []
    for (label, won), at in ordered:
        where = f"all {len(at)} sizes" if len(at) == len(contests) else _sizes(at)
        told.append(f"{label} {'wins' if won else 'leads'} at {where}")
    doubt = "" if any(won for _, won in places) else "; no lead is separable from all others"
    return f"{'; '.join(told)}{doubt}.", details + power


def _sizes(sizes: Sequence[str]) -> str:
    """100, 200 and 400 parameters; width 16 and 32."""
    if all(size.startswith("width ") for size in sizes):
        return f"width {listing([size.removeprefix('width ') for size in sizes])}"
    numbers, units = zip(*(size.rsplit(" ", 1) for size in sizes), strict=True)
    return f"{listing(numbers)} {units[0]}" if len(set(units)) == 1 else listing(sizes)


def _of_one_size(comparison: Comparison, rows: Sequence[Row], scale: Scale) -> tuple[str, list[str]]:
    scored = [row for row in rows if row.score is not None]
    if not scored:
        runs = plural(len(comparison.runs), "run")
        told = statuses_text(
            {s: sum(row.statuses.get(s, 0) for row in rows) for s in ("running", "interrupted", *LOST)}
        )
        return f"No winner: none of {runs} has a score yet ({told or 'all without a score'}).", []
    leader = scored[0]
    assert leader.score is not None
    if len(scored) == 1:
        others = f"; {plural(len(rows) - 1, 'other contestant')} has no score" if len(rows) == 2 else ""
        others = f"; {len(rows) - 1} other contestants have no score" if len(rows) > 2 else others
        sentence = f"{leader.label} has nothing to be compared with{others}."
        reached = (
            f"It reached {_score_words(leader, scale)} {score_name(comparison)} with {plural(leader.count, 'seed')}."
        )
        return sentence, [reached]

    base = baseline_row(scored)
    rival = base if base is not None and base is not leader else scored[1]
    if base is leader:
        sentence, details = _against(rival, leader, comparison, scale, leader_is_base=True)
    elif base is not None:
        sentence, details = _against(leader, rival, comparison, scale)
    else:
        sentence, details = _without_baseline(leader, rival, comparison, scale)
    tied = [row.label for row in scored if row.ties_leader and not (row is rival and "not separable" in sentence)]
    if tied:
        also = "also " if "not separable" in sentence else ""
        details.append(f"The lead is {also}not separable from {listing(tied)}.")
    details.extend(_cost(leader, rival, base))
    details.extend(_power(scored))
    return sentence, details


def _score_words(row: Row, scale: Scale) -> str:
    assert row.score is not None
    words = scale.value(row.score.mean) + scale.unit
    return words if row.score.low is None else f"{words} (95 % CI {scale.interval(row.score)})"


def _against(
    row: Row, base: Row, comparison: Comparison, scale: Scale, leader_is_base: bool = False
) -> tuple[str, list[str]]:
    """Sentence and details for a contestant and the baseline, one of which leads."""
    assert row.score is not None
    assert base.score is not None
    first, second = (base, row) if leader_is_base else (row, base)
    assert first.score is not None
    assert second.score is not None
    means = _means(first, second, comparison, scale)
    who = f"{first.label} (the baseline)" if leader_is_base else first.label
    lead = abs(first.score.mean - second.score.mean)
    if row.difference is None:
        sentence = f"{who} has the best mean, {scale.amount(lead)} ahead of {second.label}, not separable from it: "
        return sentence + "they have no seed in common.", [f"{means}."]
    gain = improves(row.difference.mean, comparison.mode) is not leader_is_base and row.difference.mean != 0
    seeds = plural(row.common_seeds, "seed")
    test = f"paired difference {_signed(row.difference, scale)} over {seeds}"
    test += f", {p_words(row.p_holm)}" if row.p_holm is not None else ", too few for a test"
    detail = f"{means}; {test}."
    if row.difference.mean == 0:
        same = "have the same mean" if lead == 0 else f"have the same mean over the {seeds} in common"
        return f"{who} and {second.label} {same}, not separable.", [detail]
    by = scale.amount(row.difference.mean)
    if not gain:  # the seeds that only one of them has made it the leader
        what = "it is not separable from" if row.tie else "it is beaten by"
        behind = f"over the {seeds} in common {what} {second.label}, {by} ahead"
        return f"{who} has the best mean, but {behind}.", [detail]
    if row.tie is False:
        nearest = ", the best of the others," if leader_is_base else ""
        return f"{who} beats {second.label}{nearest} by {by}.", [detail]
    return f"{who} leads by {by}, not separable from {second.label} with {seeds}.", [detail]


def _without_baseline(leader: Row, rival: Row, comparison: Comparison, scale: Scale) -> tuple[str, list[str]]:
    assert leader.score is not None
    assert rival.score is not None
    lead = scale.amount(leader.score.mean - rival.score.mean)
    seeds = plural(min(leader.count, rival.count), "seed")
    p = p_words(rival.p_leader) if rival.p_leader is not None else "too few for a test"
    details = [f"{_means(leader, rival, comparison, scale)}; {p}. The comparison has no baseline."]
    if rival.ties_leader:
        return f"{leader.label} leads by {lead}, not separable from {rival.label} with {seeds}.", details
    return f"{leader.label} beats {rival.label}, the second, by {lead}.", details


def _means(first: Row, second: Row, comparison: Comparison, scale: Scale) -> str:
    means = " against ".join(f"{scale.value(row.score.mean)}{scale.unit}" for row in (first, second) if row.score)
    where = f", where {better(comparison)}" if comparison.mode == "min" else ""
    return f"{means} {score_name(comparison)}{where}"


def _signed(interval: Interval, scale: Scale) -> str:
    words = scale.value(interval.mean, sign=True) + scale.difference_unit
    return words if interval.low is None else f"{words} (95 % CI {scale.interval(interval, sign=True)})"


def _cost(leader: Row, rival: Row, base: Row | None) -> list[str]:
    """What the leader costs against the baseline, or the second where it is the baseline or there is none."""
    other = base if base is not None and base is not leader else rival
    parts = []
    steps = f" ({duration(leader.step_time_s)} against {duration(other.step_time_s)})"
    for ratio, words in (
        (times(leader.step_time_s, other.step_time_s), f"the step time{steps}"),
        (times(leader.parameters, other.parameters), "the parameters"),
        (times(leader.flops, other.flops), "the FLOPs"),
        (times(leader.memory_bytes, other.memory_bytes), f"the memory ({leader.memory_kind})"),
    ):
        if ratio != NOTHING:
            parts.append(f"{ratio} {words}")
    if not parts:
        return []
    return [f"Against {other.label}, {leader.label} takes {listing(parts)}."]


def _power(scored: Sequence[Row]) -> list[str]:
    """Says so where so few seeds could not have separated anything."""
    tested = [row for row in scored if row.p_value is not None] or [row for row in scored if row.p_leader is not None]
    most, m = max((row.common_seeds or row.count for row in tested), default=1), max(1, len(tested))
    smallest = min(1.0, smallest_p(most) * m)
    if smallest <= ALPHA or not any(row.tie or row.ties_leader for row in scored):
        return []
    corrected = f", {smallest:.3g} after Holm's correction over {m} comparisons" if m > 1 else ""
    more = f"; with the correction, {seeds_needed(m)}" if seeds_needed(m) > seeds_needed() else ""
    return [
        f"With {plural(most, 'seed')} the smallest two-sided p that the test can give is {smallest_p(most):.3g}"
        f"{corrected}: {seeds_needed()} common seeds are needed to reach {ALPHA} in one comparison{more}."
    ]
