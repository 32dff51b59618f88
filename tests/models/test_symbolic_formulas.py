"""Formulas of a symbolic layer, and the rounding of their numbers."""

import builtins
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archzoo.models.symbolic import (
    FUNCTIONS,
    SymbolicLinear,
    round_formula,
)
from tests.models.symbolic_layers import NAMES, full, inputs, layer_of


def test_a_formula_computes_what_the_layer_does():
    """pykan#206, #276: formulas that predict worse than the network."""
    sympy = pytest.importorskip("sympy")
    layer = full()
    symbols = sympy.symbols(f"x:{len(NAMES)}")
    x = inputs(layer, 6)
    for o in range(2):
        f = sympy.lambdify(symbols, layer.formula(o, symbols), "numpy")
        with torch.no_grad():
            np.testing.assert_allclose(f(*x.t().numpy()), layer(x)[:, o].numpy(), rtol=1e-12)


def test_a_formula_reads_well():
    sympy = pytest.importorskip("sympy")
    x, y = sympy.symbols("x y")
    layer = SymbolicLinear(2, 3)
    layer.set_edge(0, 0, "sin", a=2)
    layer.set_edge(0, 1, "x^2", b=1 / 3, c=0.12345, d=-1)
    assert layer.formula(0, [x, y], round_to=2) == sympy.sin(2 * x) + 0.12 * (y + 0.33) ** 2 - 1
    assert layer.formula(1, [x, y]) == 0
    layer.set_edge(2, 0, "exp")
    assert layer.formula(2, [layer.formula(0, [x, y], round_to=2), 0]).has(sympy.sin(2 * x))
    for index, name in enumerate(NAMES):
        one = SymbolicLinear(1, 1)
        one.set_edge(0, 0, name)
        assert one.formula(0, [x]) == FUNCTIONS[name].sympy(x), index


def test_without_sympy_a_formula_says_what_to_install(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: (_ for _ in ()).throw(ImportError(name)) if name == "sympy" else real(name, *rest),
    )
    layer = layer_of({(0, 0): ("sin", 1.0, 0.0)})
    layer(torch.zeros(1, 4, dtype=torch.float64))  # needs none
    for call in (lambda: layer.formula(0, [0] * 4), lambda: round_formula(0)):
        with pytest.raises(ImportError, match=r"pip install 'archzoo\[interpret\]'"):
            call()


ROUNDED = [
    ("exp(0.9998*(sin(3.1413*x + 0.0001) + 1.0003*(y + 0.0002)**2 - 0.3))*1.3498", "exp(sin(pi*x) + y**2)"),
    ("0.25*(1.0002*x + 0.9999*y + 0.0001)**2 - 0.2501*(x - 1.0001*y)**2 + 0.00001", "x*y"),
    ("0.5*sqrt(4.0004*x**2 + 3.9998*y**2)", "sqrt(x**2 + y**2)"),
    ("log(1.43*x + 1.4301*y) - 0.3577", "log(x + y)"),
    ("1/(2.0002*x + 2.9999)", "1/(2*x + 3)"),
    ("0.24999/(x + 0.50001)**2", "1/(2*x + 1)**2"),
    ("2.0001*Abs(-0.5*x + 0.25)", "Abs(x - 1/2)"),
    ("sqrt(2.0003*x + 3.0002*y)", "sqrt(2*x + 3*y)"),
    ("tanh(1.3333*x) - 0.6667*sign(3.3*x - 1.65)", "tanh(4*x/3) - 2*sign(x - 1/2)/3"),
    ("sin(2.9999*x + 1.5708)", "cos(3*x)"),
    ("1.0001*exp(0.5*y)*cos(0.9999*x)", "exp(y/2)*cos(x)"),
    ("(0.5*sin(1.0001*x) + 0.4999*sin(y) + 0.1)**5", "(sin(x)/2 + sin(y)/2 + 1/10)**5"),
    ("exp(1.0001*log(x))", "x"),
    ("0.1592*x + 1.4142*y", "x/(2*pi) + sqrt(2)*y"),
    ("0.99999", "1"),
    ("0.0001*x + 0.0002", "0"),
    ("1/(0.0005*x)", "2000/x"),
    ("asin(0.9999*x)**2", "asin(x)**2"),
]


@pytest.mark.parametrize(("fitted", "true"), ROUNDED, ids=[true for _, true in ROUNDED])
def test_rounding_finds_the_exact_formula(fitted, true):
    sympy = pytest.importorskip("sympy")
    names = {"x": sympy.Symbol("x", positive=True), "y": sympy.Symbol("y", real=True)}
    rounded = round_formula(sympy.sympify(fitted, names))
    assert not rounded.atoms(sympy.Float)
    assert sympy.simplify(rounded - sympy.sympify(true, names)) == 0


def test_rounding_leaves_numbers_that_are_not_simple():
    sympy = pytest.importorskip("sympy")
    x = sympy.Symbol("x")
    for expr in (x + 0.6180339, 137.31 * x, 0.39894 * sympy.sin(x)):
        assert round_formula(expr) == expr
    assert round_formula(x + 1.004) == x + 1.004
    assert round_formula(x + 1.004, tolerance=0.01) == x + 1
    assert round_formula(sympy.Rational(17, 19) * x) == sympy.Rational(17, 19) * x
    log = round_formula(sympy.log(0.0004 * x + 0.00051))  # no natural unit: small numbers are not 0 here
    assert float(log.subs(x, 2)) == pytest.approx(math.log(0.0004 * 2 + 0.00051), abs=1e-3)
    cases = sympy.Piecewise((0.50001 * x, x > 0.3333), (x, True))
    assert round_formula(1.0001 * cases) == cases
    many = sum(sympy.symbols("v:12")) * 0.5
    assert len(str(round_formula(many**5))) < 200  # not multiplied out to 4368 terms


def test_rounding_seldom_finds_meaning_in_noise():
    sympy = pytest.importorskip("sympy")
    numbers = torch.rand(300, dtype=torch.float64).mul(4).sub(2).tolist()
    hits = sum(not round_formula(sympy.Float(number)).atoms(sympy.Float) for number in numbers)
    assert hits < 0.15 * len(numbers)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0.5, 3)), min_size=1, max_size=4))
def test_rounding_moves_a_sum_by_no_more_than_its_tolerance(terms):
    sympy = pytest.importorskip("sympy")
    x = sympy.Symbol("x")
    expr = sum(c * x**n for n, (c, _) in enumerate(terms))
    change = sympy.Poly(sympy.expand(round_formula(expr, 0.01) - expr), x).all_coeffs()
    assert all(abs(float(c)) <= 0.01 * 3 + 1e-12 for c in change)


@pytest.mark.parametrize("tolerance", [0, -1, 0.2, math.nan])
def test_a_bad_tolerance_is_refused(tolerance):
    pytest.importorskip("sympy")
    with pytest.raises(ValueError, match="tolerance="):
        round_formula(1, tolerance)
