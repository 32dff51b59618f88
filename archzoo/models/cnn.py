"""A convolutional network whose blocks are any layer of kind `conv2d`."""

from typing import Literal

from torch import Tensor, nn

from archzoo.models.model import LayerFactory, block_widths, check_kind, make_activation, register_model
from archzoo.names import suggest

NORMS = ("batch", "instance", "none")


class CNN(nn.Module):
    """Blocks (convolution, norm, activation, 2 x 2 max pooling), the mean over the pixels, dropout, a linear head.

    `norm="instance", activation="prelu"` makes the blocks of torch-conv-kan.

    Args:
        layer: Builds a convolution from its channels, its kernel size and its padding.
        input_shape: Shape of one image, (channels, height, width).
        output_size: Length of the output vector.
        width: Channels of every block.
        depth: Number of blocks.
        widths: Channels of each block, instead of `width` and `depth`.
        kernel_size: Side of the kernels, in pixels. Odd, so that padding keeps the image's size.
        norm: `"batch"`, `"instance"` (without parameters) or `"none"`.
        activation: Name of the function behind the norm; `"auto"`: ReLU if the layer is linear by itself, else none.
        pool_every: Every how many blocks the image is pooled to half its sides.
        stem: Channels of an `nn.Conv2d` before the first block, the same for every contestant; 0: none. Layers that
            need a multiple of some number of channels cannot read the image itself.
        dropout: Probability that a value before the head is dropped in training.

    Shape: (batch, *input_shape) -> (batch, output_size).

    Raises:
        ValueError: If an option is out of range, a block would see an image less than 2 pixels high or wide, or the
            layer is not of kind `conv2d`.
    """

    def __init__(
        self,
        layer: LayerFactory,
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        width: int = 32,
        depth: int = 2,
        widths: tuple[int, ...] | None = None,
        kernel_size: int = 3,
        norm: Literal["batch", "instance", "none"] = "batch",
        activation: str = "auto",
        pool_every: int = 1,
        stem: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_kind(layer, "cnn", "conv2d")
        if len(input_shape) != 3:
            raise ValueError(f"model 'cnn' takes images (channels, height, width), not inputs of shape {input_shape}")
        self.widths = block_widths(width, depth, widths)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd and positive")
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: {suggest(norm, NORMS)}")
        if pool_every < 1:
            raise ValueError(f"pool_every={pool_every}: must be 1 or more")
        if stem < 0:
            raise ValueError(f"stem={stem}: must be a number of channels, or 0 for none")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
        channels, height, width_of_image = input_shape
        halvings = (len(self.widths) - 1) // pool_every
        if min(height, width_of_image) >> halvings < 2:
            raise ValueError(
                f"depth={len(self.widths)}, pool_every={pool_every}: after {halvings} poolings, the last block would "
                f"see {height >> halvings} x {width_of_image >> halvings} of {height} x {width_of_image} pixels; it "
                "needs 2 or more each way"
            )
        self.stem = nn.Conv2d(channels, stem, kernel_size, padding=kernel_size // 2) if stem else nn.Identity()
        self.blocks = nn.Sequential()
        sizes = (stem or channels, *self.widths)
        for number, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
            block = nn.Sequential(layer(before, after, kernel_size, padding=kernel_size // 2))
            if norm != "none":
                block.append(nn.BatchNorm2d(after) if norm == "batch" else nn.InstanceNorm2d(after))
            function = make_activation(activation, layer.entry.nonlinear)
            if function is not None:
                block.append(function)
            if number % pool_every == 0:
                block.append(nn.MaxPool2d(2))
            self.blocks.append(block)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(sizes[-1], output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, *input_shape) to (batch, output_size)."""
        return self.head(self.dropout(self.blocks(self.stem(x)).mean((2, 3))))


register_model("cnn")(CNN)
