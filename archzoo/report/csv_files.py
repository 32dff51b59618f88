"""The report's numbers, in full, for a spreadsheet or a script."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from archzoo.report.ranking import Row
from archzoo.report.runs import STATUSES
from archzoo.report.sections import Section


def csv_text(sections: Sequence[Section]) -> str:
    """One line per contestant, numbers in full and in SI units or bytes, fractions as fractions."""
    figures = sorted({name for section in sections for row in section.rows for name in row.figures})
    columns = [
        *("task", "metric", "split", "mode", "size", "rank", "label", "layer", "series", "baseline", "leader"),
        "ties_leader",
        *("ties_baseline", "n_seeds", "seeds", "score_mean", "score_low", "score_high", "interval"),
        *("difference_mean", "difference_low", "difference_high", "common_seeds", "p", "p_holm"),
        *("parameters", "budget_target", "budget_deviation", "within_tolerance", "widths", "option"),
        "flops_per_sample",
        *("bytes_per_step", "step_time_s", "samples_per_s", "saved_for_backward_bytes", "peak_rss_bytes"),
        *("peak_cuda_bytes", *STATUSES),
        *("equal_seeds", "equal_reached", "equal_steps_mean", "equal_steps_low", "equal_steps_high"),
        *("equal_seconds_mean", "equal_seconds_low", "equal_seconds_high", "tuned", "tuned_of", "tuned_validation"),
        *(f"task_{name}{end}" for name in figures for end in ("", "_count")),
        "notes",
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for section in sections:
        part = section.comparison
        for row in section.rows:
            score, difference, budget = row.score, row.difference, row.budget
            values: dict[str, Any] = {
                "task": row.task,
                "metric": part.metric,
                "split": part.score_split,
                "mode": part.mode,
                "size": row.size,
                "rank": row.rank,
                "label": row.label,
                "layer": row.layer,
                "series": row.series,
                "baseline": row.baseline,
                "leader": row.leader,
                "ties_leader": row.ties_leader,
                "ties_baseline": row.tie,
                "n_seeds": row.count,
                "seeds": " ".join(str(seed) for seed in row.seeds if seed is not None),
                "common_seeds": row.common_seeds if row.tie is not None else None,
                "p": row.p_value,
                "p_holm": row.p_holm,
                "parameters": row.parameters,
                "budget_target": budget.target if budget else None,
                "budget_deviation": budget.deviation if budget else None,
                "within_tolerance": budget.within_tolerance if budget else None,
                "widths": " ".join(map(str, budget.widths)) if budget else None,
                "option": f"{budget.option}={budget.value}" if budget and budget.option else None,
                "flops_per_sample": row.flops,
                "bytes_per_step": row.bytes_per_step,
                "step_time_s": row.step_time_s,
                "samples_per_s": row.samples_per_s,
                "saved_for_backward_bytes": row.saved_bytes,
                "peak_rss_bytes": row.rss_bytes,
                "peak_cuda_bytes": row.cuda_bytes,
                **{status: row.statuses.get(status, 0) for status in STATUSES},
                "notes": "; ".join(row.notes),
            }
            for name, interval in (("score", score), ("difference", difference)):
                if interval is not None:
                    values |= {f"{name}_{end}": getattr(interval, end) for end in ("mean", "low", "high")}
            values["interval"] = score.method if score else None
            values |= _equal_values(row) | _tuned_values(row)
            for name, figure in row.figures.items():
                values |= {f"task_{name}": figure.value, f"task_{name}_count": figure.count}
            writer.writerow({key: _plain(value) for key, value in values.items()})
    return buffer.getvalue()


def _equal_values(row: Row) -> dict[str, Any]:
    equal = row.equal
    if equal is None:
        return {}
    values: dict[str, Any] = {"equal_seeds": len(equal.seeds), "equal_reached": equal.reached}
    for name, interval in (("steps", equal.steps), ("seconds", equal.seconds)):
        if interval is not None:
            values |= {f"equal_{name}_{end}": getattr(interval, end) for end in ("mean", "low", "high")}
    return values


def _tuned_values(row: Row) -> dict[str, Any]:
    chosen = row.tuning.chosen if row.tuning else None
    if row.tuning is None or chosen is None:
        return {}
    tried = "; ".join(trial.name for trial in row.tuning.trials)
    return {"tuned": chosen.name, "tuned_of": tried, "tuned_validation": chosen.mean}


def scaling_csv(sections: Sequence[Section]) -> str:
    """One line a point of a series: the score over seeds, and the power law through all points of the series."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("task", "series", "layer", "label", "parameters", "median", "low", "high", "n_seeds")
    writer.writerow([*head, "exponent", "exponent_error", "factor", "points"])
    for section in sections:
        for line in section.series:
            law = line.law
            fit = (law.exponent, law.error, law.factor, law.points) if law else (None,) * 4
            for p in line.points:
                told = (section.task, line.label, line.layer, p.row.label, p.parameters, p.median, p.low, p.high)
                writer.writerow([_plain(value) for value in (*told, p.row.count, *fit)])
    return buffer.getvalue()


def _plain(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value) and abs(value) >= 1:
        return int(value)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return f"'{value}"  # a spreadsheet would take it for a formula
    return value
