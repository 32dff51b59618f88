"""A KAN in each of its states, and a library of functions that comes back as it was."""

from collections.abc import Iterator

import pytest
import torch

from archzoo.models.symbolic import FUNCTIONS
from tests.models.kan_networks import MIXED, STATES, generic, samples


@pytest.fixture(params=STATES)
def any_state(request):
    torch.manual_seed(3)
    model = generic(**MIXED)
    STATES[request.param](model, samples(60, 3))
    return model


@pytest.fixture
def own_functions() -> Iterator[None]:
    """Takes the functions that a test adds out of the library again."""
    known = set(FUNCTIONS)
    yield
    for name in set(FUNCTIONS) - known:
        del FUNCTIONS[name]
