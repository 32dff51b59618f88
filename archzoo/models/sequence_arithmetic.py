"""A network that reads digits and a unit that adds them up (arXiv 2001.05016, section 4.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from archzoo.kernels._op import running_sum
from archzoo.models.model import LayerFactory, check_kind, register_model

CHUNK = 1024
"""Images that are read at once: a test sequence has a thousand, and a convolution's output is large."""
START = {"sum": 0.0, "product": 1.0}


class SequenceArithmetic(nn.Module):
    """Reads each image of a sequence as one number, and feeds it, with its last output, to a unit of two inputs.

    The digit network is the paper's, the same for every contestant: convolution 5 x 5, pooling, convolution 5 x 5,
    pooling, both max-pooling over 2 x 2, a hidden layer, a number, with ReLU behind each but the last. The unit,
    `layer(2, 1)`, is the contestant. Its first state is what its operation leaves unchanged: 1 for a unit that can only
    multiply, 0 for any other.

    Args:
        layer: Builds the unit from its two sizes.
        input_shape: (length, channels, height, width) of a sequence; the length may differ from call to call.
        output_size: The length.
        width: Width of the hidden layer of the digit network.
        depth: Number of hidden layers.
        widths: Width of each hidden layer, instead of `width` and `depth`.
        channels: Channels of the two convolutions.
        accumulator: `"layer"`: the contestant. `"sum"`, `"product"`: the exact operation, without parameters; what then
            remains of error is the digit network's.

    Shape: (batch, length, channels, height, width) -> (batch, length): the result after each image.

    Raises:
        ValueError: If an option is out of range, the input has not four axes, or the layer is not of kind `linear`.
    """

    def __init__(
        self,
        layer: LayerFactory,
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        width: int = 500,
        depth: int = 1,
        widths: tuple[int, ...] | None = None,
        channels: Sequence[int] = (20, 50),
        accumulator: str = "layer",
    ):
        super().__init__()
        check_kind(layer, "sequence_arithmetic", "linear")
        if len(input_shape) != 4 or output_size != input_shape[0]:
            raise ValueError(
                f"input_shape={input_shape}, output_size={output_size}: must be (length, channels, height, width) and "
                "the length, as of task mnist_arithmetic"
            )
        if width < 1 or depth < 0:
            raise ValueError(f"width={width}, depth={depth}: width must be 1 or more, and depth 0 or more")
        if len(channels) != 2 or min(channels) < 1:
            raise ValueError(f"channels={list(channels)}: must be two whole numbers, 1 or more, as [20, 50]")
        if accumulator not in ("layer", *START):
            raise ValueError(f"accumulator={accumulator!r}: must be 'layer', 'sum' or 'product'")
        first, second = channels
        height, across = (((n - 4) // 2 - 4) // 2 for n in input_shape[2:])
        if min(height, across) < 1:
            raise ValueError(f"input_shape={input_shape}: images must be 16 x 16 or larger")
        self.accumulator = accumulator
        self.digits = nn.Sequential(
            nn.Conv2d(input_shape[1], first, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        sizes = (second * height * across, *(tuple(widths) if widths is not None else (width,) * depth))
        for before, after in zip(sizes, sizes[1:], strict=False):
            self.digits.extend([nn.Linear(before, after), nn.ReLU()])
        self.digits.append(nn.Linear(sizes[-1], 1))
        self.unit = layer(2, 1) if accumulator == "layer" else None
        multiplies = layer.entry.name in ("nmu", "npu", "real_npu") or layer.options.get("mode") == "multiply"
        self.start = START.get(accumulator, float(multiplies))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, length, channels, height, width) to (batch, length)."""
        digits = torch.cat([self.digits(part) for part in x.flatten(0, 1).split(CHUNK)]).view(x.shape[0], x.shape[1])
        if self.unit is None:
            return running_sum(digits, 1) if self.accumulator == "sum" else digits.cumprod(1)
        states = [torch.full_like(digits[:, :1], self.start)]
        for i in range(digits.shape[1]):
            states.append(self.unit(torch.cat([digits[:, i : i + 1], states[-1]], 1)))
        return torch.cat([digits[:, :0], *states[1:]], 1)


register_model("sequence_arithmetic")(SequenceArithmetic)
