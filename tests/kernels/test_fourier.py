"""Harmonics by angle addition: as accurate as the functions themselves, for any x, and cheap to differentiate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archzoo.kernels.basis_linear import basis_linear, basis_linear_reference
from archzoo.kernels.fourier import Fourier
from tests.helpers import rms, rms_error, value_and_grads

counts = pytest.mark.parametrize("harmonics", [1, 2, 3, 5, 8])


def definition(x: Tensor, harmonics: int) -> Tensor:
    angles = x.unsqueeze(-2) * torch.arange(1, harmonics + 1, dtype=x.dtype).unsqueeze(-1)
    return torch.cat([torch.cos(angles), torch.sin(angles)], -2)


@counts
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_values_are_cosines_then_sines(harmonics, recorded, leading):
    x = torch.randn(*leading, 3, 50, dtype=torch.float64) * 3
    with torch.set_grad_enabled(recorded):
        values = Fourier(harmonics).values(x)
    assert values.shape == (*leading, 3, 2 * harmonics, 50)
    assert rms_error(values, definition(x, harmonics)) < 1e-14


@counts
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_slopes_and_gradients_are_those_of_autograd(harmonics, recorded, leading):
    x = (torch.randn(*leading, 3, 50, dtype=torch.float64) * 3).requires_grad_()
    grad = torch.randn(*leading, 3, 2 * harmonics, 50, dtype=torch.float64)
    (want,) = torch.autograd.grad(definition(x, harmonics), x, grad, create_graph=True)
    with torch.set_grad_enabled(recorded):
        values, slopes = Fourier(harmonics).values_and_slopes(x)
        pulled, below = Fourier(harmonics).pullback(x, grad.clone())
    assert rms_error(values, definition(x, harmonics)) < 1e-14
    assert rms_error((slopes * grad).sum(-2), want) < 1e-13
    assert torch.equal(pulled, values)
    assert rms_error(below, want) < 1e-13
    if recorded:
        second = (torch.autograd.grad(g.sin().sum(), x, retain_graph=True)[0] for g in (below, want))
        assert rms_error(*second) < 1e-12


@pytest.mark.parametrize("harmonics", [1, 5, 16, 64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4, 1e6])
def test_rounding_grows_as_the_harmonic_and_not_with_x(harmonics, scale):
    """In float32, error by root mean square over all harmonics below 1e-6 up to 64; cos(jx) loses |jx| ulps instead."""
    x = torch.randn(1, 2000) * scale
    with torch.no_grad():
        values = Fourier(harmonics).values(x)
    truth = definition(x.double(), harmonics)
    eps = torch.finfo(torch.float32).eps
    assert rms(values.double() - truth) < 3e-8 + 1.5e-8 * harmonics < 1e-6
    assert (values.double() - truth).abs().max() < eps * harmonics
    if scale >= 1:
        assert rms(values.double() - truth) < 1.1 * rms(definition(x, harmonics).double() - truth)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(x=st.floats(-1e6, 1e6, width=32), harmonics=st.integers(1, 40))
def test_harmonics_lie_on_the_circle_and_have_period_two_pi(x, harmonics):
    at = torch.tensor([[x, x + 2 * math.pi]], dtype=torch.float64)
    with torch.no_grad():
        cos, sin = Fourier(harmonics).values(at).split(harmonics, -2)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    drift = harmonics * (1e-14 + 4e-16 * abs(x))  # x + 2 pi is rounded
    for wave in (cos, sin):
        assert (wave[..., 0] - wave[..., 1]).abs().max() < drift


@pytest.mark.parametrize("recorded", [False, True])
def test_nan_reaches_every_function_and_nothing_else(recorded):
    x = torch.randn(3, 50)
    x[1, 7] = math.nan
    with torch.set_grad_enabled(recorded):
        values, below = Fourier(4).pullback(x, torch.ones(3, 8, 50))
    for tensor in (values.movedim(-2, 0), below.unsqueeze(0)):
        assert tensor[:, 1, 7].isnan().all()
        assert tensor.isnan().sum() == len(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_it_are_exact_far_out(dtype):
    """x = 1e4 in float32, a whole number of bf16: the phase is right to the last digit, forward and backward."""
    x, weight = (torch.randn(64, 4) * 1e4).to(dtype), torch.randn(5, 4, 16).to(dtype)
    term = [(Fourier(8), weight)]
    truth = value_and_grads(lambda x: basis_linear_reference(x, [(Fourier(8), weight.double())]), [x.double()])
    ours = value_and_grads(lambda x: basis_linear(x, term), [x])
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    assert all(rms_error(got, want) < bound for got, want in zip(ours, truth, strict=True))


def test_functions_can_be_mapped_over_without_recording():
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert rms_error(torch.vmap(Fourier(3).values)(x), Fourier(3).values(x)) < 1e-15
