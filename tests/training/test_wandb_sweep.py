import pytest
import yaml

from archzoo.__main__ import main as archzoo
from archzoo.report import write_report
from archzoo.training import cli, composing, wandb_sweep
from tests.training.sweeps import plan_of, records, table, tiny

AGENT = {
    "WANDB_SWEEP_ID": "sweep123",
    "WANDB_RUN_ID": "agents-own",
    "WANDB_PROJECT": "elsewhere",
    "WANDB_ENTITY": "someone",
}


def agent_commands(sweep):
    """What `wandb agent` would start, for every point of the grid: by its own code."""
    from itertools import product

    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    keys = list(sweep["parameters"])
    for values in product(*(sweep["parameters"][key]["values"] for key in keys)):
        args = create_sweep_command_args({"args": {k: {"value": v} for k, v in zip(keys, values, strict=True)}})
        args |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
        parts = [args[c[2:-1]] if c.startswith("${") else [c] for c in create_sweep_command(list(sweep["command"]))]
        yield [word for part in parts for word in part]


def test_agents_train_the_very_runs_of_the_comparison(tmp_path, monkeypatch, capsys):
    arguments = [*tiny(tmp_path / "configs"), f"output_dir={tmp_path / 'out'}", "seed=1"]
    assert archzoo(["wandb-sweep", *arguments]) == 0
    said, file = capsys.readouterr().out, tmp_path / "out" / wandb_sweep.FILE
    assert f"wandb sweep {file}\n  wandb agent ENTITY/archzoo/ID " in said
    sweep = yaml.safe_load(file.read_text())
    assert sweep["method"] == "grid"
    assert sweep["parameters"] == {"layer": {"values": ["linear", "aptx"]}}
    commands = list(agent_commands(sweep))
    start = ["/usr/bin/env", "python", "-m", "archzoo", "train", *arguments, "tracker.wandb=online"]
    assert commands == [[*start, "layer=linear"], [*start, "layer=aptx"]]
    for name, value in AGENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "_print_comparison", lambda root: None)  # takes longer than the runs
    for command in commands:
        offline = [word for word in command[4:] if word != wandb_sweep.MIRROR]
        assert archzoo(offline) == 0
    done = {record["run_id"] for record in records(tmp_path / "out").values() if record["status"] == "done"}
    assert done == {folder.name for folder in plan_of(*arguments).folders()}
    write_report(tmp_path / "out")
    assert {row["label"] for row in table(tmp_path / "out")} == {"linear", "aptx"}


def test_every_kind_of_sweep_comes_to_the_agent_as_it_was_typed():
    """Numbers as numbers where the agent types the same text again; all else as text, which W&B hands on as it is."""
    swept = ["seed=range(2)", "trainer.compile=true,false", "trainer.clip_grad=null,5e-1"]
    swept += ["+budget.vary.kan=grid_size,degree"]
    rest = ["model.width=32", "tracker.wandb=offline", "-m"]
    composing.store_schema()
    plan = composing.make_plan([*swept, *rest])
    sweep = wandb_sweep.sweep_config(plan, [*swept, "--import", "mine", *rest])
    assert {key: choices["values"] for key, choices in sweep["parameters"].items()} == {
        "seed": [0, 1],
        "trainer.compile": ["True", "False"],
        "trainer.clip_grad": ["null", 0.5],
        "+budget.vary.kan": ["grid_size", "degree"],
    }
    assert sweep["command"][5:] == ["--import", "mine", "model.width=32", wandb_sweep.MIRROR, "${args_no_hyphens}"]


def test_a_single_run_is_no_sweep(capsys):
    assert archzoo(["wandb-sweep", "seed=3"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing is swept; give several values of a key")
    assert archzoo(["wandb-sweep", "layer=kna"]) == 2


@pytest.mark.slow
def test_a_run_of_an_agent_is_mirrored(tmp_path, monkeypatch):
    """W&B gives an agent's run an id of its own; the run's folder keeps ours."""
    for name, value in AGENT.items():
        monkeypatch.setenv(name, value)
    arguments = [*tiny(tmp_path / "configs"), f"output_dir={tmp_path / 'out'}", "seed=1", "layer=linear"]
    assert cli.main([*arguments, "tracker=wandb"]) == 0
    (record,) = records(tmp_path / "out").values()
    assert record["run_id"] == plan_of(*arguments).folders()[0].name
    assert list((tmp_path / "out" / record["run_id"]).glob("wandb/offline-run-*/*.wandb"))
