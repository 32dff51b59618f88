"""The report's tables in LaTeX, narrow enough for the text of a paper."""

from collections.abc import Sequence

from archzoo.report.contestants import Comparison
from archzoo.report.formatting import NOTHING
from archzoo.report.sections import Overview, Section
from archzoo.report.sheets import EQUAL, Sheet

_PREAMBLE = (
    r"% \usepackage{booktabs}; UTF-8 (pdflatex of 2018 or later with \usepackage[T1]{fontenc}, lualatex, xelatex).",
    r"% Where a table is too wide, make it a table*, or put it in a \resizebox of graphicx.",
)

_ESCAPED = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "µ": r"$\mu$",
    "≤": r"$\leq$",
    "…": r"\dots{}",
    "–": "--",
    "α": r"$\alpha$",
}


def latex(comparison: Comparison, sections: Sequence[Section], overview: Overview | None = None) -> str:
    r"""The rankings and costs as LaTeX tables, for a document with `\usepackage{booktabs}`."""
    lines = [*_PREAMBLE]
    if overview:
        label = f"tab:{_label(comparison.name)}"
        notes = " ".join(overview.notes)
        if overview.series:
            lines += ["", *_table(overview.series, f"{comparison.name}, all tasks. {notes}", f"{label}-sizes")]
        lines += ["", *_table(overview.matrix, f"{comparison.name}, all tasks. {notes}", f"{label}-tasks")]
    for section in sections:
        of = f"{comparison.name}, task {section.task}"
        label = _label(f"{comparison.name}-{section.task}")
        tested = sum(row.p_holm is not None for row in section.rows)
        test = f"; p of a paired sign-flip permutation test, Holm-corrected over {tested}" if tested else ""
        tied = any(row.ties_leader for row in section.rows)
        ties = " A dagger marks what is not separable from the leader." if tied else ""
        notes = "".join(f" {row.label}: {note}." for row in section.rows for note in row.notes)
        told = f"{of}: mean over seeds and its 95 % confidence interval{test}. {section.verdict.sentence}{ties}{notes}"
        daggers = [row.ties_leader for row in section.rows]
        left_out = ("#", "Against the leader", "Runs")
        lines += ["", *_table(section.ranking, told, f"tab:{label}", left_out, daggers=daggers)]
        if section.scaling:
            told = f"{of}: exponent of score ~ parameters^-α, and its standard error."
            lines += ["", *_table(section.scaling, told, f"tab:{label}-scaling", section.scaling.columns[-1:])]
        if section.tuned:
            told = f"{of}: values tried, and the mean validation score over the seeds that they have in common."
            lines += ["", *_table(section.tuned, told, f"tab:{label}-tuned")]
        others = ["Samples/s", *EQUAL]
        lines += ["", *_table(section.cost, f"{of}: cost.", f"tab:{label}-cost", others, details=False)]
        if EQUAL[0] in section.cost.columns:
            told = (
                f"{of}: steps and seconds to the baseline's best validation score in the same seed, in units of the "
                "baseline's own; mean over seeds and its 95 % confidence interval."
            )
            others = [column for column in section.cost.columns[1:] if column not in EQUAL]
            lines += ["", *_table(section.cost, told, f"tab:{label}-equal", others)]
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in text.lower())


def _escape(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(_ESCAPED.get(character, character) for character in text)


def _table(
    sheet: Sheet,
    caption: str,
    label: str,
    leave_out: Sequence[str] = (),
    details: bool = True,
    daggers: Sequence[bool] = (),
) -> list[str]:
    """The lines of a floating table in booktabs' manner. A column without any value is left out.

    Args:
        sheet: The table.
        caption: Its caption, not yet escaped.
        label: Its label.
        leave_out: Heads of columns to leave out.
        details: Whether to print the cells' details.
        daggers: For every row, whether its label gets a dagger.
    """
    kept = [
        i
        for i, column in enumerate(sheet.columns)
        if column not in leave_out and any(row[i].text != NOTHING for row in sheet.rows)
    ]
    body = []
    for place, (row, kind) in enumerate(zip(sheet.rows, sheet.kinds, strict=True)):
        cells = []
        for i in kept:
            text = _escape(row[i].text)
            if sheet.numeric[i] and text[:1] in ("+", "-") and text[1:2].isdigit():
                text = f"${text[0]}${text[1:]}"
            if i == sheet.name_column:
                # In braces: a label that begins with [ would be taken for an option of the line break before it.
                text = (r"\textbf" if kind == "leader" else "") + f"{{{text}}}"
                text += r"\rlap{$^\dagger$}" if any(daggers[place : place + 1]) else ""
            if details and row[i].detail:
                text += f" {{\\scriptsize {_escape(row[i].detail)}}}"
            cells.append(text)
        body.append(f"    {' & '.join(cells)} \\\\")
    heads = [_stacked(sheet.columns[i], "r" if sheet.numeric[i] else "l") for i in kept]
    return [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{_escape(caption)}}}",
        f"  \\label{{{label}}}",
        r"  \smallskip\footnotesize\setlength{\tabcolsep}{3.5pt}",
        f"  \\begin{{tabular}}{{@{{}}{''.join('r' if sheet.numeric[i] else 'l' for i in kept)}@{{}}}}",
        r"    \toprule",
        f"    {' & '.join(heads)} \\\\",
        r"    \midrule",
        *body,
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def _stacked(head: str, side: str) -> str:
    """A head in two lines, broken where they are most alike in length."""
    words = head.split()
    if len(words) < 2:
        return _escape(head)
    breaks = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    first, second = min(breaks, key=lambda lines: max(map(len, lines)))
    return f"\\shortstack[{side}]{{{_escape(first)}\\\\{_escape(second)}}}"
