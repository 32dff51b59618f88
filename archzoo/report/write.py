"""Writes a comparison's report: HTML, Markdown, CSV, LaTeX and the pictures."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archzoo.report.canvas import PALETTE, Picture, Style, inline, plain_matplotlib
from archzoo.report.files import write_atomically
from archzoo.report.latex import PREAMBLE
from archzoo.report.latex import table as latex_table
from archzoo.report.lines import small_multiples
from archzoo.report.load import Comparison, load_comparison
from archzoo.report.pictures import EMBEDDED, Drawing, drawings
from archzoo.report.plots import draw, styles
from archzoo.report.ranking import Row, default_baseline, find_baseline, rank
from archzoo.report.samples import Sample, samples
from archzoo.report.scaling import Series, all_series
from archzoo.report.sheets import (
    EQUAL,
    Cell,
    Sheet,
    cost_sheet,
    matrix_sheet,
    overview_sheet,
    ranking_sheet,
    runs_sheet,
    scaling_sheet,
    tuned_sheet,
)
from archzoo.report.wording import (
    Scale,
    Verdict,
    command,
    methods,
    overview_notes,
    setting,
    shared_settings,
    verdict,
)

FIGURES = "figures"


@dataclass(frozen=True, slots=True)
class Section:
    """All that the report says of one task."""

    task: str
    comparison: Comparison
    rows: tuple[Row, ...]
    scale: Scale
    verdict: Verdict
    ranking: Sheet
    cost: Sheet
    runs: Sheet
    setting: list[tuple[str, str]]
    shared: dict[str, str]
    command: str | None
    methods: list[str]
    pictures: dict[str, Picture]
    series: tuple[Series, ...]
    scaling: Sheet | None
    """The points and exponents of the series, where there are any."""
    tuned: Sheet | None
    """What was tried of the settings that are tuned."""
    samples: tuple[Sample, ...]
    """What the contestants wrote, where they are language models."""
    drawings: tuple[Drawing, ...]
    """What their runs drew."""

    @property
    def curves(self) -> list[Picture]:
        """The learning curves."""
        return [picture for name, picture in self.pictures.items() if name.startswith("curves")]

    @property
    def trade_offs(self) -> list[Picture]:
        """Score against each cost."""
        return [picture for name, picture in self.pictures.items() if name.startswith("score-")]


@dataclass(frozen=True, slots=True)
class Overview:
    """What the report says of several tasks together."""

    matrix: Sheet
    """Contestants x tasks."""
    series: Sheet | None
    """Mean rank over all sizes, and the exponents, of each series."""
    picture: Picture | None
    """Score against parameters, a panel a task."""
    notes: tuple[str, ...]


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
    for picture in _pictures(sections, overview):
        write_atomically(figures / f"{picture.name}.svg", picture.svg)
    write_atomically(folder / "report.md", markdown(comparison, sections, overview))
    write_atomically(folder / "report.csv", csv_text(sections))
    if any(section.series for section in sections):
        write_atomically(folder / "scaling.csv", scaling_csv(sections))
    write_atomically(folder / "report.tex", latex(comparison, sections, overview))
    return write_atomically(folder / "report.html", html(comparison, sections, overview))


def report_sections(comparison: Comparison, baseline: str | None = None) -> list[Section]:
    """What the report says, one section per task, before it is written in any format."""
    chosen = default_baseline(comparison) if baseline is None else baseline
    if baseline is not None:
        find_baseline(comparison, baseline)
    parts = comparison.split()
    ranked: dict[str, list[Row]] = {}
    for row in rank(comparison, chosen):
        ranked.setdefault(row.task, []).append(row)
    looks = _looks(comparison, [row for rows in ranked.values() for row in rows])
    colours = {label: look.index for label, look in looks.items()}
    sections: list[Section] = []
    room = EMBEDDED
    for place, part in enumerate(parts, 1):
        rows = ranked[part.groups[0].task]
        scale = Scale.of(part.metric, [value for row in rows for value in row.values])
        series = all_series(part, rows)
        drawn = drawings(part, room)
        room -= sum(len(drawing.data) for drawing in drawn)
        sections.append(
            Section(
                task=part.groups[0].task,
                comparison=part,
                rows=tuple(rows),
                scale=scale,
                verdict=verdict(part, rows, scale),
                ranking=ranking_sheet(part, rows, scale, colours),
                cost=cost_sheet(rows, colours),
                runs=runs_sheet(part, scale, colours),
                setting=setting(part),
                shared=shared_settings(part.runs),
                command=command(part),
                methods=methods(part, rows),
                pictures=draw(part, rows, scale, looks, f"task{place}-" if len(parts) > 1 else ""),
                series=tuple(series),
                scaling=scaling_sheet(series, part, scale, colours) if series else None,
                tuned=tuned_sheet(part, scale, colours),
                samples=samples(part),
                drawings=drawn,
            )
        )
    return sections


def report_overview(comparison: Comparison, sections: Sequence[Section]) -> Overview | None:
    """What there is to say of all tasks together; None for one task."""
    if len(sections) < 2:
        return None
    looks = _looks(comparison, [row for section in sections for row in section.rows])
    colours = {label: look.index for label, look in looks.items()}
    with plain_matplotlib():
        picture = small_multiples([(s.comparison, s.series, s.scale) for s in sections], looks)
    rows = [row for section in sections for row in section.rows]
    return Overview(
        matrix_sheet([(section.comparison, section.rows, section.scale) for section in sections]),
        overview_sheet([(section.comparison, section.rows, section.series) for section in sections], colours),
        picture,
        tuple(overview_notes(rows, [line for section in sections for line in section.series])),
    )


def _looks(comparison: Comparison, rows: Sequence[Row]) -> dict[str, Style]:
    return styles(comparison, [row.label for row in rows if row.baseline])


def _pictures(sections: Sequence[Section], overview: Overview | None) -> list[Picture]:
    first = [overview.picture] if overview and overview.picture else []
    return [*first, *(picture for section in sections for picture in section.pictures.values())]


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
        files=[*files, *(f"{FIGURES}/{picture.name}.svg" for picture in _pictures(sections, overview))],
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


def markdown(comparison: Comparison, sections: Sequence[Section], overview: Overview | None = None) -> str:
    """The report as Markdown, in GitHub's dialect."""
    several = len(sections) > 1
    lines = [f"# {text_markdown(comparison.name)}", ""]
    if overview:
        lines += [f"- {text_markdown(s.task)}: {text_markdown(s.verdict.sentence)}" for s in sections] + [""]
        if overview.series:
            lines += ["## Over all sizes", "", markdown_table(overview.series), ""]
        if overview.picture:
            lines += [_md_picture(overview.picture), "", text_markdown(overview.picture.caption), ""]
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
            lines += [_md_picture(section.pictures["ranking"]), ""]
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
                    lines += [_md_picture(picture), "", text_markdown(picture.caption), ""]
        if section.drawings:
            lines += [f"{mark} Pictures", "", *(line for drawn in section.drawings for line in _md_drawing(drawn))]
        if section.samples:
            lines += [f"{mark} Sampled text", "", *(line for sample in section.samples for line in _md_sample(sample))]
        lines += [f"{mark} Setting", ""]
        lines += [f"- {text_markdown(term)}: {text_markdown(value)}" for term, value in section.setting]
        lines += [f"- Run again: {_md_code(section.command)}"] if section.command else []
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


def latex(comparison: Comparison, sections: Sequence[Section], overview: Overview | None = None) -> str:
    r"""The rankings and costs as LaTeX tables, for a document with `\usepackage{booktabs}`."""
    lines = [*PREAMBLE]
    if overview:
        label = f"tab:{_latex_label(comparison.name)}"
        notes = " ".join(overview.notes)
        if overview.series:
            lines += ["", *latex_table(overview.series, f"{comparison.name}, all tasks. {notes}", f"{label}-sizes")]
        lines += ["", *latex_table(overview.matrix, f"{comparison.name}, all tasks. {notes}", f"{label}-tasks")]
    for section in sections:
        of = f"{comparison.name}, task {section.task}"
        label = _latex_label(f"{comparison.name}-{section.task}")
        tested = sum(row.p_holm is not None for row in section.rows)
        test = f"; p of a paired sign-flip permutation test, Holm-corrected over {tested}" if tested else ""
        tied = any(row.ties_leader for row in section.rows)
        ties = " A dagger marks what is not separable from the leader." if tied else ""
        notes = "".join(f" {row.label}: {note}." for row in section.rows for note in row.notes)
        told = f"{of}: mean over seeds and its 95 % confidence interval{test}. {section.verdict.sentence}{ties}{notes}"
        daggers = [row.ties_leader for row in section.rows]
        left_out = ("#", "Against the leader", "Runs")
        lines += ["", *latex_table(section.ranking, told, f"tab:{label}", left_out, daggers=daggers)]
        if section.scaling:
            told = f"{of}: exponent of score ~ parameters^-α, and its standard error."
            lines += ["", *latex_table(section.scaling, told, f"tab:{label}-scaling", section.scaling.columns[-1:])]
        if section.tuned:
            told = f"{of}: values tried, and the mean validation score over the seeds that they have in common."
            lines += ["", *latex_table(section.tuned, told, f"tab:{label}-tuned")]
        others = ["Samples/s", *EQUAL]
        lines += ["", *latex_table(section.cost, f"{of}: cost.", f"tab:{label}-cost", others, details=False)]
        if EQUAL[0] in section.cost.columns:
            told = (
                f"{of}: steps and seconds to the baseline's best validation score in the same seed, in units of the "
                "baseline's own; mean over seeds and its 95 % confidence interval."
            )
            others = [column for column in section.cost.columns[1:] if column not in EQUAL]
            lines += ["", *latex_table(section.cost, told, f"tab:{label}-equal", others)]
    return "\n".join(lines) + "\n"


def _latex_label(text: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in text.lower())


def csv_text(sections: Sequence[Section]) -> str:
    """One line per contestant, numbers in full and in SI units or bytes, fractions as fractions."""
    figures = sorted({name for section in sections for row in section.rows for name in row.figures})
    columns = [
        *("task", "metric", "split", "mode", "size", "rank", "label", "layer", "series", "baseline", "leader"),
        "ties_leader",
        *("ties_baseline", "n_seeds", "seeds", "score_mean", "score_low", "score_high", "interval"),
        *("difference_mean", "difference_low", "difference_high", "common_seeds", "p", "p_holm"),
        *("parameters", "budget_target", "budget_deviation", "within_tolerance", "widths", "option"),
        "flops_per_sample",
        *("bytes_per_step", "step_time_s", "samples_per_s", "saved_for_backward_bytes", "peak_rss_bytes"),
        *("peak_cuda_bytes", "done", "running", "interrupted", "diverged", "failed", "unknown"),
        *("equal_seeds", "equal_reached", "equal_steps_mean", "equal_steps_low", "equal_steps_high"),
        *("equal_seconds_mean", "equal_seconds_low", "equal_seconds_high", "tuned", "tuned_of", "tuned_validation"),
        *(f"task_{name}{end}" for name in figures for end in ("", "_count")),
        "notes",
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for section in sections:
        part = section.comparison
        for row in section.rows:
            score, difference, budget = row.score, row.difference, row.budget
            values: dict[str, Any] = {
                "task": row.task,
                "metric": part.metric,
                "split": part.score_split,
                "mode": part.mode,
                "size": row.size,
                "rank": row.rank,
                "label": row.label,
                "layer": row.layer,
                "series": row.series,
                "baseline": row.baseline,
                "leader": row.leader,
                "ties_leader": row.ties_leader,
                "ties_baseline": row.tie,
                "n_seeds": row.count,
                "seeds": " ".join(str(seed) for seed in row.seeds if seed is not None),
                "common_seeds": row.common_seeds if row.tie is not None else None,
                "p": row.p_value,
                "p_holm": row.p_holm,
                "parameters": row.parameters,
                "budget_target": budget.target if budget else None,
                "budget_deviation": budget.deviation if budget else None,
                "within_tolerance": budget.within_tolerance if budget else None,
                "widths": " ".join(map(str, budget.widths)) if budget else None,
                "option": f"{budget.option}={budget.value}" if budget and budget.option else None,
                "flops_per_sample": row.flops,
                "bytes_per_step": row.bytes_per_step,
                "step_time_s": row.step_time_s,
                "samples_per_s": row.samples_per_s,
                "saved_for_backward_bytes": row.saved_bytes,
                "peak_rss_bytes": row.rss_bytes,
                "peak_cuda_bytes": row.cuda_bytes,
                **{status: row.statuses.get(status, 0) for status in columns if status in _STATUS_COLUMNS},
                "notes": "; ".join(row.notes),
            }
            for name, interval in (("score", score), ("difference", difference)):
                if interval is not None:
                    values |= {f"{name}_{end}": getattr(interval, end) for end in ("mean", "low", "high")}
            values["interval"] = score.method if score else None
            values |= _equal_values(row) | _tuned_values(row)
            for name, figure in row.figures.items():
                values |= {f"task_{name}": figure.value, f"task_{name}_count": figure.count}
            writer.writerow({key: _csv(value) for key, value in values.items()})
    return buffer.getvalue()


def _equal_values(row: Row) -> dict[str, Any]:
    equal = row.equal
    if equal is None:
        return {}
    values: dict[str, Any] = {"equal_seeds": len(equal.seeds), "equal_reached": equal.reached}
    for name, interval in (("steps", equal.steps), ("seconds", equal.seconds)):
        if interval is not None:
            values |= {f"equal_{name}_{end}": getattr(interval, end) for end in ("mean", "low", "high")}
    return values


def _tuned_values(row: Row) -> dict[str, Any]:
    chosen = row.tuning.chosen if row.tuning else None
    if row.tuning is None or chosen is None:
        return {}
    tried = "; ".join(trial.name for trial in row.tuning.trials)
    return {"tuned": chosen.name, "tuned_of": tried, "tuned_validation": chosen.mean}


def scaling_csv(sections: Sequence[Section]) -> str:
    """One line a point of a series: the score over seeds, and the power law through all points of the series."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("task", "series", "layer", "label", "parameters", "median", "low", "high", "n_seeds")
    writer.writerow([*head, "exponent", "exponent_error", "factor", "points"])
    for section in sections:
        for line in section.series:
            law = line.law
            fit = (law.exponent, law.error, law.factor, law.points) if law else (None,) * 4
            for p in line.points:
                told = (section.task, line.label, line.layer, p.row.label, p.parameters, p.median, p.low, p.high)
                writer.writerow([_csv(value) for value in (*told, p.row.count, *fit)])
    return buffer.getvalue()


_STATUS_COLUMNS = ("done", "running", "interrupted", "diverged", "failed", "unknown")


def _csv(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value) and abs(value) >= 1:
        return int(value)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return f"'{value}"  # a spreadsheet would take it for a formula
    return value


def _whole(cell: Cell) -> str:
    if not cell.detail:
        return cell.text
    return f"{cell.text} {cell.detail}" if cell.detail.startswith("[") else f"{cell.text} ({cell.detail})"


def text_markdown(text: str) -> str:
    """Text that Markdown shows as it is, escaped no more than need be, so that the source reads well too."""
    text = re.sub(r"([\\`*<|~$])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text).replace("](", "]\\(")


def _md_code(text: str) -> str:
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _md_sample(sample: Sample) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", sample.text)), default=0))
    return [f"- {text_markdown(sample.label)}:", "", fence, sample.text, fence, ""]


def _md_drawing(drawn: Drawing) -> list[str]:
    shown = f"![{text_markdown(f'{drawn.title}: {drawn.label}')}]({drawn.file})"
    return [shown, "", text_markdown(f"{drawn.label}: {drawn.caption}"), ""]


def _md_picture(picture: Picture) -> str:
    return f"![{text_markdown(picture.title)}]({FIGURES}/{picture.name}.svg)"
