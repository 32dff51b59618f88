"""`nmu_product` against its definition: values, gradients without division, range, memory, and the tools of torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import nmu_product as nmu_module
from archzoo.kernels.nmu_product import (
    nmu_product,
    nmu_product_op,
    nmu_product_reference,
)
from tests.helpers import rms_error, sampled, value_and_grads

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BOUNDS = {  # forward, gradient of x, gradient of w
    torch.float64: (1e-12, 1e-11, 1e-11),
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}
SHAPES = [  # leading dimensions, O, I
    ((1,), 1, 1),
    ((), 3, 33),
    ((2, 3, 5), 7, 2),
    ((33,), 130, 63),
    ((130,), 3, 250),
    ((70,), 65, 17),
    ((2, 2, 1), 1, 600),
    ((0,), 4, 3),
]


@pytest.fixture(params=["small", "tiled", "tiny tiles"])
def path(request, monkeypatch):
    """Every problem in one go; every problem by tiles; by so small tiles that every loop runs more than once."""
    monkeypatch.setattr(nmu_module, "_SMALL", 2**60 if request.param == "small" else 0)
    if request.param == "tiny tiles":
        monkeypatch.setattr(nmu_module, "_TILE", 20)
    return request.param


def problem(leading, outputs, features, dtype=torch.float64):
    """Factors around 1, so that products of any number of them are in range."""
    x = 1 + 0.7 * torch.randn(*leading, features, dtype=torch.float64) / features**0.5
    w = torch.rand(outputs, features, dtype=torch.float64)
    return x.to(dtype), w.to(dtype), torch.randn(*leading, outputs, dtype=torch.float64).to(dtype)


def assert_close(got, truth, bounds):
    for name, out, reference, bound in zip(("y", "dx", "dw"), got, truth, bounds, strict=True):
        assert rms_error(out, reference) <= bound, f"{name}: {rms_error(out, reference):.1e}, allowed {bound:.1e}"


def exact_gradients(x, w, dy):
    """By the exclusive products, each multiplied out."""
    t = x[:, None] * w + 1 - w
    e = torch.stack([t[..., [j for j in range(t.shape[-1]) if j != i]].prod(-1) for i in range(t.shape[-1])], -1)
    return torch.einsum("bo,boi,oi->bi", dy, e, w), torch.einsum("bo,boi,bi->oi", dy, e, x - 1)


def test_reference_is_the_equation():
    x, w, _ = problem((2,), 3, 4)
    want = [
        [torch.stack([w[o, i] * x[b, i] + 1 - w[o, i] for i in range(4)]).prod() for o in range(3)] for b in range(2)
    ]
    assert torch.allclose(nmu_product_reference(x, w), torch.tensor(want, dtype=torch.float64), rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("path")
def test_as_accurate_as_its_dtype_allows(shape, dtype):
    x, w, dy = problem(*shape, dtype)
    truth = value_and_grads(nmu_product_reference, (x.double(), w.double()), dy.double())
    got = value_and_grads(nmu_product, (x, w), dy)
    assert {t.dtype for t in got} == {dtype}
    assert_close(got, truth, BOUNDS[dtype])


@pytest.mark.usefixtures("path")
def test_zero_factors_have_exact_gradients():
    """At none, one, two and all zeros a row; y / t would be NaN."""
    x, w, dy = problem((40,), 30, 50)
    w[:10] = (w[:10] > 0.5).double()  # factors of 1, and of x
    x[1, 7] = x[2, 7] = x[2, 40] = 0
    x[3] = 0
    w[:3, 7] = w[:3, 40] = 1
    got = value_and_grads(nmu_product, (x, w), dy)
    assert (got[0][1:4, :3] == 0).all()
    assert_close(got, (nmu_product_reference(x, w), *exact_gradients(x, w, dy)), BOUNDS[torch.float64])
    assert rms_error(got[1][1:3], exact_gradients(x, w, dy)[0][1:3]) < 1e-11
    assert got[1].isfinite().all()


@pytest.mark.usefixtures("path")
def test_gradient_survives_where_the_product_underflows():
    """y = 1e-50 is 0 in float32, and y / t = 0; the product of the others, 1e-25, is not."""
    x = torch.tensor([[1e-25, 1e-25, 2.0]])
    w = torch.ones(1, 3)
    y, dx, dw = value_and_grads(nmu_product, (x, w))
    assert y.item() == 0
    assert torch.allclose(dx, torch.tensor([[2e-25, 2e-25, 0.0]]), rtol=1e-6, atol=0)
    assert torch.allclose(dw, torch.tensor([[-2e-25, -2e-25, 0.0]]), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("path")
def test_a_weight_of_one_keeps_every_digit_and_a_weight_of_zero_leaves_the_input_out():
    x = torch.tensor([[1e-9, 123456.0], [-3e-30, 3.0], [0.0, 5.0]])
    assert torch.equal(nmu_product(x, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))[:, :2], x)
    assert torch.equal(nmu_product(x, torch.zeros(4, 2)), torch.ones(3, 4))
    assert torch.equal(nmu_product(x, torch.ones(1, 2)), x.prod(-1, keepdim=True))


@pytest.mark.usefixtures("path")
def test_order_of_inputs_and_outputs_does_not_matter():
    x, w, dy = problem((40,), 30, 50)
    columns, rows = torch.randperm(50), torch.randperm(30)
    y, dx, dw = value_and_grads(nmu_product, (x, w), dy)
    got = value_and_grads(nmu_product, (x[:, columns], w[rows][:, columns]), dy[:, rows])
    assert_close(got, (y[:, rows], dx[:, columns], dw[rows][:, columns]), BOUNDS[torch.float64])


@settings(max_examples=80, deadline=None)
@given(
    x=st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.5, -2.0, 1.0]), min_size=6, max_size=6), min_size=1, max_size=4),
    w=st.lists(st.lists(st.sampled_from([0.0, 1.0, 1.0, 0.5]), min_size=6, max_size=6), min_size=1, max_size=3),
    small=st.booleans(),
)
def test_any_zero_factors_have_exact_gradients(x, w, small):
    """A factor is 0 where w = 1 meets x = 0: none, one, or all six of a product, in any pattern."""
    before = nmu_module._SMALL, nmu_module._TILE
    try:
        nmu_module._SMALL, nmu_module._TILE = (2**60, 2**15) if small else (0, 2)
        x, w = (torch.tensor(rows, dtype=torch.float64) for rows in (x, w))
        dy = 1 + torch.arange(len(x) * len(w), dtype=torch.float64).view(len(x), len(w))
        got = value_and_grads(nmu_product, (x, w), dy)
        want = nmu_product_reference(x, w), *exact_gradients(x, w, dy)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(got, want, strict=True))
    finally:
        nmu_module._SMALL, nmu_module._TILE = before


@pytest.mark.usefixtures("path")
def test_gradients_of_several_zero_factors_pass_gradcheck():
    """Rows with no zero factor, one, two, and none but zeros."""
    x = torch.tensor([[2.0, 3, 0.5], [0, 3, 0.5], [0, 0, 0.5], [0, 0, 0]], dtype=torch.float64)
    w = torch.tensor([[1.0, 1, 1], [1, 1, 0], [0.5, 1, 1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(nmu_product, (x.requires_grad_(), w.requires_grad_()))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 12), outputs=st.integers(1, 12), features=st.integers(1, 40), small=st.booleans())
def test_any_shape(rows, outputs, features, small):
    before = nmu_module._SMALL, nmu_module._TILE
    try:
        nmu_module._SMALL, nmu_module._TILE = (2**60, 2**15) if small else (0, 30)
        x, w, dy = problem((rows,), outputs, features)
        truth = value_and_grads(nmu_product_reference, (x, w), dy)
        assert_close(value_and_grads(nmu_product, (x, w), dy), truth, BOUNDS[torch.float64])
    finally:
        nmu_module._SMALL, nmu_module._TILE = before


@pytest.mark.usefixtures("path")
def test_strided_and_expanded_inputs_and_mixed_dtypes():
    x, w, dy = problem((40,), 30, 50)
    before = x.clone(), w.clone(), dy.clone()
    truth = value_and_grads(nmu_product, (x, w), dy)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, w, dy), strict=True)), "an input was written to"
    turned = value_and_grads(nmu_product, (x.t().contiguous().t(), w.t().contiguous().t()), dy.t().contiguous().t())
    assert_close(turned, truth, (1e-13,) * 3)
    expanded = x[:1].expand(40, -1)
    want = value_and_grads(nmu_product, (expanded.contiguous(), w), torch.ones_like(dy))
    got = value_and_grads(nmu_product, (expanded, w), torch.ones(1, 1, dtype=dy.dtype).expand_as(dy))
    assert_close(got, want, (1e-13,) * 3)
    mixed = value_and_grads(nmu_product, (x.bfloat16(), w.float()), dy.bfloat16())
    assert [t.dtype for t in mixed] == [torch.bfloat16, torch.bfloat16, torch.float32]
    want = value_and_grads(nmu_product_reference, (x.bfloat16().double(), w.float().double()), dy.bfloat16().double())
    assert_close(mixed, want, (6e-3, 1e-2, 2e-5))


@pytest.mark.usefixtures("path")
def test_half_precision_is_multiplied_in_float32():
    """4 ** 20 * 0.25 ** 20 leaves fp16's range on the way, and 200 roundings to bf16 would be far off."""
    x = torch.tensor([4.0] * 20 + [0.25] * 20, dtype=torch.float16)
    assert nmu_product(x, torch.ones(1, 40, dtype=torch.float16)).item() == 1
    x, w, _ = problem((40,), 30, 200, torch.bfloat16)
    assert rms_error(nmu_product(x, w), nmu_product_reference(x.double(), w.double())) < 2**-8


@pytest.mark.usefixtures("path")
def test_nan_stays_in_its_row():
    x, w, dy = problem((40,), 30, 50)
    x[1, 17] = torch.nan
    w[:, 17] = 0  # not even left out
    y, dx, dw = value_and_grads(nmu_product, (x, w), dy)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert dx[1].isnan().any()
    assert dx[[0, 2]].isfinite().all()
    assert dw.isnan().any()


@pytest.mark.usefixtures("path")
def test_gradients_of_gradients():
    x, w, _ = problem((3,), 2, 5)
    with torch.no_grad():
        x[0, 1] = x[1, 1] = x[1, 2] = 0
        w[0, 1] = w[0, 2] = 1
    inputs = [t.requires_grad_() for t in (x, w)]
    assert torch.autograd.gradcheck(nmu_product, inputs)
    assert torch.autograd.gradgradcheck(nmu_product, inputs)


@pytest.mark.usefixtures("path")
def test_gradients_that_nobody_needs_are_not_computed():
    x, w, dy = problem((40,), 30, 50)
    dx, dw = nmu_product_op.backward_op(dy, x, w, [True, True])
    for needs in [[True, False], [False, True]]:
        for got, want, needed in zip(nmu_product_op.backward_op(dy, x, w, needs), (dx, dw), needs, strict=True):
            assert torch.equal(got, want) if needed else got.numel() == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("shape", sampled([((0,), 4, 3), ((5,), 4, 3), ((70,), 65, 17)], [((5,), 4, 3)]), ids=str)
def test_opcheck(shape):
    x, w, dy = problem(*shape, torch.float32)
    opcheck(nmu_product_op.op, tuple(t.clone().requires_grad_() for t in (x, w)))
    opcheck(nmu_product_op.backward_op, (dy, x, w, [True, True]))
    opcheck(nmu_product_op.backward_op, (dy, x, w, [False, True]))


def test_functional_transforms():
    """Seeds trained side by side: one weight and one batch a seed, under vmap of grad."""
    x, w, _ = problem((4, 6), 8, 5)
    w = w.view(4, 2, 5)
    loss = lambda w, x: nmu_product(x, w).sin().sum()  # noqa: E731
    together = torch.func.vmap(torch.func.grad(loss))(w, x)
    each = [value_and_grads(lambda v, x=x: loss(v, x), (v,))[1] for v, x in zip(w, x, strict=True)]
    assert rms_error(together, torch.stack(each)) < 1e-13


def test_compiled_graph_holds_one_op_for_all_batch_sizes():
    x, w, _ = problem((70,), 65, 17)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(nmu_product, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 4, 70):  # in one go, and by tiles
        assert torch.equal(compiled(x[:rows], w), nmu_product(x[:rows], w))
    torch._dynamo.reset()
    assert len(graphs) == 1
    ops = [str(node.target) for node in graphs[0].graph.nodes if "archzoo" in str(node.target)]
    assert ops == ["archzoo.nmu_product.default"]


def test_autocast_rounds_the_result_only():
    x, w, dy = problem((40,), 30, 50, torch.float32)
    want = value_and_grads(nmu_product, (x, w), dy.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_grads(nmu_product, (x, w), dy.bfloat16())
        assert nmu_product(x.double(), w).dtype == torch.float64
    assert torch.equal(got[0], want[0].bfloat16())
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


@pytest.mark.plain_memory
@pytest.mark.parametrize(
    ("rows", "outputs", "features"),
    [pytest.param(1024, 256, 256, marks=pytest.mark.slow), (4096, 64, 64), (64, 512, 784), (8192, 2, 100)],
)
def test_memory_beyond_inputs_outputs_and_parameters(rows, outputs, features):
    """Peak of forward and backward, as torch's allocator reports it; (B, O, I) would be up to 100 times more."""
    x, w, dy = problem((rows,), outputs, features, torch.float32)
    leaves = [t.requires_grad_() for t in (x, w)]
    torch.autograd.grad(nmu_product(*leaves), leaves, dy)  # what only the first call allocates
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients = torch.autograd.grad(nmu_product(*leaves), leaves, dy)
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for change in changes:
        used += change
        peak = max(peak, used)
    size = 4 * (x.numel() + w.numel() + dy.numel())
    assert peak >= sum(4 * g.numel() for g in gradients), "the measurement misses allocations"
    assert peak <= 3 * size, f"{peak / size:.2f} times inputs, outputs and parameters"
    assert max(changes) <= max(2**20, 4 * max(x.numel(), w.numel(), dy.numel())), "a temporary is larger than a block"


def test_flops():
    x, w, dy = problem((6,), 4, 5)
    leaves = [t.requires_grad_() for t in (x, w)]
    with FlopCounterMode(display=False) as counter:
        y = nmu_product(*leaves)
    assert counter.get_total_flops() == 3 * 6 * 4 * 5
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    assert counter.get_total_flops() == 11 * 6 * 4 * 5


@pytest.mark.usefixtures("path")
def test_two_runs_agree_bit_for_bit():
    x, w, dy = problem((70,), 65, 17, torch.float32)
    first, second = (value_and_grads(nmu_product, (x, w), dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_shapes_are_refused():
    x, w, _ = problem((2,), 3, 4)
    with pytest.raises(ValueError, match=r"w of shape \(4,\)"):
        nmu_product(x, w[0])
    with pytest.raises(ValueError, match=r"w of shape \(0, 4\)"):
        nmu_product(x, w[:0])
    with pytest.raises(ValueError, match=r"x of shape \(2, 3\).*4"):
        nmu_product(x[:, 1:], w)
    with pytest.raises(ValueError, match="floating point"):
        nmu_product(x.long(), w)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "divides"),
    [
        (0.7, 1.4, True),
        (1.0, 2.0, True),
        (0.0, 1.0, False),
        (-2.0, 2.0, False),
        (-2.0, -1.0, False),
        (1e-3, 3.0, False),
    ],
)
def test_gradients_by_division_and_by_scans_are_those_of_the_definition(small, low, high, divides, monkeypatch):
    monkeypatch.setattr(nmu_module, "_SMALL", 2**60 if small else 0)
    monkeypatch.setattr(nmu_module, "_TILE", 30)
    x = (low + (high - low) * torch.rand(9, 40)).float()
    w = torch.rand(7, 40)
    x[0, :2], w[0, :2] = torch.tensor([low, high]), 1.0  # the ends, so that the range is the one that is named
    assert nmu_module._may_divide(x, w, 40 if small else 16, 94.5 if small else 24.0) == divides
    dy = torch.randn(9, 7)
    truth = value_and_grads(nmu_product_reference, (x.double(), w.double()), dy.double())
    for out, want in zip(value_and_grads(nmu_product, (x, w), dy), truth, strict=True):
        assert rms_error(out, want) < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_divided_by_what_is_not_finite(bad):
    x, w = torch.ones(4, 6), torch.full((3, 6), 0.5)
    x[2, 3] = bad
    assert not nmu_module._may_divide(x, w, 6, 94.5)


@pytest.mark.parametrize("features", [1, 2, 3])
def test_a_few_factors_agree_with_the_op(features):
    x, w, dy = torch.randn(5, features).double(), torch.rand(4, features).double(), torch.randn(5, 4).double()
    x[0], w[:2] = 0.0, 1.0  # several factors that are 0
    few = value_and_grads(nmu_product, (x, w), dy)
    for out, want in zip(few, value_and_grads(lambda x, w: nmu_product_op(x, w, False), (x, w), dy), strict=True):
        assert rms_error(out, want) < 1e-14
    assert nmu_product(x.half(), w.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_factors_of_both_signs_and_next_to_zero_leave_the_gradients_right(path, dtype):
    """Where a block may be divided by its factors, the least of which are 1e-8, and where one of them is 0."""
    torch.manual_seed(0)
    x, w, dy = (
        torch.randn(33, 24, dtype=dtype),
        0.25 + 0.5 * torch.rand(20, 24, dtype=dtype),
        torch.randn(33, 20).to(dtype),
    )
    for row in range(12):
        x[row, row] = 1 - 1 / w[row, row]  # the factor is the rounding of this
    x[20, 3], w[5, 3] = 0, 1  # the factor is 0
    got = value_and_grads(nmu_product, (x, w), dy)
    truth = value_and_grads(nmu_product_reference, (x.double(), w.double()), dy.double())
    assert_close(got, truth, BOUNDS[dtype])
