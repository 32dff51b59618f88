"""Time and memory of a BPU beside the textbook form of its recurrence, on one CPU thread.

The textbook form is what the authors' public module does, written out plainly (neurodata/BPU, `src/net.py`): three
states, nine slices of one dense matrix of all neurons, and autograd. A training step is forward, cross entropy,
backward and Adam, on 784 inputs and 10 classes, as on MNIST; both contestants have the same projections, dropout and
optimizer. Contestants take turns in one process, and ratios are of their least CPU times. Kept: what autograd holds for
the backward pass besides inputs, parameters and buffers. Beside it the seconds that connectomes take to be measured and
grown, and the bytes of the core in the state dict. With `--connectome generated` the wiring is made up, and the record
says so.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.bpu_recurrence import bpu_recurrence
from archzoo.layers.bpu import BPU, Connectome
from archzoo.models.bpu import find_connectome
from benchmarks._record import environment
from benchmarks.kan_speed import kept

RESULTS = Path(__file__).parent / "results" / "bpu_speed.json"
SIZES = ((64, 2), (64, 3), (64, 5), (64, 10), (256, 5), (256, 10))
FASTER = 30.0
"""How many times our training step the textbook's must take, at batch 64 and 5 steps."""


class Textbook(nn.Module):
    """The whole dense matrix, sliced by pools, at every step."""

    W: Tensor

    def __init__(self, ours: BPU):
        super().__init__()
        self.sizes, self.steps, self.dropout = ours.connectome.pool_sizes, ours.steps, ours.dropout
        self.input_proj = nn.Linear(ours.in_features, self.sizes[0])
        self.output_proj = nn.Linear(self.sizes[2], ours.out_features)
        self.register_buffer("W", ours.dense_weight())
        self.load_state_dict(ours.state_dict(), strict=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output_proj(self.recur(F.dropout(self.input_proj(x), self.dropout, self.training)))
        return y

    def recur(self, drive: Tensor) -> Tensor:
        blocks = [row.split(self.sizes, 1) for row in self.W.split(self.sizes)]
        s, i, o = (drive.new_zeros(len(drive), size) for size in self.sizes)
        for t in range(self.steps):
            e = drive if t == 0 else torch.zeros_like(drive)
            s, i, o = (
                F.relu(s @ blocks[0][0] + e + i @ blocks[1][0] + o @ blocks[2][0]),
                F.relu(i @ blocks[1][1] + s @ blocks[0][1] + o @ blocks[2][1]),
                F.relu(o @ blocks[2][2] + i @ blocks[1][2] + s @ blocks[0][2]),
            )
        return o


def training(layer: nn.Module, x: Tensor, target: Tensor, optimize: bool) -> Callable[[], object]:
    """A training step of a layer; without the optimizer, forward and backward alone."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(layer(x), target).backward()
        if optimize:
            optimizer.step()

    return step


def core(layer: BPU | Textbook, x: Tensor) -> Callable[[], object]:
    """Forward and backward of the recurrence alone, by the drive of its sensory neurons."""
    drive = layer.input_proj(x).detach().requires_grad_()
    if isinstance(layer, BPU):
        return lambda: torch.autograd.grad(bpu_recurrence(drive, layer.edge_weight, layer._placed).sum(), drive)
    return lambda: torch.autograd.grad(layer.recur(drive).sum(), drive)


def race(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Least CPU time of each, in ms; they take turns, in which each gets about as long, until the time is up."""
    best = dict.fromkeys(functions, math.inf)
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < 3:
        for name, function in functions.items():
            until = time.perf_counter() + seconds / 10
            while True:
                began = time.process_time()
                function()
                best[name] = min(best[name], time.process_time() - began)
                if time.perf_counter() > until:
                    break
        rounds += 1
    return {name: round(value * 1e3, 4) for name, value in best.items()}


def measure(wiring: Connectome, batch: int, steps: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    ours = BPU(wiring, 784, 10, steps=steps)
    layers: dict[str, BPU | Textbook] = {"ours": ours, "textbook": Textbook(ours)}
    x, target = torch.randn(batch, 784), torch.randint(10, (batch,))
    with torch.no_grad():  # the same function, or there is nothing to compare
        first, second = (layer.eval()(x) for layer in layers.values())
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3 * float(second.abs().max()))
    for layer in layers.values():
        layer.train()
    times = {
        "step_ms": race({n: training(layer, x, target, True) for n, layer in layers.items()}, seconds),
        "forward_backward_ms": race({n: training(layer, x, target, False) for n, layer in layers.items()}, seconds),
        "core_ms": race({n: core(layer, x) for n, layer in layers.items()}, seconds),
    }
    held = {n: kept(layer, x.clone()) for n, layer in layers.items()}
    ratios = {key.removesuffix("_ms"): round(t["textbook"] / t["ours"], 2) for key, t in times.items()}
    row: dict[str, Any] = {
        "batch": batch,
        "steps": steps,
        "neurons_per_step": list(ours.step_sizes),
        **times,
        "textbook/ours": ratios,
        "kept_MiB": {n: round(size / 2**20, 3) for n, size in held.items()},
    }
    if (batch, steps) == (64, 5):
        row["goals"] = {
            "textbook/ours, step": {"value": ratios["step"], "goal": f">= {FASTER:g}", "met": ratios["step"] >= FASTER}
        }
    return row


def connectome_row(wiring: Connectome) -> dict[str, Any]:
    """Seconds of what is done once, and the size of the core."""
    fresh = wiring.shuffle("weights").shuffle("weights")  # whose radius nobody has asked for yet
    began = time.perf_counter()
    fresh.spectral_radius()
    radius = time.perf_counter() - began
    began = time.perf_counter()
    grown = wiring.expand(5)
    growth = time.perf_counter() - began
    core_bytes = sum(v.nbytes for k, v in BPU(wiring, 1, 1).state_dict().items() if k.startswith("edge"))
    figures = {
        "spectral_radius, s": (radius, 10.0),
        "expand(5), s": (growth, 3.0),
        "core in the state dict, MB": (core_bytes / 1e6, 1.5),
    }
    return {
        "wiring": wiring.source,
        "edges": wiring.num_edges,
        "edges_grown_5_times": grown.num_edges,
        "goals": {
            name: {"value": round(value, 3), "goal": f"<= {limit:g}", "met": value <= limit}
            for name, (value, limit) in figures.items()
        },
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks bpu_speed", description=__doc__)
    parser.add_argument("--connectome", default="larva", help="as model.connectome: larva, generated or a path")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each size and kind of measurement")
    parser.add_argument("--record", action="store_true", help=f"write results/{RESULTS.name}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    wiring = find_connectome(args.connectome)
    rows = [connectome_row(wiring)]
    print(json.dumps(rows[0]), flush=True)
    for batch, steps in SIZES:
        rows.append(measure(wiring, batch, steps, args.seconds))
        print(json.dumps(rows[-1]), flush=True)
    if args.record:
        command = f"python -m benchmarks bpu_speed --seconds {args.seconds:g} --connectome {args.connectome}"
        record = {"benchmark": "bpu_speed", "command": command, "rows": rows, **environment()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RESULTS}")
