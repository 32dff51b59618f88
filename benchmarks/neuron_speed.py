"""Time and memory of APTx, NMU, PAON and PHM layers beside textbook forms and the usual layer, on one CPU thread.

A textbook form is what public code does, written out plainly: every product of an input and a weight, or every power
of an input, as one tensor, and autograd. For APTx that is PyPI's `aptx_neuron` where it is installed (0.0.10 was), and
the same formula written out here where it is not; `peer` tells which. Contestants take turns in one process, and ratios
are of their least CPU times, forward and backward. Kept: what autograd holds for the backward pass besides x and the
parameters. Peak: the most that forward and backward allocate at one time, results included.
"""

import argparse
import importlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import archzoo
from benchmarks._record import environment
from benchmarks.kan_speed import kept

RESULTS = Path(__file__).parent / "results" / "neuron_speed.json"


class TextbookAPTx(nn.Module):
    """The formula of the paper as its package has it: three (batch, out, in) tensors are kept."""

    def __init__(self, i: int, o: int):
        super().__init__()
        self.alpha, self.beta, self.gamma = (nn.Parameter(torch.randn(o, i)) for _ in range(3))
        self.delta = nn.Parameter(torch.zeros(o))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return ((self.alpha + torch.tanh(self.beta * x)) * self.gamma * x).sum(2) + self.delta


class TextbookNMU(nn.Module):
    """The product of all factors, which are a (batch, out, in) tensor."""

    def __init__(self, i: int, o: int):
        super().__init__()
        self.weight = nn.Parameter(0.25 + 0.5 * torch.rand(o, i))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.clamp(0, 1)
        return torch.prod(x.unsqueeze(1) * w + 1 - w, -1)


class TextbookPaon(nn.Module):
    """Powers, a map of each for every degree, sums of them, and the quotient (arXiv 2403.11791)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.numerator, self.denominator, self.bias = layer.numerator, layer.denominator, layer.bias
        self.smooth, self.eps, self.padding = layer.variant == "smooth", layer.eps, getattr(layer, "padding", None)

    def map(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) if self.padding is None else F.conv2d(x, weight, padding=self.padding)

    def forward(self, x: Tensor) -> Tensor:
        powers = [x**k for k in range(1, 1 + max(len(self.numerator), len(self.denominator)))]
        p = [self.map(power, w) for power, w in zip(powers, self.numerator, strict=False)]
        q = [self.map(power, v) for power, v in zip(powers, self.denominator, strict=False)]
        bias = self.bias if self.padding is None else self.bias[:, None, None]
        below, above = bias + sum(p[:-1]), bias + sum(p)
        if not self.smooth:
            return above / (1 + sum(term.abs() for term in q))
        before, last = 1 + sum(q[:-1]), 1 + sum(q)
        return (last * above + before * below) / (last**2 + before**2 + (self.eps if len(q) > 1 else 0))


@dataclass
class Case:
    """A layer, what it is compared with, and what is aimed at."""

    name: str
    shape: str
    x: Tensor
    layers: dict[str, nn.Module]
    """`ours` and others."""
    faster: dict[str, float] = field(default_factory=dict)
    """How many times our time another must take, at least."""
    slower: dict[str, float] = field(default_factory=dict)
    """How many times another's time ours may take, at most."""
    kept: dict[str, float] = field(default_factory=dict)
    """What part of another's kept memory ours may be, at most."""
    peak: float | None = None
    """Bytes that ours must stay below."""
    notes: dict[str, Any] = field(default_factory=dict)


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)


def peak(layer: nn.Module, x: Tensor, dy: Tensor) -> int:
    """The most bytes that a step has allocated at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = step(layer, x, dy)
    used = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    assert most >= sum(t.nbytes for t in found), "the profiler misses allocations"
    return most


def race(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Least CPU time of each, in ms; they take turns until the time is up."""
    best = dict.fromkeys(functions, math.inf)
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 5:
        for name, function in functions.items():
            for _ in range(3):
                began = time.process_time()
                function()
                best[name] = min(best[name], time.process_time() - began)
        rounds += 1
    return {name: value * 1e3 for name, value in best.items()}


def measure(case: Case, seconds: float) -> dict[str, Any]:
    x = case.x.requires_grad_()
    dy = torch.randn_like(case.layers["ours"](x).detach())
    times = race({name: lambda layer=layer: step(layer, x, dy) for name, layer in case.layers.items()}, seconds)
    with torch.no_grad():
        forward = race({name: lambda layer=layer: layer(x) for name, layer in case.layers.items()}, seconds / 3)
    held = {name: kept(layer, x) for name, layer in case.layers.items()}
    most = {name: peak(layer, x, dy) for name, layer in case.layers.items()}
    goals: dict[str, tuple[float, str, float]] = {}
    for other, limit in case.faster.items():
        goals[f"{other}/ours"] = times[other] / times["ours"], ">=", limit
    for other, limit in case.slower.items():
        goals[f"ours/{other}"] = times["ours"] / times[other], "<=", limit
    for other, limit in case.kept.items():
        goals[f"kept, ours/{other}"] = held["ours"] / held[other], "<=", limit
    if case.peak is not None:
        goals["peak, MiB"] = most["ours"] / 2**20, "<=", case.peak / 2**20
    return {
        "layer": case.name,
        "shape": case.shape,
        "ms": {name: round(value, 4) for name, value in times.items()},
        "forward_ms": {name: round(value, 4) for name, value in forward.items()},
        "kept_MiB": {name: round(value / 2**20, 3) for name, value in held.items()},
        "peak_MiB": {name: round(value / 2**20, 3) for name, value in most.items()},
        "goals": {
            name: {
                "value": round(value, 3),
                "goal": f"{sign} {limit:g}",
                "met": value >= limit if sign == ">=" else value <= limit,
            }
            for name, (value, sign, limit) in goals.items()
        },
        **case.notes,
    }


def aptx() -> Iterator[Case]:
    if importlib.util.find_spec("aptx_neuron") is None:
        textbook, peer = TextbookAPTx(784, 128), "the published formula; aptx_neuron is not installed"
    else:
        textbook, peer = importlib.import_module("aptx_neuron").aptx_layer(784, 128), "aptx_neuron"
    for groups in (None, 8):
        layers = {"ours": archzoo.create_layer("aptx", 784, 128, beta_groups=groups), "textbook": textbook}
        yield Case(
            "aptx" if groups is None else f"aptx, beta_groups={groups}",
            "256 x 784 -> 128",
            torch.randn(256, 784),
            layers | {"linear": nn.Linear(784, 128)},
            faster={"textbook": 6.0},
            peak=25 * 2**20,
            notes={"peer": peer},
        )


def nmu() -> Iterator[Case]:
    for b, i, o, times in ((128, 256, 256, 8.0), (128, 100, 2, 1.0), (128, 2, 1, 1.0)):
        # Where all factors are positive the gradient may divide; where inputs have both signs it may not.
        for inputs, x in (("U(0.5, 1.5)", 0.5 + torch.rand(b, i)), ("N(0, 1)", torch.randn(b, i))):
            yield Case(
                f"nmu, inputs {inputs}",
                f"{b} x {i} -> {o}",
                x,
                {"ours": archzoo.create_layer("nmu", i, o), "textbook": TextbookNMU(i, o), "linear": nn.Linear(i, o)},
                faster={"textbook": times},
                peak=b * i * o / 8 * 4 if o > 2 else None,
            )


def paon() -> Iterator[Case]:
    shapes: dict[str, tuple[str, Tensor, nn.Module, tuple[Any, ...], dict[str, Any]]] = {
        "paon": ("256 x 784 -> 128", torch.randn(256, 784), nn.Linear(784, 128), (784, 128), {}),
        "paon_conv2d": (
            "16 x 64 x 32 x 32 -> 64, 3 x 3",
            torch.randn(16, 64, 32, 32),
            nn.Conv2d(64, 64, 3, padding=1),
            (64, 64, 3),
            {"padding": 1},
        ),
    }
    for name, (shape, x, plain, sizes, how) in shapes.items():
        for variant in ("smooth", "absolute"):
            for m, n in ((1, 1), (2, 2), (3, 3)):
                ours = archzoo.create_layer(name, *sizes, **how, degrees=(m, n), variant=variant)
                for parameter in ours.parameters():  # the higher degrees start at 0, which may be cheaper
                    nn.init.normal_(parameter, std=0.01)
                yield Case(
                    f"{name} [{m}/{n}] {variant}",
                    shape,
                    x.clone(),
                    {"ours": ours, "textbook": TextbookPaon(ours), "plain": plain},
                    slower={"plain": 1.25 * (m + n)},
                    kept={"textbook": 0.5},
                )


def phm() -> Iterator[Case]:
    for rows, limit in ((256, 1.4), (1, 1.0)):
        for n in (4, 8):
            yield Case(
                f"phm, n={n}",
                f"{rows} x 2048 -> 2048",
                torch.randn(rows, 2048),
                {"ours": archzoo.create_layer("phm", 2048, 2048, n=n), "linear": nn.Linear(2048, 2048)},
                slower={"linear": limit},
            )


CASES: dict[str, Callable[[], Iterator[Case]]] = {"aptx": aptx, "nmu": nmu, "paon": paon, "phm": phm}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks neuron_speed", description=__doc__)
    parser.add_argument("--layers", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each layer and size")
    parser.add_argument("--record", action="store_true", help=f"write results/{RESULTS.name}")
    args = parser.parse_args(argv)
    for name in args.layers.split(","):
        if name not in CASES:
            parser.error(f"argument --layers: {name!r}: must be among {', '.join(CASES)}")
    torch.set_num_threads(1)
    rows = []
    for name in args.layers.split(","):
        torch.manual_seed(0)
        for case in CASES[name]():
            rows.append(measure(case, args.seconds))
            print(json.dumps(rows[-1]), flush=True)
    if args.record:
        which = "" if args.layers == ",".join(CASES) else f" --layers {args.layers}"
        command = f"python -m benchmarks neuron_speed --seconds {args.seconds:g}{which}"
        record = {"benchmark": "neuron_speed", "command": command, "rows": rows, **environment()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RESULTS}")
