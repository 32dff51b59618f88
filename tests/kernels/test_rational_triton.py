"""The op `rational` on both backends against its definition; as a basis: `test_rational.py`."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import use_backend
from archzoo.kernels.rational import (
    DENOMINATORS,
    Rational,
    rational,
    rational_op,
    rational_reference,
)
from tests.helpers import rms_error, sampled, value_and_grads
from tests.kernels.triton_support import (
    DTYPES,
    OF_TILES,
    check_autocast,
    check_compiles,
    check_exports,
    check_peak_memory,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
)

COEFFICIENTS = [1, 2]  # whose gradients are sums over the numbers of a group


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks(triton):
    """Several programs along every axis, of several steps each."""
    from archzoo.kernels._rational_triton import BACKWARD, FORWARD

    with FORWARD.forced(ROWS=4, COLS=8), BACKWARD.forced(ROWS=2, COLS=8, STEPS=2):
        yield


def problem(*shape, groups=1, shared=False, dtype=torch.float64):
    x, dy = torch.randn(2, *shape, dtype=torch.float64).to(dtype).unbind()
    a, b = torch.randn(1 if shared else groups, 6, dtype=torch.float64), torch.randn(groups, 4, dtype=torch.float64)
    return (x, a.to(dtype), b.to(dtype)), dy


def forms(denominator):
    """The op and its definition with that denominator."""
    return (lambda x, a, b: rational(x, a, b, denominator)), (lambda x, a, b: rational_reference(x, a, b, denominator))


every_denominator = pytest.mark.parametrize("denominator", DENOMINATORS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((33,), 1), ((1, 2), 2), ((130, 3), 1), ((2, 3, 63), 3), ((2, 1, 2, 4), 4), ((0, 4), 2), ((2, 0, 3), 3)],
    ids=str,
)
def test_values_and_gradients(backend, shape, groups, dtype):
    inputs, dy = problem(*shape, groups=groups, dtype=dtype)
    check_values(rational, rational_reference, inputs, dy, COEFFICIENTS)


@pytest.mark.parametrize("dtype", OF_TILES, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@every_denominator
@needs_triton
@pytest.mark.usefixtures("blocks")
def test_programs_steps_and_tiles(denominator, shared, dtype):
    inputs, dy = problem(7, 22, groups=2, shared=shared, dtype=dtype)
    check_values(*forms(denominator), inputs, dy, COEFFICIENTS)


@every_denominator
def test_the_basis_of_kan_layers_is_the_same_function(denominator):
    (x, a, b), _ = problem(5, 6, groups=3)
    values = Rational(3, denominator).values(x.t(), a, b).squeeze(-2).t()
    assert rms_error(rational_reference(x, a, b, denominator), values) < 1e-14


def test_strides_expansion_and_mixed_dtypes(backend):
    (x, a, b), dy = problem(6, 12, groups=3)
    turned = x.t().contiguous().t(), a.flip(0), b[:1].expand(3, 4)
    check_values(rational, rational_reference, turned, dy[:, :1].expand(6, 12), COEFFICIENTS)
    mixed = x.bfloat16(), a.float(), b.float()
    check_values(rational, rational_reference, mixed, dy.bfloat16(), COEFFICIENTS)


@every_denominator
@pytest.mark.parametrize("scale", [1e-4, 1e5])
def test_large_and_small_inputs(backend, denominator, scale):
    (x, a, b), dy = problem(9, 8, groups=2, dtype=torch.float32)
    check_values(*forms(denominator), (x * scale, a, b), dy, [])


@every_denominator
def test_kinks_have_the_slopes_that_the_file_says(backend, denominator):
    """+1 at b = 0, or S = 0, so that a start there can learn; 0 at x = 0."""
    (x, a, _), dy = problem(4, 6, groups=2)
    x[0] = 0
    b = torch.zeros(2, 4, dtype=x.dtype)
    function, reference = forms(denominator)
    got = value_and_grads(function, (x, a, b), dy)
    for out, want in zip(got, value_and_grads(reference, (x, a, b), dy), strict=True):
        assert rms_error(out, want) < 1e-13
    assert (got[3] != 0).all()
    (x, a, b), dy = problem(1, 2)
    slope = value_and_grads(function, (torch.zeros_like(x), a, b), torch.ones_like(dy))[1]
    want = a[0, 1] if denominator == "abs_terms" else a[0, 1] - a[0, 0] * b[0, 0]
    torch.testing.assert_close(slope, want.expand(1, 2))


def test_nan_comes_through(backend):
    (x, a, b), dy = problem(4, 6, groups=2)
    x[1, 2] = torch.nan
    y, dx, da, db = value_and_grads(rational, (x, a, b), dy)
    assert y.isnan().sum() == 1
    assert dx.isnan().sum() == 1
    assert da[0].isnan().all()
    assert db[0].isnan().all()
    assert da[1].isfinite().all()
    b[1, 3] = torch.nan
    assert rational(x, a, b)[:, 3:].isnan().all()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_that_nobody_needs_are_left_out(backend, needs):
    inputs, dy = problem(5, 4, groups=2)
    truth = value_and_grads(rational_reference, inputs, dy)[1:]
    leaves = [t.requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    rational(*leaves).backward(dy)
    for leaf, need, want in zip(leaves, needs, truth, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or torch.allclose(leaf.grad, want, rtol=1e-11)


@every_denominator
def test_gradcheck(backend, denominator):
    leaves = [t.requires_grad_() for t in problem(2, 2, groups=2)[0]]
    assert torch.autograd.gradcheck(forms(denominator)[0], leaves)


@every_denominator
def test_gradients_of_gradients_and_transforms_are_plain_torch(denominator):
    function, reference = forms(denominator)
    inputs, _ = problem(3, 4, groups=2)
    assert torch.autograd.gradgradcheck(function, [t.requires_grad_() for t in inputs])
    inputs = [t.detach() for t in inputs]
    got, want = (torch.func.grad(lambda *t, f=f: f(*t).sin().sum(), (0, 1, 2))(*inputs) for f in (function, reference))
    for out, truth in zip(got, want, strict=True):
        assert rms_error(out, truth) < 1e-13


def test_with_all_of_p_but_a1_zero_and_b_zero_it_is_the_identity(backend):
    (x, a, b), _ = problem(5, 6, groups=3)
    a = torch.zeros_like(a)
    a[:, 1] = 1
    assert torch.equal(rational(x, a, torch.zeros_like(b)), x)


@needs_triton
@pytest.mark.usefixtures("blocks")
def test_two_runs_agree_bit_for_bit():
    inputs, dy = problem(9, 22, groups=2, dtype=torch.float32)
    check_repeats(rational, inputs, dy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("rows", sampled([0, 5], [5]))
def test_opcheck(backend, rows):
    inputs, dy = problem(rows, 4, groups=2, dtype=torch.float32)
    triton = backend == "triton"
    opcheck(rational_op.op, (*(t.clone().requires_grad_() for t in inputs), "abs_terms", triton))
    opcheck(rational_op.backward_op, (dy, *inputs, "abs_sum", [True] * 3, triton))
    opcheck(rational_op.backward_op, (dy, *inputs, "abs_terms", [True, False, False], triton))


def test_compile_and_export(backend):
    inputs, dy = problem(4, 6, groups=2, dtype=torch.float32)
    if backend == "triton":
        check_compiles(rational, inputs, dy, "rational")
    else:  # compiled for a CPU, the definition takes the op's place: test_rational.py
        check_exports(rational, inputs, "rational")


def test_autocast_changes_nothing(backend):
    inputs, dy = problem(5, 6, groups=2, dtype=torch.float32)
    check_autocast(rational, inputs, dy)


@needs_triton
@pytest.mark.usefixtures("triton")
def test_what_triton_cannot_do_is_refused():
    check_refusals(rational, problem(3, 4, groups=2)[0])


@pytest.mark.plain_memory
@needs_triton
@pytest.mark.usefixtures("triton")
def test_memory():
    from archzoo.kernels._rational_triton import BACKWARD, FORWARD

    inputs, dy = problem(2048, 64, groups=2, dtype=torch.float32)
    with FORWARD.forced(ROWS=512, COLS=32), BACKWARD.forced(ROWS=512, COLS=32, STEPS=2):
        check_peak_memory(rational, inputs, dy)


def test_flops():
    inputs, dy = problem(6, 4, groups=2)
    leaves = [t.requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        y = rational(*leaves)
    assert counter.get_total_flops() == 20 * 6 * 4
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    assert counter.get_total_flops() == 60 * 6 * 4


def test_bad_inputs_are_refused():
    (x, a, b), _ = problem(2, 6, groups=3)
    for bad in ((x[:, :5], a, b), (x, a[:2], b), (x, a, b[:, :3]), (x[0, 0], a, b), (x, a[0], b), (x, a, b[:0])):
        with pytest.raises(ValueError, match=r"x, a, b of shapes .* must be \(\*, I\)"):
            rational(*bad)
    with pytest.raises(ValueError, match=r"a of torch\.int64"):
        rational(x, a.long(), b)
    with pytest.raises(ValueError, match="denominator='abs': must be one of 'abs_terms', 'abs_sum'"):
        rational(x, a, b, "abs")
