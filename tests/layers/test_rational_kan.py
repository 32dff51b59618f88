"""The rational KAN layers: what their spec alone says. What every layer owes is tested in test_contract_*.py."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers.rational_kan import _STARTS, RationalKANConv2d, RationalKANLinear
from tests.helpers import rms_error

double = {"dtype": torch.float64}
STARTS = {"identity": lambda x: x, "swish": lambda x: x / (1 + np.exp(-x)), "gelu": lambda x: x * ndtr(x)}
every_denominator = pytest.mark.parametrize("denominator", ["abs_terms", "abs_sum"])


def randomize(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)


def rational(x: Tensor, layer: nn.Module, channel: int, groups: int, denominator: str) -> Tensor:
    """F of one channel, written out."""
    per_group = (layer.in_features if hasattr(layer, "in_features") else layer.in_channels) // groups
    a, b = layer.numerator[channel // per_group % len(layer.numerator)], layer.denominator[channel // per_group]
    p = sum(a[d] * x**d for d in range(6))
    if denominator == "abs_terms":
        return p / (1 + sum(b[j - 1].abs() * x.abs() ** j for j in range(1, 5)))
    return p / (1 + sum(b[j - 1] * x**j for j in range(1, 5)).abs())


@every_denominator
@pytest.mark.parametrize("share_numerator", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_output_is_the_equation(denominator, share_numerator, groups):
    layer = RationalKANLinear(6, 4, groups=groups, denominator=denominator, share_numerator=share_numerator, **double)
    randomize(layer)
    x = torch.randn(2, 5, 6, **double)
    f = torch.stack([rational(x[..., i], layer, i, groups, denominator) for i in range(6)], -1)
    assert rms_error(layer.activation(x), f) < 1e-14
    assert rms_error(layer(x), F.linear(f, layer.weight, layer.bias)) < 1e-14


@every_denominator
@pytest.mark.parametrize("geometry", [{}, {"padding": 1, "stride": 2}, {"groups": 2, "padding": "same"}], ids=str)
def test_convolution_is_the_equation(denominator, geometry):
    """The groups of F and those of the convolution have nothing to do with each other."""
    layer = RationalKANConv2d(
        6, 4, 3, rational_groups=3, denominator=denominator, share_numerator=False, **geometry, **double
    )
    randomize(layer)
    x = torch.randn(2, 6, 5, 4, **double)
    f = torch.stack([rational(x[:, c], layer, c, 3, denominator) for c in range(6)], 1)
    assert rms_error(layer.activation(x), f) < 1e-14
    assert rms_error(layer(x), F.conv2d(f, layer.weight, layer.bias, **geometry)) < 1e-14
    assert rms_error(layer(x[0]), layer(x)[0]) < 1e-14


@pytest.mark.parametrize("pad_value", [None, 0.0, -1.5])
def test_padding_adds_nothing_or_a_value(pad_value):
    """Patch by patch, a convolution is the linear layer."""
    layer = RationalKANConv2d(2, 3, 3, padding=1, init="gelu", pad_value=pad_value, **double)
    linear = RationalKANLinear(2 * 9, 3, groups=2, init="gelu", **double)
    x = torch.randn(2, 2, 4, 5, **double)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.flatten(1))
        linear.bias.copy_(layer.bias)
    padded = layer.activation(x) if pad_value is None else x
    patches = F.unfold(F.pad(padded, (1, 1, 1, 1), value=pad_value or 0.0), 3).transpose(1, 2)
    want = F.linear(patches, linear.weight, linear.bias) if pad_value is None else linear(patches)
    assert rms_error(layer(x), want.transpose(1, 2).reshape(2, 3, 4, 5)) < 1e-14


def test_state_has_the_names_and_shapes_of_the_spec():
    def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in layer.state_dict().items()}

    want = {"weight": (5, 12), "numerator": (1, 6), "denominator": (4, 4), "bias": (5,)}
    assert shapes(RationalKANLinear(12, 5)) == want
    assert shapes(RationalKANLinear(12, 5, share_numerator=False)) == want | {"numerator": (4, 6)}
    want = {"weight": (6, 4, 3, 2), "numerator": (2, 6), "denominator": (2, 4)}
    convolution = RationalKANConv2d(12, 6, (3, 2), groups=3, rational_groups=2, share_numerator=False, bias=False)
    assert shapes(convolution) == want
    assert (convolution.groups, convolution.rational_groups) == (3, 2)


@pytest.mark.parametrize(("features", "groups"), [(64, 8), (784, 8), (12, 4), (10, 2), (7, 1), (1, 1)])
def test_groups_are_by_default_the_greatest_common_divisor_with_8(features, groups):
    assert RationalKANLinear(features, 2).groups == groups
    assert RationalKANConv2d(features, 2, 1).rational_groups == groups


# --- Starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "denominator", "most"),
    [
        ("identity", "abs_terms", 0),
        ("identity", "abs_sum", 0),
        ("swish", "abs_terms", 1.2e-6),
        ("swish", "abs_sum", 7.9e-6),
        ("gelu", "abs_terms", 1.4e-3),
        ("gelu", "abs_sum", 2.2e-3),
    ],
)
def test_start_is_the_function_that_it_is_called_by(init, denominator, most):
    """Largest error on [-3, 3]. KAT's own coefficients for gelu are off by 1.46 under its own denominator."""
    layer = RationalKANLinear(1, 1, init=init, denominator=denominator, **double)
    x = torch.linspace(-3, 3, 60001, **double)
    y = layer.activation(x.unsqueeze(1)).detach().squeeze(1)
    assert (y - torch.from_numpy(STARTS[init](x.numpy()))).abs().max() <= most


@pytest.mark.parametrize("init", STARTS)
@every_denominator
def test_gain_is_one_over_the_mean_square_of_the_start(init, denominator):
    z = torch.linspace(-12, 12, 240001, **double)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    y = RationalKANLinear(1, 1, init=init, denominator=denominator, **double).activation(z.unsqueeze(1)).squeeze(1)
    mean_square = torch.trapezoid(y.square() * density, z).item()
    assert abs(_STARTS[init][2] * mean_square - 1) < 2e-4


@pytest.mark.parametrize("init", STARTS)
def test_outputs_start_with_the_variance_of_the_inputs(init):
    layers = RationalKANLinear(512, 400, init=init), RationalKANConv2d(64, 100, 3, init=init)
    for layer, x in zip(layers, (torch.randn(2000, 512), torch.randn(20, 64, 7, 7)), strict=True):
        assert abs(layer(x).var().item() - 1) < 0.05
        assert not layer.bias.any()
    weight = layers[0].weight
    assert abs(weight.var().item() * 512 / _STARTS[init][2] - 1) < 0.02
    assert abs(layers[1].weight.var().item() * 64 * 9 / _STARTS[init][2] - 1) < 0.03


def test_identity_is_a_linear_map():
    layer, x = RationalKANLinear(8, 5, init="identity"), torch.randn(20, 8)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@every_denominator
def test_identity_learns_its_denominator(denominator):
    """It starts at b = 0, where a derivative of |b| of 0 would hold it, and leave a straight line."""
    layer = RationalKANLinear(1, 1, init="identity", denominator=denominator)
    layer.numerator.requires_grad_(False)
    x = torch.linspace(-2, 2, 64).unsqueeze(1)
    target = x / (1 + x * x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    by_a_line = (x @ torch.linalg.lstsq(x, target).solution - target).square().mean()
    assert layer.denominator.abs().max() > 0.1
    assert loss < by_a_line / 5


# --- Methods and cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 8), (2, 3, 8)], ids=str)
def test_activation_of_any_shape_is_differentiable(shape):
    layer = RationalKANLinear(8, 3, share_numerator=False, **double)
    x = (torch.randn(shape, **double) + 3).requires_grad_()
    inputs = x, layer.numerator, layer.denominator
    y = layer.activation(x)
    assert y.shape == x.shape
    assert all(g is not None for g in torch.autograd.grad(y.square().sum(), inputs))
    assert torch.autograd.gradcheck(layer.activation, x)
    with torch.no_grad():
        assert rms_error(layer.activation(x), y) < 1e-15


def test_activation_keeps_dtype_and_is_evaluated_in_float32():
    layer, x = RationalKANLinear(8, 3), torch.randn(50, 8)
    narrow = RationalKANLinear(8, 3, dtype=torch.bfloat16)
    y = narrow.activation(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert rms_error(y, layer.activation(x)) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.activation(x), layer.activation(x).float())


def test_activation_compiles_without_a_break():
    layer, x = RationalKANLinear(8, 3), torch.randn(50, 8)
    compiled = torch.compile(layer.activation, fullgraph=True, backend="aot_eager")
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(compiled(x), layer.activation(x))


def test_activation_refuses_wrong_shapes_and_dtypes():
    layer, convolution = RationalKANLinear(8, 3), RationalKANConv2d(8, 3, 1)
    with pytest.raises(ValueError, match=r"x has shape \(5, 7\).* in_features=8"):
        layer.activation(torch.randn(5, 7))
    with pytest.raises(ValueError, match=r"x has shape \(\).* in_features=8"):
        layer.activation(torch.randn(()))
    with pytest.raises(ValueError, match=r"x has shape \(2, 7, 3, 3\).* in_channels=8"):
        convolution.activation(torch.randn(2, 7, 3, 3))
    with pytest.raises(ValueError, match="x has dtype torch.int64"):
        layer.activation(torch.ones(5, 8, dtype=torch.long))


def test_kept_outputs():
    layer, x = RationalKANLinear(8, 4, share_numerator=False), torch.randn(5, 8)
    y, before = layer(x), layer.denominator
    layer.keep_outputs_([3, 1])
    assert rms_error(layer(x), y[:, [3, 1]]) < 1e-6
    assert layer.out_features == 2
    assert layer.denominator is before
    convolution, image = RationalKANConv2d(4, 4, 3), torch.randn(2, 4, 5, 5)
    y = convolution(image)
    convolution.keep_outputs_([2])
    assert rms_error(convolution(image), y[:, [2]]) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_kept_for_the_backward_are_x_and_the_parameters(kind):
    layer = RationalKANLinear(64, 64) if kind == "linear" else RationalKANConv2d(8, 8, 3)
    x = torch.randn(*((1024, 64) if kind == "linear" else (4, 8, 16, 16)), requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.untyped_storage().data_ptr() for t in kept} <= {
        t.untyped_storage().data_ptr() for t in (x, *layer.parameters())
    }


def test_parameters_are_those_of_a_linear_layer_and_a_few():
    count = sum(p.numel() for p in RationalKANLinear(784, 64).parameters())
    assert count == sum(p.numel() for p in nn.Linear(784, 64).parameters()) + 6 + 8 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "groups=3: must divide in_features=8; None takes the gcd with 8"),
        ({"groups": 16}, "groups=16: must divide in_features=8"),
        ({"groups": 0}, "groups=0: must be a whole number, at least 1"),
        ({"groups": True}, "groups=True: must be a whole number, at least 1"),
        ({"init": "silu"}, "init='silu': must be one of 'identity', 'swish', 'gelu'"),
        ({"denominator": "abs"}, "denominator='abs': must be one of 'abs_terms', 'abs_sum'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        RationalKANLinear(8, 3, **options)
    if "groups" in options:
        options = {"rational_groups": options["groups"]}
        message = "rational_" + message.replace("in_features", "in_channels")
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        RationalKANConv2d(8, 3, 1, **options)


def test_repr_shows_what_was_chosen():
    assert RationalKANLinear(8, 3, groups=2, init="gelu").extra_repr() == (
        "8, 3, bias=True, groups=2, init='gelu', denominator='abs_terms', share_numerator=True"
    )
    assert (
        "groups=2, bias=True, rational_groups=4" in RationalKANConv2d(8, 4, 3, groups=2, rational_groups=4).extra_repr()
    )
