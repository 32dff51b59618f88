"""The op `basis_linear` by its Triton kernels, against its definition; on plain torch: `test_basis_linear.py`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import use_backend
from archzoo.kernels.activation import Activation
from archzoo.kernels.basis_linear import (
    Basis,
    KernelForm,
    basis_linear,
    basis_linear_backward_op,
    basis_linear_op,
    basis_linear_reference,
)
from archzoo.kernels.chebyshev import Chebyshev
from archzoo.kernels.fourier import Fourier
from archzoo.kernels.kan_spline import BSpline
from archzoo.kernels.rational import Rational
from archzoo.kernels.rbf import RBF
from archzoo.kernels.sine import Sine
from tests.helpers import rms_error, value_and_grads
from tests.kernels.triton_support import (
    DTYPES,
    check_compiles,
    check_peak_memory,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
    tolerance,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]
of_torch = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own


@pytest.fixture
def triton() -> Iterator[None]:
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several programs, each of which walks its functions in several steps."""
    from archzoo.kernels import _basis_triton, _rational_triton

    with ExitStack() as stack:
        for sizes in _basis_triton.TUNED:
            stack.enter_context(sizes.forced(POSITIONS=32, FUNCTIONS=4))
        stack.enter_context(_rational_triton.FORWARD.forced(ROWS=4, COLS=4))
        stack.enter_context(_rational_triton.BACKWARD.forced(ROWS=4, COLS=4, STEPS=2))
        yield


@dataclass(frozen=True)
class OwnSine(Sine):
    """A user's own basis, of which Triton knows nothing."""

    @property
    def kernel(self) -> KernelForm | None:
        return None


@dataclass
class Case:
    """A sum of terms, the first of which may have tensors: `learned` of them count among the inputs."""

    bases: tuple[Basis, ...]
    tensors: Callable[[int], list[Tensor]] = lambda features: []
    learned: int = 0

    def problem(
        self, *shape: int, outputs: int = 3, dtype: torch.dtype = torch.float64
    ) -> tuple[list[Tensor], Tensor, list[int]]:
        """x, bias, weights, learned tensors; the output's gradient; which inputs are summed over a batch."""
        features = shape[-1]
        made = [torch.rand(shape, dtype=torch.float64) * 2.6 - 1.3, torch.randn(outputs, dtype=torch.float64)]
        made += [torch.randn(outputs, features, b.size, dtype=torch.float64) for b in self.bases]
        made += self.tensors(features)[: self.learned]
        dy = torch.randn(*shape[:-1], outputs, dtype=torch.float64).to(dtype)
        return [t.to(dtype) for t in made], dy, list(range(1, len(made)))

    def form(self, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The op or its definition, of those inputs."""

        def run(x: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
            weights, learned = rest[: len(self.bases)], rest[len(self.bases) :]
            own = [*learned, *self.tensors(x.shape[-1])[self.learned :]]
            terms = [(b, w, *(own if b.num_tensors else ())) for b, w in zip(self.bases, weights, strict=True)]
            return op(x, terms, bias)

        return run


def knots(features: int) -> list[Tensor]:
    """Uneven ones, of which two coincide."""
    steps = torch.linspace(0.2, 0.6, 11, dtype=torch.float64).expand(features, -1).clone()
    steps[-1, 3] = 0
    return [torch.cat([torch.zeros(features, 1, dtype=torch.float64), steps.cumsum(1)], 1) - 2.0]


def waves(features: int) -> list[Tensor]:
    phases = torch.linspace(0, 1, 5 * features, dtype=torch.float64).view(features, 5)
    return [torch.linspace(0.5, 3, 5, dtype=torch.float64), phases]


def coefficients(features: int) -> list[Tensor]:
    return [torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(0), torch.ones(1, 4, dtype=torch.float64)]


silu = Activation("silu")
KAN = Case((BSpline(3, 5, -1.0, 0.4), silu))
CASES = {
    "cubic+silu": KAN,
    "adaptive+gelu": Case((BSpline(3, 5, None, None), Activation("gelu")), knots),
    "rbf": Case((RBF(8, 0.5),), lambda features: [torch.linspace(-2, 2, 8, dtype=torch.float64)]),
    "chebyshev": Case((Chebyshev(4),)),
    "fourier": Case((Fourier(5),)),
    "sine": Case((Sine(5),), waves, 1),
    "rational": Case((Rational(1),), coefficients, 2),
    "two splines, two activations": Case((silu, BSpline(3, 3, -1.0, 0.7), BSpline(2, 2, -1.0, 1.0), silu, silu)),
}
FURTHER = {
    **{f"cubic, {outside}": Case((BSpline(3, 5, -1.0, 0.4, outside),)) for outside in ("clamp", "linear")},
    **{f"adaptive, {o}": Case((BSpline(3, 5, None, None, o),), knots) for o in ("clamp", "linear")},
    **{f"order {k}, {o}": Case((BSpline(k, 3, -0.9, 0.6, o),)) for k, o in ((0, "zero"), (1, "linear"), (4, "clamp"))},
    **{name: Case((Activation(name),)) for name in ("silu", "relu", "tanh", "identity")},
    "one polynomial": Case((Chebyshev(0),)),
    "one harmonic": Case((Fourier(1),)),
    "many harmonics": Case((Fourier(20),)),
    "sum denominator": Case((Rational(1, "abs_sum"),), coefficients, 2),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def check(case: Case, *shape: int, **options: Any) -> None:
    inputs, dy, summed = case.problem(*shape, **options)
    check_values(case.form(basis_linear), case.form(basis_linear_reference), inputs, dy, summed)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small")
def test_values_and_gradients(case, dtype):
    check(case, 13, 5, dtype=dtype)


@pytest.mark.parametrize("case", FURTHER.values(), ids=FURTHER)
@pytest.mark.usefixtures("small")
def test_other_forms_of_the_bases(case):
    check(case, 9, 4)


@pytest.mark.parametrize("shape", [(1, 1), (33,), (2, 1, 3), (0, 4), (2, 0, 4)], ids=str)
def test_shapes(shape):
    for name in ("cubic+silu", "sine"):
        check(CASES[name], *shape, outputs=1)


def test_strides_and_mixed_dtypes():
    (x, bias, *weights), dy, summed = KAN.problem(6, 4)
    turned = [x.t().contiguous().t(), bias, *(w.transpose(0, 1).contiguous().transpose(0, 1) for w in weights)]
    forms = KAN.form(basis_linear), KAN.form(basis_linear_reference)
    check_values(*forms, turned, dy[:, :1].expand(6, 3), summed)
    check_values(*forms, [x[:1].expand(6, 4), bias, *weights], dy, summed)
    mixed = [x.float(), bias.bfloat16(), *(w.float() for w in weights)]
    y, dx, db, *_ = value_and_grads(forms[0], mixed, dy.float())
    assert (y.dtype, dx.dtype, db.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert rms_error(y, forms[1](*(t.double() for t in mixed))) < 2e-6


@pytest.mark.parametrize("name", ["cubic+silu", "sine"])
def test_blocks_of_rows_add_up(name, monkeypatch):
    from archzoo.kernels import _basis_linear_triton

    monkeypatch.setattr(_basis_linear_triton, "_BLOCK", 1)
    for dtype in (torch.float32, torch.bfloat16):
        check(CASES[name], 150, 2, dtype=dtype)


@every_case
def test_nan_comes_through(case):
    inputs, dy, _ = case.problem(4, 3)
    inputs[0][1, 2] = torch.nan
    y, dx, *_ = value_and_grads(case.form(basis_linear), inputs, dy)
    assert y[1].isnan().all()
    assert dx[1, 2].isnan()
    assert y.isnan().sum() == 3
    assert dx.isnan().sum() == 1


@pytest.mark.parametrize("name", ["fourier", "sine"])
def test_sines_of_large_numbers(name):
    """As exact as a number whose digits end where float32's do can be: its argument is reduced without a rounding."""
    (x, *rest), *_ = CASES[name].problem(5, 4, dtype=torch.float32)
    angle = Case(CASES[name].bases, lambda features: [torch.ones(5), torch.zeros(features, 5)])  # f x + p is exact
    rest = rest[:2]
    for scale in (1e2, 1e4):
        y, truth = (angle.form(op)(scale * x, *rest) for op in (basis_linear, basis_linear_reference))
        exact = angle.form(basis_linear_reference)((scale * x).double(), *(t.double() for t in rest))
        assert rms_error(y, exact) < max(2e-6, 2 * rms_error(truth, exact))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("case", [CASES[n] for n in ("cubic+silu", "adaptive+gelu", "chebyshev", "fourier")])
def test_large_and_small_inputs(case, scale):
    inputs, dy, _ = case.problem(7, 3)
    inputs[0] *= scale
    check_values(case.form(basis_linear), case.form(basis_linear_reference), inputs, dy, [])


@pytest.mark.parametrize("case", [CASES[n] for n in ("cubic+silu", "sine", "rational")])
def test_gradients_that_nobody_needs_are_left_out(case):
    inputs, dy, _ = case.problem(5, 3)
    everything = value_and_grads(case.form(basis_linear), inputs, dy)[1:]
    for alone, want in enumerate(everything):
        leaves = [t.detach().requires_grad_(i == alone) for i, t in enumerate(inputs)]
        case.form(basis_linear)(*leaves).backward(dy)
        assert rms_error(leaves[alone].grad, want) < 1e-14
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != alone)


@pytest.mark.usefixtures("small")
def test_two_runs_agree_bit_for_bit():
    inputs, dy, _ = CASES["sine"].problem(20, 5, dtype=torch.float32)
    check_repeats(CASES["sine"].form(basis_linear), inputs, dy)


@of_torch
@pytest.mark.parametrize(("name", "rows"), [("cubic+silu", 0), ("sine", 5)])
def test_opcheck(name, rows):
    case = CASES[name]
    (x, bias, *rest), dy, _ = case.problem(rows, 3, dtype=torch.float32)
    weights, tensors = rest[: len(case.bases)], [t.float() for t in case.tensors(3)]
    terms = "[" + ", ".join(b.spec for b in case.bases) + "]"
    leaves = [[t.clone().requires_grad_() for t in own] for own in ([x], weights, [bias], tensors)]
    opcheck(basis_linear_op, (*leaves[0], leaves[1], *leaves[2], leaves[3], terms, True))
    needs = [True, *(True for _ in weights), *(n < case.learned for n in range(len(tensors)))]
    for needed in (needs, [False, *needs[1:]]):
        opcheck(basis_linear_backward_op, (dy, x, weights, tensors, terms, needed, True))


def test_compile_and_export():
    inputs, dy, _ = KAN.problem(4, 3, dtype=torch.float32)
    check_compiles(KAN.form(basis_linear), inputs, dy, "basis_linear")


def test_autocast_narrows_the_weights_but_not_x():
    """Its digits decide where on the spline it is: rounded to bf16, x near 100 steps by half a unit."""
    case = Case((BSpline(3, 5, 99.0, 0.4), silu))
    (x, *rest), dy, _ = case.problem(20, 3, dtype=torch.float32)
    inputs = [x + 100, rest[0], rest[1], rest[2] * 0.01]
    truth = value_and_grads(case.form(basis_linear_reference), [t.double() for t in inputs], dy.double())
    with torch.autocast(x.device.type, torch.bfloat16):
        got = value_and_grads(case.form(basis_linear), inputs, dy.bfloat16())
    assert got[0].dtype == torch.bfloat16
    for out, want, t in zip(got[1:], truth[1:], inputs, strict=True):
        assert out.dtype == t.dtype
        assert rms_error(out, want) <= tolerance(torch.bfloat16, 1)
    assert rms_error(got[0], truth[0]) <= tolerance(torch.bfloat16, 0)


def test_what_triton_cannot_do_is_refused():
    check_refusals(KAN.form(basis_linear), KAN.problem(3, 2)[0])
    x, weight = torch.randn(3, 2), torch.randn(4, 2, 3)
    with pytest.raises(RuntimeError, match="the basis OwnSine has no Triton kernel"):
        basis_linear(x, [(OwnSine(3), weight, torch.randn(3), torch.randn(2, 3))])


def test_a_basis_without_a_kernel_goes_by_its_own_methods_in_the_same_op():
    """As it does on a GPU by default; here the op is told so itself."""
    basis, x = OwnSine(3), torch.randn(6, 2, dtype=torch.float64)
    weights = [torch.randn(4, 2, size, dtype=torch.float64) for size in (3, 1, 8)]
    (frequency, phase), dy = torch.rand(2, 3, dtype=torch.float64).unbind(), torch.randn(6, 4, dtype=torch.float64)
    bases = (basis, silu, KAN.bases[0])
    terms = "[" + ", ".join(b.spec for b in bases) + "]"
    triton, torchs = (
        value_and_grads(
            lambda x, u, v, w, f, use=use: basis_linear_op(x, [u, v, w], None, [f, phase.expand(2, 3)], terms, use),
            [x, *weights, frequency],
            dy,
        )
        for use in (True, False)
    )
    for got, want in zip(triton, torchs, strict=True):
        assert rms_error(got, want) < 1e-13


@pytest.mark.plain_memory
def test_memory(monkeypatch):
    from archzoo.kernels import _basis_linear_triton
    from archzoo.kernels import _basis_triton as kernels

    monkeypatch.setattr(_basis_linear_triton, "_BLOCK", 2**19)
    inputs, dy, _ = KAN.problem(4096, 32, outputs=32, dtype=torch.float32)
    blocks = {"POSITIONS": 16384, "FUNCTIONS": 8}
    with kernels.FORWARD["cubic"].forced(**blocks), kernels.BACKWARD["cubic"].forced(**blocks):
        check_peak_memory(KAN.form(basis_linear), inputs, dy)


def test_flops_are_those_of_plain_torch():
    inputs, dy, _ = KAN.problem(5, 3)
    totals = []
    for name in ("torch", "triton"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with use_backend(name), FlopCounterMode(display=False) as counter:
            KAN.form(basis_linear)(*leaves).backward(dy)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0
