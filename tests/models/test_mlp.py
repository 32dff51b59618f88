import pytest
import torch
from torch import nn

from archzoo.models.model import LayerFactory, models


def build(layer="linear", input_shape=(1, 4, 4), output_size=3, **options):
    return models.create("mlp", LayerFactory(layer), input_shape, output_size, **options)


def kinds(model):
    return [type(m).__name__ for m in model.hidden]


def test_shapes_and_widths():
    model = build(width=8, depth=3)
    assert model(torch.randn(5, 1, 4, 4)).shape == (5, 3)
    assert model.widths == (8, 8, 8)
    assert [m.out_features for m in build(widths=(5, 6)).hidden if isinstance(m, nn.Linear)] == [5, 6]
    assert build(depth=0)(torch.randn(5, 1, 4, 4)).shape == (5, 3)


def test_only_layers_that_are_linear_by_themselves_get_an_activation():
    assert kinds(build(depth=1)) == ["Linear", "LayerNorm", "ReLU"]
    assert kinds(build("aptx", depth=1)) == ["APTxLinear", "LayerNorm"]
    assert kinds(build("phm", depth=1)) == ["PHMLinear", "LayerNorm", "ReLU"]
    assert kinds(build("phm", depth=1, auto="tanh")) == ["PHMLinear", "LayerNorm", "Tanh"]
    assert kinds(build("aptx", depth=1, auto="tanh")) == ["APTxLinear", "LayerNorm"]


def test_options_are_followed():
    model = build(depth=1, norm="none", activation="aptx", dropout=0.5)
    assert kinds(model) == ["Linear", "APTx", "Dropout"]
    assert type(build("aptx", head="layer").head).__name__ == "APTxLinear"
    assert type(build(head="aptx").head).__name__ == "APTxLinear"
    assert type(build("aptx").head) is nn.Linear


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width=0"),
        ({"depth": -1}, "depth=-1"),
        ({"head": "liner"}, "head='liner': .* did you mean 'linear'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"activation": "gleu"}, "activation='gleu': did you mean .*'gelu'"),
        ({"auto": "auto"}, "auto='auto'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_an_unknown_option_is_named_with_the_nearest():
    with pytest.raises(TypeError, match="no argument widht=3; did you mean 'width'"):
        build(widht=3)
