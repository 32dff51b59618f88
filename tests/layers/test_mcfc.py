"""MC-FC conserves mass, and multiplies positive inputs."""

import torch

from archzoo.layers.arithmetic import MCFC
from tests.layers.arithmetic_units import randn


def test_mcfc_conserves_mass():
    unit = MCFC(5, 3, dtype=torch.float64)
    x = randn(4, 5)
    assert torch.allclose(unit(x).sum(1), 0.5 * x.sum(1))  # the gates are half open
    unit.gate.data = randn(3)
    assert torch.allclose(unit(x), unit.gate.sigmoid() * (x @ unit.junction.softmax(-1)))
    assert torch.allclose(unit.junction.T @ unit.junction, torch.eye(3, dtype=torch.float64), atol=1e-12)


def test_mcfc_multiplies_positive_inputs():
    unit = MCFC(2, 3, mode="multiply", dtype=torch.float64)
    assert unit.junction.shape == (2, 4)
    assert torch.equal(unit.log_bias, torch.zeros(3, dtype=torch.float64))
    unit.gate.data, unit.log_bias.data = randn(4), randn(3)
    x = torch.rand(4, 2, dtype=torch.float64) + 0.1
    want = (unit.gate.sigmoid() * (x.log() @ unit.junction.softmax(-1)))[:, :-1] + unit.log_bias
    assert torch.allclose(unit(x), want.exp())
    assert unit(-x).isnan().all()
