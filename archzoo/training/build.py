"""From a config to its parts: the task, the model at its budget, the device, the number of steps."""

import functools
import inspect
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archzoo.arguments import INFINITE, check_types
from archzoo.budget import Match, count_flops, count_parameters, match_option, match_widths
from archzoo.models.model import LayerFactory, models
from archzoo.models.stacked import build_stacked
from archzoo.names import suggest
from archzoo.registry import layer_options, list_layers
from archzoo.tasks.task import DatasetError, Task, tasks
from archzoo.training import distributed
from archzoo.training.blocks import recompute
from archzoo.training.config import (
    ConfigError,
    TrainConfig,
    model_key,
)
from archzoo.training.swapping import swap_in

if TYPE_CHECKING:
    from archzoo.training.callbacks import Callback


DEEPEST = 1000
"""Blocks of a model at most: to build it takes time, even where it takes no memory."""


def data_dir(config: TrainConfig) -> Path | None:
    """The data folder: `data_dir`, else the environment variable ARCHZOO_DATA, else None.

    Raises:
        ConfigError: If the folder does not exist.
    """
    for key, value in (("data_dir", config.data_dir), ("ARCHZOO_DATA", os.environ.get("ARCHZOO_DATA"))):
        if value:
            folder = Path(value).expanduser()
            if not folder.is_dir():
                raise ConfigError(
                    f"{key}={value}: there is no such folder; give one that holds the data sets, or make an empty one, "
                    "into which they are downloaded"
                )
            return folder.absolute()
    return None


def build_task(config: TrainConfig) -> Task:
    """The task with its data.

    Raises:
        ConfigError: If its name or an option is wrong, or if it cannot be trained with these settings.
        DatasetError: If its data is not to be had.
    """
    task = _task(json.dumps(config.task, sort_keys=True), data_dir(config), config.seed)
    if config.trainer.compile and not task.compilable:
        raise ConfigError(
            f"trainer.compile=true: task {config.task['name']} differentiates the model by its inputs, and a compiled "
            "model can be differentiated once only; set trainer.compile=false"
        )
    name = model_key(config)
    takes_tokens = name in models.names() and getattr(models.get(name), "takes_tokens", False)
    if takes_tokens == task.input_dtype.is_floating_point:
        takes, has = ("tokens", "real numbers") if takes_tokens else ("real numbers", "tokens; set model=transformer")
        raise ConfigError(f"model={name}: takes {takes}, and the inputs of task {config.task['name']} are {has}")
    if name in models.names() and callable(check := getattr(models.get(name), "check_task", None)):
        try:
            check(task)
        except ValueError as error:
            raise ConfigError(f"model={name}, task={config.task['name']}: {error}") from error
    return task


@functools.lru_cache(maxsize=4)  # the runs of a sweep that share a process share the data
def _task(options: str, folder: Path | None, seed: int) -> Task:
    kwargs = json.loads(options)
    name = kwargs.pop("name")
    try:
        check_types(tasks.get(name), kwargs)
        return tasks.create(name, data_dir=folder, seed=seed, **kwargs)
    except DatasetError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"task={name}: {error}") from error


def _factory(layer: dict[str, Any]) -> LayerFactory:
    options = dict(layer)
    name = options.pop("name")
    try:
        factory = LayerFactory(name, options)
    except ValueError as error:
        raise ConfigError(f"layer.name={name}: {error}") from error
    try:
        check_types(factory.entry.cls, options, INFINITE)
    except ValueError as error:
        raise refused("layer", layer, error) from error
    return factory


def _build(config: TrainConfig, layer: dict[str, Any], task: Task, widths: tuple[int, ...] | None) -> nn.Module:
    options, name = dict(config.model), model_key(config)
    del options["library" if name == options.get("library") else "name"]
    if name in models.names():
        _check_model(name, options)
    if widths is not None:
        options |= {"widths": widths}
    if options.get("hidden") is not None:
        options["hidden"] = _hidden(config, task)
    if name in models.names() and "data_dir" in inspect.signature(models.get(name)).parameters:
        options["data_dir"] = data_dir(config)
    return models.create(name, _factory(layer), task.input_shape, task.output_size, **options)


def _check_model(name: str, options: dict[str, Any]) -> None:
    """A ValueError for an option of another type, and for a depth that takes too long to build."""
    check_types(models.get(name), {k: v for k, v in options.items() if (k, v) != ("hidden", "task")})  # see `_hidden`
    if not 0 <= options.get("depth", 0) <= DEEPEST:
        raise ValueError(f"depth={options['depth']}: must be from 0 to {DEEPEST}")


def _hidden(config: TrainConfig, task: Task) -> Any:
    """The hidden levels that a configuration lists one by one, or leaves to what the task knows."""
    hidden = config.model["hidden"]
    if config.budget.match != "none":
        raise ConfigError(f"model.hidden={hidden}: leaves no width that a budget could choose; set budget.match=none")
    if hidden != "task":
        return hidden
    known = getattr(task, "hidden", None)
    if not known:
        options = "".join(f", {key}={value}" for key, value in config.task.items() if key == "function")
        raise ConfigError(
            f"model.hidden=task: none is known for task {config.task['name']}{options}; give a list, as [5] or [[2, 1]]"
        )
    return known


def refused(group: str, values: dict[str, Any], error: Exception) -> ConfigError:
    """What a class says of its arguments, in terms of the config: `grid_size=0: …` becomes `layer.grid_size=0: …`."""
    if _names_a_key(error, values):
        return ConfigError(f"{group}.{error} ({group} {values['name']})")
    return ConfigError(f"{group}={values['name']}: {error}")


def _names_a_key(error: Exception, values: dict[str, Any]) -> bool:
    """Whether an error is about one of the arguments: `grid_size=0: …`."""
    return any(str(error).startswith(f"{key}=") for key in values)


def _count(config: TrainConfig, layer: dict[str, Any], task: Task, widths: tuple[int, ...]) -> int:
    with torch.device("meta"):
        model = _build(config, layer, task, widths)
        if config.budget.match == "params":
            return count_parameters(model)
        return count_flops(model.eval(), example_batch(task, 1))


_chosen: dict[str, Match | None] = {}


def choose_widths(config: TrainConfig, task: Task) -> Match | None:
    """The hidden widths at which the contestant's count meets the budget, or the value of the option that
    `budget.vary` names for its layer; None if nothing is to be matched.

    What was chosen once is remembered: a search builds 100 models and more, and the seeds of a sweep share it.

    Raises:
        ConfigError: If the layer, the model or the budget cannot be had; names the nearest reachable count.
    """
    asked = [config.task, config.model, config.layer, vars(config.budget), config.swap, config.swap_init]
    shapes = [task.input_shape, task.output_size, str(task.input_dtype)]
    key = json.dumps([*asked, *shapes], sort_keys=True)
    if key not in _chosen:
        with torch.random.fork_rng(devices=[]):  # searched or remembered, a run has the same random numbers after it
            _chosen[key] = _choose_widths(config, task)
    return _chosen[key]


def _choose_widths(config: TrainConfig, task: Task) -> Match | None:
    if "library" in config.model:  # by `archzoo.swap`, when the model is built; here, whether it can be
        return _trial(config, config.layer, task)[1]
    budget, layer = config.budget, config.layer
    key = "parameters" if budget.match == "params" else "FLOPs an example"
    own = _own_count(config, layer, task)
    if budget.match == "none":
        return None
    option = _varied_option(config)
    if isinstance(budget.to, str):
        if budget.to not in list_layers():
            raise ConfigError(f"budget.to={budget.to}: no such layer, {suggest(budget.to, list_layers())}")
        if budget.to == layer["name"]:
            if isinstance(own, Exception):
                if _names_a_key(own, config.model):
                    raise refused("model", config.model, own) from own
                refuses = f"model.width={_widths(config)[0]}: layer {layer['name']} refuses this width"
                raise ConfigError(f"{refuses}, {own}") from own
            return Match(_widths(config), own, own)
        try:
            target = float(_count(config, {"name": budget.to}, task, _widths(config)))
        except (ValueError, TypeError) as error:
            if _names_a_key(error, config.model):
                raise refused("model", config.model, error) from error
            raise ConfigError(f"budget.to={budget.to}: {error}") from error
    else:
        target = float(budget.to)

    def count(widths: tuple[int, ...], changed: dict[str, Any] | None = None) -> int | None:
        try:
            return _count(config, layer | (changed or {}), task, widths)
        except ValueError:  # a width that the layer cannot have, as 6 for phm with n=4
            return None

    own_widths = _widths(config)
    if not (own_widths or option):
        raise ConfigError("model.depth=0: there is no hidden width to choose; set model.depth=1 or budget.match=none")
    try:
        if option:
            match = match_option(
                lambda value: count(own_widths, {option: value}), option, target, budget.tolerance, own_widths
            )
        else:
            match = match_widths(count, len(own_widths), target, budget.tolerance)
    except ValueError as error:
        keys = f"budget.to={budget.to}" + (f", budget.vary.{layer['name']}={option}" if option else "")
        raise ConfigError(
            f"{keys}: {target:,.0f} {key} cannot be reached with layer {layer['name']}; {error}"
        ) from error
    if abs(match.deviation) > budget.tolerance and budget.unreachable == "error":
        chosen = f"{option} {match.value}" if option else f"widths {list(match.widths)}"
        raise ConfigError(
            f"budget.to={budget.to}: no {option or 'width'} gives layer {layer['name']} {target:,.0f} {key} within "
            f"budget.tolerance={budget.tolerance:g}; the nearest reachable count is {match.count:,} "
            f"({match.deviation:+.1%}, {chosen}); accept it with budget.unreachable=nearest"
        )
    return match


def check_memory(config: TrainConfig, task: Task, match: Match | None) -> None:
    """Refuses a model or a batch that this machine has no memory for, before it is allocated.

    Args:
        config: The run's.
        task: Its task.
        match: What the budget chose.

    Raises:
        ConfigError: With the bytes that it takes and the bytes that there are.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def needs(what: str, number: float, size: int, right: str) -> None:
        if number * size > memory:
            taken, there = (f"{count / 2**30:,.0f} GiB" for count in (number * size, memory))
            raise ConfigError(f"{what} take {taken}, and this machine has {there}; {right}")

    if "library" not in config.model:
        layer = _chosen_layer(config, match)
        with torch.device("meta"):
            parameters = count_parameters(_build(config, layer, task, match.widths if match else None))
        keys = ", ".join(f"model.{key}={config.model[key]}" for key in ("width", "depth") if key in config.model)
        what = f"{keys}, layer={layer['name']}: {parameters * task.seeds:,} parameters"
        needs(what, parameters * task.seeds, 8, "choose a smaller model.width, or smaller options of the layer")
    asked = config.trainer.batch_size
    size = min(asked if isinstance(asked, int) else 1, len(task.train))  # type: ignore[arg-type]  # every split has one
    values = size * task.seeds * math.prod(task.input_shape)
    needs(f"trainer.batch_size={asked}: the inputs", values, 8, "choose a smaller one")


def _varied_option(config: TrainConfig) -> str | None:
    """The option of the contestant that the budget varies; None if it varies the widths."""
    name, vary = config.layer["name"], config.budget.vary
    for layer in vary:
        if layer not in list_layers():
            raise ConfigError(f"budget.vary.{layer}: no such layer, {suggest(layer, list_layers())}")
    if name not in vary:
        return None
    option, key = vary[name], f"budget.vary.{name}={vary[name]}"
    options = layer_options(name)
    if option not in options:
        raise ConfigError(f"{key}: layer {name} has no such option, {suggest(option, sorted(options))}")
    value = config.layer.get(option, options[option])
    if not isinstance(value, int) or isinstance(value, bool):
        whole = sorted(k for k, v in options.items() if isinstance(v, int) and not isinstance(v, bool))
        others = f"choose one of {', '.join(whole)}" if whole else f"layer {name} has none that is"
        raise ConfigError(f"{key}: option {option} ({value}) is not a whole number; {others}")
    return str(option)


def _widths(config: TrainConfig) -> tuple[int, ...]:
    name = config.model["name"]
    parameters = inspect.signature(models.get(name)).parameters
    try:
        _check_model(name, {key: config.model[key] for key in ("width", "depth") if key in config.model})
    except ValueError as error:
        raise refused("model", config.model, error) from error
    width, depth = (int(config.model.get(key, parameters[key].default)) for key in ("width", "depth"))
    return (width,) * depth


def _own_count(config: TrainConfig, layer: dict[str, Any], task: Task) -> int | Exception:
    """The contestant's count at the configured widths; if it can be built at other widths only, its error at these.

    Raises:
        ConfigError: If it can be built at no width, or if no other is to be chosen.
    """
    own = _widths(config)
    try:
        return _count(config, layer, task, own)
    except (ValueError, TypeError) as error:
        if config.budget.match != "none":
            for width in (240, 720720):  # which many numbers divide
                with suppress(ValueError, TypeError):
                    _count(config, layer, task, (width,) * len(own))
                    return error
        group, values = ("model", config.model) if _names_a_key(error, config.model) else ("layer", layer)
        raise refused(group, values, error) from error


def _chosen_layer(config: TrainConfig, match: Match | None) -> dict[str, Any]:
    """The contestant, with the option that the budget chose."""
    return config.layer | ({match.option: match.value} if match and match.option else {})


def _trial(config: TrainConfig, layer: dict[str, Any], task: Task) -> tuple[nn.Module, Match | None]:
    """The same as `_swapped`, where its weights do not matter: on the meta device if nothing needs them."""
    on_meta = config.budget.match != "flops" and config.swap_init == "fresh"
    drawn = {"pretrained": False} if "pretrained" in config.model else {}
    return _swapped(replace(config, model=config.model | drawn), layer, task, "meta" if on_meta else "cpu")


def _swapped(
    config: TrainConfig, layer: dict[str, Any], task: Task, device: str = "cpu"
) -> tuple[nn.Module, Match | None]:
    """Another library's model with layers of ours in it, and its count beside that of before.

    Raises:
        ConfigError: If the model cannot be built, or not so swapped.
    """
    try:
        with torch.device(device):
            model: Any = _build(config, layer, task, None)
    except (ValueError, TypeError) as error:
        raise refused("model", config.model, error) from error
    return model, swap_in(model, config, layer, example_batch(task, 1))


def check_model(config: TrainConfig, task: Task, match: Match | None, callbacks: Sequence["Callback"]) -> None:
    """Refuses what cannot be done with the model, before anything is written.

    Raises:
        ConfigError: As callbacks say, or if nothing of the model can be computed again.
    """
    trainer = config.trainer
    if not callbacks and not trainer.checkpoint_activations:
        return
    layer = _chosen_layer(config, match)
    for callback in callbacks:
        layer |= callback.prepare(config, match)
    if "library" in config.model:
        model = _trial(config, layer, task)[0]
    else:
        with torch.device("meta"):
            model = _build(config, layer, task, match.widths if match else None)
    for callback in callbacks:
        callback.check(config, task, model)
    if trainer.checkpoint_activations:
        recompute_blocks(model)


def recompute_blocks(model: nn.Module) -> None:
    """As `trainer.checkpoint_activations` asks.

    Raises:
        ConfigError: If the model has no blocks.
    """
    try:
        recompute(model)
    except ValueError as error:
        raise ConfigError(f"trainer.checkpoint_activations=true: {error}") from error


def build_model(
    config: TrainConfig, task: Task, callbacks: Sequence["Callback"] = ()
) -> tuple[nn.Module, Match | None]:
    """The contestant's model at its budget, as its training begins, on the CPU; and what the budget chose.

    Where the task has several seeds, as many models in one, each as the run of its seed alone begins.
    """
    if "library" in config.model:
        layer = dict(config.layer)
        for callback in callbacks:
            layer |= callback.prepare(config, None)
        return _swapped(config, layer, task)
    match = choose_widths(config, task)
    check_memory(config, task, match)
    layer = _chosen_layer(config, match)
    for callback in callbacks:
        layer |= callback.prepare(config, match)

    def build() -> nn.Module:
        return _build(config, layer, task, match.widths if match else None)

    return build_stacked(build, range(config.seed, config.seed + task.seeds)) if task.seeds > 1 else build(), match


def example_batch(task: Task, size: int) -> Tensor:
    """Zeros of the shape and dtype of a batch of inputs of one seed."""
    return torch.zeros(size, *task.input_shape, dtype=task.input_dtype)


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU; of several processes, each has a device.

    Raises:
        ValueError: If there is no such device, or not one for each of torchrun's processes.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"trainer.device={name}: this machine has no CUDA device; use trainer.device=auto")
    if not distributed.launched():
        return device
    here, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > here or (device.index is not None and processes > 1):
        raise ValueError(
            f"trainer.device={name}: this machine has {here} CUDA devices and {processes} processes, and each needs "
            "its own; use trainer.device=auto and torchrun --nproc-per-node=gpu, or trainer.device=cpu"
        )
    return device if device.index is not None else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def total_steps(config: TrainConfig, task: Task, steps_per_epoch: float) -> int | None:
    """Optimizer steps of the whole run; None if it is counted in seconds.

    Raises:
        ValueError: If epochs are asked of a task that has none.
    """
    t = config.trainer
    if t.epochs is None:
        return t.steps
    if task.stream:
        raise ValueError(
            f"trainer.epochs={t.epochs:g}: task {config.task['name']} is an endless stream and has no epochs; set "
            "trainer.epochs=null trainer.steps=10000"
        )
    return max(1, round(t.epochs * steps_per_epoch))
