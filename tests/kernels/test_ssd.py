"""`ssd` against its definition: values, gradients, options, cutting into chunks and slabs, and the tools of torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import _ssd
from archzoo.kernels._op import _doubling
from archzoo.kernels.selective_scan import selective_scan_reference
from archzoo.kernels.selective_state_update import selective_state_update
from archzoo.kernels.ssd import ssd, ssd_op, ssd_reference
from tests.helpers import assert_same_bits, rms_error

LENGTHS = [1, 2, 7, 8, 9, 16, 23, 33]  # about multiples of the chunks of 8 that most tests use
OPTIONS = ("D", "z", "dt_bias", "dt_softplus", "dt_limit", "initial_state", "seq_idx")
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def problem(batch=2, L=20, H=4, P=3, G=2, N=5, options=OPTIONS, seed=0, decay=(-4.0, -0.1), chunk_size=8):
    """Arguments in float64. With `dt_softplus` or without, step sizes are positive: from 0.2 to 1.8."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    low, high = decay
    delta = 0.2 + 1.6 * uniform(batch, L, H)
    arguments = {
        "x": randn(batch, L, H, P),
        "dt": torch.log(torch.expm1(delta)) if "dt_softplus" in options else delta,
        "A": -torch.exp(uniform(H) * math.log(high / low) + math.log(-low)),
        "B": randn(batch, L, G, N),
        "C": randn(batch, L, G, N),
        "chunk_size": chunk_size,
    }
    optional = {
        "D": randn(H, P) if seed % 2 else randn(H),
        "z": randn(batch, L, H, P),
        "dt_bias": 0.1 * uniform(H),
        "dt_softplus": True,
        "dt_limit": (0.5, 1.5),
        "initial_state": randn(batch, H, P, N),
        "seq_idx": (uniform(batch, L) < 0.1).cumsum(1),
    }
    return {**arguments, **{name: optional[name] for name in options}}


def is_real(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def to(arguments, dtype):
    return {n: t.to(dtype) if is_real(t) else t for n, t in arguments.items()}


def value_and_grads(function, arguments, seed=9, through=(True, True)):
    """Output, final state, and the gradient of every argument, by name."""
    leaves = {name: t.detach().requires_grad_() if is_real(t) else t for name, t in arguments.items()}
    out, final = function(**leaves, return_final_state=True)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, final)]
    pairs = [(t, dt) for t, dt, used in zip((out, final), cotangents, through, strict=True) if used]
    wanted = {n: t for n, t in leaves.items() if is_real(t)}
    grads = torch.autograd.grad(
        [t for t, _ in pairs], list(wanted.values()), [dt for _, dt in pairs], allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), "final": final.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_close(got, truth, bound):
    assert got.keys() == truth.keys()
    errors = {name: rms_error(got[name], truth[name]) for name in truth if truth[name].abs().sum() > 0}
    assert all(error <= bound for error in errors.values()), errors
    assert all((got[name] == 0).all() for name in truth.keys() - errors.keys())


def by_selective_scan(
    x, dt, A, B, C, *, chunk_size, D, z, dt_bias, dt_softplus, initial_state, seq_idx, return_final_state
):
    """The same scan with a channel for each head and place in it, and a decay for each channel and state."""
    P, N = x.shape[3], B.shape[3]

    def channels(t):
        return t.flatten(2).mT

    D = (D if D.dim() == 2 else D[:, None].expand(-1, P)).flatten()
    out, last = selective_scan_reference(
        channels(x),
        channels(dt[..., None].expand(x.shape)),
        A.repeat_interleave(P)[:, None].expand(-1, N),
        *(t.permute(0, 2, 3, 1) for t in (B, C)),
        D,
        channels(z),
        dt_bias.repeat_interleave(P),
        dt_softplus,
        True,
        initial_state=initial_state.flatten(1, 2),
        seq_idx=seq_idx,
    )
    return out.mT.unflatten(2, x.shape[2:]), last.unflatten(1, x.shape[2:])


@pytest.mark.parametrize("seed", [0, 1])
def test_definition_is_a_selective_scan_with_one_decay_a_head(seed):
    arguments = problem(options=tuple(o for o in OPTIONS if o != "dt_limit"), seed=seed)
    truth = value_and_grads(by_selective_scan, arguments)
    assert_close(value_and_grads(ssd_reference, arguments), truth, 1e-12)


def test_definition_is_a_masked_attention_without_softmax():
    """y_t = sum_{s <= t} (C_t . B_s) exp(A (Delta_{s+1} + ... + Delta_t)) Delta_s x_s."""
    arguments = problem(options=(), G=1)
    x, dt, A, B, C = (arguments[name] for name in ("x", "dt", "A", "B", "C"))
    total = (dt * A).cumsum(1)
    past = torch.ones(20, 20, dtype=torch.bool).tril()[:, :, None]
    decay = (total[:, :, None] - total[:, None]).masked_fill(~past, -torch.inf).exp()  # (batch, t, s, H)
    y = torch.einsum("btgn,bsgn,btsh,bsh,bshp->bthp", C, B, decay, dt, x)
    assert rms_error(ssd_reference(**arguments), y) < 1e-13


def test_step_sizes_are_clamped_after_softplus():
    arguments = problem(options=("dt_softplus",))
    delta = torch.nn.functional.softplus(arguments.pop("dt"))
    limits = delta.quantile(0.3).item(), delta.quantile(0.7).item()
    want = ssd(**{**arguments, "dt_softplus": False}, dt=delta.clamp(*limits))
    dt = torch.log(torch.expm1(delta))
    assert rms_error(ssd(**arguments, dt=dt, dt_limit=limits), want) < 1e-13
    assert rms_error(ssd(**arguments, dt=dt), want) > 1e-3
    del arguments["dt_softplus"]
    assert rms_error(ssd(**arguments, dt=-delta), torch.zeros_like(want)) == 0, "no step goes back in time"


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("L", LENGTHS)
def test_values_and_all_gradients_with_all_options(L, dtype):
    arguments = to(problem(L=L, seed=L), dtype)
    truth = value_and_grads(ssd_reference, to(arguments, torch.float64))
    got = value_and_grads(ssd, arguments)
    assert {t.dtype for t in got.values()} == {dtype}
    assert_close(got, truth, BOUNDS[dtype])


def test_values_and_all_gradients_of_a_long_sequence():
    arguments = to(problem(1, 1027, 2, 3, 1, 4, ("D", "z"), decay=(-2.0, -1e-3), chunk_size=64), torch.float32)
    in_double = to(arguments, torch.float64)
    truth = value_and_grads(ssd_reference, in_double)
    assert_close(value_and_grads(ssd, arguments), truth, BOUNDS[torch.float32])
    assert_close(value_and_grads(ssd, in_double), truth, BOUNDS[torch.float64])


@pytest.mark.parametrize("option", ["none", *OPTIONS])
def test_each_option_alone(option):
    arguments = problem(options=() if option == "none" else (option,))
    assert_close(value_and_grads(ssd, arguments), value_and_grads(ssd_reference, arguments), 1e-12)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 5)),
    groups=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    chunk_size=st.integers(1, 50),
    options=st.sets(st.sampled_from(OPTIONS)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_options(sizes, groups, chunk_size, options, seed):
    batch, L, P, N = sizes
    arguments = problem(batch, L, math.prod(groups), P, groups[0], N, sorted(options), seed, chunk_size=chunk_size)
    assert_close(value_and_grads(ssd, arguments), value_and_grads(ssd_reference, arguments), 1e-12)


@pytest.mark.parametrize("options", [(), OPTIONS], ids=["none", "all"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_decay_of_its_own_for_each_token(dtype, options):
    arguments = problem(options=options)
    factors = torch.rand(2, 20, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.5
    arguments = to({**arguments, "A": arguments["A"] * factors}, dtype)
    truth = value_and_grads(ssd_reference, to(arguments, torch.float64))
    assert truth["A"].shape == (2, 20, 4)
    assert_close(value_and_grads(ssd, arguments), truth, BOUNDS[dtype])


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 1000])
def test_chunks_change_nothing(chunk_size):
    arguments = problem(L=33)
    truth = value_and_grads(ssd, arguments)
    assert_close(value_and_grads(ssd, {**arguments, "chunk_size": chunk_size}), truth, 1e-12)


@pytest.mark.parametrize("elements", [1, 300, 3000])
def test_cutting_into_slabs_changes_nothing(elements, monkeypatch):
    arguments = problem(3, 35)
    truth = value_and_grads(ssd_reference, arguments)
    monkeypatch.setattr(_ssd, "ELEMENTS", elements)
    assert_close(value_and_grads(ssd, arguments), truth, 1e-12)


@pytest.mark.parametrize("per_step", [-1e-6, -1e-3, -1.0, -20.0, -80.0])
def test_slow_and_fast_decay_in_float32(per_step):
    """What a step loses is `per_step`, give or take 0.8 of it; at -80 the state forgets at once."""
    arguments = problem(1, 130, options=("initial_state", "D"), decay=(per_step * 1.001, per_step), chunk_size=64)
    arguments = to(arguments, torch.float32)
    truth = value_and_grads(ssd_reference, to(arguments, torch.float64))
    got = value_and_grads(ssd, arguments)
    tiny = {name for name, t in truth.items() if t.abs().max() < 1e-30}  # float32 has no more digits for these
    for name in tiny:
        assert got.pop(name).abs().max() < 1e-30
        truth.pop(name)
    assert_close(got, truth, 1e-5)


@pytest.mark.parametrize("jump", [1.0, 1e2, 1e4])
def test_a_leap_in_time_costs_its_chunk_no_precision(jump):
    """Sums of Delta A then reach -1e5; decays between other steps are still differences of them."""
    arguments = problem(1, 128, options=("D",), chunk_size=64)
    leaps = torch.arange(128) % 10 == 3
    arguments["dt"] = torch.where(leaps[None, :, None], jump * arguments["dt"], 1e-3 * arguments["dt"])
    arguments = to(arguments, torch.float32)
    truth = value_and_grads(ssd_reference, to(arguments, torch.float64))
    assert_close(value_and_grads(ssd, arguments), truth, 2e-6)


def test_a_state_that_underflows_gives_zeros_and_no_nan():
    arguments = to(problem(options=("initial_state",), decay=(-1e5, -1e4)), torch.float32)
    got = value_and_grads(ssd, arguments)
    assert all(t.isfinite().all() for t in got.values())
    scores = (arguments["B"] * arguments["C"]).sum(-1).repeat_interleave(2, 2)
    direct = (scores * arguments["dt"]).unsqueeze(-1) * arguments["x"]
    assert rms_error(got["out"], direct) < 1e-6, "the past is gone: y_t = (C_t . B_t) Delta_t x_t"


def test_what_would_overflow_above_the_diagonal_is_masked_before_the_exp():
    """exp(cs_t - cs_s) for t < s is exp(+6000) here: masked afterwards, it would make gradients NaN."""
    arguments = to(problem(1, 64, options=(), decay=(-100.0, -99.0), chunk_size=64), torch.float32)
    assert all(t.isfinite().all() for t in value_and_grads(ssd, arguments).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    arguments = to(problem(L=65), dtype)
    for name in ("A", "D", "dt_bias"):
        arguments[name] = arguments[name].float()
    truth = value_and_grads(ssd_reference, to(arguments, torch.float64))
    got = value_and_grads(ssd, arguments)
    wide = {"final", "A", "D", "dt_bias"}
    assert {name for name, t in got.items() if t.dtype == torch.float32} == wide
    assert all(t.dtype == dtype for name, t in got.items() if name not in wide)
    assert rms_error(got.pop("final"), truth.pop("final")) < 1e-5
    assert_close(got, truth, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("through", [(True, False), (False, True)], ids=["out", "final_state"])
def test_gradients_through_one_output_alone(through):
    arguments = problem()
    truth = value_and_grads(ssd_reference, arguments, through=through)
    assert_close(value_and_grads(ssd, arguments, through=through), truth, 1e-12)


def test_gradients_that_nobody_asks_for_change_nothing_and_are_none():
    arguments = problem(L=37)
    truth = value_and_grads(ssd, arguments)
    generator = torch.Generator().manual_seed(9)
    dout = torch.randn(truth["out"].shape, generator=generator, dtype=torch.float64)
    dfinal = torch.randn(truth["final"].shape, generator=generator, dtype=torch.float64)
    for name in truth.keys() - {"out", "final"}:
        alone = {**arguments, name: arguments[name].clone().requires_grad_()}
        out, final = ssd(**alone, return_final_state=True)
        torch.autograd.backward([out, final], [dout, dfinal])
        assert torch.equal(alone[name].grad, truth[name]), name
        assert all(t.grad is None for n, t in alone.items() if isinstance(t, torch.Tensor) and n != name)


@pytest.mark.parametrize("options", [OPTIONS, ()], ids=["all", "none"])
def test_gradients_of_gradients(options):
    arguments = problem(1, 4, 2, 2, 1, 2, options, chunk_size=3)
    names = [n for n, t in arguments.items() if is_real(t)]

    def call(*tensors):
        return ssd(**{**arguments, **dict(zip(names, tensors, strict=True))}, return_final_state=True)

    leaves = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: call(*t)[1], leaves, fast_mode=True)


def test_gradients_with_a_graph_equal_those_without_where_inputs_are_made_of_each_other():
    arguments = problem()

    def gradient(create_graph):
        x = arguments["x"].clone().requires_grad_()
        dt = x.mean(-1)
        out = ssd(**{**arguments, "x": x * dt[..., None], "dt": dt, "z": x * 2})
        return torch.autograd.grad(out.sin().sum(), x, create_graph=create_graph)[0]

    assert rms_error(gradient(True), gradient(False)) < 1e-12


def test_two_runs_agree_bit_for_bit():
    arguments = to(problem(3, 300, 6, 20, 2, 12, chunk_size=64), torch.float32)
    assert_same_bits(value_and_grads(ssd, arguments), value_and_grads(ssd, arguments), "again")


# --- State, packing, strides, one step --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 8, 13, 39])
def test_two_halves_equal_the_whole_with_gradients_through_the_state(cut):
    arguments = problem(L=40, options=("D", "z", "dt_bias", "dt_softplus", "initial_state"))

    def in_two(initial_state, return_final_state, **rest):
        along_time = ("x", "dt", "B", "C", "z")
        first = {n: t[:, :cut] if n in along_time else t for n, t in rest.items()}
        second = {n: t[:, cut:] if n in along_time else t for n, t in rest.items()}
        y, state = ssd(**first, initial_state=initial_state, return_final_state=True)
        rest_of_y, state = ssd(**second, initial_state=state, return_final_state=True)
        return torch.cat([y, rest_of_y], 1), state

    assert_close(value_and_grads(in_two, arguments), value_and_grads(ssd, arguments), 1e-12)


def test_packed_sequences_equal_each_by_itself():
    arguments = problem(batch=1, L=50, options=("D", "z", "initial_state"))
    lengths = [7, 1, 16, 26]
    seq_idx = torch.repeat_interleave(torch.tensor([3, 4, 7, 9]), torch.tensor(lengths))[None]
    packed, final = ssd(**arguments, seq_idx=seq_idx, return_final_state=True)
    start, state = 0, arguments.pop("initial_state")
    for length in lengths:
        part = {
            n: t[:, start : start + length] if is_real(t) and t.shape[:2] == (1, 50) else t
            for n, t in arguments.items()
        }
        alone, own_final = ssd(**part, initial_state=state, return_final_state=True)
        assert rms_error(packed[:, start : start + length], alone) < 1e-13
        start, state = start + length, None
    assert rms_error(final, own_final) < 1e-13


def test_strides_do_not_matter_and_inputs_are_left_alone():
    arguments = problem(L=35, seed=1)
    truth = value_and_grads(ssd, arguments)
    for view in (
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t,
        lambda t: torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0],
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ):
        views = {n: view(t) if is_real(t) else t for n, t in arguments.items()}
        before = {n: t.clone() for n, t in views.items() if isinstance(t, torch.Tensor)}
        assert_close(value_and_grads(ssd, views), truth, 1e-12)
        assert all(torch.equal(before[n].nan_to_num(), views[n].nan_to_num()) for n in before)
    leaf = arguments["x"].clone().requires_grad_()
    ssd(**{**arguments, "x": leaf}).sum().backward()  # the gradient of sum() is an expanded tensor
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("G", [1, 2])
def test_a_step_with_heads_is_a_scan_of_one(G):
    arguments = problem(L=1, G=G, options=("z", "dt_bias", "dt_softplus", "initial_state"))
    want, final = ssd(**arguments, return_final_state=True)
    state, heads = arguments["initial_state"].clone(), (4, 3)
    out = selective_state_update(
        state,
        arguments["x"][:, 0],
        arguments["dt"][:, 0, :, None].expand(2, *heads),
        arguments["A"][:, None, None].expand(*heads, 5),
        arguments["B"][:, 0],
        arguments["C"][:, 0],
        None,
        arguments["z"][:, 0],
        arguments["dt_bias"][:, None].expand(heads),
        True,
    )
    assert rms_error(out, want[:, 0]) < 1e-13
    assert rms_error(state, final) < 1e-13


@pytest.mark.plain_memory
def test_memory_is_linear_in_the_length_and_small():
    """Peak beyond the inputs, forward and backward, in units of one input; states of every step are N = 16 units."""
    batch, L, H, P, N = 1, 2048, 8, 64, 16
    arguments = to(problem(batch, L, H, P, 1, N, ("D", "dt_softplus"), chunk_size=64), torch.float32)
    leaves = {n: t.requires_grad_() if is_real(t) else t for n, t in arguments.items()}
    wanted = [t for t in leaves.values() if isinstance(t, torch.Tensor)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = ssd(**leaves)
        torch.autograd.grad(out, wanted, torch.ones_like(out))
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    unit = 4 * batch * L * H * P
    assert peak > 3 * unit, "the measurement misses out, dout or a gradient"
    assert peak < 5 * unit, f"{peak / unit:.1f} inputs"  # out, dout, dx, a quarter of states, and a slab


# --- Tools of torch ---------------------------------------------------------------------------------------------------


def in_op_order(arguments):
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "seq_idx")
    return tuple(arguments.get(name) for name in names)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["none", "all"])
def test_opcheck(options):
    arguments = in_op_order(problem(1, 11, options=options))
    numbers = (4, "dt_softplus" in options, *((0.5, 1.5) if "dt_limit" in options else (0.0, math.inf)))
    leaves = [t.requires_grad_() if is_real(t) else t for t in arguments]
    opcheck(ssd_op.op, (*leaves, *numbers))
    with torch.no_grad():
        out, final, borders = ssd_op.op(*arguments, *numbers)
    tensors = tuple(None if t is None else t.detach() for t in arguments)
    for dout, dfinal, needs in (
        (out, None, [True] * 9 + [False]),
        (None, final, [n % 2 == 0 for n in range(9)] + [False]),
    ):
        opcheck(ssd_op.backward_op, (dout, dfinal, *tensors, borders, *numbers, needs))


def test_compile_and_export_hold_one_node():
    arguments = problem()
    want = ssd(**arguments)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(ssd, fullgraph=True, backend=backend)
    assert torch.equal(compiled(**arguments), want)
    torch._dynamo.reset()
    ops = [str(node.target) for node in graphs[0].graph.nodes if "archzoo" in str(node.target)]
    assert ops == ["archzoo.ssd.default"]

    class Scan(torch.nn.Module):
        def forward(self, x, dt, A, B, C):
            return ssd(x, dt, A, B, C)

    bare = [arguments[name] for name in ("x", "dt", "A", "B", "C")]
    program = torch.export.export(Scan(), tuple(bare)).module()
    assert torch.equal(program(*bare), ssd(*bare))


def test_function_transforms_give_autograds_gradients():
    arguments = problem(L=5)
    gradient = torch.func.grad(lambda x: ssd(**{**arguments, "x": x}).sin().sum())(arguments["x"])
    leaf = arguments["x"].clone().requires_grad_()
    ssd(**{**arguments, "x": leaf}).sin().sum().backward()
    assert rms_error(gradient, leaf.grad) < 1e-12


def test_autocast_rounds_nothing():
    arguments = to(problem(L=33), torch.float32)
    want = value_and_grads(ssd, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(value_and_grads(ssd, arguments), want, "under autocast")


def products_flops(function):
    """Of what torch itself counts, the ops that ours is made of."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("gate", [False, True], ids=["bare", "gate"])
@pytest.mark.parametrize("L", [24, 37])
def test_flops_are_those_of_the_products(L, gate):
    """The formulas, against torch's own count of the same work done outside the op."""
    arguments = problem(2, L, options=("D", "z") if gate else ("D",))
    leaves = {n: t.requires_grad_() if is_real(t) else t for n, t in arguments.items()}
    with FlopCounterMode(display=False) as counter:
        out = ssd(**leaves)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    tensors = in_op_order(to(arguments, torch.float64))
    numbers = (8, False, 0.0, math.inf)
    detached = [None if t is None else t.detach() for t in tensors]
    _, _, borders = ssd_op.op(*detached, *numbers)
    assert forward == products_flops(lambda: ssd_op.op._init_fn(*detached, *numbers))
    needs = [t is not None for t in detached[:9]] + [False]
    run = ssd_op.backward_op._init_fn
    assert counter.get_total_flops() == products_flops(
        lambda: run(detached[0], None, *detached, borders, *numbers, needs)
    )


@pytest.mark.parametrize("shape", [(0, 20), (2, 0)], ids=["batch", "length"])
def test_nothing_in_gives_nothing_out_and_gradients_of_zero(shape):
    arguments = problem(*shape)
    got = value_and_grads(ssd, arguments)
    assert got["out"].shape == (*shape, 4, 3)
    for name in ("A", "D", "dt_bias"):
        assert torch.equal(got[name], torch.zeros_like(arguments[name]))
    if shape[1] == 0:
        assert torch.equal(got["final"], arguments["initial_state"])
        assert got["initial_state"].abs().min() > 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.zeros(2, 20, 12), "x of shape"),
        ("x", torch.zeros(2, 20, 0, 3), "x of shape"),
        ("x", torch.zeros(2, 20, 4, 3, dtype=torch.int64), "x of shape.*int64"),
        ("dt", torch.zeros(2, 20, 3), r"dt of shape \(2, 20, 3\).*\(2, 20, 4\)"),
        ("A", torch.zeros(4, 5), r"A of shape \(4, 5\).*\(4,\)"),
        ("A", torch.zeros(2, 20, 3), r"A of shape \(2, 20, 3\).*\(2, 20, 4\)"),
        ("A", torch.zeros(4, dtype=torch.complex64), "A of torch.complex64"),
        ("B", torch.zeros(2, 20, 5), r"B of shape \(2, 20, 5\)"),
        ("B", torch.zeros(2, 20, 3, 5), "B has 3 groups.*H = 4"),
        ("C", torch.zeros(2, 20, 1, 5), r"C of shape \(2, 20, 1, 5\).*\(2, 20, 2, 5\)"),
        ("D", torch.zeros(3), r"D of shape \(3,\).*\(4,\)"),
        ("D", torch.zeros(4, 2), r"D of shape \(4, 2\).*\(4, 3\)"),
        ("z", torch.zeros(2, 4, 20, 3), "z of shape"),
        ("dt_bias", torch.zeros(1), "dt_bias of shape"),
        ("initial_state", torch.zeros(2, 4, 5, 3), "initial_state of shape"),
        ("seq_idx", torch.zeros(2, 19, dtype=torch.int64), "seq_idx of shape"),
        ("seq_idx", torch.zeros(2, 20), "seq_idx of shape.*float32"),
        ("chunk_size", 0, "chunk_size=0"),
        ("chunk_size", 2.5, "chunk_size=2.5"),
        ("dt_limit", (1.0, 0.5), r"dt_limit=\(1.0, 0.5\)"),
        ("dt_limit", (0.0, math.nan), "dt_limit=.*nan"),
        ("dt_limit", 0.5, "dt_limit=0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value and "=" not in value else "",
)
def test_what_does_not_fit_is_refused_by_name(name, value, words):
    with pytest.raises(ValueError, match=words):
        ssd(**{**problem(), name: value})


@pytest.mark.parametrize("size", [0, 1, 2, 5, 8])
def test_running_sums_for_a_gpu_that_is_to_be_deterministic(size):
    x = torch.randn(3, size, 2, dtype=torch.float64)
    assert rms_error(_doubling(x, 1), x.cumsum(1)) < 1e-15
    if size > 2:
        x[0, 2] = torch.inf
        assert torch.equal(_doubling(x, 1)[0, :2], x.cumsum(1)[0, :2])
