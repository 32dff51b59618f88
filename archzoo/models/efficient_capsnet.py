"""Efficient-CapsNet: 161,824 parameters, and no rounds of routing (https://arxiv.org/abs/2101.12491)."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import Tensor, nn

from archzoo.layers.self_attention_routing import CUT, SelfAttentionRouting, squash_exp
from archzoo.models.capsule_network import CapsuleNetwork, in_timms_words, map_side, of_pixels, sides
from archzoo.models.registration import build

__all__ = ["EfficientCapsNet"]

TYPES, CAPSULE_DIM, CLASS_DIM = 16, 8, 16
CONVOLUTIONS = ((32, 5, 1), (64, 3, 1), (64, 3, 1), (128, 3, 2))
"""Channels, kernel size and stride of each."""
PRIMARY_KERNEL = 9


class EfficientCapsNet(CapsuleNetwork):
    """Four convolutions, primary capsules by a depthwise one, class capsules by self-attention routing; a decoder.

    Each convolution is followed by ReLU and batch normalisation; none is padded. The depthwise convolution, 9 x 9,
    makes 16 capsules of 8 at each place of its map, which for 28 x 28 pixels is one place. Pixels are from 0 to 1.
    161,824 parameters without the decoder.

    Args:
        num_classes: Classes.
        in_channels: Channels of an image.
        image_size: Side of an image in pixels, or (height, width).
        decoder: Widths of the decoder's hidden layers; None: no decoder.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        features: The four convolutions.
        primary: The depthwise convolution.
        routing: The `SelfAttentionRouting`.
        decoder: An `nn.Sequential`, or None.

    Shape: (batch, in_channels, height, width) -> (batch, num_classes), lengths in [0, 1).

    Raises:
        ValueError: If a size is out of range, or the image is too small for the kernels.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int | tuple[int, int] = 28,
        *,
        decoder: Sequence[int] | None = (512, 1024),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        height, width = sides(image_size)
        super().__init__(num_classes, CLASS_DIM, (in_channels, height, width), decoder, device, dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.features, before, places = nn.Sequential(), in_channels, [height, width]
        for channels, kernel_size, stride in CONVOLUTIONS:
            self.features.extend(
                [
                    nn.Conv2d(before, channels, kernel_size, stride, **factory),
                    nn.ReLU(),
                    nn.BatchNorm2d(channels, **factory),
                ]
            )
            before, places = channels, [map_side(side, kernel_size, stride, 0) for side in places]
        self.primary = nn.Conv2d(before, TYPES * CAPSULE_DIM, PRIMARY_KERNEL, groups=before, **factory)
        places = [map_side(side, PRIMARY_KERNEL, 1, 0) for side in places]
        if min(places) < 1:
            raise ValueError(f"image_size={image_size}: must be 27 pixels or more each way")
        lower = TYPES * places[0] * places[1]
        make = functools.partial(SelfAttentionRouting, lower, in_dim=CAPSULE_DIM, out_dim=CLASS_DIM, **factory)
        self._classify(make, (lower, CAPSULE_DIM))
        self._reset_convolutions()
        self.reset_decoder()

    def _reset_convolutions(self) -> None:
        """He's rule, cut at 2 standard deviations, as in the authors' code; biases 0."""
        for module in [*self.features, self.primary]:
            if isinstance(module, nn.Conv2d):
                std = math.sqrt(2 / module.weight[0].numel()) / CUT
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def lower_capsules(self, x: Tensor) -> Tensor:
        """The primary capsules (batch, in_capsules, 8) of images."""
        s = self.primary(self.features(x)).unflatten(1, (TYPES, CAPSULE_DIM))
        return squash_exp(s, 2).permute(0, 1, 3, 4, 2).flatten(1, 3)


default_cfgs = generate_default_cfgs(
    {"archzoo_efficient_capsnet": of_pixels(first_conv="features.0", classifier="routing")}
)


@register_with_timm
def archzoo_efficient_capsnet(pretrained: bool = False, **kwargs: Any) -> EfficientCapsNet:
    """Efficient-CapsNet for 28 x 28 grey pixels, 10 classes. Options are those of `EfficientCapsNet`."""
    return build(in_timms_words(EfficientCapsNet), "archzoo_efficient_capsnet", pretrained, kwargs)
