"""kill -9 at random moments of a run that saves all the time, and what the same command then makes of it."""

import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from archzoo.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from archzoo.training.run_folder import read_record
from tests.faults.support import finish, kill, outcome, run_folder, start, train, wait_for

SLOW = 0.004  # seconds between the parts of a file, so that a kill falls between them


def killed_run(folder: Path, seed: int, rng: random.Random, kills: int, undisturbed: Any) -> Counter[str]:
    """Kills a run up to so many times, half of them inside a save, and then lets it end.

    Returns:
        Counts: `kills`; `inside_a_save`, those that left half a checkpoint; `unreadable`, checkpoints that did not
        load after a kill; `lost`, resumptions from another than the newest, or with another end than `undisturbed`.
    """
    counts: Counter[str] = Counter()
    run = run_folder(folder, seed)
    checkpoints, log = run / "checkpoints", run / "log.txt"
    newest = ""  # before the process that runs

    while True:
        resumptions, done = len(_resumed(log)), _is_done(run)
        slow = rng.random() < 0.5
        process = start(train, folder, seed, folder=folder, slow_save=SLOW if slow else 0.0)
        if counts["kills"] < kills:
            if slow:
                for _ in range(rng.randrange(1, 4)):
                    _wait_for_a_save(checkpoints, process)
                process.join(rng.uniform(0.0, 0.12))
            else:
                process.join(rng.uniform(0.0, 1.0))
            if process.exitcode is None:
                kill(process)
                counts["kills"] += 1
        code = finish(process)
        resumed = _resumed(log)[resumptions:]
        if (resumed or code == 0) and newest:  # of a run that was killed when it was done, nothing is resumed
            counts["lost"] += _differ("resumed from", resumed, [] if done else [newest])
        if code == 0:
            break
        if code != -9:
            raise AssertionError(f"exit code {code}: {(folder / 'stderr').read_text()}")
        counts["inside_a_save"] += any(checkpoints.glob("*.tmp-*"))
        for path in list_checkpoints(checkpoints):
            try:
                load_checkpoint(path)
            except CheckpointError:
                counts["unreadable"] += 1
        newest = next((path.name for path in list_checkpoints(checkpoints)), "")
    counts["lost"] += _differ("ended with", outcome(run), undisturbed)
    counts["left_behind"] += len(list(run.rglob("*.tmp-*")))
    shutil.rmtree(run)
    return counts


def _is_done(run: Path) -> bool:
    record = read_record(run)
    return record is not None and record["status"] == "done"


def _differ(what: str, found: Any, wanted: Any) -> bool:
    """Whether the two do, and if so says how."""
    if found != wanted:
        print(f"{what} {found}, not {wanted}", file=sys.stderr)
    return bool(found != wanted)


def _resumed(log: Path) -> list[str]:
    """The checkpoints that the run was resumed from so far."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.partition("resumed from ")[2] for line in lines if "resumed from " in line]


def _wait_for_a_save(checkpoints: Path, process: Any) -> None:
    before = set(checkpoints.glob("*.tmp-*"))
    wait_for(lambda: bool(set(checkpoints.glob("*.tmp-*")) - before), process)


def kill_runs(folder: Path, kills: int, seed: int = 0) -> Counter[str]:
    """Runs that are killed so many times in all."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    train(folder / "whole")
    undisturbed = outcome(run_folder(folder / "whole"))
    while counts["kills"] < kills:
        counts += killed_run(folder, 0, rng, min(kills - counts["kills"], rng.randrange(2, 7)), undisturbed)
        counts["runs"] += 1
    return counts
