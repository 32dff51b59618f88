"""What `import archzoo` and its first look-up cost beside `import torch, triton`: one JSON line.

    python benchmarks/import_cost.py --runs 7

CPU time of fresh interpreters, user and system, the two taken in turn and the least of each kept: what else the machine
does then hardly matters. Goal: a ratio of at most 1.15.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version

from benchmarks._record import environment

GOAL = 1.15
OURS = "import archzoo; archzoo.list_layers()"
TORCH = "import torch"
TORCH_AND_TRITON = "import torch, triton"
TIMED = "import os; {code}; t = os.times(); print(t.user + t.system)"


def cpu_seconds(code: str) -> float:
    """CPU time of an interpreter from its start to the end of the code, in seconds."""
    with tempfile.TemporaryDirectory() as empty:  # so that no folder of the checkout is on the path
        done = subprocess.run(
            [sys.executable, "-c", TIMED.format(code=code)],
            cwd=empty,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
    return float(done.stdout)


def measure(runs: int) -> dict[str, object]:
    """Least CPU times of `runs` alternating runs, and ours over theirs."""
    peer = TORCH_AND_TRITON if importlib.util.find_spec("triton") else TORCH
    codes = {"ours": OURS, "peer": peer, "torch": TORCH}
    for code in codes.values():
        cpu_seconds(code)  # compiles to bytecode and fills the file cache
    least = dict.fromkeys(codes, float("inf"))
    for _ in range(runs):
        for name, code in codes.items():
            least[name] = min(least[name], cpu_seconds(code))
    ratio = least["ours"] / least["peer"]
    return {
        "benchmark": "import_cost",
        "command": f"python -m benchmarks import_cost --runs {runs}",
        "code": OURS,
        "peer": peer,
        "ratio": round(ratio, 3),
        "ratio_to_torch_alone": round(least["ours"] / least["torch"], 3),
        "goal": GOAL,
        "met": ratio <= GOAL,
        "ours_cpu_s": round(least["ours"], 3),
        "peer_cpu_s": round(least["peer"], 3),
        "runs": runs,
        "triton": version("triton") if peer == TORCH_AND_TRITON else None,
        **environment(),
    }


def main(argv: list[str]) -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="alternating runs of each")
    runs = parser.parse_args(argv).runs
    if runs < 1:
        parser.error(f"--runs {runs}: must be at least 1")
    print(json.dumps(measure(runs)))
