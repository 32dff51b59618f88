"""Facts of the Padé neurons' linear layer; what every layer owes is in `test_contract_*.py`."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.layers import PaonLinear
from tests.helpers import layer_value_and_grads, rms, rms_error, value_and_grads

VARIANTS = ["smooth", "absolute"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def standard_normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def randomized(layer):
    """The layer, no parameter of which is zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.5, 0.5)
    return layer


# --- Parameters and options -------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2), (2, 0), (0, 2)], ids=str)
def test_absent_tensors_are_not_registered(degrees, bias, variant):
    M, N = degrees
    if not (M or bias):
        return
    layer = PaonLinear(7, 12, bias, degrees=degrees, variant=variant)
    want = {"numerator": (M, 12, 7), "denominator": (N, 12, 7), "bias": (12,)}
    present = {"numerator": M > 0, "denominator": N > 0, "bias": bias}
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        name: shape for name, shape in want.items() if present[name]
    }
    for name, there in present.items():
        assert isinstance(getattr(layer, name), nn.Parameter) if there else getattr(layer, name) is None


def test_default_is_smooth_1_1():
    layer = PaonLinear(7, 12)
    assert (layer.degrees, layer.variant, layer.eps, layer.denominator_init) == ((1, 1), "smooth", 1e-6, None)


@pytest.mark.parametrize(("short", "long"), [("s", "smooth"), ("a", "absolute")])
def test_variants_have_short_names(short, long):
    layer, other = PaonLinear(3, 4, variant=short, denominator_init=0.5), PaonLinear(3, 4, variant=long)
    assert layer.variant == other.variant == long
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(standard_normal(5, 3)), other(standard_normal(5, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degrees": (0, 0)}, "degrees=(0, 0)"),
        ({"degrees": (-1, 1)}, "degrees=(-1, 1)"),
        ({"degrees": (1, -1)}, "degrees=(1, -1)"),
        ({"degrees": (1, 1.0)}, "degrees=(1, 1.0)"),
        ({"degrees": (True, 1)}, "degrees=(True, 1)"),
        ({"degrees": (1,)}, "degrees=(1,)"),
        ({"degrees": (1, 1, 1)}, "degrees=(1, 1, 1)"),
        ({"degrees": 2}, "degrees=2"),
        ({"degrees": "11"}, "degrees='11'"),
        ({"degrees": None}, "degrees=None"),
        ({"degrees": (0, 1), "bias": False}, "bias=False"),
        ({"variant": "rough"}, "variant='rough': must be 'smooth'"),
        ({"eps": -1e-6}, "eps=-1e-06"),
        ({"eps": math.nan}, "eps=nan"),
        ({"denominator_init": -0.1}, "denominator_init=-0.1"),
        ({"denominator_init": "0"}, "denominator_init='0'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PaonLinear(3, 4, **options)


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"torch\.int64: must be"):
        PaonLinear(3, 4, degrees=(1, 0))(torch.ones(2, 3, dtype=torch.int64))


def test_degrees_may_be_a_list_as_configs_have_them():
    assert PaonLinear(3, 4, degrees=[2, 1]).degrees == (2, 1)


def test_repr_tells_all_options():
    assert repr(PaonLinear(3, 4, False, degrees=(2, 2), variant="a", denominator_init=0.2)) == (
        "PaonLinear(in_features=3, out_features=4, bias=False, degrees=(2, 2), variant='absolute', eps=1e-06, "
        "denominator_init=0.2)"
    )


# --- The equation and its special cases -------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (2, 2), (3, 3), (1, 3), (3, 1), (0, 2), (4, 0)], ids=str)
def test_layer_computes_the_equation(degrees, variant):
    M, N = degrees
    layer = randomized(PaonLinear(5, 3, degrees=degrees, variant=variant, eps=0.01, dtype=torch.float64))
    x = standard_normal(7, 5, dtype=torch.float64)
    p = [x**k @ layer.numerator[k - 1].t() for k in range(1, M + 1)]
    q = [x**k @ layer.denominator[k - 1].t() for k in range(1, N + 1)]
    P, Q = layer.bias + sum(p), 1 + sum(q)
    if N == 0:
        want = P
    elif variant == "absolute":
        want = P / (1 + sum(t.abs() for t in q))
    else:
        P_low, Q_low = P - p[-1] if M else 0.0, Q - q[-1]
        want = (Q * P + Q_low * P_low) / (Q**2 + Q_low**2 + (0.01 if N >= 2 else 0.0))
    assert rms_error(layer(x), want) < 1e-13


@every_variant
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (9,), (2, 3), (0,)], ids=str)
def test_1_0_is_the_linear_layer_exactly(bias, leading, variant):
    layer, linear = PaonLinear(8, 12, bias, degrees=(1, 0), variant=variant), nn.Linear(8, 12, bias)
    with torch.no_grad():
        linear.weight.copy_(layer.numerator[0])
        if bias:
            linear.bias.copy_(layer.bias)
    x = standard_normal(*leading, 8)
    got, want = layer_value_and_grads(layer, x), layer_value_and_grads(linear, x)
    assert torch.equal(got["y"], want["y"])
    assert torch.equal(got["x"], want["x"])
    assert torch.equal(got["numerator"][0], want["weight"])
    assert not bias or torch.equal(got["bias"], want["bias"])


@every_variant
def test_2_0_is_the_quadratic_neuron(variant):
    layer = randomized(PaonLinear(5, 3, degrees=(2, 0), variant=variant, dtype=torch.float64))
    x = standard_normal(7, 5, dtype=torch.float64)
    want = F.linear(x, layer.numerator[0], layer.bias) + F.linear(x * x, layer.numerator[1])
    assert rms_error(layer(x), want) < 1e-14


@every_variant
@pytest.mark.parametrize("Q", [3, 5])
def test_Q_0_is_the_generative_neuron(Q, variant):  # noqa: N802
    """Self-ONN: one linear layer on the stacked powers."""
    layer = randomized(PaonLinear(5, 3, degrees=(Q, 0), variant=variant, dtype=torch.float64))
    x = standard_normal(7, 5, dtype=torch.float64)
    stacked = torch.cat([x**k for k in range(1, Q + 1)], -1)
    want = F.linear(stacked, torch.cat(list(layer.numerator), -1), layer.bias)
    assert rms_error(layer(x), want) < 1e-14


def test_smooth_halves_the_linear_part_where_the_denominator_is_zero():
    layer = PaonLinear(5, 3, denominator_init=0.0, dtype=torch.float64)
    x = standard_normal(7, 5, dtype=torch.float64)
    assert rms_error(layer(x), F.linear(x, layer.numerator[0] / 2, layer.bias)) < 1e-14


def test_without_numerator_the_constant_is_divided():
    layer = randomized(PaonLinear(5, 3, degrees=(0, 1), dtype=torch.float64))
    x = standard_normal(7, 5, dtype=torch.float64)
    Q = 1 + F.linear(x, layer.denominator[0])
    assert rms_error(layer(x), layer.bias * Q / (Q**2 + 1)) < 1e-14


@pytest.mark.parametrize(("variant", "N"), [("smooth", 1), ("absolute", 1), ("absolute", 3)])
def test_denominators_that_cannot_vanish_bound_the_output(variant, N):
    layer = randomized(PaonLinear(5, 3, degrees=(0, N), variant=variant))
    assert (layer(100 * standard_normal(1000, 5)).abs() <= layer.bias.abs() + 1e-6).all()


def test_float16_overflows_where_the_docstring_says():
    layer = PaonLinear(1, 1, degrees=(3, 0), dtype=torch.float16)
    nn.init.ones_(layer.numerator)
    assert layer(torch.tensor([[39.0]]).half()).isfinite()
    assert layer(torch.tensor([[41.0]]).half()).isinf()


# --- Initialisation ---------------------------------------------------------------------------------------------------


def uniform_bound(values):
    """The bound of a uniform distribution about 0, by the largest of the values, whose variance must fit."""
    bound = values.abs().max().item()
    assert abs(values.std().item() * math.sqrt(3) / bound - 1) < 0.02, "not uniform"
    assert abs(values.mean().item()) < 0.02 * bound
    return bound


@every_variant
@pytest.mark.parametrize("degrees", [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 3)], ids=str)
def test_numerator_starts_linear_with_a_gain_that_undoes_the_halving(degrees, variant):
    layer = PaonLinear(300, 200, degrees=degrees, variant=variant)
    gain = 2 if variant == "smooth" and degrees[0] == 1 and degrees[1] >= 1 else 1
    assert math.isclose(uniform_bound(layer.numerator[0].detach()), gain * math.sqrt(3 / 300), rel_tol=1e-2)
    assert torch.equal(layer.numerator[1:], torch.zeros(degrees[0] - 1, 200, 300))


def test_bias_is_uniform():
    bias = PaonLinear(4, 50_000).bias.detach()
    assert math.isclose(uniform_bound(bias), 1 / math.sqrt(4), rel_tol=1e-2)


@pytest.mark.parametrize(
    ("degrees", "variant", "given", "factor"),
    [
        ((1, 1), "smooth", None, 0.0),
        ((3, 2), "smooth", None, 0.0),
        ((0, 2), "smooth", None, 0.1),
        ((1, 1), "absolute", None, 0.1),
        ((2, 3), "absolute", None, 0.1),
        ((0, 1), "absolute", None, 0.1),
        ((2, 2), "smooth", 0.3, 0.3),
        ((2, 2), "absolute", 0.3, 0.3),
        ((0, 2), "absolute", 0, 0.0),
    ],
)
def test_denominator_starts_at_zero_only_where_it_can_leave_it(degrees, variant, given, factor):
    layer = PaonLinear(300, 200, degrees=degrees, variant=variant, denominator_init=given)
    for V in layer.denominator.detach():
        if factor:
            assert math.isclose(uniform_bound(V), factor * math.sqrt(3 / 300), rel_tol=1e-2)
        else:
            assert torch.equal(V, torch.zeros(200, 300))


@pytest.mark.parametrize(("degrees", "factor"), [((1, 1), 0.1), ((1, 3), 0.1), ((2, 1), 0.0), ((3, 3), 0.0)], ids=str)
def test_without_a_bias_smooth_denominators_start_at_zero_from_numerators_of_degree_2_only(degrees, factor):
    """With M = 1, P_{M-1} would be 0 everywhere, and with it the gradient of V at 0."""
    layer = PaonLinear(300, 200, bias=False, degrees=degrees)
    assert math.isclose(layer.denominator.abs().max().item(), factor * math.sqrt(3 / 300), rel_tol=1e-2)


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("sizes", [(784, 16), (64, 256)], ids=str)
def test_output_has_about_the_inputs_variance(sizes, degrees, variant):
    """0.7 to 1.3 is the goal; the third power of a normal x is large, and takes the absolute variant to 0.68."""
    y = PaonLinear(*sizes, degrees=degrees, variant=variant)(standard_normal(2000, sizes[0]))
    assert (0.65 if variant == "absolute" and degrees[1] == 3 else 0.7) < y.std() < 1.3


@pytest.mark.parametrize(
    ("degrees", "variant"), [((1, 1), "absolute"), ((2, 2), "absolute"), ((0, 1), "smooth")], ids=str
)
def test_default_init_trains_denominators_that_zero_would_freeze(degrees, variant):
    """At V = 0 the gradients of |q| and, with M = 0, of Q / (Q^2 + 1) are 0: the published code never leaves it."""
    x, dy = standard_normal(32, 8), standard_normal(32, 4)
    frozen = PaonLinear(8, 4, degrees=degrees, variant=variant, denominator_init=0.0)
    assert rms(layer_value_and_grads(frozen, x, dy)["denominator"]) < 1e-7
    layer = PaonLinear(8, 4, degrees=degrees, variant=variant)
    assert rms(layer_value_and_grads(layer, x, dy)["denominator"]) > 1e-3


@pytest.mark.parametrize("degrees", [(1, 1), (2, 2), (3, 1), (1, 3)], ids=str)
def test_smooth_denominators_leave_zero(degrees):
    x, dy = standard_normal(32, 8), standard_normal(32, 4)
    gradient = layer_value_and_grads(PaonLinear(8, 4, degrees=degrees), x, dy)["denominator"]
    assert all(rms(g) > 1e-2 for g in gradient)


def moved_denominators(layer, x, steps=3, rate=1e-2):
    """How far each degree's weights have moved, by root mean square and in units of the rate."""
    before = layer.denominator.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    target = standard_normal(*layer(x).shape, dtype=x.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    return [rms(after - V) / rate for after, V in zip(layer.denominator, before, strict=True)]


EVERY_DENOMINATOR = [(M, N, bias) for M in range(4) for N in range(1, 4) for bias in (True, False) if M or bias]


@every_variant
@pytest.mark.parametrize(("M", "N", "bias"), EVERY_DENOMINATOR)
def test_every_denominator_trains_from_the_default_start(M, N, bias, variant):
    layer = PaonLinear(8, 4, bias, degrees=(M, N), variant=variant)
    assert min(moved_denominators(layer, standard_normal(64, 8))) > 0.5


# --- Function-preserving start ----------------------------------------------------------------------------------------


DTYPES = {torch.float64: 4e-16, torch.float32: 2e-7, torch.bfloat16: 4e-3}
"""Error of an output rounded once or twice."""


@every_variant
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("degrees", [(1, 0), (3, 0), (1, 1), (1, 3), (2, 1), (2, 2), (3, 3)], ids=str)
def test_start_computes_the_linear_layer_to_rounding_and_trains(degrees, dtype, variant):
    linear = nn.Linear(24, 12, dtype=dtype).eval()
    layer, error = PaonLinear.from_linear(linear, degrees=degrees, variant=variant)
    assert error == 0.0
    assert (layer.degrees, layer.variant, layer.training) == (degrees, variant, False)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    exact = copy.deepcopy(linear).double()
    for scale in (1e-3, 1.0, 100.0):
        x = scale * standard_normal(50, 24, dtype=dtype)
        assert rms_error(layer(x), exact(x.double())) < DTYPES[dtype]
    if degrees[1]:
        assert min(moved_denominators(layer, standard_normal(64, 24, dtype=dtype))) > 0.5


def test_a_large_eps_is_worked_into_the_start():
    linear = nn.Linear(24, 12, dtype=torch.float64)
    x = standard_normal(50, 24, dtype=torch.float64)
    for degrees in ((1, 2), (2, 2), (3, 3)):
        layer, _ = PaonLinear.from_linear(linear, degrees=degrees, eps=0.5)
        assert rms_error(layer(x), linear(x)) < 1e-15


@every_variant
def test_start_without_a_bias(variant):
    linear, x = nn.Linear(24, 12, bias=False), standard_normal(50, 24)
    layer, error = PaonLinear.from_linear(linear, degrees=(2, 2), variant=variant)
    assert (layer.bias, error) == (None, 0.0)
    assert rms_error(layer(x), linear(x)) < 2e-7
    assert min(moved_denominators(layer, x)) > 0.5


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (1, 2), (2, 2)], ids=str)
def test_start_from_a_zero_bias_trains(degrees, variant):
    """For smooth [1/N] the bias leaves 0 by the first step, and the denominators by the second."""
    linear = nn.Linear(24, 12)
    nn.init.zeros_(linear.bias)
    layer, _ = PaonLinear.from_linear(linear, degrees=degrees, variant=variant)
    assert min(moved_denominators(layer, standard_normal(64, 24))) > 0.5


def test_absolute_start_survives_a_cast_of_the_layer():
    layer, _ = PaonLinear.from_linear(nn.Linear(24, 12, dtype=torch.float64), degrees=(2, 3), variant="absolute")
    for dtype in (torch.float32, torch.bfloat16):
        assert min(moved_denominators(layer.to(dtype), standard_normal(64, 24, dtype=dtype), steps=1)) > 0.5


@pytest.mark.parametrize(
    ("bias", "dtype", "options", "message"),
    [
        (True, None, {"degrees": (0, 2)}, "degrees=(0, 2): neurons without numerator"),
        (False, None, {"degrees": (1, 1)}, "use degrees=(2, 1), variant='absolute', or give the original a bias"),
        (False, None, {"degrees": (1, 3)}, "use degrees=(2, 3), variant='absolute', or give the original a bias"),
        (True, None, {"denominator_init": 0.1}, "denominator_init=0.1"),
        (True, torch.float16, {"variant": "a"}, "dtype=torch.float16"),
    ],
)
def test_starts_that_cannot_be_are_refused(bias, dtype, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PaonLinear.from_linear(nn.Linear(4, 3, bias, dtype=dtype), **options)


def test_start_from_something_else_is_refused():
    with pytest.raises(TypeError, match="Conv2d is not an nn.Linear"):
        PaonLinear.from_linear(nn.Conv2d(3, 4, 1))


# --- What it can do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "variant", "low", "high"),
    [((4, 0), "smooth", 0.0115, 0.0135), ((2, 2), "smooth", 0, 3e-4), ((2, 2), "absolute", 0, 3e-4)],
    ids=str,
)
def test_one_neuron_fits_a_rational_function_where_a_polynomial_cannot(degrees, variant, low, high):
    """x / (1 + x^2) on [-3, 3], 600 steps of Adam, 0.1 falling as a cosine: as many weights in each case."""
    x = torch.linspace(-3, 3, 200)[:, None]
    target = x / (1 + x**2)
    torch.manual_seed(0)
    neuron = PaonLinear(1, 1, degrees=degrees, variant=variant)
    optimizer = torch.optim.Adam(neuron.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        optimizer.zero_grad()
        loss = F.mse_loss(neuron(x), target)
        loss.backward()
        optimizer.step()
        schedule.step()
    assert low <= loss.item() <= high


def test_gradient_of_the_compiled_layer_is_that_of_the_eager_one():
    layer, x = randomized(PaonLinear(5, 3, degrees=(3, 2), dtype=torch.float64)), standard_normal(7, 5).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for out, want in zip(value_and_grads(compiled, (x,)), value_and_grads(layer, (x,)), strict=True):
        assert rms_error(out, want) < 1e-13
