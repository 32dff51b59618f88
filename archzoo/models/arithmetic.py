"""The model of the arithmetic tasks (arXiv 2001.05016): units that make sums, and a last unit that combines them."""

import math
from typing import Any

from torch import Tensor, nn

from archzoo.models.model import LayerFactory, check_kind, register_model
from archzoo.names import suggest
from archzoo.registry import layer_options, list_layers


class ArithmeticModel(nn.Module):
    """Units for the sums, then the contestant, which combines them; nothing between them.

    A unit that can only multiply has an adding one of its family before it, as in the paper: a NAU before an NMU, an
    NPU or a RealNPU; a NAC or an MCFC that adds before one that multiplies. It gets the contestant's options, as far as
    it has them. Any other contestant makes its sums itself.

    Args:
        layer: Builds the contestant from its two sizes.
        input_shape: Shape of one input; it is flattened.
        output_size: Length of the output vector.
        width: Number of sums, the outputs of every unit but the last.
        depth: Number of units before the last. 0: a single unit.
        widths: Outputs of each unit before the last, instead of `width` and `depth`.
        first: What makes the sums: `"auto"`, as above; `"layer"`, the contestant; or another layer's registry name.

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
        width: int = 2,
        depth: int = 1,
        widths: tuple[int, ...] | None = None,
        first: str = "auto",
    ):
        super().__init__()
        check_kind(layer, "arithmetic", "linear")
        if width < 1 or depth < 0:
            raise ValueError(f"width={width}, depth={depth}: width must be 1 or more, and depth 0 or more")
        if first not in ("auto", "layer") and first not in list_layers("linear"):
            names = list_layers("linear")
            raise ValueError(f"first={first!r}: must be 'auto', 'layer' or a layer; {suggest(first, names)}")
        adding = _adding(layer) if first == "auto" else layer if first == "layer" else LayerFactory(first)
        self.widths = tuple(widths) if widths is not None else (width,) * depth
        sizes = (math.prod(input_shape), *self.widths)
        self.sums = nn.Sequential(*(adding(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))
        self.last = layer(sizes[-1], output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, *input_shape) to (batch, output_size)."""
        return self.last(self.sums(x.flatten(1)))


def _adding(layer: LayerFactory) -> LayerFactory:
    """The layer that makes sums for a contestant that cannot; else the contestant."""
    name, options = layer.entry.name, dict(layer.options)
    if name in ("nmu", "npu", "real_npu"):
        known: set[Any] = {"bias", *layer_options("nau")}
        return LayerFactory("nau", {key: value for key, value in options.items() if key in known})
    if options.get("mode") == "multiply":
        return LayerFactory(name, options | {"mode": "add"})
    return layer


register_model("arithmetic")(ArithmeticModel)
