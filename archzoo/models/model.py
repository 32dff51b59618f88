"""The registry of models: functions that build a whole network around one kind of layer."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from archzoo.registry import LayerEntry, Registry, create_layer, get_layer


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
    """A registered layer with its options filled in; calling it with the sizes builds one.

    Args:
        name: Registry name.
        options: Keyword arguments of every layer built, as `{"grid_size": 8}`.
    """

    def __init__(self, name: str, options: dict[str, Any] | None = None):
        self.entry: LayerEntry = get_layer(name)
        self.options = dict(options or {})

    def __call__(self, in_features: int, out_features: int) -> nn.Module:
        """A fresh layer of these sizes."""
        return create_layer(self.entry.name, in_features, out_features, **self.options)


models: Registry[Callable[..., nn.Module]] = Registry("model", "archzoo.models")
register_model = models.register
