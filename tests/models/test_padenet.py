import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.budget import count_parameters
from archzoo.models.model import LayerFactory
from archzoo.models.padenet import PadeNet
from archzoo.tasks.super_resolution import shrink

CONTESTANTS = ["conv2d", "chebyshev_kan_conv2d", "paon_conv2d"]


def build(layer="conv2d", input_shape=(1, 14, 14), scale=2, layer_options=None, **options):
    channels, height, width = input_shape
    size = channels * height * width * scale**2
    return PadeNet(LayerFactory(layer, layer_options), input_shape, size, **options)


def kinds(part):
    return [type(module).__name__ for module in part]


def channels(part):
    return [(m.in_channels, m.out_channels) for m in part.modules() if hasattr(m, "in_channels")]


def test_it_is_registered():
    from archzoo.models.model import models

    assert models.get("padenet") is PadeNet


@pytest.mark.parametrize(
    ("layer", "options", "depth", "expected"),
    [
        ("conv2d", {}, 2, 3060),
        ("conv2d", {}, 4, 7700),
        ("paon_conv2d", {"degrees": (1, 1)}, 2, 6084),
        ("paon_conv2d", {"degrees": (2, 1)}, 2, 9108),
        ("paon_conv2d", {"degrees": (2, 2)}, 2, 12132),
        ("paon_conv2d", {"degrees": (2, 2), "variant": "absolute"}, 2, 12132),
        ("paon_conv2d", {"degrees": (3, 0)}, 2, 9108),
    ],
    ids=str,
)
def test_plain_networks_have_the_counts_of_the_reference_protocol(layer, options, depth, expected):
    """The specification's n is the number of convolutions 16 to 16: one less than `depth`."""
    assert count_parameters(build(layer, layer_options=options, blocks="plain", width=16, depth=depth)) == expected


def test_plain_is_one_convolution_after_another():
    model = build(blocks="plain", widths=(5, 6, 7), scale=3, input_shape=(3, 4, 4))
    assert [kinds(part) for part in (model.head, model.body, model.tail)] == [
        ["Conv2d", "ReLU"],
        ["Conv2d", "ReLU", "Conv2d", "ReLU"],
        ["Conv2d", "PixelShuffle"],
    ]
    assert channels(model) == [(3, 5), (5, 6), (6, 7), (7, 27)]
    x = torch.randn(2, 3, 4, 5)
    detail = model.tail(model.body(model.head(x)))
    assert torch.equal(model(x), F.interpolate(x, scale_factor=3.0, mode="bicubic") + detail)


@pytest.mark.parametrize(("scale", "tail"), [(2, [28]), (3, [63]), (4, [28, 28])])
def test_residual_is_built_like_edsr(scale, tail):
    model = build(widths=(5, 6, 7), scale=scale, input_shape=(3, 4, 4))
    assert kinds(model.head) == ["Conv2d"]
    assert kinds(model.body) == ["_Residual"] * 3 + ["Conv2d"]
    assert kinds(model.body[0]) == ["Conv2d", "ReLU", "Conv2d"]
    assert channels(model.body) == [(7, 5), (5, 7), (7, 6), (6, 7), (7, 7), (7, 7), (7, 7)]
    assert kinds(model.tail) == ["Conv2d", "PixelShuffle"] * len(tail) + ["Conv2d"]
    assert channels(model.tail) == [*((7, many) for many in tail), (7, 3)]
    x = torch.randn(2, 3, 4, 5)
    first = model.head(x)
    inner = first
    for block in model.body[:-1]:
        inner = inner + block[2](block[1](block[0](inner)))
    detail = model.tail(model.body[-1](inner) + first)
    torch.testing.assert_close(model(x), F.interpolate(x, scale_factor=float(scale), mode="bicubic") + detail)


@pytest.mark.parametrize("layer", CONTESTANTS)
@pytest.mark.parametrize("blocks", ["plain", "residual"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_any_convolution_enlarges_images_of_any_size(layer, blocks, scale):
    model = build(layer, input_shape=(3, 6, 6), scale=scale, blocks=blocks, width=4)
    assert model.scale == scale
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 3, 6 * scale, 6 * scale)
    assert model(torch.randn(1, 3, 5, 9)).shape == (1, 3, 5 * scale, 9 * scale)
    assert model(torch.randn(0, 3, 6, 6)).shape == (0, 3, 6 * scale, 6 * scale)


def test_it_starts_from_the_bicubic_enlargement():
    model = build(blocks="residual", width=4)
    last = model.tail[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    x = torch.rand(2, 1, 5, 6)
    assert torch.equal(model(x), F.interpolate(x, size=(10, 12), mode="bicubic"))


def test_activation_is_between_convolutions_unless_they_bend_their_input_themselves():
    assert kinds(build("chebyshev_kan_conv2d", blocks="plain").body) == ["ChebyshevKANConv2d"]
    assert kinds(build("chebyshev_kan_conv2d").body[0]) == ["ChebyshevKANConv2d"] * 2
    tanh = build("chebyshev_kan_conv2d", blocks="plain", activation="tanh")
    assert kinds(tanh.head) == kinds(tanh.body) == ["ChebyshevKANConv2d", "Tanh"]
    assert kinds(tanh.tail) == ["ChebyshevKANConv2d", "PixelShuffle"]
    assert kinds(build(activation="none").body[0]) == ["Conv2d", "Conv2d"]


def test_ends_can_be_the_same_for_all():
    model = build("chebyshev_kan_conv2d", ends="conv2d", scale=4)
    assert kinds(model.head) == ["Conv2d"]
    assert kinds(model.tail) == ["Conv2d", "PixelShuffle", "Conv2d", "PixelShuffle", "Conv2d"]
    assert kinds(model.body[0]) == ["ChebyshevKANConv2d"] * 2
    plain = build("chebyshev_kan_conv2d", ends="conv2d", blocks="plain")
    assert [kinds(part) for part in (plain.head, plain.body, plain.tail)] == [
        ["Conv2d", "ReLU"],
        ["ChebyshevKANConv2d"],
        ["Conv2d", "PixelShuffle"],
    ]


def boxes(count):
    """Images of a white rectangle each, whose edges the bicubic enlargement blurs."""
    ends = torch.randint(0, 16, (count, 2, 2)).sort(-1).values
    places = torch.arange(16)
    down, across = (((places >= ends[:, i, :1]) & (places <= ends[:, i, 1:])).float() for i in (0, 1))
    return down[:, None, :, None] * across[:, None, None, :]


@pytest.mark.parametrize(
    ("layer", "options", "blocks", "lr"),
    [
        ("conv2d", {}, "plain", 5e-3),
        pytest.param("conv2d", {}, "residual", 5e-3, marks=pytest.mark.slow),
        pytest.param("chebyshev_kan_conv2d", {}, "plain", 3e-4, marks=pytest.mark.slow),
        ("paon_conv2d", {"degrees": (2, 2)}, "plain", 5e-3),
        pytest.param(
            "paon_conv2d", {"degrees": (2, 2), "variant": "absolute"}, "residual", 2e-3, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_it_learns_to_enlarge_better_than_bicubic(layer, options, blocks, lr):
    high = boxes(32)
    low = shrink(high, 2)
    bicubic = F.l1_loss(F.interpolate(low, size=(16, 16), mode="bicubic"), high).item()
    model = build(layer, layer_options=options, input_shape=(1, 8, 8), width=8, depth=1, blocks=blocks)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(120):
        loss = F.l1_loss(model(low), high)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert F.l1_loss(model(low), high).item() < 0.95 * bicubic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1}, "the task wants 196; choose task=super_resolution"),
        ({"width": 0}, "width=0, depth=2: both must be 1 or more"),
        ({"depth": 0}, "depth=0"),
        ({"widths": (3, 0)}, "must be 1 or more"),
        ({"blocks": "dense"}, "blocks='dense'"),
        ({"kernel_size": 4}, "kernel_size=4: must be odd and positive"),
        ({"ends": "conv2"}, "ends='conv2': must be 'layer' or a layer; did you mean 'conv2d'"),
        ({"ends": "linear"}, "ends='linear'"),
        ({"activation": "rleu"}, "activation='rleu': did you mean 'relu'"),
        ({"layer": "linear"}, "'linear' is of kind 'linear', and model 'padenet' is made of layers of kind 'conv2d'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((16,), 64, "takes images (channels, height, width), not inputs of shape (16,)"),
        ((1, 4, 4), 10, "enlarges its input of 16 numbers"),
        ((1, 4, 4), 100, "the task wants 100"),
    ],
    ids=str,
)
def test_shapes_that_are_not_of_super_resolution_are_refused(shape, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PadeNet(LayerFactory("conv2d"), shape, size)
