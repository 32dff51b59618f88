"""The rational basis against its formula written out, by itself and in both operators."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels import rational as module
from archzoo.kernels.basis_conv2d import basis_conv2d
from archzoo.kernels.basis_linear import basis_linear, basis_linear_reference
from archzoo.kernels.rational import DENOMINATORS, Rational, rational
from tests.helpers import rms_error, value_and_grads

every_denominator = pytest.mark.parametrize("denominator", DENOMINATORS)
either_numerator = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])


def written_out(x: Tensor, a: Tensor, b: Tensor, denominator: str, axis: int) -> Tensor:
    """F, the features along an axis: every power by itself, every feature with its own copy of the coefficients."""
    z = x.movedim(axis, -1)
    per_group = z.shape[-1] // len(b)
    a = a.expand(len(b), 6).repeat_interleave(per_group, 0)
    b = b.repeat_interleave(per_group, 0)
    p = sum(a[:, d] * z**d for d in range(6))
    if denominator == "abs_terms":
        q = 1 + sum(b[:, j - 1].abs() * z.abs() ** j for j in range(1, 5))
    else:
        q = 1 + sum(b[:, j - 1] * z**j for j in range(1, 5)).abs()
    return (p / q).movedim(-1, axis)


def coefficients(groups: int, shared: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    a = torch.randn(1 if shared else groups, 6, dtype=torch.float64)
    return a.to(dtype), torch.randn(groups, 4, dtype=torch.float64).to(dtype)


def pulled_back(x: Tensor, grad: Tensor, a: Tensor, b: Tensor, denominator: str, axis: int = -2) -> tuple[Tensor, ...]:
    """By torch's autograd, from the formula written out."""
    return value_and_grads(lambda *inputs: written_out(*inputs, denominator, axis), (x, a, b), grad)


@every_denominator
@either_numerator
@pytest.mark.parametrize("piece", [1, 600, 2**18], ids="{} bytes".format)
@pytest.mark.parametrize("shape", [(6, 5), (6, 1), (6, 200), (4, 6, 9), (2, 3, 6, 4), (0, 6, 4), (6, 0)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_values_slopes_and_gradients_are_those_of_the_formula(
    denominator, shared, piece, shape, transposed, monkeypatch
):
    """In place, in pieces of any size, in any layout, and in the torch that is differentiated."""
    monkeypatch.setattr(module, "_CPU_PIECE", piece)
    basis, (a, b) = Rational(3, denominator), coefficients(3, shared)
    x, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    if transposed:
        x = x.mT.contiguous().mT
    truth = pulled_back(x, grad, a, b, denominator)
    before = [t.clone() for t in (x, grad, a, b)]
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            values, *gradients = basis.pullback(x, grad.unsqueeze(-2), a, b)
            values_alone = basis.values(x, a, b)
            _, slopes = basis.values_and_slopes(x, a, b)
        for got, want in zip((values.squeeze(-2), *gradients), truth, strict=True):
            assert got.shape == want.shape
            assert rms_error(got, want) < 1e-13
        assert rms_error(values_alone, values) < 1e-14
        assert rms_error((slopes * grad.unsqueeze(-2)).squeeze(-2), truth[1]) < 1e-13
    assert all(torch.equal(t, old) for t, old in zip((x, grad, a, b), before, strict=True))


@every_denominator
@either_numerator
def test_first_and_second_derivatives(denominator, shared):
    """Away from x = 0 and b = 0, on both sides of them; the conv operator differentiates `values`, not `pullback`."""
    basis, (a, b) = Rational(2, denominator), coefficients(2, shared)
    x = torch.tensor([[-2.0, 0.7, -0.3, 1.5], [0.2, -1.1, 2.2, -0.6]], dtype=torch.float64)
    weight = torch.randn(2, 4, 1, dtype=torch.float64)
    linear = [t.requires_grad_() for t in (x, weight, a, b)]

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return basis_linear(x, [(basis, weight, a, b)])

    assert torch.autograd.gradcheck(layer, linear)
    assert torch.autograd.gradgradcheck(layer, linear)

    def convolution(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return basis_conv2d(x, [(basis, weight, a, b)], padding=(1, 0))

    image = [x.detach().view(1, 4, 1, 2).requires_grad_(), weight.detach().view(2, 4, 1, 1, 1).requires_grad_(), a, b]
    assert torch.autograd.gradcheck(convolution, image)
    assert torch.autograd.gradgradcheck(convolution, image)


@every_denominator
@pytest.mark.parametrize("recorded", [False, True], ids=["in place", "recorded"])
def test_a_denominator_of_zero_has_the_gradient_of_its_positive_side(denominator, recorded):
    """With torch's sign(0) = 0 a start at b = 0 could never learn its denominator."""
    basis, (a, _) = Rational(2, denominator), coefficients(2, True)
    b, x, grad = torch.zeros(2, 4, dtype=torch.float64), torch.rand(4, 9).double() + 0.1, torch.randn(4, 9).double()
    want = torch.empty_like(b)
    for at in range(b.numel()):
        step = torch.zeros_like(b)
        step.view(-1)[at] = 1e-6
        near, far = (written_out(x, a, b + k * step, denominator, -2) for k in (1, 2))
        here = written_out(x, a, b, denominator, -2)
        want.view(-1)[at] = ((4 * near - far - 3 * here) / 2e-6 * grad).sum()  # one-sided, of second order
    with torch.set_grad_enabled(recorded):
        *_, b_grad = basis.pullback(x, grad.unsqueeze(-2), a, b)
    assert b_grad.abs().min() > 1e-3
    assert rms_error(b_grad, want) < 1e-6
    leaf = b.clone().requires_grad_()
    (basis.values(x, a, leaf).squeeze(-2) * grad).sum().backward()
    assert rms_error(leaf.grad, want) < 1e-6


def test_at_zero_the_slope_is_the_mean_of_its_two_sides():
    basis, (a, b) = Rational(1), coefficients(1, True)
    x = torch.zeros(1, 1, dtype=torch.float64)
    left, right = (basis.values_and_slopes(x + side, a, b)[1] for side in (-1e-9, 1e-9))
    assert (left - right).abs() > 0.1
    with torch.no_grad():
        slope = basis.pullback(x, torch.ones_like(x).unsqueeze(-2), a, b)[1]
    for got in (slope, basis.values_and_slopes(x, a, b)[1].squeeze(-2), a[:, 1:2]):
        torch.testing.assert_close(got, ((left + right) / 2).squeeze(-2), atol=1e-7, rtol=1e-7)


@every_denominator
def test_the_denominator_never_vanishes(denominator):
    """The third form that is about, 1 + sum |b_j| x^j, has roots at negative x; there |F| exceeds |P|."""

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(
        st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4),
        st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    )
    def check(bs: list[float], xs: list[float]) -> None:
        a, b = torch.tensor([[1.0, 0, 0, 0, 0, 0]]).double(), torch.tensor([bs]).double()
        one_over_q = Rational(1, denominator).values(torch.tensor([xs]).double(), a, b)
        assert ((one_over_q > 0) & (one_over_q <= 1)).all()

    check()


@every_denominator
@either_numerator
@pytest.mark.parametrize("shape", [(700, 8), (3, 8), (2, 3, 8), (8,), (0, 8)], ids=str)
def test_in_the_linear_operator(denominator, shared, shape, monkeypatch):
    """Sums of the coefficients' gradients run over the operator's blocks, too."""
    monkeypatch.setattr("archzoo.kernels.basis_linear._CPU_BLOCK", 4096)
    basis, (a, b) = Rational(4, denominator), coefficients(4, shared)
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in (shape, (5, 8, 1), (5,)))
    dy = torch.randn(*shape[:-1], 5, dtype=torch.float64)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return basis_linear(x, [(basis, weight, a, b)], bias)

    def reference(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.linear(written_out(x, a, b, denominator, -1), weight[..., 0], bias)

    inputs = (x, weight, bias, a, b)
    for got, want in zip(value_and_grads(ours, inputs, dy), value_and_grads(reference, inputs, dy), strict=True):
        assert rms_error(got, want) < 1e-12
    assert rms_error(basis_linear_reference(x, [(basis, weight, a, b)], bias), ours(*inputs)) < 1e-14


BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@every_denominator
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_error_in_narrow_dtypes(denominator, dtype):
    """F is evaluated, and its coefficients' gradients are summed, in float32."""
    basis, (a, b) = Rational(4, denominator), coefficients(4, True, dtype)
    x, weight = torch.randn(3000, 8).to(dtype), torch.randn(5, 8, 1).to(dtype)
    dy = torch.randn(3000, 5).to(dtype)

    def layer(*inputs: Tensor) -> Tensor:
        return basis_linear(inputs[0], [(basis, *inputs[1:])])

    inputs = (x, weight, a, b)
    truth = value_and_grads(layer, [t.double() for t in inputs], dy.double())
    for got, want in zip(value_and_grads(layer, inputs, dy), truth, strict=True):
        assert got.dtype == dtype
        assert rms_error(got, want) < BOUNDS[dtype]


def test_large_inputs_follow_the_ratio_of_the_leading_terms():
    """x^5 / x^4 = x up to where x^5 leaves float32; beyond it F is not finite, and no wrong number."""
    a, b = torch.tensor([[0.0, 0, 0, 0, 0, 3]]), torch.tensor([[0.0, 0, 0, 2]])
    x = torch.tensor([[1e3, -1e5, 1e7, -1e8, 1e12]])
    values, x_grad, *_ = Rational(1).pullback(x, torch.ones(1, 1, 5), a, b)
    torch.testing.assert_close(values[0, 0, :3], 1.5 * x[0, :3])
    torch.testing.assert_close(x_grad[0, :3], torch.full((3,), 1.5))
    assert not values[0, 0, 3:].isfinite().any()


@every_denominator
def test_nan_comes_through(denominator):
    a, b = coefficients(2, False)
    x = torch.randn(4, 3, dtype=torch.float64)
    for spoilt, where in ((x, (1, 2)), (a, (1, 5)), (b, (0, 3))):
        before = spoilt[where].clone()
        spoilt[where] = math.nan
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded):
                assert Rational(2, denominator).values(x, a, b).isnan().any()
        spoilt[where] = before
    assert Rational(2, denominator).values(x, a, b).isfinite().all()


def test_a_stack_of_functions_by_vmap():
    """As an ensemble does: nothing may be overwritten then, though no gradient is recorded."""
    basis = Rational(2)
    x, many = torch.randn(3, 4), [coefficients(2, False, torch.float32) for _ in range(5)]
    a, b = (torch.stack(each) for each in zip(*many, strict=True))
    with torch.no_grad():
        got = torch.func.vmap(lambda a, b: basis.values(x.t(), a, b))(a, b)
    for one, (own_a, own_b) in zip(got, many, strict=True):
        torch.testing.assert_close(one, basis.values(x.t(), own_a, own_b))


def test_flops():
    basis, (a, b) = Rational(2), coefficients(2, True)
    x, weight = torch.randn(50, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, 1, dtype=torch.float64)
    with FlopCounterMode(display=False) as forward:
        basis_linear(x, [(basis, weight, a, b)])
    assert forward.get_total_flops() == 50 * 6 * (20 + 2 * 4)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_compiled_for_a_cpu_it_gives_the_gradients_of_the_op(denominator):
    g = torch.Generator().manual_seed(3)
    x, a, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((7, 12), (3, 6), (3, 4)))
    x[0, :5], b[1] = 0, 0  # the kinks
    inputs = [t.requires_grad_() for t in (x, a, b)]
    compiled = torch.compile(partial(rational, denominator=denominator), fullgraph=True, backend="aot_eager")
    found, wanted = (
        torch.autograd.grad(f(*inputs).cos().sum(), inputs)
        for f in (compiled, partial(rational, denominator=denominator))
    )
    torch._dynamo.reset()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
