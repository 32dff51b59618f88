"""Every config composes and trains a step."""

import inspect
import os
from pathlib import Path

import pytest
import yaml

from archzoo.registry import get_layer, layer_options, list_layers
from archzoo.training import cli
from tests.helpers import REPOSITORY

CONFIGS = REPOSITORY / "configs"
STEP = ["trainer.steps=1", "trainer.epochs=null", "trainer.seconds=null", "tracker=none", "trainer.limit_batches=1"]
NEEDS_DATA = {"mnist", "fashion_mnist"}


def options(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def skip_without_data(name):
    if name in NEEDS_DATA and not os.environ.get("ARCHZOO_DATA"):
        pytest.skip(f"{name} needs ARCHZOO_DATA, the folder of the data sets")


def trains(*arguments):
    assert cli.main(list(arguments)) == 0


@pytest.mark.parametrize("name", options("layer"))
def test_every_layer_trains_a_step_at_the_budget(name, tmp_path):
    trains(f"layer={name}", f"output_dir={tmp_path}", *STEP)


@pytest.mark.parametrize("name", list_layers("linear"))
def test_every_layer_has_a_config_with_all_its_options(name):
    settings = yaml.safe_load((CONFIGS / "layer" / f"{name}.yaml").read_text())
    assert settings.pop("name") == name
    assert settings.pop("bias") is inspect.signature(get_layer(name).cls).parameters["bias"].default
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in layer_options(name).items()}
    assert settings == expected


@pytest.mark.parametrize("name", options("task"))
def test_every_task_trains_a_step(name, tmp_path):
    skip_without_data(name)
    trains(f"task={name}", f"output_dir={tmp_path}", *STEP)


@pytest.mark.parametrize("group", ["optimizer", "scheduler", "tracker", "trainer", "model"])
def test_every_option_of_the_other_groups_trains_a_step(group, tmp_path):
    for name in options(group):
        trains(f"{group}={name}", f"output_dir={tmp_path / name}", *STEP)


@pytest.mark.parametrize("name", options("debug"))
def test_every_debug_preset_runs(name, tmp_path):
    short = ["trainer.steps=12", "trainer.epochs=null"] if name != "fast" else []
    trains(f"debug={name}", f"output_dir={tmp_path}", *short)
    assert (name == "profiler") == bool(list(Path(tmp_path).glob("*/trace.json")))


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_trains_a_step_of_each_run(name, tmp_path):
    skip_without_data(name)
    trains(f"experiment={name}", "seed=0,1", f"output_dir={tmp_path}", *STEP)
    assert (tmp_path / "report.html").exists()
