"""Facts of the arithmetic units: equations, init, the regularisers, and results that are cheap to redo."""

import copy
import io
import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo import create_layer
from archzoo.layers.arithmetic import INALU, MCFC, NAC, NALU, NAU, NMU, NPU, RealNPU, SparsitySchedule
from archzoo.registry import get_layer
from tests.helpers import RecordOps, layer_value_and_grads, rms_error

UNITS = ["inalu", "mcfc", "nac", "nalu", "nau", "nmu", "npu", "real_npu"]
BOXED = [NAU, NMU]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def with_weight(cls, rows, **options):
    weight = torch.tensor(rows, dtype=torch.float64)
    unit = cls(weight.shape[1], weight.shape[0], dtype=torch.float64, **options)
    unit.weight.data.copy_(weight)
    return unit


# --- Forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
def test_no_bias_by_default_and_a_zero_one_is_added_last(name):
    unit = create_layer(name, 3, 2)
    assert unit.bias is None
    torch.manual_seed(0)
    with_bias = create_layer(name, 3, 2, bias=True)
    assert torch.equal(with_bias.bias, torch.zeros(2))
    unit.load_state_dict({k: v for k, v in with_bias.state_dict().items() if k != "bias"})
    with_bias.bias.data = torch.tensor([5.0, -7.0])
    x = torch.rand(4, 3)
    assert torch.allclose(with_bias(x), unit(x) + with_bias.bias, rtol=1e-6)
    if hasattr(unit, "constrain_"):
        with_bias.constrain_()
        assert with_bias.bias.tolist() == [5, -7]
        with_bias.sparsity_weight = 1.0
        with_bias.regularization_loss().backward()
        assert with_bias.bias.grad is None


def test_nau_adds_with_clamped_weights():
    unit = with_weight(NAU, [[1, -1, 0], [3, -0.5, -4]])
    x = randn(5, 3)
    assert torch.allclose(unit(x), torch.stack([x[:, 0] - x[:, 1], x[:, 0] - 0.5 * x[:, 1] - x[:, 2]], 1))
    unit = with_weight(NAU, [[1, -1, 1.01, -1.01, 0.3]])  # the ends are inside
    unit(torch.ones(5, dtype=torch.float64)).backward()
    assert unit.weight.grad.tolist() == [[1, 1, 0, 0, 1]]


def test_nmu_multiplies_the_chosen_inputs():
    unit = with_weight(NMU, [[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]])
    x = torch.tensor([[2.0, -3, 7], [0, 5, 1e-9]], dtype=torch.float64)
    assert unit(x).tolist() == [[-6, 7, 1, -42], [0, 1e-9, 1, 0]]


def test_nmu_uses_the_raw_weight_in_clip_mode_and_clamps_in_penalty_mode():
    x = torch.tensor([2.0, 3.0], dtype=torch.float64)
    unit = with_weight(NMU, [[1.5, -0.5]])
    assert unit(x).item() == pytest.approx((1.5 * 2 - 0.5) * (-0.5 * 3 + 1.5))
    unit.weight.data[0, 1] = -0.25
    unit(x).backward()
    assert (unit.weight.grad != 0).all()
    unit.constraint = "penalty"
    assert unit(x).item() == 2
    unit.weight.data.copy_(torch.tensor([[1.0, 0.0]]))  # the ends are inside
    unit.weight.grad = None
    unit(x).backward()
    assert unit.weight.grad.tolist() == [[1, 4]]
    clamped = with_weight(NAU, [[1.5, -3]], constraint="penalty")
    assert clamped(x).item() == 2 - 3


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


# --- Init -------------------------------------------------------------------------------------------------------------


def test_init_of_nau_and_nmu():
    for features, outputs in ((3, 2), (300, 200)):
        bound = min(0.5, (6 / (features + outputs)) ** 0.5)
        w = NAU(features, outputs).weight
        assert w.abs().max() <= bound
        assert w.abs().max() > 0.7 * bound
    w = NMU(300, 200).weight
    assert 0.25 <= w.min() < 0.251
    assert 0.749 < w.max() <= 0.75
    w = NMU(300, 200, init="identity").weight
    assert 0 <= w.min() < 1e-4
    assert 0.99 * 2 / 300 < w.max() <= 2 / 300


@pytest.mark.parametrize(("features", "outputs"), [(1, 1), (2, 2), (100, 2), (300, 300)])
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


def test_a_wide_nmu_is_dead_at_birth_unless_it_starts_near_the_identity():
    """The numeric range: E[y] at init halves with each standardised input."""
    x = torch.randn(64, 256)
    dead, alive = NMU(256, 8), NMU(256, 8, init="identity")
    assert dead(x).abs().median() < torch.finfo(torch.float32).tiny
    y = layer_value_and_grads(alive, x)
    assert 1e-3 < y["y"].abs().median() < 10
    assert y["weight"].abs().median() > 1e-6


# --- Regularisers -----------------------------------------------------------------------------------------------------


def test_losses_of_nau():
    unit = with_weight(NAU, [[1, 0.25, -0.75], [1.5, -2, 0]])
    assert unit.sparsity_loss().item() == pytest.approx((0 + 0.25 + 0.25 + 0.5 + 1 + 0) / 6)
    assert unit.bounds_loss().item() == pytest.approx((0.5 + 1) / 6)
    assert unit.sparsity_error() == 1
    assert isinstance(unit.sparsity_error(), float)
    unit.sparsity = "squared"
    want = [0, 0.25**2 * 0.75**2, 0.75**2 * 0.25**2, 1.5**2 * 0.5**2, 4 * 1, 0]
    assert unit.sparsity_loss().item() == pytest.approx(sum(want) / 6)
    assert unit.bounds_loss().item() == pytest.approx((0.25 + 1) / 6)


def test_losses_of_nmu():
    unit = with_weight(NMU, [[1, 0.25, 0.625], [1.5, -0.5, 0]])
    assert unit.sparsity_loss().item() == pytest.approx((0 + 0.25 + 0.375 + 0.5 + 0.5 + 0) / 6)
    assert unit.bounds_loss().item() == pytest.approx((0.5 + 0.5) / 6)
    assert unit.sparsity_error() == 0.5
    unit.sparsity = "squared"
    want = [0, 0.25**2 * 0.75**2, 0.625**2 * 0.375**2, 1.5**2 * 0.5**2, 0.5**2 * 1.5**2, 0]
    assert unit.sparsity_loss().item() == pytest.approx(sum(want) / 6)
    assert unit.bounds_loss().item() == pytest.approx((0.25 + 0.25) / 6)


@pytest.mark.parametrize("cls", BOXED)
@pytest.mark.parametrize("sparsity", ["linear", "squared"])
def test_the_sparsity_loss_pulls_weights_to_integers_from_both_sides(cls, sparsity):
    start = [0.1, 0.9, -0.1, 1.1] + ([-0.9, -1.1] if cls is NAU else [])
    unit = with_weight(cls, [start], sparsity=sparsity)
    unit.sparsity_loss().backward()
    moved = unit.weight - 1e-3 * unit.weight.grad
    target = torch.tensor(start).round()
    assert ((moved - target).abs() < (unit.weight - target).abs()).all()


def test_regularization_loss_adds_what_is_switched_on():
    unit = with_weight(NAU, [[0.25, 2.0]])
    zero = unit.regularization_loss()
    assert zero.shape == ()
    assert zero.item() == 0
    unit.sparsity_weight = 3.0
    assert unit.regularization_loss().item() == pytest.approx(3 * (0.25 + 1) / 2)
    unit.bounds_weight = 10.0
    assert unit.regularization_loss().item() == pytest.approx(3 * (0.25 + 1) / 2)
    unit.constraint = "penalty"
    assert unit.regularization_loss().item() == pytest.approx(3 * (0.25 + 1) / 2 + 10 * 1 / 2)
    unit.input_weight = 5.0
    unit(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    inputs = ((1 - 0.25) * 1 + (1 - 2) * 4) / 2
    assert unit.regularization_loss().item() == pytest.approx(3 * (0.25 + 1) / 2 + 10 * 1 / 2 + 5 * inputs)


@pytest.mark.parametrize("cls", BOXED)
def test_input_loss_averages_all_rows_since_the_last_constrain(cls):
    unit = with_weight(cls, [[1, 0.25, 0], [0, 0.5, 1]], input_weight=1.0)
    first, second = randn(4, 3).requires_grad_(), randn(2, 5, 3).requires_grad_()
    assert unit.input_loss().item() == 0
    unit(first)
    unit(second)
    unit.eval()
    unit(randn(7, 3))  # not of the training
    m = torch.cat([first, second.view(10, 3)]).mean(0)
    neutral = 0 if cls is NAU else 1
    want = ((1 - unit.weight.abs()) * (neutral - m) ** 2).mean()
    assert torch.allclose(unit.input_loss(), want)
    assert torch.allclose(
        torch.autograd.grad(unit.input_loss(), second)[0], torch.autograd.grad(want, second)[0], rtol=1e-12
    )
    unit.constrain_()
    assert unit.input_loss().item() == 0
    unit.train()
    unit(torch.zeros(0, 3, dtype=torch.float64))


@pytest.mark.parametrize("cls", BOXED)
def test_stored_inputs_do_not_get_in_the_way_of_copies(cls):
    unit = cls(3, 2, input_weight=1.0)
    unit(torch.randn(4, 3).requires_grad_())
    assert copy.deepcopy(unit).input_loss().item() == 0
    torch.save(unit, io.BytesIO())
    assert unit.input_loss().item() != 0, "the original forgot"
    idle = cls(3, 2)
    idle(torch.randn(4, 3))
    assert idle._input_sum is None, "inputs are stored though nobody asked"


@pytest.mark.parametrize("cls", BOXED)
def test_the_training_loop_compiles_with_stored_inputs(cls):
    torch._dynamo.reset()
    unit, twin = cls(3, 2, input_weight=0.5), cls(3, 2, input_weight=0.5)
    twin.load_state_dict(unit.state_dict())
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 3)
        losses = []
        for module, call in ((unit, compiled), (twin, twin)):
            module.zero_grad()
            loss = call(x).square().mean() + call(x + 1).mean() + module.regularization_loss()
            loss.backward()
            losses.append(loss.detach())
            module.constrain_()
        assert torch.allclose(*losses)
        assert torch.allclose(unit.weight.grad, twin.weight.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("cls", BOXED)
def test_constrain_clamps_in_clip_mode_only_and_round_makes_a_formula(cls):
    low = -1 if cls is NAU else 0
    start = [[-3.0, -0.7, -0.2], [0.3, 0.8, 2.0]]
    unit = with_weight(cls, start)
    unit.constrain_()
    assert torch.equal(unit.weight, torch.tensor(start, dtype=torch.float64).clamp(low, 1))
    unit.round_()
    assert unit.weight.tolist() == [[low, low, 0], [0, 1, 1]]
    assert unit.sparsity_error() == 0
    assert unit.weight.requires_grad
    free = with_weight(cls, start, constraint="penalty")
    free.constrain_()
    assert free.weight.tolist() == start
    free.round_()
    assert free.weight.tolist() == [[low, low, 0], [0, 1, 1]]


def test_schedule_warms_up_every_unit():
    schedule = SparsitySchedule(10.0, 1e6, 2e6)
    assert [schedule(t) for t in (0, 10**6, 1_250_000, 2 * 10**6, 5 * 10**6)] == [0, 0, 2.5, 10, 10]
    assert isinstance(schedule(0), float)
    model = nn.Sequential(NAU(4, 2), nn.Sequential(NMU(2, 1)), nn.Linear(1, 1))
    schedule.apply_(model, 1_500_000)
    assert [model[0].sparsity_weight, model[1][0].sparsity_weight] == [5, 5]
    assert not hasattr(model[2], "sparsity_weight")
    unit = NMU(2, 1)
    schedule.apply_(unit, 10**7)
    assert unit.sparsity_weight == 10
    for arguments, name in (
        ((-1.0, 0, 1), "weight"),
        ((1.0, -1, 1), "start"),
        ((1.0, 5, 5), "end"),
        ((1.0, 5, 4), "end"),
    ):
        with pytest.raises(ValueError, match=f"^{name}="):
            SparsitySchedule(*arguments)


# --- The stochastic NMU -----------------------------------------------------------------------------------------------


def test_noise_cancels_exactly_at_binary_weights_and_is_off_in_eval():
    binary = [list(bits) for bits in itertools.product([0, 1], repeat=3)]
    x = randn(20, 3)
    for noise in ((1, 5), "batch", (0.5, 0.5)):
        unit = with_weight(NMU, binary, noise=noise)
        before = x.clone()
        assert rms_error(unit(x), with_weight(NMU, binary)(x)) < 1e-15
        assert torch.equal(x, before), "the input was multiplied in place"
        half = NMU(3, 2, noise=noise)
        x32 = x.float()
        plain = NMU(3, 2)
        plain.load_state_dict(half.state_dict())
        assert torch.equal(half.eval()(x32), plain(x32))
        if noise != (0.5, 0.5):
            half.train()
            assert not torch.allclose(half(x32), half(x32)), "two draws are the same"


def test_noise_is_that_of_the_paper(monkeypatch):
    unit, x = with_weight(NMU, [[0.3, 0.6]]), randn(50, 2)
    drawn = torch.rand(50, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda like: drawn)
    plain = unit(x)
    for noise, high in (((1, 5), 5), ((2, 3), 3), ("batch", 1 + 1 / x.std())):
        unit.noise = noise
        n = (2 if noise == (2, 3) else 1) + drawn * (high - (2 if noise == (2, 3) else 1))
        unit.noise = None
        want = unit(x * n) / unit(n)
        unit.noise = noise
        assert torch.allclose(unit(x), want, rtol=1e-13)
        assert not torch.allclose(want, plain)


def test_noise_in_half_precision_and_at_the_edges():
    binary = torch.eye(3)
    unit = NMU(3, 3, noise=(1, 5), dtype=torch.bfloat16)
    unit.weight.data.copy_(binary)
    x = torch.randn(20, 3, dtype=torch.bfloat16)
    assert torch.equal(unit(x), x), "n, rounded to bf16 with x, would not cancel"
    unit = NMU(3, 2, noise="batch")
    for shape in ((0, 3), (3,), (1, 3)):
        assert unit(torch.randn(shape)).isfinite().all()
    assert unit(torch.full((4, 3), 2.0)).isfinite().all()  # no spread, no noise
    assert NMU(1, 1, noise="batch")(torch.ones(1, 1)).isfinite().all()
    assert unit(torch.full((4, 3), torch.nan)).isnan().all()


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
def test_products_are_not_taken_in_half_precision_under_autocast(name):
    """Inputs and weights that bf16 holds exactly: only the result, or one GEMM, is rounded."""
    unit = create_layer(name, 6, 4, **({"mode": "multiply"} if name in ("nac", "mcfc") else {}))
    x = torch.rand(50, 6).bfloat16().float() + 1
    with torch.autocast("cpu", torch.bfloat16):
        y = unit(x)
    assert y.dtype == torch.bfloat16
    assert rms_error(y, unit(x)) < 6e-3


def test_only_the_nmu_and_the_sign_of_inalu_use_the_op():
    for name in UNITS:
        with RecordOps() as recorded:
            create_layer(name, 3, 2)(torch.rand(4, 3))
        used = torch.ops.archzoo.nmu_product in recorded.ops
        assert used == (name in ("nmu", "inalu")), name


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("nau", {"constraint": "clamp"}, r"^constraint='clamp': must be one of 'clip', 'penalty'"),
        ("nmu", {"sparsity": "l1"}, r"^sparsity='l1'"),
        ("nmu", {"init": "zeros"}, r"^init='zeros'"),
        ("nmu", {"noise": "on"}, r"^noise='on'"),
        ("nmu", {"noise": (0, 1)}, r"^noise=\(0, 1\)"),
        ("nmu", {"noise": (5, 1)}, r"^noise=\(5, 1\)"),
        ("nmu", {"noise": 3}, r"^noise=3"),
        ("nau", {"sparsity_weight": -1.0}, r"^sparsity_weight=-1.0"),
        ("nau", {"bounds_weight": math.inf}, r"^bounds_weight=inf"),
        ("nmu", {"input_weight": "1"}, r"^input_weight='1'"),
        ("nac", {"mode": "mul"}, r"^mode='mul'"),
        ("nac", {"eps": 0.0}, r"^eps=0.0"),
        ("nalu", {"eps": -1e-7}, r"^eps=-1e-07"),
        ("inalu", {"max_exponent": 0}, r"^max_exponent=0"),
        ("mcfc", {"mode": "times"}, r"^mode='times'"),
    ],
)
def test_bad_options_are_refused_by_name(name, options, text):
    with pytest.raises(ValueError, match=text):
        create_layer(name, 3, 2, **options)


def test_an_option_that_is_spoilt_later_is_noticed():
    unit = NAU(3, 2)
    unit.sparsity = "cubic"
    with pytest.raises(ValueError, match="^sparsity='cubic'"):
        unit.regularization_loss()
    unit = NMU(3, 2)
    unit.constraint = "clamp"
    with pytest.raises(ValueError, match="^constraint='clamp'"):
        unit.constrain_()


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(NAU(3, 2)) == "NAU(3, 2, bias=False)"
    unit = NMU(3, 2, bias=True, noise=(1, 5), init="identity", sparsity_weight=2.0)
    assert repr(unit) == "NMU(3, 2, bias=True, noise=(1, 5), init='identity', sparsity_weight=2.0)"
    assert repr(NAC(3, 2, mode="multiply")) == "NAC(3, 2, bias=False, mode='multiply')"
    assert repr(NALU(3, 2, shared=False, gate_bias=True)) == "NALU(3, 2, bias=False, shared=False, gate_bias=True)"


def test_which_units_bend_their_input():
    assert {name for name in UNITS if get_layer(name).nonlinear} == {"inalu", "nalu", "nmu", "npu", "real_npu"}


# --- Results that are cheap to redo -----------------------------------------------------------------------------------


def train(model, sample, target, steps, lr, schedule, watch=lambda step: None):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        schedule.apply_(model, step)
        x = sample()
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target(x)) + sum(unit.regularization_loss() for unit in model)
        loss.backward()
        optimizer.step()
        for unit in model:
            unit.constrain_()
        watch(step)


def test_one_nmu_learns_a_product_and_is_exact_once_rounded():
    """t = x1 x2 on U[1, 2], in fewer steps and at a higher rate than published; tested on U[2, 6]."""
    model = nn.Sequential(NMU(2, 1))
    train(
        model,
        sample=lambda: 1 + torch.rand(64, 2),
        target=lambda x: x.prod(-1, keepdim=True),
        steps=2000,
        lr=1e-2,
        schedule=SparsitySchedule(1.0, 1000, 1500),
    )
    assert model[0].sparsity_error() < 1e-3
    model[0].round_()
    x = 2 + 4 * torch.rand(1000, 2)
    assert torch.equal(model(x), x.prod(-1, keepdim=True))


def test_two_naus_learn_a_difference_of_sums():
    """Sub of the arithmetic task: 100 inputs, subsets of 25 that overlap by 12; judged as published, at 7e3 steps."""
    offset = int(torch.randint(63, ()))
    masks = torch.zeros(2, 100)
    masks[0, offset : offset + 25] = masks[1, offset + 13 : offset + 38] = 1

    def difference(x, masks=masks):
        a, b = (x @ masks.T).unbind(-1)
        return (a - b)[:, None]

    model = nn.Sequential(NAU(100, 2), NAU(2, 1))
    validation, test = 1 + torch.rand(1000, 100), 2 + 4 * torch.rand(1000, 100)
    errors = []

    def watch(step):
        if step % 250 == 0:
            with torch.no_grad():
                errors.append(tuple(F.mse_loss(model(x), difference(x)).item() for x in (validation, test)))

    schedule = SparsitySchedule(0.01, 5e3, 5e4)
    train(model, lambda: 1 + torch.rand(128, 100), difference, steps=7001, lr=1e-3, schedule=schedule, watch=watch)
    off = masks.double() + 1e-5 * (1 - 2 * masks.double())  # each weight of layer 1 off by 1e-5, layer 2 perfect
    threshold = F.mse_loss(difference(test.double(), off), difference(test.double(), masks.double())).item()
    assert min(errors)[1] < threshold, f"{min(errors)[1]:.1e}, threshold {threshold:.1e}"


# --- Starts from nn.Linear --------------------------------------------------------------------------------------------


def linear(rows, bias=True, dtype=torch.float64):
    weight = torch.tensor(rows, dtype=dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=dtype)
    layer.weight.data.copy_(weight)
    return layer


@pytest.mark.parametrize("cls", [NAU, NAC])
@pytest.mark.parametrize("bias", [True, False])
def test_start_is_exact_where_all_weights_fit(cls, bias):
    original = linear([[0.5, -0.75, 0.0], [0.1, -0.999, 0.9999]], bias).eval()
    unit, error = cls.from_linear(original)
    assert error == 0.0
    assert (unit.bias is not None) == bias
    assert not unit.training
    x = randn(20, 3)
    assert torch.allclose(unit(x), original(x), rtol=1e-12, atol=1e-12)
    original.weight.data.zero_()
    assert unit.weight.abs().sum() > 0  # no memory is shared
    assert cls.from_linear(original).error == 0.0


def test_nau_starts_exactly_on_the_ends_of_its_box():
    original = linear([[1.0, -1.0, 0.0]])
    unit, error = NAU.from_linear(original, constraint="penalty", sparsity_weight=0.5)
    assert error == 0.0
    assert (unit.constraint, unit.sparsity_weight) == ("penalty", 0.5)
    x = randn(20, 3)
    assert torch.equal(unit(x), original(x))
    unit.round_()
    assert torch.equal(unit.weight, original.weight)


@pytest.mark.parametrize(("cls", "nearest"), [(NAU, 1.0), (NAC, 0.999)])
def test_start_is_nearest_and_says_how_far_where_weights_do_not_fit(cls, nearest):
    original = linear([[3.0, -1.5, 0.0], [0.5, -0.25, 1.25]])
    unit, error = cls.from_linear(original)
    expected = torch.tensor([[nearest, -nearest, 0], [0.5, -0.25, nearest]], dtype=torch.float64)
    assert torch.allclose(unit.weight, expected, rtol=1e-12, atol=1e-12)
    x = randn(200_000, 3)
    difference = (unit(x) - original(x)).square().mean().sqrt()
    size = (original(x) - original.bias).square().mean().sqrt()
    assert error == pytest.approx((difference / size).item(), rel=0.01)


@pytest.mark.parametrize("cls", [NAU, NAC])
def test_started_unit_trains(cls):
    """Also from weights that are all 0, or at the ends: every parameter moves, and the loss goes down."""
    torch.manual_seed(0)
    target = linear([[0.4, -0.6, 0.2]])
    x = randn(200, 3)
    for rows in ([[0.0, 0.0, 0.0]], [[1.0, -1.0, 1.0]], [[2.0, -2.0, 0.0]]):
        unit, _ = cls.from_linear(linear(rows))
        start = {name: p.detach().clone() for name, p in unit.named_parameters()}
        optimizer = torch.optim.Adam(unit.parameters(), lr=0.05)
        losses = []
        for _ in range(100):
            loss = (unit(x) - target(x)).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            getattr(unit, "constrain_", lambda: None)()
        assert losses[-1] < 0.5 * losses[0]
        assert all((p != start[name]).all() for name, p in unit.named_parameters())


def test_nac_starts_in_single_and_half_precision():
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        original = linear([[0.5, -0.9, 0.0, 1.0, 1 - 2**-24]], dtype=dtype)
        unit, _ = NAC.from_linear(original)
        assert unit.weight.dtype == dtype
        assert unit.w_hat.isfinite().all()
        assert unit.m_hat.isfinite().all()
        assert torch.allclose(unit.weight[:, :3], original.weight[:, :3], atol=tolerance)


@pytest.mark.parametrize(
    ("cls", "options", "reason"),
    [
        (NMU, {}, "NMU multiplies its inputs"),
        (NALU, {}, r"its gate, sigmoid\(x G\^T\), is 1 for every x"),
        (NPU, {}, "NPU multiplies powers of its inputs"),
        (RealNPU, {}, "RealNPU multiplies powers of its inputs"),
        (INALU, {}, r"its gate, sigmoid\(g\), is 1"),
        (MCFC, {}, "positive shares that sum to 1"),
        (NAC, {"mode": "multiply"}, "mode='multiply': multiplies its inputs"),
    ],
)
def test_units_that_cannot_start_say_why_and_what_can(cls, options, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        cls.from_linear(nn.Linear(3, 2), **options)
    assert re.search("NA[UC].from_linear|use mode='add'", str(caught.value))


def test_wrong_originals_and_options_are_refused():
    for cls in (NAU, NAC):
        with pytest.raises(TypeError, match="Conv2d is not an nn.Linear"):
            cls.from_linear(nn.Conv2d(3, 2, 1))
        with pytest.raises(ValueError, match="bias=False: this is taken from the original"):
            cls.from_linear(nn.Linear(3, 2), bias=False)
        with pytest.raises(TypeError, match="no argument nois"):
            cls.from_linear(nn.Linear(3, 2), nois=1)


def test_sparsity_error_of_nac_and_nalu_is_of_their_weights():
    for unit in (NAC(3, 2), NALU(3, 2), NALU(3, 2, shared=False)):
        weights = [unit.weight] if isinstance(unit, NAC) else [unit.weight, unit.weight_mul]
        worst = max(min(abs(w), abs(1 - abs(w))) for weight in weights for w in weight.flatten().tolist())
        assert unit.sparsity_error() == pytest.approx(worst, rel=1e-6)
        assert isinstance(unit.sparsity_error(), float)


# --- Where the units are found ----------------------------------------------------------------------------------------


def test_units_are_one_class_wherever_they_are_imported_from():
    import archzoo
    from archzoo.layers import arithmetic

    for name in UNITS:
        cls = get_layer(name).cls
        assert getattr(arithmetic, cls.__name__) is getattr(archzoo.layers, cls.__name__) is cls
    assert archzoo.layers.SparsitySchedule is SparsitySchedule
