"""Pictures of contestants at several sizes: a line for each series, of one task or, small, of all tasks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archzoo.report.canvas import (
    HEIGHT,
    INK,
    MUTED,
    PAPER,
    SMALL,
    WIDTH,
    Picture,
    Style,
    against,
    draw_line,
    fraction,
    new_axes,
    new_figure,
    text_width,
    ticks,
    to_svg,
)
from archzoo.report.contestants import Comparison
from archzoo.report.formatting import Scale
from archzoo.report.placing import spread
from archzoo.report.ranking import Row
from archzoo.report.scaling import PowerLaw, Series
from archzoo.report.wording import exponent, score_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 1112.0
"""Width of a picture of several panels, in px: that of the page."""
PANEL = 190.0
"""Height of a panel, in px."""
_GUTTER, _TITLE = 40.0, 22.0


@dataclass(frozen=True, slots=True)
class _Line:
    """A series as it is drawn: cost, median, lowest and highest seed of each point, in the units of the axes."""

    label: str
    look: Style
    points: list[tuple[float, float, float, float]]
    law: PowerLaw | None


def score_lines(
    comparison: Comparison,
    series: Sequence[Series],
    scale: Scale,
    looks: Mapping[str, Style],
    name: str,
    axis: tuple[str, float, str],
    cost: Callable[[Row], float | None],
) -> Picture | None:
    """One task's score against one cost.

    Args:
        comparison: The task's.
        series: What `all_series` found.
        scale: How its scores are written.
        looks: Contestant's label -> style.
        name: Of the cost, as in file names.
        axis: The cost in words, the divisor and name of the unit it is shown in.
        cost: The cost of a contestant.
    """
    title, divisor, unit = axis
    lines = _lines(series, scale, looks, lambda row: None if (value := cost(row)) is None else value / divisor)
    if not lines:
        return None
    fitted = name == "parameters"
    labels = [(line.label, f"α = {exponent(line.law)}" if fitted and line.law else "") for line in lines]
    width = max(max(text_width(text, SMALL) for text in both) for both in labels) + 44
    figure, axes = new_axes(WIDTH, HEIGHT, 60, width, 12, 48)
    log_x, log_y = _limits(axes, lines, comparison.mode)
    ticks(axes, log_x, log_y)
    for line in reversed(lines):
        _draw(axes, line, fitted and log_x and log_y)
    _labels(figure, axes, lines, labels)
    axes.set_xlabel(f"{title} ({unit})" if unit else title)
    axes.set_ylabel(score_label(comparison, scale))
    caption = "Medians over seeds; the bar spans the lowest to the highest seed."
    if any(told for _, told in labels):
        caption += " Dotted: the power law through all points, score ~ parameters^-α, ± standard error of α."
    what = against(title)
    return Picture(f"score-{name}", what, caption, to_svg(figure, what))


def small_multiples(
    tasks: Sequence[tuple[Comparison, Sequence[Series], Scale]], looks: Mapping[str, Style]
) -> Picture | None:
    """Score against parameters, a panel for each task, all with the same axes where the score is the same."""
    panels = []
    for comparison, series, scale in tasks:
        lines = _lines(series, scale, looks, lambda row: row.parameters)
        if lines:
            panels.append((comparison, scale, lines))
    if len(panels) < 2:
        return None
    columns = min(len(panels), 4 if len(panels) not in (5, 6, 9) else 3)
    rows = math.ceil(len(panels) / columns)
    shared = len({score_label(comparison, scale) for comparison, scale, _ in panels}) == 1
    names = {line.label: line.look for _, _, lines in panels for line in lines}
    widths = [text_width(name, SMALL) + 60 for name in names]
    legend = _wrapped(widths, WIDE - 60)

    left, bottom, top = 60.0, 48.0, 14.0 + 18.0 * (max(legend)[0] + 1)
    step_x = (WIDE - left) / columns
    step_y = _TITLE + PANEL + (0.0 if shared else 26.0)
    height = top + rows * step_y + bottom
    figure = new_figure(WIDE, height)
    for (name, look), (row, x) in zip(names.items(), legend, strict=True):
        y = height - 14 - 18 * row
        draw_line(figure, (left + x, left + x + 30), (y, y), look.colour, 1.7, look.dash)
        draw_line(figure, (left + x + 12, left + x + 12), (y, y), look.colour, 0.0, "None", look)
        figure.text(*fraction(figure, left + x + 36, y), name, ha="left", va="center", color=INK, fontsize=SMALL)

    everything = [line for _, _, lines in panels for line in lines]
    for place, (comparison, scale, lines) in enumerate(panels):
        row, column = divmod(place, columns)
        x, y = left + column * step_x, height - top - (row + 1) * step_y + (0.0 if shared else 26.0)
        box = (x / WIDE, y / height, (step_x - _GUTTER - (0 if shared else 24)) / WIDE, PANEL / height)
        axes = figure.add_axes(box)
        log_x, log_y = _limits(axes, everything if shared else lines, comparison.mode)
        ticks(axes, log_x, log_y)
        for line in reversed(lines):
            _draw(axes, line, log_x and log_y)
        told = [("", f"{line.law.exponent:z.1f}" if line.law else "") for line in lines]
        _labels(figure, axes, lines, told)
        score = score_label(comparison, scale)
        title = comparison.groups[0].task + ("" if shared else f": {score[0].lower()}{score[1:]}")
        figure.text(*fraction(figure, x, y + PANEL + 8), title, ha="left", va="center", color=INK, fontweight="bold")
        last = place + columns >= len(panels)
        axes.tick_params(labelleft=not shared or column == 0, labelbottom=not shared or last)
        if shared and column == 0:
            axes.set_ylabel(score, fontsize=SMALL)
        if last:
            axes.set_xlabel("Parameters", fontsize=SMALL)
    caption = "Medians over seeds; the bar spans the lowest to the highest seed."
    if any(line.law for line in everything):
        caption += (
            " Dotted: the power law through all points, score ~ parameters^-α; the number at the right of a line is α."
        )
    caption += " All panels have the same axes, so that slopes compare." if shared else ""
    what = "Score against parameters, by task"
    return Picture("scaling", what, caption, to_svg(figure, what), wide=True)


def _lines(
    series: Sequence[Series], scale: Scale, looks: Mapping[str, Style], cost: Callable[[Row], float | None]
) -> list[_Line]:
    """Those that have a point, in the units of the axes."""
    found = []
    for one in series:
        factor = scale.factor
        points = [
            (x, factor * point.median, factor * point.low, factor * point.high)
            for point in one.points
            if (x := cost(point.row)) is not None and x > 0
        ]
        if points:
            found.append(_Line(one.label, looks[one.points[0].row.label], sorted(points), one.law))
    return found


def _limits(axes: "Axes", lines: Sequence[_Line], mode: str) -> tuple[bool, bool]:
    """Sets the limits; whether the axes are to be logarithmic."""
    xs = [x for line in lines for x, *_ in line.points]
    ys = [y for line in lines for _, *values in line.points for y in values]
    log_x = max(xs) / min(xs) > 2.5
    log_y = mode == "min" and min(ys) > 0 and max(ys) / min(ys) > 3
    ratio = (max(xs) / min(xs)) ** 0.06
    margin = 0.06 * (max(xs) - min(xs)) or 0.06 * max(xs)
    axes.set_xlim((min(xs) / ratio, max(xs) * ratio) if log_x else (min(xs) - margin, max(xs) + margin))
    ratio = (max(ys) / min(ys)) ** 0.06 if log_y else 1.0
    margin = 0.06 * (max(ys) - min(ys)) or 0.06 * abs(max(ys)) or 1.0
    axes.set_ylim((min(ys) / ratio, max(ys) * ratio) if log_y else (min(ys) - margin, max(ys) + margin))
    return log_x, log_y


def _draw(axes: "Axes", line: _Line, with_law: bool) -> None:
    look = line.look
    xs, medians, lows, highs = ([point[i] for point in line.points] for i in range(4))
    if with_law and line.law:
        ends = [min(xs), max(xs)]
        axes.plot(ends, [line.law(x) for x in ends], color=look.colour, linewidth=1.1, linestyle=(0, (1, 2)), zorder=2)
    axes.vlines(xs, lows, highs, color=look.colour, linewidth=1.6, alpha=0.75, zorder=3)
    axes.plot(
        xs,
        medians,
        color=look.colour,
        linestyle=look.dash,
        linewidth=1.7,
        marker=look.marker,
        markersize=0.85 * look.size,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
        zorder=4,
    )


def _labels(figure: "Figure", axes: "Axes", lines: Sequence[_Line], labels: Sequence[tuple[str, str]]) -> None:
    """At the right, each joined to the end of its line: its name, if any, and below it what is told of it."""
    _, bottom, right, top = (float(edge) for edge in axes.bbox.extents)
    ends = [(line, both, line.points[-1][:2]) for line, both in zip(lines, labels, strict=True) if any(both)]
    if not ends:
        return
    named = any(name for _, (name, _), _ in ends)
    tall = max(sum(map(bool, both)) for _, both, _ in ends)
    height = (SMALL + 3) * tall + (3 if named else 0)
    where = axes.transData.transform([end for _, _, end in ends])
    levels = [min(max(float(y), bottom), top) for _, y in where]
    places = spread(levels, height, bottom + height / 2 - 6, top - height / 2 + 6)
    for (line, (name, told), _), (x, _), y, place in zip(ends, where, levels, places, strict=True):
        look = line.look
        draw_line(figure, (float(x) + 4, right + 2, right + 8), (y, y, place), look.colour, 0.7)
        at = right + 10
        if name:
            upper = place + ((SMALL + 3) / 2 if told else 0)
            figure.text(*fraction(figure, at, upper), name, ha="left", va="center", color=INK, fontsize=SMALL)
            place = place - (SMALL + 3) / 2
        if told:
            colour = MUTED if name else look.colour
            figure.text(*fraction(figure, at, place), told, ha="left", va="center", color=colour, fontsize=SMALL)


def _wrapped(widths: Sequence[float], room: float) -> list[tuple[int, float]]:
    """Row and left edge of each of several boxes, set from left to right."""
    places, row, x = [], 0, 0.0
    for width in widths:
        if x and x + width > room:
            row, x = row + 1, 0.0
        places.append((row, x))
        x += width
    return places
