"""A multilayer perceptron whose hidden layers are any layer of kind `linear`."""

import math
from typing import Literal

from torch import Tensor, nn

from archzoo.models.model import LayerFactory, check_kind, make_activation, register_model
from archzoo.names import suggest
from archzoo.registry import list_layers


class MLP(nn.Module):
    """Flatten, then hidden layers (layer, norm, activation, dropout), then a head.

    Args:
        layer: Builds a hidden layer from its two sizes.
        input_shape: Shape of one input; it is flattened.
        output_size: Length of the output vector.
        width: Width of every hidden layer.
        depth: Number of hidden layers.
        widths: Width of each hidden layer, instead of `width` and `depth`.
        head: Registry name of the last layer, the same for every contestant; `"layer"`: the contestant again.
        norm: `"layer"`: LayerNorm behind every hidden layer. `"none"`.
        activation: Name of the function behind the norm; `"auto"`: `auto` if the layer is linear by itself, else none.
        auto: What `"auto"` stands for: ReLU unless something smooth is wanted, as of a network that is differentiated.
        dropout: Probability that a hidden value is dropped in training.

    Shape: (batch, *input_shape) -> (batch, output_size).

    Raises:
        ValueError: If an option is out of range, or the layer is not of kind `linear`.
    """

    def __init__(
        self,
        layer: LayerFactory,
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        width: int = 64,
        depth: int = 2,
        widths: tuple[int, ...] | None = None,
        head: str = "linear",
        norm: Literal["layer", "none"] = "layer",
        activation: str = "auto",
        auto: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        check_kind(layer, "mlp", "linear")
        if width < 1 or depth < 0:
            raise ValueError(f"width={width}, depth={depth}: width must be 1 or more, and depth 0 or more")
        if head != "layer" and head not in list_layers("linear"):
            raise ValueError(f"head={head!r}: must be 'layer' or a layer; {suggest(head, list_layers('linear'))}")
        if norm not in ("layer", "none"):
            raise ValueError(f"norm={norm!r}: must be 'layer' or 'none'")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
        self.widths = tuple(widths) if widths is not None else (width,) * depth
        sizes = (math.prod(input_shape), *self.widths)
        self.hidden = nn.Sequential()
        for before, after in zip(sizes, sizes[1:], strict=False):
            self.hidden.append(layer(before, after))
            if norm == "layer":
                self.hidden.append(nn.LayerNorm(after))
            function = make_activation(activation, layer.entry.nonlinear, auto)
            if function is not None:
                self.hidden.append(function)
            if dropout:
                self.hidden.append(nn.Dropout(dropout))
        last = layer if head == "layer" else LayerFactory(head)
        self.head = last(sizes[-1], output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, *input_shape) to (batch, output_size)."""
        return self.head(self.hidden(x.flatten(1)))


register_model("mlp")(MLP)
