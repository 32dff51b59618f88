"""Every op on one CPU thread beside its definition, public packages, and public code written out plainly.

    python -m benchmarks cpu [--record] [--seconds S] [--only OP …] [--peers FOLDER]

Packages are those of the extra `bench`; one that is missing is reported. Contestants of a case compute one function of
the same inputs, and must agree before they are timed. They take turns in one process; ratios are of least CPU times,
forward and backward. `--record` writes benchmarks/results/cpu_speed.json, of which `python -m benchmarks readme` makes
the README's table. A minute for each second of `--seconds`, and three for compiling; on an idle machine.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._cases import Op, add_peers
from benchmarks._measure import Call, Device, Row, Times, first_line, measure, quantiles
from benchmarks._record import environment, version_of
from benchmarks._speed import RECORDS, merged, progress_line, summary, verdict
from benchmarks.gpu import choose
from benchmarks.mamba_speed import peak

LEAST_ROUNDS = 3
PACKAGES = ("pykan", "mambapy", "aptx-neuron")


def race(calls: Mapping[str, Call], seconds: float) -> Times:
    """CPU times in ms; contestants take turns, in which each gets about as long, until the time is up.

    One that takes longer than a third of that runs once, having run before when it was compared.
    """

    def once(call: Call) -> float:
        began = time.process_time()
        call()
        return 1e3 * (time.process_time() - began)

    samples = {name: [once(call)] for name, call in calls.items()}
    short = {name: call for name, call in calls.items() if samples[name][0] < 1e3 * seconds / LEAST_ROUNDS}
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < LEAST_ROUNDS:
        for name, call in short.items():
            until = time.perf_counter() + seconds / (10 * len(short))
            while True:
                samples[name].append(once(call))
                if time.perf_counter() > until:
                    break
        rounds += 1
        if not short:
            break
    return {name: quantiles(found) for name, found in samples.items()}


def free_memory() -> float:
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def cpu_device(seconds: float) -> Device:
    return Device("cpu", "cpu", lambda calls: race(calls, seconds), peak, free_memory, "least", None)


def measure_all(ops: Sequence[Op], device: Device) -> list[Row]:
    """A row for each op and size, printed as it comes; one that fails says how."""
    rows = []
    for op in ops:
        for index, size in enumerate(op.cpu):
            part = "all" if op.compiles_on_cpu and index == 0 else "eager"
            try:
                row = measure(op, size, torch.float32, device, part, breaks=index == 0)
            except Exception as problem:  # the others are to be measured all the same
                row = {"op": op.name, "size": dict(size), "dtype": "float32", "contestants": {}}
                row["error"] = first_line(problem)
            rows.append(row)
            print(progress_line(row), flush=True)
    return rows


def record_of(ops: Sequence[Op], rows: Sequence[Row], command: str, wall: float) -> dict[str, Any]:
    return {
        "benchmark": "cpu",
        "command": command,
        "wall_s": round(wall, 1),
        "environment": environment() | {"device": "cpu", "versions": version_of(*PACKAGES)},
        "summary": summary(ops, rows, "cpu"),
        "rows": merged(rows),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help=f"write results/{RECORDS['cpu'].name}")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case and pass")
    parser.add_argument("--only", nargs="+", metavar="OP", help="ops by name, or the part before the colon")
    parser.add_argument("--peers", type=Path, help="folder with packages that are not installed")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        parser.error(f"argument --seconds: {args.seconds:g}: must be above 0")
    if args.record and args.only:
        parser.error("argument --record: a record is of all ops; leave out --only")
    torch.set_num_threads(1)
    add_peers(args.peers)
    ops = choose(args.only)
    began = time.perf_counter()
    rows = measure_all(ops, cpu_device(args.seconds))
    command = f"python -m benchmarks cpu --seconds {args.seconds:g}"
    record = record_of(ops, rows, command, time.perf_counter() - began)
    print(verdict(record))
    if args.record:
        RECORDS["cpu"].write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RECORDS['cpu']}")
