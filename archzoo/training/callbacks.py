"""What happens during training besides training: one small interface, and the callbacks that layers need.

A callback is chosen by name in the config, `callbacks: {sparsity_schedule: {weight: 10, start: 1000, end: 2000}}`. An
experiment's own goes through `register_callback`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archzoo.budget import Match
from archzoo.registry import Registry, get_layer, layer_options
from archzoo.tasks.task import Task
from archzoo.training import distributed
from archzoo.training.config import ConfigError, TrainConfig
from archzoo.training.spreading import whole_parameters

if TYPE_CHECKING:
    from archzoo.training.loop import Trainer


class Callback:
    """Does nothing; a subclass overrides what it needs. Each method gets the trainer, whose attributes it may use.

    It must be a pure function of the step, or say what it remembers by `state_dict`, so that a run that is resumed ends
    with the same bits. One that replaces, adds, removes, freezes or frees parameters does so inside
    `trainer.restructuring()`, and says by `restore` how to do it again; one that writes to parameters, inside
    `spreading.whole_parameters`; one that asks a model for more than its output asks `trainer.put_together(model)`.
    These matter where the model is sharded.
    """

    def prepare(self, config: TrainConfig, match: Match | None) -> Mapping[str, Any]:
        """Before the model is built.

        Args:
            config: The run's.
            match: What the budget chose for the contestant.

        Returns:
            Options of the layer with which the model is built, where they are not the configured or chosen ones.
        """
        return {}

    def check(self, config: TrainConfig, task: Task, model: nn.Module) -> None:
        """Refuses what could not be done later: before the run's folder is made, and again before the first step.

        Args:
            config: The run's.
            task: Its task.
            model: First as it will be built, on the meta device, and so without values; then as it is trained.

        Raises:
            ConfigError: With `callbacks.NAME`, and what would be right.
        """

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process; the model is built and a checkpoint, if any, is loaded."""

    def before_step(self, trainer: "Trainer") -> None:
        """Before the forward pass of step `trainer.step`."""

    def after_step(self, trainer: "Trainer") -> None:
        """After the optimizer's step and `constrain_()`; `trainer.step` counts the step already.

        Not after a step that was left out, because its loss or gradients were not finite.
        """

    def on_evaluate(self, trainer: "Trainer", metrics: dict[str, float]) -> None:
        """After an evaluation; what is added to `metrics` is recorded with them."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, before the final evaluation."""

    def summarize(self, trainer: "Trainer", model: nn.Module) -> Mapping[str, Any]:
        """What the run's record says of it, in `summary.task` beside what the task says: numbers, and texts.

        Args:
            trainer: At the end of training.
            model: The model that is scored, with the best weights.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive an interruption, as plain JSON."""
        return {}

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Gives a freshly built model the structure that it had when this callback's `state_dict` was `state`.

        Called before the weights of a checkpoint or of a finished run are loaded, which must fit; of several callbacks
        in their order. What the layers' own `load_state_dict` brings about need not be done here.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; called when the weights are loaded."""


callbacks: Registry[type[Callback]] = Registry("callback", "archzoo.training")
register_callback = callbacks.register


def _numbers(values: Any, kind: Any) -> bool:
    """Whether these are a list of numbers of this kind."""
    return isinstance(values, list | tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _increasing(values: Any, kind: Any) -> bool:
    """The same, and each is larger than the one before."""
    return _numbers(values, kind) and all(a < b for a, b in itertools.pairwise(values))


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

    A module inside one that has the method too is left to that one. The layer keeps its function, but its weights get
    another meaning: the optimizer's moments of them are dropped (L-BFGS: its whole memory), and a moving average of the
    weights starts again. Where several processes train one model, the inputs are the whole batch of them all, as in
    one process, and parameters and buffers behind it are those of rank 0.

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
        was_training = trainer.model.training
        trainer.model.eval()
        inputs, updated = distributed.whole_batch(trainer.inputs), False
        with torch.no_grad():
            for layer in list(outermost(trainer.model, "update_grid")):
                captured: list[Tensor] = []
                hook = layer.register_forward_pre_hook(lambda _, args, captured=captured: captured.append(args[0]))
                trainer.model(inputs)
                hook.remove()
                trainer.reshard()
                if captured:
                    with whole_parameters([layer]):
                        layer.update_grid(captured[0])  # type: ignore[operator]  # a method of this name
                        distributed.copy_from_rank_0(itertools.chain(layer.parameters(), layer.buffers()))
                    trainer.reset_optimizer_state(layer.parameters())
                    updated = True
        trainer.model.train(was_training)
        if updated:
            trainer.restart_average()


@register_callback("grid_refine")
class GridRefine(Callback):
    """Gives every layer with a `refine` method finer grids in stages (KAN, arXiv 2404.19756, section 2.4).

    A module inside one that has the method too is left to that one. The functions stay, the parameters are new: see
    `Trainer.rebuild_optimizer`. In particular the run's best evaluation is then one of the last grid.

    The sizes are given, with where they begin, or left to the budget: where `budget.vary` chooses the layer's
    `grid_size`, training begins with the configured one and ends with the chosen one, which is what was counted.

    Args:
        sizes: Grid sizes, each larger than the one before, and the first no smaller than the layers' own. None: from
            the configured one to the one that the budget chose, each larger by about the same factor.
        at: Fraction of the budget at which each of them begins. With `sizes` only.
        stages: Number of grids, the first one included, that share the budget evenly. Without `sizes` only.
    """

    def __init__(
        self, sizes: Sequence[int] | None = None, at: Sequence[float] | None = None, stages: int | None = None
    ):
        self.sizes: list[int] = []
        self.at: list[float] = []
        self.done, self.stages = 0, stages
        if stages is not None:
            if sizes is not None or at is not None:
                raise ValueError(f"stages={stages}: leave it out, or leave out sizes={sizes} and at={at}")
            if isinstance(stages, bool) or not isinstance(stages, int) or stages < 2:
                raise ValueError(f"stages={stages}: must be a whole number of grids, 2 or more, as stages=5")
            return
        if sizes is None or not (_increasing(sizes, int) and sizes and sizes[0] >= 1):
            raise ValueError(f"sizes={sizes}: must be whole numbers, each larger than the last, as [5, 10, 20]")
        if at is None or not (_increasing(at, (int, float)) and all(0 <= fraction < 1 for fraction in at)):
            raise ValueError(
                f"at={at}: must be fractions of the budget from 0 to less than 1, each larger than the last, as "
                "[0.2, 0.4, 0.6]"
            )
        if len(at) != len(sizes):
            raise ValueError(f"at={at}: must have one fraction for each of sizes={sizes}")
        self.sizes, self.at = list(sizes), list(at)

    def prepare(self, config: TrainConfig, match: Match | None) -> Mapping[str, Any]:
        """With `stages`, plans the grids from the configured size to the one that the budget chose.

        Raises:
            ConfigError: If the contestant has grids, and the budget did not choose their size.
        """
        name = config.layer["name"]
        if self.stages is None or not hasattr(get_layer(name).cls, "refine"):
            return {}
        if match is None or match.option != "grid_size" or match.value is None:
            raise ConfigError(
                f"callbacks.grid_refine.stages={self.stages}: nothing says how fine the grids of layer {name} shall "
                f"become; have the budget choose, by +budget.vary.{name}=grid_size, or give sizes=[5,10,20] and "
                "at=[0.25,0.5,0.75] instead of stages"
            )
        first, last = config.layer.get("grid_size", layer_options(name)["grid_size"]), match.value
        if first >= last:
            return {}
        ratio = (last / first) ** (1 / (self.stages - 1))
        self.sizes = sorted({round(first * ratio**i) for i in range(1, self.stages)} - {first})
        self.at = [i / (len(self.sizes) + 1) for i in range(1, len(self.sizes) + 1)]
        return {"grid_size": first}

    def check(self, config: TrainConfig, task: Task, model: nn.Module) -> None:
        """A ConfigError if a layer's grid is finer than the next one."""
        for layer in outermost(model, "refine"):
            size = getattr(layer, "grid_size", None)
            if isinstance(size, int) and self.done < len(self.sizes) and size > self.sizes[self.done]:
                raise ConfigError(
                    f"callbacks.grid_refine.sizes={self.sizes}: {type(layer).__name__} has grid_size={size} already, "
                    f"and a grid can only become finer; begin with {size} or more"
                )

    def before_step(self, trainer: "Trainer") -> None:
        """Refines when it is time."""
        due = sum(trainer.spent() >= fraction for fraction in self.at)
        if due > self.done and next(outermost(trainer.model, "refine"), None) is not None:
            with trainer.restructuring():
                for size in self.sizes[self.done : due]:
                    self._refine(trainer.model, size)
        self.done = max(due, self.done)

    def _refine(self, model: nn.Module, size: int) -> None:
        for layer in list(outermost(model, "refine")):
            layer.refine(size)  # type: ignore[operator]  # a method of this name

    def state_dict(self) -> dict[str, Any]:
        """How many stages have begun."""
        return {"done": self.done}

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Refines as often."""
        for size in self.sizes[: state["done"]]:
            self._refine(model, size)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.done = state["done"]


@register_callback("selection_stages")
class SelectionStages(Callback):
    """Leads layers that choose among candidates through their stages: full, selective, pruned (S-KAN, 2408.08338).

    Calls `select_()`, and later `prune_()`, on every module that has the method; a module inside one that has it too is
    left to that one. See `Trainer.rebuild_optimizer` for what a new stage means to optimizer, average and best weights.

    Args:
        select: Fraction of the budget at which the candidates are selected.
        prune: Fraction at which those that were not are removed.
    """

    def __init__(self, select: float = 1 / 3, prune: float = 2 / 3):
        if not (_numbers([select, prune], (int, float)) and 0 <= select <= prune < 1):
            raise ValueError(
                f"select={select}, prune={prune}: must be fractions of the budget with 0 <= select <= prune < 1"
            )
        self.stages, self.done = (("select_", select), ("prune_", prune)), 0

    def before_step(self, trainer: "Trainer") -> None:
        """Begins a stage when it is time."""
        for method, fraction in self.stages[self.done :]:
            if trainer.spent() < fraction:
                break
            self.done += 1
            if next(outermost(trainer.model, method), None) is not None:
                with trainer.restructuring():
                    for layer in list(outermost(trainer.model, method)):
                        getattr(layer, method)()

    def state_dict(self) -> dict[str, Any]:
        """How many stages have begun. The layers' own state says what was selected, and loading it restores it."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""
        self.done = state["done"]


def outermost(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """Modules that have a method of this name and do not lie inside another that has it, each once, in their order."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module in seen:
            return
        seen.add(module)
        if callable(getattr(module, method, None)):
            yield module
        else:
            for child in module.children():
                yield from walk(child)

    return walk(model)
