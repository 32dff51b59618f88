"""A sheet as a LaTeX table, narrow enough for the text of a paper."""

from collections.abc import Sequence

from archzoo.report.sheets import Sheet
from archzoo.report.wording import NOTHING

PREAMBLE = (
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


def escape(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(_ESCAPED.get(character, character) for character in text)


def table(
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
            text = escape(row[i].text)
            if sheet.numeric[i] and text[:1] in ("+", "-") and text[1:2].isdigit():
                text = f"${text[0]}${text[1:]}"
            if i == sheet.name_column:
                # In braces: a label that begins with [ would be taken for an option of the line break before it.
                text = (r"\textbf" if kind == "leader" else "") + f"{{{text}}}"
                text += r"\rlap{$^\dagger$}" if any(daggers[place : place + 1]) else ""
            if details and row[i].detail:
                text += f" {{\\scriptsize {escape(row[i].detail)}}}"
            cells.append(text)
        body.append(f"    {' & '.join(cells)} \\\\")
    heads = [_stacked(sheet.columns[i], "r" if sheet.numeric[i] else "l") for i in kept]
    return [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escape(caption)}}}",
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
        return escape(head)
    breaks = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    first, second = min(breaks, key=lambda lines: max(map(len, lines)))
    return f"\\shortstack[{side}]{{{escape(first)}\\\\{escape(second)}}}"
