"""`aptx_linear` against its definition: values, gradients, blocks, memory, FLOPs, and the tools of torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import aptx_linear as module
from archzoo.kernels.aptx_linear import aptx_linear, aptx_linear_op, aptx_linear_reference
from tests.helpers import rms, rms_error, run_python, value_and_grads

BOUNDS = {  # forward, gradient of x, gradients summed over a batch
    torch.float64: (1e-12, 1e-11, 1e-11),
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}
SHAPES = [  # leading, in, out, groups
    ((), 5, 3, 3),
    ((33,), 63, 4, 4),
    ((2, 3, 1), 1, 33, 33),
    ((1, 7), 130, 1, 1),
    ((40,), 9, 12, 4),
    ((6,), 33, 10, 1),
    ((0,), 4, 6, 6),
    ((0, 2), 4, 6, 2),
]


def randn(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def problem(leading, features, outputs, groups, dtype=torch.float64, scale=1.0, parameters=None):
    """x, alpha, beta, gamma, bias, and a cotangent."""
    p = parameters or dtype
    alpha, gamma = randn(outputs, features, dtype=p), randn(outputs, features, dtype=p, scale=features**-0.5)
    beta, bias = randn(groups, features, dtype=p, scale=1 / scale), randn(outputs, dtype=p)
    x, dy = randn(*leading, features, dtype=dtype, scale=scale), randn(*leading, outputs, dtype=dtype)
    return (x, alpha, beta, gamma, bias), dy


def assert_as_accurate(inputs, dy, bounds, function=aptx_linear):
    truth = value_and_grads(aptx_linear_reference, [t.double() for t in inputs], dy.double())
    got = value_and_grads(function, inputs, dy)
    allowed = (bounds[0], bounds[1], *[bounds[2]] * (len(got) - 2))
    for name, out, want, bound in zip(
        ("y", "dx", "dalpha", "dbeta", "dgamma", "dbias"), got, truth, allowed, strict=True
    ):
        assert rms_error(out, want) <= bound, f"{name}: {rms_error(out, want):.1e}, allowed {bound:.1e}"
    return got


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of some rows and groups, the last of which is cut, so that every loop over blocks runs more than once."""
    monkeypatch.setattr(module, "_CPU_BLOCK", 60)


def test_reference_is_the_equation_written_out():
    (x, alpha, beta, gamma, bias), _ = problem((2,), 3, 4, 2)
    y = aptx_linear_reference(x, alpha, beta, gamma, bias)
    for b in range(2):
        for o in range(4):
            terms = [
                (alpha[o, i] + math.tanh(beta[o // 2, i] * x[b, i])) * gamma[o, i] * x[b, i]  # outputs 0, 1 | 2, 3
                for i in range(3)
            ]
            assert torch.isclose(y[b, o], bias[o] + sum(terms))


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_its_dtype_allows(shape, dtype):
    inputs, dy = problem(*shape, dtype=dtype)
    got = assert_as_accurate(inputs, dy, BOUNDS[dtype])
    assert {t.dtype for t in got} == {dtype}


@pytest.mark.parametrize("scale", [1e-4, 30.0])
@pytest.mark.parametrize("groups", [10, 2])
def test_small_and_large_inputs_keep_their_accuracy(scale, groups):
    """beta scales inversely, so that tanh is neither linear nor saturated; then it is both."""
    inputs, dy = problem((33,), 40, 10, groups, torch.float32, scale=scale)
    assert_as_accurate(inputs, dy, BOUNDS[torch.float32])
    x, alpha, beta, gamma, bias = inputs
    assert_as_accurate((x, alpha, beta / beta.abs(), gamma, bias), dy, BOUNDS[torch.float32])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [((33,), 7, 10, 10), ((13,), 7, 12, 4), ((5,), 61, 6, 6), ((3,), 200, 4, 2)], ids=str)
def test_blocks_do_not_show(shape):
    inputs, dy = problem(*shape)
    x, groups = inputs[0], shape[3]
    assert all(len(cuts) > 1 for cuts in module._blocks(x, groups, tied=groups < shape[2]))
    assert_as_accurate(inputs, dy, BOUNDS[torch.float64])


@given(st.integers(0, 700), st.integers(1, 700), st.integers(1, 3000), st.booleans())
def test_blocks_cover_everything_once_and_are_bounded(rows, groups, features, tied):
    x = torch.empty(1).expand(rows, features)
    row_blocks, group_blocks = module._blocks(x, groups, tied)
    for blocks, size in ((row_blocks, rows), (group_blocks, groups)):
        assert [i for s in blocks for i in range(s.start, s.stop)] == list(range(size))
    if rows:
        largest = (row_blocks[0].stop - row_blocks[0].start) * (group_blocks[0].stop - group_blocks[0].start) * features
        assert largest <= max(2**17, features)


def test_a_small_layer_is_one_block():
    row_blocks, group_blocks = module._blocks(torch.empty(64, 64), 30, tied=False)
    assert (len(row_blocks), len(group_blocks)) == (1, 1)


@pytest.mark.parametrize("groups", [6, 2])
def test_without_alpha_it_is_one(groups):
    (x, alpha, beta, gamma, bias), dy = problem((7,), 5, 6, groups)
    want = value_and_grads(lambda *t: aptx_linear(t[0], torch.ones_like(alpha), *t[1:]), (x, beta, gamma, bias), dy)
    got = value_and_grads(lambda *t: aptx_linear(t[0], None, *t[1:]), (x, beta, gamma, bias), dy)
    for out, reference in zip(got, want, strict=True):
        assert rms_error(out, reference) < 1e-12


@pytest.mark.parametrize("groups", [6, 2])
def test_without_bias_it_is_zero(groups):
    (x, alpha, beta, gamma, bias), _ = problem((7,), 5, 6, groups)
    for a in (alpha, None):
        without = aptx_linear(x, a, beta, gamma)
        assert rms_error(without, aptx_linear(x, a, beta, gamma, torch.zeros_like(bias))) < 1e-13


def test_a_shared_beta_is_one_repeated():
    (x, alpha, beta, gamma, bias), dy = problem((17,), 9, 12, 3)
    shared = value_and_grads(aptx_linear, (x, alpha, beta, gamma, bias), dy)
    repeated = value_and_grads(aptx_linear, (x, alpha, beta.repeat_interleave(4, 0), gamma, bias), dy)
    for i, (one, other) in enumerate(zip(shared, repeated, strict=True)):
        other = other.view(3, 4, 9).sum(1) if i == 3 else other
        assert rms_error(one, other) < 1e-12


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_is_even_in_beta_and_x_and_linear_in_gamma(rows, features, outputs):
    (x, alpha, beta, gamma, _), _ = problem((rows,), features, outputs, outputs)
    y = aptx_linear(x, alpha, beta, gamma)
    assert rms(aptx_linear(-x, -alpha, beta, gamma) - y) <= 1e-12 * (1 + rms(y))
    assert rms(aptx_linear(x, alpha, beta, -3 * gamma) + 3 * y) <= 1e-12 * (1 + rms(y))


def test_saturated_tanh_gives_beta_no_gradient():
    (x, alpha, beta, gamma, bias), dy = problem((7,), 5, 6, 6)
    _, _, _, dbeta, _, _ = value_and_grads(aptx_linear, (x.sign(), alpha, 1e4 * beta.sign(), gamma, bias), dy)
    assert torch.equal(dbeta, torch.zeros_like(beta))


@pytest.mark.parametrize("groups", [4, 2])
def test_parameters_may_be_wider_than_the_input(groups):
    inputs, dy = problem((33,), 40, 4, groups, torch.bfloat16, parameters=torch.float32)
    got = assert_as_accurate(inputs, dy, BOUNDS[torch.bfloat16])
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 4


@pytest.mark.parametrize("groups", [4, 2])
def test_autocast_rounds_x_and_y_only(groups):
    inputs, dy = problem((33,), 40, 4, groups, torch.float32)
    x, *parameters = inputs

    def under_autocast(x, *parameters):
        with torch.autocast("cpu", torch.bfloat16):
            return aptx_linear(x, *parameters)

    got = value_and_grads(under_autocast, inputs, dy.bfloat16())
    truth = value_and_grads(
        aptx_linear_reference, [x.bfloat16().double(), *(p.double() for p in parameters)], dy.bfloat16().double()
    )
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 5
    bounds = (6e-3, 6e-3, 2e-5, 2e-5, 2e-5, 2e-5)  # dx passes bfloat16, as the gradient of the rounded x
    for out, want, bound in zip(got, truth, bounds, strict=True):
        assert rms_error(out, want) < bound
    with torch.autocast("cpu", torch.bfloat16):  # the backward too keeps its own dtypes
        again = value_and_grads(aptx_linear, inputs, dy.bfloat16())
    for one, other in zip(got, again, strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert aptx_linear(x.double(), *(p.double() for p in parameters)).dtype == torch.float64


@pytest.mark.parametrize("groups", [4, 2])
def test_strides_do_not_matter(groups):
    (x, alpha, beta, gamma, bias), _ = problem((6,), 5, 4, groups)
    transposed = [t.t().contiguous().t() for t in (x, alpha, beta, gamma)]
    row = x[:1].expand(6, 5)
    ones = torch.ones(()).double().expand(6, 4)
    for got, want in (
        ((*transposed, bias), (x, alpha, beta, gamma, bias)),
        ((row, alpha, beta, gamma, bias), (row.contiguous(), alpha, beta, gamma, bias)),
    ):
        for out, reference in zip(
            value_and_grads(aptx_linear, got, ones), value_and_grads(aptx_linear, want, ones.contiguous()), strict=True
        ):
            assert rms_error(out, reference) < 1e-13


@pytest.mark.parametrize("groups", [4, 2])
def test_nan_reaches_its_row_and_no_other(groups):
    (x, *parameters), _ = problem((6,), 5, 4, groups)
    x[2, 3] = torch.nan
    y = aptx_linear(x, *parameters)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("with_alpha", [True, False])
def test_gradients_pass_gradcheck_twice(groups, with_alpha):
    (x, alpha, beta, gamma, bias), _ = problem((2,), 3, 4, groups)
    inputs = [t.requires_grad_() for t in (x, alpha, beta, gamma, bias)]
    if not with_alpha:
        inputs[1] = None
    assert torch.autograd.gradcheck(aptx_linear, inputs)
    assert torch.autograd.gradgradcheck(aptx_linear, inputs)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("wanted", range(5))
def test_only_gradients_asked_for_are_computed(groups, wanted):
    inputs, dy = problem((7,), 3, 4, groups)
    truth = value_and_grads(aptx_linear, inputs, dy)[1:]
    found = aptx_linear_op.backward_op(dy, *inputs, [i == wanted for i in range(5)])
    for i, (out, want) in enumerate(zip(found, truth, strict=True)):
        assert out.numel() == (want.numel() if i == wanted else 0)
    assert rms_error(found[wanted], truth[wanted]) < 1e-13


def test_functional_transforms_go_through_the_definition():
    (x, alpha, beta, gamma, bias), _ = problem((7,), 3, 4, 4)

    def loss(gamma, x):
        return aptx_linear(x, alpha, beta, gamma, bias).sin().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))(gamma, x)
    for row, gradient in zip(x, per_example, strict=True):
        _, want = value_and_grads(lambda g, row=row: loss(g, row), (gamma,))
        assert rms_error(gradient, want) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize(
    ("rows", "dtype"), [(5, torch.float32), pytest.param(0, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_ops_pass_opcheck(groups, with_alpha, rows, dtype):
    inputs, dy = problem((rows,), 3, 4, groups, dtype, parameters=torch.float32)
    inputs = [t if i != 1 or with_alpha else None for i, t in enumerate(inputs)]
    for needed in ([True, with_alpha, True, True, True], [False, False, True, False, False]):
        opcheck(aptx_linear_op.backward_op, (dy, *inputs, needed))
    opcheck(aptx_linear_op.op, (*inputs[:4], None))
    opcheck(aptx_linear_op.op, [None if t is None else t.requires_grad_() for t in inputs])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
def test_compiles_whole_with_inductor():
    inputs, dy = problem((9,), 5, 6, 6, torch.float32)

    def function(*inputs):
        return torch.relu(aptx_linear(*inputs))

    torch._dynamo.reset()
    got = value_and_grads(torch.compile(function, fullgraph=True), inputs, dy)
    for out, want in zip(got, value_and_grads(function, inputs, dy), strict=True):
        assert rms_error(out, want) < 1e-6


def test_two_runs_agree_bit_for_bit():
    inputs, dy = problem((100,), 200, 40, 40, torch.float32)
    for one, other in zip(
        value_and_grads(aptx_linear, inputs, dy), value_and_grads(aptx_linear, inputs, dy), strict=True
    ):
        assert torch.equal(one, other)


def test_backward_keeps_inputs_only():
    inputs, _ = problem((64,), 50, 40, 40, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().data_ptr()), lambda _: None
    ):
        aptx_linear(*leaves)
    assert kept
    assert set(kept) <= own


def peak_bytes(function):
    """The most memory that a function has allocated at one time, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    assert peak >= sum(t.numel() * t.element_size() for t in result), "the measurement misses allocations"
    return peak


@pytest.mark.plain_memory
@pytest.mark.parametrize(("groups", "dtype"), [(128, torch.float32), (8, torch.float32), (128, torch.float64)], ids=str)
def test_memory_of_forward_and_backward_is_bounded(groups, dtype):
    inputs, dy = problem((256,), 784, 128, groups, dtype)
    leaves = [t.requires_grad_() for t in inputs]
    value_and_grads(aptx_linear, inputs, dy)
    peak = peak_bytes(lambda: torch.autograd.grad(aptx_linear(*leaves), leaves, dy))
    size = sum(t.numel() * t.element_size() for t in (*inputs, dy))
    assert peak <= 3 * size, f"{peak / size:.2f} times inputs, outputs and parameters"
    assert peak < 25 * 2**20


def counted(*inputs, backward=False):
    with FlopCounterMode(display=False) as counter:
        y = aptx_linear(*inputs)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def test_flops_are_those_of_the_equation():
    (x, alpha, beta, gamma, bias), _ = problem((7,), 5, 6, 6)
    n = 7 * 5 * 6
    leaves = [t.requires_grad_() for t in (x, alpha, beta, gamma, bias)]
    assert counted(*leaves) == 6 * n
    assert counted(*leaves, backward=True) == (6 + 17) * n
    assert counted(x.detach(), *leaves[1:], backward=True) == (6 + 17 - 6) * n
    leaves[2] = beta[:2].detach().requires_grad_()
    assert counted(*leaves) == 3 * 7 * 2 * 5 + 4 * n
    assert counted(*leaves, backward=True) == (3 + 12) * 7 * 2 * 5 + (4 + 8) * n


@pytest.mark.slow
def test_flop_formulas_wait_for_the_counter_and_do_not_import_it():
    run_python(
        "import sys, torch\n"
        "before = len(sys.meta_path)\n"
        "import archzoo.layers.aptx, archzoo.layers.paon\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import FlopCounterMode, flop_registry\n"
        "assert len(sys.meta_path) <= before + 1 and not any('archzoo' in type(f).__module__ for f in sys.meta_path)\n"
        "layer = archzoo.layers.aptx.APTxLinear(3, 5)\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    layer(torch.randn(2, 3))\n"
        "assert counter.get_total_flops() == 6 * 2 * 3 * 5\n"
        "ops = torch.ops.archzoo\n"
        "assert {ops.aptx_linear_backward, ops.paon_linear, ops.paon_linear_backward} <= flop_registry.keys()\n"
    )


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("x", ((4, 6), (4, 5), (4, 5), (4, 5), (4,))),
        ("x", ((), (4, 5), (4, 5), (4, 5), (4,))),
        ("alpha", ((4, 5), (5, 4), (4, 5), (4, 5), (4,))),
        ("beta", ((4, 5), (4, 5), (3, 5), (4, 5), (4,))),
        ("beta", ((4, 5), (4, 5), (4, 4), (4, 5), (4,))),
        ("beta", ((4, 5), (4, 5), (5,), (4, 5), (4,))),
        ("beta", ((4, 5), (4, 5), (0, 5), (4, 5), (4,))),
        ("gamma", ((4, 5), (4, 5), (4, 5), (5,), (4,))),
        ("bias", ((4, 5), (4, 5), (4, 5), (4, 5), (5,))),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(name, shapes):
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        aptx_linear(*(torch.zeros(shape) for shape in shapes))
