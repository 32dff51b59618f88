"""`kron_sum` and `kron_linear` against `torch.kron`: values, gradients, both paths, memory, and the tools of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import kron_sum as kron_sum_module
from archzoo.kernels.kron_sum import (
    kron_linear,
    kron_linear_op,
    kron_linear_reference,
    kron_sum,
    kron_sum_op,
    kron_sum_reference,
)
from tests.helpers import rms_error, sampled, value_and_grads

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BOUNDS = {  # forward, gradient of x, gradients summed over a batch
    torch.float64: (1e-12, 1e-11, 1e-11),
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}
SHAPES = [  # rows, (n, P, Q), (K, D): with R n <= Q D the factored path, else the built one
    ((33,), (4, 4, 4), (3, 5)),
    ((3,), (4, 4, 4), (16, 33)),
    ((), (2, 2, 2), (5, 7)),
    ((2, 3, 1), (8, 8, 8), (1, 13)),
    ((130,), (1, 1, 1), (3, 63)),
    ((1, 7), (3, 2, 5), (4, 6)),
    ((40,), (3, 2, 5), (4, 6)),
    ((0,), (4, 4, 4), (3, 5)),
]


def randn(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def problem(leading, A_shape, block, dtype=torch.float64, scale=1.0):
    (n, P, Q), (K, D) = A_shape, block
    x, A, S = randn(*leading, Q * D, dtype=dtype, scale=scale), randn(n, P, Q, dtype=dtype), randn(n, K, D, dtype=dtype)
    return x, A, S, randn(*leading, P * K, dtype=dtype)


def assert_close(got, truth, bounds, names=("y", "dx", "dA", "dS")):
    for name, out, reference, bound in zip(names, got, truth, bounds, strict=True):
        assert rms_error(out, reference) <= bound, f"{name}: {rms_error(out, reference):.1e}, allowed {bound:.1e}"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of one row or column, so that every loop over blocks runs more than once."""
    monkeypatch.setattr(kron_sum_module, "_CPU_BLOCK", 1)


def test_reference_is_the_sum_of_torch_kron_written_out():
    A, S = randn(2, 2, 3), randn(2, 4, 5)
    H = kron_sum_reference(A, S)
    for p, k, q, d in [(0, 0, 0, 0), (1, 3, 2, 4), (1, 0, 2, 3), (0, 2, 1, 1)]:
        assert torch.isclose(H[p * 4 + k, q * 5 + d], sum(A[i, p, q] * S[i, k, d] for i in range(2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_as_accurate_as_its_dtype_allows(shape, dtype):
    x, A, S, dy = problem(*shape, dtype)
    truth = value_and_grads(kron_linear_reference, (x.double(), A.double(), S.double()), dy.double())
    got = value_and_grads(kron_linear, (x, A, S), dy)
    assert {t.dtype for t in got} == {dtype}
    forward, gradient, summed = BOUNDS[dtype]
    assert_close(got, truth, (forward, gradient, summed, summed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_cutting_into_blocks_changes_nothing(shape):
    x, A, S, dy = problem(*shape)
    truth = value_and_grads(kron_linear_reference, (x, A, S), dy)
    assert_close(value_and_grads(kron_linear, (x, A, S), dy), truth, (1e-12, 1e-11, 1e-11, 1e-11))
    dH = randn(*kron_sum_reference(A, S).shape)
    truth = value_and_grads(kron_sum_reference, (A, S), dH)
    assert_close(value_and_grads(kron_sum, (A, S), dH), truth, (1e-12, 1e-11, 1e-11), ("H", "dA", "dS"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.usefixtures("small_blocks")
def test_half_precision_sums_over_blocks_in_float32(rows, dtype):
    x, A, S, dy = problem((rows,), (16, 16, 16), (4, 4), dtype)
    truth = value_and_grads(kron_linear_reference, (x.double(), A.double(), S.double()), dy.double())
    forward, gradient, summed = BOUNDS[dtype]
    assert_close(value_and_grads(kron_linear, (x, A, S), dy), truth, (forward, gradient, summed, summed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_is_as_accurate_as_its_dtype_allows(dtype):
    A, S = randn(4, 3, 5, dtype=dtype), randn(4, 33, 7, dtype=dtype)
    dH = randn(99, 35, dtype=dtype)
    truth = value_and_grads(kron_sum_reference, (A.double(), S.double()), dH.double())
    got = value_and_grads(kron_sum, (A, S), dH)
    assert {t.dtype for t in got} == {dtype}
    forward, _, summed = BOUNDS[dtype]
    assert_close(got, truth, (forward, summed, summed), ("H", "dA", "dS"))


@pytest.mark.parametrize("rows", [3, 40])
def test_both_paths_give_the_same(rows, monkeypatch):
    x, A, S, dy = problem((rows,), (4, 4, 4), (5, 6))
    results = []
    for factored in (False, True):
        monkeypatch.setattr(kron_sum_module, "_is_factored", lambda *shapes, factored=factored: factored)
        results.append(value_and_grads(kron_linear, (x, A, S), dy))
    assert not torch.equal(results[0][0], results[1][0]), "the same path ran twice"
    assert_close(results[0], results[1], (1e-13,) * 4)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_large_and_small_inputs(scale):
    x, A, S, dy = problem((9,), (4, 4, 4), (5, 6), torch.float32, scale)
    truth = value_and_grads(kron_linear_reference, (x.double(), A.double(), S.double()), dy.double())
    assert_close(value_and_grads(kron_linear, (x, A, S), dy), truth, (2e-6, 5e-6, 2e-5, 2e-5))


@pytest.mark.parametrize("rows", [3, 40])
def test_strided_and_expanded_inputs_and_mixed_dtypes(rows):
    x, A, S, dy = problem((rows,), (4, 4, 4), (5, 6))
    truth = value_and_grads(kron_linear, (x, A, S), dy)
    views = x.t().contiguous().t(), A.transpose(1, 2).contiguous().transpose(1, 2), S.mT.contiguous().mT
    assert_close(value_and_grads(kron_linear, views, dy.t().contiguous().t()), truth, (1e-13,) * 4)
    expanded = x[:1].expand(rows, -1)
    want = value_and_grads(kron_linear, (expanded.contiguous(), A, S), torch.ones_like(dy))
    got = value_and_grads(kron_linear, (expanded, A, S), torch.ones(1, 1, dtype=dy.dtype).expand_as(dy))
    assert_close(got, want, (1e-13,) * 4)

    mixed = value_and_grads(kron_linear, (x.float(), A, S.bfloat16()), dy.float())
    assert [t.dtype for t in mixed] == [torch.float32, torch.float32, torch.float64, torch.bfloat16]
    want = value_and_grads(kron_linear_reference, (x, A, S.bfloat16().double()), dy)
    assert_close(mixed, want, (2e-6, 5e-6, 2e-5, 6e-3))
    assert kron_sum(A.float(), S.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("rows", [3, 40])
def test_nan_stays_in_its_row(rows):
    x, A, S, _ = problem((rows,), (4, 4, 4), (5, 6))
    x[1, 17] = torch.nan
    y = kron_linear(x, A, S)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    S[2, 1, 1] = torch.nan
    assert kron_linear(x, A, S).isnan().any(1).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 20),
    A_shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_any_shape(rows, A_shape, block):
    x, A, S, dy = problem((rows,), A_shape, block)
    truth = value_and_grads(kron_linear_reference, (x, A, S), dy)
    assert_close(value_and_grads(kron_linear, (x, A, S), dy), truth, (1e-12, 1e-11, 1e-11, 1e-11))


@pytest.mark.parametrize("rows", [2, 7])
def test_gradients_of_gradients(rows):
    x, A, S, _ = problem((rows,), (2, 2, 2), (2, 3))
    inputs = [t.requires_grad_() for t in (x, A, S)]
    assert torch.autograd.gradcheck(kron_linear, inputs)
    assert torch.autograd.gradgradcheck(kron_linear, inputs)
    assert torch.autograd.gradcheck(kron_sum, inputs[1:])
    assert torch.autograd.gradgradcheck(kron_sum, inputs[1:])


@pytest.mark.parametrize("rows", [2, 40])
def test_gradients_that_nobody_needs_are_not_computed(rows):
    x, A, S, dy = problem((rows,), (4, 4, 4), (5, 6))
    truth = kron_linear_op.backward_op(dy, x, A, S, [True] * 3)
    with FlopCounterMode(display=False) as counter:
        kron_linear(x, A, S)  # registers the formulas
        kron_linear_op.backward_op(dy, x, A, S, [True] * 3)
    everything = counter.get_total_flops()
    for needs in [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]:
        with FlopCounterMode(display=False) as counter:
            got = kron_linear_op.backward_op(dy, x, A, S, needs)
        assert 0 < counter.get_total_flops() < everything
        for gradient, reference, needed in zip(got, truth, needs, strict=True):
            assert gradient.numel() == (reference.numel() if needed else 0)
            assert not needed or torch.equal(gradient, reference)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("rows", sampled([0, 2, 40], [2, 40]))
def test_opcheck(rows):
    x, A, S, dy = problem((rows,), (4, 4, 4), (5, 6), torch.float32)
    inputs = tuple(t.clone().requires_grad_() for t in (x, A, S))
    opcheck(kron_linear_op.op, inputs)
    opcheck(kron_linear_op.backward_op, (dy, x, A, S, [True] * 3))
    opcheck(kron_linear_op.backward_op, (dy, x, A, S, [False, True, False]))
    opcheck(kron_sum_op.op, (*inputs[1:], torch.bfloat16))
    opcheck(kron_sum_op.backward_op, (randn(20, 24, dtype=torch.float32), A, S, torch.float32, [True] * 2))


def test_functional_transforms():
    x, A, S, _ = problem((5, 3), (4, 4, 4), (5, 6))
    loss = lambda S, x: kron_linear(x, A, S).square().sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(S, x)
    assert rms_error(each, torch.stack([value_and_grads(lambda s, x=x: loss(s, x), (S,))[1] for x in x])) < 1e-12
    assert rms_error(torch.vmap(kron_sum)(A.expand(2, -1, -1, -1), S.expand(2, -1, -1, -1))[1], kron_sum(A, S)) < 1e-13


def test_compiled_graph_holds_one_op_for_all_batch_sizes():
    x, A, S, _ = problem((40,), (4, 4, 4), (5, 6))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(kron_linear, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 4, 40):  # the factored path, and the built one
        assert torch.equal(compiled(x[:rows], A, S), kron_linear(x[:rows], A, S))
    torch._dynamo.reset()
    assert len(graphs) == 1
    ops = [str(node.target) for node in graphs[0].graph.nodes if "archzoo" in str(node.target)]
    assert ops == ["archzoo.kron_linear.default"]


@pytest.mark.parametrize("rows", [2, 40])
def test_autocast_computes_and_returns_bfloat16(rows):
    x, A, S, dy = problem((rows,), (4, 4, 4), (5, 6), torch.float32)
    truth = value_and_grads(kron_linear_reference, (x.double(), A.double(), S.double()), dy.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_grads(kron_linear, (x, A, S), dy.bfloat16())
        assert kron_sum(A, S).dtype == torch.bfloat16
        assert kron_linear(x.double(), A, S).dtype == torch.float64
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert_close(got, truth, (8e-3, 1e-2, 1e-2, 1e-2))


@pytest.mark.plain_memory
@pytest.mark.parametrize(("n", "rows", "width"), [(4, 4096, 512), (8, 16, 1024), (16, 32, 2048), (8, 512, 1024)])
def test_memory_beyond_inputs_outputs_and_parameters(n, rows, width):
    """Peak of forward and backward, as torch's allocator reports it, in units of inputs, outputs and parameters."""
    x = torch.randn(rows, width, requires_grad=True)
    A = torch.randn(n, n, n, requires_grad=True)
    S = torch.randn(n, width // n, width // n, requires_grad=True)
    dy = torch.randn(rows, width)
    torch.autograd.grad(kron_linear(x, A, S), (x, A, S), dy)  # what only the first call allocates
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients = torch.autograd.grad(kron_linear(x, A, S), (x, A, S), dy)
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for change in changes:
        used += change
        peak = max(peak, used)
    size = 4 * (2 * x.numel() + A.numel() + S.numel())
    assert peak >= sum(4 * g.numel() for g in gradients), "the measurement misses allocations"
    assert peak <= 3 * size, f"{peak / size:.2f} times inputs, outputs and parameters"


@pytest.mark.parametrize("rows", [6, 7])
def test_flops_are_those_of_the_table(rows):
    n, out, inputs = 4, 20, 24
    x, A, S, dy = problem((rows,), (n, n, n), (5, 6))
    leaves = [t.requires_grad_() for t in (x, A, S)]
    with FlopCounterMode(display=False) as counter:
        y = kron_linear(*leaves)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    gemm, build, mix = rows * out * inputs, n * out * inputs, rows * n * n
    if rows * n <= inputs:
        assert forward == 2 * (gemm + mix * out)
        assert counter.get_total_flops() == 2 * (2 * gemm + mix * (out + 2 * inputs))
    else:
        assert forward == 2 * (gemm + build)
        assert counter.get_total_flops() == 2 * (2 * gemm + 3 * build)


def test_two_runs_agree_bit_for_bit():
    for rows in (3, 200):
        x, A, S, dy = problem((rows,), (4, 4, 4), (5, 6), torch.float32)
        first, second = (value_and_grads(kron_linear, (x, A, S), dy) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_shapes_are_refused():
    x, A, S, _ = problem((2,), (4, 4, 4), (5, 6))
    with pytest.raises(ValueError, match=r"A of shape \(4, 4\)"):
        kron_sum(A[0], S)
    with pytest.raises(ValueError, match="same n"):
        kron_linear(x, A[:3], S)
    with pytest.raises(ValueError, match=r"x of shape \(2, 23\).*24"):
        kron_linear(x[:, 1:], A, S)
    with pytest.raises(ValueError, match="floating point"):
        kron_linear(x.long(), A, S)
