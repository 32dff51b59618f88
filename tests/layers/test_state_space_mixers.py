"""What Mamba, Mamba-2 and Mamba-3 promise alike: steps, chunks, caches, packed sequences, padding, the past alone."""

import copy

import pytest
import torch
from torch import nn

from archzoo.layers._cache import StateCache, cache_for
from archzoo.layers.mamba import Mamba, SelectiveSSM, seq_idx_from_cu_seqlens
from archzoo.layers.mamba2 import Mamba2
from archzoo.layers.mamba3 import Mamba3
from tests.helpers import assert_all_close, layer_value_and_grads, rms_error

D = torch.float64
SMALL2, SMALL3 = {"d_state": 4, "headdim": 3, "chunk_size": 4}, {"d_state": 7, "headdim": 3, "chunk_size": 4}
CASES = {
    "mamba": (Mamba, {"d_state": 4, "dt_rank": 2}),
    "mamba, biases": (Mamba, {"d_state": 4, "dt_rank": 2, "bias": True, "conv_bias": False}),
    "mamba2": (Mamba2, SMALL2),
    "mamba2, groups": (Mamba2, {**SMALL2, "ngroups": 2, "norm_before_gate": True}),
    "mamba2, no norm": (Mamba2, {**SMALL2, "rmsnorm": False, "D_has_hdim": True}),
    "mamba2, biases": (
        Mamba2,
        {**SMALL2, "bias": True, "conv_bias": False, "d_conv": 2, "expand": 1.5, "dt_limit": (0.01, 0.02)},
    ),
    "mamba3": (Mamba3, SMALL3),
    "mamba3, groups": (Mamba3, {**SMALL3, "ngroups": 2, "is_outproj_norm": True, "A_floor": 0.9}),
    "mamba3, all turn": (Mamba3, {**SMALL3, "rope_fraction": 1, "d_state": 5, "expand": 1.5}),
}
every_case = pytest.mark.parametrize("case", CASES)
one_of_each = pytest.mark.parametrize("case", ["mamba", "mamba2", "mamba3"])


def build(case):
    torch.manual_seed(0)
    cls, options = CASES[case]
    layer = cls(6, dtype=D, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if cls is Mamba3:
            layer.in_proj.weight *= 2  # decays, ends of intervals and angles that differ
            layer.dt_bias += 2
    return layer


def tokens(batch=2, length=9, seed=1):
    return torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed), dtype=D)


class Whole(nn.Module):
    """A layer as another way to run it sees it, so that gradients have the names of its parameters."""

    def __init__(self, layer, run):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x):
        return self.run(self.layer, x)


def assert_the_same_with_gradients(layer, x, run):
    got = {name.removeprefix("layer."): t for name, t in layer_value_and_grads(Whole(layer, run), x).items()}
    assert_all_close(got, layer_value_and_grads(layer, x), "another way")


# --- States -----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("length", [0, 1, 3, 4, 9])
def test_steps_equal_one_forward_and_leave_the_same_state(case, length):
    layer, x = build(case), tokens(length=length)
    want, want_states = layer(x, return_state=True)
    states = layer.allocate_inference_cache(2, max_seqlen=100)
    assert [s.shape for s in states] == [s.shape for s in want_states]
    with torch.no_grad():
        for t in range(length):
            y, *returned = layer.step(x[:, t : t + 1], *states)
            assert all(a is b for a, b in zip(returned, states, strict=True)), "in place"
            assert rms_error(y, want[:, t : t + 1]) < 1e-12
    for got, state in zip(states, want_states, strict=True):
        assert (got - state).abs().max() < 1e-12
        assert state.is_contiguous()


@one_of_each
@pytest.mark.parametrize("chunks", [[4, 5], [1, 0, 1, 7], [2, 3, 4]], ids=str)
def test_chunks_equal_the_whole_gradients_included(case, chunks):
    def in_chunks(layer, x):
        ys, state = [], None
        for part in x.split(chunks, 1):
            y, state = layer(part, state=state, return_state=True)
            ys.append(y)
        return torch.cat(ys, 1)

    assert_the_same_with_gradients(build(case), tokens(), in_chunks)


@every_case
def test_steps_can_be_trained_through(case):
    def by_steps(layer, x):
        states = layer.allocate_inference_cache(2)
        return torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)

    assert_the_same_with_gradients(build(case), tokens(length=5), by_steps)


@one_of_each
def test_a_prompt_in_one_go_then_steps_in_a_cache(case):
    layer, x = build(case), tokens()
    want, cache = layer(x), cache_for(layer)
    assert isinstance(cache, StateCache)
    with torch.no_grad():
        parts = [cache.mix(layer, part) for part in x.split([5, 1, 1, 2], 1)]
    assert rms_error(torch.cat(parts, 1), want) < 1e-12


@one_of_each
def test_states_survive_a_copy_and_a_new_order_of_the_batch(case):
    layer, x = build(case), tokens(batch=3)
    want = layer(x)
    with torch.no_grad():
        _, states = layer(x[:, :4], return_state=True)
        kept = copy.deepcopy(states)
        layer.step(x[:, 4:5], *states)
        rows = torch.tensor([2, 0, 0])
        y, *_ = layer.step(x[rows, 4:5], *(state[rows] for state in kept))
    assert rms_error(y, want[rows, 4:5]) < 1e-12


@one_of_each
def test_a_step_can_be_exported(case):
    layer, x = build(case).eval(), tokens(length=1)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, *states):
            return self.layer.step(x, *states)

    with torch.no_grad():
        states = layer(tokens(seed=3), return_state=True)[1]
        program = torch.export.export(Step(), (x, *copy.deepcopy(states))).module()
        got = program(x, *copy.deepcopy(states))
        want = layer.step(x, *states)
    assert all(rms_error(a, b) < 1e-13 for a, b in zip(got, want, strict=True))


# --- The past alone, packing and padding ------------------------------------------------------------------------------


@one_of_each
def test_nothing_looks_ahead(case):
    layer, x = build(case), tokens()
    assert layer.causal
    later = x.clone()
    later[:, 5:] += 1
    assert rms_error(layer(later)[:, :5], layer(x)[:, :5]) < 1e-14
    assert rms_error(layer(later)[:, 5:], layer(x)[:, 5:]) > 1e-2


@one_of_each
def test_packed_sequences_equal_each_by_itself(case):
    layer, x = build(case), tokens(batch=1, length=12)
    state = layer(tokens(batch=1, seed=5), return_state=True)[1]
    seq_idx = seq_idx_from_cu_seqlens(torch.tensor([0, 2, 3, 12]), 12)
    first, second, third = x.split([2, 1, 9], 1)
    y, own_state = layer(third, return_state=True)
    alone = torch.cat([layer(first, state=state), layer(second), y], 1)
    packed, packed_state = layer(x, seq_idx=seq_idx, state=state, return_state=True)
    assert rms_error(packed, alone) < 1e-12
    assert all(rms_error(a, b) < 1e-12 for a, b in zip(packed_state, own_state, strict=True))
    assert rms_error(layer(x), alone) > 1e-3


def test_packed_sequences_of_the_bare_scan_too():
    torch.manual_seed(0)
    layer, x = SelectiveSSM(6, dtype=D), tokens(batch=1, length=12)
    seq_idx = seq_idx_from_cu_seqlens(torch.tensor([0, 2, 3, 12]), 12)
    alone = torch.cat([layer(part) for part in x.split([2, 1, 9], 1)], 1)
    assert rms_error(layer(x, seq_idx=seq_idx), alone) < 1e-12
    assert rms_error(layer(x), alone) > 1e-3


@one_of_each
@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_packed_row_can_be_gone_on_from(case, last):
    """The state knows nothing of the sequences before the last one, however short that is."""
    layer, x = build(case), tokens(batch=1, length=12)
    seq_idx = torch.tensor([[0] * (8 - last) + [1] * last])
    _, state = layer(x[:, :8], seq_idx=seq_idx, return_state=True)
    assert rms_error(layer(x[:, 8:], state=state), layer(x[:, 8 - last :])[:, last:]) < 1e-12
    y = layer(x[:, 8:], state=state, seq_idx=torch.tensor([[1, 1, 4, 4]]))
    assert rms_error(y[:, :2], layer(x[:, 8 - last :])[:, last : last + 2]) < 1e-12
    assert rms_error(y[:, 2:], layer(x[:, 10:])) < 1e-12


@every_case
def test_padding_on_the_left_leaves_no_trace(case):
    layer, x = build(case), tokens()
    padded = torch.cat([tokens(length=3, seed=4), x], 1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, :3] = False
    want, want_states = layer(x, return_state=True)
    y, states = layer(padded, mask=mask, return_state=True)
    assert rms_error(y[:, 3:], want) < 1e-12
    assert all(rms_error(a, b) < 1e-12 for a, b in zip(states, want_states, strict=True))
    assert rms_error(layer(padded)[:, 3:], want) > 1e-3
