"""KANLinear's state: masks and grids that are loaded, copied, exported, compiled and shown."""

import copy

import pytest
import torch
from torch import Tensor, nn

from archzoo.layers.kan import KANLinear
from tests.helpers import rms_error
from tests.layers.kan_layers import DOUBLE, generic, samples


def test_loading_a_mask_creates_it_and_loading_none_drops_it():
    pruned, fresh, x = generic(3, 4, adaptive=False), generic(3, 4, adaptive=False), samples(9, 3)
    whole = fresh.state_dict()
    pruned.prune_edges_(0.5, torch.rand(4, 3))
    assert "mask" in pruned.state_dict()
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(x), pruned(x))
    assert not fresh.mask.requires_grad
    pruned.load_state_dict({**whole})
    assert pruned.mask is None
    net = nn.Sequential(KANLinear(3, 4, **DOUBLE))
    net.load_state_dict({f"0.{name}": t for name, t in fresh.state_dict().items()}, assign=True)
    assert torch.equal(net(x), fresh(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid_range", [(-1.0, 1.0), (0.1, 0.77), (-300.0, 5.0)], ids=str)
def test_a_uniform_grid_is_known_after_loading(dtype, grid_range):
    layer = KANLinear(3, 4, grid_range=grid_range, dtype=dtype)
    other = KANLinear(3, 4, grid_range=(-7, 8), dtype=dtype)
    other.load_state_dict(layer.state_dict())
    assert other.spline.step is not None
    low, high = grid_range
    assert abs(other.spline.start - low) <= torch.finfo(dtype).eps * max(abs(low), abs(high))
    same = KANLinear(3, 4, grid_range=grid_range, dtype=dtype)
    same.load_state_dict(layer.state_dict())
    assert same.spline == layer.spline  # the exact numbers, whatever the dtype they went through


def test_an_adaptive_grid_is_known_after_loading():
    layer, x = generic(3, 4).float(), samples(30, 3).float()
    other = KANLinear(3, 4)
    other.load_state_dict(layer.state_dict())
    assert other.spline.step is None
    assert torch.equal(other(x), layer(x))
    back = KANLinear(3, 4)
    other.load_state_dict(back.state_dict())
    assert torch.equal(other(x), back(x))
    one_uneven_row = back.state_dict()
    one_uneven_row["grid"] = one_uneven_row["grid"].clone()
    one_uneven_row["grid"][1] *= 2
    other.load_state_dict(one_uneven_row)
    assert other.spline.step is None
    other.reset_parameters()
    assert other.spline == back.spline


def test_extras_survive_copies_and_export():
    layer, x = generic(3, 4), samples(9, 3)
    layer.refine(8)
    layer.prune_edges_(0.5, torch.rand(4, 3))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "pruned=" in repr(layer)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    layer.update_grid(x)  # the grid is Python state too: it must not be frozen into the graph
    assert torch.equal(compiled(x), layer(x))
    layer.reset_parameters()
    assert torch.equal(compiled(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (9, 4)


@pytest.mark.parametrize("adaptive", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["uniform", "adaptive"])
def test_what_else_a_loss_is_made_of_compiles(adaptive):
    layer = generic(3, 4, adaptive=adaptive, regularize_entropy=1.0, extrapolation="linear")

    def loss(x: Tensor) -> Tensor:
        return layer.regularization_loss() + layer.activation_regularization(x) + layer.basis(x, 1).square().sum()

    x = samples(20, 3, 1.5).requires_grad_()
    eager = torch.autograd.grad(loss(x), [x, layer.spline_weight, layer.base_weight])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(x), [x, layer.spline_weight, layer.base_weight]), eager, strict=True
    ):
        assert rms_error(got, want) < 1e-10


def test_a_pruned_layer_has_a_repr_on_meta_too():
    layer = generic(3, 4)
    layer.prune_edges_(layer.spline_weight.abs().mean(-1).median().item())
    assert "pruned=5" in repr(layer)
    assert "pruned" not in repr(layer.to("meta"))


@pytest.mark.parametrize("grid_eps", [0.02, 1.0])
@pytest.mark.parametrize("inputs", [1, 3])
def test_a_moved_grid_loads_bit_for_bit(grid_eps, inputs):
    """Even knots on one input are a uniform grid again, to the layer that moved them and to one that loads them."""
    layer = KANLinear(inputs, 4, grid_eps=grid_eps)
    layer.update_grid(samples(50, inputs).float())
    again = KANLinear(inputs, 4, grid_eps=grid_eps)
    again.load_state_dict(layer.state_dict())
    x = samples(200, inputs).float()
    assert torch.equal(again(x), layer(x))
