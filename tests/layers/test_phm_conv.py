"""Facts of the PHM convolution: the equation, groups, init, starts from `nn.Conv2d`; the contract is elsewhere."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.layers.phm import PHMLinear, hypercomplex_rule, share_rule_
from archzoo.layers.phm_conv import PHMConv2d
from archzoo.layers.phm_sequence import PHMEmbedding
from tests.helpers import rms_error

RULES = [
    {"n": 1},
    {"n": 2},
    {"n": 4},
    {"n": 2, "rule": "complex"},
    {"n": 4, "rule": "quaternion"},
    {"n": 4, "rule": "mixing"},
]
SHAPES = [
    {},
    {"groups": 2},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"padding": "same"},
    {"groups": 2, "padding": "valid", "bias": False},
]


def weight_of(layer):
    """The equation, by loops over blocks and terms."""
    n, k, d = layer.n, layer.out_channels // layer.n, layer.in_channels // layer.groups // layer.n
    W = torch.zeros(layer.out_channels, n * d, *layer.kernel_size, dtype=layer.S.dtype)
    for p in range(n):
        for q in range(n):
            terms = [layer.A[p, q] * layer.S[q]] if layer.rule == "mixing" else layer.A[:, p, q, None, None, None, None]
            block = terms[0] if layer.rule == "mixing" else (terms * layer.S).sum(0)
            W[p * k : (p + 1) * k, q * d : (q + 1) * d] = block
    return W


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of torch's own, the truth here
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", RULES, ids=str)
def test_output_and_gradients_are_those_of_a_convolution_with_the_equations_weight(options, shape):
    layer = PHMConv2d(16, 8, (3, 2), **shape, **options, dtype=torch.float64)
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64, requires_grad=True)
    W = weight_of(layer)
    assert rms_error(layer.weight, W) < 1e-14
    arguments = (layer.stride, layer.padding, layer.dilation, layer.groups)
    want, y = F.conv2d(x, W, layer.bias, *arguments), layer(x)
    assert rms_error(y, want) < 1e-13
    leaves, dy = [x, *layer.parameters()], torch.randn_like(want)
    for got, truth in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        assert rms_error(got, truth) < 1e-12
    assert rms_error(layer(x[0]), want[0]) < 1e-13  # an image without a batch axis


def test_a_kernel_of_one_pixel_is_the_linear_layer():
    conv, linear = PHMConv2d(8, 12, 1, dtype=torch.float64), PHMLinear(8, 12, dtype=torch.float64)
    linear.load_state_dict(conv.state_dict() | {"S": conv.S.detach().squeeze((-1, -2))})
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    assert rms_error(conv(x), linear(x.movedim(1, -1)).movedim(-1, 1)) < 1e-14


def test_a_quaternion_convolution_is_sixteen_real_ones_with_the_signs_of_the_product():
    layer = PHMConv2d(4, 4, 3, bias=False, rule="quaternion", dtype=torch.float64)
    r, i, j, k = layer.S.detach()
    rows = [[r, -i, -j, -k], [i, r, -k, j], [j, k, r, -i], [k, -j, i, r]]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    want = F.conv2d(x, torch.cat([torch.cat(row, 1) for row in rows]))
    assert rms_error(layer(x), want) < 1e-14


@pytest.mark.parametrize("options", RULES, ids=str)
def test_weight_has_glorots_variance_for_any_n_and_rule(options):
    variances = [PHMConv2d(48, 32, 3, groups=2, **options).weight.var().item() for _ in range(60)]
    mean, error = torch.tensor(variances).mean().item(), torch.tensor(variances).std().item() / 60**0.5
    want = 2 / (24 * 9 + 32 * 9)
    assert abs(mean - want) < max(4 * error, 0.02 * want)


def test_one_nth_of_the_parameters_and_n_times_fewer_flops_for_mixing():
    count = sum(p.numel() for p in PHMConv2d(64, 64, 3, bias=False, n=8).parameters())
    assert count == 64 * 64 * 9 // 8 + 8**3
    from archzoo.budget import count_flops

    x = torch.zeros(1, 64, 16, 16)
    dense = count_flops(nn.Conv2d(64, 64, 3, bias=False), x)
    mixing = count_flops(PHMConv2d(64, 64, 3, bias=False, rule="mixing"), x)
    assert mixing < 1.1 * dense / 4


def test_color_images_suit_n_of_three_and_other_sizes_name_what_would():
    assert PHMConv2d(3, 6, 3, n=3)(torch.randn(2, 3, 5, 5)).shape == (2, 6, 3, 3)
    with pytest.raises(ValueError, match=r"^in_channels=3: must be a multiple of n=4; .* of n = 1, 3$"):
        PHMConv2d(3, 6, 3)
    with pytest.raises(ValueError, match=r"^in_channels / groups=2: must be a multiple of n=4"):
        PHMConv2d(8, 8, 3, groups=4)
    with pytest.raises(ValueError, match=r"^out_channels=6: must be a multiple of n=4"):
        PHMConv2d(8, 6, 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": 0}, "n=0: "),
        ({"rule": "octonion"}, "n=4: rule='octonion' needs n=8"),
        ({"padding": "same", "stride": 2}, "padding='same' with stride=(2, 2)"),
        ({"groups": 3}, "groups=3: must divide"),
        ({"rule": nn.Parameter(torch.ones(4, 4, 4)), "learn_rule": False}, "learn_rule=False"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments_are_refused_by_name(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        PHMConv2d(8, 8, 3, **options)


def test_repr_shows_what_differs_from_the_defaults():
    text = repr(PHMConv2d(8, 12, 3, 2, padding=1, rule="quaternion"))
    want = "8, 12, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=True, n=4, rule='quaternion'"
    assert text == f"PHMConv2d({want})"


def test_linear_maps_convolutions_and_embeddings_share_one_rule():
    model = nn.ModuleDict(
        {
            "conv": PHMConv2d(8, 8, 3),
            "linear": PHMLinear(8, 8),
            "embedding": PHMEmbedding(8, 8),
            "two": PHMLinear(8, 8, n=2),
        }
    )
    assert share_rule_(copy.deepcopy(model), n=4) == 3
    assert share_rule_(model) == 4
    assert model["conv"].A is model["linear"].A
    assert model["embedding"].A is model["conv"].A
    assert model["two"].A is not model["conv"].A


# --- From nn.Conv2d ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_start_is_exact_on_weights_that_are_such_sums(options, groups):
    source = PHMConv2d(16, 8, 3, 2, 1, groups=groups, **options, dtype=torch.float64)
    conv = nn.Conv2d(16, 8, 3, 2, 1, groups=groups, dtype=torch.float64).eval()
    conv.weight.data, conv.bias.data = source.weight.detach(), source.bias.detach()
    layer, error = PHMConv2d.from_conv2d(conv, **options)
    assert error < 1e-13
    assert not layer.training
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    assert rms_error(layer(x), conv(x)) < 1e-13


def test_a_start_of_n_1_has_no_error():
    conv = nn.Conv2d(3, 5, 3)
    layer, error = PHMConv2d.from_conv2d(conv, n=1)
    assert error == 0.0
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), conv(x))


@pytest.mark.parametrize("options", RULES[1:], ids=str)
def test_error_is_what_outputs_show_and_gradient_descent_does_not_lower_it(options):
    conv = nn.Conv2d(8, 8, 3, bias=False, dtype=torch.float64)
    layer, error = PHMConv2d.from_conv2d(conv, **options)
    x = torch.randn(200, 8, 8, 8, dtype=torch.float64)
    assert rms_error(layer(x), conv(x)) == pytest.approx(error, rel=0.03)
    loss = (layer.weight - conv.weight).square().sum()
    gradients = torch.autograd.grad(loss, list(layer.parameters()))
    scale = conv.weight.detach().norm() ** 2
    assert all(g.norm() < 1e-10 * scale for g in gradients)
    layer(x).square().sum().backward()
    assert all(p.grad.norm() > 1e-6 for p in layer.parameters())


def test_what_cannot_be_started_from_is_refused():
    with pytest.raises(TypeError, match=r"Linear is not an nn\.Conv2d"):
        PHMConv2d.from_conv2d(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="padding_mode='circular': PHMConv2d pads with zeros only"):
        PHMConv2d.from_conv2d(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ValueError, match="in_channels=3: must be a multiple of n=4"):
        PHMConv2d.from_conv2d(nn.Conv2d(3, 8, 3))


def test_a_rule_given_to_a_start_stays_and_is_shared():
    rule = nn.Parameter(hypercomplex_rule(4))
    layer, _ = PHMConv2d.from_conv2d(nn.Conv2d(8, 8, 3), rule=rule)
    assert layer.A is rule
    assert torch.equal(rule, hypercomplex_rule(4))
