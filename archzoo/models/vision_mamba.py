"""A vision model of mixers alone, as Vision Mamba (https://arxiv.org/abs/2401.09417): patches, blocks, their mean.

`import archzoo.models` registers it with timm:

>>> import timm
>>> import archzoo.models
>>> model = timm.create_model("archzoo_vision_mamba_tiny", img_size=32, depth=2, num_classes=10)
>>> type(model.blocks[0].mixer)
<class 'archzoo.layers.mamba.Mamba'>

It differs from the paper's in that classes are read from the mean of all patches rather than from a token among them,
and in that both directions share their parameters unless `mixer_kwargs={"bidirectional": "separate"}` says otherwise.
"""

import functools
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models import generate_default_cfgs
from timm.models import register_model as register_with_timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from archzoo.models.model import LayerFactory, check_kind
from archzoo.models.registration import AsksLayers, build, default_cfg
from archzoo.registry import layer_options

__all__ = ["VisionMamba"]


class _Block(nn.Module):
    """x + mixer(norm(x)): a block of a `VisionTransformer` that has a mixer and no perceptron."""

    def __init__(
        self,
        dim: int,
        mixer: LayerFactory,
        norm_layer: type[nn.Module],
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **of_attention: Any,  # and of perceptrons
    ):
        super().__init__()
        self.norm = norm_layer(dim, device=device, dtype=dtype)
        self.mixer = mixer(dim, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.drop_path(self.mixer(self.norm(x)))
        return y


class VisionMamba(AsksLayers, VisionTransformer):
    """timm's `VisionTransformer` with blocks of one mixer, which may see the patches before and behind.

    Args:
        mixer: Registry name of a layer of kind `mixer`. Those that read one way only, as `mamba`, read both ways here.
        mixer_kwargs: Its options.
        kwargs: Of `timm.models.VisionTransformer`, as `img_size`, `patch_size`, `embed_dim` and `depth`.

    Shape: (batch, in_chans, height, width) -> (batch, num_classes).

    Raises:
        ValueError: If the layer is not of kind `mixer`, or refuses a size or an option.
    """

    def __init__(self, *, mixer: str = "mamba", mixer_kwargs: dict[str, Any] | None = None, **kwargs: Any):
        both_ways = {"bidirectional": "shared"} if "bidirectional" in layer_options(mixer) else {}
        factory = LayerFactory(mixer, {**both_ways, **(mixer_kwargs or {})})
        check_kind(factory, "vision_mamba", "mixer")
        usual = {"global_pool": "avg", "class_token": False, "norm_layer": "rmsnorm"}
        super().__init__(**{**usual, **kwargs}, block_fn=functools.partial(_Block, mixer=factory))  # type: ignore[arg-type]  # a class or what acts as one

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialises as timm does, and each mixer as its own paper does."""
        super().init_weights(*args, **kwargs)  # draws anew every nn.Linear, those inside of a mixer included
        for module in self.modules():
            if isinstance(module, _Block):
                module.mixer.reset_parameters()  # type: ignore[operator]  # every layer of the zoo has it


_CONFIG = default_cfg(first_conv="patch_embed.proj", classifier="head")
default_cfgs = generate_default_cfgs({"archzoo_vision_mamba_tiny": _CONFIG, "archzoo_vision_mamba_small": _CONFIG})


def _create(variant: str, pretrained: bool, width: int, options: dict[str, Any]) -> VisionMamba:
    options = {"patch_size": 16, "embed_dim": width, "depth": 24, **options}
    features = {"out_indices": options.pop("out_indices", min(3, options["depth"])), "feature_cls": "getter"}
    return build(VisionMamba, variant, pretrained, options, features=features)


@register_with_timm
def archzoo_vision_mamba_tiny(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Patch 16, width 192, 24 blocks. Options are those of `VisionMamba`, as `mixer="mamba2"`."""
    return _create("archzoo_vision_mamba_tiny", pretrained, 192, kwargs)


@register_with_timm
def archzoo_vision_mamba_small(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Patch 16, width 384, 24 blocks. Options are those of `VisionMamba`, as `mixer="mamba2"`."""
    return _create("archzoo_vision_mamba_small", pretrained, 384, kwargs)
