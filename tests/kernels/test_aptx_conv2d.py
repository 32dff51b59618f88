"""`aptx_conv2d` against its definition: values, gradients, blocks, memory, FLOPs, and the tools of torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import aptx_conv2d as module
from archzoo.kernels.aptx_conv2d import (
    aptx_conv2d,
    aptx_conv2d_op,
    aptx_conv2d_reference,
)
from archzoo.kernels.aptx_linear import aptx_linear
from archzoo.kernels.basis_conv2d import padding_sides
from tests.helpers import rms_error, value_and_grads

BOUNDS = {  # forward, gradient of x, gradients summed over pixels
    torch.float64: (1e-12, 1e-11, 1e-11),
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
GEOMETRIES = [  # batch, in, out, rows of beta, kernel, size, how
    (2, 3, 4, 4, (3, 3), (6, 5), {"padding": (1, 1)}),
    (2, 4, 6, 6, (3, 2), (7, 6), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
    (3, 4, 8, 4, (2, 3), (4, 5), {"padding": "same", "dilation": (2, 1), "groups": 2}),
    (1, 6, 6, 6, (3, 3), (5, 5), {"padding": "same", "groups": 6}),
    (2, 3, 6, 1, (1, 1), (4, 3), {"stride": (2, 2)}),
    (1, 2, 3, 3, (4, 5), (4, 5), {"padding": "valid"}),
    (0, 4, 6, 2, (3, 3), (5, 6), {"groups": 2}),
]


def randn(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def problem(batch, channels, outputs, rows, kernel, size, how, dtype=torch.float64, parameters=None):
    """x, alpha, beta, gamma, bias, a cotangent, and the geometry with its defaults."""
    how, p = PLAIN | how, parameters or dtype
    taps = (channels // how["groups"], *kernel)
    x = randn(batch, channels, *size, dtype=dtype)
    alpha, beta = randn(outputs, *taps, dtype=p), randn(rows, *taps, dtype=p)
    gamma, bias = randn(outputs, *taps, dtype=p, scale=math.prod(taps) ** -0.5), randn(outputs, dtype=p)
    inputs = (x, alpha, beta, gamma, bias)
    dy = torch.randn(definition(how)(*inputs).shape, dtype=torch.float64).to(dtype)
    return inputs, dy, how


def ours(how):
    return lambda *inputs: aptx_conv2d(*inputs, **how)


def as_lists(how, kernel):
    return list(how["stride"]), padding_sides(how["padding"], kernel, how["dilation"]), list(how["dilation"])


def definition(how):
    return lambda x, alpha, beta, gamma, bias: aptx_conv2d_reference(
        x, alpha, beta, gamma, bias, *as_lists(how, gamma.shape[2:]), how["groups"]
    )


def assert_as_accurate(inputs, dy, how, bounds):
    truth = value_and_grads(definition(how), [t.double() for t in inputs], dy.double())
    got = value_and_grads(ours(how), inputs, dy)
    allowed = (bounds[0], bounds[1], *[bounds[2]] * 4)
    for name, out, want, bound in zip(
        ("y", "dx", "dalpha", "dbeta", "dgamma", "dbias"), got, truth, allowed, strict=True
    ):
        assert rms_error(out, want) <= bound, f"{name}: {rms_error(out, want):.1e}, allowed {bound:.1e}"
    return got


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of some pixels, channels and rows of beta, so that every loop over blocks runs more than once."""
    monkeypatch.setattr(module, "_CPU_BLOCK", 60)
    monkeypatch.setattr(module, "_PIXELS", 4)


def test_reference_is_the_equation_written_out():
    (x, alpha, beta, gamma, bias), _, how = problem(
        1, 4, 4, 2, (2, 2), (3, 4), {"stride": (1, 2), "padding": (1, 1), "groups": 2}
    )
    y = definition(how)(x, alpha, beta, gamma, bias)
    padded = F.pad(x, (1, 1, 1, 1))
    assert y.shape == (1, 4, 4, 3)
    for o, i, j in ((0, 0, 0), (1, 2, 1), (2, 3, 2), (3, 1, 1)):
        total = bias[o].item()
        for c in range(2):
            for u in range(2):
                for v in range(2):
                    pixel = padded[0, 2 * (o // 2) + c, i + u, 2 * j + v].item()
                    bent = math.tanh(beta[o // 2, c, u, v].item() * pixel)
                    total += (alpha[o, c, u, v].item() + bent) * gamma[o, c, u, v].item() * pixel
        assert math.isclose(y[0, o, i, j].item(), total, rel_tol=1e-12)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("geometry", range(len(GEOMETRIES)))
def test_is_as_accurate_as_its_dtype_allows(geometry, dtype):
    inputs, dy, how = problem(*GEOMETRIES[geometry], dtype=dtype)
    got = assert_as_accurate(inputs, dy, how, BOUNDS[dtype])
    assert {t.dtype for t in got} == {dtype}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("geometry", range(len(GEOMETRIES)))
def test_blocks_do_not_show(geometry):
    inputs, dy, how = problem(*GEOMETRIES[geometry])
    assert_as_accurate(inputs, dy, how, BOUNDS[torch.float64])


@pytest.mark.usefixtures("small_blocks")
def test_small_blocks_cut_everything_that_can_be_cut():
    (x, _, beta, _, _), _, _ = problem(2, 16, 16, 16, (1, 2), (4, 5), {"groups": 2})
    walk = module._Walk(x, beta, (1, 1), (1, 1), 2)
    assert walk.c < walk.channels
    assert len({str(block) for _, block in walk.pixels()}) > 1
    k, block = next(walk.pixels())
    _, _, _, rows = next(walk.patches(k, block, x.dtype))
    assert len(rows) > 1
    (x, _, beta, _, _), _, _ = problem(1, 12, 12, 12, (3, 3), (5, 5), {"groups": 12})
    walk = module._Walk(x, beta, (1, 1), (1, 1), 12)
    assert len({str(k) for k, _ in walk.pixels()}) > 1


@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 4),
    rows=st.integers(1, 3),
    each=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    room=st.sampled_from([1, 7, 100, 2**17]),
)
@settings(max_examples=40, deadline=None)
def test_any_geometry_is_the_definition(batch, channels, rows, each, groups, kernel, stride, padding, dilation, room):
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shape = (batch, channels * groups, rows * each * groups, rows * groups, kernel, (6, 5), how)
    inputs, dy, how = problem(*shape)
    before, module._CPU_BLOCK = module._CPU_BLOCK, room
    try:
        assert_as_accurate(inputs, dy, how, BOUNDS[torch.float64])
    finally:
        module._CPU_BLOCK = before


def test_one_tap_is_the_linear_layer():
    (x, alpha, beta, gamma, bias), _, how = problem(2, 5, 6, 3, (1, 1), (3, 4), {})
    rows = aptx_linear(x.movedim(1, -1), *(t.flatten(1) for t in (alpha, beta, gamma)), bias)
    assert rms_error(aptx_conv2d(x, alpha, beta, gamma, bias, **how), rows.movedim(-1, 1)) < 1e-14


def test_a_shared_beta_is_one_repeated():
    (x, alpha, beta, gamma, bias), dy, how = problem(2, 4, 12, 4, (3, 3), (5, 5), {"groups": 2})
    shared = value_and_grads(ours(how), (x, alpha, beta, gamma, bias), dy)
    repeated = value_and_grads(ours(how), (x, alpha, beta.repeat_interleave(3, 0), gamma, bias), dy)
    for i, (one, other) in enumerate(zip(shared, repeated, strict=True)):
        other = other.unflatten(0, (4, 3)).sum(1) if i == 3 else other
        assert rms_error(one, other) < 1e-12


@pytest.mark.parametrize("rows", [6, 2])
def test_without_alpha_it_is_one_and_without_bias_it_is_zero(rows):
    (x, alpha, beta, gamma, bias), dy, how = problem(2, 3, 6, rows, (3, 3), (5, 5), {"padding": (1, 1)})
    ones, zeros = torch.ones_like(alpha), torch.zeros_like(bias)
    want = value_and_grads(lambda x, b, g: ours(how)(x, ones, b, g, zeros), (x, beta, gamma), dy)
    got = value_and_grads(lambda x, b, g: ours(how)(x, None, b, g, None), (x, beta, gamma), dy)
    for out, reference in zip(got, want, strict=True):
        assert rms_error(out, reference) < 1e-12


def test_zero_beta_and_unit_alpha_are_a_convolution():
    (x, alpha, beta, gamma, bias), _, how = problem(2, 4, 6, 6, (3, 2), (7, 6), {"stride": (2, 1), "groups": 2})
    y = aptx_conv2d(x, torch.ones_like(alpha), torch.zeros_like(beta), gamma, bias, **how)
    assert rms_error(y, F.conv2d(x, gamma, bias, **how)) < 1e-14


def test_saturated_tanh_gives_beta_no_gradient():
    (x, alpha, beta, gamma, bias), dy, how = problem(2, 3, 4, 4, (3, 3), (5, 5), {"padding": (1, 1)})
    found = value_and_grads(ours(how), (x.sign(), alpha, 1e4 * beta.sign(), gamma, bias), dy)
    assert torch.equal(found[3], torch.zeros_like(beta))
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("rows", [4, 2])
def test_parameters_may_be_wider_than_the_input(rows):
    inputs, dy, how = problem(2, 3, 4, rows, (3, 3), (5, 5), {}, torch.bfloat16, torch.float32)
    got = assert_as_accurate(inputs, dy, how, BOUNDS[torch.bfloat16])
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 4


def test_autocast_rounds_x_and_y_only():
    inputs, dy, how = problem(2, 3, 4, 4, (3, 3), (5, 5), {"padding": (1, 1)}, torch.float32)

    def under_autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return aptx_conv2d(*inputs, **how)

    got = value_and_grads(under_autocast, inputs, dy.bfloat16())
    rounded = [inputs[0].bfloat16().double(), *(p.double() for p in inputs[1:])]
    truth = value_and_grads(definition(how), rounded, dy.bfloat16().double())
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 5
    for out, want, bound in zip(got, truth, (6e-3, 6e-3, 2e-5, 2e-5, 2e-5, 2e-5), strict=True):
        assert rms_error(out, want) < bound


def test_an_image_without_a_batch_is_a_batch_of_one():
    (x, *parameters), _, how = problem(1, 3, 4, 4, (3, 3), (5, 5), {"padding": (1, 1)})
    assert torch.equal(aptx_conv2d(x[0], *parameters, **how), aptx_conv2d(x, *parameters, **how)[0])


def test_memory_formats_do_not_matter():
    (x, *parameters), _, how = problem(2, 4, 6, 6, (3, 2), (7, 6), {"groups": 2})
    last = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in (x, *parameters)]
    one, other = value_and_grads(ours(how), (x, *parameters)), value_and_grads(ours(how), last)
    for a, b in zip(one, other, strict=True):
        assert rms_error(b, a) < 1e-14


@pytest.mark.parametrize("rows", [4, 2])
def test_passes_gradcheck_and_gradgradcheck(rows):
    inputs, _, how = problem(1, 2, 4, rows, (2, 2), (3, 3), {"padding": (1, 0), "groups": 2})
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(ours(how), leaves)
    assert torch.autograd.gradgradcheck(ours(how), leaves)


@pytest.mark.parametrize("needed", range(5))
def test_one_gradient_alone_is_that_of_all(needed):
    inputs, dy, how = problem(2, 4, 6, 2, (3, 3), (5, 5), {"padding": (1, 1), "groups": 2})
    want = value_and_grads(ours(how), inputs, dy)[1 + needed]
    leaf = inputs[needed].detach().requires_grad_()
    y = aptx_conv2d(*inputs[:needed], leaf, *inputs[needed + 1 :], **how)
    assert rms_error(torch.autograd.grad(y, leaf, dy)[0], want) < 1e-13


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(("geometry", "dtype"), [(1, torch.float32), (6, torch.bfloat16)], ids=str)
def test_ops_pass_opcheck(geometry, dtype):
    inputs, dy, how = problem(*GEOMETRIES[geometry], dtype=dtype, parameters=torch.float32)
    lists = (*as_lists(how, inputs[3].shape[2:]), how["groups"])
    for flags in ([True] * 5, [True, False, False, True, False], [False, True, True, False, True]):
        opcheck(aptx_conv2d_op.backward_op, (dy, *inputs, *lists, flags))
    opcheck(aptx_conv2d_op.op, (inputs[0], None, *inputs[2:4], None, *lists))
    opcheck(aptx_conv2d_op.op, (*(t.requires_grad_() for t in inputs), *lists))


def test_transforms_of_torch_func_go_through_the_definition():
    (x, *parameters), _, how = problem(2, 3, 4, 4, (3, 3), (5, 5), {})

    def loss(beta, x):
        return aptx_conv2d(x, parameters[0], beta, *parameters[2:], **how).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters[1], x)
    for image, gradient in zip(x, per_image, strict=True):
        _, want = value_and_grads(lambda beta, image=image: loss(beta, image), (parameters[1],))
        assert rms_error(gradient, want) < 1e-12


def test_two_runs_agree_bit_for_bit():
    inputs, dy, how = problem(4, 8, 8, 8, (3, 3), (9, 9), {"padding": (1, 1)}, torch.float32)
    for one, other in zip(value_and_grads(ours(how), inputs, dy), value_and_grads(ours(how), inputs, dy), strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_inputs_only():
    inputs, _, how = problem(4, 8, 8, 8, (3, 3), (9, 9), {"padding": (1, 1)}, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().data_ptr()), lambda _: None
    ):
        aptx_conv2d(*leaves, **how)
    assert kept
    assert set(kept) <= own


def largest_request(function):
    """Elements of float32 in the largest piece of memory that a function asks for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes, "the measurement misses allocations"
    return max(sizes) // 4


@pytest.mark.plain_memory
@pytest.mark.parametrize(("groups", "rows"), [(1, 16), (1, 4), (32, 32)])
def test_no_temporary_exceeds_x_or_a_block(groups, rows):
    outputs = max(16, groups)
    geometry = (4, 32, outputs, rows, (3, 3), (24, 24), {"padding": (1, 1), "groups": groups})
    (x, *parameters), _, how = problem(*geometry, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    dy = torch.ones(4, outputs, 24, 24)
    largest = largest_request(lambda: torch.autograd.grad(aptx_conv2d(*leaves, **how), leaves, dy))
    padded = 4 * 32 * 26 * 26
    assert padded <= largest <= max(padded, 2**17)
    patches = 4 * 24 * 24 * 32 * 9
    assert 4 * largest < patches


def test_flops_are_those_of_the_equation():
    inputs, _, how = problem(2, 4, 6, 6, (3, 2), (7, 6), {"stride": (2, 1), "groups": 2})
    leaves = [t.requires_grad_() for t in inputs]
    n = 2 * 3 * 5 * 6 * 2 * 3 * 2  # images, pixels, outputs, channels of a group, taps

    def counted(leaves, backward):
        with FlopCounterMode(display=False) as counter:
            y = aptx_conv2d(*leaves, **how)
            if backward:
                y.sum().backward()
        return counter.get_total_flops()

    assert counted(leaves, False) == 6 * n
    assert counted(leaves, True) == (6 + 17) * n
    leaves[2] = leaves[2][:2].detach().requires_grad_()
    assert counted(leaves, False) == 3 * n // 3 + 4 * n
    assert counted(leaves, True) == (3 + 12) * n // 3 + (4 + 8) * n


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("x", ((1, 3, 5, 5), (4, 4, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3), (4,))),
        ("x", ((1, 4, 2, 5), (4, 4, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3), (4,))),
        ("x", ((4, 5), (4, 4, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3), (4,))),
        ("alpha", ((1, 4, 5, 5), (4, 4, 3, 2), (4, 4, 3, 3), (4, 4, 3, 3), (4,))),
        ("beta", ((1, 4, 5, 5), (4, 4, 3, 3), (3, 4, 3, 3), (4, 4, 3, 3), (4,))),
        ("beta", ((1, 4, 5, 5), (4, 4, 3, 3), (0, 4, 3, 3), (4, 4, 3, 3), (4,))),
        ("beta", ((1, 4, 5, 5), (4, 4, 3, 3), (4, 4, 3, 2), (4, 4, 3, 3), (4,))),
        ("gamma", ((1, 4, 5, 5), (4, 4, 3, 3), (4, 4, 3, 3), (4, 36), (4,))),
        ("bias", ((1, 4, 5, 5), (4, 4, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3), (5,))),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(name, shapes):
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        aptx_conv2d(*(torch.zeros(shape) for shape in shapes))


def test_groups_that_do_not_fit_are_refused():
    taps = torch.zeros(4, 2, 3, 3)
    with pytest.raises(ValueError, match=r"^groups=3: must divide the 4 outputs"):
        aptx_conv2d(torch.zeros(1, 6, 5, 5), taps, taps, taps, groups=3)
    with pytest.raises(ValueError, match=r"beta has shape \(1, 2, 3, 3\).*multiple of groups=2"):
        aptx_conv2d(torch.zeros(1, 4, 5, 5), taps, taps[:1], taps, groups=2)
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        aptx_conv2d(torch.zeros(1, 2, 5, 5, dtype=torch.int64), taps, taps, taps)
