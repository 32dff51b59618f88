"""Writes a comparison's report: HTML, Markdown, CSV, LaTeX and the pictures."""

from pathlib import Path

from archzoo.report.canvas import FIGURES
from archzoo.report.csv_files import csv_text, scaling_csv
from archzoo.report.files import write_atomically
from archzoo.report.latex import latex
from archzoo.report.load import load_comparison
from archzoo.report.markdown import markdown
from archzoo.report.page import html
from archzoo.report.sections import all_pictures, report_overview, report_sections


def write_report(folder: str | Path, baseline: str | None = None) -> Path:
    """Writes `report.html`, `report.md`, `report.csv`, `report.tex` and `figures/*.svg` into a comparison's folder.

    Where contestants are there in several sizes, `scaling.csv` has their points and exponents. `report.html` needs no
    other file, no network and no script, but where runs drew more than 16 MiB of pictures: the rest it shows from the
    runs' folders. Each file is replaced as a whole, and depends on the runs alone: a second call writes the same bytes.

    Args:
        folder: The comparison's folder, as `outputs/digits`.
        baseline: Label or layer of the contestant to test the others against; by default `"linear"` if it takes part,
            else the layer that the budget was matched to, else none.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: If the folder holds no run, or no contestant has that label or layer.
    """
    folder = Path(folder)
    comparison = load_comparison(folder)
    sections = report_sections(comparison, baseline)
    overview = report_overview(comparison, sections)
    figures = folder / FIGURES
    if figures.is_symlink():  # which may lead anywhere
        figures.unlink()
    figures.mkdir(exist_ok=True)
    for picture in all_pictures(sections, overview):
        write_atomically(folder / picture.file, picture.svg)
    write_atomically(folder / "report.md", markdown(comparison, sections, overview))
    write_atomically(folder / "report.csv", csv_text(sections))
    if any(section.series for section in sections):
        write_atomically(folder / "scaling.csv", scaling_csv(sections))
    write_atomically(folder / "report.tex", latex(comparison, sections, overview))
    return write_atomically(folder / "report.html", html(comparison, sections, overview))
