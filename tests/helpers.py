"""Yardsticks and small tools that several tests use: `from tests.helpers import rms_error`."""

import os
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).parents[1]

HEAVY = ("triton", "wandb", "hydra", "timm", "matplotlib", "torchmetrics", "rich", "sklearn", "scipy")
"""Packages that nobody pays for by `import archzoo`: neither the layers nor the kernels' torch path need them."""


def sampled(values: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """Values to parametrize with; those that are not kept, of which some like them are, are slow."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


def rms(x: Tensor) -> float:
    """Root mean square, in float64; 0 for no elements."""
    return x.detach().double().square().mean().sqrt().item() if x.numel() else 0.0


def rms_error(out: Tensor, reference: Tensor) -> float:
    """Error of `out` by root mean square, relative to the reference; NaN if any element is."""
    assert out.shape == reference.shape, f"shape {tuple(out.shape)}, reference {tuple(reference.shape)}"
    return rms(out.double() - reference.double()) / max(rms(reference), torch.finfo(torch.float64).tiny)


def value_and_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The output of a function and its gradients with respect to all inputs, for the cotangent dy (ones if None)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)
    return (y.detach(), *gradients)


def layer_value_and_grads(layer: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """A layer's output `y`, and the gradients of its input `x` and of each of its parameters, by name."""
    parameters = dict(layer.named_parameters())
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    cotangent = torch.ones_like(y) if dy is None else dy
    gradients = torch.autograd.grad(y, [leaf, *parameters.values()], cotangent, allow_unused=True)
    missing = [name for name, gradient in zip(["x", *parameters], gradients, strict=True) if gradient is None]
    assert not missing, f"no gradient reaches {missing}"
    return {"y": y.detach(), **dict(zip(["x", *parameters], gradients, strict=True))}


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Fails if two named sets of tensors differ in one bit; equal NaN bits are equal."""
    assert a.keys() == b.keys(), f"{what}: {sorted(a)} against {sorted(b)}"
    for name in a:
        assert a[name].dtype == b[name].dtype, f"{what}: dtype of {name}"
        same = torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) and torch.equal(a[name].isnan(), b[name].isnan())
        assert same, f"{what}: {name} differs"


def assert_all_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str, bound: float = 1e-11) -> None:
    """Fails if the error by root mean square of one of two named sets of tensors exceeds `bound`."""
    assert a.keys() == b.keys(), f"{what}: {sorted(a)} against {sorted(b)}"
    for name in a:
        error = rms_error(a[name], b[name])
        assert error <= bound, f"{what}: relative error of {name} is {error:.1e}, allowed {bound:.1e}"


class RecordOps(TorchDispatchMode):
    """Collects the overload packets of the ops that run under it, as `torch.ops.aten.mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[torch._ops.OpOverloadPacket] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.add(op.overloadpacket)
        return op(*args, **(kwargs or {}))


def run_python(
    code: str,
    *,
    options: Sequence[str] = (),
    path: Sequence[str | Path] = (),
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> str:
    """Runs code in a fresh interpreter and returns what it printed; its errors are in the failure's text.

    Args:
        code: What to run.
        options: Options of the interpreter, as `["-S"]`.
        path: Folders for PYTHONPATH.
        cwd: Working directory; by default one that holds no package.
        env: Variables to add.
        timeout: In seconds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path)), **(env or {})}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd or REPOSITORY / "tests" / "layers",
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def without(packages: Sequence[str]) -> str:
    """Code that makes an interpreter behave as if the packages were not installed.

    Both `import` and `importlib.util.find_spec` then say so; torch asks the latter of packages that it can do without.
    """
    return f"""
import importlib.machinery, sys
class _Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {tuple(packages)!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = _Without
"""
