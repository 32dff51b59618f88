"""The arithmetic task: its formulas, the published thresholds, a stream that is a pure function, and the criterion."""

import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archzoo.layers.arithmetic import NAU
from archzoo.models.stacked import Stacked, build_stacked
from archzoo.report.stats import wilson
from archzoo.tasks.arithmetic import BLOCK, OPERATIONS, Arithmetic
from archzoo.tasks.seeds import median_interval, rate
from archzoo.tasks.stream import STREAM_LENGTH
from archzoo.training.config import ConfigError, validate
from archzoo.training.run import execute, load_model
from tests.training.support import make_config


def weights(task: Arithmetic) -> torch.Tensor:
    return torch.from_numpy(task.formula.weights)


@pytest.mark.parametrize(
    ("operation", "published"), [("mul", 0.16), ("add", 1.6e-5), ("sub", 1.4e-8), ("function10", 2.15e-6)]
)
def test_threshold_is_the_published_one(operation, published):
    assert Arithmetic(operation=operation).threshold == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_threshold_is_the_error_of_weights_that_are_off_by_epsilon(operation):
    task = Arithmetic(operation=operation, eval_size=2000)
    exact = weights(task)
    off = torch.where(exact == 1, exact - 1e-5, exact + 1e-5)
    value = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "squared": lambda a, b: a**2,
        "function10": lambda a, b: a * b,
    }[operation]
    x = task.test.inputs.double()
    right, wrong = (value(*(x @ w).unbind(1)) for w in (exact, off))
    assert task.threshold == pytest.approx((right - wrong).square().mean().item(), rel=1e-5)
    assert torch.equal(task.test.targets[:, 0], right.float())
    inputs, targets = task.train.__getitems__(range(100))
    assert torch.equal(targets[:, 0], value(*(inputs.double() @ exact).unbind(1)).float())


def test_subsets_are_runs_of_25_that_share_12_at_any_of_63_places():
    starts = set()
    for seed in range(400):
        a, b = (np.flatnonzero(column) for column in Arithmetic(seed=seed, eval_size=1).formula.weights.T)
        assert len(a) == len(b) == 25
        assert np.array_equal(a, np.arange(a[0], a[0] + 25))
        assert np.array_equal(b, a + 13)
        starts.add(int(a[0]))
    assert starts == set(range(63))


def test_ratios_are_of_the_inputs_and_of_the_subset_and_rounded_down():
    task = Arithmetic(input_size=100, subset_ratio=0.29, overlap_ratio=0.99, eval_size=1)  # 0.29 * 100 is 28.999...
    assert weights(task).sum(0).tolist() == [29, 29]
    assert weights(task).prod(1).sum() == 28
    pair = Arithmetic(input_size=2, subset_ratio=0.5, overlap_ratio=0.0, eval_size=10)  # t = x1 x2, for a single unit
    assert torch.equal(pair.val.targets[:, 0], pair.val.inputs.prod(1))


def test_function10_is_of_four_inputs():
    task = Arithmetic(operation="function10", eval_size=50)
    assert task.input_shape == (4,)
    x = task.test.inputs.double()
    assert torch.equal(task.test.targets[:, 0], (x[:, :2].sum(1) * x.sum(1)).float())


def test_ranges_are_of_the_right_split():
    task = Arithmetic(train_range=[-2, 2], test_range=[[2, 6], [-6, -2]])
    for split, low, high in ((task.val, -2, 2), (task.test, -6, 6)):
        x = split.inputs
        assert low <= x.min() < low + 0.01
        assert high - 0.01 < x.max() <= high
    assert task.test.inputs.abs().min() >= 2
    assert task.test.inputs.mean().abs() < 0.05  # either side as often
    assert task.test.inputs.abs().mean().item() == pytest.approx(4, abs=0.01)
    x, _ = task.train.__getitems__(range(5000))
    assert x.min() >= -2
    assert x.max() <= 2
    assert x.std().item() == pytest.approx(4 / 12**0.5, rel=0.01)


def test_run_seed_draws_samples_and_place_but_not_the_inputs_of_validation_and_test():
    first, other = Arithmetic(seed=0, eval_size=100), Arithmetic(seed=1, eval_size=100)
    assert not torch.equal(first.train[0][0], other.train[0][0])
    assert torch.equal(first.val.inputs, other.val.inputs)
    assert torch.equal(first.test.inputs, other.test.inputs)
    assert torch.equal(Arithmetic(eval_size=200).val.inputs[:100], first.val.inputs)
    Arithmetic(seed=-1, eval_size=1)
    Arithmetic(seed=2**70, eval_size=1)


def test_samples_are_pinned():
    """A resumed run must go on with the same samples, also after an upgrade of NumPy or torch."""
    inputs, targets = Arithmetic(eval_size=1).train[5 * BLOCK + 3]
    assert inputs[:3].tolist() == pytest.approx([1.0381056, 1.8471396, 1.3269004], abs=1e-7)
    assert targets.item() == pytest.approx(1433.650879, rel=1e-6)


STREAM = Arithmetic(eval_size=1).train
REFERENCE = STREAM.__getitems__(range(3 * BLOCK))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3 * BLOCK - 1), st.integers(1, 1500))
def test_consecutive_samples_do_not_depend_on_the_batch(start, size):
    indices = list(range(start, min(start + size, 3 * BLOCK)))
    inputs, targets = STREAM.__getitems__(indices)
    assert torch.equal(inputs, REFERENCE[0][indices])
    assert torch.equal(targets, REFERENCE[1][indices])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3 * BLOCK - 1), max_size=20))
def test_samples_in_any_order_are_the_same(indices):
    inputs, targets = STREAM.__getitems__(indices)
    assert torch.equal(inputs, REFERENCE[0][indices])
    assert torch.equal(targets, REFERENCE[1][indices])


def test_stream_is_fresh_and_has_no_end_in_sight():
    inputs, _ = STREAM.__getitems__(range(20 * BLOCK))
    assert len(inputs.unique(dim=0)) == 20 * BLOCK
    assert len(STREAM) == STREAM_LENGTH > 5e6 * 2**16
    assert STREAM[STREAM_LENGTH - 1][0].shape == (100,)
    assert abs(np.corrcoef(inputs[:-1, 0], inputs[1:, 0])[0, 1]) < 0.02
    assert abs(np.corrcoef(inputs[:-BLOCK, 0], inputs[BLOCK:, 0])[0, 1]) < 0.02  # neither sample nor block echoes
    for index in (-1, STREAM_LENGTH):
        with pytest.raises(IndexError, match="numbered from 0"):
            STREAM[index]


def test_stream_travels_to_a_spawned_worker():
    fresh = Arithmetic(eval_size=1).train
    data = pickle.dumps(fresh)
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data)[BLOCK + 1][0], REFERENCE[0][BLOCK + 1])


class Unit(nn.Module):
    def __init__(self, error: float):
        super().__init__()
        self.error = error

    def sparsity_error(self) -> float:
        return self.error


def evaluations(*rows):
    return [{"step": float(step), "val/mse": val, "test/mse": test} for step, val, test in rows]


def test_summary_follows_the_criterion():
    task = Arithmetic(eval_size=100)
    below, above = task.threshold / 2, task.threshold * 2
    model = nn.Sequential(Unit(0.25), nn.Linear(2, 2), Unit(0.5))
    # Solved for the first time at 2000, but not where the validation error is lowest.
    lost = task.summarize(evaluations((1000, 3, above), (2000, 2, below), (3000, 1, above)), model)
    assert lost == {"threshold": task.threshold, "success": 0.0, "solved_at": 2000.0, "sparsity_error": 0.5}
    won = task.summarize(evaluations((1000, 3, above), (2000, 2, below), (3000, 1, below)), nn.Linear(2, 2))
    assert won == {"threshold": task.threshold, "success": 1.0, "solved_at": 2000.0}
    nan = task.summarize(evaluations((1000, 1, below), (2000, float("nan"), float("nan"))), nn.Linear(2, 2))
    assert nan["success"] == 1.0
    never = task.summarize(evaluations((1000, 1, task.threshold)), nn.Linear(2, 2))
    assert never == {"threshold": task.threshold, "success": 0.0}
    assert task.summarize([], nn.Linear(2, 2)) == {"threshold": task.threshold, "success": 0.0}


def test_linear_model_with_the_right_weights_succeeds():
    task = Arithmetic(operation="add", eval_size=500)
    model = nn.Linear(100, 1, bias=False)
    model.weight.data = weights(task).sum(1, keepdim=True).T.float()
    line = {"step": 1.0}
    assert task.watched == ("val", "test")
    for split in task.watched:
        metrics = task.metrics()
        data = getattr(task, split)
        metrics.update(model(data.inputs), data.targets)
        line[f"{split}/mse"] = metrics.compute()["mse"].item()
    assert task.summarize([line], model)["success"] == 1.0
    model.weight.data += 3e-5
    with torch.no_grad():
        line["test/mse"] = task.loss(model(task.test.inputs), task.test.targets).item()
    assert task.summarize([line], model)["success"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": "multiply"}, "operation='multiply': there is no such operation; did you mean 'mul'"),
        ({"input_size": 0}, "input_size=0"),
        ({"subset_ratio": 0.0}, "subset_ratio=0.0, overlap_ratio=0.5: two subsets of 0 inputs"),
        ({"subset_ratio": 0.9, "overlap_ratio": 0.0}, "do not fit into input_size=100"),
        ({"subset_ratio": 1.5}, "subset_ratio=1.5: must be from 0 to 1"),
        ({"overlap_ratio": float("nan")}, "overlap_ratio=nan"),
        ({"train_range": [2, 1]}, "train_range=[2, 1]: must be [low, high]"),
        ({"train_range": 3}, "train_range=3"),
        ({"train_range": "wide"}, "train_range='wide'"),
        ({"train_range": [1, float("inf")]}, "train_range=[1, inf]"),
        ({"train_range": []}, "train_range=[]"),
        ({"test_range": [[0, 2], [1, 3]]}, "pairs that do not overlap"),
        ({"test_range": [1, 2, 3]}, "test_range=[1, 2, 3]"),
        ({"test_range": [[1, 2], [3]]}, "test_range=[[1, 2], [3]]"),
        ({"eval_size": 0}, "eval_size=0"),
        ({"eval_size": 10**9}, "eval_size=1000000000"),
        ({"operation": "function10", "input_size": 10}, "input_size=10"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Arithmetic(**options)


# --- Several seeds in one run -----------------------------------------------------------------------------------------

FOUR = {"operation": "function10", "eval_size": 60}


def test_each_of_several_seeds_has_the_samples_and_the_place_of_its_own_run():
    together = Arithmetic(seed=5, seeds=3, eval_size=20)
    assert together.input_shape == (100,)
    indices = [*range(BLOCK - 10, BLOCK + 10), 3, 7]
    for i in range(3):
        one = Arithmetic(seed=5 + i, eval_size=20)
        for name, rows in (("train", indices), ("val", range(20)), ("test", range(20))):
            ours, its = (getattr(task, name).__getitems__(list(rows)) for task in (together, one))
            for all_seeds, alone in zip(ours, its, strict=True):
                assert torch.equal(all_seeds[:, i], alone)
        assert together.thresholds[i] == one.threshold
        assert (together.formulas[i].weights == one.formula.weights).all()
    inputs, targets = together.train[BLOCK]
    assert (inputs.shape, targets.shape) == ((3, 100), (3, 1))
    assert [t.shape for t in together.train.__getitems__([])] == [(0, 3, 100), (0, 3, 1)]


def run_config(folder, layer="nmu", **changes):
    task = {"name": "arithmetic", **FOUR, **changes.pop("task", {})}
    return make_config(
        folder,
        task=task,
        model={"name": "arithmetic"},
        layer={"name": layer, **changes.pop("layer_options", {})},
        optimizer={"name": "adam", "lr": 0.03},
        trainer={"steps": 30, "eval_every": 10, "batch_size": 32} | changes.pop("trainer", {}),
        scheduler={"name": "none"},
        **changes,
    )


@pytest.mark.parametrize("layer", ["nmu", "nalu"])
def test_a_run_of_several_seeds_is_that_of_each_alone(layer, tmp_path):
    """Initial weights, samples, the regulariser's warm-up, evaluations, weights: all to rounding."""
    callbacks = {"sparsity_schedule": {"weight": 1.0, "start": 3, "end": 20}}
    config = run_config(tmp_path / "together", layer, seed=4, task={"seeds": 3}, callbacks=callbacks)
    together = execute(config)
    assert together["error"] is None
    model, summary = load_model(tmp_path / "together" / together["run_id"]), together["summary"]
    assert isinstance(model, Stacked)
    for i in range(3):
        alone = execute(run_config(tmp_path / "alone", layer, seed=4 + i, callbacks=callbacks))
        assert together["parameters"] == alone["parameters"]
        assert together["flops"] == alone["flops"]
        for split in ("val", "test"):
            mse = summary["last"][f"{split}/mse_seed{4 + i}"]
            assert mse == pytest.approx(alone["summary"]["last"][f"{split}/mse"], rel=1e-4)
        assert summary["task"]["each_success"][i] == alone["summary"]["task"]["success"]
        assert summary["task"]["each_sparsity_error"][i] == pytest.approx(
            alone["summary"]["task"]["sparsity_error"], rel=1e-4
        )
        assert together["score"]["step"] == alone["score"]["step"] == 30
        weights = load_model(tmp_path / "alone" / alone["run_id"]).state_dict()
        for key, value in model.member(i).state_dict().items():
            torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-6)
    errors = [summary["last"][f"val/mse_seed{seed}"] for seed in (4, 5, 6)]
    assert summary["last"]["val/mse"] == pytest.approx(sorted(errors)[1])


def test_interrupted_run_of_several_seeds_ends_with_the_same_bits(tmp_path):
    config = run_config(tmp_path / "whole", "nmu", task={"seeds": 2}, layer_options={"noise": [1, 5]})
    whole = execute(config)
    config.output_dir = str(tmp_path / "halves")
    steps = iter(range(100))
    assert execute(config, should_stop=lambda: next(steps) == 14)["status"] == "interrupted"
    again = execute(config)
    assert again["status"] == "done"
    assert again["summary"] == whole["summary"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"clip_grad": 1.0}}, "trainer.clip_grad=1: task.seeds=2 trains the seeds side by side"),
        ({"trainer": {"precision": "float16"}}, "trainer.precision=float16: task.seeds=2"),
        ({"callbacks": {"grid_update": {}}}, "callbacks.grid_update: task.seeds=2"),
    ],
)
def test_what_would_mix_seeds_is_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(run_config(tmp_path, task={"seeds": 2}, **changes))


@pytest.mark.parametrize("name", ["lbfgs", "lamb", "adafactor", "muon"])
def test_optimizers_that_look_at_several_parameters_at_once_are_refused(name, tmp_path):
    config = run_config(tmp_path, task={"seeds": 2})
    validate(config)
    config.optimizer.name = name
    with pytest.raises(ConfigError, match=f"optimizer.name={name}: task.seeds=2"):
        validate(config)
    config.task["seeds"] = 1
    validate(config)


def seed_lines(*rows):
    """Evaluations, from rows of (val, test) for each seed, a thousand steps apart."""
    return [
        {"step": 1000.0 * (i + 1)}
        | {f"val/mse_seed{s}": val for s, (val, _) in enumerate(row)}
        | {f"test/mse_seed{s}": test for s, (_, test) in enumerate(row)}
        for i, row in enumerate(rows)
    ]


def test_summary_of_several_seeds_judges_each_alone():
    task = Arithmetic(seeds=4, **FOUR)
    yes, no, inf = min(task.thresholds) / 2, max(task.thresholds) * 2, math.inf
    torch.manual_seed(0)
    model = build_stacked(lambda: NAU(4, 1), range(4))
    lines = seed_lines(
        [(1, no), (1, yes), (3, no), (2, no)],
        [(2, no), (2, no), (2, yes), (1, yes)],
        [(3, no), (3, no), (1, yes), (inf, inf)],
    )
    summary = task.summarize(lines, model)
    assert summary["each_success"] == [0, 1, 1, 1]
    assert summary["each_solved_at"] == [None, 1000, 2000, 2000]
    assert (summary["successes"], summary["seeds"], summary["success"]) == (3, 4, 0.75)
    assert summary["solved_at"] == 2000
    assert "solved_at_low" not in summary  # three values have no interval
    assert summary["diverged"] == 1
    each = [model.member(i).sparsity_error() for i in range(4)]
    assert summary["each_sparsity_error"] == each
    assert summary["sparsity_error"] == sorted(each[1:])[1]
    assert task.summarize([], nn.Linear(2, 2))["each_success"] == [0, 0, 0, 0]


@pytest.mark.parametrize(("succeeded", "count"), [(0, 1), (0, 25), (1, 1), (7, 20), (94, 100), (100, 100)])
def test_rate_has_wilsons_interval(succeeded, count):
    found = rate(succeeded, count)
    assert (found["success_low"], found["success_high"]) == pytest.approx(wilson(succeeded, count), abs=1e-9)


def test_median_interval_holds_the_median_as_often_as_it_says():
    assert median_interval("x", []) == {}
    assert median_interval("x", [3.0, 1.0]) == {"x": 2.0}
    assert median_interval("x", range(6)) == {"x": 2.5, "x_low": 0, "x_high": 5}
    rng = np.random.RandomState(0)
    hits = 0
    for _ in range(2000):
        found = median_interval("x", rng.random_sample(15).tolist())
        hits += found["x_low"] <= 0.5 <= found["x_high"]
    assert 0.95 <= hits / 2000 <= 0.98  # exactly 0.965


def test_metric_of_several_seeds_is_the_median_and_survives_one_that_diverged():
    task = Arithmetic(seeds=3, seed=7, **FOUR)
    metrics = task.metrics()
    target = torch.zeros(10, 3, 1)
    output = torch.tensor([1.0, 2.0, math.nan]).view(1, 3, 1).expand(10, -1, -1)
    metrics.update(output[:4], target[:4])
    metrics.update(output[4:], target[4:])
    found = {key: value.item() for key, value in metrics.compute().items()}
    assert found == {"mse": 4.0, "mse_seed7": 1.0, "mse_seed8": 4.0, "mse_seed9": math.inf}
    assert task.loss(output, target).item() == 5.0


def test_several_seeds_are_bounded():
    for seeds in (0, 1001, 1.5):
        with pytest.raises(ValueError, match=f"seeds={seeds}: must be a whole number from 1 to 1000"):
            Arithmetic(seeds=seeds)
