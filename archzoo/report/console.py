"""The ranked table for a terminal."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from archzoo.report.contestants import Comparison
from archzoo.report.formatting import NOTHING, Scale, duration, p_text, plural, si, size
from archzoo.report.ranking import DEFAULT_BASELINE, Row, rank, standings
from archzoo.report.samples import samples
from archzoo.report.scaling import all_series
from archzoo.report.sheets import against_baseline, matrix_sheet
from archzoo.report.verdict import verdict
from archzoo.report.wording import equal_score, exponents_of, score_name, statuses_text

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = 100
MOST_ROWS = 40
"""Contestants, over all tasks and sizes, beyond which the terminal gets a summary."""


def console_table(
    comparison: Comparison, baseline: str | None = DEFAULT_BASELINE, *, columns: int = COLUMNS
) -> "Table":
    """The ranked table, of many contestants a summary; its caption has the verdict and whatever went wrong.

    Args:
        comparison: What `load_comparison` read.
        baseline: As for `rank`.
        columns: Columns that it is to fit into; 100 suffice, below 80 or so words are cut.

    Raises:
        ValueError: As `rank` does.
    """
    rows = rank(comparison, baseline)
    parts = [(part, [row for row in rows if row.task == part.groups[0].task]) for part in comparison.split()]
    several = len(parts) > 1
    if several and len(rows) > MOST_ROWS:
        return _summary(comparison, parts, columns)
    bases = sorted({row.label for row in rows if row.baseline})
    figures = any("success" in row.figures for row in rows)

    sized = any(row.size for row in rows)
    head = ["#", "contestant", "score" if several else score_name(parts[0][0])]
    head += [f"vs {bases[0]}" if len(bases) == 1 and len(bases[0]) <= 12 else "vs baseline", "p"] if bases else []
    head += ["solved"] if figures else []
    head += ["params", "FLOPs", "step", "memory", "runs"]
    lines, styles, captions, contests = [], [], [], []
    for part, ranked in parts:
        scale = Scale.of(part.metric, [value for row in ranked for value in row.values])
        if not several:
            head[2] = score_name(part) + scale.unit
        for row in ranked:
            lines.append(_cells(row, part, scale, bool(bases), figures, several))
            if sized:
                lines[-1].insert(0, row.size.removesuffix(" parameters"))
            styles.append("bold" if row.leader else "dim" if row.score is None else "")
            contests.append((row.task, row.size))
        judged = verdict(part, ranked, scale)
        of = f"{part.groups[0].task}: " if several else ""
        captions += [of + judged.sentence, *judged.details, *judged.caveats]
        captions += [of + told for told in [equal_score(part, ranked)] if told]
        captions += [f"{of}{row.label}: {note}." for row in ranked for note in row.notes]
        captions += [f"{of}{sample.label}, wrote: {sample.line}" for sample in samples(part)]
    captions.append(f"±: half the 95 % CI over seeds. p: Holm-corrected. Memory: {rows[0].memory_kind}.")
    head = ["size", *head] if sized else head
    left = [name in ("contestant", "runs") for name in head]
    breaks = [i for i, (a, b) in enumerate(pairwise(contests)) if a[1] != b[1]]
    return fitted_table(comparison.name, head, left, lines, styles, captions, columns, breaks)


def _summary(comparison: Comparison, parts: Sequence[tuple[Comparison, Sequence[Row]]], columns: int) -> "Table":
    """Of many contestants: who leads on each task at each size, or all scores where there are no sizes."""
    rows = [row for _, ranked in parts for row in ranked]
    scales = [Scale.of(part.metric, [value for row in ranked for value in row.values]) for part, ranked in parts]
    sizes = list(dict.fromkeys(row.size for row in rows))
    overall = standings(rows, lambda row: row.series or row.label) if len(sizes) > 1 else {}
    captions = []
    if overall:
        counts = all(size.endswith(" parameters") for size in sizes)
        head, lines = ["task", *(f"at {size.removesuffix(' parameters')}" for size in sizes)], []
        for (_, ranked), scale in zip(parts, scales, strict=True):
            leaders = {row.size: row for row in ranked if row.leader}
            cells = [_leads(leaders.get(size), scale) for size in sizes]
            lines.append([ranked[0].task, *cells])
        what = "number of parameters" if counts else "size"
        captions.append(f"Of every task and {what} the leader and its mean score; none of it is a test.")
        places = sorted(overall.values(), key=lambda s: (s.mean_rank is None, s.mean_rank or 0.0, s.label))
        told = [
            f"{s.label} {s.mean_rank:.2f}, first in {s.firsts} of {s.contests} ({s.wins} separable)"
            for s in places
            if s.mean_rank is not None
        ]
        captions += [f"Mean rank over tasks and sizes: {'; '.join(told)}."] if told else []
    else:
        sheet = matrix_sheet([(part, ranked, scale) for (part, ranked), scale in zip(parts, scales, strict=True)])
        head = ["contestant", *sheet.columns[1:]]
        lines = [[cell.text for cell in row] for row in sheet.rows]
    laws = [(part.groups[0].task, exponents_of(all_series(part, ranked))) for part, ranked in parts]
    if any(told for _, told in laws):
        captions.append("Exponents α of score ~ parameters^-α, ± standard error:")
        captions += [f"{task}: {told}." for task, told in laws if told]
    captions += [f"{row.task}: {row.label}: {note}." for row in rows if row.score is None for note in row.notes]
    captions.append(f"{plural(len(rows), 'contestant')}: every ranking is in report.html and report.md.")
    left = [name == "contestant" or bool(overall) for name in head]
    return fitted_table(comparison.name, head, left, lines, [""] * len(lines), captions, columns, name=head[0])


def _leads(row: Row | None, scale: Scale) -> str:
    if row is None or row.score is None:
        return NOTHING
    return f"{row.series or row.label} {scale.value(row.score.mean)}"


def fitted_table(
    title: str,
    head: Sequence[str],
    left: Sequence[bool],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str],
    captions: Sequence[str],
    columns: int = COLUMNS,
    breaks: Sequence[int] = (),
    name: str = "contestant",
) -> "Table":
    """A table that wraps its cells between words to fit; only a contestant's label may be cut within a word.

    Args:
        title: Its title.
        head: Heads of the columns.
        left: Whether each column is flush left rather than right.
        rows: The cells.
        styles: rich's style of each row.
        captions: Paragraphs below it.
        columns: Columns of the terminal.
        breaks: Indices of rows with a line below them.
        name: Head of the column of labels.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    texts = [[title, *(row[i] for row in rows)] for i, title in enumerate(head)]
    widths = [max(map(cell_len, column)) for column in texts]
    words = [max(cell_len(word) for text in column for word in text.split() or [""]) for column in texts]
    gap = 2 if sum(widths) + 2 * len(head) <= columns else 1
    label = head.index(name)
    # What is too wide is cut: first the label, down to its words, then the other columns, then the label for good.
    least = [(i, words[i]) for i in reversed(range(len(head))) if i != label]
    excess = sum(widths) + gap * (len(head) - 1) - columns
    for i, width in ((label, max(10, min(24, words[label]))), *least, (label, 10)):
        cut = max(0, min(excess, widths[i] - width))
        widths[i], excess = widths[i] - cut, excess - cut

    padding = (0, gap - 1, 0, 0)
    table = Table(title=Text(title, "bold"), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding)
    for heading, flush_left, width in zip(head, left, widths, strict=True):
        table.add_column(Text(heading), justify="left" if flush_left else "right", overflow="fold", width=width)
    for i, (row, row_style) in enumerate(zip(rows, styles, strict=True)):
        table.add_row(*map(Text, row), style=row_style, end_section=i in breaks)
    table.caption = Text("\n".join(["", *captions]), "")
    table.caption_justify = "left"
    return table


def _cells(row: Row, part: Comparison, scale: Scale, based: bool, figures: bool, several: bool) -> list[str]:
    label = row.series or row.label if row.size else row.label
    cells = [
        str(row.rank) if row.rank is not None else NOTHING,
        f"{row.task}: {label}" if several else label,
        scale.plus_minus(row.score),
    ]
    if based:
        cells += [scale.plus_minus(row.difference, sign=True), _p(row, part.mode)]
    if figures:
        success = row.figures.get("success")
        cells.append(f"{success.successes}/{success.count}" if success else NOTHING)
    off = "!" if row.budget is not None and row.budget.within_tolerance is False else ""
    cells += [si(row.parameters) + off, si(row.flops), duration(row.step_time_s), size(row.memory_bytes)]
    return [*cells, statuses_text(row.statuses)]


def _p(row: Row, mode: str) -> str:
    said = against_baseline(row, mode).text
    return said if row.baseline or row.p_holm is None else f"{p_text(row.p_holm)} {said}"
