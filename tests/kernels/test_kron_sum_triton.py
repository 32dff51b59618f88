"""`kron_sum` and `kron_linear` on Triton against `torch.kron`. Without `_triton`: the torch path."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import kron_sum as module
from archzoo.kernels import use_backend
from archzoo.kernels.kron_sum import (
    kron_linear,
    kron_linear_op,
    kron_linear_reference,
    kron_sum,
    kron_sum_op,
    kron_sum_reference,
)
from tests.helpers import rms_error, value_and_grads
from tests.kernels.triton_support import (
    DEVICE,
    DTYPES,
    OF_TILES,
    check_compiles,
    check_peak_memory,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
)

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks():
    """Several programs along every axis, of several steps each."""
    from archzoo.kernels._kron_sum_triton import BACKWARD, FORWARD

    with FORWARD.forced(BLOCKS=2, ELEMENTS=16), BACKWARD.forced(BLOCKS=8, ELEMENTS=8, STEPS=2):
        yield


def problem(rows, A_shape, block, dtype=torch.float64):
    """x, A, S, and a cotangent of x H^T; more rows than the factored path takes."""
    (n, P, Q), (K, D) = A_shape, block
    assert rows == 0 or rows * n > Q * D
    x, A, S = torch.randn(rows, Q * D), torch.randn(n, P, Q), torch.randn(n, K, D)
    return [t.to(dtype) for t in (x, A, S)], torch.randn(rows, P * K).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [((4, 3, 5), (7, 9)), ((2, 2, 2), (3, 8)), ((1, 1, 1), (1, 1))], ids=str)
def test_values_and_gradients_of_the_sum(shape, dtype):
    (_, A, S), _ = problem(0, *shape, dtype)
    dH = torch.randn(kron_sum_reference(A, S).shape).to(dtype)
    check_values(kron_sum, kron_sum_reference, (A, S), dH, [0, 1])


@pytest.mark.parametrize("dtype", OF_TILES, ids=str)
@pytest.mark.usefixtures("blocks")
def test_programs_steps_and_chunks(dtype):
    inputs, dy = problem(9, (3, 3, 5), (5, 5), dtype)
    check_values(kron_linear, kron_linear_reference, inputs, dy, [1, 2])


def test_groups_of_rows_and_columns_of_the_sum(monkeypatch):
    monkeypatch.setattr(module, "_CPU_BLOCK", 1)
    monkeypatch.setattr(module, "_GPU_BLOCK", 1)
    inputs, dy = problem(7, (3, 2, 2), (5, 8))
    check_values(kron_linear, kron_linear_reference, inputs, dy, [1, 2])


@pytest.mark.parametrize("rows", [1, 0])
def test_few_rows_are_factored(rows):
    x, A, S = torch.randn(rows, 12), torch.randn(2, 2, 2), torch.randn(2, 5, 6)
    check_values(kron_linear, kron_linear_reference, (x, A, S), torch.randn(rows, 10), [1, 2])


def test_strides_expansion_mixed_dtypes_and_leading_dimensions():
    (x, A, S), dy = problem(12, (2, 2, 2), (3, 8))
    turned = x.t().contiguous().t(), A[:1].expand(2, 2, 2), S.mT.contiguous().mT
    reference = lambda x, A, S: kron_linear_reference(x, A.contiguous(), S.contiguous())  # noqa: E731 - kron needs it
    check_values(kron_linear, reference, turned, dy[:, :1].expand_as(dy), [1, 2])
    mixed = x.view(2, 6, -1).float(), A.float(), S.bfloat16()
    check_values(kron_linear, kron_linear_reference, mixed, dy.view(2, 6, -1).float(), [1, 2])


def test_nan_comes_through():
    (x, A, S), _ = problem(12, (2, 2, 2), (3, 8))
    S[1, 1, 2] = torch.nan
    H = kron_sum(A, S).isnan()
    assert H.sum() == 4
    assert H[1, 2]
    A[0, 1, 0] = torch.nan
    assert kron_sum(A, torch.ones_like(S))[3:, :8].isnan().all()
    assert kron_linear(x, A, S).isnan().any(0)[3:].all()


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_that_nobody_needs_are_left_out(wanted):
    inputs, dy = problem(9, (2, 2, 2), (3, 8))
    truth = value_and_grads(kron_linear_reference, inputs, dy)[1 + wanted]
    leaves = [t.requires_grad_(index == wanted) for index, t in enumerate(inputs)]
    kron_linear(*leaves).backward(dy)
    assert rms_error(leaves[wanted].grad, truth) < 1e-11
    assert [t.grad is not None for t in leaves] == [index == wanted for index in range(3)]


def test_gradcheck():
    leaves = [t.requires_grad_() for t in problem(5, (2, 1, 2), (2, 3))[0]]
    assert torch.autograd.gradcheck(kron_linear, leaves, fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck():
    (x, A, S), dy = problem(9, (2, 2, 2), (3, 8), torch.float32)
    x, A, S = (t.requires_grad_() for t in (x, A, S))
    opcheck(kron_linear_op.op, (x, A, S, True))
    opcheck(kron_sum_op.op, (A, S, torch.bfloat16, True))
    x, A, S = (t.detach() for t in (x, A, S))
    opcheck(kron_linear_op.backward_op, (dy, x, A, S, [False, True, False], True))
    opcheck(kron_sum_op.backward_op, (torch.randn(6, 16), A, S, torch.float32, [True] * 2, True))


@pytest.mark.usefixtures("blocks")
def test_compile_export_repeat_and_refusals():
    inputs, dy = problem(9, (2, 2, 2), (3, 8), torch.float32)
    check_compiles(kron_linear, inputs, dy, "kron_linear")
    check_repeats(kron_linear, inputs, dy)
    check_refusals(kron_linear, inputs)
    dH = kron_sum_reference(*inputs[1:])
    check_compiles(kron_sum, inputs[1:], dH, "kron_sum")
    check_refusals(kron_sum, inputs[1:])


def test_autocast_multiplies_in_bfloat16():
    inputs, dy = problem(12, (2, 2, 2), (3, 8), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, *gradients = value_and_grads(kron_linear, inputs, dy.bfloat16())
        assert kron_sum(*inputs[1:]).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in gradients} == {torch.float32}
    truth = value_and_grads(kron_linear_reference, [t.double() for t in inputs], dy.double())
    assert all(rms_error(a, b) < 1e-2 for a, b in zip((y, *gradients), truth, strict=True))


@pytest.mark.plain_memory
def test_memory():
    from archzoo.kernels._kron_sum_triton import BACKWARD, FORWARD

    inputs, dy = problem(1024, (2, 2, 2), (128, 128), torch.float32)
    with FORWARD.forced(BLOCKS=2, ELEMENTS=8192), BACKWARD.forced(BLOCKS=4, ELEMENTS=8192, STEPS=2):
        check_peak_memory(kron_linear, inputs, dy)
