"""The recurrence of a connectome: pruned and sparse against the definition, which computes every neuron."""

import itertools
import sys
from contextlib import ExitStack, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import use_backend
from archzoo.kernels._bpu_plan import RecurrencePlan, held_sizes, link_sizes, plan_recurrence, state_sizes
from archzoo.kernels.bpu_recurrence import (
    bpu_recurrence,
    bpu_recurrence_backward_op,
    bpu_recurrence_op,
    bpu_recurrence_reference,
)
from tests.helpers import rms_error
from tests.kernels.triton_support import DEVICE, check_refusals, needs_triton

OPTIONS = [
    {"inject": inject, "residual": residual, "readout": readout}
    for inject, residual, readout in itertools.product(("first", "every"), (False, True), ("last", "sum"))
]
POOLS = (4, 9, 3)


def wiring(pools=POOLS, density=0.3, seed=0, dtype=torch.float64):
    """Random edges, sorted by (post, pre), and generic weights: no state is 0 by cancellation, on the ReLU's kink."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(pools)
    post, pre = (torch.rand(total, total, generator=generator) < density).nonzero(as_tuple=True)
    return torch.randn(len(pre), generator=generator, dtype=torch.float64).to(dtype), pre, post


def drive(*leading, sensory=POOLS[0], seed=1, dtype=torch.float64):
    return torch.randn(*leading, sensory, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(x, weight, pre, post, pools, steps, backend, **options):
    """Outputs and gradients of the op, and of the definition in float64. A backend "triton" is the kernel's."""
    plan = plan_recurrence(pre, post, pools, steps, **options)
    dy = drive(*x.shape[:-1], sensory=pools[2], seed=2)
    if backend == "triton":
        plan, x, weight, pre, post, dy = (t.to(DEVICE) for t in (plan, x, weight, pre, post, dy))

    def ours(x, w):
        with use_backend("triton") if backend == "triton" else nullcontext():
            return bpu_recurrence(x, w, plan, backend="sparse" if backend == "triton" else backend)

    def definition(x, w):
        return bpu_recurrence_reference(x, w, pre, post, pools, steps, **options)

    found = []
    for function, leaves in ((ours, (x, weight)), (definition, (x.double(), weight.double()))):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        y = function(*leaves)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    return found


@pytest.mark.parametrize(
    ("backend", "steps"),
    [*itertools.product(("sparse", "dense"), (2, 3, 7)), pytest.param("triton", 4, marks=needs_triton)],
)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_definition(steps, options, backend):
    for ours, truth in zip(*both(drive(5), *wiring(), POOLS, steps, backend, **options), strict=True):
        assert truth.abs().max() > 0
        assert rms_error(ours, truth) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [
        (torch.float32, (2e-6, 5e-6, 2e-5)),
        (torch.float16, (1e-3, 2e-3, 2e-3)),
        (torch.bfloat16, (6e-3, 1e-2, 1e-2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["sparse", pytest.param("triton", marks=needs_triton)])
def test_low_precision_rounds_inputs_and_results_only(dtype, bounds, backend):
    weight, pre, post = wiring(dtype=dtype)
    found = both(drive(65, dtype=dtype), weight, pre, post, POOLS, 4, backend, readout="sum")
    for ours, truth, bound in zip(*found, bounds, strict=True):
        assert ours.dtype == dtype
        assert rms_error(ours, truth) < bound


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pools=st.tuples(st.integers(1, 5), st.integers(0, 8), st.integers(1, 4)),
    density=st.floats(0.02, 0.6),
    steps=st.integers(1, 6),
    batch=st.integers(0, 3),
    which=st.integers(0, len(OPTIONS) - 1),
    seed=st.integers(0, 99),
)
def test_any_wiring_equals_the_definition_or_is_refused(pools, density, steps, batch, which, seed):
    weight, pre, post = wiring(pools, density, seed)
    options = OPTIONS[which]
    x = drive(batch, sensory=pools[0])
    try:
        plan_recurrence(pre, post, pools, steps, **options)
    except ValueError as error:
        assert str(error).startswith(f"steps={steps}: reach no output neuron")
        everything = x.new_ones(1, pools[0])
        truth = bpu_recurrence_reference(everything, weight.abs(), pre, post, pools, steps, **options)
        assert not truth.any()
        return
    for ours, truth in zip(*both(x, weight, pre, post, pools, steps, "sparse", **options), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_only_neurons_between_the_drive_and_the_readout_are_computed():
    # 0 -> 1 -> 2 -> 5 is read after four steps; 3 hears and is not heard, 4 speaks and hears nothing.
    post, pre = torch.tensor([[1, 2, 3, 5, 5], [0, 1, 0, 2, 4]])
    plan = plan_recurrence(pre, post, (1, 4, 1), 4)
    assert (state_sizes(plan.layout), link_sizes(plan.layout)) == ([1, 1, 1, 1], [1, 1, 1])
    with pytest.raises(ValueError, match=r"steps=3: reach no output neuron; must be 4 or more for this wiring"):
        plan_recurrence(pre, post, (1, 4, 1), 3)
    with pytest.raises(ValueError, match="no path leads from a sensory to an output neuron"):
        plan_recurrence(pre[:1], post[:1], (1, 4, 1), 9)


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_gradients_are_those_of_finite_differences_also_twice(backend):
    weight, pre, post = wiring((2, 4, 2), 0.4)
    plan = plan_recurrence(pre, post, (2, 4, 2), 4, residual=True, readout="sum")
    inputs = drive(3, sensory=2).requires_grad_(), weight.requires_grad_()
    function = lambda x, w: bpu_recurrence(x, w, plan, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_func_transforms_see_the_definition():
    weight, pre, post = wiring()
    plan = plan_recurrence(pre, post, POOLS, 3, inject="every", residual=True, readout="sum")
    x = drive(4)
    each = torch.func.vmap(torch.func.grad(lambda row: bpu_recurrence(row[None], weight, plan).sum()))(x)
    leaf = x.clone().requires_grad_()
    (together,) = torch.autograd.grad(bpu_recurrence(leaf, weight, plan).sum(), leaf)
    torch.testing.assert_close(each, together)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("form", ["sparse", "dense", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("keep", [0, 1, 2], ids=["nothing", "signs", "states"])
def test_ops_are_registered_as_torch_wants_it(keep, form):
    weight, pre, post = wiring(dtype=torch.float32)
    plan, x, weight = (
        t.to(DEVICE if form == "triton" else "cpu")
        for t in (plan_recurrence(pre, post, POOLS, 3, readout="sum"), drive(5, dtype=torch.float32), weight)
    )
    x.requires_grad_(keep > 0)
    weight.requires_grad_(keep == 2)
    arguments = (x, weight, plan.index, list(plan.layout), keep, form)
    torch.library.opcheck(bpu_recurrence_op, arguments)
    if keep:
        y, saved = bpu_recurrence_op(*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments))
        backward = (torch.ones_like(y), weight.detach(), saved, plan.index, list(plan.layout), form, True, keep == 2)
        torch.library.opcheck(bpu_recurrence_backward_op, backward)


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("learns", [True, False], ids=["learns", "fixed"])
def test_what_is_kept_is_a_byte_a_neuron_and_sample_or_the_states(learns, few, monkeypatch):
    weight, pre, post = wiring(dtype=torch.float32)
    plan = plan_recurrence(pre, post, POOLS, 5)
    cells = 6 * sum(held_sizes(plan.layout))
    monkeypatch.setattr(sys.modules[bpu_recurrence.__module__], "_FEW_STATES", cells if few else cells - 1)
    held = []
    x = drive(6, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        bpu_recurrence(x, weight.requires_grad_(learns), plan)
    assert sum(t.nbytes for t in held) - x.nbytes - weight.nbytes == cells * (4 if learns or few else 1)


def test_weights_that_change_by_data_are_seen():
    weight, pre, post = wiring(dtype=torch.float32)
    plan = plan_recurrence(pre, post, POOLS, 3)
    x = drive(4, dtype=torch.float32).requires_grad_()
    first = bpu_recurrence(x, weight, plan)
    weight.data.mul_(2.0)
    assert weight._version == 0  # nothing but the numbers tells
    torch.testing.assert_close(bpu_recurrence(x, weight, plan), 4 * first)  # two steps of edges
    (dx,) = torch.autograd.grad(first.sum(), x)  # and the first pass goes back by the weights that it had
    (again,) = torch.autograd.grad(bpu_recurrence(x, weight / 2, plan).sum(), x)
    torch.testing.assert_close(dx, again)


def test_the_result_may_be_overwritten_before_the_backward_pass():
    weight, pre, post = wiring(dtype=torch.float32)
    plan = plan_recurrence(pre, post, POOLS, 3)
    x = drive(4, dtype=torch.float32).requires_grad_()
    (want,) = torch.autograd.grad(bpu_recurrence(x, weight, plan).sum(), x)
    (got,) = torch.autograd.grad(bpu_recurrence(x, weight, plan).mul_(2.0).sum(), x)
    torch.testing.assert_close(got, 2 * want)


def test_flops_are_two_a_sample_and_edge():
    weight, pre, post = wiring(dtype=torch.float32)
    plan = plan_recurrence(pre, post, POOLS, 4)
    edges = sum(link_sizes(plan.layout))
    for learns, backward in ((False, 1), (True, 2)):
        with FlopCounterMode(display=False) as counter:
            x = drive(7, dtype=torch.float32).requires_grad_()
            bpu_recurrence(x, weight.clone().requires_grad_(learns), plan).sum().backward()
        assert counter.get_total_flops() == 2 * 7 * edges * (1 + backward)


def test_nan_stays_on_the_paths_from_where_it_entered(backend):
    post, pre = torch.tensor([[2, 3], [0, 1]], device="cpu")
    plan = plan_recurrence(pre, post, (2, 0, 2), 2)
    x = torch.tensor([[float("nan"), 1.0]], requires_grad=True)
    y = bpu_recurrence(x, torch.ones(2, device=x.device), plan.to(x.device))
    assert y.isnan().tolist() == [[True, False]]
    assert torch.autograd.grad((y * y.detach()).sum(), x)[0].isnan().tolist() == [[True, False]]


@needs_triton
def test_several_programs_a_neuron_in_blocks_of_few_edges_repeat_their_bits():
    from archzoo.kernels import _bpu_recurrence_triton as kernels

    with ExitStack() as stack:
        for sizes in (kernels.FORWARD, kernels.BACKWARD, kernels.WEIGHT):
            stack.enter_context(sizes.forced(EDGES=2, BATCH=2))
        found = [both(drive(3), *wiring(), POOLS, 3, "triton", residual=True) for _ in range(2)]
    for first, again, truth in zip(found[0][0], found[1][0], found[0][1], strict=True):
        assert rms_error(first, truth) < 1e-12
        assert torch.equal(first, again)


@needs_triton
def test_what_triton_cannot_do_is_refused():
    weight, pre, post = wiring(dtype=torch.float32)
    plan, x, weight = (
        t.to(DEVICE) for t in (plan_recurrence(pre, post, POOLS, 3), drive(2, dtype=torch.float32), weight)
    )
    check_refusals(lambda x, w: bpu_recurrence(x, w, plan), (x, weight))


def test_compiles_without_a_graph_break():
    weight, pre, post = wiring(dtype=torch.float32)
    plan = plan_recurrence(pre, post, POOLS, 3)
    function = torch.compile(lambda x: bpu_recurrence(x, weight, plan), backend="aot_eager", fullgraph=True)
    x = drive(5, dtype=torch.float32).requires_grad_()
    torch.testing.assert_close(function(x), bpu_recurrence(x, weight, plan))


def test_arguments_that_do_not_fit_are_refused():
    weight, pre, post = wiring()
    plan = plan_recurrence(pre, post, POOLS, 3)
    assert isinstance(plan, RecurrencePlan)
    with pytest.raises(ValueError, match=r"drive of shape \(2, 5\)"):
        bpu_recurrence(drive(2, sensory=5), weight, plan)
    with pytest.raises(ValueError, match=r"weight of shape \(1, "):
        bpu_recurrence(drive(2), weight[None], plan)
    with pytest.raises(ValueError, match="backend='fast'"):
        bpu_recurrence(drive(2), weight, plan, backend="fast")
