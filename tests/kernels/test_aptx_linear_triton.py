"""`aptx_linear` and `aptx_conv2d` in Triton against their definitions; in plain torch: `test_aptx_linear.py`."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.aptx_conv2d import aptx_conv2d, aptx_conv2d_op
from archzoo.kernels.aptx_linear import aptx_linear, aptx_linear_op, aptx_linear_reference
from tests.helpers import rms_error, value_and_grads
from tests.kernels import test_aptx_conv2d as conv
from tests.kernels.test_aptx_linear import problem
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
    tolerance,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]
PARAMETERS = [1, 2, 3, 4]  # whose gradients are summed over rows


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks(triton):
    """Several programs along every axis, and several blocks of rows for the gradients of the parameters."""
    from archzoo.kernels import _aptx_linear_triton as kernels

    tile = {"BM": 4, "BN": 8}
    with kernels.FORWARD.forced(**tile), kernels.INPUT.forced(**tile), kernels.PARAMETERS.forced(**tile, ROWS=3):
        yield


def check(inputs, dy, **options):
    check_values(aptx_linear, aptx_linear_reference, inputs, dy, PARAMETERS, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [((), 5, 3, 3), ((2, 3, 1), 1, 13, 13), ((1, 7), 3, 1, 1), ((6,), 5, 12, 4), ((0, 2), 4, 6, 6)], ids=str
)
def test_values_and_gradients(shape, dtype):
    check(*problem(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", OF_TILES, ids=str)
@pytest.mark.usefixtures("blocks")
def test_programs_and_tiles(dtype):
    check(*problem((7,), 9, 10, 5, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_small_and_large_inputs_keep_their_accuracy(scale):
    """beta scales inversely, so that tanh is neither linear nor saturated; then it is both."""
    inputs, dy = problem((5,), 8, 4, 4, torch.float32, scale=scale)
    check(inputs, dy)
    x, alpha, beta, gamma, bias = inputs
    check((x, alpha, beta.sign(), gamma, bias), dy)
    _, _, _, dbeta, _, _ = value_and_grads(aptx_linear, (x.sign(), alpha, 1e4 * beta.sign(), gamma, bias), dy)
    assert torch.equal(dbeta, torch.zeros_like(beta))


@pytest.mark.usefixtures("blocks")
def test_strides_expansion_and_mixed_dtypes():
    (x, alpha, beta, gamma, bias), dy = problem((6,), 5, 4, 4)
    turned = [t.t().contiguous().t() for t in (x, alpha, beta, gamma)]
    check((*turned, bias[:1].expand(4)), dy[:, :1].expand(6, 4))
    check((x[:1].expand(6, 5), alpha, beta, gamma, bias), dy)
    inputs, dy = problem((6,), 5, 4, 4, torch.bfloat16, parameters=torch.float32)
    check(inputs, dy, tf32=True)  # on a GPU tanh has an error of 2^-11, as products by tf32 have


@pytest.mark.parametrize("groups", [6, 2])
def test_without_alpha_it_is_one_and_without_bias_it_is_zero(groups):
    (x, alpha, beta, gamma, _), dy = problem((3,), 5, 6, groups)
    want = value_and_grads(lambda x, b, g: aptx_linear(x, torch.ones_like(alpha), b, g), (x, beta, gamma), dy)
    got = value_and_grads(lambda x, b, g: aptx_linear(x, None, b, g), (x, beta, gamma), dy)
    for out, reference in zip(got, want, strict=True):
        assert rms_error(out, reference) < 1e-12


def test_a_beta_of_many_outputs_is_one_repeated():
    (x, alpha, beta, gamma, bias), dy = problem((3,), 5, 64, 2)
    shared = value_and_grads(aptx_linear, (x, alpha, beta, gamma, bias), dy)
    repeated = value_and_grads(aptx_linear, (x, alpha, beta.repeat_interleave(32, 0), gamma, bias), dy)
    for i, (one, other) in enumerate(zip(shared, repeated, strict=True)):
        assert rms_error(one, other.view(2, 32, 5).sum(1) if i == 3 else other) < 1e-12


def test_nan_reaches_its_row_and_no_other():
    (x, *parameters), dy = problem((6,), 5, 4, 4)
    x[2, 3] = torch.nan
    y, dx, dalpha, dbeta, dgamma, dbias = value_and_grads(aptx_linear, (x, *parameters), dy)
    others = [0, 1, 3, 4, 5]
    assert y[2].isnan().all()
    assert y[others].isfinite().all()
    assert dx[2, 3].isnan()
    assert dx[others].isfinite().all()
    for gradient in (dalpha, dbeta, dgamma):
        assert gradient[:, 3].isnan().all()
        assert gradient[:, :3].isfinite().all()
    assert dbias.isfinite().all()


@pytest.mark.parametrize("wanted", range(5))
def test_gradients_that_nobody_needs_are_left_out(wanted):
    inputs, dy = problem((5,), 3, 4, 4)
    truth = value_and_grads(aptx_linear_reference, inputs, dy)[1:]
    found = aptx_linear_op.backward_op(dy, *inputs, [i == wanted for i in range(5)], True)
    for i, (out, want) in enumerate(zip(found, truth, strict=True)):
        assert out.numel() == (want.numel() if i == wanted else 0)
    assert rms_error(found[wanted], truth[wanted]) < 1e-12


def test_gradcheck():
    inputs, _ = problem((2,), 3, 4, 2)
    assert torch.autograd.gradcheck(aptx_linear, [t.requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.usefixtures("blocks")
def test_two_runs_agree_bit_for_bit():
    inputs, dy = problem((7,), 9, 10, 10, torch.float32)
    check_repeats(aptx_linear, inputs, dy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(
    ("rows", "dtype"), [(5, torch.float32), pytest.param(0, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_opcheck(rows, dtype):
    inputs, dy = problem((rows,), 3, 4, 2, dtype, parameters=torch.float32)
    opcheck(aptx_linear_op.backward_op, (dy, *inputs, [True] * 5, True))
    opcheck(aptx_linear_op.backward_op, (dy, inputs[0], None, *inputs[2:], [False, False, True, False, False], True))
    opcheck(aptx_linear_op.op, (*(t.requires_grad_() for t in inputs), True))


def test_compile_and_export():
    inputs, dy = problem((4,), 5, 6, 6, torch.float32)
    check_compiles(aptx_linear, inputs, dy, "aptx_linear")


def test_autocast_rounds_x_and_y_only():
    inputs, dy = problem((5,), 4, 3, 3, torch.float32)

    def under_autocast(*inputs):
        with torch.autocast(dy.device.type, torch.bfloat16):
            return aptx_linear(*inputs)

    rounded = [inputs[0].bfloat16(), *inputs[1:]]
    want = value_and_grads(aptx_linear, rounded, dy.bfloat16())
    got = value_and_grads(under_autocast, inputs, dy.bfloat16())
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 5
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(got, want, strict=True))


def test_what_triton_cannot_do_is_refused():
    check_refusals(aptx_linear, problem((3,), 2, 4, 4)[0])
    (x, *parameters), _, how = conv.problem(1, 2, 4, 4, (2, 2), (3, 3), {})
    with pytest.raises(RuntimeError, match=r"a torch\.func transform has no Triton kernel"):
        torch.func.grad(lambda x: aptx_conv2d(x, *parameters, **how).sum())(x)


@pytest.mark.plain_memory
def test_memory():
    from archzoo.kernels import _aptx_linear_triton as kernels

    inputs, dy = problem((128,), 8, 16, 16, torch.float32)
    rows, parameters = {"BM": 128, "BN": 16}, {"BM": 16, "BN": 8, "ROWS": 128}
    with kernels.FORWARD.forced(**rows), kernels.INPUT.forced(**rows), kernels.PARAMETERS.forced(**parameters):
        check_peak_memory(aptx_linear, inputs, dy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", conv.GEOMETRIES[1:5] + conv.GEOMETRIES[6:], ids=str)
def test_convolutions(geometry, dtype, monkeypatch):
    """By blocks of a few pixels in float64."""
    if dtype == torch.float64:
        monkeypatch.setattr("archzoo.kernels._patches._ELEMENTS", 0)
    batch, channels, outputs, rows, *rest = geometry
    inputs, dy, how = conv.problem(batch, channels, outputs, rows, *rest, dtype=dtype)
    check_values(conv.ours(how), conv.definition(how), inputs, dy, PARAMETERS)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_of_a_convolution_alone(wanted):
    inputs, dy, how = conv.problem(1, 2, 4, 4, (2, 2), (3, 3), {"padding": (1, 0), "groups": 2})
    truth = value_and_grads(conv.definition(how), inputs, dy)[1 + wanted]
    leaf = inputs[wanted].detach().requires_grad_()
    y = aptx_conv2d(*inputs[:wanted], leaf, *inputs[wanted + 1 :], **how)
    assert rms_error(torch.autograd.grad(y, leaf, dy)[0], truth) < tolerance(torch.float64, 2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck_of_a_convolution():
    inputs, dy, how = conv.problem(1, 2, 4, 4, (2, 2), (3, 3), {"padding": (1, 0), "groups": 2}, torch.float32)
    lists = (*conv.as_lists(how, (2, 2)), 2)
    opcheck(aptx_conv2d_op.backward_op, (dy, *inputs, *lists, [True] * 5, True))
    opcheck(aptx_conv2d_op.op, (*(t.requires_grad_() for t in inputs), *lists, True))
