"""Vision transformers with any layer of kind `linear` in their MLPs: ViKANformer (https://arxiv.org/abs/2503.01124).

They are timm's own; only fc1 and fc2 of each block are exchanged, with no activation between layers that are non-linear
by themselves. `import archzoo.models` registers them:

>>> import timm
>>> import archzoo.models
>>> model = timm.create_model("archzoo_vikanformer_mnist", mlp_layer="fast_kan", mlp_kwargs={"grid_size": 4})
>>> type(model.blocks[0].mlp.fc1)
<class 'archzoo.layers.fast_kan.FastKANLinear'>

A block's LayerNorm hands its MLP values of unit variance, a third of them outside [-1, 1]. Layers with a grid need one
that covers them: `mlp_kwargs={"grid_range": (-3.0, 3.0)}`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs
from timm.models import register_model as register_with_timm
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from archzoo.models.model import LayerFactory, block_widths, check_kind, register_model
from archzoo.models.registration import AsksLayers, build, default_cfg

__all__ = ["LayerMLP", "ViT", "build_vit"]


class LayerMLP(nn.Module):
    """timm's `Mlp` with any layer in place of its two linear ones: fc1, activation, dropout, norm, fc2, dropout.

    Args:
        fc1: Builds the first layer from its two sizes.
        fc2: Builds the second one.
        activate: Whether there is an activation between them.
        in_features: Size D of inputs and outputs.
        hidden_features: Size between the layers.
        act_layer: Builds the activation.
        norm_layer: Builds a norm of the hidden features from their number. None: no norm.
        bias: Whether the layers may have a bias; those whose default is to have none have none.
        drop: Probability that a value behind a layer is dropped in training.
        device: Where the parameters are.
        dtype: Of the parameters.

    Shape: (*, D) -> (*, D).
    """

    def __init__(
        self,
        fc1: LayerFactory,
        fc2: LayerFactory,
        activate: bool,
        in_features: int,
        hidden_features: int,
        *,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        without = {} if bias else {"bias": False}
        self.fc1 = fc1(in_features, hidden_features, **without, **factory)
        self.act = act_layer() if activate else nn.Identity()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden_features, **factory)
        self.fc2 = fc2(hidden_features, in_features, **without, **factory)
        self.drop2 = nn.Dropout(drop)

    def reset_layers(self) -> None:
        """Gives the two layers their own initial state again, but for `nn.Linear`, which timm initialises."""
        for layer in (self.fc1, self.fc2):
            if type(layer) is not nn.Linear:
                layer.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (*, D) to (*, D)."""
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class ViT(AsksLayers, VisionTransformer):
    """timm's `VisionTransformer` with any layer of kind `linear` in its MLPs.

    With `mlp_layer="linear"` it is timm's own: the same parameters under the same names, the same outputs.

    Args:
        mlp_layer: Registry name of the layer.
        mlp_kwargs: Its options, as `{"grid_size": 8}`.
        fc2_kwargs: Options in which fc2 differs from fc1. KAT (https://arxiv.org/abs/2409.10594) is `"rational_kan"`
            with `mlp_kwargs={"init": "identity"}, fc2_kwargs={"init": "swish"}`.
        mlp_widths: Hidden width of each block's MLP, instead of `int(mlp_ratio * embed_dim)`.
        act_layer: What is between fc1 and fc2, as in timm. None: GELU if the layer is linear by itself, else nothing.
        kwargs: Of `timm.models.VisionTransformer`, as `img_size`, `patch_size`, `embed_dim`, `depth`, `num_heads`.

    Shape: (batch, in_chans, height, width) -> (batch, num_classes).

    Raises:
        ValueError: If the layer is not of kind `linear` or refuses a size or an option, or the widths are not one a
            block.
    """

    def __init__(
        self,
        *,
        mlp_layer: str = "linear",
        mlp_kwargs: dict[str, Any] | None = None,
        fc2_kwargs: dict[str, Any] | None = None,
        mlp_widths: Sequence[int] | None = None,
        act_layer: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(mlp_layer, str):
            raise ValueError(f"mlp_layer={mlp_layer!r}: must be the name of a layer, as 'kan'")
        fc1 = LayerFactory(mlp_layer, mlp_kwargs)
        fc2 = LayerFactory(mlp_layer, {**fc1.options, **(fc2_kwargs or {})})
        check_kind(fc1, "vit", "linear")
        activate = act_layer is not None or not fc1.entry.nonlinear
        widths = None if mlp_widths is None else iter(mlp_widths)
        depth = kwargs.get("depth", 12)
        if mlp_widths is not None and len(mlp_widths) != depth:
            raise ValueError(f"mlp_widths={tuple(mlp_widths)}: must have one width for each of depth={depth} blocks")

        def mlp(in_features: int, hidden_features: int, **options: Any) -> LayerMLP:
            hidden = hidden_features if widths is None else next(widths)
            return LayerMLP(fc1, fc2, activate, in_features, hidden, **options)

        options: dict[str, Any] = {**kwargs, "mlp_layer": mlp, "act_layer": act_layer}
        super().__init__(**options)

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialises as timm does, and each exchanged layer as its own paper does."""
        super().init_weights(*args, **kwargs)  # draws anew every nn.Linear, those inside of a layer included
        for module in self.modules():
            if isinstance(module, LayerMLP):
                module.reset_layers()


_CONFIG = default_cfg(first_conv="patch_embed.proj", classifier="head")
default_cfgs = generate_default_cfgs(
    {
        "archzoo_vit_tiny": _CONFIG,
        "archzoo_vit_small": _CONFIG,
        "archzoo_vit_base": _CONFIG,
        "archzoo_vikanformer_mnist": {
            **_CONFIG,
            "num_classes": 10,
            "input_size": (1, 28, 28),
            "crop_pct": 1.0,
            "mean": (0.1307,),
            "std": (0.3081,),
        },
    }
)


def _create(variant: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]) -> ViT:
    options = {**sizes, **options}
    features = {"out_indices": options.pop("out_indices", min(3, options["depth"])), "feature_cls": "getter"}
    return build(ViT, variant, pretrained, options, features=features, pretrained_filter_fn=checkpoint_filter_fn)


@register_with_timm
def archzoo_vit_tiny(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-Ti/16: patch 16, width 192, 12 blocks, 3 heads. Options are those of `ViT`, as `mlp_layer="kan"`."""
    sizes = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("archzoo_vit_tiny", pretrained, sizes, kwargs)


@register_with_timm
def archzoo_vit_small(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-S/16: patch 16, width 384, 12 blocks, 6 heads. Options are those of `ViT`, as `mlp_layer="kan"`."""
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("archzoo_vit_small", pretrained, sizes, kwargs)


@register_with_timm
def archzoo_vit_base(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViT-B/16: patch 16, width 768, 12 blocks, 12 heads. Options are those of `ViT`, as `mlp_layer="kan"`."""
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("archzoo_vit_base", pretrained, sizes, kwargs)


@register_with_timm
def archzoo_vikanformer_mnist(pretrained: bool = False, **kwargs: Any) -> ViT:
    """ViKANformer for 28 x 28 grey images: patch 7, width 64, 2 blocks, 4 heads, MLP ratio 2, KAN layers, 10 classes.

    The sizes are ours: the paper's are not published with its code. Options are those of `ViT`.
    """
    sizes: dict[str, Any] = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 64}
    sizes |= {"depth": 2, "num_heads": 4, "mlp_ratio": 2.0, "mlp_layer": "kan"}
    return _create("archzoo_vikanformer_mnist", pretrained, sizes, kwargs)


@register_model("vit")
def build_vit(
    layer: LayerFactory,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    width: int = 128,
    depth: int = 2,
    widths: tuple[int, ...] | None = None,
    patch: int = 4,
    dim: int = 64,
    heads: int = 4,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    fc2_kwargs: dict[str, Any] | None = None,
) -> ViT:
    """The vision transformer of the trainer: the contestant's layers are in the MLPs, all else is the same for all.

    Args:
        layer: Builds a layer of an MLP from its two sizes.
        input_shape: Shape of one image, (channels, height, width).
        output_size: Number of classes.
        width: Hidden width of every block's MLP.
        depth: Number of blocks.
        widths: Hidden width of each block's MLP, instead of `width` and `depth`.
        patch: Side of a patch, in pixels; divides both sides of the image.
        dim: Size of a token.
        heads: Number of attention heads; divides `dim`.
        drop_path: Probability that the last block's branch is skipped in training; less for the others.
        dropout: Probability that a value is dropped in training: of a token, and behind attention and MLP layers.
        fc2_kwargs: Options in which the second layer of an MLP differs from the first.

    Shape: (batch, *input_shape) -> (batch, output_size).

    Raises:
        ValueError: If an option is out of range, or the layer is not of kind `linear`.
    """
    check_kind(layer, "vit", "linear")
    if len(input_shape) != 3:
        raise ValueError(f"model 'vit' takes images (channels, height, width), not inputs of shape {input_shape}")
    chosen = block_widths(width, depth, widths)
    channels, *sides = input_shape
    if patch < 1 or any(side % patch for side in sides):
        raise ValueError(f"patch={patch}: must divide both sides of an image of {sides[0]} x {sides[1]} pixels")
    if heads < 1 or dim < heads or dim % heads:
        raise ValueError(f"heads={heads}: must divide dim={dim}, a positive number")
    for name, value in (("drop_path", drop_path), ("dropout", dropout)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: must be at least 0 and below 1")
    return ViT(
        img_size=tuple(sides),
        patch_size=patch,
        in_chans=channels,
        num_classes=output_size,
        embed_dim=dim,
        depth=len(chosen),
        num_heads=heads,
        drop_path_rate=drop_path,
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        mlp_layer=layer.entry.name,
        mlp_kwargs=layer.options,
        fc2_kwargs=fc2_kwargs,
        mlp_widths=chosen,
    )
