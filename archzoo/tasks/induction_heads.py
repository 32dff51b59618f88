"""Induction heads (Gu & Dao 2023, arXiv 2312.00752, section 4.1): what came behind this token before? At any length."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archzoo.tasks.options import whole_number
from archzoo.tasks.task import register_task
from archzoo.tasks.token_stream import (
    MAX_LENGTH,
    MAX_TOKENS,
    MAX_VOCABULARY,
    TEST,
    UNASKED,
    TokenTask,
    fixed_stream,
)

SPECIAL = 0
TOKENS = 2**14
"""Tokens that go through a model at once, where it takes a sequence piece by piece or there are many short ones."""
SCORES = 2**26
"""Most scores that a head of attention makes of such a piece and all tokens in front of it: 256 MiB of float32."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inductions:
    """Draws sequences at whose end the special token comes for the second time; see `InductionHeads`."""

    length: int
    symbols: int
    asked: int = 1

    @property
    def vocabulary(self) -> int:
        """The special token and the symbols."""
        return self.symbols + 1

    def __call__(self, rng: np.random.RandomState, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, each (rows, length) int64."""
        inputs = rng.randint(1, self.symbols + 1, (rows, self.length))
        first, row = rng.randint(0, self.length - 2, rows), np.arange(rows)
        inputs[row, first] = inputs[:, -1] = SPECIAL
        targets = np.full((rows, self.length), UNASKED)
        targets[:, -1] = inputs[row, first + 1]
        return inputs, targets


@register_task("induction_heads")
class InductionHeads(TokenTask):
    """Say the token that came behind the special one: does the model recall by context, at lengths it never saw?

    A sequence is of random symbols; at a random place the special token stands among them, and once more at the end,
    where the answer is the symbol that came behind it the first time. The trained model is then asked the same of
    sequences of other lengths, most of them longer.

    Tokens: the special one 0, symbols from 1 on.

    The defaults are made for a small machine. The paper: length 256, a vocabulary of 16 (symbols 15), test lengths of
    2^6 to 2^20; two layers of width 64, 25 times 8192 steps of 8 sequences.

    Args:
        length: Tokens of a training, validation or test sequence.
        symbols: Different symbols.
        test_lengths: Lengths at which the model is tried at the end of training; may be empty.
        test_size: Sequences of each of these lengths.
        eval_size: Sequences to validate on, and others to test on.
        threshold: Accuracy on the validation set from which on the task counts as solved.
        data_dir: Not needed.
        seed: Seed of the training sequences.

    Raises:
        ValueError: If an option is out of range.
    """

    draw: Inductions

    def __init__(
        self,
        *,
        length: int = 32,
        symbols: int = 8,
        test_lengths: Sequence[int] = (64, 128, 256, 512),
        test_size: int = 100,
        eval_size: int = 1000,
        threshold: float = 0.99,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        whole_number("length", length, 3, MAX_LENGTH)
        whole_number("symbols", symbols, 1, MAX_VOCABULARY)
        if not isinstance(test_lengths, list | tuple):
            raise ValueError(f"test_lengths={test_lengths!r}: must be a list of lengths, as [64, 128]")
        self.test_lengths = sorted({whole_number("test_lengths", n, 3, MAX_LENGTH) for n in test_lengths})
        longest = self.test_lengths[-1] if self.test_lengths else 1
        self.test_size = whole_number("test_size", test_size, 1, MAX_TOKENS // longest)
        draw = Inductions(length, symbols)
        super().__init__(draw, eval_size=eval_size, threshold=threshold, data_dir=data_dir, seed=seed)

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """Whether and when the task was solved, and the accuracy at each test length of the model as it ended.

        `success`, `solved_at`: see `TokenTask.summarize`. `accuracy_at_N`: for each test length N; absent from the
        first length on that the model refuses, or for which a GPU's memory does not suffice. Then `untested_lengths`
        has these lengths, and `untested_because` says why.
        """
        summary = super().summarize(evaluations, model)
        for i, length in enumerate(self.test_lengths):
            try:
                summary[f"accuracy_at_{length}"] = self.accuracy_at(length, model)
            except (ValueError, torch.OutOfMemoryError) as error:
                if length <= self.draw.length:
                    raise
                summary |= {"untested_lengths": self.test_lengths[i:], "untested_because": str(error)}
                log.warning("test length %d and beyond: the model does not take them (%s)", length, error)
                break
        return summary

    @torch.no_grad()
    def accuracy_at(self, length: int, model: nn.Module) -> float:
        """Fraction of right answers to the `test_size` sequences of a length, the same in every run.

        A `CausalLM` takes long sequences piece by piece, so that memory is what its cache needs; any other model takes
        one at a time, whole.
        """
        stream = fixed_stream(dataclasses.replace(self.draw, length=length), TEST + length)
        device = next(model.parameters()).device
        right, rows = 0, max(1, TOKENS // length)
        training = model.training
        model.eval()
        try:
            for start in range(0, self.test_size, rows):
                inputs, targets = stream.__getitems__(range(start, min(start + rows, self.test_size)))
                answers = _answers(model, inputs.to(device)).argmax(-1).cpu()
                right += int((answers == targets[:, -1]).sum())
        finally:
            model.train(training)
        return right / self.test_size


def _answers(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (rows, vocabulary) behind sequences (rows, length)."""
    from archzoo.models.generation import CausalLM

    if not isinstance(model, CausalLM):
        logits: Tensor = model(ids)
        return logits[:, -1]
    cache = model.new_cache()
    for piece in ids.split(min(TOKENS, max(1, SCORES // ids.shape[1])), 1):
        answers = model.next_logits(piece, cache)
    return answers
