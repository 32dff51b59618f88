"""Random configurations train a step, or are refused by name in a moment with nothing written.

`python -m benchmarks fuzz --record` runs 5,000.
"""

import random

import pytest

from tests.fuzz.configs import BASES, SHORT, case, fuzz


def findings(seeds):
    tally = fuzz(seeds)
    assert not tally.findings, "\n".join(map(str, tally.findings))
    return tally


def test_a_few_configurations():
    tally = findings(range(16))
    assert tally.counts["trained"] >= 2
    assert tally.counts["refused"] >= 6


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 10_400, 100))
def test_hundreds_of_configurations(first):
    findings(range(first, first + 100))


def test_a_case_is_its_seed():
    cases = [case(seed) for seed in range(40)]  # whose choices the test above has composed
    assert cases == [case(seed) for seed in range(40)]
    assert len({c.words for c in cases}) == 40
    random.seed(1)
    before = random.getstate()
    case(3)
    assert random.getstate() == before
    assert all(set(SHORT) <= set(c.words) for c in cases)
    assert len(BASES) >= 20
