"""Kills, stops, full disks, damage and odd surroundings: what a run loses by each, and what saving costs.

    python -m benchmarks faults [--record] [--kills N] [--damaged N] [--signals N] [--disks N]

The trials are those of tests/faults/, at the figures that archzoo promises. Everything that is lost, unreadable,
silent, late or hung is counted, and none is allowed. Some minutes; small file systems are mounted, which only root can.
`--record` writes benchmarks/results/faults.json.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from archzoo.training.checkpoint import save_checkpoint
from benchmarks._record import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "faults.json"
COST = 1.15  # of saving, over torch.save and SHA-256


def kills(folder: Path, number: int) -> dict[str, int]:
    from tests.faults.kills import kill_runs

    return kill_runs(folder, number)


def damaged(folder: Path, number: int) -> dict[str, int]:
    from tests.faults.damage import damage

    counts, wrong = damage(folder, number)
    for line in wrong:
        print(line, file=sys.stderr)
    return {"trials": number, "wrong": len(wrong), **counts}


def signals(folder: Path, number: int) -> dict[str, int]:
    from tests.faults.signals import stop_runs

    with contextlib.redirect_stdout(io.StringIO()):
        return stop_runs(folder, number)


def disks(folder: Path, number: int) -> dict[str, int]:
    from tests.faults.full_disks import fill_disks

    return fill_disks(folder, number)


def surroundings(folder: Path, number: int) -> dict[str, int]:
    from tests.faults.surroundings import PLACES, trouble

    wrong = [line for place in list(PLACES)[:number] if (line := trouble(place, folder))]
    for line in wrong:
        print(line, file=sys.stderr)
    return {"places": min(number, len(PLACES)), "wrong": len(wrong)}


TRIALS: dict[Callable[[Path, int], dict[str, int]], tuple[str, ...]] = {
    kills: ("lost", "unreadable", "left_behind"),
    damaged: ("wrong", "silent", "hung"),
    signals: ("lost", "wrong_code", "late", "tracebacks"),
    disks: ("lost", "silent", "tracebacks"),
    surroundings: ("wrong",),
}
"""What must not be counted in a trial, not once."""


def saving(folder: Path, repeats: int = 9) -> dict[str, float]:
    """Seconds to save 64 MiB, beside torch.save to another name, SHA-256 of the file, fsync and rename."""
    tensors = {"training": {f"p{i}": torch.randn(1024, 1024) for i in range(16)}}

    def ours(step: int) -> None:
        save_checkpoint(folder / "ours", step, tensors, {}, keep=1)

    def plain(step: int) -> None:
        partial, final = folder / "plain.tmp", folder / "plain.pt"
        torch.save(tensors, partial)
        with partial.open("rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        partial.replace(final)

    def seconds(save: Callable[[int], None], step: int) -> float:
        began = time.perf_counter()
        save(step)
        return time.perf_counter() - began

    times = [(seconds(ours, step), seconds(plain, step)) for step in range(repeats + 1)][1:]
    best = [min(column) for column in zip(*times, strict=True)]
    return {"ours_s": round(best[0], 4), "plain_s": round(best[1], 4), "ratio": round(best[0] / best[1], 3)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks faults", description=__doc__)
    for trial, count in ((kills, 200), (damaged, 2000), (signals, 100), (disks, 50), (surroundings, 1000)):
        parser.add_argument(f"--{trial.__name__}", type=int, default=count, metavar="N")
    parser.add_argument("--record", action="store_true", help=f"write results/{RESULTS.name}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    # Our own folder of that name alone, and not all of the checkout, whose folder `kernels` others would import.
    tests = ModuleType("tests")
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests
    record: dict[str, Any] = {"benchmark": "faults", "command": "python -m benchmarks faults"}
    for trial in TRIALS:
        if number := getattr(args, trial.__name__):
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="archzoo-") as name:
                Path(name).chmod(0o755)  # a trial of another user's comes here
                counts = {**dict.fromkeys(TRIALS[trial], 0), **trial(Path(name), number)}
            met = not any(counts[key] for key in TRIALS[trial])
            record[trial.__name__] = {**counts, "met": met, "seconds": round(time.monotonic() - began)}
            print(json.dumps({trial.__name__: record[trial.__name__]}), flush=True)
    with tempfile.TemporaryDirectory() as name:
        cost = saving(Path(name))
    record["saving"] = {**cost, "goal": COST, "met": cost["ratio"] <= COST}
    print(json.dumps({"saving": record["saving"]}))
    if args.record:
        RESULTS.write_text(json.dumps({**record, **environment()}, indent=1) + "\n")
        print(f"wrote {RESULTS}")
