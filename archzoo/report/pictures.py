"""What the contestants' models do, in pictures that their runs drew (`archzoo.pictures`)."""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from archzoo.report.contestants import Comparison
from archzoo.report.files import read_own
from archzoo.report.runs import Run
from archzoo.report.samples import best_first
from archzoo.report.values import clean

FOLDER = "pictures"
"""Of a run's folder, where they are."""
NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
"""What they may be called, beside which there is `.png`."""
MOST = 12
"""Pictures of a run."""
LARGEST = 2**20
"""Bytes of a picture's file."""
EMBEDDED = 16 * 2**20
"""Bytes of pictures that a page holds at most. Those beyond are shown from the runs' folders."""
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture by the best run of a contestant."""

    name: str
    label: str
    """The contestant's, with the seed."""
    caption: str
    file: str
    """Path from the comparison's folder, as a link has it."""
    width: int
    """In pixels."""
    height: int
    data: bytes
    """The file, a PNG; empty where the page does not hold it."""

    @property
    def title(self) -> str:
        """The name in words."""
        return re.sub("[_-]+", " ", self.name).strip().capitalize()

    @property
    def wide(self) -> bool:
        """Whether it is to be as wide as the page."""
        return self.width > 2.2 * self.height

    @property
    def source(self) -> str:
        """What an `img` element shows."""
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}" if self.data else self.file


def drawings(comparison: Comparison, room: int = EMBEDDED) -> tuple[Drawing, ...]:
    """The pictures of each contestant that has any, by its run with the best score; those of one name together.

    Args:
        comparison: Of one task.
        room: Bytes that they may have. Those that do not fit are without their `data`.
    """
    found: list[Drawing] = []
    for group in comparison.groups:
        for run in best_first(comparison, group):
            if of_run := list(_drawings(run, group.label)):
                found += of_run
                break
    names = list(dict.fromkeys(drawing.name for drawing in found))
    shown = []
    for drawing in sorted(found, key=lambda drawing: names.index(drawing.name)):
        room -= len(drawing.data)
        shown.append(drawing if room >= 0 else replace(drawing, data=b""))
    return tuple(shown)


def _drawings(run: Run, label: str) -> Iterator[Drawing]:
    folder = run.folder / FOLDER
    if not folder.is_dir():  # as of most runs, whose records need not be read again
        return
    seed = "" if run.seed is None else f", seed {run.seed}"
    for entry in _entries(run)[:MOST]:
        name, caption = entry.get("name"), entry.get("caption")
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            continue
        if data := _read(folder / f"{name}.png", run.folder.parent):
            width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
            file = quote(f"{run.folder.name}/{FOLDER}/{name}.png")
            yield Drawing(name, label + seed, clean(caption or ""), file, width, height, data)


def _entries(run: Run) -> list[dict[str, Any]]:
    try:
        entries = json.loads(read_own(run.folder / "run.json", run.folder.parent))["pictures"]["drawn"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # as a run that drew nothing has it
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _read(path: Path, root: Path) -> bytes:
    """A PNG file of the comparison's own; empty if it is none, or too large."""
    try:
        data = read_own(path, root, LARGEST + 1)
    except OSError:
        return b""
    return data if len(data) <= LARGEST and data.startswith(_PNG) and len(data) > 24 else b""
