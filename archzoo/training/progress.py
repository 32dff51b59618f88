"""What a person sees while runs are trained: which run, which step, how much time is left."""

import time
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from archzoo.names import visible

LINE_EVERY = 10.0  # seconds between lines where there is no terminal
DRAW_EVERY = 0.25  # seconds between redraws of the bars


class Progress:
    """Says nothing: for runs that are started from Python."""

    def start_run(self, record: Mapping[str, Any]) -> None:
        """A run begins."""

    def skip_run(self, record: Mapping[str, Any]) -> None:
        """A run is not trained: it is done already, or another process has it."""

    def update_run(self, step: int, spent: float) -> None:
        """A step is done, and with it a fraction of the run's budget."""

    def warn(self, text: str) -> None:
        """The run goes on, and something is not as it should be."""

    def end_run(self, record: Mapping[str, Any]) -> None:
        """A run has ended, whichever way."""

    def close(self) -> None:
        """No run follows."""


def outcome(record: Mapping[str, Any]) -> str:
    """A few words on how a run ended."""
    if record["status"] == "done":
        score, timing = record["score"], record["timing"]
        value = "not finite" if score["value"] is None else f"{score['value']:.4g}"
        return f"{score['split']} {score['metric']} {value}, {timing['wall_s']:.1f} s"
    first = str(record.get("error") or "").partition("\n")[0]
    return record["status"] + (f": {first}" if first else "")


class SweepProgress(Progress):
    """Progress over the runs of a sweep, and over the steps of the present one: bars in a terminal, lines elsewhere.

    Args:
        total: Number of runs.
        bars: Whether to draw bars; None: if stderr is a terminal.
        number: Number of the first run that is reported, from 1.
    """

    def __init__(self, total: int, bars: bool | None = None, number: int = 1):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self.total, self.number = total, number - 1
        self.began, self.trained_before = time.monotonic(), 0.0
        self.run_began = self.drawn = self.began
        self.done_here, self.label = 0, ""
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.bars: Bars | None = None
        if self.console.is_terminal if bars is None else bars:
            self.bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
                auto_refresh=False,  # no thread beside the training: it is redrawn from the loop
            )
            self.sweep_bar = self.bars.add_task("runs", total=total, note="")
            self.run_bar = self.bars.add_task("", total=1.0, note="", visible=False)
            self.bars.start()

    @override
    def start_run(self, record: Mapping[str, Any]) -> None:
        self.number += 1
        self.label, self.run_began = str(record["name"]), time.monotonic()
        if self.bars is not None:
            self.bars.update(self.run_bar, completed=0, description=self.label, note="", visible=True)
            self.bars.refresh()
        else:
            self._say("started")
        self.drawn = time.monotonic()

    @override
    def skip_run(self, record: Mapping[str, Any]) -> None:
        self.number += 1
        self.label = str(record["name"])
        self._say(f"not trained again ({outcome(record)})" if record["status"] != "locked" else str(record["error"]))
        if self.bars is not None:
            self.bars.update(self.sweep_bar, completed=self.number)

    @override
    def update_run(self, step: int, spent: float) -> None:
        now = time.monotonic()
        if now - self.drawn < (DRAW_EVERY if self.bars is not None else LINE_EVERY):
            return
        self.drawn = now
        left = self._left(now, spent)
        note = f"step {step}, {spent:.0%}"
        if self.bars is not None:
            self.bars.update(self.run_bar, completed=spent, note=note)
            self.bars.update(self.sweep_bar, completed=self.number - 1 + spent, note=f"{self._count()}, {left} left")
            self.bars.refresh()
        else:
            self._say(f"{note}, {left} left in all")

    @override
    def warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    @override
    def end_run(self, record: Mapping[str, Any]) -> None:
        self.done_here += 1
        self._say(outcome(record))
        if self.bars is not None:
            self.bars.update(self.sweep_bar, completed=self.number, note=self._count())
            self.bars.refresh()

    @override
    def close(self) -> None:
        if self.bars is not None:
            self.bars.update(self.run_bar, visible=False)
            self.bars.stop()

    def _count(self) -> str:
        return f"{self.number} of {self.total}"

    def say(self, number: int, label: str, text: str) -> None:
        """Prints a line on a run."""
        width = len(str(self.total))
        line = f"run {number:{width}} of {self.total}  {label:<24} {text}"
        self.console.print(visible(line), soft_wrap=True)

    def _say(self, text: str) -> None:
        self.say(self.number, self.label, text)

    def _left(self, now: float, spent: float) -> str:
        """Time left, if the other runs take as long as those so far."""
        runs = self.done_here + spent
        if runs < 0.05:
            return "?"
        seconds = (now - self.began) / runs * (self.total - self.number + 1 - spent)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
