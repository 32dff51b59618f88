import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from archzoo.report.stats import (
    holm,
    mean_interval,
    seeds_needed,
    sign_flip_p,
    smallest_p,
    welch_interval,
    wilson,
)

values = st.lists(st.floats(-100, 100), min_size=2, max_size=9)


@given(values)
def test_few_seeds_have_students_interval(sample):
    interval = mean_interval(sample)
    if interval.method == "constant":
        assert interval.low == interval.high == interval.mean == sample[0]
        return
    error = scipy_stats.sem(sample)
    low, high = scipy_stats.t.interval(0.95, len(sample) - 1, np.mean(sample), error if error else 1e-300)
    assert interval.method == "t"
    assert [interval.low, interval.high] == pytest.approx([low, high], rel=1e-6, abs=1e-9)


def test_from_ten_seeds_on_it_is_a_bootstrap_that_repeats_itself():
    sample = list(np.random.default_rng(3).normal(size=10))
    first = mean_interval(sample)
    assert first.method == "BCa"
    assert first == mean_interval(sample)
    assert mean_interval(sample[:9]).method == "t"
    assert first.low is not None
    assert first.high is not None
    assert first.low < first.mean < first.high


def test_a_bootstrap_covers_the_mean_of_a_skewed_law_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        interval = mean_interval(list(rng.exponential(size=20)))
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 1 <= interval.high
    assert 0.85 <= hits / 200 <= 0.99


def test_one_value_has_no_interval_and_none_is_refused():
    assert (mean_interval([2.0]).low, mean_interval([2.0]).method) == (None, "none")
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


@pytest.mark.parametrize("count", [2, 9, 10, 30])
def test_equal_values_have_an_interval_without_width(count):
    interval = mean_interval([0.1] * count)
    assert (interval.low, interval.mean, interval.high, interval.method) == (0.1, 0.1, 0.1, "constant")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=8))
def test_the_test_is_the_exact_sign_flip_test(differences):
    observed = abs(sum(differences))
    flips = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    # Two-sided by doubling the one-sided p; the law is symmetric.
    expected = min(1.0, 2 * sum(flip >= observed for flip in flips) / len(flips))
    assert sign_flip_p([float(d) for d in differences]) == pytest.approx(expected)


def test_three_seeds_cannot_give_less_than_a_quarter_and_six_can_reach_five_per_cent():
    assert sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(0.25) == pytest.approx(smallest_p(3))
    assert sign_flip_p([1.0, 1.1, 1.2, 1.3, 1.4]) == pytest.approx(0.0625)
    assert sign_flip_p([1.0, 1.1, 1.2, 1.3, 1.4, 1.5]) == pytest.approx(0.03125)
    assert seeds_needed() == 6
    assert sign_flip_p([1.0]) is None
    assert sign_flip_p([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("comparisons", range(1, 40))
def test_seeds_needed_is_the_fewest(comparisons):
    seeds = seeds_needed(comparisons)
    assert smallest_p(seeds) * comparisons <= 0.05 < smallest_p(seeds - 1) * comparisons


def test_many_pairs_are_tested_by_random_flips_that_repeat_themselves():
    differences = list(np.random.default_rng(1).normal(0.4, 1, size=30))
    p = sign_flip_p(differences)
    assert p == sign_flip_p(differences)
    assert p == pytest.approx(scipy_stats.ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_the_test_keeps_its_level():
    rng = np.random.default_rng(5)
    p_values = [sign_flip_p(list(rng.normal(size=7))) for _ in range(400)]
    assert sum(p is not None and p <= 0.05 for p in p_values) / 400 <= 0.08


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=10))
def test_holm_never_lowers_a_p_and_keeps_their_order(p_values):
    corrected = holm(p_values)
    assert all(c is not None and p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [corrected[i] for i in order] == sorted(corrected[i] for i in order)


def test_welch_interval_is_scipys():
    a, b = [1.0, 2.0, 3.5], [2.0, 2.5, 9.0, 4.0]
    interval = welch_interval(a, b)
    expected = scipy_stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert [interval.low, interval.high] == pytest.approx([expected.low, expected.high])
    assert welch_interval([1.0], [2.0]).low is None
    assert welch_interval([1.0, 1.0], [2.0, 2.0]).method == "constant"


def test_wilson_by_hand():
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    low, high = wilson(5, 5)
    assert high == pytest.approx(1)
    assert low == pytest.approx(5 / (5 + z2))
    assert math.isclose(sum(wilson(2, 4)), 1)
