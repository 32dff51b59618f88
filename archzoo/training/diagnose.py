"""Steps whose loss or gradients are not finite: they are left out, counted, and traced to a module."""

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archzoo.training import distributed
from archzoo.training.spreading import local, whole

if TYPE_CHECKING:
    from archzoo.training.loop import Trainer

log = logging.getLogger("archzoo")


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

    if distributed.exchange(not torch.isfinite(trainer.inputs).all())[0]:
        return found("", "input")
    parameters = dict(model.named_parameters())
    weights = list(parameters)
    if (bad := _first(parameters.values())) < len(weights):
        return found(weights[bad].rpartition(".")[0], "weight")
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
            trainer.reshard()
        if first:
            return found(first[0], "output")
        return found("", "loss")
    bad_gradients = [n for n, p in parameters.items() if p.grad is not None and not torch.isfinite(local(p.grad)).all()]
    # Where there is none here, it is in another process's part.
    return found(bad_gradients[-1].rpartition(".")[0] if bad_gradients else "", "gradient")


def _first(tensors: Iterable[Any]) -> int:
    """Number of the first that is not finite, in any process: all go on alike. How many there are, if all are."""
    finite = [bool(torch.isfinite(local(tensor)).all()) for tensor in tensors]
    return -int(distributed.exchange(-finite.index(False) if False in finite else -len(finite))[0])


def _hook(name: str, first: list[str]) -> Any:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not torch.isfinite(output).all():
            first.append(name)

    return look


class BadSteps:
    """Finds a trainer's steps whose loss or gradients are not finite.

    Attributes:
        count: How many there were.
        in_a_row: Those since the last step that was sound.
        first: The first of those in a row; None if there are none.
    """

    def __init__(self, trainer: "Trainer"):
        self.trainer, self.count, self.in_a_row = trainer, 0, 0
        self.first: Divergence | None = None
        self._found, self._one = torch.zeros((), device=trainer.device), torch.ones((), device=trainer.device)

    def most(self) -> int:
        """How many in a row end the run; 0: they are not looked for."""
        asked, steps = self.trainer.config.trainer.max_bad_steps, self.trainer.total_steps
        return asked if steps is None else min(asked, max(1, steps // 2))

    def found(self, loss: Tensor | float, norm: Tensor | None = None) -> bool:
        """Whether the loss or its gradients are not finite; counts it, and finds out where.

        A loss that is still on a GPU is not looked at: gradients of a loss that is not finite are not either.
        """
        trainer = self.trainer
        if not trainer.config.trainer.max_bad_steps:
            if isinstance(loss, float):
                trainer._check_finite(loss)
            return False
        bad = isinstance(loss, float) and not math.isfinite(loss)
        if not bad and trainer.scaler is None:  # what scales the loss leaves out steps by itself, and lowers the scale
            bad = not self._gradients_are_finite(norm)
        if not bad:
            self.in_a_row, self.first = 0, None
            return False
        self.count += 1
        self.in_a_row += 1
        if self.first is None:
            self.first = diagnose(trainer, float(loss))
            log.warning("%s; this step is left out", self.first)
        return True

    def _gradients_are_finite(self, norm: Tensor | None) -> bool:
        if norm is not None:
            return math.isfinite(float(whole(norm)))
        groups, sharded = self.trainer.optimizer.param_groups, self.trainer.sharded
        grads = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
        if self.trainer.has_complex:
            grads = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
        # What torch's own GradScaler calls: one operator over all gradients, which it multiplies by one.
        found = self._found.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, self._one)
        return not (distributed.exchange(found.item())[0] if sharded else found.item())

    def is_sound(self) -> bool:
        """Whether the state may be saved: parameters are finite, and the last step was not left out.

        The next step decides on parameters that something else than a step has changed.
        """
        finite = all(torch.isfinite(local(p)).all() for p in self.trainer.model.parameters())
        bad = bool(distributed.exchange(self.in_a_row > 0 or not finite)[0])
        if bad:
            log.warning("no checkpoint at step %d: loss, gradients or parameters are not finite", self.trainer.step)
        return not bad
