"""What all arithmetic units have in common: bias, precision, options, starts from nn.Linear, imports."""

import math
import re

import pytest
import torch
from torch import nn

from archzoo import create_layer
from archzoo.layers.arithmetic import INALU, MCFC, NAC, NALU, NAU, NMU, NPU, RealNPU, SparsitySchedule
from archzoo.registry import get_layer
from tests.helpers import RecordOps, rms_error
from tests.layers.arithmetic_units import UNITS, linear, randn


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


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(NAU(3, 2)) == "NAU(3, 2, bias=False)"
    unit = NMU(3, 2, bias=True, noise=(1, 5), init="identity", sparsity_weight=2.0)
    assert repr(unit) == "NMU(3, 2, bias=True, noise=(1, 5), init='identity', sparsity_weight=2.0)"
    assert repr(NAC(3, 2, mode="multiply")) == "NAC(3, 2, bias=False, mode='multiply')"
    assert repr(NALU(3, 2, shared=False, gate_bias=True)) == "NALU(3, 2, bias=False, shared=False, gate_bias=True)"


def test_which_units_bend_their_input():
    assert {name for name in UNITS if get_layer(name).nonlinear} == {"inalu", "nalu", "nmu", "npu", "real_npu"}


# --- Starts from nn.Linear --------------------------------------------------------------------------------------------


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


# --- Where the units are found ----------------------------------------------------------------------------------------


def test_units_are_one_class_wherever_they_are_imported_from():
    import archzoo
    from archzoo.layers import arithmetic

    for name in UNITS:
        cls = get_layer(name).cls
        assert getattr(arithmetic, cls.__name__) is getattr(archzoo.layers, cls.__name__) is cls
    assert archzoo.layers.SparsitySchedule is SparsitySchedule
