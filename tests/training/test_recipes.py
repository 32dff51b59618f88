"""Recipes: what is set otherwise for one contestant of a sweep."""

import json

import pytest

from archzoo.training.cli import main
from archzoo.training.composing import make_plan, store_schema
from archzoo.training.config import ConfigError, asdict_plain, run_id

SWEEP = ["layer=linear,kan", "optimizer.weight_decay=0.1", "+recipes.kan.optimizer.lr=0.05"]
WARM = "+recipes.kan.scheduler.warmup=0.25"


def configs(*arguments):
    store_schema()
    return {config.layer["name"]: config for config in make_plan(list(arguments)).configs}


def test_a_recipe_is_its_layers_alone():
    plan = configs(*SWEEP, WARM, "+recipes.kan.layer.grid_size=7")
    assert plan["kan"].optimizer.lr == 0.05
    assert plan["kan"].layer["grid_size"] == 7
    assert plan["kan"].scheduler.warmup == 0.25
    assert plan["kan"].optimizer.weight_decay == 0.1, "what a recipe does not set is everybody's"
    assert plan["linear"].optimizer.lr == 1e-3
    assert plan["linear"].scheduler.warmup == 0.0


def test_a_run_is_the_same_with_a_recipe_and_with_its_settings_typed():
    by_recipe = asdict_plain(configs(*SWEEP, WARM)["kan"])
    typed = asdict_plain(
        configs("layer=kan", "optimizer.weight_decay=0.1", "optimizer.lr=0.05", "scheduler.warmup=0.25")["kan"]
    )
    assert "recipes" not in by_recipe
    assert by_recipe == typed
    assert run_id(by_recipe) == run_id(typed)


def test_the_run_is_trained_by_it(tmp_path):
    few = ["trainer.steps=3", "trainer.epochs=null", "tracker=none", f"output_dir={tmp_path}"]
    assert main([*SWEEP, WARM, *few]) == 0
    recorded = {r["layer"]: r["config"] for r in (json.loads(p.read_text()) for p in tmp_path.glob("*/run.json"))}
    assert recorded["kan"]["optimizer"]["lr"] == 0.05
    assert recorded["linear"]["optimizer"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+recipes.kann.optimizer.lr=0.1"], "recipes.kann: no such layer, did you mean 'kan'"),
        (["+recipes.kan.budget.match=none"], "recipes.kan.budget=.*: a recipe holds settings of layer, optimizer"),
        (["+recipes.kan=5"], "recipes.kan=5: must hold settings by group"),
        (["+recipes.kan.optimizer=5"], "recipes.kan.optimizer=5: a recipe holds"),
        (["+recipes.kan.layer.name=linear"], "recipes.kan.layer=.*: a recipe holds"),
        (["+recipes.kan.layer.grid=5"], "grid"),
        (["+recipes.kan.optimizer.rate=5"], "rate"),
        (["+recipes.kan.optimizer.lr=fast"], r"optimizer\.lr.*fast"),
        (["+recipes.kan.optimizer.lr=0.1", "optimizer.lr=0.2"], r"optimizer.lr=0.2: the recipe of layer kan sets"),
        (["+recipes.kan.optimizer.lr=0.1", "optimizer.lr=0.2,0.3"], r"optimizer.lr=0.2,0.3: the recipe of layer kan"),
    ],
    ids=["layer", "group", "whole", "number", "name", "option", "key", "type", "typed", "swept"],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, words):
    with pytest.raises(ConfigError, match=words):
        configs("layer=kan,linear", *arguments)


def test_a_recipe_can_be_dropped():
    arguments = ["experiment=ngpt_vs_gpt", "layer=ngpt", "optimizer.lr=0.2", "task=text"]
    assert configs(*arguments)["ngpt"].scheduler.warmup == 0.0
    assert configs(*arguments, "recipes.ngpt=null", "scheduler.warmup=0.3")["ngpt"].scheduler.warmup == 0.3
