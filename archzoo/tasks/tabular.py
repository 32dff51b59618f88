"""Three small tables of real measurements that scikit-learn ships: no download."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archzoo.tasks.options import choice
from archzoo.tasks.split import random_split, stratified_split
from archzoo.tasks.task import ClassificationTask, TensorSplit, register_task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

DATASETS = ("wine", "breast_cancer", "diabetes")


@register_task("tabular")
class Tabular(ClassificationTask):
    """Features standardised by the training part's mean and deviation; a fifth each for validation and test.

    | dataset | examples | features | to predict | score |
    |---|---|---|---|---|
    | `wine` | 178 | 13 | grower, 3 classes | accuracy |
    | `breast_cancer` | 569 | 30 | malignant or benign | accuracy |
    | `diabetes` | 442 | 10 | progression after a year, 25 to 346 | rmse |

    Classes are split stratified. The progression is standardised too, and its loss is the mean squared error of that,
    so 1 - loss is the share of its variance that is explained. `rmse` is in the progression's own unit.

    Args:
        dataset: Which table.
        data_dir: Not needed.
        seed: Not needed: the split is the same in every run.

    Attributes:
        regression: Whether a number is to be predicted.
        target_mean, target_std: What the progression was standardised by; 0 and 1 where there are classes.

    Raises:
        ValueError: If there is no such dataset.
    """

    def __init__(self, *, dataset: str = "wine", data_dir: Path | None = None, seed: int = 0):
        super().__init__(data_dir=data_dir, seed=seed)
        self.dataset = choice("dataset", dataset, DATASETS)
        self.regression = dataset == "diabetes"
        from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

        if self.regression:
            features, values = load_diabetes(return_X_y=True, scaled=False)
            self.output_size, self.score, self.mode = 1, "rmse", "min"
        else:
            features, values = (load_wine if dataset == "wine" else load_breast_cancer)(return_X_y=True)
            self.output_size = len(set(values.tolist()))
        inputs = torch.tensor(features, dtype=torch.float64)
        targets = torch.tensor(values, dtype=torch.float64 if self.regression else torch.int64)
        self.input_shape = (inputs.shape[1],)

        held_out = round(len(inputs) / 5)
        if self.regression:
            parts = random_split(len(inputs), val=held_out, test=held_out)
        else:
            parts = stratified_split(targets, val=held_out, test=held_out)
        train = parts[0]
        inputs = ((inputs - inputs[train].mean(0)) / inputs[train].std(0)).float()
        self.target_mean, self.target_std = 0.0, 1.0
        if self.regression:
            self.target_mean, self.target_std = targets[train].mean().item(), targets[train].std().item()
            targets = ((targets - self.target_mean) / self.target_std).float().unsqueeze(1)
        self.train, self.val, self.test = (TensorSplit(inputs[part], targets[part]) for part in parts)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy of logits; mean squared error for `diabetes`, in units of the target's variance."""
        return nn.functional.mse_loss(output, target) if self.regression else super().loss(output, target)

    def metrics(self) -> "MetricCollection":
        """Accuracy and mean loss; for `diabetes` rmse, in the progression's own unit, and mean loss."""
        if not self.regression:
            return super().metrics()
        from torchmetrics import MeanSquaredError, MetricCollection

        rmse = self.target_std * MeanSquaredError(squared=False)
        return MetricCollection({"rmse": rmse, "loss": MeanSquaredError()})
