"""Puts arithmetic experiments into `benchmarks/results/arithmetic.json`: how many seeds found the formula."""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from archzoo.registry import layer_options
from archzoo.tasks.seeds import median_interval, rate
from benchmarks.record import RESULTS

# Madsen & Johansen 2020, arXiv 2001.05016, 100 seeds: (operation, inputs) -> unit -> figures, so far as they are told
PAPER: dict[tuple[str, int], dict[str, dict[str, float]]] = {
    ("add", 100): {
        "nau": {"success": 1.00, "solved_at": 1.8e4, "sparsity_error": 3.2e-5},
        "linear": {"success": 1.00, "solved_at": 6.1e4, "sparsity_error": 0.25},
        "nac": {"success": 1.00, "solved_at": 2.5e5, "sparsity_error": 0.23},
        "nalu": {"success": 0.14, "solved_at": 1.5e6, "sparsity_error": 0.17},
    },
    ("sub", 100): {
        "nau": {"success": 1.00, "solved_at": 5e3, "sparsity_error": 0.066},
        "nac": {"success": 1.00, "solved_at": 9e3, "sparsity_error": 0.23},
        "linear": {"success": 0.07, "solved_at": 3.3e6, "sparsity_error": 0.18},
        "nalu": {"success": 0.14, "solved_at": 1.9e6, "sparsity_error": 0.21},
    },
    ("mul", 100): {
        "nmu": {"success": 0.98, "solved_at": 1.4e6, "sparsity_error": 4.2e-7},
        "nac (mode=multiply)": {"success": 0.31, "solved_at": 2.8e6, "sparsity_error": 5.8e-4},
        "nalu": {"success": 0.0},
    },
    ("squared", 100): {
        "nmu": {"success": 1.00, "solved_at": 1.2e6, "sparsity_error": 3.7e-5},
        "nac (mode=multiply)": {"success": 0.77, "solved_at": 3.3e6, "sparsity_error": 0.018},
    },
    ("function10", 4): {
        "nmu": {"success": 0.94, "solved_at": 1.4e4},
        "nalu": {"success": 0.26, "solved_at": 7.0e4},
        "nac (mode=multiply)": {"success": 0.13, "solved_at": 5.5e4},
    },
}


def unit_name(layer: dict[str, Any]) -> str:
    """The layer and its options that are not the defaults."""
    defaults = layer_options(layer["name"])
    changed = ", ".join(f"{k}={v}" for k, v in layer.items() if k in defaults and v != defaults[k])
    return layer["name"] + (f" ({changed})" if changed else "")


def arithmetic_record(folders: Iterable[Path], commands: Sequence[str] = ()) -> dict[str, Any]:
    """A row for each unit on each task, with the seeds of all its runs; and what made them.

    Args:
        folders: Of comparisons of the tasks `arithmetic` and `mnist_arithmetic`.
        commands: What made each. Where there are none: `python train.py experiment=NAME`.

    Raises:
        ValueError: If there is no run of these tasks that is done.
    """
    folders = list(folders)
    runs = [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("*/run.json"))]
    known = [run for run in runs if run["task"] in ("arithmetic", "mnist_arithmetic")]
    done = [run for run in known if run["status"] == "done"]
    if not done:
        raise ValueError(f"folders={[str(folder) for folder in folders]}: hold no run of these tasks that is done")
    return {
        "kind": "arithmetic",
        "commands": list(commands) or [f"python train.py experiment={folder.name}" for folder in folders],
        "commits": sorted({run["git"]["commit"] for run in done}),
        "dirty": any(run["git"]["dirty"] for run in done),
        "machine": {key: value for key, value in done[0]["machine"].items() if key != "host"},
        "device": done[0]["device"],
        "threads": done[0]["threads"],
        "versions": done[0]["versions"],
        "wall_s": sum(run["timing"]["wall_s"] for run in done),
        "unfinished": sum(run["status"] not in ("done", "diverged") for run in known),
        "rows": _formula_rows([run for run in known if run["task"] == "arithmetic"]),
        "sequences": _sequence_rows([run for run in done if run["task"] == "mnist_arithmetic"]),
    }


def _formula_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["status"] in ("done", "diverged"):
            config, task = run["config"], run["config"]["task"]
            inputs = 4 if task["operation"] == "function10" else task["input_size"]
            ranges = json.dumps([task["train_range"], task["test_range"]])
            steps = config["trainer"]["steps"]
            groups[task["operation"], inputs, ranges, steps, unit_name(config["layer"])].append(run)
    return [_formula_row(key, groups[key]) for key in sorted(groups)]


def _formula_row(key: tuple[Any, ...], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    operation, inputs, ranges, steps, unit = key
    solved, sparsity, succeeded, count = [], [], 0, 0
    for run in runs:
        for success, at, error in _each(run):
            count, succeeded = count + 1, succeeded + success
            solved += [at] if success and at is not None else []
            sparsity += [error] if success and error is not None else []
    train_range, test_range = json.loads(ranges)
    standard = (train_range, test_range) == ([1.0, 2.0], [2.0, 6.0])
    return {
        "operation": operation,
        "inputs": inputs,
        "train_range": train_range,
        "test_range": test_range,
        "unit": unit,
        "steps": steps,
        **rate(succeeded, count),
        **median_interval("solved_at", solved),
        **({"sparsity_error": statistics.median(sparsity)} if sparsity else {}),
        "wall_s": sum(run["timing"]["wall_s"] or 0.0 for run in runs),
        "paper": PAPER.get((operation, inputs), {}).get(unit) if standard else None,
    }


def _each(run: dict[str, Any]) -> list[tuple[bool, float | None, float | None]]:
    """Whether each seed of a run succeeded, the step at which it did, and its sparsity error."""
    found = run["summary"].get("task") or {}
    if run["status"] == "diverged":
        return [(False, None, None)]
    if "each_success" not in found:
        return [(found["success"] == 1, found.get("solved_at"), found.get("sparsity_error"))]
    errors = found["each_sparsity_error"]
    return [
        (success == 1, at, error)
        for success, at, error in zip(found["each_success"], found["each_solved_at"], errors, strict=True)
    ]


def _sequence_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors at each length, and the paper's criterion: below the upper bound of what the exact operation errs."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        task, accumulator = run["config"]["task"], run["config"]["model"]["accumulator"]
        unit = unit_name(run["config"]["layer"]) if accumulator == "layer" else "exact"
        groups[task["operation"], run["config"]["trainer"]["steps"], unit].append(run)
    rows = []
    for (operation, steps, unit), group in sorted(groups.items()):
        tests = [run["summary"]["test"] for run in group]
        longest = max(tests[0], key=_length)
        bound = _upper_bound([_at(r["summary"]["test"], longest) for r in groups.get((operation, steps, "exact"), [])])
        below = sum(bound is not None and _at(test, longest) < bound for test in tests)
        rows.append(
            {
                "operation": operation,
                "unit": unit,
                "steps": steps,
                "seeds": len(group),
                "bound": bound,
                "successes": None if bound is None or unit == "exact" else below,
                "mse": {
                    str(_length(key)): _finite(statistics.median(_at(test, key) for test in tests))
                    for key in sorted(tests[0], key=_length)
                    if _length(key)
                },
                "wall_s": sum(run["timing"]["wall_s"] for run in group),
            }
        )
    return rows


def _length(key: str) -> int:
    return int(key.removeprefix("mse_at_")) if key.startswith("mse_at_") else 0


def _at(test: dict[str, float | None], key: str) -> float:
    value = test[key]  # null where it is not finite
    return math.inf if value is None else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _upper_bound(values: Sequence[float]) -> float | None:
    """Upper 99 % confidence bound of a mean, one-sided, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import stats

    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) + float(stats.t.ppf(0.99, len(values) - 1)) * error


def table(record: dict[str, Any]) -> str:
    """Markdown: a line for each unit on each task, the paper's figures beside ours, then the sequences of digits."""
    parts = []
    if record["rows"]:
        columns = ["operation", "inputs", "unit", "steps", "succeeded", "rate, 95 %", "paper", "solved at", "paper"]
        columns += ["sparsity error", "paper"]
        lines = [_line(columns), "|---" * len(columns) + "|"]
        for row in record["rows"]:
            paper = row["paper"] or {}
            cells = [f"`{row['operation']}`", str(row["inputs"]), f"`{row['unit']}`", _short(row["steps"])]
            if [row["train_range"], row["test_range"]] != [[1.0, 2.0], [2.0, 6.0]]:
                cells[0] += f" {row['train_range']}"
            cells += [f"{row['successes']} of {row['seeds']}"]
            cells += [f"{_percent(row['success_low'])} to {_percent(row['success_high'])} %"]
            cells += [f"{_percent(paper['success'])} %" if paper else "–"]
            interval = (
                f" ({_short(row['solved_at_low'])} to {_short(row['solved_at_high'])})"
                if "solved_at_low" in row
                else ""
            )
            cells += [_short(row.get("solved_at")) + interval]
            cells += [_short(paper.get("solved_at"))]
            cells += [_short(row.get("sparsity_error")), _short(paper.get("sparsity_error"))]
            lines.append(_line(cells))
        parts.append("\n".join(lines))
    if record["sequences"]:
        for operation in dict.fromkeys(row["operation"] for row in record["sequences"]):
            rows = [row for row in record["sequences"] if row["operation"] == operation]
            lengths = list(dict.fromkeys(n for row in rows for n in row["mse"]))
            columns = [f"{operation} of digits", "steps", *(f"MSE at {n}" for n in lengths), "as good as exact"]
            lines = [_line(columns), "|---" * len(columns) + "|"]
            for row in rows:
                judged = "–" if row["successes"] is None else f"{row['successes']} of {row['seeds']}"
                errors = ["not finite" if row["mse"][n] is None else _short(row["mse"][n]) for n in lengths]
                lines.append(_line([f"`{row['unit']}`", _short(row["steps"]), *errors, judged]))
            parts.append("\n".join(lines))
    commits, versions = " and ".join(commit[:10] for commit in record["commits"]), record["versions"]
    commands = ", ".join(f"`{command}`" for command in record["commands"])
    changed = " with uncommitted changes" if record["dirty"] else ""
    notes = (
        f"{commands}, commit {commits}{changed}, {record['machine']['cores']} cores of "
        f"{record['machine']['cpu']}, torch {versions['torch']}, {record['threads']} thread; {record['wall_s']:.0f} s "
        "in all. Paper: arXiv 2001.05016, 100 seeds, up to 5e6 steps. Solved at and sparsity error: medians over the "
        "seeds that succeeded."
    )
    return "\n\n".join([*parts, notes])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _short(value: float | None) -> str:
    """As 1.4e4: two digits, and no zeros that say nothing."""
    if value is None:
        return "–"
    if 0.01 <= abs(value) < 1000 or value == 0:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks arithmetic_table", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="as outputs/arithmetic_function10")
    parser.add_argument("--command", action="append", default=[], help="what made it; once for each command")
    args = parser.parse_args(argv)
    record = arithmetic_record(args.folders, args.command)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "arithmetic.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{table(record)}\n\nwrote {path}")
