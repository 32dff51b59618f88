"""The table that a report of a swap prints as."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archzoo.surgery import Swapped, SwapReport


def table(report: "SwapReport") -> str:
    """One line a replaced module, one for the model, and what else there is to say."""
    lines = [["name", "original", "layer", "parameters", "FLOPs", "start"]]
    for row in report.swaps:
        names = " = ".join(name or "(model)" for name in row.names)
        options = [row.sizes] * bool(row.sizes) + [f"{key}={value}" for key, value in row.options.items()]
        lines.append(
            [
                names,
                row.original,
                f"{row.layer}({', '.join(options)})",
                _change(row.parameters),
                _change(row.flops),
                _start(row),
            ]
        )
    lines.append(["model", "", "", _change(report.parameters, percent=True), _change(report.flops, percent=True), ""])
    shown = [i for i in range(6) if i != 4 or report.flops is not None]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    text = ["  ".join(line[i].ljust(widths[i]) for i in shown).rstrip() for line in lines]
    reasons: dict[str, list[str]] = {}
    for row in report.swaps:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.name or "(model)")
    text += [f"fresh, {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if report.matched:
        text.append(f"matched: {report.matched}")
    if report.unmatched:
        text.append(f"rules that matched nothing: {', '.join(report.unmatched)}")
    if report.dry_run:
        text.append("dry run: nothing was changed")
    return "\n".join(text)


def _change(counts: tuple[int, int] | None, percent: bool = False) -> str:
    if counts is None:
        return ""
    before, after = counts
    text = f"{before:,} -> {after:,}"
    return f"{text} ({(after - before) / before:+.1%})" if percent and before else text


def _start(row: "Swapped") -> str:
    if row.start == "fresh" or (row.start == "exact" and row.error_on != "calibration"):
        return row.start
    return f"{row.start}, off by {row.error:.2g} on {row.error_on}"
