"""NAC and NALU: forward, init, and how far their weights are from integers."""

import pytest
import torch

from archzoo.layers.arithmetic import NAC, NALU
from tests.layers.arithmetic_units import linear, randn


def test_nac_in_both_modes():
    unit = NAC(3, 2, dtype=torch.float64)
    w = torch.tanh(unit.w_hat) * torch.sigmoid(unit.m_hat)
    x = randn(5, 3)
    assert torch.equal(unit.weight, w)
    assert torch.allclose(unit(x), x @ w.T)
    unit.mode = "multiply"
    want = torch.stack([(x.abs() + 1e-7).pow(row).prod(1) for row in w], 1)
    assert torch.allclose(unit(x), want)
    with pytest.raises(AttributeError):
        unit.weight = w
    unit.w_hat.data.mul_(2)  # the weight follows the parameters: two public ports computed it once
    assert not torch.equal(unit.weight, w)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("gate_bias", [True, False])
def test_nalu(shared, gate_bias):
    unit = NALU(3, 2, shared=shared, gate_bias=gate_bias, dtype=torch.float64)
    names = {"gate_weight", "w_hat", "m_hat"} | ({"gate_bias"} if gate_bias else set())
    names |= set() if shared else {"w_hat_mul", "m_hat_mul"}
    assert dict(unit.named_parameters()).keys() == names
    if gate_bias:
        assert torch.equal(unit.gate_bias, torch.zeros(2, dtype=torch.float64))
        unit.gate_bias.data = randn(2)
    x = randn(5, 3)
    w = unit.w_hat.tanh() * unit.m_hat.sigmoid()
    m = w if shared else unit.w_hat_mul.tanh() * unit.m_hat_mul.sigmoid()
    g = torch.sigmoid(x @ unit.gate_weight.T + (unit.gate_bias if gate_bias else 0))
    want = g * (x @ w.T) + (1 - g) * torch.exp(torch.log(x.abs() + 1e-7) @ m.T)
    assert torch.allclose(unit(x), want)
    assert torch.equal(unit.weight_mul, m)


def test_nalu_fails_for_the_published_reason():
    """The product is blind to signs, and explodes near 0 where a weight is negative."""
    unit = NALU(2, 1, gate_bias=True, dtype=torch.float64)
    unit.gate_bias.data.fill_(-40)  # multiply
    x = randn(5, 2)
    assert torch.allclose(unit(x), unit(x.abs()))
    unit.w_hat.data.fill_(-20)
    unit.m_hat.data.fill_(20)
    assert unit(torch.zeros(2, dtype=torch.float64)).item() == pytest.approx(1e14, rel=1e-6)


@pytest.mark.parametrize(
    ("features", "outputs"),
    [(2, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (100, 2), (300, 300)))],
)
def test_init_of_nac_has_the_variance_of_glorot(features, outputs):
    samples = torch.cat(
        [NAC(features, outputs).weight.detach().flatten() for _ in range(60000 // features // outputs + 1)]
    )
    want = 2 / max(features + outputs, 5)
    assert abs(samples.var().item() / want - 1) < 0.05


def test_init_of_nalu_gate_is_xavier():
    w = NALU(300, 200).gate_weight
    assert abs(w.std().item() / (2 / 500) ** 0.5 - 1) < 0.02
    assert w.abs().max() <= (6 / 500) ** 0.5


def test_nac_starts_in_single_and_half_precision():
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        original = linear([[0.5, -0.9, 0.0, 1.0, 1 - 2**-24]], dtype=dtype)
        unit, _ = NAC.from_linear(original)
        assert unit.weight.dtype == dtype
        assert unit.w_hat.isfinite().all()
        assert unit.m_hat.isfinite().all()
        assert torch.allclose(unit.weight[:, :3], original.weight[:, :3], atol=tolerance)


def test_sparsity_error_of_nac_and_nalu_is_of_their_weights():
    for unit in (NAC(3, 2), NALU(3, 2), NALU(3, 2, shared=False)):
        weights = [unit.weight] if isinstance(unit, NAC) else [unit.weight, unit.weight_mul]
        worst = max(min(abs(w), abs(1 - abs(w))) for weight in weights for w in weight.flatten().tolist())
        assert unit.sparsity_error() == pytest.approx(worst, rel=1e-6)
        assert isinstance(unit.sparsity_error(), float)
