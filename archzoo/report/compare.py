"""Two comparisons side by side: what changed in score and cost, contestant by contestant."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from archzoo.report.console import COLUMNS, fitted_table
from archzoo.report.contestants import Comparison
from archzoo.report.facts import setting
from archzoo.report.files import write_atomically
from archzoo.report.formatting import NOTHING, Scale, duration, listing, p_text, p_words, plural, times
from archzoo.report.load import comparison_of, label_tasks, load_comparison
from archzoo.report.looks import styles
from archzoo.report.markdown import markdown_table, text_markdown
from archzoo.report.page import render
from archzoo.report.ranking import Row, default_baseline, improves, rank
from archzoo.report.settings import shared_settings
from archzoo.report.sheets import Cell, Sheet
from archzoo.report.stats import (
    ALPHA,
    BOOTSTRAP_FROM,
    Interval,
    holm,
    mean_interval,
    seeds_needed,
    sign_flip_p,
    welch_interval,
)
from archzoo.report.wording import score_name, statuses_text

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Change:
    """One contestant in two comparisons, A and B, matched by task and label; a side that lacks it is None."""

    task: str
    label: str
    a: Row | None
    b: Row | None
    difference: Interval | None
    """Score in B less score in A: paired over the common seeds, else between the means (Welch)."""
    paired: bool
    p_holm: float | None
    """Of the paired permutation test, Holm-corrected over the contestants; None for fewer than two common seeds."""
    comparable: bool
    """Whether both sides measure the same: metric, mode and split."""

    @property
    def tie(self) -> bool | None:
        """Whether A and B are not separable at 5 %; None where there is nothing to compare."""
        return None if self.difference is None else self.p_holm is None or self.p_holm > ALPHA


def compare(a: Comparison, b: Comparison) -> list[Change]:
    """Matches the contestants of two comparisons, in B's order of rank, then those that only A has."""
    a, b = _same_tasks(a, b)
    parts_a, parts_b = ({part.groups[0].task: part for part in whole.split()} for whole in (a, b))
    rows_a = {(row.task, row.label): row for row in rank(a, default_baseline(a))}
    rows_b = {(row.task, row.label): row for row in rank(b, default_baseline(b))}
    found: list[tuple[str, str, Row | None, Row | None, Interval | None, bool, float | None, bool]] = []
    for task, label in dict.fromkeys([*rows_b, *rows_a]):
        left, right = rows_a.get((task, label)), rows_b.get((task, label))
        comparable = task in parts_a and task in parts_b and _measure(parts_a[task]) == _measure(parts_b[task])
        difference, paired, p = None, False, None
        if left is not None and right is not None and left.score and right.score and comparable:
            before, after = (
                {seed: value for seed, value in zip(row.seeds, row.values, strict=True) if seed is not None}
                for row in (left, right)
            )
            common = sorted(before.keys() & after.keys())
            if common:
                changes = [after[seed] - before[seed] for seed in common]
                difference, paired, p = mean_interval(changes), True, sign_flip_p(changes)
            else:
                difference = welch_interval(left.values, right.values)
        found.append((task, label, left, right, difference, paired, p, comparable))
    corrected = holm([row[6] for row in found])
    return [Change(*row[:6], p, row[7]) for row, p in zip(found, corrected, strict=True)]


def compare_reports(folder_a: str | Path, folder_b: str | Path) -> Path:
    """Prints two comparisons side by side, and writes `compare.html` and `compare.md` into B's folder.

    Args:
        folder_a: The comparison before, or the other one.
        folder_b: The comparison after.

    Returns:
        The path of `compare.html`.

    Raises:
        ValueError: If a folder holds no run.
    """
    from rich.console import Console

    a, b = _same_tasks(load_comparison(folder_a), load_comparison(folder_b))
    changes = compare(a, b)
    name_a, name_b = _names(a, b)
    sheet = _sheet(changes, a, b, name_a, name_b)
    sentence, notes = _words(changes, a, b, name_a, name_b)
    settings = _settings_sheet(a, b, name_a, name_b)

    console = Console()
    console.print(_console_table(changes, sheet, a, b, [sentence, *notes], min(console.width, COLUMNS)))
    lines = [f"# {text_markdown(name_a)} against {text_markdown(name_b)}", "", f"**{text_markdown(sentence)}**", ""]
    lines += [markdown_table(sheet), "", *(f"- {text_markdown(note)}" for note in notes), ""]
    lines += ["## What differs in the settings", ""]
    lines += [markdown_table(settings) if settings.rows else "Nothing.", ""]
    write_atomically(b.folder / "compare.md", "\n".join(lines))
    page = render(
        "compare.html.j2",
        title=f"{name_a} against {name_b}",
        sentence=sentence,
        notes=notes,
        sheet=sheet,
        settings=settings,
    )
    return write_atomically(b.folder / "compare.html", page)


def _same_tasks(a: Comparison, b: Comparison) -> tuple[Comparison, Comparison]:
    """Both with tasks named for what differs in either: one function in A and another one in B are two tasks."""
    runs = label_tasks((*a.runs, *b.runs))
    first, second = runs[: len(a.runs)], runs[len(a.runs) :]
    return comparison_of(a.folder, first), comparison_of(b.folder, second)


def _measure(part: Comparison) -> tuple[str, str, str | None]:
    return part.metric, part.mode, part.score_split


def _names(a: Comparison, b: Comparison) -> tuple[str, str]:
    return (a.name, b.name) if a.name != b.name else (f"{a.name} (A)", f"{b.name} (B)")


def _scale(task: str, a: Comparison, b: Comparison) -> tuple[Scale, Comparison]:
    parts = [part for whole in (b, a) for part in whole.split() if part.groups[0].task == task]
    values = [run.score for part in parts for run in part.runs if run.score is not None]
    return Scale.of(parts[0].metric, values), parts[0]


def _sheet(changes: Sequence[Change], a: Comparison, b: Comparison, name_a: str, name_b: str) -> Sheet:
    tasks = list(dict.fromkeys(change.task for change in changes))
    looks = styles(b, [row.label for row in rank(b, default_baseline(b)) if row.baseline])
    scales = {task: _scale(task, a, b) for task in tasks}
    scale, part = scales[tasks[0]]
    head = score_name(part) if len(tasks) == 1 else "score"
    unit = " (%)" if scale.percent and len(tasks) == 1 else ""
    columns = ["Contestant", f"{name_a}: {head}{unit}", f"{name_b}: {head}{unit}", "Change", "Verdict"]
    columns += ["Step time", "Parameters", "Memory"]
    table = []
    for change in changes:
        scale, part = scales[change.task]
        left, right = change.a, change.b
        label = f"{change.task}: {change.label}" if len(tasks) > 1 else change.label
        cells = [Cell(label), _score(left, scale, name_a), _score(right, scale, name_b)]
        if change.difference is None:
            reason = "not the same measure" if left and right and left.score and right.score else ""
            cells += [Cell(NOTHING, reason), Cell(NOTHING)]
        else:
            interval = change.difference
            cells.append(
                Cell(scale.value(interval.mean, sign=True), scale.interval(interval, sign=True))
                if interval.low is not None
                else Cell(scale.value(interval.mean, sign=True), "no CI")
            )
            told = p_words(change.p_holm) if change.p_holm is not None else "untested"
            if change.tie:
                cells.append(Cell("tie", told, "tie"))
            else:
                better = improves(interval.mean, part.mode)
                cells.append(Cell("better" if better else "worse", told, "good" if better else "bad"))
        cells += _ratios(left, right)
        table.append(tuple(cells))
    return Sheet(
        f"{name_a} against {name_b}",
        tuple(columns),
        (False, True, True, True, False, True, True, True),
        tuple(table),
        tuple(looks[change.label].index if change.label in looks else -1 for change in changes),
        tuple("" if change.difference is not None else "unscored" for change in changes),
        tuple(() for _ in changes),
    )


def _score(row: Row | None, scale: Scale, name: str) -> Cell:
    if row is None:
        return Cell(NOTHING, "absent")
    if row.score is None:
        return Cell(NOTHING, statuses_text(row.statuses))
    return Cell(
        scale.value(row.score.mean),
        f"{scale.interval(row.score)}, {row.count} seeds" if row.count > 1 else "no CI, 1 seed",
    )


def _ratios(a: Row | None, b: Row | None) -> list[Cell]:
    """How many times A's step time, parameters and memory B's are."""
    if a is None or b is None:
        return [Cell(NOTHING)] * 3
    step = times(b.step_time_s, a.step_time_s)
    memory = times(b.memory_bytes, a.memory_bytes) if a.memory_kind == b.memory_kind else NOTHING
    return [
        Cell(step, f"{duration(a.step_time_s)} to {duration(b.step_time_s)}" if step != NOTHING else ""),
        Cell(times(b.parameters, a.parameters)),
        Cell(memory),
    ]


def _words(changes: Sequence[Change], a: Comparison, b: Comparison, name_a: str, name_b: str) -> tuple[str, list[str]]:
    compared = [change for change in changes if change.difference is not None]
    modes = {part.groups[0].task: part.mode for part in b.split()}
    better: list[str] = []
    worse: list[str] = []
    for change in compared:
        if not change.tie and change.difference is not None:
            (better if improves(change.difference.mean, modes[change.task]) else worse).append(change.label)
    ties = len(compared) - len(better) - len(worse)
    parts = []
    if better:
        parts.append(f"better in {name_b}: {listing(better)}")
    if worse:
        parts.append(f"worse in {name_b}: {listing(worse)}")
    if ties:
        tied = plural(ties, "contestant")
        parts.append(f"{tied} not separable" if better or worse else f"no separable change, in {tied}")
    sentence = "; ".join(parts) or f"no contestant has a score in both {name_a} and {name_b}"
    notes = []
    alone = [
        f"{listing([c.label for c in changes if getattr(c, side) is None])} only in {name}"
        for side, name in (("a", name_b), ("b", name_a))
        if any(getattr(change, side) is None for change in changes)
    ]
    if alone:
        notes.append(f"Without a match: {'; '.join(alone)}.")
    if any(not change.comparable and change.a and change.b for change in changes):
        notes.append("The two measure different scores (metric, direction or split), which are not compared.")
    if compared:
        tested = sum(change.p_holm is not None for change in compared)
        notes.append(
            f"Change: score in {name_b} less score in {name_a}, with its 95 % confidence interval (Student's t; BCa "
            f"bootstrap from {BOOTSTRAP_FROM} seeds on), paired by seed where seeds are common, else Welch's. Test: "
            f"paired permutation test, Holm-corrected over {plural(tested, 'comparison')}; a tie is p > {ALPHA}, or "
            f"untested. {seeds_needed()} common seeds are the fewest to reach {ALPHA}"
            + (f", {seeds_needed(tested)} with this correction." if seeds_needed(tested) > seeds_needed() else ".")
        )
        if any(not change.paired for change in compared):
            unpaired = [change.label for change in compared if not change.paired]
            notes.append(f"No seed in common, so unpaired and untested: {listing(unpaired)}.")
    notes.append(f"Ratios are {name_b} over {name_a}.")
    machines = [{(run.host, run.cpu, run.device, run.threads) for run in whole.runs} for whole in (a, b)]
    if machines[0] != machines[1]:
        notes.append("The two were run on different machines, devices or thread counts: step times do not compare.")
    return sentence[0].upper() + sentence[1:] + ".", notes


def _settings_sheet(a: Comparison, b: Comparison, name_a: str, name_b: str) -> Sheet:
    """Every shared setting, and every fact of the run, that is not the same in both."""
    both = [
        {
            **{term: value for part in whole.split() for term, value in setting(part) if term in _FACTS},
            **shared_settings(whole.runs),
        }
        for whole in (a, b)
    ]
    keys = [key for key in dict.fromkeys([*both[0], *both[1]]) if both[0].get(key) != both[1].get(key)]
    rows = tuple((Cell(key), *(Cell(side.get(key, "varies or unset")) for side in both)) for key in keys)
    nothing: tuple[tuple[str, ...], ...] = tuple(() for _ in keys)
    columns = ("Setting", name_a, name_b)
    none = tuple("" for _ in keys)
    return Sheet("Settings", columns, (False, False, False), rows, tuple(-1 for _ in keys), none, nothing)


_FACTS = ("Seeds", "Device", "Threads", "Machine", "Versions", "Commit")


def _console_table(
    changes: Sequence[Change], sheet: Sheet, a: Comparison, b: Comparison, captions: Sequence[str], columns: int
) -> "Table":
    names = {name: i for i, name in enumerate(sheet.columns)}
    head = ["contestant", *sheet.columns[1:3], "change", "p", "step", "params", "memory"]
    rows = []
    for change, cells in zip(changes, sheet.rows, strict=True):
        scale, _ = _scale(change.task, a, b)
        scores = [
            scale.plus_minus(side.score) if side is not None and side.score else cell.detail or cell.text
            for side, cell in zip((change.a, change.b), cells[1:3], strict=True)
        ]
        p = cells[names["Verdict"]].text
        told = f"{p_text(change.p_holm)} {p}" if change.p_holm is not None else p
        moved = scale.plus_minus(change.difference, sign=True)
        rows.append([cells[0].text, *scores, moved, told, *(cell.text.replace(" x", "x") for cell in cells[5:])])
    left = [name == "contestant" for name in head]
    return fitted_table(sheet.title, head, left, rows, [""] * len(rows), captions, columns)
