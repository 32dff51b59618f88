"""Facts of the convolution of APTx neurons; what every layer owes is in `test_contract_*.py`."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.layers import APTxConv2d, APTxLinear
from tests.helpers import layer_value_and_grads, rms_error


def standard_normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("train_alpha", [True, False])
@pytest.mark.parametrize("beta_groups", [None, 4, 2])
def test_parameters_are_those_of_the_spec(bias, train_alpha, beta_groups):
    layer = APTxConv2d(6, 8, (3, 2), groups=2, bias=bias, train_alpha=train_alpha, beta_groups=beta_groups)
    want = {"alpha": (8, 3, 3, 2), "beta": (beta_groups or 8, 3, 3, 2), "gamma": (8, 3, 3, 2), "bias": (8,)}
    if not train_alpha:
        del want["alpha"]
    if not bias:
        del want["bias"]
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == want
    if beta_groups is None and bias:
        assert sum(p.numel() for p in layer.parameters()) == 8 * ((3 if train_alpha else 2) * 18 + 1)


@pytest.mark.parametrize("options", [{}, {"train_alpha": False}, {"beta_groups": 2}], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {"padding": 1},
        {"stride": (2, 1), "padding": (0, 2), "groups": 2},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid", "dilation": 2},
    ],
    ids=str,
)
def test_is_the_linear_layer_on_every_patch(how, options):
    layer = APTxConv2d(4, 6, 3, **how, **options, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = standard_normal(2, 4, 7, 8).double()
    y = layer(x)
    assert y.shape == nn.Conv2d(4, 6, 3, **how)(x.float()).shape
    stride, dilation, groups = how.get("stride", 1), how.get("dilation", 1), how.get("groups", 1)
    padding = {"same": (1, 2), "valid": 0}.get(how["padding"], how["padding"])
    columns = F.unfold(x, 3, dilation, padding, stride).transpose(1, 2).unflatten(2, (groups, -1))
    parts = []
    for k in range(groups):
        linear = APTxLinear(36 // groups, 6 // groups, train_alpha=layer.alpha is not None, dtype=torch.float64)
        linear.beta = nn.Parameter(
            layer.beta.unflatten(0, (groups, -1))[k].flatten(1).repeat_interleave(6 // len(layer.beta), 0)
        )
        for name in ("alpha", "gamma"):
            if getattr(layer, name) is not None:
                setattr(linear, name, nn.Parameter(getattr(layer, name).unflatten(0, (groups, -1))[k].flatten(1)))
        linear.bias = nn.Parameter(layer.bias.unflatten(0, (groups, -1))[k])
        parts.append(linear(columns[:, :, k]))
    want = torch.cat(parts, -1).transpose(1, 2).view_as(y)
    assert rms_error(y, want) < 1e-13


def test_padding_by_zeros_adds_nothing():
    layer = APTxConv2d(3, 5, 3, padding=1, dtype=torch.float64)
    x = standard_normal(2, 3, 1, 1).double()
    centre = APTxLinear(3, 5, dtype=torch.float64)
    for name in ("alpha", "beta", "gamma"):
        setattr(centre, name, nn.Parameter(getattr(layer, name)[:, :, 1, 1]))
    assert rms_error(layer(x).flatten(1), centre(x.flatten(1))) < 1e-14


@pytest.mark.parametrize("init", ["paper", "scaled"])
def test_init_has_the_moments_of_the_spec(init):
    torch.manual_seed(0)
    layer = APTxConv2d(60, 80, (3, 5), groups=2, init=init)
    gamma = 1.0 if init == "paper" else (1.5217 * 30 * 15) ** -0.5
    for name, std in {"alpha": 1.0, "beta": 1.0, "gamma": gamma}.items():
        values = getattr(layer, name).detach()
        assert abs(values.mean() / std) < 0.03, name
        assert abs(values.std() / std - 1) < 0.02, name
    assert torch.equal(layer.bias, torch.zeros(80))


@pytest.mark.parametrize("options", [{}, {"train_alpha": False}, {"beta_groups": 8}, {"groups": 8}], ids=str)
def test_scaled_init_keeps_the_variance_and_the_papers_does_not(options):
    torch.manual_seed(0)
    x = standard_normal(4, 32, 12, 12)
    assert 0.8 < APTxConv2d(32, 64, 3, **options)(x).std() < 1.2
    assert APTxConv2d(32, 64, 3, init="paper", **options)(x).std() > 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "xavier"}, r"init='xavier': must be 'scaled' or 'paper'"),
        ({"beta_groups": 5}, r"beta_groups=5: must be None, or a multiple of groups=2 that divides out_channels=12"),
        ({"beta_groups": 3}, r"beta_groups=3"),
        ({"beta_groups": 1}, r"beta_groups=1"),
        ({"beta_groups": 0}, r"beta_groups=0"),
        ({"beta_groups": 2.0}, r"beta_groups=2\.0"),
        ({"beta_groups": True}, r"beta_groups=True"),
        ({"kernel_size": 0}, r"kernel_size=0"),
        ({"padding": "reflect"}, r"padding='reflect'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        APTxConv2d(**({"in_channels": 4, "out_channels": 12, "kernel_size": 3, "groups": 2} | options))


@pytest.mark.parametrize("options", [{}, {"train_alpha": False}, {"beta_groups": 2}, {"init": "paper"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {"padding": 1, "bias": False},
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2},
        {"padding": "same", "groups": 2},
    ],
    ids=str,
)
def test_starts_as_a_convolution(how, dtype, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **how, dtype=dtype).eval()
    layer, error = APTxConv2d.from_conv2d(conv, **options)
    assert (error, layer.training, layer.gamma.dtype) == (0.0, False, dtype)
    x = 3 * standard_normal(2, 4, 7, 7).to(dtype)
    assert rms_error(layer(x), conv(x)) < {torch.float64: 1e-14, torch.float32: 1e-6}[dtype]
    assert not {p.data_ptr() for p in layer.parameters()} & {p.data_ptr() for p in conv.parameters()}
    gradients = layer_value_and_grads(layer, x, standard_normal(*conv(x).shape).to(dtype))
    assert all(gradients[name].ne(0).all() for name, _ in layer.named_parameters())


def test_a_start_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"padding_mode='circular': APTxConv2d pads with zeros only"):
        APTxConv2d.from_conv2d(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"))
    with pytest.raises(TypeError, match=r"Linear is not an nn\.Conv2d"):
        APTxConv2d.from_conv2d(nn.Linear(4, 6))
    with pytest.raises(ValueError, match=r"beta_groups=3"):
        APTxConv2d.from_conv2d(nn.Conv2d(4, 6, 3, groups=2), beta_groups=3)


def test_learns_a_bent_filter_that_a_convolution_cannot():
    """|x| of a pixel's difference to its neighbour: even, so the best convolution does no better than a constant."""
    torch.manual_seed(0)
    x = standard_normal(16, 1, 8, 8)
    target = x[..., 1:].abs() - x[..., :-1].abs()
    losses = {}
    for name, layer in (("aptx", APTxConv2d(1, 1, (1, 2))), ("conv", nn.Conv2d(1, 1, (1, 2)))):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
        for _ in range(200):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(x), target)
            loss.backward()
            optimizer.step()
        losses[name] = loss.item() / target.var().item()
    assert losses["conv"] > 0.9
    assert losses["aptx"] < 0.05


def test_repr_tells_all_options():
    layer = APTxConv2d(4, 6, 3, 1, "same", bias=False, train_alpha=False, init="paper", beta_groups=2)
    assert repr(layer) == (
        "APTxConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding='same', dilation=(1, 1), groups=1, bias=False, "
        "train_alpha=False, init='paper', beta_groups=2)"
    )
