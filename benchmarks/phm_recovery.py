"""Whether PHM finds an algebra's rule from data, and what a learned rule and `"mixing"` can express.

Every run is a `PHMLinear` trained on pairs (x, W x), x standard normal, by Adam with a cosine schedule; W is of a fixed
rule, with random S.

* Rule: S is frozen at the teacher's, A is learned. Error: the largest entry of A minus the algebra's rule. The complex
  layer turns the plane of each pair of features, the quaternion layer multiplies by quaternions, as rotations do.
* Expressiveness: A and S are both learned, from a random start, against a quaternion layer. Error: that of the weight,
  relative, in the Frobenius norm. n = 2 has twice the parameters and holds every quaternion map.

    python -m benchmarks phm_recovery [--record]

About a minute on one core; --record puts it into `benchmarks/results/phm_recovery.json`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archzoo.layers.phm import ALGEBRAS, PHMLinear
from archzoo.layers.start import relative_error
from benchmarks._record import environment

RESULTS = Path(__file__).parent / "results" / "phm_recovery.json"
BATCH = 64
RULES = {"complex": 16, "quaternion": 16, "octonion": 32}  # width: with less, S_1 .. S_8 are not independent
RULE_SETTING = {"steps": 500, "lr": 5e-2, "seeds": 10}
EXPRESS_SETTING = {"steps": 1500, "lr": 2e-2, "seeds": 5}
STUDENTS: dict[str, dict[str, Any]] = {
    "learned, n = 4": {"n": 4},
    "learned, n = 2": {"n": 2},
    "mixing": {"n": 4, "rule": "mixing"},
}


def fit(layer: PHMLinear, teacher: PHMLinear, steps: int, lr: float) -> None:
    """Trains what requires gradients of a layer to do as the teacher does."""
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weight = teacher.weight.detach()
    for _ in range(steps):
        x = torch.randn(BATCH, layer.in_features)
        optimizer.zero_grad()
        (layer(x) - x @ weight.t()).square().mean().backward()
        optimizer.step()
        schedule.step()


def rule_error(algebra: str, width: int, seed: int) -> float:
    """Largest error of an entry of A, learned with S known."""
    torch.manual_seed(seed)
    teacher = PHMLinear(width, width, bias=False, n=ALGEBRAS[algebra], rule=algebra)
    layer = PHMLinear(width, width, bias=False, n=ALGEBRAS[algebra])
    assert teacher.S is not None
    layer.S = nn.Parameter(teacher.S.detach().clone(), requires_grad=False)
    fit(layer, teacher, int(RULE_SETTING["steps"]), RULE_SETTING["lr"])
    return float((layer.A.detach() - teacher.A).abs().max())


def expression_error(options: dict[str, Any], seed: int) -> float:
    """Relative error of the weight of a layer that learned a quaternion map."""
    torch.manual_seed(seed)
    teacher = PHMLinear(16, 16, bias=False, rule="quaternion")
    layer = PHMLinear(16, 16, bias=False, **options)
    fit(layer, teacher, int(EXPRESS_SETTING["steps"]), EXPRESS_SETTING["lr"])
    return relative_error(layer.weight, teacher.weight)


def _row(name: str, errors: list[float], **more: Any) -> dict[str, Any]:
    print(f"{name:20} median {statistics.median(errors):.1e}   from {min(errors):.1e} to {max(errors):.1e}", flush=True)
    return {"name": name, **more, "median": statistics.median(errors), "errors": errors}


def measure() -> dict[str, Any]:
    """All of it, printed as it comes."""
    began = time.perf_counter()
    print(f"rule from data, {RULE_SETTING['seeds']} seeds: largest error of A")
    rules = [
        _row(algebra, [rule_error(algebra, width, s) for s in range(int(RULE_SETTING["seeds"]))], width=width)
        for algebra, width in RULES.items()
    ]
    print(f"quaternion map, {EXPRESS_SETTING['seeds']} seeds: relative error of the weight")
    students = [
        _row(name, [expression_error(options, s) for s in range(int(EXPRESS_SETTING["seeds"]))], options=options)
        for name, options in STUDENTS.items()
    ]
    return {
        "command": "python -m benchmarks phm_recovery --record",
        "environment": environment(),
        "wall_s": round(time.perf_counter() - began, 1),
        "batch": BATCH,
        "rule_from_data": {**RULE_SETTING, "rows": rules},
        "expressiveness": {**EXPRESS_SETTING, "rows": students},
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks phm_recovery", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = measure()
    print(f"{record['wall_s']} s")
    if args.record:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RESULTS}")
