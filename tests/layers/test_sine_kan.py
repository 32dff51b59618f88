"""Sine layers: what their spec alone says. What every layer owes is tested in test_contract_*.py."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers.sine_kan import SineKANConv2d, SineKANLinear
from tests.helpers import layer_value_and_grads, rms_error

double = {"dtype": torch.float64}


def phases(features: int, grid_size: int) -> Tensor:
    """The rule of the paper's code, step by step."""
    step = torch.linspace(0, math.pi, features, **double)
    rows = []
    for i in range(features):
        row = [j / (grid_size + 1) + step[i].item() for j in range(1, grid_size + 1)]
        for n in range(1, grid_size):
            row = [p * (0.9724108095811765 * n ** (-0.9884401790754128) + 0.999449553483052) for p in row]
        rows.append(row)
    return torch.tensor(rows, **double)


def textbook(layer: SineKANLinear, x: Tensor) -> Tensor:
    waves = torch.sin(x.unsqueeze(-1) * layer.freq + layer.phase)
    return torch.einsum("nij,oij->no", waves, layer.weight) + layer.bias


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("grid_size", [1, 2, 8])
def test_output_and_gradients_are_the_equations(grid_size, is_first):
    layer, x = SineKANLinear(3, 4, grid_size=grid_size, is_first=is_first, **double), torch.randn(20, 3, **double)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    dy, leaf = torch.randn(20, 4, **double), x.clone().requires_grad_()
    y = textbook(layer, leaf)
    want = [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)]
    got = layer_value_and_grads(layer, x, dy)
    assert set(got) == {"y", "x", "weight", "freq", "bias"}
    for value, right in zip(got.values(), want, strict=True):
        assert rms_error(value, right) < 1e-13


@pytest.mark.parametrize("features", [1, 2, 7])
@pytest.mark.parametrize("grid_size", [1, 2, 8])
def test_initial_frequencies_phases_and_bias(features, grid_size):
    j = torch.arange(1, grid_size + 1, **double)
    for is_first in (False, True):
        layer = SineKANLinear(features, 5, grid_size=grid_size, is_first=is_first, **double)
        torch.testing.assert_close(layer.freq.detach(), j if is_first else j / (grid_size + 1), rtol=1e-15, atol=0)
        torch.testing.assert_close(layer.phase, phases(features, grid_size), rtol=1e-13, atol=0)
        torch.testing.assert_close(layer.bias.detach(), torch.full((5,), 1 / 5, **double))
    torch.testing.assert_close(SineKANLinear(features, 5, grid_size=grid_size).phase.double(), layer.phase)


@pytest.mark.parametrize("is_first", [False, True])
def test_initial_weights_are_one_number_an_edge_over_the_sine_and_the_outputs(is_first):
    linear, conv = SineKANLinear(60, 300, is_first=is_first), SineKANConv2d(8, 300, (3, 2), groups=2, is_first=is_first)
    for weight in (linear.weight, conv.weight.flatten(3)):
        j = torch.arange(1, 9).view(-1, *[1] * (weight.dim() - 3))
        amplitude = weight * 300 * j
        assert rms_error(amplitude, amplitude[:, :, :1].expand_as(amplitude)) < 1e-6
        one = amplitude[:, :, 0]
        if is_first:
            assert abs(one.std() / 0.4 - 1) < 0.03
            assert one.abs().max() > 1.2  # normal, so beyond 3 deviations too
        else:
            assert 0.99 < one.abs().max() <= 1.0001
            assert abs(one.std() * math.sqrt(3) - 1) < 0.03
        assert abs(one.mean()) < 0.02
    torch.testing.assert_close(conv.bias.detach(), torch.full((300,), 1 / 300))
    torch.testing.assert_close(conv.phase.double(), phases(8, 8))


def test_state_has_the_names_and_shapes_of_the_spec():
    def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in layer.state_dict().items()}

    assert shapes(SineKANLinear(3, 4)) == {"weight": (4, 3, 8), "freq": (8,), "bias": (4,), "phase": (3, 8)}
    assert shapes(SineKANLinear(3, 4, False, grid_size=2)) == {"weight": (4, 3, 2), "freq": (2,), "phase": (3, 2)}
    conv = SineKANConv2d(4, 6, (3, 2), groups=2)
    assert shapes(conv) == {"weight": (6, 2, 8, 3, 2), "freq": (8,), "bias": (6,), "phase": (4, 8)}
    assert [name for name, _ in conv.named_buffers()] == ["phase"]


def test_convolution_is_the_linear_layer_on_patches():
    """With one phase a channel, whichever tap of the patch it is."""
    geometry = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "pad_value": 0.0}
    conv, x = SineKANConv2d(3, 4, (3, 2), **geometry, **double), torch.randn(2, 3, 7, 6, **double)
    linear = SineKANLinear(18, 4, **double)
    nn.init.normal_(conv.weight)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.movedim(2, -1).flatten(1, 3))  # (O, C kh kw, G)
        linear.phase.copy_(conv.phase.repeat_interleave(6, 0))
        linear.freq.copy_(conv.freq)
        linear.bias.copy_(conv.bias)
    patches = F.unfold(F.pad(x, (2, 2, 1, 1)), (3, 2), (1, 2), 0, (2, 1))
    assert rms_error(conv(x), linear(patches.transpose(1, 2)).transpose(1, 2).view_as(conv(x))) < 1e-12


def test_frequencies_learn_and_phases_stay():
    layer, x = SineKANLinear(1, 1, grid_size=1), torch.linspace(-3, 3, 256).unsqueeze(1)
    phase, target = layer.phase.clone(), torch.sin(0.8 * x + layer.phase)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(500):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(layer.freq.detach(), torch.tensor([0.8]), rtol=1e-3, atol=0)  # 0.5 at first
    assert rms_error(layer(x), target) < 1e-3
    assert torch.equal(layer.phase, phase)


def test_kept_for_the_backward_are_x_the_parameters_and_the_phases():
    layer, x = SineKANLinear(64, 64), torch.randn(1024, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    given = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters(), layer.phase]}
    assert {t.untyped_storage().data_ptr() for t in kept} <= given


def test_kept_outputs():
    linear, conv = SineKANLinear(3, 4), SineKANConv2d(3, 4, 3)
    for layer, x in ((linear, torch.randn(5, 3)), (conv, torch.randn(2, 3, 5, 5))):
        y, freq = layer(x), layer.freq
        layer.keep_outputs_([3, 1])
        torch.testing.assert_close(layer(x), y[:, [3, 1]])
        assert layer.freq is freq
        assert layer.phase.shape == (3, 8)
    assert (linear.out_features, conv.out_channels) == (2, 2)


@pytest.mark.parametrize("grid_size", [0, -1, 2.5, "8", None, True])
def test_bad_sizes_are_refused_by_name(grid_size):
    message = re.escape(f"grid_size={grid_size!r}: must be a whole number, at least 1")
    with pytest.raises(ValueError, match=message):
        SineKANLinear(2, 3, grid_size=grid_size)
    with pytest.raises(ValueError, match=message):
        SineKANConv2d(2, 3, 3, grid_size=grid_size)


def test_options_are_shown():
    assert repr(SineKANLinear(3, 4)) == "SineKANLinear(3, 4, bias=True, grid_size=8, is_first=False)"
    assert repr(SineKANConv2d(3, 4, 3, is_first=True)).endswith("bias=True, grid_size=8, is_first=True)")
