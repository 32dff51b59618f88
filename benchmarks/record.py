"""Puts a comparison that was run into `benchmarks/results/NAME.json`, which the tables of our pages are made from."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from archzoo.report import load_comparison, rank
from archzoo.report.contestants import Comparison
from archzoo.report.ranking import Row, default_baseline, standings
from archzoo.report.reaching import EqualScore
from archzoo.report.scaling import Series, all_series
from archzoo.report.stats import Interval
from archzoo.report.tuning import Tuning

RESULTS = Path(__file__).parent / "results"


def comparison_record(folder: Path, command: str) -> dict[str, Any]:
    """The ranked rows, task by task and size by size, and what made them."""
    comparison = load_comparison(folder)
    rows = rank(comparison, default_baseline(comparison))
    done = next((run for run in comparison.runs if run.status == "done"), comparison.runs[0])
    first = json.loads((done.folder / "run.json").read_text())
    parts = {part.groups[0].task: part for part in comparison.split()}
    record: dict[str, Any] = {
        "command": command,
        "task": first["task"],
        "metric": comparison.metric,
        "mode": comparison.mode,
        "commit": first["git"],
        "machine": {k: v for k, v in first["machine"].items() if k != "host"},
        "device": first["device"],
        "threads": first["threads"],
        "versions": first["versions"],
        "wall_s": sum(run.wall_s or 0.0 for run in comparison.runs),
        "rows": [_row(row, parts[row.task]) for row in rows],
    }
    series = [_series(task, line) for task, part in parts.items() for line in all_series(part, _of(rows, task))]
    if series:
        record["series"] = series
    sized = len(comparison.sizes) > 1
    if len(parts) > 1 or sized:
        places = standings(rows, lambda row: row.series or row.label if sized else row.label).values()
        record["standings"] = [
            asdict(place) for place in sorted(places, key=lambda p: (p.mean_rank is None, p.mean_rank or 0.0, p.label))
        ]
    return record


def _of(rows: list[Row], task: str) -> list[Row]:
    return [row for row in rows if row.task == task]


def _row(row: Row, part: Comparison) -> dict[str, Any]:
    budget = row.budget
    return {
        "task": row.task,
        "metric": part.metric,
        "size": row.size,
        "series": row.series,
        "layer": row.layer,
        "baseline": row.baseline,
        "rank": row.rank,
        "label": row.label,
        "seeds": list(row.seeds),
        "values": list(row.values),
        "mean": row.score.mean if row.score else None,
        "half_width": row.score.half_width if row.score else None,
        "difference": row.difference.mean if row.difference else None,
        "p": row.p_value,
        "p_holm": row.p_holm,
        "parameters": row.parameters,
        "deviation": row.deviation,
        "widths": list(budget.widths) if budget else None,
        "option": {budget.option: budget.value} if budget and budget.option else None,
        "flops": row.flops,
        "step_time_s": row.step_time_s,
        "saved_bytes": row.saved_bytes,
        "statuses": dict(row.statuses),
        "figures": {name: asdict(figure) for name, figure in row.figures.items()},
        "equal_score": _equal_score(row.equal) if row.equal else None,
        "tuned": _tuned(row.tuning) if row.tuning else None,
    }


def _equal_score(equal: EqualScore) -> dict[str, Any]:
    """Steps and seconds to the baseline's best validation score, in units of the baseline's own, seed by seed."""

    def part(ratios: tuple[float | None, ...], mean: Interval | None) -> dict[str, Any]:
        return {
            "ratios": list(ratios),
            "mean": mean.mean if mean else None,
            "half_width": mean.half_width if mean else None,
        }

    return {
        "seeds": list(equal.seeds),
        "without_curve": equal.without_curve,
        "reached": equal.reached,
        "at_most": equal.at_most,
        "base_steps": equal.base_steps,
        "base_seconds": equal.base_seconds,
        "steps": part(equal.step_ratios, equal.steps),
        "seconds": part(equal.second_ratios, equal.seconds),
    }


def _tuned(tuning: Tuning) -> dict[str, Any]:
    """What was tried, with the mean validation score over the seeds that are compared."""
    return {
        "seeds": list(tuning.seeds),
        "trials": [
            {
                "name": trial.name,
                "options": dict(trial.options),
                "validation": trial.mean,
                "seeds": sorted(trial.scores),
                "chosen": trial.chosen,
                "trouble": trial.trouble(),
            }
            for trial in tuning.trials
        ],
        "warnings": list(tuning.warnings),
    }


def _series(task: str, line: Series) -> dict[str, Any]:
    law = line.law
    return {
        "task": task,
        "label": line.label,
        "exponent": law.exponent if law else None,
        "error": law.error if law else None,
        "points": [
            {"parameters": p.parameters, "median": p.median, "low": p.low, "high": p.high, "seeds": p.row.count}
            for p in line.points
        ],
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks record", description=__doc__)
    parser.add_argument("folder", type=Path, help="as outputs/digits")
    parser.add_argument("--command", help="what made it; default: python train.py experiment=NAME")
    args = parser.parse_args(argv)
    record = comparison_record(args.folder, args.command or f"python train.py experiment={args.folder.name}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.folder.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
