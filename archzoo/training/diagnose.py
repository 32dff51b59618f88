"""Where a step went wrong whose loss or gradients are not finite."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from archzoo.training.loop import Trainer


@dataclass(frozen=True)
class Divergence:
    """The first step whose loss or gradients were not finite, and the first module to blame.

    Attributes:
        step: Number of the step, from 1.
        batch: Number of its last batch, from 1, in the order of the run's `seed` and epochs.
        loss: The loss there, as text: nan, inf or -inf; or a number, where a gradient was not finite alone.
        module: Qualified name of the module; empty for the loss itself.
        what: `"output"` or `"gradient"`: which of the module's tensors was the first; `"weight"` where its parameters
            were not finite before the step; `"input"` for the data, `"loss"` where all outputs were finite and their
            loss was not.
    """

    step: int
    batch: int
    loss: str
    module: str
    what: str

    def __str__(self) -> str:
        culprit = f"the {self.what} of {self.module}" if self.module else f"the {self.what}"
        was = f"the loss became {self.loss}" if not math.isfinite(float(self.loss)) else "a gradient was not finite"
        return f"{was} at step {self.step}, batch {self.batch}; first not finite: {culprit}"

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def diagnose(trainer: "Trainer", loss: float) -> Divergence:
    """Runs the last batch again and finds the first module whose weight, output or gradient is not finite.

    A gradient comes from the loss backward, so that of several modules with such gradients the last one is the first
    that it reached.
    """
    model, step = trainer.model, trainer.step + 1

    def found(module: str, what: str) -> Divergence:
        return Divergence(step, step * trainer.config.trainer.accumulate, str(loss), module, what)

    if not torch.isfinite(trainer.inputs).all():
        return found("", "input")
    parameters = dict(model.named_parameters())
    if bad := _bad(parameters):
        return found(bad[0], "weight")
    if not math.isfinite(loss):
        first: list[str] = []
        leaves = [(name, m) for name, m in model.named_modules() if not list(m.children())]
        hooks = [m.register_forward_hook(_hook(name, first)) for name, m in leaves]
        try:
            with torch.no_grad(), trainer._autocast():
                model(trainer.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if first:
            return found(first[0], "output")
        return found("", "loss")
    if bad := _bad({name: p.grad for name, p in parameters.items() if p.grad is not None}):
        return found(bad[-1], "gradient")
    return found("", "gradient")  # of another process's part of the batch


def _bad(tensors: dict[str, Any]) -> list[str]:
    """Modules of the tensors that are not finite; of sharded ones, this process's part is looked at."""
    return [name.rpartition(".")[0] for name, t in tensors.items() if not torch.isfinite(_own(t)).all()]


def _own(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _hook(name: str, first: list[str]) -> Any:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not torch.isfinite(output).all():
            first.append(name)

    return look
