"""PadeNet: a super-resolution network of any layer of kind `conv2d` (https://arxiv.org/abs/2403.11791)."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.models.model import LayerFactory, block_widths, check_kind, make_activation, register_model
from archzoo.names import suggest
from archzoo.registry import list_layers

BLOCKS = ("residual", "plain")


class PadeNet(nn.Module):
    """Enlarges an image: what its convolutions draw is added to the bicubic enlargement.

    `blocks="residual"` is built like EDSR (https://arxiv.org/abs/1707.02921), by analogy: that this is the papers' own
    network could not be verified. A convolution to W channels; `depth` residual blocks of two convolutions, W to
    `widths[i]` to W, with an activation between them; a convolution; a skip around all of these; for each factor of the
    scale (2, 3, or 2 and 2) a convolution to W factor² channels and a pixel shuffle; a convolution to the image.
    W is the last of `widths`, so that a budget that sets them sets the whole network.

    `blocks="plain"` is the network of our reference protocol: `depth` convolutions, each with an activation behind it,
    a convolution to channels · scale² and one pixel shuffle. Two of width 16 that enlarge a grey image 2 times have
    3,060 parameters.

    The enlargement is torch's, a = -0.75, and costs no FLOPs that `count_flops` counts. Images of any size may come.

    Args:
        layer: Builds a convolution from its channels, its kernel size and its padding.
        input_shape: Shape of one image, (channels, height, width).
        output_size: Number of values of the enlarged image: channels · height · width · scale². It tells the scale.
        width: Channels of every hidden convolution.
        depth: Number of residual blocks; of hidden convolutions if plain.
        widths: Channels inside each block, or of each hidden convolution if plain, instead of `width` and `depth`.
        blocks: `"residual"` or `"plain"`.
        kernel_size: Side of the kernels, in pixels. Odd, so that padding keeps the image's size.
        ends: Registry name of the convolutions before and behind the body, the same for every contestant; `"layer"`:
            the contestant's. Layers that need a multiple of some number of channels cannot read the image itself.
        activation: Name of the function; `"auto"`: ReLU behind a layer that is linear by itself, none behind others.

    Shape: (batch, channels, H, W) -> (batch, channels, scale · H, scale · W).

    Raises:
        ValueError: If an option is out of range, the output is not an enlarged input, or a layer is not of kind
            `conv2d`.
    """

    def __init__(
        self,
        layer: LayerFactory,
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        width: int = 16,
        depth: int = 2,
        widths: tuple[int, ...] | None = None,
        blocks: str = "residual",
        kernel_size: int = 3,
        ends: str = "layer",
        activation: str = "auto",
    ):
        super().__init__()
        check_kind(layer, "padenet", "conv2d")
        if len(input_shape) != 3:
            raise ValueError(
                f"model 'padenet' takes images (channels, height, width), not inputs of shape {input_shape}"
            )
        size = math.prod(input_shape)
        self.scale = math.isqrt(output_size // size)
        if self.scale < 2 or self.scale**2 * size != output_size:
            raise ValueError(
                f"model 'padenet' enlarges its input of {size} numbers 2, 3, … times each way, and the task wants "
                f"{output_size}; choose task=super_resolution"
            )
        self.widths = block_widths(width, depth, widths)
        if blocks not in BLOCKS:
            raise ValueError(f"blocks={blocks!r}: {suggest(blocks, BLOCKS)}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd and positive")
        if ends != "layer" and ends not in list_layers("conv2d"):
            raise ValueError(f"ends={ends!r}: must be 'layer' or a layer; {suggest(ends, list_layers('conv2d'))}")
        self.residual = blocks == "residual"
        outer = layer if ends == "layer" else LayerFactory(ends)

        def convolution(factory: LayerFactory, before: int, after: int, active: bool = False) -> list[nn.Module]:
            function = make_activation(activation, factory.entry.nonlinear)
            made = factory(before, after, kernel_size, padding=kernel_size // 2)
            return [made, function] if active and function is not None else [made]

        channels, trunk = input_shape[0], self.widths[-1]
        if self.residual:
            self.head = nn.Sequential(*convolution(outer, channels, trunk))
            self.body = nn.Sequential(
                *(
                    _Residual(*convolution(layer, trunk, inner, active=True), *convolution(layer, inner, trunk))
                    for inner in self.widths
                ),
                *convolution(layer, trunk, trunk),
            )
            self.tail = nn.Sequential()
            for factor in (2, 2) if self.scale == 4 else (self.scale,):
                self.tail.extend([*convolution(outer, trunk, trunk * factor**2), nn.PixelShuffle(factor)])
            self.tail.extend(convolution(outer, trunk, channels))
        else:
            self.head = nn.Sequential(*convolution(outer, channels, self.widths[0], active=True))
            self.body = nn.Sequential()
            for before, after in zip(self.widths, self.widths[1:], strict=False):
                self.body.extend(convolution(layer, before, after, active=True))
            last = convolution(outer, trunk, channels * self.scale**2)
            self.tail = nn.Sequential(*last, nn.PixelShuffle(self.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (batch, channels, H, W) to (batch, channels, scale · H, scale · W). Values are not bounded."""
        first = self.head(x)
        body = self.body(first)
        detail = self.tail(body + first if self.residual else body)
        return F.interpolate(x, size=detail.shape[-2:], mode="bicubic") + detail


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


register_model("padenet")(PadeNet)
