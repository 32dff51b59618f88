"""Fourier layers: what their spec alone says. What every layer owes is tested in test_contract_*.py."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers.fourier_kan import FourierKANConv2d, FourierKANLinear
from tests.helpers import layer_value_and_grads, rms_error

double = {"dtype": torch.float64}


def textbook(layer: FourierKANLinear, x: Tensor) -> Tensor:
    """Upstream's form: every harmonic by itself, (N, I, G) of them."""
    angles = x.unsqueeze(-1) * torch.arange(1, layer.grid_size + 1, dtype=x.dtype)
    y = torch.einsum("nij,oij->no", torch.cos(angles), layer.weight[:, :, 0])
    return y + torch.einsum("nij,oij->no", torch.sin(angles), layer.weight[:, :, 1]) + layer.bias


@pytest.mark.parametrize("grid_size", [1, 2, 5, 8])
def test_output_and_gradients_are_the_equations(grid_size):
    layer, x = FourierKANLinear(3, 4, grid_size=grid_size, **double), torch.randn(20, 3, **double)
    nn.init.normal_(layer.bias)
    dy, leaf = torch.randn(20, 4, **double), x.clone().requires_grad_()
    y = textbook(layer, leaf)
    want = [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)]
    for got, right in zip(layer_value_and_grads(layer, x, dy).values(), want, strict=True):
        assert rms_error(got, right) < 1e-13


def test_one_edge_alone_is_its_harmonic():
    layer, x = (
        FourierKANLinear(1, 6, bias=False, grid_size=3, **double),
        torch.linspace(-7, 7, 29, **double).unsqueeze(1),
    )
    with torch.no_grad():
        layer.weight.copy_(torch.eye(6).view(6, 1, 2, 3))
        y = layer(x)
    want = [torch.cos(x), torch.cos(2 * x), torch.cos(3 * x), torch.sin(x), torch.sin(2 * x), torch.sin(3 * x)]
    torch.testing.assert_close(y, torch.cat(want, 1))


def test_period_is_two_pi():
    layer, x = FourierKANLinear(3, 4, **double), torch.randn(20, 3, **double)
    assert rms_error(layer(x + 2 * math.pi), layer(x)) < 1e-13


def test_initial_weights():
    layer = FourierKANLinear(50, 400, grid_size=6)
    assert abs(layer.weight.std() * math.sqrt(50 * 6) - 1) < 0.02
    assert not layer.bias.any()
    smooth = FourierKANLinear(50, 400, grid_size=6, smooth_init=True)
    for j in range(1, 7):
        for wave in range(2):
            assert abs(smooth.weight[:, :, wave, j - 1].std() * math.sqrt(50) * j**2 - 1) < 0.03


def test_initial_weights_of_a_convolution():
    shape = {"in_channels": 16, "out_channels": 400, "kernel_size": (3, 2), "groups": 2, "grid_size": 4}
    layer = FourierKANConv2d(**shape)
    assert abs(layer.weight.std() * math.sqrt(8 * 6 * 4) - 1) < 0.02
    assert not layer.bias.any()
    smooth = FourierKANConv2d(**shape, smooth_init=True)
    for j in range(1, 5):
        assert abs(smooth.weight[:, :, :, j - 1].std() * math.sqrt(8 * 6) * j**2 - 1) < 0.03


def test_state_has_the_names_and_shapes_of_the_spec():
    def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in layer.state_dict().items()}

    assert shapes(FourierKANLinear(3, 4)) == {"weight": (4, 3, 2, 5), "bias": (4,)}
    assert shapes(FourierKANLinear(3, 4, False, grid_size=2)) == {"weight": (4, 3, 2, 2)}
    assert shapes(FourierKANConv2d(4, 6, (3, 2), groups=2)) == {"weight": (6, 2, 2, 5, 3, 2), "bias": (6,)}


def test_convolution_is_the_linear_layer_on_patches():
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "pad_value": 0.0}
    conv, x = FourierKANConv2d(3, 4, (3, 2), **geometry, **double), torch.randn(2, 3, 7, 6, **double)
    linear = FourierKANLinear(18, 4, **double)
    nn.init.normal_(conv.bias)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.movedim((2, 3), (-2, -1)).flatten(1, 3))  # (O, C kh kw, 2, G)
        linear.bias.copy_(conv.bias)
    patches = F.unfold(F.pad(x, (2, 2, 1, 1)), (3, 2), (1, 2), 0, (2, 1))
    assert rms_error(conv(x), linear(patches.transpose(1, 2)).transpose(1, 2).view_as(conv(x))) < 1e-12


@pytest.mark.plain_memory
def test_neither_the_harmonics_nor_a_tensor_of_all_edges_are_made():
    """FourierKAN#2: upstream's (N, O, I, G) products."""
    layer, x = FourierKANLinear(64, 64, grid_size=8), torch.randn(4096, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(x)
        y.sum().backward()
    given = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters()]}
    assert {t.untyped_storage().data_ptr() for t in kept} <= given
    largest = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert 0 < largest <= 2 * x.nbytes  # a block of harmonics; those of all rows are 16 times x


def test_kept_outputs():
    linear, conv = FourierKANLinear(3, 4), FourierKANConv2d(3, 4, 3)
    for layer, x in ((linear, torch.randn(5, 3)), (conv, torch.randn(2, 3, 5, 5))):
        y = layer(x)
        layer.keep_outputs_([3, 1])
        torch.testing.assert_close(layer(x), y[:, [3, 1]])
    assert (linear.out_features, conv.out_channels) == (2, 2)


@pytest.mark.parametrize("grid_size", [0, -1, 2.5, "5", None, True])
def test_bad_sizes_are_refused_by_name(grid_size):
    message = re.escape(f"grid_size={grid_size!r}: must be a whole number, at least 1")
    with pytest.raises(ValueError, match=message):
        FourierKANLinear(2, 3, grid_size=grid_size)
    with pytest.raises(ValueError, match=message):
        FourierKANConv2d(2, 3, 3, grid_size=grid_size)


def test_options_are_shown():
    assert repr(FourierKANLinear(3, 4)) == "FourierKANLinear(3, 4, bias=True, grid_size=5, smooth_init=False)"
    assert repr(FourierKANConv2d(3, 4, 3, smooth_init=True)).endswith("bias=True, grid_size=5, smooth_init=True)")
