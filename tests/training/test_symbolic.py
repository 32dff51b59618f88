"""The callback `symbolic_regression`: a formula in the place of splines, its record, and the same bits after a stop."""

import json
from pathlib import Path

import pytest
import torch

from archzoo.models.kan import KAN
from archzoo.tasks.functions import Functions
from archzoo.training.build import build_model, build_task
from archzoo.training.checkpoint import load_checkpoint, save_checkpoint
from archzoo.training.config import ConfigError, asdict_plain, run_id
from archzoo.training.loop import Interrupted, Trainer
from archzoo.training.run import execute, load_model, make_callbacks
from archzoo.training.symbolic import SymbolicRegression
from tests.training.support import make_config

QUICK = {"names": ["x", "sin", "exp"], "starts": 3, "candidates": 2, "beams": [1], "samples": 200}


def config(folder=None, **changes):
    options = {
        "task": {"name": "functions", "function": "xy", "train_size": 200, "test_size": 100},
        "model": {"name": "kan", "hidden": "task"},
        "layer": {"name": "kan", "grid_size": 4, "bias": False, "extrapolation": "linear"},
        "optimizer": {"name": "lbfgs", "lr": 1.0, "options": {"max_iter": 5}},
        "scheduler": {"name": "none"},
        "trainer": {"steps": 6, "batch_size": 200, "precision": "float64", "eval_every": 2},
        "budget": {"match": "none"},
        "callbacks": {"symbolic_regression": QUICK},
    }
    return make_config(
        folder, **{key: {**options.get(key, {}), **changes.get(key, {})} for key in {**options, **changes}}
    )


def run_folder(c):
    return Path(c.output_dir) / run_id(asdict_plain(c))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    c = config(tmp_path_factory.mktemp("symbolic"))
    return c, execute(c)


def test_the_record_says_which_formula_and_that_it_is_the_true_one(done):
    c, record = done
    assert record["status"] == "done", record["error"]
    summary = json.loads((run_folder(c) / "run.json").read_text())["summary"]["task"]
    assert summary["formula"] == summary["truth"] == "x0*x1"
    assert summary["success"] == 1.0
    assert summary["formula_rmse"] < 1e-12
    assert 0 < summary["spline_rmse"] < 1e-2
    assert summary["numeric_edges"] == 0
    assert record["structure"]["changed_at"] == 3
    assert record["score"]["value"] < 1e-6, "of the model, whose numbers are trained and not rounded"


def test_the_model_that_was_recorded_is_the_formula(done):
    model = load_model(run_folder(done[0]))
    assert isinstance(model, KAN)
    assert str(model.formula(tolerance=1e-4)) == "x0*x1"


@pytest.mark.slow
@pytest.mark.parametrize(  # before, right at and after the search
    "stop_at", [2, 3, 4]
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, stop_at):
    c = config()
    task = build_task(c)

    def trainer(seed, **options):
        torch.manual_seed(seed)
        made = make_callbacks(c)
        return Trainer(c, task, build_model(c, task, made)[0], made, **options)

    whole = trainer(0)
    whole.fit()
    first = trainer(0, save=lambda t: save_checkpoint(tmp_path, t.step, *t.state(), keep=99))
    first.should_stop = lambda: first.step == stop_at
    with pytest.raises(Interrupted):
        first.fit()
    second = trainer(7)
    second.load_state(*load_checkpoint(tmp_path / f"step_{stop_at:08d}"))
    second.fit()
    a, b = whole.model.state_dict(), second.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (whole.best, whole.evaluations, whole.changed_at) == (second.best, second.evaluations, second.changed_at)
    summaries = [t.callbacks[0].summarize(t, t.model) for t in (whole, second)]
    assert summaries[0] == summaries[1]
    assert summaries[0]["formula"] == "x0*x1"


@pytest.mark.slow
def test_edges_that_stayed_splines_are_no_success(tmp_path):
    c = config(tmp_path, callbacks={"symbolic_regression": {**QUICK, "names": ["exp"], "trials": 1}})
    summary = execute(c)["summary"]["task"]
    assert summary["numeric_edges"] > 0
    assert summary["success"] == 0.0
    assert "formula" not in summary


def test_a_run_that_ends_before_says_nothing(tmp_path):
    record = execute(config(tmp_path, trainer={"steps": 1}))
    assert (record["status"], record["summary"]["task"]) == ("done", {})


def test_what_it_cannot_work_on_is_refused():
    c = config()
    task = Functions(function="xy", train_size=50)
    with pytest.raises(ConfigError, match="symbolic_regression: needs a KAN"):
        SymbolicRegression().check(c, task, torch.nn.Linear(2, 1))
    digits = build_task(make_config(task={"name": "digits"}))
    with pytest.raises(ConfigError, match="symbolic_regression: needs a task with a number to predict"):
        SymbolicRegression().check(c, digits, KAN([64, 10]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 1.0}, "at=1.0"),
        ({"round_to": 0.0}, "round_to=0.0"),
        ({"samples": 4}, "samples=4"),
        ({"names": ["sinus"]}, "names='sinus' is not in the library"),
        ({"trials": 0}, "trials=0"),
        ({"beam": 2}, "beam"),
    ],
)
def test_wrong_options_are_named(options, message):
    c = config(callbacks={"symbolic_regression": options})
    with pytest.raises(ConfigError, match=message):
        make_callbacks(c)


def test_hidden_levels_one_by_one_or_by_what_the_task_knows():
    c = config(model={"hidden": [[1, 2], 3]})
    assert build_model(c, build_task(c))[0].width == [(2, 0), (1, 2), (3, 0), (1, 0)]
    c = config(task={"function": "feynman_i_29_16"})
    assert build_model(c, build_task(c))[0].width == [(3, 0), (2, 0), (1, 1), (1, 0)]
    c = config(task={"function": "j0"})
    with pytest.raises(ConfigError, match=r"model.hidden=task: none is known for task functions, function=j0; give a"):
        build_model(c, build_task(c))
    c = config(budget={"match": "params", "to": 100})
    with pytest.raises(ConfigError, match=r"model.hidden=task: leaves no width .* set budget.match=none"):
        build_model(c, build_task(c))
