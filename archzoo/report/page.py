"""The report as an HTML page that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archzoo.report.canvas import PALETTE, inline
from archzoo.report.contestants import Comparison
from archzoo.report.sections import Overview, Section, all_pictures


def html(comparison: Comparison, sections: Sequence[Section], overview: Overview | None = None) -> str:
    """The report as one HTML page."""
    files = ["report.md", "report.csv", "report.tex"]
    files += ["scaling.csv"] if any(section.series for section in sections) else []
    return render(
        "report.html.j2",
        title=f"{comparison.name}: which layer won",
        name=comparison.name,
        sections=sections,
        overview=overview,
        files=[*files, *(picture.file for picture in all_pictures(sections, overview))],
    )


def render(template: str, **values: Any) -> str:
    """Fills one of the templates beside this file; every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        palette=PALETTE,
        css=Markup((here / "style.css").read_text(encoding="utf-8")),
        inline=lambda picture: Markup(inline(picture)),
    )
    return environment.get_template(template).render(**values)
