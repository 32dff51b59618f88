"""Edges of a KAN that become formulas, and the formula of the whole network."""

import copy
import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from archzoo.budget import count_parameters
from archzoo.models.kan import KAN
from archzoo.models.symbolic import FUNCTIONS, Fit, add_function
from tests.helpers import rms_error
from tests.models.kan_networks import DOUBLE, MIXED, generic, samples, train, with_formulas
from tests.models.symbolic_layers import sampled


def test_a_formula_takes_the_place_of_its_spline_and_gives_it_back():
    model, x = generic(**MIXED), samples(60, 3)
    y, keys = model(x), model.state_dict().keys()
    fit = model.fix_symbolic(0, 2, 1, "sin", x)
    assert isinstance(fit, Fit)
    got = model.blocks[0].edge_function(2, 1, x[:, 1])
    assert rms_error(got, fit(x[:, 1])) < 1e-12
    assert (0, 2, 1) not in model.numeric_edges()
    assert model.blocks[0].symbolic.affine.requires_grad
    model.unfix_symbolic(0, 2, 1)
    assert torch.equal(model(x), y)
    assert model.state_dict().keys() == keys
    with pytest.raises(ValueError, match="l=0, o=2, i=1: this edge is not a formula"):
        model.unfix_symbolic(0, 2, 1)


def test_a_formula_with_numbers_of_its_own():
    model, x = generic([2, 1]), samples(20, 2)
    fit = model.fix_symbolic(0, 0, 1, "exp", affine=(2.0, 0.5, -1.0, 3.0))
    assert (fit.a, fit.b, fit.c, fit.d) == (2.0, 0.5, -1.0, 3.0)
    assert math.isnan(fit.r2)
    assert rms_error(model.blocks[0].edge_function(0, 1, x[:, 1]), 3 - torch.exp(2 * x[:, 1] + 0.5)) < 1e-12
    model.fix_symbolic(0, 0, 1, "x")
    assert rms_error(model.blocks[0].edge_function(0, 1, x[:, 1]), x[:, 1]) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0, 0, "sin"), "l=2: must be a block, from 0 to 1"),
        ((0, 4, 0, "sin"), "o=4: must lie from 0 to 3"),
        ((0, 0, 3, "sin"), "i=3: must lie from 0 to 2"),
        ((0, 0, 0, "sine"), "'sine' is not in the library; did you mean"),
        ((0, 0, 0, "sin", samples(9, 3), (1, 0, 1, 0)), "affine=(1, 0, 1, 0): is fitted where x is given"),
        ((0, 1, 1, "sin", samples(9, 3)), "l=0, o=1, i=1: this edge is pruned"),
    ],
    ids=["l", "o", "i", "name", "affine", "pruned"],  # no random numbers in names: parallel workers must agree on them
)
def test_edges_that_cannot_be_formulas_are_refused(arguments, message):
    model = generic()
    scores = torch.ones(4, 3)
    scores[1, 1] = 0
    model.blocks[0].edges.prune_edges_(0.5, scores)
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.fix_symbolic(*arguments)
    assert model.state_dict().keys() == keys
    assert len(model.numeric_edges()) == 19


def test_suggestions_are_of_the_samples_given_whatever_was_forwarded_last_as_in_pykan_508():
    model, x = generic([2, 2, 1]), samples(100, 2)
    options = {"names": ["x", "sin", "x^2"], "top": 2}
    want = model.suggest_symbolic(1, 0, 1, x, **options)
    model(samples(7, 2, scale=50.0))
    assert model.suggest_symbolic(1, 0, 1, x, **options) == want
    assert model.suggest_symbolic(1, 0, 1, 0.1 * x, **options) != want
    assert len(want) == 2
    assert want[0].score <= want[1].score


def known_model():
    """A [2, 1, 1] whose splines hold sin(pi x0) + x1^2 below and exp above, nearly; the other way round is exact."""
    model = KAN([2, 1, 1], grid_size=30, grid_range=(-1, 2), base_activation=None, **DOUBLE)
    for block, functions in zip(
        model.blocks, ([lambda x: torch.sin(torch.pi * x), torch.square], [torch.exp]), strict=True
    ):
        at = torch.linspace(-1, 2, 400, **DOUBLE)
        basis = block.edges.basis(at.unsqueeze(-1).expand(-1, len(functions)))[:, 0]
        with torch.no_grad():
            for i, function in enumerate(functions):
                block.edges.spline_weight[0, i] = torch.linalg.lstsq(basis, function(at).unsqueeze(-1)).solution[:, 0]
    return model


NAMES = ["0", "x", "x^2", "sin", "exp"]


def test_auto_symbolic_names_known_functions_and_the_rest_of_training_finds_their_numbers():
    import sympy

    model, x = known_model(), samples(300, 2, scale=0.9)
    x0, x1 = sympy.symbols("x0 x1")
    truth = sympy.exp(sympy.sin(sympy.pi * x0) + x1**2)
    fixed = model.auto_symbolic(x, names=NAMES)
    assert [(e.block, e.output, e.input, e.fit.name) for e in fixed] == [
        (0, 0, 0, "sin"),
        (0, 0, 1, "x^2"),
        (1, 0, 0, "exp"),
    ]
    assert min(edge.fit.r2 for edge in fixed) > 0.9999
    assert model.numeric_edges() == []
    with torch.no_grad():
        for block in model.blocks:
            block.symbolic.affine.mul_(1.05)
    y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:].square())
    assert train(model, x, y, 300) < 1e-6
    assert model.formula(tolerance=1e-4) == truth
    exact = model.lambdify(x, tolerance=1e-4)
    assert exact.rmse < 1e-5
    assert rms_error(exact(x), y) < 1e-14


def test_products_are_found_in_formulas():
    import sympy

    model, x = KAN([2, (0, 1), 1], **DOUBLE), samples(200, 2)
    for edge in model.numeric_edges():
        model.fix_symbolic(*edge, "x", affine=(1.0, 0.0, float(torch.randn(())), 0.1))
    assert train(model, x, x.prod(-1, keepdim=True), 300) < 1e-7
    x0, x1 = sympy.symbols("x0 x1")
    assert sympy.expand(model.formula(tolerance=1e-5)).equals(x0 * x1) or (
        sympy.lambdify((x0, x1), model.formula() - x0 * x1)(0.3, -0.7) < 1e-6
    )


def test_edges_below_the_threshold_stay_splines_and_have_no_formula():
    model, x = known_model(), samples(300, 2, scale=0.9)
    fixed = model.auto_symbolic(x, r2_threshold=0.999, names=["x^2", "x"])
    assert [(e.block, e.output, e.input) for e in fixed] == [(0, 0, 1)]
    assert model.numeric_edges() == [(0, 0, 0), (1, 0, 0)]
    with pytest.raises(
        ValueError, match=re.escape("edges (0, 0, 0), (1, 0, 0) as (l, o, i) are splines, which have no")
    ):
        model.formula()
    with pytest.raises(ValueError, match="are splines"):
        model.lambdify(x)
    with pytest.raises(ValueError, match="r2_threshold=1.5: must be 1 at most"):
        model.auto_symbolic(x, 1.5)


def test_later_edges_are_fitted_to_what_earlier_formulas_give():
    model, x = known_model(), samples(300, 2, scale=0.9)
    with torch.no_grad():
        model.blocks[0].edges.spline_weight[0, 1] += 0.02 * torch.randn(33, **DOUBLE)
    splines = copy.deepcopy(model)
    (*_, last) = model.auto_symbolic(x, names=NAMES)
    model.unfix_symbolic(1, 0, 0)
    assert last.fit == model.fix_symbolic(1, 0, 0, "exp", x)
    assert last.fit != splines.fix_symbolic(1, 0, 0, "exp", x)


@pytest.mark.parametrize("name", sampled(FUNCTIONS))
def test_formula_predicts_what_the_network_does_as_not_in_pykan_206_and_276(name):
    model, x = generic([3, (1, 1), 2], bias=True), samples(50, 3)
    model.prune_inputs(x, float(model.attribute(x).nodes[0].sort().values[1]))
    for edge in model.numeric_edges():
        # Arguments from 0.2 to 0.8, in every function's domain.
        model.fix_symbolic(*edge, "tanh" if edge[0] else name, affine=(0.3, 0.5, 0.2, 0.1))
    formula = model.lambdify(x)
    y = model(x)
    assert y.isfinite().all()
    assert rms_error(formula(x), y) < 1e-12
    assert formula.rmse < 1e-12
    assert formula.max_error >= formula.rmse
    assert rms_error(torch.from_numpy(formula(x.numpy())), y) < 1e-12
    assert formula(x.reshape(5, 10, 3)).shape == (5, 10, 2)
    assert len(formula.inputs) == 3
    assert len(model.formula()) == 2
    assert model.lambdify().rmse is None


def test_formula_of_a_deep_network_takes_no_hours():
    # sympy asks of nested functions whether they are real, and finds no end where inputs are not known to be.
    model, x = generic([3, (1, 2), (0, 1), 2], mult_arity=[[], [2, 3], [2], []]), samples(50, 3)
    for edge in model.numeric_edges():
        model.fix_symbolic(*edge, "tanh" if edge[0] else "1/x", affine=(0.3, 0.5, 0.2, 0.1))
    formula = model.lambdify(x)
    assert formula.max_error < 1e-12
    assert not any(symbol.is_real for symbol in formula.inputs)  # as sympy.Symbol("x0") is not
    assert formula.expressions[0].free_symbols == set(formula.inputs)


def test_formula_in_float32_matches_to_float32():
    model, x = with_formulas(KAN([2, (2, 1), 1]), 1), samples(50, 2).float()
    formula = model.lambdify(x)
    assert formula(x).dtype == torch.float32
    assert formula.max_error < 1e-5


def test_formula_tells_what_rounding_costs_and_is_differentiable():
    model, x = with_formulas(generic([2, 2, 1]), 1), samples(50, 2).requires_grad_()
    errors = [model.lambdify(x, digits=digits).rmse for digits in (1, 3, 6)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    rough = model.lambdify(x, digits=3)
    assert rough.rmse == pytest.approx((rough(x) - model(x)).square().mean().sqrt().item())
    (ours,) = torch.autograd.grad(model.lambdify()(x).sum(), x)
    (theirs,) = torch.autograd.grad(model(x).sum(), x)
    assert rms_error(ours, theirs) < 1e-12
    assert torch.allclose(model.lambdify(simplify=True)(x), model(x))


def test_formula_takes_names_and_symbols():
    import sympy

    model = KAN([2, 1], **DOUBLE)
    model.fix_symbolic(0, 0, 0, "x^2")
    model.fix_symbolic(0, 0, 1, "sin", affine=(2.0, 0.0, 0.25, 0.0))
    assert str(model.formula()) == "x0**2 + 0.25*sin(2*x1)"
    assert str(model.formula(["mass", "t"])) == "mass**2 + 0.25*sin(2*t)"
    t = sympy.Symbol("t", positive=True)
    assert model.formula(["x", t]).has(t)
    for wrong in (["x"], ["x", "x"], ["x", 3]):
        with pytest.raises(ValueError, match="must be 2 different names or sympy symbols"):
            model.formula(wrong)
    with pytest.raises(ValueError, match="digits=0: must be"):
        model.formula(digits=0)
    with pytest.raises(ValueError, match="its last dimension must be 2"):
        model.lambdify()(torch.rand(4, 3))


@pytest.mark.usefixtures("own_functions")
def test_functions_added_by_users_are_in_formulas():
    import sympy

    add_function("test_sinc", torch.sinc, sympy.Function("test_sinc"), 3)
    add_function("test_relu", torch.relu, lambda u: sympy.Max(u, 0), 3)
    add_function("test_zeta", torch.exp, sympy.zeta, 3)
    model, x = generic([2, 2, 1]), samples(50, 2)
    for number, edge in enumerate(model.numeric_edges()):
        model.fix_symbolic(*edge, ("test_sinc", "test_relu")[number % 2], affine=(0.7, 0.2, -0.5, 0.1))
    assert model.lambdify(x).max_error < 1e-12
    model.fix_symbolic(0, 0, 0, "test_zeta")
    assert "zeta" in str(model.formula())
    with pytest.raises(ValueError, match="expressions: there is zeta, of which no torch function is known"):
        model.lambdify(x)


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_network_of_formulas_takes_no_call_per_edge_as_in_pykan_432():
    counts = []
    for width in ([2, 2, 1], [6, 8, 4]):
        model = KAN(width)
        for number, edge in enumerate(model.numeric_edges()):
            model.fix_symbolic(*edge, ("sin", "exp")[number % 2])
        with CountOps() as ops, torch.no_grad():
            model(torch.rand(5, width[0]))
        counts.append(ops.count)
    assert counts[0] == counts[1]


def test_symbolic_branch_is_absent_while_it_is_empty():
    model = KAN([2, 2, 1])
    assert count_parameters(model) == 6 * 7 + 2 * 2 * 3
    assert not any("symbolic" in name for name in model.state_dict())
