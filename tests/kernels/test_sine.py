"""Sines with learned frequencies: values, and gradients by x and by the frequencies, whatever leads the shape."""

import math

import pytest
import torch
from torch import Tensor

from archzoo.kernels.sine import Sine
from tests.helpers import rms, rms_error


def given(*leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a gradient from above, frequencies, phases."""
    x, grad = torch.randn(*leading, 3, 50, dtype=dtype) * 3, torch.randn(*leading, 3, 5, 50, dtype=dtype)
    return x, grad, torch.rand(5, dtype=dtype) * 4, torch.rand(3, 5, dtype=dtype) * 3


def definition(x: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    return torch.stack([torch.sin(frequency[j] * x + phase[:, j, None]) for j in range(len(frequency))], -2)


leads = pytest.mark.parametrize("leading", [(), (2,), (0,), (2, 3)], ids=str)
modes = pytest.mark.parametrize("recorded", [False, True])


@leads
@modes
def test_values_are_the_definition(leading, recorded):
    x, _, *own = given(*leading)
    with torch.set_grad_enabled(recorded):
        values = Sine(5).values(x, *own)
    assert values.shape == (*leading, 3, 5, 50)
    assert rms_error(values, definition(x, *own)) < 1e-14


@leads
@modes
def test_gradients_are_those_of_autograd(leading, recorded):
    x, grad, frequency, phase = given(*leading)
    leaves = x.requires_grad_(), frequency.requires_grad_()
    truth = definition(x, frequency, phase)
    want = torch.autograd.grad(truth, leaves, grad, create_graph=True)
    with torch.set_grad_enabled(recorded):
        values, *pulled = Sine(5).pullback(x, grad.clone(), frequency, phase)
        again, slopes = Sine(5).values_and_slopes(x, frequency, phase)
    assert rms_error(values, truth) < 1e-14
    assert rms_error(again, truth) < 1e-14
    assert rms_error((slopes * grad).sum(-2), want[0]) < 1e-13
    for got, right in zip(pulled, want, strict=True):
        assert rms_error(got, right) < 1e-13
    if recorded:
        seconds = [torch.autograd.grad(sum(g.sin().sum() for g in gs), leaves) for gs in (pulled, want)]
        for got, right in zip(*seconds, strict=True):
            assert rms_error(got, right) < 1e-12


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_sine_and_cosine_from_one_tangent_lose_nothing(scale):
    """Against torch's own sine and cosine of the same float32 angles."""
    x, grad, frequency, phase = given(dtype=torch.float32)
    x = x * scale
    wide = [t.double() for t in (x, grad, frequency, phase)]
    with torch.enable_grad():
        truth, own = Sine(5).pullback(*wide), Sine(5).pullback(x, grad, frequency, phase)
    with torch.no_grad():
        ours = Sine(5).pullback(x, grad.clone(), frequency, phase)
    for got, plain, want in zip(ours, own, truth, strict=True):
        assert rms(got.double() - want) < 2 * rms(plain.double() - want) + 1e-7 * rms(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_poles_of_the_tangent_are_passed(dtype):
    """Angles of odd multiples of pi, as near as the dtype has them, and next to them."""
    centre = torch.tensor([[k * math.pi for k in (-7, -3, -1, 1, 3, 5, 1001)]], dtype=torch.float64).to(dtype)
    x = torch.cat([centre, centre.nextafter(centre + 1), centre.nextafter(centre - 1)], 1)
    one, none = torch.ones(1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    with torch.no_grad():
        sin, cos, _ = Sine(1).pullback(x, torch.ones_like(x).unsqueeze(-2), one, none)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(sin.squeeze(-2), torch.sin(x), rtol=8 * eps, atol=0)
    torch.testing.assert_close(cos, torch.cos(x), rtol=4 * eps, atol=0)


@modes
def test_nan_and_infinity_reach_every_function_and_nothing_else(recorded):
    for value in (math.nan, math.inf):
        x, grad, *own = given()
        x[1, 7] = value
        with torch.set_grad_enabled(recorded):
            values, below, _ = Sine(5).pullback(x, grad, *own)
        for tensor in (values.movedim(-2, 0), below.unsqueeze(0)):
            assert tensor[:, 1, 7].isnan().all()
            assert tensor.isnan().sum() == len(tensor)


def test_functions_can_be_mapped_over_without_recording():
    x, _, *own = given(4)
    with torch.no_grad():
        values = Sine(5).values(x, *own)
        assert rms_error(torch.vmap(lambda x: Sine(5).values(x, *own))(x), values) < 1e-15
        phases = torch.stack([own[1], own[1] + 1])  # an ensemble that shares x and the frequencies
        ensemble = torch.vmap(lambda phase: Sine(5).values(x, own[0], phase))(phases)
    assert rms_error(ensemble[0], values) < 1e-15
    assert rms_error(ensemble[1], definition(x, own[0], own[1] + 1)) < 1e-14
