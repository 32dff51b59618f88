"""Poisson's equation: its solutions, its points, a loss that is 0 for the solution alone, and models that learn it."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import archzoo
from archzoo.models.model import LayerFactory, models
from archzoo.tasks.poisson import ON_BOUNDARY, SOLUTIONS, F, Poisson, U, derivatives
from archzoo.training.build import build_model, build_task
from archzoo.training.config import ConfigError
from archzoo.training.cost import cost_record
from archzoo.training.loop import Trainer
from archzoo.training.run import execute
from tests.helpers import sampled
from tests.training.support import make_config

SMALL = {"n_interior": 200, "n_boundary": 40, "eval_side": 12}


class Exact(nn.Module):
    """The solution itself, as a model; scaled, and moved up, on request."""

    def __init__(self, name, factor=1.0, offset=0.0):
        super().__init__()
        self.name = name
        self.scale = nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x):
        return (self.scale * SOLUTIONS[self.name](*x.unbind(-1))[0] + self.offset).unsqueeze(-1)


def batch(task, dtype=torch.float64):
    return task.train.inputs.to(dtype), task.train.targets.to(dtype)


def model_of(layer, **options):
    torch.manual_seed(0)
    return models.create("mlp", LayerFactory(layer), (2,), 1, **{"width": 8, "depth": 1, "norm": "none", **options})


# ---- the equation


def test_the_papers_solution_has_the_papers_right_hand_side():
    x, y = torch.rand(2, 50, dtype=torch.float64) * 2 - 1
    s = math.pi
    u = torch.sin(s * x) * torch.sin(s * y * y)
    f = -(s**2) * (1 + 4 * y**2) * torch.sin(s * x) * torch.sin(s * y**2)
    f = f + 2 * s * torch.sin(s * x) * torch.cos(s * y**2)
    for ours, papers in zip(SOLUTIONS["sine_y2"](x, y), (u, f), strict=True):
        torch.testing.assert_close(ours, papers, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(SOLUTIONS["sine_y"](x, y)[1], -2 * s**2 * torch.sin(s * x) * torch.sin(s * y))


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_right_hand_side_is_the_laplacian_of_the_solution(name):
    x = torch.rand(200, 2, dtype=torch.float64) * 2 - 1
    u, _, laplacian = derivatives(Exact(name), x)
    exact, f = SOLUTIONS[name](*x.unbind(1))
    torch.testing.assert_close(u, exact)
    torch.testing.assert_close(laplacian, f, rtol=1e-11, atol=1e-11)


def test_derivatives_are_those_of_calculus_also_where_gradients_are_off():
    def cubic(x):
        return (x[:, 0] ** 3 * x[:, 1] + 2 * x[:, 1] ** 2).unsqueeze(1)

    x = torch.randn(20, 2, dtype=torch.float64)
    with torch.no_grad():
        u, gradient, laplacian = derivatives(cubic, x)
    a, b = x.unbind(1)
    torch.testing.assert_close(u, a**3 * b + 2 * b**2)
    torch.testing.assert_close(gradient, torch.stack([3 * a**2 * b, a**3 + 4 * b], 1))
    torch.testing.assert_close(laplacian, 6 * a * b + 4)
    assert not x.requires_grad


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(5), nn.LayerNorm(5, bias=False), nn.LayerNorm(5, elementwise_affine=False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_with_layer_norm_keeps_its_values_and_has_right_derivatives(norm, dtype):
    """torch's own layer norm gives a wrong gradient of the Laplacian, without a word: pytorch#175754."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), norm, nn.Tanh(), nn.Linear(5, 1)).to(dtype)
    x = torch.rand(9, 2, dtype=dtype)
    torch.testing.assert_close(derivatives(model, x)[0], model(x).squeeze(1))
    if dtype == torch.float64:
        names, parameters = zip(*model.named_parameters(), strict=True)

        def loss(*values):
            substituted = dict(zip(names, values, strict=True))
            return derivatives(lambda z: torch.func.functional_call(model, substituted, (z,)), x)[2].square().sum()

        assert torch.autograd.gradcheck(loss, [p.detach().requires_grad_() for p in parameters], atol=1e-4)


def test_batch_norm_is_refused_while_it_normalises_over_the_batch():
    task, model = Poisson(**SMALL), nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match=r"batch normalisation .* use model\.norm=layer"):
        task.training_loss(model, *batch(task))
    task.training_loss(model.eval(), *batch(task))


def test_the_laplacian_of_a_linear_model_is_0_and_its_loss_can_be_differentiated():
    task, model = Poisson(**SMALL), nn.Linear(2, 1).double()
    assert not derivatives(model, task.train.inputs.double())[2].any()
    task.training_loss(model, *batch(task)).backward()
    assert model.weight.grad.abs().sum() > 0  # by the boundary


# ---- the points


@pytest.mark.parametrize("name", SOLUTIONS)
def test_points_lie_where_they_should_with_their_values(name):
    task = Poisson(solution=name, n_interior=500, n_boundary=81, eval_side=20)
    assert [len(split) for split in (task.train, task.val, task.test)] == [581, 19 * 19, 400]
    for split in (task.train, task.val, task.test):
        assert (split.inputs.dtype, split.targets.dtype) == (torch.float32, torch.float64)
        assert split.inputs.abs().max() <= 1
        u, f = SOLUTIONS[name](*split.inputs.double().unbind(1))
        torch.testing.assert_close(split.targets[:, U], u, atol=1e-15, rtol=0)
        assert torch.equal(split.targets[:, F], f)
        on_boundary = split.inputs.abs().amax(1) == 1
        assert torch.equal(split.targets[:, ON_BOUNDARY], on_boundary.double())
        assert not split.targets[on_boundary, U].any()
    border = task.train.inputs[task.train.targets[:, ON_BOUNDARY] == 1]
    for axis in (0, 1):
        for end in (-1, 1):
            side = border[border[:, axis] == end]
            assert len(side) in (20, 21)
            assert side[:, 1 - axis].min() < -0.5 < 0.5 < side[:, 1 - axis].max()
    assert not task.val.targets[:, ON_BOUNDARY].any()


def test_the_paper_has_ten_thousand_points_inside_and_800_on_the_boundary():
    targets = Poisson().train.targets
    assert (len(targets), targets[:, ON_BOUNDARY].sum()) == (10_800, 800)


@pytest.mark.parametrize("eval_side", [2, 11, 12])
def test_no_two_splits_share_a_point(eval_side):
    task = Poisson(**{**SMALL, "eval_side": eval_side})
    points = [set(map(tuple, split.inputs.tolist())) for split in (task.train, task.val, task.test)]
    assert len(set.union(*points)) == sum(map(len, points))


def test_neither_seed_nor_another_parts_size_moves_points():
    base, other = Poisson(**SMALL), Poisson(**{**SMALL, "n_boundary": 90, "eval_side": 5}, seed=7)
    assert torch.equal(base.train.inputs[:200], other.train.inputs[:200])
    assert torch.equal(base.train.inputs[200:], other.train.inputs[200:240])
    assert torch.equal(base.train.inputs, Poisson(**SMALL, seed=3).train.inputs)


# ---- the loss


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_loss_of_the_solution_is_0_and_that_of_others_is_not(name):
    task = Poisson(solution=name, **SMALL)
    assert task.training_loss(Exact(name), *batch(task)) < 1e-20
    for other in (Exact(name, factor=1.01), Exact(name, offset=0.01)):
        assert task.training_loss(other, *batch(task)) > 1e-6


def test_the_full_batchs_loss_is_the_papers():
    task, model = Poisson(alpha=0.03, **SMALL), model_of("linear", activation="tanh").double()
    inputs, targets = batch(task)
    u, _, laplacian = derivatives(model, inputs)
    inside = (laplacian - targets[:, F])[:200].square().mean()
    border = u[200:].square().mean()
    torch.testing.assert_close(task.training_loss(model, inputs, targets), 0.03 * inside + border)


def test_the_mean_over_an_epochs_batches_is_the_full_batchs_loss():
    task, model = Poisson(**SMALL), model_of("linear", activation="tanh").double()
    inputs, targets = batch(task)
    order = torch.randperm(240)
    parts = [task.training_loss(model, inputs[k], targets[k]) for k in order.split(24)]
    torch.testing.assert_close(torch.stack(parts).mean(), task.training_loss(model, inputs, targets))


def test_what_u_is_inside_has_no_part_in_it():
    task, model = Poisson(**SMALL), model_of("linear", activation="tanh").double()
    inputs, targets = batch(task)
    before = task.training_loss(model, inputs, targets)
    targets[:200, U] = math.nan
    assert task.training_loss(model, inputs, targets) == before


@pytest.mark.parametrize("layer", sampled(["kan", "fast_kan", "linear"], ["kan", "linear"]))
def test_its_gradient_is_right_through_three_derivatives(layer):
    task = Poisson(n_interior=12, n_boundary=4, eval_side=2)
    model = model_of(layer, width=3, head="layer", activation="tanh" if layer == "linear" else "none").double()
    inputs, targets = batch(task)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        substituted = dict(zip(names, values, strict=True))
        return task.training_loss(lambda x: torch.func.functional_call(model, substituted, (x,)), inputs, targets)

    assert torch.autograd.gradcheck(loss, [p.detach().requires_grad_() for p in parameters], atol=1e-4, rtol=1e-4)


def test_metrics_are_the_errors_of_u_batch_by_batch():
    task = Poisson(**SMALL)
    metrics, targets = task.metrics(), task.test.targets.float()
    output = targets[:, :1] + torch.tensor([3e-4, -3e-4]).repeat(72)[:, None]
    metrics.update(output[:50], targets[:50])
    metrics.update(output[50:], targets[50:])
    values = metrics.compute()
    assert values[task.score].item() == pytest.approx(3e-4, rel=1e-3)
    assert values["loss"].item() == pytest.approx(9e-8, rel=1e-3)
    assert task.mode == "min"


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_summary_has_both_errors_of_the_paper(name):
    task = Poisson(solution=name, n_interior=4, n_boundary=4, eval_side=200)
    perfect = task.summarize([], Exact(name))
    assert all(value < 1e-18 for value in perfect.values())
    with torch.no_grad():  # as the trainer may call it
        off = task.summarize([], Exact(name, factor=1.1, offset=0.2))
    u, f = SOLUTIONS[name](*task.test.inputs.double().unbind(1))
    assert off["l2_squared"] == pytest.approx((0.1 * u + 0.2).square().mean().item())
    if name == "sine_y":  # |grad u|^2 has the mean pi^2 / 2
        assert off["h1_squared"] == pytest.approx(off["l2_squared"] + 0.01 * math.pi**2 / 2, rel=1e-6)
    assert off["residual"] == pytest.approx((0.1 * f).square().mean().item())


# ---- training


@pytest.mark.parametrize(
    ("layer", "optimizer", "steps"),
    [
        ("linear", {"name": "adam", "lr": 1e-2}, 60),
        ("kan", {"name": "adam", "lr": 1e-2}, 60),
        pytest.param("fast_kan", {"name": "adam", "lr": 1e-2}, 60, marks=pytest.mark.slow),
        ("linear", {"name": "lbfgs", "lr": 1.0}, 5),
        pytest.param("kan", {"name": "lbfgs", "lr": 1.0}, 5, marks=pytest.mark.slow),
    ],
)
def test_models_learn_it(layer, optimizer, steps):
    lines = []
    trainer = {"steps": steps, "batch_size": 10**6, "precision": "float64", "eval_every": steps}
    config = make_config(optimizer=optimizer, trainer=trainer, scheduler={"name": "none"})
    options = {"head": "layer"} if layer == "kan" else {"activation": "tanh"}
    task = Poisson(**SMALL)
    run = Trainer(config, task, model_of(layer, **options), record=lines.append)
    start = run.evaluate("val")["val/rmse"]
    run.fit()
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    if optimizer["name"] == "lbfgs":
        assert losses == sorted(losses, reverse=True)
        assert run.best["val/rmse"] < 0.8 * start


@pytest.mark.parametrize("trainer", [{"precision": "bfloat16"}, {"accumulate": 2}, {"overfit_batches": 2}], ids=str)
def test_the_other_ways_of_training_work(trainer):
    config = make_config(trainer={"steps": 3, "batch_size": 32, **trainer})
    run = Trainer(config, Poisson(**SMALL), model_of("kan"))
    run.fit()
    assert math.isfinite(run.best["val/rmse"])


def test_a_run_tells_what_a_step_costs_and_both_errors(tmp_path):
    options = {"model": {"name": "mlp", "width": 4, "depth": 1, "norm": "none"}, "layer": {"name": "kan"}}
    config = make_config(tmp_path, task={"name": "poisson", **SMALL}, trainer={"batch_size": 10**9}, **options)
    record = execute(config)
    assert record["status"] == "done", record["error"]
    assert {"l2_squared", "h1_squared", "residual"} == record["summary"]["task"].keys()
    assert record["score"]["metric"] == "rmse"
    task = build_task(config)
    torch.manual_seed(0)
    model, _ = build_model(config, task)
    plain = cost_record(
        make_config(task={"name": "functions"}, trainer={"batch_size": 240}, **options), _Plain(), model
    )
    assert record["parameters"] == plain["parameters"]
    assert record["flops"] == plain["flops"], "one forward pass"
    assert record["bytes_per_step"] > 2 * plain["bytes_per_step"], "three derivatives"
    assert record["memory"]["saved_for_backward_bytes"] > 2 * plain["memory"]["saved_for_backward_bytes"]
    assert record["timing"]["samples_per_s"] < 1e9 / record["timing"]["step_time_p50_s"]


class _Plain(Poisson):
    """The same points, trained on u."""

    training_loss = archzoo.tasks.task.Task.training_loss

    def __init__(self):
        super().__init__(**SMALL)


def test_compiling_is_refused_before_anything_is_trained():
    config = make_config(task={"name": "poisson", **SMALL}, trainer={"compile": True})
    with pytest.raises(
        ConfigError, match=r"trainer\.compile=true: task poisson differentiates the model by its inputs"
    ):
        build_task(config)


# ---- options


def test_the_config_lists_every_option_with_its_default():
    path = Path(__file__).parents[2] / "configs" / "task" / "poisson.yaml"
    options = {k: p.default for k, p in inspect.signature(Poisson).parameters.items() if k not in ("data_dir", "seed")}
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"name": "poisson"} | options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solution": "sine_y3"}, "solution='sine_y3': there is no such solution; did you mean 'sine_y' or 'sine_y2'"),
        ({"n_interior": 0}, "n_interior=0"),
        ({"n_boundary": 0}, "n_boundary=0"),
        ({"n_boundary": 1.5}, "n_boundary=1.5"),
        ({"alpha": 0.0}, "alpha=0.0: must be above 0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"eval_side": 1}, "eval_side=1"),
        ({"eval_side": 10**6}, "eval_side=1000000"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Poisson(**options)
