"""How a module that stands in a model becomes a layer of the zoo: one adapter for each sort of module and kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from archzoo.layers.start import Start, original_arguments
from archzoo.registry import Kind, LayerEntry

Make = Callable[..., nn.Module]
"""Builds a layer of the asked name and options from the arguments of its kind, on the device and in the dtype asked."""


class Adapter(ABC):
    """Turns a module that was found into the arguments of a new layer of one kind.

    A subclass names the module and the kind, and gives `arguments`. It may build more than one layer (`build`), say of
    which modules it keeps off (`refusal`), and how the new one starts from the trained weights (`start`).

    Attributes:
        kind: The kind of layer that takes the place.
        original: The type of module whose place it takes.
        inputs: The argument that is the size of the input, where that size may be chosen; "" if there is none.
        outputs: The argument that is the size of the output, likewise.
        axis: The axis of input and output that has these sizes.
    """

    kind: ClassVar[Kind]
    original: ClassVar[type[nn.Module]]
    inputs: ClassVar[str] = ""
    outputs: ClassVar[str] = ""
    axis: ClassVar[int] = -1

    def refusal(self, module: nn.Module) -> str:
        """Why this module, though an `original`, is not to be replaced; "" if it may be.

        By default: a subclass that computes otherwise or holds more than the original does.
        """
        own, usual = type(module), self.original
        other = [name for name in ("forward", "_conv_forward", "__call__") if _differs(own, usual, name)]
        if other:
            return f"{own.__name__} is an nn.{usual.__name__} with a {other[0]} of its own, which would be lost"
        tensors = (*module._parameters, *module._buffers, *module._modules)
        more = [name for name in tensors if name not in ("weight", "bias")]
        return f"{own.__name__} holds {', '.join(more)} beside weight and bias, which would be lost" if more else ""

    @abstractmethod
    def arguments(self, layer: type[nn.Module], module: nn.Module) -> dict[str, Any]:
        """What the module decides of the new layer of this class: sizes and the like, device and dtype.

        Two modules with equal arguments get layers of equal cost.

        Raises:
            ValueError: If such a layer cannot stand in for the module.
        """

    def build(self, make: Make, module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
        """The new module, of one layer or more that `make(**arguments)` builds."""
        return make(**arguments)

    def start(self, entry: LayerEntry, module: nn.Module, options: dict[str, Any]) -> Start[nn.Module]:
        """The new module, as near to the trained one as it can start.

        Raises:
            ValueError: If there is no such start.
        """
        raise ValueError(f"a {type(module).__name__} gives layer {entry.name!r} no weights to start from")

    def resizable(self, module: nn.Module) -> bool:
        """Whether a new layer in this module's place may have other input and output sizes."""
        return bool(self.inputs and self.outputs)

    def describe(self, arguments: dict[str, Any]) -> str:
        """The sizes, for a table: `64 -> 32`."""
        return f"{arguments[self.inputs]} -> {arguments[self.outputs]}" if self.inputs else ""


def _differs(cls: type, usual: type, name: str) -> bool:
    return getattr(cls, name, None) is not getattr(usual, name, None)


class _Usual(Adapter):
    """`nn.Linear` or `nn.Conv2d`, by the layers' methods `from_linear` and `from_conv2d`."""

    starts_by: ClassVar[str]

    def arguments(self, layer: type[nn.Module], module: nn.Module) -> dict[str, Any]:
        return original_arguments(layer, module)

    def start(self, entry: LayerEntry, module: nn.Module, options: dict[str, Any]) -> Start[nn.Module]:
        if entry.cls is self.original:  # the usual layer itself, as the baseline among others
            layer = self.build(entry.cls, module, self.arguments(entry.cls, module) | options)
            layer.load_state_dict(module.state_dict())
            return Start(layer, 0.0)
        method = getattr(entry.cls, self.starts_by, None)
        if method is None:
            raise ValueError(f"layer {entry.name!r} has no {self.starts_by}")
        return method(module, **options)


class _Linear(_Usual):
    kind = "linear"
    original = nn.Linear
    inputs, outputs, axis = "in_features", "out_features", -1
    starts_by = "from_linear"

    def refusal(self, module: nn.Module) -> str:
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "it belongs to an nn.MultiheadAttention, which reads its weight and never calls it"
        return super().refusal(module)


class _Conv2d(_Usual):
    kind = "conv2d"
    original = nn.Conv2d
    inputs, outputs, axis = "in_channels", "out_channels", -3
    starts_by = "from_conv2d"

    def resizable(self, module: nn.Module) -> bool:
        return bool(module.groups == 1)

    def describe(self, arguments: dict[str, Any]) -> str:
        return f"{super().describe(arguments)}, {'x'.join(map(str, arguments['kernel_size']))}"


_adapters: list[Adapter] = [_Linear(), _Conv2d()]


def register_adapter(adapter: Adapter) -> Adapter:
    """Lets `swap` take a further sort of module. Of two that fit a module, the one that came last is taken.

    >>> from torch import nn
    >>> from archzoo.surgery import Adapter, register_adapter, swap
    >>> class Bag(nn.EmbeddingBag):
    ...     "Any module of yours."
    >>> class ForBag(Adapter):
    ...     "A linear layer of the zoo on counts of words, in its place."
    ...     kind, original = "linear", Bag
    ...     def refusal(self, module):
    ...         return ""
    ...     def arguments(self, layer, module):
    ...         return {"in_features": module.num_embeddings, "out_features": module.embedding_dim, "bias": False}
    >>> adapter = register_adapter(ForBag())
    >>> swap(nn.Sequential(Bag(30, 8)), {Bag: "linear"}).model
    Sequential(
      (0): Linear(in_features=30, out_features=8, bias=False)
    )
    """
    _adapters.append(adapter)
    return adapter


def find_adapter(entry: LayerEntry, module: nn.Module) -> Adapter:
    """The adapter that puts a layer into a module's place.

    Raises:
        ValueError: If there is none, or if it refuses the module; says why.
    """
    of_kind = [adapter for adapter in reversed(_adapters) if adapter.kind == entry.kind]
    for adapter in of_kind:
        if isinstance(module, adapter.original):
            if why := adapter.refusal(module):
                raise ValueError(why)
            return adapter
    places = ", ".join(sorted({f"{a.original.__module__.split('.')[0]} {a.original.__name__}" for a in of_kind}))
    raise ValueError(
        f"layer {entry.name!r} is of kind {entry.kind} and takes the place of {places or 'no module'}, "
        f"not of {type(module).__name__}"
    )


def first_tensor(module: nn.Module) -> Tensor | None:
    """The parameter, or else the buffer, that says where a module lives and in what precision; None if it has none."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t for t in tensors if t.is_floating_point()), None)
