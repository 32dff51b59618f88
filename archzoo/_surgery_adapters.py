"""How a module that stands in a model becomes a layer of the zoo: one adapter for each sort of module and kind."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers.start import Start, original_arguments
from archzoo.registry import Kind, LayerEntry, create_layer


@dataclass(frozen=True)
class Make:
    """Builds a layer of the asked name from the arguments of its kind, on the device and in the dtype asked."""

    entry: LayerEntry

    def __call__(self, **arguments: Any) -> nn.Module:
        """The layer."""
        return create_layer(self.entry.name, **arguments)


HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


class Adapter(ABC):
    """Turns a module that was found into the arguments of a new layer of one kind.

    A subclass names the module and the kind, and gives `arguments`. It may know modules by more than their type
    (`fits`), build more than one layer (`build`), say of which modules it keeps off (`refusal`), and how the new one
    starts from the trained weights (`start`).

    Attributes:
        kind: The kind of layer that takes the place.
        names: The layers of that kind that do; empty: all.
        original: The type of module whose place it takes.
        what: What that is, for messages; by default the type's name.
        inputs: The argument that is the size of the input, where that size may be chosen; "" if there is none.
        outputs: The argument that is the size of the output, likewise.
        inner: The argument that is a width inside the new module, likewise; see `inner_width`.
        splits: Whether an inner width makes two layers of one, which is done where nothing else is free.
        axis: The axis of input and output that has these sizes.
    """

    kind: ClassVar[Kind]
    names: ClassVar[tuple[str, ...]] = ()
    original: ClassVar[type[nn.Module]]
    what: ClassVar[str] = ""
    inputs: ClassVar[str] = ""
    outputs: ClassVar[str] = ""
    inner: ClassVar[str] = ""
    splits: ClassVar[bool] = False
    axis: ClassVar[int] = -1

    def fits(self, module: nn.Module) -> bool:
        """Whether this adapter is for that module."""
        return isinstance(module, self.original)

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

    def activated(self, module: nn.Module) -> bool:
        """Whether the module ends in an elementwise function."""
        return False

    def inner_width(self, module: nn.Module) -> int:
        """The inner width that corresponds to this module; 0 if none may be chosen."""
        return 0

    def describe(self, arguments: dict[str, Any]) -> str:
        """The sizes, for a table: `64 -> 32`, or `64 -> 256 -> 64`."""
        keys = (self.inputs, self.inner, self.outputs)
        return " -> ".join(str(arguments[key]) for key in keys if key in arguments)


def _differs(cls: type, usual: type, name: str) -> bool:
    return getattr(cls, name, None) is not getattr(usual, name, None)


class LayerAdapter(Adapter):
    """One layer for one: `nn.Linear`, `nn.Conv2d` and what computes as they do.

    The new one starts by the layers' methods `from_linear` and `from_conv2d`. With an inner width it is two layers, the
    first to that width and the second from it.
    """

    starts_by: ClassVar[str]
    inner = "inner"
    splits = True
    second: ClassVar[dict[str, Any]] = {}
    """What else the second of two layers has."""

    def usual(self, module: nn.Module) -> Any:
        """The usual layer that computes what the module does; shares its numbers where it can."""
        return module

    def arguments(self, layer: type[nn.Module], module: nn.Module) -> dict[str, Any]:
        return original_arguments(layer, self.usual(module))

    def build(self, make: Make, module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
        arguments = dict(arguments)
        width = arguments.pop(self.inner, None)
        if width is None:
            return make(**arguments)
        first = self.build(make, module, arguments | {self.outputs: width})
        return nn.Sequential(first, make(**arguments | {self.inputs: width} | self.second))

    def start(self, entry: LayerEntry, module: nn.Module, options: dict[str, Any]) -> Start[nn.Module]:
        usual = self.usual(module)
        if entry.cls in (nn.Linear, nn.Conv2d):  # the usual layer itself, as the baseline among others
            layer = entry.cls(**original_arguments(entry.cls, usual) | options)
            layer.load_state_dict(usual.state_dict())
            return Start(layer.train(module.training), 0.0)
        method = getattr(entry.cls, self.starts_by, None)
        if method is None:
            raise ValueError(f"layer {entry.name!r} has no {self.starts_by}")
        return method(usual, **options)


class _Linear(LayerAdapter):
    kind = "linear"
    original: ClassVar[type[nn.Module]] = nn.Linear
    inputs, outputs, axis = "in_features", "out_features", -1
    starts_by = "from_linear"

    def refusal(self, module: nn.Module) -> str:
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "it belongs to an nn.MultiheadAttention, which reads its weight and never calls it"
        if _is_of(module, "timm.layers.linear", "Linear"):  # computes the same, with a detour for TorchScript
            return ""
        return super().refusal(module)

    def inner_width(self, module: nn.Module) -> int:
        return min(self.usual(module).weight.shape)


class _Conv1D(_Linear):
    """transformers' linear layer, of which the weight is the other way round."""

    original = nn.Module
    what = "transformers Conv1D"

    def fits(self, module: nn.Module) -> bool:
        return _is_of(module, "transformers.", "Conv1D")

    def refusal(self, module: nn.Module) -> str:
        return ""

    def usual(self, module: nn.Module) -> nn.Linear:
        weight, bias = module.get_parameter("weight").detach(), module.get_parameter("bias").detach()
        inputs, outputs = weight.shape
        linear = nn.Linear(inputs, outputs, device="meta", dtype=weight.dtype).train(module.training)
        linear.weight, linear.bias = nn.Parameter(weight.T), nn.Parameter(bias)
        return linear


class _Conv2d(LayerAdapter):
    kind = "conv2d"
    original = nn.Conv2d
    inputs, outputs, axis = "in_channels", "out_channels", -3
    starts_by = "from_conv2d"
    second: ClassVar = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}

    def resizable(self, module: nn.Module) -> bool:
        return bool(module.groups == 1)

    def inner_width(self, module: nn.Module) -> int:
        conv = self.usual(module)
        depthwise = 1 < conv.groups == conv.in_channels  # its inner width could not be less than its outer one
        return 0 if depthwise else min(conv.in_channels * math.prod(conv.kernel_size), conv.out_channels)

    def describe(self, arguments: dict[str, Any]) -> str:
        return f"{super().describe(arguments)}, {'x'.join(map(str, arguments['kernel_size']))}"


class _TimmConv2d(_Conv2d):
    """timm's convolutions that pad by the input's size, or standardise their weight, or both.

    Padding stays, by a module before the new layer. A new layer does not standardise; it starts from the standardised
    weight.
    """

    classes = ("Conv2dSame", "Conv2dSameExport", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
    what = "timm Conv2dSame, StdConv2d or ScaledStdConv2d"

    def fits(self, module: nn.Module) -> bool:
        return _is_of(module, "timm.layers.", *self.classes)

    def refusal(self, module: nn.Module) -> str:
        return ""

    def usual(self, module: Any) -> nn.Conv2d:
        weight: Tensor = module.weight.detach()
        if "Std" in type(module).__name__:
            gain = getattr(module, "gain", None)
            scale = None if gain is None else (gain.detach() * module.scale).flatten()
            flat = weight.reshape(1, len(weight), -1)
            weight = F.batch_norm(flat, None, None, scale, training=True, eps=module.eps).reshape_as(weight)
        shape = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
        shape |= {"bias": module.bias is not None, "device": "meta", "dtype": weight.dtype}
        conv = nn.Conv2d(module.in_channels, module.out_channels, **shape)
        conv.weight = nn.Parameter(weight)
        if module.bias is not None:
            conv.bias = nn.Parameter(module.bias.detach())
        return conv.train(module.training)

    def build(self, make: Make, module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
        new = super().build(make, module, arguments)
        return new if self.inner in arguments else _padded(module, new)

    def start(self, entry: LayerEntry, module: nn.Module, options: dict[str, Any]) -> Start[nn.Module]:
        layer, error = super().start(entry, module, options)
        return Start(_padded(module, layer), error)


def _padded(module: Any, layer: nn.Module) -> nn.Module:
    """The layer, behind the padding of one of timm's convolutions if that pads by the input's size."""
    name = type(module).__name__
    if not (name.startswith("Conv2dSame") or getattr(module, "same_pad", False)):
        return layer
    return nn.Sequential(SamePad2d(module.kernel_size, module.stride, module.dilation), layer)


class SamePad2d(nn.Module):
    """Zeros around images so that a convolution gives ceil(size / stride): TensorFlow's "SAME", the odd one at the end.

    Shape: (*, height, width) -> (*, height + p, width + q).
    """

    def __init__(self, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]):
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        """Pads."""
        amounts: list[int] = []
        for axis in (1, 0):
            size, stride = x.shape[axis - 2], self.stride[axis]
            seen = (-(-size // stride) - 1) * stride + self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            total = max(seen - size, 0)
            amounts += [total // 2, total - total // 2]
        return F.pad(x, amounts)

    def extra_repr(self) -> str:
        """Of the convolution behind it."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


def _is_of(module: nn.Module, package: str, *names: str) -> bool:
    """Whether the module is of one of these classes, without an import of the package."""
    return type(module).__name__ in names and type(module).__module__.startswith(package)


_adapters: list[Adapter] = [_Linear(), _Conv1D(), _Conv2d(), _TimmConv2d()]


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


def _known() -> list[Adapter]:
    """All adapters, those of structures first, which are made of layers: they need this module before it needs them."""
    from archzoo._surgery_attention import ATTENTION
    from archzoo._surgery_capsules import CAPSULE_HEAD
    from archzoo._surgery_perceptrons import PERCEPTRONS

    return [CAPSULE_HEAD, ATTENTION, *PERCEPTRONS, *_adapters]


def find_adapter(entry: LayerEntry, module: nn.Module) -> Adapter:
    """The adapter that puts a layer into a module's place.

    Raises:
        ValueError: If there is none, or if it refuses the module; says why.
    """
    candidates = [a for a in reversed(_known()) if a.kind == entry.kind and (not a.names or entry.name in a.names)]
    for adapter in candidates:
        if adapter.fits(module):
            if why := adapter.refusal(module):
                raise ValueError(why)
            return adapter
    candidates.reverse()
    layers_first = sorted(candidates, key=lambda a: not isinstance(a, LayerAdapter))
    names = [a.what or f"{a.original.__module__.split('.')[0]} {a.original.__name__}" for a in layers_first]
    places = " or ".join([", ".join(names[:-1]), names[-1]][len(names) == 1 :]) if names else "no module"
    other = sorted({a.kind for a in _known() if not a.names and a.fits(module) and not a.refusal(module)})
    hint = f"; a layer of kind {' or '.join(other)} would" if other else ""
    raise ValueError(
        f"layer {entry.name!r} is of kind {entry.kind} and takes the place of {places}, "
        f"not of {type(module).__name__}{hint}"
    )


def layer_adapter(kind: Kind, module: nn.Module) -> LayerAdapter | None:
    """The adapter that puts one layer of a kind into the place of this one; None if there is none."""
    for adapter in reversed(_adapters):
        if isinstance(adapter, LayerAdapter) and adapter.kind == kind and adapter.fits(module):
            return None if adapter.refusal(module) else adapter
    return None


def first_tensor(module: nn.Module) -> Tensor | None:
    """The parameter, or else the buffer, that says where a module lives and in what precision; None if it has none."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t for t in tensors if t.is_floating_point()), None)
