"""The report's tables, as cells of text; HTML, Markdown and LaTeX are three ways to write them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from archzoo.report.contestants import Comparison
from archzoo.report.formatting import NOTHING, RATIO, Scale, count, duration, p_words, si, size, times
from archzoo.report.ranking import MEMORY_KINDS, Row, Standing, baseline_row, by_size, standings
from archzoo.report.reaching import EqualScore
from archzoo.report.runs import LOST, Run
from archzoo.report.scaling import Series
from archzoo.report.stats import Interval
from archzoo.report.tuning import Trial
from archzoo.report.wording import exponent, ratio_text, reached_text, score_name, statuses_text

EQUAL = ("Steps to equal score", "Seconds to equal score")
"""Columns of the table of costs, where there are validation curves and a baseline."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell; `detail` is said less loudly, `tone` is `good`, `bad`, `tie`, `size` or nothing."""

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
    return "untested" if value is None else p_words(value)


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
    """Scores, differences, tests and statuses; of several sizes one after the other."""
    contests = by_size(rows)
    base = baseline_row(rows)
    base_name = base.label if base and len(contests) == 1 else "the baseline"
    scored = sum(row.score is not None for row in rows)
    name = score_name(comparison)
    unit = " (%)" if scale.percent else ""
    figures = sorted({name for row in rows for name in row.figures}, key=lambda name: (name != "success", name))
    columns = ["#", "Contestant", f"{name[:1].upper()}{name[1:]}{unit}, 95 % CI"]
    numeric = [True, False, True]
    if base is not None and scored > 1:
        columns += [f"Difference to {base_name}{' (points)' if scale.percent else ''}", f"Against {base_name}"]
        numeric += [True, False]
    if scored > 1:
        columns += ["Against the leader"]
        numeric += [False]
    columns += ["Success rate" if figure == "success" else f"Median {figure}" for figure in figures]
    numeric += [True for _ in figures]
    columns += ["Runs"]
    numeric += [False]
    if len(contests) > 1:
        columns, numeric = ["Size", *columns], [False, *numeric]

    table = []
    for row in rows:
        cells = [
            Cell(str(row.rank) if row.rank is not None else NOTHING),
            Cell(row.series or row.label if len(contests) > 1 else row.label),
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
            cells.append(against_leader(row, contests[row.size]))
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
        lost = row.score is None and any(row.statuses.get(status) for status in LOST)
        cells.append(Cell(statuses_text(row.statuses), "", "bad" if lost else ""))
        if len(contests) > 1:
            cells = [_size(row.size) if row is contests[row.size][0] else Cell(""), *cells]
        table.append(tuple(cells))
    name_column = columns.index("Contestant")
    return _sheet("Ranking", columns, numeric, table, rows, colours, name_column=name_column, notes=True)


def cost_sheet(rows: Sequence[Row], colours: dict[str, int]) -> Sheet:
    """What each contestant costs."""
    bases = {row.size: row for row in rows if row.baseline}
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
    equal = any(row.equal is not None and not row.baseline for row in rows)
    columns += EQUAL if equal else []
    table = []
    for row in rows:
        base = bases.get(row.size)
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
                *(_equal_cells(row) if equal else ()),
            )
        )
    return _sheet("Cost", columns, [False] + [True] * (len(columns) - 1), table, rows, colours)


def _equal_cells(row: Row) -> tuple[Cell, Cell]:
    """Steps and seconds to the baseline's best validation score, in units of the baseline's own."""
    equal = row.equal
    if equal is None:
        return Cell(NOTHING), Cell(NOTHING)
    if row.baseline:
        return Cell("1 x", f"{equal.base_steps:,.0f} steps"), Cell("1 x", duration(equal.base_seconds))
    if not equal.complete:
        said = Cell(f"reached {reached_text(equal)}")
        return said, said
    return _ratio(equal, equal.steps), _ratio(equal, equal.seconds)


def _ratio(equal: EqualScore, ratio: Interval | None) -> Cell:
    if ratio is None:
        return Cell(NOTHING)
    return Cell(ratio_text(equal, ratio), RATIO.interval(ratio))


def tuned_sheet(comparison: Comparison, scale: Scale, colours: dict[str, int]) -> Sheet | None:
    """Every value that was tried of what is tuned, with its validation score; None where nothing is."""
    groups = [group for group in comparison.groups if group.tuning is not None]
    if not groups:
        return None
    columns = ["Contestant", "Tried", f"Validation {comparison.metric}{scale.unit}", "Seeds", "Choice"]
    table, chips, kinds = [], [], []
    for group in groups:
        assert group.tuning is not None
        for trial in group.tuning.trials:
            count = len(trial.scores)
            compared = len(group.tuning.seeds) if group.tuning.paired else count
            part = f"{compared} compared" if trial.mean is not None and compared != count else ""
            cells = (Cell(group.label), Cell(trial.name), Cell(scale.value(trial.mean)), Cell(str(count), part))
            table.append((*cells, _choice(trial, group.tuning.warnings)))
            chips.append(colours[group.label])
            kinds.append("leader" if trial.chosen else "")
    sheet = _plain_sheet("Tuned", columns, (False, False, True, True, False), table, chips)
    return replace(sheet, kinds=tuple(kinds))


def _choice(trial: Trial, warnings: Sequence[str]) -> Cell:
    if trial.chosen:
        return Cell("chosen", "; ".join(warnings), "tie" if warnings else "good")
    trouble = "; ".join(trial.trouble())
    if trial.mean is None and trial.diverged:
        return Cell("lost", trouble, "bad")
    return Cell("no score" if trial.mean is None else NOTHING, trouble)


def runs_sheet(comparison: Comparison, scale: Scale, colours: dict[str, int]) -> Sheet:
    """Every run; of what is tuned, those that were not chosen too."""
    columns = ["Contestant", "Seed", score_name(comparison) + scale.unit, "At step", "Status", "Wall time", "Folder"]
    table, indices, kinds = [], [], []
    for group in comparison.groups:
        for run in group.runs:
            table.append((Cell(group.label), *_run_cells(run, scale)))
            indices.append(colours[group.label])
            kinds.append("" if run.counted else "unscored")
        for trial in group.tuning.trials if group.tuning and group.tuning.chosen else ():
            for run in () if trial.chosen else trial.runs:
                table.append((Cell(f"{group.label}: {trial.name}"), *_run_cells(run, scale)))
                indices.append(-1)
                kinds.append("unscored")
    numeric = (False, True, True, True, False, True, False)
    empty: tuple[tuple[str, ...], ...] = tuple(() for _ in table)
    return Sheet("Runs", tuple(columns), numeric, tuple(table), tuple(indices), tuple(kinds), empty)


def _run_cells(run: Run, scale: Scale) -> tuple[Cell, ...]:
    return (
        Cell(str(run.seed) if run.seed is not None else NOTHING),
        Cell(scale.value(run.score)),
        Cell(f"{run.score_step:,}" if run.score_step is not None else NOTHING),
        _status(run),
        Cell(duration(run.wall_s)),
        Cell(run.folder.name),
    )


def scaling_sheet(series: Sequence[Series], comparison: Comparison, scale: Scale, colours: dict[str, int]) -> Sheet:
    """The points of each series and the exponent through them."""
    name = score_name(comparison)
    columns = ["Contestant", "Exponent α", "Points", f"Parameters: median {name}{scale.unit} over seeds"]
    rows = []
    for line in series:
        told = ", ".join(f"{point.parameters:,}: {scale.value(point.median)}" for point in line.points)
        points = Cell(str(len(line.points)))
        rows.append((Cell(line.label), Cell(exponent(line.law)), points, Cell(told or NOTHING)))
    chips = [next((colours[p.row.label] for p in line.points), -1) for line in series]
    return _plain_sheet("Score against parameters", columns, [False, True, True, False], rows, chips)


def matrix_sheet(sections: Sequence[tuple[Comparison, Sequence[Row], Scale]]) -> Sheet:
    """Contestants x tasks, where a comparison has several tasks; with their mean rank and how often they were first."""
    rows = [row for _, part, _ in sections for row in part]
    several_sizes = len({row.size for row in rows}) > 1
    overall = standings(rows, lambda row: row.label)
    sizes = {row.label: row.size for row in rows}
    order = list(dict.fromkeys(row.size for row in rows))
    labels = sorted(overall, key=lambda label: (order.index(sizes[label]), _standing_order(overall[label])))
    brief = len(sections) > 4  # of so many columns none may be wide
    scores = [score_name(part) + scale.unit for part, _, scale in sections]
    tasks = [part.groups[0].task for part, _, _ in sections]
    one_score = scores[0] if len(set(scores)) == 1 else ""
    columns = ["Contestant"]
    columns += tasks if one_score else [f"{task}: {score}" for task, score in zip(tasks, scores, strict=True)]
    columns += ["Mean rank", "First in"]
    if several_sizes:
        columns = ["Size", *columns]
    table: list[tuple[Cell, ...]] = []
    before = ""
    series = {row.label: row.series for row in rows if several_sizes and row.series}
    for label in labels:
        cells = [Cell(series.get(label, label))]
        for _, part_rows, scale in sections:
            row = next((row for row in part_rows if row.label == label), None)
            if row is None or row.score is None:
                cells.append(Cell(NOTHING, statuses_text(row.statuses) if row else ""))
                continue
            contest = [other for other in part_rows if other.size == row.size]
            compared = sum(other.score is not None for other in contest) > 1
            place = against_leader(row, contest) if row.leader and compared else Cell("")
            words = [place.text] if brief else [scale.interval(row.score), place.text]
            mean = scale.value(row.score.mean) if scale.decimals is not None or not brief else f"{row.score.mean:.3g}"
            cells.append(Cell(mean, " ".join(filter(None, words)), place.tone))
        cells += _standing(overall[label])
        if several_sizes:
            cells = [Cell("") if sizes[label] == before else _size(sizes[label]), *cells]
            before = sizes[label]
        table.append(tuple(cells))
    numeric = [column not in ("Contestant", "Size") for column in columns]
    title = f"All tasks: {one_score}" if one_score else "All tasks"
    return _plain_sheet(title, columns, numeric, table, [-1] * len(table), columns.index("Contestant"))


def _size(size: str) -> Cell:
    """A size in two lines: it heads a narrow column."""
    number, _, unit = size.partition(" ")
    return Cell(number, unit, "size") if number[:1].isdigit() else Cell(size, "", "size")


def overview_sheet(
    sections: Sequence[tuple[Comparison, Sequence[Row], Sequence[Series]]], colours: dict[str, int]
) -> Sheet | None:
    """One line a series, over all sizes and tasks: mean rank, firsts, and the exponent on each task. None without."""
    rows = [row for _, part, _ in sections for row in part]
    labels = {row.series: row.label for row in rows if row.series}
    if not labels:
        return None
    columns, compete = ["Contestant"], len({row.size for row in rows}) > 1
    overall = standings([row for row in rows if row.series], lambda row: row.series) if compete else {}
    columns += ["Mean rank", "First in"] if compete else []
    fitted = [
        (part.groups[0].task, {line.label: line for line in series})
        for part, _, series in sections
        if any(line.law for line in series)
    ]
    columns += [f"{task}: α" if len(sections) > 1 else "Exponent α" for task, _ in fitted]
    table = []
    order = sorted(labels, key=lambda label: _standing_order(overall[label]) if compete else (0.0, label))
    for label in order:
        cells = [Cell(label), *(_standing(overall[label]) if compete else ())]
        for _, series in fitted:
            line = series.get(label)
            cells.append(Cell(exponent(line.law)) if line else Cell(NOTHING))
        table.append(tuple(cells))
    numeric = [False, *(True for _ in columns[1:])]
    return _plain_sheet("Over all sizes", columns, numeric, table, [colours[labels[label]] for label in order])


def _standing_order(standing: Standing) -> tuple[float, str]:
    return (float("inf") if standing.mean_rank is None else standing.mean_rank, standing.label)


def _standing(standing: Standing) -> list[Cell]:
    if standing.mean_rank is None:
        return [Cell(NOTHING), Cell(NOTHING)]
    wins = f"{standing.wins} separable" if standing.firsts else ""
    return [Cell(f"{standing.mean_rank:.2f}"), Cell(f"{standing.firsts} of {standing.contests}", wins)]


def _plain_sheet(
    title: str,
    columns: Sequence[str],
    numeric: Sequence[bool],
    table: Sequence[tuple[Cell, ...]],
    colours: Sequence[int],
    name_column: int = 0,
) -> Sheet:
    """A sheet whose rows have neither kind nor notes."""
    empty: tuple[tuple[str, ...], ...] = tuple(() for _ in table)
    kinds = tuple("" for _ in table)
    return Sheet(title, tuple(columns), tuple(numeric), tuple(table), tuple(colours), kinds, empty, name_column)


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
    """What the budget search found: the widths, a stack of equal ones once, or the option that it varied instead."""
    if row.budget is None:
        return ""
    if row.budget.option is not None:
        return f"{row.budget.option} {row.budget.value}"
    widths = row.budget.widths
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
    return Cell(run.status, detail, "bad" if run.status in LOST else "tie")
