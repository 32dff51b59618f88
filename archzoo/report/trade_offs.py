"""Pictures of score against cost, with the Pareto front."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from archzoo.report.canvas import (
    HEIGHT,
    INK,
    MUTED,
    SMALL,
    WIDTH,
    Picture,
    Style,
    against,
    draw_line,
    end_labels,
    fraction,
    new_axes,
    text_width,
    ticks,
    to_svg,
)
from archzoo.report.contestants import Comparison
from archzoo.report.formatting import Scale, plural
from archzoo.report.limits import cost_limits, log_scores, score_limits
from archzoo.report.placing import around, leader_line, place_labels, side_by_side
from archzoo.report.ranking import Row
from archzoo.report.stats import Interval
from archzoo.report.wording import score_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def trade_off(
    comparison: Comparison,
    rows: Sequence[Row],
    scale: Scale,
    looks: Mapping[str, Style],
    short: Mapping[str, str],
    name: str,
    axis: tuple[str, float, str],
    cost: Callable[[Row], float | None],
) -> Picture:
    """One task's score against one cost.

    Args:
        comparison: The task's.
        rows: What `rank` made of it; two or more with a score and a cost.
        scale: How its scores are written.
        looks: What `styles` gave.
        short: What `short_labels` gave.
        name: Of the cost, as in file names.
        axis: The cost in words, the divisor and name of the unit it is shown in.
        cost: The cost of a contestant.
    """
    title, divisor, prefix = axis
    points = [(row, row.score, x) for row in rows if row.score is not None and (x := cost(row)) is not None and x > 0]
    xs = [x for _, _, x in points]
    log_x = max(xs) / min(xs) > 8
    log_y = log_scores(comparison, [row for row, _, _ in points])
    low, high = score_limits([row for row, _, _ in points], scale, log_y)
    left, right = cost_limits([x / divisor for x in xs], log_x)
    true = [(x / divisor, scale.factor * score.mean) for _, score, x in points]

    def canvas(label_width: float) -> tuple["Figure", "Axes", list[tuple[float, float]]]:
        figure, axes = new_axes(WIDTH, HEIGHT, 60, label_width, 12, 48)
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        ticks(axes, log_x, log_y)
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
    what = against(title)
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
