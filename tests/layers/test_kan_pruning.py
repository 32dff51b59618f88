"""KANLinear's regularisation, and edges and outputs taken out of it."""

import re

import pytest
import torch
from torch import Tensor

from archzoo.layers.kan import KANLinear
from tests.helpers import rms_error
from tests.layers.kan_layers import generic, samples


@pytest.mark.parametrize("normalize", [True, False])
def test_edge_scale_is_the_deviation_of_the_edge_functions(normalize):
    layer, x = generic(3, 4, standalone_scale=True), samples(60, 3)
    layer.prune_edges_(0.5, torch.rand(4, 3))
    want = layer.edge_functions(x).std(0)
    if normalize:
        want = want / (x.std(0) + 0.1)
    assert rms_error(layer.edge_scale(x, normalize), want) < 1e-12
    assert rms_error(layer.edge_scale(x.view(6, 10, 3), normalize), want) < 1e-12


def test_edge_scale_is_differentiable_also_where_an_edge_is_constant():
    layer = generic(2, 3, adaptive=False)
    x = samples(30, 2).requires_grad_()
    weights = [layer.base_weight, layer.spline_weight]

    def scale(x: Tensor, base: Tensor, spline: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"base_weight": base, "spline_weight": spline}, (x,), strict=False)

    layer.forward = layer.edge_scale
    assert torch.autograd.gradcheck(scale, [x, *weights], fast_mode=True)
    layer.prune_edges_(1.0, torch.zeros(3, 2))
    assert not layer.edge_scale(x).any()
    layer.activation_regularization(x).backward()
    assert all(t.grad.isfinite().all() for t in (x, *weights))
    assert not layer.edge_scale(x[:1]).any()


def test_activation_regularization_is_pykans():
    layer, x = generic(3, 4), samples(60, 3)
    v = layer.edge_functions(x).std(0) / (x.std(0) + 0.1)
    r, c = v / (v.sum(1, keepdim=True) + 1), v / (v.sum(0, keepdim=True) + 1)
    entropy = -(r * torch.log2(r + 1e-4)).sum(1).mean() - (c * torch.log2(c + 1e-4)).sum(0).mean()
    torch.testing.assert_close(layer.activation_regularization(x), v.sum() + 2 * entropy)
    torch.testing.assert_close(layer.activation_regularization(x, 0.5, 3.0), 0.5 * v.sum() + 3 * entropy)


def test_regularization_loss():
    assert KANLinear(3, 4).regularization_loss().item() == 0.0
    layer = generic(3, 4, adaptive=False, regularize_activation=0.7, regularize_entropy=0.2)
    a = layer.spline_weight.abs().mean(-1)
    p = a / a.sum()
    torch.testing.assert_close(layer.regularization_loss(), 0.7 * a.sum() - 0.2 * (p * p.log()).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pruned", ["some", "all"])
def test_regularization_loss_is_finite_with_pruned_edges(pruned, dtype):
    """Upstream gives NaN."""
    layer = KANLinear(3, 4, regularize_activation=1.0, regularize_entropy=1.0, dtype=dtype)
    scores = torch.zeros(4, 3)
    scores[1] = 0.0 if pruned == "all" else 1.0
    layer.prune_edges_(0.5, scores)
    loss = layer.regularization_loss()
    loss.backward()
    assert loss.isfinite()
    assert layer.spline_weight.grad.isfinite().all()
    assert not layer.spline_weight.grad[0].any()


def test_pruned_edges_are_gone_and_stay_gone():
    layer, x = generic(3, 4), samples(20, 3)
    scores = torch.arange(12.0).view(4, 3)
    layer.prune_edges_(5, scores)
    assert torch.equal(layer.mask, (scores >= 5).double())
    assert not layer.edge_functions(x)[:, 0].any()
    layer.prune_edges_(5, 11 - scores)
    assert layer.mask.sum() == 2
    layer(x).sum().backward()
    assert not layer.base_weight.grad[0].any()
    by_weight = generic(3, 4)
    by_weight.prune_edges_(by_weight.spline_weight.abs().mean(-1).median().item())
    assert by_weight.mask.sum() == 7  # the median of twelve is the sixth
    with pytest.raises(ValueError, match=re.escape("scores has shape (3, 4); it must be one number an edge, (4, 3)")):
        layer.prune_edges_(0.0, torch.zeros(3, 4))


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
def test_subset_and_kept_outputs(adaptive):
    layer, x = generic(4, 5, adaptive=adaptive, standalone_scale=True), samples(20, 4)
    layer.prune_edges_(0.3, torch.rand(5, 4))
    phi = layer.edge_functions(x)
    small = layer.subset([2, 0], torch.tensor([True, False, False, True, True]))
    assert (small.in_features, small.out_features) == (2, 3)
    assert rms_error(small.edge_functions(x[:, [2, 0]]), phi[:, [0, 3, 4]][:, :, [2, 0]]) < 1e-14
    assert rms_error(small(x[:, [2, 0]]), phi[:, [0, 3, 4]][:, :, [2, 0]].sum(-1) + layer.bias[[0, 3, 4]]) < 1e-13
    small(x[:, [2, 0]]).sum().backward()
    assert layer.spline_weight.grad is None
    y = layer(x)
    layer.keep_outputs_([4, 1])
    assert rms_error(layer(x), y[:, [4, 1]]) < 1e-14
    assert layer.out_features == 2
    assert {n: len(p) for n, p in layer.named_parameters()} == dict.fromkeys(
        ("base_weight", "spline_weight", "spline_scaler", "bias"), 2
    )
    for index in ([], [5], [-1], [0.5], [True]):
        with pytest.raises(ValueError, match="index="):
            layer.keep_outputs_(index)
    with pytest.raises(ValueError, match="in_index="):
        layer.subset([4], [0])
