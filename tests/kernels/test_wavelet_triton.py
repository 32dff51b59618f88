"""`wavelet_linear` and `wavelet_conv2d` in Triton against their definitions; in plain torch: `test_wavelet.py`."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.basis_conv2d import padding_sides
from archzoo.kernels.wavelet import WAVELETS, wavelet_linear, wavelet_linear_op, wavelet_linear_reference
from archzoo.kernels.wavelet_conv2d import wavelet_conv2d, wavelet_conv2d_op, wavelet_conv2d_reference
from tests.helpers import rms_error, sampled, value_and_grads
from tests.kernels.test_wavelet import of, parameters, problem, randn
from tests.kernels.triton_support import (
    DTYPES,
    check_compiles,
    check_peak_memory,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]
PARAMETERS = [1, 2, 3, 4]  # whose gradients are summed over rows
every_wavelet = pytest.mark.parametrize("wavelet", WAVELETS)


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks(triton):
    """Several programs along every axis, and several blocks of rows for the gradients of the parameters."""
    from archzoo.kernels import _wavelet_triton as kernels

    tile = {"BM": 4, "BN": 8}
    with kernels.FORWARD.forced(**tile), kernels.INPUT.forced(**tile), kernels.PARAMETERS.forced(**tile, ROWS=3):
        yield


def check(wavelet, inputs, dy):
    check_values(of(wavelet), of(wavelet, wavelet_linear_reference), inputs, dy, PARAMETERS)


@every_wavelet
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [((), 5, 3), ((2, 3, 1), 1, 13), ((0, 2), 4, 6)], ids=str)
def test_values_and_gradients(shape, dtype, wavelet):
    check(wavelet, *problem(*shape, dtype=dtype))


@every_wavelet
@pytest.mark.parametrize("dtype", sampled([torch.float64, torch.float32], [torch.float64]), ids=str)
@pytest.mark.usefixtures("blocks")
def test_programs_and_tiles(dtype, wavelet):
    check(wavelet, *problem((7,), 9, 10, dtype=dtype))


@pytest.mark.usefixtures("blocks")
def test_strides_expansion_and_mixed_dtypes():
    (*tensors, bias), dy = problem((6,), 5, 4)
    turned = [t.t().contiguous().t() for t in tensors]
    check("mexican_hat", (*turned, bias[:1].expand(4)), dy[:, :1].expand(6, 4))
    check("mexican_hat", (tensors[0][:1].expand(6, 5), *tensors[1:], bias), dy)
    check("mexican_hat", *problem((6,), 5, 4, torch.bfloat16, torch.float32))


@every_wavelet
@pytest.mark.parametrize("spread", [1e-3, 6.0])
def test_small_and_large_inputs_keep_their_accuracy(spread, wavelet):
    (x, *rest), dy = problem((16,), 5, 4, torch.float32)
    check(wavelet, (x * spread, *rest), dy)


@every_wavelet
def test_far_away_a_wavelet_is_zero_and_not_nan(wavelet):
    (x, weight, scale, translation, bias), _ = problem((6,), 3, 4, torch.float32)
    for far, s in ((1e30, scale), (-torch.inf, scale), (1e3, scale.sign() * 1e-30)):
        y, *gradients, _ = value_and_grads(of(wavelet), (torch.full_like(x, far), weight, s, translation, bias))
        assert torch.equal(y, bias.expand(6, 4))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@every_wavelet
def test_nan_reaches_its_row_and_no_other(wavelet):
    (x, *rest), _ = problem((6,), 5, 4)
    x[2, 3] = torch.nan
    y, dx, dweight, dscale, dtranslation, _ = value_and_grads(of(wavelet), (x, *rest))
    others = [0, 1, 3, 4, 5]
    assert y[2].isnan().all()
    assert y[others].isfinite().all()
    assert dx[others].isfinite().all()
    assert dx[2, 3].isnan()
    for gradient in (dweight, dscale, dtranslation):
        assert gradient[:, 3].isnan().all()
        assert gradient[:, :3].isfinite().all()


@pytest.mark.parametrize("wanted", range(5))
def test_gradients_that_nobody_needs_are_left_out(wanted):
    inputs, dy = problem((5,), 3, 4)
    truth = value_and_grads(of("morlet", wavelet_linear_reference), inputs, dy)[1:]
    found = wavelet_linear_op.backward_op(dy, *inputs, "morlet", [i == wanted for i in range(5)], True)
    for i, (out, want) in enumerate(zip(found, truth, strict=True)):
        assert out.numel() == (want.numel() if i == wanted else 0)
    assert rms_error(found[wanted], truth[wanted]) < 1e-12


@every_wavelet
def test_gradcheck(wavelet):
    leaves = [t.requires_grad_() for t in problem((2,), 3, 4)[0]]
    assert torch.autograd.gradcheck(of(wavelet), leaves, fast_mode=True)
    assert torch.autograd.gradcheck(of(wavelet), leaves[:4], fast_mode=True)


@pytest.mark.usefixtures("blocks")
def test_two_runs_agree_bit_for_bit():
    inputs, dy = problem((7,), 9, 10, torch.float32)
    check_repeats(wavelet_linear, inputs, dy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(
    ("rows", "dtype"), [(5, torch.float32), pytest.param(0, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_opcheck(rows, dtype):
    (*inputs, bias), dy = problem((rows,), 3, 4, dtype, torch.float32)
    opcheck(wavelet_linear_op.backward_op, (dy, *inputs, bias, "morlet", [True] * 5, True))
    opcheck(wavelet_linear_op.backward_op, (dy, *inputs, None, "dog", [False, False, True, False, False], True))
    opcheck(wavelet_linear_op.op, (*(t.requires_grad_() for t in (*inputs, bias)), "mexican_hat", True))


def test_compile_and_export():
    inputs, dy = problem((4,), 5, 6, torch.float32)
    check_compiles(wavelet_linear, inputs, dy, "wavelet_linear")


def test_autocast_rounds_the_result_only():
    inputs, dy = problem((5,), 4, 3, torch.float32)

    def under_autocast(*inputs):
        with torch.autocast(dy.device.type, torch.bfloat16):
            return wavelet_linear(*inputs)

    want = value_and_grads(wavelet_linear, inputs, dy.bfloat16().float())
    got = value_and_grads(under_autocast, inputs, dy.bfloat16())
    assert torch.equal(got[0], want[0].bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


def test_what_triton_cannot_do_is_refused():
    check_refusals(wavelet_linear, problem((3,), 2, 4)[0])
    with pytest.raises(RuntimeError, match=r"a torch\.func transform has no Triton kernel"):
        torch.func.grad(lambda x: wavelet_conv2d(x, *parameters(2, 1, 1, 1)).sum())(randn(1, 1, 2, 2))


@pytest.mark.plain_memory
def test_memory():
    from archzoo.kernels import _wavelet_triton as kernels

    inputs, dy = problem((128,), 8, 16, torch.float32)
    rows, of_parameters = {"BM": 128, "BN": 16}, {"BM": 16, "BN": 8, "ROWS": 128}
    with kernels.FORWARD.forced(**rows), kernels.INPUT.forced(**rows), kernels.PARAMETERS.forced(**of_parameters):
        check_peak_memory(wavelet_linear, inputs, dy)


GEOMETRIES = [  # batch, in, out, kernel, size, how
    (2, 4, 6, (3, 2), (7, 6), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    (1, 2, 3, (2, 2), (3, 4), {"padding": "same", "pad_value": 0.5}),
    (0, 2, 4, (1, 2), (2, 3), {"groups": 2}),
]


def conv_problem(batch, channels, outputs, kernel, size, how, dtype=torch.float64):
    """x and parameters, a cotangent, the op and its definition."""
    how = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "pad_value": None} | how
    lists = list(how["stride"]), padding_sides(how["padding"], kernel, how["dilation"]), list(how["dilation"])
    inputs = randn(batch, channels, *size, dtype=dtype), *parameters(outputs, channels // how["groups"], *kernel)
    inputs = [t.to(dtype) for t in inputs]

    def definition(*inputs):
        return wavelet_conv2d_reference(*inputs, "mexican_hat", *lists, how["groups"], how["pad_value"])

    dy = randn(*definition(*inputs).shape, dtype=dtype)
    return inputs, dy, (lambda *inputs: wavelet_conv2d(*inputs, **how)), definition


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions(geometry, dtype, monkeypatch):
    """By blocks of a few pixels in float64."""
    if dtype == torch.float64:
        monkeypatch.setattr("archzoo.kernels._patches._ELEMENTS", 0)
    inputs, dy, function, definition = conv_problem(*geometry, dtype=dtype)
    check_values(function, definition, inputs, dy, PARAMETERS)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck_of_a_convolution():
    inputs, dy, *_ = conv_problem(1, 2, 4, (2, 2), (3, 3), {"padding": (1, 0), "groups": 2}, torch.float32)
    geometry = "dog", [1, 1], [1, 1, 0, 0], [1, 1], 2, None
    opcheck(wavelet_conv2d_op.backward_op, (dy, *inputs, *geometry, [True] * 5, True))
    opcheck(wavelet_conv2d_op.backward_op, (dy, *inputs, *geometry, [True, False, False, False, False], True))
    opcheck(wavelet_conv2d_op.op, (*(t.requires_grad_() for t in inputs), *geometry, True))
