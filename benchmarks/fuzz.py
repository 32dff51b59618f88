"""Random configurations, of which each must train a step or be refused by name: one JSON line, and the findings.

    python -m benchmarks fuzz --record

Every case is a function of its seed (`tests/fuzz/configs.py`): a small run with some settings changed to other types,
out of range, NaN, infinite, huge, odd, unknown, or such as do not go together. Goal: 0 findings. A finding is another
exception than ConfigError or DatasetError, a refusal that names no key or that wrote a file, a run that failed, or more
than 3 s of CPU. Cases that are known good stay the same; `--first` takes others.
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

from benchmarks._record import environment, version_of

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
CHUNK = 250
"""Cases of a process."""
LONGEST_S = 10.0
"""Seconds a case at most, on average over a process's."""
START_S = 60.0
"""Seconds that a process may take to begin, on a busy machine."""


def _chunk(seeds: range) -> list[dict[str, Any]]:
    """The lines that a process of its own prints on these cases; one that dies or hangs is a finding too."""
    code = f"import sys; sys.path.append({str(ROOT)!r}); from tests.fuzz.configs import main; main()"
    command = [sys.executable, "-c", code, str(seeds.start), str(seeds.stop)]
    with tempfile.TemporaryDirectory() as empty:  # so that no folder of the checkout is on the path
        try:
            done = subprocess.run(
                command,
                cwd=empty,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=START_S + LONGEST_S * len(seeds),
            )
        except subprocess.TimeoutExpired as error:
            return [{"finding": f"seeds {seeds.start} to {seeds.stop}: not done after {error.timeout:.0f} s"}]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        lines.append({"finding": f"seeds {seeds.start} to {seeds.stop}: the process died\n{done.stderr[-2000:]}"})
    return lines


def measure(first: int, cases: int, processes: int) -> dict[str, Any]:
    """Runs the cases in several processes, and prints each finding when it is there."""
    began = time.monotonic()
    chunks = [range(at, min(at + CHUNK, first + cases)) for at in range(first, first + cases, CHUNK)]
    counts: Counter[str] = Counter()
    findings, slowest = 0, 0.0
    with ThreadPoolExecutor(processes) as pool:
        for seeds, lines in zip(chunks, pool.map(_chunk, chunks), strict=True):
            for line in lines:
                counts.update(line.get("counts", {}))
                slowest = max(slowest, line.get("slowest", 0.0))
                if "finding" in line:
                    findings += 1
                    print(line["finding"], file=sys.stderr)
            print(f"{seeds.stop - first} of {cases}: {findings} findings", file=sys.stderr)
    return {
        "benchmark": "fuzz",
        "command": f"python -m benchmarks fuzz --first {first} --cases {cases}",
        "cases": cases,
        "counts": dict(sorted(counts.items())),
        "findings": findings,
        "goal": 0,
        "met": findings == 0 and sum(counts.values()) == cases,
        "slowest_cpu_s": round(slowest, 2),
        "wall_s": round(time.monotonic() - began),
        "processes": processes,
        "versions": version_of("hydra-core", "omegaconf", "timm"),
        **environment(),
    }


def main(argv: list[str]) -> None:
    """Measures, prints one JSON line, and with `--record` writes it beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args(argv)
    if args.cases < 1 or args.processes < 1 or args.first < 0:
        parser.error("--cases and --processes must be 1 or more, and --first 0 or more")
    result = measure(args.first, args.cases, args.processes)
    print(json.dumps(result))
    if args.record:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
