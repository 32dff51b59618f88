"""Capsules on top of any backbone of timm: its features become primary capsules, which are routed to the classes.

>>> import timm
>>> import archzoo.models
>>> model = timm.create_model(
...     "archzoo_capsule_classifier", backbone="resnet10t", num_classes=10, img_size=64, capsule_types=4
... )
>>> model.head.routing
DynamicRouting(16, 10, 8, 16, bias=True, iterations=3, leaky=False, detach=False)
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import register_model as register_with_timm
from torch import Tensor, nn

from archzoo.layers._check import check_whole
from archzoo.layers.capsules import DynamicRouting, squash
from archzoo.models.capsule_network import CapsuleNetwork, sides

__all__ = ["CapsuleClassifier", "CapsuleHead"]


class CapsuleHead(nn.Module):
    """Class capsules of features: at each place a linear map to `capsule_types` primary capsules, squash, routing.

    Weights of the routing grow with the number of places: of a large map, use a later stage, or pool it.

    Args:
        features: Size C of the features of a place.
        places: Places P of the map, or tokens.
        num_classes: Classes.
        capsule_types: Primary capsules of a place.
        capsule_dim: Size of a primary capsule.
        class_dim: Size of a class capsule.
        iterations: Rounds of routing.
        leaky: Whether a vote may go nowhere.
        detach: Whether the gradient runs through the last round only.

    Shape: (batch, P, C) -> (batch, num_classes, class_dim).

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(
        self,
        features: int,
        places: int,
        num_classes: int,
        *,
        capsule_types: int = 8,
        capsule_dim: int = 8,
        class_dim: int = 16,
        iterations: int = 3,
        leaky: bool = False,
        detach: bool = False,
    ):
        super().__init__()
        check_whole(features=features, places=places, capsule_types=capsule_types, capsule_dim=capsule_dim)
        self.capsule_types, self.capsule_dim = capsule_types, capsule_dim
        self.primary = nn.Linear(features, capsule_types * capsule_dim)
        self.routing = DynamicRouting(
            places * capsule_types,
            num_classes,
            capsule_dim,
            class_dim,
            iterations=iterations,
            leaky=leaky,
            detach=detach,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps features (batch, P, C) to class capsules (batch, num_classes, class_dim)."""
        u = squash(self.primary(x).unflatten(-1, (self.capsule_types, self.capsule_dim)))
        return self.routing(u.flatten(1, 2))


class CapsuleClassifier(CapsuleNetwork):
    """A backbone of timm with capsules for a head, and, for small images, a decoder.

    Args:
        backbone: Name of a model of timm, which is built without its own head; or a model of timm.
        num_classes: Classes.
        in_channels: Channels of an image.
        image_size: Side of an image in pixels, or (height, width).
        capsule_types: Primary capsules of each place of the backbone's last map, or of each token.
        capsule_dim: Size of a primary capsule.
        class_dim: Size of a class capsule.
        iterations: Rounds of routing.
        leaky: Whether a vote may go nowhere: for images with much that is none of the classes.
        detach: Whether the gradient runs through the last round only.
        decoder: Widths of the decoder's hidden layers; None: no decoder.
        pretrained: Whether a backbone that is named is loaded with its weights.
        backbone_kwargs: Its other options, as `{"drop_path_rate": 0.1}`.

    Attributes:
        backbone: The model of timm, of which `forward_features` is used.
        head: The `CapsuleHead`.

    Shape: (batch, in_channels, height, width) -> (batch, num_classes), lengths in [0, 1).

    Raises:
        ValueError: If a size is out of range, or the backbone's features are not a map (batch, C, h, w) or
            (batch, h, w, C), or tokens (batch, P, C).
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int | tuple[int, int] = 224,
        *,
        capsule_types: int = 8,
        capsule_dim: int = 8,
        class_dim: int = 16,
        iterations: int = 3,
        leaky: bool = False,
        detach: bool = False,
        decoder: Sequence[int] | None = None,
        pretrained: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
    ):
        height, width = sides(image_size)
        super().__init__(num_classes, class_dim, (in_channels, height, width), decoder, None, None)
        if isinstance(backbone, str):
            options = {"num_classes": 0, "in_chans": in_channels, **(backbone_kwargs or {})}
            backbone = timm.create_model(backbone, pretrained=pretrained, **options)
        elif pretrained or backbone_kwargs:
            raise ValueError(
                f"pretrained={pretrained}, backbone_kwargs={backbone_kwargs}: are for a backbone that is named; "
                f"this one, {type(backbone).__name__}, is built already"
            )
        self.backbone: nn.Module = backbone
        self.channels_last = str(getattr(backbone, "output_fmt", "")).endswith("NHWC")
        places, features = self._features_of_nothing().shape[1:]
        self.head = CapsuleHead(
            features,
            places,
            num_classes,
            capsule_types=capsule_types,
            capsule_dim=capsule_dim,
            class_dim=class_dim,
            iterations=iterations,
            leaky=leaky,
            detach=detach,
        )
        self.reset_decoder()

    @torch.no_grad()
    def _features_of_nothing(self) -> Tensor:
        """The features (1, P, C) of a black image, with statistics and random numbers left as they are."""
        was_training = self.backbone.training
        self.backbone.eval()
        x = torch.zeros(1, *self.image_shape, device=next(self.backbone.parameters()).device)
        try:
            return self._features(x)
        finally:
            self.backbone.train(was_training)

    def _features(self, x: Tensor) -> Tensor:
        features: Any = self.backbone.forward_features(x)  # type: ignore[operator]
        if not isinstance(features, Tensor) or features.dim() not in (3, 4):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"backbone={type(self.backbone).__name__}: its features, {shape}, are neither a map nor tokens"
            )
        if features.dim() == 3:
            return features
        return features.flatten(1, 2) if self.channels_last else features.flatten(2).mT

    def forward_features(self, x: Tensor) -> Tensor:
        """The class capsules (batch, num_classes, class_dim) of images."""
        self.check_image(x)
        return self.head(self._features(x))


@register_with_timm
def archzoo_capsule_classifier(
    pretrained: bool = False,
    backbone: str | nn.Module = "resnet18",
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    backbone_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> CapsuleClassifier:
    """Capsules on a backbone of timm, whose weights `pretrained` loads. Options are those of `CapsuleClassifier`."""
    passed = {key: kwargs.pop(key, None) for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    options = {key: value for key, value in passed.items() if value is not None} | (backbone_kwargs or {})
    model = CapsuleClassifier(
        backbone, num_classes, in_chans, img_size, pretrained=pretrained, backbone_kwargs=options or None, **kwargs
    )
    own = {"num_classes": num_classes, "classifier": "head", "input_size": model.image_shape}
    config: Any = {**getattr(model.backbone, "pretrained_cfg", {}), **own}  # inputs are standardised as the backbone's
    model.pretrained_cfg = model.default_cfg = config
    return model
