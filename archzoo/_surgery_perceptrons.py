"""Whole perceptrons inside a model, known by what is in them, and the same of layers of the zoo."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from archzoo._surgery_adapters import HOOKS, Adapter, LayerAdapter, Make, layer_adapter
from archzoo._surgery_attention import is_attention
from archzoo._surgery_elementwise import bends
from archzoo.layers.start import Start, relative_error
from archzoo.registry import LayerEntry


@dataclass(frozen=True)
class _Parts:
    """A perceptron, taken apart."""

    layers: Sequence[nn.Module]
    """One; or those to the hidden features, and the last one from them."""
    adapters: Sequence[LayerAdapter]
    sizes: Sequence[tuple[int, int]]
    """(in, out) of the layers."""
    rest: Sequence[nn.Module]
    """What else is in it, but for what contains others."""

    def __repr__(self) -> str:  # equal for equal costs
        return f"{self.sizes}, {[tuple(tensor.shape) for tensor in _tensors(self.rest)]}"

    @property
    def hidden(self) -> int:
        """Features that the last layer sees."""
        return self.sizes[-1][0]


class _Perceptron(Adapter):
    """A copy of the perceptron with other layers in it, everything else being as it was.

    It is known by its parts, whatever their names: one layer and a function (as BERT's, whose two halves are modules of
    their own), a layer to hidden features and one back (also to twice as many, of which one half gates the other), or
    two to hidden features that meet in a product and one back. Norms and dropout may stand beside them.

    Layers that bend their input by themselves need no activation between them, and get none; unless they start from
    trained weights, which have learned with it.
    """

    original = nn.Module
    inner: ClassVar = "hidden"

    def fits(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Linear | nn.Conv2d):  # with more in it, as of an adaptation of low rank
            return False
        return any(layer_adapter(self.kind, m) for m in _leaves(module))

    def refusal(self, module: nn.Module) -> str:
        try:
            self._parts(module)
        except ValueError as error:
            return f"{type(module).__name__} is no perceptron that could be one of other layers: {error}"
        return ""

    def arguments(self, layer: type[nn.Module], module: nn.Module) -> dict[str, Any]:
        parts = self._parts(module)
        each = [a.arguments(layer, m) for a, m in zip(parts.adapters, parts.layers, strict=True)]
        hidden = {self.inner: parts.hidden} if len(each) > 1 else {}
        factory = {key: each[0][key] for key in ("device", "dtype")}
        sizes = {self.inputs: parts.sizes[0][0], self.outputs: parts.sizes[-1][1]}
        return {**sizes, **hidden, **factory, "layers": each, "parts": parts}

    def build(self, make: Make, module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
        options = dict(arguments)
        parts, each = options.pop("parts"), options.pop("layers")
        ends = options.pop(self.inputs), options.pop(self.outputs)
        hidden = options.pop(self.inner, parts.hidden)
        new: dict[nn.Module, nn.Module] = {}
        for index, (layer, adapter) in enumerate(zip(parts.layers, parts.adapters, strict=True)):
            last = index == len(each) - 1
            wide = parts.sizes[index][1] // parts.hidden * hidden  # twice, if one half gates the other
            sizes = (hidden if last and index else ends[0], ends[1] if last else wide)
            given = {adapter.inputs: sizes[0], adapter.outputs: sizes[1]}
            new[layer] = adapter.build(make, layer, each[index] | given | options)
        if make.entry.nonlinear:
            new |= {function: nn.Identity() for function in _functions_of(module, parts)}
        return _copy_with(module, new, options["device"])

    def start(self, entry: LayerEntry, module: nn.Module, options: dict[str, Any]) -> Start[nn.Module]:
        parts = self._parts(module)
        starts = [a.start(entry, m, options) for a, m in zip(parts.adapters, parts.layers, strict=True)]
        new = _copy_with(module, {old: start.layer for old, start in zip(parts.layers, starts, strict=True)})
        error = max(start.error for start in starts)
        return Start(new, _error(module, new, parts, self.axis) if error and len(starts) > 1 else error)

    def inner_width(self, module: nn.Module) -> int:
        parts = self._parts(module)
        return parts.hidden if len(parts.layers) > 1 and not _bound(parts, parts.hidden) else 0

    def resizable(self, module: nn.Module) -> bool:
        """Half a perceptron may be linked to the other half at the end that has no norm of its size."""
        parts = self._parts(module)
        return len(parts.layers) == 1 and not _bound(parts, max(parts.sizes[0]))

    def activated(self, module: nn.Module) -> bool:
        parts = self._parts(module)
        return len(parts.layers) == 1 and any(map(bends, parts.rest))

    def _parts(self, module: nn.Module) -> _Parts:
        """The perceptron, taken apart; a ValueError that says what of it is none."""
        if is_attention(module):
            raise ValueError("it is attention, whose place a mixer takes")
        layers, adapters, rest = [], [], []
        for part in _leaves(module):
            adapter = layer_adapter(self.kind, part)
            if adapter is None:
                rest.append(part)
            else:
                layers.append(part)
                adapters.append(adapter)
        tensors = [*_tensors(rest), *(p for m in module.modules() if m._modules for p in m._parameters.values())]
        if any(t is not None and sum(size > 1 for size in t.shape) > 1 for t in tensors):
            raise ValueError("it holds other weights beside its layers")
        usual = [a.usual(m) for a, m in zip(adapters, layers, strict=True)]
        if any(max((*u.kernel_size, *u.stride, u.groups)) > 1 for u in usual if isinstance(u, nn.Conv2d)):
            raise ValueError("it holds a convolution of more than single pixels")
        sizes = [tuple(getattr(u, key) for key in (a.inputs, a.outputs)) for a, u in zip(adapters, usual, strict=True)]
        *first, (hidden, _) = sizes
        wanted = {1: [[]], 2: [[hidden], [2 * hidden]], 3: [[hidden, hidden]]}.get(len(sizes), [])
        if [out for _, out in first] not in wanted or len({size for size, _ in first}) > 1:
            raise ValueError("it holds layers of " + ", ".join(f"{a} -> {b}" for a, b in sizes))
        return _Parts(layers, adapters, sizes, rest)


class _LinearPerceptron(_Perceptron):
    kind = "linear"
    what = "a perceptron of these"
    inputs, outputs, axis = "in_features", "out_features", -1


class _ConvPerceptron(_Perceptron):
    kind = "conv2d"
    what = "a perceptron of 1x1 convolutions"
    inputs, outputs, axis = "in_channels", "out_channels", -3


PERCEPTRONS = (_LinearPerceptron(), _ConvPerceptron())


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in it that contain no other."""
    return (m for m in module.modules() if not m._modules and m is not module)


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def _bound(parts: _Parts, width: int) -> bool:
    """Whether something beside the layers, as a norm, has that width."""
    return any(width in tensor.shape for tensor in _tensors(parts.rest))


class _Inside(fx.Tracer):
    """Follows a forward into all modules that contain others."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not m._modules


def _functions_of(module: nn.Module, parts: _Parts) -> list[nn.Module]:
    """The activations that stand between the layers, or behind a single one.

    Read off the order of calls, as torch.fx follows them; where it cannot, those whose name has "act" in it.
    """
    functions = [m for m in parts.rest if bends(m)]
    if not functions:
        return []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            graph = _Inside().trace(module)
    except Exception:  # a forward of someone else's, run with stand-ins for its input, may raise anything
        named = {m for name, m in module.named_modules() if "act" in name.rpartition(".")[2]}
        return [m for m in functions if m in named]
    order = [module.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]
    places = [order.index(layer) for layer in parts.layers if layer in order]
    if len(places) < len(parts.layers):
        return []
    end = places[-1] if len(places) > 1 else len(order)
    return [m for m in order[places[0] : end] if m in functions]


def _copy_with(module: nn.Module, new: dict[nn.Module, nn.Module], device: Any = None) -> nn.Module:
    """A deep copy, with other modules in the place of some in it, and without hooks."""
    memo: dict[int, Any] = {id(getattr(module, name)): OrderedDict() for name in HOOKS}
    memo |= {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}  # the model's, not its own
    memo |= {id(old): replacement.train(old.training) for old, replacement in new.items()}
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied.to("meta") if device == "meta" else copied


@torch.no_grad()
def _error(old: nn.Module, new: nn.Module, parts: _Parts, axis: int) -> float:
    """As of a `Start`, for standard normal inputs."""
    weight = next(parts.layers[0].parameters())
    features = parts.sizes[0][0]
    shape = (64, features, 4, 4) if axis == -3 else (64, 16, features)
    x = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    mode = old.training
    truth, found = old.eval()(x), new.eval()(x)
    old.train(mode)
    new.train(mode)
    return relative_error(found, truth)
