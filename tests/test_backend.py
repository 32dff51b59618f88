"""Which implementation an op takes: the context manager and what it does inside a compiled function."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from archzoo.kernels import _backend, use_backend
from archzoo.kernels._backend import wants_triton
from tests.helpers import run_python, without


@pytest.fixture
def triton_is_possible(monkeypatch):
    """As if triton were here and TRITON_INTERPRET=1 had been set; no kernel is launched."""
    monkeypatch.setattr(_backend, "HAS_TRITON", True)
    monkeypatch.setattr(_backend, "INTERPRET", True)


class _Cuda:
    is_cuda: ClassVar[bool] = True


def test_by_default_only_a_cuda_tensor_takes_triton():
    assert not wants_triton(torch.zeros(1))
    assert wants_triton(_Cuda()) is _backend.HAS_TRITON


@pytest.mark.usefixtures("triton_is_possible")
def test_inside_the_context_every_tensor_takes_what_was_asked_for():
    x = torch.zeros(1)
    with use_backend("triton"):
        assert wants_triton(x)
        with use_backend("torch"):
            assert not wants_triton(x)
            assert not wants_triton(_Cuda())
        assert wants_triton(x)
    assert not wants_triton(x)


@pytest.mark.usefixtures("triton_is_possible")
def test_one_context_can_be_entered_again_even_inside_itself():
    triton, x = use_backend("triton"), torch.zeros(1)
    for _ in range(2):
        with triton:
            with triton:
                assert wants_triton(x)
            assert wants_triton(x)
        assert not wants_triton(x)


@pytest.mark.usefixtures("triton_is_possible")
def test_an_exception_restores_what_was_chosen_before():
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert not wants_triton(torch.zeros(1))


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match=rf"name must be 'torch' or 'triton', got {name!r}"):
        use_backend(name)


def test_triton_is_refused_where_nothing_can_run_it(monkeypatch):
    monkeypatch.setattr(_backend, "HAS_TRITON", True)
    monkeypatch.setattr(_backend, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device, or TRITON_INTERPRET=1"):
        use_backend("triton")
    with use_backend("torch"):
        assert not wants_triton(torch.zeros(1))


def test_without_triton_installed_torch_is_taken_and_triton_refused():
    run_python(
        without(["triton"]) + "import torch\n"
        "from archzoo.kernels import use_backend, _backend\n"
        "class Cuda: is_cuda = True\n"
        "assert not _backend.wants_triton(Cuda())\n"
        "try:\n"
        "    use_backend('triton')\n"
        "except RuntimeError as error:\n"
        "    assert 'triton is not installed' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('not refused')\n",
        env={"TRITON_INTERPRET": "1"},
    )


@pytest.mark.usefixtures("triton_is_possible")
def test_compiled_code_can_enter_the_context_and_follows_it_from_outside():
    def which(x: Tensor) -> Tensor:
        return x + 1 if wants_triton(x) else x - 1

    def enters(x: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend("triton"):
            inside = which(x)
        return inside, which(x)

    torch._dynamo.reset()
    x = torch.zeros(3)
    inside, outside = torch.compile(enters, fullgraph=True, backend="eager")(x)
    assert inside.tolist() == [1, 1, 1]
    assert outside.tolist() == [-1, -1, -1]
    compiled = torch.compile(which, fullgraph=True, backend="eager")
    for _ in range(2):
        assert compiled(x).tolist() == [-1, -1, -1]
        with use_backend("triton"):
            assert compiled(x).tolist() == [1, 1, 1]
    torch._dynamo.reset()
