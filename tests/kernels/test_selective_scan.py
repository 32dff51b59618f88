"""`selective_scan` and its single step against the definition: values, gradients, options, and the tools of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import _scan
from archzoo.kernels.selective_scan import (
    selective_scan,
    selective_scan_op,
    selective_scan_reference,
)
from archzoo.kernels.selective_state_update import selective_state_update
from tests.helpers import assert_same_bits, rms_error
from tests.kernels.scan_support import OPTIONS, assert_close, in_op_layout, problem, to, value_and_grads

LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 65]
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5}


def closed_form(u, delta, A, B, C):
    """out_t = sum_{s <= t} C_t exp(A (Delta_{s+1} + ... + Delta_t)) Delta_s B_s u_s, for varying B and C."""
    total = delta.cumsum(-1)
    past = torch.ones(u.shape[-1], u.shape[-1], dtype=torch.bool).tril()
    exponent = (total.unsqueeze(-1) - total.unsqueeze(-2)).unsqueeze(2) * A[:, :, None, None]  # (b, d, N, t, s)
    kernel = exponent.masked_fill(~past, -torch.inf).exp()
    return torch.einsum("bnt,bdnts,bds,bns,bds->bdt", C, kernel, delta, B, u)


def test_definition_is_the_sum_over_the_past_written_out():
    arguments = problem(options=())
    assert rms_error(selective_scan_reference(**arguments), closed_form(**arguments)) < 1e-13
    everything = problem(options=("D", "z", "delta_bias", "delta_softplus"))
    u, z = everything["u"], everything["z"]
    width = F.softplus(everything["delta"] + everything["delta_bias"][:, None])
    y = closed_form(u, width, everything["A"], everything["B"], everything["C"]) + everything["D"][:, None] * u
    assert rms_error(selective_scan_reference(**everything), y * z / (1 + torch.exp(-z))) < 1e-13


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("L", LENGTHS)
def test_values_and_all_gradients_with_all_options(L, dtype):
    arguments = to(problem(L=L), dtype)
    truth = value_and_grads(selective_scan_reference, to(arguments, torch.float64))
    got = value_and_grads(selective_scan, arguments)
    assert {t.dtype for t in got.values()} == {dtype}
    assert_close(got, truth, BOUNDS[dtype])


@pytest.mark.slow
def test_values_and_all_gradients_of_a_long_sequence():
    arguments = to(problem(batch=1, d=3, N=4, L=4099, decay=(-2.0, -1e-3)), torch.float32)
    in_double = to(arguments, torch.float64)
    truth = value_and_grads(selective_scan_reference, in_double)
    assert_close(value_and_grads(selective_scan, arguments), truth, BOUNDS[torch.float32])
    assert_close(value_and_grads(selective_scan, in_double), truth, BOUNDS[torch.float64])


@pytest.mark.parametrize("option", ["none", *OPTIONS])
def test_each_option_alone(option):
    arguments = problem(L=37, options=() if option == "none" else (option,))
    truth = value_and_grads(selective_scan_reference, arguments)
    assert_close(value_and_grads(selective_scan, arguments), truth, 1e-11)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.sampled_from([1, 4, 6, 12]), st.integers(1, 5), st.integers(1, 40)),
    options=st.sets(st.sampled_from(OPTIONS)),
    weights=st.tuples(*[st.sampled_from(["constant", "varying", 1, 2, 3])] * 2),
    channel_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_options(sizes, options, weights, channel_last, seed):
    batch, d, N, L = sizes
    B, C = ("varying" if isinstance(w, int) and d % w else w for w in weights)
    arguments = problem(batch, d, N, L, sorted(options), B, C, seed, channel_last)
    truth = value_and_grads(selective_scan_reference, arguments)
    assert_close(value_and_grads(selective_scan, arguments), truth, 1e-11)


@pytest.mark.parametrize("C", ["constant", "varying", 2, 3], ids=str)
@pytest.mark.parametrize("B", ["constant", "varying", 2, 3], ids=str)
def test_constant_varying_and_grouped_weights(B, C):
    arguments = problem(d=12, L=19, B=B, C=C)
    truth = value_and_grads(selective_scan_reference, arguments)
    assert_close(value_and_grads(selective_scan, arguments), truth, 1e-11)


@pytest.mark.parametrize(
    ("per_step", "L"), [(-1e-6, 65), (-1e-6, 4099), (-1e-3, 65), (-1.0, 65), (-20.0, 65), (-80.0, 65), (-80.0, 1025)]
)
def test_slow_and_fast_decay_in_float32(per_step, L):
    """What a step loses is `per_step`, give or take 0.8 of it; at -80 the state forgets at once."""
    arguments = problem(1, 4, 2, L, ("initial_state", "D"), decay=(per_step * 1.001, per_step))
    arguments = to(arguments, torch.float32)
    truth = value_and_grads(selective_scan_reference, to(arguments, torch.float64))
    got = value_and_grads(selective_scan, arguments)
    tiny = {name for name, t in truth.items() if t.abs().max() < 1e-30}  # float32 has no more digits for these
    for name in tiny:
        assert got.pop(name).abs().max() < 1e-30
        truth.pop(name)
    assert_close(got, truth, 1e-5)


def test_a_state_that_underflows_gives_zeros_and_no_nan():
    arguments = to(problem(options=("initial_state",), decay=(-1e5, -1e4)), torch.float32)
    got = value_and_grads(selective_scan, arguments)
    assert all(t.isfinite().all() for t in got.values())
    direct = arguments["delta"] * arguments["u"] * (arguments["B"] * arguments["C"]).sum(1, keepdim=True)
    assert rms_error(got["out"], direct) < 1e-6, "the past is gone: out_t = C_t B_t Delta_t u_t"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    arguments = to(problem(L=65), dtype)
    arguments["A"] = arguments["A"].float()
    truth = value_and_grads(selective_scan_reference, to(arguments, torch.float64))
    got = value_and_grads(selective_scan, arguments)
    assert got["last"].dtype == got["A"].dtype == torch.float32
    assert all(t.dtype == dtype for name, t in got.items() if name not in ("A", "last"))
    assert rms_error(got["last"], truth["last"]) < 1e-5
    ulp = torch.finfo(dtype).eps / 2
    assert_close({n: t for n, t in got.items() if n != "last"}, {n: t for n, t in truth.items() if n != "last"}, ulp)


@pytest.mark.parametrize("through", [(True, False), (False, True)], ids=["out", "last_state"])
def test_gradients_through_one_output_alone(through):
    arguments = problem()
    truth = value_and_grads(selective_scan_reference, arguments, through=through)
    assert_close(value_and_grads(selective_scan, arguments, through=through), truth, 1e-11)


def test_gradients_that_nobody_asks_for_change_nothing_and_are_none():
    arguments = problem(L=37, B=2, C="constant")
    truth = value_and_grads(selective_scan, arguments)
    generator = torch.Generator().manual_seed(9)
    dout = torch.randn(truth["out"].shape, generator=generator, dtype=torch.float64)
    dlast = torch.randn(truth["last"].shape, generator=generator, dtype=torch.float64)
    for name in truth.keys() - {"out", "last"}:
        alone = {**arguments, name: arguments[name].clone().requires_grad_()}
        out, last = selective_scan(**alone, return_last_state=True)
        torch.autograd.backward([out, last], [dout, dlast])
        assert torch.equal(alone[name].grad, truth[name]), name
        assert all(t.grad is None for n, t in alone.items() if isinstance(t, torch.Tensor) and n != name)


def test_gradients_of_gradients():
    for options in (OPTIONS, ()):
        arguments = problem(1, 2, 2, 3, options)
        names = [n for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()]

        def call(*tensors, arguments=arguments, names=names):
            given = {**arguments, **dict(zip(names, tensors, strict=True))}
            return selective_scan(**given, return_last_state=True)

        leaves = [arguments[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *t, call=call: call(*t)[1], leaves, fast_mode=True)


def test_two_runs_agree_bit_for_bit():
    arguments = to(problem(3, 40, 5, 100, B=2), torch.float32)
    assert_same_bits(value_and_grads(selective_scan, arguments), value_and_grads(selective_scan, arguments), "again")


# --- State, packing, tiles, strides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 16, 23, 39])
def test_two_halves_equal_the_whole_with_gradients_through_the_state(cut):
    arguments = problem(L=40, options=("D", "z", "delta_bias", "delta_softplus", "initial_state"))

    def in_two(return_last_state, initial_state, **rest):
        along_time = ("u", "delta", "B", "C", "z")
        first = {n: t[..., :cut] if n in along_time else t for n, t in rest.items()}
        second = {n: t[..., cut:] if n in along_time else t for n, t in rest.items()}
        y, state = selective_scan(**first, initial_state=initial_state, return_last_state=True)
        rest_of_y, state = selective_scan(**second, initial_state=state, return_last_state=True)
        return torch.cat([y, rest_of_y], -1), state

    assert_close(value_and_grads(in_two, arguments), value_and_grads(selective_scan, arguments), 1e-12)


def test_packed_sequences_equal_each_by_itself():
    arguments = problem(batch=1, L=50, options=("D", "z", "initial_state"))
    lengths = [7, 1, 16, 26]
    seq_idx = torch.repeat_interleave(torch.tensor([3, 4, 7, 9]), torch.tensor(lengths))[None]
    packed, last = selective_scan(**arguments, seq_idx=seq_idx, return_last_state=True)
    start, state = 0, arguments.pop("initial_state")
    for length in lengths:
        part = {n: t[..., start : start + length] if t.shape[-1] == 50 else t for n, t in arguments.items()}
        alone, own_last = selective_scan(**part, initial_state=state, return_last_state=True)
        assert rms_error(packed[..., start : start + length], alone) < 1e-13
        start, state = start + length, None
    assert rms_error(last, own_last) < 1e-13


@pytest.mark.parametrize("states", [1, 9, 40, 300])
@pytest.mark.parametrize("weights", ["varying", 2, "constant"], ids=str)
def test_cutting_into_tiles_changes_nothing(states, weights, monkeypatch):
    arguments = problem(3, 12, 3, 35, B=weights, C=weights)
    truth = value_and_grads(selective_scan_reference, arguments)
    monkeypatch.setattr(_scan, "STATES", states)
    assert_close(value_and_grads(selective_scan, arguments), truth, 1e-11)


def test_strides_do_not_matter_and_inputs_are_left_alone():
    arguments = problem(L=35, B=2)
    truth = value_and_grads(selective_scan, arguments)
    for view in (
        lambda t: t.contiguous(),
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0],
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ):
        views = {
            n: view(t) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
        }
        before = {n: t.clone() for n, t in views.items() if isinstance(t, torch.Tensor)}
        assert_close(value_and_grads(selective_scan, views), truth, 1e-12)
        assert all(torch.equal(before[n].nan_to_num(), views[n].nan_to_num()) for n in before)
    expanded = {**arguments, "u": arguments["u"][:1].expand(2, -1, -1)}
    want = value_and_grads(selective_scan, {**expanded, "u": expanded["u"].contiguous()})
    assert_close(value_and_grads(selective_scan, expanded), want, 1e-12)
    leaf = arguments["u"].clone().requires_grad_()
    selective_scan(**{**arguments, "u": leaf}).sum().backward()  # the gradient of sum() is an expanded tensor
    assert leaf.grad.isfinite().all()


@pytest.mark.plain_memory
@pytest.mark.parametrize("channel_last", [True, False])
def test_nothing_as_large_as_all_states_is_allocated(channel_last):
    """Peak beyond the inputs, forward and backward, in units of one input; all states are N = 16 units."""
    batch, d, N, L = 1, 512, 16, 1024
    arguments = to(
        problem(batch, d, N, L, ("D", "z", "delta_bias", "delta_softplus"), channel_last=channel_last), torch.float32
    )
    leaves = {n: t.requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    wanted = [t for t in leaves.values() if isinstance(t, torch.Tensor)]

    def run():
        out = selective_scan(**leaves)
        torch.autograd.grad(out, wanted, torch.ones_like(out))

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    unit = 4 * batch * d * L
    assert peak > 5 * unit, "the measurement misses out, dout, states before blocks, or gradients"
    assert peak < 8 * unit, f"{peak / unit:.1f} inputs"  # out, dout, 1 of states, 3 gradients, and blocks


# --- Tools of torch ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(("options", "B"), [((), "varying"), (OPTIONS, "constant"), (OPTIONS, 2)], ids=str)
def test_opcheck(options, B):
    arguments = in_op_layout(problem(1, 4, 2, 18, options, B))
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in arguments]
    opcheck(selective_scan_op.op, (*leaves, "delta_softplus" in options))
    with torch.no_grad():
        out, last, borders = selective_scan_op.op(*arguments, False)
    tensors = [None if t is None else t.detach() for t in arguments]
    for dout, dlast, needs in ((out, None, [n < 9 for n in range(10)]), (None, last, [n % 2 == 0 for n in range(10)])):
        opcheck(selective_scan_op.backward_op, (dout, dlast, *tensors, borders, False, needs))


def test_compile_and_export_hold_one_node():
    arguments = problem(L=18)
    want = selective_scan(**arguments)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend=backend)
    assert torch.equal(compiled(**arguments), want)
    torch._dynamo.reset()
    ops = [str(node.target) for node in graphs[0].graph.nodes if "archzoo" in str(node.target)]
    assert ops == ["archzoo.selective_scan.default"]

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C)

    bare = problem(L=18, options=())
    program = torch.export.export(Scan(), tuple(bare.values())).module()
    assert torch.equal(program(*bare.values()), selective_scan(**bare))


def test_function_transforms_give_autograds_gradients():
    arguments = problem(L=5)
    gradient = torch.func.grad(lambda u: selective_scan(**{**arguments, "u": u}).sin().sum())(arguments["u"])
    leaf = arguments["u"].clone().requires_grad_()
    selective_scan(**{**arguments, "u": leaf}).sin().sum().backward()
    assert rms_error(gradient, leaf.grad) < 1e-12


def test_autocast_rounds_nothing():
    arguments = to(problem(L=33), torch.float32)
    want = value_and_grads(selective_scan, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(value_and_grads(selective_scan, arguments), want, "under autocast")


def test_flops():
    arguments = problem(2, 6, 3, 20, ("D", "z"))
    leaves = {n: t.requires_grad_() for n, t in arguments.items()}
    with FlopCounterMode(display=False) as counter:
        out = selective_scan(**leaves)
    E = 2 * 6 * 20
    assert counter.get_total_flops() == E * (9 * 3 + 2)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 20 * E * 3


@pytest.mark.parametrize("shape", [(0, 6, 20), (2, 6, 0)], ids=["batch", "length"])
def test_nothing_in_gives_nothing_out_and_gradients_of_zero(shape):
    batch, d, L = shape
    arguments = problem(batch, d, 3, L)
    got = value_and_grads(selective_scan, arguments)
    assert got["out"].shape == shape
    for name in ("A", "D", "delta_bias"):
        assert torch.equal(got[name], torch.zeros_like(arguments[name]))
    if L == 0:
        assert torch.equal(got["last"], arguments["initial_state"])
        assert got["initial_state"].abs().min() > 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("u", torch.zeros(2, 6), "u of shape"),
        ("u", torch.zeros(2, 6, 20, dtype=torch.int64), "u of shape.*int64"),
        ("delta", torch.zeros(2, 6, 19), r"delta of shape \(2, 6, 19\).*\(2, 6, 20\)"),
        ("A", torch.zeros(5, 3), "A of shape.*d = 6"),
        ("A", torch.zeros(6, 3, dtype=torch.complex64), "A of torch.complex64"),
        ("B", torch.zeros(2, 4, 20), r"B of shape \(2, 4, 20\)"),
        ("B", torch.zeros(2, 4, 3, 20), "B has 4 groups.*d = 6"),
        ("C", torch.zeros(3, 6), "C of shape"),
        ("C", torch.zeros(2, 3, 20, dtype=torch.int32), "C of shape.*int32"),
        ("D", torch.zeros(5), r"D of shape \(5,\).*\(6,\)"),
        ("z", torch.zeros(2, 20, 6), "z of shape"),
        ("delta_bias", torch.zeros(1), "delta_bias of shape"),
        ("initial_state", torch.zeros(2, 3, 6), "initial_state of shape"),
        ("seq_idx", torch.zeros(2, 19, dtype=torch.int64), "seq_idx of shape"),
        ("seq_idx", torch.zeros(2, 20), "seq_idx of shape.*float32"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_does_not_fit_is_refused_by_name(name, value, words):
    with pytest.raises(ValueError, match=words):
        selective_scan(**{**problem(), name: value})


# --- One step ---------------------------------------------------------------------------------------------------------


def one_step(groups):
    generator = torch.Generator().manual_seed(4)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = (2, 3) if groups is None else (2, groups, 3)
    return {
        "state": randn(2, 6, 3),
        "x": randn(2, 6),
        "dt": randn(2, 6),
        "A": -randn(6, 3).exp(),
        "B": randn(*weights),
        "C": randn(*weights),
        "D": randn(6),
        "z": randn(2, 6),
        "dt_bias": randn(6),
    }


def by_scan(state, x, dt, A, B, C, D, z, dt_bias):
    u, delta, B, C, z = (t.unsqueeze(-1) for t in (x, dt, B, C, z))
    return selective_scan(u, delta, A, B, C, D, z, dt_bias, True, return_last_state=True, initial_state=state)


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_a_step_is_a_scan_of_one(groups):
    arguments = one_step(groups)
    want, last = by_scan(**arguments)
    state = arguments["state"]
    out = selective_state_update(**arguments, dt_softplus=True)
    assert rms_error(out, want.squeeze(-1)) < 1e-13
    assert arguments["state"] is state
    assert rms_error(state, last) < 1e-13, "the state is updated in place"


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_a_step_with_heads_is_one_of_all_their_channels(groups):
    arguments = one_step(groups)
    with_heads = {
        "state": arguments["state"].clone().unflatten(1, (2, 3)),
        "A": arguments["A"].unflatten(0, (2, 3)),
        **{name: arguments[name].unflatten(-1, (2, 3)) for name in ("x", "dt", "D", "z", "dt_bias")},
        **{name: arguments[name] for name in ("B", "C")},
    }
    out = selective_state_update(**with_heads, dt_softplus=True)
    assert rms_error(out.flatten(1), selective_state_update(**arguments, dt_softplus=True)) < 1e-13
    assert rms_error(with_heads["state"].flatten(1, 2), arguments["state"]) < 1e-13


def test_many_steps_can_be_trained_through():
    arguments = problem(L=5, options=("D", "z", "delta_bias", "delta_softplus", "initial_state"))

    def by_steps(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, return_last_state):
        state, ys = initial_state.clone(), []
        for t in range(u.shape[-1]):
            now = (x[..., t] for x in (u, delta))
            ys.append(selective_state_update(state, *now, A, B[..., t], C[..., t], D, z[..., t], delta_bias, True))
        return torch.stack(ys, -1), state

    assert_close(value_and_grads(by_steps, arguments), value_and_grads(selective_scan, arguments), 1e-12)


def test_a_state_of_half_precision_is_rounded_once_a_step():
    arguments = {n: t.float() for n, t in one_step(None).items()}
    arguments["state"] = arguments["state"].bfloat16()
    want, last = by_scan(**{n: t.double() for n, t in arguments.items()})
    out = selective_state_update(**arguments, dt_softplus=True)
    assert rms_error(out, want.squeeze(-1)) < 1e-6
    assert rms_error(arguments["state"], last) < 4e-3


@pytest.mark.parametrize(
    ("name", "shape"),
    [("state", (2, 6)), ("x", (2, 5)), ("dt", (6,)), ("A", (6, 4)), ("B", (2, 4)), ("C", (2, 4, 3)), ("z", (1, 6))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_refuses_what_does_not_fit(name, shape):
    with pytest.raises(ValueError, match=f"{name} of shape"):
        selective_state_update(**{**one_step(None), name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="A of torch.complex64"):
        selective_state_update(**{**one_step(None), "A": torch.zeros(6, 3, dtype=torch.complex64)})
