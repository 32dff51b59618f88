"""`paon_linear` on Triton against its definition. Without `_triton`: the torch path."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.paon_linear import paon_linear, paon_linear_op, paon_linear_reference
from tests.helpers import rms_error, value_and_grads
from tests.kernels.triton_support import (
    DEVICE,
    DTYPES,
    check_compiles,
    check_peak_memory,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
)

pytestmark = needs_triton

VARIANTS = ["smooth", "absolute"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks():
    """Several programs along every axis, and several steps over the inputs."""
    from archzoo.kernels._pade_triton import BACKWARD
    from archzoo.kernels._pade_triton import FORWARD as RATIONAL
    from archzoo.kernels._paon_linear_triton import FORWARD

    with (
        FORWARD.forced(BM=16, BN=16, BK=16, GROUP=2),
        RATIONAL.forced(ROWS=4, COLS=8),
        BACKWARD.forced(ROWS=8, COLS=8, STEPS=2),
    ):
        yield


def problem(leading, features, outputs, degrees, dtype=torch.float64, bias=True):
    """Inputs that are there, and a cotangent. Denominators are far from 0, and terms q_k from their kink."""
    (M, N), each = degrees, features**-0.5
    x, W = torch.randn(*leading, features), each * torch.randn(M, outputs, features)
    V = 0.2 * each * torch.randn(N, outputs, features)
    inputs = [x, *[W] * (M > 0), *[V] * (N > 0), *[torch.randn(outputs)] * bias]
    return [t.to(dtype) for t in inputs], torch.randn(*leading, outputs).to(dtype)


def forms(degrees, variant="smooth", bias=True):
    """The op and its definition, of those inputs that are there."""

    def spread(x, *rest):
        rest = list(rest)
        full = [rest.pop(0) if there else None for there in (degrees[0] > 0, degrees[1] > 0, bias)]
        return x, *full

    return (
        lambda *t: paon_linear(*spread(*t), variant=variant),
        lambda *t: paon_linear_reference(*spread(*t), absolute=variant == "absolute"),
    )


def parameters(inputs):
    return range(1, len(inputs))


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("degrees", [(1, 1), (3, 3), (3, 1), (0, 2)], ids=str)
def test_values_and_gradients(degrees, variant, dtype):
    inputs, dy = problem((17,), 33, 10, degrees, dtype)
    function, reference = forms(degrees, variant)
    if variant == "absolute" and dtype.itemsize == 2:  # a term that 16 bits round across its kink turns its gradient
        with torch.no_grad():
            got, want = function(*inputs), reference(*(t.double() for t in inputs))
        assert rms_error(got, want) < {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
        inputs = [t.abs() for t in inputs]
    check_values(function, reference, inputs, dy, parameters(inputs))


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (3, 3), (1, 4), (3, 5), (0, 1), (4, 0)], ids=str)
@pytest.mark.usefixtures("blocks")
def test_programs_and_steps(degrees, variant):
    """Of more than three terms that the absolute variant keeps apart, each is a GEMM of its own."""
    inputs, dy = problem((35,), 40, 19, degrees)
    check_values(*forms(degrees, variant), inputs, dy, parameters(inputs))


@pytest.mark.parametrize("shape", [((), 5, 3), ((1,), 1, 1), ((2, 3, 1), 1, 33), ((0,), 4, 6)], ids=str)
@pytest.mark.parametrize("degrees", [(2, 1), (0, 2)], ids=str)
def test_shapes(shape, degrees):
    inputs, dy = problem(*shape, degrees, torch.float32)
    check_values(*forms(degrees), inputs, dy, parameters(inputs))


@every_variant
def test_no_bias_strides_expansion_and_mixed_dtypes(variant):
    (x, W, V), dy = problem((6,), 12, 5, (2, 1), bias=False)
    turned = x.t().contiguous().t(), W.mT.contiguous().mT, V[:, :1].expand(1, 5, 12)
    check_values(*forms((2, 1), variant, bias=False), turned, dy[:, :1].expand(6, 5), [1, 2])
    mixed = x.bfloat16(), W.float(), V.float()
    check_values(*forms((2, 1), variant, bias=False), mixed, dy.bfloat16(), [1, 2])


@every_variant
def test_nan_reaches_its_row_and_no_other(variant):
    (x, *rest), _ = problem((6,), 5, 4, (2, 2))
    x[2, 3] = torch.nan
    y = forms((2, 2), variant)[0](x, *rest)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


@every_variant
@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_nobody_needs_are_left_out(wanted, variant):
    inputs, dy = problem((7,), 3, 4, (2, 2))
    function, reference = forms((2, 2), variant)
    truth = value_and_grads(reference, inputs, dy)[1 + wanted]
    leaves = [t.requires_grad_(index == wanted) for index, t in enumerate(inputs)]
    function(*leaves).backward(dy)
    assert rms_error(leaves[wanted].grad, truth) < 1e-11
    assert [t.grad is not None for t in leaves] == [index == wanted for index in range(4)]


@every_variant
def test_accumulators_are_kept_for_a_backward_pass_alone(variant):
    """And made again where a graph without gradients is differentiated after all."""
    (x, W, V, bias), dy = problem((7,), 3, 4, (2, 1))
    options = variant == "absolute", 1e-6
    _, kept = paon_linear_op.op(x, W, V, bias, *options, True, True)
    assert len(kept) == (2 if variant == "absolute" else 3)
    _, nothing = paon_linear_op.op(x, W, V, bias, *options, False, True)
    assert nothing.shape == (0, 7, 4)
    truth = paon_linear_op.backward_op(dy, x, W, V, bias, kept, *options, True, [True] * 4, True)
    found = paon_linear_op.backward_op(dy, x, W, V, bias, nothing, *options, False, [True] * 4, True)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@every_variant
def test_gradcheck(variant):
    leaves = [t.requires_grad_() for t in problem((2,), 3, 2, (2, 2))[0]]
    assert torch.autograd.gradcheck(forms((2, 2), variant)[0], leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck():
    inputs, dy = problem((5,), 3, 4, (2, 1), torch.bfloat16)
    options = False, 1e-6, True
    kept = paon_linear_op.op(*inputs, *options, True)[1]
    assert kept.dtype == torch.bfloat16
    opcheck(paon_linear_op.op, (*(t.clone().requires_grad_() for t in inputs), *options, True))
    opcheck(paon_linear_op.backward_op, (dy, *inputs, kept, *options, [True] * 4, True))
    opcheck(paon_linear_op.backward_op, (dy, *inputs, kept, *options, [False, True, False, False], True))


@pytest.mark.usefixtures("blocks")
def test_compile_export_and_repeat():
    inputs, dy = problem((20,), 20, 18, (2, 1), torch.float32)
    check_compiles(paon_linear, inputs, dy, "paon_linear")
    check_repeats(paon_linear, inputs, dy)


def test_autocast_multiplies_in_bfloat16():
    inputs, dy = problem((17,), 33, 10, (2, 1), torch.float32)
    rounded = [t.bfloat16() for t in inputs]
    with torch.autocast(DEVICE, torch.bfloat16):
        got = value_and_grads(paon_linear, inputs, dy.bfloat16())
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 4
    for out, want in zip(got, value_and_grads(paon_linear, rounded, dy.bfloat16()), strict=True):
        assert torch.equal(out, want.to(out.dtype))


def test_what_triton_cannot_do_is_refused():
    check_refusals(paon_linear, problem((3,), 4, 2, (2, 1))[0])


@pytest.mark.plain_memory
def test_memory():
    from archzoo.kernels._pade_triton import BACKWARD
    from archzoo.kernels._paon_linear_triton import FORWARD

    inputs, dy = problem((1024,), 256, 128, (2, 1), torch.float32)
    with FORWARD.forced(BM=512, BN=128, BK=128, GROUP=8), BACKWARD.forced(ROWS=256, COLS=128, STEPS=2):
        check_peak_memory(paon_linear, inputs, dy)
