"""FastKANLinear: what its spec alone says. What every layer owes is tested in test_contract_*.py."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers.fast_kan import FastKANLinear
from tests.helpers import rms_error

double = {"dtype": torch.float64}


@pytest.mark.parametrize("layernorm", [None, False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bandwidth": 0.9, "grid_range": (-1.0, 3.0), "base_activation": "tanh"}], ids=str
)
def test_output_is_the_equation(layernorm, options):
    layer = FastKANLinear(3, 4, grid_size=6, layernorm=layernorm, **double, **options)
    x = torch.randn(20, 3, **double)
    if layer.layernorm is not None:
        nn.init.uniform_(layer.layernorm.weight, 0.5, 1.5)
        z = F.layer_norm(x, (3,), layer.layernorm.weight, layer.layernorm.bias)
    else:
        z = x
    low, high = options.get("grid_range", (-2.0, 2.0))
    centres, h = torch.linspace(low, high, 6, **double), options.get("bandwidth", (high - low) / 5)
    r = torch.exp(-(((z.unsqueeze(-1) - centres) / h) ** 2))
    base = torch.tanh(x) if options else F.silu(x)  # of x, not of z
    want = torch.einsum("nij,oij->no", r, layer.spline_weight) + base @ layer.base_weight.t() + layer.bias
    assert (layer.layernorm is None) == (layernorm is False)
    assert rms_error(layer(x), want) < 1e-13


def test_a_single_feature_has_no_layernorm():
    assert FastKANLinear(1, 3).layernorm is None
    with pytest.raises(ValueError, match="layernorm=True: normalising a single feature"):
        FastKANLinear(1, 3, layernorm=True)


def test_state_has_the_names_and_shapes_of_the_spec():
    assert {name: tuple(t.shape) for name, t in FastKANLinear(3, 4).state_dict().items()} == {
        "base_weight": (4, 3),
        "spline_weight": (4, 3, 8),
        "bias": (4,),
        "grid": (8,),
        "layernorm.weight": (3,),
        "layernorm.bias": (3,),
    }
    assert FastKANLinear(3, 4, base_activation=None).base_weight is None


def test_initial_weights_and_centres():
    layer = FastKANLinear(64, 500, scale_spline=0.3)
    assert abs(layer.spline_weight.std() / 0.3 - 1) < 0.02
    for parameter in (layer.base_weight, layer.bias):
        assert 0.97 / 8 < parameter.abs().max() <= 1 / 8
    torch.testing.assert_close(layer.grid, torch.linspace(-2, 2, 8))


@pytest.mark.parametrize(
    "base_activation", [torch.sin, nn.SiLU(), "zero", None], ids=["function", "module", "zero", "none"]
)
def test_any_base(base_activation):
    layer, x = FastKANLinear(3, 4, base_activation=base_activation, **double), torch.randn(5, 3, **double)
    base = 0 if layer.base_weight is None else base_activation(x) @ layer.base_weight.t()
    bare = FastKANLinear(3, 4, base_activation=None, **double)
    bare.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "base_weight"})
    assert rms_error(layer(x), bare(x) + base) < 1e-13


def test_gaussians_are_not_kept_for_the_backward():
    layer, x = FastKANLinear(64, 64), torch.randn(1024, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), layer.grid]}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(size for at, size in storages.items() if at not in own) <= 4 * x.nbytes


def test_second_derivatives():
    layer, x = FastKANLinear(3, 2, **double), torch.randn(4, 3, **double, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


def test_kept_outputs():
    layer, x = FastKANLinear(3, 4), torch.randn(5, 3)
    y = layer(x)
    layer.keep_outputs_([3, 1])
    assert rms_error(layer(x), y[:, [3, 1]]) < 1e-6  # another GEMM may sum in another order
    assert layer.out_features == 2
    with pytest.raises(ValueError, match=re.escape("index=[2]: must be at least one index from 0 to 1")):
        layer.keep_outputs_([2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features=0: must be a whole number, at least 1"),
        ({"grid_size": 0}, "grid_size=0: must be"),
        ({"grid_size": 1}, "bandwidth=None: grid_size=1 has no"),
        ({"bandwidth": "wide"}, "bandwidth='wide': must be positive"),
        ({"bandwidth": 0.0}, "bandwidth=0.0: must be positive"),
        ({"grid_range": (2, -2)}, "grid_range=(2, -2): must be finite and increasing"),
        ({"base_activation": 3}, "base_activation=3: must be one of"),
        ({"scale_spline": math.inf}, "scale_spline=inf: must be finite"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FastKANLinear(**{"in_features": 2, "out_features": 3, **options})


def test_one_gaussian_with_a_bandwidth():
    assert FastKANLinear(2, 3, grid_size=1, bandwidth=1.0)(torch.randn(4, 2)).shape == (4, 3)
