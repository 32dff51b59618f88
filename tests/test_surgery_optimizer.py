"""What a swap does to an optimizer's parameter groups, and that `unswap` takes it back."""

import pytest
import torch
from torch import nn

import archzoo


def make(optimizer=torch.optim.AdamW, names=False):
    """A perceptron after one step, its vectors in a group that is not decayed."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, p) if names else p for n, p in named.items() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) if names else p for n, p in named.items() if p.dim() == 1], "weight_decay": 0.0, "lr": 0.5},
    ]
    optimizer = optimizer(groups, lr=0.01)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()


def groups(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def test_new_parameters_go_where_the_old_ones_were():
    model, optimizer = make()
    old = list(model[0].parameters())
    kept = optimizer.state[model[2].weight]
    archzoo.swap(model, {"0": "aptx"}, optimizer=optimizer)
    vectors = [f"0.{name}" for name, p in model[0].named_parameters() if p.dim() <= 1]
    others = [f"0.{name}" for name, p in model[0].named_parameters() if p.dim() > 1]
    assert "0.bias" in vectors
    assert groups(model, optimizer) == [[*others, "2.weight"], [*vectors, "2.bias"]]
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(0.1, 0.01), (0.0, 0.5)]
    assert not any(p in optimizer.state for p in old)
    assert optimizer.state[model[2].weight] is kept
    before = {name: p.clone() for name, p in model[0].named_parameters()}
    step(model, optimizer)
    assert all(not torch.equal(before[name], p) for name, p in model[0].named_parameters() if p.grad.any())


def test_names_of_parameters_are_kept_up():
    model, optimizer = make(names=True)
    report = archzoo.swap(model, {"0": "aptx"}, optimizer=optimizer)
    assert [g["param_names"] for g in optimizer.param_groups] == groups(model, optimizer)
    archzoo.unswap(report)
    assert [g["param_names"] for g in optimizer.param_groups] == [["0.weight", "2.weight"], ["0.bias", "2.bias"]]


def test_unswap_restores_groups_and_state():
    model, optimizer = make()
    before = optimizer.state_dict()
    numbers = [{key: torch.as_tensor(v).clone() for key, v in s.items()} for s in before["state"].values()]
    report = archzoo.swap(model, {nn.Linear: "paon"}, optimizer=optimizer)
    step(model, optimizer)
    archzoo.unswap(report)
    assert groups(model, optimizer) == [["0.weight", "2.weight"], ["0.bias", "2.bias"]]
    assert len(optimizer.state) == 4
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, old in enumerate(numbers):
        assert all(torch.equal(torch.as_tensor(after["state"][index][key]), value) for key, value in old.items())


def test_an_optimizer_that_was_loaded_since_is_put_right_too():
    model, optimizer = make()
    report = archzoo.swap(model, {"0": "paon"}, optimizer=optimizer)
    step(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    archzoo.unswap(report)
    assert groups(model, optimizer) == [["0.weight", "2.weight"], ["0.bias", "2.bias"]]


def test_groups_that_changed_since_are_left_alone():
    model, optimizer = make()
    report = archzoo.swap(model, {"0": "paon"}, optimizer=optimizer)
    optimizer.param_groups[1]["params"].pop()
    with pytest.raises(ValueError, match="parameter group 1 has changed since"):
        archzoo.unswap(report)
    assert isinstance(model[0], archzoo.PaonLinear)


def test_an_old_module_in_a_wrapper_keeps_its_state():
    model, optimizer = make()
    state = optimizer.state[model[0].weight]
    archzoo.swap(model, {"0": lambda module: nn.Sequential(module, nn.Linear(8, 8))}, optimizer=optimizer)
    assert optimizer.state[model[0][0].weight] is state
    assert groups(model, optimizer) == [["0.0.weight", "0.1.weight", "2.weight"], ["0.0.bias", "0.1.bias", "2.bias"]]


def test_parameters_in_no_group_have_new_ones_in_none():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    archzoo.swap(model, {nn.Linear: "paon"}, optimizer=optimizer)
    assert all(name.startswith("1.") for name in groups(model, optimizer)[0])


@pytest.mark.parametrize(
    ("optimizer", "rules", "message"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), {"0": "kan"}, "LBFGS: .* make a new one after the swap"),
        (lambda model: torch.optim.SGD([nn.Parameter(torch.ones(2))]), {"0": "kan"}, "has none of the parameters"),
        (
            lambda model: torch.optim.SGD(model.parameters()),
            {"1": lambda module: nn.PReLU()},
            r"1 had no parameter, .*\.add_param_group",
        ),
    ],
    ids=["lbfgs", "another_models", "no_group"],
)
def test_what_cannot_be_put_right_is_refused_before_anything_changes(optimizer, rules, message):
    model, _ = make()
    optimizer = optimizer(model)
    before = [id(m) for m in model.modules()], [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=message):
        archzoo.swap(model, rules, optimizer=optimizer)
    assert before == ([id(m) for m in model.modules()], [id(p) for p in optimizer.param_groups[0]["params"]])
