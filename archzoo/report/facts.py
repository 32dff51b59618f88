"""What all contestants share: task, model, budget, training, machine, versions."""

import shlex
from collections.abc import Iterable, Sequence

from archzoo.report.contestants import Comparison
from archzoo.report.formatting import count, plural
from archzoo.report.runs import Run
from archzoo.report.settings import shared_settings
from archzoo.report.wording import better, score_name, statuses_text


def setting(comparison: Comparison) -> list[tuple[str, str]]:
    """What all contestants share, as terms and values. A value that differs between runs is listed as such."""
    runs = comparison.runs
    shared = shared_settings(runs)

    def group(name: str, skip: Iterable[str] = ()) -> str:
        prefix = f"{name}."
        options = {k.removeprefix(prefix): v for k, v in shared.items() if k.startswith(prefix)}
        title = options.pop("name", "")
        told = ", ".join(f"{key} = {value}" for key, value in options.items() if key not in skip and value != "none")
        return f"{title} ({told})" if title and told else title or told

    seeds = sorted({run.seed for run in runs if run.seed is not None})
    facts = [
        ("Task", group("task") or _either(run.task for run in runs)),
        ("Score", f"{score_name(comparison)}, {better(comparison)}"),
        ("Model", group("model") or _either(run.model for run in runs)),
        ("Budget", _budget(runs)),
        ("Training", group("trainer")),
        ("Optimiser", group("optimizer")),
        ("Seeds", f"{len(seeds)}: {_ranges(seeds)}" if seeds else ""),
        ("Runs", statuses_text({status: sum(r.status == status for r in runs) for status in {r.status for r in runs}})),
        ("Device", _either(run.device for run in runs)),
        ("Threads", _either(str(run.threads) if run.threads else None for run in runs)),
        ("Machine", _either(_machine(run) for run in runs)),
        ("Versions", _versions(runs)),
        (
            "Commit",
            _either(
                f"{run.commit}{' with uncommitted changes' if run.dirty else ''}" if run.commit else None
                for run in runs
            ),
        ),
        ("Period", _period(runs)),
    ]
    return [(term, value) for term, value in facts if value]


def command(comparison: Comparison) -> str | None:
    """The command that runs the comparison again."""
    names = sorted({run.experiment for run in comparison.runs if run.experiment})
    return f"python train.py experiment={shlex.quote(names[0])}" if len(names) == 1 else None  # to be pasted


def _budget(runs: Sequence[Run]) -> str:
    budgets = {(b.match, b.to, b.target, b.tolerance) for run in runs if (b := run.budget) is not None}
    names = {"params": "parameters", "flops": "FLOPs", "time": "time"}
    told = []
    for match, to, target, tolerance in sorted(budgets, key=str):
        if match == "none":
            told.append("not matched")
            continue
        of = f" those of {to}" if to and not to.replace(".", "").isdigit() else ""
        at = f" ({count(target)})" if target is not None else ""
        within = f" to within {100 * tolerance:g} %" if tolerance is not None else ""
        told.append(f"{names.get(match, match)} matched to{of}{at}{within}")
    return " / ".join(told)


def _machine(run: Run) -> str | None:
    cores = plural(run.cores, "core") if run.cores else None
    return ", ".join(part for part in (run.host, run.cpu, cores) if part) or None


def _versions(runs: Sequence[Run]) -> str:
    names = sorted({name for run in runs for name in run.versions}, key=lambda n: (n not in ("archzoo", "torch"), n))
    return ", ".join(f"{name} {_either(run.versions.get(name) for run in runs)}" for name in names)


def _period(runs: Sequence[Run]) -> str:
    started = min((run.started for run in runs if run.started), default=None)
    ended = max((run.ended for run in runs if run.ended), default=None)
    return " to ".join(part[:19].replace("T", " ") for part in (started, ended) if part)


def _either(values: Iterable[str | None]) -> str:
    different = sorted({value for value in values if value})
    if len(different) > 3:
        return f"{', '.join(different[:3])} and {len(different) - 3} more"
    return " / ".join(different)


def _ranges(numbers: Sequence[int]) -> str:
    """0-4, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)
