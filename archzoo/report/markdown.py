"""The report in Markdown."""

import re
from collections.abc import Sequence

from archzoo.report.canvas import Picture
from archzoo.report.contestants import Comparison
from archzoo.report.pictures import Drawing
from archzoo.report.samples import Sample
from archzoo.report.sections import Overview, Section
from archzoo.report.sheets import Cell, Sheet


def markdown(comparison: Comparison, sections: Sequence[Section], overview: Overview | None = None) -> str:
    """The report as Markdown, in GitHub's dialect."""
    several = len(sections) > 1
    lines = [f"# {text_markdown(comparison.name)}", ""]
    if overview:
        lines += [f"- {text_markdown(s.task)}: {text_markdown(s.verdict.sentence)}" for s in sections] + [""]
        if overview.series:
            lines += ["## Over all sizes", "", markdown_table(overview.series), ""]
        if overview.picture:
            lines += [_picture(overview.picture), "", text_markdown(overview.picture.caption), ""]
        lines += [f"## {text_markdown(overview.matrix.title)}", "", markdown_table(overview.matrix), ""]
        lines += [*(f"- {text_markdown(note)}" for note in overview.notes), ""]
    mark = "###" if several else "##"
    for section in sections:
        if several:
            lines += [f"## Task {text_markdown(section.task)}", ""]
        lines += [f"**{text_markdown(section.verdict.sentence)}**", ""]
        lines += [line for text in section.verdict.details for line in (text_markdown(text), "")]
        if section.verdict.caveats:
            lines += [*(f"> - {text_markdown(text)}" for text in section.verdict.caveats), ""]
        if "ranking" in section.pictures:
            lines += [_picture(section.pictures["ranking"]), ""]
        lines += [f"{mark} Ranking", "", markdown_table(section.ranking), ""]
        notes = [f"- {text_markdown(row.label)}: {text_markdown(note)}" for row in section.rows for note in row.notes]
        if notes:
            lines += [*notes, ""]
        if section.scaling:
            lines += [f"{mark} Score against parameters", "", markdown_table(section.scaling), ""]
        if section.tuned:
            lines += [f"{mark} Tuned", "", markdown_table(section.tuned), ""]
        lines += [f"{mark} Cost", "", markdown_table(section.cost), ""]
        for title, pictures in (("Learning curves", section.curves), ("Score against cost", section.trade_offs)):
            if pictures:
                lines += [f"{mark} {title}", ""]
                for picture in pictures:
                    lines += [_picture(picture), "", text_markdown(picture.caption), ""]
        if section.drawings:
            lines += [f"{mark} Pictures", "", *(line for drawn in section.drawings for line in _drawing(drawn))]
        if section.samples:
            lines += [f"{mark} Sampled text", "", *(line for sample in section.samples for line in _sample(sample))]
        lines += [f"{mark} Setting", ""]
        lines += [f"- {text_markdown(term)}: {text_markdown(value)}" for term, value in section.setting]
        lines += [f"- Run again: {_code(section.command)}"] if section.command else []
        lines += ["", f"{mark} How it was computed", "", *(f"- {text_markdown(line)}" for line in section.methods)]
        lines += ["", f"{mark} Runs", "", markdown_table(section.runs), ""]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(sheet: Sheet) -> str:
    """A sheet as a Markdown table."""
    lines = [
        "| " + " | ".join(text_markdown(column) for column in sheet.columns) + " |",
        "| " + " | ".join("---:" if numeric else "---" for numeric in sheet.numeric) + " |",
    ]
    lines += ["| " + " | ".join(text_markdown(_whole(cell)) for cell in row) + " |" for row in sheet.rows]
    return "\n".join(lines)


def text_markdown(text: str) -> str:
    """Text that Markdown shows as it is, escaped no more than need be, so that the source reads well too."""
    text = re.sub(r"([\\`*<|~$])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text).replace("](", "]\\(")


def _whole(cell: Cell) -> str:
    if not cell.detail:
        return cell.text
    return f"{cell.text} {cell.detail}" if cell.detail.startswith("[") else f"{cell.text} ({cell.detail})"


def _code(text: str) -> str:
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _sample(sample: Sample) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", sample.text)), default=0))
    return [f"- {text_markdown(sample.label)}:", "", fence, sample.text, fence, ""]


def _drawing(drawn: Drawing) -> list[str]:
    shown = f"![{text_markdown(f'{drawn.title}: {drawn.label}')}]({drawn.file})"
    return [shown, "", text_markdown(f"{drawn.label}: {drawn.caption}"), ""]


def _picture(picture: Picture) -> str:
    return f"![{text_markdown(picture.title)}]({picture.file})"
