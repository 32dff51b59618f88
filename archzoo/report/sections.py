"""What a report says, before it is written in any format: a section for each task, and what they say together."""

from collections.abc import Sequence
from dataclasses import dataclass

from archzoo.report.canvas import Picture, Style, plain_matplotlib
from archzoo.report.contestants import Comparison
from archzoo.report.facts import command, setting
from archzoo.report.formatting import Scale
from archzoo.report.lines import small_multiples
from archzoo.report.looks import styles
from archzoo.report.methods import methods, overview_notes
from archzoo.report.pictures import EMBEDDED, Drawing, drawings
from archzoo.report.plots import draw
from archzoo.report.ranking import Row, default_baseline, find_baseline, rank
from archzoo.report.samples import Sample, samples
from archzoo.report.scaling import Series, all_series
from archzoo.report.settings import shared_settings
from archzoo.report.sheets import (
    Sheet,
    cost_sheet,
    matrix_sheet,
    overview_sheet,
    ranking_sheet,
    runs_sheet,
    scaling_sheet,
    tuned_sheet,
)
from archzoo.report.verdict import Verdict, verdict


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


def all_pictures(sections: Sequence[Section], overview: Overview | None) -> list[Picture]:
    """Every picture of the report, those of all tasks together first."""
    first = [overview.picture] if overview and overview.picture else []
    return [*first, *(picture for section in sections for picture in section.pictures.values())]
