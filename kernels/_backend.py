"""Which implementation an op uses: plain torch, or Triton."""

import importlib.util
import os
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

# Triton reads the variable when `@triton.jit` decorates, so it counts only if set before archzoo is imported.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_chosen: list[str | None] = [None]


def _triton_is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None  # without importing it, which takes long
    except (ImportError, ValueError):
        return False


HAS_TRITON = _triton_is_installed()


class use_backend:  # noqa: N801 - reads as a verb; a class over a module global, which dynamo can trace
    """Context manager that makes every op use `"torch"` or `"triton"`.

    Without it a CUDA tensor takes Triton, where the op has a Triton kernel, and any other takes torch.

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
