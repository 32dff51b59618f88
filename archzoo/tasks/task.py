"""What a comparison runs on: a task owns its data, loss, metrics and splits, and the shape of the model's ends."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from archzoo.registry import Registry

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from archzoo.pictures import Picture

tasks: Registry[type["Task"]] = Registry("task", "archzoo.tasks")
register_task = tasks.register


class DatasetError(RuntimeError):
    """A data set is missing, partial or corrupted. The message says where it was looked for and how to get it."""


class SampleError(DatasetError):
    """An example, or a batch, could not be read. Can be pickled, as it comes out of a loader process.

    Attributes:
        dataset: The task and the split.
        index: Number of the example in the split; None where it is not known which of a batch it was.
        worker: Number of the loader process; None where none was asked.
        reason: What went wrong.
    """

    def __init__(self, dataset: str, index: int | None, worker: int | None, reason: str):
        super().__init__(dataset, index, worker, reason)
        self.dataset, self.index, self.worker, self.reason = dataset, index, worker, reason

    def __str__(self) -> str:
        what = "a batch" if self.index is None else f"example {self.index}"
        reader = "" if self.worker is None else f" by loader process {self.worker}"
        return f"{self.dataset}: {what} could not be read{reader}: {self.reason}"


class TensorSplit(Dataset[tuple[Tensor, Tensor]]):
    """Examples held in memory. A whole batch is read by one indexing, not example by example.

    Args:
        inputs: (examples, *input_shape).
        targets: (examples, ...).
    """

    def __init__(self, inputs: Tensor, targets: Tensor):
        if len(inputs) != len(targets):
            raise ValueError(f"inputs and targets differ in length: {len(inputs)} and {len(targets)}")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int] | Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


class Task(ABC):
    """A task. A subclass sets the attributes below in `__init__`, which loads the data.

    Args (of every subclass):
        data_dir: Where data files are, or where they are downloaded to. None: the folder that ARCHZOO_DATA names,
            else `archzoo` in the user's cache.
        seed: Seed of the run: for data that is drawn anew. Never of the train/validation/test split.

    Attributes:
        input_shape: Shape of one input, without the batch axis.
        input_dtype: Of the inputs; int64 where they are numbers of tokens.
        output_size: Length of the model's output vector.
        train, val, test: The splits. Model selection looks at `val` only.
        score: Name of the metric that ranks models, one of `metrics()`.
        mode: Whether a larger (`"max"`) or smaller (`"min"`) score is better.
        watched: Splits that are evaluated during training.
        stream: Whether `train` is an endless stream of fresh samples, which is read in order and has no epochs.
        seeds: Independent seeds that one run trains, side by side in one model (`archzoo.models.stacked`): the run's
            and those behind it. Where it is not 1, inputs, outputs and targets have an axis more, of that size, behind
            the batch's, which `input_shape` and `output_size` leave out; losses are summed over seeds, not averaged.
        compilable: Whether `torch.compile` can take the model. Not so where `training_loss` differentiates it by its
            inputs: what is compiled can be differentiated once only.
        pixel_range: Values of a black and of a white pixel, where inputs are images; None where they are not, or where
            the task does not know.

    Raises:
        DatasetError: If its data is not to be had.
        ValueError: If an option is wrong.
    """

    input_shape: tuple[int, ...]
    input_dtype: torch.dtype = torch.float32
    output_size: int
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    score: str
    mode: Literal["max", "min"]
    watched: ClassVar[tuple[str, ...]] = ("val",)
    stream: bool = False
    seeds: int = 1
    compilable: ClassVar[bool] = True
    pixel_range: tuple[float, float] | None = None

    def __init__(self, *, data_dir: Path | None = None, seed: int = 0):
        self.data_dir, self.seed = data_dir, seed

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss over a batch, a scalar. output is (batch, output_size), target a batch of the split's targets."""

    def training_loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of a training batch, a scalar, which the training loop calls and differentiates by the parameters.

        `loss` of the model's output; a task that needs more of the model, as its derivatives by the inputs, overrides
        this. A model that has more to learn than its output, as a reconstruction, brings its own: a method
        `training_loss(task, inputs, targets)`. `inputs` and `targets` are on the model's device, and autocast is on
        where the trainer's precision is.
        """
        own = getattr(model, "training_loss", None)
        return self.loss(model(inputs), targets) if own is None else own(self, inputs, targets)

    @abstractmethod
    def metrics(self) -> "MetricCollection":
        """Fresh metrics; the trainer calls `update(output, target)` batch by batch, then `compute()`."""

    @staticmethod
    def collate(batch: Any) -> Any:
        """Makes a batch of what a split returns; a split with `__getitems__` has made it already."""
        return default_collate(batch) if isinstance(batch, list) else batch

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """Figures for the run's summary that need the whole course of the run, as the step at which it was solved.

        Numbers, texts, and lists of them; the report knows `success` as a rate, and shows medians of other numbers.

        Args:
            evaluations: One mapping per evaluation, with `step` and `SPLIT/METRIC` for every watched split.
            model: The model at the end of training.
        """
        return {}

    def pictures(self, model: nn.Module) -> "Mapping[str, Picture]":
        """Pictures of what the model does, by name, for the run's folder, the trackers and the report; none by default.

        Called once, at the end of a run: see `archzoo.pictures`, also for what helps to draw. A model may have pictures
        of its own, by a method `pictures(task)`.

        Args:
            model: The model that is scored, with the best weights, in evaluation mode. Gradients are off.
        """
        return {}


CRITERIA = ("cross_entropy", "margin")


class ClassificationTask(Task):
    """A task with classes: a loss of their scores, and accuracy. `output_size` is the number of classes.

    Attributes:
        criterion: The loss: `"cross_entropy"` of logits, or `"margin"`, of scores from 0 to 1, as lengths of capsules
            are (arXiv 1710.09829).
    """

    score = "accuracy"
    mode: Literal["max", "min"] = "max"
    criterion: str = "cross_entropy"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The batch's mean loss of scores (batch, classes) against class indices (batch,)."""
        if self.criterion == "margin":
            from archzoo.layers.capsules import margin_loss

            return margin_loss(output, target)
        return nn.functional.cross_entropy(output, target)

    def objects(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the images of a batch show: classes (batch, objects), and each alone (batch, objects, *input_shape)."""
        return targets.unsqueeze(1), inputs.unsqueeze(1)

    def metrics(self) -> "MetricCollection":
        """Accuracy, as a fraction, and the mean loss; cross entropy is in nats."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        from archzoo.tasks.metrics import mean_loss

        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(self.output_size, average="micro", validate_args=False),
                "loss": mean_loss(self.loss),
            }
        )


class RegressionTask(Task):
    """A task with one real number to predict: mean squared error. Targets are (batch, 1)."""

    output_size = 1
    score = "rmse"
    mode: Literal["max", "min"] = "min"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of (batch, 1) against (batch, 1)."""
        return nn.functional.mse_loss(output, target)

    def metrics(self) -> "MetricCollection":
        """Root of the mean squared error, in the target's unit, and the loss, its square."""
        from torchmetrics import MeanSquaredError, MetricCollection

        return MetricCollection({"rmse": MeanSquaredError(squared=False), "loss": MeanSquaredError()})
