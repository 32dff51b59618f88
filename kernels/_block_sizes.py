"""Block sizes of Triton kernels: from a committed table, or else a rule; never by timing at run time.

Autotuning goes by the clock: two ranks, or a run and its resumption, pick differently, and then sum in another order.
`block_sizes.json` holds what `tune()` measured, as {op: {"sm90 bfloat16 16384x4096": {"ROWS": 1, …}}}: the device's
compute capability, the dtype, and the sizes that matter to the op, each rounded up to a power of two.
"""

import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("block_sizes.json")
TUNED_DTYPES = (torch.float32, torch.bfloat16)

Blocks = dict[str, int]
"""Constexprs of a kernel and options of the compiler, by name."""

_forced: dict[str, Blocks] = {}


def power_of_two(n: int) -> int:
    """The least power of two that is n or more, and 1 or more."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class BlockSizes:
    """Those of one pass of an op.

    Args:
        op: Name of the pass, `<op>` or `<op>_backward`; the key in the table.
        rule: For (dtype, *sizes) the block sizes where the table has none. It sees sizes rounded up to powers of two.
        candidates: What `tune()` tries beside the rule's, for the same.
        problem: For (dtype, device, *sizes) a function that does the pass once. On the `meta` device as well, from
            where the test that compiles all kernels learns what would be launched.
        sizes: For which `tune()` measures, and that test compiles; sizes that users have, and all branches of the rule.
    """

    op: str
    rule: Callable[..., Blocks]
    candidates: Callable[..., Sequence[Blocks]]
    problem: Callable[..., Callable[[], Any]]
    sizes: Sequence[tuple[int, ...]]

    def of(self, x: Tensor, *sizes: int) -> Blocks:
        """The block sizes for a tensor's dtype and device, and the sizes of the problem."""
        if self.op in _forced:
            return _forced[self.op]
        rounded = [power_of_two(size) for size in sizes]
        found = _table().get(self.op, {}).get(_key(_capability(x.device), x.dtype, rounded))
        return self.rule(x.dtype, *rounded) if found is None else found

    @contextmanager
    def forced(self, **blocks: int) -> Iterator[None]:
        """These block sizes, whatever the problem: for tuning and for tests. Not to be nested."""
        _forced[self.op] = blocks
        try:
            yield
        finally:
            del _forced[self.op]


@functools.cache
def _table() -> dict[str, dict[str, Blocks]]:
    return json.loads(TABLE.read_text())


def _key(capability: int, dtype: torch.dtype, sizes: Sequence[int]) -> str:
    return f"sm{capability} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes))}"


def _capability(device: torch.device) -> int:
    """90 for sm_90; 0 where there is no GPU, of which the table has nothing."""
    return _capability_of_gpu(device.index) if device.type == "cuda" else 0


@functools.cache
def _capability_of_gpu(index: int | None) -> int:
    if not torch.cuda.is_available():  # a fake tensor, as where a graph is made for another machine
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def all_tuned() -> dict[str, BlockSizes]:
    """Of every op that has a Triton kernel, by the name of the pass. Imports triton."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("_*_triton.py"))
    modules = [importlib.import_module(f"archzoo.kernels.{name}") for name in names]
    return {sizes.op: sizes for module in modules for sizes in module.TUNED}


def tune(*ops: str, path: str | os.PathLike[str] = TABLE) -> dict[str, dict[str, Blocks]]:
    """Measures block sizes anew on the current CUDA device, and writes the table that ops take them from.

    What is written holds for this device's compute capability from the next start of Python on; entries of other
    capabilities stay. Gradients then differ from those before in their last bits, as sums have another order.

    Args:
        ops: Names of passes, as `"rational"` and `"rational_backward"`; by default all.
        path: The table.

    Returns:
        The whole table.

    Raises:
        RuntimeError: If there is no CUDA device.
        ValueError: If an op is unknown, or has no Triton kernel.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune() measures on a CUDA device, and there is none")
    known = all_tuned()
    unknown = [op for op in ops if op not in known]
    if unknown:
        raise ValueError(f"ops={unknown}: must be among {', '.join(sorted(known))}")
    device = torch.device("cuda", torch.cuda.current_device())
    file = Path(path)
    table: dict[str, dict[str, Blocks]] = json.loads(file.read_text()) if file.exists() else {}
    for op in ops or sorted(known):
        entries = table.setdefault(op, {})
        for dtype in TUNED_DTYPES:
            for sizes in known[op].sizes:
                key = _key(_capability(device), dtype, [power_of_two(size) for size in sizes])
                entries[key] = _best(known[op], dtype, device, sizes)
    file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return table


def _best(tuned: BlockSizes, dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> Blocks:
    """The fastest candidate; the first of equals, so the rule's own where nothing is faster."""
    run, rounded = tuned.problem(dtype, device, *sizes), [power_of_two(size) for size in sizes]
    found, least = tuned.rule(dtype, *rounded), float("inf")
    for blocks in [found, *tuned.candidates(dtype, *rounded)]:
        with tuned.forced(**blocks):
            time = _milliseconds(run)
        if time < least:
            found, least = blocks, time
    return found


def _milliseconds(run: Callable[[], Any]) -> float:
    """Median time; infinite for block sizes that need more of the device than it has."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(run, quantiles=[0.5]))
    except OutOfResources:
        return float("inf")
