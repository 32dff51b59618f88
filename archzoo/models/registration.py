"""What our models in timm's registry have in common: a config, errors that say what there is not, and layers exchanged.

`timm.create_model("archzoo_padenet18", num_classes=10)` and the like, after `import archzoo.models`.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg
from torch import nn

from archzoo.registry import get_layer

Model = TypeVar("Model", bound=nn.Module)
Layer = tuple[str, Mapping[str, Any] | None]
"""A layer's name and its options."""


def default_cfg(**changes: Any) -> dict[str, Any]:
    """timm's description of a model for 224 x 224 pixels and 1000 classes, without weights."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        **changes,
    }


def build(
    model: Callable[..., Model],
    variant: str,
    pretrained: bool,
    options: Mapping[str, Any],
    *,
    features: dict[str, Any] | None = None,
    **how: Any,
) -> Model:
    """timm's `build_model_with_cfg`.

    Args:
        model: Builds the model from the options.
        variant: Its name in timm's registry.
        pretrained: Whether weights are to be loaded.
        options: Of the model and of timm.
        features: How timm extracts feature maps, its `feature_cfg`. None: there are none.
        how: Further arguments of `build_model_with_cfg`.

    Raises:
        ValueError: If weights are asked for and none are named, for we publish none; or if feature maps are, of a
            model that has none.
    """
    if pretrained and not (options.get("pretrained_cfg") or options.get("pretrained_cfg_overlay")):
        raise ValueError(
            f"pretrained=True: {variant} has no published weights; leave it out, or name your own by "
            "pretrained_cfg_overlay={'file': PATH}"
        )
    if features is None and options.get("features_only"):
        raise ValueError(f"features_only=True: {variant} has no feature maps; leave it out, and use forward_features")
    return build_model_with_cfg(model, variant, pretrained, feature_cfg=features, **how, **options)


class AsksLayers(nn.Module):
    """Lets timm's optimizers and checkpoints ask the layers in a model of timm, by mixing in before timm's class."""

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model's own class or a layer in it wants not decayed."""
        of_class = getattr(super(), "no_weight_decay", set)
        asked = (
            (prefix, method())
            for prefix, module in self.named_modules()
            if prefix and callable(method := getattr(module, "no_weight_decay", None))
        )
        return {*of_class(), *(f"{prefix}.{name}" for prefix, names in asked for name in names)}


def exchange(model: nn.Module, places: Mapping[str, Layer], activations: str | None = None) -> None:
    """Puts layers into a model that has just been built.

    Args:
        model: The model.
        places: Glob over the names of modules -> the layer. `linear` and `conv2d` without options stay as they are.
        activations: Glob over names of activations, which go where all layers bend their inputs by themselves. None:
            they stay.

    Raises:
        ValueError: If there is no such layer, or it refuses its place.
    """
    from archzoo.surgery import swap

    rules = {
        glob: (name, dict(options or {}))
        for glob, (name, options) in places.items()
        if options or name not in ("linear", "conv2d")
    }
    if not rules:
        return
    swap(model, rules)
    if activations is None or not all(get_layer(name).nonlinear for name, _ in places.values()):
        return
    for prefix, module in list(model.named_modules()):
        for key in list(module._modules):
            if fnmatchcase(f"{prefix}.{key}", activations):
                module._modules[key] = nn.Identity()
