"""The ranked table for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from archzoo.report.load import Comparison
from archzoo.report.ranking import DEFAULT_BASELINE, Row, rank
from archzoo.report.sheets import against_baseline
from archzoo.report.wording import (
    NOTHING,
    Scale,
    duration,
    p_text,
    score_name,
    si,
    size,
    statuses_text,
    verdict,
)

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = 100


def console_table(
    comparison: Comparison, baseline: str | None = DEFAULT_BASELINE, *, columns: int = COLUMNS
) -> "Table":
    """The ranked table; its caption has the verdict and whatever went wrong.

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
    bases = sorted({row.label for row in rows if row.baseline})
    figures = any("success" in row.figures for row in rows)

    head = ["#", "contestant", "score" if several else score_name(parts[0][0])]
    head += [f"vs {bases[0]}" if len(bases) == 1 and len(bases[0]) <= 12 else "vs baseline", "p"] if bases else []
    head += ["solved"] if figures else []
    head += ["params", "FLOPs", "step", "memory", "runs"]
    lines, styles, captions = [], [], []
    for part, ranked in parts:
        scale = Scale.of(part.metric, [value for row in ranked for value in row.values])
        if not several:
            head[2] += scale.unit
        for row in ranked:
            lines.append(_cells(row, ranked, part, scale, bool(bases), figures, several))
            styles.append("bold" if row.leader else "dim" if row.score is None else "")
        judged = verdict(part, ranked, scale)
        of = f"{part.groups[0].task}: " if several else ""
        captions += [of + judged.sentence, *judged.details, *judged.caveats]
        captions += [f"{of}{row.label}: {note}." for row in ranked for note in row.notes]
    captions.append(f"±: half the 95 % CI over seeds. p: Holm-corrected. Memory: {rows[0].memory_kind}.")
    left = [name in ("contestant", "runs") for name in head]
    return fitted_table(comparison.name, head, left, lines, styles, captions, columns)


def fitted_table(
    title: str,
    head: Sequence[str],
    left: Sequence[bool],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str],
    captions: Sequence[str],
    columns: int = COLUMNS,
) -> "Table":
    """A table that wraps its cells between words to fit; only a contestant's label may be cut within a word.

    Args:
        title: Its title.
        head: Heads of the columns; one is `contestant`.
        left: Whether each column is flush left rather than right.
        rows: The cells.
        styles: rich's style of each row.
        captions: Paragraphs below it.
        columns: Columns of the terminal.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    texts = [[name, *(row[i] for row in rows)] for i, name in enumerate(head)]
    widths = [max(map(cell_len, column)) for column in texts]
    words = [max(cell_len(word) for text in column for word in text.split() or [""]) for column in texts]
    gap = 2 if sum(widths) + 2 * len(head) <= columns else 1
    label = head.index("contestant")
    # What is too wide is cut: first the label, down to its words, then the other columns, then the label for good.
    least = [(i, words[i]) for i in reversed(range(len(head))) if i != label]
    excess = sum(widths) + gap * (len(head) - 1) - columns
    for i, width in ((label, max(10, min(24, words[label]))), *least, (label, 10)):
        cut = max(0, min(excess, widths[i] - width))
        widths[i], excess = widths[i] - cut, excess - cut

    padding = (0, gap - 1, 0, 0)
    table = Table(title=Text(title, "bold"), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding)
    for name, flush_left, width in zip(head, left, widths, strict=True):
        table.add_column(Text(name), justify="left" if flush_left else "right", overflow="fold", width=width)
    for row, row_style in zip(rows, styles, strict=True):
        table.add_row(*map(Text, row), style=row_style)
    table.caption = Text("\n".join(["", *captions]), "")
    table.caption_justify = "left"
    return table


def _cells(
    row: Row, rows: Sequence[Row], part: Comparison, scale: Scale, based: bool, figures: bool, several: bool
) -> list[str]:
    cells = [
        str(row.rank) if row.rank is not None else NOTHING,
        f"{row.task}: {row.label}" if several else row.label,
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
