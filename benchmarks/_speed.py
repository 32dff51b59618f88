"""What the records of `gpu` and `cpu` say: ratios, means, goals; and the tables that the README and the docs have."""

import importlib
import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from archzoo.kernels import _thresholds
from benchmarks._cases import H200, Goal, Op, label
from benchmarks._measure import COMPILED, DEFINITION, OURS, OURS_COMPILED, planned_floors

RESULTS = Path(__file__).parent / "results"
RECORDS = {"gpu": RESULTS / "gpu_speed.json", "cpu": RESULTS / "cpu_speed.json"}
MEAN_GOALS = {"gpu": 1.5, "cpu": 2.0}
WORST_GOAL = 0.9
NO_GPU = "not measured: no GPU was at hand"
Row = Mapping[str, Any]


def merged(lines: Iterable[Row]) -> list[dict[str, Any]]:
    """One row a case, of the lines of its parts; the later line wins."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        key = case_name(line)
        if key in rows:
            contestants = {**line["contestants"], **rows[key]["contestants"]}
            rows[key] = {**line, **rows[key], "contestants": contestants}
        else:
            rows[key] = dict(line)
    return list(rows.values())


def case_name(row: Row) -> str:
    return f"{row['op']} {label(row['size'])} {row['dtype']}"


def pass_of(row: Row) -> str:
    """Forward and backward, or forward alone where there is no more."""
    return "fb" if "fb_ratio" in row["contestants"].get(OURS, {}) else "f"


def alternatives(row: Row) -> dict[str, float]:
    """Of every contestant of the same function how many times our time it takes; a compiled one, ours compiled."""
    key = f"{pass_of(row)}_ratio"
    ratios = {name: r[key] for name, r in row["contestants"].items() if key in r and "yardstick" not in r}
    compiled = ratios.pop(OURS_COMPILED, 1.0)
    ratios.pop(OURS, None)
    return {name: round(value / compiled, 3) if name == COMPILED else value for name, value in ratios.items()}


def best(row: Row) -> tuple[str, float] | None:
    """The fastest public code, which sets the bar; where there is none, the definition, or that compiled."""
    found = alternatives(row)
    public = {name: value for name, value in found.items() if name not in (DEFINITION, COMPILED)}
    return min((public or found).items(), key=lambda item: item[1]) if found else None


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def fraction(row: Row, which: str) -> float | None:
    """What part of our time the floor is, forward or forward and backward."""
    floor, times = row.get("floor", {}).get(f"{which}_ms"), row["contestants"].get(OURS, {}).get(f"{which}_ms")
    return None if floor is None or times is None else floor / times["p50"]


def goal_value(goal: Goal, row: Row) -> float | None:
    """What a goal is held to in a case; None if it could not be measured."""
    if goal.what.startswith("floor"):
        return fraction(row, goal.what.removeprefix("floor "))
    if goal.what == "peak":
        own, other = row.get("peak_bytes"), row.get("io_bytes")
        if goal.against:
            other = row["contestants"].get(goal.against, {}).get("peak_bytes")
        return own / other if own is not None and other else None
    value: float | None = row["contestants"].get(goal.against, {}).get(f"{goal.what}_ratio")
    return value


def goals(ops: Sequence[Op], rows: Sequence[Row], where: str) -> list[dict[str, Any]]:
    """Every goal, at the first size at which it could be measured."""
    found = []
    for op in ops:
        for goal in (goal for goal in op.goals if goal.where == where):
            values = ((row, goal_value(goal, row)) for row in rows if row["op"] == op.name)
            row, value = next(((r, v) for r, v in values if v is not None), (None, None))
            met = None
            if value is not None:
                met = value <= goal.limit if goal.what == "peak" else value >= goal.limit
            found.append(
                {
                    "op": op.name,
                    "goal": goal.text(),
                    "size": None if row is None else label(row["size"]),
                    "value": None if value is None else round(value, 3),
                    "met": met,
                }
            )
    return found


def summary(ops: Sequence[Op], rows: Sequence[Row], where: str) -> dict[str, Any]:
    """The suite's figures: the mean over ops of each one's mean over sizes, the worst case, what must be zero."""
    compiled = [(row, alternatives(row)[COMPILED]) for row in rows if COMPILED in alternatives(row)]
    return {
        "public": _standing([(row, found[1], found[0]) for row in rows if (found := best(row))], MEAN_GOALS[where]),
        "compiled": _standing([(row, value, COMPILED) for row, value in compiled], 1.0),
        "graph_breaks": {row["op"]: row["graph_breaks"] for row in rows if row.get("graph_breaks")},
        "not_repeatable": [case_name(row) for row in rows if row.get("repeatable") is False],
        "failed": [case_name(row) for row in rows if "error" in row],
        "goals": goals(ops, rows, where),
    }


def _standing(raced: Sequence[tuple[Row, float, str]], goal: float) -> dict[str, Any]:
    """The geometric mean over ops of each one's mean over cases, and the worst case."""
    by_op: dict[str, list[float]] = {}
    for row, value, _ in raced:
        by_op.setdefault(row["op"], []).append(value)
    if not by_op:
        return {"cases": 0}
    mean = geometric_mean([geometric_mean(values) for values in by_op.values()])
    row, value, name = min(raced, key=lambda item: item[1])
    return {
        "cases": len(raced),
        "geometric_mean": round(mean, 3),
        "mean_goal": goal,
        "mean_met": mean >= goal,
        "worst": {"case": case_name(row), "against": name, "ratio": value},
        "worst_goal": WORST_GOAL,
        "worst_met": value >= WORST_GOAL,
    }


# --- Tables -----------------------------------------------------------------------------------------------------------


def load(where: str) -> dict[str, Any] | None:
    path = RECORDS[where]
    return json.loads(path.read_text()) if path.exists() else None


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}×"


def speed_table() -> str:
    """Of the README: one line an op on the CPU, at its first size, and how the goals fared."""
    record = load("cpu")
    if record is None:
        return "Not recorded yet: `python -m benchmarks cpu --record`."
    lines = ["| op | size | fastest public code | its time | others |", "|---|---|---|---|---|"]
    for row in _first_sizes(record["rows"]):
        found, first = alternatives(row), best(row)
        others = {name: value for name, value in found.items() if first is None or name != first[0]}
        told = ", ".join(f"{name} {ratio(value)}" for name, value in sorted(others.items(), key=lambda x: x[1]))
        name, value = first or ("–", None)
        lines.append(f"| `{row['op']}` | {label(row['size'])} | {name} | {ratio(value)} | {told or '–'} |")
    return "\n".join([*lines, "", f"{provenance(record)} {verdict(record)}"])


def verdict(record: Mapping[str, Any]) -> str:
    """Means and goals in sentences."""
    found = record["summary"]
    text = " ".join(
        [
            _sentence(found["public"], "the fastest public code (where there is none, the definition)"),
            _sentence(found["compiled"], "the definition compiled"),
        ]
    )
    known = [goal for goal in found["goals"] if goal["met"] is not None]
    missed = [f"`{goal['op']}`: {goal['goal']}, is {goal['value']:.3g}" for goal in known if not goal["met"]]
    text += f" Of {len(known)} goals that could be measured {len(known) - len(missed)} are met" + (
        f"; not met: {'; '.join(missed)}." if missed else "."
    )
    unknown = [f"`{goal['op']}`: {goal['goal']}" for goal in found["goals"] if goal["met"] is None]
    return text + (f" Not measured: {'; '.join(unknown)}." if unknown else "")


def _sentence(found: Mapping[str, Any], against: str) -> str:
    if not found["cases"]:
        return f"Nothing was timed against {against}."
    worst = found["worst"]
    return (
        f"Geometric mean over ops against {against}: {found['geometric_mean']:.2f} (goal {found['mean_goal']:g}: "
        f"{_met(found['mean_met'])}); the worst of {found['cases']} cases {worst['ratio']:.2f}, {worst['case']} "
        f"against {worst['against']} (goal {found['worst_goal']:g}: {_met(found['worst_met'])})."
    )


def _met(met: bool) -> str:
    return "met" if met else "not met"


def provenance(record: Mapping[str, Any]) -> str:
    machine = record["environment"]
    gpu = machine["device"] != "cpu"
    commit = machine["commit"].replace("+", " with uncommitted changes") or "unknown"
    where = machine["device"] if gpu else f"{machine['cpu']}, {machine['threads']} thread"
    return (
        f"`{record['command']}`, commit {commit}, {where}, torch {machine['torch']}; {record['wall_s']:.0f} s in all."
    )


def _first_sizes(rows: Sequence[Row]) -> list[Row]:
    seen: dict[str, Row] = {}
    for row in rows:
        if "error" not in row:
            seen.setdefault(row["op"], row)
    return list(seen.values())


def kernels_table(ops: Sequence[Op]) -> str:
    """Of the docs: of every op what binds it, what of the floor was measured, the CPU's ratio, and when it loses."""
    gpu, cpu = load("gpu"), load("cpu")
    rows = {where: _by_op(record) for where, record in (("gpu", gpu), ("cpu", cpu))}
    columns = ["op", "floor forward, backward: what binds", "of the floor, F / F + B"]
    columns += [
        "GPU, fastest public code",
        "CPU, fastest public code",
        "where it is weakest, and what it was seen to lose",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * 6 + "|"]
    for op in ops:
        on_gpu, on_cpu = rows["gpu"].get(op.name), rows["cpu"].get(op.name)
        floor = planned(op)
        cells = [
            f"`{op.name}`",
            floor,
            "not measured: no GPU was at hand",
            "not measured",
            "not recorded",
            op.loses + _lost(gpu, op, "GPU") + _lost(cpu, op, "CPU"),
        ]
        if on_gpu is not None:
            shares = [fraction(on_gpu, which) for which in ("f", "fb")]
            cells[2] = " / ".join("–" if share is None else f"{share:.2f}" for share in shares)
            cells[3] = _against(on_gpu)
        if on_cpu is not None:
            cells[4] = _against(on_cpu)
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"GPU: {provenance(gpu)} {verdict(gpu)}"] if gpu else []
    notes += [f"CPU: {provenance(cpu)}"] if cpu else []
    return "\n\n".join(["\n".join(lines), *notes])


def signature_table(ops: Sequence[Op]) -> str:
    """How each op is imported and called, as the code has it."""
    lines = ["| import from `archzoo.kernels.…` | call |", "|---|---|"]
    for name, module in {op.name.partition(":")[0]: op.module for op in ops}.items():
        function = getattr(importlib.import_module(f"archzoo.kernels.{module}"), name)
        parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
        lines.append(f"| `{module}` | `{name}{inspect.Signature(parameters)}` |")
    return "\n".join(lines)


def thresholds_table() -> str:
    """Of every op what its numbers are, and how few of them it leaves to plain torch on each device measured."""
    table = json.loads(_thresholds.TABLE.read_text())
    devices = sorted({device for entries in table.values() for device in entries}, key=lambda name: int(name[2:]))
    if not devices:
        return "Not measured on any device yet: on every GPU Triton takes all sizes."
    lines = ["| op | its numbers | " + " | ".join(f"torch below, {device}" for device in devices) + " |"]
    lines.append("|---" * (2 + len(devices)) + "|")
    for op, counted in _thresholds.COUNTED.items():
        kinds = {key.partition(":")[2]: table[key] for key in sorted(table) if key.partition(":")[0] == op}
        cells = []
        for device in devices:
            found = {kind: f"{entries[device]:,}" for kind, entries in kinds.items() if device in entries}
            cells.append(", ".join(f"{kind} {below}".strip() for kind, below in found.items()) or "not measured")
        lines.append(f"| `{op}` | {counted} | {' | '.join(cells)} |")
    return "\n".join(lines)


def planned(op: Op) -> str:
    """Floors at the first size, by the ceilings of an H200."""
    found = planned_floors(op, op.gpu[0], H200)
    text = f"{found['f_ms']:.3g} ms {found['f_binds']}"
    if op.backward:
        text += f", {found['fb_ms'] - found['f_ms']:.3g} ms {found['b_binds']}"
    return f"{text} ({label(op.gpu[0])})"


def _by_op(record: Mapping[str, Any] | None) -> dict[str, Row]:
    return {} if record is None else {row["op"]: row for row in _first_sizes(record["rows"])}


def _lost(record: Mapping[str, Any] | None, op: Op, where: str) -> str:
    """The cases of an op in which something computes the same faster."""
    rows = [] if record is None else [row for row in record["rows"] if row["op"] == op.name and "error" not in row]
    told = [
        f"{ratio(value)} {name} at {label(row['size'])}"
        for row in rows
        for name, value in alternatives(row).items()
        if value < 1
    ]
    return f"; on the {where} {', '.join(told)}" if told else ""


def _against(row: Row) -> str:
    found = best(row)
    return "nothing to compare with" if found is None else f"{ratio(found[1])} {found[0]}"


def progress_line(row: Row) -> str:
    """What a case came to, for a terminal."""
    if "error" in row:
        return f"{case_name(row)}: {row['error']}"
    parts = []
    for name, found in row["contestants"].items():
        reason = next((f"{key}: {found[key]}" for key in ("missing", "skipped", "error") if key in found), None)
        time = found.get(f"{pass_of(row)}_ms")
        if reason is not None:
            parts.append(f"{name} {reason}")
        elif time is not None:
            parts.append(f"{name} {time['p50']:.4g} ms ({found[f'{pass_of(row)}_ratio']:.3g})")
    share = fraction(row, pass_of(row))
    return f"{case_name(row)}: " + "; ".join(parts) + ("" if share is None else f"; {share:.2f} of the floor")
