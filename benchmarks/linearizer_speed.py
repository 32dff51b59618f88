"""Time of collapsing a Linearizer's flow into one matrix: dense, by low rank, and factored; on one CPU thread.

Euler steps at d = 1024, rank 8, float32. `dense` forms each step's matrix and multiplies (2 d^3 a step), `low rank`
applies the factors to the product (4 d^2 r), and ours keeps the product factored too: what `LinearFlow.collapse` does,
with the perceptrons that make the factors, which the others are spared: `to the end` with A as the last step, the
default. Contestants alternate in one process, and ratios
are of the least times.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo.layers._collapse import StepMatrices, collapse
from archzoo.layers.linear_operators import TimeLowRankOperator
from benchmarks._record import environment

RESULTS = Path(__file__).parent / "results" / "linearizer_speed.json"
GOAL = 8.0
FEATURES, RANK = 1024, 8
Factors = list[tuple[float, Tensor, Tensor]]


def dense(factors: Factors) -> Tensor:
    eye = torch.eye(FEATURES)
    B = eye
    for c, P, Q in factors:
        B = (c * eye + P @ Q.mT) @ B
    return B


def low_rank(factors: Factors) -> Tensor:
    B = torch.eye(FEATURES)
    for c, P, Q in factors:
        B = c * B + P @ (Q.mT @ B)
    return B


def measure(steps: int, method: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    operator = TimeLowRankOperator(FEATURES, RANK)
    factors = list(StepMatrices(operator, steps, method))
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(factors),
        "low rank": lambda: low_rank(factors),
        "ours": lambda: collapse(operator, steps, method, False),
        "ours, to the end": lambda: collapse(operator, steps, method, True),
    }
    error = (collapse(operator, steps, method, False).matrix() - dense(factors)).abs().max()
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - began)
    return {
        "steps": steps - 1,
        "method": method,
        "milliseconds": {name: round(1e3 * seconds, 3) for name, seconds in least.items()},
        "dense/low rank": round(least["dense"] / least["low rank"], 2),
        "dense/ours": round(least["dense"] / least["ours"], 2),
        "largest difference": float(error),
        "goal dense/ours": GOAL,
    }


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [measure(20, method, options.rounds) for method in ("euler", "rk4")]
    command = " ".join(["python -m benchmarks linearizer_speed", *(arguments or [])])
    record = {"benchmark": "linearizer_speed", "command": command, "environment": environment(), "results": results}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    for line in results:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
