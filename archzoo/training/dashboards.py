"""`archzoo dashboard`: a comparison's runs on W&B, and a workspace and a report that show them."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archzoo.report.contestants import Comparison
from archzoo.report.dashboard import build_dashboard, can_be_sent, specs
from archzoo.report.files import read_own, write_atomically
from archzoo.report.load import load_comparison
from archzoo.report.runs import Run
from archzoo.report.sections import report_overview, report_sections
from archzoo.report.wandb_server import Unreachable, log_in, save, sync
from archzoo.report.write import write_report
from archzoo.training.config import TrackerConfig
from archzoo.training.trackers import tell_offline

SAVED = "dashboard.json"
"""Of the comparison's folder: what is on W&B, so that a second call brings it up to date."""
PREVIEW = "dashboard-preview.json"


@dataclass(slots=True)
class Sorted:
    """The runs of a comparison, by what there is to do for W&B to have them."""

    recorded: list[Run] = field(default_factory=list)
    """With an offline run in their folder."""
    untold: list[Run] = field(default_factory=list)
    """Without, as of `tracker=none`: told from the local record."""
    there: list[Run] = field(default_factory=list)
    """Logged online, to the project that is meant."""
    unfinished: list[Run] = field(default_factory=list)
    """Still running, or without a run.json that can be read."""


def make_dashboard(
    folder: Path,
    *,
    entity: str | None = None,
    project: str | None = None,
    baseline: str | None = None,
    dry_run: bool = False,
) -> int:
    """Sends a comparison to W&B, or says why not; a second call brings what is there up to date.

    Args:
        folder: The comparison's, as `outputs/digits`.
        entity: User or team; by default what the runs have (`tracker.entity`), else that of the login.
        project: By default what the runs have (`tracker.project`).
        baseline: As of `write_report`.
        dry_run: Only write what would be sent, to `dashboard-preview.json`. Needs no login and no network.

    Returns:
        The exit code: 0, or 1 if W&B does not have all of it now. Then there is at least the local report.

    Raises:
        ValueError: If the folder holds no run, or no contestant has that label or layer.
    """
    comparison = load_comparison(folder)
    trackers = [tracker for run in comparison.runs if isinstance(tracker := run.config.get("tracker"), dict)]
    project = project or _commonest([str(t["project"]) for t in trackers if t.get("project")]) or TrackerConfig.project
    entity = entity or _commonest([str(t["entity"]) for t in trackers if t.get("entity")])
    try:
        if dry_run:
            return _preview(comparison, baseline, entity or "ENTITY", project)
        return _send(comparison, baseline, entity, project)
    except (Unreachable, ImportError) as error:
        told = str(error)
        if isinstance(error, ImportError):
            told = f"{error.name} is not installed; pip install 'archzoo[dashboards]'"
        print(f"W&B does not have all of it: {told}", file=sys.stderr)
        page = folder / "report.html"
        print(f"local report: {page if page.is_file() else write_report(folder, baseline)}")
        return 1


def _send(comparison: Comparison, baseline: str | None, entity: str | None, project: str) -> int:
    login = log_in()
    entity = entity or login.entity
    if entity is None:
        raise Unreachable(f"{login.url} does not say whose the project is to be; give --entity")
    sections = report_sections(comparison, baseline)
    dashboard = build_dashboard(comparison, sections, report_overview(comparison, sections), entity, project)
    try:
        before = json.loads((comparison.folder / SAVED).read_text())
    except (OSError, ValueError):
        before = {}
    moved = bool(before) and (before.get("entity"), before.get("project")) != (entity, project)
    runs = _sort(comparison, entity, project)
    if moved:  # W&B's files know what of them was sent, but not where to
        runs.untold, runs.recorded = [*runs.untold, *runs.recorded], []
    for run in list(runs.untold):
        try:
            record = json.loads(read_own(run.folder / "run.json", comparison.folder))
            tell_offline(run.folder, TrackerConfig(wandb="offline", project=project, entity=entity), record)
        except Exception as error:  # what a damaged or foreign folder holds; the other runs are sent
            print(f"not sent: {run.folder.name} ({type(error).__name__}: {error})", file=sys.stderr)
            runs.untold.remove(run)
    offline = [path for run in [*runs.recorded, *runs.untold] for path in run.folder.glob("wandb/offline-run-*")]
    unsent = sync(offline, entity, project)
    print(f"runs on W&B: {len(offline) - len(unsent) + len(runs.there)} of {len(comparison.runs)}")
    if runs.unfinished:
        print(f"not sent, for they are running or unreadable: {len(runs.unfinished)}; call again when they are done")
    if unsent:
        raise Unreachable(f"{len(unsent)} of {len(offline)} runs were not sent whole; call again for these")
    saved: dict[str, Any] = {"entity": entity, "project": project}
    for what, view in (("workspace", dashboard.workspace), ("report", dashboard.report)):
        saved[what] = save(view, None if moved else before.get(what))
        write_atomically(comparison.folder / SAVED, json.dumps(saved, indent=1) + "\n")
        print(f"{what}: {saved[what]['url']}")
    return 0


def _preview(comparison: Comparison, baseline: str | None, entity: str, project: str) -> int:
    sections = report_sections(comparison, baseline)
    told = specs(build_dashboard(comparison, sections, report_overview(comparison, sections), entity, project))
    runs = _sort(comparison, entity, project)
    print(
        f"would send {len(runs.recorded) + len(runs.untold)} runs to {entity}/{project}: {len(runs.recorded)} recorded "
        f"offline, {len(runs.untold)} told from the local record; {len(runs.there)} more were logged online, and "
        f"{len(runs.unfinished)} are running or unreadable"
    )
    panels = told["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    print("workspace: " + ", ".join(f"{part['name']} ({len(part['panels'])})" for part in panels))
    print(f"report: {len(told['report']['spec']['blocks'])} blocks")
    print(f"all of both: {write_atomically(comparison.folder / PREVIEW, json.dumps(told, indent=1))}")
    return 0


def _sort(comparison: Comparison, entity: str | None, project: str) -> Sorted:
    runs = Sorted()
    for run in comparison.runs:
        tracker = run.config.get("tracker") or {}
        here = tracker.get("project") == project and tracker.get("entity") in (None, entity)
        if run.status in ("running", "unknown") or not can_be_sent(run):
            runs.unfinished.append(run)
        elif any(run.folder.glob("wandb/offline-run-*")):
            runs.recorded.append(run)
        elif tracker.get("wandb") == "online" and here and any(run.folder.glob("wandb/run-*")):
            runs.there.append(run)
        else:
            runs.untold.append(run)
    return runs


def _commonest(values: list[str]) -> str | None:
    return Counter(values).most_common(1)[0][0] if values else None
