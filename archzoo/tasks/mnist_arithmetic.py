"""Sums and products of sequences of handwritten digits (Madsen & Johansen 2020, arXiv 2001.05016, section 4.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from archzoo.tasks.idx import idx_splits
from archzoo.tasks.mnist import SOURCE
from archzoo.tasks.options import choice, whole_number
from archzoo.tasks.split import SPLIT_SEED
from archzoo.tasks.task import RegressionTask, TensorSplit, register_task

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

OPERATIONS = ("sum", "product")
LENGTHS = {"sum": 10, "product": 2}
"""Of the training sequences, as in the paper."""
TEST_LENGTHS = {"sum": (1, 10, 100, 1000), "product": (1, 2, 5, 10, 20)}
MAX_LENGTH = 5000
STREAM_LENGTH = 2**48
"""Sequences that the stream says it has."""


class DigitSequences(Dataset[tuple[Tensor, Tensor]]):
    """Sequences of images with the running sum or product of their digits; gathered when they are asked for.

    Args:
        images: (images, 1, 28, 28).
        digits: (images,) what they show.
        length: Images of a sequence.
        operation: One of `OPERATIONS`.
        seed: With a seed, an endless stream of sequences drawn with replacement, sequence i a function of seed and i
            alone. None: a fixed order of the images cut into sequences; what fills no sequence is left out.
    """

    def __init__(self, images: Tensor, digits: Tensor, length: int, operation: str, seed: int | None = None):
        self.images, self.length, self.seed = images, length, seed
        self.digits, self.operation = digits.double(), operation
        self.order = np.random.RandomState(SPLIT_SEED).permutation(len(images))

    def __len__(self) -> int:
        return len(self.images) // self.length if self.seed is None else STREAM_LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = np.array([self._row(int(i)) for i in indices], dtype=np.int64).reshape(-1, self.length)
        which = torch.from_numpy(rows)
        digits = self.digits[which]
        targets = digits.cumsum(1) if self.operation == "sum" else digits.cumprod(1)
        return self.images[which], targets.float()

    def _row(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sequences are numbered from 0 to {len(self) - 1}")
        if self.seed is None:
            return self.order[index * self.length : (index + 1) * self.length]
        # Philox makes any place of its sequence at the same cost; RandomState, for NumPy promises never to change it.
        rng = np.random.RandomState(np.random.Philox(key=self.seed % 2**64, counter=index << 64))
        return rng.randint(len(self.images), size=self.length)


@register_task("mnist_arithmetic")
class MNISTArithmetic(RegressionTask):
    """The sum, or the product, of a sequence of digits: does a unit that reads digits add them up beyond its training?

    The model sees one image after another and says the result so far after each; nobody tells it the digits. Trained on
    short sequences, tested on long ones, which a unit that is not exact leaves further and further behind. Sequences of
    a product have no digit 0. Training sequences are drawn anew, a stream without end; those of validation, as long as
    the training ones, and of test are fixed, and use an image once at most.

    The paper counts a run as a success where its test error is below the upper 99 % confidence bound of that of runs
    whose unit is fixed to the right operation (`model.accumulator`), for then the recognition of digits is all that is
    left to err. `python -m benchmarks arithmetic_table` says so of runs that have such runs beside them.

    Args:
        operation: `sum` or `product`.
        length: Digits of a training sequence. None: the paper's, 10 for a sum and 2 for a product.
        test_lengths: Lengths whose errors are told each; the test sequences are as long as the longest. None: 1, 10,
            100 and 1000 for a sum; 1, 2, 5, 10 and 20 for a product.
        val_size: Images held out for validation: the last of the 60,000 training images.
        train_size: Images to train on: the first ones. None: all that validation leaves.
        data_dir: Folder that holds `mnist/`, as for the task `mnist`.
        seed: Seed of the training sequences.

    Raises:
        DatasetError: If a file is neither there nor to be downloaded, or is not the official one.
        ValueError: If an option is wrong, or there are too few images for one sequence.
    """

    score = "mse"
    stream = True

    def __init__(
        self,
        *,
        operation: str = "sum",
        length: int | None = None,
        test_lengths: Sequence[int] | None = None,
        val_size: int = 5000,
        train_size: int | None = None,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        choice("operation", operation, OPERATIONS)
        length = LENGTHS[operation] if length is None else whole_number("length", length, 1, MAX_LENGTH)
        lengths = TEST_LENGTHS[operation] if test_lengths is None else test_lengths
        if not isinstance(lengths, list | tuple) or not lengths:
            raise ValueError(f"test_lengths={test_lengths!r}: must be a list of lengths, as [1, 10, 100]")
        self.test_lengths = sorted({whole_number("test_lengths", n, 1, MAX_LENGTH) for n in lengths})
        self.input_shape, self.output_size = (length, 1, 28, 28), length
        splits = idx_splits(SOURCE, data_dir, val_size=val_size, train_size=train_size, mean=0.1307, std=0.3081)
        seeds, ends = (seed, None, None), (length, length, self.test_lengths[-1])
        self.train, self.val, self.test = (
            self._sequences(split, name, operation, end, of)
            for split, name, end, of in zip(splits, ("train", "val", "test"), ends, seeds, strict=True)
        )

    @staticmethod
    def _sequences(split: TensorSplit, name: str, operation: str, length: int, seed: int | None) -> DigitSequences:
        images, digits = split.inputs, split.targets
        if operation == "product":
            images, digits = images[digits > 0], digits[digits > 0]
        key = "test_lengths" if name == "test" else "length"
        if len(images) < length:
            raise ValueError(f"{key}: a sequence of {length} digits is longer than the {len(images)} {name} images")
        return DigitSequences(images, digits, length, operation, seed)

    def metrics(self) -> "MetricCollection":
        """Mean squared error at all positions, `mse`, and after the test lengths, `mse_at_N`, so far as they go."""
        from torchmetrics import MetricCollection

        return MetricCollection([_errors_at(self.test_lengths)])


def _errors_at(lengths: Sequence[int]) -> "Metric":
    from torchmetrics import Metric

    class PositionErrors(Metric):
        full_state_update = False
        total: Tensor
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros(MAX_LENGTH, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state("count", torch.zeros(MAX_LENGTH, dtype=torch.float64), dist_reduce_fx="sum")

        def update(self, output: Tensor, target: Tensor) -> None:
            self.total[: output.shape[1]] += (output.double() - target.double()).square().sum(0)
            self.count[: output.shape[1]] += len(output)

        def compute(self) -> dict[str, Tensor]:
            told = {f"mse_at_{n}": self.total[n - 1] / self.count[n - 1] for n in lengths if self.count[n - 1]}
            return {"mse": self.total.sum() / self.count.sum()} | told

    return PositionErrors()
