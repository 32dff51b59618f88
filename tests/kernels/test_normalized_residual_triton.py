"""`normalized_residual` on Triton against its definition. Without `_triton`: the torch path."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.normalized_residual import (
    normalized_residual,
    normalized_residual_op,
    normalized_residual_reference,
    unit,
)
from tests.helpers import sampled, value_and_grads
from tests.kernels.triton_support import (
    DTYPES,
    OF_TILES,
    check_autocast,
    check_compiles,
    check_peak_memory,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
)

pytestmark = needs_triton

ALPHA = [2]  # whose gradient is a sum over rows


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture(params=["whole rows", "by columns"])
def blocks(request, triton):
    """Several programs of several steps each, or rows that are longer than a block."""
    from archzoo.kernels._normalized_residual_triton import BACKWARD, FORWARD

    columns = 128 if request.param == "whole rows" else 16
    with FORWARD.forced(ROWS=4, COLS=columns), BACKWARD.forced(ROWS=2, COLS=columns, STEPS=2):
        yield


def problem(*shape, dtype=torch.float64):
    h, branch, dy = (torch.randn(3, *shape, dtype=torch.float64) * 3).to(dtype).unbind()
    return (h, branch, torch.rand(shape[-1], dtype=torch.float64).to(dtype)), dy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33,), (1, 2), (7, 130), (2, 3, 63), (2, 1, 2, 5), (0, 4), (2, 0, 3)], ids=str)
@pytest.mark.usefixtures("triton")
def test_values_and_gradients(shape, dtype):
    inputs, dy = problem(*shape, dtype=dtype)
    check_values(normalized_residual, normalized_residual_reference, inputs, dy, ALPHA)


@pytest.mark.parametrize("dtype", OF_TILES, ids=str)
@pytest.mark.usefixtures("blocks")
def test_programs_steps_and_columns(dtype):
    inputs, dy = problem(9, 33, dtype=dtype)
    check_values(normalized_residual, normalized_residual_reference, inputs, dy, ALPHA)


@pytest.mark.usefixtures("blocks")
def test_one_feature_is_a_sign():
    (h, branch, alpha), dy = problem(5, 1)
    y, *gradients = value_and_grads(normalized_residual, (h, branch, alpha), dy)
    assert torch.equal(y, normalized_residual_reference(h, branch, alpha))
    assert all(g.abs().max() < 1e-14 for g in gradients)


@pytest.mark.usefixtures("blocks")
def test_strides_expansion_and_mixed_dtypes():
    (h, branch, alpha), dy = problem(6, 30)
    turned = h.t().contiguous().t(), branch[:1].expand(6, -1), alpha.expand(2, -1)[0]
    check_values(normalized_residual, normalized_residual_reference, turned, dy[:, :1].expand(6, 30), ALPHA)
    mixed = h.float(), branch.bfloat16(), alpha.float()
    check_values(normalized_residual, normalized_residual_reference, mixed, dy.float(), ALPHA)


@pytest.mark.parametrize("scale", [1e-6, 1e12])
@pytest.mark.usefixtures("blocks")
def test_large_and_small_inputs(scale):
    (h, branch, alpha), dy = problem(5, 33, dtype=torch.float32)
    check_values(normalized_residual, normalized_residual_reference, (h * scale, branch * scale, alpha), dy, ALPHA)


@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str)
@pytest.mark.usefixtures("blocks")
def test_rows_of_zeros_give_zeros_and_get_no_gradient(dtype):
    (h, branch, alpha), dy = problem(5, 33, dtype=dtype)
    h[0] = branch[1] = h[2] = branch[2] = 0
    y, dh, dbranch, _ = value_and_grads(normalized_residual, (h, branch, alpha), dy)
    assert (dh[[0, 2]] == 0).all()
    assert (dbranch[[1, 2]] == 0).all()
    assert (y[2] == 0).all()
    check_values(normalized_residual, normalized_residual_reference, (h, branch, alpha), dy, ALPHA)


@pytest.mark.usefixtures("blocks")
def test_rows_below_the_clamp_are_not_made_unit():
    (h, branch, alpha), dy = problem(4, 20)
    h[0] *= 1e-14
    branch[1] *= 1e-14
    truth = value_and_grads(normalized_residual_reference, (h, branch, alpha), dy)
    got = value_and_grads(normalized_residual, (h, branch, alpha), dy)
    assert truth[1][0].abs().max() > 1e8, "the clamp is not reached"
    for out, reference in zip(got, truth, strict=True):
        torch.testing.assert_close(out, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("blocks")
def test_nan_stays_in_its_row():
    (h, branch, alpha), dy = problem(9, 30)
    h[1, 3] = branch[2, 4] = torch.nan
    y, dh, dbranch, dalpha = value_and_grads(normalized_residual, (h, branch, alpha), dy)
    for t in (y, dh, dbranch):
        assert t[1:3].isnan().all()
        assert t[[0, *range(3, 9)]].isfinite().all()
    assert dalpha.isnan().all()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.usefixtures("blocks")
def test_gradients_that_nobody_needs_are_left_out(needs):
    inputs, dy = problem(5, 20)
    truth = value_and_grads(normalized_residual_reference, inputs, dy)[1:]
    leaves = [t.requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    normalized_residual(*leaves).backward(dy)
    for leaf, need, want in zip(leaves, needs, truth, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or torch.allclose(leaf.grad, want, rtol=1e-12)


def test_gradcheck(backend):
    inputs, _ = problem(2, 4)
    assert torch.autograd.gradcheck(normalized_residual, [t.requires_grad_() for t in inputs])


@pytest.mark.usefixtures("blocks")
def test_scaling_an_input_changes_nothing():
    (h, branch, alpha), _ = problem(5, 33)
    y = normalized_residual(h, branch, alpha)
    torch.testing.assert_close(normalized_residual(3 * h, 0.2 * branch, alpha), y, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(normalized_residual(h, branch, torch.zeros_like(alpha)), unit(h), rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("blocks")
def test_two_runs_agree_bit_for_bit():
    inputs, dy = problem(6, 33, dtype=torch.float32)
    check_repeats(normalized_residual, inputs, dy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("shape", sampled([(0, 3), (5, 4)], [(5, 4)]), ids=str)
@pytest.mark.usefixtures("triton")
def test_opcheck(shape):
    inputs, dy = problem(*shape, dtype=torch.float32)
    opcheck(normalized_residual_op.op, (*(t.clone().requires_grad_() for t in inputs), True))
    inverse = normalized_residual_op.op(*inputs, True)[1]
    opcheck(normalized_residual_op.backward_op, (dy, *inputs, inverse, [True] * 3, True))
    opcheck(normalized_residual_op.backward_op, (dy, *inputs, inverse, [False, True, False], True))


@pytest.mark.usefixtures("triton")
def test_compile_and_export():
    inputs, dy = problem(4, 17, dtype=torch.float32)
    check_compiles(normalized_residual, inputs, dy, "normalized_residual")


def test_autocast_changes_nothing(backend):
    inputs, dy = problem(5, 16, dtype=torch.float32)
    check_autocast(normalized_residual, inputs, dy)


def test_a_backward_goes_where_its_forward_went():
    from archzoo.kernels._normalized_residual_triton import BACKWARD

    with on_device():
        inputs, dy = problem(4, 8)
        leaves = [t.requires_grad_() for t in inputs]
        with use_backend("triton"):
            y = normalized_residual(*leaves)
        with pytest.raises(KeyError, match="COLS"), BACKWARD.forced(), use_backend("torch"):
            y.backward(dy)


@pytest.mark.usefixtures("triton")
def test_what_triton_cannot_do_is_refused():
    check_refusals(normalized_residual, problem(3, 4)[0])


@pytest.mark.plain_memory
@pytest.mark.usefixtures("triton")
def test_memory():
    inputs, dy = problem(64, 256, dtype=torch.bfloat16)
    check_peak_memory(normalized_residual, inputs, dy)
