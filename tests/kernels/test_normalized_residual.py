"""`normalized_residual` against its definition: values, gradients, rows of zeros, memory, and the tools of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import normalized_residual as module
from archzoo.kernels.normalized_residual import (
    normalized_residual,
    normalized_residual_op,
    normalized_residual_reference,
    unit,
)
from tests.helpers import rms_error, sampled, value_and_grads

BOUNDS = {  # y, and the gradients of h, branch and alpha
    torch.float64: (1e-14, 1e-13, 1e-13, 1e-13),
    torch.float32: (3e-7, 1e-6, 1e-6, 2e-6),
    torch.float16: (1e-3, 2e-3, 2e-3, 2e-3),
    torch.bfloat16: (4e-3, 6e-3, 6e-3, 6e-3),
}
SHAPES = [(1,), (7,), (1, 1), (5, 12), (2, 3, 17), (300, 33), (0, 4), (2, 0, 3)]


@pytest.fixture(params=["one block", "blocks"])
def path(request, monkeypatch):
    """All rows at once, and by blocks of which the last is shorter."""
    monkeypatch.setattr(module, "_BLOCK", 2**30 if request.param == "one block" else 100)


def problem(*shape, dtype=torch.float64):
    h, branch, dy = (
        torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1.0, 5.0, 1.0]).view(3, *[1] * len(shape))
    ).unbind()
    alpha = torch.rand(shape[-1], dtype=torch.float64)
    return (h.to(dtype), branch.to(dtype), alpha.to(dtype)), dy.to(dtype)


def assert_close(got, truth, bounds):
    for name, out, reference, bound in zip(("y", "dh", "dbranch", "dalpha"), got, truth, bounds, strict=True):
        error = rms_error(out, reference)
        assert error <= bound, f"{name}: {error:.1e}, allowed {bound:.1e}"


def test_reference_is_the_equation():
    (h, branch, alpha), _ = problem(6)
    a, b = h / h.norm(), branch / branch.norm()
    r = torch.stack([a[i] + alpha[i] * (b[i] - a[i]) for i in range(6)])
    assert torch.allclose(normalized_residual_reference(h, branch, alpha), r / r.norm(), rtol=1e-14)
    assert torch.equal(normalized_residual_reference(h, branch, torch.zeros(6, dtype=h.dtype)), unit(unit(h)))


def test_gradients_are_the_specs():
    (h, branch, alpha), g = problem(3, 5)
    norm = lambda x: x.norm(dim=-1, keepdim=True)  # noqa: E731
    dot = lambda x, y: (x * y).sum(-1, keepdim=True)  # noqa: E731
    a, b = h / norm(h), branch / norm(branch)
    r = a + alpha * (b - a)
    y = r / norm(r)
    dr = (g - y * dot(y, g)) / norm(r)
    db, da = alpha * dr, (1 - alpha) * dr
    want = y, (da - a * dot(a, da)) / norm(h), (db - b * dot(b, db)) / norm(branch), (dr * (b - a)).sum(0)
    assert_close(value_and_grads(normalized_residual, (h, branch, alpha), g), want, BOUNDS[torch.float64])


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("path")
def test_as_accurate_as_its_dtype_allows(shape, dtype):
    inputs, dy = problem(*shape, dtype=dtype)
    truth = value_and_grads(normalized_residual_reference, [t.double() for t in inputs], dy.double())
    got = value_and_grads(normalized_residual, inputs, dy)
    assert {t.dtype for t in got} == {dtype}
    if shape[-1] == 1:  # a point on a line: y is 1 or -1, and what gradients there are is rounding
        assert_close(got[:1] + truth[1:], truth, BOUNDS[dtype])
        assert all(g.abs().max() < 1e-5 if g.numel() else True for g in got[1:])
    else:
        assert_close(got, truth, BOUNDS[dtype])


@settings(max_examples=60, deadline=None)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    features=st.integers(2, 70),
    block=st.sampled_from([1, 50, 2**16]),
    needs=st.tuples(*[st.booleans()] * 3).filter(any),
)
def test_any_shape_and_any_subset_of_gradients(leading, features, block, needs):
    before = module._BLOCK
    try:
        module._BLOCK = block
        inputs, dy = problem(*leading, features)
        truth = value_and_grads(normalized_residual_reference, inputs, dy)
        leaves = [t.requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        y = normalized_residual(*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy))
        got = [next(found) if need else want for need, want in zip(needs, truth[1:], strict=True)]
        assert_close([y, *got], truth, (1e-13, 1e-11, 1e-11, 1e-11))
    finally:
        module._BLOCK = before


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.usefixtures("path")
def test_rows_of_zeros_give_zeros_and_get_no_gradient(dtype):
    (h, branch, alpha), dy = problem(12, 33, dtype=dtype)
    h[0] = branch[1] = h[2] = branch[2] = 0
    y, dh, dbranch, dalpha = value_and_grads(normalized_residual, (h, branch, alpha), dy)
    assert (dh[[0, 2]] == 0).all()
    assert (dbranch[[1, 2]] == 0).all()
    assert (y[2] == 0).all()
    assert all(t.isfinite().all() for t in (y, dh, dbranch, dalpha))
    assert torch.allclose(y[0].double(), unit((alpha * branch[0]).double()), atol=1e-2)
    assert torch.allclose(y[1].double(), unit(((1 - alpha) * h[1]).double()), atol=1e-2)
    dead = value_and_grads(normalized_residual, (h[2:3], branch[2:3], alpha), dy[2:3])
    assert all((t == 0).all() for t in dead)
    truth = value_and_grads(normalized_residual_reference, [t.double() for t in (h, branch, alpha)], dy.double())
    assert_close((y, dh, dbranch, dalpha), truth, BOUNDS[dtype])


@pytest.mark.usefixtures("path")
def test_rows_below_the_clamp_are_not_made_unit():
    (h, branch, alpha), dy = problem(4, 5)
    h[0] *= 1e-14
    branch[1] *= 1e-13
    truth = value_and_grads(normalized_residual_reference, (h, branch, alpha), dy)
    got = value_and_grads(normalized_residual, (h, branch, alpha), dy)
    assert truth[1][0].abs().max() > 1e8, "the clamp is not reached"
    for out, reference in zip(got, truth, strict=True):
        assert torch.allclose(out, reference, rtol=1e-10, atol=1e-12)


def test_zeros_and_opposite_directions_can_be_differentiated_twice():
    (h, branch, alpha), dy = problem(3, 4)
    h[0] = branch[1] = 0
    leaves = [t.requires_grad_() for t in (h, branch, alpha)]
    first = torch.autograd.grad(normalized_residual(*leaves), leaves, dy, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert all(t.isfinite().all() for t in second)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # the way from x to -x leads through 0
    assert all((t == 0).all() for t in value_and_grads(normalized_residual, (x, -x, half)))


@pytest.mark.usefixtures("path")
def test_gradients_of_gradients():
    inputs, _ = problem(7, 3)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(normalized_residual, leaves)
    assert torch.autograd.gradgradcheck(normalized_residual, leaves)
    with FlopCounterMode(display=False):  # a mode at work: the op itself, not its implementation
        assert torch.autograd.gradcheck(normalized_residual, leaves, fast_mode=True)


@pytest.mark.parametrize("dim", [0, 1])
def test_unit_vectors(dim):
    x = torch.randn(4, 3, dtype=torch.float64)
    x.select(1 - dim, 1).zero_()
    x.requires_grad_()
    y = unit(x, dim)
    assert torch.allclose(y.norm(dim=dim), torch.tensor([1.0, 0.0, 1.0, 1.0][: y.shape[1 - dim]], dtype=x.dtype))
    (gradient,) = torch.autograd.grad(y.sin().sum(), x)
    assert (gradient.select(1 - dim, 1) == 0).all()
    assert gradient.isfinite().all()
    kept = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: unit(x, dim), kept)


def test_half_precision_squares_in_float32():
    """In float16 300² is infinite, and 1e-4² is 0; in bfloat16 ones would add up to 256 at most."""
    for value in (300.0, 1e-4):
        x = torch.full((2, 64), value, dtype=torch.float16)
        assert torch.allclose(normalized_residual(x, x, torch.ones(64)), torch.tensor(0.125, dtype=torch.float16))
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert unit(x)[0, 0] == 1 / 64


@pytest.mark.usefixtures("path")
def test_strided_and_expanded_inputs_and_mixed_dtypes():
    (h, branch, alpha), dy = problem(40, 30)
    before = [t.clone() for t in (h, branch, alpha, dy)]
    truth = value_and_grads(normalized_residual, (h, branch, alpha), dy)
    assert all(torch.equal(a, b) for a, b in zip(before, (h, branch, alpha, dy), strict=True)), "an input was written"
    turned = [t.t().contiguous().t() for t in (h, branch, dy)]
    assert_close(value_and_grads(normalized_residual, (*turned[:2], alpha), turned[2]), truth, (1e-14,) * 4)
    want = value_and_grads(normalized_residual, (h[:1].repeat(40, 1), branch, alpha), torch.ones_like(dy))
    got = value_and_grads(normalized_residual, (h[:1].expand(40, -1), branch, alpha), dy.new_ones(1, 1).expand(40, 30))
    assert_close(got, want, (1e-14,) * 4)
    mixed = value_and_grads(normalized_residual, (h.float(), branch.bfloat16(), alpha.float()), dy.float())
    assert [t.dtype for t in mixed] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    rounded = (h.float().double(), branch.bfloat16().double(), alpha.float().double())
    want = value_and_grads(normalized_residual_reference, rounded, dy)
    assert_close(mixed, want, (3e-7, 1e-6, 4e-3, 2e-6))


def test_autocast_changes_nothing():
    inputs, dy = problem(20, 16, dtype=torch.float32)
    want = value_and_grads(normalized_residual, inputs, dy)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_grads(normalized_residual, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("path")
def test_nan_stays_in_its_row():
    (h, branch, alpha), dy = problem(40, 30)
    h[1, 3] = branch[2, 4] = torch.nan
    y, dh, dbranch, dalpha = value_and_grads(normalized_residual, (h, branch, alpha), dy)
    for t in (y, dh, dbranch):
        assert t[1:3].isnan().all()
        assert t[[0, *range(3, 40)]].isfinite().all()
    assert dalpha.isnan().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("shape", sampled([(0, 3), (5, 4), (70, 33)], [(5, 4)]), ids=str)
def test_opcheck(shape):
    inputs, dy = problem(*shape, dtype=torch.float32)
    opcheck(normalized_residual_op.op, tuple(t.clone().requires_grad_() for t in inputs))
    inverse = normalized_residual_op.op(*inputs)[1]
    opcheck(normalized_residual_op.backward_op, (dy, *inputs, inverse, [True] * 3))
    opcheck(normalized_residual_op.backward_op, (dy, *inputs, inverse, [False, True, False]))


@pytest.mark.usefixtures("path")
def test_the_op_and_its_implementation_agree():
    inputs, dy = problem(30, 17)
    with FlopCounterMode(display=False):
        op = value_and_grads(normalized_residual, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(op, value_and_grads(normalized_residual, inputs, dy), strict=True))


def test_functional_transforms():
    (h, branch, alpha), _ = problem(4, 6, 5)
    loss = lambda a, h, b: normalized_residual(h, b, a).sin().sum()  # noqa: E731
    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(alpha, h, branch)
    each = [torch.func.grad(loss)(alpha, *pair) for pair in zip(h, branch, strict=True)]
    assert rms_error(together, torch.stack(each)) < 1e-13
    assert rms_error(each[0], value_and_grads(lambda a: loss(a, h[0], branch[0]), (alpha,))[1]) < 1e-13


def test_compiled_for_a_cpu_the_definition_takes_the_place_of_the_op_at_all_batch_sizes():
    inputs, dy = problem(70, 17)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(normalized_residual, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 4, 70):
        some = inputs[0][:rows], inputs[1][:rows], inputs[2]
        got, want = (value_and_grads(f, some, dy[:rows]) for f in (compiled, normalized_residual))
        assert_close(got, want, (1e-13,) * 4)  # compiled is the definition, eager the op
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert own_ops(graphs[0]) == []


def own_ops(graph):
    return [str(node.target) for node in graph.graph.nodes if "archzoo" in str(node.target)]


def test_an_exported_graph_holds_one_op():
    class Model(torch.nn.Module):
        def forward(self, h, branch, alpha):
            return normalized_residual(h, branch, alpha)

    inputs, _ = problem(70, 17)
    exported = torch.export.export(Model(), inputs)
    assert own_ops(exported.graph_module) == ["archzoo.normalized_residual.default"]
    assert torch.equal(exported.module()(*inputs), normalized_residual(*inputs))


def test_kept_for_backward_are_the_inputs_and_three_numbers_a_row():
    inputs, _ = problem(64, 128, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normalized_residual(*leaves)
    own = {t.untyped_storage().data_ptr() for t in leaves}
    further = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [tuple(t.shape) for t in further] == [(3, 64, 1)]


def test_flops():
    inputs, dy = problem(6, 4)
    leaves = [t.requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as counter:
        y = normalized_residual(*leaves)
    assert counter.get_total_flops() == 12 * 6 * 4
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    assert counter.get_total_flops() == 25 * 6 * 4


@pytest.mark.usefixtures("path")
def test_two_runs_agree_bit_for_bit():
    inputs, dy = problem(70, 65, dtype=torch.float32)
    first, second = (value_and_grads(normalized_residual, inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_inputs_are_refused():
    (h, branch, alpha), _ = problem(2, 3)
    for bad in ((h, branch[:1], alpha), (h, branch, alpha[:2]), (h, branch, alpha[None]), (h[0, 0], h[0, 0], alpha)):
        with pytest.raises(ValueError, match=r"h, branch, alpha of shapes .* must be \(\*, D\)"):
            normalized_residual(*bad)
    with pytest.raises(ValueError, match=r"branch of torch\.int64"):
        normalized_residual(h, branch.long(), alpha)
