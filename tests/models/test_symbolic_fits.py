"""Functions fitted to samples, and which of them is suggested."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archzoo.models.symbolic import (
    FUNCTIONS,
    SymbolicLinear,
    fit_function,
    suggest_functions,
)
from tests.models.symbolic_layers import NAMES, sampled

SHORT = ["0", "x", "x^2", "x^3", "1/x", "sqrt", "exp", "log", "sin", "cos", "abs", "tan", "tanh", "exp(-x^2)"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def samples(name, low, high, width, place, sign, c, d, n):
    """x in [low, high] and y = c f(a x + b) + d, the argument inside the function's domain on all of it."""
    first, last = FUNCTIONS[name].domain
    if math.isinf(first):
        middle, half = 4 * place - 2, 3 * width
    elif math.isinf(last):
        half = 2 * width
        middle = first + 0.05 + 2 * place + half
    else:
        half = 0.49 * width * (last - first)
        middle = first + 0.01 * (last - first) + half + place * (0.98 * (last - first) - 2 * half)
    a = sign * 2 * half / (high - low)
    b = middle - a * (low + high) / 2
    x = torch.linspace(low, high, n, dtype=torch.float64)
    return x, c * FUNCTIONS[name].torch(a * x + b) + d


@pytest.mark.parametrize("name", sampled(NAMES[1:]))
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    low=st.sampled_from([-1.0, 0.0, -3.0, 0.5, 7.0]),
    length=st.sampled_from([2.0, 1.0, 0.2, 5.0]),
    width=st.floats(0.1, 0.95),
    place=st.floats(0, 1),
    sign=st.sampled_from([-1, 1]),
    scale=st.floats(-2, 2),
    d=st.floats(-3, 3),
    n=st.sampled_from([50, 300]),
)
def test_a_fit_finds_its_own_function(name, low, length, width, place, sign, scale, d, n):
    x, y = samples(name, low, low + length, width, place, sign, sign * 10**scale, d, n)
    fit = fit_function(name, x, y)
    assert fit.r2 > 1 - 1e-10
    torch.testing.assert_close(fit(x), y, rtol=0, atol=2e-5 * float(y.std()) + 1e-13)


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("sqrt", torch.sqrt),
        ("x^1.5", lambda u: u**1.5),
        ("arcsin", lambda u: torch.asin(2 * u - 1)),
        ("arccos", lambda u: torch.acos(2 * u - 1)),
    ],
)
def test_a_domain_that_ends_at_the_samples_is_fitted_and_survives_float32(name, f):
    x = torch.linspace(0, 1, 500, dtype=torch.float64)
    fit = fit_function(name, x, f(x))
    assert fit.r2 > 1 - 1e-7
    layer = SymbolicLinear(1, 1)
    layer.set_edge(0, 0, fit)
    y = layer(x.float().unsqueeze(-1))
    y.sum().backward()
    assert y.isfinite().all()
    assert layer.affine.grad.isfinite().all()


def test_gauss_newton_makes_up_for_a_coarse_scan():
    """pykan#513: the scan alone is slow and worse than steps on all four numbers."""
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    for name, y in (("tanh", torch.tanh(3.3 * x - 0.7)), ("exp(-x^2)", torch.exp(-((2.1 * x + 0.3) ** 2)))):
        fit = fit_function(name, x, y, grid=11, zooms=0)
        assert fit.r2 > 1 - 1e-12
    assert (fit.a, fit.b, fit.c, fit.d) == pytest.approx((2.1, 0.3, 1, 0), abs=1e-6)


@pytest.mark.parametrize("name", sampled(NAMES))
def test_a_fit_is_at_least_as_good_as_any_point_of_the_scan(name):
    x = torch.linspace(-1, 1, 60, dtype=torch.float64)
    y = torch.sin(2 * x) + 0.3 * (3 * x).cos() + 0.1 * torch.randn(60, dtype=torch.float64)
    a, b = torch.meshgrid(*[torch.linspace(-10, 10, 41, dtype=torch.float64)] * 2, indexing="ij")
    low, high = FUNCTIONS[name].domain
    inside = (b - a.abs() > low) & (b + a.abs() < high)
    f = FUNCTIONS[name].torch(a[inside][:, None] * x + b[inside][:, None])
    if name == "0":
        assert fit_function(name, x, y).r2 == 0
        return
    r2 = torch.corrcoef(torch.cat([y[None], f[f.std(1) > 1e-3 * f.square().mean(1).sqrt()]]))[0, 1:].square().max()
    assert fit_function(name, x, y).r2 >= float(r2) - 1e-12


@pytest.mark.parametrize("name", ["1/x", "1/x^2", "1/x^5", "1/sqrt", "log", "sqrt", "tan", "arctanh", "arcsin"])
def test_a_fit_has_no_pole_between_the_samples(name):
    """pykan turns what is not finite into 0, and calls a pole among the samples a good fit."""
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    y = torch.where(x > 0.003, 1 / (x - 0.003), -1 / (x - 0.003).abs())
    fit = fit_function(name, x, y)
    fine = fit(torch.linspace(-1, 1, 100_001, dtype=torch.float64))
    assert fine.isfinite().all()
    assert float(fine.abs().max()) < 100 * float(y.abs().max())
    low, high = FUNCTIONS[name].domain
    ends = [fit.a * end + fit.b for end in (-1, 1)]
    if name.startswith("1/x"):
        ends = [abs(end) for end in ends] if math.prod(ends) > 0 else [-1.0]  # either side of the pole will do
    assert low < min(ends) < max(ends) < high


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, -3.7, 1e6])
def test_a_constant_is_fitted_by_itself(name, value):
    x = torch.linspace(-2, -1, 20, dtype=torch.float64)
    fit = fit_function(name, x, torch.full_like(x, value))
    assert (fit.r2, fit.c, fit.d) == (1.0, 0.0, value)
    assert fit(x).eq(value).all()


def test_a_constant_is_called_0():
    x = torch.linspace(-1, 1, 50)
    noise = torch.full_like(x, 0.1) * (1 + torch.finfo(x.dtype).eps * (-1) ** torch.arange(50))
    assert suggest_functions(x, noise)[0].name == "0"
    flat = suggest_functions(torch.ones(50), torch.randn(50), ["x", "0", "sin"])
    assert [(fit.name, fit.r2) for fit in flat] == [("0", 0), ("x", 0), ("sin", 0)]


def test_r2_and_score_are_what_they_are_called():
    x = torch.linspace(-1, 1, 100, dtype=torch.float64)
    y = torch.sin(3 * x) + 0.1 * torch.randn(100, dtype=torch.float64)
    for weight in (0.0, 0.2, 1.0):
        for fit in suggest_functions(x, y, ["x", "sin", "abs", "0"], weight=weight):
            r2 = 1 - float((y - fit(x)).square().sum() / (y - y.mean()).square().sum())
            assert fit.r2 == pytest.approx(r2, abs=1e-12)
            assert fit.score == pytest.approx(weight * fit.complexity + (1 - weight) * math.log2(1 + 1e-5 - fit.r2))


@pytest.mark.parametrize("names", [["0", "x", "x^3", "sin", "tanh"], pytest.param(SHORT, marks=pytest.mark.slow)])
def test_a_clear_sine_is_not_called_0(names):
    """pykan#415: with a weight of 0.8, a sine is ranked below 0."""
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    y = 0.3 * torch.sin(3 * x)
    assert suggest_functions(x, y, names, top=1)[0].name == "sin"
    y = y + 0.02 * torch.randn(200, dtype=torch.float64)
    noisy = suggest_functions(x, y, names)[0]
    assert noisy.name == "sin"
    assert noisy.r2 > 0.98
    assert suggest_functions(x, y, names, weight=0.8)[0].name == "0"


@pytest.mark.parametrize(
    ("name", "f", "formula"),
    [
        ("sin", lambda x: -2 * torch.sin(math.pi * x), (math.pi, 0, -2, 0)),
        slow("cos", lambda x: torch.cos(2 * x) + 1, (2, 0, 1, 1)),
        slow("x^2", lambda x: 3 * x**2 - 1, (1, 0, 3, -1)),
        slow("exp", lambda x: torch.exp(2 * x + 1), (2, 0, math.e, 0)),
        ("log", lambda x: torch.log(2 * x + 3), (1, 1.5, 1, math.log(2))),
        slow("sqrt", lambda x: torch.sqrt(4 * x + 6), (1, 1.5, 2, 0)),
        ("1/x", lambda x: 1 / (3 - 2 * x), (1, -1.5, -0.5, 0)),
        slow("abs", lambda x: (2 * x - 1).abs(), (1, -0.5, 2, 0)),
        slow("x^3", lambda x: x**3, (1, 0, 1, 0)),
        slow("tanh", lambda x: torch.tanh(-3 * x), (3, 0, -1, 0)),
        slow("exp(-x^2)", lambda x: torch.exp(-((1 - 2 * x) ** 2)), (2, -1, 1, 0)),
        slow("x", lambda x: 2 * x + 1, (1, 0, 2, 1)),
        ("arccos", lambda x: torch.acos(-0.9 * x), (0.9, 0, -1, math.pi)),
    ],
)
def test_a_function_is_recognised_by_its_usual_numbers(name, f, formula):
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    rivals = [] if name == "arccos" else ["x", "x^2", "sin", "cos", "exp"]
    fit = suggest_functions(x, f(x), {name: 0, **dict.fromkeys(rivals)}, top=1)[0]
    assert fit.name == name
    assert (fit.a, fit.b, fit.c, fit.d) == pytest.approx(formula, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "f", "rival"),
    [("x^2", torch.square, "cos"), slow("x", lambda x: x, "sqrt"), slow("1/x", lambda x: 1 / (x + 1.5), "tan")],
)
def test_functions_with_more_free_numbers_do_not_win_by_fitting_a_splines_error(name, f, rival):
    """pykan#89, #480: a spline is never exactly its function, and cos fits what is nearly x^2 better than x^2."""
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    error = torch.cos(5 * x + 0.5) + torch.cos(8 * x - 1) + torch.sin(11 * x + 2)
    y = f(x) / f(x).std() - 0.005 * error / error.std()
    fits = suggest_functions(x, y, SHORT)
    places = {fit.name: place for place, fit in enumerate(fits)}
    assert fits[0].name == name
    assert fits[places[rival]].r2 > fits[0].r2


def test_ranking_is_by_score_where_none_is_simpler():
    x = torch.linspace(-1, 1, 100, dtype=torch.float64)
    fits = suggest_functions(x, (x + 0.4 * torch.sin(7 * x)))
    scores = [fit.score for fit in fits]
    assert len(fits) == len(NAMES)
    assert scores == pytest.approx(sorted(scores), abs=1e-3)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_samples_far_from_0_and_in_any_unit_are_fitted(offset):
    for unit in (1e-3, 1.0, 20.0):
        x = torch.linspace(-1, 1, 400, dtype=torch.float64)
        y = 1e-6 * torch.sin(4 * x + 0.5)
        assert fit_function("sin", unit * x + offset, y).r2 > 1 - 1e-9
        assert fit_function("x", unit * x + offset, 3 * x).r2 > 1 - 1e-12
        fit = fit_function("exp", unit * x + offset, x.exp())
        assert fit.r2 > 1 - 1e-9
        assert fit(unit * x + offset).isfinite().all()


def test_many_samples_in_any_order_and_dtype_are_fitted_in_little_memory():
    x = torch.rand(10_000) * 2 - 1
    fit = fit_function("sin", x, torch.sin(5 * x).requires_grad_())
    assert fit.r2 > 1 - 1e-10
    with torch.inference_mode():
        assert fit_function("sin", x, torch.sin(5 * x)) == fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sine"}, "name='sine' is not in the library; did you mean 'sin'"),
        ({"x": torch.zeros(4), "y": torch.zeros(4)}, r"\(4,\).*at least 5"),
        ({"x": torch.zeros(10, 1)}, r"\(10, 1\) and \(10,\)"),
        ({"y": torch.zeros(9)}, r"\(10,\) and \(9,\)"),
        ({"x": torch.full((10,), math.nan)}, "x: 10 of 10 samples are not finite"),
        ({"y": torch.tensor([math.inf] + [0.0] * 9)}, "y: 1 of 10"),
        ({"grid": 2}, "grid=2"),
        ({"zooms": -1}, "zooms=-1"),
        ({"a_range": (1, 1)}, "a_range="),
        ({"b_range": (0, math.inf)}, "b_range="),
        ({"weight": 1.1}, "weight=1.1"),
    ],
)
def test_bad_arguments_of_a_fit_are_refused(change, message):
    arguments = {"name": "sin", "x": torch.linspace(0, 1, 10), "y": torch.linspace(0, 1, 10), **change}
    with pytest.raises(ValueError, match=message):
        fit_function(**arguments)


def test_bad_arguments_of_a_suggestion_are_refused():
    x = torch.linspace(0, 1, 10)
    with pytest.raises(ValueError, match="names='cosine'"):
        suggest_functions(x, x, ["x", "cosine"])
    with pytest.raises(ValueError, match="top=0"):
        suggest_functions(x, x, top=0)
