"""The fixture by which a test runs on both backends."""

from collections.abc import Iterator

import pytest

from archzoo.kernels import use_backend
from tests.kernels.triton_support import needs_triton, on_device


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which backend all ops of a test use; new tensors are on the GPU if there is one, or else on the CPU."""
    with on_device(), use_backend(request.param):
        yield request.param
