"""Chebyshev layers: what their spec alone says. What every layer owes is tested in test_contract_*.py."""

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers.chebyshev_kan import ChebyshevKANConv2d, ChebyshevKANLinear
from tests.helpers import rms_error

double = {"dtype": torch.float64}


@pytest.mark.parametrize("degree", [0, 1, 2, 4, 7])
def test_output_is_the_equation(degree):
    layer, x = ChebyshevKANLinear(3, 4, degree=degree, **double), torch.randn(20, 3, **double)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    basis = torch.from_numpy(np.polynomial.chebyshev.chebvander(np.tanh(x.numpy()), degree))
    assert rms_error(layer(x), torch.einsum("nid,oid->no", basis, layer.weight) + layer.bias) < 1e-13


def test_one_edge_alone_is_its_polynomial():
    """T_0 is 1 everywhere, T_1 tanh itself, T_2 = 2 tanh^2 - 1; T_d is 1 at infinity and (-1)^d at its other end."""
    layer, x = (
        ChebyshevKANLinear(1, 5, bias=False, **double),
        torch.tensor([[-50.0], [-0.3], [0.0], [1.2], [50.0]], **double),
    )
    with torch.no_grad():
        layer.weight.copy_(torch.eye(5).unsqueeze(1))
        y, t = layer(x), torch.tanh(x[:, 0])
    torch.testing.assert_close(y[:, 0], torch.ones_like(t))
    torch.testing.assert_close(y[:, 1], t)
    torch.testing.assert_close(y[:, 2], 2 * t * t - 1)
    torch.testing.assert_close(y[2], torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0], **double))  # cos(d pi / 2)
    torch.testing.assert_close(y[0], torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], **double))
    torch.testing.assert_close(y[4], torch.ones(5, **double))


@pytest.mark.parametrize("degree", [0, 4, 9])
def test_initial_weights(degree):
    layer = ChebyshevKANLinear(50, 400, degree=degree)
    assert abs(layer.weight.std() * 50 * (degree + 1) - 1) < 0.03
    assert abs(layer.weight.mean()) < 0.02 * layer.weight.std()
    assert not layer.bias.any()
    conv = ChebyshevKANConv2d(16, 300, (3, 2), groups=2, degree=degree)
    assert abs(conv.weight.std() * 8 * 6 * (degree + 1) - 1) < 0.03
    assert not conv.bias.any()


def test_state_has_the_names_and_shapes_of_the_spec():
    def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in layer.state_dict().items()}

    assert shapes(ChebyshevKANLinear(3, 4)) == {"weight": (4, 3, 5), "bias": (4,)}
    assert shapes(ChebyshevKANLinear(3, 4, False, degree=2)) == {"weight": (4, 3, 3)}
    assert shapes(ChebyshevKANConv2d(4, 6, (3, 2), groups=2)) == {"weight": (6, 2, 5, 3, 2), "bias": (6,)}


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_are_numbers_where_tanh_is_one(create_graph):
    """Upstream's cos(d acos(tanh x)) has NaN for a gradient from |x| = 9 on."""
    layer = ChebyshevKANLinear(8, 3)
    x = torch.tensor([[-1e4, -100.0, -9.1, -3.0, 3.0, 9.1, 100.0, 1e4]], requires_grad=True)
    gradients = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()], create_graph=create_graph)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][0, 3:5].all()
    if create_graph:
        assert torch.autograd.grad(gradients[0].square().sum(), x)[0].isfinite().all()


def on_patches(conv: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """The linear layer with the convolution's weights, on patches padded by zeros."""
    with torch.no_grad():
        linear.weight.copy_(conv.weight.movedim(2, -1).flatten(1, 3))  # (O, C kh kw, functions)
        linear.bias.copy_(conv.bias)
    padded = F.pad(x, (conv.padding[1],) * 2 + (conv.padding[0],) * 2)
    patches = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    return linear(patches.transpose(1, 2)).transpose(1, 2).view_as(conv(x))


def test_convolution_is_the_linear_layer_on_patches():
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "pad_value": 0.0}
    conv = ChebyshevKANConv2d(3, 4, (3, 2), **geometry, **double)
    linear, x = ChebyshevKANLinear(18, 4, **double), torch.randn(2, 3, 7, 6, **double)
    nn.init.normal_(conv.bias)
    assert rms_error(conv(x), on_patches(conv, linear, x)) < 1e-12


def test_kept_outputs():
    linear, conv = ChebyshevKANLinear(3, 4), ChebyshevKANConv2d(3, 4, 3, bias=False)
    for layer, x in ((linear, torch.randn(5, 3)), (conv, torch.randn(2, 3, 5, 5))):
        y = layer(x)
        layer.keep_outputs_([3, 1])
        torch.testing.assert_close(layer(x), y[:, [3, 1]])
        layer.keep_outputs_(torch.tensor([False, True]))
        torch.testing.assert_close(layer(x), y[:, [1]])
        with pytest.raises(ValueError, match=re.escape("index=[2]: must be at least one index from 0 to 0")):
            layer.keep_outputs_([2])
    assert (linear.out_features, conv.out_channels) == (1, 1)
    with pytest.raises(ValueError, match="groups=2"):
        ChebyshevKANConv2d(4, 4, 3, groups=2).keep_outputs_([0])


@pytest.mark.parametrize("degree", [-1, 2.5, "4", None, True])
def test_bad_degrees_are_refused_by_name(degree):
    message = re.escape(f"degree={degree!r}: must be a whole number, at least 0")
    with pytest.raises(ValueError, match=message):
        ChebyshevKANLinear(2, 3, degree=degree)
    with pytest.raises(ValueError, match=message):
        ChebyshevKANConv2d(2, 3, 3, degree=degree)


def test_bad_pad_value_is_refused_by_name():
    with pytest.raises(ValueError, match="pad_value=nan: must be a finite number"):
        ChebyshevKANConv2d(2, 3, 3, pad_value=math.nan)


def test_options_are_shown():
    assert repr(ChebyshevKANLinear(3, 4)) == "ChebyshevKANLinear(3, 4, bias=True, degree=4)"
    conv = ChebyshevKANConv2d(3, 4, 3, padding=1, pad_value=0.0)
    assert "padding=(1, 1), pad_value=0.0, bias=True, degree=4" in repr(conv)
