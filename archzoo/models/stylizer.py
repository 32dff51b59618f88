"""Styles as matrices between two invertible nets, so that styles mix and compose exactly (arXiv 2510.08570)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archzoo.layers.linearizer import Linearizer
from archzoo.layers.style_operators import KernelOperator, StyleOperator
from archzoo.models.invertible import build_net
from archzoo.models.model import LayerFactory, block_widths, check_kind, register_model
from archzoo.pictures import Picture, tiles

if TYPE_CHECKING:
    from archzoo.tasks.task import Task

STOPS = 7
"""Mixtures of two styles in the picture."""


class Stylizer(nn.Module):
    """An image in each of several styles: g_y^{-1}(A_s g_x(x)), A_s a matrix or a kernel, the nets shared by all.

    Mixtures are of the operators, a A_1 + (1 - a) A_2, as the paper has it; upstream's code mixes the styles' numbers,
    and half-way between the first and the third asks for the second.

    Args:
        layer: Makes the hidden layers of the couplings' conditioners; of kind `conv2d`.
        input_shape: Shape of an image, (channels, height, width).
        output_size: That of all styles' images together.
        width: Of the conditioners' hidden layers.
        depth: Number of blocks of each net.
        widths: A width for each block, instead of `width` and `depth`.
        kernel_size: Side in pixels of a kernel for each style and channel, as in the paper; None: a whole matrix for
            each style, which can do more.
        clamp: Bound of the couplings' log-scales.

    Attributes:
        linearizer: The `Linearizer`, whose operator takes a style: its number, or weights that mix all.
        styles: Number of styles.

    Shape: (batch, *input_shape) -> (batch, styles · size), one style behind the other.

    Raises:
        ValueError: If an option is out of range, or the task or the layer is not for it.
    """

    def __init__(
        self,
        layer: LayerFactory,
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        width: int = 32,
        depth: int = 4,
        widths: tuple[int, ...] | None = None,
        kernel_size: int | None = None,
        clamp: float = 5.0,
    ):
        super().__init__()
        check_kind(layer, "stylizer", "conv2d")
        size = math.prod(input_shape)
        if len(input_shape) != 3 or output_size % size:
            raise ValueError(
                f"model 'stylizer' draws images of shape {input_shape} in every style, and the task wants "
                f"{output_size} numbers; choose task=style_transfer"
            )
        if kernel_size is not None and kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size}: must be 1 or more, or null")
        self.widths, self.styles = block_widths(width, depth, widths), output_size // size
        g_x, g_y = (build_net(layer, "stylizer", input_shape, self.widths, clamp=clamp) for _ in range(2))
        channels, height, columns = input_shape
        A: StyleOperator | KernelOperator = StyleOperator(size, self.styles)
        if kernel_size is not None:
            A = KernelOperator((channels, height, columns), kernel_size, self.styles)
        self.linearizer = Linearizer(g_x, A, g_y, x_shape=input_shape)

    def forward(self, x: Tensor) -> Tensor:
        """All styles of images (batch, *input_shape). Content is encoded once, and all are decoded in one batch."""
        f = self.linearizer
        z = f.space("x").encode(x)
        styled = torch.stack([f.A(z, style) for style in range(self.styles)], 1)
        return f.space("y").decode(styled).flatten(1)

    def pictures(self, task: "Task") -> dict[str, Picture]:
        """Mixtures of each pair of neighbouring styles, of the first test image."""
        if self.styles < 2:
            return {}
        f, weight = self.linearizer, next(self.parameters())
        image = task.test[0][0][None].to(weight)
        eye = torch.eye(self.styles, dtype=weight.dtype, device=weight.device)
        stops = torch.linspace(0, 1, STOPS, dtype=weight.dtype, device=weight.device)[:, None]
        rows = [
            f(image.expand(STOPS, *image.shape[1:]), (1 - stops) * eye[k] + stops * eye[k + 1])
            for k in range(self.styles - 1)
        ]
        told = "The first test image in mixtures of two operators: in each row from one style to the next."
        return {"mixtures": Picture(tiles(rows, zoom=max(1, 64 // image.shape[-1])), told)}


register_model("stylizer")(Stylizer)
