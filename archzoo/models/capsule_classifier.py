"""Capsules on top of any backbone of timm: its features become primary capsules, which are routed to the classes.

>>> import timm
>>> import archzoo.models
>>> model = timm.create_model(
...     "archzoo_capsule_classifier", backbone="resnet10t", num_classes=10, img_size=64, capsule_types=4
... )
>>> model.head.routing
DynamicRouting(16, 10, 8, 16, bias=True, iterations=3, leaky=False, detach=False)
"""

import functools
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import Tensor, nn

from archzoo.layers._check import check_whole
from archzoo.layers.capsules import DynamicRouting, squash
from archzoo.models.capsule_network import CapsuleNetwork, in_timms_words, sides
from archzoo.models.registration import build, default_cfg

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

    classifier = "head"

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
            of_backbone = {"num_classes": 0, "in_chans": in_channels, **(backbone_kwargs or {})}
            backbone = timm.create_model(backbone, pretrained=pretrained, **of_backbone)
        elif pretrained or backbone_kwargs:
            raise ValueError(
                f"pretrained={pretrained}, backbone_kwargs={backbone_kwargs}: are for a backbone that is named; "
                f"this one, {type(backbone).__name__}, is built already"
            )
        self.backbone: nn.Module = backbone
        self.channels_last = str(getattr(backbone, "output_fmt", "")).endswith("NHWC")
        places, features = self._features_of_nothing().shape[1:]
        options: dict[str, Any] = {"iterations": iterations, "leaky": leaky, "detach": detach}
        options |= {"capsule_types": capsule_types, "capsule_dim": capsule_dim, "class_dim": class_dim}
        self._classify(functools.partial(CapsuleHead, features, places, **options), (places, features))
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

    def lower_capsules(self, x: Tensor) -> Tensor:
        """The backbone's features (batch, P, C) of images, which the head makes capsules of."""
        return self._features(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backbone computes its blocks again in the backward pass rather than keep them."""
        backbone: Any = self.backbone  # of timm, all of whose models have it
        backbone.set_grad_checkpointing(enable)


_NAME = "archzoo_capsule_classifier"
_OF_TIMM = ("pretrained_cfg", "pretrained_model_args", "pretrained_cfg_overlay", "cache_dir")
default_cfgs = generate_default_cfgs({_NAME: default_cfg(num_classes=10, first_conv=None, classifier="head")})


@register_with_timm
def archzoo_capsule_classifier(
    pretrained: bool = False,
    backbone: str | nn.Module = "resnet18",
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    backbone_kwargs: dict[str, Any] | None = None,
    drop_rate: float = 0.0,
    **kwargs: Any,
) -> CapsuleClassifier:
    """Capsules on a backbone of timm, whose weights `pretrained` loads. Options are those of `CapsuleClassifier`.

    Of a whole that timm has saved (`local-dir:`), `pretrained` loads all.
    """
    if kwargs.pop("features_only", False):
        raise ValueError(f"features_only=True: has no use with {_NAME}; ask its backbone, {backbone!r}")
    given: dict[str, Any] = {key: value for key in _OF_TIMM if (value := kwargs.pop(key, None)) is not None}
    of_whole: dict[str, Any] = {
        key: given.pop(key) for key in ("pretrained_cfg", "pretrained_model_args") if key in given
    }
    whole = "pretrained_cfg" in of_whole
    options = {**given, **(backbone_kwargs or {})}

    def make(num_classes: int, in_chans: int, img_size: int | tuple[int, int]) -> CapsuleClassifier:
        of_capsules: dict[str, Any] = {"pretrained": pretrained and not whole, "backbone_kwargs": options or None}
        return in_timms_words(CapsuleClassifier, backbone=backbone)(
            num_classes, in_chans, img_size, drop_rate, **of_capsules, **kwargs
        )

    sizes: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    model = build(make, _NAME, pretrained and whole, {**of_whole, **sizes})
    inputs: dict[str, Any] = {"input_size": model.image_shape, "num_classes": num_classes}
    if not whole:  # inputs are standardised as the backbone's
        usual: Any = getattr(model.backbone, "pretrained_cfg", {})
        inputs |= {key: usual[key] for key in ("mean", "std", "crop_pct", "interpolation") if key in usual}
    described: Any = model.pretrained_cfg
    described.update(inputs)
    return model
