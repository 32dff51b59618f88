"""`paon_linear` and the Padé epilogue against their definitions: values, gradients, memory, FLOPs, tools of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import _pade
from archzoo.kernels.paon_linear import paon_linear, paon_linear_op, paon_linear_reference
from tests.helpers import RecordOps, rms, rms_error, value_and_grads

BOUNDS = {  # forward, gradient of x, gradients summed over a batch
    torch.float64: (1e-12, 1e-11, 1e-11),
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}
DEGREES = [(1, 1), (2, 2), (3, 3), (2, 0), (5, 0), (0, 1), (0, 3), (1, 2), (1, 4), (2, 1), (4, 1), (3, 2)]
VARIANTS = ["smooth", "absolute"]
SHAPES = [((), 5, 3), ((33,), 63, 4), ((2, 3, 1), 1, 33), ((1, 7), 130, 1), ((0,), 4, 6), ((0, 2), 4, 6)]
every_degree = pytest.mark.parametrize("degrees", DEGREES, ids=str)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def randn(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def problem(leading, features, outputs, degrees, dtype=torch.float64, scale=1.0, bias=True):
    """x, W, V, bias, where there are any, and a cotangent. Terms have a size of 1; Q_N = Q_{N-1} = 0 is far away."""
    (M, N), each = degrees, features**-0.5
    powers = torch.tensor([scale**-k for k in range(1, max(degrees) + 1)], dtype=torch.float64)[:, None, None]
    W, V = powers[:M] * each * randn(M, outputs, features), 0.3 * powers[:N] * each * randn(N, outputs, features)
    inputs = [
        randn(*leading, features, dtype=dtype, scale=scale),
        W.to(dtype) if M else None,
        V.to(dtype) if N else None,
        randn(outputs, dtype=dtype) if bias else None,
    ]
    return inputs, randn(*leading, outputs, dtype=dtype)


def gradients(function, inputs, dy, variant="smooth", **options):
    """The value and the gradients of those inputs that are there, by name."""
    there = [i for i, t in enumerate(inputs) if t is not None]

    def call(*values):
        full = [None] * 4
        for i, value in zip(there, values, strict=True):
            full[i] = value
        if function is paon_linear_reference:
            return function(*full, absolute=variant == "absolute", **options)
        return function(*full, variant=variant, **options)

    found = value_and_grads(call, [inputs[i] for i in there], dy)
    return dict(zip(["y", *(("dx", "dnumerator", "ddenominator", "dbias")[i] for i in there)], found, strict=True))


def doubled(inputs):
    return [None if t is None else t.double() for t in inputs]


def assert_as_accurate(inputs, dy, variant, bounds):
    got = gradients(paon_linear, inputs, dy, variant)
    truth = gradients(paon_linear_reference, doubled(inputs), dy.double(), variant)
    for name, out in got.items():
        bound = bounds[{"y": 0, "dx": 1}.get(name, 2)]
        error = rms_error(out, truth[name])
        assert error <= bound, f"{name}: {error:.1e}, allowed {bound:.1e}"
    return got


# --- The epilogue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("M", [0, 1, 2])
@pytest.mark.parametrize("N", [1, 2])
def test_smooth_epilogue_agrees_with_autograd(shape, M, N):
    """Of any shape: (rows, features), or feature maps."""
    w0, p_low, p, q_low, q = (randn(*shape).requires_grad_() for _ in range(5))
    eps = 0.1 if N > 1 else 0.0
    P_low = [0.0, w0, w0 + p_low][M]
    P = [w0, w0 + p, w0 + p_low + p][M]
    Q_low = 1 + q_low if N > 1 else 1.0
    Q = Q_low + q
    y, dy = (Q * P + Q_low * P_low) / (Q**2 + Q_low**2 + eps), randn(*shape)
    assert rms_error(_pade.smooth(P, P_low, Q, Q_low, eps), y) < 1e-14
    d = _pade.smooth_backward(dy, P, P_low, Q, Q_low, eps)
    want = torch.autograd.grad(y, (p, p_low, q, q_low, w0), dy, allow_unused=True)
    got = (d.p, d.p_low, d.q, d.q_low, d.p_low if M else d.p)
    wanted = [w is not None for w in want]
    assert wanted == [M > 0, M > 1, True, N > 1, True]
    for out, reference in zip(got, want, strict=True):
        assert reference is None or rms_error(out, reference) < 1e-13


def test_absolute_epilogue_agrees_with_autograd():
    P, q, dy = randn(2, 3, 4, 5).requires_grad_(), randn(3, 2, 3, 4, 5).requires_grad_(), randn(2, 3, 4, 5)
    with torch.no_grad():
        q[1, 0] = 0  # the kink, where autograd takes 0 too
    y = P / (1 + q.abs().sum(0))
    assert rms_error(_pade.absolute(P, q), y) < 1e-14
    dP, dq = torch.autograd.grad(y, (P, q), dy)
    d = _pade.absolute_backward(dy, P, q)
    assert rms_error(d.p, dP) < 1e-14
    assert rms_error(d.q, dq) < 1e-14


# --- Values and gradients ---------------------------------------------------------------------------------------------


@every_variant
@every_degree
def test_reference_is_the_equation_written_out(degrees, variant):
    (x, W, V, bias), _ = problem((2,), 3, 4, degrees)
    M, N = degrees
    got = paon_linear_reference(x, W, V, bias, variant == "absolute", eps=0.01)
    for b in range(2):
        for o in range(4):
            p = [sum(W[k - 1, o, i] * x[b, i] ** k for i in range(3)) for k in range(1, M + 1)]
            q = [sum(V[k - 1, o, i] * x[b, i] ** k for i in range(3)) for k in range(1, N + 1)]
            P = {m: bias[o] + sum(p[:m]) for m in range(M + 1)} | {-1: torch.tensor(0.0)}
            Q = {n: 1 + sum(q[:n]) for n in range(N + 1)}
            if N == 0:
                want = P[M]
            elif variant == "absolute":
                want = P[M] / (1 + sum(abs(t) for t in q))
            else:
                want = (Q[N] * P[M] + Q[N - 1] * P[M - 1]) / (Q[N] ** 2 + Q[N - 1] ** 2 + (0.01 if N >= 2 else 0))
            assert torch.isclose(got[b, o], want)


@every_variant
@every_degree
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_every_degree_is_as_accurate_as_its_dtype_allows(degrees, variant, dtype):
    inputs, dy = problem((17,), 33, 10, degrees, dtype)
    got = assert_as_accurate(inputs, dy, variant, BOUNDS[dtype])
    assert {t.dtype for t in got.values()} == {dtype}


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_accurate(shape, degrees, variant):
    inputs, dy = problem(*shape, degrees)
    assert_as_accurate(inputs, dy, variant, BOUNDS[torch.float64])


@every_variant
@every_degree
def test_without_bias_it_is_zero(degrees, variant):
    (x, W, V, bias), dy = problem((7,), 5, 4, degrees)
    without = gradients(paon_linear, (x, W, V, None), dy, variant)
    zero = gradients(paon_linear, (x, W, V, torch.zeros_like(bias)), dy, variant)
    for name, out in without.items():
        assert rms_error(out, zero[name]) < 1e-13, name


@pytest.mark.parametrize("scale", [1e-4, 30.0])
@every_variant
def test_small_and_large_inputs_keep_their_accuracy(scale, variant):
    """The weights scale inversely, so that every degree counts."""
    inputs, dy = problem((33,), 40, 10, (3, 3), torch.float32, scale=scale)
    assert_as_accurate(inputs, dy, variant, BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(), (33,), (2, 3)], ids=str)
@every_variant
def test_1_0_is_the_linear_layer_bit_for_bit(leading, dtype, variant):
    inputs, dy = problem(leading, 40, 10, (1, 0), dtype)
    x, W, _, bias = inputs
    got = gradients(paon_linear, inputs, dy, variant)
    want = value_and_grads(lambda x, w, b: F.linear(x, w[0], b), (x, W, bias), dy)
    for (name, out), reference in zip(got.items(), want, strict=True):
        assert torch.equal(out, reference), name


@every_variant
@given(st.integers(1, 9), st.integers(1, 6), st.sampled_from(DEGREES))
@settings(max_examples=20, deadline=None)
def test_is_linear_in_the_numerator(variant, rows, features, degrees):
    (x, W, V, bias), _ = problem((rows,), features, 3, degrees)
    y = paon_linear(x, W, V, bias, variant=variant)
    tripled = paon_linear(x, None if W is None else -3 * W, V, -3 * bias, variant=variant)
    assert rms(tripled + 3 * y) <= 1e-12 * (1 + rms(y))


@pytest.mark.parametrize("N", [1, 2, 3])
def test_absolute_is_never_larger_than_its_numerator(N):
    (x, W, V, bias), _ = problem((50,), 9, 7, (2, N))
    polynomial = paon_linear(x, W, None, bias)
    assert (paon_linear(x, W, 10 * V, bias, variant="absolute").abs() <= polynomial.abs() + 1e-12).all()


def test_eps_guards_the_smooth_variant_from_degree_two_on():
    """One input x = 1 with q_1 = -1, q_2 = 0 makes Q_2 = Q_1 = 0; with N = 1 the denominator is 1 at least."""
    x, W, bias = torch.ones(1, 1), torch.ones(1, 1, 1), torch.zeros(1)
    V = torch.tensor([-1.0, 0.0]).view(2, 1, 1)
    assert paon_linear(x, W, V, bias, eps=1e-6).item() == 0
    assert paon_linear(x, W, V, bias, eps=0.0).isnan().all()
    assert torch.equal(paon_linear(x, W, V[:1], bias, eps=0.5), paon_linear(x, W, V[:1], bias, eps=0.0))


def test_zero_terms_of_the_absolute_variant_get_no_gradient():
    (x, W, V, bias), dy = problem((9,), 5, 4, (2, 2))
    got = gradients(paon_linear, (x, W, torch.zeros_like(V), bias), dy, "absolute")
    assert torch.equal(got["ddenominator"], torch.zeros_like(V))
    assert rms(got["dnumerator"]) > 0


@every_variant
def test_nan_reaches_its_row_and_no_other(variant):
    (x, *parameters), _ = problem((6,), 5, 4, (2, 2))
    x[2, 3] = torch.nan
    y = paon_linear(x, *parameters, variant=variant)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2)], ids=str)
def test_strides_and_parameter_dtypes_do_not_matter(degrees, variant):
    (x, W, V, bias), dy = problem((6,), 5, 4, degrees)
    want = gradients(paon_linear, (x, W, V, bias), dy, variant)
    transposed = [t.mT.contiguous().mT for t in (x, W, V)]
    strided_dy = torch.stack([dy, dy], -1)[..., 0]
    got = gradients(paon_linear, (*transposed, bias), strided_dy, variant)
    for name, out in got.items():
        assert rms_error(out, want[name]) < 1e-13, name
    row, ones = x[:1].expand(6, 5), torch.ones((), dtype=torch.float64).expand(6, 4)
    want = gradients(paon_linear, (row.contiguous(), W, V, bias), ones.contiguous(), variant)
    for name, out in gradients(paon_linear, (row, W, V, bias), ones, variant).items():
        assert rms_error(out, want[name]) < 1e-13, name
    mixed = (x.bfloat16(), W.float(), V.bfloat16(), bias.float())
    got = assert_as_accurate(mixed, dy.bfloat16(), variant, BOUNDS[torch.bfloat16])
    assert [t.dtype for t in got.values()] == [torch.bfloat16] + [t.dtype for t in mixed]


@every_variant
@pytest.mark.parametrize("degrees", [(1, 0), (1, 1), (3, 2)], ids=str)
def test_autocast_rounds_inputs_as_the_linear_layer_does_and_sums_in_float32(degrees, variant):
    inputs, dy = problem((33,), 40, 4, degrees, torch.float32)
    rounded = [None if t is None else t.bfloat16() for t in inputs]
    truth = gradients(paon_linear_reference, doubled(rounded), dy.bfloat16().double(), variant)

    def under_autocast(*inputs, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return paon_linear(*inputs, **options)

    got = gradients(under_autocast, inputs, dy.bfloat16(), variant)
    assert [t.dtype for t in got.values()] == [torch.bfloat16] + [torch.float32] * (len(got) - 1)
    for name, out in got.items():
        assert rms_error(out, truth[name]) < 6e-3, name  # the last rounding, of y and of each gradient
    with torch.autocast("cpu", torch.bfloat16):  # the backward too keeps its own dtypes
        for name, out in gradients(paon_linear, inputs, dy.bfloat16(), variant).items():
            assert torch.equal(out, got[name]), name
        wide = doubled(inputs)
        assert paon_linear(*wide, variant=variant).dtype == torch.float64


# --- Tools of torch ---------------------------------------------------------------------------------------------------


@every_variant
@every_degree
def test_gradients_pass_gradcheck_twice(degrees, variant):
    inputs, _ = problem((2,), 3, 4, degrees)
    inputs = [None if t is None else t.requires_grad_() for t in inputs]

    def call(*inputs):
        return paon_linear(*inputs, variant=variant)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@every_variant
@pytest.mark.parametrize("wanted", range(4))
def test_only_gradients_asked_for_are_computed(wanted, variant):
    inputs, dy = problem((7,), 3, 4, (2, 2))
    truth = list(gradients(paon_linear, inputs, dy, variant).values())[1:]
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    y = paon_linear(*leaves, variant=variant)
    with RecordOps() as recorded:
        (gradient,) = torch.autograd.grad(y, leaves[wanted], dy)
    assert torch.ops.archzoo.paon_linear_backward in recorded.ops
    assert rms_error(gradient, truth[wanted]) < 1e-13
    with torch.no_grad():
        options = variant == "absolute", 1e-6, True
        saved = paon_linear_op.op(*leaves, *options)[1]
        found = paon_linear_op.backward_op(dy, *leaves, saved, *options, [i == wanted for i in range(4)])
    assert [t.numel() > 0 for t in found] == [i == wanted for i in range(4)]


def test_functional_transforms_go_through_the_definition():
    (x, W, V, bias), _ = problem((7,), 3, 4, (2, 1))

    def loss(W, x):
        return paon_linear(x, W, V, bias).sin().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))(W, x)
    for row, gradient in zip(x, per_example, strict=True):
        _, want = value_and_grads(lambda w, row=row: loss(w, row), (W,))
        assert rms_error(gradient, want) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (3, 0), (0, 2)], ids=str)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(5, torch.float32), pytest.param(0, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_ops_pass_opcheck(degrees, variant, rows, dtype):
    inputs, dy = problem((rows,), 3, 4, degrees, dtype)
    options = variant == "absolute", 1e-6, True
    saved = paon_linear_op.op(*inputs, *options)[1]
    there = [t is not None for t in inputs]
    for needed in (there, [True, False, False, False]):
        opcheck(paon_linear_op.backward_op, (dy, *inputs, saved, *options, needed))
    opcheck(paon_linear_op.op, (*inputs[:3], None, *options))
    opcheck(paon_linear_op.op, (*(None if t is None else t.requires_grad_() for t in inputs), *options))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
def test_compiles_whole_with_inductor():
    inputs, dy = problem((9,), 5, 6, (2, 2), torch.float32)

    def function(*inputs):
        return torch.relu(paon_linear(*inputs))

    torch._dynamo.reset()
    got = value_and_grads(torch.compile(function, fullgraph=True), inputs, dy)
    for out, want in zip(got, value_and_grads(function, inputs, dy), strict=True):
        assert rms_error(out, want) < 1e-6


@every_variant
def test_two_runs_agree_bit_for_bit(variant):
    inputs, dy = problem((100,), 200, 40, (3, 2), torch.float32)
    first, second = (gradients(paon_linear, inputs, dy, variant) for _ in range(2))
    for name, out in first.items():
        assert torch.equal(out, second[name]), name


# --- Cost -------------------------------------------------------------------------------------------------------------


@every_variant
@every_degree
def test_backward_keeps_x_and_the_accumulators(degrees, variant):
    inputs, _ = problem((64,), 50, 40, degrees, torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    own = {t.untyped_storage().data_ptr() for t in leaves if t is not None}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), lambda _: None
    ):
        paon_linear(*leaves, variant=variant)
    extra = sum(size for pointer, size in kept.items() if pointer not in own)
    M, N = degrees
    accumulators = 0 if N == 0 else min(M, 2) + min(N, 2) if variant == "smooth" else min(M, 1) + N
    assert extra == accumulators * 64 * 40 * 4


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
@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (3, 3), (5, 0)], ids=str)
def test_memory_of_forward_and_backward_is_bounded(degrees, variant):
    inputs, dy = problem((256,), 784, 128, degrees, torch.float32)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    full = [None if t is None else t.requires_grad_() for t in inputs]
    torch.autograd.grad(paon_linear(*full, variant=variant), leaves, dy)
    peak = peak_bytes(lambda: torch.autograd.grad(paon_linear(*full, variant=variant), leaves, dy))
    size = sum(t.numel() * t.element_size() for t in (*leaves, dy))
    assert peak <= 2 * size, f"{peak / size:.2f} times inputs, outputs and parameters"


def counted(*inputs, backward=False, **options):
    with FlopCounterMode(display=False) as counter:
        y = paon_linear(*inputs, **options)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@every_variant
@every_degree
def test_flops_are_degree_times_the_linear_layers(degrees, variant):
    inputs, _ = problem((70,), 300, 60, degrees, torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    linear, K = 2 * 70 * 300 * 60, sum(degrees)
    forward = counted(*leaves, variant=variant)
    assert K * linear <= forward < 1.1 * K * linear
    both = counted(*leaves, variant=variant, backward=True)
    assert 3 * K * linear <= both < 3 * 1.1 * K * linear
    leaves[0] = leaves[0].detach()
    assert 2 * K * linear <= counted(*leaves, variant=variant, backward=True) < 2 * 1.1 * K * linear


def test_flops_of_1_1_are_exact():
    inputs, _ = problem((7,), 5, 6, (1, 1))
    gemm, outputs = 2 * 7 * 5 * 6, 7 * 6
    assert counted(*inputs) == 2 * gemm + 5 * outputs  # Q P, + w_0, Q Q, + 1, division
    assert counted(*inputs, variant="absolute") == 2 * gemm + 3 * outputs  # |q|, + 1, division


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("x", ((4, 6), (1, 4, 5), (1, 4, 5), (4,))),
        ("x", ((), (1, 4, 5), None, (4,))),
        ("numerator", ((4, 5), (4, 5), (1, 4, 5), (4,))),
        ("numerator", ((4, 5), (0, 4, 5), (1, 4, 5), (4,))),
        ("denominator", ((4, 5), (1, 4, 5), (1, 3, 5), (4,))),
        ("denominator", ((4, 5), None, (4, 5), (4,))),
        ("bias", ((4, 5), (1, 4, 5), (1, 4, 5), (5,))),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(name, shapes):
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        paon_linear(*(None if shape is None else torch.zeros(shape) for shape in shapes))


def test_no_degree_and_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="numerator=None, denominator=None"):
        paon_linear(torch.zeros(2, 3), None, None, torch.zeros(4))
    with pytest.raises(ValueError, match=r"variant='rough'.*'smooth' or 'absolute'"):
        paon_linear(torch.zeros(2, 3), torch.zeros(1, 4, 3), None, variant="rough")
