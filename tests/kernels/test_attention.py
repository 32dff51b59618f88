"""The attention op against its definition, and torch's own function."""

import math

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


def test_memory_may_be_laid_out_in_any_way():
    one = torch.ones((), dtype=torch.float64)
    for which in range(3):
        for other in (torch.randn(2, 3, 4, 5).mT, torch.randn(2, 5, 3, 4).transpose(1, 2), torch.randn(3, 1, 4)):
            leaves = inputs()
            leaves[which] = other.double().expand(2, 3, 5, 4)
            for dy in (torch.randn(2, 3, 4, 5, dtype=torch.float64).mT, one.expand(2, 3, 5, 4)):
                want = value_and_grads(attention_reference, leaves, dy)
                for a, b in zip(value_and_grads(attention, leaves, dy), want, strict=True):
                    assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def some_seen(*shape):
    """A mask of bool by which everybody sees the last token, and half of the others."""
    seen = torch.rand(shape) < 0.5
    seen[..., -1] = True
    return seen


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    kept=st.lists(st.booleans(), max_size=4),
    numbers=st.booleans(),
)
def test_a_mask_of_any_shape_is_that_of_the_definition(sizes, kept, numbers):
    q, k, v = (torch.randn(*sizes[:2], length, 4, dtype=torch.float64) for length in (sizes[2], *[sizes[3]] * 2))
    shape = [size if keep else 1 for size, keep in zip(sizes[4 - len(kept) :], kept, strict=True)]
    seen = some_seen(*shape) if shape else torch.tensor(True)
    added = torch.zeros(shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
    if numbers:
        added = added + torch.randn(shape, dtype=torch.float64)
    got = value_and_grads(lambda *t: attention(*t, attn_mask=added if numbers else seen), (q, k, v))
    for a, b in zip(got, value_and_grads(lambda *t: attention_reference(*t, mask=added), (q, k, v)), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


def test_a_mask_may_be_learned():
    q, k, v = inputs()
    mask = torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda mask: attention(q, k, v, attn_mask=mask), (mask,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_with_a_mask_it_is_torchs_own_to_the_last_bit(dtype):
    q, k, v = inputs((2, 2, 33, 16), dtype=dtype)
    for mask in (some_seen(33, 33), torch.randn(2, 1, 1, 33, dtype=dtype)):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.equal(attention(q, k, v, attn_mask=mask), want)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_is_where_the_definition_has_it(dtype, value, causal):
    for length in (1, 7, 16, 37):  # torch's kernel takes 16 keys at once
        for which in range(2):
            for place in {0, length // 2, length - 1}:
                for features in (slice(0, 1), slice(None)):
                    leaves = inputs((1, 2, length, 8), dtype=dtype)
                    leaves[which][0, 1, place, features] = value
                    got = value_and_grads(lambda *t: attention(*t, causal=causal), leaves)
                    want = attention_reference(*(t.double() for t in leaves), causal)
                    assert torch.equal(got[0].isnan(), want.isnan()), (length, which, place)
                    if want.isnan().any():
                        assert any(gradient.isnan().any() for gradient in got[1:])
                    assert not any(t[0, 0].isnan().any() for t in got), "NaN reached another head"


@pytest.mark.parametrize("length", [5, 37])
def test_a_mask_hides_no_nan(length):
    others = ~torch.eye(length, dtype=torch.bool)
    for which in range(2):
        leaves = inputs((2, 3, length, 4), dtype=torch.float32)
        leaves[which][1, 2, 3] = math.nan
        added = torch.zeros(length, length, dtype=torch.float64).masked_fill(~others, -math.inf)
        want = attention_reference(*(t.double() for t in leaves), mask=added).isnan()
        assert torch.equal(attention(*leaves, attn_mask=others).isnan(), want)
        assert want[1, 2, 3].all()
        assert not want[0].any()


def test_a_sum_of_exponentials_of_one_is_no_nan():
    """Its logarithm is 0, by which torch's kernel marks what it hides."""
    q, k, v = inputs()
    for t in (q, k):
        t.zero_()
    k[..., 1:, 0] = -math.inf
    q[..., 1:, 0] = 1.0
    y = attention(q, k, v, causal=True)
    assert torch.equal(y[:, :, 0], v[:, :, 0])
    assert torch.equal(y, v[:, :, :1].expand_as(v))


@pytest.mark.parametrize("kind", ["full", "causal", "masked"])
def test_gradients_of_both_orders(kind):
    leaves = [t.requires_grad_() for t in inputs((2, 2, 4, 2))]
    mask = some_seen(2, 4, 4) if kind == "masked" else None

    def call(q, k, v):
        return attention(q, k, v, causal=kind == "causal", attn_mask=mask)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    got = torch.func.grad(lambda q: call(q, *leaves[1:]).sin().sum())(leaves[0].detach())
    (want,) = torch.autograd.grad(call(*leaves).sin().sum(), leaves[0])
    assert rms_error(got, want) < 1e-13


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("rows", [0, 2])
def test_opcheck(rows):
    q, k, v = (t.requires_grad_() for t in inputs((rows, 3, 5, 4), dtype=torch.float32))
    for options in ((True, None), (False, torch.randn(1, 1, 5, 5))):
        q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        opcheck(attention_op, (q, k, v, *options))
        with torch.no_grad():
            y, sums = attention_op(q, k, v, *options)
        opcheck(attention_backward_op, (torch.randn_like(y), *(t.detach() for t in (q, k, v)), y, sums, *options))


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


def test_masks_that_do_not_fit_are_refused():
    q, k, v = inputs()
    for mask in (torch.ones(5, 4, dtype=torch.bool), torch.ones(5, 5, dtype=torch.int64), torch.ones(1, 1, 1, 5, 5)):
        with pytest.raises(ValueError, match=r"^attn_mask of shape .* = \(2, 3, 5, 5\)"):
            attention(q, k, v, attn_mask=mask)
    with pytest.raises(ValueError, match="^causal=True: must be False beside attn_mask"):
        attention(q, k, v, causal=True, attn_mask=torch.ones(5, 5, dtype=torch.bool))
