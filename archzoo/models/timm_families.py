"""timm's MLP-Mixer, ResNet and ConvNeXt with layers of the zoo in their places.

`import archzoo.models` registers them:

>>> import timm
>>> import archzoo.models
>>> model = timm.create_model("archzoo_resnet18", conv_layer="phm_conv2d", conv_kwargs={"n": 2}, num_classes=10)
>>> type(model.layer1[0].conv1)
<class 'archzoo.layers.phm_conv.PHMConv2d'>

With `linear` and `conv2d`, which are the defaults, they are timm's own: the same parameters under the same names, the
same outputs. Behind layers that bend their inputs by themselves there is no activation, unless `act_layer` names one.
"""

from typing import Any

from timm.models import generate_default_cfgs
from timm.models import register_model as register_with_timm
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from archzoo.models.registration import AsksLayers, build, default_cfg, exchange

__all__ = ["ZooConvNeXt", "ZooMixer", "ZooResNet"]

Options = dict[str, Any] | None


class ZooMixer(AsksLayers, MlpMixer):
    """MLP-Mixer (https://arxiv.org/abs/2105.01601) of any layer of kind `linear`, in both perceptrons of its blocks.

    Args:
        mlp_layer: Registry name of the layer.
        mlp_kwargs: Its options.
        act_layer: Class of the activation between two layers. None: as above; GELU.
        kwargs: Of timm's `MlpMixer`.

    Shape: (batch, in_chans, height, width) -> (batch, num_classes).
    """

    def __init__(
        self,
        *,
        mlp_layer: str = "linear",
        mlp_kwargs: Options = None,
        act_layer: type[nn.Module] | None = None,
        **kwargs: Any,
    ):
        super().__init__(act_layer=act_layer or nn.GELU, **kwargs)
        exchange(self, {"blocks.*.mlp_*.fc?": (mlp_layer, mlp_kwargs)}, None if act_layer else "blocks.*.act")


class ZooResNet(AsksLayers, ResNet):
    """ResNet (https://arxiv.org/abs/1512.03385) of any layer of kind `conv2d`, in the convolutions of its blocks.

    The first convolution and those of the shortcuts stay.

    Args:
        conv_layer: Registry name of the layer.
        conv_kwargs: Its options.
        act_layer: Of timm: class or name of all activations. None: as above; ReLU.
        kwargs: Of timm's `ResNet`.

    Shape: (batch, in_chans, height, width) -> (batch, num_classes).
    """

    def __init__(
        self, *, conv_layer: str = "conv2d", conv_kwargs: Options = None, act_layer: Any = None, **kwargs: Any
    ):
        super().__init__(act_layer=act_layer or nn.ReLU, **kwargs)
        exchange(self, {"layer?.*.conv?": (conv_layer, conv_kwargs)}, None if act_layer else "layer?.*.act?")


class ZooConvNeXt(AsksLayers, ConvNeXt):
    """ConvNeXt (https://arxiv.org/abs/2201.03545) of any layer of kind `linear` in its perceptrons.

    Args:
        mlp_layer: Registry name of the layer.
        mlp_kwargs: Its options.
        conv_layer: Registry name of what takes the place of the depthwise convolutions.
        conv_kwargs: Its options.
        act_layer: Of timm: class or name of the activation between two layers. None: as above; GELU.
        kwargs: Of timm's `ConvNeXt`.

    Shape: (batch, in_chans, height, width) -> (batch, num_classes).
    """

    def __init__(
        self,
        *,
        mlp_layer: str = "linear",
        mlp_kwargs: Options = None,
        conv_layer: str = "conv2d",
        conv_kwargs: Options = None,
        act_layer: Any = None,
        **kwargs: Any,
    ):
        super().__init__(act_layer=act_layer or "gelu", **kwargs)
        exchange(self, {"stages.*.mlp.fc?": (mlp_layer, mlp_kwargs)}, None if act_layer else "stages.*.mlp.act")
        exchange(self, {"stages.*.conv_dw": (conv_layer, conv_kwargs)})


_RESNET = default_cfg(fixed_input_size=False, pool_size=(7, 7), first_conv="conv1", classifier="fc")
_CONVNEXT = default_cfg(fixed_input_size=False, pool_size=(7, 7), first_conv="stem.0", classifier="head.fc")
_MIXER = default_cfg(first_conv="stem.proj", classifier="head")

default_cfgs = generate_default_cfgs(
    {
        "archzoo_mixer_s16": _MIXER,
        "archzoo_mixer_b16": _MIXER,
        "archzoo_resnet18": _RESNET,
        "archzoo_resnet50": _RESNET,
        "archzoo_padenet18": _RESNET,
        "archzoo_convnext_atto": _CONVNEXT,
        "archzoo_convnext_tiny": _CONVNEXT,
    }
)


def _mixer(variant: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]) -> ZooMixer:
    features = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    return build(ZooMixer, variant, pretrained, {**sizes, **options}, features=features)


def _resnet(variant: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]) -> ZooResNet:
    return build(ZooResNet, variant, pretrained, {**sizes, **options}, features={})


def _convnext(variant: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]) -> ZooConvNeXt:
    features = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build(ZooConvNeXt, variant, pretrained, {**sizes, **options}, features=features)


@register_with_timm
def archzoo_mixer_s16(pretrained: bool = False, **kwargs: Any) -> ZooMixer:
    """Mixer-S/16: patch 16, 8 blocks, width 512. Options are those of `ZooMixer`, as `mlp_layer="kan"`."""
    return _mixer("archzoo_mixer_s16", pretrained, {"patch_size": 16, "num_blocks": 8, "embed_dim": 512}, kwargs)


@register_with_timm
def archzoo_mixer_b16(pretrained: bool = False, **kwargs: Any) -> ZooMixer:
    """Mixer-B/16: patch 16, 12 blocks, width 768. Options are those of `ZooMixer`, as `mlp_layer="kan"`."""
    return _mixer("archzoo_mixer_b16", pretrained, {"patch_size": 16, "num_blocks": 12, "embed_dim": 768}, kwargs)


@register_with_timm
def archzoo_resnet18(pretrained: bool = False, **kwargs: Any) -> ZooResNet:
    """ResNet-18. Options are those of `ZooResNet`, as `conv_layer="phm_conv2d"`."""
    return _resnet("archzoo_resnet18", pretrained, {"block": BasicBlock, "layers": (2, 2, 2, 2)}, kwargs)


@register_with_timm
def archzoo_resnet50(pretrained: bool = False, **kwargs: Any) -> ZooResNet:
    """ResNet-50. Options are those of `ZooResNet`, as `conv_layer="phm_conv2d"`."""
    return _resnet("archzoo_resnet50", pretrained, {"block": Bottleneck, "layers": (3, 4, 6, 3)}, kwargs)


@register_with_timm
def archzoo_padenet18(pretrained: bool = False, **kwargs: Any) -> ZooResNet:
    """ResNet-18 of Padé neurons (https://arxiv.org/abs/2403.11791), with no activations in its blocks."""
    sizes = {"block": BasicBlock, "layers": (2, 2, 2, 2), "conv_layer": "paon_conv2d"}
    return _resnet("archzoo_padenet18", pretrained, sizes, kwargs)


@register_with_timm
def archzoo_convnext_atto(pretrained: bool = False, **kwargs: Any) -> ZooConvNeXt:
    """ConvNeXt-Atto: widths 40 to 320. Options are those of `ZooConvNeXt`, as `mlp_layer="kan"`."""
    return _convnext("archzoo_convnext_atto", pretrained, {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)}, kwargs)


@register_with_timm
def archzoo_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> ZooConvNeXt:
    """ConvNeXt-T: widths 96 to 768. Options are those of `ZooConvNeXt`, as `mlp_layer="kan"`."""
    return _convnext("archzoo_convnext_tiny", pretrained, {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}, kwargs)
