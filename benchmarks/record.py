"""Puts a comparison that was run into `benchmarks/results/NAME.json`, from where the README's tables are made."""

import argparse
import json
from pathlib import Path
from typing import Any

from archzoo.report import load_comparison, rank
from archzoo.report.ranking import default_baseline

RESULTS = Path(__file__).parent / "results"


def comparison_record(folder: Path, command: str) -> dict[str, Any]:
    """The ranked rows, and what made them."""
    comparison = load_comparison(folder)
    first = json.loads((folder / comparison.runs[0].folder.name / "run.json").read_text())
    rows = [
        {
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
            "widths": list(row.budget.widths) if row.budget else None,
            "flops": row.flops,
            "step_time_s": row.step_time_s,
            "saved_bytes": row.saved_bytes,
            "statuses": dict(row.statuses),
            "figures": {name: str(figure) for name, figure in row.figures.items()},
        }
        for row in rank(comparison, default_baseline(comparison))
    ]
    return {
        "command": command,
        "task": first["task"],
        "metric": first["score"]["metric"],
        "mode": first["score"]["mode"],
        "commit": first["git"],
        "machine": {k: v for k, v in first["machine"].items() if k != "host"},
        "device": first["device"],
        "threads": first["threads"],
        "versions": first["versions"],
        "wall_s": sum(run.wall_s or 0.0 for run in comparison.runs),
        "rows": rows,
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
