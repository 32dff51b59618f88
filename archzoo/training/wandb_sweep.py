"""`archzoo wandb-sweep`: a comparison as a sweep of Weights & Biases, whose agents train the very same runs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archzoo.training.cli import EXIT_CONFIG, prepare
from archzoo.training.composing import Plan

FILE = "wandb_sweep.yaml"
MIRROR = "tracker.wandb=online"  # without which W&B would see nothing of its own sweep


def main(argv: Sequence[str]) -> int:
    """Writes the sweep of a command line of `archzoo train` beside its runs, and says how to start it.

    Returns:
        The exit code, as of `archzoo train`.
    """
    argv = list(argv)
    plan = prepare(list(argv))
    if isinstance(plan, int):
        return plan
    if len(plan.configs) == 1:
        print("error: nothing is swept; give several values of a key, as layer=linear,kan seed=0,1,2", file=sys.stderr)
        return EXIT_CONFIG
    path = write_sweep(plan, argv)
    config = plan.configs[0]
    where = f"{config.tracker.entity or 'ENTITY'}/{config.tracker.project}"
    print(f"wrote {path}: {len(plan.configs)} runs, to be in {config.output_dir}")
    print(f"  wandb sweep {path}")
    print(f"  wandb agent {where}/ID        on every machine that sees this folder, as often as it has devices")
    print(f"  archzoo report {config.output_dir}        the report of the runs so far, at any time")
    return 0


def write_sweep(plan: Plan, argv: list[str]) -> Path:
    """Writes the YAML of the sweep into the output folder."""
    import yaml

    path = Path(plan.configs[0].output_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sweep_config(plan, argv), sort_keys=False))
    return path


def sweep_config(plan: Plan, argv: list[str]) -> dict[str, Any]:
    """The sweep: a grid over the swept keys, each run by the command that a person would type for it."""
    values: dict[str, list[str]] = {}
    for job in plan.jobs:
        for setting in job:
            key, _, value = setting.partition("=")
            if value not in values.setdefault(key, []):
                values[key].append(value)
    swept = {key: choices for key, choices in values.items() if len(choices) > 1}
    config = plan.configs[0]
    sweep: dict[str, Any] = {
        "name": config.name,
        "project": config.tracker.project,
        "entity": config.tracker.entity,
        "program": "train.py",  # which W&B wants to know; it is the command below that is run
        "method": "grid",
        "metric": {"name": "score", "goal": "maximize" if _higher_is_better(plan) else "minimize"},
        "parameters": {key: {"values": [_number(v) for v in choices]} for key, choices in swept.items()},
        "command": [
            *("${env}", "${interpreter}", "-m", "archzoo", "train"),
            *_fixed(argv, swept),
            *(MIRROR, "${args_no_hyphens}"),
        ],
    }
    return {key: value for key, value in sweep.items() if value is not None}


def _fixed(argv: list[str], swept: dict[str, list[str]]) -> list[str]:
    """The command line without what the agent sets."""
    gone = {*swept, MIRROR.partition("=")[0], "--multirun", "-m"}
    return [argument for argument in argv if argument.partition("=")[0] not in gone]


def _number(text: str) -> int | float | str:
    """A number where the text is that of one, so that W&B draws it as one; the agent types the same text again."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if str(value) == text:
            return value
    return text


def _higher_is_better(plan: Plan) -> bool:
    from archzoo.training.build import build_task

    return build_task(plan.configs[0]).mode == "max"
