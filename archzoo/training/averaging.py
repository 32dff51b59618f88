"""A moving average of a model's weights."""

import copy

import torch
from torch import Tensor, nn

from archzoo.training.spreading import local


class Average:
    """An exponential moving average of all numbers in a model's state dict; counts in it are the model's own.

    timm's and torch's copy the model that they average and update whole tensors; of a sharded one neither can be had.

    Args:
        model: What it starts from. Where it is to be sharded, it is not yet: the copy is sharded beside it.
        decay: Weight of the average at every update; that of the first step takes the model as it is.

    Attributes:
        module: The averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the model after a step, counted from 1. Each process averages its part."""
        own: list[Tensor] = []
        new: list[Tensor] = []
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                own.append(local(average))
                new.append(local(value))
            else:
                average.copy_(value)
        torch._foreach_lerp_(own, new, weight=1 - self.decay if step > 1 else 1.0)

    def restart(self, model: nn.Module) -> None:
        """Begins anew as a copy of the model, whose structure is the same."""
        self.module.load_state_dict(model.state_dict())  # which tells layers, as of their grids, unlike a mere copy
