import json
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import nn

from archzoo.training import checkpoint
from archzoo.training.checkpoint import (
    CheckpointError,
    get_random_state,
    get_state,
    list_checkpoints,
    load_checkpoint,
    pack_tensors,
    save_checkpoint,
    set_random_state,
    set_state,
    sweep_partial,
)

TENSORS = {"training": {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(7)}, "best": {}}


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path / "checkpoints", 12, TENSORS, {"note": [1, 2.5, "x"]}, keep=2)


def test_what_is_saved_is_loaded(saved):
    tensors, state = load_checkpoint(saved)
    assert torch.equal(tensors["training"]["a"], TENSORS["training"]["a"])
    assert tensors["training"]["b"].dtype == torch.int64
    assert tensors["best"] == {}
    assert state == {"format": 1, "step": 12, "note": [1, 2.5, "x"]}


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000100", "step_00000015"]


def test_the_same_step_can_be_saved_again(tmp_path):
    save_checkpoint(tmp_path, 5, TENSORS, {"try": 1}, keep=2)
    assert load_checkpoint(save_checkpoint(tmp_path, 5, TENSORS, {"try": 2}, keep=2))[1]["try"] == 2


def test_a_writer_that_fails_leaves_the_older_one_and_nothing_half_written(saved, monkeypatch):
    def full(path, *parts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(saved.parent, 20, TENSORS, {}, keep=2)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    load_checkpoint(saved)


def test_what_a_killed_writer_left_is_not_a_checkpoint_and_is_swept(saved):
    shutil.copytree(saved, saved.parent / "step_00000020.tmp-123")
    assert list_checkpoints(saved.parent) == [saved]
    sweep_partial(saved.parent)
    assert list(saved.parent.iterdir()) == [saved]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.data())
def test_no_damage_goes_unnoticed(saved, tmp_path, data):
    copy = tmp_path / "damaged" / saved.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy)
    file = copy / data.draw(st.sampled_from(sorted(p.name for p in saved.iterdir())))
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "zero", "delete", "swap"]))
    if kind == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "zero":
        file.write_bytes(bytes(len(content)))
    elif kind == "delete":
        file.unlink()
    else:
        file.write_bytes((copy / "state.json").read_bytes() + b" ")
    try:
        loaded, state = load_checkpoint(copy)
    except CheckpointError as error:
        assert str(copy) in str(error)
    else:  # only the manifest has bytes that do not count, as white space
        assert file.name == "manifest.json"
        original, original_state = load_checkpoint(saved)
        assert state == original_state
        assert all(torch.equal(loaded["training"][k], t) for k, t in original["training"].items())


def test_a_manifest_cannot_point_outside(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["../../x"] = {"bytes": 1, "sha256": "0"}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        load_checkpoint(saved)


def _trained(optimizer_class=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = optimizer_class(model.parameters(), **options)
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.9)}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.1}),  # no state at all
    ],
)
def test_model_and_optimizer_go_on_bit_for_bit(tmp_path, optimizer_class, options):
    model, optimizer = _trained(optimizer_class, **options)
    tensors, numbers = get_state(model, optimizer)
    path = save_checkpoint(tmp_path, 3, {"training": tensors}, {"optimizer": numbers}, keep=1)
    x = torch.randn(5, 3)

    def one_more(model, optimizer):
        model(x).square().sum().backward()
        optimizer.step()
        return {k: v.clone() for k, v in model.state_dict().items()}

    expected = one_more(model, optimizer)
    torch.manual_seed(99)
    fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    fresh_optimizer = optimizer_class(fresh.parameters(), **{**options, "lr": 0.77})
    loaded, state = load_checkpoint(path)
    set_state(fresh, fresh_optimizer, loaded["training"], state["optimizer"])
    resumed = one_more(fresh, fresh_optimizer)
    assert all(torch.equal(resumed[k], v) for k, v in expected.items())


def test_what_l_bfgs_remembers_goes_on_bit_for_bit(tmp_path):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        options = {"max_iter": 8, "history_size": 4, "line_search_fn": "strong_wolfe"}
        return model, torch.optim.LBFGS(model.parameters(), **options)

    x = torch.randn(9, 3)

    def step(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = (model(x).square() - 0.3).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    model, optimizer = made()
    for steps in range(4):  # none: no memory yet
        tensors, numbers = get_state(model, optimizer)
        path = save_checkpoint(tmp_path, steps, {"training": tensors}, {"optimizer": numbers}, keep=9)
        fresh, fresh_optimizer = made()
        loaded, state = load_checkpoint(path)
        set_state(fresh, fresh_optimizer, loaded["training"], state["optimizer"])
        step(model, optimizer), step(fresh, fresh_optimizer)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
        memory, copy = optimizer.state[model[0].weight], fresh_optimizer.state[fresh[0].weight]
        assert memory.keys() == copy.keys()
        assert len(memory["old_dirs"]) == len(copy["old_dirs"]) <= 4
        assert (memory["n_iter"], memory["prev_loss"]) == (copy["n_iter"], copy["prev_loss"])
    assert len(memory["old_dirs"]) == 4


def test_a_parameter_without_moments_beside_others_has_none_when_loaded():
    model, optimizer = _trained()
    del optimizer.state[model[0].weight]  # as right after a grid update
    tensors, numbers = get_state(model, optimizer)
    other, other_optimizer = _trained()
    set_state(other, other_optimizer, tensors, numbers)
    assert other_optimizer.state.keys() == set(other.parameters()) - {other[0].weight}


def test_another_models_checkpoint_is_refused():
    tensors, numbers = get_state(*_trained())
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    with pytest.raises(CheckpointError, match="another model"):
        set_state(other, torch.optim.AdamW(other.parameters()), tensors, numbers)


def test_random_generators_go_on_where_they_were():
    state = json.loads(json.dumps(get_random_state()))
    drawn = torch.randn(3), random.random(), np.random.rand()
    set_random_state(state)
    again = torch.randn(3), random.random(), np.random.rand()
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]


def test_a_tensor_of_one_element_is_stored_whatever_its_stride():
    odd = torch.arange(14.0, dtype=torch.float64).reshape(2, 7)[1:, 3]
    assert odd.stride() == (7,)
    assert torch.equal(load(pack_tensors({"odd": odd, "none": odd[:0], "number": odd[0]}))["odd"], odd)
