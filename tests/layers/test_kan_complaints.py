"""What users of other KAN libraries complain of (issues by repository and number) does not happen here.

Symbolic quality (pykan#89, #206, #276, #415, #432, #480, #508, #513) is tested in `tests/models/test_symbolic_*.py`
and `test_kan_formulas.py`. How fast the layers are is measured, not tested: `python -m benchmarks kan_speed`.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import archzoo
from archzoo.layers.kan import KANLinear
from archzoo.models.kan import KAN
from tests.helpers import rms_error

FAMILY = [name for name in archzoo.list_layers("linear") if name.endswith("kan") and name != "selectable_kan"]


def kept_floats(layer: nn.Module, x: Tensor) -> float:
    """What autograd holds for the backward pass besides parameters, x itself included, in floats an input."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(held.values()) / (4 * x.numel())


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("outputs", [4, 64])
def test_memory_does_not_grow_with_grid_and_outputs(name, outputs):
    """pykan#9, #18, #38, #224; efficient-kan#23: 14.5 GB at a batch of 36864, 0.8 GB for an MLP; FourierKAN#2."""
    x = torch.randn(36_864 // 16, 16, requires_grad=True)
    assert kept_floats(archzoo.create_layer(name, 16, outputs), x) <= 4
    grid = {"kan": "grid_size", "fast_kan": "grid_size", "fourier_kan": "grid_size", "chebyshev_kan": "degree"}
    if name in grid:
        assert kept_floats(archzoo.create_layer(name, 16, outputs, **{grid[name]: 40}), x) <= 4


def test_work_is_a_gemm_and_not_a_loop_over_edges():
    """pykan#9, #18, #38: 10 times slower. FLOPs are 2 an edge, row and function, and calls do not grow with edges."""

    def cost(inputs: int, outputs: int) -> tuple[float, int]:
        layer, x = KANLinear(inputs, outputs), torch.rand(16, inputs)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            layer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
            layer(x)
        return flops.get_total_flops() / (16 * inputs * outputs * 9), len(profile.events())

    (small, few), (large, many) = cost(4, 4), cost(32, 256)
    assert many <= few + 4  # for 512 times as many edges
    assert 2 <= large < 2.5
    assert small > large  # the bases, which outputs share


DEGENERATE = {
    "constant": torch.full((50, 3), 0.3),
    "binary": torch.randint(0, 2, (50, 3), generator=torch.Generator().manual_seed(0)).float(),
    "repeated": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).repeat(20, 1),
    "one sample": torch.tensor([[0.1, -0.2, 5.0]]),
    "far apart": torch.tensor([[-1e4, 0.0, 1e-6], [1e4, 1e-9, 2e-6]]).repeat(10, 1),
}


@pytest.mark.parametrize("samples", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("margin", [0.01, 0.0])
def test_grid_updates_and_refinement_never_give_nan(samples, margin):
    """pykan#199, #230, #233, #300, #346, #364: NaN from lstsq, which assumes full rank on CUDA."""
    torch.manual_seed(0)
    layer = KANLinear(3, 4)
    layer.update_grid(samples, margin=margin)
    layer.refine(12)
    x = torch.cat([samples, torch.randn(10, 3)]).requires_grad_()
    layer(x).square().mean().backward()
    for tensor in (layer(x), x.grad, *(p.grad for p in layer.parameters())):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("outside", ["clamp", "linear"])
def test_inputs_outside_of_the_grid_still_count(outside):
    """pykan#142, #385: the spline is 0 out there. It can be continued, or the grid moved."""
    torch.manual_seed(0)
    layer = KANLinear(1, 1, base_activation=None, extrapolation=outside, scale_noise=1.0)
    ends = layer(torch.tensor([[1.0], [3.0], [30.0]]))
    assert (ends[1:] != 0).all()
    assert torch.allclose(ends, ends[0]) == (outside == "clamp")
    moved = KANLinear(1, 1, base_activation=None, scale_noise=1.0)
    x = torch.linspace(3, 4, 50).unsqueeze(1)
    assert not moved(x).any()
    moved.update_grid(x)
    optimizer = torch.optim.LBFGS(moved.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (moved(x) - x.sin()).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert loss() < 1e-6


@pytest.mark.parametrize("name", FAMILY)
def test_inputs_of_any_number_of_dimensions(name):
    """pykan#204: only (batch, features) works."""
    layer = archzoo.create_layer(name, 6, 3)
    x = torch.randn(2, 3, 4, 6)
    assert rms_error(layer(x), layer(x.view(-1, 6)).view(2, 3, 4, 3)) < 1e-6


def test_a_layer_trained_elsewhere_becomes_a_formula():
    """efficient-kan#21, #27: symbolic output of a model that is a stack of layers, in somebody's own loop."""
    torch.manual_seed(0)
    x = 2 * torch.rand(400, 2, dtype=torch.float64) - 1
    y = x[:, :1].sin() + x[:, 1:] ** 2
    own = nn.Sequential(KANLinear(2, 1, dtype=torch.float64))
    optimizer = torch.optim.LBFGS(own.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_change=0)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (own(x) - y).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    model = KAN([2, 1], grid_size=5, bias=True, dtype=torch.float64)
    model.blocks[0].edges.load_state_dict(own[0].state_dict())
    assert rms_error(model(x), own(x)) < 1e-14
    fixed = model.auto_symbolic(x, names=["x", "x^2", "x^3", "sin", "exp"])
    assert [edge.fit.name for edge in fixed] == ["sin", "x^2"]
    assert model.lambdify(x).rmse < 1e-3


def test_splines_are_scipys():
    """pykan#273, #361."""
    scipy = pytest.importorskip("scipy.interpolate")
    torch.manual_seed(0)
    layer = KANLinear(2, 3, base_activation=None, bias=False, dtype=torch.float64)
    layer.update_grid(torch.randn(100, 2, dtype=torch.float64))
    x = torch.randn(50, 2, dtype=torch.float64) * 0.5
    total = torch.zeros(50, 3, dtype=torch.float64)
    for o, i in itertools.product(range(3), range(2)):
        spline = scipy.BSpline(*layer.to_scipy(o, i), extrapolate=False)
        total[:, o] += torch.from_numpy(spline(x[:, i].numpy())).nan_to_num()
    assert rms_error(layer(x), total) < 1e-12


def test_gradients_do_not_break_where_chebyshevs_angle_has_none():
    """ChebyKAN: cos(d acos(tanh x)) has a NaN gradient from |x| = 9 on in float32."""
    x = torch.tensor([[-50.0], [9.5], [math.pi * 100]], requires_grad=True)
    layer = archzoo.create_layer("chebyshev_kan", 1, 2)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()
