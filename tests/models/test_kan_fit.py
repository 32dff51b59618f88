"""Levenberg-Marquardt for a KAN: its Jacobian is the true one, its steps never make a fit worse, and few are enough."""

import copy

import pytest
import torch

from archzoo.models.kan import KAN
from archzoo.models.kan_fit import _linearized, fit_least_squares


def samples(count=200, inputs=2, seed=0):
    torch.manual_seed(seed)
    return 2 * torch.rand(count, inputs, dtype=torch.float64) - 1


@torch.no_grad()
def rmse(model, x, y):
    return float((model(x) - y).square().mean().sqrt())


def product(x):
    return x[:, :1] * x[:, 1:2]


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"base_activation": "zero"}, {"standalone_scale": True}], ids=str
)
def test_jacobian_is_that_of_autograd(options):
    torch.manual_seed(0)
    model = KAN([2, (1, 1), 2], dtype=torch.float64, **options)
    model.blocks[0].node_scale.data.mul_(1.7)
    model.fix_symbolic(0, 1, 0, "sin", affine=(1.3, 0.2, -0.7, 0.4))
    model.fix_symbolic(1, 0, 1, "x^2", affine=(0.6, -0.1, 1.2, 0.3))
    model.fix_symbolic(1, 1, 0, "0")
    model.blocks[0].edges.prune_edges_(0.5, torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    x, y = samples(30), torch.zeros(30, 2, dtype=torch.float64)
    columns, residual = _linearized(model, x, y)
    outputs = model(x)
    assert torch.equal(residual, -outputs.detach().mT.flatten())
    checked = set()
    for c in columns:
        for k in range(2):
            for n in (0, 17):
                (gradient,) = torch.autograd.grad(outputs[n, k], c.parameter, retain_graph=True)
                torch.testing.assert_close(c.values[k, n], gradient[c.at])
                outside = gradient.clone()
                outside[c.at] = 0
                assert not outside.any(), "no number that matters is left out"
        checked.add(c.parameter)
    left = {name for name, p in model.named_parameters() if p not in checked and p.requires_grad}
    assert left <= {"blocks.0.edges.spline_scaler", "blocks.1.edges.spline_scaler"}, "which go with the splines"


@pytest.mark.slow
def test_on_products_forty_steps_do_better_than_two_hundred_of_lbfgs_in_the_median():
    x = samples(300)
    y = product(x)

    def by_lbfgs(model, steps):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = KAN([2, (0, 1), 1], grid_size=5, dtype=torch.float64)
        other = copy.deepcopy(model)
        fit_least_squares(model, x, y, 20, grid_every=4)
        ours = fit_least_squares(model, x, y, 20)
        for _ in range(5):
            other.update_grid(x)
            by_lbfgs(other, 4)
        by_lbfgs(other, 200)
        errors.append((ours, rmse(other, x, y)))
    ours, theirs = (sorted(column)[1] for column in zip(*errors, strict=True))
    assert ours < theirs / 10


def test_the_error_never_rises_and_the_result_is_that_of_the_model():
    x = samples()
    y = product(x)
    errors = []
    for steps in range(12):
        torch.manual_seed(1)
        model = KAN([2, (0, 1), 1], dtype=torch.float64)
        errors.append(fit_least_squares(model, x, y, steps))
        assert errors[-1] == pytest.approx(rmse(model, x, y), rel=1e-9)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 5


def test_numbers_of_formulas_are_trained_to_the_last_digits():
    x = samples()
    y = 2 * torch.exp(0.7 * product(x)) + 0.5
    model = KAN([2, (0, 1), 1], dtype=torch.float64)
    for edge in ((0, 0, 1), (0, 1, 0)):
        model.fix_symbolic(*edge, "0")
    for edge in ((0, 0, 0), (0, 1, 1)):
        model.fix_symbolic(*edge, "x", affine=(1.1, 0.05, 1.0, 0.0))
    model.fix_symbolic(1, 0, 0, "exp", affine=(0.5, 0.1, 1.5, 0.0))
    assert fit_least_squares(model, x, y, 60) < 1e-12


def test_where_nothing_can_be_gained_the_model_stays_as_it_is():
    x = samples()
    model = KAN([2, 1], dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    y = model(x).detach()
    assert fit_least_squares(model, x, y) == 0
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_wrong_arguments_are_named():
    model, x = KAN([2, 1], dtype=torch.float64), samples(10)
    for y, options, message in [
        (x[:, 0], {}, r"x, y: shapes \(10, 2\) and \(10,\)"),
        (x[:5, :1], {}, "x, y: shapes"),
        (x[:, :1], {"steps": -1}, "steps=-1"),
        (x[:, :1], {"grid_every": 1.5}, "grid_every=1.5"),
        (x[:, :1], {"tolerance": -1.0}, "tolerance=-1.0"),
        (x[:, :1] * float("nan"), {}, "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_least_squares(model, x, y, **options)
