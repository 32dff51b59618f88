"""A Linearizer's flow as a one-step generator, with conditioners of any layer (https://arxiv.org/abs/2510.08570)."""

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from archzoo.layers.invertible import Conditioned
from archzoo.layers.linear_flow import METHODS, LinearFlow
from archzoo.layers.linear_operators import TimeLowRankOperator
from archzoo.models.invertible import build_net
from archzoo.models.model import LayerFactory, block_widths, register_model
from archzoo.names import suggest

if TYPE_CHECKING:
    from archzoo.tasks.task import Task


class LinearFlowModel(nn.Module):
    """Noise to samples in one step, which stands for many: `archzoo.layers.linear_flow.LinearFlow` for the trainer.

    It is trained by the flow's own loss, on the task's inputs, noise, and its targets, data.

    Args:
        layer: Makes hidden layers of the couplings' conditioners: of kind `linear` for vectors, `conv2d` for images.
        input_shape: Shape of one point.
        output_size: Its size.
        width: Of the conditioners' hidden layers.
        depth: Number of blocks of the invertible net.
        widths: A width for each block, instead of `width` and `depth`.
        rank: Of the operator.
        time_dim: Length of the operator's embedding of time.
        conditioned: Whether the net is told noise (0) from data (1); else both are seen by one and the same map.
        noise_level: Of the disturbance of latents in the loss.
        steps: Steps that are collapsed into one.
        method: `"euler"` or `"rk4"`.
        clamp: Bound of the couplings' log-scales.

    Attributes:
        flow: The `LinearFlow`.

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
        rank: int = 8,
        time_dim: int = 128,
        conditioned: bool = False,
        noise_level: float = 0.3,
        steps: int = 100,
        method: str = "euler",
        clamp: float = 5.0,
    ):
        super().__init__()
        size = math.prod(input_shape)
        if output_size != size:
            raise ValueError(
                f"model 'linear_flow' makes samples of the noise's {size} numbers, and the task wants {output_size}; "
                "choose task=flow_matching"
            )
        if steps < 1:
            raise ValueError(f"steps={steps}: must be 1 or more")
        if method not in METHODS:
            raise ValueError(f"method={method!r}: {suggest(str(method), METHODS)}")
        if not 0 <= noise_level < math.inf:
            raise ValueError(f"noise_level={noise_level}: must be 0 or more")
        self.widths = block_widths(width, depth, widths)
        self.noise_level, self.steps, self.method = noise_level, steps, method
        net = build_net(layer, "linear_flow", input_shape, self.widths, context_dim=int(conditioned), clamp=clamp)
        ends = (Conditioned(net, 0.0), Conditioned(net, 1.0)) if conditioned else (net, net)
        self.flow = LinearFlow(TimeLowRankOperator(size, rank, time_dim), *ends, shape=input_shape)

    def training_loss(self, task: "Task", inputs: Tensor, targets: Tensor) -> Tensor:
        """The flow's loss of noise (batch, *input_shape) and data (batch, output_size)."""
        return self.flow.loss(targets.view_as(inputs), inputs, noise_level=self.noise_level)

    def forward(self, x: Tensor) -> Tensor:
        """Samples (batch, output_size) of noise (batch, *input_shape), in one step."""
        return self.flow(x, self.steps, self.method).flatten(1)


register_model("linear_flow")(LinearFlowModel)
