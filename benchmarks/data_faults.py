"""What data that goes wrong costs a run, and how broken files are refused: one JSON line a fault.

    python -m benchmarks data_faults --record

A loader process is killed at random batches, and an example of any batch cannot be read: a run that is then told to go
on has lost something if it does not take up the last step done, or ends with other bits than an undisturbed run. Files
of every task that reads any are broken in every way: each is to be refused with a DatasetError that names the data set,
the path and the command that gets it, and nothing may be written. Goals: 0 lost, 0 longer than 60 s, 100 % refused, 0
files written.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._record import environment

HANG = 60.0  # seconds
RECORD = Path(__file__).parent / "results" / "data_faults.json"


def killed_workers(trials: int, folder: Path) -> dict[str, Any]:
    """A loader process killed by SIGKILL at a random step."""
    from benchmarks._broken_data import STEPS, config_of, disturbed, kill_a_worker_at, whole

    rng = random.Random(20240430)
    expected = whole(config_of(folder / "whole", 2))
    lost, longest = 0, 0.0
    for trial in range(trials):
        step = rng.randint(1, STEPS - 11)  # the last batches are read ahead by then
        outcome = disturbed(config_of(folder / str(trial), 2), expected, should_stop=kill_a_worker_at(step, rng))
        lost += not (outcome.same and outcome.saved >= step and "killed by SIGKILL" in outcome.error)
        longest = max(longest, outcome.seconds)
    return {"fault": "worker killed", **_figures(trials, lost, longest)}


def bad_examples(trials: int, workers: int, folder: Path) -> dict[str, Any]:
    """An example that cannot be read, each time in another batch."""
    from benchmarks._broken_data import STEPS, Fault, bad_example, config_of, disturbed, whole

    expected = whole(config_of(folder / "whole", workers))
    lost, longest = 0, 0.0
    for trial in range(trials):
        batch = 1 + 2 * trial % (STEPS - 1)  # an odd number: every batch but the first comes once
        fault = Fault(bad_example(batch))
        outcome = disturbed(config_of(folder / str(trial), workers), expected, fault)
        lost += not (outcome.same and outcome.saved == batch and f"example {fault.index} could not" in outcome.error)
        longest = max(longest, outcome.seconds)
    return {"fault": "bad example", "workers": workers, **_figures(trials, lost, longest)}


def _figures(trials: int, lost: int, longest: float) -> dict[str, Any]:
    return {"trials": trials, "lost": lost, "longest_s": round(longest, 2), "met": not lost and longest < HANG}


def broken_files(folder: Path) -> dict[str, Any]:
    """Every file of `READERS`, broken in every way."""
    from benchmarks._broken_data import READERS, refusals, small_sets

    with small_sets() as contents:
        found = [
            refusal
            for number, reader in enumerate(READERS)
            for refusal in refusals(folder / str(number), contents, reader)
        ]
    refused, written = sum(refusal.helps for refusal in found), sum(len(refusal.changed) for refusal in found)
    return {
        "fault": "broken file",
        "tasks": len({reader[0] for reader in READERS}),
        "kinds": len({refusal.kind for refusal in found}),
        "trials": len(found),
        "refused": refused,
        "files_written": written,
        "longest_s": round(max(refusal.seconds for refusal in found), 2),
        "met": refused == len(found) and not written,
    }


def measure(trials: int) -> Iterator[dict[str, Any]]:
    """Figures of each fault."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield killed_workers(trials, folder / "killed")
        for workers in (0, 2):
            yield bad_examples(trials, workers, folder / f"bad{workers}")
        yield broken_files(folder / "files")


def main(argv: list[str]) -> None:
    """Tries every fault, and prints a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of each fault in a run")
    parser.add_argument("--record", action="store_true", help=f"write results/{RECORD.name}")
    arguments = parser.parse_args(argv)
    if arguments.trials < 1:
        parser.error(f"--trials {arguments.trials}: must be at least 1")
    rows = []
    for row in measure(arguments.trials):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.record:
        command = f"python -m benchmarks data_faults --trials {arguments.trials} --record"
        record = {"benchmark": "data_faults", "command": command, "rows": rows, **environment()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RECORD}")
