"""What the trainer's tests share: a small task held in memory, and configs that run in a blink."""

import json
from pathlib import Path
from typing import Any

import torch

from archzoo.tasks.task import ClassificationTask, TensorSplit
from archzoo.training.config import (
    BudgetConfig,
    OptimizerConfig,
    SchedulerConfig,
    SweepConfig,
    TrackerConfig,
    TrainConfig,
    TrainerConfig,
)


class Blobs(ClassificationTask):
    """Three Gaussian blobs in the plane."""

    input_shape = (2,)
    output_size = 3

    def __init__(self, train: int = 96, seed: int = 0):
        super().__init__(seed=seed)
        generator = torch.Generator().manual_seed(7)

        def split(n: int) -> TensorSplit:
            targets = torch.arange(n) % 3
            centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
            return TensorSplit(centres[targets] + 0.7 * torch.randn(n, 2, generator=generator), targets)

        self.train, self.val, self.test = split(train), split(60), split(60)


def make_config(output_dir: Path | str = "unused", **changes: Any) -> TrainConfig:
    """A config of the digits task; `trainer`, `tracker`, … are dictionaries of what differs."""
    parts: dict[str, Any] = {
        "optimizer": OptimizerConfig(**{"lr": 1e-2, **changes.pop("optimizer", {})}),
        "scheduler": SchedulerConfig(**changes.pop("scheduler", {})),
        "trainer": TrainerConfig(
            **{"steps": 12, "batch_size": 16, "log_every": 1, "eval_every": 4, **changes.pop("trainer", {})}
        ),
        "budget": BudgetConfig(**{"match": "none", **changes.pop("budget", {})}),
        "tracker": TrackerConfig(**{"wandb": "disabled", **changes.pop("tracker", {})}),
        "sweep": SweepConfig(**changes.pop("sweep", {})),
    }
    defaults: dict[str, Any] = {
        "name": "test",
        "output_dir": str(output_dir),
        "task": {"name": "digits"},
        "model": {"name": "mlp", "width": 8, "depth": 2, "dropout": 0.2},
        "layer": {"name": "linear"},
    }
    return TrainConfig(**{**defaults, **parts, **changes})


def lines_without_time(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time_s", "train_s")} for line in lines]
