"""Values and gradients, and that they repeat bit for bit."""

import copy

import torch
from torch import Tensor

from tests.helpers import (
    assert_all_close,
    assert_same_bits,
    layer_value_and_grads,
    rms,
    rms_error,
)
from tests.layers.contract import every_layer, snapshot, train


@every_layer(sampled=True)
def test_gradients_pass_gradcheck(case):
    layer = case.generic(small=True, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (case.x(2, small=True, dtype=torch.float64), *(p.detach() for p in parameters))
    large = sum(t.numel() for t in inputs) > 300  # then along random directions, not number by number
    assert torch.autograd.gradcheck(call, tuple(t.requires_grad_() for t in inputs), fast_mode=large)


@every_layer(sampled=True)
def test_double_backward_passes_gradgradcheck(case):
    layer = case.generic(small=True, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (case.x(2, small=True, dtype=torch.float64), *(p.detach() for p in parameters))
    assert torch.autograd.gradgradcheck(call, tuple(t.requires_grad_() for t in inputs), fast_mode=True)


@every_layer()
def test_gradient_penalty_trains_every_parameter_it_depends_on(case):
    """The gradient of the input, made with create_graph=True, is the one made without."""
    layer = case.generic(dtype=torch.float64)
    x, dy = case.x(5, dtype=torch.float64).requires_grad_(), case.dy(5, dtype=torch.float64)
    (plain,) = torch.autograd.grad(layer(x), x, dy)
    (with_graph,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    assert rms_error(with_graph, plain) < 1e-11
    penalty = with_graph.square().sum()
    gradients = torch.autograd.grad(penalty, list(layer.parameters()), allow_unused=True)
    assert any(gradient is not None and rms(gradient) > 0 for gradient in gradients)


@every_layer()
def test_every_parameter_trains(case):
    gradients = layer_value_and_grads(case.generic(), case.x(16), case.dy(16))
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert rms(gradient) > 0, f"the gradient of {name} is zero everywhere"


@every_layer()
def test_gradients_are_the_same_whichever_are_asked_for(case):
    layer = case.generic()
    x, dy = case.x(5), case.dy(5)
    truth = layer_value_and_grads(layer, x, dy)
    for name in dict(layer.named_parameters()):
        alone = copy.deepcopy(layer).requires_grad_(False)
        alone.get_parameter(name).requires_grad_()
        alone(x).backward(dy)
        assert rms_error(alone.get_parameter(name).grad, truth[name]) < 1e-6, name
        assert all(p.grad is None for n, p in alone.named_parameters() if n != name)
    frozen, leaf = copy.deepcopy(layer).requires_grad_(False), x.clone().requires_grad_()
    frozen(leaf).backward(dy)
    assert rms_error(leaf.grad, truth["x"]) < 1e-6
    with torch.no_grad():
        assert torch.equal(layer(x), truth["y"])
    with torch.inference_mode():
        assert torch.equal(layer(x), truth["y"])


@every_layer()
def test_functional_gradients_equal_autograds(case):
    layer = case.generic(dtype=torch.float64)
    x = case.x(5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sin().sum())(parameters)
    layer(x).sin().sum().backward()
    assert_all_close(gradients, {name: p.grad for name, p in layer.named_parameters()}, "torch.func.grad")


@every_layer()
def test_two_runs_agree_bit_for_bit(case):
    x, dy = case.x(300), case.dy(300)
    layer, twin = case.generic(), case.generic()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = layer_value_and_grads(layer, x, dy)
    assert torch.equal(torch.get_rng_state(), state), "forward and backward drew random numbers"
    assert_same_bits(first, layer_value_and_grads(layer, x, dy), "the second run")
    assert_same_bits(first, layer_value_and_grads(twin, x, dy), "another layer of the same seed")


@every_layer(sampled=True)
def test_training_lowers_the_loss_and_repeats_bit_for_bit(case):
    x = case.x(64)
    torch.manual_seed(1)
    target = case.sizes.usual()(x).detach()
    runs = []
    for _ in range(2):
        layer = case.build(seed=0)
        losses = train(layer, x, target, steps=25)
        runs.append(snapshot(layer))
    assert_same_bits(*runs, "25 steps, twice")
    assert losses[-1] < 0.95 * losses[0], f"from {losses[0]:.3g} to {losses[-1]:.3g}"


@every_layer()
def test_nan_in_gives_nan_out_in_its_own_row(case):
    layer = case.generic()
    clean = case.x(4)
    x = clean.clone()
    x[1].view(-1)[x[1].numel() // 2] = torch.nan
    y, want = layer(x), layer(clean)
    assert y[1].isnan().all() if case.entry.kind == "linear" else y[1].isnan().any(), "NaN came out as a number"
    others = [0, 2, 3]
    assert rms_error(y[others], want[others]) < 1e-5, "a NaN in one row reached another"
    gradients = layer_value_and_grads(layer, x, case.dy(4))
    names = dict(layer.named_parameters()).keys()
    assert any(gradients[name].isnan().any() for name in names), "all gradients of NaN are numbers"
    for name in names:
        broken = copy.deepcopy(layer)
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[-1] = torch.nan
        assert broken(clean).isnan().any(), f"NaN in {name} came out as a number"
