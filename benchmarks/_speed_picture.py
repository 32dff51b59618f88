"""The picture of a record of `gpu`. Imports matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks._speed import alternatives, case_name, fraction, pass_of


def draw_speed(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Left: what others take in units of our time; right: the floor over our time. One line a case."""
    timed = [row for row in rows if "error" not in row and alternatives(row)]
    if not timed:
        return "no picture: nothing was timed beside ours"
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 1.5 + 0.3 * len(timed)), sharey=True, layout="constrained", width_ratios=(3, 1)
    )
    names = sorted({name for row in timed for name in alternatives(row)})
    markers = "osD^vP*X<>hpd8"
    for index, name in enumerate(names):
        points = [(alternatives(row)[name], y) for y, row in enumerate(timed) if name in alternatives(row)]
        left.plot(*zip(*points, strict=True), markers[index % len(markers)], ls="", ms=6, label=name)
    left.axvline(1, color="black", lw=1)
    left.set_xscale("log")
    left.set_xlabel("time of others, in units of ours (right of 1: ours is faster)")
    left.legend(fontsize=7)
    left.set_yticks(range(len(timed)), [case_name(row) for row in timed], fontsize=7)
    left.invert_yaxis()
    shares = [fraction(row, pass_of(row)) or 0.0 for row in timed]
    right.barh(range(len(timed)), shares, color="tab:blue")
    right.axvline(1, color="black", lw=1)
    right.set_xlabel("floor / our time")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"drew {path.name}"
