"""The metric that torchmetrics does not have. torchmetrics is slow to import, hence only where a metric is made."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric


def mean_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> "Metric":
    """Metric that is the mean of a loss over all examples seen, each batch weighted by its size.

    Args:
        loss: Maps (output, target) to the batch's mean loss.
    """
    from torchmetrics import Metric

    class MeanLoss(Metric):
        full_state_update = False
        total: Tensor
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

        def update(self, output: Tensor, target: Tensor) -> None:
            self.total += loss(output, target).double() * len(output)
            self.count += len(output)

        def compute(self) -> Tensor:
            return self.total / self.count

    return MeanLoss()
