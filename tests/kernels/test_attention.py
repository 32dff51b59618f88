"""The attention op against its definition, and torch's own function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels.attention import (
    attention,
    attention_backward_op,
    attention_op,
    attention_reference,
    self_attention,
)
from tests.helpers import RecordOps, rms_error, value_and_grads


def inputs(shape=(2, 3, 5, 4), dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values_and_gradients_are_those_of_the_definition(causal):
    @settings(max_examples=30, deadline=None, database=None, derandomize=True)
    @given(shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 17)))
    def check(shape):
        q, k, v = inputs(shape)
        dy = torch.randn(shape, dtype=torch.float64)
        got = value_and_grads(lambda *t: attention(*t, causal=causal), (q, k, v), dy)
        want = value_and_grads(lambda *t: attention_reference(*t, causal), (q, k, v), dy)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)  # with one key, gradients of q and k are 0

    check()


@pytest.mark.parametrize("length", [0, 1, 7])
def test_keys_may_be_of_another_number_even_none(length):
    q, k, v = inputs()
    k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64) for _ in range(2))
    got = value_and_grads(attention, (q, k, v))
    for a, b in zip(got, value_and_grads(attention_reference, (q, k, v)), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients_of_both_orders(causal):
    leaves = [t.requires_grad_() for t in inputs()]

    def call(q, k, v):
        return attention(q, k, v, causal=causal)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    got = torch.func.grad(lambda q: call(q, *leaves[1:]).sin().sum())(leaves[0].detach())
    (want,) = torch.autograd.grad(call(*leaves).sin().sum(), leaves[0])
    assert rms_error(got, want) < 1e-13


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("rows", [0, 2])
def test_opcheck(rows):
    q, k, v = (t.requires_grad_() for t in inputs((rows, 3, 5, 4), dtype=torch.float32))
    opcheck(attention_op, (q, k, v, True))
    with torch.no_grad():
        y, sums = attention_op(q, k, v, True)
    opcheck(attention_backward_op, (torch.randn_like(y), *(t.detach() for t in (q, k, v)), y, sums, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_torchs_own_to_the_last_bit(dtype):
    q, k, v = inputs((2, 2, 33, 16), dtype=dtype)
    y = attention(q, k, v, causal=True)
    assert y.dtype == dtype
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16


def test_only_gradients_that_are_asked_for_and_nothing_quadratic_is_kept():
    q, k, v = inputs((1, 2, 512, 4), dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = attention(q.requires_grad_(), k, v)
    assert sum(kept) < 5 * q.numel()
    y.sum().backward()
    assert k.grad is None
    assert q.grad is not None


def test_flops_are_those_of_the_products_also_on_meta():
    def count(device):
        q, k, v = (t.to(device).requires_grad_() for t in inputs((2, 3, 8, 4), dtype=torch.float32))
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v).sum().backward()
        return counter.get_total_flops()

    products = 2 * 2 * 3 * 8 * 8 * 4
    assert count("cpu") == count("meta") == 7 * products


def test_dropout_drops_and_is_torchs():
    q, k, v = inputs((1, 1, 64, 4), dtype=torch.float32)
    torch.manual_seed(1)
    y = attention(q, k, v, dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert rms_error(y, attention(q, k, v)) > 0.1


def test_heads_lie_side_by_side():
    qkv = torch.randn(2, 5, 3 * 12, dtype=torch.float64)
    want = []
    for head in range(3):
        q, k, v = (qkv[:, None, :, part * 12 + head * 4 : part * 12 + head * 4 + 4] for part in range(3))
        want.append(attention_reference(q, k, v, True)[:, 0])
    assert rms_error(self_attention(qkv, 3, causal=True), torch.cat(want, -1)) < 1e-14
    with RecordOps() as recorded:
        self_attention(qkv, 3)
    assert torch.ops.archzoo.attention in recorded.ops


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs()
    longer = torch.cat([k, k], 2)
    for arguments, options in (
        ((q, longer, longer), {"causal": True}),
        ((q, k, v[..., :2]), {}),
        ((q[0], k[0], v[0]), {}),
    ):
        with pytest.raises(ValueError, match=r"^q, k, v of shapes .*must be \(B, H, L, D\)"):
            attention(*arguments, **options)
