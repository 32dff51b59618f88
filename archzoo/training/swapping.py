"""Layers of the zoo in the models of other libraries, as the configuration's `swap` says."""

import logging
from typing import Any, Literal

from torch import Tensor

from archzoo.budget import Match, count_parameters
from archzoo.registry import layer_options
from archzoo.surgery import swap
from archzoo.training.config import CONTESTANT, USUAL, ConfigError, TrainConfig

log = logging.getLogger("archzoo")


def swap_in(model: Any, config: TrainConfig, layer: dict[str, Any], example: Tensor) -> Match | None:
    """Swaps layers into `model.body`, in place.

    Args:
        model: Of `archzoo.models.from_timm` or `from_transformers`.
        config: Of the run.
        layer: The contestant and its options.
        example: A batch of one, for FLOPs.

    Returns:
        The model's count beside that of before; None if nothing is to be matched.

    Raises:
        ConfigError: If a rule or a layer is wrong, or the count cannot be kept.
    """
    kept: dict[str, Literal["params", "flops"]] = {"params": "params", "flops": "flops"}
    match = kept.get(config.budget.match)
    if not config.swap:
        before = count_parameters(model.body)
        return Match((), before, before) if match else None
    rules = {rule: _choice(choice, layer) for rule, choice in config.swap.items()}
    calibration = model.arguments(example) if match == "flops" else None
    how: Any = config.swap_init
    try:
        report = swap(model.body, rules, match=match, init=how, calibration=calibration)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"swap={config.swap}: {error}") from error
    model.body = report.model
    log.info("swapped:\n%s", report)
    if match is None:
        return None
    target, count = report.flops if match == "flops" and report.flops else report.parameters
    return Match((), count, target)


def _choice(choice: Any, layer: dict[str, Any]) -> Any:
    """What `archzoo.swap` puts where a rule matches; None for the usual layer, which is there already."""
    options = dict(layer if choice == CONTESTANT else choice if isinstance(choice, dict) else {"name": choice})
    name = options.pop("name")
    if name is None or (name in USUAL and choice in (name, CONTESTANT)):
        return None
    if choice == CONTESTANT:  # its config lists all options, and what is not given `swap` takes from the original
        usual = {"bias": True, **layer_options(name)}
        options = {k: v for k, v in options.items() if v != (list(u) if isinstance(u := usual.get(k), tuple) else u)}
    return name, options
