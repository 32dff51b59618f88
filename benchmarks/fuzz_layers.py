"""Random constructions and calls of every layer, of which each must be right or refused by name: one JSON line.

    python -m benchmarks fuzz_layers --record

Trials are those of `tests/fuzz/layers.py`: arguments of other types, out of range, NaN, infinite, huge; inputs of other
shapes, dtypes, devices and strides; all of them a function of `--seed`. A tenth as many more have NaN in. Goal: 0
findings. A finding is an error other than a ValueError or TypeError that says what was wrong, a wrong value that is
taken, a wrong shape or dtype that comes out, NaN that comes out as a number, a hang, or a process that dies. What
`nn.Linear` and `nn.Conv2d`, in the zoo as they are, refuse is torch's own, and so is a device that is not there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import archzoo
from benchmarks._record import environment

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fuzz_layers.json"
SLOWEST_S = 5.0
"""Seconds a trial at most, on average over a process's."""


def _chunk(names: list[str], trials: int, seed: int) -> list[dict[str, Any]]:
    """The lines that a process of its own prints on these layers; one that dies or hangs is a finding too."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); from tests.fuzz.layers import main; main()"
    with tempfile.TemporaryDirectory() as empty:  # so that no folder of the checkout is on the path
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, str(trials), str(seed), *names],
                cwd=empty,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=SLOWEST_S * trials * len(names),
            )
        except subprocess.TimeoutExpired as error:
            return [{"layer": ", ".join(names), "ended": {}, "findings": [f"not done after {error.timeout:.0f} s"]}]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    missing = sorted(set(names) - {line["layer"] for line in lines})
    return lines + [{"layer": name, "ended": {}, "findings": [done.stderr[-2000:]]} for name in missing]


def measure(trials: int, seed: int, processes: int) -> dict[str, Any]:
    """Tries the layers in several processes, and prints each finding."""
    began = time.monotonic()
    names = ["APTx", *archzoo.list_layers()]
    chunks = [names[at :: 2 * processes] for at in range(2 * processes)]
    with ThreadPoolExecutor(processes) as pool:
        lines = [line for found in pool.map(lambda chunk: _chunk(chunk, trials, seed), chunks) for line in found]
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line["ended"])
        for finding in line["findings"]:
            print(f"{line['layer']}: {finding}", file=sys.stderr)
    findings = sum(len(line["findings"]) for line in lines)
    return {
        "benchmark": "fuzz_layers",
        "command": f"python -m benchmarks fuzz_layers --trials {trials} --seed {seed}",
        "layers": len(names),
        "trials_a_layer": trials,
        "counts": dict(sorted(counts.items())),
        "by_layer": {line["layer"]: line["ended"] for line in sorted(lines, key=lambda line: line["layer"])},
        "findings": findings,
        "goal": 0,
        "met": findings == 0 and sum(counts.values()) == len(names) * (trials + trials // 10),
        "wall_s": round(time.monotonic() - began),
        "processes": processes,
        **environment(),
    }


def main(argv: list[str]) -> None:
    """Measures, prints one JSON line, and with `--record` writes it beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="of each layer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args(argv)
    if args.trials < 1 or args.processes < 1:
        parser.error("--trials and --processes must be 1 or more")
    result = measure(args.trials, args.seed, args.processes)
    print(json.dumps(result))
    if args.record:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
