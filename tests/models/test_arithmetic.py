"""The model of the arithmetic tasks: which unit makes the sums, and which combines them."""

import re

import pytest
import torch

from archzoo.layers.arithmetic import MCFC, NAC, NALU, NAU, NMU, NPU
from archzoo.models.model import LayerFactory, models


def build(name, options=None, **model):
    return models.create("arithmetic", LayerFactory(name, options), (4,), 1, **model)


@pytest.mark.parametrize(
    ("name", "options", "classes"),
    [
        ("nmu", {"noise": (1, 5), "init": "identity", "input_weight": 0.5}, (NAU, NMU)),
        ("npu", {}, (NAU, NPU)),
        ("nau", {"sparsity": "squared"}, (NAU, NAU)),
        ("nalu", {"shared": False}, (NALU, NALU)),
        ("nac", {"mode": "multiply"}, (NAC, NAC)),
        ("mcfc", {"mode": "multiply"}, (MCFC, MCFC)),
        ("linear", {"bias": False}, (torch.nn.Linear, torch.nn.Linear)),
    ],
)
def test_a_unit_that_only_multiplies_has_an_adding_one_before_it(name, options, classes):
    model = build(name, options)
    first, last = model.sums[0], model.last
    assert (type(first), type(last)) == classes
    assert (first.in_features, first.out_features, last.in_features, last.out_features) == (4, 2, 2, 1)
    assert getattr(first, "mode", "add") == "add"
    assert getattr(last, "mode", "add") == options.get("mode", "add")
    for key in ("input_weight", "sparsity", "shared"):
        if key in options:
            assert getattr(first, key) == getattr(last, key) == options[key]
    assert model(torch.rand(5, 4) + 1).shape == (5, 1)


def test_ten_parameters_compute_the_function_of_that_name():
    model = build("nmu").double()
    assert sum(p.numel() for p in model.parameters()) == 10
    model.sums[0].weight.data = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    model.last.weight.data.fill_(1.0)
    x = 1 + torch.rand(20, 4, dtype=torch.float64)
    assert torch.allclose(model(x)[:, 0], x[:, :2].sum(1) * x.sum(1))


def test_first_layer_depth_and_widths_can_be_chosen():
    assert isinstance(build("nmu", first="layer").sums[0], NMU)
    assert isinstance(build("nmu", first="nac").sums[0], NAC)
    assert len(build("nmu", depth=0).sums) == 0
    assert build("nmu", depth=0).last.in_features == 4
    assert [unit.out_features for unit in build("nau", widths=(6, 3)).sums] == [6, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": 0}, "width=0, depth=1"), ({"first": "nua"}, "first='nua': must be 'auto', 'layer' or a layer")],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build("nmu", **options)
    with pytest.raises(ValueError, match="of kind 'conv2d'"):
        build("conv2d")
