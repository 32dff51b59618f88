"""Chebyshev polynomials of tanh: values, slopes, and that nothing is NaN where tanh saturates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archzoo.kernels.chebyshev import Chebyshev
from tests.helpers import rms_error

degrees = pytest.mark.parametrize("degree", [0, 1, 2, 3, 4, 9])


def points(*leading: int) -> Tensor:
    return torch.randn(*leading, 3, 50, dtype=torch.float64) * 2


@degrees
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_values_are_those_of_numpy(degree, recorded, leading):
    x = points(*leading)
    with torch.set_grad_enabled(recorded):
        values = Chebyshev(degree).values(x)
    want = np.polynomial.chebyshev.chebvander(np.tanh(x.numpy()), degree)
    assert values.shape == (*leading, 3, degree + 1, 50)
    assert rms_error(values, torch.from_numpy(want).movedim(-1, -2)) < 1e-14


@degrees
def test_slopes_are_those_of_autograd(degree):
    x = points().requires_grad_()
    values, slopes = Chebyshev(degree).values_and_slopes(x)
    for d in range(degree + 1):
        (want,) = torch.autograd.grad(Chebyshev(degree).values(x)[:, d].sum(), x)
        assert rms_error(slopes[:, d], want) < 1e-13
        derivative = np.polynomial.chebyshev.chebder(np.eye(degree + 1)[d])
        t = np.tanh(x.detach().numpy())
        assert rms_error(want, torch.from_numpy(np.polynomial.chebyshev.chebval(t, derivative) * (1 - t * t))) < 1e-13
    assert torch.equal(values, Chebyshev(degree).values(x))


@degrees
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_gradients_pulled_back_are_those_of_autograd(degree, recorded, leading):
    x, grad = points(*leading).requires_grad_(), torch.randn(*leading, 3, degree + 1, 50, dtype=torch.float64)
    truth = Chebyshev(degree).values(x)
    (want,) = torch.autograd.grad(truth, x, grad, create_graph=True)
    with torch.set_grad_enabled(recorded):
        values, below = Chebyshev(degree).pullback(x, grad.clone())
    assert rms_error(values, truth) < 1e-14
    assert rms_error(below, want) < 1e-13
    if recorded:
        second = (torch.autograd.grad(g.sin().sum(), x, retain_graph=True)[0] for g in (below, want))
        assert rms_error(*second) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_is_nan_where_tanh_is_one(dtype):
    """Upstream's cos(d acos t) has slope NaN from |x| = 9 on in float32."""
    x = torch.tensor([[-1e4, -100.0, -20.0, -9.1, 0.0, 9.1, 20.0, 100.0, 1e4, math.inf, -math.inf]], dtype=dtype)
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            values, slopes = Chebyshev(6).values_and_slopes(x)
            _, below = Chebyshev(6).pullback(x, torch.ones(1, 7, 11, dtype=dtype))
        assert slopes.isfinite().all()
        assert below.isfinite().all()
        signs = x.sign().unsqueeze(-2) ** torch.arange(7).view(1, 7, 1)
        far = x.abs() > 15
        torch.testing.assert_close(values.movedim(-2, -1)[far], signs.movedim(-2, -1)[far])
    upstream = torch.full((1,), 9.1, requires_grad=True)
    torch.cos(2 * torch.acos(torch.tanh(upstream))).sum().backward()
    assert upstream.grad.isnan().all()


@degrees
@pytest.mark.parametrize("recorded", [False, True])
def test_nan_reaches_every_function_and_nothing_else(degree, recorded):
    x = points()
    x[1, 7] = math.nan
    with torch.set_grad_enabled(recorded):
        values, below = Chebyshev(degree).pullback(x, torch.ones(3, degree + 1, 50, dtype=torch.float64))
    for tensor in (values.movedim(-2, 0), below.unsqueeze(0)):
        assert tensor[:, 1, 7].isnan().all()
        assert tensor.isnan().sum() == len(tensor)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(x=st.floats(-1e4, 1e4, width=32), degree=st.integers(0, 20))
def test_values_stay_within_one(x, degree):
    with torch.no_grad():
        values = Chebyshev(degree).values(torch.full((1, 1), x, dtype=torch.float64))
    assert values.abs().max() <= 1 + 1e-12


def test_functions_can_be_mapped_over_without_recording():
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(torch.vmap(Chebyshev(3).values)(x), Chebyshev(3).values(x))
