"""The arithmetic task of the NAU and NMU (Madsen & Johansen 2020, arXiv 2001.05016): is the formula found exactly?

Train on inputs of one range, test on those of another. The success criterion is that of arXiv 1910.01888.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from archzoo.tasks.options import choice, number, whole_number
from archzoo.tasks.seeds import seed_metrics, sparsity_error, successes, summed_errors
from archzoo.tasks.split import SPLIT_SEED
from archzoo.tasks.stream import BlockStream, block_generator, stream_key
from archzoo.tasks.task import RegressionTask, TensorSplit, register_task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

OPERATIONS = ("add", "sub", "mul", "div", "squared", "function10")
EPSILON = 1e-5
"""By how much every weight of the first layer is off in the solution that sets the threshold."""
BLOCK = 1024
"""Samples of the stream that are drawn at once."""
MAX_VALUES = 2**28
"""Most input values that a split may hold: 1 GiB of float32."""
TRAIN, VAL, TEST, OFFSET = range(4)


@dataclass(frozen=True)
class Formula:
    """t = operation(a, b), where a and b are weighted sums of the inputs.

    Args:
        operation: One of `OPERATIONS`.
        weights: (inputs, 2) float64: 1 where an input belongs to a, and to b, and 0 elsewhere.
    """

    operation: str
    weights: np.ndarray

    def __call__(self, inputs: np.ndarray, epsilon: float = 0.0) -> np.ndarray:
        """Values (n, 1) for inputs (n, inputs), float64; with every weight off by epsilon towards the wrong side."""
        sums = inputs @ (self.weights + epsilon * (1 - 2 * self.weights))
        a, b = sums[:, :1], sums[:, 1:]
        if self.operation == "add":
            return a + b
        if self.operation == "sub":
            return a - b
        if self.operation == "div":
            return a / b
        return a * a if self.operation == "squared" else a * b


@dataclass(frozen=True)
class Uniform:
    """Inputs drawn uniformly from a union of intervals, in numbered blocks that do not depend on each other.

    Args:
        intervals: (k, 2) float64, bounds of the intervals.
        inputs: Number of inputs of a sample.
        key: Key of the counter-based generator.
    """

    intervals: np.ndarray
    inputs: int
    key: int

    def __call__(self, count: int, block: int = 0) -> np.ndarray:
        """The first `count` samples of a block, (count, inputs) float32."""
        rng = block_generator(self.key, block)
        position = rng.random_sample((count, self.inputs))
        if len(self.intervals) == 1:
            ((low, high),) = self.intervals
            return (position * (high - low) + low).astype(np.float32)
        low, high = self.intervals.T
        ends = np.cumsum(high - low)
        position *= ends[-1]
        which = np.searchsorted(ends[:-1], position, side="right")
        return (position + (high - ends)[which]).astype(np.float32)


class SampleStream(BlockStream):
    """Endless fresh samples. Sample i depends on the seed and on i alone, whoever asks for it and in whatever batch.

    Args:
        formulas: The formula of each seed. With several, sample i holds that of each, on an axis of its own.
        draws: The inputs of each.
    """

    def __init__(self, formulas: Sequence[Formula], draws: Sequence[Uniform]):
        super().__init__(BLOCK)
        self.formulas, self.draws = list(formulas), list(draws)

    def draw_block(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a block."""
        drawn = [_samples(f, draw(BLOCK, number)) for f, draw in zip(self.formulas, self.draws, strict=True)]
        if len(drawn) == 1:
            return drawn[0]
        return torch.stack([x for x, _ in drawn], 1), torch.stack([t for _, t in drawn], 1)


@register_task("arithmetic")
class Arithmetic(RegressionTask):
    """t = a + b, a - b, a b, a / b or a^2 of sums a and b over two overlapping runs of the inputs.

    Training samples are fresh at every step, a stream without end. Where the runs lie is drawn once per seed; the
    validation inputs (training range) and the test inputs (test range) are the same for all seeds. `function10` is
    t = (x1 + x2) (x1 + x2 + x3 + x4) of four inputs, which a NAU(4, 2) and an NMU(2, 1) compute with ten parameters.

    A run has succeeded if, at the evaluation with the lowest validation error, its test error is below `threshold`: the
    error on the test set of a model whose first layer's weights are all off by 1e-5 and whose second layer is perfect.

    Args:
        operation: `add`, `sub`, `mul`, `div`, `squared` (of a) or `function10`.
        input_size: Number of inputs.
        subset_ratio: Share of the inputs that each of a and b sums; rounded down.
        overlap_ratio: Share of a's inputs that are also b's; rounded down. The authors' code has it so; their printed
            algorithm means a share of all inputs.
        train_range: Bounds of the training inputs, [low, high], or several such pairs, for a union of intervals.
        test_range: Bounds of the test inputs, likewise.
        eval_size: Samples to validate on, and others to test on.
        seeds: Seeds that one run trains, side by side in one model: the run's and those behind it. Each has the samples
            and the place of the runs that it has as a run of its own, and is judged alone.
        data_dir: Not needed.
        seed: Seed of the training samples and of the place of the runs.

    Attributes:
        formula: The formula of the first seed; `formulas`: of each.
        threshold: Mean squared error on the test set below which the formula counts as found, for the first seed;
            `thresholds`: for each.

    Raises:
        ValueError: If an option is wrong, or the two runs do not fit into the inputs.
    """

    score = "mse"
    watched: ClassVar[tuple[str, ...]] = ("val", "test")
    stream = True

    def __init__(
        self,
        *,
        operation: str = "mul",
        input_size: int = 100,
        subset_ratio: float = 0.25,
        overlap_ratio: float = 0.5,
        train_range: Sequence[Any] = (1.0, 2.0),
        test_range: Sequence[Any] = (2.0, 6.0),
        eval_size: int = 10_000,
        seeds: int = 1,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        choice("operation", operation, OPERATIONS)
        whole_number("input_size", input_size, 1, 10_000)
        number("subset_ratio", subset_ratio, 0.0, 1.0)
        number("overlap_ratio", overlap_ratio, 0.0, 1.0)
        train_intervals, test_intervals = _intervals("train_range", train_range), _intervals("test_range", test_range)
        if operation == "function10":
            if (input_size, subset_ratio, overlap_ratio) != (100, 0.25, 0.5):
                raise ValueError(
                    f"input_size={input_size}, subset_ratio={subset_ratio}, overlap_ratio={overlap_ratio}: "
                    "operation='function10' has four inputs and subsets of its own; leave these at 100, 0.25 and 0.5"
                )
            input_size = 4
        whole_number("seeds", seeds, 1, 1000)
        whole_number("eval_size", eval_size, 1, MAX_VALUES // input_size)

        self.input_shape, self.seeds = (input_size,), seeds
        self.formulas = []
        for one in range(seed, seed + seeds):
            runs = (
                (slice(0, 2), slice(0, 4))
                if operation == "function10"
                else self._runs(one, input_size, subset_ratio, overlap_ratio)
            )
            weights = np.zeros((input_size, 2))
            for column, run in enumerate(runs):
                weights[run, column] = 1
            self.formulas.append(Formula(operation, weights))
        self.formula = self.formulas[0]
        draws = [Uniform(train_intervals, input_size, stream_key(one, TRAIN)) for one in range(seed, seed + seeds)]
        self.train = SampleStream(self.formulas, draws)
        self.val = self._split(Uniform(train_intervals, input_size, stream_key(SPLIT_SEED, VAL))(eval_size))
        test = Uniform(test_intervals, input_size, stream_key(SPLIT_SEED, TEST))(eval_size).astype(np.float64)
        self.test = self._split(test)
        self.thresholds = [float(np.mean((f(test, EPSILON) - f(test)) ** 2)) for f in self.formulas]
        self.threshold = self.thresholds[0]

    def _split(self, inputs: np.ndarray) -> TensorSplit:
        """The samples with these inputs; those of several seeds share them, and are seen so, not copied."""
        samples = [_samples(formula, inputs) for formula in self.formulas]
        if self.seeds == 1:
            return TensorSplit(*samples[0])
        shared = samples[0][0].unsqueeze(1).expand(-1, self.seeds, -1)
        return TensorSplit(shared, torch.stack([targets for _, targets in samples], 1))

    def _runs(self, seed: int, input_size: int, subset_ratio: float, overlap_ratio: float) -> tuple[slice, slice]:
        """The inputs that a sums, and those that b sums."""
        size = _floor(subset_ratio * input_size)
        overlap = _floor(overlap_ratio * size)
        used = 2 * size - overlap
        if not size or used > input_size:
            raise ValueError(
                f"subset_ratio={subset_ratio}, overlap_ratio={overlap_ratio}: two subsets of {size} inputs that share "
                f"{overlap} do not fit into input_size={input_size}; subsets must have at least 1 and use at most all"
            )
        rng = block_generator(stream_key(seed, OFFSET), 0)
        start = int(rng.randint(input_size - used + 1))
        return slice(start, start + size), slice(start + size - overlap, start + used)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error; of several seeds, the sum of theirs."""
        return super().loss(output, target) if self.seeds == 1 else summed_errors(output, target)

    def metrics(self) -> "MetricCollection":
        """The mean squared error; of several seeds, the median of theirs, and that of each."""
        from torchmetrics import MeanSquaredError, MetricCollection

        if self.seeds == 1:
            return MetricCollection({"mse": MeanSquaredError()})
        return MetricCollection([seed_metrics(range(self.seed, self.seed + self.seeds))])

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """Whether and when the formula was found; of several seeds, in how many, see `archzoo.tasks.seeds.successes`.

        `success`: 1 if, at the evaluation with the lowest validation error, the test error is below the threshold.
        `solved_at`: the first evaluated step with a test error below the threshold; absent where there is none.
        `sparsity_error`: how far the weight that is farthest from its integers is from them at the end of training;
        the maximum over the modules that have `sparsity_error()`, absent where there is none.
        `threshold`: the threshold.
        """
        if self.seeds > 1:
            numbers = range(self.seed, self.seed + self.seeds)
            return {"threshold": self.threshold, **successes(evaluations, model, numbers, self.thresholds)}
        summary = {"threshold": self.threshold, "success": 0.0}
        finite = [evaluation for evaluation in evaluations if math.isfinite(evaluation["val/mse"])]
        if finite:
            best = min(finite, key=lambda evaluation: evaluation["val/mse"])
            summary["success"] = float(best["test/mse"] < self.threshold)
        solved = [evaluation["step"] for evaluation in evaluations if evaluation["test/mse"] < self.threshold]
        if solved:
            summary["solved_at"] = float(min(solved))
        if (error := sparsity_error(model)) is not None:
            summary["sparsity_error"] = error
        return summary


def _samples(formula: Formula, inputs: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both float32; the targets computed in float64 from the very inputs that the model gets."""
    targets = formula(inputs.astype(np.float64))
    return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets.astype(np.float32))


def _floor(value: float) -> int:
    """Rounds down, but 0.29 * 100 to 29."""
    return math.floor(value + 1e-9)


def _intervals(name: str, value: Any) -> np.ndarray:
    """Bounds (k, 2) of [low, high] or of several such pairs, in ascending order."""
    try:
        intervals = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        intervals = np.empty(0)
    if intervals.shape == (2,):
        intervals = intervals[None]
    right = intervals.ndim == 2 and intervals.shape[1] == 2 and len(intervals) > 0
    if right and (np.abs(intervals) <= 1e6).all() and (intervals[:, 0] < intervals[:, 1]).all():
        intervals = intervals[np.argsort(intervals[:, 0])]
        if (intervals[1:, 0] >= intervals[:-1, 1]).all():
            return intervals
    raise ValueError(
        f"{name}={value!r}: must be [low, high] with low < high, both within 1e6 of 0, "
        "or a list of such pairs that do not overlap"
    )
