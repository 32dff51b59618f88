"""The report's pictures, as SVG text. Drawn at 72 dpi, so that one unit of a picture is one px at 100 % zoom."""

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from archzoo.report.load import Comparison, Contestant, number
from archzoo.report.ranking import Row
from archzoo.report.stats import Interval
from archzoo.report.wording import Scale, plural, score_name

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 520.0, 340.0
FONT_SIZE = 12.0
SMALL = 11.0
LABEL_LENGTH = 26
"""Characters of a label in a picture; the tables have it in full."""
POINTS = 160
"""Points of a training-loss curve: the mean of each of so many stretches of the run."""

PAPER, INK, MUTED, GRID = "#fefefe", "#1f2329", "#69717d", "#e4e7eb"

# Okabe and Ito's colours, without yellow, and Tol's darker ones: safe for the colour-blind; marker and dash differ too.
# The first is the baseline's. In an HTML page each becomes a CSS variable, with the second colour on a dark ground.
PALETTE = (
    ("#5b6470", "#a9b2bd"),
    ("#0072b2", "#57aee3"),
    ("#d55e00", "#f08a43"),
    ("#009e73", "#35c79b"),
    ("#cc79a7", "#e29ac3"),
    ("#de9a00", "#f2b733"),
    ("#332288", "#9a90f0"),
    ("#882255", "#d16a9d"),
    ("#56b4e9", "#a5daf9"),
    ("#999933", "#c9c962"),
    ("#7a4b2a", "#c48f66"),
    ("#117733", "#63bf7c"),
)
# Each with the size, in px, at which it looks as large as the others.
_MARKERS = tuple(zip("osD^vPX<>ph*", (7.5, 7.0, 6.6, 8.4, 8.4, 8.6, 8.2, 8.4, 8.4, 8.6, 8.4, 11.0), strict=True))
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
_FONT = "'DejaVu Sans', Verdana, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


Curve: TypeAlias = "tuple[np.ndarray, np.ndarray] | None"
"""Steps and values of one run, or None if it logged none."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a contestant looks in every picture."""

    index: int
    colour: str
    marker: str
    size: float
    """Of the marker, in px."""
    dash: Any


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG file and what to say below it."""

    name: str
    """File name without `.svg`."""
    title: str
    caption: str
    svg: str


def styles(comparison: Comparison, baselines: Sequence[str]) -> dict[str, Style]:
    """Label -> style. The baseline is grey; the others take colours by name, and keep them as scores change."""
    labels = sorted({group.label for group in comparison.groups})
    out = {}
    place = 1
    for label in labels:
        if label in baselines:
            out[label] = Style(0, PALETTE[0][0], *_MARKERS[0], "-")
            continue
        index = 1 + (place - 1) % (len(PALETTE) - 1)
        out[label] = Style(index, PALETTE[index][0], *_MARKERS[place % len(_MARKERS)], _DASHES[place % len(_DASHES)])
        place += 1
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
    with _plain_matplotlib():
        short = _short_labels(comparison.groups)
        pictures = [_ranking(comparison, rows, scale, looks, short)]
        keys = {f"val/{comparison.metric}": 0, "train/loss": POINTS}
        curves: dict[str, dict[Path, Curve]] = {key: {} for key in keys}
        for run in comparison.runs:  # one at a time: all lines of all runs may take much memory
            records = run.metrics()
            for key, bins in keys.items():
                curves[key][run.folder] = _points(records, key, bins)
        pictures += [_curves(comparison, rows, curves[key], key, scale, looks, short) for key in keys]
        memory_kind = rows[0].memory_kind if rows else ""
        costs: list[tuple[str, str, str, Callable[[Row], float | None]]] = [
            ("parameters", "Parameters", "", lambda row: row.parameters),
            ("flops", "FLOPs per sample, forward", "", lambda row: row.flops),
            ("step-time", "Step time, median", "s", lambda row: row.step_time_s),
            ("memory", f"Memory: {memory_kind}", "B", lambda row: row.memory_bytes),
        ]
        pictures += [_trade_off(comparison, rows, scale, looks, short, *cost) for cost in costs]
    return {
        picture.name: Picture(prefix + picture.name, picture.title, picture.caption, picture.svg)
        for picture in pictures
        if picture is not None
    }


def inline(picture: Picture) -> str:
    """The picture as an element of an HTML page: colours are the page's, and no id is on the page twice."""
    svg = picture.svg[picture.svg.index("<svg") :]
    for colour, variable in (
        (PAPER, "var(--paper)"),
        (INK, "var(--ink)"),
        (MUTED, "var(--muted)"),
        (GRID, "var(--grid)"),
    ):
        svg = svg.replace(colour, variable)
    for index, (light, _) in enumerate(PALETTE):
        svg = svg.replace(light, f"var(--s{index})")
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{picture.name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{picture.name}-", svg)
    svg = re.sub(r"\n? <title>.*?</title>", "", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_escape(picture.title)}" ', 1)


def _ranking(
    comparison: Comparison, rows: Sequence[Row], scale: Scale, looks: Mapping[str, Style], short: Mapping[str, str]
) -> Picture | None:
    scored = [row for row in rows if row.score is not None]
    if not scored:
        return None
    step = 25.0 if len(scored) <= 12 else 20.0
    name_width = max(_text_width(short[row.label]) for row in scored) + 14
    value_width = max(_text_width(scale.value(row.score.mean)) for row in scored if row.score) + 12
    top, bottom = 8.0, 48.0
    height = top + bottom + step * len(scored) + 8
    figure, axes = _axes(WIDTH, height, name_width, value_width, top, bottom)
    log = _log_scores(comparison, rows)
    low, high = _score_limits(rows, scale, log)
    axes.set_xlim(low, high)
    if log:
        _log_axis(axes, "x")
    axes.set_ylim(len(scored) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for spine in ("left", "right", "top"):
        axes.spines[spine].set_visible(False)
    for place, row in enumerate(scored):
        assert row.score is not None
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
        figure.text(*_at(figure, left - 10, y), short[row.label], ha="right", va="center", color=INK)
        figure.text(
            *_at(figure, right + 8, y), scale.value(row.score.mean), ha="left", va="center", color=INK, fontsize=SMALL
        )
    axes.set_xlabel(_score_label(comparison, scale))
    caption = (
        "Mean over seeds with its 95 % confidence interval; strokes are single seeds, an arrow says that the interval "
        "goes on. Shaded: the leader, and all that are not separable from it."
    )
    return Picture("ranking", "Ranking", caption, _svg(figure, f"Ranking by {score_name(comparison)}"))


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
    label_width = max(_text_width(short[name], SMALL) for name in names) + 44
    figure, axes = _axes(WIDTH, max(HEIGHT, 72 + (SMALL + 5) * len(names)), 60, label_width, 12, 48)
    steps_shown = [line[0] for line in lines.values()] + [steps for _, _, steps, _ in strays]
    first, final = min(s.min() for s in steps_shown), max(s.max() for s in steps_shown)
    axes.set_xlim(min(first, 0), final if final > 0 else 1)
    axes.set_ylim(low, high)
    if log:
        _log_axis(axes, "y")
    else:
        axes.yaxis.set_major_formatter(_plain)
    axes.xaxis.set_major_formatter(_thousands)
    axes.xaxis.set_major_locator(_few_ticks())
    _frame(axes)

    ends = {}
    for label, (steps, mean, lowest, highest) in reversed(lines.items()):  # the best on top
        look = looks[label]
        if (highest > lowest).any():
            axes.fill_between(steps, lowest, highest, color=look.colour, alpha=0.16, linewidth=0)
        marker = look.marker if len(steps) == 1 else ""
        axes.plot(steps, mean, color=look.colour, linestyle=look.dash, linewidth=1.7, marker=marker)
        ends[label] = (steps[-1], mean[-1])
    for label, status, steps, stray in strays:
        look = looks[label]
        axes.plot(steps, stray, color=look.colour, linestyle=(0, (1, 1.5)), linewidth=1.1, alpha=0.9)
        end = (steps[-1], float(np.clip(stray[-1], low, high)))
        axes.plot(
            *end, "x" if status in ("diverged", "failed") else "o", color=look.colour, markersize=6, clip_on=False
        )
        ends.setdefault(label, end)
    _end_labels(figure, axes, ends, looks, short, label_width)
    axes.set_xlabel("Step")
    what = f"Validation {comparison.metric}" if is_score else "Training loss"
    axes.set_ylabel(what + (scale.unit and " (%)" if is_score else ""))
    several = any((line[3] > line[2]).any() for line in lines.values())
    caption = "Mean over seeds; the band spans the lowest to the highest seed." if several else "One seed each."
    if not lines:
        caption = "No run counts yet."
    if not is_score and max(len(steps) for steps in steps_shown) == POINTS:
        caption += f" Each point is the mean of a {POINTS}th of the run."
    caption += " Early values may lie outside the picture." if values.min() < low or values.max() > high else ""
    if strays:
        caption += " Dotted: single runs that do not count, to a cross where they diverged or failed."
    name = "curves-score" if is_score else "curves-loss"
    return Picture(name, what, caption, _svg(figure, f"{what} over training steps"))


def _trade_off(
    comparison: Comparison,
    rows: Sequence[Row],
    scale: Scale,
    looks: Mapping[str, Style],
    short: Mapping[str, str],
    name: str,
    title: str,
    unit: str,
    cost: Callable[[Row], float | None],
) -> Picture | None:
    points = [(row, row.score, x) for row in rows if row.score is not None and (x := cost(row)) is not None and x > 0]
    if len(points) < 2:
        return None
    xs = [x for _, _, x in points]
    log_x = max(xs) / min(xs) > 8
    divisor, prefix = _unit(math.sqrt(min(xs) * max(xs)) if log_x else max(xs), unit)
    log_y = _log_scores(comparison, [row for row, _, _ in points])
    low, high = _score_limits([row for row, _, _ in points], scale, log_y)
    left, right = _cost_limits([x / divisor for x in xs], log_x)
    true = [(x / divisor, scale.factor * score.mean) for _, score, x in points]

    def canvas(label_width: float) -> tuple["Figure", "Axes", list[tuple[float, float]]]:
        figure, axes = _axes(WIDTH, HEIGHT, 60, label_width, 12, 48)
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        if log_x:
            _log_axis(axes, "x")
        else:
            axes.xaxis.set_major_formatter(_thousands)
            axes.xaxis.set_major_locator(_few_ticks())
        if log_y:
            _log_axis(axes, "y")
        else:
            axes.yaxis.set_major_formatter(_plain)
        _frame(axes)
        return figure, axes, [(float(x), float(y)) for x, y in axes.transData.transform(true)]

    front = pareto([(x, score.mean) for _, score, x in points], comparison.mode)
    texts = [short[row.label] for row, _, _ in points]
    sizes = [(_text_width(text, SMALL), SMALL + 2.5) for text in texts]
    label_width = 0.0
    spots: list[tuple[float, float]] | None = None
    for label_width in (14.0, max(width for width, _ in sizes) + 40):  # labels at the points; too crowded: at the side
        figure, axes, where = canvas(label_width)
        heights = [
            tuple(axes.transData.transform([(x, end) for end in _clipped(score, scale, low, high)])[:, 1])
            for (x, _), (_, score, _) in zip(true, points, strict=True)
        ]
        where = _side_by_side(where, heights, axes.bbox.extents)
        shown = [(float(x), y) for (x, _), (_, y) in zip(axes.transData.inverted().transform(where), true, strict=True)]
        stairs = _stairs([shown[i] for i in front])
        stairs = [(stairs[0][0], low if comparison.mode == "max" else high), *stairs, (right, stairs[-1][1])]
        walls = [_around(*axes.transData.transform(ends)) for ends in pairwise(stairs)]
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
        _end_labels(figure, axes, listed, looks, short, label_width, leaders=False)
    else:
        for point, text, size, (box_x, box_y) in zip(where, texts, sizes, spots, strict=True):
            x0, y0, x1, y1 = _leader(point, (box_x, box_y), size)
            if math.hypot(x1 - x0, y1 - y0) > 10:
                _line(figure, (x0, x1), (y0, y1), MUTED, 0.6)
            figure.text(*_at(figure, box_x, box_y + 2.5), text, fontsize=SMALL, color=INK, va="baseline")
    axes.set_xlabel(f"{title} ({prefix})" if prefix else title)
    axes.set_ylabel(_score_label(comparison, scale))
    scored = sum(row.score is not None for row in rows)
    caption = "Mean and 95 % confidence interval of the score. Dashed, and ringed points: the Pareto front."
    if any(abs(x - at) > 1e-6 * (right - left) for (x, _), (at, _) in zip(shown, true, strict=True)):
        caption += " Points that would cover each other are moved a little to the side."
    if len(points) < scored:
        caption += f" Left out, for want of the figure: {plural(scored - len(points), 'contestant')}."
    what = f"Score against {title[0].lower() if not title.startswith('FLOP') else 'F'}{title[1:]}"
    return Picture(f"score-{name}", what, caption, _svg(figure, what))


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


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart in [low, high], in the same order, as near as can be to the given ones.

    Isotonic regression of `position - i * gap`. If they cannot all fit, they are spaced evenly.
    """
    count = len(positions)
    if count > 1 and gap * (count - 1) > high - low:
        gap = (high - low) / (count - 1)
    order = sorted(range(count), key=lambda i: positions[i])
    blocks: list[list[float]] = []  # [mean, members]
    for place, i in enumerate(order):
        blocks.append([positions[i] - place * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, members = blocks.pop()
            before = blocks[-1]
            before[0] = (before[0] * before[1] + mean * members) / (before[1] + members)
            before[1] += members
    flat = [min(max(mean, low), high - (count - 1) * gap) for mean, members in blocks for _ in range(int(members))]
    out = [0.0] * count
    for place, i in enumerate(order):
        out[i] = flat[place] + place * gap
    return out


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in px."""
Segment = tuple[float, float, float, float]
"""From x, y to x, y, in px."""


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bars: Sequence[Box],
    walls: Sequence[Box],
    bounds: Sequence[float],
) -> list[tuple[float, float]] | None:
    """Lower left corners of labels beside their points.

    No label covers another, a point, or a wall or (if that can be had) a bar. None if there is no such placement.
    """
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for avoid_bars in (True, False):
        for order in (
            sorted(range(len(points)), key=lambda i: -points[i][1]),
            sorted(range(len(points)), key=lambda i: points[i][0]),
            sorted(range(len(points)), key=lambda i: -sizes[i][0]),
        ):
            obstacles = [*marks, *walls, *(bars if avoid_bars else ())]
            placed: list[Box] = []
            leaders: list[Segment] = []
            spots: dict[int, tuple[float, float]] = {}
            for i in order:
                spot = _spot(points[i], sizes[i], obstacles, placed, leaders, bounds)
                if spot is None:
                    break
                spots[i] = spot
                x, y = spot
                placed.append((x - 2, y, x + sizes[i][0] + 2, y + sizes[i][1]))
                leaders.append(_leader(points[i], spot, sizes[i]))
            if len(spots) == len(points):
                return [spots[i] for i in range(len(points))]
    return None


# To the right and up in units of the radius, and the part of the label that lies left of there.
_DIRECTIONS = (
    *((1.0, 0.0, 0.0), (-1.0, 0.0, 1.0), (0.0, 1.0, 0.5), (0.0, -1.0, 0.5)),
    *((0.7, 0.7, 0.0), (0.7, -0.7, 0.0), (-0.7, 0.7, 1.0), (-0.7, -0.7, 1.0)),
    *((0.0, 1.0, 0.1), (0.0, 1.0, 0.9), (0.0, -1.0, 0.1), (0.0, -1.0, 0.9)),
)


def _spot(
    point: tuple[float, float],
    size: tuple[float, float],
    obstacles: Sequence[Box],
    placed: Sequence[Box],
    leaders: Sequence[Segment],
    bounds: Sequence[float],
) -> tuple[float, float] | None:
    """The nearest free place of a label; no label that is placed, nor its leader, crosses it or its own leader."""
    (x, y), (width, height) = point, size
    for radius in (7.0, 12.0, 18.0, 26.0, 36.0):
        for right, up, anchor in _DIRECTIONS:
            left, low = x + right * radius - anchor * width, y + up * radius - height * (1 - up) / 2
            box = (left, low, left + width, low + height)
            inside = box[0] >= bounds[0] + 2 and box[1] >= bounds[1] + 2 and box[2] <= bounds[2] - 2
            if not inside or box[3] > bounds[3] - 2 or any(_overlap(box, other) for other in (*obstacles, *placed)):
                continue
            leader = _leader(point, (left, low), size)
            if not any(_crosses(leader, other) for other in placed) and not any(
                _crosses(other, box) for other in leaders
            ):
                return left, low
    return None


def _leader(point: tuple[float, float], spot: tuple[float, float], size: tuple[float, float]) -> Segment:
    """The line from a point to the nearest place of its label."""
    (x, y), (left, low), (width, height) = point, spot, size
    return (x, y, min(max(x, left), left + width), min(max(y, low), low + height))


def _crosses(segment: Segment, box: Box) -> bool:
    """Whether a line meets a box (Liang and Barsky)."""
    x0, y0, x1, y1 = segment
    enter, leave = 0.0, 1.0
    for start, change, low, high in ((x0, x1 - x0, box[0], box[2]), (y0, y1 - y0, box[1], box[3])):
        if not change:
            if not low < start < high:
                return False
            continue
        first, second = sorted(((low - start) / change, (high - start) / change))
        enter, leave = max(enter, first), min(leave, second)
    return enter < leave


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _around(a: Sequence[float], b: Sequence[float]) -> Box:
    """A box about an upright or level line, in px."""
    return (
        float(min(a[0], b[0])) - 2,
        float(min(a[1], b[1])) - 2,
        float(max(a[0], b[0])) + 2,
        float(max(a[1], b[1])) + 2,
    )


def _side_by_side(
    points: Sequence[tuple[float, float]], heights: Sequence[tuple[float, ...]], bounds: Sequence[float]
) -> list[tuple[float, float]]:
    """Points moved sideways, a little, if the bars of any two (from, to, in px) would cover each other."""
    gap = min(8.0, 24.0 / max(1, len(points) - 1))  # so little that it does not look like a difference in cost
    spans = [(x, min(y, *ends) - 5, max(y, *ends) + 5) for (x, y), ends in zip(points, heights, strict=True)]
    if not any(abs(a[0] - b[0]) < 2 and a[1] < b[2] and b[1] < a[2] for a, b in combinations(spans, 2)):
        return list(points)
    xs = spread([x for x, _ in points], gap, bounds[0] + 8, bounds[2] - 8)
    return [(x, y) for x, (_, y) in zip(xs, points, strict=True)]


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


def _score_label(comparison: Comparison, scale: Scale) -> str:
    name = score_name(comparison)
    better = ", lower is better" if comparison.mode == "min" else ""
    return f"{name[:1].upper()}{name[1:]}{' (%)' if scale.percent else ''}{better}"


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
    return "".join(word[0] for word in words) if len(words) > 1 else key[:4]


@contextmanager
def _plain_matplotlib() -> Iterator[None]:
    """matplotlib as it comes, whatever the user's matplotlibrc says, with our few settings."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A label in a script that DejaVu Sans lacks is measured a little wrong, but the viewer's own font draws it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "archzoo",
                "text.parse_math": False,
                "axes.unicode_minus": False,
                "axes.formatter.useoffset": False,
                "font.size": FONT_SIZE,
                "axes.labelsize": FONT_SIZE,
                "xtick.labelsize": SMALL,
                "ytick.labelsize": SMALL,
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "axes.linewidth": 0.8,
                "axes.facecolor": "none",
                "figure.facecolor": PAPER,
                "lines.solid_capstyle": "butt",
            }
        )
        yield


def _axes(width: float, height: float, left: float, right: float, top: float, bottom: float) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes(
        (left / width, bottom / height, max(80.0, width - left - right) / width, (height - top - bottom) / height)
    )
    return figure, axes


def _frame(axes: "Axes") -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _log_axis(axes: "Axes", which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    limits = axes.get_xlim() if which == "x" else axes.get_ylim()
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(limits)
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = math.log10(limits[1] / limits[0])
    room = float(axes.bbox.width) / 55 if which == "x" else float(axes.bbox.height) / 25  # for so many labels
    subs = next((subs for subs in ((1.0, 2.0, 5.0), (1.0, 3.0)) if len(subs) * decades <= room), (1.0,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(_thousands))
    axis.set_minor_formatter(NullFormatter())


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def _plain(value: float, _: object = None) -> str:
    return f"{value:.6g}"


def _thousands(value: float, _: object = None) -> str:
    if value and not 9.99e-4 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _end_labels(
    figure: "Figure",
    axes: "Axes",
    ends: Mapping[str, tuple[float, float]],
    looks: Mapping[str, Style],
    short: Mapping[str, str],
    label_width: float,
    leaders: bool = True,
) -> None:
    """The legend, at the right and in the order of the lines' ends, each joined to its line."""
    _, bottom, right, top = (float(edge) for edge in axes.bbox.extents)
    labels = list(ends)
    where = axes.transData.transform([ends[label] for label in labels])
    clipped = [min(max(float(y), bottom), top) for _, y in where]
    height = SMALL + 4
    places = spread(clipped, height, bottom + height / 2, top - height / 2)
    for label, (x, _), y, place in zip(labels, where, clipped, places, strict=True):
        look = looks[label]
        if leaders:
            _line(figure, (float(x) + 2, right + 4, right + 14), (y, y, place), look.colour, 0.7)
        _line(
            figure, (right + 15, right + 33), (place, place), look.colour, 1.7, look.dash if leaders else "None", look
        )
        figure.text(*_at(figure, right + 37, place), short[label], ha="left", va="center", color=INK, fontsize=SMALL)


def _line(
    figure: "Figure",
    xs: Sequence[float],
    ys: Sequence[float],
    colour: str,
    width: float,
    dash: Any = "-",
    look: Style | None = None,
) -> None:
    """A line in px over the whole figure, with a marker in its middle if a look is given."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import IdentityTransform

    line = Line2D(list(xs), list(ys), color=colour, linewidth=width, linestyle=dash, transform=IdentityTransform())
    figure.add_artist(line)
    if look is not None and dash == "None":
        x, y = [sum(xs) / len(xs) + 3], [sum(ys) / len(ys)]
        marker = Line2D(x, y, color=colour, marker=look.marker, markersize=look.size, transform=IdentityTransform())
        figure.add_artist(marker)


def _at(figure: "Figure", x: float, y: float) -> tuple[float, float]:
    """Pixels -> fractions of the figure."""
    return x / float(figure.bbox.width), y / float(figure.bbox.height)


def _text_width(text: str, size: float = FONT_SIZE) -> float:
    """Width of a text in px, in DejaVu Sans, which is wider than what a viewer takes in its stead."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width = float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return width + 0.5 * size * wide


def _svg(figure: "Figure", title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[: svg.index("<!DOCTYPE")] + svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="([\d.]+)pt" height="([\d.]+)pt"', r'\1width="\2" height="\3"', svg, count=1)
    svg = svg.replace("'DejaVu Sans'", _FONT)
    return re.sub(r"<svg [^>]*>", lambda m: f"{m[0]}\n <title>{_escape(title)}</title>", svg, count=1)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
