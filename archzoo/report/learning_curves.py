"""Pictures of what a metric did over the training steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from archzoo.report.canvas import (
    HEIGHT,
    POINTS,
    SMALL,
    WIDTH,
    Picture,
    Style,
    draw_frame,
    end_labels,
    few_ticks,
    log_axis,
    new_axes,
    plain_tick,
    text_width,
    thousands_tick,
    to_svg,
)
from archzoo.report.contestants import Comparison
from archzoo.report.formatting import Scale
from archzoo.report.limits import curve_limits
from archzoo.report.ranking import Row
from archzoo.report.values import number

if TYPE_CHECKING:
    import numpy as np

Curve: TypeAlias = "tuple[np.ndarray, np.ndarray] | None"
"""Steps and values of one run, or None if it logged none."""


def learning_curves(
    comparison: Comparison,
    rows: Sequence[Row],
    curves: Mapping[Path, Curve],
    key: str,
    scale: Scale,
    looks: Mapping[str, Style],
    short: Mapping[str, str],
) -> Picture | None:
    """A line over the training steps for each contestant; None where no run logged any.

    Args:
        comparison: One task's.
        rows: What `rank` made of it.
        curves: Run's folder -> its curve.
        key: Of the metric.
        scale: How scores are written.
        looks: What `styles` gave.
        short: What `short_labels` gave.
    """
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
    low, high = curve_limits(values, last, comparison.mode if is_score else "min", log)
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


def curve_of(records: Sequence[Mapping[str, Any]], key: str, bins: int) -> Curve:
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
