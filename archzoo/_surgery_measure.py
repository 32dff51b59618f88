"""One run of a model on a calibration batch: what its layers cost, and how far new layers are from the old ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from archzoo.budget import counted_flops

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of a module, by position and by name."""


@dataclass
class Measured:
    """FLOPs of one forward pass."""

    flops: int = 0
    of: dict[nn.Module, int] = field(default_factory=dict)
    """Of each module that was asked for, over all its calls."""
    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    """What each was called with, the tensors on the meta device."""
    between: dict[tuple[nn.Module, nn.Module], int] = field(default_factory=dict)
    """From the end of a module to the beginning of the one that ran next."""


def run(model: nn.Module, calibration: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments, or a dict of named ones."""
    if isinstance(calibration, Mapping):
        return model(**calibration)
    return model(*calibration) if isinstance(calibration, tuple | list) else model(calibration)


@contextmanager
def _quietly(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients, with the same random numbers after it, past no layer's forward."""
    training = {module: module.training for module in modules}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training.items():
            module.training = mode


def measure(model: nn.Module, modules: Sequence[nn.Module], calibration: Any) -> Measured:
    """Counts the FLOPs of a model and of some modules in it. The model stays as it is."""
    result = Measured(of=dict.fromkeys(modules, 0), calls={module: [] for module in modules})
    handles = []
    started: dict[nn.Module, int] = {}
    last: tuple[nn.Module, int] | None = None

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal last
        started[module] = counted()
        if last is not None:
            pair = last[0], module
            result.between[pair] = result.between.get(pair, 0) + started[module] - last[1]
        result.calls[module].append(tree_map(_to_meta, (args, kwargs)))

    def after(module: nn.Module, *_: Any) -> None:
        nonlocal last
        last = module, counted()
        result.of[module] += last[1] - started[module]

    with _quietly(model.modules()), counted_flops() as counted:
        try:
            for module in modules:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, prepend=True))
            run(model, calibration)
            result.flops = counted()
        finally:
            for handle in handles:
                handle.remove()
    return result


def _to_meta(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def flops_of_calls(module: nn.Module, calls: Sequence[Call]) -> int:
    """FLOPs of a module, on meta or not, that is called with tensors of these shapes."""
    tensor = next(iter(module.parameters()), None)
    device = tensor.device if tensor is not None else torch.device("meta")

    def fill(value: Any) -> Any:
        return torch.zeros_like(value, device=device) if isinstance(value, Tensor) else value

    with _quietly(module.modules()), counted_flops() as counted:
        for args, kwargs in tree_map(fill, list(calls)):
            module(*args, **kwargs)
        return counted()


def resized(call: Call, axis: int, size: int) -> Call:
    """The call with another size of its first tensor along an axis."""
    (x, *rest), kwargs = call
    shape = list(x.shape)
    shape[axis] = size
    return (x.new_empty(shape), *rest), kwargs


def output_errors(model: nn.Module, new: Mapping[nn.Module, nn.Module], calibration: Any) -> dict[nn.Module, float]:
    """How far each new module's output is from the old one's, on the inputs that this has in the model.

    Returns:
        The root mean square of the difference over that of the old output, of every old module that was called.
    """
    sums = {old: [0.0, 0.0] for old in new}
    called: set[nn.Module] = set()

    def compare(old: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        called.add(old)
        for truth, found in zip(tree_leaves(output), tree_leaves(new[old](*args, **kwargs)), strict=False):
            if isinstance(truth, Tensor) and isinstance(found, Tensor):
                sums[old][0] += float((found.double() - truth.double()).square().sum())
                sums[old][1] += float(truth.double().square().sum())

    handles: list[Any] = []
    modules = {*model.modules(), *(part for module in new.values() for part in module.modules())}
    with _quietly(modules):
        try:
            handles += [old.register_forward_hook(compare, with_kwargs=True, prepend=True) for old in new]
            run(model, calibration)
        finally:
            for handle in handles:
                handle.remove()
    return {old: (sums[old][0] / sums[old][1]) ** 0.5 if sums[old][1] else float(sums[old][0] > 0) for old in called}
