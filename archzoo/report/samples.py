"""What the contestants wrote, where they are language models and the callback `sample_text` had them write."""

import json
from dataclasses import dataclass

from archzoo.names import visible
from archzoo.report.contestants import Comparison, Contestant
from archzoo.report.files import read_own
from archzoo.report.runs import Run

LONGEST = 600
"""Characters of a text that are shown: a report is no anthology."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A text by the best run of a contestant."""

    label: str
    """The contestant's, with the seed."""
    text: str
    """At most `LONGEST` characters, all of which can be shown."""

    @property
    def line(self) -> str:
        """The beginning of the text in one line, for a terminal."""
        whole = self.text.replace("\t", " ").replace("\n", "⏎")
        return whole if len(whole) <= 160 else whole[:159] + "…"


def samples(comparison: Comparison) -> tuple[Sample, ...]:
    """A text of each contestant that has one, by its run with the best score."""
    found = []
    for group in comparison.groups:
        for run in best_first(comparison, group):
            if text := _text(run):
                shown = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
                seed = "" if run.seed is None else f", seed {run.seed}"
                found.append(Sample(group.label + seed, shown))
                break
    return tuple(found)


def best_first(comparison: Comparison, group: Contestant) -> list[Run]:
    """The runs of a contestant that count, by score."""
    sign = 1 if comparison.mode == "max" else -1
    scored = [(sign * run.score, run) for run in group.counted if run.score is not None]
    return [run for _, run in sorted(scored, key=lambda entry: -entry[0])]


def _text(run: Run) -> str:
    try:
        text = json.loads(read_own(run.folder / "run.json", run.folder.parent))["summary"]["task"]["sample"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # as a run of another task has it
        return ""
    return visible(text) if isinstance(text, str) else ""
