"""How a case is measured: its contestants run and must agree, then are timed; on a GPU, a CPU, or as a test has it.

A tolerance here only makes sure that all compute one function, since public code rounds 16-bit numbers where ours does
not; how exact ours is, the tests say. The errors found are in the record.
"""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._cases import H200, Ceilings, Contestant, Inputs, Make, Op, Size, leaves_of

OURS, DEFINITION, COMPILED = "ours", "definition", "definition, compiled"
OURS_COMPILED = "ours, compiled"
"""On a CPU, where some ops leave their place to the definition when they are compiled; no alternative to ours."""
Times = dict[str, dict[str, float]]
"""Of each contestant ms: the least, and the quantiles p20, p50, p80."""
Call = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """What measuring needs of a device; a test brings its own.

    Args:
        where: `"gpu"` or `"cpu"`, whose goals, sizes and peers hold.
        place: torch's name of it.
        race: For calls by name the times of each.
        peak: Bytes that a call holds at most beyond what was held before.
        free: Bytes of memory that can be had.
        decides: Which of the times ratios are of.
        ceilings: Rates for floors; None where there are no floors.
    """

    where: str
    place: str
    race: Callable[[Mapping[str, Call]], Times]
    peak: Callable[[Call], int]
    free: Callable[[], float]
    decides: str = "p50"
    ceilings: Ceilings | None = H200


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Of times in ms."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return {"least": ordered[0], "p20": at(0.2), "p50": statistics.median(ordered), "p80": at(0.8)}


# --- Running ----------------------------------------------------------------------------------------------------------


def cotangent(y: Tensor) -> Tensor:
    """The same for every contestant, of both signs, and laid out as its own output is, which suits it."""
    ramp = torch.arange(y.numel(), device=y.device, dtype=torch.float32)
    return torch.empty_like(y).copy_(torch.sin(ramp.mul_(0.7)).view(y.shape))


def forward_and_backward(contestant: Contestant, dy: Tensor) -> Call:
    leaves = list(contestant.leaves.values())
    return lambda: torch.autograd.grad(contestant.call(), leaves, dy)


def forward(contestant: Contestant) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return contestant.call()

    return call


def values(contestant: Contestant) -> dict[str, Tensor]:
    """The output `y` and the gradients, by the names of the leaves."""
    if not contestant.leaves:
        return {"y": forward(contestant)().detach()}
    y = contestant.call()
    gradients = torch.autograd.grad(y, list(contestant.leaves.values()), cotangent(y))
    return {"y": y.detach(), **dict(zip(contestant.leaves, gradients, strict=True))}


def error(found: Tensor, wanted: Tensor) -> float:
    """By root mean square, relative to what is wanted; NaN if any number is."""
    wide = torch.float64 if wanted.dtype == torch.float64 else torch.float32
    difference = torch.linalg.vector_norm(found.to(wide) - wanted.to(wide))
    return float(difference / torch.linalg.vector_norm(wanted.to(wide)).clamp_min(torch.finfo(wide).tiny))


def allowed(dtype: torch.dtype, name: str) -> float:
    """Values and gradients; products of float32 may be by tf32."""
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-3}.get(dtype, 5e-2)
    return tolerance if name == "y" else 2 * tolerance


def disagreement(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str | None]:
    """The largest error of what both have, and what is wrong, if it is too large."""
    errors = {name: error(found[name], wanted[name]) for name in wanted if name in found}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    bad = [
        f"{name} by {value:.1e}, allowed {allowed(wanted[name].dtype, name):.0e}"
        for name, value in errors.items()
        if not value <= allowed(wanted[name].dtype, name)
    ]
    return errors[worst], f"differs from ours: {', '.join(bad)}" if bad else None


def repeatable(contestant: Contestant) -> bool:
    """Whether a second run gives the same bits."""
    first, second = values(contestant), values(contestant)
    return all(torch.equal(first[name], second[name]) for name in first)


def graph_breaks(op: Op, inputs: Inputs) -> tuple[int, str]:
    """Of our op under torch.compile, forward and backward, and what broke the graph first."""
    torch._dynamo.reset()
    try:
        compiled = torch.compile(op.ours, fullgraph=True, backend="aot_eager", dynamic=False)
        values(op.contestant(compiled, inputs))
    except torch._dynamo.exc.TorchDynamoException as broken:
        torch._dynamo.reset()
        return max(1, _count_breaks(op, inputs)), first_line(broken)
    return 0, ""


def _count_breaks(op: Op, inputs: Inputs) -> int:
    try:
        return torch._dynamo.explain(op.ours)(**inputs).graph_break_count
    except torch._dynamo.exc.TorchDynamoException:  # it does not get through at all
        return 1


def first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:300]


# --- Floors -----------------------------------------------------------------------------------------------------------


def nbytes(tensors: Sequence[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def floors(op: Op, size: Size, inputs: Inputs, y: Tensor, ceilings: Ceilings) -> dict[str, Any]:
    """Least times in ms, and what binds each pass. Inputs are read once and results written once."""
    work_forward, work_backward = op.work(size, op.dtype)
    read, written = nbytes(list(inputs.values())), nbytes([y])
    f, binds_f = ceilings.floor(work_forward, read + written, op.dtype)
    found: dict[str, Any] = {
        "f_ms": f,
        "f_binds": binds_f,
        "f_bytes": int(read + written + work_forward.extra_bytes),
        "f_flops": {"tensor": work_forward.tensor, "pipe": work_forward.pipe, "special": work_forward.special},
    }
    if op.backward:
        gradients = nbytes(list(leaves_of(inputs, op.constant).values()))
        b, binds_b = ceilings.floor(work_backward, read + written + gradients, op.dtype)
        found |= {
            "fb_ms": f + b,
            "b_binds": binds_b,
            "b_bytes": int(read + written + gradients + work_backward.extra_bytes),
            "b_flops": {"tensor": work_backward.tensor, "pipe": work_backward.pipe, "special": work_backward.special},
        }
    return found


def planned_floors(op: Op, size: Size, ceilings: Ceilings) -> dict[str, Any]:
    """The same without a GPU and without memory: of shapes alone."""
    inputs = op.inputs(size, Make("meta", op.dtype))
    with torch.no_grad():
        return floors(op, size, inputs, op.ours(**inputs), ceilings)


# --- A case -----------------------------------------------------------------------------------------------------------


def measure(op: Op, size: Size, dtype: torch.dtype, device: Device, part: str = "eager", breaks: bool = True) -> Row:
    """Runs, compares and times the contestants of a case.

    Args:
        op: The op.
        size: Of its inputs.
        dtype: Of its inputs.
        device: Where, and how.
        part: `"eager"`: ours, the definition and all peers. `"compiled"`: ours and the compiled definition, on a CPU
            ours compiled too. `"all"`.
        breaks: Whether to look for graph breaks, once an op.

    Returns:
        A row: of each contestant its times and `f_ratio`, `fb_ratio` to ours, or why there are none (`missing`,
        `skipped`, `error`); what is known of ours.
    """
    row: Row = {"op": op.name, "size": dict(size), "dtype": str(dtype).removeprefix("torch."), "contestants": {}}
    said: dict[str, dict[str, Any]] = row["contestants"]
    inputs = op.build(size, device.place, dtype)
    ours = op.contestant(op.ours, inputs)
    wanted = values(ours)
    runners = {OURS: ours}
    said[OURS] = {}
    torch._dynamo.reset()  # or the cases together come to its limit of recompilations
    for name, build, reason in _others(op, size, device, part, inputs):
        if reason is None:
            said[name], runner = _try(name, build, wanted)
            if runner is not None:
                runners[name] = runner
        else:
            said[name] = reason
    _time(runners, op.backward, device, said)
    if part != "compiled":
        row |= _about_ours(op, size, inputs, ours, wanted["y"], device, breaks)
        compared = {goal.against for goal in op.goals if goal.what == "peak" and goal.where == device.where}
        for name in compared & runners.keys():
            said[name]["peak_bytes"] = _peak(runners[name], device)
    return row


_Builder = Callable[[], Contestant]


def _others(
    op: Op, size: Size, device: Device, part: str, inputs: Inputs
) -> list[tuple[str, _Builder, dict[str, str] | None]]:
    """All but ours: name, what builds it, and why it is not to be built, if so."""
    itemsize, free = inputs_itemsize(inputs), device.free()

    def room(needed: float) -> dict[str, str] | None:
        if needed <= 0.8 * free:
            return None
        return {"skipped": f"needs about {needed / 1e9:.3g} GB, of {free / 1e9:.3g} GB free"}

    found: list[tuple[str, _Builder, dict[str, str] | None]] = []
    if part in ("eager", "all"):
        definition = partial(op.contestant, op.definition, inputs)
        found.append((DEFINITION, definition, room(op.memory(size, itemsize))))
        for peer in op.peers:
            if device.where in peer.where:
                reason = room(peer.memory(size, itemsize) if peer.memory else 0)
                if (refused := peer.refuse(size)) is not None:
                    reason = {"skipped": refused}
                if (missing := peer.missing()) is not None:
                    reason = {"missing": missing}
                found.append((peer.name, lambda peer=peer: peer.build(inputs), reason))
    if part in ("compiled", "all"):
        needed = room(op.memory(size, itemsize))
        found.append((COMPILED, lambda: _compiled(op, op.definition, inputs), needed))
        if device.where == "cpu":
            found.append((OURS_COMPILED, lambda: _compiled(op, op.ours, inputs), needed))
    return found


def inputs_itemsize(inputs: Inputs) -> int:
    return min(t.element_size() for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point())


def _compiled(op: Op, function: Callable[..., Tensor], inputs: Inputs) -> Contestant:
    return op.contestant(torch.compile(function, fullgraph=True, dynamic=False), inputs)


def _try(name: str, build: _Builder, wanted: Mapping[str, Tensor]) -> tuple[dict[str, Any], Contestant | None]:
    """Runs a contestant once: what there is to say of it, and it itself if it may be timed. What fails, says so."""
    try:
        contestant = build()
        found = values(contestant)
        worst, wrong = (None, None) if contestant.yardstick else disagreement(found, wanted)
    except torch.OutOfMemoryError:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {"skipped": "out of memory"}, None
    except Exception as problem:  # a peer may fail in any way, and the others are to be measured all the same
        if fatal(problem):
            raise RuntimeError(f"{name}: {problem}") from problem
        return {"error": first_line(problem)}, None
    if wrong:
        return {"error": wrong}, None
    return ({"yardstick": True} if worst is None else {"difference": worst}), contestant


def fatal(problem: BaseException) -> bool:
    """Whether CUDA can do nothing more in this process."""
    text = str(problem)
    return any(sign in text for sign in _FATAL)


_FATAL = ("illegal memory access", "misaligned address", "illegal instruction", "device-side assert", "launch failure")


def _time(runners: Mapping[str, Contestant], backward: bool, device: Device, said: dict[str, dict[str, Any]]) -> None:
    passes = {"f": {name: forward(runner) for name, runner in runners.items()}}
    if backward:
        dys: dict[Any, Tensor] = {}  # contestants whose outputs are alike share one

        def dy(runner: Contestant) -> Tensor:
            y = forward(runner)()
            return dys.setdefault((y.shape, y.stride(), y.dtype), cotangent(y))

        passes["fb"] = {name: forward_and_backward(runner, dy(runner)) for name, runner in runners.items()}
    for name_of_pass, calls in passes.items():
        times = device.race(calls)
        base = times[OURS][device.decides]
        for name, found in times.items():
            said[name][f"{name_of_pass}_ms"] = {key: round(value, 5) for key, value in found.items()}
            said[name][f"{name_of_pass}_ratio"] = round(found[device.decides] / base, 3)


def _peak(runner: Contestant, device: Device) -> int:
    if not runner.leaves:
        return device.peak(forward(runner))
    return device.peak(forward_and_backward(runner, cotangent(forward(runner)())))


def _about_ours(op: Op, size: Size, inputs: Inputs, ours: Contestant, y: Tensor, device: Device, breaks: bool) -> Row:
    row: Row = {"io_bytes": nbytes(list(inputs.values())) + nbytes([y]), "peak_bytes": _peak(ours, device)}
    if op.backward:
        row["repeatable"] = repeatable(ours)
    if breaks:
        row["graph_breaks"], why = graph_breaks(op, inputs)
        if why:
            row["graph_break"] = why
    if device.ceilings is not None:
        row["floor"] = floors(op, size, inputs, y, device.ceilings)
    return row
