"""What all tests share: one thread, seeds, fresh memory filled with NaN, and what was logged."""

import gc
import logging
import os
from collections.abc import Generator, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter then. Before archzoo is imported, which decides by it.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # so that `pytest -n` does not oversubscribe the cores, and that sums have one order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it on a GPU
    torch.backends.cudnn.allow_tf32 = False  # which it is for no other products: float32 is held to what it can do
    config.addinivalue_line("markers", "plain_memory: fresh memory is not filled with NaN in this test")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting makes millions of objects that stay: looking through them again and again is a third of its time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()  # nor is what the tests set off to look through them
        gc.enable()


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` prints the stack thrice for devices that are not there
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


class Logs(logging.Handler):
    """What was logged since it was made: `records`, and their messages as `text`."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def text(self) -> str:
        return "\n".join(record.getMessage() for record in self.records)


@pytest.fixture
def logs() -> Iterator[Logs]:
    """What a test logs. Stands in for `caplog`, whose plugin visits all loggers of torch six times in every test."""
    handler = Logs()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


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
