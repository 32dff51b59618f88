"""Facts of the APTx activation and of the layer of APTx neurons; what every layer owes is in `test_contract_*.py`."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo.layers import APTx, APTxLinear
from tests.helpers import layer_value_and_grads, rms_error, value_and_grads

# --- The activation ---------------------------------------------------------------------------------------------------


def grid(dtype=torch.float64):
    return torch.linspace(-12, 12, 4801, dtype=dtype)


@pytest.mark.parametrize("rho", [0.1, 1.0, 2.0, 7.0])
def test_swish_is_a_special_case(rho):
    x = grid()
    assert rms_error(APTx(beta=rho / 2)(x), x * torch.sigmoid(rho * x)) < 1e-7  # beta is stored in float32
    assert rms_error(APTx(beta=rho / 2, dtype=torch.float64)(x), x * torch.sigmoid(rho * x)) < 1e-15


def test_default_is_swish_2_and_half_beta_is_silu():
    x = grid()
    assert rms_error(APTx()(x), x * torch.sigmoid(2 * x)) < 1e-15
    assert rms_error(APTx(beta=0.5)(x), F.silu(x)) < 1e-15


def test_large_beta_is_relu():
    x = torch.randn(1000)
    assert torch.equal(APTx(beta=1e9)(x), torch.relu(x))


def test_mish_is_approximated_on_each_side():
    x = grid()
    left, right = x[x < 0], x[x > 0]
    assert (APTx(beta=0.5)(left) - F.mish(left)).abs().max() < 0.04
    assert (APTx(beta=1.0)(right) - F.mish(right)).abs().max() < 0.04
    assert (APTx(beta=1.0)(left) - F.mish(left)).abs().max() > 0.15


def test_equation_with_three_values():
    x = grid()
    got = APTx(alpha=0.3, beta=-1.7, gamma=2.5, dtype=torch.float64)(x)
    assert rms_error(got, (0.3 + torch.tanh(-1.7 * x)) * 2.5 * x) < 1e-15


def test_scalars_are_parameters_or_buffers_of_the_same_names():
    fixed, learned = APTx(), APTx(trainable=True)
    assert not list(fixed.parameters())
    assert {name for name, _ in learned.named_parameters()} == {"alpha", "beta", "gamma"}
    assert fixed.state_dict().keys() == learned.state_dict().keys() == {"alpha", "beta", "gamma"}
    assert all(value.shape == () for value in fixed.state_dict().values())
    learned.load_state_dict(APTx(0.1, 0.2, 0.3).state_dict())
    assert [round(p.item(), 6) for p in learned.parameters()] == [0.1, 0.2, 0.3]
    learned.reset_parameters()
    assert [p.item() for p in learned.parameters()] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trainable", [False, True])
def test_any_shape_and_dtype_maps_to_itself(shape, dtype, trainable):
    activation, x = APTx(trainable=trainable), torch.randn(shape).to(dtype)
    y = activation(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    if x.numel() > 1:
        assert rms_error(y, activation(x.double())) <= {torch.bfloat16: 6e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    assert activation(torch.full_like(x, torch.nan)).isnan().all()


def test_activation_passes_gradcheck():
    activation = APTx(0.7, 1.3, 0.4, trainable=True, dtype=torch.float64)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(activation, dict(zip(("alpha", "beta", "gamma"), values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *activation.parameters()))


def test_activation_compiles_and_exports():
    activation, x = APTx(trainable=True), torch.randn(5)
    compiled = torch.compile(activation, fullgraph=True, backend="aot_eager")
    for out, want in zip(value_and_grads(compiled, (x,)), value_and_grads(activation, (x,)), strict=True):
        assert rms_error(out, want) < 1e-6
    assert torch.equal(torch.export.export(activation, (x,)).module()(x), activation(x))
    assert APTx(device="meta")(x.to("meta")).shape == x.shape
    assert APTx(0.25).extra_repr() == "alpha=0.25, beta=1, gamma=0.5, trainable=False"


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
def test_scalars_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: must be a finite number"):
        APTx(**{name: value})


def test_integers_are_refused():
    for module in (APTx(), APTxLinear(3, 4)):
        with pytest.raises(ValueError, match=r"torch\.int64: must be"):
            module(torch.ones(2, 3, dtype=torch.int64))


def test_activation_is_exported_and_not_a_layer():
    assert archzoo.APTx is APTx
    assert APTx not in [archzoo.registry.get_layer(name).cls for name in archzoo.list_layers()]


# --- The neuron -------------------------------------------------------------------------------------------------------


def standard_normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("train_alpha", [True, False])
@pytest.mark.parametrize("beta_groups", [None, 4, 1])
def test_parameters_are_those_of_the_paper(bias, train_alpha, beta_groups):
    layer = APTxLinear(7, 12, bias, train_alpha=train_alpha, beta_groups=beta_groups)
    want = {"alpha": (12, 7), "beta": (beta_groups or 12, 7), "gamma": (12, 7), "bias": (12,)}
    if not train_alpha:
        del want["alpha"]
    if not bias:
        del want["bias"]
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == want
    assert (layer.alpha is None, layer.bias is None) == (not train_alpha, not bias)
    assert all(isinstance(p, nn.Parameter) for p in layer.parameters())


def test_the_papers_mnist_network_has_its_number_of_parameters():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    layers = []
    for a, b in itertools.pairwise((784, 128, 64, 32)):
        layers.append(APTxLinear(a, b))
        assert count(layers[-1]) == b * (3 * a + 1)
        assert count(APTxLinear(a, b, train_alpha=False)) == b * (2 * a + 1)
    assert count(nn.Sequential(*layers, nn.Linear(32, 10))) == 332_330


@pytest.mark.parametrize("train_alpha", [True, False])
def test_layer_computes_the_equation(train_alpha):
    layer = APTxLinear(5, 3, train_alpha=train_alpha, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = standard_normal(4, 5).double()
    alpha = layer.alpha if train_alpha else torch.ones_like(layer.gamma)
    x_ = x[:, None]
    want = layer.bias + ((alpha + torch.tanh(layer.beta * x_)) * layer.gamma * x_).sum(-1)
    assert rms_error(layer(x), want) < 1e-14


def test_a_neuron_of_one_input_is_the_activation():
    neuron = APTxLinear(1, 1, bias=False, dtype=torch.float64)
    for parameter, value in zip((neuron.alpha, neuron.beta, neuron.gamma), (1.0, 1.0, 0.5), strict=True):
        nn.init.constant_(parameter, value)
    assert rms_error(neuron(grid()[:, None])[:, 0], APTx()(grid())) < 1e-15


def test_shared_beta_is_the_full_layer_with_repeated_rows():
    tied, full = APTxLinear(5, 12, beta_groups=3), APTxLinear(5, 12)
    with torch.no_grad():
        for name in ("alpha", "gamma", "bias"):
            getattr(full, name).copy_(getattr(tied, name))
        full.beta.copy_(tied.beta.repeat_interleave(4, 0))
    x = standard_normal(6, 5)
    assert rms_error(tied(x), full(x)) < 1e-6
    want = layer_value_and_grads(full, x)["beta"].view(3, 4, 5).sum(1)
    assert rms_error(layer_value_and_grads(tied, x)["beta"], want) < 1e-6


def test_as_many_groups_as_outputs_are_the_full_layer_bit_for_bit():
    torch.manual_seed(1)
    full = APTxLinear(5, 12)
    torch.manual_seed(1)
    assert torch.equal(APTxLinear(5, 12, beta_groups=12)(standard_normal(6, 5)), full(standard_normal(6, 5)))


@pytest.mark.parametrize("init", ["paper", "scaled"])
def test_init_has_the_moments_of_the_spec(init):
    layer = APTxLinear(400, 300, init=init)
    wanted = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0 if init == "paper" else (1.5217 * 400) ** -0.5}
    for name, std in wanted.items():
        values = getattr(layer, name).detach()
        assert abs(values.mean() / std) < 0.02, name
        assert abs(values.std() / std - 1) < 0.01, name
        kurtosis = (values / values.std()).pow(4).mean()
        assert abs(kurtosis - 3) < 0.1, f"{name} is not normal"
    assert torch.equal(layer.bias, torch.zeros(300))


@pytest.mark.parametrize("train_alpha", [True, False])
@pytest.mark.parametrize("beta_groups", [None, 8])
def test_scaled_init_keeps_the_variance_and_the_papers_does_not(train_alpha, beta_groups):
    x = standard_normal(256, 784)
    options = {"train_alpha": train_alpha, "beta_groups": beta_groups}
    assert 0.9 < APTxLinear(784, 128, **options)(x).std() < 1.1
    assert 31 < APTxLinear(784, 128, init="paper", **options)(x).std() < 38


def test_the_second_moment_of_a_term():
    """E[(alpha + tanh(beta x))^2 x^2] = E[alpha^2 x^2] + E[tanh(beta x)^2 x^2] = 1.5221, by quadrature over both."""
    z = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2)
    weight /= weight.sum()
    tanh = torch.tanh(z[:, None] * z)
    assert abs(1 + (weight[:, None] * weight * tanh**2 * z**2).sum() - 1.5217) < 5e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "xavier"}, r"init='xavier': must be 'scaled' or 'paper'"),
        ({"beta_groups": 5}, r"beta_groups=5: must be None or a divisor of out_features=12"),
        ({"beta_groups": 0}, r"beta_groups=0"),
        ({"beta_groups": 24}, r"beta_groups=24"),
        ({"beta_groups": 2.0}, r"beta_groups=2\.0"),
        ({"beta_groups": True}, r"beta_groups=True"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        APTxLinear(7, 12, **options)


def test_two_layers_learn_xor_without_an_activation_between():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([0.0, 1.0, 1.0, 0.0])
    net = nn.Sequential(APTxLinear(2, 8), APTxLinear(8, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x)[:, 0], target)
        loss.backward()
        optimizer.step()
    assert loss < 0.01


def test_repr_tells_all_options():
    layer = APTxLinear(5, 12, bias=False, train_alpha=False, init="paper", beta_groups=3)
    assert repr(layer) == (
        "APTxLinear(in_features=5, out_features=12, bias=False, train_alpha=False, init='paper', beta_groups=3)"
    )


# --- Starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"train_alpha": False}, {"beta_groups": 4}, {"train_alpha": False, "beta_groups": 1}], ids=str
)
def test_starts_as_a_linear_layer(options, dtype, bias):
    linear = nn.Linear(7, 12, bias, dtype=dtype).eval()
    layer, error = APTxLinear.from_linear(linear, **options)
    assert (error, layer.training, layer.gamma.dtype, layer.bias is not None) == (0.0, False, dtype, bias)
    x = (3 * standard_normal(5, 7)).to(dtype)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
    assert rms_error(layer(x), linear(x)) < bound
    with torch.no_grad():
        linear.weight.zero_()
    assert layer.gamma.ne(0).all(), "the layer shares memory with the original"


@pytest.mark.parametrize("options", [{}, {"train_alpha": False}, {"beta_groups": 4}], ids=str)
def test_all_parameters_of_a_start_learn(options):
    layer, _ = APTxLinear.from_linear(nn.Linear(7, 12), **options)
    x, dy = standard_normal(5, 7), torch.randn(5, 12, generator=torch.Generator().manual_seed(6))
    gradients = layer_value_and_grads(layer, x, dy)
    for name, _ in layer.named_parameters():
        assert gradients[name].ne(0).all(), name
    by_row = (dy[:, :, None] * layer.gamma.detach() * x.square()[:, None]).sum(0)  # at tanh'(0) = 1
    assert rms_error(gradients["beta"], by_row.unflatten(0, (len(layer.beta), -1)).sum(1)) < 1e-5


def test_a_start_from_something_else_is_refused():
    with pytest.raises(TypeError, match=r"Conv2d is not an nn\.Linear"):
        APTxLinear.from_linear(nn.Conv2d(4, 6, 3))
    with pytest.raises(ValueError, match=r"beta_groups=5"):
        APTxLinear.from_linear(nn.Linear(7, 12), beta_groups=5)
    with pytest.raises(ValueError, match=r"bias=False: this is taken from the original"):
        APTxLinear.from_linear(nn.Linear(7, 12), bias=False)
