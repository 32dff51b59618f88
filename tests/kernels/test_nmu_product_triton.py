"""The op `nmu_product` in Triton against its definition; in plain torch: `test_nmu_product.py`."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.nmu_product import nmu_product, nmu_product_op, nmu_product_reference
from tests.helpers import rms_error, sampled, value_and_grads
from tests.kernels.test_nmu_product import exact_gradients, problem
from tests.kernels.triton_support import (
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

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]
WEIGHT = [1]  # whose gradient is summed over rows


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks(triton):
    """Several programs along every axis, and several blocks of rows for the gradient of the weight."""
    from archzoo.kernels._nmu_product_triton import FORWARD, INPUT, PARAMETERS, PRODUCTS

    tile = {"BM": 4, "BN": 8}
    with FORWARD.forced(**tile), PRODUCTS.forced(**tile), INPUT.forced(**tile), PARAMETERS.forced(**tile, ROWS=3):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [((1,), 1, 1), ((), 3, 33), ((2, 1, 5), 7, 2), ((33,), 13, 9), ((0,), 4, 3)], ids=str)
def test_values_and_gradients(shape, dtype):
    *inputs, dy = problem(*shape, dtype)
    check_values(nmu_product, nmu_product_reference, inputs, dy, WEIGHT)


@pytest.mark.parametrize("dtype", OF_TILES, ids=str)
@pytest.mark.usefixtures("blocks")
def test_programs_and_tiles(dtype):
    *inputs, dy = problem((7,), 9, 10, dtype)
    check_values(nmu_product, nmu_product_reference, inputs, dy, WEIGHT)


@pytest.mark.usefixtures("blocks")
def test_strides_expansion_and_mixed_dtypes():
    x, w, dy = problem((6,), 9, 5)
    turned = x.t().contiguous().t(), w.t().contiguous().t()
    check_values(nmu_product, nmu_product_reference, turned, dy[:, :1].expand(6, 9), WEIGHT)
    check_values(nmu_product, nmu_product_reference, (x[:1].expand(6, 5), w), dy, WEIGHT)
    check_values(nmu_product, nmu_product_reference, (x.bfloat16(), w.float()), dy.bfloat16(), WEIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("blocks")
def test_zero_factors_have_exact_gradients(dtype):
    """At none, one, two and all zeros a row."""
    x, w, dy = problem((5,), 9, 11)
    w[:4] = (w[:4] > 0.5).double()
    x[1, 7] = x[2, 7] = x[2, 10] = 0
    x[3] = 0
    w[:3, 7] = w[:3, 10] = 1
    got = value_and_grads(nmu_product, [t.to(dtype) for t in (x, w)], dy.to(dtype))
    exact = exact_gradients(*(t.to(dtype).double() for t in (x, w, dy)))
    assert (got[0][1:4, :3] == 0).all()
    for out, want in zip(got[1:], exact, strict=True):
        assert rms_error(out, want) < 50 * torch.finfo(dtype).eps
    assert rms_error(got[1][1:3], exact[0][1:3]) < 50 * torch.finfo(dtype).eps
    assert torch.equal(got[1][3] == 0, exact[0][3] == 0)


@pytest.mark.parametrize(
    ("factors", "product"),
    [
        ([1e-25, 1e-25, 2.0], [2e-25, 2e-25, 0.0]),  # y = 0
        ([1e-30, 1e20, 1e20, 1e-20], [1e20, 1e-30, 1e-30, 1e10]),  # y would be 1e-10; 1e40 on the way
        ([1e-20, 1e-20, 1e5, 1e5], [1e-10, 1e-10, 1e-35, 1e-35]),  # 1e-40 on the way
        ([3e-38, 0.0, 3e37], [0.0, 9e-1, 0.0]),
        ([0.5] * 12 + [1e-37], [2.0**-11 * 1e-37] * 12 + [2.0**-12]),  # the first are denormal, or 0
        ([-1e-19, 1e-19, 1e-19, 1e19], [1e-19, -1e-19, -1e-19, 0.0]),
    ],
)
def test_the_product_of_the_others_needs_no_range_but_its_own(factors, product):
    x = torch.tensor([factors, [1.0] * len(factors)])
    (_, dx, dw) = value_and_grads(nmu_product, (x, torch.ones(1, len(factors))), torch.tensor([[1.0], [0.0]]))
    want = torch.tensor(product)
    assert torch.allclose(dx[0], want, rtol=2e-6, atol=1e-37)
    assert torch.allclose(dw[0], want * (x[0] - 1), rtol=2e-6, atol=1e-37)
    assert torch.equal(dx[1], torch.zeros_like(dx[1]))


def test_a_weight_of_one_keeps_every_digit_and_half_precision_is_multiplied_in_float32():
    x = torch.tensor([[1e-9, 123456.0], [-3e-30, 3.0], [0.0, 5.0]])
    assert torch.equal(nmu_product(x, torch.eye(2)), x)
    assert torch.equal(nmu_product(x, torch.zeros(4, 2)), torch.ones(3, 4))
    x = torch.tensor([4.0] * 20 + [0.25] * 20, dtype=torch.float16)
    assert nmu_product(x, torch.ones(1, 40, dtype=torch.float16)).item() == 1


def test_nan_stays_in_its_row():
    x, w, dy = problem((4,), 3, 9)
    x[1, 7] = torch.nan
    w[:, 7] = 0  # not even left out
    y, dx, dw = value_and_grads(nmu_product, (x, w), dy)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()
    assert dx[1].isnan().any()
    assert dx[[0, 2, 3]].isfinite().all()
    assert dw.isnan().any()


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=str)
def test_gradients_that_nobody_needs_are_left_out(needs):
    *inputs, dy = problem((5,), 4, 3)
    truth = value_and_grads(nmu_product_reference, inputs, dy)[1:]
    leaves = [t.requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    nmu_product(*leaves).backward(dy)
    for leaf, need, want in zip(leaves, needs, truth, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or torch.allclose(leaf.grad, want, rtol=1e-11)


def test_gradcheck():
    x = torch.tensor([[2.0, 3, 0.5], [0, 3, 0.5], [0, 0, 0.5]], dtype=torch.float64)
    w = torch.tensor([[1.0, 1, 1], [1, 1, 0], [0.5, 1, 1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(nmu_product, (x.requires_grad_(), w.requires_grad_()), fast_mode=True)


@pytest.mark.usefixtures("blocks")
def test_two_runs_agree_bit_for_bit():
    *inputs, dy = problem((7,), 9, 5, torch.float32)
    check_repeats(nmu_product, inputs, dy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("rows", sampled([0, 5], [5]))
def test_opcheck(rows):
    x, w, dy = problem((rows,), 4, 3, torch.float32)
    opcheck(nmu_product_op.op, (*(t.clone().requires_grad_() for t in (x, w)), True))
    opcheck(nmu_product_op.backward_op, (dy, x, w, [True, True], True))
    opcheck(nmu_product_op.backward_op, (dy, x, w, [False, True], True))


def test_compile_and_export():
    *inputs, dy = problem((4,), 5, 6, torch.float32)
    check_compiles(nmu_product, inputs, dy, "nmu_product")


def test_autocast_rounds_the_result_only():
    *inputs, dy = problem((5,), 4, 6, torch.float32)
    want = value_and_grads(nmu_product, inputs, dy.bfloat16().float())
    with torch.autocast(dy.device.type, torch.bfloat16):
        got = value_and_grads(nmu_product, inputs, dy.bfloat16())
    assert torch.equal(got[0], want[0].bfloat16())
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


def test_what_triton_cannot_do_is_refused():
    check_refusals(nmu_product, problem((3,), 4, 2)[:2])


@pytest.mark.plain_memory
def test_memory():
    from archzoo.kernels._nmu_product_triton import FORWARD, INPUT, PARAMETERS, PRODUCTS

    *inputs, dy = problem((128,), 64, 8, torch.float32)
    tile, rows = {"BM": 128, "BN": 64}, {"BM": 64, "BN": 8, "ROWS": 128}
    with FORWARD.forced(**tile), PRODUCTS.forced(**tile), INPUT.forced(BM=128, BN=8), PARAMETERS.forced(**rows):
        check_peak_memory(nmu_product, inputs, dy)
