"""`paon_conv2d` and its transposed form against their definition: values, gradients, memory, FLOPs, tools of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import paon_conv2d as module
from archzoo.kernels.paon_conv2d import (
    paon_conv2d,
    paon_conv2d_op,
    paon_conv2d_reference,
    paon_conv_transpose2d,
)
from archzoo.kernels.paon_linear import paon_linear_reference
from tests.helpers import RecordOps, rms, rms_error, value_and_grads

BOUNDS = {  # forward, gradients
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 2e-5),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2),
}
DEGREES = [(1, 1), (2, 2), (3, 3), (2, 0), (4, 0), (0, 1), (0, 3), (1, 2), (1, 4), (2, 1), (4, 1), (3, 2)]
PLAIN = {"stride": (1, 1), "padding": (1, 1)}
GEOMETRIES = {
    "plain": PLAIN,
    "strided": {"stride": (2, 1), "padding": (0, 2)},
    "dilated": {"dilation": (1, 2), "padding": (2, 1)},
    "grouped": {"groups": 2, "padding": (1, 0), "stride": (1, 2)},
}
every_degree = pytest.mark.parametrize("degrees", DEGREES, ids=str)
every_variant = pytest.mark.parametrize("variant", ["smooth", "absolute"])
every_geometry = pytest.mark.parametrize("geometry", list(GEOMETRIES.values()), ids=list(GEOMETRIES))
both_ways = pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])


@pytest.fixture
def many_blocks(monkeypatch):
    """One image a block, so that a batch takes several."""
    monkeypatch.setattr(module, "_CPU_BLOCK", 1)


def randn(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def problem(degrees, dtype=torch.float64, shape=(3, 4, 6, 5), outputs=6, kernel=(3, 2), transposed=False, groups=1):
    """x, W, V, bias, where there are any. Terms have a size of about 1, and Q_N = Q_{N-1} = 0 is far away."""
    (M, N), channels = degrees, shape[-3]
    sizes = (channels, outputs // groups) if transposed else (outputs, channels // groups)
    each = (channels // groups * kernel[0] * kernel[1]) ** -0.5
    return [
        randn(*shape, dtype=dtype),
        randn(M, *sizes, *kernel, dtype=dtype, scale=each) if M else None,
        randn(N, *sizes, *kernel, dtype=dtype, scale=0.2 * each) if N else None,
        randn(outputs, dtype=dtype),
    ]


def definition(x, W, V, bias, *, variant="smooth", transposed=False, eps=1e-6, **geometry):
    pairs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "output_padding": (0, 0), "groups": 1}
    pairs |= {"transposed": transposed} | geometry
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in pairs.items()}
    return paon_conv2d_reference(x, W, V, bias, **options, absolute=variant == "absolute", eps=eps)


def ours(x, W, V, bias, *, transposed=False, **options):
    return (paon_conv_transpose2d if transposed else paon_conv2d)(x, W, V, bias, **options)


def gradients(function, inputs, dy=None, **options):
    """The value and the gradients of those inputs that are there, by name."""
    there = [i for i, t in enumerate(inputs) if t is not None]

    def call(*values):
        full = [None] * 4
        for i, value in zip(there, values, strict=True):
            full[i] = value
        return function(*full, **options)

    values = [inputs[i] for i in there]
    if dy is None:
        y = call(*values)
        dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype)
    found = value_and_grads(call, values, dy)
    return dict(zip(["y", *(("dx", "dnumerator", "ddenominator", "dbias")[i] for i in there)], found, strict=True))


def doubled(inputs):
    return [None if t is None else t.double() for t in inputs]


def assert_as_accurate(inputs, bounds, **options):
    got, truth = gradients(ours, inputs, **options), gradients(definition, doubled(inputs), **options)
    for name, out in got.items():
        error, bound = rms_error(out, truth[name]), bounds[name != "y"]
        assert error <= bound, f"{name}: {error:.1e}, allowed {bound:.1e}"
    return got


# --- Values and gradients ---------------------------------------------------------------------------------------------


@every_variant
@every_degree
def test_reference_is_the_linear_layers_on_every_patch(degrees, variant):
    x, W, V, bias = problem(degrees)
    patches = F.unfold(x, (3, 2), padding=(1, 1), stride=(2, 1)).mT  # (B, pixels, C kh kw)
    rows = [None if w is None else w.flatten(2) for w in (W, V)]
    want = paon_linear_reference(patches, *rows, bias, variant == "absolute", 0.01)
    got = definition(x, W, V, bias, variant=variant, padding=(1, 1), stride=(2, 1), eps=0.01)
    assert rms_error(got.flatten(2).mT, want) < 1e-13


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2), (0, 2)], ids=str)
def test_transposed_reference_is_the_plain_one_of_the_spread_image(degrees, variant):
    """Zeros between the pixels, and the weights turned round: a zero adds nothing to any degree."""
    x, W, V, bias = problem(degrees, transposed=True)
    spread = torch.zeros(3, 4, 11, 5, dtype=x.dtype)
    spread[:, :, ::2] = x
    turned = [None if w is None else w.transpose(1, 2).flip(3, 4) for w in (W, V)]
    want = definition(F.pad(spread, (0, 0, 0, 1)), *turned, bias, variant=variant, padding=(1, 1))
    got = definition(
        x, W, V, bias, variant=variant, transposed=True, stride=(2, 1), padding=(1, 0), output_padding=(1, 0)
    )
    assert rms_error(got, want) < 1e-13


@every_variant
@every_degree
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_every_degree_is_as_accurate_as_its_dtype_allows(degrees, variant, dtype):
    got = assert_as_accurate(problem(degrees, dtype), BOUNDS[dtype], variant=variant, **PLAIN)
    assert {t.dtype for t in got.values()} == {dtype}


@every_variant
@every_geometry
@both_ways
@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2), (0, 2), (2, 0)], ids=str)
def test_every_geometry_is_accurate_whatever_the_blocks(degrees, transposed, geometry, variant):
    inputs = problem(degrees, transposed=transposed, groups=geometry.get("groups", 1))
    extra = {"output_padding": (0, 1)} if transposed and geometry.get("dilation") else {}
    assert_as_accurate(inputs, BOUNDS[torch.float64], variant=variant, transposed=transposed, **{**geometry, **extra})


@every_variant
@both_ways
@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    degrees=st.sampled_from(DEGREES),
    batch=st.integers(0, 4),
    channels=st.sampled_from([2, 4]),
    outputs=st.sampled_from([2, 6]),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.sampled_from([1, 2]),
    block=st.sampled_from([1, 10_000, 2**23]),
)
def test_any_shape_is_accurate(
    variant, transposed, degrees, batch, channels, outputs, size, kernel, stride, groups, block
):
    inputs = problem(degrees, torch.float64, (batch, channels, *size), outputs, kernel, transposed, groups)
    before, module._CPU_BLOCK = module._CPU_BLOCK, block
    try:
        assert_as_accurate(
            inputs, BOUNDS[torch.float64], variant=variant, transposed=transposed, stride=stride, groups=groups
        )
    finally:
        module._CPU_BLOCK = before


@every_variant
@every_degree
def test_without_bias_it_is_zero(degrees, variant):
    x, W, V, bias = problem(degrees)
    without = gradients(paon_conv2d, (x, W, V, None), variant=variant)
    zero = gradients(paon_conv2d, (x, W, V, torch.zeros_like(bias)), variant=variant)
    for name, out in without.items():
        assert rms_error(out, zero[name]) < 1e-13, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_geometry
@both_ways
def test_1_0_is_the_usual_layer_bit_for_bit(transposed, geometry, dtype):
    inputs = problem((1, 0), dtype, transposed=transposed, groups=geometry.get("groups", 1))
    usual = F.conv_transpose2d if transposed else F.conv2d
    got = gradients(ours, inputs, transposed=transposed, **geometry)
    want = gradients(lambda x, W, V, b: usual(x, W[0], b, **geometry), inputs)
    for name, out in got.items():
        assert torch.equal(out, want[name]), name


def test_an_image_without_a_batch_axis_is_taken():
    x, *parameters = problem((2, 2))
    assert torch.equal(paon_conv2d(x[0], *parameters), paon_conv2d(x[:1], *parameters)[0])
    x, *parameters = problem((2, 2), transposed=True)
    assert torch.equal(paon_conv_transpose2d(x[0], *parameters), paon_conv_transpose2d(x[:1], *parameters)[0])


# --- Near a zero denominator ------------------------------------------------------------------------------------------


def vanishing(x, q_1, q_2, sizes=(1, 1)):
    """x and parameters of a neuron whose Q_1 = 1 + q_1 and Q_2 = Q_1 + q_2 at that x."""
    x = torch.tensor([x], dtype=torch.float64).view(1, 1, *sizes)
    V = torch.tensor([q_1, q_2], dtype=torch.float64).view(2, 1, 1, 1, 1) / x.view(1) ** torch.tensor([1, 2]).view(
        2, 1, 1, 1, 1
    )
    W, bias = torch.tensor([0.7, -0.3], dtype=torch.float64).view(2, 1, 1, 1, 1), torch.ones(1, dtype=torch.float64)
    return x, W, V, bias


def test_eps_keeps_the_zero_denominator_finite_and_its_gradients_right():
    """Q_1 = Q_2 = 0 makes y = 0, and dy/dQ_N = P_M / eps."""
    inputs = vanishing(1.0, -1.0, 0.0)
    got = gradients(paon_conv2d, inputs, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert got["y"].item() == 0
    P_1, P_2 = 1.7, 1.4
    assert torch.allclose(got["ddenominator"].flatten() * 1e-6, torch.tensor([P_1 + P_2, P_2], dtype=torch.float64))
    assert torch.equal(got["dnumerator"], torch.zeros_like(got["dnumerator"]))
    assert all(t.isfinite().all() for t in got.values())
    assert paon_conv2d(*inputs, eps=0.0).isnan().all()


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    x=st.floats(0.1, 2) | st.floats(-2, -0.1),
    Q_1=st.floats(-1e-3, 1e-3) | st.just(0.0),
    q_2=st.floats(-1e-3, 1e-3) | st.just(0.0),
    eps=st.sampled_from([1e-6, 1e-4, 1e-2]),
)
def test_gradients_near_a_zero_denominator_are_the_definitions(x, Q_1, q_2, eps):
    inputs = vanishing(x, Q_1 - 1, q_2)
    got, want = gradients(paon_conv2d, inputs, eps=eps), gradients(definition, inputs, eps=eps)
    for name, out in got.items():
        assert out.isfinite().all(), name
        # Both round Q, of size 1 before it cancels, and the derivative by it is 1 / eps at most.
        assert (out - want[name]).abs().max() <= 1e-12 * (1 + want[name].abs().max()) + 1e-15 / eps**2, name


@pytest.mark.parametrize(("Q_1", "q_2"), [(0.0, 0.0), (1e-3, 0.0), (0.0, -1e-3), (1e-3, -1e-3)])
def test_gradcheck_passes_at_a_zero_denominator(Q_1, q_2):
    """The guard is wide enough here for a finite difference of 1e-6 to be small beside it."""
    inputs = [t.requires_grad_() for t in vanishing(0.9, Q_1 - 1, q_2)]
    assert torch.autograd.gradcheck(lambda *t: paon_conv2d(*t, eps=1e-2), inputs, rtol=1e-5)


def test_zero_terms_of_the_absolute_variant_get_no_gradient():
    x, W, V, bias = problem((2, 2))
    got = gradients(paon_conv2d, (x, W, torch.zeros_like(V), bias), variant="absolute")
    assert torch.equal(got["ddenominator"], torch.zeros_like(V))
    assert rms(got["dnumerator"]) > 0


# --- Strides, dtypes, autocast ----------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2)], ids=str)
def test_strides_and_parameter_dtypes_do_not_matter(degrees, variant):
    x, W, V, bias = problem(degrees)
    want = gradients(paon_conv2d, (x, W, V, bias), variant=variant)
    strided = [t.mT.contiguous().mT if t.dim() == 5 else t.to(memory_format=torch.channels_last) for t in (x, W, V)]
    for name, out in gradients(paon_conv2d, (*strided, bias), variant=variant).items():
        assert rms_error(out, want[name]) < 1e-13, name
    same, ones = x[:1].expand(x.shape), torch.ones((), dtype=torch.float64).expand(want["y"].shape)
    want = gradients(paon_conv2d, (same.contiguous(), W, V, bias), ones.contiguous(), variant=variant)
    for name, out in gradients(paon_conv2d, (same, W, V, bias), ones, variant=variant).items():
        assert rms_error(out, want[name]) < 1e-13, name
    mixed = (x.bfloat16(), W.float(), V.bfloat16(), bias.float())
    got = assert_as_accurate(mixed, BOUNDS[torch.bfloat16], variant=variant)
    assert [t.dtype for t in got.values()] == [torch.bfloat16] + [t.dtype for t in mixed]


@every_variant
@pytest.mark.parametrize("degrees", [(1, 0), (1, 1), (3, 2)], ids=str)
def test_autocast_rounds_inputs_as_the_usual_layer_does_and_sums_in_float32(degrees, variant):
    inputs = problem(degrees, torch.float32)
    rounded = [None if t is None else t.bfloat16() for t in inputs]
    dy = randn(3, 6, 4, 4).bfloat16()
    truth = gradients(definition, doubled(rounded), dy.double(), variant=variant)

    def under_autocast(*inputs, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return paon_conv2d(*inputs, **options)

    got = gradients(under_autocast, inputs, dy, variant=variant)
    assert [t.dtype for t in got.values()] == [torch.bfloat16] + [torch.float32] * (len(got) - 1)
    for name, out in got.items():
        assert rms_error(out, truth[name]) < 6e-3, name  # the last rounding, of y and of each gradient
    with torch.autocast("cpu", torch.bfloat16):  # the backward too keeps its own dtypes
        if degrees != (1, 0):  # which is torch's own
            for name, out in gradients(paon_conv2d, inputs, dy, variant=variant).items():
                assert torch.equal(out, got[name]), name
        assert paon_conv2d(*doubled(inputs), variant=variant).dtype == torch.float64


# --- Tools of torch ---------------------------------------------------------------------------------------------------


@every_variant
@both_ways
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2), (1, 3), (0, 2), (3, 0)], ids=str)
def test_gradients_pass_gradcheck_twice(degrees, transposed, variant):
    inputs = problem(degrees, shape=(2, 2, 3, 2), outputs=2, kernel=(2, 2), transposed=transposed, groups=2)
    inputs = [None if t is None else t.requires_grad_() for t in inputs]

    def call(*inputs):
        return ours(*inputs, variant=variant, transposed=transposed, groups=2)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@every_variant
@pytest.mark.parametrize("wanted", range(4))
def test_only_gradients_asked_for_are_computed(wanted, variant):
    inputs = problem((2, 2))
    dy = randn(3, 6, 4, 4)
    truth = list(gradients(paon_conv2d, inputs, dy, variant=variant).values())[1:]
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    y = paon_conv2d(*leaves, variant=variant)
    with RecordOps() as recorded:
        (gradient,) = torch.autograd.grad(y, leaves[wanted], dy)
    assert torch.ops.archzoo.paon_conv2d_backward in recorded.ops
    assert rms_error(gradient, truth[wanted]) < 1e-13
    options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1, variant == "absolute", 1e-6, True
    with torch.no_grad():
        saved = paon_conv2d_op.op(*leaves, *options)[1]
        found = paon_conv2d_op.backward_op(dy, *leaves, saved, *options, [i == wanted for i in range(4)])
    assert [t.numel() > 0 for t in found] == [i == wanted for i in range(4)]


def test_functional_transforms_go_through_the_definition():
    x, W, V, bias = problem((2, 1))

    def loss(W, x):
        return paon_conv2d(x, W, V, bias).sin().sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))(W, x)
    for image, gradient in zip(x, per_example, strict=True):
        _, want = value_and_grads(lambda w, image=image: loss(w, image), (W,))
        assert rms_error(gradient, want) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@every_variant
@pytest.mark.parametrize(
    ("degrees", "transposed", "dtype"),
    [((1, 1), False, torch.float32), ((3, 0), True, torch.float32), ((0, 2), False, torch.bfloat16)],
    ids=str,
)
def test_ops_pass_opcheck(degrees, transposed, dtype, variant):
    inputs = problem(degrees, dtype, (2, 2, 4, 3), 4, (3, 2), transposed)
    extra = [1, 0] if transposed else [0, 0]
    options = [2, 1], [1, 0], [1, 1], transposed, extra, 1, variant == "absolute", 1e-6, True
    y, saved = paon_conv2d_op.op(*inputs, *options)
    there = [t is not None for t in inputs]
    for needed in (there, [True, False, False, False]):
        opcheck(paon_conv2d_op.backward_op, (torch.ones_like(y), *inputs, saved, *options, needed))
    opcheck(paon_conv2d_op.op, (*inputs[:3], None, *options))
    opcheck(paon_conv2d_op.op, (*(None if t is None else t.requires_grad_() for t in inputs), *options))


@every_variant
def test_two_runs_agree_bit_for_bit(variant):
    inputs = problem((3, 2), torch.float32, (8, 16, 12, 12), 24)
    first, second = (gradients(paon_conv2d, inputs, variant=variant) for _ in range(2))
    for name, out in first.items():
        assert torch.equal(out, second[name]), name


# --- Cost -------------------------------------------------------------------------------------------------------------


def kept_bytes(function, inputs):
    """What a function of leaves keeps for its backward pass, the parameters apart."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    own = {t.untyped_storage().data_ptr() for t in leaves[1:] if t is not None}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        y = function(*leaves)
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def textbook(x, W, V, bias, variant="smooth"):
    """As the published code: all powers stacked, one grouped convolution, the rational function of its outputs."""
    eps, outputs = 1e-6 if len(V) > 1 else 0.0, W.shape[1]

    def terms(weight):
        powers = torch.cat([x**k for k in range(1, len(weight) + 1)], 1)
        return F.conv2d(powers, weight.flatten(0, 1), None, padding=1, groups=len(weight)).split(outputs, 1)

    p, q, w0 = terms(W), terms(V), bias[:, None, None]
    P, P_low = w0 + sum(p), w0 + sum(p[:-1])
    if variant == "absolute":
        return P / (1 + sum(t.abs() for t in q))
    Q, Q_low = 1 + sum(q), 1 + sum(q[:-1])
    return (Q * P + Q_low * P_low) / (Q**2 + Q_low**2 + eps)


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (2, 2), (3, 3)], ids=str)
def test_backward_keeps_x_and_the_accumulators_at_most_half_of_the_textbook_form(degrees, variant):
    inputs = problem(degrees, torch.float32, (4, 16, 8, 8), 16, (3, 3))
    assert rms_error(textbook(*inputs, variant), paon_conv2d(*inputs, variant=variant, padding=(1, 1))) < 1e-5
    found = kept_bytes(lambda *t: paon_conv2d(*t, variant=variant, padding=(1, 1)), inputs)
    M, N = degrees
    maps = 1 + (min(M, 2) + min(N, 2) if variant == "smooth" else 1 + N)
    assert found == maps * 4 * 16 * 8 * 8 * 4
    assert found <= kept_bytes(lambda *t: textbook(*t, variant), inputs) / 2


def test_backward_of_a_polynomial_keeps_x_alone():
    inputs = problem((4, 0), torch.float32, (4, 16, 8, 8), 16, (3, 3))
    assert kept_bytes(paon_conv2d, inputs) == 4 * 16 * 8 * 8 * 4


def counted(*inputs, backward=False, **options):
    with FlopCounterMode(display=False) as counter:
        y = ours(*inputs, **options)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@every_variant
@every_geometry
@both_ways
@pytest.mark.parametrize("degrees", [(1, 1), (2, 2), (3, 1), (0, 2), (3, 0)], ids=str)
def test_flops_are_degree_times_the_usual_layers(degrees, transposed, geometry, variant):
    inputs = problem(degrees, torch.float32, (2, 64, 9, 8), 32, (3, 3), transposed, geometry.get("groups", 1))
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    weight = (leaves[1] if degrees[0] else leaves[2])[:1]
    options = {"transposed": transposed, **geometry}
    usual, K = counted(leaves[0], weight, None, leaves[3], **options), sum(degrees)
    forward = counted(*leaves, variant=variant, **options)
    assert K * usual <= forward < 1.1 * K * usual
    both = counted(*leaves, variant=variant, backward=True, **options)
    assert 3 * K * usual <= both < 3 * 1.1 * K * usual
    leaves[0] = leaves[0].detach()
    assert 2 * K * usual <= counted(*leaves, variant=variant, backward=True, **options) < 2 * 1.1 * K * usual


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "shapes"),
    [
        (r"x has shape \(3, 5, 6, 6\)", ((3, 5, 6, 6), (1, 6, 4, 3, 3), (1, 6, 4, 3, 3), (6,))),
        (r"x has shape \(4, 6\)", ((4, 6), (1, 6, 4, 3, 3), None, (6,))),
        (r"x has shape \(3, 4, 2, 6\): its height 2 is less", ((3, 4, 2, 6), (1, 6, 4, 3, 3), None, (6,))),
        ("numerator has shape", ((3, 4, 6, 6), (6, 4, 3, 3), None, (6,))),
        ("numerator has shape", ((3, 4, 6, 6), (0, 6, 4, 3, 3), (1, 6, 4, 3, 3), (6,))),
        ("denominator has shape", ((3, 4, 6, 6), (1, 6, 4, 3, 3), (1, 6, 4, 3, 2), (6,))),
        (r"bias has shape \(4,\): must be \(6,\)", ((3, 4, 6, 6), (1, 6, 4, 3, 3), (1, 6, 4, 3, 3), (4,))),
        ("numerator=None, denominator=None", ((3, 4, 6, 6), None, None, (6,))),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(message, shapes):
    with pytest.raises(ValueError, match=f"^{message}"):
        paon_conv2d(*(None if shape is None else torch.zeros(shape) for shape in shapes))


def test_other_arguments_out_of_range_are_refused():
    inputs = problem((1, 1))
    with pytest.raises(ValueError, match=r"variant='rough'.*'smooth' or 'absolute'"):
        paon_conv2d(*inputs, variant="rough")
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        paon_conv2d(inputs[0].long(), *inputs[1:])
    with pytest.raises(ValueError, match=r"padding=\(9, 9\): leaves no pixel"):
        paon_conv_transpose2d(*problem((1, 1), transposed=True), padding=(9, 9))
