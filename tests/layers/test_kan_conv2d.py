"""Convolution by splines and by Gaussians: the linear layer on every patch, and the grid of each channel."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers.fast_kan import FastKANConv2d, FastKANLinear
from archzoo.layers.kan import KANLinear
from archzoo.layers.kan_conv2d import KANConv2d
from tests.helpers import rms_error

BASES = ["silu", "zero", torch.sin]


def smooth(x: Tensor) -> Tensor:
    """A base activation that the kernels do not know."""
    return x * torch.cos(x)


def name_of(base: object) -> str:
    return getattr(base, "__name__", str(base))


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2.4 - 1.2


def perturbed(layer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def on_patches(conv: nn.Module, linear: nn.Module, x: Tensor, pad_value: float) -> Tensor:
    """The linear layer with the convolution's weights, on patches in the order channel, row, column."""
    state = {name: value for name, value in conv.state_dict().items() if not name.startswith("grid")}
    for name in ("base_weight", "spline_scaler"):
        if name in state:
            state[name] = state[name].flatten(1)
    state["spline_weight"] = state["spline_weight"].movedim(2, -1).flatten(1, 3)
    linear.load_state_dict(state, strict=False)
    padded = F.pad(x, (conv.padding[1],) * 2 + (conv.padding[0],) * 2, value=pad_value)
    patches = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    y = linear(patches.transpose(1, 2)).transpose(1, 2)
    size = conv(x).shape[2:]
    return y.unflatten(2, size)


SHAPE = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


@pytest.mark.parametrize("base", [*BASES, smooth], ids=name_of)
@pytest.mark.parametrize("pad_value", [0.0, 0.4])
@pytest.mark.parametrize("scale", [False, True])
def test_a_spline_convolution_is_the_linear_layer_on_patches(base, pad_value, scale):
    options = {"base_activation": base, "standalone_scale": scale, "dtype": torch.float64}
    conv = perturbed(KANConv2d(3, 4, **SHAPE, pad_value=pad_value, **options))
    linear = KANLinear(3 * 6, 4, **options)
    x = images(2, 3, 7, 6)
    assert rms_error(conv(x), on_patches(conv, linear, x, pad_value)) < 1e-12


@pytest.mark.parametrize("base", [*BASES, smooth], ids=name_of)
@pytest.mark.parametrize("pad_value", [0.0, 0.4])
def test_a_gaussian_convolution_is_the_linear_layer_on_patches(base, pad_value):
    options = {"base_activation": base, "layernorm": False, "dtype": torch.float64}
    conv = perturbed(FastKANConv2d(3, 4, **SHAPE, pad_value=pad_value, **options))
    linear = FastKANLinear(3 * 6, 4, **options)
    x = images(2, 3, 7, 6)
    assert rms_error(conv(x), on_patches(conv, linear, x, pad_value)) < 1e-12


@pytest.mark.parametrize("cls", [KANConv2d, FastKANConv2d])
@pytest.mark.parametrize("base", ["gelu", smooth], ids=name_of)
def test_padding_adds_nothing_unless_told_what_it_adds(cls, base):
    """A border of pixels whose functions are all 0 is what the default pads with."""
    conv = perturbed(cls(2, 3, 3, padding=1, base_activation=base, dtype=torch.float64))
    x = images(1, 2, 4, 4)
    far = F.pad(x, (1, 1, 1, 1), value=-1e4)  # beyond every spline and Gaussian, where gelu is 0 too
    inside = copy.deepcopy(conv)
    inside.padding = (0, 0)
    if base == "gelu":
        assert rms_error(conv(x), inside(far)) < 1e-12
    else:
        assert rms_error(conv(x), inside(far)) > 0.9  # smooth is not 0 there
        inner = conv(x)[..., 1:-1, 1:-1]
        assert rms_error(inner, inside(x)) < 1e-12
    conv.pad_value = 0.0
    assert rms_error(conv(x), inside(F.pad(x, (1, 1, 1, 1)))) < 1e-12


def test_groups_see_their_own_channels_only():
    conv = perturbed(KANConv2d(4, 6, 3, groups=2, dtype=torch.float64))
    conv.update_grid(images(8, 4, 6, 6))
    x = images(2, 4, 5, 5)
    alone = KANConv2d(2, 3, 3, dtype=torch.float64)
    for group in range(2):
        channels, outputs = slice(2 * group, 2 * group + 2), slice(3 * group, 3 * group + 3)
        state = {n: v[outputs] for n, v in conv.state_dict().items() if n != "grid"}
        alone.load_state_dict({**state, "grid": conv.grid[channels]})
        assert rms_error(conv(x)[:, outputs], alone(x[:, channels])) < 1e-13


@pytest.mark.parametrize("groups", [1, 2])
def test_moving_the_grid_keeps_cubics_and_refining_keeps_the_function(groups):
    conv = perturbed(KANConv2d(4, 2, (2, 3), groups=groups, base_activation="zero", dtype=torch.float64))
    x = images(8, 4, 6, 6, seed=1) * 0.7  # inside the grid
    with torch.no_grad():  # cubics: what any cubic grid can hold
        inside = conv.spline.values(torch.linspace(-0.99, 0.99, 99, dtype=torch.float64).unsqueeze(0))[0]
        fit = torch.linspace(-0.99, 0.99, 99, dtype=torch.float64)
        cubic = torch.linalg.lstsq(inside.t(), (fit**3 - fit + 0.5).unsqueeze(1)).solution.flatten()
        gains = torch.randn(2, 4 // groups, 1, 2, 3, dtype=torch.float64)
        conv.spline_weight.copy_(gains * cubic.view(1, 1, -1, 1, 1))
    before = conv(x)
    weight = conv.spline_weight
    conv.update_grid(x)
    assert conv.spline_weight is weight
    assert conv.grid.std(0).max() > 0, "each channel has knots of its own"
    assert rms_error(conv(x), before) < 1e-9
    conv.refine(3 * conv.grid_size)
    assert conv.spline_weight is not weight
    assert conv.spline_weight.is_contiguous()
    assert tuple(conv.spline_weight.shape) == (2, 4 // groups, 18, 2, 3)
    assert rms_error(conv(x), before) < 1e-9


def test_grid_updates_take_every_pixel_and_refuse_what_is_not_finite():
    conv = KANConv2d(2, 3, 3, dtype=torch.float64)
    x = images(4, 2, 5, 5) * torch.tensor([1.0, 10.0], dtype=torch.float64).view(2, 1, 1)
    conv.update_grid(x)
    ends = conv.grid[:, [3, 8]]
    assert torch.allclose(ends[:, 1] - ends[:, 0], x.amax((0, 2, 3)) - x.amin((0, 2, 3)), rtol=1e-2)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="x: 100 samples; the grid needs at least one, and all finite"):
        conv.update_grid(x)
    with pytest.raises(ValueError, match=re.escape("x has shape (4, 3, 5, 5)")):
        conv.update_grid(images(4, 3, 5, 5))


def test_the_norm_of_fast_kan_is_over_the_channels_of_a_pixel():
    conv = perturbed(FastKANConv2d(4, 3, 1, layernorm=True, dtype=torch.float64))
    linear = FastKANLinear(4, 3, layernorm=True, dtype=torch.float64)
    linear.load_state_dict(
        {n: v.flatten(2) if n == "spline_weight" else v for n, v in conv.state_dict().items()}
        | {"base_weight": conv.base_weight.flatten(1)}
    )
    x = images(2, 4, 3, 3)
    assert rms_error(conv(x).movedim(1, -1), linear(x.movedim(1, -1))) < 1e-13
    with pytest.raises(ValueError, match="layernorm=True"):
        FastKANConv2d(1, 3, 1, layernorm=True)


def test_initial_functions_are_those_of_a_linear_layer_with_the_same_fan_in():
    torch.manual_seed(0)
    conv = KANConv2d(16, 64, 3, groups=2)
    bound = (8 * 9) ** -0.5
    assert 0.95 * bound < conv.base_weight.abs().max() <= bound
    x = torch.linspace(-1, 1, 6).unsqueeze(0)  # the inner knots, where the splines pass through the noise
    noise = torch.einsum("ocjhw,jr->ocrhw", conv.spline_weight, conv.spline.values(x)[0])[:, :, :-1]
    assert 0.45 * 0.1 / 5 < noise.abs().max() <= 0.5 * 0.1 / 5 * 1.001


def test_outputs_can_be_chosen_and_edges_pruned():
    conv = perturbed(KANConv2d(2, 5, 3, standalone_scale=True, dtype=torch.float64))
    x = images(2, 2, 5, 5)
    conv.prune_edges_(conv.spline_weight.abs().mean(2).median().item())
    assert 0.4 < conv.mask.mean() < 0.6
    y = conv(x)
    again = KANConv2d(2, 5, 3, standalone_scale=True, dtype=torch.float64)
    again.load_state_dict(conv.state_dict())
    assert torch.equal(again(x), y)
    conv.keep_outputs_([3, 0])
    assert rms_error(conv(x), y[:, [3, 0]]) < 1e-14
    assert conv.out_channels == 2
    with pytest.raises(ValueError, match="groups=2"):
        KANConv2d(2, 4, 3, groups=2).keep_outputs_([0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_size": 0}, "grid_size=0"),
        ({"spline_order": -1}, "spline_order=-1"),
        ({"grid_range": (1.0, 1.0)}, "grid_range=(1.0, 1.0)"),
        ({"base_activation": "sulu"}, "base_activation='sulu'"),
        ({"extrapolation": "none"}, "extrapolation='none'"),
        ({"groups": 3}, "groups=3"),
        ({"padding": "some"}, "padding='some'"),
        ({"stride": 0}, "stride=0"),
        ({"pad_value": float("nan")}, "pad_value=nan"),
        ({"pad_value": "0"}, "pad_value='0'"),
    ],
    ids=lambda value: str(value),
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KANConv2d(2, 4, 3, **options)
