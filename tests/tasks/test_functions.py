"""The functions: their formulas, their domains, exact test targets, and points that no option moves."""

import math
import re

import numpy as np
import pytest
import scipy.special
import torch

from archzoo.models.kan import KAN
from archzoo.tasks.functions import FUNCTIONS, Functions

EARLIER_INPUTS = [[-0.20938603579998016, 0.7189021110534668], [-0.3098287880420685, 0.3604990243911743]]
EARLIER_TARGETS = [0.9097716808319092, 0.49816766381263733]


def columns(split):
    return split.inputs.double().numpy().T


def box(name):
    """Low and high ends of a function's inputs, (inputs, 1) each."""
    ends = np.array(FUNCTIONS[name].ranges or [(-1.0, 1.0)] * FUNCTIONS[name].inputs)
    return ends[:, :1], ends[:, 1:]


def test_the_five_toy_functions_the_fifteen_special_ones_and_the_formulas_of_physics():
    toy = {name: f for name, f in FUNCTIONS.items() if not name.startswith("feynman_")}
    assert len(toy) == 20
    assert len(FUNCTIONS) == 42
    assert {name: f.inputs for name, f in toy.items() if f.inputs != 2} == {
        "j0": 1,
        "exp_sin_4d": 4,
        "exp_mean_100d": 100,
    }
    assert all(f.ranges == () for f in toy.values())


def test_the_points_and_values_of_the_first_twenty_are_those_of_earlier_versions():
    split = Functions(function="exp_sin").train
    assert split.inputs[:2].tolist() == EARLIER_INPUTS
    assert split.targets[:2, 0].tolist() == EARLIER_TARGETS


@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if f.text])
def test_what_is_computed_is_what_is_written(name):
    sympy = pytest.importorskip("sympy")
    function = FUNCTIONS[name]
    symbols = sympy.symbols([f"x{i}" for i in range(function.inputs)])
    written = sympy.sympify(function.text)
    assert written.free_symbols == set(symbols)
    low, high = box(name)
    points = low + (high - low) * np.random.RandomState(1).rand(function.inputs, 50)
    np.testing.assert_allclose(function.formula(*points), sympy.lambdify(symbols, written)(*points), rtol=1e-12)
    task = Functions(function=name, train_size=10, test_size=10)
    assert task.formula == function.text


def test_the_truth_is_exact_where_targets_are_rounded_or_noisy():
    task = Functions(function="feynman_i_27_6", noise=0.1)
    for split in (task.train, task.test):
        truth = task.truth(split.inputs)
        assert (truth.dtype, truth.shape) == (torch.float64, split.targets.shape)
        x, y = columns(split)
        assert np.array_equal(truth.numpy()[:, 0], 1 / (1 + x * y))
    assert torch.equal(task.truth(task.test.inputs).float(), task.test.targets)


def test_a_kan_of_the_hidden_levels_has_an_edge_for_every_input():
    known = [name for name, f in FUNCTIONS.items() if f.hidden]
    assert set(known) == {name for name, f in FUNCTIONS.items() if f.text}
    for name in known:
        task = Functions(function=name, train_size=10, test_size=10)
        model = KAN([FUNCTIONS[name].inputs, *task.hidden, 1])
        assert model(task.train.inputs).shape == (10, 1)
    assert Functions(function="j0", train_size=10, test_size=10).hidden == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_points_fill_the_box_and_values_are_finite_and_exact(name):
    task = Functions(function=name)
    for split in (task.train, task.val, task.test):
        assert split.inputs.shape == (1000, FUNCTIONS[name].inputs)
        low, high = box(name)
        unit = (columns(split) - low) / (high - low)
        assert (unit.min(1) > -1e-7).all()
        assert (unit.max(1) < 1 + 1e-7).all()
        assert (unit.min() < 0.01) & (unit.max() > 0.99)
        assert split.targets.shape == (1000, 1)
        assert torch.isfinite(split.targets).all()
        assert split.targets.std() > 0.01
        values = FUNCTIONS[name].formula(*columns(split)).astype(np.float32)
        assert np.array_equal(split.targets.numpy()[:, 0], values)


def test_toy_functions_have_the_papers_formulas():
    rng = np.random.RandomState(1)
    for name, formula in {
        "j0": lambda x: scipy.special.jv(0, 20 * x[0]),
        "exp_sin": lambda x: math.exp(math.sin(math.pi * x[0]) + x[1] ** 2),
        "xy": lambda x: x[0] * x[1],
        "exp_mean_100d": lambda x: math.exp(sum(math.sin(math.pi * v / 2) ** 2 for v in x) / 100),
        "exp_sin_4d": lambda x: math.exp(
            0.5 * (math.sin(math.pi * (x[0] ** 2 + x[1] ** 2)) + math.sin(math.pi * (x[2] ** 2 + x[3] ** 2)))
        ),
    }.items():
        points = rng.uniform(-1, 1, (20, FUNCTIONS[name].inputs))
        np.testing.assert_allclose(FUNCTIONS[name].formula(*points.T), [formula(x) for x in points], rtol=1e-12)


def test_special_functions_have_the_arguments_that_the_docstring_says():
    x, y = np.random.RandomState(1).uniform(-1, 1, (2, 20))
    u, v, w = (x + 1) / 2, (y + 1) / 2, 0.1 + 0.9 * (y + 1) / 2
    for name, expected in {
        "ellipj": scipy.special.ellipj(u, v)[0],
        "ellipkinc": scipy.special.ellipkinc(u, v),
        "yv": scipy.special.yv(u, w),
        "kv": scipy.special.kv(u, w),
        "jv": scipy.special.jv(u, v),
        "lpmv_2": scipy.special.lpmv(2, u, v),
    }.items():
        np.testing.assert_allclose(FUNCTIONS[name].formula(x, y), expected, rtol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(0, 1), (1, 1), (0, 2), (1, 2), (2, 2)])
def test_spherical_harmonics_have_unit_norm_on_the_sphere(m, n):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    x = (np.arange(64) + 0.5) / 32 - 1  # longitudes / pi
    colatitude = np.arccos(nodes)
    values = FUNCTIONS[f"sph_harm_{m}_{n}"].formula(x[None], (2 * colatitude / np.pi - 1)[:, None])
    norm = (values**2 * weights[:, None]).sum() * 2 * np.pi / 64
    assert norm == pytest.approx(1 if m == 0 else 0.5, rel=1e-10)  # the real part of a complex one holds one half
    if hasattr(scipy.special, "sph_harm_y"):
        expected = scipy.special.sph_harm_y(n, m, colatitude[:, None], np.pi * x[None]).real
        np.testing.assert_allclose(values, expected, atol=1e-12)


def test_no_option_moves_the_points_of_another_part():
    base = Functions()
    longer = Functions(train_size=2000, noise=0.5)
    assert torch.equal(longer.train.inputs[:1000], base.train.inputs)
    for split in ("val", "test"):
        assert torch.equal(getattr(longer, split).inputs, getattr(base, split).inputs)
    assert torch.equal(longer.test.targets, base.test.targets)
    for noisy, exact in ((longer.val, base.val), (longer.train, Functions(train_size=2000).train)):
        noise = noisy.targets - exact.targets
        assert noise.std().item() == pytest.approx(0.5, rel=0.1)
        assert abs(noise.mean().item()) < 0.05


def test_score_is_the_root_mean_squared_error():
    task = Functions(function="xy")
    metrics = task.metrics()
    output = task.test.targets + torch.tensor([3e-4, -3e-4]).repeat(500)[:, None]
    metrics.update(output[:300], task.test.targets[:300])
    metrics.update(output[300:], task.test.targets[300:])
    assert metrics.compute()[task.score].item() == pytest.approx(3e-4, rel=1e-3)
    assert task.mode == "min"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "jo"}, "function='jo': there is no such function; did you mean 'jv' or 'j0'?"),
        ({"function": "exp_sine"}, "did you mean 'exp_sin'"),
        ({"function": None}, "function=None"),
        ({"train_size": 0}, "train_size=0"),
        ({"train_size": 10**12}, "train_size=1000000000000"),
        ({"test_size": 1.5}, "test_size=1.5"),
        ({"noise": -1.0}, "noise=-1.0: must be from 0 to 1e+06"),
        ({"noise": math.nan}, "noise=nan"),
        ({"noise": "loud"}, "noise='loud'"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Functions(**options)
