"""What every op with a Triton kernel is tested by: `from tests.kernels.triton_support import check_values, …`.

A test that takes the fixture `backend` (in `conftest.py`) runs on plain torch and on Triton. Without a GPU Triton is
its interpreter, 5 to 20 ms a program: shapes are tiny, and `BlockSizes.forced` makes blocks small enough for several.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from archzoo.kernels import use_backend
from archzoo.kernels._backend import HAS_TRITON
from tests.helpers import rms_error, sampled, value_and_grads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels run: tests that take `backend` make their tensors there, by torch's default device."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OF_TILES = sampled(DTYPES, {torch.float64, torch.bfloat16})
"""Dtypes for what does not depend on them: the one with the tightest bounds, and one that is widened and rounded."""

# dtype: forward, gradients, gradients that are summed over a batch. The table of kernels.md.
_TOLERANCES = {
    torch.float64: (1e-12, 1e-11, 1e-11),
    torch.float32: (2e-6, 5e-6, 2e-5),
    "tf32": (1e-3, 2e-3, 2e-3),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def tolerance(dtype: torch.dtype, kind: int, tf32: bool = False) -> float:
    """Allowed error by root mean square: `kind` 0 for a value, 1 for a gradient, 2 for one summed over a batch."""
    return _TOLERANCES["tf32" if tf32 and dtype == torch.float32 else dtype][kind]


def check_values(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dy: Tensor,
    summed: Sequence[int],
    *,
    tf32: bool = False,
) -> None:
    """Holds an op's value and gradients to its definition in float64, with tolerances by the dtype of each.

    Args:
        function: The op.
        reference: Its definition.
        inputs: Of it.
        dy: Gradient of its output.
        summed: Which inputs are parameters, whose gradients are summed over a batch.
        tf32: Whether products of float32 are by tf32.
    """
    truth = value_and_grads(reference, [t.double() for t in inputs], dy.double())
    before = [t.clone() for t in (*inputs, dy)]
    got = value_and_grads(function, inputs, dy)
    for old, t in zip(before, (*inputs, dy), strict=True):
        assert torch.equal(old.nan_to_num(), t.nan_to_num()), "an input was written"
    kinds = [0, *(2 if index in summed else 1 for index in range(len(inputs)))]
    for at, (out, want, kind) in enumerate(zip(got, truth, kinds, strict=True)):
        name = f"gradient of input {at - 1}" if at else "value"
        assert at == 0 or out.dtype == inputs[at - 1].dtype, f"{name}: {out.dtype}"
        error, bound = rms_error(out, want), tolerance(out.dtype, kind, tf32)
        assert error <= bound, f"{name} in {out.dtype}: {error:.1e}, allowed {bound:.1e}"


def check_repeats(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> None:
    """Two runs give the same bits."""
    first, second = (value_and_grads(function, inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_compiles(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, op: str) -> None:
    """One graph, without a break, in which the work is one op, whose result is that of eager; and so for export."""
    graphs = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    got = value_and_grads(torch.compile(function, fullgraph=True, backend=backend), inputs, dy)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert [str(n.target) for n in graphs[0].graph.nodes if "archzoo" in str(n.target)] == [f"archzoo.{op}.default"]
    want = value_and_grads(function, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    check_exports(function, inputs, op)


def check_exports(function: Callable[..., Tensor], inputs: Sequence[Tensor], op: str) -> None:
    """A graph in which the work is one op, whose result is that of eager."""

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*inputs)

    want = function(*inputs)
    exported = torch.export.export(Module(), tuple(inputs))
    assert [str(n.target) for n in exported.graph.nodes if "archzoo" in str(n.target)] == [f"archzoo.{op}.default"]
    with use_backend("torch"):  # the graph holds the choice
        assert torch.equal(exported.module()(*inputs), want)


def check_autocast(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> None:
    """Autocast changes nothing in an op that keeps its input's dtype."""
    want = value_and_grads(function, inputs, dy)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = value_and_grads(function, inputs, dy)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


def check_refusals(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Inside `use_backend("triton")` nothing else takes the kernel's place, and no wrong number comes out."""
    with use_backend("triton"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        with pytest.raises(RuntimeError, match="a gradient of a gradient has no Triton kernel"):
            torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"a torch\.func transform has no Triton kernel"):
            torch.func.grad(lambda *own: function(*own).sum())(*inputs)
        narrow = [t.to(torch.float8_e4m3fn) for t in inputs]
        with pytest.raises(ValueError, match=r"float8_e4m3fn: must be float16, bfloat16, float32 or float64"):
            function(*narrow)


def check_peak_memory(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, *, times: float = 3.0
) -> None:
    """What a forward and backward pass allocates is at most 3 times inputs, output and parameters."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, dy)

    result = run()  # compiles
    given = sum(t.numel() * t.element_size() for t in (*inputs, dy))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        peak = now = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
    assert peak >= sum(t.numel() * t.element_size() for t in result), "the measurement misses allocations"
    assert peak <= times * given, f"{peak / given:.2f} times inputs, outputs and parameters"


def on_device() -> Any:
    """A context in which new tensors are where kernels run."""
    return torch.device(DEVICE) if DEVICE != "cpu" else nullcontext()
