"""From a config to an optimizer, and to the schedule of its learning rate."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from archzoo.names import suggest
from archzoo.training.build import refused
from archzoo.training.config import ConfigError, OptimizerConfig, SchedulerConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of timm over the parameters that are trained, or `lbfgs`: torch's.

    Vectors, as biases and norms, are not decayed, nor what the `no_weight_decay()` of the model or of a module in it
    names.

    Raises:
        ConfigError: If there is no such optimizer, or it does not take an option.
    """
    if config.name == "lbfgs":
        return _build_lbfgs(config, model)
    import timm.optim

    names = ["lbfgs", *map(str, timm.optim.list_optimizers())]  # type: ignore[attr-defined]  # timm does not say that it exports it
    if config.name not in names:
        raise ConfigError(f"optimizer.name={config.name}: no such optimizer, {suggest(config.name, names)}")
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.options.items()}
    try:
        with _asked_of_all(model):
            return timm.optim.create_optimizer_v2(  # type: ignore[attr-defined]  # likewise
                model,
                opt=config.name,
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                **options,
            )
    except (TypeError, ValueError) as error:
        raise refused("optimizer", vars(config), error) from error


@contextmanager
def _asked_of_all(model: nn.Module) -> Iterator[None]:
    """Lets `model.no_weight_decay()`, which timm asks of the model alone, answer for the layers in it too."""
    names = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if callable(method := getattr(module, "no_weight_decay", None))
        for name in method()
    }
    vars(model)["no_weight_decay"] = lambda: names
    try:
        yield
    finally:
        del vars(model)["no_weight_decay"]


def _build_lbfgs(config: OptimizerConfig, model: nn.Module) -> torch.optim.LBFGS:
    """torch's L-BFGS, with a strong Wolfe line search unless the options say otherwise. `momentum` is not its own."""
    options: dict[str, Any] = {"line_search_fn": "strong_wolfe", **config.options}
    wrong = f"optimizer.options.{{}}={{}}: must be {{}} (optimizer {config.name})"
    for key in ("max_iter", "max_eval", "history_size"):
        value = options.get(key, 1)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (key == "max_eval" and value is None):
            raise ConfigError(wrong.format(key, value, f"a whole number, 1 or more, as optimizer.options.{key}=20"))
    for key in ("tolerance_grad", "tolerance_change"):
        value = options.get(key, 0.0)
        if not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise ConfigError(wrong.format(key, value, f"0 or more, as optimizer.options.{key}=1e-9"))
    if (value := options["line_search_fn"]) not in ("strong_wolfe", None):
        raise ConfigError(wrong.format("line_search_fn", value, "strong_wolfe, or null for steps of size lr"))
    try:
        return torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=config.lr, **options)
    except (TypeError, ValueError) as error:
        raise refused("optimizer", vars(config), error) from error


def carry_over(
    old: torch.optim.Optimizer, new: torch.optim.Optimizer, was: Mapping[nn.Parameter, nn.Parameter]
) -> None:
    """Gives a new optimizer of the same configuration what the old one knows of the parameters that both have.

    Those that have taken another's place, as `was` says, have what that one had.

    Its groups, of which there are as many unless the last parameter of one has gone, get the old ones' learning rate
    and counters. L-BFGS knows nothing of single parameters.
    """
    if isinstance(new, torch.optim.LBFGS):
        new.param_groups[0]["lr"] = old.param_groups[0]["lr"]
        return
    if len(new.param_groups) == len(old.param_groups):
        for group, before in zip(new.param_groups, old.param_groups, strict=True):
            group |= {key: value for key, value in before.items() if key != "params"}
    for parameter in (p for group in new.param_groups for p in group["params"]):
        if (before := was.get(parameter, parameter)) in old.state:
            new.state[parameter] = old.state[before]


class Schedule:
    """Sets the learning rate from the part of the budget that is spent, so that it needs no state of its own.

    Args:
        config: The schedule.
        optimizer: Whose groups' `lr` is set.
        resolution: Number of equal parts of the budget that have a rate each: its steps, if it is counted in steps.
    """

    def __init__(self, config: SchedulerConfig, optimizer: torch.optim.Optimizer, resolution: int):
        import timm.scheduler

        self.resolution = resolution
        warmup = round(config.warmup * resolution)
        if config.name == "none":
            # timm has no constant schedule: a step that is never reached.
            name, decay_every = "step", 2 * resolution
        else:
            name, decay_every = config.name, max(1, round(config.decay_every * resolution))
        self.scheduler, _ = timm.scheduler.create_scheduler_v2(  # type: ignore[attr-defined]  # likewise
            optimizer,
            sched=name,
            num_epochs=resolution,
            decay_epochs=decay_every,
            decay_milestones=[round(m * resolution) + 1 for m in config.milestones],  # timm decays one step early
            decay_rate=config.decay_rate,
            min_lr=config.min_lr,
            warmup_epochs=warmup,
            warmup_lr=optimizer.param_groups[0]["lr"] / (warmup + 1),
            warmup_prefix=False,
        )
        assert self.scheduler is not None

    def set(self, fraction: float) -> None:
        """Sets the rate for a step that begins when `fraction` of the budget is spent."""
        self.scheduler.step(round(fraction * self.resolution))
