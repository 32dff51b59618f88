"""`causal_conv1d` on Triton against its definition. Without `_triton`: the torch path."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_op, causal_conv1d_reference
from tests.helpers import rms_error, value_and_grads
from tests.kernels.triton_support import (
    DTYPES,
    check_autocast,
    check_compiles,
    check_peak_memory,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
)

pytestmark = needs_triton

PARAMETERS = [1, 2]  # whose gradients are sums over time


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks(triton):
    """Several programs along time and channels; fewer steps in one than W = 4 reaches back."""
    from archzoo.kernels._causal_conv1d_triton import BACKWARD, FORWARD

    with FORWARD.forced(STEPS=2, CHANNELS=4), BACKWARD.forced(STEPS=4, CHANNELS=4):
        yield


def problem(batch=1, d=5, L=7, W=4, dtype=torch.float64):
    """(x, weight, bias, initial_state), dy; channel-last."""
    randn = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype)  # noqa: E731
    state = randn(batch, d, W - 1)
    return (randn(batch, L, d).mT, randn(d, W), randn(d), state), randn(batch, L, d).mT


def forms(activation="silu", seq_idx=None):
    """The op and its definition with these options, of (x, weight, bias, initial_state)."""
    return [
        lambda x, weight, bias=None, state=None, f=f: f(
            x, weight, bias, activation, seq_idx=seq_idx, initial_state=state
        )
        for f in (causal_conv1d, causal_conv1d_reference)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("blocks")
def test_values_and_gradients(dtype):
    inputs, dy = problem(dtype=dtype)
    check_values(*forms(), inputs, dy, PARAMETERS)


@pytest.mark.parametrize(("W", "activation", "given"), [(1, None, 4), (2, "silu", 3), (3, None, 2), (7, "silu", 4)])
@pytest.mark.usefixtures("blocks")
def test_widths_and_options(W, activation, given):
    inputs, dy = problem(batch=2, d=3, W=W)
    check_values(*forms(activation), inputs[:given], dy, PARAMETERS)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 130, 3), (0, 3, 2), (2, 3, 0), (1, 2, 33)], ids=str)
@pytest.mark.usefixtures("triton")
def test_blocks_of_the_usual_sizes(sizes):
    inputs, dy = problem(*sizes, W=2)
    check_values(*forms(), inputs, dy, PARAMETERS)


@pytest.mark.usefixtures("blocks")
def test_packed_sequences():
    inputs, dy = problem(batch=2, L=9)
    seq_idx = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [4] * 8 + [5]])
    check_values(*forms(seq_idx=seq_idx), inputs, dy, PARAMETERS)


@pytest.mark.usefixtures("blocks")
def test_strides_expansion_and_mixed_dtypes():
    (x, weight, bias, state), dy = problem(batch=2)
    wider = torch.stack([state, state.new_full(state.shape, torch.nan)], -1)[..., 0]
    views = x.contiguous(), weight.t().contiguous().t(), bias.expand(2, -1)[0], wider
    check_values(*forms(), views, dy[:1].expand(2, -1, -1), PARAMETERS)
    mixed = x.bfloat16(), weight.float(), bias.bfloat16(), state.float()
    check_values(*forms(), mixed, dy.bfloat16(), PARAMETERS)


@pytest.mark.usefixtures("blocks")
def test_nothing_of_another_sequence_is_read_and_nan_comes_through():
    (x, weight, bias, _), dy = problem(d=2, L=8)
    x[..., 2] = torch.nan
    y, dx, dweight, _ = value_and_grads(
        forms(seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]))[0], (x, weight, bias), dy
    )
    assert y[..., 2].isnan().all()
    assert y[..., [0, 1, 3, 4, 5, 6, 7]].isfinite().all()
    assert dx[..., 3:].isfinite().all()
    assert dweight[:, -1].isnan().all()


@pytest.mark.usefixtures("blocks")
def test_gradients_that_nobody_needs_are_left_out():
    inputs, dy = problem(d=2, L=5)
    truth = value_and_grads(forms()[1], inputs, dy)[1:]
    for alone, want in enumerate(truth):
        leaves = [t.detach().requires_grad_(index == alone) for index, t in enumerate(inputs)]
        forms()[0](*leaves).backward(dy)
        assert rms_error(leaves[alone].grad, want) < 1e-12
        assert all(leaf.grad is None for index, leaf in enumerate(leaves) if index != alone)


@pytest.mark.usefixtures("blocks")
def test_gradcheck():
    inputs, _ = problem(d=2, L=3, W=2)
    assert torch.autograd.gradcheck(forms()[0], [t.requires_grad_() for t in inputs], fast_mode=True)


@pytest.mark.usefixtures("blocks")
def test_two_runs_agree_bit_for_bit():
    inputs, dy = problem(dtype=torch.float32)
    check_repeats(forms()[0], inputs, dy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.usefixtures("blocks")
def test_opcheck(options):
    (x, weight, bias, state), dy = problem(d=2, L=3, W=2, dtype=torch.float32)
    rest = (None, None, None) if options == "none" else (bias, state.mT, torch.zeros(1, 3, dtype=torch.int64))
    leaves = [
        t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in (x.mT, weight, *rest)
    ]
    opcheck(causal_conv1d_op.op, (*leaves, options == "all", True))
    needs = [True, True, options == "all", False, False]
    opcheck(causal_conv1d_op.backward_op, (dy.mT, x.mT, weight, *rest, True, needs, True))


@pytest.mark.usefixtures("blocks")
def test_compile_export_and_autocast():
    inputs, dy = problem(d=2, L=3, W=2, dtype=torch.float32)
    function = forms()[0]
    check_compiles(function, inputs, dy, "causal_conv1d")
    check_autocast(function, inputs, dy)


@pytest.mark.usefixtures("blocks")
def test_what_triton_cannot_do_is_refused():
    check_refusals(forms()[0], problem(d=2, L=3)[0])
    (x, weight, *_), _ = problem(W=9)
    with pytest.raises(RuntimeError, match="a weight of 9 taps, more than 8, has no Triton kernel"):
        causal_conv1d(x, weight)


@pytest.mark.plain_memory
@pytest.mark.usefixtures("triton")
def test_memory():
    inputs, dy = problem(d=128, L=32, dtype=torch.bfloat16)
    check_peak_memory(forms()[0], inputs[:3], dy)
