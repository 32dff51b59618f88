"""What tasks of made-up token sequences share: the stream, fixed sets, loss, accuracy, and the step that solved it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from archzoo.tasks.options import number, whole_number
from archzoo.tasks.split import SPLIT_SEED
from archzoo.tasks.stream import BlockStream, block_generator, stream_key
from archzoo.tasks.task import Task, TensorSplit

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

UNASKED = -100
"""Target of a position that is not asked about; `cross_entropy` leaves it out."""
MAX_LENGTH, MAX_VOCABULARY = 2**20, 2**16
MAX_TOKENS = 2**26
"""Most tokens that the inputs of a fixed set may hold: 512 MiB of int64, and as much for the targets."""
BLOCK_VALUES = 2**20
"""About as many values are drawn at once."""
TRAIN, VAL, TEST = range(3)


class Draw(Protocol):
    """Draws sequences of one length."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        ...

    @property
    def asked(self) -> int:
        """Positions of a sequence that have a target."""
        ...

    def __call__(self, rng: np.random.RandomState, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, each (rows, length) int64; targets are `UNASKED` where nothing is asked."""
        ...


class TokenStream(BlockStream):
    """Endless fresh sequences.

    Args:
        draw: Draws them.
        key: Key of the generator, of `stream_key`.
    """

    def __init__(self, draw: Draw, key: int):
        super().__init__(max(1, min(1024, BLOCK_VALUES // max(draw.length, draw.vocabulary))))
        self.draw, self.key = draw, key

    def draw_block(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a block."""
        inputs, targets = self.draw(block_generator(self.key, number), self.block)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def fixed_stream(draw: Draw, purpose: int) -> TokenStream:
    """The same sequences in every run, and others for another purpose."""
    return TokenStream(draw, stream_key(SPLIT_SEED, purpose))


def draw_distinct(rng: np.random.RandomState, rows: int, count: int, of: int) -> np.ndarray:
    """For each row, `count` different numbers below `of`, in random order: (rows, count) int64."""
    pool = np.tile(np.arange(of, dtype=np.int32), (rows, 1))
    left = of - np.arange(count)
    picked = np.arange(count) + (rng.random_sample((rows, count)) * left).astype(np.int64)
    row = np.arange(rows)
    for place in range(count):  # the first `count` steps of Fisher and Yates' shuffle, of all rows at once
        other = picked[:, place]
        chosen = pool[row, other]
        pool[row, other] = pool[:, place]
        pool[:, place] = chosen
    return pool[:, :count].astype(np.int64)


class TokenTask(Task):
    """A task whose samples are drawn, an endless stream, and whose answers stand at some positions of the output.

    Inputs are (length,) tokens, int64, and so are targets, -100 where nothing is asked. Validation and test sequences
    are the same in every run. The model gives logits (batch, length, vocabulary).

    Args:
        draw: Draws the sequences.
        eval_size: Sequences to validate on, and others to test on.
        threshold: Accuracy on the validation set from which on the task counts as solved.
        data_dir: Not needed.
        seed: Seed of the training sequences.
    """

    input_dtype = torch.int64
    score = "accuracy"
    mode: Literal["max", "min"] = "max"
    stream = True

    def __init__(self, draw: Draw, *, eval_size: int, threshold: float, data_dir: Path | None, seed: int):
        super().__init__(data_dir=data_dir, seed=seed)
        whole_number("eval_size", eval_size, 1, MAX_TOKENS // draw.length)
        self.draw: Draw = draw
        self.threshold = number("threshold", threshold, 0.0, 1.0)
        self.input_shape, self.output_size = (draw.length,), draw.vocabulary
        self.train = TokenStream(draw, stream_key(seed, TRAIN))
        self.val, self.test = (
            TensorSplit(*fixed_stream(draw, part).__getitems__(range(eval_size))) for part in (VAL, TEST)
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy in nats of logits (batch, length, vocabulary), over the positions that are asked about."""
        return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=UNASKED)

    def metrics(self) -> "MetricCollection":
        """The loss, the fraction of right answers, and, where a sequence asks several, of sequences without a mistake.

        They are `loss`, `accuracy` and `sequence_accuracy`.
        """
        from torchmetrics import MetricCollection

        from archzoo.tasks.metrics import mean_loss

        metrics = {"accuracy": mean_loss(accuracy), "loss": mean_loss(self.loss)}
        if self.draw.asked > 1:
            metrics["sequence_accuracy"] = mean_loss(sequence_accuracy)
        return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]  # a Metric is what it takes

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """Whether and when the task was solved.

        `success`: 1 if the validation accuracy was at the threshold or above at any evaluation. `solved_at`: the first
        evaluated step at which it was; absent where there is none.
        """
        solved = [e["step"] for e in evaluations if e["val/accuracy"] >= self.threshold]
        return {"success": float(bool(solved))} | ({"solved_at": float(min(solved))} if solved else {})


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of the answers (batch, length, vocabulary) whose likeliest token is the target's (batch, length)."""
    asked = target != UNASKED
    return ((output.argmax(-1) == target) & asked).sum().double() / asked.sum()


def sequence_accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of the sequences all of whose answers are right."""
    return ((output.argmax(-1) == target) | (target == UNASKED)).all(-1).double().mean()
