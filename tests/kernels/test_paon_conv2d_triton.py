"""`paon_conv2d` on Triton against its definition. Without `_triton`: the torch path."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import paon_conv2d as module
from archzoo.kernels import use_backend
from archzoo.kernels.paon_conv2d import (
    paon_conv2d,
    paon_conv2d_op,
    paon_conv2d_reference,
    paon_conv_transpose2d,
)
from tests.helpers import rms_error, value_and_grads
from tests.kernels.triton_support import (
    DTYPES,
    check_compiles,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
)

pytestmark = needs_triton

GEOMETRY = [2, 1], [1, 1], [1, 1]
every_variant = pytest.mark.parametrize("variant", ["smooth", "absolute"])


@pytest.fixture(autouse=True)
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks(monkeypatch):
    """Several programs along every axis, and of a batch one image at a time."""
    from archzoo.kernels._pade_triton import BACKWARD, FORWARD

    monkeypatch.setattr(module, "_CPU_BLOCK", 1)
    monkeypatch.setattr(module, "_GPU_BLOCK", 1)
    with FORWARD.forced(ROWS=4, COLS=8), BACKWARD.forced(ROWS=2, COLS=8, STEPS=2):
        yield


def problem(degrees, dtype=torch.float64, shape=(2, 2, 5, 6), transposed=False):
    """Inputs that are there, and a cotangent. Denominators are far from 0, and terms q_k from their kink."""
    (M, N), sizes = degrees, (shape[1], 3) if transposed else (3, shape[1])
    x, W, V = torch.randn(shape), torch.randn(M, *sizes, 3, 2) / 4, torch.randn(N, *sizes, 3, 2) / 20
    inputs = [t.to(dtype) for t in (x, *[W] * (M > 0), *[V] * (N > 0), torch.randn(3))]
    return inputs, torch.randn_like(forms(degrees, transposed=transposed)[1](*inputs))


def forms(degrees, variant="smooth", transposed=False):
    """The op and its definition, of those inputs that are there."""
    op = paon_conv_transpose2d if transposed else paon_conv2d
    stride, padding, dilation = GEOMETRY

    def spread(x, *rest):
        rest = list(rest)
        return x, *(rest.pop(0) if there else None for there in (degrees[0] > 0, degrees[1] > 0, True))

    return (
        lambda *t: op(*spread(*t), stride=stride, padding=padding, dilation=dilation, variant=variant),
        lambda *t: paon_conv2d_reference(*spread(*t), *GEOMETRY, transposed, [0, 0], 1, variant == "absolute"),
    )


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(variant, dtype):
    inputs, dy = problem((3, 3), dtype, (4, 3, 6, 7))  # so many that no single one is the error
    if variant == "absolute" and dtype.itemsize == 2:  # a term that 16 bits round across its kink turns its gradient
        inputs = [t.abs() for t in inputs]
    check_values(*forms((3, 3), variant), inputs, dy, [1, 2, 3])


@every_variant
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("degrees", [(1, 3), (3, 0), (0, 2)], ids=str)
@pytest.mark.usefixtures("blocks")
def test_degrees_programs_and_images(degrees, transposed, variant):
    inputs, dy = problem(degrees, transposed=transposed)
    check_values(*forms(degrees, variant, transposed), inputs, dy, range(1, len(inputs)))


@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (0, 2, 5, 6), (2, 1, 5, 6)], ids=str)
def test_one_pixel_no_image_one_channel(shape):
    inputs, dy = problem((1, 1), torch.float32, shape)
    check_values(*forms((1, 1)), inputs, dy, [1, 2, 3])


@every_variant
def test_nan_strides_and_mixed_dtypes(variant):
    (x, *rest), dy = problem((2, 1))
    turned = x.to(memory_format=torch.channels_last), *rest
    check_values(*forms((2, 1), variant), turned, dy[:, :, :1, :1].expand_as(dy), [1, 2, 3])
    mixed = x.bfloat16(), *(t.float() for t in rest)
    check_values(*forms((2, 1), variant), mixed, dy.bfloat16(), [1, 2, 3])
    x[1, 0, 2, 2] = torch.nan
    y = forms((2, 1), variant)[0](x, *rest)
    assert y[0].isfinite().all()
    assert y[1].isnan().any()


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_nobody_needs_are_left_out(wanted):
    inputs, dy = problem((2, 2))
    function, reference = forms((2, 2))
    truth = value_and_grads(reference, inputs, dy)[1 + wanted]
    leaves = [t.requires_grad_(index == wanted) for index, t in enumerate(inputs)]
    function(*leaves).backward(dy)
    assert rms_error(leaves[wanted].grad, truth) < 1e-11
    assert [t.grad is not None for t in leaves] == [index == wanted for index in range(4)]


@every_variant
def test_accumulators_are_kept_for_a_backward_pass_alone(variant):
    """And made again where a graph without gradients is differentiated after all."""
    inputs, dy = problem((2, 1))
    options = *GEOMETRY, False, [0, 0], 1, variant == "absolute", 1e-6
    kept = paon_conv2d_op.op(*inputs, *options, True, True)[1]
    nothing = paon_conv2d_op.op(*inputs, *options, False, True)[1]
    assert nothing.shape == (0, *kept.shape[1:])
    truth = paon_conv2d_op.backward_op(dy, *inputs, kept, *options, True, [True] * 4, True)
    found = paon_conv2d_op.backward_op(dy, *inputs, nothing, *options, False, [True] * 4, True)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck():
    inputs, dy = problem((2, 1), torch.bfloat16)
    options = *GEOMETRY, False, [0, 0], 1, False, 1e-6, True
    kept = paon_conv2d_op.op(*inputs, *options, True)[1]
    opcheck(paon_conv2d_op.op, (*(t.clone().requires_grad_() for t in inputs), *options, True))
    opcheck(paon_conv2d_op.backward_op, (dy, *inputs, kept, *options, [True] * 4, True))


@pytest.mark.usefixtures("blocks")
def test_compile_export_repeat_and_refusals():
    inputs, dy = problem((2, 1), torch.float32)
    function = forms((2, 1))[0]
    check_compiles(function, inputs, dy, "paon_conv2d")
    check_repeats(function, inputs, dy)
    check_refusals(function, inputs)
