"""The picture of the ranking: mean, interval and seeds of each contestant."""

from collections.abc import Mapping, Sequence

from archzoo.report.canvas import (
    GRID,
    INK,
    LABEL_LENGTH,
    MUTED,
    PAPER,
    SMALL,
    WIDTH,
    Picture,
    Style,
    few_ticks,
    fraction,
    log_axis,
    new_axes,
    plain_tick,
    text_width,
    to_svg,
)
from archzoo.report.contestants import Comparison
from archzoo.report.formatting import Scale
from archzoo.report.limits import log_scores, score_limits
from archzoo.report.ranking import Row, by_size
from archzoo.report.wording import score_label, score_name


def ranking_plot(
    comparison: Comparison, rows: Sequence[Row], scale: Scale, looks: Mapping[str, Style], short: Mapping[str, str]
) -> Picture | None:
    """The contestants below each other, best first; None where none has a score.

    Args:
        comparison: One task's.
        rows: What `rank` made of it.
        scale: How its scores are written.
        looks: What `styles` gave.
        short: What `short_labels` gave.
    """
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
    log = log_scores(comparison, rows)
    low, high = score_limits(rows, scale, log)
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
