"""The report's tables, as cells of text; HTML, Markdown and LaTeX are three ways to write them."""

from collections.abc import Sequence
from dataclasses import dataclass

from archzoo.report.load import Comparison, Run
from archzoo.report.ranking import MEMORY_KINDS, Row
from archzoo.report.wording import (
    NOTHING,
    Scale,
    count,
    duration,
    p_text,
    score_name,
    si,
    size,
    statuses_text,
    times,
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell; `detail` is said less loudly, `tone` is `good`, `bad`, `tie` or nothing."""

    text: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table. `colours` gives the index of each row's contestant, -1 for none, and `kinds` the row's CSS class."""

    title: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]
    colours: tuple[int, ...]
    kinds: tuple[str, ...]
    notes: tuple[tuple[str, ...], ...]
    """Notes on each row."""
    name_column: int = 0
    """The column with the contestant's label."""


def against_baseline(row: Row, mode: str) -> Cell:
    """What the test against the baseline says."""
    if row.baseline:
        return Cell("baseline")
    if row.tie is None:
        return Cell(NOTHING)
    p = _p(row.p_holm)
    if row.tie or row.difference is None:
        return Cell("tie", p, "tie")
    better = (row.difference.mean > 0) == (mode == "max")
    return Cell("better", p, "good") if better else Cell("worse", p, "bad")


def _p(value: float | None) -> str:
    return "untested" if value is None else f"p = {p_text(value)}".replace("= <", "<")


def against_leader(row: Row, rows: Sequence[Row]) -> Cell:
    """Where the row stands to the leader; a winner is a leader that every other contestant is separable from."""
    if row.leader:
        return (
            Cell("leads, tied", "", "tie") if any(other.ties_leader for other in rows) else Cell("winner", "", "good")
        )
    if row.score is None:
        return Cell(NOTHING)
    return Cell("tie", _p(row.p_leader), "tie") if row.ties_leader else Cell("behind", _p(row.p_leader))


def ranking_sheet(comparison: Comparison, rows: Sequence[Row], scale: Scale, colours: dict[str, int]) -> Sheet:
    """Scores, differences, tests and statuses."""
    base = next((row for row in rows if row.baseline), None)
    scored = sum(row.score is not None for row in rows)
    name = score_name(comparison)
    unit = " (%)" if scale.percent else ""
    figures = sorted({name for row in rows for name in row.figures}, key=lambda name: (name != "success", name))
    columns = ["#", "Contestant", f"{name[:1].upper()}{name[1:]}{unit}, 95 % CI"]
    numeric = [True, False, True]
    if base is not None and scored > 1:
        columns += [f"Difference to {base.label}{' (points)' if scale.percent else ''}", f"Against {base.label}"]
        numeric += [True, False]
    if scored > 1:
        columns += ["Against the leader"]
        numeric += [False]
    columns += ["Success rate" if figure == "success" else f"Median {figure}" for figure in figures]
    numeric += [True for _ in figures]
    columns += ["Runs"]
    numeric += [False]

    table = []
    for row in rows:
        cells = [
            Cell(str(row.rank) if row.rank is not None else NOTHING),
            Cell(row.label),
            Cell(scale.value(row.score.mean), scale.interval(row.score)) if row.score else Cell(NOTHING),
        ]
        if base is not None and scored > 1:
            cells.append(
                Cell(scale.value(row.difference.mean, sign=True), scale.interval(row.difference, sign=True))
                if row.difference
                else Cell(NOTHING)
            )
            cells.append(against_baseline(row, comparison.mode))
        if scored > 1:
            cells.append(against_leader(row, rows))
        for key in figures:
            figure = row.figures.get(key)
            if figure is None or figure.value is None:
                cells.append(Cell(NOTHING))
            elif figure.successes is not None and figure.low is not None and figure.high is not None:
                rate = f"[{100 * figure.low:.0f}, {100 * figure.high:.0f}] %"
                cells.append(Cell(f"{figure.successes}/{figure.count}", rate))
            else:
                whole = f"{figure.value:,.0f}" if abs(figure.value) >= 1000 else f"{figure.value:.4g}"
                cells.append(Cell(whole, f"of {figure.count}"))
        lost = row.score is None and any(row.statuses.get(status) for status in ("failed", "diverged", "unknown"))
        cells.append(Cell(statuses_text(row.statuses), "", "bad" if lost else ""))
        table.append(tuple(cells))
    return _sheet("Ranking", columns, numeric, table, rows, colours, name_column=1, notes=True)


def cost_sheet(rows: Sequence[Row], colours: dict[str, int]) -> Sheet:
    """What each contestant costs."""
    base = next((row for row in rows if row.baseline), None)
    columns = [
        "Contestant",
        "Parameters",
        "Budget deviation",
        "FLOPs per sample",
        "Step time",
        "Samples/s",
        "Bytes per step",
    ]
    columns += ["Kept for backward", "Peak GPU memory" if _has_gpu(rows) else "Peak RSS"]
    table = []
    for row in rows:
        relative = f"{times(row.step_time_s, base.step_time_s)} {base.label}" if base and not row.baseline else ""
        off = row.budget is not None and row.budget.within_tolerance is False
        table.append(
            (
                Cell(row.label),
                Cell(count(row.parameters)),
                Cell(str(row.budget or "") or NOTHING, _widths(row), "bad" if off else ""),
                Cell(si(row.flops)),
                Cell(duration(row.step_time_s), relative if relative[:1].isdigit() else ""),
                Cell(si(row.samples_per_s)),
                Cell(size(row.bytes_per_step)),
                Cell(size(row.saved_bytes)),
                Cell(size(row.cuda_bytes if _has_gpu(rows) else row.rss_bytes)),
            )
        )
    return _sheet("Cost", columns, [False] + [True] * 8, table, rows, colours)


def runs_sheet(comparison: Comparison, scale: Scale, colours: dict[str, int]) -> Sheet:
    """Every run."""
    columns = ["Contestant", "Seed", score_name(comparison) + scale.unit, "At step", "Status", "Wall time", "Folder"]
    table, indices, kinds = [], [], []
    for group in comparison.groups:
        for run in group.runs:
            table.append(
                (
                    Cell(group.label),
                    Cell(str(run.seed) if run.seed is not None else NOTHING),
                    Cell(scale.value(run.score)),
                    Cell(f"{run.score_step:,}" if run.score_step is not None else NOTHING),
                    _status(run),
                    Cell(duration(run.wall_s)),
                    Cell(run.folder.name),
                )
            )
            indices.append(colours[group.label])
            kinds.append("" if run.counted else "unscored")
    numeric = (False, True, True, True, False, True, False)
    empty = tuple(() for _ in table)
    return Sheet("Runs", tuple(columns), numeric, tuple(table), tuple(indices), tuple(kinds), empty)


def matrix_sheet(sections: Sequence[tuple[Comparison, Sequence[Row], Scale]]) -> Sheet:
    """Contestants x tasks, where a comparison has several tasks."""
    labels = sorted({row.label for _, rows, _ in sections for row in rows})
    columns = ["Contestant"]
    for part, _, scale in sections:
        columns.append(f"{part.groups[0].task}: {score_name(part)}{scale.unit}")
    table = []
    for label in labels:
        cells = [Cell(label)]
        for _, rows, scale in sections:
            scored = sum(row.score is not None for row in rows)
            row = next((row for row in rows if row.label == label), None)
            if row is None or row.score is None:
                cells.append(Cell(NOTHING, statuses_text(row.statuses) if row else ""))
            else:
                place = against_leader(row, rows) if row.leader and scored > 1 else Cell("")
                detail = " ".join(part for part in (scale.interval(row.score), place.text) if part)
                cells.append(Cell(scale.value(row.score.mean), detail, place.tone))
        table.append(tuple(cells))
    empty: tuple[tuple[str, ...], ...] = tuple(() for _ in labels)
    return Sheet(
        "All tasks",
        tuple(columns),
        (False, *(True for _ in sections)),
        tuple(table),
        tuple(-1 for _ in labels),
        tuple("" for _ in labels),
        empty,
    )


def _sheet(
    title: str,
    columns: Sequence[str],
    numeric: Sequence[bool],
    table: Sequence[tuple[Cell, ...]],
    rows: Sequence[Row],
    colours: dict[str, int],
    name_column: int = 0,
    notes: bool = False,
) -> Sheet:
    kinds = ("unscored" if row.score is None else "leader" if row.leader else "" for row in rows)
    return Sheet(
        title,
        tuple(columns),
        tuple(numeric),
        tuple(table),
        tuple(colours[row.label] for row in rows),
        tuple(kinds),
        tuple(row.notes if notes else () for row in rows),
        name_column,
    )


def _has_gpu(rows: Sequence[Row]) -> bool:
    return any(row.memory_kind == MEMORY_KINDS[0] for row in rows)


def _widths(row: Row) -> str:
    """The widths that the budget search found; a stack of equal ones once."""
    widths = row.budget.widths if row.budget else ()
    if not widths:
        return ""
    if len(set(widths)) == 1:
        return f"width {widths[0]}"
    shown = ", ".join(map(str, widths[:4])) + (", …" if len(widths) > 4 else "")
    return f"widths {shown}"


def _status(run: Run) -> Cell:
    trouble = run.trouble
    if trouble is None:
        return Cell("done")
    detail = trouble.removeprefix(run.status).lstrip(": ")
    return Cell(run.status, detail, "bad" if run.status in ("failed", "diverged", "unknown") else "tie")
