"""A network that is a projection by construction: a Linearizer of zeros and ones (arXiv 2510.08570)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archzoo.layers.linear_operators import ProjectorOperator
from archzoo.layers.linearizer import Linearizer
from archzoo.models.invertible import build_net
from archzoo.models.model import LayerFactory, block_widths, register_model

if TYPE_CHECKING:
    from archzoo.tasks.task import Task


class Projector(nn.Module):
    """f(f(x)) = f(x) for every input: one invertible net on both sides of a diagonal of zeros and ones.

    After the paper's idempotent generator, for which there is no code. Beside the task's loss, each open gate costs, so
    that few stay open, and latents keep the inputs' distances from 0: | |g(x) - g(0)|^2 - |x|^2 |, per number.

    Args:
        layer: Makes hidden layers of the couplings' conditioners: of kind `linear` for vectors, `conv2d` for images.
        input_shape: Shape of one input.
        output_size: Its size.
        width: Of the conditioners' hidden layers.
        depth: Number of blocks of the invertible net.
        widths: A width for each block, instead of `width` and `depth`.
        rank_weight: Of the mean of the gates' sigmoids in the loss.
        isometry_weight: Of the isometry in the loss.
        clamp: Bound of the couplings' log-scales.

    Attributes:
        linearizer: The `Linearizer`.

    Shape: (batch, *input_shape) -> (batch, output_size).

    Raises:
        ValueError: If an option is out of range, or the layer does not go with the inputs.
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
        rank_weight: float = 0.01,
        isometry_weight: float = 0.001,
        clamp: float = 5.0,
    ):
        super().__init__()
        size = math.prod(input_shape)
        if output_size != size:
            raise ValueError(
                f"model 'projector' maps its input of {size} numbers to as many, and the task wants {output_size}; "
                "choose task=idempotent"
            )
        for name, value in (("rank_weight", rank_weight), ("isometry_weight", isometry_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: must be 0 or more")
        self.widths, self.isometry_weight = block_widths(width, depth, widths), isometry_weight
        net = build_net(layer, "projector", input_shape, self.widths, clamp=clamp)
        self.linearizer = Linearizer(net, ProjectorOperator(size, rank_weight=rank_weight / size), x_shape=input_shape)

    def training_loss(self, task: "Task", inputs: Tensor, targets: Tensor) -> Tensor:
        """The task's loss and the isometry's; the loop adds the gates'. The inputs pass through the net once."""
        f = self.linearizer
        z = f.space().encode(inputs)
        loss = task.loss(f.space().decode(f.A(z)).flatten(1), targets)
        if not self.isometry_weight:
            return loss
        origin = f.space().encode(torch.zeros_like(inputs[:1]))
        gap = (z - origin).square().mean(-1) - inputs.flatten(1).square().mean(-1)
        return loss + self.isometry_weight * gap.abs().mean()

    def encode(self, x: Tensor) -> Tensor:
        """Latents (batch, output_size) of inputs, zero where a gate is shut."""
        return self.linearizer.A(self.linearizer.space().encode(x))

    def forward(self, x: Tensor) -> Tensor:
        """Projections (batch, output_size) of inputs (batch, *input_shape)."""
        return self.linearizer(x).flatten(1)


register_model("projector")(Projector)
