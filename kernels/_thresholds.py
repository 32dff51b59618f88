"""How few numbers an op on a GPU leaves to plain torch: from a committed table; never by timing at run time.

Starting a kernel through a custom op takes longer than a small one runs, and torch's own may start sooner.
`thresholds.json` holds what `tune_thresholds()` measured, as {op: {"sm90": 65536, …}}: the numbers below which the op
takes plain torch on a device of that compute capability, 0 where Triton never was the slower. A pair that is not there
was not measured, and takes Triton. What counts as a number of an op, `COUNTED` says in words.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels._block_sizes import _capability
from archzoo.kernels._tracing import constant, is_exporting

TABLE = Path(__file__).with_name("thresholds.json")
LEAST, MOST = 12, 24
"""Powers of two: how many numbers `tune_thresholds` tries."""

Table = dict[str, dict[str, int]]
_table: Table = json.loads(TABLE.read_text())  # now: dynamo would trace a later reading

COUNTED = {
    "selective_scan": "u, times the states of a channel",
    "ssd": "x, times the states of a head",
    "selective_state_update": "the state",
    "causal_conv1d": "x",
    "basis_linear": "x; each kind of basis by itself",
    "basis_conv2d": "x; each kind of basis by itself",
    "rational": "x",
    "normalized_residual": "h",
    "normalize": "the weight",
    "aptx_linear": "x, times the outputs",
    "nmu_product": "x, times the outputs",
    "wavelet_linear": "x, times the outputs",
    "aptx_conv2d": "patches, times the numbers of gamma",
    "wavelet_conv2d": "patches, times the numbers of the weight",
    "paon_linear": "the result",
    "paon_conv2d": "the result",
    "kron_sum": "S, times the numbers of one factor of A",
    "kron_linear": "S, times the numbers of one factor of A",
    "capsule_routing": "examples, times the numbers of the weight",
}


def capability_key(device: torch.device) -> str:
    """Of a device in the table."""
    return f"sm{_capability(device)}"


def is_below(op: str, numbers: int | None, x: Tensor) -> bool:
    """Whether so many numbers, by default those of x, are too few for the op's kernels on its device.

    By shapes alone, so that equal runs choose alike. A compiled graph for any size has one guard for it, and none where
    the table has no entry, or the least size is above; an exported one, which may have none, takes plain torch only if
    all its sizes are below.
    """
    if op not in _table or not (threshold := _threshold(op, x.device)):
        return False
    numbers = x.numel() if numbers is None else numbers
    if isinstance(numbers, int) and not torch.compiler.is_compiling():
        return numbers < threshold
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    return (statically_known_true if is_exporting() else guard_or_false)(numbers < threshold)


@constant
def _threshold(op: str, device: torch.device) -> int:
    return _table[op].get(capability_key(device), 0)


# --- Measuring --------------------------------------------------------------------------------------------------------


def tune_thresholds(*ops: str, path: str | os.PathLike[str] = TABLE) -> Table:
    """Measures anew how few numbers ops leave to plain torch on the current CUDA device, and writes the table.

    Forward and backward, in float32, of calls that follow one another, as in training: of small sizes that is the time
    it takes to start them, so the processor counts too. What is written holds for this device's compute capability from
    the next start of Python on; entries of other capabilities stay.

    Args:
        ops: Keys of the table, as `"rational"` and `"basis_linear:cubic"`; by default all.
        path: The table.

    Returns:
        The whole table.

    Raises:
        RuntimeError: If there is no CUDA device.
        ValueError: If an op is unknown, or has no threshold.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune_thresholds() measures on a CUDA device, and there is none")
    from archzoo.kernels._threshold_problems import PROBLEMS

    unknown = [op for op in ops if op not in PROBLEMS]
    if unknown:
        raise ValueError(f"ops={unknown}: must be among {', '.join(PROBLEMS)}")
    device = torch.device("cuda", torch.cuda.current_device())
    return write({op: measure(op, device)[0] for op in ops or PROBLEMS}, device, path)


def write(found: dict[str, int], device: torch.device, path: str | os.PathLike[str] = TABLE) -> Table:
    """Puts thresholds of ops on a device into the table of a file, or else into the committed one, for that file."""
    file = Path(path)
    table: Table = json.loads((file if file.exists() else TABLE).read_text())
    for op, threshold in found.items():
        table.setdefault(op, {})[capability_key(device)] = threshold
    file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return table


def measure(op: str, device: torch.device) -> tuple[int, dict[int, dict[str, float]]]:
    """The threshold of an op on a device, and for each size that was tried the seconds of each backend."""
    from archzoo.kernels._backend import use_backend
    from archzoo.kernels._threshold_problems import PROBLEMS, WITHOUT_BACKWARD, Draw

    tried: dict[int, dict[str, float]] = {}

    def triton_is_slower(exponent: int) -> bool:
        function, tensors = PROBLEMS[op](Draw(device), 2**exponent)
        times = tried[2**exponent] = {}
        for backend in ("torch", "triton"):
            with use_backend(backend):
                times[backend] = _seconds(_passes(function, tensors, op not in WITHOUT_BACKWARD))
        return times["triton"] > times["torch"]

    return crossing(triton_is_slower), tried


def crossing(slower: Callable[[int], bool], least: int = LEAST, most: int = MOST) -> int:
    """The power of two from which Triton is not the slower, by bisection; 0 if it is not at the least.

    Where it still is at the largest, twice that: what lies beyond was not tried.
    """
    if not slower(least):
        return 0
    above = most + 1
    while above - least > 1:
        middle = (least + above) // 2
        least, above = (middle, above) if slower(middle) else (least, middle)
    return int(2**above)


def _passes(function: Callable[..., Any], tensors: Any, backward: bool) -> Callable[[], Any]:
    """A call of the function, and of its gradient."""
    if not backward:
        return lambda: function(*tensors)
    leaves = [t.requires_grad_() for t in tensors]
    dy = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


def _seconds(call: Callable[[], Any], rounds: int = 5, at_once: int = 20, enough: float = 5e-3) -> float:
    """Of a call in a row of calls, the least of some rounds; `do_bench` would hide what it takes to start one."""

    def each(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    each(2)  # compiles
    count = max(1, min(at_once, int(enough / each(1))))
    return min(each(count) for _ in range(rounds))
