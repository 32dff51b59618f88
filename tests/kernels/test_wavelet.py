"""`wavelet_linear` and `wavelet_conv2d` against their definitions: values, gradients, tiles, memory, FLOPs, speed."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import wavelet as module
from archzoo.kernels import wavelet_conv2d as conv_module
from archzoo.kernels.wavelet import (
    WAVELETS,
    wavelet_linear,
    wavelet_linear_op,
    wavelet_linear_reference,
    wavelet_reference,
)
from archzoo.kernels.wavelet_conv2d import wavelet_conv2d, wavelet_conv2d_op
from tests.helpers import rms, rms_error, sampled, value_and_grads

BOUNDS = {  # forward, gradient of x, gradients summed over a batch
    torch.float64: (1e-12, 1e-11, 1e-11),
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}
SHAPES = [  # leading, in, out
    ((), 5, 3),
    ((33,), 63, 4),
    ((2, 3, 1), 1, 33),
    ((1, 7), 130, 1),
    ((3000,), 2, 3),
    ((0,), 4, 6),
    ((0, 2), 4, 6),
]
NAMES = ("y", "dx", "dweight", "dscale", "dtranslation", "dbias")

every_wavelet = pytest.mark.parametrize("wavelet", WAVELETS)


def randn(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def parameters(*shape, dtype=torch.float64):
    """weight, scale of both signs, translation, bias."""
    scale = (0.7 + 0.6 * torch.rand(shape, dtype=torch.float64)) * torch.randn(shape).sign()
    weight = randn(*shape, dtype=dtype, scale=math.prod(shape[1:]) ** -0.5)
    return weight, scale.to(dtype), randn(*shape, dtype=dtype, scale=0.5), randn(shape[0], dtype=dtype)


def problem(leading, features, outputs, dtype=torch.float64, parameter_dtype=None):
    """x, weight, scale, translation, bias, and a cotangent."""
    given = parameters(outputs, features, dtype=parameter_dtype or dtype)
    return (randn(*leading, features, dtype=dtype), *given), randn(*leading, outputs, dtype=dtype)


def of(wavelet, function=wavelet_linear, **options):
    return lambda *tensors: function(*tensors, wavelet=wavelet, **options)


def assert_as_accurate(inputs, dy, bounds, wavelet):
    truth = value_and_grads(of(wavelet, wavelet_linear_reference), [t.double() for t in inputs], dy.double())
    got = value_and_grads(of(wavelet), inputs, dy)
    for name, out, want, bound in zip(NAMES, got, truth, (*bounds[:2], *[bounds[2]] * 4), strict=True):
        assert rms_error(out, want) <= bound, f"{name}: {rms_error(out, want):.1e}, allowed {bound:.1e}"
    return got


def textbook(wavelet, u):
    """As the paper's code has them, but for one number."""
    envelope = math.exp(-0.5 * u**2)
    return {
        "mexican_hat": 2 / (math.sqrt(3) * math.pi**0.25) * (u**2 - 1) * envelope,
        "morlet": math.cos(5 * u) * envelope,
        "dog": -u * envelope,
    }[wavelet]


@every_wavelet
def test_reference_is_the_equation_written_out(wavelet):
    (x, weight, scale, translation, bias), _ = problem((2,), 3, 4)
    y = wavelet_linear_reference(x, weight, scale, translation, bias, wavelet)
    for b, o in itertools.product(range(2), range(4)):
        terms = [weight[o, i] * textbook(wavelet, (x[b, i] - translation[o, i]) / scale[o, i]) for i in range(3)]
        assert torch.isclose(y[b, o], bias[o] + sum(terms))


def test_the_mexican_hat_and_the_derivative_of_a_gaussian_are_what_their_names_say():
    u = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    (dog,) = torch.autograd.grad(torch.exp(-(u**2) / 2).sum(), u, create_graph=True)
    (second,) = torch.autograd.grad(dog.sum(), u)
    assert rms_error(wavelet_reference(u, "dog"), dog) < 1e-14
    hat = wavelet_reference(u, "mexican_hat").detach()
    assert rms_error(hat, 2 / (math.sqrt(3) * math.pi**0.25) * second) < 1e-14
    assert abs(torch.trapezoid(hat**2, u.detach()) - 1) < 1e-9, "its energy is 1"
    assert abs(torch.trapezoid(hat, u.detach())) < 1e-9, "a wavelet has no mean"


@every_wavelet
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_its_dtype_allows(shape, dtype, wavelet):
    inputs, dy = problem(*shape, dtype=dtype)
    got = assert_as_accurate(inputs, dy, BOUNDS[dtype], wavelet)
    assert {t.dtype for t in got} == {dtype}


@every_wavelet
@pytest.mark.parametrize("spread", [1e-3, 6.0])
def test_small_and_large_inputs_keep_their_accuracy(spread, wavelet):
    (x, weight, scale, translation, bias), dy = problem((400,), 40, 10, torch.float32)
    assert_as_accurate((x * spread, weight, scale, translation, bias), dy, BOUNDS[torch.float32], wavelet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_slope_of_morlet_is_right_at_the_poles_of_the_tangent(dtype):
    """Backward takes sine and cosine of 5 u from the tangent of half of it, which is infinite at u = pi/5, 3 pi/5, …"""
    u = torch.arange(-9, 10, 2, dtype=torch.float64) * math.pi / 5
    u = (u + torch.tensor([0.0, 1e-7, -1e-7, 1e-15])[:, None]).reshape(-1, 1).to(dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    _, slope, value, *_ = value_and_grads(of("morlet"), (u, one, one, zero))
    exact, envelope = u.double(), torch.exp(-(u.double() ** 2) / 2)
    want = -(5 * torch.sin(5 * exact) + exact * torch.cos(5 * exact)) * envelope
    assert rms(slope.double() - want) < 4 * torch.finfo(dtype).eps
    assert rms(value.double() - (torch.cos(5 * exact) * envelope).sum()) < 20 * torch.finfo(dtype).eps


@every_wavelet
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_away_a_wavelet_is_zero_and_not_nan(wavelet, dtype):
    """Where u^2 overflows the plain formula gives inf * 0; a wavelet vanishes there, and so do its gradients."""
    (x, weight, scale, translation, bias), _ = problem((6,), 3, 4, dtype)
    for far, s in ((1e30, scale), (-torch.inf, scale), (1e3, scale.sign() * 1e-30)):
        y, *gradients, dbias = value_and_grads(
            of(wavelet), (torch.full_like(x, far), weight, s, translation, bias), torch.ones(6, 4, dtype=dtype)
        )
        assert torch.equal(y, bias.expand(6, 4))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
        assert torch.equal(dbias, torch.full_like(bias, 6))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few outputs, inputs and rows, the last of which is cut, so that every loop runs more than once."""
    monkeypatch.setattr(module, "_CPU_TILE", 60)
    monkeypatch.setattr(module, "_ROWS", 8)
    monkeypatch.setattr(conv_module, "_PATCHES", 200)


@pytest.mark.usefixtures("small_tiles")
@every_wavelet
@pytest.mark.parametrize(
    "shape", [((33,), 7, 10), ((1,), 70, 6), ((3,), 200, 4), ((13,), 1, 40), ((50,), 61, 1)], ids=str
)
def test_tiles_do_not_show(shape, wavelet):
    inputs, dy = problem(*shape)
    rows, features, outputs = len(dy), *shape[1:]
    assert math.prod(module._tile_shape(1, outputs, features, rows, 60)) < rows * features * outputs
    assert_as_accurate(inputs, dy, BOUNDS[torch.float64], wavelet)


@every_wavelet
def test_few_rows_of_many_inputs_have_their_inputs_last_in_memory(wavelet):
    inputs, dy = problem((3,), 5000, 20)
    assert module._tile_shape(1, 20, 5000, 3, 2**17)[2] > 64 > 3
    assert_as_accurate(inputs, dy, BOUNDS[torch.float64], wavelet)


@given(st.tuples(*[st.integers(1, 3000)] * 3, st.integers(1, 10**6)), st.sampled_from([1, 60, 2**17]))
def test_tiles_are_bounded(sizes, room):
    tile = module._tile_shape(*sizes, room)
    assert all(1 <= part <= whole for part, whole in zip(tile, sizes, strict=True))
    assert math.prod(tile) <= max(room, module._ROWS)


def test_a_small_layer_is_one_tile():
    assert module._tile_shape(2, 10, 16, 100, module._CPU_TILE) == (2, 10, 16, 100)


@every_wavelet
def test_without_bias_it_is_zero(wavelet):
    (*inputs, bias), _ = problem((7,), 5, 6)
    assert torch.equal(of(wavelet)(*inputs), of(wavelet)(*inputs, torch.zeros_like(bias)))


@every_wavelet
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.sampled_from([-2.0, -1.0, 0.5, 4.0]))
@settings(max_examples=15, deadline=None)
def test_shifting_and_stretching_everything_changes_nothing(wavelet, rows, features, outputs, factor):
    """psi sees (x - t) / s only; and it is linear in w."""
    (x, weight, scale, translation, _), _ = problem((rows,), features, outputs)
    y = of(wavelet)(x, weight, scale, translation)
    moved = of(wavelet)(factor * x + 3, -weight, factor * scale, factor * translation + 3)
    assert rms(moved + y) <= 1e-12 * (1 + rms(y))


@every_wavelet
def test_parameters_may_be_wider_than_the_input(wavelet):
    inputs, dy = problem((33,), 40, 4, torch.bfloat16, torch.float32)
    got = assert_as_accurate(inputs, dy, BOUNDS[torch.bfloat16], wavelet)
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 4


def under_autocast(function):
    def call(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*tensors)

    return call


@every_wavelet
def test_autocast_rounds_the_result_only(wavelet):
    inputs, dy = problem((33,), 40, 4, torch.float32)
    got = value_and_grads(under_autocast(of(wavelet)), inputs, dy.bfloat16())
    truth = value_and_grads(of(wavelet, wavelet_linear_reference), [t.double() for t in inputs], dy.bfloat16().double())
    assert [t.dtype for t in got] == [torch.bfloat16] + [torch.float32] * 5
    for name, out, want, bound in zip(NAMES, got, truth, (6e-3, 5e-6, *[2e-5] * 4), strict=True):
        assert rms_error(out, want) < bound, name
    with torch.autocast("cpu", torch.bfloat16):  # the backward too keeps its own dtypes
        again = value_and_grads(of(wavelet), inputs, dy.bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    assert under_autocast(of(wavelet))(*(t.double() for t in inputs)).dtype == torch.float64


@every_wavelet
def test_strides_do_not_matter(wavelet):
    (*tensors, bias), dy = problem((6,), 5, 4)
    want = value_and_grads(of(wavelet), (*tensors, bias), dy)
    transposed = [t.t().contiguous().t() for t in tensors]
    for out, reference in zip(
        value_and_grads(of(wavelet), (*transposed, bias), dy.t().contiguous().t()), want, strict=True
    ):
        assert rms_error(out, reference) < 1e-13
    row, ones = tensors[0][:1].expand(6, 5), torch.ones(()).double().expand(6, 4)
    expanded = value_and_grads(of(wavelet), (row, *tensors[1:], bias), ones)
    for out, reference in zip(
        expanded, value_and_grads(of(wavelet), (row.contiguous(), *tensors[1:], bias), ones.contiguous()), strict=True
    ):
        assert rms_error(out, reference) < 1e-13


@every_wavelet
def test_nan_reaches_its_row_and_no_other(wavelet):
    (x, *rest), _ = problem((6,), 5, 4)
    x[2, 3] = torch.nan
    y, dx, *_ = value_and_grads(of(wavelet), (x, *rest))
    assert y[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert y[others].isfinite().all()
    assert dx[others].isfinite().all()
    assert dx[2, 3].isnan()


@every_wavelet
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_pass_gradcheck_twice(wavelet, with_bias):
    inputs, _ = problem((2,), 3, 4)
    leaves = [t.requires_grad_() for t in inputs[: 5 if with_bias else 4]]
    assert torch.autograd.gradcheck(of(wavelet), leaves)
    assert torch.autograd.gradgradcheck(of(wavelet), leaves)


@every_wavelet
@pytest.mark.parametrize("wanted", range(4))
def test_only_gradients_asked_for_are_computed(wanted, wavelet):
    (*inputs, bias), dy = problem((7,), 3, 4)
    truth = value_and_grads(of(wavelet), inputs, dy)[1:]
    found = wavelet_linear_op.backward_op(dy, *inputs, None, wavelet, [i == wanted for i in range(5)])[:4]
    for i, (out, want) in enumerate(zip(found, truth, strict=True)):
        assert out.numel() == (want.numel() if i == wanted else 0)
    assert rms_error(found[wanted], truth[wanted]) < 1e-13
    bias.requires_grad_()
    for create_graph in (False, True):
        (dbias,) = torch.autograd.grad(of(wavelet)(*inputs, bias), bias, dy, create_graph=create_graph)
        assert rms_error(dbias, dy.sum(0)) < 1e-14


def test_functional_transforms_go_through_the_definition():
    (x, weight, scale, translation, bias), _ = problem((7,), 3, 4)

    def loss(scale, x):
        return wavelet_linear(x, weight, scale, translation, bias).sin().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))(scale, x)
    for row, gradient in zip(x, per_example, strict=True):
        _, want = value_and_grads(lambda s, row=row: loss(s, row), (scale,))
        assert rms_error(gradient, want) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@every_wavelet
@pytest.mark.parametrize(
    ("rows", "dtype"), [(5, torch.float32), pytest.param(0, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_ops_pass_opcheck(wavelet, rows, dtype):
    (*inputs, bias), dy = problem((rows,), 3, 4, dtype, torch.float32)
    for needed in ([True] * 5, [False, False, True, False, False]):
        opcheck(wavelet_linear_op.backward_op, (dy, *inputs, bias, wavelet, needed))
    opcheck(wavelet_linear_op.op, (*inputs, None, wavelet))
    opcheck(wavelet_linear_op.op, (*(t.requires_grad_() for t in (*inputs, bias)), wavelet))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize(
    ("rows", "dtype"), [(5, torch.float32), pytest.param(0, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_ops_of_a_convolution_pass_opcheck(rows, dtype):
    conv = randn(rows, 4, 4, 3, dtype=dtype), *(t.requires_grad_() for t in parameters(6, 2, 3, 2, dtype=torch.float32))
    geometry = [2, 1], [1, 1, 0, 1], [1, 1], 2, None
    opcheck(wavelet_conv2d_op.op, (*conv, "morlet", *geometry))
    dy = randn(rows, 6, 2, 3, dtype=dtype)
    opcheck(wavelet_conv2d_op.backward_op, (dy, *(t.detach() for t in conv), "morlet", *geometry, [True] * 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
def test_compiles_whole_with_inductor():
    inputs, dy = problem((9,), 5, 6, torch.float32)

    def function(*inputs):
        return torch.relu(wavelet_linear(*inputs))

    torch._dynamo.reset()
    got = value_and_grads(torch.compile(function, fullgraph=True), inputs, dy)
    for out, want in zip(got, value_and_grads(function, inputs, dy), strict=True):
        assert rms_error(out, want) < 1e-6


@every_wavelet
def test_two_runs_agree_bit_for_bit(wavelet):
    inputs, dy = problem((1500,), 100, 10, torch.float32)
    first, second = (value_and_grads(of(wavelet), inputs, dy) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def conv_problem(batch, channels, outputs, kernel, size, groups=1, dtype=torch.float32):
    return randn(batch, channels, *size, dtype=dtype), *parameters(outputs, channels // groups, *kernel, dtype=dtype)


@pytest.mark.parametrize("function", [wavelet_linear, wavelet_conv2d])
def test_backward_keeps_inputs_only(function):
    linear, conv = problem((64,), 50, 40, torch.float32)[0], conv_problem(2, 8, 8, (3, 3), (8, 8))
    leaves = [t.requires_grad_() for t in (linear if function is wavelet_linear else conv)]
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().data_ptr()), lambda _: None
    ):
        function(*leaves, **({} if function is wavelet_linear else {"padding": (1, 1)}))
    assert kept
    assert set(kept) <= own


def peak_bytes(function):
    """The most memory that a function has allocated at one time, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    assert peak >= sum(t.numel() * t.element_size() for t in result), "the measurement misses allocations"
    return peak


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.plain_memory
@every_wavelet
@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.float64], [torch.float32]), ids=str)
def test_memory_of_forward_and_backward_is_bounded(wavelet, dtype):
    """At (1024, 256 -> 64) in float32 one tensor of all edges would take 64 MiB."""
    inputs, dy = problem((1024,), 256, 64, dtype)
    leaves = [t.requires_grad_() for t in inputs]
    value_and_grads(of(wavelet), inputs, dy)
    peak = peak_bytes(lambda: torch.autograd.grad(of(wavelet)(*leaves), leaves, dy))
    tiles = 5 * module._CPU_TILE * dtype.itemsize
    assert peak <= 3 * size_of((*inputs, dy)) + tiles


@pytest.mark.slow
@pytest.mark.plain_memory
def test_memory_of_a_convolution_is_bounded():
    """All edges would take 288 MiB, all patches alone 18 MiB."""
    inputs = conv_problem(4, 32, 16, (3, 3), (64, 64))
    leaves = [t.requires_grad_() for t in inputs]

    def call():
        y = wavelet_conv2d(*leaves, padding=(1, 1))
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    blocks = 4 * (5 * module._CPU_TILE + 3 * conv_module._PATCHES)
    assert peak_bytes(call) <= 4 * size_of(inputs) + blocks


def counted(function, *inputs, backward=False):
    with FlopCounterMode(display=False) as counter:
        y = function(*inputs)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("wavelet", "forward", "backward"), [("mexican_hat", 9, 17), ("morlet", 10, 26), ("dog", 8, 15)]
)
def test_flops_are_those_of_the_equation(wavelet, forward, backward):
    (x, *rest), _ = problem((7,), 5, 6)
    leaves = [t.requires_grad_() for t in (x, *rest)]
    n = 7 * 5 * 6
    assert counted(of(wavelet), *leaves) == forward * n
    assert counted(of(wavelet), *leaves, backward=True) == (forward + backward) * n
    assert counted(of(wavelet), x.detach(), *leaves[1:], backward=True) == (forward + backward - 2) * n
    conv = [t.requires_grad_() for t in conv_problem(2, 4, 6, (3, 2), (5, 5), groups=2)]
    call = of(wavelet, wavelet_conv2d, groups=2, stride=(2, 1), padding=(1, 0))
    n = 2 * (6 * 2 * 3 * 2) * (3 * 4)
    assert counted(call, *conv) == forward * n
    assert counted(call, *conv, backward=True) == (forward + backward) * n


# --- Convolution ------------------------------------------------------------------------------------------------------

GEOMETRIES = [
    {},
    {"padding": (1, 2), "stride": (2, 1)},
    {"padding": "same", "dilation": (2, 3)},
    {"padding": "valid", "stride": (3, 2), "groups": 2},
    {"padding": (2, 1), "dilation": (1, 2), "groups": 4},
]


def on_patches(x, weight, scale, translation, bias, wavelet, pad_value, **geometry):
    """The linear layer on patches, a group at a time; where padding adds nothing, its terms are taken out again."""
    stride, dilation, groups = (geometry.get(k, d) for k, d in (("stride", 1), ("dilation", 1), ("groups", 1)))
    kernel, padding = tuple(weight.shape[2:]), geometry.get("padding", (0, 0))
    if padding == "valid":
        padding = (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    else:
        sides = (padding[1], padding[1], padding[0], padding[0])

    like = F.conv2d(F.pad(x, sides), torch.zeros_like(weight), None, stride, 0, dilation, groups)

    def patches(t, value):
        unfolded = F.unfold(F.pad(t, sides, value=value), kernel, dilation, 0, stride)
        return unfolded.transpose(1, 2).unflatten(2, (groups, -1))  # (batch, pixels, groups, in)

    windows, inside = patches(x, pad_value or 0.0), patches(torch.ones_like(x), float(pad_value is not None))
    outputs = []
    for g, flat in enumerate(zip(*(t.flatten(1).chunk(groups) for t in (weight, scale, translation)), strict=True)):
        w, s, t = flat
        psi = wavelet_reference((windows[:, :, g].unsqueeze(2) - t) / s, wavelet)
        outputs.append((w * psi * inside[:, :, g].unsqueeze(2)).sum(3))
    return torch.cat(outputs, 2).transpose(1, 2).reshape(like.shape) + bias.view(-1, 1, 1)


@pytest.mark.parametrize("pad_value", [None, 0.0, -0.7])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("tiles", ["usual", pytest.param("small", marks=pytest.mark.slow)])
@every_wavelet
def test_a_convolution_is_the_linear_layer_on_patches(geometry, pad_value, tiles, wavelet, request):
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    inputs = conv_problem(3, 4, 8, (3, 2), (7, 6), geometry.get("groups", 1), torch.float64)
    options = {"wavelet": wavelet, "pad_value": pad_value, **geometry}
    want = on_patches(*inputs, **options)
    dy = torch.randn_like(want)
    truth = value_and_grads(lambda *t: on_patches(*t, **options), inputs, dy)
    got = value_and_grads(lambda *t: wavelet_conv2d(*t, **options), inputs, dy)
    for name, out, reference in zip(NAMES, got, truth, strict=True):
        assert rms_error(out, reference) < 1e-12, name


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@every_wavelet
def test_a_convolution_is_as_accurate_as_its_dtype_allows(dtype, wavelet):
    inputs = conv_problem(5, 4, 6, (3, 3), (9, 8), dtype=dtype)
    dy = randn(5, 6, 9, 8, dtype=dtype)
    options = {"wavelet": wavelet, "padding": "same"}
    truth = value_and_grads(
        lambda *t: on_patches(*t, pad_value=None, **options, dilation=(1, 1)), [t.double() for t in inputs], dy.double()
    )
    got = value_and_grads(lambda *t: wavelet_conv2d(*t, **options), inputs, dy)
    assert {t.dtype for t in got} == {dtype}
    bounds = BOUNDS[dtype]
    for name, out, want, bound in zip(NAMES, got, truth, (*bounds[:2], *[bounds[2]] * 4), strict=True):
        assert rms_error(out, want) <= bound, name


@every_wavelet
@pytest.mark.parametrize("pad_value", [None, 0.4])
def test_gradients_of_a_convolution_pass_gradcheck_twice(wavelet, pad_value):
    inputs = conv_problem(1, 2, 2, (2, 2), (3, 2), 2, torch.float64)
    call = of(wavelet, wavelet_conv2d, padding="same", groups=2, pad_value=pad_value)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_one_image_and_no_image():
    x, *rest = conv_problem(2, 4, 6, (3, 2), (7, 6), dtype=torch.float64)
    y = wavelet_conv2d(x, *rest, padding=(1, 1))
    assert rms_error(wavelet_conv2d(x[1], *rest, padding=(1, 1)), y[1]) < 1e-14
    none = x[:0].requires_grad_()
    leaves = [t.requires_grad_() for t in rest]
    empty = wavelet_conv2d(none, *leaves, padding=(1, 1))
    assert empty.shape == (0, *y.shape[1:])
    empty.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (none, *leaves))


def test_functional_transforms_of_a_convolution_go_through_the_definition():
    x, *rest = conv_problem(3, 2, 2, (2, 2), (3, 3), dtype=torch.float64)

    def loss(weight, image):
        return wavelet_conv2d(image, weight, *rest[1:], padding=(1, 1)).sin().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))(rest[0], x)
    for image, gradient in zip(x, per_example, strict=True):
        _, want = value_and_grads(lambda w, image=image: loss(w, image), (rest[0],))
        assert rms_error(gradient, want) < 1e-12


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [wavelet_linear, wavelet_conv2d])
def test_an_unknown_wavelet_is_refused_with_the_choices(function):
    with pytest.raises(ValueError, match="wavelet='haar': must be one of 'mexican_hat', 'morlet', 'dog'"):
        function(*(torch.zeros(2, 2) for _ in range(4)), wavelet="haar")


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("x", ((4, 6), (4, 5), (4, 5), (4, 5), (4,))),
        ("x", ((), (4, 5), (4, 5), (4, 5), (4,))),
        ("weight", ((4, 5), (5,), (4, 5), (4, 5), (4,))),
        ("weight", ((4, 0), (4, 0), (4, 0), (4, 0), (4,))),
        ("scale", ((4, 5), (4, 5), (4, 4), (4, 5), (4,))),
        ("translation", ((4, 5), (4, 5), (4, 5), (5,), (4,))),
        ("bias", ((4, 5), (4, 5), (4, 5), (4, 5), (5,))),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(name, shapes):
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        wavelet_linear(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("message", "x", "weight", "options"),
    [
        ("x has shape", (2, 3, 5, 5), (4, 2, 3, 3), {}),
        ("x has shape", (2, 5), (4, 2, 3, 3), {}),
        ("its height 2 is less than the kernel spans", (2, 2, 2, 5), (4, 2, 3, 3), {}),
        ("weight has shape", (2, 2, 5, 5), (4, 2, 3), {}),
        ("groups=3: must divide the 4 outputs", (2, 6, 5, 5), (4, 2, 3, 3), {"groups": 3}),
    ],
)
def test_convolutions_that_do_not_fit_are_refused_by_name(message, x, weight, options):
    with pytest.raises(ValueError, match=message):
        wavelet_conv2d(torch.zeros(x), *(torch.ones(weight) for _ in range(3)), **options)


@pytest.mark.parametrize("function", [wavelet_linear, wavelet_conv2d])
def test_integers_are_refused(function):
    shape = (4, 3) if function is wavelet_linear else (4, 3, 1, 1)
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        function(torch.ones(shape, dtype=torch.int64), *(torch.ones(shape) for _ in range(3)))
