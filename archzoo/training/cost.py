"""What a training step of a run costs, as its record says."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.budget import measure_cost
from archzoo.models.stacked import Stacked
from archzoo.tasks.task import Task
from archzoo.training.build import example_batch
from archzoo.training.config import TrainConfig
from archzoo.training.data import BatchOrder, train_batches


def batch_size(config: TrainConfig, task: Task) -> int:
    """Examples a forward pass: a batch size beyond the training split is the full batch."""
    return min(config.trainer.batch_size, len(task.train))  # type: ignore[arg-type]  # every split has a length


def cost_record(config: TrainConfig, task: Task, model: nn.Module) -> dict[str, Any]:
    """Measures a step on a copy of a float32 model on the CPU; the random generator is left as it was.

    FLOPs are those of the model's forward pass on one example. Bytes are those of a forward and a backward pass on a
    batch, and so of all that the task's or the model's training loss asks of the model. Where the
    model is of several seeds, all this is of one of them.
    """
    if isinstance(model, Stacked):
        model = model.member(0)
    size = batch_size(config, task)
    with torch.random.fork_rng(devices=[]):
        probe = copy.deepcopy(model).train()
        if type(task).training_loss is Task.training_loss and not hasattr(probe, "training_loss"):
            cost = measure_cost(probe, example_batch(task, size))
        else:
            inputs, targets = next(train_batches(task, task.train, BatchOrder(size, size, seed=0), workers=0))
            cost = measure_cost(_Objective(task, probe, targets), inputs, lambda loss: loss)
    return {
        "parameters": cost.parameters,
        "flops": cost.flops,
        "bytes_per_step": cost.traffic_bytes,
        "memory": {
            "saved_for_backward_bytes": cost.saved_bytes,
            "peak_rss_bytes": None,
            "peak_cuda_bytes": None,
        },
    }


class _Objective(nn.Module):
    """A task's training loss as a module; without gradients, as FLOPs are counted, the model's output."""

    def __init__(self, task: Task, model: nn.Module, targets: Tensor):
        super().__init__()
        self.task, self.model = task, model
        self.targets = targets.float() if targets.is_floating_point() else targets

    def forward(self, inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.model(inputs)
        return self.task.training_loss(self.model, inputs, self.targets)
