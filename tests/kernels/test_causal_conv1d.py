"""`causal_conv1d` against torch's own convolution: values, gradients, packing, states, and the tools of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import causal_conv1d as module
from archzoo.kernels.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_op,
    causal_conv1d_reference,
)
from tests.helpers import rms_error, value_and_grads


def problem(batch=2, d=5, L=11, W=4, dtype=torch.float64, seed=0):
    """x, weight, bias, initial_state with a column to spare, dy."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, d, L), (d, W), (d,), (batch, d, W), (batch, d, L))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def assert_close(got, truth, bound):
    for name, out, reference in zip(("y", "dx", "dweight", "dbias", "dstate"), got, truth, strict=False):
        assert rms_error(out, reference) <= bound, f"{name}: {rms_error(out, reference):.1e}"


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("W", [1, 2, 4, 7])
def test_is_torchs_depthwise_convolution(W, activation):
    x, weight, bias, _, dy = problem(W=W)

    def usual(x, weight, bias):
        y = F.conv1d(F.pad(x, (W - 1, 0)), weight.unsqueeze(1), bias, groups=x.shape[1])
        return y if activation is None else y * torch.sigmoid(y)

    truth = value_and_grads(usual, (x, weight, bias), dy)
    for function in (causal_conv1d, causal_conv1d_reference):
        got = value_and_grads(lambda *t, function=function: function(*t, activation), (x, weight, bias), dy)
        assert_close(got, truth, 1e-13)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 12), st.integers(1, 5)),
    packed=st.booleans(),
    with_state=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    block=st.sampled_from([1, 20, 2**17]),
)
def test_any_shape_and_any_options(sizes, packed, with_state, activation, block):
    batch, _, L, _ = sizes
    x, weight, bias, state, dy = problem(*sizes)
    seq_idx = (torch.rand(batch, L, generator=torch.Generator().manual_seed(1)) < 0.3).cumsum(1) if packed else None
    inputs = (x, weight, bias, state) if with_state else (x, weight, bias)

    def call(function):
        return lambda x, weight, bias, state=None: function(
            x, weight, bias, activation, seq_idx=seq_idx, initial_state=state
        )

    before, module._BLOCK = module._BLOCK, block
    try:
        got = value_and_grads(call(causal_conv1d), inputs, dy)
    finally:
        module._BLOCK = before
    assert_close(got, value_and_grads(call(causal_conv1d_reference), inputs, dy), 1e-12)


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_two_halves_equal_the_whole(cut):
    x, weight, bias, _, dy = problem()

    def in_two(x, weight, bias):
        first = causal_conv1d(x[..., :cut], weight, bias, "silu")
        state = F.pad(x, (4, 0))[..., cut : cut + 4]  # the last W inputs, zeros before the first
        return torch.cat([first, causal_conv1d(x[..., cut:], weight, bias, "silu", initial_state=state)], -1)

    truth = value_and_grads(lambda *t: causal_conv1d(*t, "silu"), (x, weight, bias), dy)
    assert_close(value_and_grads(in_two, (x, weight, bias), dy), truth, 1e-13)


def test_packed_sequences_equal_each_by_itself():
    x, weight, bias, state, _ = problem(batch=1, L=14)
    lengths = [2, 1, 7, 4]
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 5, 6]), torch.tensor(lengths))[None]
    packed = causal_conv1d(x, weight, bias, "silu", seq_idx=seq_idx, initial_state=state)
    start = 0
    for length in lengths:
        alone = causal_conv1d(
            x[..., start : start + length], weight, bias, "silu", initial_state=state if start == 0 else None
        )
        assert rms_error(packed[..., start : start + length], alone) < 1e-13
        start += length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_float32_at_least_and_rounded_once(dtype):
    inputs = problem(L=65, dtype=dtype)
    call = lambda x, weight, bias, state: causal_conv1d(x, weight, bias, "silu", initial_state=state)  # noqa: E731
    got = value_and_grads(call, inputs[:4], inputs[4])
    truth = value_and_grads(call, [t.double() for t in inputs[:4]], inputs[4].double())
    assert {t.dtype for t in got} == {dtype}
    assert_close(got, truth, max(1e-6, torch.finfo(dtype).eps / 2))


def test_strides_do_not_matter_and_the_input_is_left_alone():
    x, weight, bias, _, dy = problem()
    truth = value_and_grads(causal_conv1d, (x, weight, bias), dy)
    nan = torch.full_like(x, torch.nan)
    for view in (x.mT.contiguous().mT, torch.stack([x, nan], -1)[..., 0], torch.cat([nan, x], 1)[:, 5:]):
        before = view.clone()
        assert_close(value_and_grads(causal_conv1d, (view, weight, bias), dy.mT.contiguous().mT), truth, 1e-13)
        assert torch.equal(view, before)


def test_nothing_of_another_sequence_is_read():
    x, weight, bias, _, _ = problem(batch=1, L=8)
    x[..., :3] = torch.nan
    y = causal_conv1d(x, weight, bias, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))
    assert y[..., :3].isnan().all()
    assert y[..., 3:].isfinite().all()


def test_gradients_of_gradients():
    x, weight, bias, state, _ = problem(2, 2, 5, 3)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]])
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]

    def call(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, "silu", seq_idx=seq_idx, initial_state=state)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("options", ["none", "all"])
def test_opcheck(options):
    x, weight, bias, state, dy = problem()
    seq_idx = torch.zeros(2, 11, dtype=torch.int64)
    rest = (None, None, None) if options == "none" else (bias, state.mT[:, 1:], seq_idx)
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in (x.mT, weight, *rest)]
    opcheck(causal_conv1d_op.op, (*leaves, options == "all"))
    plain = [None if t is None else t.detach() for t in leaves]
    for needs in ([True] * 4 + [False], [True, False, True, False, False]):
        opcheck(causal_conv1d_op.backward_op, (dy.mT, *plain, True, needs))


def test_compile_holds_one_node_and_transforms_work():
    x, weight, bias, _, _ = problem()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, weight, bias, "silu"), causal_conv1d(x, weight, bias, "silu"))
    torch._dynamo.reset()
    assert [str(n.target) for n in graphs[0].graph.nodes if "archzoo" in str(n.target)] == [
        "archzoo.causal_conv1d.default"
    ]
    gradient = torch.func.grad(lambda w: causal_conv1d(x, w, bias, "silu").sum())(weight)
    _, _, truth, _ = value_and_grads(lambda *t: causal_conv1d(*t, "silu"), (x, weight, bias))
    assert rms_error(gradient, truth) < 1e-12


def test_flops():
    x, weight, _, _, _ = problem()
    with FlopCounterMode(display=False) as counter:
        y = causal_conv1d(x.requires_grad_(), weight.requires_grad_())
    assert counter.get_total_flops() == 2 * 4 * x.numel()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 6 * 4 * x.numel()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(5, 11)}, "x of shape"),
        ({"weight": torch.zeros(4, 5)}, r"weight of shape \(4, 5\).*d = 5"),
        ({"weight": torch.zeros(5, 0)}, "weight of shape"),
        ({"bias": torch.zeros(4)}, r"bias of shape \(4,\).*\(5,\)"),
        ({"activation": "relu"}, "activation='relu'.*'silu'"),
        ({"seq_idx": torch.zeros(2, 11)}, "seq_idx of shape.*float32"),
        ({"initial_state": torch.zeros(2, 5, 2)}, r"initial_state of shape.*3 or more"),
        ({"initial_state": torch.zeros(1, 5, 3)}, "initial_state of shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_by_name(arguments, words):
    x, weight, bias, _, _ = problem()
    with pytest.raises(ValueError, match=words):
        causal_conv1d(**{"x": x, "weight": weight, "bias": bias, **arguments})


def test_a_gradient_of_a_gradient_counts_an_input_that_was_made_of_another_once():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for convolve in (causal_conv1d, causal_conv1d_reference):
        y = convolve(x, weight, weight.sum(1))
        (gradient,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
        found.append((gradient, *torch.autograd.grad(gradient.square().sum(), weight)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
