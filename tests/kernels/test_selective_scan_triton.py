"""`selective_scan` on Triton against its definition. Without `_triton`: the torch path."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from archzoo.kernels import _scan, use_backend
from archzoo.kernels.selective_scan import selective_scan, selective_scan_op, selective_scan_reference
from tests.helpers import assert_same_bits, rms_error
from tests.kernels.scan_support import OPTIONS, assert_close, in_op_layout, problem, to, value_and_grads
from tests.kernels.triton_support import (
    check_autocast,
    check_compiles,
    check_peak_memory,
    check_refusals,
    needs_triton,
    on_device,
    tolerance,
)

pytestmark = needs_triton

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
SUMMED = ("A", "B", "C", "D", "delta_bias")  # whose gradients are sums over a batch, or channels


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks(triton, monkeypatch):
    """Several programs, segments of one block of 4 steps (8 in float32), and states and channels that fill no block."""
    from archzoo.kernels import _selective_scan_backward_triton as backward
    from archzoo.kernels import _selective_scan_triton as forward

    for file in (_scan, forward):
        monkeypatch.setattr(file, "STEPS", 8)
    sizes = {"STATES": 2, "CHANNELS": 4, "SEGMENT": 1}
    with forward.FORWARD.forced(**sizes), backward.BACKWARD.forced(**sizes):
        yield


def small(**changes):
    return problem(**{"batch": 1, "d": 5, "N": 2, "L": 6, **changes})


def assert_as_exact(got, truth, dtype):
    """By the table of kernels.md. Those of float32 parameters as well by the dtype of dout, which is rounded to it."""
    for name, want in truth.items():
        kind = 0 if name in ("out", "last") else 2 if name in SUMMED else 1
        bound = tolerance(got[name].dtype if name == "last" else dtype, kind)
        error = rms_error(got[name], want)
        assert error <= bound, f"{name} in {got[name].dtype}: {error:.1e}, allowed {bound:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("blocks")
def test_values_and_all_gradients_with_all_options(dtype):
    arguments = to(small(L=9, N=3 if dtype == torch.float64 else 2), dtype)
    arguments["A"] = arguments["A"].float() if dtype != torch.float64 else arguments["A"]
    truth = value_and_grads(selective_scan_reference, to(arguments, torch.float64))
    got = value_and_grads(selective_scan, arguments)
    assert got["last"].dtype == got["A"].dtype == torch.promote_types(dtype, torch.float32)
    assert all(t.dtype == dtype for name, t in got.items() if name not in ("A", "last"))
    assert_as_exact(got, truth, dtype)


@pytest.mark.parametrize(
    ("B", "C", "options"),
    [
        ("varying", "varying", ()),
        ("constant", 2, ("D",)),
        (3, "constant", ("z",)),
        (2, 3, ("delta_bias",)),
        ("varying", 2, ("seq_idx", "z")),
        (1, "constant", ("delta_softplus", "initial_state")),
    ],
    ids=str,
)
@pytest.mark.usefixtures("blocks")
def test_constant_varying_and_grouped_weights_and_each_option(B, C, options):
    arguments = small(d=6, L=5, batch=2 if B == C else 1, B=B, C=C, options=options)
    truth = value_and_grads(selective_scan_reference, arguments)
    assert_close(value_and_grads(selective_scan, arguments), truth, 1e-12)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 1, 17), (1, 33, 4, 16)], ids=str)
@pytest.mark.usefixtures("triton")
def test_blocks_of_the_usual_sizes(sizes):
    """With 16 steps, 32 channels and tensor cores' sums: what a GPU runs, but for the number of programs."""
    arguments = to(problem(*sizes), torch.bfloat16)
    truth = value_and_grads(selective_scan_reference, to(arguments, torch.float64))
    assert_as_exact(value_and_grads(selective_scan, arguments), truth, torch.bfloat16)


@pytest.mark.usefixtures("blocks")
def test_borders_are_those_of_plain_torch():
    """So that a backward of one backend could read what a forward of the other has kept."""
    arguments = in_op_layout(small(d=6, B=2))
    for got, want in zip(*(selective_scan_op.op(*arguments, True, triton) for triton in (True, False)), strict=True):
        assert got.shape == want.shape
        assert got.stride() == want.stride()
        assert rms_error(got, want) < 1e-13


@pytest.mark.parametrize("shape", [(0, 5, 10), (2, 5, 0)], ids=["batch", "length"])
@pytest.mark.usefixtures("blocks")
def test_nothing_in_gives_nothing_out_and_gradients_of_zero(shape):
    batch, d, L = shape
    arguments = problem(batch, d, 3, L)
    got = value_and_grads(selective_scan, arguments)
    assert got["out"].shape == shape
    assert all((got[name] == 0).all() for name in ("A", "D", "delta_bias"))
    if L == 0:
        assert torch.equal(got["last"], arguments["initial_state"])
        assert got["initial_state"].abs().min() > 0


@pytest.mark.usefixtures("blocks")
def test_strides_do_not_matter():
    arguments = small(L=3, batch=2, d=2)
    truth = value_and_grads(selective_scan, arguments)
    for view in (
        lambda t: t.contiguous(),
        lambda t: torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0],
    ):
        views = {
            n: view(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
        }
        before = {n: t.clone() for n, t in views.items() if isinstance(t, torch.Tensor)}
        assert_same_bits(value_and_grads(selective_scan, views), truth, "another layout")
        assert all(torch.equal(before[n], views[n]) for n in before)
    expanded = {**arguments, "u": arguments["u"][:1].expand(2, -1, -1).requires_grad_()}
    out = selective_scan(**expanded)
    (gradient,) = torch.autograd.grad(out.sum(), expanded["u"])  # that of sum() has no strides
    want = torch.autograd.grad(selective_scan_reference(**expanded).sum(), expanded["u"])[0]
    assert rms_error(gradient, want) < 1e-12


@pytest.mark.usefixtures("blocks")
def test_gradients_through_one_output_alone_and_of_one_input_alone():
    arguments = small(L=4, d=2, N=1)
    for through in ((True, False), (False, True)):
        truth = value_and_grads(selective_scan_reference, arguments, through=through)
        assert_close(value_and_grads(selective_scan, arguments, through=through), truth, 1e-12)
    truth = value_and_grads(selective_scan, arguments, through=(True, False))
    generator = torch.Generator(torch.get_default_device()).manual_seed(9)
    dout = torch.randn(truth["out"].shape, generator=generator, dtype=torch.float64)
    for name in TENSORS:
        alone = {**arguments, name: arguments[name].clone().requires_grad_()}
        selective_scan(**alone).backward(dout)
        assert torch.equal(alone[name].grad, truth[name]), name


@pytest.mark.usefixtures("blocks")
def test_nan_stays_where_it_may_reach():
    arguments = small(L=9, options=("D", "z"))
    arguments["u"][0, 1, 6] = torch.nan
    got = value_and_grads(selective_scan, arguments)
    assert got["out"][0, 1, 6:].isnan().all()
    assert got["out"].isnan().sum() == 3
    assert got["delta"][0, 1].isnan().any()
    assert got["C"][..., 6:].isnan().all()
    assert got["C"][..., :6].isfinite().all()
    assert got["A"][1].isnan().all()
    assert got["A"].isnan().sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("triton")
def test_the_softplus_is_exact_everywhere(dtype):
    """out = Delta, where u, B and C are 1; and the slope."""
    delta = torch.cat([torch.linspace(-80, 40, 31), torch.tensor([-1e-3, 0.0, 1e-3, 20.0, 20.01, -1e4, 1e4])])
    delta = delta.to(dtype)[None, :, None].requires_grad_()
    one = torch.ones(1, 1, 1, dtype=dtype)
    got = selective_scan(torch.ones_like(delta), delta, -torch.ones(38, 1), one, one, delta_softplus=True)
    (slope,) = torch.autograd.grad(got.sum(), delta)
    want = F.softplus(delta.double())
    bound = torch.finfo(dtype).eps * (10 + 2 * delta.detach().abs())  # 2^x has the error of x
    assert ((got - want).abs() <= bound * want + 1e-44).all()
    (want,) = torch.autograd.grad(want.sum(), delta)
    assert ((slope - want).abs() <= bound * want + 1e-40).all()


@pytest.mark.usefixtures("blocks")
def test_states_that_hardly_decay_and_such_that_forget_at_once():
    arguments = small(L=9, d=2, options=("initial_state", "D"))
    for per_step in (-1e-6, -20.0, -80.0):
        arguments["A"] = torch.full((2, 2), per_step, dtype=torch.float64)
        single = to(arguments, torch.float32)
        truth = value_and_grads(selective_scan_reference, to(single, torch.float64))
        got = value_and_grads(selective_scan, single)
        tiny = [name for name, t in truth.items() if t.abs().max() < 1e-30]
        assert all(got.pop(name).abs().max() < 1e-30 and truth.pop(name) is not None for name in tiny)
        assert_as_exact(got, truth, torch.float32)


@pytest.mark.usefixtures("blocks")
def test_packed_sequences_equal_each_by_itself():
    arguments = small(L=11, d=2, options=("z", "initial_state"))
    lengths = [3, 1, 6, 1]
    seq_idx = torch.repeat_interleave(torch.tensor([3, 4, 7, 9]), torch.tensor(lengths))[None]
    packed, last = selective_scan(**arguments, seq_idx=seq_idx, return_last_state=True)
    start, state = 0, arguments.pop("initial_state")
    for length in lengths:
        part = {n: t[..., start : start + length] if t.shape[-1] == 11 else t for n, t in arguments.items()}
        alone, own_last = selective_scan(**part, initial_state=state, return_last_state=True)
        assert rms_error(packed[..., start : start + length], alone) < 1e-13
        start, state = start + length, None
    assert rms_error(last, own_last) < 1e-13


@pytest.mark.usefixtures("blocks")
def test_two_runs_agree_bit_for_bit():
    arguments = to(small(), torch.float32)
    assert_same_bits(value_and_grads(selective_scan, arguments), value_and_grads(selective_scan, arguments), "again")


@pytest.mark.slow
@pytest.mark.usefixtures("blocks")
def test_gradcheck():
    arguments = small(d=2, N=1, L=4)
    names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def call(*tensors):
        return selective_scan(**{**arguments, **dict(zip(names, tensors, strict=True))}, return_last_state=True)

    assert torch.autograd.gradcheck(call, [arguments[name].requires_grad_() for name in names], fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(("options", "B"), [((), "varying"), (OPTIONS, 2)], ids=str)
@pytest.mark.usefixtures("blocks")
def test_opcheck(options, B):
    arguments = in_op_layout(problem(1, 2, 1, 3, options, B))
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in arguments]
    opcheck(selective_scan_op.op, (*leaves, "delta_softplus" in options, True))
    tensors = [None if t is None else t.detach() for t in arguments]
    out, last, borders = selective_scan_op.op(*tensors, False, True)
    needs = [n < 9 and (n % 2 == 0 or options == ()) for n in range(10)]
    opcheck(selective_scan_op.backward_op, (out, None if options else last, *tensors, borders, False, needs, True))


def of_five():
    """The op as a function of its five tensors, with a softplus; such tensors; and a gradient of the output."""
    inputs = tuple(to(problem(1, 2, 1, 5, ()), torch.float32).values())
    return (lambda *tensors: selective_scan(*tensors, delta_softplus=True)), inputs, torch.randn(1, 2, 5)


@pytest.mark.usefixtures("blocks")
def test_compile_export_and_autocast():
    function, inputs, dy = of_five()
    check_compiles(function, inputs, dy, "selective_scan")
    check_autocast(function, inputs, dy)


@pytest.mark.usefixtures("blocks")
def test_what_triton_cannot_do_is_refused():
    function, inputs, _ = of_five()
    check_refusals(function, inputs)


@pytest.mark.plain_memory
@pytest.mark.usefixtures("triton")
def test_memory():
    from archzoo.kernels._selective_scan_backward_triton import BACKWARD
    from archzoo.kernels._selective_scan_triton import FORWARD

    sizes = {"STATES": 4, "CHANNELS": 256, "SEGMENT": 4}
    inputs = tuple(to(problem(1, 256, 4, 32, ()), torch.float32).values())
    with FORWARD.forced(**sizes), BACKWARD.forced(**sizes):
        check_peak_memory(selective_scan, inputs, torch.randn(1, 256, 32))
