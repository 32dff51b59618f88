"""B-spline bases: the recursion against scipy, the closed form against the recursion, ends, knots and derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archzoo.kernels.kan_spline import OUTSIDE, BSpline, cox_de_boor

ORDERS = range(5)


def knots(order: int, cells: int = 6, features: int = 3, seed: int = 0) -> Tensor:
    """Uneven knots, other ones for each feature, float64."""
    steps = torch.rand(features, cells + 2 * order, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([torch.zeros(features, 1, dtype=torch.float64), (steps + 0.1).cumsum(1)], 1) - 1.0


def uniform(order: int = 3, outside: str = "zero") -> BSpline:
    return BSpline(order, 5, -1.0, 0.4, outside)


@pytest.mark.parametrize("derivative", range(4))
@pytest.mark.parametrize("order", ORDERS)
def test_recursion_agrees_with_scipy(order, derivative):
    interpolate = pytest.importorskip("scipy.interpolate", reason="scipy is the independent definition here")
    t, x = knots(order), torch.linspace(-1.5, 5.0, 301, dtype=torch.float64)
    ours = cox_de_boor(x.expand(3, -1), t, order, derivative)
    for i in range(3):
        for j in range(ours.shape[1]):
            element = interpolate.BSpline(t[i].numpy(), torch.eye(ours.shape[1])[j].double().numpy(), order)
            inside = (x >= t[i, order]) & (x < t[i, -order - 1])  # scipy extrapolates from there on
            theirs = torch.from_numpy(element(x[inside].numpy(), nu=derivative))
            torch.testing.assert_close(ours[i, j][inside], theirs, rtol=1e-9, atol=1e-9 * 10**derivative)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 6e-7)], ids=str)
def test_closed_form_is_the_uniform_cubic_recursion(dtype, bound):
    basis, x = uniform(), torch.linspace(-2.6, 2.6, 1001, dtype=torch.float64).unsqueeze(0)
    t = basis.knots(x)
    with torch.no_grad():
        values, slopes = basis.values_and_slopes(x.to(dtype))
        only_values = basis.values(x.to(dtype))
    assert (values - cox_de_boor(x, t, 3)).abs().max() < bound
    assert (only_values - cox_de_boor(x, t, 3)).abs().max() < bound
    assert (slopes - cox_de_boor(x, t, 3, 1)).abs().max() < 10 * bound  # slopes are some 1 / step larger


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@settings(deadline=None, max_examples=25)
@given(
    order=st.integers(0, 4),
    cells=st.integers(1, 9),
    start=st.floats(-5, 5),
    step=st.floats(0.01, 3),
    at=st.floats(0, 1, exclude_max=True),
)
def test_bases_are_local_and_sum_to_one_inside_the_grid(adaptive, order, cells, start, step, at):
    basis = BSpline(order, cells, start, step)
    tensors = ()
    x = torch.full((1, 1), start + at * cells * step, dtype=torch.float64).clamp(max=start + cells * step - 1e-9)
    if adaptive:
        tensors = (basis.knots(x),)
        basis = BSpline(order, cells, None, None)
    values = basis.values(x, *tensors)
    assert values.shape == (1, cells + order, 1)
    assert values.min() >= 0
    assert abs(values.sum().item() - 1) < 1e-9
    assert (values > 1e-12).sum() <= order + 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
def test_nothing_is_left_beyond_the_outermost_knots(order, adaptive):
    basis = uniform(order)
    x = torch.tensor([[-1e38, -4.0, 4.0, 1e38, math.inf, -math.inf]])
    t = basis.knots(x)
    basis, tensors = (BSpline(order, 5, None, None), (t,)) if adaptive else (basis, ())
    for derivative in range(3):
        assert torch.equal(basis.derivative(x, derivative, *tensors), torch.zeros(1, 5 + order, 6))


def test_cells_of_order_zero_are_half_open():
    t = torch.tensor([[-1.0, -0.6, 0.0, 0.1]])
    at_knots = cox_de_boor(t, t, 0)[0]
    assert torch.equal(at_knots, torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_repeated_knots_count_as_zero_over_zero_is_zero(order):
    """efficient-kan gives NaN there."""
    t = torch.tensor([[0.0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3]], dtype=torch.float64)
    x = torch.linspace(0, 2.999, 50, dtype=torch.float64).unsqueeze(0)
    values, slopes = cox_de_boor(x, t, order), cox_de_boor(x, t, order, 1)
    assert values.isfinite().all()
    assert slopes.isfinite().all()
    torch.testing.assert_close(values.sum(1), torch.ones_like(x))  # clamped knots: a partition of unity up to the ends
    assert torch.equal(
        cox_de_boor(x, torch.full((1, 9), 7.0, dtype=torch.float64), order), torch.zeros(1, 8 - order, 50)
    )


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("order", ORDERS)
def test_nan_stays_nan(order, outside):
    x = torch.tensor([[math.nan]])
    assert uniform(order, outside).values(x).isnan().all()
    adaptive = BSpline(order, 5, None, None, outside)
    assert adaptive.values(x, uniform(order).knots(x)).isnan().all()


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("order", ORDERS)
def test_outside_clamp_keeps_the_value_and_linear_the_tangent(order, adaptive):
    t = knots(order, cells=5, features=1) if adaptive else uniform(order).knots(torch.empty(0, dtype=torch.float64))
    tensors = (t,) if adaptive else ()

    def basis(outside: str) -> BSpline:
        return BSpline(order, 5, None if adaptive else -1.0, None if adaptive else 0.4, outside)

    low, high, far = t[:, order].unsqueeze(1), t[:, order + 5].unsqueeze(1), 1.7
    just_in = high - 1e-9  # from the left: a piece of order 0 or 1 jumps at the end itself
    for end, x in ((low, low - far), (just_in, high + far)):
        value, slope = cox_de_boor(end, t, order), cox_de_boor(end, t, order, 1)
        clamp, linear = basis("clamp"), basis("linear")
        torch.testing.assert_close(clamp.values(x, *tensors), value, rtol=0, atol=1e-7)
        torch.testing.assert_close(
            linear.values(x, *tensors), value + slope * (x - end).unsqueeze(1), rtol=0, atol=1e-6
        )
        assert not clamp.derivative(x, 1, *tensors).any()
        torch.testing.assert_close(linear.derivative(x, 1, *tensors), slope, rtol=0, atol=1e-6)
        assert not linear.derivative(x, 2, *tensors).any()
        for each in (clamp, linear):
            pair = each.values_and_slopes(x, *tensors)
            assert torch.equal(pair[0], each.values(x, *tensors))
            assert torch.equal(pair[1], each.derivative(x, 1, *tensors))
    inside = torch.linspace(0.01, 0.99, 20, dtype=torch.float64) * (high - low) + low
    for each in (basis("clamp"), basis("linear")):
        for derivative in range(3):
            want = basis("zero").derivative(inside, derivative, *tensors)
            torch.testing.assert_close(each.derivative(inside, derivative, *tensors), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_autograd_gives_each_derivative_from_the_one_before(outside):
    """On the knots too, where the closed form's |u| has no derivative: PINNs put their boundary points there."""
    basis = uniform(3, outside)
    on_knots = basis.knots(torch.empty(0, dtype=torch.float64))[:, 3:-4]
    x = torch.cat([on_knots, torch.tensor([[-3.0, -1.3, -0.95, 0.333, 1.2, 2.5]], dtype=torch.float64)], 1)
    x.requires_grad_()
    direction = torch.randn(basis.size, 1, dtype=torch.float64)
    value = (basis.values(x) * direction).sum()
    for derivative in range(1, 4):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        want = (basis.derivative(x, derivative) * direction).sum(-2)
        torch.testing.assert_close(value, want, rtol=0, atol=1e-10)


def test_autograd_keeps_x_alone():
    kept: list[int] = []
    x = torch.rand(4, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        uniform().values(x)
    assert sum(kept) == x.numel()
