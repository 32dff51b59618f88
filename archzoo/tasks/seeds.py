"""Several seeds of one task, trained side by side (`Task.seeds`): their errors, and how many succeeded."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archzoo.report.stats import LEVEL, wilson

if TYPE_CHECKING:
    from torchmetrics import Metric


def summed_errors(output: Tensor, target: Tensor) -> Tensor:
    """Sum over seeds of their mean squared errors, for (batch, seeds, size); a seed's gradients are those it has alone.

    A seed whose error is not finite adds nothing: the others go on.
    """
    from archzoo.models.stacked import finite_sum

    return finite_sum((output - target).square().mean((0, 2)))


def seed_key(seed: int) -> str:
    """Name of the metric of one seed."""
    return f"mse_seed{seed}"


def seed_metrics(seeds: Sequence[int]) -> "Metric":
    """Metric that is the mean squared error of each seed, `mse_seedN`, and the median over seeds, `mse`.

    A seed that has diverged counts as infinitely wrong. The median: one seed's failure says nothing of the others.

    Args:
        seeds: The seeds, in the order of the outputs' second axis.
    """
    from torchmetrics import Metric

    class SeedErrors(Metric):
        full_state_update = False
        total: Tensor
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros(len(seeds), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

        def update(self, output: Tensor, target: Tensor) -> None:
            self.total += (output - target).double().square().mean(2).sum(0)
            self.count += len(output)

        def compute(self) -> dict[str, Tensor]:
            errors = torch.where(self.total.isfinite(), self.total / self.count, math.inf)
            ordered, middle = errors.sort().values, (len(errors) - 1) / 2
            median = (ordered[math.floor(middle)] + ordered[math.ceil(middle)]) / 2
            return {"mse": median} | {seed_key(seed): error for seed, error in zip(seeds, errors, strict=True)}

    return SeedErrors()


def successes(
    evaluations: Sequence[Mapping[str, float]], model: nn.Module, seeds: Sequence[int], thresholds: Sequence[float]
) -> dict[str, Any]:
    """How many seeds found the formula, when, and how near to integers their weights came to be.

    A seed has succeeded if, at the evaluation with its lowest validation error, its test error is below its threshold.

    `successes`, `seeds`: how many did, and of how many. `success`, `success_low`, `success_high`: the rate and Wilson's
    95 % interval. `solved_at`: median over the seeds that succeeded of the first evaluated step with a test error below
    the threshold; `solved_at_low`, `solved_at_high`: its 95 % interval by order statistics, absent for fewer than six.
    `sparsity_error`: median over the same seeds of the distance of the weight that is farthest from its integers, at
    the end of training; absent where no module has `sparsity_error()`. `diverged`: seeds whose validation error is not
    finite at the end. `each_…`: lists, in the order of the seeds, null where there is no figure; `each_solved_at` also
    has the seeds that solved it and lost it.

    Args:
        evaluations: Of the whole run, with `SPLIT/mse_seedN`.
        model: A `Stacked` model, at the end of training.
        seeds: The seeds.
        thresholds: Mean squared error on the test set below which the formula counts as found, of each.
    """
    from archzoo.models.stacked import Stacked

    solved_at = [
        next((e["step"] for e in evaluations if e[f"test/{seed_key(seed)}"] < threshold), None)
        for seed, threshold in zip(seeds, thresholds, strict=True)
    ]
    success = [
        _succeeded(evaluations, seed_key(seed), threshold) for seed, threshold in zip(seeds, thresholds, strict=True)
    ]
    sparsity = [sparsity_error(model.member(i)) for i in range(len(seeds))] if isinstance(model, Stacked) else []
    last = evaluations[-1] if evaluations else {}
    return {
        **rate(sum(success), len(seeds)),
        **median_interval("solved_at", [s for s, ok in zip(solved_at, success, strict=True) if ok and s is not None]),
        **_median("sparsity_error", [e for e, ok in zip(sparsity, success, strict=False) if ok and e is not None]),
        "diverged": sum(not math.isfinite(last.get(f"val/{seed_key(seed)}", 0.0)) for seed in seeds),
        "each_success": [int(s) for s in success],
        "each_solved_at": solved_at,
        "each_sparsity_error": sparsity,
    }


def _succeeded(evaluations: Sequence[Mapping[str, float]], key: str, threshold: float) -> bool:
    finite = [e for e in evaluations if math.isfinite(e[f"val/{key}"])]
    return bool(finite) and min(finite, key=lambda e: e[f"val/{key}"])[f"test/{key}"] < threshold


def sparsity_error(model: nn.Module) -> float | None:
    """Maximum of the modules' `sparsity_error()`; None if none has it."""
    methods = [getattr(module, "sparsity_error", None) for module in model.modules()]
    with torch.no_grad():
        return max((float(method()) for method in methods if callable(method)), default=None)


def rate(succeeded: int, count: int) -> dict[str, float]:
    """`successes`, `seeds`, and the rate `success` with the ends of Wilson's interval."""
    low, high = wilson(succeeded, count)
    return {
        "success": succeeded / count,
        "success_low": low,
        "success_high": high,
        "successes": succeeded,
        "seeds": count,
    }


def median_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median under a name, and the ends of its interval: order statistics that hold it with 95 % at least."""
    ordered, count = sorted(values), len(values)
    below, outside = -1, 0.0  # of `count` values, how many fall below the median is binomial
    while outside <= (1 - LEVEL) / 2 and count:
        below += 1
        outside += math.comb(count, below) / 2**count
    interval = {f"{name}_low": ordered[below - 1], f"{name}_high": ordered[count - below]} if below > 0 else {}
    return _median(name, ordered) | interval


def _median(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: float(statistics.median(values))} if values else {}
