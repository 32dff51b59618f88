"""The registry of models: functions that build a whole network around one kind of layer."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from archzoo.names import suggest
from archzoo.registry import Kind, LayerEntry, Registry, create_layer, get_layer


class BuildModel(Protocol):
    """Builds a network from a layer, the shapes of a task, and a width of every hidden layer."""

    def __call__(
        self,
        layer: "LayerFactory",
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        widths: tuple[int, ...] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The network: (batch, *input_shape) -> (batch, output_size)."""
        ...


class LayerFactory:
    """A registered layer with its options filled in; calling it with what its kind takes builds one.

    Args:
        name: Registry name.
        options: Keyword arguments of every layer built, as `{"grid_size": 8}`.

    >>> LayerFactory("linear", {"bias": False})(64, 32)
    Linear(in_features=64, out_features=32, bias=False)
    """

    def __init__(self, name: str, options: dict[str, Any] | None = None):
        self.entry: LayerEntry = get_layer(name)
        self.options = dict(options or {})

    def __call__(self, *sizes: Any, **arguments: Any) -> nn.Module:
        """A fresh layer: `(in_features, out_features)`, or `(in_channels, out_channels, kernel_size, padding=1)`.

        Raises:
            ValueError: If an option is also an argument of this call, or the layer refuses a value.
            TypeError: If the layer has no such option.
        """
        for key in self.options.keys() & arguments.keys():
            raise ValueError(f"{key}={self.options[key]!r}: the model sets it to {arguments[key]!r}; leave it out")
        return create_layer(self.entry.name, *sizes, **self.options, **arguments)


def check_kind(layer: LayerFactory, model: str, kind: Kind) -> None:
    """A ValueError unless the layer is of the kind that the model is made of."""
    if layer.entry.kind != kind:
        raise ValueError(
            f"layer={layer.entry.name!r} is of kind {layer.entry.kind!r}, and model {model!r} is made of layers of "
            f"kind {kind!r}, as {kind!r} itself; `archzoo.list_layers(kind={kind!r})` lists them"
        )


def block_widths(width: int, depth: int, widths: tuple[int, ...] | None) -> tuple[int, ...]:
    """The hidden width of each block: `depth` times the same, or those that are given.

    Raises:
        ValueError: If a width or the depth is below 1.
    """
    chosen = (width,) * depth if widths is None else tuple(widths)
    if not chosen or min(chosen) < 1:
        raise ValueError(f"width={width}, depth={depth}: both must be 1 or more")
    return chosen


def token_sizes(width: int, depth: int, widths: tuple[int, ...] | None, dim: int | None) -> tuple[tuple[int, ...], int]:
    """The hidden width of each block of a model of tokens, and the size of a token: a quarter of the last by default.

    Raises:
        ValueError: If a width or the depth is below 1, or the width cannot be quartered.
    """
    chosen = block_widths(width, depth, widths)
    if dim is None:
        if chosen[-1] % 4:
            raise ValueError(f"width={chosen[-1]}: must be a multiple of 4, for dim=None is a quarter of it")
        dim = chosen[-1] // 4
    return chosen, dim


ACTIVATIONS = ("auto", "none", "relu", "gelu", "silu", "tanh", "aptx", "prelu")


def make_activation(name: str, nonlinear: bool, auto: str = "relu") -> nn.Module | None:
    """A fresh activation to be put behind a layer, or None.

    Args:
        name: One of `ACTIVATIONS`; `"auto"` is none behind a layer that bends its input by itself, else `auto`.
        nonlinear: Whether the layer does.
        auto: Another of the names.

    Raises:
        ValueError: If there is no such activation.
    """
    choices = {"activation": list(ACTIVATIONS), "auto": [a for a in ACTIVATIONS if a != "auto"]}
    for key, value in (("activation", name), ("auto", auto)):
        if value not in choices[key]:
            raise ValueError(f"{key}={value!r}: {suggest(str(value), choices[key])}")
    if name == "auto":
        name = "none" if nonlinear else auto
    if name == "aptx":
        from archzoo.layers.aptx import APTx

        return APTx()
    modules = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "prelu": nn.PReLU}
    return modules[name]() if name in modules else None


models: Registry[Callable[..., nn.Module]] = Registry("model", "archzoo.models")
register_model = models.register
