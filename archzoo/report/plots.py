"""The report's pictures, as SVG text. Drawn at 72 dpi, so that one unit of a picture is one px at 100 % zoom."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from archzoo.report.canvas import (
    DASHES,
    GRID,
    HEIGHT,
    INK,
    LABEL_LENGTH,
    MARKERS,
    MUTED,
    PALETTE,
    PAPER,
    POINTS,
    SMALL,
    WIDTH,
    Picture,
    Style,
    draw_frame,
    draw_line,
    end_labels,
    few_ticks,
    fraction,
    log_axis,
    new_axes,
    plain_matplotlib,
    plain_tick,
    text_width,
    thousands_tick,
    to_svg,
)
from archzoo.report.lines import score_lines
from archzoo.report.load import Comparison, Contestant, number
from archzoo.report.placing import around, leader_line, place_labels, side_by_side
from archzoo.report.ranking import Row, by_size
from archzoo.report.scaling import all_series
from archzoo.report.stats import Interval
from archzoo.report.wording import Scale, plural, score_label, score_name

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve: TypeAlias = "tuple[np.ndarray, np.ndarray] | None"
"""Steps and values of one run, or None if it logged none."""


def styles(comparison: Comparison, baselines: Sequence[str]) -> dict[str, Style]:
    """Label -> style. The baseline is grey; the others take colours by name, and keep them as scores change.

    Where there are series, a layer has one colour, and a series one marker and one dash at all its sizes.
    """
    labels = sorted({group.label for group in comparison.groups})
    if any(group.series for group in comparison.groups):
        return _series_styles(comparison, baselines)
    out = {}
    place = 1
    for label in labels:
        if label in baselines:
            out[label] = Style(0, PALETTE[0][0], *MARKERS[0], "-")
            continue
        index = 1 + (place - 1) % (len(PALETTE) - 1)
        out[label] = Style(index, PALETTE[index][0], *MARKERS[place % len(MARKERS)], DASHES[place % len(DASHES)])
        place += 1
    return out


def _series_styles(comparison: Comparison, baselines: Sequence[str]) -> dict[str, Style]:
    grey = {group.layer for group in comparison.groups if group.label in baselines}
    variants: dict[str, list[str]] = {}
    for group in sorted(comparison.groups, key=lambda group: (group.layer not in grey, group.layer, group.label)):
        names = variants.setdefault(group.layer, [])
        if (name := group.series or group.label) not in names:
            names.append(name)
    first = min(len(grey), 1)  # colour of the first layer that is not the baseline's
    out = {}
    for group in comparison.groups:
        place = list(variants).index(group.layer)
        index = 0 if group.layer in grey else 1 + (place - first) % (len(PALETTE) - 1)
        variant = variants[group.layer].index(group.series or group.label)
        marker = MARKERS[(place + len(variants) * variant) % len(MARKERS)]
        out[group.label] = Style(index, PALETTE[index][0], *marker, DASHES[variant % len(DASHES)])
    return out


def draw(
    comparison: Comparison, rows: Sequence[Row], scale: Scale, looks: Mapping[str, Style], prefix: str = ""
) -> dict[str, Picture]:
    """All pictures of one task, by name; one that has no data is left out.

    Args:
        comparison: One task's.
        rows: What `rank` made of it.
        scale: How its scores are written.
        looks: What `styles` gave.
        prefix: Put before the pictures' file names.
    """
    with plain_matplotlib():
        short = _short_labels(comparison.groups)
        pictures = [_ranking(comparison, rows, scale, looks, short)]
        keys = {f"val/{comparison.metric}": 0, "train/loss": POINTS}
        curves: dict[str, dict[Path, Curve]] = {key: {} for key in keys}
        shown = (run for group in comparison.groups for run in group.runs)
        for run in shown:  # one at a time: all lines of all runs may take much memory
            records = run.metrics()
            for key, bins in keys.items():
                curves[key][run.folder] = _points(records, key, bins)
        pictures += [_curves(comparison, rows, curves[key], key, scale, looks, short) for key in keys]
        series = all_series(comparison, rows)
        memory_kind = rows[0].memory_kind if rows else ""
        costs: list[tuple[str, str, str, Callable[[Row], float | None]]] = [
            ("parameters", "Parameters", "", lambda row: row.parameters),
            ("flops", "FLOPs per sample, forward", "", lambda row: row.flops),
            ("step-time", "Step time, median", "s", lambda row: row.step_time_s),
            ("memory", f"Memory: {memory_kind}", "B", lambda row: row.memory_bytes),
        ]
        for name, title, unit, cost in costs:
            known = [x for row in rows if row.score is not None and (x := cost(row)) is not None and x > 0]
            if len(known) < 2:
                continue
            log_x = max(known) / min(known) > 8
            divisor, prefixed = _unit(math.sqrt(min(known) * max(known)) if log_x else max(known), unit)
            axis = (title, divisor, prefixed)
            if series:
                pictures.append(score_lines(comparison, series, scale, looks, name, axis, cost))
            else:
                pictures.append(_trade_off(comparison, rows, scale, looks, short, name, axis, cost))
    return {
        picture.name: Picture(prefix + picture.name, picture.title, picture.caption, picture.svg)
        for picture in pictures
        if picture is not None
    }


def _ranking(
    comparison: Comparison, rows: Sequence[Row], scale: Scale, looks: Mapping[str, Style], short: Mapping[str, str]
) -> Picture | None:
    scored = [row for row in rows if row.score is not None]
    if not scored:
        return None
    contests = by_size(scored)
    sized = len(contests) > 1
    names = {
        row.label: row.series if sized and 0 < len(row.series) <= LABEL_LENGTH else short[row.label] for row in scored
    }
    slots = len(scored) + (len(contests) if sized else 0)
    step = 25.0 if slots <= 12 else 20.0
    name_width = max(text_width(name) for name in [*names.values(), *contests]) + 14
    value_width = max(text_width(scale.value(row.score.mean)) for row in scored if row.score) + 12
    top, bottom = 8.0, 48.0
    height = top + bottom + step * slots + 8
    figure, axes = new_axes(WIDTH, height, name_width, value_width, top, bottom)
    log = _log_scores(comparison, rows)
    low, high = _score_limits(rows, scale, log)
    axes.set_xlim(low, high)
    if log:
        log_axis(axes, "x")
    else:
        axes.xaxis.set_major_formatter(plain_tick)
        axes.xaxis.set_major_locator(few_ticks())
    axes.set_ylim(slots - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for spine in ("left", "right", "top"):
        axes.spines[spine].set_visible(False)
    place = -1
    for row in scored:
        assert row.score is not None
        place += 1
        if sized and row is contests[row.size][0]:
            y = axes.transData.transform((low, place))[1]
            head = fraction(figure, name_width - 10, y - 1)
            figure.text(*head, row.size, ha="right", va="center", color=MUTED, fontsize=SMALL)
            place += 1
        look = looks[row.label]
        if row.leader or row.ties_leader:
            axes.axhspan(place - 0.46, place + 0.46, color=GRID, alpha=0.55, linewidth=0, zorder=0)
        if row.score.low is not None and row.score.high is not None:
            ends = [scale.factor * row.score.low, scale.factor * row.score.high]
            axes.plot([max(ends[0], low), min(ends[1], high)], [place] * 2, color=look.colour, linewidth=2.2)
            for end, edge, marker in ((ends[0], low, "<"), (ends[1], high, ">")):  # the interval goes on
                if (end < edge) if marker == "<" else (end > edge):
                    axes.plot([edge], [place], marker=marker, color=look.colour, markersize=5, clip_on=False)
        if row.count > 1:
            values = [scale.factor * value for value in row.values]
            axes.plot(
                values, [place] * len(values), "|", color=look.colour, markersize=9, alpha=0.75, markeredgewidth=1
            )
        axes.plot(
            [scale.factor * row.score.mean],
            [place],
            look.marker,
            color=look.colour,
            markersize=look.size,
            markeredgecolor=PAPER,
            markeredgewidth=0.6,
        )
        y = axes.transData.transform((low, place))[1]
        left, right = name_width, WIDTH - value_width
        figure.text(*fraction(figure, left - 10, y), names[row.label], ha="right", va="center", color=INK)
        figure.text(
            *fraction(figure, right + 8, y),
            scale.value(row.score.mean),
            ha="left",
            va="center",
            color=INK,
            fontsize=SMALL,
        )
    axes.set_xlabel(score_label(comparison, scale))
    caption = (
        "Mean over seeds with its 95 % confidence interval; strokes are single seeds, an arrow says that the interval "
        "goes on. Shaded: the leader, and all that are not separable from it."
        + (" Contestants compete at one size." if sized else "")
    )
    return Picture("ranking", "Ranking", caption, to_svg(figure, f"Ranking by {score_name(comparison)}"))


def _curves(
    comparison: Comparison,
    rows: Sequence[Row],
    curves: Mapping[Path, Curve],
    key: str,
    scale: Scale,
    looks: Mapping[str, Style],
    short: Mapping[str, str],
) -> Picture | None:
    import numpy as np

    is_score = not key.startswith("train/")
    factor = scale.factor if is_score else 1.0
    lines = {}  # label -> (steps, mean, low, high)
    strays = []  # (label, status, steps, values): runs that do not count, up to where they got
    for group in sorted(comparison.groups, key=lambda group: [row.label for row in rows].index(group.label)):
        counted = {run.folder for run in group.counted}
        done = [points for run in group.runs if run.folder in counted and (points := curves[run.folder])]
        if done:
            steps = np.unique(np.concatenate([run_steps for run_steps, _ in done]))
            grid = np.stack([np.interp(steps, s, v, left=np.nan, right=np.nan) for s, v in done]) * factor
            whole = np.isfinite(grid).all(axis=0)  # a mean over changing seeds would jump
            if whole.any():
                grid = grid[:, whole]
                lines[group.label] = (steps[whole], grid.mean(axis=0), grid.min(axis=0), grid.max(axis=0))
        for run in group.runs:
            if run.status != "done" and (points := curves[run.folder]):
                strays.append((group.label, run.status, points[0], points[1] * factor))
    if not lines and not strays:
        return None

    values = np.concatenate([np.concatenate(line[2:]) for line in lines.values()] or [s[3] for s in strays])
    last = np.array([line[1][-1] for line in lines.values()] or [s[3][-1] for s in strays])
    log = bool(values.min() > 0 and values.max() / values.min() > 20 and (not is_score or comparison.mode == "min"))
    low, high = _curve_limits(values, last, comparison.mode if is_score else "min", log)
    if is_score and scale.percent:
        low, high = max(low, -1.0), min(high, 100 + 0.02 * (100 - max(low, -1.0)))
    names = list(dict.fromkeys([*lines, *(label for label, *_ in strays)]))
    label_width = max(text_width(short[name], SMALL) for name in names) + 44
    figure, axes = new_axes(WIDTH, max(HEIGHT, 72 + (SMALL + 5) * len(names)), 60, label_width, 12, 48)
    steps_shown = [line[0] for line in lines.values()] + [steps for _, _, steps, _ in strays]
    first, final = min(s.min() for s in steps_shown), max(s.max() for s in steps_shown)
    axes.set_xlim(min(first, 0), final if final > 0 else 1)
    axes.set_ylim(low, high)
    if log:
        log_axis(axes, "y")
    else:
        axes.yaxis.set_major_formatter(plain_tick)
    axes.xaxis.set_major_formatter(thousands_tick)
    axes.xaxis.set_major_locator(few_ticks())
    draw_frame(axes)

    ends = {}
    sizes = list(dict.fromkeys(row.size for row in rows))
    thickness = {row.label: 1.7 if len(sizes) < 2 else 0.9 + 1.6 * sizes.index(row.size) / len(sizes) for row in rows}
    for label, (steps, mean, lowest, highest) in reversed(lines.items()):  # the best on top
        look = looks[label]
        if (highest > lowest).any():
            axes.fill_between(steps, lowest, highest, color=look.colour, alpha=0.16, linewidth=0)
        marker = look.marker if len(steps) == 1 else ""
        axes.plot(steps, mean, color=look.colour, linestyle=look.dash, linewidth=thickness[label], marker=marker)
        ends[label] = (steps[-1], mean[-1])
    for label, status, steps, stray in strays:
        look = looks[label]
        axes.plot(steps, stray, color=look.colour, linestyle=(0, (1, 1.5)), linewidth=1.1, alpha=0.9)
        end = (steps[-1], float(np.clip(stray[-1], low, high)))
        axes.plot(
            *end, "x" if status in ("diverged", "failed") else "o", color=look.colour, markersize=6, clip_on=False
        )
        ends.setdefault(label, end)
    end_labels(figure, axes, ends, looks, short, label_width)
    axes.set_xlabel("Step")
    what = f"Validation {comparison.metric}" if is_score else "Training loss"
    axes.set_ylabel(what + (scale.unit and " (%)" if is_score else ""))
    several = any((line[3] > line[2]).any() for line in lines.values())
    caption = "Mean over seeds; the band spans the lowest to the highest seed." if several else "One seed each."
    caption += " The larger the thicker." if len(sizes) > 1 else ""
    if not lines:
        caption = "No run counts yet."
    if not is_score and max(len(steps) for steps in steps_shown) == POINTS:
        caption += f" Each point is the mean of a {POINTS}th of the run."
    caption += " Early values may lie outside the picture." if values.min() < low or values.max() > high else ""
    if strays:
        caption += " Dotted: single runs that do not count, to a cross where they diverged or failed."
    name = "curves-score" if is_score else "curves-loss"
    return Picture(name, what, caption, to_svg(figure, f"{what} over training steps"))


def _trade_off(
    comparison: Comparison,
    rows: Sequence[Row],
    scale: Scale,
    looks: Mapping[str, Style],
    short: Mapping[str, str],
    name: str,
    axis: tuple[str, float, str],
    cost: Callable[[Row], float | None],
) -> Picture:
    title, divisor, prefix = axis
    points = [(row, row.score, x) for row in rows if row.score is not None and (x := cost(row)) is not None and x > 0]
    xs = [x for _, _, x in points]
    log_x = max(xs) / min(xs) > 8
    log_y = _log_scores(comparison, [row for row, _, _ in points])
    low, high = _score_limits([row for row, _, _ in points], scale, log_y)
    left, right = _cost_limits([x / divisor for x in xs], log_x)
    true = [(x / divisor, scale.factor * score.mean) for _, score, x in points]

    def canvas(label_width: float) -> tuple["Figure", "Axes", list[tuple[float, float]]]:
        figure, axes = new_axes(WIDTH, HEIGHT, 60, label_width, 12, 48)
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        if log_x:
            log_axis(axes, "x")
        else:
            axes.xaxis.set_major_formatter(thousands_tick)
            axes.xaxis.set_major_locator(few_ticks())
        if log_y:
            log_axis(axes, "y")
        else:
            axes.yaxis.set_major_formatter(plain_tick)
        draw_frame(axes)
        return figure, axes, [(float(x), float(y)) for x, y in axes.transData.transform(true)]

    front = pareto([(x, score.mean) for _, score, x in points], comparison.mode)
    texts = [short[row.label] for row, _, _ in points]
    sizes = [(text_width(text, SMALL), SMALL + 2.5) for text in texts]
    label_width = 0.0
    spots: list[tuple[float, float]] | None = None
    for label_width in (14.0, max(width for width, _ in sizes) + 40):  # labels at the points; too crowded: at the side
        figure, axes, where = canvas(label_width)
        heights = [
            tuple(axes.transData.transform([(x, end) for end in _clipped(score, scale, low, high)])[:, 1])
            for (x, _), (_, score, _) in zip(true, points, strict=True)
        ]
        where = side_by_side(where, heights, axes.bbox.extents)
        shown = [(float(x), y) for (x, _), (_, y) in zip(axes.transData.inverted().transform(where), true, strict=True)]
        stairs = _stairs([shown[i] for i in front])
        stairs = [(stairs[0][0], low if comparison.mode == "max" else high), *stairs, (right, stairs[-1][1])]
        walls = [around(*axes.transData.transform(ends)) for ends in pairwise(stairs)]
        bars = [(x - 2, bottom, x + 2, top) for (x, _), (bottom, top) in zip(where, heights, strict=True)]
        spots = place_labels(where, sizes, bars, walls, axes.bbox.extents)
        if spots is not None:
            break

    for i, ((row, score, _), (x, y)) in enumerate(zip(points, shown, strict=True)):
        look = looks[row.label]
        if score.low is not None:
            ends = _clipped(score, scale, low, high)
            axes.plot([x, x], ends, color=look.colour, linewidth=1.6, alpha=0.85, zorder=2)
        ring = INK if i in front else look.colour
        axes.plot(
            [x],
            [y],
            look.marker,
            color=look.colour,
            markersize=look.size,
            markeredgecolor=ring,
            markeredgewidth=0.8,
            zorder=4,
        )
    axes.plot(*zip(*stairs, strict=True), color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    if spots is None:
        listed = {row.label: at for (row, _, _), at in zip(points, shown, strict=True)}
        end_labels(figure, axes, listed, looks, short, label_width, leaders=False)
    else:
        for point, text, size, (box_x, box_y) in zip(where, texts, sizes, spots, strict=True):
            x0, y0, x1, y1 = leader_line(point, (box_x, box_y), size)
            if math.hypot(x1 - x0, y1 - y0) > 10:
                draw_line(figure, (x0, x1), (y0, y1), MUTED, 0.6)
            figure.text(*fraction(figure, box_x, box_y + 2.5), text, fontsize=SMALL, color=INK, va="baseline")
    axes.set_xlabel(f"{title} ({prefix})" if prefix else title)
    axes.set_ylabel(score_label(comparison, scale))
    scored = sum(row.score is not None for row in rows)
    caption = "Mean and 95 % confidence interval of the score. Dashed, and ringed points: the Pareto front."
    if any(abs(x - at) > 1e-6 * (right - left) for (x, _), (at, _) in zip(shown, true, strict=True)):
        caption += " Points that would cover each other are moved a little to the side."
    if len(points) < scored:
        caption += f" Left out, for want of the figure: {plural(scored - len(points), 'contestant')}."
    what = f"Score against {title[0].lower() if not title.startswith('FLOP') else 'F'}{title[1:]}"
    return Picture(f"score-{name}", what, caption, to_svg(figure, what))


def pareto(points: Sequence[tuple[float, float]], mode: str) -> set[int]:
    """Indices of the (cost, score) points that no other one beats in one respect without losing in the other."""
    sign = 1.0 if mode == "max" else -1.0
    return {
        i
        for i, (cost, score) in enumerate(points)
        if not any(
            other_cost <= cost and sign * other >= sign * score and (other_cost < cost or sign * other > sign * score)
            for other_cost, other in points
        )
    }


def _clipped(score: Interval, scale: Scale, low: float, high: float) -> tuple[float, float]:
    """An interval's ends as far as the picture shows them; the mean twice where there is no interval."""
    if score.low is None or score.high is None:
        return scale.factor * score.mean, scale.factor * score.mean
    return max(scale.factor * score.low, low), min(scale.factor * score.high, high)


def _stairs(front: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The front as a flight of stairs: its points and the corners between them."""
    path = sorted(front)
    return [path[0], *(corner for a, b in pairwise(path) for corner in ((b[0], a[1]), b))]


def _points(records: Sequence[Mapping[str, Any]], key: str, bins: int) -> Curve:
    """(steps, values) of one metric of one run, ordered by step; None if it has none."""
    import numpy as np

    by_step: dict[float, float] = {}  # a resumed run may have logged a step twice: the later line holds
    for record in records:
        value, step = number(record.get(key)), number(record.get("step"))
        if value is not None and step is not None:
            by_step[step] = value
    if not by_step:
        return None
    steps = np.array(sorted(by_step))
    values = np.array([by_step[step] for step in steps.tolist()])
    if bins and len(steps) > bins:
        place = np.minimum((steps - steps[0]) * bins / (steps[-1] - steps[0]), bins - 1).astype(int)
        members = np.bincount(place, minlength=bins)
        full = members > 0
        steps = np.bincount(place, steps, bins)[full] / members[full]
        values = np.bincount(place, values, bins)[full] / members[full]
    return steps, values


def _curve_limits(values: "np.ndarray", last: "np.ndarray", mode: str, log: bool) -> tuple[float, float]:
    """The range of all curves, less the far-off beginning that would press their ends together."""
    lowest, highest = float(values.min()), float(values.max())
    if log:
        return lowest / 1.15, highest * 1.15
    room = max(4 * float(last.max() - last.min()), 0.12 * (highest - lowest))
    if mode == "max":
        lowest = max(lowest, float(last.min()) - room)
    else:
        highest = min(highest, float(last.max()) + room)
    margin = 0.04 * (highest - lowest) or abs(highest) * 0.05 or 0.05
    return lowest - margin, highest + margin


def _score_limits(rows: Sequence[Row], scale: Scale, log: bool) -> tuple[float, float]:
    """Shows every seed; of intervals, no more than as much again as the seeds span (few seeds have huge ones)."""
    values = [scale.factor * value for row in rows for value in row.values]
    ends = [scale.factor * e for row in rows if row.score for e in (row.score.low, row.score.high) if e is not None]
    low, high = min(values), max(values)
    if log:
        ratio = (high / low) ** 0.25
        return max(min([low, *(e for e in ends if e > 0)]), low / ratio) / 1.15, min(
            max([high, *ends]), high * ratio
        ) * 1.15
    span = high - low or abs(high) * 0.02 or 1.0
    shown_low, shown_high = max(min([low, *ends]), low - 0.6 * span), min(max([high, *ends]), high + 0.6 * span)
    margin = 0.05 * (shown_high - shown_low) or span / 2
    shown_low, shown_high = shown_low - margin, shown_high + margin
    if scale.percent:
        shown_high = min(shown_high, 100 + 0.04 * (100 - shown_low))
        shown_low = max(shown_low, -0.04 * shown_high)
    return shown_low, shown_high


def _log_scores(comparison: Comparison, rows: Sequence[Row]) -> bool:
    values = [value for row in rows for value in row.values]
    return comparison.mode == "min" and min(values) > 0 and max(values) / min(values) > 20


def _cost_limits(xs: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(xs), max(xs)
    if log:
        ratio = (high / low) ** 0.12
        return low / ratio, high * ratio
    margin = max(0.12 * (high - low), 0.12 * high)  # equal costs must not be blown up to a difference
    return max(0.0, low - margin), high + margin


def _unit(value: float, unit: str) -> tuple[float, str]:
    """Divisor and unit in which an axis around that value is written."""
    if unit == "B":
        power = min(5, max(0, int(math.log(value, 1024))))
        return 1024.0**power, ("B", "KiB", "MiB", "GiB", "TiB", "PiB")[power]
    power = math.floor(math.log10(value) / 3 + 1e-9)
    if unit == "s":
        power = min(0, max(-3, power))
        return 1000.0**power, ("s", "ms", "µs", "ns")[-power]
    power = min(5, max(0, power))
    return 1000.0**power, ("", "thousand", "million", "billion", "10¹²", "10¹⁵")[power]


def _short_labels(groups: Sequence[Contestant]) -> dict[str, str]:
    """Labels short enough for a picture that still differ: options by their initials, then without the middle."""
    out: dict[str, str] = {}
    for group in groups:
        text = group.label
        if len(text) > LABEL_LENGTH and group.options:
            text = f"{group.layer} ({', '.join(f'{_initials(k)}={v}' for k, v in group.options.items())})"
        if len(text) > LABEL_LENGTH:
            head = LABEL_LENGTH // 2
            text = f"{text[:head]}…{text[len(text) - (LABEL_LENGTH - head - 1) :]}"
        number = 2
        base = text
        while text in out.values():
            text = f"{base[: LABEL_LENGTH - 3]} #{number}"
            number += 1
        out[group.label] = text
    return out


def _initials(key: str) -> str:
    words = [word for word in re.split(r"[._]", key) if word]
    return "".join(word[0] for word in words) if len(words) > 1 else key[:3]
