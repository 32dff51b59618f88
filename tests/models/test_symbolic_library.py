"""The library of functions that an edge may be."""

import math

import numpy as np
import pytest
import torch

from archzoo.models.symbolic import (
    FUNCTIONS,
    Fit,
    add_function,
    fit_function,
    suggest_functions,
)
from tests.models.symbolic_layers import NAMES

COMPLEXITY = {
    0: "0",
    1: "x",
    2: "x^2 1/x 1/x^2 sqrt 1/sqrt exp log sin cos",
    3: "x^3 x^4 x^5 1/x^3 abs tan tanh sgn exp(-x^2)",
    4: "x^1.5 1/x^4 arcsin arccos arctan arctanh",
    5: "1/x^5",
}


def test_the_library_has_the_functions_and_complexities_of_the_papers():
    assert {name: f.complexity for name, f in FUNCTIONS.items()} == {
        name: complexity for complexity, names in COMPLEXITY.items() for name in names.split()
    }
    assert all(name == f.name for name, f in FUNCTIONS.items())


@pytest.mark.parametrize("name", NAMES)
def test_torch_and_sympy_say_the_same(name):
    sympy = pytest.importorskip("sympy")
    u = sympy.Symbol("u")
    points = np.linspace(0.05, 0.95, 19)
    expected = [float(FUNCTIONS[name].sympy(u).subs(u, point)) for point in points]
    np.testing.assert_allclose(FUNCTIONS[name].torch(torch.from_numpy(points)).numpy(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if FUNCTIONS[name].canonical is not None])
@pytest.mark.parametrize("a", [-0.7, 0.4])
def test_a_canonical_form_is_the_same_function(name, a):
    function = FUNCTIONS[name]
    inside = 0.5 if function.domain[0] >= 0 or math.isfinite(function.domain[1]) else 2.0
    x = torch.linspace(-0.2, 0.2, 11, dtype=torch.float64)
    numbers = (a, inside, 1.3, -0.2)
    if name == "0":
        numbers = (a, inside, 0.0, -0.2)
    before = Fit(name, *numbers, 1.0, 0, 0.0)(x)
    form = function.canonical(*numbers)
    torch.testing.assert_close(Fit(name, *form, 1.0, 0, 0.0)(x), before, rtol=1e-13, atol=1e-13)
    again = function.canonical(*form)
    assert again == pytest.approx(form, abs=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sin", torch.sin, abs, 1), "name='sin' is taken"),
        (("", torch.sin, abs, 1), "name=''"),
        (("a b", torch.sin, abs, 1), "name='a b'"),
        (("a\n", torch.sin, abs, 1), r"name='a\\n'"),
        ((3, torch.sin, abs, 1), "name=3"),
        (("f", 2.0, abs, 1), "torch_fn=2.0"),
        (("f", torch.sin, "sin", 1), "sympy_fn='sin'"),
        (("f", torch.sin, abs, -1), "complexity=-1"),
        (("f", torch.sin, abs, 1.5), "complexity=1.5"),
        (("f", torch.sum, abs, 1), "torch_fn=.*elementwise"),
    ],
)
def test_a_bad_function_is_refused(arguments, message, own_functions):
    with pytest.raises(ValueError, match=message):
        add_function(*arguments)
    assert list(FUNCTIONS) == NAMES
    with pytest.raises(ValueError, match="domain="):
        add_function("f", torch.sin, abs, 1, domain=(1, 1))


def test_an_added_function_is_fitted_and_suggested(own_functions):
    add_function("softplus", torch.nn.functional.softplus, lambda u: u, 1)
    x = torch.linspace(-1, 1, 100, dtype=torch.float64)
    y = 2 * torch.nn.functional.softplus(3 * x - 0.5) + 1
    fit = fit_function("softplus", x, y)
    assert fit.r2 > 1 - 1e-10
    assert suggest_functions(x, y, ["x", "softplus", "x^2"])[0] == fit


def test_an_added_function_is_fitted_only_where_it_is_finite(own_functions):
    add_function("own_log", torch.log, lambda u: u, 1)
    x = torch.linspace(0.5, 2, 100, dtype=torch.float64)
    assert fit_function("own_log", x, x.log()).r2 > 1 - 1e-10
    add_function("nowhere", lambda u: u * math.nan, lambda u: u, 1)
    fits = suggest_functions(x, x.log(), ["nowhere", "own_log"])
    assert [fit.name for fit in fits] == ["own_log", "nowhere"]
    assert fits[1].r2 == -math.inf
    assert fits[1].score == math.inf
