"""The operator that every KAN layer is made of, on the bases at hand and on one with a parameter written here."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import basis_linear as module
from archzoo.kernels.activation import Activation, as_activation
from archzoo.kernels.basis_linear import Basis, basis_linear, basis_linear_reference
from archzoo.kernels.kan_spline import BSpline
from archzoo.kernels.rbf import RBF
from tests.helpers import rms_error, value_and_grads


@dataclass(frozen=True)
class Sines(Basis):
    """sin(f_j x) with learned frequencies: what a new basis has to say, and what one with a parameter adds."""

    count: int

    @property
    def size(self) -> int:
        return self.count

    @property
    def num_tensors(self) -> int:
        return 1

    @property
    def flops(self) -> tuple[int, int]:
        return 2 * self.count, 4 * self.count

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.sin(tensors[0].to(x.dtype).unsqueeze(-1) * x.unsqueeze(-2))

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        frequency = tensors[0].to(x.dtype).unsqueeze(-1)
        return self.values(x, *tensors), torch.cos(frequency * x.unsqueeze(-2)) * frequency

    def pullback(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        values, slopes = self.values_and_slopes(x, *tensors)
        per_frequency = grad * torch.cos(tensors[0].to(x.dtype).unsqueeze(-1) * x.unsqueeze(-2)) * x.unsqueeze(-2)
        return values, (grad * slopes).sum(-2), per_frequency.sum((-3, -1))


@dataclass
class Case:
    """A sum of terms; `tensors` are what is differentiated besides x, in the order weights, bias, learned tensors."""

    bases: tuple[Basis, ...]
    fixed: Callable[[int, torch.dtype], tuple[Tensor, ...]] = lambda features, dtype: ()
    learned: tuple[float, ...] = ()

    def inputs(self, *shape: int, outputs: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """x, weights, bias, learned tensor: the same numbers in every dtype, but for rounding."""
        features = shape[-1]
        made = [torch.rand(shape, dtype=torch.float64) * 2.4 - 1.2]
        made += [torch.randn(outputs, features, b.size, dtype=torch.float64) for b in self.bases]
        made.append(torch.randn(outputs, dtype=torch.float64))
        if self.learned:
            made.append(torch.tensor(self.learned, dtype=torch.float64))
        return [t.to(dtype) for t in made]

    def run(self, op: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        weights, bias, learned = rest[: len(self.bases)], rest[len(self.bases)], rest[len(self.bases) + 1 :]
        own = learned or self.fixed(x.shape[-1], weights[0].dtype)
        terms = [(b, w, *(own if b.num_tensors else ())) for b, w in zip(self.bases, weights, strict=True)]
        return op(x, terms, bias)

    def ours(self, *inputs: Tensor) -> Tensor:
        return self.run(basis_linear, *inputs)

    def reference(self, *inputs: Tensor) -> Tensor:
        return self.run(basis_linear_reference, *inputs)


def uneven_knots(features: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    steps = torch.linspace(0.2, 0.6, 11, dtype=torch.float64).expand(features, -1)
    return ((torch.cat([torch.zeros(features, 1, dtype=torch.float64), steps.cumsum(1)], 1) - 2.0).to(dtype),)


CASES = {
    "cubic": Case((BSpline(3, 5, -1.0, 0.4),)),
    "cubic+silu": Case((BSpline(3, 5, -1.0, 0.4), Activation("silu"))),
    "adaptive+gelu": Case((BSpline(3, 5, None, None), Activation("gelu")), uneven_knots),
    "quadratic, linear outside": Case((BSpline(2, 5, -1.0, 0.4, "linear"),)),
    "rbf": Case((RBF(8, 0.5),), lambda features, dtype: (torch.linspace(-2, 2, 8, dtype=dtype),)),
    "sines": Case((Sines(3),), learned=(0.5, 1.5, 2.0)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
of_torch = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # inside torch itself
SHAPES = [(1, 1), (63, 130), (2, 3, 33), (5,), (0, 4), (2, 0, 4)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows at tiny sizes, the last one not full."""
    monkeypatch.setattr(module, "_CPU_BLOCK", 4096)
    monkeypatch.setattr(module, "_MIN_ROWS", 4)


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients_are_the_definitions(case, shape):
    inputs = case.inputs(*shape)
    dy = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    ours, truth = value_and_grads(case.ours, inputs, dy), value_and_grads(case.reference, inputs, dy)
    for got, want in zip(ours, truth, strict=True):
        assert rms_error(got, want) < 1e-12


BOUNDS = {
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3, 2e-3),
    torch.bfloat16: (6e-3, 1e-2, 1e-2),
}


@every_case
@pytest.mark.parametrize("product", ["CPU", "GPU"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_error_in_narrow_dtypes(case, dtype, product, monkeypatch):
    """Also with the GEMM in the weight's dtype, as off the CPU."""
    if product == "GPU":
        monkeypatch.setattr(module, "product_dtype", lambda weight: weight.dtype)
    inputs = case.inputs(200, 40, dtype=dtype)
    dy = torch.randn(200, 7).to(dtype)
    fixed = case.fixed(40, dtype)
    same_numbers = Case(case.bases, lambda features, _: tuple(t.double() for t in fixed), case.learned)
    truth = value_and_grads(same_numbers.reference, [t.double() for t in inputs], dy.double())
    ours = value_and_grads(case.ours, inputs, dy)
    forward, gradient, summed = BOUNDS[dtype]
    for index, (got, want) in enumerate(zip(ours, truth, strict=True)):
        assert got.dtype == dtype
        assert rms_error(got, want) < (forward if index == 0 else gradient if index == 1 else summed)


@every_case
@pytest.mark.usefixtures("small_blocks")
def test_first_and_second_derivatives(case):
    inputs = [t.requires_grad_() for t in case.inputs(5, 3, outputs=2)]
    assert torch.autograd.gradcheck(case.ours, inputs)
    assert torch.autograd.gradgradcheck(case.ours, inputs)


@every_case
def test_only_what_is_needed_is_computed_and_it_is_the_same(case):
    inputs = case.inputs(20, 5)
    dy = torch.randn(20, 7, dtype=torch.float64)
    _, *everything = value_and_grads(case.ours, inputs, dy)
    for alone, want in enumerate(everything):
        leaves = [t.detach().requires_grad_(i == alone) for i, t in enumerate(inputs)]
        case.ours(*leaves).backward(dy)
        assert rms_error(leaves[alone].grad, want) < 1e-14
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != alone)


@every_case
@of_torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("dynamic", [False, True])
def test_operators_keep_torchs_contract(case, dynamic):
    x, *rest = (t.requires_grad_() for t in case.inputs(6, 4))
    weights, bias = rest[: len(case.bases)], rest[len(case.bases)]
    tensors = rest[len(case.bases) + 1 :] or list(case.fixed(4, torch.float64))
    terms = "[" + ", ".join(b.spec for b in case.bases) + "]"
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = tests if dynamic else tests[:3]
    torch.library.opcheck(module.basis_linear_op, (x, weights, bias, tensors, terms, False), test_utils=tests)
    needs = [True] * len(weights) + [False, *(bool(case.learned) for _ in tensors)]
    plain = [[t.detach() for t in ts] for ts in ([torch.randn(6, 7, dtype=torch.float64), x], weights, tensors)]
    backward = (*plain[0], plain[1], plain[2], terms, needs, False)
    torch.library.opcheck(module.basis_linear_backward_op, backward, test_utils=("test_schema", "test_faketensor"))


@every_case
def test_compiles_without_a_break(case):
    inputs = case.inputs(20, 5, dtype=torch.float32)
    dy = torch.randn(20, 7)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    for got, want in zip(value_and_grads(compiled, inputs, dy), value_and_grads(case.ours, inputs, dy), strict=True):
        assert torch.equal(got, want)


@every_case
@of_torch
def test_function_transforms(case):
    """`torch.func` takes plain torch, whose derivatives it can take: per-sample gradients and Hessians, as PINNs do."""
    x, *rest = case.inputs(6, 3, outputs=1)
    hessians = torch.func.vmap(torch.func.hessian(lambda row: case.ours(row, *rest).sum()))(x)
    for row, hessian in zip(x, hessians, strict=True):
        want = torch.autograd.functional.hessian(lambda r: case.ours(r, *rest).sum(), row)
        torch.testing.assert_close(hessian, want)


def test_rows_are_independent_of_their_block(monkeypatch):
    inputs = CASES["cubic+silu"].inputs(100, 6)
    whole = CASES["cubic+silu"].ours(*inputs)
    monkeypatch.setattr(module, "_CPU_BLOCK", 1)
    monkeypatch.setattr(module, "_MIN_ROWS", 7)
    assert rms_error(CASES["cubic+silu"].ours(*inputs), whole) < 1e-15


def test_strided_inputs():
    case = CASES["cubic+silu"]
    x, *rest = case.inputs(12, 5)
    dy = torch.randn(7, dtype=torch.float64).expand(12, 7)
    want = value_and_grads(case.ours, [x, *rest], dy.contiguous())
    strided = [x.t().contiguous().t(), *(w.transpose(0, 2).contiguous().transpose(0, 2) for w in rest[:2]), rest[2]]
    for got, expected in zip(value_and_grads(case.ours, strided, dy), want, strict=True):
        assert rms_error(got, expected) < 1e-15
    one = x[:1].expand(12, 5)
    assert torch.equal(case.ours(one, *rest), case.ours(one.contiguous(), *rest))


def test_two_runs_agree_in_every_bit():
    case = CASES["cubic+silu"]
    inputs = case.inputs(3000, 20, dtype=torch.float32)
    first, second = (value_and_grads(case.ours, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_stays_in_its_row():
    case = CASES["cubic+silu"]
    x, *rest = case.inputs(9, 4)
    x[3, 1] = math.nan
    y = case.ours(x, *rest)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


def test_autocast_narrows_the_weights_but_not_x():
    """Its digits decide where on the spline it is: rounded to bf16, x near 100 steps by half a unit."""
    case = Case((BSpline(3, 5, 99.0, 0.4),))
    x, weight, bias = case.inputs(300, 8, dtype=torch.float32)
    x = (x + 100).requires_grad_()
    truth = case.reference(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = case.ours(x, weight, bias)
        y.sum().backward()  # the backward op does its own choice of dtypes too
    assert y.dtype == torch.bfloat16
    assert rms_error(y, truth) < 6e-3
    x_wide = x.detach().double().requires_grad_()
    case.reference(x_wide, weight.double(), bias.double()).sum().backward()
    assert rms_error(x.grad, x_wide.grad) < 1e-2
    assert x.grad.dtype == torch.float32


def test_kept_for_the_backward_are_x_and_the_parameters():
    case = CASES["cubic+silu"]
    inputs = [t.requires_grad_() for t in case.inputs(1024, 64, dtype=torch.float32)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.ours(*inputs)
    assert {t.untyped_storage().data_ptr() for t in kept} <= {t.untyped_storage().data_ptr() for t in inputs}


@pytest.mark.plain_memory
@pytest.mark.parametrize("name", ["cubic+silu", "adaptive+gelu", "rbf"])
def test_peak_memory_is_within_three_times_what_goes_in_and_out(name):
    case = CASES[name]
    inputs = [t.requires_grad_() for t in case.inputs(8192, 128, outputs=128, dtype=torch.float32)]
    dy = torch.randn(8192, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        case.ours(*inputs).backward(dy)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    given = sum(t.nbytes for t in [*inputs, dy])
    assert 3 * given < 4 * 8192 * 128 * case.bases[0].size * 2  # bytes: basis and slopes of the whole batch fail
    assert 0 < peak <= 3 * given


def test_flops_are_those_of_the_basis_and_of_two_per_weight_and_row():
    case = CASES["cubic+silu"]
    inputs = [t.requires_grad_() for t in case.inputs(50, 6, outputs=4)]
    spline, silu = (b.flops for b in case.bases)
    with FlopCounterMode(display=False) as forward:
        y = case.ours(*inputs)
    assert forward.get_total_flops() == 50 * 6 * (spline[0] + silu[0] + 2 * 4 * (8 + 1))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 50 * 6 * (spline[1] + silu[1] + (2 + 4 * 4) * (8 + 1))


def test_wrong_arguments_are_refused_by_name():
    basis, weight = BSpline(3, 5, -1.0, 0.4), torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"x has shape \(5, 4\).*in_features=3"):
        basis_linear(torch.randn(5, 4), [(basis, weight)])
    with pytest.raises(ValueError, match=r"x has dtype torch.int64"):
        basis_linear(torch.ones(5, 3, dtype=torch.long), [(basis, weight)])
    with pytest.raises(ValueError, match=r"weight \(2, 3, 7\).*needs \(2, 3, 8\)"):
        basis_linear(torch.randn(5, 3), [(basis, weight[..., 1:])])
    with pytest.raises(ValueError, match=r"1 tensors.*and 0"):
        basis_linear(torch.randn(5, 3), [(basis, weight, torch.randn(3, 12))])
    with pytest.raises(ValueError, match=r"bias has shape \(3,\).*\(2,\)"):
        basis_linear(torch.randn(5, 3), [(basis, weight)], torch.randn(3))


@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "tanh", "identity"])
def test_activations_and_their_slopes(name):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64).unsqueeze(0).requires_grad_()
    reference = getattr(torch.nn.functional, name, lambda t: t)
    value, slope = Activation(name).values_and_slopes(x)
    torch.testing.assert_close(value, reference(x).unsqueeze(1))
    torch.testing.assert_close(Activation(name).values(x), value)
    torch.testing.assert_close(slope.squeeze(1), torch.autograd.grad(reference(x).sum(), x)[0])


def test_activations_are_known_by_what_people_call_them():
    functional, nn = torch.nn.functional, torch.nn
    for names in (
        ("silu", functional.silu, nn.SiLU()),
        ("gelu", functional.gelu, nn.GELU()),
        ("identity", nn.Identity()),
    ):
        assert {as_activation(name) for name in names} == {Activation(names[0])}
    assert as_activation("zero") is None
    assert as_activation(None) is None
    by_tanh = nn.GELU(approximate="tanh")
    assert as_activation(by_tanh) is by_tanh
    assert as_activation(torch.sin) is torch.sin
    with pytest.raises(ValueError, match=r"base_activation='sulu': must be one of 'silu', "):
        as_activation("sulu")
