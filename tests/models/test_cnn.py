import re

import pytest
import torch
from torch import nn

import archzoo
from archzoo.budget import count_flops, count_parameters
from archzoo.models.cnn import CNN
from archzoo.models.model import LayerFactory
from archzoo.registry import Card, LayerEntry, list_layers


class BentConv2d(nn.Conv2d):
    """A convolution that is not linear."""

    def forward(self, x):
        return super().forward(x.tanh())


@pytest.fixture
def bent(monkeypatch):
    """The name of a layer that is not linear."""
    entry = LayerEntry("bent", BentConv2d, "conv2d", Card("-", "-", 2000, "", "y = x", "-", "-"), nonlinear=True)
    monkeypatch.setitem(archzoo.registry._entries, "bent", entry)
    return entry.name


def build(layer="conv2d", input_shape=(3, 8, 8), output_size=10, layer_options=None, **options):
    return CNN(LayerFactory(layer, layer_options), input_shape, output_size, **options)


def kinds(model):
    return [[type(module).__name__ for module in block] for block in model.blocks]


def test_it_is_registered():
    from archzoo.models.model import models

    assert models.get("cnn") is CNN


def test_shapes_and_widths():
    model = build(width=8, depth=2)
    assert model(torch.randn(5, 3, 8, 8)).shape == (5, 10)
    assert model(torch.randn(0, 3, 8, 8)).shape == (0, 10)
    assert [(b[0].in_channels, b[0].out_channels) for b in model.blocks] == [(3, 8), (8, 8)]
    model = build(widths=(5, 6, 7), pool_every=2)
    assert model.widths == (5, 6, 7)
    assert [(b[0].in_channels, b[0].out_channels) for b in model.blocks] == [(3, 5), (5, 6), (6, 7)]
    assert model.head.in_features == 7


def test_only_layers_that_are_linear_by_themselves_get_an_activation(bent):
    assert kinds(build(depth=1)) == [["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]]
    assert kinds(build(bent, depth=1)) == [["BentConv2d", "BatchNorm2d", "MaxPool2d"]]


def test_blocks_of_torch_conv_kan_can_be_had(bent):
    model = build(bent, norm="instance", activation="prelu", pool_every=2)
    assert kinds(model) == [
        ["BentConv2d", "InstanceNorm2d", "PReLU"],
        ["BentConv2d", "InstanceNorm2d", "PReLU", "MaxPool2d"],
    ]


def test_options_are_followed():
    model = build(depth=1, norm="none", activation="silu", kernel_size=5, stem=4, dropout=0.25)
    assert kinds(model) == [["Conv2d", "SiLU", "MaxPool2d"]]
    assert (model.blocks[0][0].kernel_size, model.blocks[0][0].padding) == ((5, 5), (2, 2))
    assert (model.stem.in_channels, model.stem.out_channels, model.blocks[0][0].in_channels) == (3, 4, 4)
    assert model.dropout.p == 0.25
    assert build(layer_options={"bias": False}).blocks[0][0].bias is None


def test_it_computes_conv_norm_relu_pool_and_the_mean_of_pixels():
    model = build(widths=(4, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    y = x
    for block in model.blocks:
        y = nn.functional.conv2d(y, block[0].weight, block[0].bias, padding=1) / (1 + block[1].eps) ** 0.5
        y = nn.functional.max_pool2d(y.relu(), 2)
    y = y.flatten(2).mean(-1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), y)


def test_pooling_stops_where_an_image_has_two_pixels():
    assert build(depth=3)(torch.randn(1, 3, 8, 8)).shape == (1, 10)  # blocks see 8, 4 and 2 pixels
    with pytest.raises(
        ValueError, match=re.escape("depth=4, pool_every=1: after 3 poolings, the last block would see 1 x")
    ):
        build(depth=4)
    deep = build(depth=6, pool_every=2, norm="instance")
    assert deep.train()(torch.randn(1, 3, 8, 8)).shape == (1, 10)
    with pytest.raises(ValueError, match="depth=7, pool_every=2"):
        build(depth=7, pool_every=2)


@pytest.mark.parametrize("layer", list_layers("conv2d"))
def test_every_convolution_can_be_its_layer_and_be_counted_on_meta(layer):
    with torch.device("meta"):
        model = build(layer, width=8, depth=2, stem=8)
        assert count_parameters(model) > 0
        assert count_flops(model.eval(), torch.zeros(1, 3, 8, 8)) > 0
    model = build(layer, width=8, depth=2, stem=8)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    first = model.blocks[0][0]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in first.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0, depth=2: both must be 1 or more"),
        ({"depth": 0}, "depth=0"),
        ({"kernel_size": 4}, "kernel_size=4: must be odd"),
        ({"kernel_size": -1}, "kernel_size=-1"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"activation": "gleu"}, "activation='gleu': did you mean"),
        ({"pool_every": 0}, "pool_every=0"),
        ({"stem": -1}, "stem=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"input_shape": (64,)}, "takes images (channels, height, width), not inputs of shape (64,)"),
        ({"layer": "linear"}, "'linear' is of kind 'linear', and model 'cnn' is made of layers of kind 'conv2d', as"),
        ({"layer_options": {"padding": 0}}, "padding=0: the model sets it to 1; leave it out"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)
