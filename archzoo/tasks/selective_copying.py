"""Selective copying (Gu & Dao 2023, arXiv 2312.00752, section 4.1): remember some tokens in the midst of noise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from archzoo.tasks.options import whole_number
from archzoo.tasks.task import register_task
from archzoo.tasks.token_stream import MAX_LENGTH, MAX_VOCABULARY, UNASKED, TokenTask, draw_distinct

NOISE = 0


@dataclass(frozen=True)
class Copies:
    """Draws sequences of noise with data tokens in it, then a marker for each; see `SelectiveCopying`."""

    positions: int
    data: int
    symbols: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.positions + self.data

    @property
    def vocabulary(self) -> int:
        """Noise, symbols, marker."""
        return self.symbols + 2

    @property
    def asked(self) -> int:
        """Positions of a sequence that have a target."""
        return self.data

    def __call__(self, rng: np.random.RandomState, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, each (rows, length) int64."""
        places = np.sort(draw_distinct(rng, rows, self.data, self.positions))
        tokens = rng.randint(1, self.symbols + 1, (rows, self.data))
        inputs = np.full((rows, self.length), NOISE)
        np.put_along_axis(inputs, places, tokens, 1)
        inputs[:, self.positions :] = self.symbols + 1
        targets = np.full((rows, self.length), UNASKED)
        targets[:, self.positions :] = tokens
        return inputs, targets


@register_task("selective_copying")
class SelectiveCopying(TokenTask):
    """Repeat the data tokens of a sequence of noise, in their order: does the model choose what it remembers?

    `data` tokens, each one of `symbols`, lie at random among `length` positions, noise at all others. Then come as many
    markers, and the answer to marker i is data token i. As the gaps differ from sequence to sequence, a model that
    treats all tokens alike, as a time-invariant state space or a convolution does, cannot tell data from noise.

    Tokens: noise 0, symbols from 1 on, then the marker, as in the code of S4, from which this task comes: the paper's
    own was never published. A sequence has length + data tokens, and the vocabulary symbols + 2.

    The defaults are made for a small machine. The paper: length 4096, data 16, a vocabulary of 16 (symbols 14); two
    layers of width 64, 4e5 steps of 64 sequences at a constant rate of 1e-4.

    Args:
        length: Positions in front of the markers.
        data: Data tokens of a sequence.
        symbols: Different data tokens.
        eval_size: Sequences to validate on, and others to test on.
        threshold: Accuracy on the validation set from which on the task counts as solved.
        data_dir: Not needed.
        seed: Seed of the training sequences.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        length: int = 16,
        data: int = 3,
        symbols: int = 6,
        eval_size: int = 1000,
        threshold: float = 0.97,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        whole_number("length", length, 1, MAX_LENGTH // 2)
        whole_number("data", data, 1, length)
        whole_number("symbols", symbols, 1, MAX_VOCABULARY)
        draw = Copies(length, data, symbols)
        super().__init__(draw, eval_size=eval_size, threshold=threshold, data_dir=data_dir, seed=seed)
