"""One comparison in a YAML, as every engine gets it, and what its report comes to."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from archzoo.training import cli, composing
from archzoo.training.run import execute
from tests.helpers import REPOSITORY

TRAIN = [sys.executable, str(REPOSITORY / "train.py")]
TINY = """\
# @package _global_
defaults: [{override /task: digits}, {override /model: mlp}, {override /tracker: none}]
name: tiny
model: {width: 8, depth: 2, dropout: 0.2}
trainer: {steps: 12, epochs: null, eval_every: 4, log_every: 2, batch_size: 16}
budget: {match: none}
hydra: {mode: MULTIRUN, sweeper: {params: {layer: "linear,aptx", seed: "range(2)"}}}
"""


def tiny(folder: Path) -> list[str]:
    """Writes the comparison; returns the arguments that choose it."""
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "tiny.yaml").write_text(TINY)
    return ["--config-dir", str(folder), "experiment=tiny"]


def train(*arguments: str, folder: Path, limit: float = 500) -> SimpleNamespace:
    """Runs the command in a folder; where it takes longer than `limit` seconds, it ends with all its processes."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*TRAIN, *arguments], cwd=folder, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def plan_of(*arguments: str) -> composing.Plan:
    plan = cli.prepare(list(arguments))
    assert isinstance(plan, composing.Plan)
    return plan


def cut_off(plan: composing.Plan, run: int, steps: int = 6) -> dict[str, Any]:
    """Trains a run of a sweep for some steps, and interrupts it."""
    looks = iter(range(1, 10_000))
    record = execute(plan.configs[run], should_stop=lambda: next(looks) >= steps)
    assert record["status"] == "interrupted"
    return record


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in (json.loads(p.read_text()) for p in folder.glob("*/run.json"))}


def table(folder: Path) -> list[dict[str, str]]:
    """The report's table without what a clock or the process measured."""
    with (folder / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = ("time", "seconds", "samples_per_s", "rss")
    return [{k: v for k, v in row.items() if not any(word in k for word in measured)} for row in rows]
