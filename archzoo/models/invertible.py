"""Invertible nets whose conditioners are made of any layer of kind `linear` or `conv2d`, for models around them."""

from torch import nn

from archzoo.layers.invertible import Inverse, InvertibleSequential, Squeeze2x2
from archzoo.layers.invertible_nets import ConvConditioner, InvertibleBlock, MLPConditioner
from archzoo.models.model import LayerFactory, check_kind, make_activation


def build_net(
    layer: LayerFactory,
    model: str,
    shape: tuple[int, ...],
    widths: tuple[int, ...],
    *,
    context_dim: int = 0,
    clamp: float = 5.0,
) -> InvertibleSequential:
    """An invertible net, a block for each width, whose conditioners' hidden layers are the contestant's.

    Args:
        layer: Of kind `linear` for vectors, `conv2d` for images; with SiLU behind it where it is linear by itself.
        model: Name of the model, for messages.
        shape: Of one point: (size,) or (channels, height, width). Images of odd channels are squeezed.
        widths: Of the hidden layers of each block's conditioners.
        context_dim: As in `InvertibleMLP`.
        clamp: As in `InvertibleMLP`.

    Raises:
        ValueError: If the layer is of another kind, or the shape of neither.
    """
    if len(shape) not in (1, 3):
        raise ValueError(f"model {model!r} takes vectors and images, not inputs of shape {shape}")
    image = len(shape) == 3
    check_kind(layer, model, "conv2d" if image else "linear")

    def activation() -> nn.Module:
        return make_activation("auto", layer.entry.nonlinear, "silu") or nn.Identity()

    def block(channels: int, width: int) -> InvertibleBlock:
        def conditioner(reads: int, writes: int) -> nn.Module:
            make = ConvConditioner if image else MLPConditioner
            return make(reads, writes, width, context_dim=context_dim, layer=layer, activation=activation)

        return InvertibleBlock(channels, conditioner, clamp=clamp, channel_dim=1 if image else -1)

    squeezes = image and shape[0] % 2 == 1
    if squeezes and (shape[1] % 2 or shape[2] % 2):
        raise ValueError(
            f"model {model!r} takes images of even height and width, not of {shape[1]} x {shape[2]} pixels"
        )
    blocks = [block(4 * shape[0] if squeezes else shape[0], width) for width in widths]
    if squeezes:
        return InvertibleSequential(Squeeze2x2(), *blocks, Inverse(Squeeze2x2()))
    return InvertibleSequential(*blocks)
