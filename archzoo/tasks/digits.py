"""Handwritten digits, 8 x 8 pixels: the UCI set of 1,797 that scikit-learn ships. Real data, and no download."""

from pathlib import Path

import torch

from archzoo.tasks.split import stratified_split
from archzoo.tasks.task import ClassificationTask, TensorSplit, register_task


@register_task("digits")
class Digits(ClassificationTask):
    """Pixels scaled to [-1, 1]; stratified splits of 1,197 train, 300 validation and 300 test images.

    Args:
        data_dir: Not needed.
        seed: Not needed: the split is the same in every run.
    """

    input_shape = (1, 8, 8)
    output_size = 10

    def __init__(self, *, data_dir: Path | None = None, seed: int = 0):
        super().__init__(data_dir=data_dir, seed=seed)
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        targets = torch.tensor(labels, dtype=torch.int64)
        train, val, test = stratified_split(targets, val=300, test=300)
        self.train = TensorSplit(inputs[train], targets[train])
        self.val = TensorSplit(inputs[val], targets[val])
        self.test = TensorSplit(inputs[test], targets[test])
