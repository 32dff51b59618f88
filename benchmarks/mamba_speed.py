"""Time and memory of Mamba's scan, block and decoding step beside others, on one CPU thread.

Scan: forward and backward, batch 2, 256 channels, 16 states, float32, softplus and bias inside, channel-last. Beside:
the parallel scan of `mambapy` (an optional peer: `pip install --no-deps --target DIR mambapy`, PYTHONPATH=DIR); the
textbook's loop over steps, which is the reference code of the authors, through autograd; and torch's own
`associative_scan` compiled, which needs a C++ compiler. Contestants alternate in one process, and ratios are
of the least times: how many times the time of ours the other takes. The textbook runs once, a minute or two. Peak: what
torch's allocator held at most, beyond the inputs.
"""

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels.selective_scan import selective_scan
from archzoo.layers.mamba import Mamba
from benchmarks._record import environment

RESULTS = Path(__file__).parent / "results" / "mamba_speed.json"
BATCH, CHANNELS, STATES = 2, 256, 16
GOALS = {
    "scan, mambapy/ours at length 1024": 5.0,
    "scan, mambapy/ours at length 4096": 4.0,
    "scan, peak ours/mambapy": 0.5,
    "scan, compiled associative_scan/ours at length 1024": 2.0,
    "scan, textbook/ours at length 1024": 50.0,
    "block, mambapy/ours": 3.5,
    "step, ours/mambapy": 2 / 3,
    "step, token 2000/token 100": 1.0,
    "slope of time over length, 512 to 16384": 1.1,
}
HAS_PEER = importlib.util.find_spec("mambapy") is not None
Call = Callable[[], Any]


# --- Contestants: u, delta (B, L, d), A (d, N), B, C (B, L, N), D, bias (d,) -> y (B, L, d) -------------------------


def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    return selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, delta_bias=bias, delta_softplus=True).mT


def discretised(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and inputs (B, L, d, N), as all that materialise them."""
    delta = F.softplus(delta + bias).unsqueeze(-1)
    return torch.exp(delta * A), delta * B.unsqueeze(2) * u.unsqueeze(-1)


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    states = pscan(*discretised(u, delta, A, B, bias))
    return (states @ C.unsqueeze(-1)).squeeze(3) + D * u


def textbook(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    decay, add = discretised(u, delta, A, B, bias)
    h, ys = torch.zeros_like(add[:, 0]), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + add[:, t]
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(ys, 1) + D * u


def associative(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, states = associative_scan(combine, discretised(u, delta, A, B, bias), dim=1, combine_mode="generic")
    return (states @ C.unsqueeze(-1)).squeeze(3) + D * u


# --- Measuring --------------------------------------------------------------------------------------------------------


def inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    u, delta = torch.randn(BATCH, length, CHANNELS), torch.randn(BATCH, length, CHANNELS)
    B, C = torch.randn(BATCH, length, STATES), torch.randn(BATCH, length, STATES)
    bias = torch.full((CHANNELS,), math.log(math.expm1(0.01)))
    return [t.requires_grad_() for t in (u, delta, A, B, C, torch.ones(CHANNELS), bias)]


def step_of(scan: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    """Forward and backward."""
    dy = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(scan(*tensors), tensors, dy)


def times(calls: dict[str, Call], seconds: float, rounds: int = 3, inner: int = 1) -> dict[str, float]:
    """Least time of each in ms, of `inner` calls in a row; they take turns until the time is up."""
    best = dict.fromkeys(calls, math.inf)
    end, done = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or done < rounds:
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(inner):
                call()
            best[name] = min(best[name], (time.perf_counter() - began) / inner)
        done += 1
    return {name: value * 1e3 for name, value in best.items()}


def peak(call: Call) -> int:
    """Bytes that torch's allocator held at most during the call, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    used = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    return most


def ratios(found: dict[str, float]) -> dict[str, float]:
    return {f"{name}/ours": round(value / found["ours"], 2) for name, value in found.items() if name != "ours"}


def scan(length: int, seconds: float) -> dict[str, Any]:
    tensors = inputs(length)
    calls = {"ours": step_of(ours, tensors)}
    if HAS_PEER:
        calls["mambapy"] = step_of(mambapy, tensors)
    if length == 1024:
        torch._dynamo.reset()
        calls["compiled associative_scan"] = step_of(torch.compile(associative, fullgraph=True), tensors)
    want = ours(*tensors)
    for contestant in (mambapy,) if HAS_PEER else ():
        assert torch.allclose(contestant(*tensors), want, atol=1e-4), contestant.__name__
    for call in calls.values():
        call()
    found = times(calls, seconds)
    if length == 1024:
        found |= times({"textbook": step_of(textbook, tensors)}, 0, rounds=1)
    row: dict[str, Any] = {"what": "scan", "length": length, "ms": {n: round(t, 1) for n, t in found.items()}}
    row |= ratios(found)
    held = {name: peak(calls[name]) for name in ("ours", "mambapy") if name in calls}
    row["peak_MiB"] = {name: round(value / 2**20, 1) for name, value in held.items()}
    if HAS_PEER:
        row["peak ours/mambapy"] = round(held["ours"] / held["mambapy"], 3)
    return row


def slope(seconds: float) -> dict[str, Any]:
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    calls = {str(length): step_of(ours, inputs(length)) for length in lengths}
    found = times(calls, seconds)
    fitted = exponent(lengths, list(found.values()))
    return {"what": "slope", "ms": {name: round(value, 1) for name, value in found.items()}, "slope": round(fitted, 3)}


def exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The slope of values over lengths, both as logarithms, by least squares."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (lengths, values))
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def layers(dim: int) -> tuple[Mamba, Any]:
    """Our mixer, and the peer's with the same parameters, or None."""
    torch.manual_seed(0)
    mixer = Mamba(dim)
    if not HAS_PEER:
        return mixer, None
    from mambapy.mamba import MambaBlock, MambaConfig

    peer = MambaBlock(MambaConfig(d_model=dim, n_layers=1))
    peer.load_state_dict(mixer.state_dict(), strict=True)
    return mixer, peer


def block(seconds: float) -> dict[str, Any]:
    mixer, peer = layers(128)
    x, dy = torch.randn(1, 2048, 128), torch.randn(1, 2048, 128)

    def train(module: Any) -> Call:
        leaves = [x.requires_grad_(), *module.parameters()]
        return lambda: torch.autograd.grad(module(x), leaves, dy)

    calls = {"ours": train(mixer)}
    if peer is not None:
        assert torch.allclose(mixer(x), peer(x), atol=1e-5)
        calls["mambapy"] = train(peer)
    found = times(calls, seconds)
    return {"what": "block", "dim": 128, "length": 2048, "ms": {n: round(t, 1) for n, t in found.items()}} | ratios(
        found
    )


@torch.no_grad()
def step(seconds: float) -> dict[str, Any]:
    """One token after another, batch 1; and whether the 2000th takes longer than the 100th."""
    mixer, peer = layers(128)
    x = torch.randn(1, 1, 128)
    states = mixer.allocate_inference_cache(1)
    calls: dict[str, Call] = {"ours": lambda: mixer.step(x, *states)}
    if peer is not None:
        cache = [(None, torch.zeros(1, 256, 3))]

        def peer_step() -> None:
            _, cache[0] = peer.step(x[:, 0], cache[0])

        calls["mambapy"] = peer_step
    found = times(calls, seconds, rounds=100, inner=5)
    states = mixer.allocate_inference_cache(1)
    tokens = []
    for _ in range(2100):
        began = time.perf_counter()
        mixer.step(x, *states)
        tokens.append(time.perf_counter() - began)
    early, late = (min(tokens[i : i + 100]) for i in (100, 2000))
    row = {"what": "step", "dim": 128, "ms": {n: round(t, 3) for n, t in found.items()}, **ratios(found)}
    if peer is not None:
        row["ours/mambapy"] = round(found["ours"] / found["mambapy"], 3)
    return row | {"token 2000/token 100": round(late / early, 3)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks mamba_speed", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each measurement")
    parser.add_argument("--only", default="scan,slope,block,step", help="names, separated by commas")
    parser.add_argument("--record", action="store_true", help=f"write results/{RESULTS.name}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not HAS_PEER:
        print("mambapy is not installed: no comparison with it (pip install --no-deps --target DIR mambapy)")
    parts: dict[str, list[Callable[[float], dict[str, Any]]]] = {
        "scan": [lambda seconds: scan(1024, seconds), lambda seconds: scan(4096, seconds)],
        "slope": [slope],
        "block": [block],
        "step": [step],
    }
    rows = []
    for name in args.only.split(","):
        for measure in parts[name]:
            rows.append(measure(args.seconds))
            print(json.dumps(rows[-1]), flush=True)
    if args.record:
        command = f"python -m benchmarks mamba_speed --seconds {args.seconds:g}"
        record = {"benchmark": "mamba_speed", "command": command, "goals": GOALS, "rows": rows, **environment()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RESULTS}")
