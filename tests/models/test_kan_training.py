"""The KAN model in training: regularisation, grids that move and are refined, fits."""

import copy
import math
import pickle

import pytest
import torch

from archzoo.models.kan import KAN
from tests.helpers import rms_error
from tests.models.kan_networks import DOUBLE, MIXED, generic, samples, train, with_formulas


def test_regularization_is_the_sum_over_blocks_of_their_inputs():
    model, x = generic(**MIXED), samples(5, 8, 3)
    levels = model.activations(x)
    want = sum(b.edges.activation_regularization(h, 0.5, 3.0) for b, h in zip(model.blocks, levels, strict=False))
    assert torch.equal(model.regularization_loss(x, l1=0.5, entropy=3.0), want)
    assert want.requires_grad


def test_regularization_without_samples_is_that_of_the_last_training_pass_once():
    torch.manual_seed(0)
    model, x = KAN([3, 4, 2], regularize=0.1, **DOUBLE), samples(40, 3)
    assert model.regularization_loss() == 0
    model(x)
    first = model.regularization_loss()
    torch.testing.assert_close(first, 0.1 * model.regularization_loss(x), rtol=1e-13, atol=0)
    assert all(p.grad is None for p in model.parameters())
    first.backward()
    assert model.blocks[0].edges.spline_weight.grad.any()
    assert model.regularization_loss() == 0
    model(samples(40, 3))
    model.eval()(x)
    assert model.train().regularization_loss() > 0
    model.eval()(x)
    assert model.regularization_loss() == 0
    silent = KAN([3, 4, 2], **DOUBLE)
    silent(x)
    assert silent.regularization_loss() == 0
    assert not silent._seen


def test_a_model_between_forward_and_regularization_can_be_copied_and_compiled():
    torch._dynamo.reset()  # its limit of recompilations counts those of all tests
    model, x = generic(regularize=0.1), samples(40, 3)
    model(x)
    assert copy.deepcopy(model).regularization_loss() == 0
    assert pickle.loads(pickle.dumps(model)).regularization_loss() == 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        loss = compiled(x).square().mean() + model.regularization_loss()
        want = model(x).square().mean() + 0.1 * model.regularization_loss(x)
        assert torch.allclose(loss, want, rtol=1e-12)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        wants = torch.autograd.grad(want, list(model.parameters()))
        assert all(torch.allclose(g, w, rtol=1e-9, atol=1e-12) for g, w in zip(grads, wants, strict=True))


def test_formulas_are_not_regularized():
    model, x = with_formulas(generic(), 1), samples(40, 3)
    assert model.regularization_loss(x) == 0


def test_update_grid_covers_what_each_block_gets_after_the_blocks_below_moved():
    model, x = generic(scale_noise=5.0, grid_eps=1.0), samples(10, 20, 3, scale=3.0)
    parameters = list(model.parameters())
    model.update_grid(x, margin=0.0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for block, inputs in zip(model.blocks, model.activations(x), strict=False):
        inner = block.edges.grid[:, 3:-3]
        low, high = inputs.reshape(-1, inputs.shape[-1]).aminmax(dim=0)
        assert torch.allclose(inner[:, 0], low)
        assert torch.allclose(inner[:, -1], high)


def test_update_grid_keeps_what_the_grid_can_hold():
    model, x = generic([2, (2, 1), 1]), samples(200, 2)
    with torch.no_grad():
        for block in model.blocks:  # one cubic on all of the grid: coefficients that are a cubic polynomial of j
            j = torch.linspace(-1, 1, 6, **DOUBLE)
            powers = torch.stack([j**n for n in range(4)])
            block.edges.spline_weight.copy_(torch.randn(*block.edges.spline_weight.shape[:2], 4, **DOUBLE) @ powers / 8)
    y = model(x)
    assert model.activations(x)[1].abs().max() < 1
    model.update_grid(x)
    assert rms_error(model(x), y) < 1e-9


def test_refine_to_a_multiple_changes_nothing():
    model, x = generic(**MIXED, grid_range=(-9, 9)), samples(50, 3)
    y = model(x)
    model.refine(12)
    assert rms_error(model(x), y) < 1e-9
    assert model.grid_size == 12
    with pytest.raises(ValueError, match="grid_size=6: must be a whole number, at least 12"):
        model.refine(6)


def test_refine_refuses_before_it_changes_any_block():
    model = KAN([2, 2, 1])
    model.blocks[1].edges.refine(8)
    with pytest.raises(ValueError, match="grid_size=5: must be a whole number, at least 8"):
        model.refine(5)
    assert model.grid_size == 3


@pytest.mark.parametrize("x", [torch.rand(0, 3), torch.full((4, 3), math.nan)], ids=["no samples", "NaN"])
def test_methods_refuse_samples_that_say_nothing_and_change_nothing(x):
    model = generic()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for method in ("update_grid", "attribute", "prune_nodes", "prune_edges", "prune_inputs", "auto_symbolic"):
        with pytest.raises(ValueError, match="^x: "):
            getattr(model, method)(x.double())
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def test_fits_the_paper_s_example_and_lbfgs_goes_on_after_refine():
    x, fresh = samples(1000, 2), samples(1000, 2)
    truth = lambda x: torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:].square())  # noqa: E731
    model = KAN([2, 5, 1], grid_size=5, **DOUBLE)
    for _ in range(5):
        model.update_grid(x)
        coarse = train(model, x, truth(x), 60)
    error = (model(fresh) - truth(fresh)).square().mean().sqrt().item()
    assert error < 6e-3
    model.refine(10)
    assert all(p.is_contiguous() for p in model.parameters())
    assert train(model, x, truth(x), 60) < coarse / 2
