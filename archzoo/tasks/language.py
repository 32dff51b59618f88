"""What tasks of language modelling share: loss, metrics, and the way from text to the numbers of its bytes and back."""

import math
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from archzoo.tasks.task import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

LONGEST = 2**14
"""Tokens of a window at most."""


class LanguageTask(Task):
    """The next byte at every position of a window of text. A subclass sets `vocabulary`, `score` and the splits.

    Inputs are (context,) ids, int64, and targets those one place further. The model gives (batch, context, V) logits.

    Attributes:
        vocabulary: The V distinct bytes, in the order of their ids.
    """

    input_dtype = torch.int64
    mode: Literal["max", "min"] = "min"
    vocabulary: bytes

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy in nats of logits (batch, length, V) against ids (batch, length)."""
        return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())

    def metrics(self) -> "MetricCollection":
        """The loss in nats, the same in bits under the name of the score, and the fraction that are the likeliest."""
        from torchmetrics import MetricCollection

        from archzoo.tasks.metrics import mean_loss

        def bits(output: Tensor, target: Tensor) -> Tensor:
            return self.loss(output, target) / math.log(2)

        def accuracy(output: Tensor, target: Tensor) -> Tensor:
            return (output.argmax(-1) == target).double().mean()

        return MetricCollection(
            {self.score: mean_loss(bits), "loss": mean_loss(self.loss), "accuracy": mean_loss(accuracy)},
            compute_groups=False,
        )

    @cached_property
    def _ids(self) -> Tensor:
        """The id of each of the 256 bytes, -1 where it has none."""
        ids = torch.full((256,), -1, dtype=torch.int64)
        ids[list(self.vocabulary)] = torch.arange(len(self.vocabulary))
        return ids

    def encode(self, text: str | bytes) -> Tensor:
        """The ids (length,) of a text, int64; a string as UTF-8.

        Raises:
            ValueError: If it has a byte that is not in the vocabulary.
        """
        data = text.encode() if isinstance(text, str) else text
        ids = self._ids[list(data)] if data else torch.empty(0, dtype=torch.int64)
        if (ids < 0).any():
            place = int((ids < 0).nonzero()[0])
            raise ValueError(
                f"text={text!r}: byte {data[place : place + 1]!r} at place {place} does not occur in the corpus; use "
                f"its {len(self.vocabulary)} bytes only: {self.vocabulary!r}"
            )
        return ids

    def decode(self, ids: Tensor) -> str:
        """The text of ids (length,), bytes that are no UTF-8 as U+FFFD each.

        Raises:
            ValueError: If they are no ids of this task.
        """
        if ids.dim() != 1 or ids.is_floating_point():
            raise ValueError(f"ids of shape {tuple(ids.shape)} and {ids.dtype}: must be whole numbers (length,)")
        numbers = ids.tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self.vocabulary):
            raise ValueError(f"ids from {min(numbers)} to {max(numbers)}: must be 0 to {len(self.vocabulary) - 1}")
        return bytes(self.vocabulary[number] for number in numbers).decode(errors="replace")
