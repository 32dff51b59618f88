"""iNALU against its equation."""

import math

import torch

from archzoo.layers.arithmetic import INALU
from tests.layers.arithmetic_units import randn


def test_inalu():
    unit = INALU(3, 2, dtype=torch.float64, max_exponent=2.0)
    unit.gate.data = randn(2)
    x = torch.tensor([[-1.0, 2, 0.5], [30, -20, -10], [0, 1, 1]], dtype=torch.float64)
    a = unit.w_hat.tanh() * unit.m_hat.sigmoid()
    m = unit.w_hat_mul.tanh() * unit.m_hat_mul.sigmoid()
    size = torch.exp(torch.minimum(torch.log(x.abs().clamp(min=1e-7)) @ m.T, torch.tensor(2.0)))
    sign = torch.prod(x.sign()[:, None] * m.abs() + 1 - m.abs(), -1)
    g = unit.gate.sigmoid()
    assert torch.allclose(unit(x), g * (x @ a.T) + (1 - g) * size * sign)
    assert (size == math.exp(2)).any()
    big = INALU(100, 300)
    for parameter, mean in ((big.w_hat, 0.88), (big.w_hat_mul, 0.88), (big.m_hat, 0.5), (big.m_hat_mul, 0.5)):
        assert abs(parameter.mean().item() - mean) < 0.01
        assert abs(parameter.std().item() - 0.2) < 0.01
    assert abs(big.gate.std().item() - 0.2) < 0.05
