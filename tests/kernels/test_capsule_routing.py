"""`capsule_routing` against its definition, and that against a loop written out: values, gradients, memory, tools."""

import functools
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import _capsule_passes
from archzoo.kernels import capsule_routing as module
from archzoo.kernels.capsule_routing import (
    capsule_routing,
    capsule_routing_op,
    capsule_routing_reference,
    squash,
)
from tests.helpers import rms_error, value_and_grads

NAMES = ("v", "du", "dweight", "dbias")
MODES = [
    pytest.param(*m, id=f"{m[0]}_rounds{'_leaky' * m[1]}{'_detached' * m[2]}")
    for m in itertools.product((1, 2, 3), (False, True), (False, True))
]
BOUNDS = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 1e-5),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (6e-3, 1.5e-2),
}


@pytest.fixture(params=["votes", "whole", "tiles"])
def path(request, monkeypatch):
    """Votes held; not held, in one chunk; in chunks and tiles so small that every loop runs twice at least."""
    if request.param != "votes":
        monkeypatch.setattr(_capsule_passes, "_FEW", 0)
    if request.param == "tiles":
        monkeypatch.setattr(_capsule_passes, "_BLOCK", 1)  # chunks of 16
        monkeypatch.setattr(_capsule_passes, "_ROWS", 2)
        monkeypatch.setattr(module, "_COUPLED", 7)


def problem(leading, lower=37, upper=3, d=6, k=4, dtype=torch.float64, bias=True):
    u = torch.randn(*leading, lower, k, dtype=torch.float64)
    weight = 0.3 * torch.randn(lower, upper, d, k, dtype=torch.float64)
    inputs = [u, weight] + [torch.randn(upper, d, dtype=torch.float64)] * bias
    return [t.to(dtype) for t in inputs], torch.randn(*leading, upper, d, dtype=torch.float64).to(dtype)


def reference(*inputs, **options):
    return capsule_routing_reference(*inputs, **options)[0]


def assert_close(got, truth, bounds):
    for name, out, want, bound in zip(NAMES, got, truth, (bounds[0], *bounds[1:] * 3), strict=False):
        assert rms_error(out, want) <= bound, f"{name}: {rms_error(out, want):.1e}, allowed {bound:.1e}"


def test_definition_is_the_papers_procedure_capsule_by_capsule():
    (u, weight, bias), _ = problem((), lower=4, upper=3, d=2, k=5)
    for leaky in (False, True):
        b = torch.zeros(4, 3, dtype=torch.float64)
        for _ in range(3):
            e = b.exp()
            c = e / (e.sum(1, keepdim=True) + leaky)
            v = torch.zeros(3, 2, dtype=torch.float64)
            for j in range(3):
                s = bias[j] + sum(c[i, j] * (weight[i, j] @ u[i]) for i in range(4))
                n = s.norm()
                v[j] = n**2 / (1 + n**2) * s / n
            for i, j in itertools.product(range(4), range(3)):
                b[i, j] += (weight[i, j] @ u[i]) @ v[j]
        got, coupling = capsule_routing_reference(u, weight, bias, 3, leaky)
        assert rms_error(got, v) < 1e-14
        assert rms_error(coupling, c) < 1e-14


@pytest.mark.parametrize(("iterations", "leaky", "detach"), MODES)
def test_op_is_the_definition(iterations, leaky, detach, path):
    options = {"iterations": iterations, "leaky": leaky, "detach": detach}
    inputs, dv = problem((5,))
    truth = value_and_grads(functools.partial(reference, **options), inputs, dv)
    assert_close(
        value_and_grads(functools.partial(capsule_routing, **options), inputs, dv), truth, BOUNDS[torch.float64]
    )
    v, coupling = capsule_routing(*inputs, **options, return_coupling=True)
    assert rms_error(v, truth[0]) < 1e-13
    assert rms_error(coupling, capsule_routing_reference(*inputs, **options)[1]) < 1e-13
    assert torch.all(coupling.sum(-1) < 1) if leaky else torch.allclose(coupling.sum(-1), torch.ones(5, 37).double())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    leading=st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0)]),
    lower=st.integers(1, 40),
    upper=st.integers(1, 5),
    d=st.integers(1, 5),
    k=st.integers(1, 5),
    iterations=st.integers(1, 4),
    leaky=st.booleans(),
    detach=st.booleans(),
    bias=st.booleans(),
    few=st.sampled_from([0, 2**19]),
)
def test_op_is_the_definition_at_any_size(leading, lower, upper, d, k, iterations, leaky, detach, bias, few):
    torch.manual_seed(0)
    options = {"iterations": iterations, "leaky": leaky, "detach": detach}
    inputs, dv = problem(leading, lower, upper, d, k, bias=bias)
    truth = value_and_grads(functools.partial(reference, **options), inputs, dv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_capsule_passes, "_FEW", few)
        got = value_and_grads(functools.partial(capsule_routing, **options), inputs, dv)
    for name, out, want in zip(NAMES, got, truth, strict=False):
        assert (
            (out - want).abs().max() <= 1e-11 * (1 + want.abs().max()) if want.numel() else out.shape == want.shape
        ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_that_of_inputs_and_outputs_only(dtype, path):
    inputs, dv = problem((5,), dtype=dtype)
    truth = value_and_grads(reference, [t.double() for t in inputs], dv.double())
    got = value_and_grads(capsule_routing, inputs, dv)
    assert {t.dtype for t in got} == {dtype}
    assert_close(got, truth, BOUNDS[dtype])


def test_mixed_dtypes_give_the_wider_one():
    inputs, dv = problem((5,), dtype=torch.float32)
    half = [inputs[0].bfloat16(), *inputs[1:]]
    got = value_and_grads(capsule_routing, half, dv)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert_close(got, value_and_grads(reference, [t.double() for t in half], dv.double()), (2e-6, 3e-3))


def test_autocast_rounds_nothing():
    inputs, dv = problem((5,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_grads(capsule_routing, inputs, dv)
    for out, want in zip(got, value_and_grads(capsule_routing, inputs, dv), strict=True):
        assert torch.equal(out, want)


@pytest.mark.parametrize(("iterations", "leaky"), [(1, False), (3, False), (3, True)], ids=["1", "3", "3_leaky"])
def test_gradients_pass_gradcheck_and_gradgradcheck(iterations, leaky):
    inputs, _ = problem((2,), lower=3, upper=2, d=2, k=2)
    leaves = [t.requires_grad_() for t in inputs]
    function = functools.partial(capsule_routing, iterations=iterations, leaky=leaky)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("detach", [False, True], ids=["full", "detached"])
def test_only_what_is_needed_is_differentiated(detach):
    inputs, dv = problem((3,))
    truth = value_and_grads(functools.partial(capsule_routing, detach=detach), inputs, dv)[1:]
    for needed in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needed, strict=True)]
        v = capsule_routing(*leaves, detach=detach)
        assert v.requires_grad == any(needed)
        if any(needed):
            v.backward(dv)
        for leaf, need, want in zip(leaves, needed, truth, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                assert rms_error(leaf.grad, want) < 1e-13


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_custom_ops_are_sound(bias):
    inputs, dv = problem((3,), lower=5)
    inputs = [t.requires_grad_() for t in inputs] if bias else [inputs[0].requires_grad_(), inputs[1], None]
    opcheck(capsule_routing_op.op, (*inputs, 3, False, False))
    _, sums = capsule_routing_op.op(*inputs, 3, False, False)
    plain = [None if t is None else t.detach() for t in inputs]
    for needed in ([True, True, bias], [False, True, False]):
        opcheck(capsule_routing_op.backward_op, (dv, *plain, sums.detach(), 3, False, False, needed))


def test_vmap_and_compiled_agree():
    inputs, dv = problem((4,))
    want = value_and_grads(capsule_routing, inputs, dv)
    u, weight, bias = inputs
    each = torch.func.vmap(lambda one: capsule_routing(one, weight, bias))(u)
    assert rms_error(each, want[0]) < 1e-13
    torch._dynamo.reset()
    compiled = torch.compile(capsule_routing, fullgraph=True, backend="aot_eager")
    assert_close(value_and_grads(compiled, inputs, dv), want, BOUNDS[torch.float64])
    _, coupling = compiled(*inputs, return_coupling=True)
    assert rms_error(coupling, capsule_routing(*inputs, return_coupling=True)[1]) < 1e-13


def test_kept_for_backward_is_below_a_megabyte_in_the_papers_network():
    u = torch.rand(32, 1152, 8, requires_grad=True)
    weight = (0.1 * torch.randn(1152, 10, 16, 8)).requires_grad_()
    held = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in (u.data_ptr(), weight.data_ptr()):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        capsule_routing(u, weight)
    assert 0 < sum(held.values()) <= 3 * 32 * 160 * 4


def test_samples_do_not_mix_and_runs_repeat_bit_for_bit():
    inputs, dv = problem((6,))
    first, again = (value_and_grads(capsule_routing, inputs, dv) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    alone = torch.stack([capsule_routing(row, *inputs[1:]) for row in inputs[0]])
    assert rms_error(alone, first[0]) < 1e-14
    poisoned = inputs[0].clone()
    poisoned[2, 5, 1] = torch.nan
    v = capsule_routing(poisoned, *inputs[1:])
    assert v[2].isnan().all()
    assert torch.equal(v[[0, 1, 3, 4, 5]], first[0][[0, 1, 3, 4, 5]])


def test_large_logits_do_not_overflow(path):
    (u, weight, bias), dv = problem((3,), dtype=torch.float32)
    for leaky in (False, True):
        out = value_and_grads(functools.partial(capsule_routing, leaky=leaky), (1e4 * u, weight, bias), dv)
        assert all(t.isfinite().all() for t in out)
        assert out[0].norm(dim=-1).max() <= 1 + 1e-6


def test_flops_are_the_papers_and_train_cost_more():
    u, weight = (torch.empty(2, 1152, 8, device="meta"), torch.empty(1152, 10, 16, 8, device="meta"))
    counts = []
    for iterations, detach in ((1, False), (3, False), (3, True)):
        with FlopCounterMode(display=False) as counter:
            capsule_routing(
                u.requires_grad_(), weight.requires_grad_(), None, iterations, False, detach
            ).sum().backward()
        formula = counter.get_flop_counts()["Global"]
        forward, backward = (
            formula[torch.ops.archzoo.capsule_routing],
            formula[torch.ops.archzoo.capsule_routing_backward],
        )
        counts.append((forward // 2, backward // 2))
    votes, rounds = 2 * 1152 * 160 * 8, 5 * 2 * 1152 * 160
    assert counts[1][0] == votes + rounds + 2 * 4 * 1152 * 10  # 2.95 M, 1.84 M, and the two softmaxes
    assert counts[0][0] == votes + 2 * 1152 * 160
    assert counts[0][1] < counts[1][1] > counts[2][1] > counts[2][0]


@pytest.mark.parametrize("shape", [(4, 3), (0, 3)], ids=str)
def test_squash_is_safe_at_zero_and_bounded(shape):
    s = torch.randn(shape, dtype=torch.float64)
    n = s.norm(dim=-1, keepdim=True)
    assert rms_error(squash(s), n**2 / (1 + n**2) * s / n) < 1e-14
    assert torch.equal(squash(s.t(), dim=0), squash(s).t())
    leaf = s.clone().requires_grad_()
    assert torch.autograd.gradcheck(squash, leaf) if len(s) else True
    for dtype in (torch.float64, torch.float32, torch.float16):
        zero = torch.zeros(shape, dtype=dtype, requires_grad=True)
        value, gradient = value_and_grads(squash, [zero])
        assert torch.equal(value, torch.zeros_like(value))
        assert (gradient.abs() < 1e-6).all()
    assert squash(torch.full((2, 8), 6e4, dtype=torch.float16)).isfinite().all()


def test_hand_written_gradient_of_squash_is_autograds():
    s, dv = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    s[0] = 0
    s[1] *= 1e-12
    _, want = value_and_grads(squash, [s], dv)
    got = module._squash_backward(dv, s)
    assert rms_error(got[2:], want[2:]) < 1e-14
    assert (got[:2] - want[:2]).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 36, 4)}, "u of shape (2, 36, 4): must be (*, in_capsules, in_dim) = (*, 37, 4)"),
        ({"u": torch.zeros(4)}, "u of shape (4,)"),
        ({"u": torch.zeros(2, 37, 4, dtype=torch.int64)}, "u of torch.int64: must be real floating point"),
        ({"weight": torch.zeros(37, 3, 6)}, "weight of shape (37, 3, 6): must be (in_capsules"),
        ({"weight": torch.zeros(0, 3, 6, 4)}, "weight of shape (0, 3, 6, 4)"),
        ({"bias": torch.zeros(6, 3)}, "bias of shape (6, 3): must be (out_capsules, out_dim) = (3, 6)"),
        ({"iterations": 0}, "iterations=0: must be a whole number, 1 or more"),
        ({"iterations": 1.5}, "iterations=1.5"),
    ],
    ids=["lower", "vector", "integers", "three_axes", "none", "bias", "no_rounds", "half_a_round"],
)
def test_wrong_argument_is_named(change, message):
    arguments = {"u": torch.zeros(2, 37, 4), "weight": torch.zeros(37, 3, 6, 4), "bias": torch.zeros(3, 6)}
    with pytest.raises(ValueError, match=re.escape(message)):
        capsule_routing(**(arguments | change))
