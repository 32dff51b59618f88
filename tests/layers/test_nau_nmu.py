"""NAU and NMU: forward, init, the losses that pull weights to integers, the stochastic NMU."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.layers.arithmetic import NAU, NMU, SparsitySchedule
from tests.helpers import layer_value_and_grads, rms_error
from tests.layers.arithmetic_units import BOXED, randn, with_weight

# --- Forward ----------------------------------------------------------------------------------------------------------


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


def test_an_option_that_is_spoilt_later_is_noticed():
    unit = NAU(3, 2)
    unit.sparsity = "cubic"
    with pytest.raises(ValueError, match="^sparsity='cubic'"):
        unit.regularization_loss()
    unit = NMU(3, 2)
    unit.constraint = "clamp"
    with pytest.raises(ValueError, match="^constraint='clamp'"):
        unit.constrain_()


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


@pytest.mark.slow
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
