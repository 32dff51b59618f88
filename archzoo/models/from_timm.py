"""The trainer's model `timm`: any model of timm, with layers of the zoo swapped into it (`swap=…`)."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.models.model import LayerFactory, register_model
from archzoo.names import suggest

MULTIPLE = 32
"""Nearly all models of timm take images whose sides are multiples of this."""


class TimmModel(nn.Module):
    """A model of timm behind an enlargement of its images.

    Args:
        body: The model of timm.
        size: (height, width) to which images are enlarged, in pixels.

    Shape: (batch, channels, H, W) -> (batch, classes).
    """

    def __init__(self, body: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.body, self.size = body, size

    def arguments(self, x: Tensor) -> Tensor:
        """What the body is called with, for images (batch, channels, H, W)."""
        return x if x.shape[-2:] == self.size else F.interpolate(x, self.size, mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (batch, channels, H, W) to (batch, classes)."""
        y: Tensor = self.body(self.arguments(x))
        return y

    def extra_repr(self) -> str:
        """The size of the images."""
        return f"size={self.size}"


@register_model("timm")
def from_timm(
    layer: LayerFactory,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    name: str,
    image_size: int | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    options: dict[str, Any] | None = None,
) -> TimmModel:
    """A model of timm for the images and classes of a task.

    Args:
        layer: Of no use here: what the contestant takes the place of is said by `swap`.
        input_shape: Shape of one image, (channels, height, width).
        output_size: Number of classes.
        name: As timm has it, `"vit_tiny_patch16_224"`; those of `import archzoo.models` too.
        image_size: Side in pixels to which images are enlarged. None: each side to the next multiple of 32.
        pretrained: Whether to load timm's weights, which timm then looks for on the network.
        checkpoint: A file of weights to start from, `.safetensors`: others are pickles.
        options: Of `timm.create_model`, as `{"drop_path_rate": 0.1}`; none that says where weights come from.

    Raises:
        ValueError: If there is no such model, timm refuses an option, or it does not run on such images.
    """
    if len(input_shape) != 3:
        raise ValueError(f"model 'timm' takes images (channels, height, width), not inputs of shape {input_shape}")
    if not timm.is_model(name):
        raise ValueError(f"name={name!r}: timm has no such model; {suggest(name, timm.list_models())}")
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size={image_size!r}: must be a side in pixels, or null")
    if taken := sorted(key for key in options or {} if key.startswith(("pretrained", "checkpoint", "cache"))):
        right = f"weights come by pretrained=true, or from the file checkpoint; leave out {', '.join(taken)}"
        raise ValueError(f"options={options}: {right}")
    channels, *sides = input_shape
    height, width = (image_size or -(-side // MULTIPLE) * MULTIPLE for side in sides)
    given = {"in_chans": channels, "num_classes": output_size, **(options or {})}
    usual = timm.get_pretrained_cfg(name)
    if usual is not None and usual.fixed_input_size:
        given = {"img_size": (height, width), **given}
    meta = torch.get_default_device().type == "meta"  # only its sizes are asked for
    try:
        with torch.device("meta"):
            y = timm.create_model(name, **given).eval()(torch.zeros(1, channels, height, width))
    except Exception as error:  # of anyone's model
        size = "x".join(map(str, usual.input_size[1:])) if usual is not None else "unknown"
        raise ValueError(
            f"image_size={image_size}: {name} does not run on images of {height} x {width} pixels with options="
            f"{options or {}} ({type(error).__name__}: {error}); its usual size is {size}"
        ) from error
    if not isinstance(y, Tensor) or y.shape != (1, output_size):
        raise ValueError(f"name={name!r}: its output is not one score for each of {output_size} classes")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ValueError(f"checkpoint={checkpoint!r}: there is no such file")
    if checkpoint is not None and Path(checkpoint).suffix != ".safetensors":
        raise ValueError(
            f"checkpoint={checkpoint!r}: is not read, for a pickle may run code; convert it to a .safetensors file"
        )
    if not meta:
        given |= {"pretrained": pretrained, "checkpoint_path": checkpoint or ""}
    return TimmModel(timm.create_model(name, **given), (height, width))
