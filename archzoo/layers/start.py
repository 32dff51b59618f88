"""Starts that preserve a function: a layer of the zoo that computes, at first, what a trained usual layer computes.

A layer that can has a class method, `from_linear(linear, **options)` or `from_conv2d(conv, **options)`, that returns a
`Start`: the layer, and how far it is from the original. One that never can raises a ValueError that says why.

>>> from torch import nn
>>> from archzoo import PaonLinear
>>> layer, error = PaonLinear.from_linear(nn.Linear(64, 32), degrees=(2, 2))
>>> error
0.0
"""

import inspect
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from archzoo.registry import check_arguments

Layer = TypeVar("Layer", bound=nn.Module)


class Start(NamedTuple, Generic[Layer]):
    """A layer that starts as near to another as it can, and the distance; `layer, error = Layer.from_linear(linear)`.

    Attributes:
        layer: The new layer, with the original's sizes, bias, device, dtype and training mode. Shares no memory.
        error: Root mean square of the difference of their outputs, for standard normal inputs, over that of the
            original's output without its bias. 0.0: they agree for every input, to rounding.
    """

    layer: Layer
    error: float


def original_arguments(cls: type[nn.Module], original: nn.Module) -> dict[str, Any]:
    """What an `nn.Linear` or an `nn.Conv2d` decides of a layer of a class that takes its place: all but its options.

    Raises:
        TypeError: If the original is neither.
        ValueError: If the original is lazy, without sizes yet, or pads otherwise than the class can.
    """
    sizes = (
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        if isinstance(original, nn.Conv2d)
        else ("in_features", "out_features")
    )
    if not isinstance(original, nn.Linear | nn.Conv2d):
        raise TypeError(f"{type(original).__name__} is neither an nn.Linear nor an nn.Conv2d")
    if isinstance(original.weight, UninitializedParameter):
        raise ValueError(f"{type(original).__name__} has no sizes yet: give it an input first")
    arguments = {name: getattr(original, name) for name in sizes}
    arguments |= {"bias": original.bias is not None, "device": original.weight.device, "dtype": original.weight.dtype}
    if isinstance(original, nn.Conv2d) and original.padding_mode != "zeros":
        if "padding_mode" not in inspect.signature(cls).parameters:
            raise ValueError(f"padding_mode={original.padding_mode!r}: {cls.__name__} pads with zeros only")
        arguments["padding_mode"] = original.padding_mode
    return arguments


def fresh(cls: type[Layer], original: nn.Module, **options: Any) -> Layer:
    """A layer of a class, freshly initialised, in the shape of an `nn.Linear` or of an `nn.Conv2d`.

    Args:
        cls: The class; its signature is that of its kind.
        original: Whose sizes, bias, device, dtype and training mode the layer gets.
        options: The layer's own options.

    Raises:
        TypeError: If the original is neither an `nn.Linear` nor an `nn.Conv2d`, or the class has no such option.
        ValueError: If the original is lazy, without sizes yet, or on the meta device; if it pads otherwise than the
            class can; if an option is one that the original decides.
    """
    arguments = original_arguments(cls, original)
    if arguments["device"].type == "meta":
        raise ValueError("device='meta': the original holds no numbers to start from; load its weights first")
    for key in options.keys() & (arguments.keys() - {"padding_mode"}):
        raise ValueError(f"{key}={options[key]!r}: this is taken from the original layer; leave it out")
    arguments |= options
    check_arguments(cls.__name__, cls, kwargs=arguments)
    return cls(**arguments).train(original.training)


def check_original(original: Any, usual: type[nn.Module]) -> None:
    """A TypeError unless the original is of the type that a method starts from."""
    if not isinstance(original, usual):
        raise TypeError(f"{type(original).__name__} is not an nn.{usual.__name__}")


@torch.no_grad()
def copy_bias(layer: nn.Module, original: nn.Module) -> None:
    """Gives the layer the original's bias, where it has one."""
    if isinstance(original.bias, Tensor):
        layer.get_parameter("bias").copy_(original.bias)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Size of the difference of two weights over the size of the second, in float64; 0.0 if they are equal."""
    truth = truth.detach().double()
    difference = (found.detach().double() - truth).norm()
    return float(difference / truth.norm()) if difference else 0.0
