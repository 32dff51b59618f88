"""`ssd` on Triton against its definition, and Mamba-3's scan that calls it. Without `_triton`: the torch path."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels._ssd import triton_steps
from archzoo.kernels.ssd import ssd, ssd_op, ssd_reference
from archzoo.kernels.trapezoidal_ssd import trapezoidal_ssd, trapezoidal_ssd_reference
from tests.helpers import assert_same_bits, rms_error
from tests.kernels import test_trapezoidal_ssd as trapezoids
from tests.kernels.test_ssd import OPTIONS, assert_close, in_op_order, is_real, problem, to, value_and_grads
from tests.kernels.triton_support import (
    OF_TILES,
    check_autocast,
    check_compiles,
    check_peak_memory,
    check_refusals,
    needs_triton,
    on_device,
    tolerance,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]

PARAMETERS = ("A", "D", "dt_bias")  # whose gradients are sums over tokens
OUTPUTS = ("out", "final")


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


def small(L=20, H=2, options=OPTIONS, **sizes):
    """One sequence of two chunks, one of them short."""
    return problem(**{"batch": 1, "L": L, "H": H, "G": 1, "options": options, "chunk_size": 16, **sizes})


def check(arguments, **options):
    """Values and all gradients, with tolerances by the dtype of x."""
    truth = value_and_grads(ssd_reference, to(arguments, torch.float64), **options)
    got, dtype = value_and_grads(ssd, arguments, **options), arguments["x"].dtype
    for name, want in truth.items():
        assert name in OUTPUTS or got[name].dtype == arguments[name].dtype
        error = rms_error(got[name], want) if want.abs().sum() else got[name].abs().max()
        kind = 0 if name in OUTPUTS else 2 if name in PARAMETERS else 1
        assert error <= tolerance(dtype, kind), f"{name} in {dtype}: {error:.1e}"


@pytest.mark.parametrize("dtype", OF_TILES, ids=str)
def test_values_and_all_gradients_with_all_options(dtype):
    check(to(small(H=4 if dtype == torch.bfloat16 else 2), dtype))  # of two heads, rounding leaves sums to chance


@pytest.mark.parametrize("sizes", [{"P": 1, "N": 1, "L": 1}, {"P": 1, "N": 3, "L": 17}], ids=str)
def test_without_options_and_of_size_one(sizes):
    check(small(H=1, options=(), **sizes))


@pytest.mark.slow
def test_tiles_and_uneven_splits_of_heads():
    from archzoo.kernels._ssd_backward_triton import INPUTS, SCORES, WEIGHTS
    from archzoo.kernels._ssd_triton import OUTPUTS, STATES

    tiles = {"BN": 16, "BP": 16}
    with (
        STATES.forced(**tiles, SEGMENTS=1),
        OUTPUTS.forced(**tiles),
        INPUTS.forced(**tiles),
        SCORES.forced(**tiles, SPLITS=2),
        WEIGHTS.forced(**tiles, SPLITS=2),
    ):
        check(small(L=17, H=3, P=17, N=18, options=("initial_state", "D")))


def test_segments_of_time():
    from archzoo.kernels._ssd_triton import STATES

    with STATES.forced(BN=16, BP=16, SEGMENTS=2):
        check(small(L=65, H=1, options=("initial_state", "seq_idx")))


def test_batch_groups_and_a_decay_of_its_own_for_each_token():
    arguments = problem(2, 5, 4, 3, 2, 5, ("D", "dt_limit"), seed=1)  # D (H, P)
    factors = torch.rand(2, 5, 4, dtype=torch.float64) + 0.5
    check({**arguments, "A": arguments["A"] * factors})


def test_strides_expansion_and_mixed_dtypes():
    arguments = small(L=5, P=4)
    views = {n: torch.stack([t, t], -1)[..., 0] if is_real(t) else t for n, t in arguments.items()}
    views |= {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in views.items() if n in ("x", "B", "z")}
    views["C"] = torch.cat([views["C"], views["B"]], 2)[:, :, :1]
    before = {n: t.clone() for n, t in views.items() if is_real(t)}
    check(views)
    assert all(torch.equal(before[n], views[n]) for n in before)
    mixed = to(arguments, torch.float32) | {n: arguments[n].bfloat16() for n in ("dt", "B", "dt_bias")}
    got = value_and_grads(ssd, mixed)
    assert_close(got, value_and_grads(ssd_reference, to(mixed, torch.float64)), 2e-3)  # dt's gradient is of bfloat16
    leaf = arguments["x"].clone().requires_grad_()
    ssd(**{**arguments, "x": leaf}).sum().backward()  # the gradient of sum() is an expanded tensor
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("through", [(True, False), (False, True)], ids=["out", "final_state"])
def test_gradients_through_one_output_alone(through):
    check(small(L=5, H=1), through=through)


@pytest.mark.parametrize("names", [("x",), ("dt", "A"), ("B",), ("C",), ("D",), ("z", "initial_state")], ids=str)
def test_gradients_that_nobody_needs_are_left_out(names):
    arguments = small(L=5, H=1)
    truth = value_and_grads(ssd_reference, arguments, through=(True, False))
    leaves = {n: t.detach().requires_grad_(n in names) if is_real(t) else t for n, t in arguments.items()}
    out = ssd(**leaves)
    generator = torch.Generator(torch.get_default_device()).manual_seed(9)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64))
    for name, t in leaves.items():
        if is_real(t):
            assert (t.grad is not None) == (name in names)
            assert t.grad is None or rms_error(t.grad, truth[name]) < 1e-12


@pytest.mark.parametrize("jump", [1.0, 1e4])
def test_a_leap_in_time_costs_its_chunk_no_precision(jump):
    arguments = small(L=64, H=1, options=("D",), chunk_size=64)
    leaps = torch.arange(64) % 10 == 3
    arguments["dt"] = torch.where(leaps[None, :, None], jump * arguments["dt"], 1e-3 * arguments["dt"])
    arguments = to(arguments, torch.float32)
    assert_close(value_and_grads(ssd, arguments), value_and_grads(ssd_reference, to(arguments, torch.float64)), 2e-6)


@pytest.mark.parametrize("decay", [(-1e5, -1e4), (-2e-6, -1e-6)], ids=["forgets at once", "forgets nothing"])
def test_fast_and_slow_decay_in_float32(decay):
    arguments = to(small(H=1, options=("initial_state",), decay=decay), torch.float32)
    got, truth = value_and_grads(ssd, arguments), value_and_grads(ssd_reference, to(arguments, torch.float64))
    for name, want in truth.items():
        assert got[name].isfinite().all()
        assert want.abs().max() < 1e-30 or rms_error(got[name], want) < 1e-5


def test_step_sizes_of_softplus_at_both_of_its_ends():
    arguments = to(small(L=7, H=1, options=("dt_softplus",)), torch.float32)
    arguments["dt"] = torch.tensor([-80.0, -17.0, -5.0, 0.0, 5.0, 19.9, 25.0]).view(1, 7, 1)
    arguments["A"] = torch.tensor([-1e-3])
    assert_close(value_and_grads(ssd, arguments), value_and_grads(ssd_reference, to(arguments, torch.float64)), 2e-6)


def test_nan_comes_through_to_all_that_follow():
    arguments = small(L=36, options=())
    arguments["x"][0, 20, 1, 2] = torch.nan
    out, final = ssd(**arguments, return_final_state=True)
    assert out[0, 20:, 1, 2].isnan().all()
    assert final[0, 1, 2].isnan().all()
    assert out[0, :16].isfinite().all()
    assert out[:, :, 0].isfinite().all()
    arguments["dt"][0, 3, 0] = torch.nan
    assert ssd(**arguments)[0, 3:, 0].isnan().all()


def test_two_runs_agree_bit_for_bit():
    arguments = to(small(H=1), torch.float32)
    assert_same_bits(value_and_grads(ssd, arguments), value_and_grads(ssd, arguments), "again")


@pytest.mark.parametrize("shape", [(0, 20), (2, 0)], ids=["batch", "length"])
def test_nothing_in_gives_nothing_out_and_gradients_of_zero(shape):
    arguments = problem(*shape)
    got = value_and_grads(ssd, arguments)
    assert got["out"].shape == (*shape, 4, 3)
    for name in PARAMETERS:
        assert torch.equal(got[name], torch.zeros_like(arguments[name]))
    if shape[1] == 0:
        assert torch.equal(got["final"], arguments["initial_state"])
        assert got["initial_state"].abs().min() > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck():
    tensors = in_op_order(to(small(L=3, H=1), torch.float32))
    numbers = (16, True, 0.5, 1.5, True)
    opcheck(ssd_op.op, (*(t.requires_grad_() if is_real(t) else t for t in tensors), *numbers))
    tensors = tuple(None if t is None else t.detach() for t in tensors)
    out, final, borders = ssd_op.op(*tensors, *numbers)
    *numbers, triton = numbers
    opcheck(ssd_op.backward_op, (out, final, *tensors, borders, *numbers, [True] * 8 + [False] * 2, triton))


def positional(x, dt, A, B, C):
    return ssd(x, dt, A, B, C, chunk_size=16)


def test_compile_export_autocast_and_refusals():
    arguments = to(small(L=3, H=1, options=()), torch.float32)
    inputs = [t for t in arguments.values() if is_real(t)]
    dy = torch.randn_like(inputs[0])
    check_compiles(positional, inputs, dy, "ssd")
    check_autocast(positional, inputs, dy)
    check_refusals(positional, inputs)


@pytest.mark.parametrize(("chunk_size", "steps"), [(1, 16), (16, 16), (63, 32), (64, 64), (1000, 64)])
def test_chunks_are_of_a_power_of_two(chunk_size, steps):
    assert triton_steps(torch.empty(0), chunk_size) == steps
    assert triton_steps(torch.empty(0, dtype=torch.float64), chunk_size) == min(steps, 32)


@pytest.mark.slow
@pytest.mark.plain_memory
def test_memory():
    def run(x, dt, A, B, C):
        return ssd(x, dt, A, B, C)

    x, dy = torch.randn(2, 1, 256, 1, 64, dtype=torch.bfloat16).unbind()
    B, C = torch.randn(2, 1, 256, 1, 32, dtype=torch.bfloat16).unbind()
    check_peak_memory(run, (x, torch.rand(1, 256, 1, dtype=torch.bfloat16), -torch.rand(1), B, C), dy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_mamba_3s_scan(dtype):
    arguments = trapezoids.to(trapezoids.problem(1, 18, 1, chunk_size=16), dtype)
    truth = trapezoids.value_and_grads(trapezoidal_ssd_reference, trapezoids.to(arguments, torch.float64))
    trapezoids.assert_close(trapezoids.value_and_grads(trapezoidal_ssd, arguments), truth, tolerance(dtype, 1))
