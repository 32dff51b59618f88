"""Time and memory of mixers against the length of a text, on one CPU thread: attention beside Mamba and others.

Forward and backward of one layer, batch 1, float32, at lengths from 256 to 16384, each twice the one before. Layers
take turns at every length, and times are the least of each. Memory: what torch's allocator held at most, beyond inputs
and parameters. Slopes: of the logarithm of time over that of length, by least squares, over all lengths and over the
last three. `--record` writes results/mixer_cost.json and draws docs/mixer_cost.svg.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.registry import create_layer
from benchmarks._record import environment
from benchmarks.mamba_speed import Call, exponent, peak, times

RESULTS = Path(__file__).parent / "results" / "mixer_cost.json"
PICTURE = Path(__file__).parents[1] / "docs" / "mixer_cost.svg"
LENGTHS = [2**k for k in range(8, 15)]


def step(layer: nn.Module, x: Tensor, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x), leaves, dy)


def measure(mixers: list[str], dim: int, length: int, seconds: float) -> dict[str, Any]:
    calls: dict[str, Call] = {}
    x, dy = torch.randn(1, length, dim), torch.randn(1, length, dim)
    for name in mixers:
        torch.manual_seed(0)
        layer = create_layer(name, dim)
        leaves = [x.requires_grad_(), *layer.parameters()]
        calls[name] = partial(step, layer, x, leaves, dy)
        calls[name]()
    found = times(calls, seconds, rounds=2)
    held = {name: round(peak(call) / 2**20, 2) for name, call in calls.items()}
    return {"length": length, "ms": {name: round(value, 2) for name, value in found.items()}, "peak_MiB": held}


def slopes(rows: list[dict[str, Any]], mixers: list[str], key: str) -> dict[str, dict[str, float]]:
    lengths = [row["length"] for row in rows]
    found = {}
    for name in mixers:
        values = [row[key][name] for row in rows]
        found[name] = {
            "all": round(exponent(lengths, values), 3),
            "last three": round(exponent(lengths[-3:], values[-3:]), 3),
        }
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """Two log-log panels: time and memory against length, with the slopes of the last three lengths."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = record["rows"]
    lengths = [row["length"] for row in rows]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, key, label in zip(panels, ("ms", "peak_MiB"), ("ms, forward and backward", "MiB at most"), strict=True):
        for name, marker in zip(record["mixers"], "osD^vP", strict=False):
            slope = record["slopes"][key][name]["last three"]
            axes.loglog(
                lengths, [row[key][name] for row in rows], marker=marker, ms=4, label=f"{name}: ~ L^{slope:.2f}"
            )
        axes.set_xticks(lengths, [str(length) for length in lengths], rotation=45)
        axes.minorticks_off()
        axes.set_xlabel("length L")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "archzoo"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks mixer_cost", description=__doc__)
    parser.add_argument("--mixers", default="attention,mamba,mamba2", help="registry names, separated by commas")
    parser.add_argument("--dim", type=int, default=128, help="size of a token")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="leave out longer texts")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each length; twice each layer at least")
    parser.add_argument("--record", action="store_true", help=f"write results/{RESULTS.name} and docs/{PICTURE.name}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    mixers, rows = args.mixers.split(","), []
    for length in (length for length in LENGTHS if length <= args.longest):
        rows.append(measure(mixers, args.dim, length, args.seconds))
        print(json.dumps(rows[-1]), flush=True)
    if len(rows) < 3:
        raise SystemExit(f"--longest {args.longest}: must leave three lengths at least, as 1024 does")
    found = {key: slopes(rows, mixers, key) for key in ("ms", "peak_MiB")}
    print(json.dumps({"slopes": found}))
    if args.record:
        command = f"python -m benchmarks mixer_cost --mixers {args.mixers} --dim {args.dim} --seconds {args.seconds:g}"
        record = {"benchmark": "mixer_cost", "command": command, "mixers": mixers, "rows": rows, "slopes": found}
        record |= environment()
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        draw(record, PICTURE)
        print(f"wrote {RESULTS} and {PICTURE}")
