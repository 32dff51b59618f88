"""Puts the finished experiment `kan_symbolic` into `benchmarks/results/kan_symbolic.json`: what was found."""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from archzoo.tasks.functions import FUNCTIONS

RESULTS = Path(__file__).parent / "results"


def symbolic_record(folder: Path, command: str) -> dict[str, Any]:
    """For each function: what it is, the hidden levels it was looked for in, and what every seed found."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*/run.json")):
        run = json.loads(path.read_text())
        runs[run["config"]["task"]["function"]].append(run)
    if not runs:
        raise SystemExit(f"{folder}: no run.json in its folders; run {command} first")
    rows = [_row(name, sorted(runs[name], key=lambda run: run["seed"])) for name in FUNCTIONS if name in runs]
    every = [run for group in runs.values() for run in group]
    first = every[0]
    return {
        "command": command,
        "exact": sum(row["exact"] > 0 for row in rows),
        "exact_for_all_seeds": sum(row["exact"] == row["seeds"] for row in rows),
        "functions": len(rows),
        "commits": sorted({f"{r['git']['commit'][:12]}{'+' * r['git']['dirty']}" for r in every if r["git"]}),
        "machine": {k: v for k, v in first["machine"].items() if k != "host"},
        "device": first["device"],
        "threads": first["threads"],
        "versions": first["versions"],
        "wall_s": sum(run["timing"]["wall_s"] or 0.0 for run in every),
        "rows": rows,
    }


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = [run["summary"].get("task", {}) for run in runs]
    return {
        "function": name,
        "truth": FUNCTIONS[name].text,
        "hidden": FUNCTIONS[name].hidden,
        "exact": sum(summary.get("success") == 1 for summary in found),
        "seeds": len(runs),
        "runs": [
            {
                "seed": run["seed"],
                "status": run["status"],
                "exact": summary.get("success") == 1,
                "formula": summary.get("formula"),
                "formula_rmse": summary.get("formula_rmse"),
                "spline_rmse": summary.get("spline_rmse"),
                "numeric_edges": summary.get("numeric_edges"),
                "wall_s": run["timing"]["wall_s"],
            }
            for run, summary in zip(runs, found, strict=True)
        ],
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kan_symbolic", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs/kan_symbolic"))
    parser.add_argument("--command", default="python train.py experiment=kan_symbolic", help="what made it")
    args = parser.parse_args(argv)
    record = symbolic_record(args.folder, args.command)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "kan_symbolic.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print(f"{row['exact']}/{row['seeds']}  {row['function']:20} {row['truth']}")
    print(f"{record['exact']} of {record['functions']} functions exactly, from one seed or more; wrote {path}")
