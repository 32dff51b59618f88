"""Multi-query associative recall, MQAR (Arora et al. 2023, "Zoology", arXiv 2312.04927): the values of many keys."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from archzoo.tasks.options import number, whole_number
from archzoo.tasks.task import register_task
from archzoo.tasks.token_stream import MAX_LENGTH, MAX_VOCABULARY, UNASKED, TokenTask, draw_distinct

FILLER = 0


@dataclass(frozen=True)
class Recalls:
    """Draws sequences of key-value pairs with queries behind them; see `AssociativeRecall`."""

    length: int
    pairs: int
    asked: int
    vocabulary: int
    power: float

    def __call__(self, rng: np.random.RandomState, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, each (rows, length) int64."""
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + draw_distinct(rng, rows, self.pairs, half - 1)
        values = half + draw_distinct(rng, rows, self.pairs, self.vocabulary - half)
        inputs, targets = np.full((rows, self.length), FILLER), np.full((rows, self.length), UNASKED)
        inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values

        # Slots without replacement, each with a chance in proportion to its weight: the first ones to ring, if the
        # alarm of each has that rate.
        slots = (self.length - context) // 2
        weights = np.arange(1, slots + 1) ** (self.power - 1)
        alarms = rng.standard_exponential((rows, slots)) / weights
        places = context + 2 * np.argsort(alarms, axis=1, kind="stable")[:, : self.asked]

        which = draw_distinct(rng, rows, self.asked, self.pairs)
        np.put_along_axis(inputs, places, np.take_along_axis(keys, which, 1), 1)
        np.put_along_axis(targets, places, np.take_along_axis(values, which, 1), 1)
        return inputs, targets


@register_task("associative_recall")
class AssociativeRecall(TokenTask):
    """Say the values of keys that a sequence has shown before: how many pairs does the model remember?

    A sequence begins with `pairs` pairs of a key and its value. Some of the keys come once more behind them, and the
    answer to such a query, at its own position, is the key's value. Attention looks it up; a recurrent state must hold
    all pairs, so that more of them need a larger one.

    Queries lie at every second position at most. The gap of one from the pairs follows a power law, as that of repeated
    bigrams does in text. All else is filler. Tokens: filler 0, keys up to vocab // 2 - 1, then values. No key and no
    value is in a sequence twice, as in the authors' code, where moreover every key is queried.

    The defaults are made for a small machine. The paper, figure 2: vocab 8192, and (length, pairs) of (64, 4),
    (128, 8), (256, 16) and (512, 64); two layers of attention, four of others, of widths 64 to 512, 64 passes over
    100,000 sequences at the best of four learning rates.

    Args:
        length: Tokens of a sequence.
        pairs: Key-value pairs of a sequence.
        queries: Queries of a sequence, of different keys. None: of every key, as in the paper.
        vocab: Number of tokens: filler, keys and values.
        power: Exponent a of the gap's density a x^(a-1); 1 is uniform, and nearer to 0 are shorter gaps.
        eval_size: Sequences to validate on, and others to test on.
        threshold: Accuracy on the validation set from which on the task counts as solved.
        data_dir: Not needed.
        seed: Seed of the training sequences.

    Raises:
        ValueError: If an option is out of range, there are too few tokens for the pairs, or too few positions.
    """

    def __init__(
        self,
        *,
        length: int = 16,
        pairs: int = 4,
        queries: int | None = None,
        vocab: int = 32,
        power: float = 0.01,
        eval_size: int = 1000,
        threshold: float = 0.99,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        whole_number("length", length, 4, MAX_LENGTH)
        whole_number("pairs", pairs, 1, MAX_VOCABULARY // 2 - 1)
        asked = pairs if queries is None else whole_number("queries", queries, 1, pairs)
        whole_number("vocab", vocab, 2 * pairs + 2, MAX_VOCABULARY)
        number("power", power, 0.0, 10.0)
        if length < 2 * (pairs + asked):
            raise ValueError(
                f"length={length}: must be {2 * (pairs + asked)} or more, two for each of pairs={pairs} and of "
                f"{asked} queries"
            )
        draw = Recalls(length, pairs, asked, vocab, power)
        super().__init__(draw, eval_size=eval_size, threshold=threshold, data_dir=data_dir, seed=seed)
