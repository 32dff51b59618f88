"""Writes the tables of README.md, docs/results.md and docs/kernels.md, from the layers' cards and recorded results.

`--check` writes nothing, and fails if they are stale.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from archzoo.registry import card, get_layer, list_layers
from benchmarks._ops import OPS
from benchmarks._speed import kernels_table, signature_table, speed_table, thresholds_table
from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": {"layers", "digits", "speed"},
    "docs/results.md": set[str](),
    "docs/kernels.md": {"kernels", "signatures", "thresholds"},
}
"""Where the tables are, and which each page must have."""


def layer_table() -> str:
    """One line a layer: name, class, paper, what was reproduced."""
    lines = ["| name | class | paper | what of it was reproduced here |", "|---|---|---|---|"]
    for name in list_layers():
        c = card(name)
        names = c.authors.split(", ")
        authors = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
        source = f"[{authors}, {c.year}](https://arxiv.org/abs/{c.arxiv})" if c.arxiv else f"{authors}, {c.year}"
        lines.append(f"| `{name}` | `{get_layer(name).cls.__name__}` | {source} | {c.reproduced} |")
    return "\n".join(lines)


def result_table(record: dict[str, Any]) -> str:
    """One line a contestant, best first and smallest size first, and where the numbers come from."""
    percent, decibels = record["metric"] == "accuracy", record["metric"] == "psnr"

    def figure(value: float | None, digits: int = 2) -> str:
        if value is None:
            return "–"
        return f"{100 * value:.{digits}f}" if percent else f"{value:.2f}" if decibels else f"{value:.3g}"

    rows = record["rows"]
    bases = {row.get("size", ""): row for row in rows if row.get("baseline", row["label"] == "linear")}
    sized = any(row.get("size") for row in rows)
    unit = ", %" if percent else ", dB" if decibels else ""
    columns = [*(["size"] if sized else []), "", "layer", f"{record['metric']}{unit} ± 95 % CI"]
    columns += [*(["p"] if bases else []), "parameters", "FLOPs", *(["step time"] if bases else [])]
    solving, lengths = _solving(rows)
    columns += [*(["solved (median step)"] if solving else []), *([_at(lengths)] if lengths else [])]
    equal = not solving and any(row.get("equal_score") and not row.get("baseline") for row in rows)
    columns += ["steps to equal score", "seconds to equal score"] if equal else []
    lines = ["| " + " | ".join(columns).replace("  ", " ") + " |", "|---" * len(columns) + "|"]
    for row in rows:
        deviation = "" if row["deviation"] is None else f" ({row['deviation']:+.1%})"
        p = "–" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
        base = bases.get(row.get("size", ""))
        step = f"{row['step_time_s'] / base['step_time_s']:.1f}×" if base and row["step_time_s"] else "–"
        parameters, flops = ("–" if row[key] is None else f"{int(row[key]):,}" for key in ("parameters", "flops"))
        cells = [*([row["size"]] if sized else []), str(row["rank"] or "–"), f"`{row.get('series') or row['label']}`"]
        cells += [f"{figure(row['mean'])} ± {figure(row['half_width'])}", *([p] if bases else [])]
        cells += [parameters + deviation, flops, *([step] if bases else [])]
        cells += [_solved(row)] if solving else []
        cells += [" / ".join(_percent(row, f"accuracy_at_{n}") for n in lengths)] if lengths else []
        cells += [_ratio(row, "steps"), _ratio(row, "seconds")] if equal else []
        lines.append("| " + " | ".join(cells) + " |")
    notes = "FLOPs: forward, of one example."
    if bases:
        of_that_size = " of that size" if sized else ""
        base = next(iter(bases.values()))
        # Baselines of several sizes differ in label, and what they have in common is the layer.
        label = base["label"] if len(bases) == 1 else base.get("layer", base["label"])
        notes = (
            f"p: paired permutation test against `{label}`{of_that_size}, Holm-corrected; {notes} Step time: in units "
            f"of `{label}`'s{of_that_size}."
        )
        if equal:
            notes += (
                f" Steps and seconds to equal score: to the best validation score of `{label}`{of_that_size} in the "
                "same seed, in units of its own; seconds of training, without evaluations."
            )
    notes += _tuned(rows)
    return "\n".join([*lines, "", f"{provenance(record)} {notes}"])


def _solving(rows: list[dict[str, Any]]) -> tuple[bool, list[int]]:
    """Whether the task is one that is solved or not, and the lengths at which the models were tried besides."""
    names = {name for row in rows for name in row.get("figures", {})}
    found = (re.fullmatch(r"accuracy_at_(\d+)", name) for name in names)
    return "success" in names, sorted(int(match[1]) for match in found if match)


def _at(lengths: list[int]) -> str:
    return f"at length {' / '.join(map(str, lengths))}, %"


def _percent(row: dict[str, Any], name: str) -> str:
    value = row.get("figures", {}).get(name, {}).get("value")
    return "–" if value is None else f"{100 * value:.0f}"


def _solved(row: dict[str, Any]) -> str:
    """3 of 3 (275): in how many seeds, and the median step of those at which it was."""
    success, step = (row.get("figures", {}).get(name) for name in ("success", "solved_at"))
    if not success:
        return "–"
    return f"{success['successes']} of {success['count']}" + (f" ({step['value']:.0f})" if step else "")


def _ratio(row: dict[str, Any], of: str) -> str:
    """0.52× ± 0.05, or in how many seeds the score was reached."""
    equal = row.get("equal_score")
    if equal is None or row.get("baseline"):
        return "–"
    if equal["reached"] < len(equal["seeds"]) or equal["without_curve"]:
        seeds = len(equal["seeds"]) + equal["without_curve"]
        return f"reached in {equal['reached']} of {seeds} seeds"
    mean, half = equal[of]["mean"], equal[of]["half_width"]
    if mean is None:
        return "–"
    return f"{'≤ ' if equal['at_most'] else ''}{mean:.2f}×" + ("" if half is None else f" ± {half:.2f}")


def _tuned(rows: list[dict[str, Any]]) -> str:
    """A sentence on what was tuned: of every contestant what was chosen, of what, and what there is to mind."""
    told = []
    for row in rows:
        if tuned := row.get("tuned"):
            chosen = [trial["name"] for trial in tuned["trials"] if trial["chosen"]]
            tried = ", ".join("/".join(trial["options"].values()) for trial in tuned["trials"])
            words = f"`{row['label']}` {chosen[0] if chosen else 'undecided'} of {tried}"
            told.append(words + (f" ({'; '.join(tuned['warnings'])})" if tuned["warnings"] else ""))
    return f" Tuned by the validation score: {'; '.join(told)}." if told else ""


def _tuned_tasks(rows: list[dict[str, Any]]) -> str:
    """That every task has its own choices, which only the record has one by one, and how many are in doubt."""
    choices = [row["tuned"] for row in rows if row.get("tuned")]
    keys = sorted({key for tuned in choices for trial in tuned["trials"] for key in trial["options"]})
    doubtful = sum(bool(tuned["warnings"]) for tuned in choices)
    doubt = f" ({doubtful} of {len(choices)} choices have a warning in the report)" if doubtful else ""
    return f" Tuned by the validation score, task by task: {', '.join(keys)}{doubt}." if keys else ""


def task_table(record: dict[str, Any]) -> str:
    """One line a task: who was best at each size, and the exponent of each series; without sizes, every mean."""
    rows = record["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    notes = f"{record['metric']}: mean over seeds."
    if len(sizes) > 1:
        columns = [f"best of {size}" for size in sizes]
        leads = {(row["task"], row["size"]): row for row in rows if row["rank"] == 1}
        cells = {task: [_best(leads.get((task, size))) for size in sizes] for task in tasks}
    else:
        columns = sorted({row["label"] for row in rows})
        means = {(row["task"], row["label"]): row["mean"] for row in rows}
        best = {row["task"]: row["label"] for row in rows if row["rank"] == 1}
        cells = {
            task: [_mean(means.get((task, label)), best.get(task) == label) for label in columns] for task in tasks
        }
        columns = [f"`{label}`" for label in columns]
    series = {(line["task"], line["label"]): line for line in record.get("series", []) if line["exponent"] is not None}
    labels = list(dict.fromkeys(label for _, label in series))
    columns += [f"α, `{label}`" for label in labels]
    for task in tasks:
        cells[task] += [_exponent(series.get((task, label))) for label in labels]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| `{task}` | " + " | ".join(cells[task]) + " |" for task in tasks]
    if labels:
        counts = [point["parameters"] for line in series.values() for point in line["points"]]
        notes += (
            f" α: exponent of {record['metric']} ~ parameters^-α, least squares in log-log on the medians over seeds, "
            f"all points ({min(counts):,} to {max(counts):,} parameters), ± standard error."
        )
    places = [
        f"`{place['label']}` {place['mean_rank']:.2f} (first in {place['firsts']} of {place['contests']})"
        for place in record.get("standings", [])
        if place["mean_rank"] is not None
    ]
    notes += f" Mean rank: {', '.join(places)}." if places else ""
    notes += _tuned_tasks(rows)
    return "\n".join([*lines, "", f"{provenance(record)} {notes}"])


def _best(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"`{row['series'] or row['label']}` {row['mean']:.2g}"


def _mean(value: float | None, best: bool) -> str:
    return "–" if value is None else f"**{value:.3g}**" if best else f"{value:.3g}"


def _exponent(line: dict[str, Any] | None) -> str:
    if line is None:
        return "–"
    return f"{line['exponent']:z.2f}" + ("" if line["error"] is None else f" ± {line['error']:.2f}")


def provenance(record: dict[str, Any]) -> str:
    """The command, and where and how it was run."""
    commit = record["commit"] or {}
    rows = record["rows"] if "rows" in record else record["formulas"].values()
    seeds = max(len(row["seeds"]) if "rows" in record else len(row) for row in rows)
    changed = " with uncommitted changes" if commit.get("dirty") else ""
    return (
        f"`{record['command']}`, {f'seeds 0 to {seeds - 1}' if seeds > 1 else 'seed 0'}, commit "
        f"{str(commit.get('commit'))[:10]}{changed}, "
        f"{record['machine']['cores']} cores of {record['machine']['cpu']}, torch {record['versions']['torch']}, "
        f"{record['threads']} thread; {record['wall_s']:.0f} s in all."
    )


def comparison_table(record: dict[str, Any]) -> str:
    """The table that suits a recorded comparison."""
    if record.get("kind") == "arithmetic":
        from benchmarks.arithmetic_table import table as arithmetic_table

        return arithmetic_table(record)
    if "formulas" in record:
        from benchmarks.kan_symbolic import table

        notes = "Exact: the formula, its numbers rounded, is the true function to 1e-6 of its deviation on test points."
        return f"{table(record)}\n\n{provenance(record)} {notes}"
    several = len({row.get("task") for row in record["rows"]}) > 1
    return task_table(record) if several else result_table(record)


OWN_TABLES: dict[str, Callable[[], str]] = {
    "layers": layer_table,
    "speed": speed_table,
    "kernels": lambda: kernels_table(OPS),
    "signatures": lambda: signature_table(OPS),
    "thresholds": thresholds_table,
}
"""Those that are no recorded comparison."""


def render(text: str) -> str:
    """A page with its tables as they are to be: of the layers, of speed, and of any recorded comparison.

    A place for a table is `<!-- NAME: python -m benchmarks readme -->`, and its end `<!-- end -->`.
    """
    for name in table_names(text):
        table = OWN_TABLES[name]() if name in OWN_TABLES else comparison_table(_load(name))
        pattern = rf"(<!-- {re.escape(name)}: python -m benchmarks readme -->\n).*?(<!-- end -->)"
        place = re.search(pattern, text, flags=re.DOTALL)
        assert place is not None, f"the table of {name} has no end"
        text = f"{text[: place.end(1)]}{table}\n{text[place.start(2) :]}"
    return text


def table_names(text: str) -> list[str]:
    """The tables that a page has places for."""
    return re.findall(r"<!-- (\S+): python -m benchmarks readme -->\n", text)


def _load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables are stale")
    args = parser.parse_args(argv)
    for page, needed in PAGES.items():
        path = ROOT / page
        text = path.read_text()
        names = table_names(text)
        assert needed <= set(names), f"{page} has tables {names}, and needs {needed}"
        assert len(names) == len(set(names)), f"{page} has a table twice: {names}"
        fresh = render(text)
        if args.check and fresh != text:
            sys.exit(f"{page} is stale: run python -m benchmarks readme")
        if not args.check:
            path.write_text(fresh)
