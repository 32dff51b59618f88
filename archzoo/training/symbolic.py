"""Symbolic regression as a part of training: splines first, then the formula that `recover_formula` finds."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archzoo.tasks.task import RegressionTask, Task
from archzoo.training.callbacks import Callback, register_callback
from archzoo.training.config import ConfigError, TrainConfig
from archzoo.training.data import BatchOrder, train_batches

if TYPE_CHECKING:
    from archzoo.training.loop import Trainer

EXACT = 1e-6
"""Root mean square error of an exact formula at most, in standard deviations of what it describes."""


@register_callback("symbolic_regression")
class SymbolicRegression(Callback):
    """Looks for a closed formula in place of a `KAN`'s splines, and trains on the numbers in it (arXiv 2404.19756).

    Up to `at` the splines are trained as usual. Then `archzoo.models.kan_recovery.recover_formula` searches structures
    and functions, with splines of its own, on training data. What is left of the budget goes into the formula's
    numbers. At the end they are rounded, and the run's record says in `summary.task` what was found:

    - `formula`, and `truth`, where the task knows it;
    - `formula_rmse`, the rounded formula's error on the test split's inputs: of exact targets, where the task has them;
    - `success`, whether that is less than 1e-6 of their deviation; only where the task has exact targets;
    - `spline_rmse`, the error on training data of the splines from which the formula came;
    - `numeric_edges`, how many edges stayed splines. There is no formula if there are any.

    Args:
        at: Fraction of the budget that is spent when it begins.
        names: Functions to try; null for those of `recover_formula`.
        round_to: Tolerance of the rounding, see `round_formula`; the numbers must have been trained to that.
        samples: How many examples of the training split it looks at.
        structures: Of `recover_formula`, and so are the others.
        starts: …
        candidates: …
        beams: …
        trials: …
        tolerance: …
    """

    def __init__(
        self,
        at: float = 0.5,
        names: Sequence[str] | None = None,
        round_to: float = 1e-4,
        samples: int = 1000,
        structures: int = 24,
        starts: int = 6,
        candidates: int = 4,
        beams: Sequence[int] = (1, 4),
        trials: int = 200,
        tolerance: float = 1e-5,
    ):
        from archzoo.models.kan_recovery import NAMES, check_options

        if not 0 <= at < 1:
            raise ValueError(f"at={at}: must be a fraction of the budget, 0 or more and less than 1")
        if not 0 < round_to <= 0.1:
            raise ValueError(f"round_to={round_to}: must be positive, at most 0.1")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 5:
            raise ValueError(f"samples={samples!r}: must be a whole number, 5 or more")
        self.at, self.round_to, self.samples = at, round_to, samples
        self.options = {
            "names": NAMES if names is None else tuple(names),
            "structures": structures,
            "starts": starts,
            "candidates": candidates,
            "beams": tuple(beams),
            "trials": trials,
            "tolerance": tolerance,
        }
        check_options(**self.options)  # type: ignore[arg-type]
        self.spline_rmse: float | None = None

    def check(self, config: TrainConfig, task: Task, model: nn.Module) -> None:
        """A ConfigError if the model is not a `KAN`, or the task no regression."""
        from archzoo.models.kan import KAN

        if not isinstance(model, KAN):
            raise ConfigError(
                "callbacks.symbolic_regression: needs a KAN, on inputs that are vectors; choose model=kan layer=kan"
            )
        if not isinstance(task, RegressionTask):
            raise ConfigError("callbacks.symbolic_regression: needs a task with a number to predict, as task=functions")

    def before_step(self, trainer: "Trainer") -> None:
        """Searches when it is time."""
        from archzoo.models.kan_recovery import recover_formula

        if self.spline_rmse is not None or trainer.spent() < self.at:
            return
        found = recover_formula(trainer.model, *self._data(trainer), **self.options)  # type: ignore[arg-type]
        self.spline_rmse = found.spline_rmse
        trainer.rebuild_optimizer()

    def _data(self, trainer: "Trainer") -> tuple[Tensor, Tensor]:
        split = trainer.task.train
        order = BatchOrder(len(split), min(self.samples, len(split)), seed=0, shuffle=False)  # type: ignore[arg-type]
        inputs, targets = next(train_batches(trainer.task, split, order, workers=0))
        return inputs.to(trainer.device, torch.float64), targets.to(trainer.device, torch.float64)

    def summarize(self, trainer: "Trainer", model: nn.Module) -> dict[str, Any]:
        """What was found."""
        from archzoo.models.kan import KAN

        assert isinstance(model, KAN)
        if self.spline_rmse is None:  # the budget ended before
            return {}
        numeric = len(model.numeric_edges())
        record: dict[str, Any] = {"spline_rmse": self.spline_rmse, "numeric_edges": float(numeric)}
        task, split = trainer.task, trainer.task.test
        order = BatchOrder(len(split), len(split), seed=0, shuffle=False)  # type: ignore[arg-type]
        inputs, targets = next(train_batches(task, split, order, workers=0))
        exact = task.truth(inputs) if hasattr(task, "truth") else None
        targets = targets.double() if exact is None else exact
        if text := getattr(task, "formula", ""):
            record["truth"] = text
        if not numeric:
            formula = model.lambdify(tolerance=self.round_to)
            record["formula"] = "; ".join(map(str, formula.expressions))
            error = float((formula(inputs.double()) - targets).square().mean().sqrt())
            record["formula_rmse"] = error if math.isfinite(error) else math.inf
        if exact is not None:
            limit = EXACT * float(targets.std())
            record["success"] = float(not numeric and record["formula_rmse"] <= limit)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Whether it has been done, by the error that it began with. The model's own state holds what was found."""
        return {"spline_rmse": self.spline_rmse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.spline_rmse = state["spline_rmse"]
