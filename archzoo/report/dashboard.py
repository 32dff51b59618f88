"""A comparison as a W&B workspace and a W&B report: which runs, grouped how, in which panels. Uses no network.

Both say what the local report says, from the same sections: its tables and caveats as text, computed here; and panels
that W&B draws from the runs that it has. Figures have the names of `archzoo.training.trackers.flat_summary`.
"""

import itertools
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from archzoo.report.contestants import Comparison
from archzoo.report.markdown import markdown_table, text_markdown
from archzoo.report.ranking import MEMORY_KINDS
from archzoo.report.runs import Run
from archzoo.report.sections import Overview, Section
from archzoo.report.settings import flatten
from archzoo.report.sheets import Sheet
from archzoo.report.wording import score_name

COSTS = {
    "parameters": "parameters",
    "flops": "FLOPs per sample",
    "timing/step_time_p50_s": "step time (s)",
    **dict(
        zip(
            ("memory/peak_cuda_bytes", "memory/saved_for_backward_bytes", "memory/peak_rss_bytes"),
            (f"{kind} (bytes)" for kind in MEMORY_KINDS),
            strict=True,
        )
    ),
}
"""Figures of a run's summary that the score is drawn against."""
_PANEL_WIDTH, _PANEL_HEIGHT, _PANELS_A_ROW = 8, 7, 3  # in the cells of W&B's grid, which is 24 wide
_TITLE = 128  # characters of a report's title that W&B takes
_BAND = "mean over seeds; the band spans the lowest to the highest seed"


@dataclass(frozen=True, slots=True)
class Dashboard:
    """What is saved on W&B; objects of wandb-workspaces, whose `save` sends them."""

    workspace: Any
    report: Any


def build_dashboard(
    comparison: Comparison, sections: Sequence[Section], overview: Overview | None, entity: str, project: str
) -> Dashboard:
    """The workspace and the report of a comparison.

    Args:
        comparison: What `load_comparison` read.
        sections: `report_sections` of it.
        overview: `report_overview` of it.
        entity: User or team that owns the project.
        project: W&B project that the runs are in.

    Raises:
        ImportError: If wandb-workspaces is not installed (the extra `dashboards`).
    """
    return Dashboard(
        _workspace(comparison, sections, overview, entity, project),
        _report(comparison, sections, overview, entity, project),
    )


def _library() -> tuple[Any, Any, Any]:
    """Its reports, workspaces and expressions."""
    with warnings.catch_warnings():  # it defines its models in pydantic's old way
        warnings.simplefilter("ignore", DeprecationWarning)
        import wandb_workspaces.expr as expr
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    return reports, workspaces, expr


def specs(dashboard: Dashboard) -> dict[str, Any]:
    """What the API would be sent, as JSON has it."""
    workspace, report = dashboard.workspace._to_model(), dashboard.report._to_model()
    return {
        "workspace": {
            "name": workspace.display_name,
            "spec": json.loads(workspace.spec.model_dump_json(by_alias=True, exclude_none=True)),
        },
        "report": {
            "title": report.display_name,
            "description": report.description,
            "spec": json.loads(report.spec.model_dump_json(by_alias=True, exclude_none=True)),
        },
    }


def _workspace(
    comparison: Comparison, sections: Sequence[Section], overview: Overview | None, entity: str, project: str
) -> Any:
    wr, ws, expr = _library()

    parts = [section.comparison for section in sections]
    texts = [_ranking_text(section, heading=len(sections) > 1) for section in sections]
    if overview:
        texts = [_overview_text(overview), *texts]
    panels = {
        "Ranking": [*(wr.MarkdownPanel(markdown=text) for text in texts), _bars(parts)],
        "Learning curves": _curves(parts),
        "Score against cost": _trade_offs(parts),
        "Samples and pictures": _media(parts),
    }
    keys = [*_task_keys(comparison), *_contestant_keys(comparison)]
    largest_first = comparison.mode == "max"
    return ws.Workspace(
        entity=entity,
        project=project,
        name=_plain(f"{comparison.name}: which layer won"),
        sections=[
            ws.Section(name=name, panels=_laid_out(found), is_open=True) for name, found in panels.items() if found
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_of_runs(_runs(parts)),
            groupby=[expr.Config(key) for key in keys],
            order=[expr.Ordering(expr.Summary("score"), ascending=not largest_first)],
            pinned_columns=["run:displayName", "summary:score", *(f"summary:{cost}" for cost in _costs(parts))],
        ),
    )


def _report(
    comparison: Comparison, sections: Sequence[Section], overview: Overview | None, entity: str, project: str
) -> Any:
    wr, _, _ = _library()

    blocks: list[Any] = [wr.TableOfContents()]
    if overview:
        blocks += [wr.H1("All tasks"), wr.MarkdownBlock(_overview_text(overview))]
    for section in sections:
        blocks += _section_blocks(section, heading=len(sections) > 1)
    return wr.Report(
        entity=entity,
        project=project,
        title=f"{comparison.name}: which layer won"[:_TITLE],
        description=" ".join(section.verdict.sentence for section in sections[:3]),
        blocks=blocks,
        width="fluid",
    )


def _section_blocks(section: Section, heading: bool) -> list[Any]:
    wr, _, _ = _library()

    part = section.comparison
    parts = [part]
    blocks: list[Any] = [wr.H1(f"Task {section.task}")] if heading else []
    blocks += [wr.H2("Ranking"), wr.MarkdownBlock(_ranking_text(section, heading=False))]
    grids = {
        "": [_bars(parts)],
        "Learning curves": _curves(parts),
        "Score against cost": _trade_offs(parts),
        "Samples and pictures": _media(parts),
    }
    for title, panels in grids.items():
        if panels:
            blocks += [wr.H2(title)] if title else []
            blocks.append(wr.PanelGrid(runsets=[_runset(section)], panels=_laid_out(panels)))
    told = [("Cost", section.cost), ("Tuned", section.tuned), ("Score against parameters", section.scaling)]
    for title, sheet in told:
        if sheet is not None:
            blocks += [wr.H2(title), wr.MarkdownBlock(markdown_table(sheet))]
    blocks += [wr.H2("Setting"), wr.UnorderedList([f"{term}: {value}" for term, value in section.setting])]
    if section.command:
        blocks.append(wr.P(["Run again: ", wr.InlineCode(section.command)]))
    return [*blocks, wr.H2("How it was computed"), wr.UnorderedList(list(section.methods))]


def _runset(section: Section) -> Any:
    wr, _, _ = _library()

    part = section.comparison
    return wr.Runset(
        name=section.task,
        filters=_of_runs(_runs([part])),
        groupby=[f"config.{key}" for key in _contestant_keys(part)],
        order=[wr.OrderBy(wr.SummaryMetric("score"), ascending=part.mode == "min")],
        pinned_columns=["run:displayName", "summary:score", *(f"summary:{cost}" for cost in _costs([part]))],
    )


# ---- which runs, and how they are grouped


def _runs(parts: Iterable[Comparison]) -> list[Run]:
    """The runs of the table: of a setting that is tuned, those at the chosen value."""
    return [run for part in parts for group in part.groups for run in group.runs]


def _of_runs(runs: Iterable[Run]) -> Any:
    """A filter that only these runs pass. Another comparison may have the name and the project of this one."""
    _, _, expr = _library()

    return expr.And(expr.Metric("ID").isin([run.id for run in runs if can_be_sent(run)]))


def can_be_sent(run: Run) -> bool:
    """Whether W&B can have a run: not one without a run.json that can be read, or with an id that is none of ours."""
    return bool(run.config) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run.id) is not None


def _contestant_keys(comparison: Comparison) -> list[str]:
    """Config keys that tell contestants apart: the layer, and the options that contestants with one layer differ in."""
    configs = [flatten(run.config) for run in comparison.runs]
    keys = ["contestant"]
    for option in dict.fromkeys(option for group in comparison.groups for option in group.options):  # as `grid_size`
        meant = {key for config in configs for key in config if f".{key}".endswith(f".{option}")}
        keys += sorted(key for key in meant if len({config.get(key) for config in configs}) > 1)
    return list(dict.fromkeys(keys))


def _task_keys(comparison: Comparison) -> list[str]:
    """Config keys that tell the tasks apart; none where there is one task."""
    if len(comparison.tasks) < 2:
        return []
    values: dict[str, set[str]] = {"name": set()}
    for run in comparison.runs:
        task = run.config.get("task")
        for key, value in (flatten(task) if isinstance(task, dict) else {}).items():
            values.setdefault(key, set()).add(value)
    return [f"task.{key}" for key, found in values.items() if len(found) > 1 and key != "seed"]


# ---- panels


def _bars(parts: Sequence[Comparison]) -> Any:
    wr, _, _ = _library()

    better = "" if parts[0].mode == "max" else ", lower is better"
    name = score_name(parts[0]) if len({score_name(part) for part in parts}) == 1 else "score"
    return wr.BarPlot(
        title=f"{name}{better}: mean over seeds, from the lowest to the highest seed",
        metrics=["score"],
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        aggregate=True,
        max_bars_to_show=100,
    )


def _curves(parts: Sequence[Comparison]) -> list[Any]:
    """Validation score by step and by seconds of training; losses; learning rate: of these, what the runs have."""
    wr, _, _ = _library()

    scores = dict.fromkeys(f"val/{part.metric}" for part in parts)
    wanted = [*((score, x) for score in scores for x in ("Step", "train_s")), ("val/loss", "Step")]
    wanted += [("train/loss", "Step"), ("lr", "Step")]
    logged = _logged(parts)
    return [
        wr.LinePlot(
            title=f"{key}{' by seconds of training' if x == 'train_s' else ''}: {_BAND}",
            x=x,
            y=[key],
            title_x="training step" if x == "Step" else "seconds of training, without evaluations",
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            aggregate=True,
            max_runs_to_show=100,
        )
        for key, x in dict.fromkeys(wanted)
        if {key, x} <= logged | {"Step"}
    ]


def _logged(parts: Iterable[Comparison]) -> set[str]:
    """Keys of metrics.jsonl of one run of each contestant, one that counts if there is any."""
    groups = [group for part in parts for group in part.groups]
    runs = [next(iter([*group.counted, *group.runs])) for group in groups]
    return {key for run in runs for line in run.metrics() for key in line}


def _trade_offs(parts: Sequence[Comparison]) -> list[Any]:
    wr, _, _ = _library()

    return [
        wr.ScatterPlot(
            title=f"Score against {COSTS[cost]}",
            x=wr.SummaryMetric(cost),
            y=wr.SummaryMetric("score"),
            log_x=True,
        )
        for cost in _costs(parts)
    ]


def _costs(parts: Sequence[Comparison]) -> list[str]:
    """The figures of cost that runs have."""
    runs = _runs(parts)
    has = (
        lambda run: run.parameters,
        lambda run: run.flops,
        lambda run: run.step_time_s,
        lambda run: run.cuda_bytes,
        lambda run: run.saved_bytes,
        lambda run: run.rss_bytes,
    )
    return [cost for cost, value in zip(COSTS, has, strict=True) if any(value(run) for run in runs)]


def _media(parts: Sequence[Comparison]) -> list[Any]:
    """What the runs drew and wrote."""
    wr, _, _ = _library()

    runs = _runs(parts)
    pictures = dict.fromkeys(path.stem for run in runs for path in sorted(run.folder.glob("pictures/*.png")))
    shown = {f"pictures/{name}": name.replace("_", " ").capitalize() for name in pictures}
    if any((run.folder / "samples.jsonl").is_file() for run in runs):
        shown["sample"] = "Sampled text"
    return [wr.MediaBrowser(title=title, media_keys=[key], num_columns=4) for key, title in shown.items()]


def _laid_out(panels: Sequence[Any]) -> list[Any]:
    """The panels in rows; texts and media have a row each."""
    wr, _, _ = _library()

    y, column = 0, 0
    for panel in panels:
        wide = isinstance(panel, wr.MarkdownPanel | wr.MediaBrowser)
        if column and (wide or column == _PANELS_A_ROW):
            y, column = y + _PANEL_HEIGHT, 0
        width = _PANEL_WIDTH * (_PANELS_A_ROW if wide else 1)
        height = _PANEL_HEIGHT * (2 if isinstance(panel, wr.MarkdownPanel) else 1)
        panel.layout = wr.Layout(x=column * _PANEL_WIDTH, y=y, w=width, h=height)
        y, column = (y + height, 0) if wide else (y, column + 1)
    return list(panels)


# ---- texts


def _ranking_text(section: Section, heading: bool) -> str:
    """Verdict, details, caveats and the ranked table, with its confidence intervals and notes."""
    verdict = section.verdict
    lines = [f"## Task {text_markdown(section.task)}", ""] if heading else []
    lines += [f"**{text_markdown(verdict.sentence)}**", ""]
    lines += itertools.chain.from_iterable((text_markdown(text), "") for text in verdict.details)
    if verdict.caveats:
        lines += [*(f"> - {text_markdown(text)}" for text in verdict.caveats), ""]
    lines += [markdown_table(section.ranking), ""]
    lines += [f"- {text_markdown(row.label)}: {text_markdown(note)}" for row in section.rows for note in row.notes]
    return "\n".join(lines).rstrip() + "\n"


def _overview_text(overview: Overview) -> str:
    sheets: list[Sheet] = [sheet for sheet in (overview.series, overview.matrix) if sheet is not None]
    tables = [f"**{text_markdown(sheet.title)}**\n\n{markdown_table(sheet)}" for sheet in sheets]
    return "\n\n".join([*tables, "\n".join(f"- {text_markdown(note)}" for note in overview.notes)]) + "\n"


def _plain(name: str) -> str:
    """A name without what W&B refuses in names of workspaces: symbols, emoji among them, and lone surrogates."""
    return "".join(c for c in name if not unicodedata.category(c).startswith(("S", "Cs")))
