"""Signals that ask a run to stop, at random moments, and what the same command then makes of it."""

import json
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from archzoo.training.checkpoint import list_checkpoints
from tests.faults.support import COMMAND, command, finish, kill, outcome, start, wait_for

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 143, signal.SIGINT: 130}
SETTINGS = [*COMMAND, "trainer.checkpoint_every=1000", "trainer.eval_every=25"]  # what is saved is saved for the signal


def only_run(output_dir: Path) -> Path:
    (found,) = output_dir.glob("*/run.json")
    return found.parent


def last_step(run: Path) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def stopped_run(folder: Path, rng: random.Random, signals: int, undisturbed: Any) -> Counter[str]:
    """Stops a run up to so many times, and then lets it end.

    Returns:
        Counts: `signals`; `lost`, stops after which the newest checkpoint is not that of the last step, and runs with
        another end than `undisturbed`; `wrong_code`; `late`, stops that took more than 30 s; and `longest_ms`.
    """
    counts: Counter[str] = Counter()
    expected = None
    while True:
        began = _started(folder)
        process = start(command, *SETTINGS, f"output_dir={folder}/out", folder=folder)
        number = rng.choice(list(CODES))
        told = False
        if counts["signals"] < signals:
            told = wait_for(lambda count=began: _started(folder) > count, process)
            process.join(rng.uniform(0.0, 0.5))
        sent = time.monotonic()
        if told and process.exitcode is None:
            kill(process, number)
            counts["signals"] += 1
        else:
            told = False
        code = finish(process)
        run = only_run(folder / "out")
        if expected is not None:
            resumed = [x for x in (run / "log.txt").read_text().splitlines() if "resumed from" in x]
            counts["lost"] += not resumed[-1].endswith(f"{expected:08d}")
        if code == 0:
            break
        counts["wrong_code"] += code != CODES[number] or not told
        taken = time.monotonic() - sent
        counts["late"] += taken > 30
        counts["longest_ms"] = max(counts["longest_ms"], int(1000 * taken))
        if json.loads((run / "run.json").read_text())["status"] == "done":  # the signal came behind its last step
            expected = None
            continue
        expected = last_step(run)
        counts["lost"] += list_checkpoints(run / "checkpoints")[0].name != f"step_{expected:08d}"
    counts["lost"] += outcome(run) != undisturbed
    counts["tracebacks"] += (folder / "stderr").read_text().count("Traceback")
    shutil.rmtree(run)
    return counts


def _started(folder: Path) -> int:
    told = folder / "stderr"
    return told.read_text().count("started") if told.exists() else 0


def stop_runs(folder: Path, signals: int, seed: int = 0) -> Counter[str]:
    """Runs that are stopped so many times in all."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    assert command(*SETTINGS, f"output_dir={folder}/whole") == 0  # here: what it imports, the others find
    undisturbed = outcome(only_run(folder / "whole"))
    while counts["signals"] < signals:
        found = stopped_run(folder, rng, min(signals - counts["signals"], rng.randrange(2, 7)), undisturbed)
        counts["longest_ms"] = max(counts["longest_ms"], found.pop("longest_ms", 0))
        counts += found
        counts["runs"] += 1
    return counts
