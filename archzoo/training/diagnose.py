"""Where a run that diverged first went wrong."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from archzoo.training.loop import Trainer


@dataclass(frozen=True)
class Divergence:
    """The step at which the loss was no longer finite, and the first module to blame.

    Attributes:
        step: Number of the step, from 1.
        loss: The loss there: nan, inf or -inf, as text.
        module: Qualified name of the module; empty for the loss itself.
        what: `"output"` or `"gradient"`: which of the module's tensors was the first; `"input"` for the data, `"loss"`
            where all outputs were finite and their loss was not.
    """

    step: int
    loss: str
    module: str
    what: str

    def __str__(self) -> str:
        culprit = f"the {self.what} of {self.module}" if self.module else f"the {self.what}"
        return f"the loss became {self.loss} at step {self.step}; first not finite: {culprit}"

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def diagnose(trainer: "Trainer", loss: float) -> Divergence:
    """Runs the last batch again and finds the first module whose output, gradient or weight is not finite.

    Where weights are not finite already, a gradient of the step before was to blame. It came from the loss backward, so
    that of several modules with such weights the last one is the first that it reached.
    """
    model, step = trainer.model, trainer.step + 1
    if not torch.isfinite(trainer.inputs).all():
        return Divergence(step, str(loss), "", "input")
    bad_weights = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad_weights:
        return Divergence(step, str(loss), bad_weights[-1].rpartition(".")[0], "gradient")
    first: list[str] = []
    hooks = [m.register_forward_hook(_hook(name, first)) for name, m in model.named_modules() if not list(m.children())]
    try:
        with torch.no_grad(), trainer._autocast():
            model(trainer.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if first:
        return Divergence(step, str(loss), first[0], "output")
    return Divergence(step, str(loss), "", "loss")


def _hook(name: str, first: list[str]) -> Any:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not torch.isfinite(output).all():
            first.append(name)

    return look
