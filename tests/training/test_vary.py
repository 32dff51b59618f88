"""`budget.vary`: a budget that is met by an option of the layer, with the widths as they are."""

from pathlib import Path

import pytest
import torch

from archzoo.budget import count_parameters
from archzoo.training.build import build_model, build_task, choose_widths
from archzoo.training.callbacks import GridRefine
from archzoo.training.config import ConfigError, asdict_plain, from_plain, run_id, validate
from archzoo.training.run import execute, load_model
from tests.training.support import make_config

VARY = {"match": "params", "to": 400, "tolerance": 0.05, "vary": {"kan": "grid_size"}}
SHAPE = {"name": "mlp", "width": 4, "depth": 1, "norm": "none", "head": "layer"}


def make(folder="unused", layer="kan", budget=VARY, **changes):
    changes = {"task": {"name": "functions", "train_size": 60, "test_size": 60}, "model": SHAPE} | changes
    options = {"grid_size": 3} if layer == "kan" else {}
    return make_config(folder, layer={"name": layer, **options}, budget=budget, **changes)


def test_the_option_is_searched_and_the_widths_stay():
    config = make()
    model, match = build_model(config, build_task(config))
    assert match is not None
    # 2 x 4 + 4 edges of G + 3 + 1 numbers, 5 biases: G = 29 is nearest to 400
    assert (match.widths, match.option, match.value, match.count) == ((4,), "grid_size", 29, 12 * 33 + 5)
    assert count_parameters(model) == match.count
    assert [layer.grid_size for layer in (model.hidden[0], model.head)] == [29, 29]


def test_other_layers_vary_their_width():
    match = choose_widths(make(layer="linear"), build_task(make()))
    assert match is not None
    assert (match.option, match.widths) == (None, (100,))


def test_no_hidden_width_is_needed():
    config = make(model={**SHAPE, "depth": 0}, budget={**VARY, "to": 39})
    match = choose_widths(config, build_task(config))
    assert match is not None
    assert (match.widths, match.value) == ((), 15)


NEAREST = {"to": 227, "tolerance": 0.01}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"vary": {"kam": "grid_size"}}, "budget.vary.kam: no such layer, did you mean 'kan'"),
        ({"vary": {"kan": "gird_size"}}, "budget.vary.kan=gird_size: layer kan has no such option, did you mean"),
        ({"vary": {"kan": "grid_eps"}}, "option grid_eps (0.02) is not a whole number; choose one of grid_size,"),
        ({"vary": {"kan": "standalone_scale"}}, "option standalone_scale (False) is not a whole number"),
        ({"to": 60}, "budget.to=60, budget.vary.kan=grid_size: 60 parameters cannot be reached with layer kan;"),
        ({"to": 60}, "the smallest reachable count is 65 (grid_size 1)"),
        (NEAREST, "budget.to=227: no grid_size gives layer kan 227 parameters within budget.tolerance=0.01"),
        (
            NEAREST,
            "the nearest reachable count is 221 (-2.6%, grid_size 14); accept it with budget.unreachable=nearest",
        ),
    ],
)
def test_what_cannot_be_is_named_with_what_can(budget, words):
    config = make(budget={**VARY, **budget})
    with pytest.raises(ConfigError) as error:
        choose_widths(config, build_task(config))
    assert words in str(error.value)


def test_the_nearest_value_is_taken_on_request():
    config = make(budget={**VARY, **NEAREST, "unreachable": "nearest"})
    match = choose_widths(config, build_task(config))
    assert match is not None
    assert (match.value, match.count) == (14, 221)


def test_an_option_that_adds_nothing_is_refused():
    config = make_config(layer={"name": "phm"}, budget={**VARY, "vary": {"phm": "n"}})
    with pytest.raises(ConfigError, match=r"budget\.vary\.phm=n: .* the count does not grow with n: it is"):
        choose_widths(config, build_task(config))


def test_the_name_of_an_option_is_a_word():
    with pytest.raises(ConfigError, match=r"budget\.vary\.kan=3: must be the name of an option"):
        validate(make(budget={**VARY, "vary": {"kan": 3}}))


def test_a_run_that_varies_nothing_keeps_its_id():
    plain = asdict_plain(make(budget={"match": "params"}))
    assert "vary" not in plain["budget"]
    assert from_plain(plain).budget.vary == {}
    assert run_id(asdict_plain(make())) != run_id(plain)


def test_the_record_and_the_loaded_model_have_the_chosen_value(tmp_path):
    config = make(tmp_path, task={"name": "functions", "train_size": 60, "test_size": 60})
    record = execute(config)
    assert record["status"] == "done", record["error"]
    kept = {key: record["budget"][key] for key in ("option", "value", "widths", "reached")}
    assert kept == {"option": "grid_size", "value": 29, "widths": [4], "reached": record["parameters"]}
    assert load_model(tmp_path / record["run_id"]).head.grid_size == 29


# ---- grids that grow to the chosen size


STAGES = {"grid_refine": {"stages": 3}}


def test_grids_grow_from_the_configured_size_to_the_chosen_one(tmp_path):
    config = make(tmp_path, callbacks=STAGES, trainer={"precision": "float64"})
    record = execute(config)
    assert record["status"] == "done", record["error"]
    assert record["budget"]["reached"] == record["parameters"] == 401
    assert record["structure"]["initial"]["parameters"] == 12 * (3 + 4) + 5
    assert record["structure"]["changed_at"] == 8
    model = load_model(tmp_path / record["run_id"])
    assert model.head.grid_size == 29
    assert model.head.spline_weight.dtype == torch.float64


def test_a_run_whose_grids_grow_ends_the_same_if_it_is_stopped(tmp_path):
    whole, parts = (make(tmp_path / name, callbacks=STAGES) for name in ("whole", "parts"))
    execute(whole)
    looks = iter(range(1000))
    assert execute(parts, should_stop=lambda: next(looks) == 6)["status"] == "interrupted"
    assert execute(parts)["status"] == "done"
    folders = [Path(config.output_dir, run_id(asdict_plain(config))) for config in (whole, parts)]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second


def plan(first, chosen, stages):
    callback = GridRefine(stages=stages)
    config = make()
    config.layer["grid_size"] = first
    budget = 12 * (chosen + 4) + 5
    config.budget.to = budget
    built = callback.prepare(config, choose_widths(config, build_task(config)))
    return built, callback.sizes, callback.at


def test_the_sizes_are_about_a_factor_apart_and_share_the_budget():
    assert plan(3, 48, 5) == ({"grid_size": 3}, [6, 12, 24, 48], [0.2, 0.4, 0.6, 0.8])
    assert plan(3, 5, 5) == ({"grid_size": 3}, [4, 5], [1 / 3, 2 / 3])


def test_where_the_chosen_size_is_no_larger_nothing_grows():
    assert plan(3, 3, 5) == ({}, [], [])
    assert plan(5, 2, 5) == ({}, [], [])


def test_layers_without_grids_train_beside_those_with(tmp_path):
    assert execute(make(tmp_path, layer="linear", callbacks=STAGES))["status"] == "done"


def test_stages_without_a_chosen_size_are_refused():
    config = make(budget={"match": "params", "to": 400, "tolerance": 0.5}, callbacks=STAGES)
    with pytest.raises(ConfigError, match=r"callbacks\.grid_refine\.stages=3: nothing says how fine the grids of"):
        build_model(config, build_task(config), [GridRefine(stages=3)])


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: GridRefine(stages=1), "stages=1: must be a whole number of grids, 2 or more"),
        (lambda: GridRefine(stages=2.5), "stages=2.5"),
        (lambda: GridRefine(stages=3, sizes=[5], at=[0.5]), "stages=3: leave it out, or leave out sizes"),
        (lambda: GridRefine(), "sizes=None: must be whole numbers"),
        (lambda: GridRefine(sizes=[5, 8]), "at=None: must be fractions"),
    ],
)
def test_a_wrong_option_of_grid_refine_is_named(make_it, words):
    with pytest.raises(ValueError, match=words):
        make_it()
