"""The KAN model as the trainer makes it."""

import re

import pytest
import torch

from archzoo.budget import count_flops, count_parameters, match_widths
from archzoo.models.model import LayerFactory, models


def build(input_shape=(3,), output_size=2, layer="kan", options=None, **model):
    return models.create("kan", LayerFactory(layer, options), input_shape, output_size, **model)


def test_trainer_s_model_has_the_layer_s_options_and_flattens():
    model = build(options={"grid_size": 8, "bias": False}, width=4, depth=2, mult=1, mult_arity=3, affine=True)
    assert model.width == [(3, 0), (4, 1), (4, 1), (2, 0)]
    assert model.mult_arity == [[], [3], [3], []]
    assert model.grid_size == 8
    assert model.blocks[0].edges.bias is None
    assert build().blocks[0].edges.bias is not None
    assert build().grid_size == 5
    assert build(regularize=0.5).regularize == 0.5
    assert build(widths=(3, 6)).width == [(3, 0), (3, 0), (6, 0), (2, 0)]
    assert build((1, 2, 3))(torch.rand(5, 1, 2, 3)).shape == (5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "linear"}, "layer='linear': model 'kan' is made of layer 'kan' alone; choose layer=kan"),
        ({"width": 0}, "width=0: must be a whole number, at least 1"),
        ({"depth": -1}, "depth=-1: must be"),
        ({"mult": -1}, "mult=-1: must be"),
        ({"mult_arity": 1}, "mult_arity=1: must be"),
    ],
    ids=str,
)
def test_trainer_s_model_refuses_by_name(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**arguments)


def test_widths_can_be_matched_on_meta():
    def count(widths):
        with torch.device("meta"):
            return count_parameters(build(widths=widths))

    match = match_widths(count, 2, 5000, 0.02)
    assert abs(match.deviation) <= 0.02
    with torch.device("meta"):
        assert count_flops(build(widths=match.widths), torch.zeros(1, 3)) > 2 * 4000
