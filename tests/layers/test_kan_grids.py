"""KANLinear's grids: moved to samples, refined, and the splines refitted to them."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from archzoo.layers.kan import KANLinear
from tests.helpers import rms_error
from tests.layers.kan_layers import DOUBLE, generic, samples


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("on_samples", [False, True])
def test_refining_to_a_multiple_changes_nothing_inside_the_grid(order, adaptive, on_samples):
    layer = generic(3, 4, spline_order=order, grid_size=4, adaptive=adaptive, standalone_scale=True)
    inner = layer.grid[:, order : order + 5]
    x = inner[:, :1].t() + torch.rand(2000, 3, **DOUBLE) * (inner[:, -1:] - inner[:, :1]).t() * (1 - 1e-9)
    before, old = layer(x).detach(), layer.spline_weight
    layer.refine(12, x if on_samples else None)
    assert layer.grid_size == 12
    assert layer.grid.shape == (3, 13 + 2 * order)
    assert layer.spline_weight.shape == (4, 3, 12 + order)
    assert layer.spline_weight is not old
    assert layer.spline_weight.is_contiguous()
    assert (layer(x) - before).abs().max() < 1e-9
    assert (layer.spline.step is None) == adaptive


def test_refined_knots_divide_the_old_ones_by_index():
    layer = generic(2, 2, grid_size=3)
    old = layer.grid[:, 3:7].clone()
    layer.refine(5)
    at = [0, 0.6, 1.2, 1.8, 2.4, 3]
    want = torch.stack([old[:, math.floor(a)] * (1 - a % 1) + old[:, math.ceil(a)] * (a % 1) for a in at], 1)
    torch.testing.assert_close(layer.grid[:, 3:9], want)
    step = (want[:, -1] - want[:, 0]) / 5
    torch.testing.assert_close(layer.grid[:, :3], want[:, :1] - step[:, None] * torch.tensor([3, 2, 1]))
    torch.testing.assert_close(layer.grid[:, 9:], want[:, -1:] + step[:, None] * torch.tensor([1, 2, 3]))


def test_updated_knots_mix_quantiles_and_even_steps():
    layer, x = KANLinear(2, 3, grid_size=4, grid_eps=0.3, **DOUBLE), samples(103, 2, 3.0)
    layer.update_grid(x, margin=0.05)
    ordered = x.sort(0).values.t()
    adaptive = ordered[:, [0, 25, 51, 76, 102]]  # trunc(linspace(0, 102, 5))
    step = (ordered[:, -1:] - ordered[:, :1] + 0.1) / 4
    uniform = ordered[:, :1] - 0.05 + torch.arange(5) * step
    inner = 0.3 * uniform + 0.7 * adaptive
    torch.testing.assert_close(layer.grid[:, 3:8], inner)
    torch.testing.assert_close(layer.grid[:, :3], inner[:, :1] - step * torch.tensor([3, 2, 1]))
    torch.testing.assert_close(layer.grid[:, 8:], inner[:, -1:] + step * torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("extrapolation", ["zero", "linear"])
def test_updating_the_grid_keeps_a_cubic(scaled, extrapolation):
    """With a scaler too: efficient-kan applies it twice, and moves outputs by several standard deviations."""
    layer = generic(2, 3, adaptive=False, standalone_scale=scaled, extrapolation=extrapolation)
    points = torch.linspace(-1, 1 - 1e-9, 100, **DOUBLE).unsqueeze(1).expand(-1, 2)
    cubics = torch.stack([points[:, 0] ** p for p in range(4)], 1) @ torch.randn(4, 6, **DOUBLE)
    coefficients = torch.linalg.lstsq(layer.basis(points)[:, 0], cubics).solution  # exact: splines hold every cubic
    with torch.no_grad():
        layer.spline_weight.copy_(coefficients.t().view(3, 2, 8))
        if scaled:
            layer.spline_scaler.uniform_(0.1, 3.0)
    parameter, x = layer.spline_weight, samples(400, 2, 0.9)
    untouched = {n: p.clone() for n, p in layer.named_parameters() if n != "spline_weight"}
    before = layer(x).detach()
    layer.update_grid(x)
    assert layer.spline_weight is parameter
    assert layer.spline.step is None
    assert (layer(x) - before).abs().max() < 1e-8
    assert all(torch.equal(p, layer.get_parameter(n)) for n, p in untouched.items())


DEGENERATE = {
    "constant": torch.full((50, 1), 0.3),
    "zeros": torch.zeros(50, 1),
    "binary": torch.tensor([0.0, 1.0]).repeat(25).unsqueeze(1),
    "two samples": torch.tensor([[0.1], [0.7]]),
    "one sample": torch.tensor([[0.4]]),
    "far away": torch.linspace(1e4, 1e4 + 1, 50).unsqueeze(1),
}


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("x", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("margin", [0.01, 0.0])
def test_degenerate_samples_give_finite_splines(x, order, margin):
    """lstsq on CUDA assumes full rank: the source of pykan's NaN reports."""
    layer = KANLinear(1, 3, spline_order=order, scale_noise=1.0)
    before = layer(x).detach()
    layer.update_grid(x, margin=margin)
    assert layer(x).isfinite().all()
    assert layer.spline_weight.isfinite().all()
    if margin and x.abs().max() <= 1 and order:
        torch.testing.assert_close(layer(x).detach(), before, rtol=0, atol=1e-4)
    layer.refine(7, x)
    assert layer(x).isfinite().all()
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


def test_refitting_in_blocks_is_the_same(monkeypatch):
    first, x = generic(3, 2), samples(1000, 3)
    second = copy.deepcopy(first)
    first.update_grid(x)
    monkeypatch.setattr("archzoo.layers._splines._REFIT_BLOCK", 2000)
    second.update_grid(x)
    assert rms_error(second.spline_weight, first.spline_weight) < 1e-7


@pytest.mark.slow
def test_lbfgs_goes_on_after_refining_and_reaches_the_papers_example():
    """exp(sin(pi x) + y^2) by [2, 5, 1], 300 iterations; 2.1e-3 to 3.0e-3 from five seeds without refining."""
    x = samples(2000, 2)
    y = torch.exp(torch.sin(math.pi * x[:, :1]) + x[:, 1:] ** 2)
    net = nn.Sequential(KANLinear(2, 5, **DOUBLE), KANLinear(5, 1, **DOUBLE))

    def train(steps: int) -> float:
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (net(x[:1000]) - y[:1000]).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        with torch.no_grad():
            return (net(x[1000:]) - y[1000:]).square().mean().sqrt().item()

    assert train(15) < 6e-3
    for layer in net:
        layer.refine(10)
    refined = train(3)
    assert refined < 6e-3


def test_update_grid_and_refine_refuse_what_they_cannot_do():
    layer = KANLinear(2, 3)
    with pytest.raises(ValueError, match="grid_size=4: must be a whole number, at least 5"):
        layer.refine(4)
    with pytest.raises(ValueError, match="at least one"):
        layer.update_grid(torch.rand(0, 2))
    with pytest.raises(ValueError, match="all finite"):
        layer.update_grid(torch.tensor([[0.0, math.nan]]))
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\).*in_features=2"):
        layer.update_grid(torch.rand(4, 3))
    with pytest.raises(ValueError, match="margin=-1"):
        layer.update_grid(torch.rand(4, 2), margin=-1)
