"""KANLinear: what its spec alone says of the equation. What every layer owes is in test_contract_*.py, the basis in
tests/kernels.
"""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from archzoo.layers.kan import KANLinear
from tests.helpers import rms_error
from tests.layers.kan_layers import DOUBLE, by_definition, generic, samples


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "options", [{}, {"standalone_scale": True, "base_activation": "tanh"}], ids=["plain", "scaled"]
)
def test_output_is_the_equation(order, adaptive, options):
    layer = generic(3, 4, spline_order=order, adaptive=adaptive, **options)
    layer.prune_edges_(0.5, torch.rand(4, 3))
    x = samples(50, 3, 2.0)
    with torch.no_grad():
        phi = by_definition(layer, x)
        assert rms_error(layer.edge_functions(x), phi) < 1e-12
        assert rms_error(layer(x), phi.sum(-1) + layer.bias) < 1e-12
        assert layer.basis(x).shape == (50, 3, layer.grid_size + order)


@pytest.mark.parametrize("base", ["silu", "gelu", "relu", "tanh", "identity"])
def test_named_and_callable_bases_agree(base):
    layer = generic(3, 4, base_activation=base, adaptive=False)
    functions = {**vars(nn.functional), "tanh": torch.tanh, "identity": lambda x: x}
    function = functions[base]
    other = KANLinear(3, 4, base_activation=lambda x: function(x), **DOUBLE)
    other.load_state_dict(layer.state_dict())
    x = samples(20, 3, 2.0)
    assert rms_error(layer(x), other(x)) < 1e-13
    assert rms_error(layer.edge_functions(x), other.edge_functions(x)) < 1e-13
    assert rms_error(layer.edge_scale(x), other.edge_scale(x)) < 1e-12


@pytest.mark.parametrize("base", ["zero", None])
def test_no_base_means_no_base_weight(base):
    layer = KANLinear(3, 4, base_activation=base)
    assert layer.base_weight is None
    assert set(layer.state_dict()) == {"spline_weight", "bias", "grid"}
    x = torch.rand(9, 3)
    assert rms_error(layer(x), layer.edge_functions(x).sum(-1)) < 1e-6


def test_state_has_the_names_and_shapes_of_the_spec():
    layer = KANLinear(3, 4, grid_size=6, spline_order=2, standalone_scale=True)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "base_weight": (4, 3),
        "spline_weight": (4, 3, 8),
        "spline_scaler": (4, 3),
        "bias": (4,),
        "grid": (3, 11),
    }
    assert layer.mask is None
    assert KANLinear(3, 4, False).bias is None
    assert KANLinear(3, 4).spline_scaler is None


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_initial_splines_pass_through_small_noise_at_the_inner_knots(order):
    layer = KANLinear(40, 50, spline_order=order, grid_size=4, scale_noise=0.3, scale_spline=2.0, **DOUBLE)
    knots = layer.grid[:, order : order + 5].t().clone()
    knots[-1] -= 1e-12  # the last cell is open on the right
    at_knots = torch.einsum("nik,oik->noi", layer.basis(knots), layer.spline_weight.detach())
    limit = 0.5 * 0.3 / 4 * 2.0
    assert 0.95 * limit < at_knots.abs().max() <= limit * (1 + 1e-9)
    assert abs(at_knots.std() / (limit / 3**0.5) - 1) < 0.05
    # of minimum norm: in the row space of the basis at the knots
    basis = layer.basis(knots)[:, 0]
    projector = torch.linalg.pinv(basis) @ basis
    assert rms_error(layer.spline_weight @ projector, layer.spline_weight) < 1e-8


def test_initial_scales_grow_with_their_arguments():
    """efficient-kan's shrink: it multiplies the a of kaiming_uniform."""
    layer = KANLinear(64, 200, scale_base=3.0, scale_spline=0.5, standalone_scale=True)
    for weight, bound in ((layer.base_weight, 3 / 8), (layer.spline_scaler, 0.5 / 8)):
        assert 0.98 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.03
    assert not layer.bias.any()
    torch.testing.assert_close(layer.grid[0], (torch.arange(12) - 3) * 0.4 - 1)


def test_extrapolation_is_of_the_spline_alone():
    x = torch.tensor([[1.7], [-2.0]], **DOUBLE)
    end, inward = x.clamp(-1, 1), x.clamp(-1, 1) * (1 - 1e-6)
    for extrapolation in ("zero", "clamp", "linear"):
        torch.manual_seed(0)
        layer = generic(1, 3, adaptive=False, extrapolation=extrapolation)
        base = layer.base_weight * nn.functional.silu(x).unsqueeze(1)
        spline = (layer.edge_functions(x) - base).squeeze(-1)
        at_end = (layer.edge_functions(end) - layer.base_weight * nn.functional.silu(end).unsqueeze(1)).squeeze(-1)
        near = (layer.edge_functions(inward) - layer.base_weight * nn.functional.silu(inward).unsqueeze(1)).squeeze(-1)
        tangent = (at_end - near) / (end - inward)
        if extrapolation == "clamp":
            torch.testing.assert_close(spline, at_end, rtol=0, atol=1e-9)
        elif extrapolation == "linear":
            torch.testing.assert_close(spline, at_end + tangent * (x - end), rtol=0, atol=1e-4)
        else:
            far = torch.tensor([[2.3], [-2.3]], **DOUBLE)  # beyond the outermost knots at 2.2
            torch.testing.assert_close(layer(far), layer.bias + nn.functional.silu(far) @ layer.base_weight.t())


def test_basis_derivatives_and_second_order_training():
    """A PINN's loss: the second derivative of a two-layer net by its input, then the gradient by the weights."""
    net = nn.Sequential(generic(1, 4, adaptive=False), generic(4, 1, adaptive=False))
    x = torch.linspace(-0.9, 0.9, 7, **DOUBLE).unsqueeze(1).requires_grad_()

    def second(points: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
        return torch.autograd.grad(slope.sum(), points, create_graph=True)[0]

    h = 1e-4
    by_differences = (net(x + h) - 2 * net(x) + net(x - h)) / h**2
    torch.testing.assert_close(second(x), by_differences, rtol=1e-3, atol=1e-2)  # the third derivative jumps at knots
    loss = second(x).square().mean()
    gradients = torch.autograd.grad(loss, [net[0].spline_weight, net[1].spline_weight])
    for layer, gradient in zip(net, gradients, strict=True):
        direction = torch.randn_like(layer.spline_weight)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                layer.spline_weight += sign * h * direction
            losses.append(second(x).square().mean())
            with torch.no_grad():
                layer.spline_weight -= sign * h * direction
        torch.testing.assert_close(
            (gradient * direction).sum(), (losses[0] - losses[1]) / (2 * h), rtol=1e-5, atol=1e-6
        )
    basis = net[0].basis(x, derivative=1)
    torch.testing.assert_close(basis, (net[0].basis(x + h) - net[0].basis(x - h)) / (2 * h), rtol=0, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
def test_bf16_modules_and_autocast_find_the_cell_in_float32(adaptive):
    """On a fine grid a bf16 position would be several cells off."""
    layer = generic(4, 3, grid_size=200, grid_range=(-0.5, 1.5), adaptive=adaptive).float()
    x = samples(500, 4).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert rms_error(y, layer(x)) < 6e-3
    assert layer.basis(x.bfloat16()).dtype == torch.float32


def test_what_is_kept_for_the_backward_is_within_four_inputs():
    layer, x = KANLinear(64, 64), torch.rand(1024, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(size for at, size in storages.items() if at not in own) <= x.nbytes  # x itself


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features=0: must be a whole number, at least 1"),
        ({"out_features": 2.5}, "out_features=2.5: must be"),
        ({"grid_size": 0}, "grid_size=0: must be"),
        ({"spline_order": -1}, "spline_order=-1: must be a whole number, at least 0"),
        ({"grid_range": (1, 1)}, "grid_range=(1, 1): must be finite and increasing"),
        ({"grid_range": (0, math.inf)}, "grid_range=(0, inf): must be"),
        ({"grid_range": (0, 1, 2)}, "grid_range=(0, 1, 2): must be"),
        ({"grid_range": None}, "grid_range=None: must be"),
        ({"grid_eps": 1.5}, "grid_eps=1.5: must lie from 0"),
        ({"grid_eps": "uniform"}, "grid_eps='uniform': must lie from 0"),
        ({"scale_base": "1"}, "scale_base='1': must be finite"),
        ({"base_activation": "sulu"}, "base_activation='sulu': must be one of 'silu'"),
        ({"extrapolation": "cubic"}, "extrapolation='cubic': must be one of 'zero', 'clamp', 'linear'"),
        ({"scale_noise": math.nan}, "scale_noise=nan: must be finite"),
        ({"regularize_entropy": -1.0}, "regularize_entropy=-1.0: must be finite, 0 or more"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KANLinear(**{"in_features": 2, "out_features": 3, **options})


def test_bad_derivatives_are_refused():
    with pytest.raises(ValueError, match="derivative=-1: must be a whole number, at least 0"):
        KANLinear(2, 3).basis(torch.rand(1, 2), -1)
