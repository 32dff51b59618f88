"""What all tests share: one thread, seeds, and fresh memory filled with NaN."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter then. Before archzoo is imported, which decides by it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # so that `pytest -n` does not oversubscribe the cores, and that sums have one order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it on a GPU
    config.addinivalue_line("markers", "plain_memory: fresh memory is not filled with NaN in this test")


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Fills what `torch.empty*` returns with NaN (integers: with their maximum), so that an unwritten element fails."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _nan_filled_memory_for_layers_and_kernels(request: pytest.FixtureRequest) -> None:
    folder = request.path.relative_to(request.config.rootpath).parts[:2]
    wanted = folder in (("tests", "layers"), ("tests", "kernels"))
    if wanted and not request.node.get_closest_marker("plain_memory"):
        request.getfixturevalue("nan_filled_memory")
