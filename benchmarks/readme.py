"""Writes the README's tables from the layers' cards and the recorded results; `--check` fails if they are stale."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from archzoo.registry import card, get_layer, list_layers
from benchmarks.record import RESULTS

README = Path(__file__).parents[1] / "README.md"


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
    """One line a contestant, best first, and where the numbers come from."""
    percent = record["metric"] == "accuracy"

    def figure(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else f"{100 * value:.{digits}f}" if percent else f"{value:.3g}"

    base = next((row for row in record["rows"] if row["label"] == "linear"), None)
    head = f"| | layer | {record['metric']}{', %' if percent else ''} ± 95 % CI | p | parameters | FLOPs | step time |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in record["rows"]:
        deviation = "" if row["deviation"] is None else f" ({row['deviation']:+.1%})"
        p = "–" if row["p_holm"] is None else f"{row['p_holm']:.2g}"
        step = f"{row['step_time_s'] / base['step_time_s']:.1f}×" if base else "–"
        lines.append(
            f"| {row['rank'] or '–'} | `{row['label']}` | {figure(row['mean'])} ± {figure(row['half_width'])} | {p} "
            f"| {row['parameters']:,}{deviation} | {int(row['flops']):,} | {step} |"
        )
    commit = record["commit"] or {}
    seeds = len(record["rows"][0]["seeds"])
    lines.append("")
    lines.append(
        f"`{record['command']}`, seeds 0 to {seeds - 1}, commit {str(commit.get('commit'))[:10]}, "
        f"{record['machine']['cores']} cores of {record['machine']['cpu']}, torch {record['versions']['torch']}, "
        f"{record['threads']} thread; {record['wall_s']:.0f} s in all. p: paired permutation test against `linear`, "
        "Holm-corrected; FLOPs: forward, of one example; step time: in units of `linear`'s."
    )
    return "\n".join(lines)


def render(text: str) -> str:
    """The README with its tables as they are to be."""
    digits = RESULTS / "digits.json"
    results = result_table(json.loads(digits.read_text())) if digits.exists() else ""
    for name, table in (("layers", layer_table()), ("results", results)):
        pattern = rf"(<!-- {name}: python -m benchmarks readme -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        assert found == 1, f"README.md has no place for the table of {name}"
    return text


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables are stale")
    args = parser.parse_args(argv)
    text = README.read_text()
    fresh = render(text)
    if args.check and fresh != text:
        sys.exit("README.md is stale: run python -m benchmarks readme")
    if not args.check:
        README.write_text(fresh)
