"""NPU and RealNPU against the power products that they are."""

import math

import pytest
import torch

from archzoo.layers.arithmetic import NPU, RealNPU
from tests.layers.arithmetic_units import randn, with_weight


def test_npu_is_a_complex_power_product():
    """With open gates y is the real part of prod x^(W + iV), x^w = exp(w log x)."""
    unit = NPU(3, 2, dtype=torch.float64)
    assert torch.equal(unit.weight_im, torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(unit.gate, torch.full((3,), 0.5, dtype=torch.float64))
    x = randn(5, 3)
    real = RealNPU(3, 2, dtype=torch.float64)
    real.load_state_dict({"weight": unit.weight.detach(), "gate": unit.gate.detach()})
    assert torch.allclose(unit(x), real(x), rtol=1e-13)
    for gate in (1.0, 7.0):  # clamped
        unit.gate.data.fill_(gate)
        unit.weight_im.data = randn(2, 3)
        power = torch.complex(unit.weight, unit.weight_im)
        want = torch.exp(torch.log(torch.complex(x, torch.zeros_like(x))) @ power.T).real
        assert torch.allclose(unit(x), want, rtol=1e-12)
    unit.gate.data.fill_(0)
    assert torch.allclose(unit(x), torch.ones(5, 2, dtype=torch.float64))


def test_real_npu_divides_and_takes_roots():
    unit = with_weight(RealNPU, [[1, -1], [2, 0], [0.5, 0]])
    unit.gate.data.fill_(1)
    x = torch.tensor([[9.0, -2.0]], dtype=torch.float64)
    assert torch.allclose(unit(x), torch.tensor([[-4.5, 81, 3]], dtype=torch.float64))
    half = 0.5 * (3 + torch.finfo(torch.float64).eps) + 0.5
    unit = with_weight(RealNPU, [[2.0]])
    want = half**2 * math.cos(2 * math.pi * 0.5)
    assert unit(torch.tensor([-3.0], dtype=torch.float64)).item() == pytest.approx(want, rel=1e-14)
