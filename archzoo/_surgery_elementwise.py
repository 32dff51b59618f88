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
    x = torch.linspace(-4, 4, 32).unflatten(0, (2, 4, 4))
    with torch.no_grad():
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
    generator = torch.Generator().manual_seed(0)
    for width in (3, 5):
        shape = [2, width, 4, 4] if axis == -3 else [2, 4, width]
        x = torch.randn(shape, generator=generator)
        other = x.clone()
        other.flatten()[1] += 1.0
        try:
            y, changed = _seeded(function, x), _seeded(function, other)
        except Exception:  # not made for this input
            return False
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return False
        if not torch.equal(y.flatten()[[0, *range(2, x.numel())]], changed.flatten()[[0, *range(2, x.numel())]]):
            return False
    return True


def _seeded(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that dropout drops the same
        return function(x.clone())
