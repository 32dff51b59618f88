"""Which implementation an op uses: plain torch, or Triton."""

import importlib.util
import os
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from archzoo.kernels._thresholds import is_below

# Triton reads the variable when `@triton.jit` decorates, so it counts only if set before archzoo is imported.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_chosen: list[str | None] = [None]


def _triton_is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None  # without importing it, which takes long
    except (ImportError, ValueError):
        return False


HAS_TRITON = _triton_is_installed()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class use_backend:  # noqa: N801 - reads as a verb; a class over a module global, which dynamo can trace
    """Context manager that makes every op use `"torch"` or `"triton"`.

    Without it a CUDA tensor takes Triton, where the op has a Triton kernel and is not too small for it (as measured,
    see `tune_thresholds`), and any other takes torch. Gradients of gradients and `torch.func` transforms are plain
    torch's then; inside `use_backend("triton")`, which insists, they raise a RuntimeError.

    Args:
        name: `"torch"` or `"triton"`.

    Raises:
        ValueError: If `name` is neither.
        RuntimeError: If `name` is `"triton"` and Triton is not installed, or there is neither a CUDA device nor
            `TRITON_INTERPRET=1`.
    """

    def __init__(self, name: Literal["torch", "triton"]):
        if name not in ("torch", "triton"):
            raise ValueError(f"use_backend: name must be 'torch' or 'triton', got {name!r}")
        if name == "triton" and not HAS_TRITON:
            raise RuntimeError("use_backend('triton'): triton is not installed; use 'torch'")
        if name == "triton" and not (INTERPRET or torch.cuda.is_available()):
            raise RuntimeError(
                "use_backend('triton') needs a CUDA device, or TRITON_INTERPRET=1 set before archzoo is imported"
            )
        self.name = name
        self.before: list[str | None] = []

    def __enter__(self) -> None:
        self.before.append(_chosen[0])
        _chosen[0] = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _chosen[0] = self.before.pop()


def wants_triton(x: Tensor) -> bool:
    """Whether an op on x should use its Triton kernel."""
    return (HAS_TRITON and x.is_cuda) if _chosen[0] is None else _chosen[0] == "triton"


def takes_triton(op: str, numbers: int | None = None, /, **tensors: Tensor | None) -> bool:
    """Whether an op on these tensors, of which the first decides, uses its Triton kernel. Asked in the public function.

    The answer is an argument of the custom op, as a graph must hold it, and a backward follow its forward.

    Args:
        op: Name of the op, for messages and the table of `_thresholds.py`.
        numbers: How many the kernels go over, which is held against that table; by default those of the first tensor.
        tensors: By the names that the caller knows; None for one not given.

    Raises:
        ValueError: If Triton is wanted, and a tensor is of a dtype or on a device that no kernel takes.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    x = next(iter(given.values()))
    if not wants_triton(x):
        return False
    for name, t in given.items():
        if t.dtype not in _DTYPES:
            raise ValueError(
                f"{name} of {t.dtype}: must be float16, bfloat16, float32 or float64 for the Triton kernel of {op}; "
                "use_backend('torch') does without it"
            )
        if t.device != x.device or not (INTERPRET or x.device.type in ("cuda", "meta")):
            raise ValueError(f"{name} on {t.device}: must be on one CUDA device with all others, for Triton's {op}")
    return _chosen[0] is not None or not is_below(op, numbers, x)


def refuse_triton(op: str, what: str) -> None:
    """Before plain torch takes the place of an op's kernel: an error if `use_backend("triton")` insists on Triton.

    Raises:
        RuntimeError: Then.
    """
    if _chosen[0] == "triton":
        raise RuntimeError(f"{op}: {what} has no Triton kernel; leave use_backend('triton'), or use_backend('torch')")
