"""Loses one of two training processes, over and over: what is lost with it, and how long until the other has ended.

Each rank is killed (SIGKILL) and stopped for good (SIGSTOP) at random moments of a run of a fraction of a second, which
two other processes then take up. A stopped process is noticed after `trainer.rank_timeout`, here 3 s. Goal: nothing is
lost, and every run ends with the bits of one to which nothing happened. `--torchrun N` adds trials of whole commands,
`torchrun --max-restarts=1`, in which torchrun itself starts all processes again.
"""

import argparse
import json
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archzoo.training.run import execute
from benchmarks._record import environment
from tests.faults.ranks import RANK_TIMEOUT, disturbed, small, torchrun, trial
from tests.training.processes import together

FILE = Path(__file__).parent / "results" / "rank_faults.json"


def forked(points: int, folder: Path) -> list[dict[str, Any]]:
    """Figures of each rank and signal."""
    together(2, execute, small(folder / "whole"))
    (whole,) = (folder / "whole").iterdir()
    rows, random_ = [], random.Random(0)
    for rank in (0, 1):
        for number in (signal.SIGKILL, signal.SIGSTOP):
            places = (folder / f"{rank}-{number}-{i}" for i in range(points))
            outcomes = [trial(place, whole, rank, number, random_) for place in places]
            rows.append(
                {
                    "rank": rank,
                    "signal": number.name,
                    "trials": points,
                    "lost": sum(not o["same_bits"] or not o["resumable"] for o in outcomes),
                    "partial_checkpoints_left": sum(o["partial_left"] for o in outcomes),
                    "longest_until_all_ended_s": max(o["ended_s"] for o in outcomes),
                }
            )
            print(rows[-1], flush=True)
    return rows


def commands(trials: int, folder: Path) -> list[dict[str, Any]]:
    """Outcomes of whole commands."""
    rows = []
    for seed in range(trials):
        outcome = disturbed(folder / f"torchrun{seed}", seed)
        whole = folder / f"whole{seed}"
        command = torchrun(2, f"output_dir={whole}", f"seed={seed % 3}")
        subprocess.run(command, check=True, capture_output=True, timeout=200)
        ours, theirs = (next(f.glob("*/model.safetensors")).read_bytes() for f in (folder / f"torchrun{seed}", whole))
        rows.append({**outcome, "same_bits": ours == theirs})
        print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks rank_faults", description=__doc__)
    parser.add_argument("--points", type=int, default=20, help="moments for each rank and signal")
    parser.add_argument(
        "--torchrun", type=int, default=0, metavar="N", help="trials of whole commands, half a minute each"
    )
    parser.add_argument("--record", action="store_true", help=f"write {FILE.name}")
    args = parser.parse_args(argv)
    if args.points < 1 or args.torchrun < 0:
        parser.error(f"--points {args.points} --torchrun {args.torchrun}: must be 1 or more, and 0 or more")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        forks, whole = forked(args.points, Path(folder)), commands(args.torchrun, Path(folder))
    result = {
        "benchmark": "rank_faults",
        "command": f"python -m benchmarks rank_faults --points {args.points} --torchrun {args.torchrun} --record",
        "rank_timeout_s": RANK_TIMEOUT,
        "forked": forks,
        "torchrun": whole,
        "wall_s": time.monotonic() - began,
        "environment": environment(),
    }
    if args.record:
        FILE.write_text(json.dumps(result, indent=1) + "\n")
