"""Metrics that torchmetrics does not have. Imported only when a job runs, for torchmetrics is slow to import."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Mean of a loss over all examples seen, each batch weighted by its size.

    Args:
        loss: Maps (output, target) to the batch's mean loss.
    """

    full_state_update = False

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.loss = loss
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Adds a batch."""
        self.total += self.loss(output, target).double() * len(output)
        self.count += len(output)

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.count
