"""Models stacked into one: each is trained as it would be alone."""

import copy
import math

import pytest
import torch
from torch import nn

from archzoo import create_layer
from archzoo.layers.arithmetic import NAC, NAU, NMU, SparsitySchedule
from archzoo.models.stacked import Stacked, build_stacked, finite_sum
from archzoo.training.config import OptimizerConfig
from archzoo.training.optimizing import build_optimizer

SEEDS = range(3, 8)


def units(**options):
    return lambda: nn.Sequential(NAU(4, 2, bias=True, **options), NMU(2, 1, **options)).double()


def samples(count=5, batch=16):
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.rand(batch, count, 4, generator=generator, dtype=torch.float64)
    return x, x[..., :2].sum(-1, keepdim=True) * x.sum(-1, keepdim=True)


def errors(y, t):
    return (y - t).square().mean((0, 2))


def step(model, optimizer, loss):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    for module in model.modules():
        if hasattr(module, "constrain_"):
            module.constrain_()


def alone(build, seed):
    torch.manual_seed(seed)
    return build()


@pytest.mark.parametrize("name", ["linear", "nau", "nmu", "nac", "nalu", "inalu", "npu", "real_npu", "mcfc", "kan"])
def test_outputs_and_gradients_are_those_of_the_models(name):
    build = lambda: create_layer(name, 4, 2, bias=True, dtype=torch.float64)  # noqa: E731
    stacked = build_stacked(build, SEEDS)
    x, _ = samples()
    y = stacked(x)
    y.square().sum().backward()
    for i, seed in enumerate(SEEDS):
        model = alone(build, seed)
        expected = model(x[:, i])
        torch.testing.assert_close(y[:, i], expected)
        expected.square().sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(stacked.get_parameter(key.replace(".", ":")).grad[i], parameter.grad)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_training_is_that_of_each_model_alone(optimizer):
    """With regularisers that look at weights, bounds and inputs, constraints, and decay of what is decayed."""
    build = units(constraint="penalty", bounds_weight=0.3, input_weight=0.2)
    config = OptimizerConfig(optimizer, lr=0.05, weight_decay=0.1)
    schedule = SparsitySchedule(0.5, 1, 4)
    x, t = samples()
    models = [build_stacked(build, SEEDS), *(alone(build, seed) for seed in SEEDS)]
    for i, model in enumerate(models):
        trained = build_optimizer(config, model)
        for k in range(6):
            schedule.apply_(model, k)
            if i == 0:
                step(model, trained, finite_sum(errors(model(x), t)) + model.regularization_loss())
            else:
                loss = (model(x[:, i - 1]) - t[:, i - 1]).square().mean()
                step(model, trained, loss + sum(unit.regularization_loss() for unit in model))
    for i, model in enumerate(models[1:]):
        assert models[0].member(i).state_dict().keys() == model.state_dict().keys()
        for key, value in models[0].member(i).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-9, atol=1e-12)


def test_constrain_clamps_every_model():
    stacked = build_stacked(units(), SEEDS)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(0.9)
    stacked.constrain_()
    for i in range(stacked.count):
        nau, nmu = stacked.member(i)
        assert nau.weight.max() == 1
        assert nau.bias.eq(0.9).all()  # neither clamped nor forgotten
        assert nmu.weight.min() >= 0.9
        assert nmu.weight.max() == 1


def test_one_model_that_diverges_leaves_the_others_alone():
    x, t = samples()
    broken = x.clone()
    broken[:, 2] = math.inf
    grown = []
    for inputs in (x, broken):
        model = build_stacked(units(sparsity_weight=1.0), SEEDS)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = finite_sum(errors(model(inputs), t)) + model.regularization_loss()
            assert loss.isfinite()
            step(model, optimizer, loss)
        grown.append(model)
    for key, value in grown[1].state_dict().items():
        others = [0, 1, 3, 4]
        assert torch.equal(value[others], grown[0].state_dict()[key][others])
        assert not value[2].isfinite().all()


def test_noise_differs_between_models_and_is_off_in_eval():
    stacked = Stacked([alone(lambda: NMU(2, 1, noise=(1, 5)), 0)] * 3)
    x = torch.rand(8, 1, 2).expand(-1, 3, -1)
    y = stacked(x)
    assert not torch.equal(y[:, 0], y[:, 1])
    assert not torch.equal(y, stacked(x))
    stacked.eval()
    y = stacked(x)
    assert torch.equal(y[:, 0], y[:, 1])
    assert torch.equal(y, stacked(x))


def test_regularization_is_of_the_last_forward_and_nothing_is_kept():
    stacked = build_stacked(units(input_weight=1.0), SEEDS)
    x, _ = samples()
    for _ in range(2):  # a second pass does not add to the first one's inputs
        stacked(x)
        loss = stacked.regularization_loss()
        torch.testing.assert_close(loss, stacked_loss(x))
    with pytest.raises(RuntimeError, match="there was none"):
        stacked.regularization_loss()
    stacked(x)
    copy.deepcopy(stacked)


def stacked_loss(x):
    losses = []
    for i, seed in enumerate(SEEDS):
        model = alone(units(input_weight=1.0), seed)
        model(x[:, i])
        losses.append(sum(unit.regularization_loss() for unit in model))
    return torch.stack(losses).sum()


def test_sparsity_weight_is_that_of_the_units_that_have_one():
    stacked = build_stacked(units(), SEEDS)
    SparsitySchedule(2.0, 0, 1).apply_(stacked, 1)
    assert stacked.sparsity_weight == 2.0
    assert [unit.sparsity_weight for unit in stacked.member(1)] == [2.0, 2.0]
    assert not hasattr(build_stacked(lambda: NAC(4, 2), SEEDS), "sparsity_weight")


def test_state_survives_a_round_trip_a_move_and_a_copy():
    stacked, other = build_stacked(units(), SEEDS), build_stacked(units(), range(5))
    other.load_state_dict(stacked.state_dict())
    x, _ = samples()
    for model in (other, copy.deepcopy(stacked)):
        assert torch.equal(model(x), stacked(x))
    single = copy.deepcopy(stacked).float()
    assert single.member(0)[0].weight.dtype == torch.float32
    assert single(x.float()).dtype == torch.float32
    assert str(stacked).startswith("Stacked(")
    assert "5 x" in str(stacked)


def test_wrong_models_and_inputs_are_refused():
    with pytest.raises(ValueError, match="one model or more"):
        Stacked([])
    with pytest.raises(ValueError, match="one architecture"):
        Stacked([nn.Linear(2, 1), nn.Linear(3, 1)])
    with pytest.raises(ValueError, match=r"shape \(16, 4\): must be \(batch, 5"):
        build_stacked(units(), SEEDS)(samples()[0][:, 0])
