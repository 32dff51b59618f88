"""Wav-KAN layers: what their spec alone says. What every layer owes is tested in test_contract_*.py."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import archzoo
from archzoo.layers import WaveletKANConv2d, WaveletKANLinear
from tests.helpers import layer_value_and_grads, rms_error

double = {"dtype": torch.float64}
every_wavelet = pytest.mark.parametrize("wavelet", ["mexican_hat", "morlet", "dog"])


def psi(u: Tensor, wavelet: str) -> Tensor:
    """As Wav-KAN's code has them."""
    if wavelet == "mexican_hat":
        return (2 / (math.sqrt(3) * math.pi**0.25)) * ((u**2) - 1) * torch.exp(-0.5 * u**2)
    if wavelet == "morlet":
        return torch.exp(-0.5 * u**2) * torch.cos(5.0 * u)
    return -u * torch.exp(-0.5 * u**2)


def perturbed(layer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


# --- Linear -----------------------------------------------------------------------------------------------------------


@every_wavelet
def test_output_is_the_equation(wavelet):
    layer, x = perturbed(WaveletKANLinear(3, 4, wavelet=wavelet, **double)), torch.randn(20, 3, **double)
    u = (x[:, None] - layer.translation) / layer.scale
    assert rms_error(layer(x), (layer.weight * psi(u, wavelet)).sum(2) + layer.bias) < 1e-14


def test_the_mexican_hat_is_the_default_and_points_down():
    """The sign is that of Wav-KAN's code, opposite to the usual Ricker wavelet."""
    layer = WaveletKANLinear(1, 1, bias=False, **double)
    nn.init.ones_(layer.weight)
    assert layer.wavelet == "mexican_hat"
    at_zero = layer(torch.zeros(1, **double)).item()
    assert math.isclose(at_zero, -2 / (math.sqrt(3) * math.pi**0.25))


@pytest.mark.parametrize("bias", [True, False])
def test_state_has_the_names_and_shapes_of_the_spec(bias):
    """No batch norm, and no unused `weight1`, as upstream has."""
    want = {"weight": (4, 3), "scale": (4, 3), "translation": (4, 3)} | ({"bias": (4,)} if bias else {})
    layer = WaveletKANLinear(3, 4, bias)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == want
    assert {name for name, _ in layer.named_parameters()} == want.keys()
    conv = dict.fromkeys(("weight", "scale", "translation"), (4, 3, 2, 5)) | ({"bias": (4,)} if bias else {})
    layer = WaveletKANConv2d(6, 4, (2, 5), groups=2, bias=bias)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == conv


@pytest.mark.parametrize(
    ("make", "fan_in"),
    [
        (lambda: WaveletKANLinear(64, 500), 64),
        (lambda: WaveletKANConv2d(8, 500, (2, 4)), 64),
        (lambda: WaveletKANConv2d(16, 500, (2, 4), groups=2), 64),
    ],
    ids=["linear", "conv2d", "groups"],
)
def test_initial_values_are_those_of_nn_linear_unit_scale_and_no_shift(make, fan_in):
    layer = make()
    bound = fan_in**-0.5
    for parameter in (layer.weight, layer.bias):
        assert 0.98 * bound < parameter.abs().max() <= bound
        assert abs(parameter.detach().std() * math.sqrt(3) / bound - 1) < 0.1
        assert abs(parameter.detach().mean()) < 0.1 * bound
    assert torch.equal(layer.scale, torch.ones_like(layer.scale))
    assert torch.equal(layer.translation, torch.zeros_like(layer.translation))


@every_wavelet
def test_no_edge_is_kept_for_the_backward(wavelet):
    """The issue allows 4 floats an input of every row; x itself is all there is."""
    layer, x = WaveletKANLinear(64, 64, wavelet=wavelet), torch.randn(1024, 64, requires_grad=True)
    conv, images = WaveletKANConv2d(8, 8, 3, padding=1, wavelet=wavelet), torch.randn(4, 8, 16, 16, requires_grad=True)
    for module, inputs in ((layer, x), (conv, images)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            module(inputs)
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        assert sum(size for at, size in storages.items() if at not in own) <= inputs.nbytes


def test_inputs_far_away_get_zero_gradients_and_no_nan():
    """A wavelet and its gradients vanish a few scales away; u^2 then overflows, and the plain formula gives NaN."""
    layer = WaveletKANLinear(2, 3)
    gradients = layer_value_and_grads(layer, torch.tensor([[1e25, 0.5], [-1e25, 0.5], [300.0, 0.5]]))
    assert all(g.isfinite().all() for g in gradients.values())
    assert torch.equal(gradients["weight"][:, 0], torch.zeros(3))
    assert (gradients["weight"][:, 1] != 0).all()


@every_wavelet
def test_second_derivatives(wavelet):
    layer, x = WaveletKANLinear(3, 2, wavelet=wavelet, **double), torch.randn(4, 3, **double, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


def test_inputs_of_any_number_of_dimensions():
    """pykan#204: a KAN layer for (batch, …, features)."""
    layer, x = WaveletKANLinear(3, 4), torch.randn(2, 5, 7, 3)
    assert layer(x).shape == (2, 5, 7, 4)
    assert rms_error(layer(x)[1, 3], layer(x[1, 3])) < 1e-6


@pytest.mark.parametrize(
    ("wavelet", "least"),
    [("mexican_hat", 0.92), *(pytest.param(name, 0.92, marks=pytest.mark.slow) for name in ("dog", "morlet"))],
)
def test_learns_the_digits(wavelet, least):
    """1400 of the 1797 digits, pixels in [0, 1], [64, 32, LayerNorm, 10], 15 epochs."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(digits.target)[order]
    torch.manual_seed(0)
    layers = [archzoo.create_layer("wavelet_kan", *sizes, wavelet=wavelet) for sizes in ((64, 32), (32, 10))]
    net = nn.Sequential(layers[0], nn.LayerNorm(32), layers[1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(15):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    assert (net(x[1400:]).argmax(1) == y[1400:]).float().mean() >= least


# --- Convolution ------------------------------------------------------------------------------------------------------

GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "groups": 2},
    {"kernel_size": (1, 3), "padding": "valid", "stride": 2, "groups": 4},
    {"kernel_size": 5, "padding": 2, "stride": 3},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_shapes_are_those_of_nn_conv2d(geometry):
    ours, usual = WaveletKANConv2d(4, 8, **geometry), nn.Conv2d(4, 8, **geometry)
    for shape in ((2, 4, 9, 11), (4, 9, 11), (0, 4, 9, 11)):
        x = torch.randn(shape)
        assert ours(x).shape == usual(x).shape, shape
    assert ours.weight.shape == usual.weight.shape


@pytest.mark.parametrize("pad_value", [0.0, 0.4])
@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if "groups" not in g], ids=str)
@every_wavelet
def test_a_convolution_is_the_linear_layer_on_patches(geometry, pad_value, wavelet):
    conv = perturbed(WaveletKANConv2d(4, 8, **geometry, wavelet=wavelet, pad_value=pad_value, **double))
    linear = WaveletKANLinear(conv.weight[0].numel(), 8, wavelet=wavelet, **double)
    linear.load_state_dict({name: t.flatten(1) if t.dim() == 4 else t for name, t in conv.state_dict().items()})
    x = torch.randn(2, 4, 7, 6, **double)
    padded = F.pad(x, (conv.padding[1],) * 2 + (conv.padding[0],) * 2, value=pad_value)
    patches = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    y = conv(x)
    assert rms_error(y, linear(patches.mT).mT.unflatten(2, y.shape[2:])) < 1e-13


@every_wavelet
def test_padding_adds_nothing_unless_told_what_it_adds(wavelet):
    """Even where a wavelet is not 0 at 0, or is moved to where it is not 0 at the padding's value."""
    conv = perturbed(WaveletKANConv2d(2, 3, 3, padding=1, wavelet=wavelet, **double))
    inside = WaveletKANConv2d(2, 3, 3, wavelet=wavelet, **double)
    inside.load_state_dict(conv.state_dict())
    x = torch.randn(2, 2, 4, 4, **double)
    y = conv(x)
    assert rms_error(y, inside(F.pad(x, (1, 1, 1, 1), value=1e4))) < 1e-13
    assert rms_error(y[..., 1:-1, 1:-1], inside(x)) < 1e-13
    corner = inside(F.pad(x, (1, 1, 1, 1)))[..., 0, 0]
    assert rms_error(y[..., 0, 0], corner) > 0.01, "padding by zeros is another thing"
    conv.pad_value = 0.0
    assert rms_error(conv(x)[..., 0, 0], corner) < 1e-13


def test_an_image_of_padding_alone_gives_the_bias():
    conv = perturbed(WaveletKANConv2d(1, 2, 3, padding=5, stride=12))
    y = conv(torch.randn(1, 1, 4, 4))
    assert torch.equal(y, conv.bias.view(1, 2, 1, 1).expand(y.shape))


def test_groups_see_their_own_channels_only():
    conv, x = perturbed(WaveletKANConv2d(4, 6, 3, groups=2, **double)), torch.randn(2, 4, 5, 5, **double)
    alone = WaveletKANConv2d(2, 3, 3, **double)
    for group in range(2):
        channels, outputs = slice(2 * group, 2 * group + 2), slice(3 * group, 3 * group + 3)
        alone.load_state_dict({name: t[outputs] for name, t in conv.state_dict().items()})
        assert rms_error(conv(x)[:, outputs], alone(x[:, channels])) < 1e-13


def test_parameters_in_channels_last_give_the_same():
    conv, x = perturbed(WaveletKANConv2d(4, 6, 3, padding=1, **double)), torch.randn(2, 4, 5, 5, **double)
    before = layer_value_and_grads(conv, x)
    after = layer_value_and_grads(conv.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    for name in before:
        assert rms_error(after[name], before[name]) < 1e-14, name


# --- Kept outputs, and what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [[3, 1], torch.tensor([False, True, True, False])], ids=["order", "mask"])
@pytest.mark.parametrize(
    ("make", "shape", "size", "axis"),
    [
        (lambda: WaveletKANLinear(3, 4), (5, 3), "out_features", 1),
        (lambda: WaveletKANConv2d(3, 4, 2), (5, 3, 4, 4), "out_channels", 1),
        (lambda: WaveletKANLinear(3, 4, bias=False), (5, 3), "out_features", 1),
    ],
    ids=["linear", "conv2d", "no_bias"],
)
def test_kept_outputs(make, shape, size, axis, index):
    layer, x = perturbed(make()), torch.randn(shape)
    y, before = layer(x), dict(layer.named_parameters())
    layer.scale.requires_grad_(False)
    layer.keep_outputs_(index)
    chosen = [3, 1] if isinstance(index, list) else [1, 2]
    assert rms_error(layer(x), y[:, chosen]) < 1e-6
    assert getattr(layer, size) == 2
    assert all(p is not before[name] for name, p in layer.named_parameters())
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ["scale"]
    with pytest.raises(ValueError, match=re.escape("index=[2]: must be at least one index from 0 to 1")):
        layer.keep_outputs_([2])


def test_outputs_of_groups_are_not_kept_apart():
    layer = WaveletKANConv2d(4, 6, 3, groups=2)
    with pytest.raises(ValueError, match="groups=2"):
        layer.keep_outputs_([0])
    assert layer.weight.shape[0] == layer.out_channels == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wavelet": "haar"}, "wavelet='haar': must be one of 'mexican_hat', 'morlet', 'dog'"),
        ({"wavelet": None}, "wavelet=None: must be one of"),
        ({"wavelet": ["dog"]}, "wavelet=['dog']: must be one of"),
        ({"stride": 0}, "stride=0: must be"),
        ({"dilation": (1, 0)}, "dilation=(1, 0): must be"),
        ({"padding": "full"}, "padding='full': must be"),
        ({"padding": "same", "stride": 2}, "padding='same' with stride=(2, 2)"),
        ({"groups": 3}, "groups=3: must divide"),
        ({"pad_value": math.nan}, "pad_value=nan: must be a finite number"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WaveletKANConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})
    if "wavelet" in options:
        with pytest.raises(ValueError, match=re.escape(message)):
            WaveletKANLinear(4, 6, **options)


def test_an_image_smaller_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match="height 2"):
        WaveletKANConv2d(1, 1, 3)(torch.zeros(1, 1, 2, 5))


def test_repr_tells_all_options():
    assert (
        repr(WaveletKANLinear(5, 12, bias=False, wavelet="dog")) == "WaveletKANLinear(5, 12, bias=False, wavelet='dog')"
    )
    assert repr(WaveletKANConv2d(4, 6, 3, padding=1, groups=2, pad_value=0.5)) == (
        "WaveletKANConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, pad_value=0.5, bias=True, "
        "wavelet='mexican_hat')"
    )
