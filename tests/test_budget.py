import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from archzoo.budget import LARGEST_VALUE, count_flops, count_parameters, match_option, match_widths, measure_cost


def test_parameters_are_counted_once_each():
    shared = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(shared, nn.ReLU(), shared)) == 12
    shared.bias.requires_grad_(False)
    assert count_parameters(shared, trainable_only=True) == 9


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("module", "flops"),
    [
        (nn.Linear(5, 7, bias=False), 2 * 5 * 7),
        (nn.ReLU(), 5),
        (nn.SiLU(), 5),
        (nn.LayerNorm(5), 8 * 5),
        (nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 2, bias=False)), 70 + 7 + 28),
    ],
    ids=str,
)
def test_flops_of_a_forward_pass(module, flops, device):
    assert count_flops(module.to(device), torch.zeros(1, 5, device=device)) == flops
    assert count_flops(module, torch.zeros(3, 5, device=device)) == 3 * flops


def test_the_cost_of_a_step():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    cost = measure_cost(model, torch.zeros(10, 8))
    assert cost.parameters == 8 * 16 + 16 + 16 * 4 + 4
    # the batch for the first weight's gradient, and tanh's output for its own and the second weight's
    assert cost.saved_bytes == 4 * (10 * 8 + 10 * 16)
    assert cost.traffic_bytes > cost.saved_bytes
    assert all(p.grad is None for p in model.parameters())


def mlp(widths, inputs=64, outputs=10, each=1):
    sizes = [inputs, *widths, outputs]
    return sum(each * a * b + b for a, b in zip(sizes, sizes[1:], strict=False))


@given(depth=st.integers(2, 3), each=st.sampled_from([1, 2, 9]), target=st.integers(20_000, 300_000))
def test_matched_counts_come_within_a_percent(depth, each, target):
    match = match_widths(lambda widths: mlp(widths, each=each), depth, target, 0.01)
    assert match.count == mlp(match.widths, each=each)
    assert abs(match.deviation) <= 0.01
    assert len(match.widths) == depth


@given(step=st.sampled_from([2, 4, 8]), target=st.integers(20_000, 300_000))
def test_only_allowed_widths_are_chosen(step, target):
    def count(widths):
        return None if any(w % step for w in widths) else mlp(widths)

    match = match_widths(count, 2, target, 0.02)
    assert all(w % step == 0 for w in match.widths)
    assert abs(match.deviation) <= 0.02


def test_equal_widths_are_preferred_and_others_are_near():
    assert match_widths(mlp, 2, mlp((50, 50)), 0.01).widths == (50, 50)
    narrow = match_widths(lambda widths: mlp(widths, each=9), 2, 9_226, 0.01)
    assert len(set(narrow.widths)) == 2
    assert max(narrow.widths) <= 1.5 * min(narrow.widths)


def test_no_single_width_is_nearer():
    def count(widths):
        return mlp(widths, each=9)

    match = match_widths(count, 1, 5_000, 1e-9)
    assert abs(match.count - 5_000) == min(abs(count((w,)) - 5_000) for w in range(1, 200))


def test_a_target_below_the_smallest_count_is_refused_with_that_count():
    with pytest.raises(ValueError, match=r"the smallest reachable count is 85 \(width 1\)"):
        match_widths(mlp, 1, 7, 0.01)


def test_a_layer_that_allows_no_width_is_refused():
    with pytest.raises(ValueError, match="no width up to 256"):
        match_widths(lambda widths: None, 2, 1000, 0.01)


@given(edges=st.integers(1, 50), offset=st.integers(0, 9), target=st.integers(1_000, 100_000))
def test_the_value_of_an_option_comes_as_near_as_can_be(edges, offset, target):
    match = match_option(lambda value: edges * (value + offset), "grid_size", target, 0.5, (5, 5))
    assert (match.widths, match.option) == ((5, 5), "grid_size")
    assert match.value is not None
    assert match.count == edges * (match.value + offset)
    assert abs(match.count - target) <= edges / 2


def test_only_allowed_values_of_an_option_are_chosen():
    match = match_option(lambda value: 10 * value if value % 3 == 0 else None, "n", 100, 0.5, ())
    assert (match.value, match.count) == (9, 90)


@pytest.mark.parametrize("count", [lambda value: 7, lambda value: 1000 // value], ids=["constant", "falling"])
def test_an_option_that_does_not_add_to_the_count_is_refused(count):
    with pytest.raises(ValueError, match=r"the count does not grow with n: it is \S+ at n=1 and \S+ at n=2"):
        match_option(count, "n", 100, 0.01, ())


def test_the_search_for_a_value_ends():
    match = match_option(lambda value: min(value, 50), "n", 100, 0.01, ())
    assert match.count == 50
    assert match.value is not None
    assert match.value <= LARGEST_VALUE


def test_a_target_below_the_smallest_count_names_the_option():
    with pytest.raises(ValueError, match=r"the smallest reachable count is 30 \(grid_size 1\)"):
        match_option(lambda value: 10 * (value + 2), "grid_size", 12, 0.01, ())
    with pytest.raises(ValueError, match="no grid_size up to 256 is allowed"):
        match_option(lambda value: None, "grid_size", 12, 0.01, ())
