"""CapsNet: two convolutions, routing, and a decoder that draws what a capsule says (https://arxiv.org/abs/1710.09829).

`import archzoo.models` registers it with timm:

>>> import timm
>>> import archzoo.models
>>> model = timm.create_model("archzoo_capsnet_small", num_classes=10, decoder=False)
>>> model.routing
DynamicRouting(288, 10, 8, 16, bias=True, iterations=3, leaky=False, detach=False)
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers._check import check_whole
from archzoo.layers.capsules import INIT_BIAS, DynamicRouting, PrimaryCapsules
from archzoo.models.capsule_network import (
    RECON_WEIGHT,
    BuildRouting,
    CapsuleNetwork,
    in_timms_words,
    linear_capsules,
    map_side,
    of_pixels,
    sides,
)
from archzoo.models.model import LayerFactory, register_model
from archzoo.models.registration import build

__all__ = ["CapsNet"]

CONV_STD = 0.05
"""Of the first convolution's weights, a normal distribution that is cut at twice as much."""


class CapsNet(CapsuleNetwork):
    """Convolution, ReLU, primary capsules, class capsules by routing; and a decoder that reconstructs the image.

    With the default sizes it is the paper's network: 8,215,728 parameters for 28 x 28 grey pixels, 6,804,384 without
    the decoder. The number of lower capsules follows from `image_size`. Pixels are from 0 to 1.

    Args:
        num_classes: Classes; 0: none, and no decoder.
        in_channels: Channels of an image.
        image_size: Side of an image in pixels, or (height, width).
        channels: Channels of the first convolution.
        kernel_size: Side of the kernels of both convolutions, whose strides are 1 and 2.
        padding: Pixels of zeros around the input of both.
        capsule_types: Primary capsules at each place of the map.
        capsule_dim: Size of a primary capsule.
        class_dim: Size of a class capsule.
        iterations: Rounds of routing.
        leaky: Whether a vote may go nowhere.
        detach: Whether the gradient runs through the last round only.
        shared_coupling: See `PrimaryCapsules`.
        decoder: Widths of the decoder's hidden layers; None: no decoder.
        routing: Builds the layer of class capsules from (in_capsules, num_classes, capsule_dim, class_dim), instead of
            `DynamicRouting` with the options above.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        conv: The first convolution.
        primary: The `PrimaryCapsules`.
        routing: The layer of class capsules.
        decoder: An `nn.Sequential`, or None.

    Shape: (batch, in_channels, height, width) -> (batch, num_classes), lengths in [0, 1).

    Raises:
        ValueError: If a size is out of range, or the image is too small for the kernels.
    """

    routing: nn.Module

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        *,
        channels: int = 256,
        kernel_size: int = 9,
        padding: int = 0,
        capsule_types: int = 32,
        capsule_dim: int = 8,
        class_dim: int = 16,
        iterations: int = 3,
        leaky: bool = False,
        detach: bool = False,
        shared_coupling: bool = True,
        decoder: Sequence[int] | None = (512, 1024),
        routing: BuildRouting | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        height, width = sides(image_size)
        super().__init__(num_classes, class_dim, (in_channels, height, width), decoder, device, dtype)
        check_whole(channels=channels, kernel_size=kernel_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.primary = PrimaryCapsules(
            channels,
            capsule_types,
            capsule_dim,
            kernel_size,
            2,
            padding,
            shared_coupling=shared_coupling,
            leaky=leaky,
            **factory,
        )
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=padding, **factory)
        places = [
            map_side(map_side(side, kernel_size, 1, padding), kernel_size, 2, padding) for side in (height, width)
        ]
        if min(places) < 1:
            raise ValueError(
                f"image_size={image_size}: too small for two kernels of {kernel_size} pixels, padding {padding}; it "
                f"must be {2 * kernel_size - 1 - 4 * padding} or more each way, or choose a smaller kernel_size"
            )
        lower = capsule_types * places[0] * places[1]
        made: Any = routing
        if routing is None:
            made = functools.partial(DynamicRouting, iterations=iterations, leaky=leaky, detach=detach, **factory)
        self._classify(functools.partial(_routed, made, lower, capsule_dim, class_dim), (lower, capsule_dim))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.trunc_normal_(self.conv.weight, std=CONV_STD, a=-2 * CONV_STD, b=2 * CONV_STD)
        assert self.conv.bias is not None
        nn.init.constant_(self.conv.bias, INIT_BIAS)
        self.reset_decoder()

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        self.primary.reset_parameters()
        for module in self.routing.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self._reset_own()

    def lower_capsules(self, x: Tensor) -> Tensor:
        """The primary capsules (batch, in_capsules, capsule_dim) of images."""
        return self.primary(F.relu(self.conv(x)))


def _routed(make: BuildRouting, lower: int, capsule_dim: int, class_dim: int, num_classes: int) -> nn.Module:
    return make(lower, num_classes, capsule_dim, class_dim)  # of the module, that a network can be pickled


# ---- timm


_CONFIG = of_pixels(first_conv="conv", classifier="routing")
default_cfgs = generate_default_cfgs({"archzoo_capsnet": _CONFIG, "archzoo_capsnet_small": _CONFIG})


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]) -> CapsNet:
    return build(in_timms_words(CapsNet), variant, pretrained, {**sizes, **options})


@register_with_timm
def archzoo_capsnet(pretrained: bool = False, **kwargs: Any) -> CapsNet:
    """The paper's network for 28 x 28 grey pixels, 10 classes. Options are those of `CapsNet`, as `iterations=1`."""
    return _create("archzoo_capsnet", pretrained, {}, kwargs)


@register_with_timm
def archzoo_capsnet_small(pretrained: bool = False, **kwargs: Any) -> CapsNet:
    """A quarter of the channels and of the capsule types: 2.1 million parameters, 30 MFLOP an image."""
    return _create("archzoo_capsnet_small", pretrained, {"channels": 64, "capsule_types": 8}, kwargs)


# ---- the trainer


CAPSULE_SIZES = ("in_capsules", "out_capsules", "in_dim", "out_dim")


def routing_of(layer: LayerFactory, model: str) -> BuildRouting:
    """How a contestant makes class capsules: by itself, or, where it is of kind `linear`, by one map and squash.

    Raises:
        ValueError: If it is of neither kind.
    """
    if layer.entry.kind == "linear":
        return linear_capsules(layer)
    if tuple(inspect.signature(layer.entry.cls).parameters)[: len(CAPSULE_SIZES)] != CAPSULE_SIZES:
        raise ValueError(
            f"layer={layer.entry.name!r}: model {model!r} needs a layer of capsules, as 'capsules' or "
            "'self_attention_routing', or one of kind 'linear', which is then squashed"
        )
    return layer


class TrainedCapsNet(CapsNet):
    """The trainer's CapsNet: the class capsules are the contestant's, all else is the same for all.

    Args:
        layer: Builds the class capsules: `capsules`, `self_attention_routing`, or a layer of kind `linear`, whose
            output is squashed.
        input_shape: Shape of one image, (channels, height, width).
        output_size: Number of classes.
        width: Channels of the first convolution.
        depth: Convolutions before the primary capsules: 1.
        widths: One width, instead of `width`.
        kernel_size: Side of the kernels of both convolutions.
        padding: Pixels of zeros around the input of both.
        capsule_types: Primary capsules at each place of the map.
        capsule_dim: Size of a primary capsule.
        class_dim: Size of a class capsule.
        shared_coupling: See `PrimaryCapsules`.
        decoder: Widths of the decoder's hidden layers; null: none.
        recon_weight: Of the squared error of the reconstruction, a sum over pixels; 0: no reconstruction is trained.
        shift: Pixels by which training images are shifted at most, at random.

    Shape: (batch, *input_shape) -> (batch, output_size).

    Raises:
        ValueError: If an option is out of range, or the layer does not make capsules.
    """

    def __init__(
        self,
        layer: LayerFactory,
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        width: int = 256,
        depth: int = 1,
        widths: tuple[int, ...] | None = None,
        kernel_size: int = 9,
        padding: int = 0,
        capsule_types: int = 32,
        capsule_dim: int = 8,
        class_dim: int = 16,
        shared_coupling: bool = True,
        decoder: Sequence[int] | None = (512, 1024),
        recon_weight: float = RECON_WEIGHT,
        shift: int = 0,
    ):
        if len(input_shape) != 3:
            raise ValueError(
                f"model 'capsnet' takes images (channels, height, width), not inputs of shape {input_shape}"
            )
        chosen = (width,) * depth if widths is None else tuple(widths)
        if len(chosen) != 1 or chosen[0] < 1:
            raise ValueError(f"width={width}, depth={depth}: width must be 1 or more, and depth 1, as in the paper")
        if isinstance(recon_weight, bool) or not isinstance(recon_weight, int | float) or recon_weight < 0:
            raise ValueError(f"recon_weight={recon_weight!r}: must be a number, 0 or more")
        if isinstance(shift, bool) or not isinstance(shift, int) or not 0 <= shift < min(input_shape[1:]):
            raise ValueError(f"shift={shift!r}: must be a number of pixels, 0 or more, and below the image's side")
        super().__init__(
            output_size,
            input_shape[0],
            (input_shape[1], input_shape[2]),
            channels=chosen[0],
            kernel_size=kernel_size,
            padding=padding,
            capsule_types=capsule_types,
            capsule_dim=capsule_dim,
            class_dim=class_dim,
            leaky=bool(layer.options.get("leaky", False)),
            shared_coupling=shared_coupling,
            decoder=decoder,
            routing=routing_of(layer, "capsnet"),
        )
        self.recon_weight, self.shift = float(recon_weight), shift


register_model("capsnet")(TrainedCapsNet)
