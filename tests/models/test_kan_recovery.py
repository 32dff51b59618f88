"""From data to the formula itself: where single edges mislead (pykan#89, #480), the error of the whole decides."""

import copy

import pytest
import torch

from archzoo.models.kan import KAN
from archzoo.models.kan_recovery import _block_structures, _structures, recover_formula

FEW = ("x", "x^2", "sin", "exp", "1/x", "log")


def samples(count=300, inputs=2, seed=0):
    torch.manual_seed(seed)
    return 2 * torch.rand(count, inputs, dtype=torch.float64) - 1


@torch.no_grad()
def rmse(model, x, y):
    return float((model(x) - y).square().mean().sqrt())


@pytest.mark.slow
def test_a_product_is_recovered_where_auto_symbolic_finds_other_functions_pykan_89():
    x = samples()
    y = x[:, :1] * x[:, 1:]
    model = KAN([2, (0, 1), 1], grid_size=4, dtype=torch.float64)
    found = recover_formula(model, x, y)
    assert str(model.formula(tolerance=1e-4)) == "x0*x1"
    assert found.rmse < 1e-8 < found.spline_rmse
    assert [edge.fit.name for edge in found.edges] == ["x", "x", "x"]
    assert found.structures == 1, "the sparsest is enough"


@pytest.mark.slow
def test_the_papers_toy_function_and_what_is_left_is_exact_in_float32_too():
    x = samples().float()
    y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:] ** 2)
    model = KAN([2, 1, 1], grid_size=6)
    recover_formula(model, x, y, FEW)
    assert model.blocks[0].edges.spline_weight.dtype == torch.float32
    assert str(model.formula(tolerance=1e-3)) == "exp(x1**2 + sin(pi*x0))"
    assert model.lambdify(x, tolerance=1e-3).rmse < 1e-5


@pytest.mark.slow
def test_noise_is_not_fitted_by_a_more_complicated_formula():
    x = samples()
    y = x[:, :1] * torch.exp(x[:, 1:])
    noisy = y + 0.01 * torch.randn_like(y)
    model = KAN([2, (0, 1), 1], grid_size=4, dtype=torch.float64)
    found = recover_formula(model, x, noisy, ("x", "exp", "sin"), starts=3, beams=(1,))
    assert sorted(edge.fit.name for edge in found.edges) == ["exp", "x", "x"]
    assert found.rmse == pytest.approx(0.01, rel=0.1)
    assert rmse(model, x, y) < 0.002


@pytest.mark.slow
def test_it_is_a_function_of_the_seed():
    x = samples()
    y = x[:, :1] / (2 + x[:, 1:])
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = KAN([2, (0, 1), 1], grid_size=4, dtype=torch.float64)
        result = recover_formula(model, x, y, FEW, beams=(1,))
        found.append((result, model.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())


@pytest.mark.slow
def test_edges_that_were_pruned_stay_so_and_formulas_may_go():
    x = samples(inputs=3)
    y = x[:, :1] + x[:, 1:2] ** 2
    model = KAN([3, 1, 1], grid_size=4, dtype=torch.float64)
    model.blocks[0].edges.prune_edges_(0.5, torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64))
    model.fix_symbolic(0, 0, 1, "exp")
    recover_formula(model, x, y, FEW, beams=(1,))
    assert str(model.formula(tolerance=1e-3)) == "x0 + x1**2"
    assert model.numeric_edges() == []


@pytest.mark.slow
def test_pruned_inputs_stay_so():
    x = samples(inputs=3)
    y = x[:, 2:] * x[:, :1]
    model = KAN([3, (0, 1), 1], grid_size=4, dtype=torch.float64)
    with torch.no_grad():
        model.blocks[0].edges.base_weight[:, 1] = 0
        model.blocks[0].edges.spline_weight[:, 1] = 0
    model.prune_inputs(x)
    recover_formula(model, x, y, ("x", "exp"), beams=(1,))
    assert model.input_index == [0, 2]
    assert str(model.formula(tolerance=1e-3)) == "x0*x2"


@pytest.mark.slow
def test_two_functions_in_a_row_are_found_where_one_does_not_do_and_a_line_where_it_does():
    model = KAN([2, 2, (0, 1), 1])
    chained = _structures(model, 24)
    assert chained[0] in (
        (((2, 0), (0, 2)), ((0, 1), (1, 0)), ((1,),)),
        (((0, 2), (2, 0)), ((0, 1), (1, 0)), ((1,),)),
    )
    assert any(masks == (((1, 0), (0, 1)), ((0, 1), (1, 0)), ((1,),)) for masks in chained)
    x = samples()
    y = x[:, :1] * torch.exp(x[:, 1:] ** 2)
    model = KAN([2, 2, (0, 1), 1], grid_size=4, dtype=torch.float64)
    recover_formula(model, x, y, ("x", "x^2", "exp"), beams=(1,), tolerance=1e-6)
    assert str(model.formula(tolerance=1e-3)) == "x0*exp(x1**2)"


@pytest.mark.slow
def test_where_trials_end_edges_stay_splines():
    x = samples()
    y = x[:, :1] * x[:, 1:]
    model = KAN([2, (0, 1), 1], grid_size=4, dtype=torch.float64)
    found = recover_formula(model, x, y, FEW, trials=1)
    assert len(found.edges) == 1
    assert len(model.numeric_edges()) == 2
    assert found.rmse == pytest.approx(rmse(model, x, y), rel=1e-6)


def test_structures_are_all_that_use_each_node_sparsest_first_and_factors_have_no_order():
    model = KAN([2, (0, 1), 1])
    assert sorted(_block_structures(model.blocks[0])) == sorted(
        [((0, 1), (1, 0)), ((0, 1), (1, 1)), ((1, 0), (1, 1)), ((1, 1), (1, 1))]
    )
    ordered = [sum(map(sum, masks[0])) for masks in _structures(model, 10)]
    assert ordered == [2, 3, 3, 4]
    assert len(_structures(model, 2)) == 2
    assert len(_block_structures(KAN([2, 2, 1]).blocks[0])) == 7, "sums have an order: what follows may tell them apart"
    pruned = KAN([2, 2, 1])
    pruned.blocks[0].edges.prune_edges_(0.5, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert sorted(_block_structures(pruned.blocks[0])) == [((1, 0), (0, 1)), ((1, 0), (1, 1))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ()}, r"names=\(\)"),
        ({"names": ("sinus",)}, "names='sinus' is not in the library; did you mean 'sin'"),
        ({"structures": 0}, "structures=0"),
        ({"starts": 0}, "starts=0"),
        ({"candidates": 0}, "candidates=0"),
        ({"beams": ()}, r"beams=\(\)"),
        ({"beams": (1, 0)}, "beams=0"),
        ({"trials": 0}, "trials=0"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"y": torch.ones(50, 1)}, "not all the same"),
        ({"y": torch.full((50, 1), float("nan"))}, "must be finite"),
        ({"y": torch.ones(50)}, "x, y: shapes"),
        ({"model": KAN([9, 9, 1])}, "model: has 90 edges, of which .* take fewer nodes, or prune edges first"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments_are_named_and_nothing_is_changed(change, message):
    x = samples(50)
    arguments = {"model": KAN([2, 1, 1]), "x": x, "y": x[:, :1], **change}
    model = arguments["model"]
    if model.in_features != 2:
        arguments["x"] = samples(50, model.in_features)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        recover_formula(**arguments)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
