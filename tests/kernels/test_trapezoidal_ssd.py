"""`trapezoidal_ssd` against its definition: values, gradients, states, packing, causality, and the tools of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archzoo.kernels.ssd import ssd_reference
from archzoo.kernels.trapezoidal_ssd import trapezoidal_ssd, trapezoidal_ssd_reference, trapezoidal_state_update
from tests.helpers import rms_error

OPTIONS = ("D", "h", "seq_idx")
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
ALONG_TIME = ("x", "dt", "A", "trap", "B", "C")


def problem(batch=2, L=20, H=3, P=2, N=4, options=OPTIONS, seed=0, chunk_size=8):
    """Arguments in float64; `h`, `B_before` and `x_before` are the initial state."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    arguments = {
        "x": randn(batch, L, H, P),
        "dt": 0.1 + uniform(batch, L, H),
        "A": -2 * uniform(batch, L, H) - 1e-3,
        "trap": uniform(batch, L, H),
        "B": randn(batch, L, H, N),
        "C": randn(batch, L, H, N),
        "chunk_size": chunk_size,
    }
    optional = {
        "D": randn(H),
        "h": randn(batch, H, P, N),
        "B_before": randn(batch, H, N),
        "x_before": randn(batch, H, P),
        "seq_idx": (uniform(batch, L) < 0.15).cumsum(1),
    }
    chosen = {*options, *(("B_before", "x_before") if "h" in options else ())}
    return {**arguments, **{name: t for name, t in optional.items() if name in chosen}}


def call(function, arguments):
    """out and the final state, by name."""
    arguments = dict(arguments)
    state = tuple(arguments.pop(name, None) for name in ("h", "B_before", "x_before"))
    out, final = function(**arguments, initial_state=None if state[0] is None else state, return_final_state=True)
    return dict(zip(("out", "final_h", "final_B", "final_x"), (out, *final), strict=True))


def is_real(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def to(arguments, dtype):
    return {n: t.to(dtype) if is_real(t) else t for n, t in arguments.items()}


def value_and_grads(function, arguments, seed=9):
    """Outputs, and the gradient of every argument through all of them, by name."""
    leaves = {name: t.detach().requires_grad_() if is_real(t) else t for name, t in arguments.items()}
    results = call(function, leaves)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    # Numbers that every dtype holds, so that results of two dtypes compare.
    cotangents = [torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in results.values()]
    wanted = {n: t for n, t in leaves.items() if is_real(t)}
    grads = torch.autograd.grad(list(results.values()), list(wanted.values()), cotangents)
    return {**{n: t.detach() for n, t in results.items()}, **dict(zip(wanted, grads, strict=True))}


def assert_close(got, truth, bound):
    assert got.keys() == truth.keys()
    errors = {name: rms_error(got[name], truth[name]) for name in truth if truth[name].abs().sum() > 0}
    assert all(error <= bound for error in errors.values()), errors
    assert all((got[name] == 0).all() for name in truth.keys() - errors.keys())


def test_definition_without_the_earlier_end_is_mamba_2s():
    arguments = problem(options=("D",))
    A = arguments["A"][0, 0]
    arguments |= {"trap": torch.ones_like(arguments["dt"]), "A": A.expand(2, 20, 3)}
    want = ssd_reference(
        *(arguments[name] for name in ("x", "dt")), A, arguments["B"], arguments["C"], D=arguments["D"]
    )
    assert rms_error(call(trapezoidal_ssd_reference, arguments)["out"], want) < 1e-13


def test_trapezoids_err_by_the_square_of_the_step():
    """h' = a h + b(t), against its integral: half the step is a quarter of the error, and half of it without them."""

    def error(steps, trap):
        t = torch.arange(1, steps + 1, dtype=torch.float64)[None, :, None] * (2 / steps)
        ones, b = torch.ones(1, steps, 1, 1, dtype=torch.float64), torch.sin(t)[..., None]
        dt, A = torch.full_like(t, 2 / steps), torch.full_like(t, -0.7)
        y = trapezoidal_ssd_reference(b, dt, A, torch.full_like(t, trap), ones, ones)[0, -1].item()
        a, end = torch.tensor(0.7, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
        exact = (a * end.sin() - end.cos() + (-a * end).exp()) / (1 + a**2)
        return abs(y - exact.item())

    assert error(50, 0.5) / error(100, 0.5) == pytest.approx(4, rel=0.05)
    assert error(50, 1.0) / error(100, 1.0) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("L", [1, 2, 7, 8, 9, 33])
def test_values_and_all_gradients_with_all_options(L, dtype):
    arguments = to(problem(L=L, seed=L), dtype)
    truth = value_and_grads(trapezoidal_ssd_reference, to(arguments, torch.float64))
    got = value_and_grads(trapezoidal_ssd, arguments)
    assert {t.dtype for t in got.values()} == {dtype}
    assert_close(got, truth, BOUNDS[dtype])


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 30, 3, 4, 5))),
    chunk_size=st.integers(1, 40),
    options=st.sets(st.sampled_from(OPTIONS)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_options(sizes, chunk_size, options, seed):
    arguments = problem(*sizes, sorted(options), seed, chunk_size)
    assert_close(call(trapezoidal_ssd, arguments), call(trapezoidal_ssd_reference, arguments), 1e-12)


def test_gradients_and_gradients_of_gradients():
    arguments = problem(1, 4, 2, 1, 2, ("D", "h"), chunk_size=3)
    names = [n for n, t in arguments.items() if is_real(t)]

    def run(*tensors):
        return tuple(call(trapezoidal_ssd, {**arguments, **dict(zip(names, tensors, strict=True))}).values())

    leaves = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    arguments = problem(L=65)
    arguments |= {n: arguments[n].float() for n in ("dt", "A", "trap", "D", "h")}
    arguments |= {n: arguments[n].to(dtype) for n in ("x", "B", "C", "B_before", "x_before")}
    truth = value_and_grads(trapezoidal_ssd_reference, to(arguments, torch.float64))
    got = value_and_grads(trapezoidal_ssd, arguments)
    assert {n for n, t in got.items() if t.dtype == dtype} == {
        "out", "final_B", "final_x", "x", "B", "C", "B_before", "x_before"
    }  # fmt: skip
    assert rms_error(got["out"], truth["out"]) < torch.finfo(dtype).eps / 2
    assert rms_error(got["final_h"], truth["final_h"]) < 1e-5
    for name in arguments.keys() & got.keys():  # x, B and C have two parts, each rounded, and then their sum
        assert rms_error(got[name], truth[name]) < (
            1e-5 if got[name].dtype == torch.float32 else torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("cut", [0, 1, 8, 13, 20])
def test_two_halves_equal_the_whole_with_gradients_through_the_state(cut):
    arguments = problem(options=("D", "h"))

    def in_two(initial_state, return_final_state, **rest):
        first = {n: t[:, :cut] if n in ALONG_TIME else t for n, t in rest.items()}
        second = {n: t[:, cut:] if n in ALONG_TIME else t for n, t in rest.items()}
        y, state = trapezoidal_ssd(**first, initial_state=initial_state, return_final_state=True)
        rest_of_y, state = trapezoidal_ssd(**second, initial_state=state, return_final_state=True)
        return torch.cat([y, rest_of_y], 1), state

    assert_close(value_and_grads(in_two, arguments), value_and_grads(trapezoidal_ssd, arguments), 1e-12)


def test_packed_sequences_equal_each_by_itself():
    arguments = problem(1, 26, options=("D", "h"))
    lengths = [7, 1, 2, 16]
    seq_idx = torch.repeat_interleave(torch.tensor([3, 4, 7, 9]), torch.tensor(lengths))[None]
    packed = call(trapezoidal_ssd, {**arguments, "seq_idx": seq_idx})
    start, state = 0, {n: arguments.pop(n) for n in ("h", "B_before", "x_before")}
    for length in lengths:
        part = {n: t[:, start : start + length] if n in ALONG_TIME else t for n, t in arguments.items()}
        alone = call(trapezoidal_ssd, {**part, **state})
        assert rms_error(packed["out"][:, start : start + length], alone["out"]) < 1e-13
        start, state = start + length, {}
    assert all(rms_error(packed[n], alone[n]) < 1e-13 for n in ("final_h", "final_B", "final_x"))


def test_a_later_step_size_leaves_no_trace_not_even_of_rounding():
    arguments = to(problem(options=("D", "h")), torch.float32)
    want = call(trapezoidal_ssd, arguments)["out"]
    changed = {n: t.clone() if n in ALONG_TIME else t for n, t in arguments.items()}
    changed["dt"][:, 13:] = 1e20
    changed["trap"][:, 13:] = 0
    got = call(trapezoidal_ssd, changed)["out"]
    assert torch.equal(got[:, :13], want[:, :13])
    assert not torch.equal(got[:, 13:], want[:, 13:])


def test_step_sizes_of_zero_keep_the_state():
    arguments = problem(options=("h",))
    arguments["dt"] = torch.zeros_like(arguments["dt"])
    got = value_and_grads(trapezoidal_ssd, arguments)
    assert rms_error(got["final_h"], arguments["h"]) < 1e-15
    assert_close(got, value_and_grads(trapezoidal_ssd_reference, arguments), 1e-12)


def test_strides_do_not_matter_and_inputs_are_left_alone():
    arguments = problem()
    truth = value_and_grads(trapezoidal_ssd, arguments)
    views = {
        n: torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0] if is_real(t) else t
        for n, t in arguments.items()
    }
    before = {n: t.clone() for n, t in views.items() if is_real(t)}
    assert_close(value_and_grads(trapezoidal_ssd, views), truth, 1e-12)
    assert all(torch.equal(before[n], views[n]) for n in before)


def test_steps_equal_the_scan_in_place_and_can_be_trained_through():
    arguments = problem(L=5, options=("D", "h"))

    def by_steps(initial_state, return_final_state, chunk_size, D, **rest):
        state = tuple(t.clone() for t in initial_state)
        ys = [trapezoidal_state_update(state, **{n: t[:, i] for n, t in rest.items()}, D=D) for i in range(5)]
        return torch.stack(ys, 1), state

    truth = value_and_grads(trapezoidal_ssd, arguments)
    assert_close(value_and_grads(by_steps, arguments), truth, 1e-12)
    with torch.no_grad():
        state = tuple(arguments[n].clone() for n in ("h", "B_before", "x_before"))
        y = trapezoidal_state_update(state, *(arguments[n][:, 0] for n in ALONG_TIME), arguments["D"])
    assert rms_error(y, truth["out"][:, 0]) < 1e-13
    assert torch.equal(state[2], arguments["x"][:, 0])


def test_autocast_rounds_nothing():
    arguments = to(problem(), torch.float32)
    want, one = value_and_grads(trapezoidal_ssd, arguments), {n: t for n, t in arguments.items() if n != "seq_idx"}
    step = [one[n][:, 0] for n in ALONG_TIME]

    def update():
        state = tuple(one[n].clone() for n in ("h", "B_before", "x_before"))
        return trapezoidal_state_update(state, *step, one["D"]), *state

    want_step = update()
    with torch.autocast("cpu", torch.bfloat16):
        got, got_step = value_and_grads(trapezoidal_ssd, arguments), update()
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert all(torch.equal(a, b) for a, b in zip(got_step, want_step, strict=True))


def test_it_compiles_and_exports_as_one_scan():
    arguments = problem()
    want = call(trapezoidal_ssd, arguments)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    got = call(torch.compile(trapezoidal_ssd, fullgraph=True, backend=backend), arguments)
    torch._dynamo.reset()
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert [str(n.target) for n in graphs[0].graph.nodes if "archzoo" in str(n.target)] == ["archzoo.ssd.default"]


@pytest.mark.parametrize("shape", [(0, 20), (2, 0)], ids=["batch", "length"])
def test_nothing_in_gives_nothing_out(shape):
    arguments = problem(*shape)
    got = value_and_grads(trapezoidal_ssd, arguments)
    assert got["out"].shape == (*shape, 3, 2)
    assert torch.equal(got["D"], torch.zeros(3, dtype=torch.float64))
    if shape[1] == 0:
        assert all(torch.equal(got[f"final_{n[0]}"], arguments[n]) for n in ("h", "B_before", "x_before"))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.zeros(2, 20, 6), "x of shape"),
        ("x", torch.zeros(2, 20, 3, 2, dtype=torch.int64), "x of shape.*int64"),
        ("dt", torch.zeros(2, 20), r"dt of shape \(2, 20\).*\(2, 20, 3\)"),
        ("A", torch.zeros(3), r"A of shape \(3,\).*\(2, 20, 3\)"),
        ("trap", torch.zeros(2, 19, 3), "trap of shape"),
        ("B", torch.zeros(2, 20, 1, 4), r"B of shape \(2, 20, 1, 4\).*\(2, 20, 3, N\)"),
        ("C", torch.zeros(2, 20, 3, 5), r"C of shape \(2, 20, 3, 5\).*\(2, 20, 3, 4\)"),
        ("D", torch.zeros(3, 2), r"D of shape \(3, 2\)"),
        ("h", torch.zeros(2, 3, 4, 2), r"initial_state\[0\] of shape"),
        ("B_before", torch.zeros(2, 3, 2), r"initial_state\[1\] of shape"),
        ("x_before", torch.zeros(2, 3, 4), r"initial_state\[2\] of shape"),
        ("seq_idx", torch.zeros(2, 19, dtype=torch.int64), "seq_idx of shape"),
        ("chunk_size", 0, "chunk_size=0"),
    ],
    ids=range(13),
)
def test_what_does_not_fit_is_refused_by_name(name, value, words):
    with pytest.raises(ValueError, match=words):
        call(trapezoidal_ssd, {**problem(), name: value})
