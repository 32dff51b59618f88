"""What happens during training besides training: one small interface, and the callbacks that layers need.

A callback is chosen by name in the config, `callbacks: {sparsity_schedule: {weight: 10, start: 1000, end: 2000}}`. An
experiment's own goes through `register_callback`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archzoo.registry import Registry

if TYPE_CHECKING:
    from archzoo.training.loop import Trainer


class Callback:
    """Does nothing; a subclass overrides what it needs. Each method gets the trainer, whose attributes it may use.

    It must be a pure function of the step, or say what it remembers by `state_dict`, so that a run that is resumed ends
    with the same bits.
    """

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process; the model is built and a checkpoint, if any, is loaded."""

    def before_step(self, trainer: "Trainer") -> None:
        """Before the forward pass of step `trainer.step`."""

    def after_step(self, trainer: "Trainer") -> None:
        """After the optimizer's step and `constrain_()`; `trainer.step` counts the step already."""

    def on_evaluate(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """After an evaluation; what is added to `metrics` is recorded with them."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, before the final evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive an interruption, as plain JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


callbacks: Registry[type[Callback]] = Registry("callback", "archzoo.training.callbacks")
register_callback = callbacks.register


def _check_ramp(start: float, end: float) -> None:
    if not 0 <= start <= end <= 1:
        raise ValueError(f"start={start}, end={end}: must be fractions of the budget with 0 <= start <= end <= 1")


@register_callback("regularization_warmup")
class RegularizationWarmup(Callback):
    """Multiplies every `regularization_loss()` by a factor that goes from 0 to 1 along a straight line.

    Args:
        start: Fraction of the budget up to which the factor is 0.
        end: Fraction of the budget from which it is 1.
    """

    def __init__(self, start: float = 0.0, end: float = 0.1):
        _check_ramp(start, end)
        self.start, self.end = start, end

    def before_step(self, trainer: "Trainer") -> None:
        """Sets the factor."""
        spent = trainer.spent()
        ramp = (spent - self.start) / (self.end - self.start) if self.end > self.start else float(spent >= self.start)
        trainer.regularization_factor = min(1.0, max(0.0, ramp))


@register_callback("sparsity_schedule")
class SparsityScheduleCallback(Callback):
    """Warms up the sparsity regulariser of NAU and NMU (arXiv 2001.05016, section 2.4): too early, it freezes errors.

    Args:
        weight: Final `sparsity_weight` of every submodule that has one.
        start: Optimizer step up to which it is 0.
        end: Optimizer step from which it is `weight`.
    """

    def __init__(self, weight: float, start: int, end: int):
        from archzoo.layers.arithmetic import SparsitySchedule

        self.schedule = SparsitySchedule(weight, start, end)

    def before_step(self, trainer: "Trainer") -> None:
        """Sets the weight of this step."""
        self.schedule.apply_(trainer.model, trainer.step)


@register_callback("grid_update")
class GridUpdate(Callback):
    """Moves the knots of every layer with an `update_grid` method to where its inputs are (KAN, arXiv 2404.19756).

    The layer keeps its function, but its weights get another meaning, so the optimizer's moments of them are dropped.

    Args:
        every: Steps between updates.
        until: Fraction of the budget after which the grids stay as they are.
    """

    def __init__(self, every: int = 50, until: float = 0.2):
        if every < 1:
            raise ValueError(f"every={every}: must be 1 or more steps")
        if not 0 <= until <= 1:
            raise ValueError(f"until={until}: must be a fraction of the budget between 0 and 1")
        self.every, self.until = every, until

    def after_step(self, trainer: "Trainer") -> None:
        """Updates the grids, first layers first, each from the inputs that it gets after those before it moved."""
        if trainer.step % self.every or trainer.spent() > self.until:
            return
        layers = [m for m in trainer.model.modules() if callable(getattr(m, "update_grid", None))]
        was_training = trainer.model.training
        trainer.model.eval()
        with torch.no_grad():
            for layer in layers:
                captured: list[Tensor] = []
                hook = layer.register_forward_pre_hook(lambda _, inputs, captured=captured: captured.append(inputs[0]))
                trainer.model(trainer.inputs)
                hook.remove()
                if captured:
                    _update_grid(layer, captured[0])
                    trainer.reset_optimizer_state(layer.parameters())
        trainer.model.train(was_training)


def _update_grid(layer: nn.Module, x: Tensor) -> None:
    layer.update_grid(x)  # type: ignore[operator]  # checked by the caller: a method of this name
