"""The report's pictures, as SVG text. Drawn at 72 dpi, so that one unit of a picture is one px at 100 % zoom."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from archzoo.report.canvas import POINTS, Picture, Style, plain_matplotlib
from archzoo.report.contestants import Comparison
from archzoo.report.formatting import Scale
from archzoo.report.learning_curves import Curve, curve_of, learning_curves
from archzoo.report.lines import score_lines
from archzoo.report.looks import short_labels
from archzoo.report.ranking import Row
from archzoo.report.ranking_plot import ranking_plot
from archzoo.report.scaling import all_series
from archzoo.report.trade_offs import trade_off


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
        short = short_labels(comparison.groups)
        pictures = [ranking_plot(comparison, rows, scale, looks, short)]
        keys = {f"val/{comparison.metric}": 0, "train/loss": POINTS}
        curves: dict[str, dict[Path, Curve]] = {key: {} for key in keys}
        shown = (run for group in comparison.groups for run in group.runs)
        for run in shown:  # one at a time: all lines of all runs may take much memory
            records = run.metrics()
            for key, bins in keys.items():
                curves[key][run.folder] = curve_of(records, key, bins)
        pictures += [learning_curves(comparison, rows, curves[key], key, scale, looks, short) for key in keys]
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
                pictures.append(trade_off(comparison, rows, scale, looks, short, name, axis, cost))
    return {
        picture.name: Picture(prefix + picture.name, picture.title, picture.caption, picture.svg)
        for picture in pictures
        if picture is not None
    }


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
