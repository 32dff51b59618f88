"""`capsule_routing` on Triton against its definition. Without `_triton`: the torch path."""

import functools

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.capsule_routing import capsule_routing, capsule_routing_op, capsule_routing_reference
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

PARAMETERS = [1, 2]  # whose gradients are sums over samples


@pytest.fixture(autouse=True)
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks():
    """Several programs along every axis, of several steps each."""
    from archzoo.kernels._capsule_routing_backward_triton import BACKWARD
    from archzoo.kernels._capsule_routing_triton import FORWARD

    with FORWARD.forced(BN=16, STEPS=2), BACKWARD.forced(BN=16):
        yield


def problem(*leading, lower=3, upper=3, d=5, k=3, dtype=torch.float64):
    u, weight = torch.randn(*leading, lower, k), 0.3 * torch.randn(lower, upper, d, k)
    inputs = u, weight, torch.randn(upper, d)
    return [t.to(dtype) for t in inputs], torch.randn(*leading, upper, d).to(dtype)


def forms(**options):
    """The op and its definition with those options."""
    return (
        functools.partial(capsule_routing, **options),
        lambda *t: capsule_routing_reference(*t, **options)[0],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype):
    inputs, dv = problem(5, dtype=dtype)
    check_values(*forms(), inputs, dv, PARAMETERS)


@pytest.mark.parametrize(
    ("iterations", "leaky", "detach"),
    [(3, True, False), (1, True, True), (2, False, True)],
    ids=["three_leaky", "one_leaky_detached", "two_detached"],
)
@pytest.mark.usefixtures("blocks")
def test_modes_programs_and_steps(iterations, leaky, detach):
    inputs, dv = problem(17)
    check_values(*forms(iterations=iterations, leaky=leaky, detach=detach), inputs, dv, PARAMETERS)


@pytest.mark.parametrize(
    ("tile", "sizes", "options"),
    [
        ((4, 8, 16), (6, 5, 3), {"iterations": 2}),
        pytest.param((4, 8, 16), (6, 5, 3), {"leaky": True, "detach": True}, marks=pytest.mark.slow),
        pytest.param((4, 8, 16), (3, 5, 18), {"iterations": 2}, marks=pytest.mark.slow),
        pytest.param((4, 4, 16), (6, 5, 18), {"iterations": 2, "leaky": True}, marks=pytest.mark.slow),
        pytest.param((4, 4, 16), (6, 5, 3), {}, marks=pytest.mark.slow),
    ],
    ids=["upper", "upper_leaky_detached", "lower", "both_and_inner_leaky", "upper_and_inner"],
)
@pytest.mark.usefixtures("blocks")
def test_tiles(tile, sizes, options, monkeypatch):
    """Of upper capsules, of their numbers, and of those of lower ones: where not all votes of one lower capsule fit."""
    from archzoo.kernels import _capsule_routing_triton as module

    monkeypatch.setattr(module, "tile_of", lambda *args: tile)
    inputs, dv = problem(3, lower=1, **dict(zip(("upper", "d", "k"), sizes, strict=True)))
    check_values(*forms(**options), inputs, dv, PARAMETERS)
    check_repeats(forms(**options)[0], inputs, dv)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_classes(dtype):
    inputs, dv = problem(2, lower=2, upper=100, d=16, k=2, dtype=dtype)
    check_values(*forms(), inputs, dv, PARAMETERS)


def test_tiles_of_all_sizes_fit():
    """16 KiB of weights, and of products no side below 16."""
    from archzoo.kernels._capsule_routing_triton import tile_of

    for dtype in DTYPES:
        for upper in (1, 5, 100, 1000):
            for d in (1, 16, 256, 257, 5000):
                for k in (1, 8, 100, 3000):
                    height, width, depth = tile_of(dtype, upper, d, k)
                    assert height * width * depth * dtype.itemsize <= 2**14
                    assert min(height * width, depth) >= 16


@pytest.mark.parametrize(
    ("leading", "sizes"),
    [((), (2, 1, 1, 1)), ((0,), (2, 3, 2, 2)), ((2, 1), (1, 5, 3, 17))],
    ids=["ones", "empty", "leading"],
)
def test_shapes(leading, sizes):
    inputs, dv = problem(*leading, **dict(zip(("lower", "upper", "d", "k"), sizes, strict=True)))
    check_values(*forms(iterations=2), inputs, dv, PARAMETERS)


def test_no_bias_strides_expansion_and_mixed_dtypes():
    (u, weight, _), dv = problem(3, lower=2)
    turned = u.mT.contiguous().mT, weight[:1].expand(2, 3, 5, 3)
    check_values(*forms(), turned, dv[:1].expand(3, 3, 5), [1])
    mixed = u.bfloat16(), weight.float()
    check_values(*forms(), mixed, dv.float(), [1])


def test_couplings_of_the_last_round():
    (u, weight, bias), _ = problem(3)
    _, coupling = capsule_routing(u, weight, bias, return_coupling=True)
    assert rms_error(coupling, capsule_routing_reference(u, weight, bias)[1]) < 1e-12


def test_nan_and_large_logits():
    (u, weight, bias), dv = problem(3, dtype=torch.float32)
    out = value_and_grads(forms(leaky=True)[0], (1e4 * u, weight, bias), dv)
    assert all(t.isfinite().all() for t in out)
    u[1, 2, 1] = torch.nan
    v = capsule_routing(u, weight, bias)
    assert v[1].isnan().all()
    assert v[[0, 2]].isfinite().all()


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_that_nobody_needs_are_left_out(wanted):
    inputs, dv = problem(2, lower=2)
    truth = value_and_grads(forms()[1], inputs, dv)[1 + wanted]
    leaves = [t.requires_grad_(index == wanted) for index, t in enumerate(inputs)]
    capsule_routing(*leaves).backward(dv)
    assert rms_error(leaves[wanted].grad, truth) < 1e-11
    assert [t.grad is not None for t in leaves] == [index == wanted for index in range(3)]


@pytest.mark.slow
def test_gradcheck():
    leaves = [t.requires_grad_() for t in problem(2, lower=2, upper=2, d=2, k=2)[0]]
    assert torch.autograd.gradcheck(capsule_routing, leaves, fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck():
    (u, weight, _), dv = problem(1, lower=1, upper=2, d=2, k=1, dtype=torch.float32)
    sums = capsule_routing_op.op(u, weight, None, 2, False, False, True)[1]
    opcheck(capsule_routing_op.op, (u.requires_grad_(), weight.requires_grad_(), None, 2, False, False, True))
    inputs = dv, u.detach(), weight.detach(), None, sums, 2, False, False, [True, True, False], True
    opcheck(capsule_routing_op.backward_op, inputs)


@pytest.mark.usefixtures("blocks")
def test_compile_export_autocast_and_repeat():
    inputs, dv = problem(2, lower=3, dtype=torch.float32)
    function = forms(iterations=2)[0]
    check_compiles(function, inputs, dv, "capsule_routing")
    check_autocast(function, inputs, dv)
    check_repeats(function, inputs, dv)


def test_what_triton_cannot_do_is_refused():
    check_refusals(capsule_routing, problem(2)[0])


@pytest.mark.slow
@pytest.mark.plain_memory
def test_memory():
    from archzoo.kernels._capsule_routing_backward_triton import BACKWARD
    from archzoo.kernels._capsule_routing_triton import FORWARD

    inputs, dv = problem(512, lower=12, upper=2, d=4, k=4, dtype=torch.float32)
    with FORWARD.forced(BN=512, STEPS=12), BACKWARD.forced(BN=512):
        check_peak_memory(forms(iterations=2)[0], inputs, dv)
