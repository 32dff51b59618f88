"""Swaps into twelve families of timm: every linear and conv2d layer of the zoo goes in, runs, learns, and comes out.

The default suite takes a sample, of every family and of every layer; -m slow takes all of them.
"""

from itertools import cycle

import pytest
import timm
import torch
from timm.models import efficientnet, maxxvit, mlp_mixer, mobilenetv3, regnet
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn

import archzoo
from archzoo.budget import count_parameters
from tests.helpers import assert_same_bits

LINEAR, CONV2D = archzoo.list_layers(kind="linear"), archzoo.list_layers(kind="conv2d")
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
MIXER = {"img_size": 16, "patch_size": 4, "num_blocks": 2, "embed_dim": 16}


def stages(*blocks):
    return decode_arch_def([[block] for block in blocks])


def swin():
    windows = {"patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=16, num_classes=4, **windows)


def efficient():
    blocks = stages("ds_r1_k3_s1_e1_c8_se0.25", "ir_r1_k3_s2_e4_c8_se0.25", "ir_r1_k5_s2_e4_c16_se0.25")
    return efficientnet.EfficientNet(blocks, num_classes=4, stem_size=8, num_features=32, pad_type="same")


def mobilenet():
    blocks = stages("ds_r1_k3_s2_e1_c8_se0.25", "ir_r1_k3_s2_e4_c8", "ir_r1_k5_s1_e4_c16_se0.25", "cn_r1_k1_s1_c32")
    return mobilenetv3.MobileNetV3(blocks, num_classes=4, stem_size=8, num_features=32)


def maxvit():
    transformer = maxxvit.MaxxVitTransformerCfg(dim_head=4, window_size=(2, 2), grid_size=(2, 2))
    shape = {"embed_dim": (8, 16), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 8}
    return maxxvit.MaxxVit(maxxvit.MaxxVitCfg(transformer_cfg=transformer, **shape), img_size=16, num_classes=4)


def regnetx():
    config = regnet.RegNetCfg(depth=4, w0=8, wa=8, wm=1.3, group_size=4, stem_width=8)
    return regnet.RegNet(config, num_classes=4)


def resnet():
    layers = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8}
    return timm.create_model("resnet18", num_classes=4, **layers)


FAMILIES = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT),
    "deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, **VIT),
    "swin": swin,
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=4, depths=(1,) * 4, dims=(8, 8, 16, 16)),
    "resnet": resnet,
    "efficientnet": efficient,
    "mixer": lambda: mlp_mixer.MlpMixer(num_classes=4, **MIXER),
    "resmlp": lambda: mlp_mixer.MlpMixer(
        num_classes=4, mlp_ratio=4, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, **MIXER
    ),
    "maxvit": maxvit,
    "regnet": regnetx,
    "mobilenet": mobilenet,
    "eva": lambda: timm.create_model("eva02_tiny_patch14_224", num_classes=4, qkv_fused=False, **VIT),
}
PUBLISHED = {
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_distilled_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
    "convnext": "convnext_atto",
    "resnet": "resnet18",
    "efficientnet": "efficientnet_b0",
    "mixer": "mixer_s32_224",
    "resmlp": "resmlp_12_224",
    "maxvit": "maxvit_pico_rw_256",
    "regnet": "regnetx_002",
    "mobilenet": "mobilenetv3_small_050",
    "eva": "eva02_tiny_patch14_224",
}
SIZE = {"convnext": 32, "regnet": 32}


def is_linear(name, module):
    return isinstance(module, nn.Linear)


def is_conv(name, module):
    return isinstance(module, nn.Conv2d)


def is_odd(name, module):
    """Whether PHM's two parts do not go into the channels of each group, as into those of a colour image."""
    sizes = (module.in_channels, module.out_channels) if is_conv(name, module) else ()
    return any(size // module.groups % 2 for size in sizes)


def is_grouped(name, module):
    return is_conv(name, module) and module.groups > 1


def rules(layer):
    if layer == "selectable_kan_conv2d":  # channels in groups cannot choose for themselves
        return {is_grouped: (layer, {"granularity": "layer"}), is_conv: layer}
    if layer == "phm_conv2d":
        return {is_odd: (layer, {"n": 1}), is_conv: (layer, {"n": 2})}
    return {is_linear if layer in LINEAR else is_conv: (layer, {"n": 2} if layer == "phm" else {})}


def check(family, layer):
    """Swap, forward, backward, state dict, and back. In evaluation, so that no statistics move."""
    model, size = FAMILIES[family]().eval(), SIZE.get(family, 16)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        before = {**{name: t.clone() for name, t in model.state_dict().items()}, "output": model(x)}
    places = [(name, id(module)) for name, module in model.named_modules()]
    report = archzoo.swap(model, rules(layer), allow_unmatched=True)
    cls = archzoo.registry.get_layer(layer).cls
    assert len(report.swaps) == sum(isinstance(m, cls) for m in model.modules()) > 0
    y = model(x)
    assert y.shape == (2, 4)
    y.square().sum().backward()
    for row in report.swaps:
        module = model.get_submodule(row.name)
        assert all(p.grad is not None for p in module.parameters()), row.name
    twin = FAMILIES[family]().eval()
    archzoo.swap(twin, rules(layer), allow_unmatched=True)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_same_bits({"y": twin(x)}, {"y": model(x)}, f"{family}, {layer}, from its state dict")
        archzoo.unswap(report)
        after = {**model.state_dict(), "output": model(x)}
    assert [(name, id(module)) for name, module in model.named_modules()] == places
    assert_same_bits(after, before, f"{family}, {layer}, taken back")


SAMPLE = [
    *zip(cycle(["vit", "deit", "swin", "mixer", "resmlp", "eva"]), LINEAR, strict=False),
    *zip(cycle(["convnext", "resnet", "efficientnet", "regnet", "mobilenet", "maxvit"]), CONV2D, strict=False),
]


@pytest.mark.parametrize(("family", "layer"), SAMPLE)
def test_every_family_and_every_layer(family, layer):
    check(family, layer)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [*LINEAR, *CONV2D])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair(family, layer):
    check(family, layer)


# (family, layer) pairs that no choice of widths and options brings within 1 %: 24 functions of each tap, with more
# parameters in the depthwise convolutions alone than the whole model has; and a head of one layer, in steps of 2 %.
OUT_OF_REACH = {
    ("efficientnet", "selectable_kan_conv2d"),
    ("mobilenet", "selectable_kan_conv2d"),
    ("mobilenet", "selectable_kan"),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "family",  # a sample in CI: all take four minutes
    [name if name in ("vit", "resnet", "mixer") else pytest.param(name, marks=pytest.mark.large) for name in PUBLISHED],
)
def test_parameters_are_matched_at_published_sizes(family):
    """Every linear layer of the model for one of ours, or every convolution, at the size that timm publishes.

    All but 3 of 396 pairs come within 1 %, and these say what comes nearest.
    """
    missed = {}
    for layer in [*LINEAR, *CONV2D]:
        with torch.device("meta"):
            model = timm.create_model(PUBLISHED[family], **({"qkv_fused": False} if family == "eva" else {}))
        before = count_parameters(model)
        chosen = (
            rules(layer) if layer == "selectable_kan_conv2d" else {is_linear if layer in LINEAR else is_conv: layer}
        )
        try:
            report = archzoo.swap(model, chosen, match="params", allow_unmatched=True)
        except ValueError as error:
            missed[family, layer] = str(error)
        else:
            assert abs(report.parameters[1] - before) <= 0.01 * before, layer
            assert count_parameters(report.model) == report.parameters[1], layer
    assert missed.keys() == {pair for pair in OUT_OF_REACH if pair[0] == family}
    assert all("the nearest reachable count is" in message for message in missed.values())
