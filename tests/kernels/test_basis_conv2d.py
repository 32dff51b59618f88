"""The operator that every convolutional KAN layer is made of, against its definition and the linear one on patches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import basis_conv2d as module
from archzoo.kernels.activation import Activation
from archzoo.kernels.basis_conv2d import basis_conv2d, basis_conv2d_reference
from archzoo.kernels.basis_linear import Basis, basis_linear
from archzoo.kernels.chebyshev import Chebyshev
from archzoo.kernels.fourier import Fourier
from archzoo.kernels.kan_spline import BSpline
from archzoo.kernels.rbf import RBF
from archzoo.kernels.sine import Sine
from tests.helpers import rms_error, value_and_grads


@dataclass
class Geometry:
    """How the kernel is laid over the image."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pad_value: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "kernel"}

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Padding at the top, bottom, left and right."""
        if self.padding == "valid":
            return 0, 0, 0, 0
        if self.padding == "same":
            h, w = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
            return h // 2, h - h // 2, w // 2, w - w // 2
        return self.padding[0], self.padding[0], self.padding[1], self.padding[1]


GEOMETRIES = {
    "plain": Geometry(),
    "one tap": Geometry((1, 1)),
    "stride": Geometry((3, 2), stride=(2, 3)),
    "padding": Geometry(padding=(1, 2)),
    "dilation": Geometry((2, 3), dilation=(3, 2), padding=(1, 1)),
    "same": Geometry(padding="same"),
    "same, even kernel": Geometry((2, 4), padding="same"),
    "same, dilated": Geometry((2, 3), padding="same", dilation=(3, 2)),
    "valid": Geometry((3, 2), padding="valid"),
    "groups": Geometry(groups=2, padding=(1, 0)),
    "a group a channel": Geometry((2, 2), groups=4, stride=(2, 1)),
    "pad value": Geometry(padding=(2, 1), pad_value=0.3, stride=(2, 2)),
    "pad value, same": Geometry((2, 4), padding="same", pad_value=-0.7, groups=2),
}
EVERYTHING = Geometry((3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2), groups=2)


@dataclass
class Case:
    """A sum of terms. What is differentiated: x, weights, bias, and the first `learned` of the bases' tensors."""

    bases: tuple[Basis, ...]
    tensors: Callable[[int], tuple[Tensor, ...]] = lambda channels: ()
    learned: int = 0

    def inputs(
        self, *shape: int, outputs: int = 4, geometry: Geometry | None = None, dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        """x, weights, bias, learned tensors: the same numbers in every dtype, but for rounding."""
        geometry = geometry or Geometry()
        channels = shape[-3]
        made = [torch.rand(shape, dtype=torch.float64) * 2.4 - 1.2]
        for basis in self.bases:
            size = (outputs, channels // geometry.groups, basis.size, *geometry.kernel)
            made.append(torch.randn(size, dtype=torch.float64))
        made.append(torch.randn(outputs, dtype=torch.float64))
        made += self.tensors(channels)[: self.learned]
        return [t.to(dtype) for t in made]

    def run(self, op: Callable[..., Tensor], geometry: Geometry, x: Tensor, *rest: Tensor) -> Tensor:
        count = len(self.bases)
        weights, bias, learned = rest[:count], rest[count], rest[count + 1 :]
        own = [*learned, *(t.to(bias.dtype) for t in self.tensors(x.shape[-3])[self.learned :])]
        terms = [(b, w, *(own if b.num_tensors else ())) for b, w in zip(self.bases, weights, strict=True)]
        return op(x, terms, bias, **geometry.options)

    def ours(self, geometry: Geometry) -> Callable[..., Tensor]:
        return lambda *inputs: self.run(basis_conv2d, geometry, *inputs)

    def definition(self, geometry: Geometry) -> Callable[..., Tensor]:
        def op(x: Tensor, terms: Any, bias: Tensor, **options: Any) -> Tensor:
            sides, images = list(geometry.sides), x.view(-1, *x.shape[-3:])
            if geometry.pad_value is not None:
                images = F.pad(images, (*sides[2:], *sides[:2]), value=geometry.pad_value)
                sides = [0, 0, 0, 0]
            rest = (list(geometry.stride), sides, list(geometry.dilation), geometry.groups)
            y = basis_conv2d_reference(images, terms, bias, *rest)
            return y.view(*x.shape[:-3], *y.shape[1:])

        return lambda *inputs: self.run(op, geometry, *inputs)

    def on_patches(self, geometry: Geometry) -> Callable[..., Tensor]:
        """`basis_linear` at each pixel put out, on those taps of its patch that lie inside the image."""

        def op(x: Tensor, terms: Any, bias: Tensor, **options: Any) -> Tensor:
            top, bottom, left, right = geometry.sides
            if geometry.pad_value is not None:
                x = F.pad(x, (left, right, top, bottom), value=geometry.pad_value)
                top = bottom = left = right = 0
            (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
            height, width = x.shape[2:]
            size = (
                (height + top + bottom - dh * (kh - 1) - 1) // sh + 1,
                (width + left + right - dw * (kw - 1) - 1) // sw + 1,
            )
            channels, outputs = x.shape[1] // geometry.groups, len(bias) // geometry.groups
            pixels = []
            for p in range(size[0]):
                for q in range(size[1]):
                    at = [(a, b, p * sh + a * dh - top, q * sw + b * dw - left) for a in range(kh) for b in range(kw)]
                    at = [tap for tap in at if 0 <= tap[2] < height and 0 <= tap[3] < width]
                    groups = []
                    for g in range(geometry.groups):
                        seen, made = slice(g * channels, (g + 1) * channels), slice(g * outputs, (g + 1) * outputs)
                        patch = torch.cat([x[:, seen, r, c] for _, _, r, c in at], 1)
                        local = [
                            (
                                basis,
                                torch.cat([weight[made, :, :, a, b] for a, b, _, _ in at], 1),
                                *(t[seen].repeat(len(at), 1) if t.dim() == 2 else t for t in own),
                            )
                            for basis, weight, *own in terms
                        ]
                        groups.append(basis_linear(patch, local, bias[made]))
                    pixels.append(torch.cat(groups, 1))
            return torch.stack(pixels, -1).unflatten(-1, size)

        return lambda *inputs: self.run(op, geometry, *inputs)


def uneven_knots(channels: int) -> tuple[Tensor, ...]:
    steps = torch.linspace(0.2, 0.6, 11, dtype=torch.float64) * torch.linspace(0.9, 1.1, channels).double().unsqueeze(1)
    return (torch.cat([torch.zeros(channels, 1, dtype=torch.float64), steps.cumsum(1)], 1) - 2.0,)


def waves(channels: int) -> tuple[Tensor, ...]:
    phases = torch.linspace(0, 3, 3 * channels, dtype=torch.float64).view(channels, 3)
    return torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64), phases


CASES = {
    "cubic+silu": Case((BSpline(3, 5, -1.0, 0.4), Activation("silu"))),
    "adaptive+gelu": Case((BSpline(3, 5, None, None), Activation("gelu")), uneven_knots),
    "rbf": Case((RBF(8, 0.5),), lambda channels: (torch.linspace(-2, 2, 8, dtype=torch.float64),)),
    "chebyshev": Case((Chebyshev(3),)),
    "fourier": Case((Fourier(3),)),
    "sine": Case((Sine(3),), waves, learned=1),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
of_torch = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # inside torch itself


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small images a block."""
    monkeypatch.setattr(module, "_CPU_BLOCK", 2 * 8 * 8 * 4 * 7 * 6)


def assert_same(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], bound: float = 1e-12) -> None:
    for got, want in zip(ours, truth, strict=True):
        assert rms_error(got, want) < bound


@every_geometry
@pytest.mark.parametrize("name", ["cubic+silu", "sine"])
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients_are_the_definitions_and_those_of_the_linear_map_on_patches(name, geometry):
    case = CASES[name]
    inputs = case.inputs(3, 4, 7, 6, geometry=geometry)
    dy = torch.randn_like(case.ours(geometry)(*inputs))
    ours = value_and_grads(case.ours(geometry), inputs, dy)
    assert_same(ours, value_and_grads(case.definition(geometry), inputs, dy))
    assert_same(ours, value_and_grads(case.on_patches(geometry), inputs, dy))


@every_case
@pytest.mark.parametrize("shape", [(3, 4, 7, 6), (1, 4, 3, 3), (4, 7, 6), (0, 4, 7, 6)], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_any_basis_on_any_batch(case, shape):
    inputs = case.inputs(*shape, geometry=EVERYTHING)
    dy = torch.randn_like(case.ours(EVERYTHING)(*inputs))
    assert dy.dim() == len(shape)
    ours = value_and_grads(case.ours(EVERYTHING), inputs, dy)
    assert_same(ours, value_and_grads(case.definition(EVERYTHING), inputs, dy))
    if len(shape) == 4 and shape[0]:
        assert_same(ours, value_and_grads(case.on_patches(EVERYTHING), inputs, dy))


@every_geometry
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # F.conv2d's own
def test_of_the_identity_it_is_torchs_convolution(geometry):
    identity = Activation("identity")
    x, weight, bias = Case((identity,)).inputs(2, 4, 7, 6, geometry=geometry)
    y = basis_conv2d(x, [(identity, weight)], bias, **geometry.options)
    padding = geometry.padding
    if geometry.pad_value is not None:
        top, bottom, left, right = geometry.sides
        x, padding = F.pad(x, (left, right, top, bottom), value=geometry.pad_value), 0
    want = F.conv2d(x, weight.squeeze(2), bias, geometry.stride, padding, geometry.dilation, geometry.groups)
    assert rms_error(y, want) < 1e-13


def test_padding_adds_nothing_unless_a_value_is_given():
    case = CASES["fourier"]
    x, weight, bias = case.inputs(2, 4, 5, 5)
    without = case.ours(Geometry())(x, weight, bias)
    nothing, zeros = (case.ours(Geometry(padding=(1, 1), pad_value=v))(x, weight, bias) for v in (None, 0.0))
    for y in (nothing, zeros):
        assert rms_error(y[..., 1:-1, 1:-1], without) < 1e-13
    assert rms_error(nothing, zeros) > 0.1  # cos 0 is not 0
    corner = case.ours(Geometry((2, 2)))(x[..., :2, :2], weight[..., 1:, 1:], bias)
    assert rms_error(nothing[..., :1, :1], corner) < 1e-13


BOUNDS = {
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}


@every_case
@pytest.mark.parametrize("product", ["CPU", "GPU"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_error_in_narrow_dtypes(case, dtype, product, monkeypatch):
    """Also with the convolution in the weight's dtype, as off the CPU."""
    if product == "GPU":
        monkeypatch.setattr(module, "product_dtype", lambda weight: weight.dtype)
    inputs = case.inputs(4, 4, 8, 7, dtype=dtype)
    narrow = [t.to(dtype).double() for t in case.tensors(4)]
    same_numbers = Case(case.bases, lambda channels: tuple(narrow), case.learned)
    dy = torch.randn_like(case.ours(Geometry())(*inputs))
    truth = value_and_grads(same_numbers.definition(Geometry()), [t.double() for t in inputs], dy.double())
    ours = value_and_grads(case.ours(Geometry()), inputs, dy)
    forward, gradient, summed = BOUNDS[dtype]
    for index, (got, want) in enumerate(zip(ours, truth, strict=True)):
        assert got.dtype == dtype
        assert rms_error(got, want) < (forward if index == 0 else gradient if index == 1 else summed)


@every_case
@pytest.mark.usefixtures("small_blocks")
def test_first_and_second_derivatives(case):
    geometry = Geometry((2, 2), stride=(2, 1), padding="valid", groups=2)
    inputs = [t.requires_grad_() for t in case.inputs(2, 2, 3, 3, outputs=2, geometry=geometry)]
    assert torch.autograd.gradcheck(case.ours(geometry), inputs)
    assert torch.autograd.gradgradcheck(case.ours(geometry), inputs)


def test_second_derivatives_where_padding_is_uneven():
    case, geometry = CASES["sine"], Geometry((2, 2), padding="same")
    inputs = [t.requires_grad_() for t in case.inputs(1, 2, 3, 2, outputs=2, geometry=geometry)]
    assert torch.autograd.gradgradcheck(case.ours(geometry), inputs)


@every_case
def test_only_what_is_needed_is_computed_and_it_is_the_same(case):
    inputs = case.inputs(2, 4, 5, 5, geometry=EVERYTHING)
    dy = torch.randn_like(case.ours(EVERYTHING)(*inputs))
    _, *everything = value_and_grads(case.ours(EVERYTHING), inputs, dy)
    for alone, want in enumerate(everything):
        leaves = [t.detach().requires_grad_(i == alone) for i, t in enumerate(inputs)]
        case.ours(EVERYTHING)(*leaves).backward(dy)
        assert rms_error(leaves[alone].grad, want) < 1e-14
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != alone)


def operator_arguments(case: Case, geometry: Geometry, *shape: int) -> tuple[Any, ...]:
    """x, weights, bias, tensors, terms and geometry, as the operator itself takes them."""
    x, *rest = case.inputs(*shape, geometry=geometry)
    count = len(case.bases)
    tensors = [*rest[count + 1 :], *case.tensors(shape[1])[case.learned :]]
    terms = "[" + ", ".join(b.spec for b in case.bases) + "]"
    layout = (list(geometry.stride), list(geometry.sides), list(geometry.dilation), geometry.groups)
    return x, rest[:count], rest[count], tensors, terms, *layout


@every_case
@of_torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(
    "geometry",
    [EVERYTHING, pytest.param(GEOMETRIES["same, even kernel"], marks=pytest.mark.slow)],
    ids=["everything", "same"],
)
def test_operators_keep_torchs_contract(case, geometry):
    x, weights, bias, tensors, *rest = operator_arguments(case, geometry, 2, 4, 5, 6)
    for leaf in (x, *weights, bias, *tensors[: case.learned]):
        leaf.requires_grad_()
    names = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(module.basis_conv2d_op, (x, weights, bias, tensors, *rest, False), test_utils=names)
    needs = [True] * (1 + len(weights)) + [i < case.learned for i in range(len(tensors))]
    with torch.no_grad():
        grad = torch.randn_like(module.basis_conv2d_op(x, weights, bias, tensors, *rest, False))
        plain = (grad, x.detach(), [w.detach() for w in weights], [t.detach() for t in tensors], *rest, needs, False)
    torch.library.opcheck(module.basis_conv2d_backward_op, plain, test_utils=("test_schema", "test_faketensor"))


def test_gradients_are_contiguous_whatever_the_weights_strides():
    """As their shape functions promise to a compiler."""
    x, _, _, _, _, *layout = operator_arguments(CASES["chebyshev"], Geometry(), 2, 4, 5, 6)
    kernel = torch.randn(3, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last).unsqueeze(2)
    grad, terms = torch.randn(2, 3, 3, 4, dtype=torch.float64), "[" + Activation("silu").spec + "]"
    arguments = (grad, x, [kernel], [], terms, *layout, [True, True], False)
    torch.library.opcheck(module.basis_conv2d_backward_op, arguments, test_utils=("test_faketensor",))


@every_case
def test_compiles_without_a_break(case):
    inputs = case.inputs(2, 4, 6, 5, geometry=EVERYTHING, dtype=torch.float32)
    dy = torch.randn_like(case.ours(EVERYTHING)(*inputs))
    compiled = torch.compile(case.ours(EVERYTHING), fullgraph=True, backend="aot_eager")
    eager = value_and_grads(case.ours(EVERYTHING), inputs, dy)
    for got, want in zip(value_and_grads(compiled, inputs, dy), eager, strict=True):
        assert torch.equal(got, want)


@every_case
@of_torch
def test_function_transforms(case):
    """`torch.func` takes plain torch: Hessians of an image, and a batch mapped over, with gradients or without."""
    geometry = Geometry((2, 2))
    x, *rest = case.inputs(2, 2, 3, 2, outputs=1, geometry=geometry)
    ours = case.ours(geometry)
    hessians = torch.func.vmap(torch.func.hessian(lambda image: ours(image, *rest).sum()))(x)
    for image, hessian in zip(x, hessians, strict=True):
        want = torch.autograd.functional.hessian(lambda i: ours(i, *rest).sum(), image)
        torch.testing.assert_close(hessian, want)
    with torch.no_grad():
        mapped = torch.vmap(lambda image: ours(image, *rest))(x)
    assert rms_error(mapped, ours(x, *rest)) < 1e-13


def test_images_are_independent_of_their_block(monkeypatch):
    case = CASES["cubic+silu"]
    inputs = case.inputs(7, 4, 6, 6)
    whole = value_and_grads(case.ours(Geometry()), inputs)
    for images in (1, 3):
        monkeypatch.setattr(module, "_CPU_BLOCK", images * 8 * 8 * 4 * 36)
        assert_same(value_and_grads(case.ours(Geometry()), inputs), whole, 1e-14)


def test_strided_inputs():
    case = CASES["cubic+silu"]
    x, first, second, bias = case.inputs(2, 4, 6, 5)
    dy = torch.randn(4, dtype=torch.float64).view(4, 1, 1).expand(2, 4, 4, 3)
    want = value_and_grads(case.ours(Geometry()), [x, first, second, bias], dy.contiguous())
    strided = [
        x.to(memory_format=torch.channels_last),
        first.transpose(0, 4).contiguous().transpose(0, 4),
        second.squeeze(2).to(memory_format=torch.channels_last).unsqueeze(2),
        bias,
    ]
    assert_same(value_and_grads(case.ours(Geometry()), strided, dy), want, 1e-14)
    one = x[:1, :1].expand(2, 4, 6, 5)
    assert torch.equal(
        case.ours(Geometry())(one, first, second, bias), case.ours(Geometry())(one.contiguous(), first, second, bias)
    )


def test_two_runs_agree_in_every_bit():
    case = CASES["cubic+silu"]
    inputs = case.inputs(40, 4, 16, 16, dtype=torch.float32)
    first, second = (value_and_grads(case.ours(Geometry(padding=(1, 1))), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_case
def test_nan_stays_where_the_kernel_sees_it(case):
    geometry = Geometry(padding="same")
    x, *rest = case.inputs(3, 4, 7, 7)
    x[1, 2, 3, 3] = math.nan
    y = case.ours(geometry)(x, *rest)
    assert y[1, :, 2:5, 2:5].isnan().all()
    y[1, :, 2:5, 2:5] = 0
    assert y.isfinite().all()


def test_autocast_narrows_the_weights_but_not_x():
    """Its digits decide where on the spline it is: rounded to bf16, x near 100 steps by half a unit."""
    case, geometry = Case((BSpline(3, 5, 99.0, 0.4),)), Geometry(padding=(1, 1))
    x, weight, bias = case.inputs(4, 4, 8, 8, dtype=torch.float32)
    x = (x + 100).requires_grad_()
    truth = case.definition(geometry)(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = case.ours(geometry)(x, weight, bias)
        y.sum().backward()  # the backward op does its own choice of dtypes too
    assert y.dtype == torch.bfloat16
    assert rms_error(y, truth) < 6e-3
    wide = x.detach().double().requires_grad_()
    case.definition(geometry)(wide, weight.double(), bias.double()).sum().backward()
    assert rms_error(x.grad, wide.grad) < 1e-2
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["cubic+silu", "fourier", "sine"])
def test_kept_for_the_backward_are_x_and_the_parameters(name):
    case = CASES[name]
    inputs = [t.requires_grad_() for t in case.inputs(8, 4, 16, 16, dtype=torch.float32)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.ours(Geometry())(*inputs)
    given = {t.untyped_storage().data_ptr() for t in inputs}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    assert all(t.numel() <= 4 * 12 for t in others)  # phases and knots alone


@pytest.mark.plain_memory
@pytest.mark.parametrize("name", ["cubic+silu", "chebyshev", "fourier", "sine"])
def test_peak_memory_is_within_three_times_what_goes_in_and_out(name, monkeypatch):
    monkeypatch.setattr(module, "_CPU_BLOCK", 2**20)
    case, geometry = CASES[name], Geometry(padding=(1, 1))
    inputs = [t.requires_grad_() for t in case.inputs(128, 8, 32, 32, outputs=8, dtype=torch.float32)]
    dy = torch.randn(128, 8, 32, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        case.ours(geometry)(*inputs).backward(dy)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    given = sum(t.nbytes for t in [*inputs, dy])
    whole = 2 * inputs[0].nbytes * case.bases[0].size  # functions and slopes of the batch
    assert 0 < peak <= 3 * given
    assert peak < inputs[0].nbytes + dy.nbytes + whole / 2


def test_flops_are_those_of_the_basis_once_a_pixel_and_of_two_per_weight_and_pixel_put_out():
    case, geometry = CASES["cubic+silu"], Geometry((3, 2), stride=(2, 1), groups=2)
    inputs = [t.requires_grad_() for t in case.inputs(5, 4, 7, 6, geometry=geometry)]
    spline, silu = (b.flops for b in case.bases)
    pixels, gemm = 5 * 4 * 7 * 6, 2 * (4 * 2 * 3 * 2) * (5 * 3 * 5)
    with FlopCounterMode(display=False) as forward:
        y = case.ours(geometry)(*inputs)
    assert y.shape == (5, 4, 3, 5)
    assert forward.get_total_flops() == pixels * (spline[0] + silu[0]) + gemm * (8 + 1)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == pixels * (spline[1] + silu[1] + 2 * (8 + 1)) + 2 * gemm * (8 + 1)


def test_learned_tensors_alone_cost_the_gradient_of_their_functions():
    case, counts = CASES["sine"], {}
    for what in ("x", "learned", "weight"):
        inputs = case.inputs(5, 4, 7, 6)
        inputs[{"x": 0, "weight": 1, "learned": 3}[what]].requires_grad_()
        y = case.ours(Geometry())(*inputs)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        counts[what] = counter.get_total_flops()
    assert counts["learned"] == counts["x"] == counts["weight"] + 5 * 4 * 7 * 6 * (2 * 3 + 2 * 3)


def test_wrong_arguments_are_refused_by_name():
    basis, weight, x = BSpline(3, 5, -1.0, 0.4), torch.randn(2, 3, 8, 3, 3), torch.randn(5, 3, 6, 6)
    for shape in ((5, 4, 6, 6), (4, 6, 6), (6, 6), (1, 5, 3, 6, 6)):
        with pytest.raises(ValueError, match=r"x has shape .*must be \(batch, 3, height, width\)"):
            basis_conv2d(torch.randn(shape), [(basis, weight)])
    with pytest.raises(ValueError, match=r"x has dtype torch.int64"):
        basis_conv2d(torch.ones(5, 3, 6, 6, dtype=torch.long), [(basis, weight)])
    with pytest.raises(ValueError, match=r"weight \(2, 3, 7, 3, 3\).*needs \(2, 3, 8, 3, 3\)"):
        basis_conv2d(x, [(basis, weight[:, :, 1:])])
    with pytest.raises(ValueError, match=r"weight \(2, 3, 1, 3, 2\).*needs \(2, 3, 1, 3, 3\)"):
        basis_conv2d(x, [(basis, weight), (Activation("silu"), weight[:, :, :1, :, :2])])
    with pytest.raises(ValueError, match=r"1 tensors.*and 0"):
        basis_conv2d(x, [(basis, weight, torch.randn(3, 12))])
    with pytest.raises(ValueError, match=r"bias has shape \(3,\).*\(2,\)"):
        basis_conv2d(x, [(basis, weight)], torch.randn(3))
    with pytest.raises(ValueError, match="width 2 is less than the kernel spans"):
        basis_conv2d(x[..., :2], [(basis, weight)])
    with pytest.raises(ValueError, match="height 6 is less than the kernel spans"):
        basis_conv2d(x, [(basis, weight)], dilation=(4, 1), padding=(1, 0))
