"""An autoencoder whose first and last layers are any layer of kind `linear` (https://arxiv.org/abs/2410.02077)."""

import math

from torch import Tensor, nn

from archzoo.models.model import LayerFactory, block_widths, check_kind, make_activation, register_model


class Autoencoder(nn.Module):
    """Encoder: hidden layers (layer, activation), then `nn.Linear` to the latent. The decoder is its mirror image.

    At depth 1: layer, ReLU, linear, latent, linear, ReLU, layer. Outputs are not bounded.

    Args:
        layer: Builds a layer from its two sizes.
        input_shape: Shape of one input; it is flattened.
        output_size: Length of the reconstruction: that of the flattened input.
        width: Width of every hidden layer.
        depth: Number of hidden layers on each side of the latent.
        widths: Widths of the encoder's hidden layers, instead of `width` and `depth`.
        latent: Length of the latent.
        activation: Name of the function behind every hidden layer, the paper's ReLU by default; `"auto"`: ReLU if the
            layer is linear by itself, else none.

    Shape: (batch, *input_shape) -> (batch, output_size).

    Raises:
        ValueError: If an option is out of range, the output is not as long as the input, or the layer is not of kind
            `linear`.
    """

    def __init__(
        self,
        layer: LayerFactory,
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        width: int = 128,
        depth: int = 1,
        widths: tuple[int, ...] | None = None,
        latent: int = 16,
        activation: str = "relu",
    ):
        super().__init__()
        check_kind(layer, "autoencoder", "linear")
        size = math.prod(input_shape)
        if output_size != size:
            raise ValueError(
                f"model 'autoencoder' draws its input of {size} numbers again, and the task wants {output_size}; "
                "choose task=autoencoding"
            )
        self.widths = block_widths(width, depth, widths)
        if latent < 1:
            raise ValueError(f"latent={latent}: must be 1 or more")
        sizes = (size, *self.widths)
        self.encoder, self.decoder = nn.Sequential(), nn.Sequential(nn.Linear(latent, sizes[-1]))

        def activate(side: nn.Sequential) -> None:
            function = make_activation(activation, layer.entry.nonlinear)
            if function is not None:
                side.append(function)

        for before, after in zip(sizes, sizes[1:], strict=False):
            self.encoder.append(layer(before, after))
            activate(self.encoder)
        self.encoder.append(nn.Linear(sizes[-1], latent))
        for before, after in zip(sizes[::-1], sizes[-2::-1], strict=False):
            activate(self.decoder)
            self.decoder.append(layer(before, after))

    def encode(self, x: Tensor) -> Tensor:
        """The latents (batch, latent) of inputs (batch, *input_shape)."""
        return self.encoder(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        """The reconstructions (batch, output_size) of latents (batch, latent)."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, *input_shape) to (batch, output_size)."""
        return self.decode(self.encode(x))


register_model("autoencoder")(Autoencoder)
