"""Puts a run of experiment=kan_symbolic into `benchmarks/results/kan_symbolic.json`: what was found of each formula."""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS


def formulas(folder: Path) -> dict[str, Any]:
    """One row a function, with what each seed found; and what made them."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/run.json"))]
    done = [run for run in runs if run["status"] == "done"]
    if not done:
        raise ValueError(f"folder={str(folder)!r}: holds no run that is done")
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(done, key=lambda run: run["seed"]):
        what = run["summary"]["task"]
        found[run["config"]["task"]["function"]].append(
            {
                "seed": run["seed"],
                "exact": what.get("success") == 1,
                "formula": what.get("formula"),
                "formula_rmse": what.get("formula_rmse"),
                "numeric_edges": what["numeric_edges"],
                "test_rmse": run["score"]["value"],
                "wall_s": run["timing"]["wall_s"],
                "truth": what.get("truth"),
            }
        )
    first = done[0]
    return {
        "task": first["task"],
        "commit": {"commit": first["git"]["commit"], "dirty": any(run["git"]["dirty"] for run in done)},
        "machine": {key: value for key, value in first["machine"].items() if key != "host"},
        "device": first["device"],
        "threads": first["threads"],
        "versions": first["versions"],
        "wall_s": sum(run["timing"]["wall_s"] for run in done),
        "unfinished": len(runs) - len(done),
        "formulas": dict(sorted(found.items())),
    }


def table(record: dict[str, Any]) -> str:
    """One line a function: the truth, in how many seeds it was found exactly, and what was found."""
    lines = ["| function | truth | found exactly | as |", "|---|---|---|---|"]
    for name, runs in record["formulas"].items():
        exact = [run for run in runs if run["exact"]]
        best = min(runs, key=lambda run: (not run["exact"], run["test_rmse"]))
        shown = f"`{best['formula']}`" if exact else f"not found; test RMSE {best['test_rmse']:.1e} at best"
        lines.append(f"| `{name}` | `{runs[0]['truth']}` | {len(exact)} of {len(runs)} | {shown} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kan_symbolic", description=__doc__)
    parser.add_argument("folder", type=Path, help="as outputs/kan_symbolic")
    parser.add_argument("--command", default="python train.py experiment=kan_symbolic")
    args = parser.parse_args(argv)
    path = RESULTS / "kan_symbolic.json"
    path.write_text(json.dumps({"command": args.command, **formulas(args.folder)}, indent=1) + "\n")
    print(f"wrote {path}")
