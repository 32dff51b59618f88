"""Which functions act on each number alone, which is tried."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def bends(module: nn.Module) -> bool:
    """Whether a module is an elementwise function, and not the identity, in evaluation."""
    function = of_module(module)
    if function is None or not is_elementwise(function, -1):
        return False
    with torch.no_grad(), torch.device("cpu"):
        x = torch.linspace(-4, 4, 32).unflatten(0, (2, 4, 4))
        return not torch.equal(_seeded(function, x), x)


def of_module(module: nn.Module) -> Callable[[Tensor], Any] | None:
    """A module's forward in evaluation, without its hooks; None if it has more than single numbers to learn."""
    tensors = (*module.parameters(), *module.buffers())
    if any(t.numel() != 1 for t in tensors) or inspect.isabstract(type(module)):
        return None
    twin = copy.deepcopy(module).eval()
    if tensors:
        twin = twin.float().to_empty(device="cpu")
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.detach().fill_(0.25)
    return twin.forward


@torch.no_grad()
def is_elementwise(function: Callable[[Tensor], Any] | None, axis: int) -> bool:
    """Whether each number of the output comes from that number of the input alone, at any width."""
    if function is None:
        return False
    with torch.device("cpu"):  # also where whoever builds a model on `meta` has set another
        return all(_is_elementwise(function, [2, n, 4, 4] if axis == -3 else [2, 4, n]) for n in (3, 5))


def _is_elementwise(function: Callable[[Tensor], Any], shape: list[int]) -> bool:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other.flatten()[1] += 1.0
    try:
        y, changed = _seeded(function, x), _seeded(function, other)
    except Exception:  # somebody's function, not made for this input
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return False
    rest = [0, *range(2, x.numel())]
    return torch.equal(y.flatten()[rest], changed.flatten()[rest])


def _seeded(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that dropout drops the same
        return function(x.clone())
