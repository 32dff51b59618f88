"""Runs whose disk takes no more from some step on, and what is left of their checkpoints."""

import itertools
import os
import random
import resource
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from archzoo.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from archzoo.training.run import execute
from tests.faults.support import STEPS, finish, outcome, run_folder, small_config, start, train

NOBODY = 65534  # root writes where it may not
ROOT = os.geteuid() == 0
KINDS = ("largest file", "read-only folder", *(("small file system",) if ROOT else ()))


def train_until_full(output_dir: Path, step: int, kind: str, largest_file: int) -> int:
    """One run that is allowed no file above a size, or nothing in the folder of checkpoints, after some step."""
    checkpoints = run_folder(output_dir) / "checkpoints"
    steps = itertools.count(1)

    def look() -> bool:
        if next(steps) == step:
            if kind == "largest file":
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
            elif kind == "read-only folder":
                checkpoints.chmod(0o555)
        return False

    record = execute(small_config(output_dir), should_stop=look)
    return 4 if record["status"] == "interrupted" and record["checkpoint_error"] else 1


def trial(folder: Path, kind: str, rng: random.Random, undisturbed: Any, checkpoint_bytes: int) -> Counter[str]:
    """Fills the disk of a run, makes room again, and lets the same command end it.

    Returns:
        Counts: `lost`, checkpoints that were there and are not, or do not load, or an end other than `undisturbed`;
        `silent`, runs that did not stop, or not with a message that says where, what is needed and what is free.
    """
    counts: Counter[str] = Counter(trials=1)
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)  # whatever the umask is
    mounted = kind == "small file system"
    if mounted:
        size = checkpoint_bytes * 3 // 2 + (96 << 10)  # run.json, config.yaml, metrics and log beside
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        user = NOBODY if kind == "read-only folder" and ROOT else None
        step, largest = rng.randrange(6, STEPS - 15), rng.randrange(checkpoint_bytes // 3)
        run = run_folder(folder / "out")
        code = finish(start(train_until_full, folder / "out", step, kind, largest, folder=folder, user=user))
        left = list_checkpoints(run / "checkpoints")
        last = 5 if mounted else (step - 1) // 5 * 5  # what was saved while there was room
        counts["lost"] += not left or int(left[0].name[5:]) < last
        for path in left:
            try:
                load_checkpoint(path)
            except CheckpointError:
                counts["lost"] += 1
        said = (run / "log.txt").read_text() + (run / "run.json").read_text()
        complete = all(word in said for word in (f"{run}/checkpoints: no checkpoint at step", "it needs", "are free"))
        counts["silent"] += code != 4 or not (complete or largest < len(said))  # the log has no room either
        counts["tracebacks"] += "Traceback" in (folder / "stderr").read_text()
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        (run / "checkpoints").chmod(0o755)
        counts["lost"] += finish(start(train, folder / "out", folder=folder)) != 0 or outcome(run) != undisturbed
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
    shutil.rmtree(folder)
    return counts


def fill_disks(folder: Path, trials: int, seed: int = 0) -> Counter[str]:
    """So many trials, of each kind in turn."""
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    train(folder / "whole")
    whole = run_folder(folder / "whole")
    size = sum(-(-p.stat().st_size // 4096) * 4096 for p in list_checkpoints(whole / "checkpoints")[0].iterdir())
    for number in range(trials):
        counts += trial(folder / f"t{number}", KINDS[number % len(KINDS)], rng, outcome(whole), size)
    return counts
